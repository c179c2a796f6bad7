//! Areas in a `BTreeMap` under a reader-writer lock, that of std or of `parking_lot`: the simplest
//! solution.

use std::borrow::Borrow;
use std::collections::BTreeMap;
use std::ops::{Deref, DerefMut};
use std::sync::{Arc, PoisonError};

use dirtymap::{Iova, IovaRange, Mapping};

use crate::{Areas, Fit, sum};

/// The key is an area's first address.
type Tree<A> = BTreeMap<u64, A>;

/// An area as the tree stores it.
pub trait Area: From<Mapping> + Borrow<Mapping> + Send + Sync {
    /// The name of the peer with the lock of std.
    const NAME: &'static str;
}

impl Area for Mapping {
    const NAME: &'static str = "rwlock-btreemap";
}

/// An object of its own with a count, so that a handle may outlive the removal: what our areas are.
impl Area for Arc<Mapping> {
    const NAME: &'static str = "rwlock-btreemap, counted areas";
}

/// A reader-writer lock around the tree.
pub trait Lock: Default + Send + Sync {
    /// What the tree stores.
    type Area: Area;
    /// The name of the peer.
    const NAME: &'static str;
    /// Shared access.
    fn read(&self) -> impl Deref<Target = Tree<Self::Area>>;
    /// Exclusive access.
    fn write(&self) -> impl DerefMut<Target = Tree<Self::Area>>;
}

impl<A: Area> Lock for std::sync::RwLock<Tree<A>> {
    type Area = A;
    const NAME: &'static str = A::NAME;

    #[inline]
    fn read(&self) -> impl Deref<Target = Tree<A>> {
        self.read().unwrap_or_else(PoisonError::into_inner)
    }

    #[inline]
    fn write(&self) -> impl DerefMut<Target = Tree<A>> {
        self.write().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Lock for parking_lot::RwLock<Tree<Mapping>> {
    type Area = Mapping;
    const NAME: &'static str = "parking_lot-btreemap";

    #[inline]
    fn read(&self) -> impl Deref<Target = Tree<Mapping>> {
        self.read()
    }

    #[inline]
    fn write(&self) -> impl DerefMut<Target = Tree<Mapping>> {
        self.write()
    }
}

/// A `BTreeMap` under a reader-writer lock.
#[derive(Default)]
pub struct LockedBTree<L = std::sync::RwLock<Tree<Mapping>>> {
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
            .insert(mapping.range.start().get(), mapping.into());
    }

    fn unmap(&self, range: IovaRange) {
        self.areas.write().remove(&range.start().get());
    }

    #[inline]
    fn lookup(&self, iova: u64) -> Option<Mapping> {
        let areas = self.areas.read();
        let mapping: &Mapping = areas.range(..=iova).next_back()?.1.borrow();
        mapping.range.contains(Iova::new(iova)).then_some(*mapping)
    }

    fn first_fit(&self, len: u64) -> Option<IovaRange> {
        let mut fit = Fit::of(len);
        let areas = self.areas.read();
        areas
            .values()
            .find_map(|area| fit.before(area.borrow().range));
        Some(fit.place())
    }

    fn scan(&self) -> u64 {
        sum(self.areas.read().values().map(|area| *area.borrow()))
    }

    fn remap_batch(&self, mappings: &[Mapping]) -> bool {
        let mut areas = self.areas.write();
        for mapping in mappings {
            let start = mapping.range.start().get();
            areas.remove(&start);
            areas.insert(start, (*mapping).into());
        }
        true
    }

    fn map_anywhere(&self, len: u64) -> Option<IovaRange> {
        let mut areas = self.areas.write();
        let mut fit = Fit::of(len);
        areas
            .values()
            .find_map(|area| fit.before(area.borrow().range));
        let range = fit.place();
        areas.insert(range.start().get(), crate::unbacked(range).into());
        Some(range)
    }
}
