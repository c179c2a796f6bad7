//! A leaf that a walk or a scan has reached, and its D.

use dirtymap::sync::{Ordering, Step, performs};
use dirtymap::{Access, Granule, Iova, IovaRange};

use crate::fmt::{AtomicIopte, Format, Iopte};

/// The translation that one leaf holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Leaf {
    /// The addresses that the leaf translates: all of it, not only those asked for.
    pub range: IovaRange,
    /// The physical address of the first of them.
    pub phys: u64,
    /// The rights of devices.
    pub access: Access,
    /// Whether D is set: in any of its entries for
    /// [`Table::translate`](super::Table::translate), in the one that the walk went through for
    /// [`Table::set_dirty`](super::Table::set_dirty).
    pub dirty: bool,
}

/// A leaf that a walk has reached.
#[derive(Clone, Copy)]
pub(super) struct Found<'g> {
    /// The entries of the table that the leaf is in.
    pub(super) page: &'g [AtomicIopte],
    pub(super) level: u32,
    /// Which entry the walk went through.
    pub(super) index: usize,
    /// The value of that entry.
    pub(super) entry: Iopte,
    /// The addresses that this entry covers.
    pub(super) span: IovaRange,
}

impl<'g> Found<'g> {
    pub(super) fn slot(&self) -> &'g AtomicIopte {
        &self.page[self.index]
    }

    pub(super) fn size<F: Format>(&self) -> Granule {
        F::leaf_size(self.entry, self.level)
    }

    /// All addresses of the leaf.
    pub(super) fn range<F: Format>(&self) -> IovaRange {
        IovaRange::granule_at(self.span.start(), self.size::<F>())
    }

    /// All entries of the leaf.
    pub(super) fn group<F: Format>(&self) -> &'g [AtomicIopte] {
        let entries = 1 << F::group_lg2(self.entry, self.level);
        let first = self.index & !(entries - 1);
        &self.page[first..first + entries]
    }

    pub(super) fn leaf<F: Format>(&self) -> Leaf {
        Leaf {
            range: self.range::<F>(),
            phys: F::output(self.entry),
            access: F::access(self.entry),
            dirty: F::is_dirty(self.entry),
        }
    }
}

/// Sets D in the entry, unless it is set. False if the entry has changed since the walk.
pub(super) fn make_dirty<F: Format>(found: &Found<'_>) -> bool {
    // Relaxed, both: D publishes nothing. A harvest that clears it flushes before the copy, and the
    // flush brings the data: it waits for the device. A harvest after the write finds D, because
    // the order of the two orders its look after this; one that runs beside the write may miss D.
    // The clear and this are changes of one word, so D survives one of them or is recorded. On
    // failure the caller walks anew.
    F::is_dirty(found.entry)
        || found
            .slot()
            .replace(
                found.entry,
                F::written(found.entry),
                Ordering::Relaxed,
                Ordering::Relaxed,
            )
            .is_ok()
}

/// A dirty leaf that a scan found.
pub(super) struct DirtyLeaf<'g> {
    /// All entries of the leaf.
    pub(super) group: &'g [AtomicIopte],
    pub(super) level: u32,
    /// All addresses of the leaf.
    pub(super) span: IovaRange,
    pub(super) size: Granule,
}

impl DirtyLeaf<'_> {
    /// Makes the leaf clean. Returns whether it was dirty.
    pub(super) fn clear<F: Format>(&self) -> bool {
        let mut was_dirty = false;
        for slot in self.group {
            was_dirty |= clear_entry::<F>(slot, self.level, |entry| {
                F::leaf_size(entry, self.level) <= self.size || !performs(Step::SpareLarger)
            });
            if !performs(Step::CleanEveryEntry) {
                break;
            }
        }
        was_dirty
    }
}

/// Up to 64 adjacent entries of one table.
pub(super) struct Batch<'g> {
    pub(super) slots: &'g [AtomicIopte],
    pub(super) level: u32,
    /// The first address of the first one.
    pub(super) start: Iova,
    /// The size of the range that one of them covers.
    pub(super) size: Granule,
}

impl Batch<'_> {
    /// Whether all addresses of the entries lie in `range`.
    #[inline]
    pub(super) fn is_inside(&self, range: IovaRange) -> bool {
        let last = ((self.slots.len() as u64 - 1) << self.size.lg2()) + self.size.mask();
        let end = self.start.checked_add(last);
        self.start >= range.start() && end.is_some_and(|end| end <= range.last())
    }

    /// Makes the entries of `mask` clean. Returns those that were dirty.
    #[inline]
    pub(super) fn clear<F: Format>(&self, mask: u64) -> u64 {
        let (mut rest, mut were_dirty) = (mask, 0);
        while rest != 0 {
            let nth = rest.trailing_zeros();
            rest &= rest - 1;
            let slot = &self.slots[nth as usize];
            // One entry is the smallest leaf of its level.
            let cleared = clear_entry::<F>(slot, self.level, |entry| {
                entry.0 & F::GROUPED == 0 || !performs(Step::SpareGroup)
            });
            were_dirty |= u64::from(cleared) << nth;
        }
        were_dirty
    }
}

/// Makes an entry of a table of `level` clean if its leaf is `recorded`. Returns whether it was
/// dirty.
#[inline]
fn clear_entry<F: Format>(
    slot: &AtomicIopte,
    level: u32,
    recorded: impl Fn(Iopte) -> bool,
) -> bool {
    // Relaxed: only the first guess of the compare-exchange.
    let mut entry = slot.load(Ordering::Relaxed);
    while F::is_present(entry) && F::is_leaf(entry, level) && F::is_dirty(entry) && recorded(entry)
    {
        // Release on success: pairs with the Acquire of an unmap; a thread that finds the leaf
        // clean when it removes it sees the record of the scan. Nothing is read by the D that is
        // cleared: see `make_dirty`. Relaxed on failure: the next guess.
        match slot.replace(
            entry,
            F::MAKE_CLEAN.of(entry),
            Ordering::Release,
            Ordering::Relaxed,
        ) {
            Ok(()) => return true,
            Err(now) => entry = now,
        }
    }
    false
}
