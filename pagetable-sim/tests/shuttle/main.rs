//! Whole systems, too large for loom, under random schedules: an address space over a simulated
//! IOMMU with devices, CPU threads, mappers and two harvesters.
//!
//! ```text
//! RUSTFLAGS="--cfg dirtymap_shuttle" \
//!     cargo test --profile loom -p pagetable-sim --features __shuttle --test shuttle
//! ```
//!
//! It finds errors of the protocols, and none of weak memory: here each access is SeqCst, and
//! fences have no effect. All threads of an execution are one OS thread, so to crossbeam-epoch they
//! are one participant that is pinned as long as any of them is: it frees later than it might,
//! never earlier.
#![cfg(dirtymap_shuttle)]
#![allow(clippy::unwrap_used)] // helpers of tests

use dirtymap::sync::model::{Random, holds_only_with};
use dirtymap::sync::{Arc, AtomicU64, Mutex, Ordering, Step, lock, thread};
use dirtymap::{Access, AddressSpace, HarvestRequest, Iova, IovaRange, UserBitmap};
use pagetable_sim::{AmdV1, Device, DeviceConfig, Domain, DomainConfig, PhysMemory};

const PAGE: u64 = Domain::PAGE.bytes();
/// Pages that stay mapped, in two areas.
const STAY: u64 = 3;
/// A page after them that is mapped and unmapped all the time.
const COMES_AND_GOES: u64 = STAY;
const PAGES: u64 = STAY + 1;

fn pages(first: u64, count: u64) -> IovaRange {
    IovaRange::from_len(Iova::new(first * PAGE), count * PAGE).unwrap()
}

/// A machine under migration.
struct Machine {
    space: AddressSpace,
    domain: Arc<Domain>,
    memory: Arc<PhysMemory>,
    /// The copy. The lock is held over each copy, so that no old copy overtakes a new one.
    copy: Mutex<[u64; PAGES as usize]>,
}

impl Machine {
    fn new(config: DomainConfig) -> Arc<Self> {
        let memory = Arc::new(PhysMemory::new(PAGES * PAGE).unwrap());
        let domain = Domain::new(memory.clone(), config);
        let space = AddressSpace::with_source(Domain::PAGE, domain.clone()).unwrap();
        for (first, count) in [(0, 2), (2, 1)] {
            let range = pages(first, count);
            space.map(range, first * PAGE, Access::ReadWrite).unwrap();
        }
        space.start_tracking().unwrap();
        Arc::new(Machine {
            space,
            domain,
            memory,
            copy: Mutex::new([0; PAGES as usize]),
        })
    }

    fn device(&self) -> Device<AmdV1> {
        self.domain.attach(DeviceConfig {
            iotlb_sets: 1,
            iotlb_ways: 2,
            posted_writes: 2,
            walk_entries: 1,
            ..DeviceConfig::DEFAULT
        })
    }

    /// Copies the pages of `words`, which begin at page `first`.
    fn copy(&self, first: u64, word: u64) {
        for page in (0..PAGES).filter(|page| page >= &first && word >> (page - first) & 1 != 0) {
            let mut copy = lock(&self.copy);
            copy[page as usize] = self.word(page);
        }
    }

    fn word(&self, page: u64) -> u64 {
        let mut bytes = [0; 8];
        self.memory.read(page * PAGE, &mut bytes).unwrap();
        u64::from_le_bytes(bytes)
    }

    /// One pass: harvest, sync, copy, commit; or abort, before or after the sync.
    fn pass(&self, abort: u64) {
        let words = [AtomicU64::new(0)];
        let request = HarvestRequest::new(pages(0, STAY), Domain::PAGE);
        let lease = self.space.harvest(&request, UserBitmap::shared(&words));
        let lease = lease.unwrap();
        if abort == 1 {
            lease.abort();
            return;
        }
        let lease = lease.sync().unwrap();
        if abort == 2 {
            return; // dropped, which aborts
        }
        self.copy(0, words[0].load(Ordering::Relaxed));
        lease.commit();
    }

    /// Whether the copy of the pages that stayed mapped is equal to the memory.
    fn is_copied(&self) -> bool {
        let copy = *lock(&self.copy);
        (0..PAGES).all(|page| copy[page as usize] == self.word(page))
    }
}

/// Writes `count` numbers that no other thread writes, to pages that `random` chooses.
fn drive(mut device: Device<AmdV1>, mut random: Random, count: u64) {
    for nth in 0..count {
        let page = random.below(PAGES);
        let value = (1 << 32) + nth + 1;
        // A page that has gone is refused.
        let _ = device.write(Iova::new(page * PAGE), &value.to_le_bytes());
        match random.below(4) {
            0 => device.quiesce(),
            1 => linger(&mut device, 2),
            _ => (),
        }
    }
    linger(&mut device, 4);
}

/// The device only answers, while its last writes may be in flight.
fn linger(device: &mut Device<AmdV1>, times: u64) {
    for _ in 0..times {
        device.service();
        thread::yield_now();
    }
}

/// Rules 1, 2, 4, 5 and 10 of the contract: a device, a CPU thread that marks or holds a guard, a
/// mapper, and two harvesters that commit and abort, over two areas and one that comes and goes. In
/// the end all that was written was copied.
fn precopy(seed: u64, config: DomainConfig) -> bool {
    let machine = Machine::new(config);
    let mut random = Random::new(seed);
    let mut next = || Random::new(random.below(u64::MAX));
    let mut threads = Vec::new();
    let (device, of_device) = (machine.device(), next());
    threads.push(thread::spawn(move || drive(device, of_device, 6)));
    let (mut of_cpu, m) = (next(), machine.clone());
    threads.push(thread::spawn(move || {
        for nth in 0..4u64 {
            let page = of_cpu.below(STAY);
            let write = || {
                m.memory
                    .write(page * PAGE, &(nth + 1).to_le_bytes())
                    .unwrap()
            };
            if of_cpu.below(2) == 0 {
                write();
                m.space.mark(pages(page, 1)).unwrap();
            } else {
                let guard = m.space.begin_write(pages(page, 1)).unwrap();
                write();
                drop(guard);
            }
        }
    }));
    let (mut of_mapper, m) = (next(), machine.clone());
    threads.push(thread::spawn(move || {
        for _ in 0..2 {
            let gone = pages(COMES_AND_GOES, 1);
            let backing = COMES_AND_GOES * PAGE;
            m.space.map(gone, backing, Access::ReadWrite).unwrap();
            let words = [AtomicU64::new(0)];
            let bitmap = UserBitmap::shared(&words);
            m.space.unmap(gone, Domain::PAGE, bitmap).unwrap();
            m.copy(COMES_AND_GOES, words[0].load(Ordering::Relaxed));
            if of_mapper.below(2) == 0 {
                let _ = m.space.cut(Iova::new(PAGE));
            }
        }
    }));
    for _ in 0..2 {
        let (mut of_harvester, m) = (next(), machine.clone());
        threads.push(thread::spawn(move || {
            (0..3).for_each(|_| m.pass(of_harvester.below(4)));
        }));
    }
    threads
        .into_iter()
        .for_each(|thread| thread.join().unwrap());
    machine.pass(0);
    machine.is_copied()
}

#[test]
fn a_migration_loses_no_write() {
    let steps = [
        Step::DropCached,
        Step::DrainInFlight,
        Step::RecordLeaves,
        Step::RecordMarks,
        Step::OweBeforePutBack,
        Step::FlushBeforeReuse,
        Step::NextGeneration,
        Step::WaitForLeader,
    ];
    holds_only_with(SEEDS, &steps, |seed| precopy(seed, DomainConfig::default()));
}

/// The same while the harvesters skip tables that no device walked through: this includes a case
/// that no loom model reaches, in which two harvesters clear A, look and flush at once while a
/// device writes.
#[test]
fn a_migration_that_skips_what_is_quiet_loses_no_write() {
    fn skipping(seed: u64) -> bool {
        let config = DomainConfig {
            max_leaf: Domain::PAGE,
            skip_quiet: true,
            ..DomainConfig::default()
        };
        precopy(seed, config)
    }
    holds_only_with(SEEDS, &[Step::LookAfterFlush, Step::DropCached], skipping);
}

/// The number of seeds of a daily run.
const SEEDS: u64 = 2_000;
