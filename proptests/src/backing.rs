//! Devices write through addresses that are mapped anew all the time, and the copy of the guest's
//! memory is complete: the backing of leases and unmaps names each page that was written.
//!
//! The log of the writes is the memory itself. Devices write real bytes of guest memory, by
//! addresses that two threads map to guest pages of their choice, and unmap. Harvesters copy the
//! guest pages that a lease names, after its sync, and each thread that unmaps copies those of the
//! unmap. At the end the copy and the memory are the same, byte for byte. A page that is attributed
//! to a wrong mapping is not copied, and differs.

use std::time::{Duration, Instant};

use dirtymap::harvest::Backing;
use dirtymap::sync::{Arc, AtomicBool, Mutex, Ordering, lock, thread};
use dirtymap::{Access, AddressSpace, Granule, Iova, IovaRange, SparseBitmap, Start, UserBitmap};
use pagetable_sim::{DeviceConfig, Domain, DomainConfig, PhysMemory};

use crate::Random;

const PAGE: u64 = 4096;
const GUEST_PAGES: u64 = 48;
/// Addresses that are mapped and unmapped as a whole.
const SLOTS: u64 = 12;
const SLOT_PAGES: u64 = 2;

struct Storm {
    space: AddressSpace,
    memory: Arc<PhysMemory>,
    /// Copied under the lock, so that an older copy never replaces a newer one.
    copy: Mutex<Vec<u8>>,
    stop: AtomicBool,
}

fn slot(n: u64) -> IovaRange {
    IovaRange::from_len(Iova::new(n * SLOT_PAGES * PAGE), SLOT_PAGES * PAGE).unwrap()
}

impl Storm {
    fn goes_on(&self) -> bool {
        // Relaxed: only says when to stop.
        !self.stop.load(Ordering::Relaxed)
    }

    fn copy(&self, runs: impl Iterator<Item = IovaRange>, backing: &Backing) {
        let mut copy = lock(&self.copy);
        for part in runs.flat_map(|run| backing.of(run)) {
            let (at, len) = (part.backing as usize, part.range.len() as usize);
            let bytes = &mut copy[at..at + len];
            self.memory.read(part.backing, bytes).unwrap();
        }
    }

    fn unmap(&self, n: u64) {
        let bits = SparseBitmap::new(SLOT_PAGES);
        let bitmap = UserBitmap::sparse(&bits);
        let unmapped = self.space.unmap_with_backing(slot(n), Granule::K4, bitmap);
        let (_, dirty, backing) = unmapped.unwrap();
        self.copy(dirty.runs(), &backing);
    }

    /// Maps and unmaps the slots whose number has the given remainder.
    fn mapper(&self, remainder: u64, mut random: Random) {
        let mut is_mapped = [false; SLOTS as usize];
        while self.goes_on() {
            let n = random.below(SLOTS / 2) * 2 + remainder;
            let place = &mut is_mapped[n as usize];
            if *place {
                self.unmap(n);
            } else {
                let guest = random.below(GUEST_PAGES / SLOT_PAGES) * SLOT_PAGES;
                let mapped = self.space.map(slot(n), guest * PAGE, Access::ReadWrite);
                mapped.unwrap();
            }
            *place = !*place;
        }
    }

    fn harvester(&self, mut random: Random) {
        let reader = self.space.consumer("reader", Start::Dirty).unwrap();
        while self.goes_on() {
            let rounds = match random.below(2) {
                0 => reader.rounds(),
                _ => self.space.rounds(),
            };
            if let Ok(lease) = rounds.with_backing().next() {
                self.copy(lease.runs(), lease.backing().unwrap());
                // An abort counts pages of areas that have gone. They are copied already.
                match random.below(4) {
                    0 => drop(lease.abort()),
                    _ => drop(lease.commit()),
                }
            }
        }
    }
}

#[test]
fn the_backing_of_leases_and_unmaps_names_each_page_that_was_written() {
    let until = Instant::now() + Duration::from_millis(1500);
    for seed in 0.. {
        if seed > 0 && Instant::now() >= until {
            break;
        }
        storm(seed);
    }
}

fn storm(seed: u64) {
    let memory = Arc::new(PhysMemory::new(GUEST_PAGES * PAGE).unwrap());
    let domain = Domain::new(memory.clone(), DomainConfig::default());
    let space = AddressSpace::with_source(Granule::K4, domain.clone()).unwrap();
    space.start_tracking().unwrap();
    let storm = Storm {
        space,
        memory: memory.clone(),
        copy: Mutex::new(vec![0; (GUEST_PAGES * PAGE) as usize]),
        stop: AtomicBool::new(false),
    };
    thread::scope(|scope| {
        let storm = &storm;
        let random = |nth: u64| Random::new(seed * 16 + nth);
        scope.spawn(move || storm.mapper(0, random(1)));
        scope.spawn(move || storm.mapper(1, random(2)));
        scope.spawn(move || storm.harvester(random(3)));
        let mut device = domain.attach(DeviceConfig::default());
        let mut random = random(4);
        // The mappers may begin late on a busy machine, so what counts is what was written.
        let mut written = 0;
        while written < 10_000 {
            let at = random.below(SLOTS * SLOT_PAGES * PAGE - 64);
            let bytes = [random.bits() as u8; 64];
            // At an address that is not mapped the device faults.
            let len = 1 + random.below(63) as usize;
            written += u32::from(device.write(Iova::new(at), &bytes[..len]).is_ok());
            device.service();
        }
        device.quiesce();
        storm.stop.store(true, Ordering::Relaxed);
    });
    let left = storm.space.mappings();
    for area in left {
        storm.unmap(area.range.start().get() / PAGE / SLOT_PAGES);
    }
    let mut bytes = vec![0; (GUEST_PAGES * PAGE) as usize];
    memory.read(0, &mut bytes).unwrap();
    let copy = lock(&storm.copy);
    for page in 0..GUEST_PAGES as usize {
        let part = page * PAGE as usize..(page + 1) * PAGE as usize;
        assert!(
            bytes[part.clone()] == copy[part],
            "seed {seed}: guest page {page} was not copied after its last write"
        );
    }
    assert!(bytes.iter().any(|byte| *byte != 0));
}
