//! The invalidations that one harvest or unmap owes.

use std::fmt;

use crate::units::{Granule, Iova, IovaRange};
use crate::words::word_runs;

/// The number of disjoint ranges up to which a gather is exact.
const MAX_RANGES: usize = 32;
/// The number of ranges that are left when there were too many.
const KEPT_RANGES: usize = 24;

/// A bounded set of disjoint ranges whose cached translations must be dropped: what Linux calls an
/// `iommu_iotlb_gather`, with up to 32 ranges instead of one.
///
/// Ranges that touch are joined. When there are too many, neighbours with the smallest gaps between
/// them are joined, gaps included, until 24 ranges are left: invalidating more than needed costs
/// time, and never data. An empty gather is a state of its own, not a sentinel range.
///
/// ```
/// use dirtymap::flush::FlushGather;
/// use dirtymap::{Granule, ToIovaRange};
///
/// # fn main() -> Result<(), dirtymap::Error> {
/// let mut gather = FlushGather::new();
/// gather.add((0x1000..0x2000).to_iova_range()?, Granule::K4);
/// gather.add((0x2000..0x3000).to_iova_range()?, Granule::K4);
/// assert_eq!(gather.ranges(), [(0x1000..0x3000).to_iova_range()?]);
/// assert_eq!(gather.entries(), 2);
/// # Ok(())
/// # }
/// ```
#[doc(alias = "iommu_iotlb_gather")]
#[doc(alias = "iotlb_gather")]
#[doc(alias = "iommu_iotlb_sync")]
#[derive(Clone)]
pub struct FlushGather {
    /// Ascending and disjoint, with a gap between neighbours; only the first `len` are in use.
    ranges: [IovaRange; MAX_RANGES],
    len: usize,
    leaves: Option<Leaves>,
    entries: u64,
    tables: bool,
    /// A gap that is no longer than this one, above all ranges, is joined at once. No gap between
    /// neighbours is shorter. 0 until there were too many ranges.
    closest: u64,
}

/// The sizes of the leaves in a gather. An invalidation command may need them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Leaves {
    /// The smallest leaf.
    pub smallest: Granule,
    /// The largest leaf; equal to `smallest` if all have one size.
    pub largest: Granule,
}

impl FlushGather {
    /// An empty gather, which owes nothing.
    pub const fn new() -> Self {
        FlushGather {
            ranges: [IovaRange::ALL; MAX_RANGES],
            len: 0,
            leaves: None,
            entries: 0,
            tables: false,
            closest: 0,
        }
    }

    /// Whether nothing is owed.
    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The ranges to invalidate: ascending and disjoint.
    pub fn ranges(&self) -> &[IovaRange] {
        &self.ranges[..self.len]
    }

    /// The sizes of the leaves that were added; `None` if there are none.
    pub const fn leaves(&self) -> Option<Leaves> {
        self.leaves
    }

    /// Whether all addresses are to be invalidated.
    pub fn is_full(&self) -> bool {
        self.ranges() == [IovaRange::ALL]
    }

    /// How many leaves were added. Saturates at `u64::MAX`.
    pub const fn entries(&self) -> u64 {
        self.entries
    }

    /// Whether tables above the leaves were retired. Then the cached pointers to tables must be
    /// dropped for all the ranges, in addition to the cached leaves.
    pub const fn tables(&self) -> bool {
        self.tables
    }

    /// The bytes that the ranges span, with the gaps that were joined.
    pub fn bytes(&self) -> u128 {
        self.ranges().iter().map(|r| r.len()).sum()
    }

    /// Owes the invalidation of `range`, which is mapped by leaves of size `leaf`.
    #[doc(alias = "iommu_iotlb_gather_add_page")]
    #[inline]
    pub fn add(&mut self, range: IovaRange, leaf: Granule) {
        self.entries = self.entries.saturating_add(1);
        self.widen(Leaves {
            smallest: leaf,
            largest: leaf,
        });
        self.insert(range);
    }

    /// Owes the invalidation of many leaves of one size: bit `n` of `mask` stands for the leaf `n`
    /// after the one at `start`. Does the same as [`add`](Self::add) of each run of them, in
    /// ascending order. Bits past the end of the address space are ignored.
    #[inline]
    pub fn add_many(&mut self, start: Iova, leaf: Granule, mask: u64) {
        let room = (u64::MAX - start.get()) >> leaf.lg2();
        let rest = match room {
            0..63 => mask & ((2 << room) - 1),
            _ => mask,
        };
        if rest != 0 {
            self.add_counted(start, leaf, rest, rest.count_ones());
        }
    }

    /// As [`add_many`](Self::add_many), where `mask` is not 0, has `count` bits set, and all of its
    /// leaves begin inside of the address space.
    #[inline(always)]
    pub(crate) fn add_counted(&mut self, start: Iova, leaf: Granule, mask: u64, count: u32) {
        self.entries = self.entries.saturating_add(count.into());
        self.widen(Leaves {
            smallest: leaf,
            largest: leaf,
        });
        // If all of the gather lies below, gaps that are short enough are joined: here all at once.
        let first = start.get() + (u64::from(mask.trailing_zeros()) << leaf.lg2());
        let end = start.get() + (u64::from(mask.ilog2()) << leaf.lg2());
        if let Some(last) = self.ranges[..self.len].last_mut()
            && last.last() < start
            && first - last.last().get() - 1 <= self.closest
            && let Some(end) = Iova::new(end).checked_add(leaf.mask())
            && !has_gap(mask, (self.closest >> leaf.lg2()) + 1)
        {
            *last = IovaRange::ascending(last.start(), end);
            return;
        }
        self.add_runs(start, leaf, mask);
    }

    /// Inserts the runs of [`add_counted`](Self::add_counted) one by one.
    #[inline(never)]
    fn add_runs(&mut self, start: Iova, leaf: Granule, mask: u64) {
        let at = |nth: u32| Iova::new(start.get() + (u64::from(nth) << leaf.lg2()));
        for (first, last) in word_runs(mask) {
            let end = match at(last).checked_add(leaf.mask()) {
                Some(end) => end,
                // The last leaf begins inside of the address space and ends past it.
                None => IovaRange::granule_at(at(last), leaf).last(),
            };
            self.insert(IovaRange::ascending(at(first), end));
        }
    }

    /// Owes that devices drop their cached pointers to a table that translated `range`, and the
    /// leaves in it. If the table is freed, its memory may be used again only after the flush: see
    /// [`FlushQueue::owe_then`](super::FlushQueue::owe_then).
    pub fn add_table(&mut self, range: IovaRange) {
        self.tables = true;
        self.insert(range);
    }

    /// The same debt, as a full invalidation.
    #[must_use]
    pub fn to_full(&self) -> FlushGather {
        let mut full = self.clone();
        full.insert(IovaRange::ALL);
        full
    }

    /// Adds everything that `other` owes.
    pub fn merge(&mut self, other: &FlushGather) {
        self.tables |= other.tables;
        self.entries = self.entries.saturating_add(other.entries);
        if let Some(leaves) = other.leaves {
            self.widen(leaves);
        }
        for range in other.ranges() {
            self.insert(*range);
        }
    }

    #[inline]
    fn widen(&mut self, leaves: Leaves) {
        if self.leaves == Some(leaves) {
            return;
        }
        self.leaves = Some(match self.leaves {
            None => leaves,
            Some(old) => Leaves {
                smallest: old.smallest.min(leaves.smallest),
                largest: old.largest.max(leaves.largest),
            },
        });
    }

    #[inline]
    fn insert(&mut self, range: IovaRange) {
        // A walk ascends, so the new range nearly always joins or follows the last one.
        if let Some(last) = self.ranges[..self.len].last_mut()
            && last.start() <= range.start()
        {
            if last.touches(range) || gap(*last, range) <= self.closest {
                // The gaps between the other ranges stay the same.
                *last = last.hull(range);
                return;
            }
            if self.len < MAX_RANGES {
                self.ranges[self.len] = range;
                self.len += 1;
                return;
            }
        }
        self.insert_anywhere(range);
    }

    fn insert_anywhere(&mut self, mut range: IovaRange) {
        self.closest = 0; // gaps may become shorter
        // The ranges that touch the new one are `from..to`; they become one with it.
        let from = self
            .ranges()
            .partition_point(|r| r.last() < range.start() && !r.touches(range));
        let mut to = from;
        while to < self.len && self.ranges[to].touches(range) {
            range = range.hull(self.ranges[to]);
            to += 1;
        }
        if to > from {
            self.ranges[from] = range;
            self.ranges.copy_within(to..self.len, from + 1);
            self.len -= to - from - 1;
            return;
        }
        if self.len == MAX_RANGES {
            self.join_closest();
            return self.insert(range);
        }
        self.ranges.copy_within(from..self.len, from + 1);
        self.ranges[from] = range;
        self.len += 1;
    }

    /// Joins the neighbours with the smallest gaps, the lower ones first, until a gather with
    /// [`MAX_RANGES`] has [`KEPT_RANGES`]. So a walk that goes on for long pays for one pass over
    /// the ranges from time to time, and not for each range.
    #[inline(never)]
    fn join_closest(&mut self) {
        const JOINED: usize = MAX_RANGES - KEPT_RANGES;
        let gaps: [u64; MAX_RANGES - 1] =
            std::array::from_fn(|nth| gap(self.ranges[nth], self.ranges[nth + 1]));
        let mut shortest = gaps;
        shortest.select_nth_unstable(JOINED - 1);
        let longest = shortest[JOINED - 1];
        // How many of those that are as long as the longest one are joined.
        let as_long = |gap: &&u64| **gap == longest;
        let mut as_long = shortest[..JOINED].iter().filter(as_long).count();
        self.len = 1;
        for (nth, gap) in gaps.into_iter().enumerate() {
            let range = self.ranges[nth + 1];
            if gap < longest || gap == longest && as_long > 0 {
                as_long -= usize::from(gap == longest);
                let last = &mut self.ranges[self.len - 1];
                *last = last.hull(range);
            } else {
                self.ranges[self.len] = range;
                self.len += 1;
            }
        }
        self.closest = longest;
    }
}

impl Default for FlushGather {
    fn default() -> Self {
        FlushGather::new()
    }
}

impl fmt::Debug for FlushGather {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FlushGather")
            .field("ranges", &self.ranges())
            .field("leaves", &self.leaves)
            .field("entries", &self.entries)
            .field("tables", &self.tables)
            .finish()
    }
}

/// Whether `mask`, which is not 0, has at least `zeros` zeros in a row between two of its ones.
#[inline(always)]
fn has_gap(mask: u64, zeros: u64) -> bool {
    if zeros < 32 {
        return has_short_gap(mask, zeros);
    }
    // So many lie in the middle.
    let (low, high) = (mask as u32, (mask >> 32) as u32);
    low != 0 && high != 0 && u64::from(low.leading_zeros() + high.trailing_zeros()) >= zeros
}

#[inline(never)]
fn has_short_gap(mask: u64, zeros: u64) -> bool {
    let inside = (u64::MAX << mask.trailing_zeros()) & (u64::MAX >> mask.leading_zeros());
    let mut begins = !mask & inside;
    // Where `found` zeros in a row begin, twice as many begin if another `found` follow them.
    let mut found = 1;
    while found < zeros && begins != 0 {
        let more = found.min(zeros - found);
        begins &= begins >> more;
        found += more;
    }
    begins != 0
}

/// The bytes between two ranges; `low` lies below `high`.
#[inline]
fn gap(low: IovaRange, high: IovaRange) -> u64 {
    high.start().get() - low.last().get() - 1
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    fn range(start: u64, len: u64) -> IovaRange {
        IovaRange::from_len(Iova::new(start), len).unwrap()
    }

    #[test]
    fn many_at_once_are_as_many_one_by_one() {
        let mut x = 0x9E37_79B9_7F4A_7C15u64;
        let mut next = || {
            x ^= x << 13;
            x ^= x >> 7;
            x ^= x << 17;
            x
        };
        for size in [Granule::K4, Granule::M2] {
            for sparse in 0..6 {
                let (mut many, mut single) = (FlushGather::new(), FlushGather::new());
                let mut leaves = 0;
                for nth in 0..if cfg!(miri) { 20 } else { 2000u64 } {
                    let mask = (0..sparse).fold(next(), |mask, _| mask & next());
                    // Mostly ascending, as a walk is; sometimes anywhere.
                    let word = if next() % 50 == 0 { next() % 4000 } else { nth };
                    let start = Iova::new((word * 64) << size.lg2());
                    many.add_many(start, size, mask);
                    let mut bits = 0..64;
                    while let Some(first) = bits.find(|bit| mask >> bit & 1 != 0) {
                        let end = bits.find(|bit| mask >> bit & 1 == 0).unwrap_or(64);
                        let run = Iova::new(start.get() + (first << size.lg2()));
                        let bytes = (end - first) << size.lg2();
                        single.insert(IovaRange::from_len(run, bytes).unwrap());
                    }
                    leaves += u64::from(mask.count_ones());
                    assert_eq!(many.ranges(), single.ranges());
                    assert_eq!(many.closest, single.closest);
                    assert!(many.closest <= gaps(&many).min().unwrap_or(0));
                }
                let same = Leaves {
                    smallest: size,
                    largest: size,
                };
                assert_eq!((many.entries(), many.leaves()), (leaves, Some(same)));
            }
        }
        let mut last = FlushGather::new();
        last.add_many(Iova::new(u64::MAX - 0xfff), Granule::K4, u64::MAX);
        assert_eq!((last.entries(), last.ranges()[0].len()), (1, 4096));
    }

    fn gaps(gather: &FlushGather) -> impl Iterator<Item = u64> + '_ {
        gather.ranges().windows(2).map(|two| gap(two[0], two[1]))
    }

    /// However long a walk is, a gap goes only if 23 others are no shorter.
    #[test]
    fn a_walk_keeps_the_longest_gaps() {
        let mut x = 0x2545_F491_4F6C_DD1Du64;
        for bits in [3, 20] {
            let mut gather = FlushGather::new();
            let (mut at, mut all) = (0, Vec::new());
            for nth in 0..if cfg!(miri) { 100 } else { 2000 } {
                x ^= x << 13;
                x ^= x >> 7;
                x ^= x << 17;
                let gap = (1 + (x >> 8) % (1 << bits)) << 12;
                if nth > 0 {
                    all.push(gap);
                    at += gap;
                }
                gather.add(range(at, 0x1000), Granule::K4);
                at += 0x1000;
                let kept: Vec<_> = gaps(&gather).collect();
                assert!(kept.len() >= all.len().min(KEPT_RANGES - 1));
                assert!(kept.len() < MAX_RANGES);
                assert!(kept.iter().all(|gap| *gap >= gather.closest));
                let longer =
                    |some: &[u64]| some.iter().filter(|gap| **gap > gather.closest).count();
                assert_eq!(longer(&kept), longer(&all), "after {nth}");
            }
        }
    }

    #[test]
    fn keeps_every_page_and_stays_sorted_disjoint_and_bounded() {
        let mut x = 0x2545_F491_4F6C_DD1Du64;
        for _ in 0..if cfg!(miri) { 4 } else { 400 } {
            let mut gather = FlushGather::new();
            let mut pages = BTreeSet::new();
            for _ in 0..x % 90 {
                x ^= x << 13;
                x ^= x >> 7;
                x ^= x << 17;
                let (page, len) = (x >> 8 & 0x3ff, 1 + (x >> 4 & 3));
                gather.add(range(page * 4096, len * 4096), Granule::K4);
                pages.extend(page..page + len);
                let ranges = gather.ranges();
                assert!(ranges.len() <= MAX_RANGES);
                assert!(
                    ranges
                        .windows(2)
                        .all(|w| w[0].last() < w[1].start() && !w[0].touches(w[1]))
                );
                assert!(
                    pages
                        .iter()
                        .all(|p| ranges.iter().any(|r| r.contains(Iova::new(p * 4096))))
                );
            }
            if pages.len() < MAX_RANGES {
                assert_eq!(
                    gather.bytes(),
                    pages.len() as u128 * 4096,
                    "nothing is joined below the bound"
                );
            }
            x = x.wrapping_add(0x9E37_79B9_7F4A_7C15) | 1;
        }
    }

    #[test]
    fn the_borders_of_the_address_space_do_not_wrap() {
        let mut gather = FlushGather::new();
        gather.add(range(u64::MAX - 4095, 4096), Granule::K4);
        gather.add(range(0, 4096), Granule::M2);
        assert_eq!(
            gather.ranges(),
            [range(0, 4096), range(u64::MAX - 4095, 4096)]
        );
        gather.add(IovaRange::ALL, Granule::G1);
        assert_eq!(gather.ranges(), [IovaRange::ALL]);
        assert_eq!(gather.bytes(), 1 << 64);
        assert_eq!(
            gather.leaves(),
            Some(Leaves {
                smallest: Granule::K4,
                largest: Granule::G1
            })
        );
    }

    #[test]
    fn a_gather_merged_to_and_fro_stops_counting_and_does_not_wrap() {
        let mut pair = [FlushGather::new(), FlushGather::new()];
        pair[0].add(range(0, 4096), Granule::K4);
        for _ in 0..100 {
            let [a, b] = &mut pair;
            a.merge(b);
            b.merge(a);
        }
        assert_eq!(pair[0].entries(), u64::MAX);
        assert_eq!(pair[0].ranges(), [range(0, 4096)]);
    }

    #[test]
    fn a_table_that_goes_is_owed_without_leaves_and_survives_merging() {
        let mut table = FlushGather::new();
        table.add_table(range(2 << 20, 2 << 20));
        assert!(table.tables() && !table.is_empty());
        assert_eq!((table.entries(), table.leaves()), (0, None));
        let mut both = FlushGather::new();
        both.add(range(0, 4096), Granule::K4);
        assert!(!both.tables());
        both.merge(&table);
        assert_eq!(
            (both.tables(), both.entries(), both.ranges().len()),
            (true, 1, 2)
        );
        let full = both.to_full();
        assert!(full.is_full() && !both.is_full());
        assert_eq!(
            (full.tables(), full.entries(), full.leaves()),
            (true, 1, both.leaves())
        );
    }

    #[test]
    fn past_the_bound_the_smallest_gaps_go() {
        let mut gather = FlushGather::new();
        for i in 0..=MAX_RANGES as u64 {
            // Every fourth one is close to the next.
            let shift = if i % 4 == 0 { 0x8000 } else { 0 };
            gather.add(range(i * 0x1_0000 + shift, 0x1000), Granule::K4);
        }
        let joined = (MAX_RANGES - KEPT_RANGES) as u64;
        assert_eq!(gather.ranges().len(), KEPT_RANGES + 1);
        assert_eq!(
            gather.bytes(),
            u128::from((MAX_RANGES as u64 + 1) * 0x1000 + joined * 0x7000)
        );
    }

    /// A gather knows a lower bound of its gaps only as long as it grows at its end. A range in the
    /// middle makes smaller gaps. Then a larger one at the end is not joined before these.
    #[test]
    fn past_the_bound_a_gap_is_joined_only_if_none_is_smaller() {
        let mut gather = FlushGather::new();
        for i in 0..=MAX_RANGES as u64 {
            gather.add(range(i * 0x1_0000, 0x1000), Granule::K4);
        }
        let end = (MAX_RANGES as u64 + 1) * 0x1_0000;
        let bytes = gather.bytes();
        gather.add(range(end, 0x1000), Granule::K4); // no larger than those that were joined
        assert_eq!(gather.bytes(), bytes + 0x1_0000);
        gather.add(range(end - 0x2_8000, 0x1000), Granule::K4); // leaves gaps of 0x7000
        gather.add(range(end + 0xa000, 0x1000), Granule::K4); // 0x9000 above
        assert_eq!(gather.bytes(), bytes + 0x1_2000);
    }
}
