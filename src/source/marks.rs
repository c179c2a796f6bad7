//! Software dirty bits: CPU threads say which pages they wrote.
//!
//! # The race, and why it is won
//! A page that is marked already should cost a load, not a locked operation. But then the writer stores data and
//! *reads* the mark, while the harvester clears the mark and *reads* the data. Each side puts a full fence between
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
//! - if F1 does, H2 reads after F2 and sees the store of W1: the copy has the data;
//! - if F2 does, W2 reads after F1 and sees the clear of H1: the mark is set anew, for the next harvest.
//!
//! Instead of F1, the one who copies can run a fence in all other threads: see [`ordering`](super::ordering).
//!
//! A CPU that believes "already dirty" is thus an IOTLB entry, and the fence in `sync` is its flush.

use crate::bitmap::{ChunkMap, LINE_WORDS, OneGroup, Sink, Visitor, word_runs};
use crate::error::Error;
use crate::source::{MarkOrdering, Stopped};
use crate::sync::{Arc, Step, performs};
use crate::units::{Granule, Iova, IovaRange};

/// Dirty bits in memory of our own, one for each smallest page: the marks of an area, and what is kept for a domain.
#[derive(Debug)]
pub(crate) struct Marks {
    range: IovaRange,
    page: Granule,
    ordering: MarkOrdering,
    bits: ChunkMap,
}

impl Marks {
    /// Clean marks for `range`, which is made of whole pages of size `page`. Allocates nothing.
    pub(crate) fn new(range: IovaRange, page: Granule, ordering: MarkOrdering) -> Self {
        let (_, last) = pages(range.start(), page, range);
        Marks {
            range,
            page,
            ordering,
            bits: ChunkMap::in_slabs(last),
        }
    }

    /// As [`new`](Self::new), for a range of which little is ever marked.
    pub(crate) fn few(range: IovaRange, page: Granule) -> Self {
        let (_, last) = pages(range.start(), page, range);
        Marks {
            range,
            page,
            ordering: MarkOrdering::Fences,
            bits: ChunkMap::new(last),
        }
    }

    /// Marks the pages that `range` touches, as far as they belong to the area. The data was written before.
    pub(crate) fn mark(&self, range: IovaRange) {
        if let Some(inside) = range.intersection(self.range) {
            self.mark_inside(inside);
        }
    }

    /// Marks the pages that `range` touches, which lies in the area as a whole. The data was written before.
    #[inline]
    pub(crate) fn mark_inside(&self, range: IovaRange) {
        debug_assert!(self.range.covers(range));
        let (first, last) = pages(self.range.start(), self.page, range);
        // A new mark is followed by F3 of the protocols in `space::unmap` and `space::attachment`, in `Slot::set_word`.
        self.bits.set(first, last, || self.ordering.before_look());
    }

    /// Moves the marks of `range` into `sink`.
    pub(crate) fn read_and_clear(
        &self,
        range: IovaRange,
        sink: &mut Sink<'_>,
    ) -> Result<(), Stopped> {
        if let Some(word) = sink.first_word(self.range.start(), self.page)
            && sink.range().covers(range.round_out(self.page))
            && let Some((first, last)) = self.bits_of(range)
        {
            // Words as they are.
            let recorder = Recorder {
                marks: self,
                range,
                sink,
                word,
            };
            return self.bits.take(first, last, recorder);
        }
        self.visit::<true>(range, |start, mask| {
            if performs(Step::RecordBeforeClear) {
                sink.record_mask(start, self.page, mask)?;
            }
            Ok(())
        })
    }

    /// A stop at the word that begins with `bit`.
    #[cold]
    fn stopped(&self, bit: u64, range: IovaRange, error: Error) -> Stopped {
        let start = Iova::new(self.range.start().get() + (bit << self.page.lg2()));
        let at = start.max(range.start());
        Stopped { at, error }
    }

    /// Records the marks of `range` and leaves them.
    pub(crate) fn peek(&self, range: IovaRange, sink: &mut Sink<'_>) -> Result<(), Stopped> {
        self.visit::<false>(range, |start, mask| {
            sink.record_mask(start, self.page, mask)
        })
    }

    /// Forgets the marks of `range`, which is made of whole pages; how many there were.
    pub(crate) fn clear(&self, range: IovaRange) -> u64 {
        let mut pages = 0;
        self.take(range, |_, mask| pages += u64::from(mask.count_ones()));
        pages
    }

    /// Hands the marks of `range` to `taker`, as page and mask of the pages from there on, and forgets them.
    pub(crate) fn take(&self, range: IovaRange, mut taker: impl FnMut(Iova, u64)) {
        let taken = self.visit::<true>(range, |start, mask| {
            taker(start, mask);
            Ok(())
        });
        debug_assert!(taken.is_ok());
    }

    /// The marks of `range`, as runs in ascending order.
    pub(crate) fn runs(&self, range: IovaRange) -> Vec<IovaRange> {
        let mut runs = Vec::new();
        let seen = self.visit::<false>(range, |start, mask| {
            self.add_runs(start, mask, &mut runs);
            Ok(())
        });
        debug_assert!(seen.is_ok());
        runs
    }

    /// Takes the marks of `range`, as runs in ascending order.
    ///
    /// Who moves marks takes them first and sets them elsewhere then: a marker that finds a page marked here, and so
    /// leaves it at that, comes before the taking, and so before the setting.
    pub(crate) fn take_runs(&self, range: IovaRange) -> Vec<IovaRange> {
        let mut runs = Vec::new();
        self.take(range, |start, mask| self.add_runs(start, mask, &mut runs));
        runs
    }

    fn add_runs(&self, start: Iova, mask: u64, runs: &mut Vec<IovaRange>) {
        for (first, last) in word_runs(mask) {
            let page = |n: u32| Iova::new(start.get() + (u64::from(n) << self.page.lg2()));
            // Never an error: a run goes upwards.
            runs.extend(IovaRange::new(
                page(first),
                page(last).granule_last(self.page),
            ));
        }
    }

    /// Calls `visit` for the marks of `range`, as page and mask of the pages from there on, and clears them after it if `TAKE`.
    #[inline]
    fn visit<const TAKE: bool>(
        &self,
        range: IovaRange,
        mut visit: impl FnMut(Iova, u64) -> Result<(), Error>,
    ) -> Result<(), Stopped> {
        let Some((first, last)) = self.bits_of(range) else {
            return Ok(());
        };
        let visit = |bit: u64, mask| {
            let start = Iova::new(self.range.start().get() + (bit << self.page.lg2()));
            visit(start, mask).map_err(|error| self.stopped(bit, range, error))
        };
        match TAKE {
            true => self.bits.take(first, last, visit),
            false => self.bits.peek(first, last, visit),
        }
    }

    /// The bits of the pages that `range` touches.
    fn bits_of(&self, range: IovaRange) -> Option<(u64, u64)> {
        let inside = range.intersection(self.range)?;
        Some(pages(self.range.start(), self.page, inside))
    }
}

/// Writes words of marks down as words of the sink.
struct Recorder<'r, 's> {
    marks: &'r Marks,
    range: IovaRange,
    sink: &'r mut Sink<'s>,
    /// The word of the sink, modulo 2^64, that word 0 of the marks is.
    word: u64,
}

impl Visitor<Stopped> for Recorder<'_, '_> {
    #[inline]
    fn word(&mut self, bit: u64, seen: u64) -> Result<(), Stopped> {
        if !performs(Step::RecordBeforeClear) {
            return Ok(());
        }
        self.sink
            .or(self.word.wrapping_add(bit / 64), seen)
            .map_err(|error| self.marks.stopped(bit, self.range, error))
    }

    #[inline]
    fn line(&mut self, bit: u64, seen: &[u64; LINE_WORDS], found: u64) -> bool {
        self.sink
            .or_line(self.word.wrapping_add(bit / 64), seen, found)
    }
}

/// Marks of an area with what leads to them at hand.
#[derive(Clone, Debug)]
pub(crate) struct NearMarks {
    group: OneGroup,
    /// The part of the marks that belongs to the area.
    range: IovaRange,
    base: Iova,
    page: Granule,
    ordering: MarkOrdering,
    marks: Arc<Marks>,
}

impl NearMarks {
    /// None if there are too many pages for one group. Allocates the group: see [`ChunkMap`].
    pub(crate) fn new(marks: &Arc<Marks>, range: IovaRange) -> Option<Self> {
        Some(NearMarks {
            group: marks.bits.one_group()?,
            range: range.intersection(marks.range)?,
            base: marks.range.start(),
            page: marks.page,
            ordering: marks.ordering,
            marks: Arc::clone(marks),
        })
    }

    /// As [`Marks::mark_inside`], if the pages are near: in the area as a whole, and in one word. Whether they are.
    #[inline(always)]
    pub(crate) fn mark(&self, range: IovaRange) -> bool {
        if !self.range.covers(range) {
            return false;
        }
        let (first, last) = pages(self.base, self.page, range);
        if first / 64 != last / 64 {
            return false;
        }
        let before_look = || self.ordering.before_look();
        // SAFETY: the group is that of these marks' bits, see `new`, which have one for each page of the range.
        unsafe {
            self.marks
                .bits
                .set_near(self.group, first, last, before_look)
        };
        true
    }
}

/// The numbers of the first and the last page that `range` touches, where page 0 begins at `base`.
#[inline]
fn pages(base: Iova, page: Granule, range: IovaRange) -> (u64, u64) {
    let number = |iova: Iova| (iova.get() - base.get()) >> page.lg2();
    (number(range.start()), number(range.last()))
}
