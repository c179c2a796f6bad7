//! Areas in the persistent `OrdMap` of the crate `imbl`, published through `arc-swap`:
//! copy-on-write from two crates.

use arc_swap::ArcSwap;
use dirtymap::{Iova, IovaRange, Mapping};
use imbl::OrdMap;

use crate::{Areas, Fit, sum};

/// An `OrdMap` under an `ArcSwap`. The key is an area's first address.
#[derive(Default)]
pub struct SwappedOrdMap {
    areas: ArcSwap<OrdMap<u64, Mapping>>,
}

impl Areas for SwappedOrdMap {
    fn new() -> Self {
        Self::default()
    }

    fn name(&self) -> &'static str {
        "arc-swap-imbl"
    }

    fn map(&self, mapping: Mapping) {
        self.areas.rcu(|areas| {
            let mut areas = OrdMap::clone(areas);
            areas.insert(mapping.range.start().get(), mapping);
            areas
        });
    }

    fn unmap(&self, range: IovaRange) {
        self.areas.rcu(|areas| {
            let mut areas = OrdMap::clone(areas);
            areas.remove(&range.start().get());
            areas
        });
    }

    #[inline]
    fn lookup(&self, iova: u64) -> Option<Mapping> {
        let areas = self.areas.load();
        let (_, mapping) = areas.get_prev(&iova)?;
        mapping.range.contains(Iova::new(iova)).then_some(*mapping)
    }

    fn first_fit(&self, len: u64) -> Option<IovaRange> {
        let mut fit = Fit::of(len);
        let areas = self.areas.load();
        areas.values().find_map(|mapping| fit.before(mapping.range));
        Some(fit.place())
    }

    fn scan(&self) -> u64 {
        sum(self.areas.load().values())
    }
}
