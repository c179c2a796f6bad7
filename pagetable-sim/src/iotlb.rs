//! A device's cache of translations. It also caches "D is set", which is why clearing D takes a flush.
//!
//! ```text
//!  write, entry absent            walk, set D, insert the entry with D
//!  write, entry without D         walk, set D, note D
//!  write, entry with D            no look at the table: this write leaves no trace in it
//!  read, entry absent             walk, insert the entry with the D that was found
//! ```
//!
//! The cache is set-associative, and each leaf size has its own tags: a lookup probes the sizes that are present. It
//! belongs to one device and one thread; only the [port](crate::port) connects it to the domain.

use dirtymap::sync::{Step, performs};
use dirtymap::{Access, Iova, IovaRange};

use crate::fmt::{Format, LeafSizes, granule};
use crate::table::Leaf;

/// A cached translation.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Cached {
    start: u64,
    phys: u64,
    last: u64,
    access: Access,
    /// A write through this entry does not look at the table.
    pub(crate) dirty: bool,
}

impl Cached {
    /// The entry for `leaf`, as found in the table.
    pub(crate) fn new(leaf: &Leaf, dirty: bool) -> Self {
        Cached {
            start: leaf.range.start().get(),
            phys: leaf.phys,
            last: leaf.range.last().get(),
            access: leaf.access,
            dirty,
        }
    }

    /// Where `iova`, which the entry translates, lies in memory.
    #[inline]
    pub(crate) fn phys(&self, iova: Iova) -> u64 {
        self.phys + (iova.get() - self.start)
    }

    pub(crate) fn access(&self) -> Access {
        self.access
    }

    fn range(&self) -> IovaRange {
        IovaRange::new(Iova::new(self.start), Iova::new(self.last)).unwrap_or(IovaRange::ALL)
    }
}

/// See the [module](self).
#[derive(Debug)]
pub(crate) struct Iotlb {
    /// `sets * ways` tags, those of a set next to each other; `NO_TAG` where nothing is cached.
    tags: Box<[u64]>,
    entries: Box<[Option<Cached>]>,
    sets: u64,
    ways: usize,
    /// How many entries of each size, by its logarithm, are cached.
    cached: [usize; SIZES],
    /// The sizes of which some are: a lookup probes only those.
    present: LeafSizes,
    /// State of the pseudo-random choice of a victim.
    random: u64,
}

const NO_TAG: u64 = 0;
/// Logarithms of sizes.
const SIZES: usize = 64;
/// The largest cache: no configuration may ask for more.
const MAX_SETS: usize = 1 << 16;
const MAX_WAYS: usize = 64;

/// The tag of the leaf that holds `iova` and has 2^`lg2` bytes. Never `NO_TAG`, and different for different leaves: the
/// size is in the bits below it, which have room for it.
#[inline]
fn tag(iova: Iova, lg2: u32) -> u64 {
    iova.get() >> lg2 << lg2 | u64::from(lg2)
}

impl Iotlb {
    /// An empty cache of `sets` (rounded up to a power of two) times `ways` entries; each at least 1 and at most 65536
    /// and 64.
    pub(crate) fn new(sets: usize, ways: usize) -> Self {
        let sets = sets.clamp(1, MAX_SETS).next_power_of_two();
        let ways = ways.clamp(1, MAX_WAYS);
        Iotlb {
            tags: vec![NO_TAG; sets * ways].into_boxed_slice(),
            entries: vec![None; sets * ways].into_boxed_slice(),
            sets: sets as u64,
            ways,
            cached: [0; SIZES],
            present: LeafSizes::NONE,
            random: 0x9E37_79B9_7F4A_7C15,
        }
    }

    /// The entry that translates `iova`.
    #[inline]
    pub(crate) fn lookup<F: Format>(&mut self, iova: Iova) -> Option<&mut Cached> {
        let place = self.find::<F>(iova)?;
        self.entries[place].as_mut()
    }

    /// Caches `leaf`, in place of whatever was cached for its addresses, or of a victim.
    pub(crate) fn insert<F: Format>(&mut self, iova: Iova, entry: Cached) {
        if let Some(old) = self.find::<F>(iova) {
            self.forget(old);
        }
        let lg2 = (entry.last - entry.start).trailing_ones();
        let number = iova.get() >> lg2;
        let first = self.set_of(number);
        let free = (first..first + self.ways).find(|at| self.tags[*at] == NO_TAG);
        let place = free.unwrap_or_else(|| {
            let victim = first + self.random() as usize % self.ways;
            self.forget(victim);
            victim
        });
        self.tags[place] = tag(iova, lg2);
        self.entries[place] = Some(entry);
        self.cached[lg2 as usize] += 1;
        self.present = self.present.or(LeafSizes::only(granule(lg2)));
    }

    /// Drops every entry that translates an address of `ranges`, which ascend and are disjoint. Returns how many.
    pub(crate) fn invalidate(&mut self, ranges: &[IovaRange]) -> u64 {
        if self.present == LeafSizes::NONE {
            return 0;
        }
        let mut dropped = 0;
        for place in 0..self.entries.len() {
            let Some(entry) = self.entries[place] else {
                continue;
            };
            let range = entry.range();
            let next = ranges.partition_point(|r| r.last() < range.start());
            let drops = |r: &IovaRange| {
                r.covers(range) || performs(Step::DropLarger) && r.intersects(range)
            };
            if ranges.get(next).is_some_and(drops) {
                self.forget(place);
                dropped += 1;
            }
        }
        dropped
    }

    /// Where the entry that translates `iova` is.
    #[inline]
    fn find<F: Format>(&self, iova: Iova) -> Option<usize> {
        for size in self.present.and(F::LEAF_SIZES).iter() {
            let lg2 = u32::from(size.lg2());
            let number = iova.get() >> lg2;
            let first = self.set_of(number);
            let set = &self.tags[first..first + self.ways];
            let wanted = tag(iova, lg2);
            if let Some(way) = set.iter().position(|tag| *tag == wanted) {
                return Some(first + way);
            }
        }
        None
    }

    /// The first place of the set for the page `number`.
    #[inline]
    fn set_of(&self, number: u64) -> usize {
        (number & (self.sets - 1)) as usize * self.ways
    }

    fn forget(&mut self, place: usize) {
        self.tags[place] = NO_TAG;
        if let Some(entry) = self.entries[place].take() {
            let lg2 = (entry.last - entry.start).trailing_ones();
            let cached = &mut self.cached[lg2 as usize];
            *cached -= 1;
            if *cached == 0 {
                self.present = self.present.without(LeafSizes::only(granule(lg2)));
            }
        }
    }

    /// The next number of a xorshift generator: which entry is evicted is the same in every run.
    fn random(&mut self) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random >> 16
    }
}

#[cfg(test)]
#[cfg(not(dirtymap_loom))]
mod tests {
    use super::*;
    use crate::fmt::AmdV1;
    use dirtymap::Granule;

    fn leaf(start: u64, size: Granule) -> Leaf {
        Leaf {
            range: IovaRange::granule_at(Iova::new(start), size),
            phys: start ^ 0x40_0000_0000,
            access: Access::ReadWrite,
            dirty: false,
        }
    }

    fn insert(tlb: &mut Iotlb, start: u64, size: Granule) {
        let leaf = leaf(start, size);
        tlb.insert::<AmdV1>(leaf.range.start(), Cached::new(&leaf, false));
    }

    #[test]
    fn finds_every_leaf_size_and_drops_what_a_range_touches() {
        let mut tlb = Iotlb::new(4, 3);
        insert(&mut tlb, 0x1000, Granule::K4);
        insert(&mut tlb, 0x20_0000, Granule::M2);
        insert(&mut tlb, 0x4000_0000, Granule::G1);
        for iova in [
            0x1000,
            0x1fff,
            0x20_0000,
            0x3f_ffff,
            0x4000_0000,
            0x7fff_ffff,
        ] {
            let iova = Iova::new(iova);
            let found = tlb.lookup::<AmdV1>(iova).unwrap();
            assert_eq!(found.phys(iova), iova.get() ^ 0x40_0000_0000);
        }
        for iova in [0, 0xfff, 0x2000, 0x40_0000, 0x8000_0000] {
            assert!(tlb.lookup::<AmdV1>(Iova::new(iova)).is_none());
        }
        let byte = |at| IovaRange::from_len(Iova::new(at), 1).unwrap();
        assert_eq!(
            tlb.invalidate(&[byte(0), byte(0x3f_ffff), byte(0x8000_0000)]),
            1
        );
        assert!(tlb.lookup::<AmdV1>(Iova::new(0x20_0000)).is_none());
        assert!(tlb.lookup::<AmdV1>(Iova::new(0x1000)).is_some());
        assert_eq!(tlb.invalidate(&[IovaRange::ALL]), 2);
        assert_eq!(tlb.invalidate(&[IovaRange::ALL]), 0);
        assert_eq!(tlb.cached, [0; SIZES]);
    }

    #[test]
    fn a_full_set_evicts_one_of_its_own() {
        let mut tlb = Iotlb::new(4, 2);
        insert(&mut tlb, 0x1000, Granule::K4); // set 1
        for page in (0..40).step_by(4) {
            insert(&mut tlb, page << 12, Granule::K4); // set 0
        }
        assert_eq!(tlb.cached[12], 3);
        assert!(tlb.lookup::<AmdV1>(Iova::new(0x1000)).is_some());
        assert!(
            tlb.lookup::<AmdV1>(Iova::new(36 << 12)).is_some(),
            "the newest stays"
        );
    }

    #[test]
    fn a_smaller_leaf_takes_the_place_of_a_larger_one() {
        let mut tlb = Iotlb::new(4, 2);
        insert(&mut tlb, 0, Granule::M2);
        insert(&mut tlb, 0x3000, Granule::K4);
        assert!(tlb.lookup::<AmdV1>(Iova::new(0x3000)).is_some());
        assert!(tlb.lookup::<AmdV1>(Iova::new(0)).is_none());
    }

    #[test]
    fn sizes_are_bounded() {
        assert_eq!(Iotlb::new(0, 0).tags.len(), 1);
        assert_eq!(Iotlb::new(5, 3).tags.len(), 24);
        assert_eq!(
            Iotlb::new(usize::MAX, usize::MAX).tags.len(),
            MAX_SETS * MAX_WAYS
        );
    }
}
