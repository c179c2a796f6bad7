//! Sets of addresses, as ascending disjoint ranges.

use dirtymap::{Iova, IovaRange};

/// A set of addresses.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Ranges(Vec<(u64, u64)>);

impl Ranges {
    /// All addresses of `ranges`, which may touch and overlap.
    pub(crate) fn new(ranges: impl IntoIterator<Item = IovaRange>) -> Self {
        let mut all: Vec<_> = ranges
            .into_iter()
            .map(|range| (range.start().get(), range.last().get()))
            .collect();
        all.sort_unstable();
        let mut merged: Vec<(u64, u64)> = Vec::new();
        for (start, last) in all {
            match merged.last_mut() {
                Some((_, end)) if *end == u64::MAX || start <= *end + 1 => *end = last.max(*end),
                _ => merged.push((start, last)),
            }
        }
        Ranges(merged)
    }

    /// The ranges, ascending, none next to another.
    pub(crate) fn iter(&self) -> impl Iterator<Item = IovaRange> {
        self.0
            .iter()
            .filter_map(|(start, last)| IovaRange::new(Iova::new(*start), Iova::new(*last)).ok())
    }

    /// The addresses in both.
    pub(crate) fn and(&self, other: &Ranges) -> Ranges {
        let mut both = Vec::new();
        let (mut a, mut b) = (self.iter().peekable(), other.iter().peekable());
        while let (Some(left), Some(right)) = (a.peek(), b.peek()) {
            both.extend(left.intersection(*right));
            if left.last() < right.last() {
                a.next();
            } else {
                b.next();
            }
        }
        Ranges::new(both)
    }

    /// The addresses in `self` and not in `other`.
    pub(crate) fn without(&self, other: &Ranges) -> Ranges {
        let mut from = Some(0);
        let mut holes = Vec::new();
        for (start, last) in &other.0 {
            if let Some(from) = from.filter(|from| from < start) {
                holes.push((from, start - 1));
            }
            from = last.checked_add(1);
        }
        holes.extend(from.map(|from| (from, u64::MAX)));
        self.and(&Ranges(holes))
    }

    /// Whether there are none.
    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}
