//! Scans for dirty leaves: up to 64 entries at a time, which is a word of a bitmap.
//!
//! ```text
//!  64 entries:  [8][8][8][8][8][8][8][8]   OR of each line of eight; a mask of the lines that
//!                                          have anything to look at. Where the last 64 had
//!                                          much, the mask of all lines, without branches
//!  the mask:    leaves of one entry        recorded by one OR, owed in one call, then cleared
//!               groups, tables             entry by entry, in order
//! ```
//!
//! A clean entry costs a load and an OR, without a write or a lock.

use std::ops::RangeInclusive;

use crossbeam_epoch::Guard;
use dirtymap::source::Stopped;
use dirtymap::sync::{Ordering, Step, performs};
use dirtymap::{Iova, IovaRange};

use super::entries::any_dirty;
use super::leaf::{Batch, DirtyLeaf, Found};
use super::page::child;
use super::tree::Table;
use super::wide::{WIDE, Wide, is_wide};
use crate::fmt::{AtomicIopte, Format, Iopte};

/// The number of entries that are looked at together.
const WORD: usize = 64;
/// Entries in a line of the cache.
const LINE: usize = 8;

/// An entry that leads to a table, as the scan read it.
pub(super) struct Upper<'g> {
    pub(super) slot: &'g AtomicIopte,
    pub(super) entry: Iopte,
    pub(super) level: u32,
    pub(super) span: IovaRange,
    /// The scan covers everything below.
    pub(super) whole: bool,
}

/// The purpose of a scan.
pub(super) trait Visitor<F: Format> {
    /// The state that the visitor keeps while the scan is below an entry.
    type Look;

    /// A dirty leaf.
    fn leaf(&mut self, leaf: &DirtyLeaf<'_>) -> Result<(), dirtymap::Error>;
    /// The leaves of `batch` that `mask` has set, at least one: all are dirty, and inside the
    /// scanned range.
    fn leaves(&mut self, batch: &Batch<'_>, mask: u64) -> Result<(), Stopped>;
    /// Whether the scan need not look below an entry with this value, which leads to a table.
    fn skips(&self, entry: Iopte) -> bool;
    /// An entry that leads to a table; `None` if the scan need not look there.
    fn enter(&mut self, upper: &Upper<'_>) -> Option<Self::Look>;
    /// The scan comes back from there; an error of [`leaf`](Self::leaf) may have ended it early.
    fn leave(&mut self, upper: &Upper<'_>, look: Self::Look);
}

impl<F: Format> Table<F> {
    /// Visits the dirty leaves that `range` touches, in order.
    pub(super) fn scan(
        &self,
        range: IovaRange,
        visit: &mut impl Visitor<F>,
    ) -> Result<(), Stopped> {
        let guard = crossbeam_epoch::pin();
        let mut scan = Scan {
            visit,
            guard: &guard,
            dense: false,
        };
        for part in Self::reach().filter_map(|reach| reach.intersection(range)) {
            scan.table::<F>(&self.root, F::LEVELS - 1, part, None)?;
        }
        Ok(())
    }
}

struct Scan<'v, V> {
    visit: &'v mut V,
    guard: &'v Guard,
    /// Whether the last entries had much to look at.
    dense: bool,
}

/// The summary of some entries for a scan.
#[derive(Clone, Copy)]
struct Seen {
    /// The entries that the scan must look at.
    mask: u64,
    /// The OR of at least those.
    any: u64,
    /// The AND of them, for formats whose leaves have a bit.
    all: u64,
}

impl<V> Scan<'_, V> {
    /// Visits the dirty leaves of `range` in the subtree of `page`, a table of `level`. `ahead` is
    /// the table that comes next.
    fn table<F>(
        &mut self,
        page: &[AtomicIopte],
        level: u32,
        range: IovaRange,
        ahead: Option<&[AtomicIopte]>,
    ) -> Result<(), Stopped>
    where
        F: Format,
        V: Visitor<F>,
    {
        // A leaf that sticks out may be dirty by an entry outside of the range only.
        let first = group_at::<F>(page, level, F::index(range.start().get(), level)).0;
        let last = group_at::<F>(page, level, F::index(range.last().get(), level)).1;
        // Entries below this one belong to a leaf that was visited.
        let mut next = first;
        let mut at = first;
        while at <= last {
            if !self.dense {
                at += clean_lines::<F>(&page[at..=last], level, ahead.map(|table| &table[at..]));
                if at > last {
                    break;
                }
            }
            // From the start of a word on, so that the mask is a word of the bitmap: the entries
            // before it are clean.
            let begin = (at & !(WORD - 1)).max(first);
            let end = (at | (WORD - 1)).min(last) + 1;
            let mut seen =
                self.look::<F>(&page[at..end], level, ahead.map(|table| &table[at..end]));
            seen.mask <<= at - begin;
            self.dense = is_dense(seen.mask);
            if seen.mask != 0 {
                let batch = Batch {
                    slots: &page[begin..end],
                    level,
                    start: Iova::new(address_of::<F>(range, level, begin)),
                    size: F::size(level),
                };
                if next <= begin && batch.is_inside(range) && all_single::<F>(&batch, seen) {
                    self.visit.leaves(&batch, seen.mask)?;
                } else {
                    for index in at..end {
                        let line = seen.mask >> ((index - begin) & !(LINE - 1)) & 0xff;
                        if line != 0 && index >= next {
                            next = self.entry::<F>(page, level, index, range)?;
                        }
                    }
                }
            }
            at = end;
        }
        Ok(())
    }

    /// Looks at up to 64 entries, and has the processor fetch as many `ahead`.
    #[inline]
    fn look<F: Format>(
        &self,
        slots: &[AtomicIopte],
        level: u32,
        ahead: Option<&[AtomicIopte]>,
    ) -> Seen {
        if let Some(table) = ahead {
            let lines = table.as_chunks::<LINE>().0;
            lines.iter().for_each(|line| line[0].prefetch());
        }
        if level > 0 && (self.dense || is_wide::<F>()) {
            // D alone is a test by fewer instructions, and enough among leaves of one entry.
            let seen = look::<F, true, true>(slots, 0);
            if seen.only_single::<F>(level) {
                return seen;
            }
        }
        match (level, self.dense) {
            (0, false) => look::<F, true, false>(slots, 0),
            (0, true) => look::<F, true, true>(slots, 0),
            (_, false) => look::<F, false, false>(slots, level),
            (_, true) => look::<F, false, true>(slots, level),
        }
    }

    /// Visits the dirty leaves that `range` touches under one entry of a table of `level`. Returns
    /// the next entry to look at.
    fn entry<F>(
        &mut self,
        page: &[AtomicIopte],
        level: u32,
        index: usize,
        range: IovaRange,
    ) -> Result<usize, Stopped>
    where
        F: Format,
        V: Visitor<F>,
    {
        // Acquire: pairs with the Release that installed the entry, in `map`; publishes the table
        // it leads to.
        let entry = page[index].load(Ordering::Acquire);
        if !F::is_present(entry) {
            return Ok(index + 1);
        }
        let start = Iova::new(address_of::<F>(range, level, index));
        let span = IovaRange::granule_at(start, F::size(level));
        if !F::is_leaf(entry, level) {
            if let Some(part) = span.intersection(range) {
                let upper = Upper {
                    slot: &page[index],
                    entry,
                    level,
                    span,
                    whole: part == span,
                };
                if let Some(look) = self.visit.enter(&upper) {
                    let child = child::<F>(entry, self.guard);
                    let skips = |entry| self.visit.skips(entry);
                    let last = F::index(range.last().get(), level);
                    let ahead = ahead::<F>(page, level, index..=last, self.guard, skips);
                    let done = self.table::<F>(child, level - 1, part, ahead);
                    self.visit.leave(&upper, look);
                    done?;
                }
            }
            return Ok(index + 1);
        }
        let found = Found {
            page,
            level,
            index,
            entry,
            span,
        };
        let (group, leaf) = (found.group::<F>(), found.range::<F>());
        let next = (index & !(group.len() - 1)) + group.len();
        let seen =
            F::is_dirty(entry) || performs(Step::ReadEveryEntry) && any_dirty::<F>(group, level);
        if seen && let Some(part) = leaf.intersection(range) {
            let size = found.size::<F>();
            let leaf = DirtyLeaf {
                group,
                level,
                span: leaf,
                size,
            };
            self.visit.leaf(&leaf).map_err(|error| Stopped {
                at: part.start(),
                error,
            })?;
        }
        Ok(next)
    }
}

/// The lowest table that comes after that of the first of `entries` of `page`, a table of `level`,
/// and that the scan, which ends with the last of them, does not skip. Even where it follows in
/// memory, a processor that fetches ahead by itself begins anew with each table.
fn ahead<'g, F: Format>(
    page: &[AtomicIopte],
    level: u32,
    entries: RangeInclusive<usize>,
    guard: &'g Guard,
    skips: impl Fn(Iopte) -> bool,
) -> Option<&'g [AtomicIopte]> {
    if level != 1 || cfg!(dirtymap_loom) {
        return None;
    }
    page.get(entries)?.iter().skip(1).find_map(|slot| {
        // Acquire: as the load in `entry`.
        let entry = slot.load(Ordering::Acquire);
        let is_table = F::is_present(entry) && !F::is_leaf(entry, level);
        (is_table && !skips(entry)).then(|| child::<F>(entry, guard))
    })
}

/// How many of the entries, in whole lines, come before the first line with anything to look at;
/// has the processor fetch as many `ahead`.
#[inline]
fn clean_lines<F: Format>(
    slots: &[AtomicIopte],
    level: u32,
    ahead: Option<&[AtomicIopte]>,
) -> usize {
    let (lines, rest) = slots.as_chunks::<LINE>();
    let clean = match (level, ahead) {
        (0, None) => lines.iter().position(|line| any::<F, true>(line, 0) != 0),
        (_, None) => lines
            .iter()
            .position(|line| any::<F, false>(line, level) != 0),
        (_, Some(ahead)) => {
            lines
                .iter()
                .zip(ahead.as_chunks::<LINE>().0)
                .position(|(line, next)| {
                    next[0].prefetch();
                    match level {
                        0 => any::<F, true>(line, 0) != 0,
                        _ => any::<F, false>(line, level) != 0,
                    }
                })
        }
    };
    match clean {
        Some(clean) => clean * LINE,
        // The rest is too short for a test.
        None => slots.len() - rest.len(),
    }
}

/// Not zero if a line of a table of `level`, the lowest one if it is `LOW`, has anything to look
/// at.
#[inline]
fn any<F: Format, const LOW: bool>(line: &[AtomicIopte; LINE], level: u32) -> u64 {
    // Relaxed: only decides whether to look closer. A D that was set before the harvest began is
    // seen: the harvester learned that the write is done, and that orders this load after it.
    let entries = line.iter().map(|slot| slot.load(Ordering::Relaxed));
    // With a level that the compiler knows, the test is one AND of the OR.
    let level = if LOW { 0 } else { level };
    entries.fold(0, |any, entry| any | F::worth_a_look(entry, level))
}

/// Looks at entries of a table of `level`, the lowest one if it is `LOW`: without branches if it is
/// `DENSE`.
#[inline]
fn look<F: Format, const LOW: bool, const DENSE: bool>(slots: &[AtomicIopte], level: u32) -> Seen {
    let mut seen = Seen {
        mask: 0,
        any: 0,
        all: u64::MAX,
    };
    let mut at = 0;
    if LOW && is_wide::<F>() {
        let mut wide = Wide::new();
        for entries in slots.as_chunks::<WIDE>().0 {
            seen.mask |= wide.look::<F>(entries) << at;
            at += WIDE;
        }
        (seen.any, seen.all) = wide.any_all();
    }
    let (lines, rest) = slots[at..].as_chunks::<LINE>();
    for line in lines {
        if DENSE || any::<F, LOW>(line, level) != 0 {
            seen.add::<F, LOW>(line, level, at);
        }
        at += LINE;
    }
    if !rest.is_empty() {
        seen.add::<F, LOW>(rest, level, at);
    }
    seen
}

impl Seen {
    /// Adds the entries of a line, the first of which is the entry `at`.
    #[inline]
    fn add<F: Format, const LOW: bool>(&mut self, line: &[AtomicIopte], level: u32, at: usize) {
        let level = if LOW { 0 } else { level };
        let mut mask = 0;
        for (nth, slot) in line.iter().enumerate() {
            // Relaxed: as in `look`; a clear of D derives from the value at that time.
            let entry = slot.load(Ordering::Relaxed);
            self.any |= entry.0;
            if F::TABLE_SET == 0 {
                self.all &= entry.0;
            }
            mask |= u64::from(F::worth_a_look(entry, level) != 0) << nth;
        }
        self.mask |= mask << at;
    }

    /// Whether all that was seen are leaves of one entry each, or absent.
    #[inline]
    fn only_single<F: Format>(self, level: u32) -> bool {
        let no_table = level == 0
            || F::TABLE_SET != 0 && self.any & F::TABLE_SET == 0
            || F::LEAF_SET != 0 && self.all & F::LEAF_SET != 0;
        self.any & F::GROUPED == 0 && no_table
    }
}

/// Whether so many of 64 entries had anything to look at that the next 64 are looked at without
/// branches: three, since mispredicted ones cost more then than the loads that they save.
#[inline]
fn is_dense(mask: u64) -> bool {
    let without_lowest = mask & mask.wrapping_sub(1);
    without_lowest & without_lowest.wrapping_sub(1) != 0
}

/// Whether all that was `seen` are leaves of one entry each. One that is merged into a larger leaf
/// in between does no harm: it stays as it is.
#[inline]
fn all_single<F: Format>(batch: &Batch<'_>, seen: Seen) -> bool {
    seen.only_single::<F>(batch.level)
        || batch.level > 0 && each_single::<F>(batch.slots, batch.level, seen.mask)
}

/// The same, of a batch where some are something else: entry by entry.
fn each_single<F: Format>(slots: &[AtomicIopte], level: u32, mask: u64) -> bool {
    let mut rest = mask;
    while rest != 0 {
        // Relaxed: only decides how to look.
        let entry = slots[rest.trailing_zeros() as usize].load(Ordering::Relaxed);
        let leaf = F::is_present(entry) && F::is_leaf(entry, level);
        if !leaf || entry.0 & F::GROUPED != 0 {
            return false;
        }
        rest &= rest - 1;
    }
    true
}

/// The first address of the entry `index` of a table of `level` that covers `range`.
#[inline]
fn address_of<F: Format>(range: IovaRange, level: u32, index: usize) -> u64 {
    // The bits above the table's span come from the range, those below from the index.
    let from = range.start().granule_start(F::size(level)).get();
    let away = (index as u64).wrapping_sub(F::index(from, level) as u64) << F::size(level).lg2();
    from.wrapping_add(away)
}

/// The first and the last entry of the leaf that entry `index` belongs to; the entry itself if it
/// holds none.
fn group_at<F: Format>(page: &[AtomicIopte], level: u32, index: usize) -> (usize, usize) {
    // Relaxed: only says where to look.
    let entry = page[index].load(Ordering::Relaxed);
    if !F::is_present(entry) || !F::is_leaf(entry, level) {
        return (index, index);
    }
    let others = (1 << F::group_lg2(entry, level)) - 1;
    (index & !others, index | others)
}

#[cfg(test)]
#[cfg(not(dirtymap_loom))]
mod tests {
    use super::*;
    use crate::fmt::{AmdV1, ArmS1, Riscv, VtdSs, X86_64};

    /// Entries with these values, whatever they mean.
    fn slots(values: &[u64]) -> Vec<AtomicIopte> {
        let slot = |value: &u64| {
            let slot = AtomicIopte::absent();
            let new = Iopte(*value);
            let done = slot.replace(Iopte::ABSENT, new, Ordering::Relaxed, Ordering::Relaxed);
            assert!(done.is_ok());
            slot
        };
        values.iter().map(slot).collect()
    }

    fn agrees<F: Format>(values: &[u64]) {
        let seen = look::<F, true, true>(&slots(values), 0);
        let worth = |nth: usize| F::worth_a_look(Iopte(values[nth]), 0) != 0;
        let expected = (0..values.len()).fold(0, |mask, nth| mask | u64::from(worth(nth)) << nth);
        assert_eq!(seen.mask, expected, "{values:x?}");
        let others = F::GROUPED | F::TABLE_SET;
        let any = values.iter().fold(0, |any, value| any | value) & others;
        let all = values.iter().fold(u64::MAX, |all, value| all & value) & F::LEAF_SET;
        assert_eq!(seen.any & others, any);
        // Formats that need no AND have none.
        assert!(F::LEAF_SET == 0 || F::TABLE_SET != 0 || seen.all & F::LEAF_SET == all);
    }

    /// The look by vectors finds in each entry what the look at this entry alone finds, for words
    /// of every length, whatever bits are set around D.
    #[test]
    fn entries_that_are_looked_at_together_are_as_each_of_them() {
        let mut x = 0x9E37_79B9_7F4A_7C15u64;
        let mut next = || {
            x ^= x << 13;
            x ^= x >> 7;
            x ^= x << 17;
            x
        };
        for len in 0..=WORD {
            for dense in 0..4 {
                // Few zeros, or few ones.
                let word = (0..dense).fold(next(), |word, _| word & next());
                let flip = if next() % 2 == 0 { u64::MAX } else { 0 };
                let values: Vec<u64> = (0..len).map(|_| (next() & next() & word) ^ flip).collect();
                agrees::<AmdV1>(&values);
                agrees::<VtdSs<4>>(&values);
                agrees::<X86_64<4>>(&values);
                agrees::<ArmS1>(&values);
                agrees::<Riscv<4>>(&values);
            }
        }
        // Each bit of each entry, alone.
        for nth in 0..WORD {
            for bit in 0..64 {
                let mut values = [0; WORD];
                values[nth] = 1 << bit;
                agrees::<AmdV1>(&values);
                agrees::<VtdSs<4>>(&values);
                agrees::<X86_64<4>>(&values);
            }
        }
    }
}
