//! The dirty bit: hardware sets it, a harvest reads and clears it.
//!
//! ```text
//!  device write --walk--> D := 1 in the entry (compare-exchange, while present and writable)
//!  harvest ------scan---> record, owe, then D := 0 in every entry of the leaf (compare-exchange)
//! ```
//!
//! For one leaf the harvest sees D set, records the leaf, owes its invalidation and clears D, in
//! this order. Hardware may act in between:
//! - a write that sets nothing because D is still set lands in a leaf that is recorded already;
//! - a write after the clear sets D anew, unless the device uses a cached "D is set". Such a write
//!   leaves no trace, until the invalidation that the harvest owes drops the cached entry. The page
//!   is recorded, and copied after that invalidation, so the write is in the copy.
//!
//! "D is set" means that the leaf is written in the sense of the format: a bit is set or, for Arm,
//! clear.
//!
//! # Which entries may be cleaned
//! D is cleared only in an entry whose leaf, at that moment, lies inside the recorded range. The
//! leaf may have been unmapped, split or merged since it was seen. An absent entry stays absent,
//! and an entry that leads to a table stays as it is. A smaller leaf becomes clean: all of it was
//! recorded. A larger leaf stays dirty. So cleaning is a compare-exchange; a `fetch_and` would
//! clear D in any of these.

use std::ops::ControlFlow;

use crossbeam_epoch::Guard;
use dirtymap::bitmap::Sink;
use dirtymap::source::{LeafSink, Stopped};
use dirtymap::sync::{Ordering, Step, performs};
use dirtymap::{Iova, IovaRange};

use super::leaf::{Batch, DirtyLeaf, Leaf, make_dirty};
use super::scan::{Upper, Visitor};
use super::skip::{Harvest, is_quiet};
use super::tree::Table;
use crate::error::Error;
use crate::fmt::{Format, Iopte};

/// A look at the dirty leaves that changes nothing.
struct Peek<'s, 'b> {
    sink: &'s mut Sink<'b>,
    range: IovaRange,
    /// It need not look below quiet entries.
    skips: bool,
}

impl<F: Format> Visitor<F> for Peek<'_, '_> {
    type Look = ();

    fn leaf(&mut self, leaf: &DirtyLeaf<'_>) -> Result<(), dirtymap::Error> {
        match leaf.span.intersection(self.range) {
            Some(part) => self.sink.record(part),
            None => Ok(()),
        }
    }

    fn leaves(&mut self, batch: &Batch<'_>, mask: u64) -> Result<(), Stopped> {
        let recorded = self.sink.record_mask(batch.start, batch.size, mask);
        recorded.map_err(|error| Stopped {
            at: batch.start,
            error,
        })
    }

    fn skips(&self, entry: Iopte) -> bool {
        self.skips && is_quiet::<F>(entry)
    }

    fn enter(&mut self, upper: &Upper<'_>) -> Option<()> {
        (!Visitor::<F>::skips(self, upper.entry)).then_some(())
    }

    fn leave(&mut self, _upper: &Upper<'_>, _look: ()) {}
}

/// Makes leaves clean without a record.
struct Clean;

impl<F: Format> Visitor<F> for Clean {
    type Look = ();

    fn leaf(&mut self, leaf: &DirtyLeaf<'_>) -> Result<(), dirtymap::Error> {
        leaf.clear::<F>();
        Ok(())
    }

    fn leaves(&mut self, batch: &Batch<'_>, mask: u64) -> Result<(), Stopped> {
        batch.clear::<F>(mask);
        Ok(())
    }

    fn skips(&self, _entry: Iopte) -> bool {
        false
    }

    fn enter(&mut self, _upper: &Upper<'_>) -> Option<()> {
        Some(())
    }

    fn leave(&mut self, _upper: &Upper<'_>, _look: ()) {}
}

impl<F: Format> Table<F> {
    /// The walk of a write: sets D in the entry that maps `iova` in one step, while it is present
    /// and writable. Returns the leaf as it was before (`dirty` is the D of that entry), or `None`
    /// if nothing is mapped there. A leaf that is not writable stays as it is.
    ///
    /// D publishes no bytes: a flush waits for devices, and not for the caller. A thread that
    /// writes to memory by itself marks what it wrote in the space
    /// ([`AddressSpace::mark`](dirtymap::AddressSpace::mark)).
    pub fn set_dirty(&self, iova: Iova) -> Option<Leaf> {
        let guard = crossbeam_epoch::pin();
        loop {
            let found = self.walk(iova, &guard)?;
            let leaf = found.leaf::<F>();
            if leaf.dirty || !leaf.access.writes() {
                return Some(leaf);
            }
            if make_dirty::<F>(&found) {
                if performs(Step::HeatWrite) {
                    self.heat(found.span, &guard);
                }
                return Some(leaf);
            }
            // The entry changed. Walk anew: the leaf may have been split or merged, and was mapped
            // all the time.
        }
    }

    /// Makes every leaf that `range` touches dirty, writable or not. Addresses without a leaf are
    /// skipped. Publishes no bytes, as [`set_dirty`](Self::set_dirty). Lock-free; may run at the
    /// same time as everything else.
    ///
    /// # Errors
    /// [`Error::TooWide`], [`Error::Unaligned`]; nothing is changed then.
    pub fn make_dirty(&self, range: IovaRange) -> Result<(), Error> {
        Self::check_range(range)?;
        let guard = crossbeam_epoch::pin();
        self.dirty_entries(range, &guard);
        if performs(Step::HeatByHand) {
            self.heat(range, &guard);
        }
        Ok(())
    }

    /// Sets D in every entry that `range`, which the table can map, touches.
    pub(super) fn dirty_entries(&self, range: IovaRange, guard: &Guard) {
        let done = self.visit(range, guard, &mut |mut found| {
            while !make_dirty::<F>(&found) {
                match self.walk(found.span.start(), guard) {
                    // A table replaced it, or a leaf replaced the table.
                    Some(now) if now.level != found.level => self.dirty_entries(found.span, guard),
                    Some(now) => {
                        found = now;
                        continue;
                    }
                    None => (),
                }
                break;
            }
            ControlFlow::<()>::Continue(())
        });
        debug_assert!(done.is_continue());
    }

    /// Hands the dirty leaves that `range` touches to `out`, which has them cleared. Addresses
    /// without a leaf are skipped. Lock-free; may run at the same time as everything else.
    ///
    /// # Errors
    /// [`Stopped`] with the first address that was not processed, and the error of `out`.
    pub fn read_and_clear(
        &self,
        range: IovaRange,
        out: &mut LeafSink<'_, '_>,
    ) -> Result<(), Stopped> {
        let mut harvest = Harvest::new(out, self.skips());
        let done = self.scan(range, &mut harvest);
        if harvest.skipped != 0 {
            // Relaxed: a count.
            self.skipped.fetch_add(harvest.skipped, Ordering::Relaxed);
        }
        done
    }

    /// Records the dirty state of `range` and changes nothing.
    ///
    /// # Errors
    /// As [`read_and_clear`](Self::read_and_clear).
    pub fn peek(&self, range: IovaRange, sink: &mut Sink<'_>) -> Result<(), Stopped> {
        let skips = self.skips();
        self.scan(range, &mut Peek { sink, range, skips })
    }

    /// Makes every leaf clean, and reports nothing.
    pub fn clean(&self) {
        let done = self.scan(IovaRange::ALL, &mut Clean);
        debug_assert!(done.is_ok());
    }
}
