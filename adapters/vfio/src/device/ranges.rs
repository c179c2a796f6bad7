//! The ranges of a log, and those of areas.

use std::collections::BTreeMap;

use dirtymap::{Granule, Iova, IovaRange};

/// `ranges`, rounded out to `page`, joined where they overlap or touch, and where the gaps are
/// smallest until there are at most `most`.
pub(super) fn combined(ranges: &[IovaRange], page: Granule, most: usize) -> Vec<IovaRange> {
    let mut all: Vec<_> = ranges.iter().map(|range| range.round_out(page)).collect();
    all.sort_by_key(|range| range.start());
    let mut gaps: Vec<u64> = Vec::new();
    let joined = join(&all, 0);
    for pair in joined.windows(2) {
        gaps.push(gap(pair[0], pair[1]));
    }
    let surplus = joined.len().saturating_sub(most.max(1));
    if surplus == 0 {
        return joined;
    }
    // The widest gap that is joined. Gaps of that width may be joined beyond need.
    gaps.sort_unstable();
    join(&joined, gaps[surplus - 1])
}

/// Joins ascending ranges whose gaps are at most `most` bytes wide.
fn join(ranges: &[IovaRange], most: u64) -> Vec<IovaRange> {
    let mut joined: Vec<IovaRange> = Vec::with_capacity(ranges.len());
    for range in ranges {
        match joined.last_mut() {
            Some(below) if gap(*below, *range) <= most => *below = below.hull(*range),
            _ => joined.push(*range),
        }
    }
    joined
}

/// The bytes between two ranges; 0 if they overlap.
fn gap(below: IovaRange, above: IovaRange) -> u64 {
    let from = u128::from(below.last().get()) + 1;
    let gap = u128::from(above.start().get()).saturating_sub(from);
    u64::try_from(gap).unwrap_or(u64::MAX)
}

/// Disjoint ranges: those of areas. Ranges that touch are not joined.
#[derive(Debug, Default)]
pub(super) struct Mapped(BTreeMap<Iova, Iova>);

impl Mapped {
    pub(super) fn add(&mut self, range: IovaRange) {
        self.0.insert(range.start(), range.last());
    }

    /// Removes `range`, and cuts what extends past it.
    pub(super) fn remove(&mut self, range: IovaRange) {
        let touched: Vec<_> = self.touched(range).collect();
        for area in touched {
            self.0.remove(&area.start());
            if let Some(below) = area.below(range.start()) {
                self.add(below);
            }
            let above = range.last().checked_add(1);
            if let Some(Ok(above)) = above.map(|above| IovaRange::new(above, area.last())) {
                self.add(above);
            }
        }
    }

    /// The parts of `range` that are mapped, ascending, joined where they touch.
    pub(super) fn parts(&self, range: IovaRange) -> impl Iterator<Item = IovaRange> {
        let parts = self.touched(range);
        let mut parts = parts
            .filter_map(move |area| area.intersection(range))
            .peekable();
        std::iter::from_fn(move || {
            let mut part = parts.next()?;
            while let Some(next) = parts.next_if(|next| gap(part, *next) == 0) {
                part = part.hull(next);
            }
            Some(part)
        })
    }

    /// The ranges that `range` touches, as a whole.
    fn touched(&self, range: IovaRange) -> impl Iterator<Item = IovaRange> {
        let below = self.0.range(..range.start()).next_back();
        let below = below.filter(|(_, last)| **last >= range.start());
        let from = self.0.range(range.start()..=range.last());
        let all = below.into_iter().chain(from);
        all.filter_map(|(start, last)| IovaRange::new(*start, *last).ok())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)] // helpers of tests
mod tests {
    use super::*;

    fn range(start: u64, last: u64) -> IovaRange {
        IovaRange::new(Iova::new(start), Iova::new(last)).unwrap()
    }

    /// A device logs few ranges. What lies between two of them is then logged as well, and the
    /// smallest gaps cost least.
    #[test]
    fn ranges_with_the_smallest_gaps_are_joined() {
        let page = Granule::K4;
        let pages = |first: u64, last: u64| range(first << 12, (last << 12) + 4095);
        let all = [pages(0, 0), pages(2, 3), pages(10, 10), pages(13, 13)];
        let combined = |most| combined(&all, page, most);
        assert_eq!(combined(4), all);
        assert_eq!(combined(3), [pages(0, 3), all[2], all[3]]);
        assert_eq!(combined(2), [pages(0, 3), pages(10, 13)]);
        assert_eq!(combined(1), [pages(0, 13)]);
        assert_eq!(combined(0), [pages(0, 13)]);
    }

    #[test]
    fn ranges_are_rounded_out_and_overlaps_are_one() {
        let ends = [range(5, 6), range(u64::MAX - 1, u64::MAX), range(0, 5000)];
        let combined = combined(&ends, Granule::K4, 9);
        assert_eq!(combined, [range(0, 8191), range(u64::MAX - 4095, u64::MAX)]);
        assert_eq!(super::combined(&combined, Granule::K4, 1), [IovaRange::ALL]);
    }

    #[test]
    fn what_is_mapped_can_be_removed_in_parts() {
        let mut mapped = Mapped::default();
        mapped.add(range(10, 19));
        mapped.add(range(20, 29));
        mapped.add(range(40, u64::MAX));
        let parts = |mapped: &Mapped, from, to| mapped.parts(range(from, to)).collect::<Vec<_>>();
        assert_eq!(parts(&mapped, 0, 50), [range(10, 29), range(40, 50)]);
        mapped.remove(range(15, 22));
        mapped.remove(range(15, 22));
        assert_eq!(parts(&mapped, 12, 25), [range(12, 14), range(23, 25)]);
        mapped.remove(range(50, u64::MAX));
        assert_eq!(parts(&mapped, 0, u64::MAX).last(), Some(&range(40, 49)));
    }
}
