//! Cached translations. An entry also caches "D is set", so a harvest that clears D owes a flush.
//!
//! ```text
//!  write, entry absent            walk, set D, insert the entry with D
//!  write, entry without D         walk, set D, note D
//!  write, entry with D            no look at the table: this write leaves no trace in it
//!  read, entry absent             walk, insert the entry with the D that was found
//! ```
//!
//! The IOTLB and a device's own TLB are two caches of this kind. Each belongs to one device and one
//! thread; only the [port](crate::port) connects it to the domain.

use dirtymap::{Access, Granule, Iova};

use crate::cache::SizedCache;
use crate::table::Leaf;

/// See the [module](self).
pub(crate) type Iotlb = SizedCache<Cached>;

/// A cached translation of a naturally aligned power of two.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Cached {
    phys: u64,
    /// The size, minus one.
    mask: u64,
    access: Access,
    /// A write through this entry does not look at the table.
    pub(crate) dirty: bool,
}

impl Cached {
    /// The entry for the piece around `iova`, not larger than `largest`, of `leaf` as found in the
    /// table.
    pub(crate) fn new(leaf: &Leaf, iova: Iova, largest: Granule, dirty: bool) -> Self {
        let leaf_mask = leaf.range.last().get() - leaf.range.start().get();
        let mask = leaf_mask.min(largest.mask());
        Cached {
            phys: leaf.phys + (iova.get() & leaf_mask & !mask),
            mask,
            access: leaf.access,
            dirty,
        }
    }

    /// Where `iova`, which the entry translates, lies in memory.
    #[inline]
    pub(crate) fn phys(&self, iova: Iova) -> u64 {
        self.phys + (iova.get() & self.mask)
    }

    /// Whether the entry lets a device do `wanted` without a look at the table.
    #[inline]
    pub(crate) fn serves(&self, wanted: Access) -> bool {
        (!wanted.reads() || self.access.reads())
            && (!wanted.writes() || self.access.writes() && self.dirty)
    }
}

impl Iotlb {
    /// Caches `entry` as the only translation of `iova`.
    pub(crate) fn put(&mut self, iova: Iova, entry: Cached) {
        self.insert_only(iova, entry.mask.count_ones(), entry);
    }
}
