//! A leaf that a walk or a scan has reached, and its D.

use dirtymap::sync::{Ordering, PairExchange, Step, performs};
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
    // flush brings the data: it waits for the device. The harvest has read this D before its F2, so
    // the F1 of the device, which comes before this, is before that F2: the flush sees the device
    // awake, or sees that it slept after this. A harvest after the write finds D, because
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
        if mask == u64::MAX {
            were_dirty = clear_pairs::<F>(self.slots, self.level);
            rest = !were_dirty;
        }
        while rest != 0 {
            let nth = rest.trailing_zeros();
            rest &= rest - 1;
            let slot = &self.slots[nth as usize];
            let cleared = clear_entry::<F>(slot, self.level, is_single::<F>);
            were_dirty |= u64::from(cleared) << nth;
        }
        were_dirty
    }
}

/// Makes all entries of a part of a table of `level` clean, two by one locked operation, as far as
/// the processor and other threads let it. Returns those that it made clean.
#[inline(never)]
fn clear_pairs<F: Format>(slots: &[AtomicIopte], level: u32) -> u64 {
    PairExchange::get().map_or(0, |exchange| match level {
        // With a level that the compiler knows, the test of an entry is short.
        0 => clear_pairs_at::<F>(slots, 0, exchange),
        level => clear_pairs_at::<F>(slots, level, exchange),
    })
}

#[inline(always)]
fn clear_pairs_at<F: Format>(slots: &[AtomicIopte], level: u32, exchange: PairExchange) -> u64 {
    let mut were_dirty = 0;
    for (nth, pair) in slots.as_chunks().0.iter().enumerate() {
        if clear_pair::<F>(pair, level, exchange) {
            were_dirty |= 0b11 << (2 * nth);
        }
    }
    were_dirty
}

/// Whether a leaf is one entry, the smallest of its level: so it was recorded with its batch.
#[inline(always)]
fn is_single<F: Format>(entry: Iopte) -> bool {
    entry.0 & F::GROUPED == 0 || !performs(Step::SpareGroup)
}

/// Makes two neighbours of a table of `level` clean by one locked operation, if both are dirty
/// leaves of one entry. Otherwise changes nothing and returns false.
#[inline(always)]
fn clear_pair<F: Format>(pair: &[AtomicIopte; 2], level: u32, exchange: PairExchange) -> bool {
    // Relaxed: as in `clear_entry`.
    let old = [0, 1].map(|nth: usize| pair[nth].load(Ordering::Relaxed));
    let clears = |entry: Iopte| is_written_leaf::<F>(entry, level) && is_single::<F>(entry);
    let new = old.map(|entry| F::MAKE_CLEAN.of(entry));
    // A full fence: more than the orderings in `clear_entry`.
    clears(old[0]) && clears(old[1]) && AtomicIopte::replace_pair(pair, old, new, exchange)
}

/// Whether an entry of a table of `level` is a dirty leaf, or a part of one.
#[inline(always)]
fn is_written_leaf<F: Format>(entry: Iopte, level: u32) -> bool {
    F::is_present(entry) && F::is_leaf(entry, level) && F::is_dirty(entry)
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
    while is_written_leaf::<F>(entry, level) && recorded(entry) {
        // Release on success: pairs with the Acquire of an unmap; a thread that finds the leaf
        // clean when it removes it sees the record of the scan. Acquire on success: pairs with the
        // Release of `split_leaf`; if this is a part of a group that was split, the other parts are
        // seen dirty from now on, by this thread and by those that come after it. No data is read
        // by the D itself: see `make_dirty`. Relaxed on failure: the next guess.
        match slot.replace(
            entry,
            F::MAKE_CLEAN.of(entry),
            Ordering::AcqRel,
            Ordering::Relaxed,
        ) {
            Ok(()) => return true,
            Err(now) => entry = now,
        }
    }
    false
}

#[cfg(test)]
#[cfg(not(dirtymap_loom))]
mod tests {
    use super::*;
    use crate::fmt::AmdV1;
    use dirtymap::sync::thread;

    const K4: Granule = Granule::K4;

    /// Entries at a multiple of 16 bytes.
    #[repr(align(16))]
    struct Slots([AtomicIopte; 66]);

    fn leaf(nth: usize) -> Iopte {
        AmdV1::leaf(nth as u64 * K4.bytes(), Access::ReadWrite, K4)
    }

    /// Entries of dirty leaves, but for those that `change` says.
    fn slots(change: impl Fn(usize) -> Option<Iopte>) -> Slots {
        Slots(std::array::from_fn(|nth| {
            let slot = AtomicIopte::absent();
            let new = change(nth).unwrap_or(AmdV1::written(leaf(nth)));
            let done = slot.replace(Iopte::ABSENT, new, Ordering::Relaxed, Ordering::Relaxed);
            assert!(done.is_ok());
            slot
        }))
    }

    fn batch(slots: &Slots, first: usize, level: u32) -> Batch<'_> {
        Batch {
            slots: &slots.0[first..first + 64],
            level,
            start: Iova::new(first as u64 * AmdV1::size(level).bytes()),
            size: AmdV1::size(level),
        }
    }

    /// A clear of all 64 entries takes two at once. An entry that changed since it was seen (it is
    /// absent, clean, a part of a larger leaf, or leads to a table) stays as it is, and its
    /// neighbour becomes clean. The first entry may be the upper one of a pair.
    #[test]
    fn a_full_word_is_cleared_but_for_what_changed() {
        let large = AmdV1::written(AmdV1::leaf(
            0,
            Access::ReadWrite,
            Granule::from_lg2(13).unwrap(),
        ));
        let table = Iopte(AmdV1::table(0x1000, 1).0 | AmdV1::written(Iopte::ABSENT).0);
        for first in 0..2 {
            for changed in [Iopte::ABSENT, large, leaf(7), table] {
                // A lowest table leads to no table.
                let level = u32::from(changed == table);
                for places in [
                    vec![],
                    vec![7],
                    vec![8],
                    vec![8, 9],
                    vec![first, first + 63],
                ] {
                    let change = |nth| places.contains(&nth).then_some(changed);
                    let slots = slots(change);
                    let cleared = batch(&slots, first, level).clear::<AmdV1>(u64::MAX);
                    for nth in first..first + 64 {
                        let stays = change(nth);
                        assert_eq!(cleared >> (nth - first) & 1 == 0, stays.is_some());
                        let now = slots.0[nth].load(Ordering::Relaxed);
                        let clean = AmdV1::MAKE_CLEAN.of(AmdV1::written(leaf(nth)));
                        assert_eq!(now, stays.unwrap_or(clean), "{places:?} of {first}");
                    }
                }
            }
        }
    }

    /// A device sets D in single entries while a harvest clears all of them by pairs: each D that
    /// was set is cleared once.
    #[test]
    fn no_write_is_lost_beside_a_clear_of_pairs() {
        let slots = slots(|_| None);
        let all = batch(&slots, 0, 0);
        let rounds = if cfg!(miri) { 20 } else { 4000 };
        let mut cleared = 0;
        thread::scope(|scope| {
            let device = scope.spawn(|| {
                let mut written = 64;
                for _ in 0..rounds {
                    for slot in &slots.0[..64] {
                        let old = slot.load(Ordering::Relaxed);
                        let new = AmdV1::written(old);
                        let done = slot.replace(old, new, Ordering::Relaxed, Ordering::Relaxed);
                        written += u32::from(old != new && done.is_ok());
                    }
                }
                written
            });
            while !device.is_finished() {
                cleared += all.clear::<AmdV1>(u64::MAX).count_ones();
            }
            cleared += all.clear::<AmdV1>(u64::MAX).count_ones();
            assert_eq!(cleared, device.join().unwrap());
        });
    }
}
