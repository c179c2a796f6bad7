//! The walk of a device: from the root, or from a table that the device caches a pointer to.
//!
//! ```text
//!  root --entry: note A--> table --entry: note A--> table --leaf: set D of a write-->
//!                            ^                        ^
//!                            +------------------------+-- or begin here: entries above are neither read nor changed
//! ```
//!
//! A cached pointer is a [`TableRef`], which keeps the table in memory. Whether the table is still the one that
//! translates the address is another matter: after it was retired, only an invalidation that names pointers to tables
//! makes devices forget it.

use std::marker::PhantomData;
use std::ptr::{self, NonNull};

use dirtymap::Iova;
use dirtymap::sync::Ordering;

use super::dirty::write_through;
use super::{Leaf, Table, TablePage, child, is_leaf, leaf_of, let_go};
use crate::error::FaultKind;
use crate::fmt::{Format, Iopte};

/// What a device walks for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Walk {
    pub(crate) iova: Iova,
    /// Hardware notes accesses: A in the entries above the leaf that it reads, D for a write.
    pub(crate) tracked: bool,
    /// The access is a write.
    pub(crate) write: bool,
}

/// A pointer to a table that stays in memory for as long as this exists, though it may have been retired.
pub(crate) struct TableRef<F: Format> {
    page: NonNull<TablePage>,
    level: u32,
    format: PhantomData<F>,
}

impl<F: Format> TableRef<F> {
    /// Holds `page`, a table of `level` that the caller has reached by a walk under an epoch guard or another hold.
    fn hold(page: &TablePage, level: u32) -> Self {
        // Relaxed: a new hold is made from one that lasts at least as long as we run.
        page.1.fetch_add(1, Ordering::Relaxed);
        TableRef {
            page: NonNull::from(page),
            level,
            format: PhantomData,
        }
    }

    fn page(&self) -> &TablePage {
        // SAFETY: alive, aligned and initialised: `hold` got it as a reference and has counted us since; shared: all its
        // fields are atomics.
        unsafe { self.page.as_ref() }
    }

    /// How many addresses the table translates, as a logarithm.
    pub(crate) fn span_lg2(&self) -> u32 {
        F::size(self.level + 1).lg2().into()
    }
}

impl<F: Format> Drop for TableRef<F> {
    fn drop(&mut self) {
        let page = ptr::with_exposed_provenance_mut(self.page.addr().get());
        // SAFETY: below the root all tables are made by `Box::into_raw`, in `map`, which exposed their provenance; `hold`
        // counted us.
        unsafe { let_go::<F>(page, self.level) };
    }
}

// SAFETY: `page` leads to a table that is shared between all threads by design: atomics only, with counted holds.
unsafe impl<F: Format> Send for TableRef<F> {}

impl<F: Format> std::fmt::Debug for TableRef<F> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TableRef")
            .field("level", &self.level)
            .finish_non_exhaustive()
    }
}

impl<F: Format> Table<F> {
    /// Walks for a device to the leaf that maps an address, and returns the leaf as it was found. Begins at `from`, a
    /// table that covers the address, or at the root. Sets A in each upper entry that it reads, and D for a write that
    /// the leaf permits, if accesses are tracked. Pointers to the tables that it goes through are added to `met`, also
    /// by a walk that ends in a fault.
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
        let (mut page, mut level) = match from {
            Some(table) => (table.page(), table.level),
            None => (&*self.root, F::LEVELS - 1),
        };
        loop {
            let slot = &page.0[F::index(iova.get(), level)];
            // Acquire: pairs with the Release that installed the entry, in `map`; publishes the table it leads to, or
            // what the mapper wrote into the memory behind a leaf.
            let mut entry = slot.load(Ordering::Acquire);
            loop {
                if !F::is_present(entry) {
                    return Err(FaultKind::NotMapped);
                }
                if entry.0 & F::RESERVED != 0 {
                    return Err(FaultKind::Reserved);
                }
                if is_leaf::<F>(entry, level) {
                    if walk.tracked && walk.write {
                        entry =
                            write_through::<F>(slot, entry, level).ok_or(FaultKind::NotMapped)?;
                    }
                    return Ok(leaf_of::<F>(iova, entry, level));
                }
                let noted = if walk.tracked {
                    Iopte(entry.0 | F::TABLE_ACCESSED)
                } else {
                    entry
                };
                if noted == entry {
                    break;
                }
                // Release on success: whoever sees what we set below, by Acquire, sees A above as well. Acquire, both: as
                // the load above, for what we derive from the entry or look at anew.
                match slot.replace(entry, noted, Ordering::AcqRel, Ordering::Acquire) {
                    Ok(()) => break,
                    Err(now) => entry = now,
                }
            }
            page = child::<F>(entry, &guard);
            level -= 1;
            if let Some(met) = &mut met {
                met.push(TableRef::hold(page, level));
            }
        }
    }

    /// Whether A is set in each of the entries above the leaf of `iova`, from the root down.
    #[cfg(all(test, not(dirtymap_loom)))]
    pub(crate) fn upper_accessed(&self, iova: Iova) -> Vec<bool> {
        let guard = crossbeam_epoch::pin();
        let mut page = &*self.root;
        let mut found = Vec::new();
        for level in (1..F::LEVELS).rev() {
            let entry = page.0[F::index(iova.get(), level)].load(Ordering::Acquire);
            if !F::is_present(entry) || is_leaf::<F>(entry, level) {
                break;
            }
            found.push(entry.0 & F::TABLE_ACCESSED != 0);
            page = child::<F>(entry, &guard);
        }
        found
    }

    /// Sets the reserved bits of the leaf that maps `iova`, so that the next walk there faults. False if there is no
    /// leaf, or the format has no reserved bits.
    pub(crate) fn corrupt(&self, iova: Iova) -> bool {
        let guard = crossbeam_epoch::pin();
        if F::RESERVED == 0 {
            return false;
        }
        while let Some((slot, entry, _)) = self.walk(iova, &guard) {
            let bad = Iopte(entry.0 | F::RESERVED);
            // Relaxed on success: publishes nothing. Acquire on failure: as the walk, which is repeated.
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
