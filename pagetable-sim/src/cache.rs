//! A set-associative cache keyed by addresses and sizes: translations, and pointers to tables, of
//! any power of two.
//!
//! The key of an entry is one word, the first address with half the size added to it: `start | size
//! / 2`. Sizes are powers of two and addresses multiples of them, so the lowest bit that is set
//! tells the size, no two keys are equal, and none is 0. A lookup probes one set for each size that
//! is cached at the moment, the smallest first.

use dirtymap::sync::{Step, performs};
use dirtymap::{Iova, IovaRange};

/// See the [module](self).
#[derive(Debug)]
pub(crate) struct SizedCache<T> {
    /// `sets * ways` keys, those of a set next to each other; `NO_KEY` where nothing is cached.
    keys: Box<[u64]>,
    entries: Box<[Option<T>]>,
    sets: u64,
    ways: usize,
    /// Bit n is set if an entry of 2^n bytes is cached.
    sizes: u64,
    /// The number of cached entries of 2^n bytes.
    counts: [u32; 64],
    /// State of the pseudo-random choice of a victim.
    random: u64,
}

const NO_KEY: u64 = 0;
/// The limits of a cache; larger configurations are cut down to them.
pub(crate) const MAX_SETS: usize = 1 << 16;
pub(crate) const MAX_WAYS: usize = 64;

/// The key of the 2^`lg2` bytes, 1 to 63, around `iova`.
#[inline]
fn key_of(iova: Iova, lg2: u32) -> u64 {
    let size = 1u64 << lg2;
    iova.get() & !(size - 1) | size >> 1
}

/// The addresses of a key that is not `NO_KEY`.
#[inline]
fn range_of(key: u64) -> IovaRange {
    let half = key & key.wrapping_neg();
    let (start, last) = (key ^ half, key | (half - 1));
    IovaRange::new(Iova::new(start), Iova::new(last)).unwrap_or(IovaRange::ALL)
}

impl<T> SizedCache<T> {
    /// An empty cache of `sets` (rounded up to a power of two) times `ways` entries; each at least
    /// 1 and at most 65536 and 64.
    pub(crate) fn new(sets: usize, ways: usize) -> Self {
        let sets = sets.clamp(1, MAX_SETS).next_power_of_two();
        let ways = ways.clamp(1, MAX_WAYS);
        SizedCache {
            keys: vec![NO_KEY; sets * ways].into_boxed_slice(),
            entries: (0..sets * ways).map(|_| None).collect(),
            sets: sets as u64,
            ways,
            sizes: 0,
            counts: [0; 64],
            random: 0x9E37_79B9_7F4A_7C15,
        }
    }

    /// The smallest entry that holds `iova`.
    #[inline]
    pub(crate) fn lookup(&mut self, iova: Iova) -> Option<&mut T> {
        let place = self.find(iova)?;
        self.entries[place].as_mut()
    }

    /// Caches `entry` for the 2^`lg2` bytes around `iova`, in place of the entry for just these
    /// bytes, or of a victim.
    pub(crate) fn insert(&mut self, iova: Iova, lg2: u32, entry: T) {
        if let Some(old) = self.find_sized(iova, lg2) {
            self.forget(old);
        }
        self.insert_new(iova, lg2, entry);
    }

    /// The same, as the only entry that holds `iova`.
    pub(crate) fn insert_only(&mut self, iova: Iova, lg2: u32, entry: T) {
        while let Some(old) = self.find(iova) {
            self.forget(old);
        }
        self.insert_new(iova, lg2, entry);
    }

    /// Caches `entry`; nothing is cached for just these bytes.
    fn insert_new(&mut self, iova: Iova, lg2: u32, entry: T) {
        debug_assert!((1..64).contains(&lg2), "sizes of 2 bytes to 2^63");
        let first = self.set_of(iova, lg2);
        let set = &self.keys[first..first + self.ways];
        let free = set.iter().position(|key| *key == NO_KEY);
        let place = first
            + free.unwrap_or_else(|| {
                self.random ^= self.random << 13;
                self.random ^= self.random >> 7;
                self.random ^= self.random << 17;
                (self.random >> 16) as usize % self.ways
            });
        self.forget(place);
        self.keys[place] = key_of(iova, lg2);
        self.entries[place] = Some(entry);
        self.counts[lg2 as usize] += 1;
        self.sizes |= 1 << lg2;
    }

    /// Drops every entry that holds an address of `ranges`, which ascend and are disjoint. Returns
    /// their number.
    pub(crate) fn invalidate(&mut self, ranges: &[IovaRange]) -> u64 {
        if self.sizes == 0 {
            return 0;
        }
        let mut dropped = 0;
        for place in 0..self.keys.len() {
            let key = self.keys[place];
            if key == NO_KEY {
                continue;
            }
            let range = range_of(key);
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

    /// Where the smallest entry that holds `iova` is.
    #[inline]
    fn find(&self, iova: Iova) -> Option<usize> {
        let mut sizes = self.sizes;
        while sizes != 0 {
            let found = self.find_sized(iova, sizes.trailing_zeros());
            if found.is_some() {
                return found;
            }
            sizes &= sizes - 1;
        }
        None
    }

    /// Where the entry for the 2^`lg2` bytes around `iova` is.
    #[inline]
    fn find_sized(&self, iova: Iova, lg2: u32) -> Option<usize> {
        let wanted = key_of(iova, lg2);
        let first = self.set_of(iova, lg2);
        let set = &self.keys[first..first + self.ways];
        let way = set.iter().position(|key| *key == wanted)?;
        Some(first + way)
    }

    /// The first place of the set for the 2^`lg2` bytes around `iova`.
    #[inline]
    fn set_of(&self, iova: Iova, lg2: u32) -> usize {
        (iova.get() >> lg2 & (self.sets - 1)) as usize * self.ways
    }

    #[inline]
    fn forget(&mut self, place: usize) {
        let key = std::mem::replace(&mut self.keys[place], NO_KEY);
        if key != NO_KEY {
            let lg2 = key.trailing_zeros() + 1;
            self.entries[place] = None;
            self.counts[lg2 as usize] -= 1;
            if self.counts[lg2 as usize] == 0 {
                self.sizes &= !(1 << lg2);
            }
        }
    }
}

#[cfg(test)]
#[cfg(not(dirtymap_loom))]
mod tests {
    use super::*;
    use dirtymap::Granule;

    type Cache = SizedCache<u64>;

    fn insert(cache: &mut Cache, start: u64, lg2: u32) {
        cache.insert(Iova::new(start), lg2, start);
    }

    fn found(cache: &mut Cache, iova: u64) -> Option<u64> {
        cache.lookup(Iova::new(iova)).copied()
    }

    #[test]
    fn keys_tell_addresses_and_sizes() {
        for lg2 in 1..64 {
            let size = Granule::from_lg2(lg2 as u8).unwrap();
            for iova in [0, 1, 0x1234_5678_9abc_def0, u64::MAX] {
                let iova = Iova::new(iova);
                assert_eq!(
                    range_of(key_of(iova, lg2)),
                    IovaRange::granule_at(iova, size)
                );
            }
        }
    }

    #[test]
    fn holds_any_power_of_two_and_drops_what_a_range_touches() {
        let mut cache = Cache::new(4, 9);
        // 4 KiB, 8 KiB, 1 MiB, 2 MiB, 1 GiB, 256 GiB, 2^57 and 2^63.
        let sizes = [12, 13, 20, 21, 30, 38, 57, 63];
        for lg2 in sizes {
            insert(&mut cache, 1 << lg2, lg2);
        }
        for lg2 in sizes {
            let size = 1u64 << lg2;
            assert_eq!(found(&mut cache, size), Some(size));
            assert_eq!(found(&mut cache, size + (size - 1)), Some(size));
        }
        for iova in [0, 0xfff, 0x8000] {
            assert_eq!(found(&mut cache, iova), None);
        }
        let byte = |at| IovaRange::from_len(Iova::new(at), 1).unwrap();
        assert_eq!(
            cache.invalidate(&[byte(0), byte(0x3f_ffff), byte(0x1_0000_0000)]),
            1
        );
        assert_eq!(found(&mut cache, 0x20_0000), None);
        assert_eq!(found(&mut cache, 0x1000), Some(0x1000));
        assert_eq!(cache.invalidate(&[IovaRange::ALL]), 7);
        assert_eq!(cache.invalidate(&[IovaRange::ALL]), 0);
        assert_eq!((cache.sizes, cache.counts), (0, [0; 64]));
    }

    #[test]
    fn a_full_set_evicts_one_of_its_own() {
        let mut cache = Cache::new(4, 2);
        insert(&mut cache, 0x1000, 12); // set 1
        for page in (0..40).step_by(4) {
            insert(&mut cache, page << 12, 12); // set 0
        }
        assert_eq!(cache.counts[12], 3);
        assert_eq!(found(&mut cache, 0x1000), Some(0x1000));
        assert_eq!(
            found(&mut cache, 36 << 12),
            Some(36 << 12),
            "the newest stays"
        );
    }

    #[test]
    fn the_smallest_is_found_first_and_all_can_be_replaced() {
        let mut cache = Cache::new(4, 2);
        insert(&mut cache, 0, 30);
        insert(&mut cache, 0x20_0000, 21);
        assert_eq!(found(&mut cache, 0x20_0000), Some(0x20_0000));
        assert_eq!(found(&mut cache, 0), Some(0));
        insert(&mut cache, 0, 30);
        assert_eq!(cache.counts[30], 1, "in place of itself");
        cache.insert_only(Iova::new(0x20_1000), 12, 7);
        assert_eq!(found(&mut cache, 0x20_1000), Some(7));
        assert_eq!(found(&mut cache, 0x20_0000), None);
        assert_eq!(found(&mut cache, 0), None);
    }

    #[test]
    fn sizes_are_bounded() {
        assert_eq!(Cache::new(0, 0).keys.len(), 1);
        assert_eq!(Cache::new(5, 3).keys.len(), 24);
        assert_eq!(
            Cache::new(usize::MAX, usize::MAX).keys.len(),
            MAX_SETS * MAX_WAYS
        );
    }
}
