//! The dirty bit: hardware sets it, a harvest reads and clears it.
//!
//! ```text
//!  device write --walk--> D := 1 (compare-exchange, while present and writable)
//!  harvest ------scan---> record, owe, then D := 0 (fetch_and or fetch_or)
//! ```
//!
//! For one leaf the harvest sees D set, records the leaf, owes its invalidation and clears D, in this order. Hardware
//! may act in between:
//! - a write that sets nothing because D is still set lands in a leaf that is recorded already;
//! - a write after the clear sets D anew, unless the device goes by a cached "D is set": then it leaves no trace, until
//!   the invalidation that the harvest owes makes the device forget. The page is recorded and copied after that, so the
//!   write is in the copy.
//!
//! "D" is what the format calls written: a bit that is set or, for Arm, one that is not. Making a leaf clean is one
//! atomic operation on the bits that the format names.
//!
//! If the leaf was unmapped and another one of the same addresses mapped between reading and clearing, the new leaf
//! loses a D that belongs to addresses which were recorded in this very harvest. If nothing was mapped since, the entry
//! stays absent, though it may keep a bit of the clearing; a table that was put there stays where it is.

use crossbeam_epoch::Guard;
use dirtymap::sync::Ordering;
use dirtymap::{Granule, Iova, IovaRange, LeafSink, Sink, Stopped};

use super::{AtomicIopte, Leaf, Table, TablePage, child, is_leaf, leaf_of};
use crate::fmt::{Format, Iopte};

/// A dirty leaf that a scan found.
struct DirtyLeaf<'g> {
    slot: &'g AtomicIopte,
    /// All addresses of the leaf.
    span: IovaRange,
    size: Granule,
}

impl DirtyLeaf<'_> {
    /// Makes the leaf clean; whether it was dirty until now.
    fn clear<F: Format>(&self) -> bool {
        // Acquire: pairs with the Release of `set_dirty`. Release: whoever finds D clear, hardware or an unmap, sees what
        // the scan did before. One step: a change of the other bits meanwhile is kept.
        self.slot.make_clean(F::MAKE_CLEAN, Ordering::AcqRel)
    }
}

impl<F: Format> Table<F> {
    /// The walk of a write: sets D of the leaf that maps `iova` in one step, while it is present and writable. Returns
    /// the leaf as it was found (`dirty` tells whether D was set before), `None` if nothing is mapped there. A leaf
    /// that is not writable stays as it is.
    pub fn set_dirty(&self, iova: Iova) -> Option<Leaf> {
        let guard = crossbeam_epoch::pin();
        let (slot, entry, level) = self.walk(iova, &guard)?;
        let found = write_through::<F>(slot, entry, level)?;
        Some(leaf_of::<F>(iova, found, level))
    }

    /// Hands the dirty leaves that `range` touches to `out`, which has them cleared. Addresses without a leaf are
    /// skipped. Lock-free; may run at the same time as everything else.
    ///
    /// # Errors
    /// [`Stopped`] with the first address that was not processed, and the error of `out`.
    pub fn read_and_clear(
        &self,
        range: IovaRange,
        out: &mut LeafSink<'_, '_>,
    ) -> Result<(), Stopped> {
        self.scan(range, |leaf| {
            out.take(leaf.span, leaf.size, || leaf.clear::<F>())
        })
    }

    /// Records the dirty state of `range` and changes nothing.
    ///
    /// # Errors
    /// As [`read_and_clear`](Self::read_and_clear).
    pub fn peek(&self, range: IovaRange, sink: &mut Sink<'_>) -> Result<(), Stopped> {
        self.scan(range, |leaf| match leaf.span.intersection(range) {
            Some(part) => sink.record(part),
            None => Ok(()),
        })
    }

    /// Makes every leaf clean and tells nobody what was dirty.
    pub fn clean(&self) {
        let done = self.scan(IovaRange::ALL, |leaf| {
            leaf.clear::<F>();
            Ok(())
        });
        debug_assert!(done.is_ok());
    }

    /// Visits the dirty leaves that `range` touches, in order.
    fn scan(
        &self,
        range: IovaRange,
        mut visit: impl FnMut(&DirtyLeaf<'_>) -> Result<(), dirtymap::Error>,
    ) -> Result<(), Stopped> {
        let guard = crossbeam_epoch::pin();
        for part in Self::reach().filter_map(|reach| reach.intersection(range)) {
            scan_table::<F, _>(&self.root, F::LEVELS - 1, part, &mut visit, &guard)?;
        }
        Ok(())
    }
}

/// Sets D of a leaf that was seen as `entry` in a table of `level`, if devices may write through it. Returns the leaf as
/// it was found, `None` if it is gone.
pub(super) fn write_through<F: Format>(
    slot: &AtomicIopte,
    mut entry: Iopte,
    level: u32,
) -> Option<Iopte> {
    while F::access(entry).writes() && !F::is_dirty(entry) {
        // AcqRel on success: D is in the table before the data is in memory, and after what the last clear of D
        // recorded; pairs with `make_clean` in a harvest. Acquire on failure: as the load of the walk; the new value is
        // derived from it.
        match slot.replace(
            entry,
            F::written(entry),
            Ordering::AcqRel,
            Ordering::Acquire,
        ) {
            Ok(()) => break,
            Err(now) if F::is_present(now) && is_leaf::<F>(now, level) => entry = now,
            // Unmapped meanwhile, and perhaps mapped by smaller leaves since: there was a moment without a translation.
            Err(_) => return None,
        }
    }
    Some(entry)
}

/// Visits the dirty leaves of `range` in the subtree of `page`. Eight entries with nothing to look at cost eight loads
/// and one OR.
fn scan_table<F, V>(
    page: &TablePage,
    level: u32,
    range: IovaRange,
    visit: &mut V,
    guard: &Guard,
) -> Result<(), Stopped>
where
    F: Format,
    V: FnMut(&DirtyLeaf<'_>) -> Result<(), dirtymap::Error>,
{
    let size = F::size(level);
    let first = F::index(range.start().get(), level);
    let last = F::index(range.last().get(), level);
    let base = range.start().granule_start(size).get();
    let mut look = |nth: usize, entry: &AtomicIopte| {
        let start = Iova::new(base + ((nth as u64) << size.lg2()));
        scan_entry::<F, V>(entry, level, start, range, visit, guard)
    };
    let (eights, rest) = page.0[first..=last].as_chunks::<8>();
    for (nth, eight) in eights.iter().enumerate() {
        // Relaxed: only decides whether to look closer. A D that was set before the harvest began is seen, because
        // whatever tells the harvester that the write is done also orders this load after it.
        let any = eight.iter().fold(0, |any, entry| {
            any | F::worth_a_look(entry.load(Ordering::Relaxed), level)
        });
        if any != 0 {
            for (i, entry) in eight.iter().enumerate() {
                look(nth * 8 + i, entry)?;
            }
        }
    }
    for (i, entry) in rest.iter().enumerate() {
        look(eights.len() * 8 + i, entry)?;
    }
    Ok(())
}

/// Visits the dirty leaves of `range` under one entry, of a table of `level`, that covers the addresses from `start`
/// on.
fn scan_entry<F, V>(
    slot: &AtomicIopte,
    level: u32,
    start: Iova,
    range: IovaRange,
    visit: &mut V,
    guard: &Guard,
) -> Result<(), Stopped>
where
    F: Format,
    V: FnMut(&DirtyLeaf<'_>) -> Result<(), dirtymap::Error>,
{
    // Acquire: pairs with the Release that installed the entry, in `map`; publishes the table it leads to.
    let entry = slot.load(Ordering::Acquire);
    if !F::is_present(entry) {
        return Ok(());
    }
    let size = F::size(level);
    let span = IovaRange::granule_at(start, size);
    let Some(part) = span.intersection(range) else {
        return Ok(());
    };
    if !is_leaf::<F>(entry, level) {
        return scan_table::<F, V>(child::<F>(entry, guard), level - 1, part, visit, guard);
    }
    if F::is_dirty(entry) {
        visit(&DirtyLeaf { slot, span, size }).map_err(|error| Stopped {
            at: part.start(),
            error,
        })?;
    }
    Ok(())
}
