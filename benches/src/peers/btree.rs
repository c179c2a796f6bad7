//! Areas in a `BTreeMap` behind a reader-writer lock: what one writes first.

use std::collections::BTreeMap;
use std::sync::{PoisonError, RwLock};

use dirtymap::{Access, Iova, IovaRange, Mapping};

use crate::{Allocator, Areas, PAGE};

/// A `BTreeMap` behind an `RwLock`. The key is an area's first address.
#[derive(Default)]
pub struct LockedBTree {
    areas: RwLock<BTreeMap<u64, Mapping>>,
}

impl Areas for LockedBTree {
    fn new() -> Self {
        Self::default()
    }

    fn name(&self) -> &'static str {
        "rwlock-btreemap"
    }

    fn map(&self, mapping: Mapping) {
        let mut areas = self.areas.write().unwrap_or_else(PoisonError::into_inner);
        areas.insert(mapping.range.start().get(), mapping);
    }

    #[inline]
    fn lookup(&self, iova: u64) -> Option<Mapping> {
        let areas = self.areas.read().unwrap_or_else(PoisonError::into_inner);
        let (_, mapping) = areas.range(..=iova).next_back()?;
        mapping.range.contains(Iova::new(iova)).then_some(*mapping)
    }
}

impl Allocator for LockedBTree {
    fn allocate(&self, len: u64) -> IovaRange {
        let mut areas = self.areas.write().unwrap_or_else(PoisonError::into_inner);
        let mut start = PAGE.next_multiple_of(len);
        for mapping in areas.values() {
            if start + len <= mapping.range.start().get() {
                break;
            }
            let behind = mapping.range.last().get() + 1;
            start = start.max(behind.next_multiple_of(len));
        }
        let range = IovaRange::from_len(Iova::new(start), len)
            .unwrap_or_else(|error| panic!("a workload stays far below 2^64: {error}"));
        let mapping = Mapping {
            range,
            backing: 0,
            access: Access::ReadWrite,
        };
        areas.insert(start, mapping);
        range
    }

    fn free(&self, range: IovaRange) {
        let mut areas = self.areas.write().unwrap_or_else(PoisonError::into_inner);
        areas.remove(&range.start().get());
    }
}
