//! Areas in a `BTreeMap` behind a reader-writer lock: what one writes first.

use std::collections::BTreeMap;
use std::sync::{PoisonError, RwLock};

use dirtymap::{Iova, Mapping};

use crate::Areas;

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
