//! The tree alone, for benches that compare it with other maps.

use std::convert::Infallible;

use super::tree::AreaTree;
use crate::error::Error;
use crate::sync::Arc;
use crate::units::{Granule, Iova, IovaRange};

/// The leaf of a range of a batch is prefetched this many ranges before the turn of that range.
const LEAF_AHEAD: usize = 3;
/// The node above that leaf is prefetched this many ranges before.
const PARENT_AHEAD: usize = 6;

/// A map from non-overlapping ranges to values: the tree that an
/// [`AddressSpace`](crate::AddressSpace) uses, without marks, sources, states or flushes. Not part
/// of the API.
#[derive(Debug)]
pub struct AreaMap<T: Send + Sync + 'static>(AreaTree<T>);

impl<T: Copy + Send + Sync + 'static> AreaMap<T> {
    /// An empty map.
    #[allow(clippy::new_without_default)] // not an API
    pub fn new() -> Self {
        AreaMap(AreaTree::new())
    }

    /// Adds a range.
    ///
    /// # Errors
    /// [`Error::Overlap`] with the lowest range in the way.
    pub fn insert(&self, range: IovaRange, value: T) -> Result<(), Error> {
        self.0.update(|edit| edit.insert(range, Arc::new(value)))
    }

    /// Removes the range that starts at `start`.
    pub fn remove(&self, start: Iova) -> Option<T> {
        let removed = self
            .0
            .update(|edit| Ok::<_, Infallible>(edit.remove(start).map(|entry| *entry.area)));
        match removed {
            Ok(value) => value,
        }
    }

    /// Removes and inserts each of these ranges, in order and as one step. A range is only inserted
    /// if no range is mapped at its start.
    ///
    /// # Errors
    /// [`Error::Overlap`] with the lowest range in the way of the first that cannot be inserted.
    /// Then nothing is changed.
    pub fn replace(
        &self,
        ranges: impl Iterator<Item = (IovaRange, T)> + Clone,
    ) -> Result<(), Error> {
        self.0.update(|edit| {
            let mut parents = ranges.clone().skip(PARENT_AHEAD);
            let mut leaves = ranges.clone().skip(LEAF_AHEAD);
            ranges.clone().try_for_each(|(range, value)| {
                if let Some((later, _)) = parents.next() {
                    edit.ask_for(later.start(), 1);
                }
                if let Some((later, _)) = leaves.next() {
                    edit.ask_for(later.start(), 0);
                }
                edit.remove(range.start());
                edit.insert(range, Arc::new(value))
            })
        })
    }

    /// The value at `iova`. Lock-free; never frees nodes and never drops values.
    #[inline]
    pub fn lookup(&self, iova: Iova) -> Option<T> {
        self.0.snapshot().lookup(iova).map(|entry| *entry.area)
    }

    /// The lowest `len` bytes, not 0, inside `within` that are free and start at a multiple of
    /// `alignment`.
    pub fn first_fit(&self, within: IovaRange, len: u64, alignment: Granule) -> Option<IovaRange> {
        self.0.snapshot().first_fit(within, len, alignment)
    }

    /// Visits all ranges of one moment in ascending order. Returns how many updates were published
    /// meanwhile.
    pub fn scan(&self, mut visit: impl FnMut(IovaRange, &T)) -> u64 {
        let snapshot = self.0.snapshot();
        let areas = snapshot.iter(IovaRange::ALL);
        areas.for_each(|entry| visit(entry.range, entry.area));
        snapshot.age()
    }

    /// Drops the values that no reader can reach any more.
    pub fn reclaim(&self) {
        self.0.reclaim();
    }
}
