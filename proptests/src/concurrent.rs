//! Real threads: two devices and a CPU write as fast as they can, two consumers harvest, abort and
//! commit; in the end the copy must equal the memory, byte for byte.

use std::time::{Duration, Instant};

use dirtymap::sync::{Arc, AtomicBool, Mutex, Ordering, lock, thread};
use dirtymap::{Access, AddressSpace, Granule, HarvestRequest, Iova, IovaRange, UserBitmap};
use pagetable_sim::{Device, DeviceConfig, Domain, DomainConfig, PhysMemory};

use crate::Random;

const PAGE: u64 = 4096;
/// First page and number of pages of each area; the first has a large leaf, the second follows it
/// without a gap.
const AREAS: [(u64, u64); 3] = [(512, 514), (1026, 40), (4096, 9)];

struct Storm {
    space: AddressSpace,
    memory: Arc<PhysMemory>,
    /// The copy. Each page is copied under its lock, so that an older copy never replaces a newer
    /// one.
    copy: Vec<Mutex<[u8; PAGE as usize]>>,
    stop: AtomicBool,
}

impl Storm {
    fn goes_on(&self) -> bool {
        // Relaxed: only says when to stop.
        !self.stop.load(Ordering::Relaxed)
    }

    /// A random page, often one of a few.
    fn place(random: &mut Random) -> u64 {
        let (first, pages) = AREAS[random.below(3) as usize];
        let most = if random.below(4) == 0 {
            pages
        } else {
            pages.min(6)
        };
        let page = first + random.below(most);
        page * PAGE + random.below(PAGE)
    }

    fn device(&self, mut device: Device, mut random: Random) {
        let mut bytes = [0; 600];
        while self.goes_on() {
            let at = Self::place(&mut random);
            let len = (1 + random.below(600)) as usize;
            bytes[..len].fill(random.bits() as u8);
            match random.below(64) {
                0 => device.quiesce(),
                1 => drop(device.read(Iova::new(at), &mut bytes[..len])),
                // At the end of an area the device faults, after it has written the bytes before.
                _ => drop(device.write(Iova::new(at), &bytes[..len])),
            }
            device.service();
        }
    }

    fn cpu(&self, mut random: Random) {
        while self.goes_on() {
            let at = Self::place(&mut random);
            let len = 1 + random.below(PAGE - at % PAGE);
            let bytes = vec![random.bits() as u8; len as usize];
            self.memory.write(at, &bytes).unwrap();
            let range = IovaRange::from_len(Iova::new(at), len).unwrap();
            if random.below(2) == 0 {
                self.space.mark(range).unwrap();
            } else {
                self.space.area(range.start()).unwrap().mark(range).unwrap();
            }
        }
    }

    fn consumer(&self, mut random: Random) {
        while self.goes_on() {
            let (first, pages) = AREAS[random.below(3) as usize];
            let from = random.below(pages);
            let (first, pages) = match random.below(3) {
                0 => (first + from, 1 + random.below(pages - from)),
                1 => (AREAS[0].0, AREAS[0].1 + AREAS[1].1),
                _ => (first, pages),
            };
            let granule = Granule::from_lg2(11 + random.below(2) as u8).unwrap();
            self.round(first, pages, granule, random.below(8));
        }
    }

    /// One harvest, and the end of its lease.
    fn round(&self, first: u64, pages: u64, granule: Granule, fate: u64) {
        let range = IovaRange::from_len(Iova::new(first * PAGE), pages * PAGE).unwrap();
        let mut words = vec![0; (range.granules(granule) as usize).div_ceil(64)];
        let request = HarvestRequest::new(range, granule);
        let lease = self
            .space
            .harvest(&request, UserBitmap::new(&mut words))
            .unwrap();
        if fate == 0 {
            return;
        }
        let lease = lease.sync().unwrap();
        for run in lease.runs() {
            let (mut at, end) = (run.start().get(), run.last().get() + 1);
            while at < end {
                let (from, len) = (at % PAGE, (end - at).min(PAGE - at % PAGE));
                let mut page = lock(&self.copy[(at / PAGE) as usize]);
                let part = &mut page[from as usize..(from + len) as usize];
                self.memory.read(at, part).unwrap();
                at += len;
            }
        }
        match fate {
            1 => drop(lease.abort()),
            _ => drop(lease.commit()),
        }
    }
}

/// With `cuts`, areas are cut at any page meanwhile, which splits leaves.
fn storm(config: DomainConfig, device: DeviceConfig, cuts: bool, seed: u64) {
    let memory = Arc::new(PhysMemory::new(4200 * PAGE).unwrap());
    let domain = Domain::new(Arc::clone(&memory), config);
    let storm = Storm {
        space: AddressSpace::with_source(Granule::K4, Arc::clone(&domain)).unwrap(),
        memory,
        copy: (0..4200).map(|_| Mutex::new([0; PAGE as usize])).collect(),
        stop: AtomicBool::new(false),
    };
    for (first, pages) in AREAS {
        let range = IovaRange::from_len(Iova::new(first * PAGE), pages * PAGE).unwrap();
        storm
            .space
            .map(range, first * PAGE, Access::ReadWrite)
            .unwrap();
    }
    storm.space.start_tracking().unwrap();
    let random = |nth: u64| Random::new(seed.wrapping_mul(31).wrapping_add(nth));
    let storm = &storm;
    thread::scope(|scope| {
        for nth in 0..2 {
            let device = domain.attach(device);
            scope.spawn(move || storm.device(device, random(nth)));
            scope.spawn(move || storm.consumer(random(nth + 2)));
        }
        scope.spawn(move || storm.cpu(random(4)));
        let end = Instant::now() + Duration::from_millis(700);
        let mut random = random(5);
        while Instant::now() < end {
            thread::sleep(Duration::from_millis(10));
            if cuts {
                let (first, pages) = AREAS[random.below(3) as usize];
                let at = Iova::new((first + random.below(pages)) * PAGE);
                storm.space.cut(at).unwrap();
                let leaf = domain.translate(at).unwrap();
                assert_eq!(leaf.range.start(), at, "seed {seed}");
            }
        }
        // Relaxed: as in `goes_on`.
        storm.stop.store(true, Ordering::Relaxed);
    });
    for (first, pages) in AREAS {
        storm.round(first, pages, Granule::K4, 7);
        for page in first..first + pages {
            let mut now = [0; PAGE as usize];
            storm.memory.read(page * PAGE, &mut now).unwrap();
            let same = *lock(&storm.copy[page as usize]) == now;
            assert!(
                same,
                "seed {seed}: the copy of page {page} differs from the memory"
            );
        }
    }
    let stats = storm.space.stats();
    assert_eq!(
        stats.leased_bytes,
        stats.committed_bytes + stats.aborted_bytes,
        "seed {seed}: {stats:?}"
    );
    assert_eq!(
        stats.flush.owed,
        stats.flush.retired + stats.flush.pending,
        "seed {seed}: {stats:?}"
    );
    assert!(
        stats.harvests > 10 && stats.flush.invalidated.dropped > 0,
        "seed {seed}: {stats:?}"
    );
}

fn leaves(max_leaf: Granule) -> DomainConfig {
    DomainConfig {
        max_leaf,
        ..DomainConfig::default()
    }
}

/// The seed differs in every run. A failure prints it.
fn seed() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    now.unwrap().as_nanos() as u64
}

#[test]
fn no_write_is_lost_in_a_storm_on_small_leaves() {
    storm(leaves(Granule::K4), DeviceConfig::default(), false, seed());
}

#[test]
fn no_write_is_lost_in_a_storm_on_large_leaves_with_tiny_iotlbs() {
    let device = DeviceConfig {
        iotlb_sets: 1,
        iotlb_ways: 2,
        posted_writes: 200,
        ..DeviceConfig::DEFAULT
    };
    storm(leaves(Granule::M2), device, false, seed());
}

#[test]
fn no_write_is_lost_in_a_storm_on_leaves_that_are_cut() {
    let device = DeviceConfig {
        walk_entries: 16,
        tlb_entries: 8,
        ..DeviceConfig::DEFAULT
    };
    storm(leaves(Granule::M2), device, true, seed());
}

#[test]
fn no_write_is_lost_in_a_storm_whose_harvests_skip_what_is_quiet() {
    let config = DomainConfig {
        skip_quiet: true,
        ..leaves(Granule::K4)
    };
    let device = DeviceConfig {
        walk_entries: 16,
        tlb_entries: 8,
        ..DeviceConfig::DEFAULT
    };
    storm(config, device, false, seed());
}
