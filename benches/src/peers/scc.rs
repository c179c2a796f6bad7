//! Areas in the `TreeIndex` of the crate `scc`: a concurrent B+tree that is read without locks.
//!
//! With several mapping threads, areas may overlap, and a scan is not a snapshot of one moment.

use dirtymap::{Iova, IovaRange, Mapping};
use scc::{Guard, TreeIndex};

use crate::{Areas, Fit, sum};

/// A `TreeIndex`. The key is an area's last address, so that a lookup is one step forward.
#[derive(Default)]
pub struct SccTree {
    areas: TreeIndex<u64, Mapping>,
}

impl Areas for SccTree {
    fn new() -> Self {
        Self::default()
    }

    fn name(&self) -> &'static str {
        "scc-treeindex"
    }

    fn map(&self, mapping: Mapping) {
        let inserted = self.areas.insert_sync(mapping.range.last().get(), mapping);
        debug_assert!(inserted.is_ok(), "no workload maps an area twice");
    }

    fn unmap(&self, range: IovaRange) {
        self.areas.remove_sync(&range.last().get());
    }

    #[inline]
    fn lookup(&self, iova: u64) -> Option<Mapping> {
        let guard = Guard::new();
        let (_, mapping) = self.areas.range(iova.., &guard).next()?;
        mapping.range.contains(Iova::new(iova)).then_some(*mapping)
    }

    fn first_fit(&self, len: u64) -> Option<IovaRange> {
        let mut fit = Fit::of(len);
        let guard = Guard::new();
        self.areas
            .iter(&guard)
            .find_map(|(_, mapping)| fit.before(mapping.range));
        Some(fit.place())
    }

    fn scan(&self) -> u64 {
        let guard = Guard::new();
        sum(self.areas.iter(&guard).map(|(_, mapping)| *mapping))
    }
}
