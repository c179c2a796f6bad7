//! Mapping and unmapping: everything is checked first, then installed leaf by leaf.

use std::cell::Cell;

use crossbeam_epoch::Guard;
use dirtymap::sync::Ordering;
use dirtymap::{Access, Granule, IovaRange};

use super::{Slot, Table, TablePage, child, free_table, is_leaf, slots};
use crate::error::Error;
use crate::fmt::{Format, Iopte};

/// A checked request to map.
struct Job {
    range: IovaRange,
    phys: u64,
    access: Access,
    max_leaf: Granule,
    /// A leaf took the place of a table.
    retired: Cell<bool>,
}

impl Job {
    /// Where the memory behind `part` of the range begins.
    fn phys_of(&self, part: IovaRange) -> u64 {
        self.phys + (part.start().get() - self.range.start().get())
    }
}

impl<F: Format> Table<F> {
    /// Maps `range` to the memory from `phys` on, clean, by the largest leaves that the alignment of both addresses
    /// allows and that are not larger than `max_leaf` (a `max_leaf` below the smallest page counts as the smallest
    /// page).
    ///
    /// Returns whether a table was retired: devices that cache a pointer to it must forget it, for what it says of the
    /// range has not been true since. Lock-free. The caller owns the range for the time of the call.
    ///
    /// # Errors
    /// In this order: [`Error::TooWide`], [`Error::Unaligned`], [`Error::UnalignedPhys`], [`Error::PhysTooWide`],
    /// [`Error::NoSuchAccess`], [`Error::AlreadyMapped`]. Nothing is changed then.
    pub fn map(
        &self,
        range: IovaRange,
        phys: u64,
        access: Access,
        max_leaf: Granule,
    ) -> Result<bool, Error> {
        Self::check_range(range)?;
        if phys & F::PAGE.mask() != 0 {
            return Err(Error::UnalignedPhys {
                phys,
                page: F::PAGE,
            });
        }
        if u128::from(phys) + range.len() > 1 << F::OUTPUT_LG2 {
            return Err(Error::PhysTooWide {
                phys,
                len: range.len(),
                width: F::OUTPUT_LG2,
                format: F::NAME,
            });
        }
        if !F::grants(access) {
            return Err(Error::NoSuchAccess {
                access,
                format: F::NAME,
            });
        }
        let guard = crossbeam_epoch::pin();
        if let Some(leaf) = first_leaf::<F>(&self.root, F::LEVELS - 1, range, &guard) {
            return Err(Error::AlreadyMapped { range, leaf });
        }
        let job = Job {
            range,
            phys,
            access,
            max_leaf,
            retired: Cell::new(false),
        };
        fill::<F>(&self.root, F::LEVELS - 1, range, &job, &guard).map_err(|leaf| {
            // Another call mapped into our range meanwhile, which it must not. Ours lies below its leaf: take it back.
            if leaf.start() > range.start()
                && let Ok(below) =
                    IovaRange::from_len(range.start(), leaf.start().get() - range.start().get())
            {
                clear::<F>(&self.root, F::LEVELS - 1, below, &mut |_, _, _| (), &guard);
            }
            Error::AlreadyMapped { range, leaf }
        })?;
        Ok(job.retired.get())
    }

    /// Removes all leaves in `range`. Calls `removed` for each, with its addresses, its size, and whether it was dirty:
    /// hardware can no longer set D when the leaf is gone, so that is the last word. Addresses without a leaf are
    /// skipped.
    ///
    /// Devices may use cached translations until they are invalidated. Lock-free; the caller owns the range for the
    /// time of the call.
    ///
    /// # Errors
    /// In this order: [`Error::TooWide`], [`Error::Unaligned`], [`Error::PartOfLeaf`]. Nothing is changed then.
    pub fn unmap(
        &self,
        range: IovaRange,
        mut removed: impl FnMut(IovaRange, Granule, bool),
    ) -> Result<(), Error> {
        Self::check_range(range)?;
        // Leaves are disjoint, so only those at the borders can stick out.
        for border in [range.start(), range.last()] {
            if let Some(leaf) = self.translate(border)
                && !range.covers(leaf.range)
            {
                let leaf = leaf.range;
                return Err(Error::PartOfLeaf { range, leaf });
            }
        }
        let guard = crossbeam_epoch::pin();
        clear::<F>(&self.root, F::LEVELS - 1, range, &mut removed, &guard);
        Ok(())
    }
}

/// The addresses of the first leaf that `range` touches, in the subtree of `page`.
fn first_leaf<F: Format>(
    page: &TablePage,
    level: u32,
    range: IovaRange,
    guard: &Guard,
) -> Option<IovaRange> {
    slots::<F>(page, level, range).find_map(|slot| {
        // Acquire: pairs with the Release in `child_or_new`; publishes the table.
        let entry = slot.entry.load(Ordering::Acquire);
        if !F::is_present(entry) {
            None
        } else if is_leaf::<F>(entry, level) {
            Some(slot.span)
        } else {
            first_leaf::<F>(child::<F>(entry, guard), level - 1, slot.part, guard)
        }
    })
}

/// Installs the leaves for `range`, a part of the job's, in the subtree of `page`.
///
/// # Errors
/// The addresses of a leaf that is in the way. Everything below it is installed.
fn fill<F: Format>(
    page: &TablePage,
    level: u32,
    range: IovaRange,
    job: &Job,
    guard: &Guard,
) -> Result<(), IovaRange> {
    for slot in slots::<F>(page, level, range) {
        let phys = job.phys_of(slot.part);
        let size = F::size(level);
        let fits = level < F::LEAF_LEVELS
            && slot.part == slot.span
            && phys & size.mask() == 0
            && size <= job.max_leaf;
        if fits || level == 0 {
            let leaf = F::leaf(phys, job.access, level);
            if install::<F>(&slot, level, leaf, guard)? {
                job.retired.set(true);
            }
        } else {
            let child = child_or_new::<F>(&slot, level, guard)?;
            fill::<F>(child, level - 1, slot.part, job, guard)?;
        }
    }
    Ok(())
}

/// Puts `leaf` into an entry that is absent, or that leads to a table without leaves: that table is retired. Returns
/// whether there was one.
fn install<F: Format>(
    slot: &Slot<'_>,
    level: u32,
    leaf: Iopte,
    guard: &Guard,
) -> Result<bool, IovaRange> {
    let mut seen = Iopte::ABSENT;
    loop {
        // Release on success: publishes what the caller wrote into the memory. Acquire on failure: pairs with the
        // Release in `child_or_new`, for the table that we look into.
        match slot
            .entry
            .replace(seen, leaf, Ordering::Release, Ordering::Acquire)
        {
            Ok(()) if F::is_present(seen) => {
                // A walker that is inside the old table is pinned; whoever comes later from above finds the leaf.
                // SAFETY: `seen` was present and no leaf (below); the compare-exchange took the one entry that led
                // there, so no later walk finds it and nobody else gives up its hold, which goes when all who are
                // pinned now have left.
                guard.defer(move || unsafe { free_table::<F>(seen, level - 1) });
                return Ok(true);
            }
            Ok(()) => return Ok(false),
            Err(now) if !F::is_present(now) => seen = now,
            Err(now) if is_leaf::<F>(now, level) => return Err(slot.span),
            Err(now) => {
                let table = child::<F>(now, guard);
                if let Some(leaf) = first_leaf::<F>(table, level - 1, slot.span, guard) {
                    return Err(leaf);
                }
                seen = now;
            }
        }
    }
}

/// The table that `slot`, an entry of a table of `level`, leads to; installed if there is none.
fn child_or_new<'g, F: Format>(
    slot: &Slot<'_>,
    level: u32,
    guard: &'g Guard,
) -> Result<&'g TablePage, IovaRange> {
    // Acquire: pairs with the Release below; publishes the table.
    let mut entry = slot.entry.load(Ordering::Acquire);
    if !F::is_present(entry) {
        let fresh = Box::into_raw(TablePage::new());
        let address = fresh.expose_provenance() as u64;
        let new = F::table(address, level);
        // Memory safety rests on it: `child` follows the address that the entry holds.
        assert_eq!(
            F::table_address(new),
            address,
            "a host address that fits an entry"
        );
        // What is found instead may be absent as well: a late `make_clean` changes bits of an entry whose leaf is gone.
        while !F::is_present(entry) {
            // Release on success: publishes the fresh table. Acquire on failure: we use the winner's.
            match slot
                .entry
                .replace(entry, new, Ordering::Release, Ordering::Acquire)
            {
                Ok(()) => return Ok(child::<F>(new, guard)),
                Err(now) => entry = now,
            }
        }
        // SAFETY: `fresh` came from `Box::into_raw` above and was not published: no compare-exchange succeeded.
        drop(unsafe { Box::from_raw(fresh) });
    }
    if is_leaf::<F>(entry, level) {
        return Err(slot.span);
    }
    Ok(child::<F>(entry, guard))
}

/// Removes the leaves of `range` in the subtree of `page`. None sticks out.
fn clear<F: Format>(
    page: &TablePage,
    level: u32,
    range: IovaRange,
    removed: &mut impl FnMut(IovaRange, Granule, bool),
    guard: &Guard,
) {
    for slot in slots::<F>(page, level, range) {
        // Acquire: pairs with the Release in `child_or_new`; publishes the table.
        let mut entry = slot.entry.load(Ordering::Acquire);
        while F::is_present(entry) {
            if !is_leaf::<F>(entry, level) {
                clear::<F>(
                    child::<F>(entry, guard),
                    level - 1,
                    slot.part,
                    removed,
                    guard,
                );
                break;
            }
            // Acquire on success: pairs with the Release of a harvest's clear, so that a leaf seen clean was recorded;
            // Release: what we did before is visible to a walk that finds nothing. Acquire on failure: as the load
            // above. A failure means that hardware set D or a harvest cleared it: what we report is what was there when
            // the leaf went.
            match slot
                .entry
                .replace(entry, Iopte::ABSENT, Ordering::AcqRel, Ordering::Acquire)
            {
                Ok(()) => {
                    removed(slot.span, F::size(level), F::is_dirty(entry));
                    break;
                }
                Err(now) => entry = now,
            }
        }
    }
}
