//! Devices write through addresses that are mapped anew all the time, and the copy of the guest's
//! memory is complete: the backing of leases and unmaps names each page that was written.
//!
//! The log of the writes is the memory itself. Devices write real bytes of guest memory, by
//! addresses that two threads map to guest pages of their choice, and unmap. Each of two consumers
//! has a copy of its own, and copies the guest pages that its leases name, after their sync. Each
//! thread that unmaps copies those of the unmap, for both consumers. At the end each copy and the
//! memory are the same, byte for byte. A page that is attributed to a wrong mapping is not copied,
//! and differs.
//!
//! The programs in one thread have a log of all writes instead: each with its address, the mapping
//! that the address had, and its guest page. There a later write to the same guest page does not
//! hide that an earlier one was attributed wrongly.

use std::time::{Duration, Instant};

use dirtymap::harvest::Backing;
use dirtymap::sync::{Arc, AtomicBool, Mutex, Ordering, lock, thread};
use dirtymap::{
    Access, AddressSpace, Consumer, Granule, Iova, IovaRange, Lease, SparseBitmap, Start, Synced,
    UserBitmap,
};
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
    /// Of the unnamed consumer and of the named one. Copied under the lock, so that an older copy
    /// never replaces a newer one.
    copies: [Mutex<Vec<u8>>; 2],
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

    fn copy(&self, to: usize, runs: impl Iterator<Item = IovaRange>, backing: &Backing) {
        let mut copy = lock(&self.copies[to]);
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
        for to in 0..self.copies.len() {
            self.copy(to, dirty.runs(), &backing);
        }
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

    fn harvester(&self, reader: &Consumer<'_>, mut random: Random) {
        while self.goes_on() {
            let consumer = random.below(2) as usize;
            if let Some(lease) = self.harvest(consumer, reader) {
                // An abort counts pages of areas that have gone. They are copied already.
                match random.below(4) {
                    0 => drop(lease.abort()),
                    _ => drop(lease.commit()),
                }
            }
        }
    }

    /// A lease of the unnamed consumer (0) or of the reader (1), copied. `None` without areas.
    fn harvest<'s>(&'s self, consumer: usize, reader: &Consumer<'s>) -> Option<Lease<'s, Synced>> {
        let rounds = match consumer {
            0 => self.space.rounds(),
            _ => reader.rounds(),
        };
        let lease = rounds.with_backing().next().ok()?;
        self.copy(consumer, lease.runs(), lease.backing().unwrap());
        Some(lease)
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
        copies: [(); 2].map(|()| Mutex::new(vec![0; (GUEST_PAGES * PAGE) as usize])),
        stop: AtomicBool::new(false),
    };
    let reader = storm.space.consumer("reader", Start::Dirty).unwrap();
    thread::scope(|scope| {
        let (storm, reader) = (&storm, &reader);
        let random = |nth: u64| Random::new(seed * 16 + nth);
        scope.spawn(move || storm.mapper(0, random(1)));
        scope.spawn(move || storm.mapper(1, random(2)));
        scope.spawn(move || storm.harvester(reader, random(3)));
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
    for (nth, area) in left.into_iter().enumerate() {
        // Half of what is left comes by the last harvests, half by unmaps.
        if nth % 2 == 0 {
            storm.unmap(area.range.start().get() / PAGE / SLOT_PAGES);
        }
    }
    for consumer in 0..2 {
        if let Some(lease) = storm.harvest(consumer, &reader) {
            lease.commit();
        }
    }
    let mut bytes = vec![0; (GUEST_PAGES * PAGE) as usize];
    memory.read(0, &mut bytes).unwrap();
    for (consumer, copy) in storm.copies.iter().enumerate() {
        let copy = lock(copy);
        for page in 0..GUEST_PAGES as usize {
            let part = page * PAGE as usize..(page + 1) * PAGE as usize;
            assert!(
                bytes[part.clone()] == copy[part],
                "seed {seed}, consumer {consumer}: guest page {page} was not copied after its last \
                 write"
            );
        }
    }
    assert!(bytes.iter().any(|byte| *byte != 0));
}

/// A write of a program in one thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Write {
    iova_page: u64,
    guest_page: u64,
    /// The number of the map that the address had.
    map: u64,
}

/// A consumer of a program in one thread.
struct Reader<'s> {
    consumer: Option<Consumer<'s>>,
    /// The writes that no lease that stays and no unmap has reported to it.
    pending: Vec<Write>,
    /// A lease that is held while areas come and go, with its writes.
    lease: Option<(Lease<'s, Synced>, Vec<Write>)>,
}

/// The pages of the addresses and of their backing.
fn pairs(runs: impl Iterator<Item = IovaRange>, backing: &Backing) -> Vec<(u64, u64)> {
    let parts = runs.flat_map(|run| backing.of(run));
    let pages = parts.flat_map(|part| {
        let first = (part.range.start().get() / PAGE, part.backing / PAGE);
        (0..(part.range.len() as u64).div_ceil(PAGE)).map(move |n| (first.0 + n, first.1 + n))
    });
    pages.collect()
}

/// Each write is among `told`, and each page that is told is in a slot to which one was.
fn check(told: &[(u64, u64)], writes: &[Write], at: &str) {
    for write in writes {
        let pair = (write.iova_page, write.guest_page);
        assert!(
            told.contains(&pair),
            "{at}: {write:?} is not among {told:?}"
        );
    }
    for (iova, guest) in told {
        let is_near = |write: &&Write| {
            write.iova_page / SLOT_PAGES == iova / SLOT_PAGES
                && write.guest_page / SLOT_PAGES == guest / SLOT_PAGES
        };
        let why = writes.iter().find(is_near);
        assert!(
            why.is_some(),
            "{at}: no write to {iova} in guest page {guest}"
        );
    }
}

impl<'s> Reader<'s> {
    /// Ends a lease. An abort leaves to the lease what was written to maps that have gone.
    fn end(&mut self, commits: bool, maps: &[Option<(u64, u64)>]) {
        let Some((lease, writes)) = self.lease.take() else {
            return;
        };
        if commits {
            lease.commit();
            return;
        }
        lease.abort();
        let is_there = |write: &Write| {
            let map = maps[(write.iova_page / SLOT_PAGES) as usize];
            map.is_some_and(|(map, _)| map == write.map)
        };
        self.pending.extend(writes.into_iter().filter(is_there));
    }

    fn begin(&mut self, space: &'s AddressSpace, at: &str) {
        let rounds = match &self.consumer {
            Some(consumer) => consumer.rounds(),
            None => space.rounds(),
        };
        let Ok(lease) = rounds.with_backing().next() else {
            return; // nothing is mapped
        };
        let writes = std::mem::take(&mut self.pending);
        check(&pairs(lease.runs(), lease.backing().unwrap()), &writes, at);
        self.lease = Some((lease, writes));
    }
}

/// Two devices in two domains and threads that mark, three consumers whose leases are held while
/// their areas are unmapped and mapped anew, commits and aborts: against a log of all writes.
#[test]
fn each_consumer_is_told_each_write_with_the_guest_page_that_it_went_to() {
    for seed in 0..150 {
        program(seed);
    }
}

fn program(seed: u64) {
    let memory = Arc::new(PhysMemory::new(GUEST_PAGES * PAGE).unwrap());
    let domains = [(); 2].map(|()| Domain::new(memory.clone(), DomainConfig::default()));
    let space = AddressSpace::with_source(Granule::K4, domains[0].clone()).unwrap();
    space.attach(domains[1].clone()).unwrap();
    space.start_tracking().unwrap();
    let mut devices = domains.map(|domain| domain.attach(DeviceConfig::default()));
    let named = |name| Some(space.consumer(name, Start::Clean).unwrap());
    let mut readers = [None, named("one"), named("two")].map(|consumer| Reader {
        consumer,
        pending: Vec::new(),
        lease: None,
    });
    let mut random = Random::new(seed);
    // The number and the first guest page of the map of each slot.
    let mut maps: [Option<(u64, u64)>; SLOTS as usize] = [None; SLOTS as usize];
    for step in 0..150 {
        let at = format!("seed {seed}, step {step}");
        let n = random.below(SLOTS);
        let map = maps[n as usize];
        match (random.below(8), map) {
            (0, None) => {
                let guest = random.below(GUEST_PAGES / SLOT_PAGES) * SLOT_PAGES;
                let mapped = space.map(slot(n), guest * PAGE, Access::ReadWrite);
                mapped.unwrap();
                maps[n as usize] = Some((step, guest));
            }
            (0, Some((map, _))) => {
                let bits = SparseBitmap::new(SLOT_PAGES);
                let bitmap = UserBitmap::sparse(&bits);
                let unmapped = space.unmap_with_backing(slot(n), Granule::K4, bitmap);
                let (_, dirty, backing) = unmapped.unwrap();
                maps[n as usize] = None;
                let told = pairs(dirty.runs(), &backing);
                let mut any = Vec::new();
                for reader in &mut readers {
                    let gone = reader.pending.extract_if(.., |write| write.map == map);
                    any.extend(gone);
                }
                check(&told, &any, &at);
            }
            (1 | 2, _) => {
                let reader = &mut readers[random.below(3) as usize];
                match reader.lease {
                    Some(_) => reader.end(random.below(3) > 0, &maps),
                    None => reader.begin(&space, &at),
                }
            }
            (_, Some((map, guest))) => {
                let offset = random.below(SLOT_PAGES);
                let iova_page = n * SLOT_PAGES + offset;
                let iova = Iova::new(iova_page * PAGE + 8);
                match random.below(3) {
                    2 => space.mark(IovaRange::from_len(iova, 8).unwrap()).unwrap(),
                    nth => {
                        let device = &mut devices[nth as usize];
                        device.write(iova, &[step as u8; 8]).unwrap();
                        device.quiesce();
                    }
                }
                for reader in &mut readers {
                    reader.pending.push(Write {
                        iova_page,
                        guest_page: guest + offset,
                        map,
                    });
                }
            }
            _ => (),
        }
    }
    for (nth, reader) in readers.iter_mut().enumerate() {
        let at = format!("seed {seed}, the end of consumer {nth}");
        reader.end(true, &maps);
        reader.begin(&space, &at);
        reader.end(true, &maps);
        assert!(reader.pending.is_empty(), "{at}");
    }
}
