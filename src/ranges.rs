//! Lists of ranges: joining those that touch, and what lies between them; sets of addresses and of
//! pages.

mod pages;
mod set;

pub(crate) use pages::PageSet;
pub(crate) use set::RangeSet;

use crate::units::{Iova, IovaRange};

/// Adds `range` to `runs`: to the last run, if it does not begin below that one and the two touch
/// or overlap. So of ranges in ascending order, `runs` has the maximal runs.
pub(crate) fn add_joined(runs: &mut Vec<IovaRange>, range: IovaRange) {
    if let Some(last) = runs.last_mut()
        && last.start() <= range.start()
        && let Some(both) = last.joined(range)
    {
        *last = both;
    } else {
        runs.push(range);
    }
}

/// The parts of `range` that lie in none of `taken`, which are disjoint and in ascending order.
pub(crate) fn without(
    range: IovaRange,
    taken: impl IntoIterator<Item = IovaRange>,
) -> impl Iterator<Item = IovaRange> {
    let mut taken = taken.into_iter();
    let mut floor = Some(range.start());
    std::iter::from_fn(move || {
        loop {
            let start = floor?;
            let Some(next) = taken.next() else {
                floor = None;
                return Some(IovaRange::ascending(start, range.last()));
            };
            // A range that ends below the floor does not move it.
            let above = next.last().checked_add(1).map(|above| above.max(start));
            floor = above.filter(|above| *above <= range.last());
            if start < next.start() {
                let last = Iova::new(next.start().get() - 1).min(range.last());
                return Some(IovaRange::ascending(start, last));
            }
        }
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)] // helpers of tests
mod tests {
    use super::*;

    fn range(start: u64, last: u64) -> IovaRange {
        IovaRange::new(Iova::new(start), Iova::new(last)).unwrap()
    }

    /// The ranges that bits of `mask` make, with bit 0 at `base`.
    fn runs_of(mask: u64, base: u64) -> Vec<IovaRange> {
        let runs = crate::words::word_runs(mask);
        runs.map(|(first, last)| range(base + u64::from(first), base + u64::from(last)))
            .collect()
    }

    /// Eight addresses at either end of the address space, and every set of them: single addresses
    /// join to the maximal runs, and what is left of the eight, or of a part of them, is the rest.
    #[test]
    fn runs_and_what_is_between_them_are_those_of_sets() {
        for base in [0, u64::MAX - 7] {
            for mask in 0..256u64 {
                let mut joined = Vec::new();
                for bit in (0..8).filter(|bit| mask >> bit & 1 == 1) {
                    add_joined(&mut joined, range(base + bit, base + bit));
                }
                assert_eq!(joined, runs_of(mask, base));
                for (first, last) in [(0, 7), (0, 3), (2, 5), (4, 7), (3, 3)] {
                    let inside = crate::words::word_mask(first, last);
                    let asked = range(base + u64::from(first), base + u64::from(last));
                    let left: Vec<_> = without(asked, runs_of(mask, base)).collect();
                    assert_eq!(left, runs_of(!mask & inside, base), "{mask:#b} in {asked}");
                }
            }
        }
    }
}
