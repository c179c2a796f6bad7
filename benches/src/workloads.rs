//! The workloads: the same pages, ranges and addresses in every run.

use dirtymap::sync::{AtomicBool, Ordering, thread};
use dirtymap::{Access, Iova, IovaRange, Mapping};

use crate::{PAGE, Tracker};

/// Pages of the memory that is marked and harvested: 64 GiB.
pub const PAGES: u64 = 1 << 24;
/// Words of a bitmap of [`PAGES`].
pub const WORDS: usize = (PAGES / 64) as usize;

/// The seed of every workload.
const SEED: u64 = 0x6469_7274_796d_6170;

/// Pseudorandom numbers that are the same on every machine and with every version of every crate
/// (SplitMix64).
pub struct Random(u64);

impl Random {
    /// The sequence that all workloads start with.
    pub fn fixed() -> Self {
        Random(SEED)
    }

    /// The next number.
    pub fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let x = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }

    /// The next number below `bound`, which is not 0.
    pub fn below(&mut self, bound: u64) -> u64 {
        ((u128::from(self.next_u64()) * u128::from(bound)) >> 64) as u64
    }
}

/// `count` different numbers below `bound`, in random order. Takes longer the closer `count` is to
/// `bound`.
///
/// # Panics
/// If `count` exceeds `bound`.
pub fn distinct(count: u64, bound: u64) -> Vec<u64> {
    assert!(
        count <= bound,
        "there are only {bound} numbers below {bound}"
    );
    let mut random = Random::fixed();
    let mut seen = vec![false; bound as usize];
    let mut numbers = Vec::new();
    while (numbers.len() as u64) < count {
        let number = random.below(bound);
        if !std::mem::replace(&mut seen[number as usize], true) {
            numbers.push(number);
        }
    }
    numbers
}

/// A bitmap of `pages` pages, of which one in `every` is set, chosen at random. With 1, all are
/// set.
pub fn random_bits(pages: u64, every: u64) -> Vec<u64> {
    if every == 1 {
        return vec![u64::MAX; (pages / 64) as usize];
    }
    let (mut random, mut words) = (Random::fixed(), vec![0u64; (pages / 64) as usize]);
    let mut left = pages / every;
    while left > 0 {
        let page = random.below(pages);
        let (word, bit) = (&mut words[page as usize / 64], 1 << (page % 64));
        left -= u64::from(*word & bit == 0);
        *word |= bit;
    }
    words
}

/// The numbers below `count` in random order.
pub fn shuffled(count: usize) -> Vec<usize> {
    let mut random = Random::fixed();
    let mut numbers: Vec<usize> = (0..count).collect();
    for at in (1..count).rev() {
        numbers.swap(at, random.below(at as u64 + 1) as usize);
    }
    numbers
}

/// `count` of the numbers below `bound`, as ascending runs of `len`, each at a multiple of `len`.
pub fn clusters(count: u64, len: u64, bound: u64) -> Vec<std::ops::Range<u64>> {
    let mut starts = distinct(count / len, bound / len);
    starts.sort_unstable();
    starts.iter().map(|at| at * len..(at + 1) * len).collect()
}

/// The dirty ones of [`PAGES`] pages at the time of a harvest.
pub enum Dirty {
    /// Single pages, in the order in which they are written.
    Pages(Vec<u64>),
    /// All.
    All,
}

impl Dirty {
    /// One page in `every`, chosen at random. With 1, all pages.
    pub fn one_in(every: u64) -> Self {
        match every {
            1 => Dirty::All,
            _ => Dirty::Pages(distinct(PAGES / every, PAGES)),
        }
    }

    /// Marks these pages.
    pub fn mark(&self, peer: &impl Tracker) {
        match self {
            Dirty::Pages(pages) => pages.iter().for_each(|page| peer.mark_page(*page)),
            Dirty::All => peer.mark(0, PAGES * PAGE),
        }
    }
}

/// `count` areas of 1 to 16 pages with holes of 0 to 15 pages between them, in ascending order.
pub fn areas(count: usize) -> Vec<Mapping> {
    let mut random = Random::fixed();
    let mut start = 0;
    let mut areas = Vec::with_capacity(count);
    while areas.len() < count {
        let len = (1 + random.below(16)) * PAGE;
        // Never an error, because a workload stays far below 2^64.
        if let Ok(range) = IovaRange::from_len(Iova::new(start), len) {
            areas.push(Mapping {
                range,
                backing: areas.len() as u64 * 16 * PAGE,
                access: Access::ReadWrite,
            });
        }
        start += len + random.below(16) * PAGE;
    }
    areas
}

/// `count` addresses, each inside one of `areas`, in random order.
pub fn addresses(areas: &[Mapping], count: usize) -> Vec<u64> {
    let mut random = Random::fixed();
    let mut address = || {
        let range = areas[random.below(areas.len() as u64) as usize].range;
        range.start().get() + random.below(range.last().get() - range.start().get() + 1)
    };
    (0..count).map(|_| address()).collect()
}

/// Runs `timed` while another thread repeats `other`.
pub fn beside(other: impl Fn() + Sync, timed: impl FnOnce()) {
    /// Stops the other thread even if `timed` panics, because the scope waits for it.
    struct Stop<'a>(&'a AtomicBool);
    impl Drop for Stop<'_> {
        fn drop(&mut self) {
            // Relaxed: pairs with the load below, and publishes nothing.
            self.0.store(true, Ordering::Relaxed);
        }
    }
    let stopped = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            // Relaxed: pairs with the store above; no read depends on it.
            while !stopped.load(Ordering::Relaxed) {
                other();
            }
        });
        let _stop = Stop(&stopped);
        timed();
    });
}
