//! A set of addresses as ranges.

use std::collections::BTreeMap;

use super::without;
use crate::units::{Iova, IovaRange};

/// Disjoint ranges that do not touch, by first address.
///
/// A call costs a search, and a step for each range that its part joins. A joined range no longer
/// exists, so parts in any order cost O(log n) each, and any number of parts that touch are one
/// range.
#[derive(Clone, Debug, Default)]
pub(crate) struct RangeSet {
    /// The first address of each range, with its last.
    runs: BTreeMap<Iova, Iova>,
}

impl RangeSet {
    /// The empty set. Allocates nothing.
    pub(crate) const fn new() -> Self {
        RangeSet {
            runs: BTreeMap::new(),
        }
    }

    /// The parts of `range` that are not in the set, in ascending order.
    pub(crate) fn without(&self, range: IovaRange) -> impl Iterator<Item = IovaRange> + '_ {
        let below = self.runs.range(..range.start()).next_back();
        let below = below.filter(|(_, last)| **last >= range.start());
        let above = self.runs.range(range.start()..=range.last());
        let inside = below.into_iter().chain(above);
        without(
            range,
            inside.map(|(start, last)| IovaRange::ascending(*start, *last)),
        )
    }

    /// Adds `part`, and returns how many ranges it was joined with.
    pub(crate) fn add(&mut self, part: IovaRange) -> usize {
        let (start, mut last) = (part.start(), part.last());
        let mut joined = 0;
        // The ranges that begin in the part or right above it.
        let above = part.last().checked_add(1).unwrap_or(part.last());
        while let Some((&from, &to)) = self.runs.range(start..=above).next() {
            self.runs.remove(&from);
            last = last.max(to);
            joined += 1;
        }
        // The range that begins below the part. It grows in place, so ascending parts allocate
        // nothing.
        if let Some((_, to)) = self.runs.range_mut(..start).next_back()
            && to.checked_add(1).is_none_or(|next| next >= start)
        {
            *to = last.max(*to);
            return joined + 1;
        }
        self.runs.insert(start, last);
        joined
    }

    /// Removes `part`. Returns the ranges that were removed, in ascending order.
    pub(crate) fn remove(&mut self, part: IovaRange) -> Vec<IovaRange> {
        let mut removed = Vec::new();
        // The last range that begins at the end of the part or below it, while it reaches the part.
        while let Some((&start, &last)) = self.runs.range(..=part.last()).next_back()
            && last >= part.start()
        {
            self.runs.remove(&start);
            let run = IovaRange::ascending(start, last);
            for rest in without(run, [part]) {
                self.runs.insert(rest.start(), rest.last());
            }
            removed.extend(run.intersection(part));
        }
        removed.reverse();
        removed
    }

    /// Whether it has nothing.
    pub(crate) fn is_empty(&self) -> bool {
        self.runs.is_empty()
    }

    /// The ranges in ascending order.
    pub(crate) fn iter(&self) -> impl Iterator<Item = IovaRange> + '_ {
        let runs = self.runs.iter();
        runs.map(|(start, last)| IovaRange::ascending(*start, *last))
    }

    /// The number of ranges.
    pub(crate) fn len(&self) -> usize {
        self.runs.len()
    }
}

#[cfg(all(test, not(dirtymap_loom)))]
#[allow(clippy::unwrap_used)] // helpers of tests
mod tests {
    use super::*;

    fn range(start: u64, last: u64) -> IovaRange {
        IovaRange::new(Iova::new(start), Iova::new(last)).unwrap()
    }

    /// Every order of parts of a small range, against one flag for each address.
    #[test]
    fn parts_in_any_order_are_what_flags_say() {
        let mut state = 1u64;
        let mut below = |bound: u64| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            (state >> 33) % bound
        };
        for _ in 0..2000 {
            let (mut committed, mut flags) = (RangeSet::new(), [false; 40]);
            for _ in 0..12 {
                let first = below(40);
                let part = range(first, (first + below(8)).min(39));
                let flags_of = |flags: &[bool; 40], asked: IovaRange| -> Vec<u64> {
                    (asked.start().get()..=asked.last().get())
                        .filter(|at| !flags[*at as usize])
                        .collect()
                };
                for asked in [part, range(0, 39)] {
                    let fresh: Vec<IovaRange> = committed.without(asked).collect();
                    let told = fresh
                        .iter()
                        .flat_map(|run| run.start().get()..=run.last().get());
                    assert_eq!(told.collect::<Vec<u64>>(), flags_of(&flags, asked));
                    let apart =
                        |pair: &[IovaRange]| pair[0].last().get() + 1 < pair[1].start().get();
                    assert!(fresh.windows(2).all(apart), "{fresh:?} are not maximal");
                }
                let add = below(3) > 0;
                if add {
                    committed.add(part);
                } else {
                    let removed = committed.remove(part);
                    let gone = removed
                        .iter()
                        .flat_map(|run| run.start().get()..=run.last().get());
                    let were_in = (part.start().get()..=part.last().get())
                        .filter(|at| flags[*at as usize])
                        .collect::<Vec<u64>>();
                    assert_eq!(gone.collect::<Vec<u64>>(), were_in);
                }
                (part.start().get()..=part.last().get()).for_each(|at| flags[at as usize] = add);
                let told = committed
                    .iter()
                    .flat_map(|run| run.start().get()..=run.last().get());
                let set = (0..40).filter(|at| flags[*at as usize]);
                assert!(told.eq(set));
                assert_eq!(committed.is_empty(), flags == [false; 40]);
            }
        }
        let mut all = RangeSet::new();
        all.add(range(5, u64::MAX));
        all.add(range(0, 4));
        assert_eq!((all.len(), all.without(IovaRange::ALL).count()), (1, 0));
    }

    /// The runs of a lease were in one sorted list: 160,000 of them took 0.06 s ascending and 6.9 s
    /// descending, because each insert moved all others. This test counts the ranges that a call
    /// touches, and the ranges that exist.
    #[test]
    fn parts_cost_as_much_at_the_end_as_at_the_beginning() {
        const PARTS: u64 = 20_000;
        let part = |n: u64| range(n * 10, n * 10 + 4);
        let touching = |n: u64| range(n * 10, n * 10 + 9);
        let shuffled = |n: u64| n * 7919 % PARTS;
        let orders: [&dyn Fn(u64) -> u64; 3] = [&|n| n, &|n| PARTS - 1 - n, &shuffled];
        for order in orders {
            let mut apart = RangeSet::new();
            for n in 0..PARTS {
                let part = part(order(n));
                assert_eq!(apart.without(part).count(), 1);
                assert_eq!(apart.add(part), 0);
            }
            assert_eq!(apart.len() as u64, PARTS);
            // Two joined ranges are one from then on, so there are fewer joins than calls.
            let (mut joined, mut all) = (0, RangeSet::new());
            for n in 0..PARTS {
                joined += all.add(touching(order(n)));
            }
            assert_eq!((all.len(), joined as u64), (1, PARTS - 1));
        }
        // In order, there is never more than one.
        let mut ascending = RangeSet::new();
        for n in 0..PARTS {
            ascending.add(touching(n));
            assert_eq!(ascending.len(), 1);
        }
    }
}
