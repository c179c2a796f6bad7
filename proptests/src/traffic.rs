//! Everything at once: mappers that map, cut and unmap, domains that are attached and detached with
//! their devices, and harvesters.
//!
//! Addresses are mapped to the memory of the same number, and each mapper owns a stretch of it.
//! While a page is not mapped, only its owner writes to it: a write of a device means that a flush
//! was missing. While it is mapped, every write must be reported: by a harvest, by the unmap, or by
//! an abort as outside. In the end the copy equals the memory.

use std::time::{Duration, Instant};

use dirtymap::sync::{Arc, AtomicBool, AtomicU64, Mutex, Ordering, lock, thread};
use dirtymap::{
    Access, AddressSpace, Change, Error, Granule, HarvestRequest, Holes, Iova, IovaRange, Scope,
    UserBitmap,
};
use pagetable_sim::{Breakage, Device, DeviceConfig, Domain, DomainConfig, PhysMemory};

use crate::Random;

const PAGE: u64 = 4096;
const MAPPERS: u64 = 4;
/// Pages of each mapper.
const STRETCH: u64 = 48;
const PAGES: u64 = MAPPERS * STRETCH;

struct Traffic {
    space: AddressSpace,
    memory: Arc<PhysMemory>,
    /// The copy. Each page is copied under its lock, so that an older copy never replaces a newer
    /// one.
    copy: Vec<Mutex<[u8; PAGE as usize]>>,
    breakage: Breakage,
    stop: AtomicBool,
    /// Pages that changed while only their owner was allowed to write.
    stolen: AtomicU64,
    /// Translations that still existed when they had to be gone.
    leaked: AtomicU64,
}

fn pages(first: u64, count: u64) -> IovaRange {
    IovaRange::from_len(Iova::new(first * PAGE), count * PAGE).unwrap()
}

fn numbers(range: IovaRange) -> std::ops::RangeInclusive<u64> {
    range.start().get() / PAGE..=range.last().get() / PAGE
}

impl Traffic {
    fn new(breakage: Breakage) -> Self {
        Traffic {
            space: AddressSpace::new(Granule::K4),
            memory: Arc::new(PhysMemory::new(PAGES * PAGE).unwrap()),
            copy: (0..PAGES).map(|_| Mutex::new([0; PAGE as usize])).collect(),
            breakage,
            stop: AtomicBool::new(false),
            stolen: AtomicU64::new(0),
            leaked: AtomicU64::new(0),
        }
    }

    fn goes_on(&self) -> bool {
        // Relaxed: only says when to stop.
        !self.stop.load(Ordering::Relaxed)
    }

    fn domain(&self, random: &mut Random) -> Arc<Domain> {
        let max_leaf = Granule::from_lg2(12 + random.below(3) as u8).unwrap();
        let domain = Domain::new(
            Arc::clone(&self.memory),
            DomainConfig {
                max_leaf,
                ..DomainConfig::default()
            },
        );
        domain.break_hardware(self.breakage);
        domain
    }

    fn copy_pages(&self, range: IovaRange) {
        for page in numbers(range) {
            let mut copy = lock(&self.copy[page as usize]);
            self.memory.read(page * PAGE, &mut *copy).unwrap();
        }
    }

    fn mapper(&self, nth: u64, mut random: Random) {
        while self.goes_on() {
            let from = random.below(STRETCH);
            let len = 1 + random.below(STRETCH - from);
            let first = nth * STRETCH + from;
            let range = pages(first, len);
            self.own(range, &mut random);
            if random.below(4) == 0 && len > 1 {
                self.map_in_two(first, len);
            } else {
                let backing = range.start().get();
                self.space.map(range, backing, Access::ReadWrite).unwrap();
            }
            self.live(range, &mut random);
            self.unmap(range, &mut random);
        }
    }

    fn map_in_two(&self, first: u64, len: u64) {
        let map = |first: u64, len: u64| Change::Map {
            range: pages(first, len),
            backing: first * PAGE,
            access: Access::ReadWrite,
        };
        let batch = [map(first, 1), map(first + 1, len - 1)];
        self.space.apply(&batch).unwrap();
    }

    /// Only the caller may write to these pages. Writes to them, and checks a little later that the
    /// bytes are unchanged.
    fn own(&self, range: IovaRange, random: &mut Random) {
        let fill = [random.bits() as u8; PAGE as usize];
        for page in numbers(range) {
            let mut copy = lock(&self.copy[page as usize]);
            self.memory.write(page * PAGE, &fill).unwrap();
            *copy = fill;
        }
        thread::yield_now();
        for page in numbers(range) {
            let mut now = [0; PAGE as usize];
            self.memory.read(page * PAGE, &mut now).unwrap();
            // Relaxed: read when all threads are done.
            self.stolen
                .fetch_add(u64::from(now != fill), Ordering::Relaxed);
        }
    }

    /// The changes of an area while it is mapped.
    fn live(&self, range: IovaRange, random: &mut Random) {
        for _ in 0..random.below(20) {
            let page = range.start().get() / PAGE + random.below(range.len() as u64 / PAGE);
            match random.below(8) {
                0 => match self.space.cut(Iova::new(page * PAGE)) {
                    // A source that cannot split leaves refuses a cut inside one.
                    Ok(_) | Err(Error::Source(_)) => {}
                    Err(other) => panic!("{other}"),
                },
                1 => {
                    self.memory
                        .write(page * PAGE, &random.bits().to_le_bytes())
                        .unwrap();
                    self.space.mark(pages(page, 1)).unwrap();
                }
                _ => thread::yield_now(),
            }
        }
    }

    fn unmap(&self, range: IovaRange, random: &mut Random) {
        if random.below(8) == 0 {
            // Discards the dirty pages, because the next owner writes to all of them.
            self.space.apply(&[Change::Unmap { range }]).unwrap();
            self.own(range, random);
            return;
        }
        let mut words = [0u64; 1];
        let bitmap = UserBitmap::new(&mut words);
        let (unmapped, view) = self.space.unmap(range, Granule::K4, bitmap).unwrap();
        assert_eq!((unmapped.bytes, unmapped.discarded_bytes), (range.len(), 0));
        view.runs().for_each(|run| self.copy_pages(run));
    }

    /// A domain that is attached and detached. Its device keeps writing during the detach.
    fn attacher(&self, mut random: Random) {
        while self.goes_on() {
            let domain = self.domain(&mut random);
            let id = self.space.attach(Arc::clone(&domain)).unwrap();
            let gone = AtomicBool::new(false);
            thread::scope(|scope| {
                let (device, seed) = (domain.attach(DeviceConfig::default()), random.bits());
                // Relaxed: only says when to stop.
                let goes_on = || !gone.load(Ordering::Relaxed);
                scope.spawn(move || self.device(device, Random::new(seed), goes_on));
                thread::sleep(Duration::from_millis(random.below(8)));
                self.space.detach(id).unwrap();
                let left = (0..PAGES).filter(|page| {
                    let iova = Iova::new(page * PAGE);
                    domain.translate(iova).is_some()
                });
                // Relaxed, both: read when all threads are done; only says when to stop.
                self.leaked
                    .fetch_add(left.count() as u64, Ordering::Relaxed);
                gone.store(true, Ordering::Relaxed);
            });
            assert_eq!(domain.stats().refused_unmaps, 0);
        }
    }

    fn device(&self, mut device: Device, mut random: Random, goes_on: impl Fn() -> bool) {
        while goes_on() {
            let at = random.below(PAGES * PAGE - 64);
            let bytes = [random.bits() as u8; 64];
            let len = 1 + random.below(64) as usize;
            // Faults at the first unmapped address, after the bytes before it are written.
            let _ = device.write(Iova::new(at), &bytes[..len]);
            if random.below(256) == 0 {
                device.quiesce();
            }
            device.service();
        }
    }

    fn harvester(&self, permanent: dirtymap::DomainId, mut random: Random) {
        while self.goes_on() {
            let mappings = self.space.mappings();
            let Some(mapping) = mappings.get(random.below(1 + mappings.len() as u64) as usize)
            else {
                continue;
            };
            let scope = match random.below(3) {
                0 => Scope::Domain(permanent),
                _ => Scope::All,
            };
            self.round(mapping.range, scope, random.below(6));
        }
    }

    /// One harvest, and the end of its lease.
    fn round(&self, range: IovaRange, scope: Scope, fate: u64) {
        let words = [dirtymap::sync::AtomicU64::new(0)];
        let bitmap = || UserBitmap::shared(&words);
        let request = HarvestRequest::new(range, Granule::K4).in_scope(scope);
        let request = request.holes(Holes::Stop);
        // It stops if an area was unmapped meanwhile.
        let lease = self.space.harvest(&request, bitmap()).unwrap().partial();
        let aborted = match fate {
            0 => lease.abort(),
            1 => lease.sync().unwrap().abort(),
            _ => {
                let lease = lease.sync().unwrap();
                lease.runs().for_each(|run| self.copy_pages(run));
                lease.commit();
                return;
            }
        };
        if aborted.outside_bytes != 0 {
            // The area was unmapped, with a flush, so no later harvest reports these pages.
            let view = bitmap().view(range, Granule::K4).unwrap();
            view.runs().for_each(|run| self.copy_pages(run));
        }
    }
}

/// The numbers of pages that were stolen, that leaked, and that differ at the end.
fn violations(breakage: Breakage, time: Duration, seed: u64) -> [u64; 3] {
    let traffic = Traffic::new(breakage);
    let random = |nth: u64| Random::new(seed.wrapping_mul(31).wrapping_add(nth));
    let permanent = traffic.domain(&mut random(0));
    let id = traffic.space.attach(Arc::clone(&permanent)).unwrap();
    traffic.space.start_tracking().unwrap();
    let traffic_ref = &traffic;
    thread::scope(|scope| {
        for nth in 0..MAPPERS {
            scope.spawn(move || traffic_ref.mapper(nth, random(nth + 1)));
        }
        for nth in 0..2 {
            let device = permanent.attach(DeviceConfig::default());
            let goes_on = || traffic_ref.goes_on();
            scope.spawn(move || traffic_ref.device(device, random(nth + 10), goes_on));
            scope.spawn(move || traffic_ref.attacher(random(nth + 20)));
            scope.spawn(move || traffic_ref.harvester(id, random(nth + 30)));
        }
        let end = Instant::now() + time;
        while Instant::now() < end {
            thread::sleep(Duration::from_millis(10));
        }
        // Relaxed: as in `goes_on`.
        traffic.stop.store(true, Ordering::Relaxed);
    });
    let space = &traffic.space;
    assert!(space.mappings().is_empty(), "seed {seed}");
    assert_eq!(space.domains(), [id], "seed {seed}");
    let left = |page: &u64| permanent.translate(Iova::new(page * PAGE)).is_some();
    let leaked = (0..PAGES).filter(left).count() as u64;
    let differs = |page: &u64| {
        let mut now = [0; PAGE as usize];
        traffic.memory.read(page * PAGE, &mut now).unwrap();
        *lock(&traffic.copy[*page as usize]) != now
    };
    let stats = space.stats();
    let settled = stats.committed_bytes + stats.aborted_bytes;
    assert_eq!(stats.leased_bytes, settled, "seed {seed}: {stats:?}");
    let flush = stats.flush;
    assert_eq!(
        flush.owed,
        flush.retired + flush.pending,
        "seed {seed}: {stats:?}"
    );
    assert!(
        stats.harvests > 10 && stats.unmapped_dirty_bytes > 0,
        "seed {seed}: {stats:?}"
    );
    // Relaxed, both: all threads are done.
    [
        traffic.stolen.load(Ordering::Relaxed),
        traffic.leaked.load(Ordering::Relaxed) + leaked,
        (0..PAGES).filter(differs).count() as u64,
    ]
}

/// The seed differs in every run. A failure prints it.
fn seed() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    now.unwrap().as_nanos() as u64
}

#[test]
fn no_write_is_lost_nothing_leaks_and_nothing_is_reused_too_early() {
    let seed = seed();
    let found = violations(Breakage::None, Duration::from_millis(2500), seed);
    assert_eq!(found, [0; 3], "seed {seed}: stolen, leaked, different");
}

#[test]
fn traffic_without_invalidations_is_noticed() {
    // Without the flush, devices of the last owner write to memory that is used again.
    let brief = Duration::from_millis(500);
    let noticed = (0..20).any(|_| {
        let [stolen, leaked, _] = violations(Breakage::IgnoreInvalidations, brief, seed());
        assert_eq!(leaked, 0);
        stolen > 0
    });
    assert!(noticed);
}
