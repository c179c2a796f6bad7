//! When a flush is due, and whether it invalidates ranges or everything. Arithmetic without state.

use std::time::{Duration, Instant};

use super::FlushGather;

/// The bounds at which a debt is due although no thread waits for it. `None` is no bound; the
/// default has none.
///
/// The queue has no thread of its own. A thread that hands over a gather calls
/// [`flush_due`](super::FlushQueue::flush_due) afterwards, and so pays when a bound is reached. For
/// the bound on age, a timer calls it too.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FlushPolicy {
    /// Due when this many gathers wait for a flush.
    pub max_pending: Option<u64>,
    /// Due when the ranges that wait span this many bytes.
    pub max_bytes: Option<u128>,
    /// Due when the oldest gather has waited this long.
    pub max_age: Option<Duration>,
}

impl FlushPolicy {
    /// Whether `pending` gathers of `bytes` bytes are too many.
    pub(super) fn is_reached(&self, pending: u64, bytes: impl FnOnce() -> u128) -> bool {
        self.max_pending.is_some_and(|max| pending >= max)
            || self.max_bytes.is_some_and(|max| bytes() >= max)
    }

    /// When a gather that was handed over at `oldest` becomes due; `None` if never.
    pub(super) fn deadline(&self, oldest: Instant) -> Option<Instant> {
        oldest.checked_add(self.max_age?)
    }
}

/// The cost of an invalidation, in a unit of the invalidator's choice, such as nanoseconds.
///
/// The default is 0 for all: an invalidator that declares no cost is always asked for ranges.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FlushCost {
    /// The cost of each range.
    pub per_range: u64,
    /// The cost of each leaf in a range, for an invalidator whose commands name one leaf. The
    /// number of leaves is the bytes of the range over the size of the smallest leaf in the gather.
    /// 0 if one command takes a range of any length.
    pub per_leaf: u64,
    /// The cost of a full invalidation, with the time that devices then spend on filling their
    /// caches again.
    pub full: u64,
}

impl FlushCost {
    /// The cost of the ranges of `gather`, one by one. Saturates at `u128::MAX`.
    pub fn of_ranges(&self, gather: &FlushGather) -> u128 {
        let ranges = gather.ranges().len() as u128;
        let leaves: u128 = gather.leaves().map_or(0, |leaves| {
            let granules = |range: &crate::units::IovaRange| range.granules(leaves.smallest);
            gather.ranges().iter().map(granules).sum() // disjoint ranges: 2^64 at most
        });
        (u128::from(self.per_range) * ranges).saturating_add(u128::from(self.per_leaf) * leaves)
    }

    /// Whether one full invalidation is cheaper than the ranges of `gather`.
    pub fn prefers_full(&self, gather: &FlushGather) -> bool {
        self.of_ranges(gather) > u128::from(self.full)
    }

    /// The cost of two invalidators that are asked one after the other. Saturates.
    #[must_use]
    pub fn and(self, other: FlushCost) -> FlushCost {
        FlushCost {
            per_range: self.per_range.saturating_add(other.per_range),
            per_leaf: self.per_leaf.saturating_add(other.per_leaf),
            full: self.full.saturating_add(other.full),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::{Granule, Iova, IovaRange};

    fn gather(ranges: &[(u64, u64)], leaf: Granule) -> FlushGather {
        let mut gather = FlushGather::new();
        for (start, len) in ranges {
            gather.add(IovaRange::from_len(Iova::new(*start), *len).unwrap(), leaf);
        }
        gather
    }

    #[test]
    fn ranges_are_asked_for_until_they_cost_more_than_all() {
        let cost = FlushCost {
            per_range: 100,
            per_leaf: 1,
            full: 1000,
        };
        let mut gather = gather(&[(0, 2 << 20)], Granule::K4);
        assert_eq!(cost.of_ranges(&gather), 100 + 512);
        assert!(!cost.prefers_full(&gather));
        gather.add(
            IovaRange::from_len(Iova::new(1 << 30), 288 << 12).unwrap(),
            Granule::K4,
        );
        assert_eq!(cost.of_ranges(&gather), 1000);
        assert!(!cost.prefers_full(&gather), "at the same price, ranges");
        gather.add(
            IovaRange::from_len(Iova::new((1 << 30) + (288 << 12)), 4096).unwrap(),
            Granule::K4,
        );
        assert!(cost.prefers_full(&gather));
    }

    #[test]
    fn large_leaves_are_cheap_and_mixed_ones_are_counted_by_the_smallest() {
        let cost = FlushCost {
            per_range: 0,
            per_leaf: 1,
            full: 10,
        };
        assert_eq!(cost.of_ranges(&gather(&[(0, 2 << 20)], Granule::M2)), 1);
        let mut mixed = gather(&[(0, 2 << 20)], Granule::M2);
        mixed.add(
            IovaRange::from_len(Iova::new(1 << 30), 4096).unwrap(),
            Granule::K4,
        );
        assert_eq!(cost.of_ranges(&mixed), 513);
        // A leaf larger than what is owed of it costs one command.
        assert_eq!(cost.of_ranges(&gather(&[(4096, 4096)], Granule::G1)), 1);
    }

    #[test]
    fn a_source_that_declares_nothing_is_asked_for_ranges_and_the_dearest_does_not_wrap() {
        let everything = gather(&[(0, u64::MAX)], Granule::from_lg2(0).unwrap());
        assert!(!FlushCost::default().prefers_full(&everything));
        assert!(!FlushCost::default().prefers_full(&FlushGather::new()));
        let dear = FlushCost {
            per_range: u64::MAX,
            per_leaf: u64::MAX,
            full: u64::MAX,
        };
        let dearest = dear.and(dear);
        assert_eq!(dearest, dear);
        let mut all = everything;
        all.add(IovaRange::ALL, Granule::K4);
        all.add(
            IovaRange::from_len(Iova::new(0), 1).unwrap(),
            Granule::from_lg2(0).unwrap(),
        );
        assert_eq!(
            dearest.of_ranges(&all),
            u128::from(u64::MAX) * ((1 << 64) + 1)
        );
        assert!(dearest.prefers_full(&all));
    }

    #[test]
    fn each_bound_is_reached_exactly() {
        let pending = FlushPolicy {
            max_pending: Some(3),
            ..FlushPolicy::default()
        };
        assert!(!pending.is_reached(2, || u128::MAX));
        assert!(pending.is_reached(3, || 0));
        let bytes = FlushPolicy {
            max_bytes: Some(8192),
            ..FlushPolicy::default()
        };
        assert!(!bytes.is_reached(u64::MAX, || 8191));
        assert!(bytes.is_reached(1, || 8192));
        assert!(!FlushPolicy::default().is_reached(u64::MAX, || u128::MAX));
        let now = Instant::now();
        let age = |max_age| FlushPolicy {
            max_age,
            ..FlushPolicy::default()
        };
        assert_eq!(age(None).deadline(now), None);
        assert_eq!(age(Some(Duration::MAX)).deadline(now), None, "no wrap");
        assert_eq!(
            age(Some(Duration::from_millis(5))).deadline(now),
            Some(now + Duration::from_millis(5))
        );
    }
}
