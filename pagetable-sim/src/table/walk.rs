//! The walk of a device: from the root, or from a table that the device caches a pointer to.
//!
//! ```text
//!  root --entry: note A--> table --entry: note A--> table --leaf: set D of a write-->
//!                            ^                        ^
//!                            +------------------------+-- or begin here: no entry above is read
//! ```
//!
//! A cached pointer is a [`TableRef`], which keeps the table in memory. The table may no longer
//! translate the address: after it was retired, only an invalidation that names pointers to tables
//! makes devices forget it.

use dirtymap::sync::Ordering;
use dirtymap::{Iova, IovaRange};

use super::leaf::{Found, Leaf, make_dirty};
use super::page::TableRef;
#[cfg(all(test, not(dirtymap_loom)))]
use super::page::child;
use super::tree::Table;
use crate::error::FaultKind;
#[cfg(all(test, not(dirtymap_loom)))]
use crate::fmt::AtomicIopte;
use crate::fmt::{Format, Iopte};

/// The reason of a device's walk.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Walk {
    pub(crate) iova: Iova,
    /// Hardware records accesses: A in the entries above the leaf that it reads, D for a write.
    pub(crate) tracked: bool,
    /// The access is a write.
    pub(crate) write: bool,
}

impl<F: Format> Table<F> {
    /// Walks for a device to the leaf that maps an address, and returns the leaf as it was found.
    /// Begins at `from`, a table that covers the address, or at the root. Sets A in each upper
    /// entry that it reads, and D for a write that the leaf permits, if accesses are tracked.
    /// Pointers to the tables that it goes through are added to `met`, also by a walk that ends in
    /// a fault.
    #[inline]
    pub(crate) fn walk_from(
        &self,
        from: Option<&TableRef<F>>,
        walk: Walk,
        mut met: Option<&mut Vec<TableRef<F>>>,
    ) -> Result<Leaf, FaultKind> {
        let iova = walk.iova;
        if !self.reaches(iova) {
            return Err(FaultKind::TooWide);
        }
        let guard = crossbeam_epoch::pin();
        let (mut node, mut level) = match from {
            Some(table) => (table.node(), table.level()),
            None => (self.root.node(), F::LEVELS - 1),
        };
        loop {
            let page = node.entries;
            let index = F::index(iova.get(), level);
            let slot = &page[index];
            // Acquire: pairs with the Release that installed the entry, in `map`; publishes the
            // table that it leads to, or the bytes that the mapper wrote into the memory of a leaf.
            let mut entry = slot.load(Ordering::Acquire);
            loop {
                if !F::is_present(entry) {
                    return Err(FaultKind::NotMapped);
                }
                if entry.0 & F::RESERVED != 0 {
                    return Err(FaultKind::Reserved);
                }
                if F::is_leaf(entry, level) {
                    let span = IovaRange::granule_at(iova, F::size(level));
                    let found = Found {
                        page,
                        level,
                        index,
                        entry,
                        span,
                    };
                    let notes = walk.tracked && walk.write && F::access(entry).writes();
                    if !notes || make_dirty::<F>(&found) {
                        return Ok(found.leaf::<F>());
                    }
                    // The entry changed: it may be another leaf now, lead to a table, or be gone.
                    // Acquire: as the load above.
                    entry = slot.load(Ordering::Acquire);
                    continue;
                }
                let noted = if walk.tracked {
                    Iopte(entry.0 | F::TABLE_ACCESSED)
                } else {
                    entry
                };
                if noted == entry {
                    break;
                }
                // Relaxed on success: A publishes nothing, and the entry leads to the table that we
                // found by Acquire, which stays while we are pinned. Acquire on failure: as the
                // load above, for another table that is there now.
                match slot.replace(entry, noted, Ordering::Relaxed, Ordering::Acquire) {
                    Ok(()) => break,
                    Err(now) => entry = now,
                }
            }
            node = node.below::<F>(entry, &guard);
            level -= 1;
            if let Some(met) = &mut met {
                met.push(node.hold(level));
            }
        }
    }

    /// Whether A is set in each of the entries above the leaf of `iova`, from the root down.
    #[cfg(all(test, not(dirtymap_loom)))]
    pub(crate) fn upper_accessed(&self, iova: Iova) -> Vec<bool> {
        let guard = crossbeam_epoch::pin();
        let mut page: &[AtomicIopte] = &self.root;
        let mut found = Vec::new();
        for level in (1..F::LEVELS).rev() {
            let entry = page[F::index(iova.get(), level)].load(Ordering::Acquire);
            if !F::is_present(entry) || F::is_leaf(entry, level) {
                break;
            }
            found.push(entry.0 & F::TABLE_ACCESSED != 0);
            page = child::<F>(entry, &guard);
        }
        found
    }

    /// Sets the reserved bits of the leaf that maps `iova`, so that the next walk there faults.
    /// False if there is no leaf, or the format has no reserved bits.
    pub(crate) fn corrupt(&self, iova: Iova) -> bool {
        let guard = crossbeam_epoch::pin();
        if F::RESERVED == 0 {
            return false;
        }
        while let Some(found) = self.walk(iova, &guard) {
            let (slot, entry) = (found.slot(), found.entry);
            let bad = Iopte(entry.0 | F::RESERVED);
            // Relaxed on success: publishes nothing. Acquire on failure: as the walk, which is
            // repeated.
            if slot
                .replace(entry, bad, Ordering::Relaxed, Ordering::Acquire)
                .is_ok()
            {
                return true;
            }
        }
        false
    }
}
