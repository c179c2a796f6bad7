//! Unmapping: leaf by leaf, and entry by entry where a leaf has several.

use crossbeam_epoch::Guard;
use dirtymap::sync::Ordering;
use dirtymap::{Granule, IovaRange};

use super::entries::slots;
use super::page::child;
use super::tree::Table;
use crate::error::Error;
use crate::fmt::{AtomicIopte, Format, Iopte};

/// Receives each leaf that was removed: its addresses, its size, and whether it was dirty.
type Removed<'a> = dyn FnMut(IovaRange, Granule, bool) + 'a;

/// A leaf whose entries are going.
struct Going {
    leaf: IovaRange,
    size: Granule,
    dirty: bool,
}

impl<F: Format> Table<F> {
    /// Removes all leaves in `range`. Calls `removed` for each, with its addresses, its size, and
    /// whether it was dirty: hardware cannot set D once the leaf is gone, so that is final.
    /// Addresses without a leaf are skipped.
    ///
    /// Devices may use cached translations until they are invalidated. Lock-free; the caller owns
    /// the range until the call returns.
    ///
    /// # Errors
    /// In this order: [`Error::TooWide`], [`Error::Unaligned`], [`Error::PartOfLeaf`]. Nothing is
    /// changed then.
    pub fn unmap(
        &self,
        range: IovaRange,
        mut removed: impl FnMut(IovaRange, Granule, bool),
    ) -> Result<(), Error> {
        Self::check_range(range)?;
        self.check_whole_leaves(range)?;
        let guard = crossbeam_epoch::pin();
        self.remove(range, &mut removed, &guard);
        Ok(())
    }

    /// Makes all entries of `range` that hold leaves absent.
    pub(super) fn remove(&self, range: IovaRange, removed: &mut Removed<'_>, guard: &Guard) {
        clear::<F>(&self.root, F::LEVELS - 1, range, removed, guard);
    }
}

/// Removes the leaves of `range` in the subtree of `page`.
fn clear<F: Format>(
    page: &[AtomicIopte],
    level: u32,
    range: IovaRange,
    removed: &mut Removed<'_>,
    guard: &Guard,
) {
    let mut going: Option<Going> = None;
    for (_, slot) in slots::<F>(page, level, range) {
        if let Some(gone) = going.take_if(|going| !going.leaf.covers(slot.span)) {
            removed(gone.leaf, gone.size, gone.dirty);
        }
        // Acquire: pairs with the Release in `child_or_new`; publishes the table.
        let mut entry = slot.entry.load(Ordering::Acquire);
        while F::is_present(entry) {
            if !F::is_leaf(entry, level) {
                let child = child::<F>(entry, guard);
                clear::<F>(child, level - 1, slot.part, removed, guard);
                break;
            }
            // Acquire on success: pairs with the Release of a harvest's clear, so that a leaf seen
            // clean was recorded. Acquire on failure: as the load above; a split has put a table
            // there. Any other failure means that hardware set D or a harvest cleared it: we report
            // the value that the entry had when it was removed.
            match slot
                .entry
                .replace(entry, Iopte::ABSENT, Ordering::Acquire, Ordering::Acquire)
            {
                Ok(()) => {
                    let size = F::leaf_size(entry, level);
                    let going = going.get_or_insert(Going {
                        leaf: IovaRange::granule_at(slot.span.start(), size),
                        size,
                        dirty: false,
                    });
                    going.dirty |= F::is_dirty(entry);
                    break;
                }
                Err(now) => entry = now,
            }
        }
    }
    if let Some(gone) = going {
        removed(gone.leaf, gone.size, gone.dirty);
    }
}
