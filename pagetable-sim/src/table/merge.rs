//! Merging leaves while devices write: the way back from a split.
//!
//! ```text
//!  entries of one table      compare-exchange of each: the same D, a larger leaf
//!  a whole table, to a leaf  compare-exchange of the entry above: a dirty leaf; retire the table
//! ```
//!
//! # Why no write is lost
//! The invariant is that of [`split`](super::split).
//!
//! * In **one table** a larger leaf replaces an entry, in one step, with the D that it has.
//!   Addresses that were dirty by its D still are.
//! * A device may be **inside a table** that is replaced: it sets D in a part after the entry above
//!   no longer leads there, and caches that. No harvest looks there again. So a writable leaf
//!   starts dirty, written or not. It becomes clean only by a harvest that records all of it and
//!   owes its flush. That flush waits until the device has finished its operation, and drops its
//!   cached entry.
//! * A device may **cache a pointer** to such a table, and use it until an invalidation that names
//!   tables. The flush of a harvest names none, so the leaf is made dirty once more after that
//!   invalidation.
//!
//! The price: the first harvest after a merge reports the whole of each writable leaf that replaced
//! a table. A read-only leaf, or one made of entries of one table, is dirty if a part of it was.

use crossbeam_epoch::Guard;
use dirtymap::sync::{Ordering, Step, performs};
use dirtymap::{Access, Granule, IovaRange};

use super::entries::{Slot, any_dirty, leads_to_same, slots};
use super::page::{Node, retire};
use super::tree::Table;
use crate::error::Error;
use crate::fmt::{AtomicIopte, Format, Iopte, LeafSizes, granule};

/// Receives each leaf that was merged: its addresses, its size, and whether it replaced a table.
type Merged<'a> = dyn FnMut(IovaRange, Granule, bool) + 'a;

impl<F: Format> Table<F> {
    /// Merges the leaves of `range` into the largest that are among `sizes` (a set, or a
    /// [`Granule`] for all sizes up to it), as far as they map contiguous memory with the same
    /// rights. Calls `merged` with each new leaf, its size, and whether it replaced a table.
    /// Devices may use its parts until its addresses are invalidated, which does no harm.
    ///
    /// A writable leaf that replaces a table is dirty afterwards; any other leaf is if one of its
    /// parts was. A device that caches a pointer to the table sets D in the old table until an
    /// invalidation that names tables
    /// ([`FlushGather::add_table`](dirtymap::flush::FlushGather::add_table)) has reached it.
    /// Harvests before that may have made the leaf clean, so the caller makes it dirty again after
    /// that invalidation ([`make_dirty`](Self::make_dirty)).
    /// [`Domain::merge`](crate::Domain::merge) does all that.
    ///
    /// Lock-free, and devices may write at the same time; the caller owns the range until the call
    /// returns.
    ///
    /// # Errors
    /// [`Error::TooWide`], [`Error::Unaligned`]; nothing is changed then.
    pub fn merge(
        &self,
        range: IovaRange,
        sizes: impl Into<LeafSizes>,
        mut merged: impl FnMut(IovaRange, Granule, bool),
    ) -> Result<(), Error> {
        Self::check_range(range)?;
        let guard = crossbeam_epoch::pin();
        let sizes = sizes.into().and(F::LEAF_SIZES);
        merge_table::<F>(
            self.root.node(),
            F::LEVELS - 1,
            range,
            sizes,
            &mut merged,
            &guard,
        );
        if performs(Step::HeatMerge) {
            self.heat(range, &guard);
        }
        Ok(())
    }
}

/// Merges the leaves of `range` in the subtree of `page`, a table of `level`: the tables below
/// first, then its entries.
fn merge_table<'g, F: Format>(
    page: Node<'g>,
    level: u32,
    range: IovaRange,
    sizes: LeafSizes,
    merged: &mut Merged<'_>,
    guard: &'g Guard,
) {
    for (_, slot) in slots::<F>(page.entries, level, range) {
        // Acquire: pairs with the Release in `child_or_new`; publishes the table.
        let entry = slot.entry.load(Ordering::Acquire);
        if F::is_present(entry) && !F::is_leaf(entry, level) {
            let table = page.below::<F>(entry, guard);
            merge_table::<F>(table, level - 1, slot.part, sizes, merged, guard);
            if slot.part == slot.span && sizes.contains(F::size(level)) {
                replace_table::<F>(page, &slot, level, entry, merged, guard);
            }
        }
    }
    let mut inside = slots::<F>(page.entries, level, range)
        .filter(|(_, slot)| slot.part == slot.span)
        .map(|(index, slot)| (index, slot.span));
    let Some((mut first, mut span)) = inside.next() else {
        return;
    };
    let last = inside.last().map_or(first, |(last, _)| last);
    loop {
        // The largest group that begins here, or else this entry alone.
        let group_lg2 = (1..F::INDEX_LG2)
            .rev()
            .find(|lg2| join::<F>(page.entries, level, first, last, span, *lg2, sizes, merged))
            .unwrap_or(0);
        first += 1 << group_lg2;
        let size = u32::from(F::size(level).lg2()) + group_lg2;
        let Some(next) = 1u64
            .checked_shl(size)
            .and_then(|bytes| span.start().checked_add(bytes))
        else {
            return;
        };
        if first > last {
            return;
        }
        span = IovaRange::granule_at(next, F::size(level));
    }
}

/// Puts one leaf in the place of the table that `entry`, of `page`, leads to, if its parts make
/// one.
fn replace_table<F: Format>(
    page: Node<'_>,
    slot: &Slot<'_>,
    level: u32,
    entry: Iopte,
    merged: &mut Merged<'_>,
    guard: &Guard,
) {
    let table = page.below::<F>(entry, guard).entries;
    let size = F::size(level);
    let Some((phys, access)) =
        contiguous::<F>(table, level - 1).filter(|(p, _)| p & size.mask() == 0)
    else {
        return;
    };
    let clean = F::leaf(phys, access, size);
    let written = access.writes() && performs(Step::DirtyWhole);
    let mut entry = entry;
    loop {
        let dirty = written || any_dirty::<F>(table, level - 1);
        let leaf = if dirty { F::written(clean) } else { clean };
        // Release on success: a walk that finds the leaf sees the bytes that mappers wrote into the
        // memory of all its parts. Relaxed on failure: a walk has set A, or else the caller does
        // not own the range and nothing is changed.
        match slot
            .entry
            .replace(entry, leaf, Ordering::Release, Ordering::Relaxed)
        {
            Ok(()) => break,
            Err(now) if leads_to_same::<F>(now, entry, level) => entry = now,
            Err(_) => return,
        }
    }
    // SAFETY: `entry` was present and no leaf; the compare-exchange took the one entry that led
    // there, so no other call retires it.
    unsafe { retire::<F>(page, entry, level, guard) };
    merged(slot.span, size, true);
}

/// Makes one leaf of the 2^`group_lg2` entries from `first` on, the first of which covers `span`.
/// Returns whether they are one leaf now.
#[allow(clippy::too_many_arguments)] // one candidate in one table
fn join<F: Format>(
    page: &[AtomicIopte],
    level: u32,
    first: usize,
    last: usize,
    span: IovaRange,
    group_lg2: u32,
    sizes: LeafSizes,
    merged: &mut Merged<'_>,
) -> bool {
    let entries = 1 << group_lg2;
    let size = granule(u32::from(F::size(level).lg2()) + group_lg2);
    if first & (entries - 1) != 0 || first + entries - 1 > last {
        return false;
    }
    let group = &page[first..first + entries];
    // Relaxed: only its size is read.
    let entry = group[0].load(Ordering::Relaxed);
    if F::is_present(entry) && F::is_leaf(entry, level) && F::leaf_size(entry, level) >= size {
        return true;
    }
    if !sizes.contains(size) {
        return false;
    }
    let Some((phys, access)) = contiguous::<F>(group, level).filter(|(p, _)| p & size.mask() == 0)
    else {
        return false;
    };
    let leaf = F::leaf(phys, access, size);
    for slot in group {
        // Relaxed: the first guess.
        let mut old = slot.load(Ordering::Relaxed);
        // It is always a leaf if the caller owns the range.
        while F::is_present(old) && F::is_leaf(old, level) {
            let new = if F::is_dirty(old) {
                F::written(leaf)
            } else {
                leaf
            };
            // Release on success: as in `replace_table`; a device caches the whole leaf by any of
            // its entries. Relaxed on failure: D was set or cleared, and the new value follows from
            // that.
            match slot.replace(old, new, Ordering::Release, Ordering::Relaxed) {
                Ok(()) => break,
                Err(now) => old = now,
            }
        }
    }
    merged(IovaRange::granule_at(span.start(), size), size, false);
    true
}

/// The start of the memory of all these entries, and the rights, if they are whole leaves that map
/// contiguous memory with the same rights.
fn contiguous<F: Format>(entries: &[AtomicIopte], level: u32) -> Option<(u64, Access)> {
    let mut first = None;
    for (nth, slot) in entries.iter().enumerate() {
        // Relaxed: nothing is read by the leaf. The caller owns the range, so the maps of the
        // leaves came before.
        let entry = slot.load(Ordering::Relaxed);
        if !F::is_present(entry) || !F::is_leaf(entry, level) {
            return None;
        }
        // Groups are aligned in the table, and so are the entries that we are given.
        let in_group = nth & ((1 << F::group_lg2(entry, level)) - 1);
        let at = |nth: usize| (nth as u64) << F::size(level).lg2();
        let phys = F::output(entry) + at(in_group);
        let begin = (phys.checked_sub(at(nth))?, F::access(entry));
        if *first.get_or_insert(begin) != begin {
            return None;
        }
    }
    first
}
