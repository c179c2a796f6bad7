//! Areas in a `BTreeMap` under a reader-writer lock, that of std or of `parking_lot`: the simplest
//! solution.

use std::collections::BTreeMap;
use std::ops::{Deref, DerefMut};
use std::sync::PoisonError;

use dirtymap::{Iova, IovaRange, Mapping};

use crate::{Areas, Fit, sum};

/// The key is an area's first address.
type Tree = BTreeMap<u64, Mapping>;

/// A reader-writer lock around the tree.
pub trait Lock: Default + Send + Sync {
    /// The name of the peer.
    const NAME: &'static str;
    /// Shared access.
    fn read(&self) -> impl Deref<Target = Tree>;
    /// Exclusive access.
    fn write(&self) -> impl DerefMut<Target = Tree>;
}

impl Lock for std::sync::RwLock<Tree> {
    const NAME: &'static str = "rwlock-btreemap";

    #[inline]
    fn read(&self) -> impl Deref<Target = Tree> {
        self.read().unwrap_or_else(PoisonError::into_inner)
    }

    #[inline]
    fn write(&self) -> impl DerefMut<Target = Tree> {
        self.write().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Lock for parking_lot::RwLock<Tree> {
    const NAME: &'static str = "parking_lot-btreemap";

    #[inline]
    fn read(&self) -> impl Deref<Target = Tree> {
        self.read()
    }

    #[inline]
    fn write(&self) -> impl DerefMut<Target = Tree> {
        self.write()
    }
}

/// A `BTreeMap` under a reader-writer lock.
#[derive(Default)]
pub struct LockedBTree<L = std::sync::RwLock<Tree>> {
    areas: L,
}

impl<L: Lock> Areas for LockedBTree<L> {
    fn new() -> Self {
        Self::default()
    }

    fn name(&self) -> &'static str {
        L::NAME
    }

    fn map(&self, mapping: Mapping) {
        self.areas
            .write()
            .insert(mapping.range.start().get(), mapping);
    }

    fn unmap(&self, range: IovaRange) {
        self.areas.write().remove(&range.start().get());
    }

    #[inline]
    fn lookup(&self, iova: u64) -> Option<Mapping> {
        let areas = self.areas.read();
        let (_, mapping) = areas.range(..=iova).next_back()?;
        mapping.range.contains(Iova::new(iova)).then_some(*mapping)
    }

    fn first_fit(&self, len: u64) -> Option<IovaRange> {
        let mut fit = Fit::of(len);
        let areas = self.areas.read();
        areas.values().find_map(|mapping| fit.before(mapping.range));
        Some(fit.place())
    }

    fn scan(&self) -> u64 {
        sum(self.areas.read().values())
    }

    fn remap_batch(&self, mappings: &[Mapping]) -> bool {
        let mut areas = self.areas.write();
        for mapping in mappings {
            let start = mapping.range.start().get();
            areas.remove(&start);
            areas.insert(start, *mapping);
        }
        true
    }

    fn map_anywhere(&self, len: u64) -> Option<IovaRange> {
        let mut areas = self.areas.write();
        let mut fit = Fit::of(len);
        areas.values().find_map(|mapping| fit.before(mapping.range));
        let range = fit.place();
        areas.insert(range.start().get(), crate::unbacked(range));
        Some(range)
    }
}
