//! Areas in a `RangeInclusiveMap` of the crate `rangemap` under a `parking_lot` lock: a map for
//! ranges.

use dirtymap::{Access, IovaRange, Mapping};
use parking_lot::RwLock;
use rangemap::RangeInclusiveMap;

use crate::{Areas, Fit, range_of, sum};

/// The backing of an area. Neighbours with equal values would be joined, and no two areas of a
/// workload have equal ones.
type Backing = (u64, Access);

/// A `RangeInclusiveMap` under a `parking_lot` lock.
#[derive(Default)]
pub struct LockedRangeMap {
    areas: RwLock<RangeInclusiveMap<u64, Backing>>,
}

fn mapping(first: u64, last: u64, (backing, access): Backing) -> Mapping {
    Mapping {
        range: range_of(first, last),
        backing,
        access,
    }
}

impl Areas for LockedRangeMap {
    fn new() -> Self {
        Self::default()
    }

    fn name(&self) -> &'static str {
        "parking_lot-rangemap"
    }

    fn map(&self, mapping: Mapping) {
        let range = mapping.range.start().get()..=mapping.range.last().get();
        self.areas
            .write()
            .insert(range, (mapping.backing, mapping.access));
    }

    fn unmap(&self, range: IovaRange) {
        let range = range.start().get()..=range.last().get();
        self.areas.write().remove(range);
    }

    #[inline]
    fn lookup(&self, iova: u64) -> Option<Mapping> {
        let areas = self.areas.read();
        let (range, backing) = areas.get_key_value(&iova)?;
        Some(mapping(*range.start(), *range.end(), *backing))
    }

    fn first_fit(&self, len: u64) -> Option<IovaRange> {
        // A gap that is long enough may have no room for an aligned range, so each gap is checked,
        // as in the other peers.
        let mut fit = Fit::of(len);
        let areas = self.areas.read();
        areas
            .iter()
            .find_map(|(range, _)| fit.before(range_of(*range.start(), *range.end())));
        Some(fit.place())
    }

    fn scan(&self) -> u64 {
        let areas = self.areas.read();
        let all = areas
            .iter()
            .map(|(range, backing)| mapping(*range.start(), *range.end(), *backing));
        sum(all)
    }
}
