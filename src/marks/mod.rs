//! Page marks, and what keeps them from being missed.
//!
//! * this file: software dirty bits, by which CPU threads mark the pages that they wrote. The pages
//!   that an abort, a stop or an unmap put back are marks of the same kind
//! * [`ordering`]: the fences that order marks with copies
//! * [`in_flight`]: writes that have begun and are not marked yet
//! * [`pending`]: the pages that are pending for a consumer
//! * [`sharing`]: marks that a harvest takes and leaves to other consumers
//! * [`gone`]: the unmapped parts of an area that was cut, for marks that come late
//! * [`zeros`]: pages that read as zero since they were discarded
//!
//! # The race between a mark and a copy
//! A mark of a page that is marked already should cost a load, not a locked operation. That makes
//! the race one of *store buffering* (Dekker): the writer stores data and then loads the mark,
//! while the harvester clears the mark and then loads the data. Each side puts a full fence between
//! its two steps:
//!
//! ```text
//!  writer                                    harvester
//!  W1  store data                            H1  clear the mark            (ChunkMap::take)
//!  F1  fence(SeqCst)                         F2  fence(SeqCst)             (Lease::sync)
//!  W2  load the mark; set it if it is clear  H2  copy the page
//! ```
//!
//! Either F1 or F2 comes first in the one order of all SeqCst fences:
//! - if F1 comes first, H2 sees the store of W1, so the copy has the data;
//! - if F2 comes first, W2 sees the clear of H1, so it sets the mark again for the next harvest.
//!
//! Instead of F1, the thread that copies can run a fence in all other threads: see
//! [`ordering`].
//!
//! A CPU that has loaded "marked" thus plays the part of an IOTLB entry, and the fence in `sync` is
//! its flush.

mod crossing;
mod flights;
mod gone;
mod in_flight;
mod ordering;
mod pending;
mod sharing;
mod zeros;

#[cfg(all(test, dirtymap_loom))]
#[allow(clippy::unwrap_used)] // helpers of tests
mod loom_tests;

pub(crate) use flights::{Flight, Flights};
pub(crate) use in_flight::{FlightSlot, InFlight};
pub use ordering::MarkOrdering;
pub(crate) use pending::Pending;
pub(crate) use zeros::Zeros;

use std::convert::Infallible;
use std::ptr::NonNull;

use crate::bitmap::Sink;
use crate::chunkmap::{ChunkMap, Handed, OneGroup, Place, Taker, Visitor};
use crate::error::{BitmapError, Stopped};
use crate::sync::{AtomicBool, OnceBox, OnceLock, Ordering, Step, TINY, performs};
use crate::units::{Granule, Iova, IovaRange};
use crate::words::word_runs;
use gone::Gone;

/// All addresses. Fewer in the model checker, where a bitmap of all of them would be dozens of
/// levels deep.
pub(crate) fn every_address() -> IovaRange {
    if TINY {
        IovaRange::ascending(Iova::MIN, Iova::new(0x3_ffff))
    } else {
        IovaRange::ALL
    }
}

/// Dirty bits in the library's own memory, one for each smallest page. They serve as the marks of
/// an area, and as the put-back store of a domain. Few words, because each area has them.
#[derive(Debug)]
pub(crate) struct Marks {
    /// The address of the first page.
    start: Iova,
    page: Granule,
    ordering: MarkOrdering,
    bits: ChunkMap,
    /// Apart, because most areas have none of it.
    rare: OnceBox<Rare>,
    /// Whether there are zeros.
    has_zeros: AtomicBool,
}

/// What an area has from its first cut or discard on.
#[derive(Debug, Default)]
struct Rare {
    /// The parts of the area that have left the tree, from its first cut on. The state of the area
    /// orders this field.
    gone: OnceLock<Gone>,
    /// The pages of the area that read as zero, from its first discard on.
    zeros: OnceLock<Zeros>,
}

impl Marks {
    /// Clean marks for `range`, which is made of whole pages of size `page`. Allocates no bitmap
    /// memory.
    pub(crate) fn new(range: IovaRange, page: Granule, ordering: MarkOrdering) -> Self {
        Self::with(range, page, ordering, ChunkMap::in_slabs)
    }

    /// The same, for a range in which few pages are ever marked.
    pub(crate) fn few(range: IovaRange, page: Granule) -> Self {
        Self::with(range, page, MarkOrdering::Fences, ChunkMap::new)
    }

    fn with(
        range: IovaRange,
        page: Granule,
        ordering: MarkOrdering,
        bits: fn(u64) -> ChunkMap,
    ) -> Self {
        debug_assert!(range.is_aligned(page));
        let (_, last) = pages(range.start(), page, range);
        Marks {
            start: range.start(),
            page,
            ordering,
            bits: bits(last),
            rare: OnceBox::new(),
            has_zeros: AtomicBool::new(false),
        }
    }

    /// The same, for pages anywhere.
    pub(crate) fn everywhere(page: Granule) -> Self {
        Marks::few(every_address(), page)
    }

    /// All pages that these marks are for.
    #[inline]
    pub(crate) fn range(&self) -> IovaRange {
        let last = self.page_at(self.bits.last()).get() | self.page.mask();
        IovaRange::ascending(self.start, Iova::new(last))
    }

    /// Marks the pages that `range` touches, as far as they lie in the range of these marks. The
    /// data was written before the call. Lock-free.
    pub(crate) fn mark(&self, range: IovaRange) {
        if let Some(inside) = range.intersection(self.range()) {
            self.mark_inside(inside);
        }
    }

    /// Marks the pages that `range` touches; all of `range` lies in the range of these marks. The
    /// data was written before the call. Lock-free.
    #[inline]
    pub(crate) fn mark_inside(&self, range: IovaRange) {
        debug_assert!(self.range().covers(range));
        let (first, last) = pages(self.start, self.page, range);
        // A mark that is set here is followed by F3 of the protocols in `space::unmap` and
        // `space::attachment`: a full fence before the look at the area, in `Slot::set_word`.
        self.bits.set(first, last, || self.ordering.before_look());
    }

    /// As [`mark_inside`](Self::mark_inside), out of the way of marks of a page.
    #[inline(never)]
    fn mark_many(&self, range: IovaRange) {
        self.mark_inside(range);
    }

    /// Prepares for a cut of the area, from which on parts of it may leave the tree one by one.
    ///
    /// The thread that cuts an area first has claimed it, so no other thread calls this at the same
    /// time.
    pub(crate) fn come_apart(&self) {
        self.rare_or_new().gone.get_or_init(Gone::new);
    }

    fn rare_or_new(&self) -> &Rare {
        self.rare.get_or_init(Rare::default)
    }

    fn gone(&self) -> Option<&Gone> {
        self.rare.get()?.gone.get()
    }

    /// Records that `range`, an area or a piece of one, has left the tree. Does nothing for an area
    /// that was never cut: a thread that has marked such an area looks at the area's state instead.
    pub(crate) fn say_gone(&self, range: IovaRange) {
        if let Some(gone) = self.gone()
            && performs(Step::SayGone)
        {
            gone.add(range);
        }
    }

    /// The pages of the area that read as zero; `None` before its first discard.
    pub(crate) fn zeros(&self) -> Option<&Zeros> {
        // Acquire: pairs with the Release in `zeros_or_new`; publishes the bitmap.
        let zeros = self.has_zeros.load(Ordering::Acquire);
        zeros.then(|| self.rare.get()?.zeros.get())?
    }

    /// The same, for a discard.
    pub(crate) fn zeros_or_new(&self) -> &Zeros {
        let zeros = &self.rare_or_new().zeros;
        let zeros = zeros.get_or_init(|| Zeros::new(self.range(), self.page));
        // Release: pairs with the Acquire in `zeros`. Acquire: another discard may have made it.
        self.has_zeros.swap(true, Ordering::AcqRel);
        zeros
    }

    /// Visits the parts of `range` that have left the tree since the area was cut, in ascending
    /// order.
    #[cold]
    pub(crate) fn gone_in(&self, range: IovaRange, visit: impl FnMut(IovaRange)) {
        if let Some(gone) = self.gone() {
            gone.parts(range, visit);
        }
    }

    /// Moves the marks of `range` into `sink`: records each, then clears it.
    pub(crate) fn read_and_clear(
        &self,
        range: IovaRange,
        sink: &mut Sink<'_>,
    ) -> Result<(), Stopped> {
        let Some((first, last)) = self.bits_of(range) else {
            return Ok(());
        };
        self.bits
            .take(first, last, Recorder::new(self, range, sink))
    }

    /// The address of the page of `bit`.
    fn page_at(&self, bit: u64) -> Iova {
        Iova::new(self.start.get() + (bit << self.page.lg2()))
    }

    /// The error for a walk that stopped at the word that begins with `bit`.
    #[cold]
    fn stopped(&self, bit: u64, range: IovaRange, error: BitmapError) -> Stopped {
        let at = self.page_at(bit).max(range.start());
        let error = error.into();
        Stopped { at, error }
    }

    /// Records the marks of `range` in `sink` and leaves them set.
    pub(crate) fn peek(&self, range: IovaRange, sink: &mut Sink<'_>) -> Result<(), Stopped> {
        let Some((first, last)) = self.bits_of(range) else {
            return Ok(());
        };
        self.bits.peek(first, last, |bit, mask| {
            let recorded = sink.put_mask(self.page_at(bit), self.page, mask);
            recorded.map_err(|error| self.stopped(bit, range, error))
        })
    }

    /// Marks pages of a chunk, in marks that begin at address 0: see [`ChunkMap::set_handed`]. The
    /// caller has performed F1 after all that the marks stand for.
    pub(crate) fn mark_handed(&self, chunk: u64, handed: Handed<'_>) {
        debug_assert!(self.start == Iova::MIN);
        self.bits.set_handed(chunk, handed);
    }

    /// The bytes of the pages of bitmap that were allocated; not of slabs.
    pub(crate) fn held_bytes(&self) -> u64 {
        self.bits.held_bytes()
    }

    /// As [`peek`](Self::peek), without trust in summaries, which another harvest may have cleared:
    /// see `harvest::shared`.
    pub(crate) fn peek_all(&self, range: IovaRange, sink: &mut Sink<'_>) -> Result<(), Stopped> {
        let Some((first, last)) = self.bits_of(range) else {
            return Ok(());
        };
        self.bits.peek_all(first, last, |bit, mask| {
            let recorded = sink.put_mask(self.page_at(bit), self.page, mask);
            recorded.map_err(|error| self.stopped(bit, range, error))
        })
    }

    /// Visits the words of `range` that have marks, without trust in summaries.
    pub(crate) fn visit_all(&self, range: IovaRange, visit: &mut impl FnMut(Iova, u64)) {
        let Some((first, last)) = self.bits_of(range) else {
            return;
        };
        let Ok(()) = self
            .bits
            .peek_all(first, last, |bit, mask| -> Result<(), Infallible> {
                visit(self.page_at(bit), mask);
                Ok(())
            });
    }

    /// Clears the marks of `range`, which is made of whole pages. Returns how many there were.
    pub(crate) fn clear(&self, range: IovaRange) -> u64 {
        let mut pages = 0;
        self.take(range, |_, mask| pages += u64::from(mask.count_ones()));
        pages
    }

    /// Clears the marks of `range` and hands them to `taker`, as the address of a page and a mask
    /// of the pages from there on.
    pub(crate) fn take(&self, range: IovaRange, mut taker: impl FnMut(Iova, u64)) {
        let Some((first, last)) = self.bits_of(range) else {
            return;
        };
        let Ok(()) = self
            .bits
            .take(first, last, |bit, mask| -> Result<(), Infallible> {
                taker(self.page_at(bit), mask);
                Ok(())
            });
    }

    /// The marks of `range`, as runs in ascending order; leaves them set.
    pub(crate) fn runs(&self, range: IovaRange) -> Vec<IovaRange> {
        let mut runs = Vec::new();
        if let Some((first, last)) = self.bits_of(range) {
            let Ok(()) = self
                .bits
                .peek(first, last, |bit, mask| -> Result<(), Infallible> {
                    self.add_runs(self.page_at(bit), mask, &mut runs);
                    Ok(())
                });
        }
        runs
    }

    /// Clears the marks of `range` and returns them as runs in ascending order.
    ///
    /// A thread that moves marks takes them first and then sets them in the other place. A marker
    /// that finds its page marked here, and therefore sets nothing, came before the taking, so it
    /// also came before the setting.
    pub(crate) fn take_runs(&self, range: IovaRange) -> Vec<IovaRange> {
        let mut runs = Vec::new();
        self.take(range, |start, mask| self.add_runs(start, mask, &mut runs));
        runs
    }

    /// Adds the pages of `mask`, from the one at `start` on, to `runs`.
    pub(crate) fn add_runs(&self, start: Iova, mask: u64, runs: &mut Vec<IovaRange>) {
        for (first, last) in word_runs(mask) {
            let page = |n: u32| Iova::new(start.get() + (u64::from(n) << self.page.lg2()));
            let last = page(last).granule_last(self.page);
            runs.push(IovaRange::ascending(page(first), last));
        }
    }

    /// The bits of the pages that `range` touches.
    fn bits_of(&self, range: IovaRange) -> Option<(u64, u64)> {
        let inside = range.intersection(self.range())?;
        Some(pages(self.start, self.page, inside))
    }
}

/// The visitor by which a harvest takes marks.
struct Recorder<'r, 'b> {
    marks: &'r Marks,
    /// The range of the request.
    range: IovaRange,
    /// The word of the sink that corresponds to word 0 of the marks, modulo 2^64; `None` if the two
    /// bitmaps divide the pages into words differently.
    word: Option<u64>,
    sink: &'r mut Sink<'b>,
}

impl<'r, 'b> Recorder<'r, 'b> {
    #[inline]
    fn new(marks: &'r Marks, range: IovaRange, sink: &'r mut Sink<'b>) -> Self {
        // Whole words can be copied if both bitmaps divide the pages into words in the same way.
        let whole = sink.range().covers(range.round_out(marks.page));
        let word = whole.then(|| sink.first_word(marks.start, marks.page));
        Recorder {
            marks,
            range,
            word: word.flatten(),
            sink,
        }
    }
}

impl Visitor for Recorder<'_, '_> {
    type Error = Stopped;

    #[inline]
    fn visit(&mut self, first: u64, mask: u64) -> Result<(), Stopped> {
        let marks = self.marks;
        if !performs(Step::RecordMarks) {
            return Ok(());
        }
        let recorded = match self.word {
            Some(word) => self.sink.or(word.wrapping_add(first / 64), mask),
            None => self.sink.put_mask(marks.page_at(first), marks.page, mask),
        };
        recorded.map_err(|error| marks.stopped(first, self.range, error))
    }

    #[inline]
    fn place(&self, first: u64, words: u64) -> Place<'_> {
        match self.word {
            Some(word) if performs(Step::RecordMarks) => {
                self.sink.place(word.wrapping_add(first / 64), words)
            }
            _ => Place::NONE,
        }
    }

    #[inline]
    fn placed(&mut self, bits: u64) {
        self.sink.count_set(bits);
    }
}

impl Taker for Recorder<'_, '_> {
    #[inline]
    fn may_fail(&self) -> bool {
        self.sink.may_fail()
    }

    fn secure(&mut self, first: u64, last: u64) -> Result<bool, Stopped> {
        // The last line may extend past the last page.
        let bits = u128::from(last - first) + 1;
        let start = self.marks.page_at(first);
        let end = u128::from(start.get()) + (bits << self.marks.page.lg2()) - 1;
        let last = u64::try_from(end).map_or(Iova::MAX, Iova::new);
        let secured = self.sink.secure(IovaRange::ascending(start, last));
        secured.map_err(|error| self.marks.stopped(first, self.range, error))
    }
}

/// A short path to the words of the marks of an area: for an area that is marked often. Valid while
/// the marks live.
#[derive(Clone, Copy, Debug)]
pub(crate) struct NearMarks {
    group: OneGroup,
    /// The part of the marks that belongs to the area.
    range: IovaRange,
    base: Iova,
    page: Granule,
    /// The bits of an address that select its page.
    above_page: u64,
    ordering: MarkOrdering,
    marks: NonNull<Marks>,
}

// SAFETY: a reference to marks, which are shared between threads, and to their words. It is
// followed only by `mark`, whose caller keeps the marks alive.
unsafe impl Send for NearMarks {}
// SAFETY: as for `Send`.
unsafe impl Sync for NearMarks {}

impl NearMarks {
    /// `None` if the area has too many pages for one group. Allocates the group: see [`ChunkMap`].
    pub(crate) fn new(marks: &Marks, range: IovaRange) -> Option<Self> {
        Some(NearMarks {
            group: marks.bits.one_group()?,
            range: range.intersection(marks.range())?,
            base: marks.start,
            page: marks.page,
            above_page: !marks.page.mask(),
            ordering: marks.ordering,
            marks: NonNull::from(marks),
        })
    }

    /// The same as [`Marks::mark_inside`], if `range` lies in the area. Returns whether it does; if
    /// not, nothing is marked.
    ///
    /// # Safety
    /// The marks live, where they were in `new`.
    #[inline(always)]
    pub(crate) unsafe fn mark(&self, range: IovaRange) -> bool {
        let (start, last) = (range.start().get(), range.last().get());
        if !self.range.covers(range) {
            return false;
        }
        if (start ^ last) & self.above_page != 0 {
            // SAFETY: the marks live, by the caller.
            unsafe { self.marks.as_ref() }.mark_many(range);
            return true;
        }
        let bit = (start - self.base.get()) >> self.page.lg2();
        let before_look = || self.ordering.before_look();
        // SAFETY: the marks live, by the caller. The group belongs to their bits (see `new`), which
        // have one for each page of the area.
        unsafe { self.group.set(bit, before_look) };
        true
    }
}

/// The numbers of the first and the last page that `range` touches; page 0 begins at `base`.
#[inline]
fn pages(base: Iova, page: Granule, range: IovaRange) -> (u64, u64) {
    let number = |iova: Iova| (iova.get() - base.get()) >> page.lg2();
    (number(range.start()), number(range.last()))
}
