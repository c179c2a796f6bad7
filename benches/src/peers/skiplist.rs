//! Areas in the lock-free `SkipMap` of `crossbeam-skiplist`.
//!
//! With several mapping threads, areas may overlap, and a scan is not a snapshot of one moment.

use std::ops::Bound;

use crossbeam_skiplist::SkipMap;
use dirtymap::{Iova, IovaRange, Mapping};

use crate::{Areas, Fit, sum};

/// A `SkipMap`. The key is an area's first address.
#[derive(Default)]
pub struct SkipList {
    areas: SkipMap<u64, Mapping>,
}

impl Areas for SkipList {
    fn new() -> Self {
        Self::default()
    }

    fn name(&self) -> &'static str {
        "crossbeam-skiplist"
    }

    fn map(&self, mapping: Mapping) {
        self.areas.insert(mapping.range.start().get(), mapping);
    }

    fn unmap(&self, range: IovaRange) {
        self.areas.remove(&range.start().get());
    }

    #[inline]
    fn lookup(&self, iova: u64) -> Option<Mapping> {
        let entry = self.areas.upper_bound(Bound::Included(&iova))?;
        let mapping = *entry.value();
        mapping.range.contains(Iova::new(iova)).then_some(mapping)
    }

    fn first_fit(&self, len: u64) -> Option<IovaRange> {
        let mut fit = Fit::of(len);
        self.areas
            .iter()
            .find_map(|entry| fit.before(entry.value().range));
        Some(fit.place())
    }

    fn scan(&self) -> u64 {
        sum(self.areas.iter().map(|entry| *entry.value()))
    }
}
