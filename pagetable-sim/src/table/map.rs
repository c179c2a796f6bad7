//! Mapping: everything is checked first, then installed leaf by leaf, the largest that fits each
//! time.
//!
//! A large leaf may replace a table without leaves. That table is **frozen** first: a
//! compare-exchange turns each absent entry into one that takes no leaf. So a `map` that wrongly
//! runs in the same range either finds a frozen entry, and is refused, or has installed a leaf
//! before, and refuses us.

use std::cell::Cell;

use crossbeam_epoch::Guard;
use dirtymap::sync::{Ordering, Step, weaken};
use dirtymap::{Access, Granule, Iova, IovaRange};

use super::entries::{Slot, leads_to_same, slots};
use super::page::{Node, TableRef, child, entry_for, retire};
use super::tree::Table;
use crate::error::Error;
use crate::fmt::{AtomicIopte, Format, Iopte, LeafSizes, granule};

/// A checked request for leaves.
pub(super) struct Job {
    range: IovaRange,
    phys: u64,
    access: Access,
    /// The sizes that the caller names and that the format and the alignment of both addresses to
    /// each other allow.
    sizes: LeafSizes,
    /// No leaf maps both sides of it.
    cut: Option<Iova>,
    /// Leaves start dirty.
    pub(super) dirty: bool,
    /// Whether a leaf replaced a table.
    retired: Cell<bool>,
}

impl Job {
    /// Leaves for `range`, clean. The smallest page is always among the sizes.
    pub(super) fn new<F: Format>(
        range: IovaRange,
        phys: u64,
        access: Access,
        sizes: LeafSizes,
        cut: Option<Iova>,
    ) -> Self {
        let aligned_lg2 = (range.start().get() ^ phys).trailing_zeros();
        Job {
            range,
            phys,
            access,
            sizes: sizes
                .and(F::LEAF_SIZES)
                .and(LeafSizes::up_to(granule(aligned_lg2)))
                .or(LeafSizes::only(F::PAGE)),
            cut,
            dirty: false,
            retired: Cell::new(false),
        }
    }

    /// The largest leaf that may begin at `at`, where the leaf before it ends.
    pub(super) fn size_at(&self, at: Iova) -> Granule {
        let last = match self.cut {
            Some(cut) if at < cut => cut.get() - 1,
            _ => self.range.last().get(),
        };
        let room = (u128::from(last - at.get()) + 1).ilog2();
        let fits = LeafSizes::up_to(granule(room.min(at.get().trailing_zeros())));
        // Never empty: the smallest page fits wherever a page begins.
        self.sizes.and(fits).largest().unwrap_or(Granule::K4)
    }

    /// The leaf of `size` at `at`.
    pub(super) fn leaf<F: Format>(&self, at: Iova, size: Granule) -> Iopte {
        let phys = self.phys + (at.get() - self.range.start().get());
        let leaf = F::leaf(phys, self.access, size);
        if self.dirty { F::written(leaf) } else { leaf }
    }
}

/// A leaf, or a frozen entry, where a leaf was to be installed.
pub(super) struct InTheWay {
    /// All leaves of the job below this address are installed.
    at: Iova,
    leaf: IovaRange,
}

impl<F: Format> Table<F> {
    /// Maps `range` to the memory from `phys` on, clean, by the largest leaves that the alignment
    /// of both addresses allows and that are among `sizes`: a set, or a [`Granule`] for all sizes
    /// up to it. The smallest page always is among them.
    ///
    /// Returns whether a table was retired: devices that cache a pointer to it must forget it,
    /// because it no longer translates the range. Lock-free. The caller owns the range until the
    /// call returns.
    ///
    /// # Errors
    /// In this order: [`Error::TooWide`], [`Error::Unaligned`], [`Error::UnalignedPhys`],
    /// [`Error::PhysTooWide`], [`Error::NoSuchAccess`], [`Error::AlreadyMapped`]. Nothing is
    /// changed then.
    pub fn map(
        &self,
        range: IovaRange,
        phys: u64,
        access: Access,
        sizes: impl Into<LeafSizes>,
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
        Self::check_access(access)?;
        let guard = crossbeam_epoch::pin();
        if let Some(leaf) = self.first_leaf(range, &guard) {
            return Err(Error::AlreadyMapped { range, leaf });
        }
        let job = Job::new::<F>(range, phys, access, sizes.into(), None);
        fill::<F>(self.root.node(), F::LEVELS - 1, range, &job, &guard).map_err(|in_the_way| {
            // Another call maps into our range, which it must not. Our leaves are below this
            // address: remove them.
            let InTheWay { at, leaf } = in_the_way;
            if let Some(last) = at.get().checked_sub(1)
                && let Ok(below) = IovaRange::new(range.start(), Iova::new(last))
            {
                self.remove(below, &mut |_, _, _| (), &guard);
            }
            Error::AlreadyMapped { range, leaf }
        })?;
        Ok(job.retired.get())
    }

    /// Refuses rights that no leaf of the format grants.
    pub(super) fn check_access(access: Access) -> Result<(), Error> {
        if F::grants(access) {
            return Ok(());
        }
        Err(Error::NoSuchAccess {
            access,
            format: F::NAME,
        })
    }

    /// The addresses of the first leaf that `range` touches.
    fn first_leaf(&self, range: IovaRange, guard: &Guard) -> Option<IovaRange> {
        use std::ops::ControlFlow::Break;
        match self.visit(range, guard, &mut |found| Break(found.range::<F>())) {
            Break(leaf) => Some(leaf),
            std::ops::ControlFlow::Continue(()) => None,
        }
    }
}

/// Installs the leaves for `range`, a part of the job's, in the subtree of `page`, a table of
/// `level`.
pub(super) fn fill<'g, F: Format>(
    page: Node<'g>,
    level: u32,
    range: IovaRange,
    job: &Job,
    guard: &'g Guard,
) -> Result<(), InTheWay> {
    let needed = F::index(range.last().get(), level) - F::index(range.start().get(), level) + 1;
    let mut leaf = Iopte::ABSENT;
    // The last address of the group that the leaf is for.
    let mut installed = None;
    for (index, slot) in slots::<F>(page.entries, level, range) {
        let at = slot.part.start();
        if installed.is_none_or(|last| last < at) {
            let size = job.size_at(at);
            if size < F::size(level) {
                let child = child_or_new::<F>(page, index, &slot, level, needed, guard)?;
                fill::<F>(child, level - 1, slot.part, job, guard)?;
                continue;
            }
            installed = Some(IovaRange::granule_at(at, size).last());
            leaf = job.leaf::<F>(at, size);
        }
        if install::<F>(page, &slot, level, leaf, guard)? {
            job.retired.set(true);
        }
    }
    Ok(())
}

/// Puts `leaf` into an entry of `page`, a table of `level`, that is absent, or that leads to a
/// table without leaves: that table is retired. Returns whether there was one.
fn install<F: Format>(
    page: Node<'_>,
    slot: &Slot<'_>,
    level: u32,
    leaf: Iopte,
    guard: &Guard,
) -> Result<bool, InTheWay> {
    // Release on success: publishes the bytes that the caller wrote into the memory. Acquire on
    // failure: pairs with the Release in `child_or_new`, for the table that we look into.
    let Err(mut now) =
        slot.entry
            .replace(Iopte::ABSENT, leaf, Ordering::Release, Ordering::Acquire)
    else {
        return Ok(false);
    };
    if !F::is_present(now) || F::is_leaf(now, level) {
        return Err(slot.taken_by::<F>(now, level));
    }
    let table = child::<F>(now, guard);
    let refused = |leaf| InTheWay {
        at: slot.span.start(),
        leaf,
    };
    freeze::<F>(table, level - 1, slot.span, guard).map_err(refused)?;
    loop {
        // Release: as above. Relaxed on failure: we give up, or try again because a walk has set A.
        match slot
            .entry
            .replace(now, leaf, Ordering::Release, Ordering::Relaxed)
        {
            Ok(()) => {
                // SAFETY: `now` was present and no leaf; the compare-exchange took the one entry
                // that led there, so no other call retires it.
                unsafe { retire::<F>(page, now, level, guard) };
                return Ok(true);
            }
            Err(other) if leads_to_same::<F>(other, now, level) => now = other,
            Err(_) => {
                thaw::<F>(table, level - 1, slot.span, guard);
                return Err(refused(slot.span));
            }
        }
    }
}

impl Slot<'_> {
    /// `now`, which is no table, is in the way.
    fn taken_by<F: Format>(&self, now: Iopte, level: u32) -> InTheWay {
        let at = self.part.start();
        let leaf = if F::is_present(now) {
            IovaRange::granule_at(at, F::leaf_size(now, level))
        } else {
            // Frozen, for a large leaf.
            self.span
        };
        InTheWay { at, leaf }
    }
}

/// Freezes the absent entries of the subtree of `page`, so that no call installs anything there.
///
/// # Errors
/// The addresses of a leaf that is there already, or of an entry that another call is freezing;
/// then nothing is frozen.
fn freeze<F: Format>(
    page: &[AtomicIopte],
    level: u32,
    range: IovaRange,
    guard: &Guard,
) -> Result<(), IovaRange> {
    for (_, slot) in slots::<F>(page, level, range) {
        // Relaxed on success: publishes nothing. Acquire on failure: pairs with the Release in
        // `child_or_new`; publishes the table that we look into.
        let Err(now) = slot.entry.replace(
            Iopte::ABSENT,
            Iopte::FROZEN,
            Ordering::Relaxed,
            Ordering::Acquire,
        ) else {
            continue;
        };
        let frozen = if !F::is_present(now) || F::is_leaf(now, level) {
            Err(slot.taken_by::<F>(now, level).leaf)
        } else {
            freeze::<F>(child::<F>(now, guard), level - 1, slot.part, guard)
        };
        if let Err(leaf) = frozen {
            if let Some(last) = slot.span.start().get().checked_sub(1)
                && let Ok(below) = IovaRange::new(range.start(), Iova::new(last))
            {
                thaw::<F>(page, level, below, guard);
            }
            return Err(leaf);
        }
    }
    Ok(())
}

/// Undoes [`freeze`].
fn thaw<F: Format>(page: &[AtomicIopte], level: u32, range: IovaRange, guard: &Guard) {
    for (_, slot) in slots::<F>(page, level, range) {
        // Relaxed, both: publishes nothing, and finds the tables that `freeze` has found, by
        // Acquire. No call replaces a table whose entries are frozen.
        if let Err(now) = slot.entry.replace(
            Iopte::FROZEN,
            Iopte::ABSENT,
            Ordering::Relaxed,
            Ordering::Relaxed,
        ) && F::is_present(now)
            && !F::is_leaf(now, level)
        {
            thaw::<F>(child::<F>(now, guard), level - 1, slot.part, guard);
        }
    }
}

/// The table that `slot`, the entry `index` of `page`, a table of `level`, leads to; installed if
/// there is none, as one of `needed`.
fn child_or_new<'g, F: Format>(
    page: Node<'g>,
    index: usize,
    slot: &Slot<'_>,
    level: u32,
    needed: usize,
    guard: &'g Guard,
) -> Result<Node<'g>, InTheWay> {
    // Acquire: pairs with the Release below; publishes the table.
    let mut entry = slot.entry.load(Ordering::Acquire);
    if entry == Iopte::ABSENT {
        let fresh = TableRef::<F>::below(page, index, level - 1, needed as u64);
        let new = entry_for::<F>(&fresh, level);
        // Release on success: publishes the fresh table. Acquire on failure: we use the winner's.
        match slot.entry.replace(
            entry,
            new,
            weaken(Step::PublishTable, Ordering::Release),
            Ordering::Acquire,
        ) {
            Ok(()) => {
                fresh.leak();
                return Ok(page.below::<F>(new, guard));
            }
            Err(now) => entry = now,
        }
    }
    if !F::is_present(entry) || F::is_leaf(entry, level) {
        return Err(slot.taken_by::<F>(entry, level));
    }
    Ok(page.below::<F>(entry, guard))
}
