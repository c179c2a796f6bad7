//! Software dirty bits: CPU threads say which pages they wrote.
//!
//! # The race, and why it is won
//! A page that is marked already should cost a load, not a locked operation. But then the writer stores data and
//! *reads* the mark, while the harvester clears the mark and *reads* the data. Each side puts a full fence between
//! its two steps:
//!
//! ```text
//!  writer                                    harvester
//!  W1  store data                            H1  clear the mark            (ChunkMap::visit)
//!  F1  fence(SeqCst)                         F2  fence(SeqCst)             (Lease::sync)
//!  W2  load the mark; set it if it is clear  H2  copy the page
//! ```
//!
//! Either F1 or F2 comes first in the one order of all SeqCst fences:
//! - if F1 does, H2 reads after F2 and sees the store of W1: the copy has the data;
//! - if F2 does, W2 reads after F1 and sees the clear of H1: the mark is set anew, for the next harvest.
//!
//! A CPU that believes "already dirty" is thus an IOTLB entry, and the fence in `sync` is its flush.

use crate::bitmap::{ChunkMap, Sink, word_runs};
use crate::error::Error;
use crate::source::Stopped;
use crate::sync::{Ordering, Step, fence, performs};
use crate::units::{Granule, Iova, IovaRange};

/// Dirty bits in memory of our own, one for each smallest page: the marks of an area, and what is kept for a domain.
#[derive(Debug)]
pub(crate) struct Marks {
    range: IovaRange,
    page: Granule,
    bits: ChunkMap,
}

impl Marks {
    /// Clean marks for `range`, which is made of whole pages of size `page`. Allocates nothing.
    pub(crate) fn new(range: IovaRange, page: Granule) -> Self {
        let last = (range.last().get() - range.start().get()) >> page.lg2();
        Marks {
            range,
            page,
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
        let base = self.range.start().get();
        let first = (range.start().get() - base) >> self.page.lg2();
        let last = (range.last().get() - base) >> self.page.lg2();
        let marked_anew = self.bits.set(first, last, || {
            if performs(Step::MarkFence) {
                // SeqCst: F1 of the module's protocol; pairs with F2 in `Lease::sync`.
                fence(Ordering::SeqCst);
            }
        });
        if marked_anew && performs(Step::GoneFence) {
            // SeqCst: F3 of the protocols in `space::unmap` and `space::attachment`; pairs with F4 and F6 there.
            fence(Ordering::SeqCst);
        }
    }

    /// Moves the marks of `range` into `sink`.
    pub(crate) fn read_and_clear(
        &self,
        range: IovaRange,
        sink: &mut Sink<'_>,
    ) -> Result<(), Stopped> {
        self.visit(range, |start, mask| {
            if performs(Step::RecordBeforeClear) {
                sink.record_mask(start, self.page, mask)?;
            }
            Ok(true)
        })
    }

    /// Records the marks of `range` and leaves them.
    pub(crate) fn peek(&self, range: IovaRange, sink: &mut Sink<'_>) -> Result<(), Stopped> {
        self.visit(range, |start, mask| {
            sink.record_mask(start, self.page, mask)?;
            Ok(false)
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
        let taken = self.visit(range, |start, mask| {
            taker(start, mask);
            Ok(true)
        });
        debug_assert!(taken.is_ok());
    }

    /// Takes the marks of `range`, as runs in ascending order.
    ///
    /// Who moves marks takes them first and sets them elsewhere then: a marker that finds a page marked here, and so
    /// leaves it at that, comes before the taking, and so before the setting.
    pub(crate) fn take_runs(&self, range: IovaRange) -> Vec<IovaRange> {
        let mut runs = Vec::new();
        self.take(range, |start, mask| {
            for (first, last) in word_runs(mask) {
                let page = |n: u32| Iova::new(start.get() + (u64::from(n) << self.page.lg2()));
                // Never an error: a run goes upwards.
                runs.extend(IovaRange::new(
                    page(first),
                    page(last).granule_last(self.page),
                ));
            }
        });
        runs
    }

    fn visit(
        &self,
        range: IovaRange,
        mut visit: impl FnMut(Iova, u64) -> Result<bool, Error>,
    ) -> Result<(), Stopped> {
        let Some((first, last)) = self.bits_of(range) else {
            return Ok(());
        };
        self.bits.visit(first, last, |bit, mask| {
            let start = Iova::new(self.range.start().get() + (bit << self.page.lg2()));
            visit(start, mask).map_err(|error| Stopped {
                at: start.max(range.start()),
                error,
            })
        })
    }

    /// The bits of the pages that `range` touches.
    fn bits_of(&self, range: IovaRange) -> Option<(u64, u64)> {
        let inside = range.intersection(self.range)?;
        let base = self.range.start().get();
        let bit = |iova: Iova| (iova.get() - base) >> self.page.lg2();
        Some((bit(inside.start()), bit(inside.last())))
    }
}
