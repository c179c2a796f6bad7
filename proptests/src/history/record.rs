//! The run: two devices and a CPU write, two threads harvest for the unnamed consumer and one for
//! each of two named ones, one mapper unmaps and maps again, one thread discards. Each of them
//! records its operations and their times.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use dirtymap::harvest::{Content, Synced};
use dirtymap::sync::{Arc, AtomicBool, AtomicU64, Mutex, Ordering, Step, leave_out, lock, thread};
use dirtymap::{
    Access, AddressSpace, Consumer, Error, Granule, HarvestRequest, Holes, Iova, IovaRange, Lease,
    Start, UserBitmap,
};
use pagetable_sim::{Breakage, Device, DeviceConfig, Domain, DomainConfig, PhysMemory};

use super::{Copied, End, Harvest, History, Stamp, Write};
use crate::Random;

const PAGE: u64 = 4096;
/// The pages of the two areas, one after the other. The second area is unmapped and mapped again
/// and again.
const AREAS: [(u64, u64); 2] = [(16, 24), (40, 8)];
const FIRST: u64 = AREAS[0].0;
const BEHIND: u64 = AREAS[1].0 + AREAS[1].1;
/// The most writes that a writer records before it rests.
const MOST: usize = 60_000;

/// What is broken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Broken {
    Nothing,
    /// The hardware.
    Hardware(Breakage),
    /// CPUs do not mark.
    ForgetMarks,
    /// An abort is recorded and not performed.
    ForgetAborts,
    /// Consumers copy before the sync instead of after it.
    CopyBeforeSync,
    /// Harvests leave out a step.
    Step(Step),
}

struct Run {
    space: AddressSpace,
    memory: Arc<PhysMemory>,
    broken: Broken,
    began: Instant,
    stop: AtomicBool,
    history: Mutex<History>,
    /// By page: when the last drop of its storage ended.
    dropped: Vec<AtomicU64>,
}

fn pages(first: u64, count: u64) -> IovaRange {
    IovaRange::from_len(Iova::new(first * PAGE), count * PAGE).unwrap()
}

impl Run {
    fn now(&self) -> Stamp {
        self.began.elapsed().as_nanos() as Stamp
    }

    fn goes_on(&self) -> bool {
        // Relaxed: only says when to stop.
        !self.stop.load(Ordering::Relaxed)
    }

    /// Writes to random pages, often one of a few. `write` returns whether it wrote.
    fn writer(
        &self,
        writer: usize,
        mut random: Random,
        mut write: impl FnMut(u64, &[u8], u64) -> bool,
    ) {
        let mut writes = Vec::with_capacity(MOST);
        let mut number = 0;
        while self.goes_on() && writes.len() < MOST {
            let page = match random.below(4) {
                0 => FIRST + random.below(BEHIND - FIRST),
                _ => [FIRST, FIRST + 1, BEHIND - 1][random.below(3) as usize],
            };
            number += 1;
            let at = page * PAGE + writer as u64 * 8;
            let began = self.now();
            let done = write(at, &u64::to_le_bytes(number), random.bits());
            let ended = self.now();
            if done {
                writes.push(Write {
                    writer,
                    page,
                    number,
                    began,
                    ended,
                });
            }
        }
        lock(&self.history).writes.extend(writes);
    }

    fn device(&self, writer: usize, mut device: Device, random: Random) {
        self.writer(writer, random, |at, bytes, dice| {
            // Faults while the area is unmapped.
            let done = device.write(Iova::new(at), bytes).is_ok();
            if dice.is_multiple_of(64) {
                device.quiesce();
            }
            device.service();
            done
        });
        device.quiesce();
    }

    fn cpu(&self, writer: usize, random: Random) {
        self.writer(writer, random, |at, bytes, dice| {
            if dice.is_multiple_of(16) {
                thread::yield_now();
            }
            self.memory.write(at, bytes).unwrap();
            let range = IovaRange::from_len(Iova::new(at), 8).unwrap();
            self.broken == Broken::ForgetMarks || self.space.mark(range).is_ok()
        });
    }

    /// Discards some pages of the first area. The memory keeps what is in it, so that a copy that
    /// takes the pages for data has the numbers of all writers; and the lane of this writer gets a
    /// new one, when the storage is dropped.
    fn discarder(&self, writer: usize, mut random: Random) {
        if let Broken::Step(step) = self.broken {
            leave_out(Some(step));
        }
        let mut writes = Vec::new();
        let mut number = 0;
        while self.goes_on() && writes.len() < MOST {
            let (first, count) = AREAS[0];
            let page = first + [0, 1, random.below(count - 3)][random.below(3) as usize];
            let all = page..page + 1 + random.below(3);
            number += 1;
            let began = self.now();
            let discarded = self.space.discard(pages(page, all.end - page), || {
                for page in all.clone() {
                    let at = page * PAGE + writer as u64 * 8;
                    self.memory.write(at, &u64::to_le_bytes(number)).unwrap();
                }
                let now = self.now();
                for page in all.clone() {
                    // Release: pairs with the Acquire in `copy`.
                    self.dropped[page as usize].store(now, Ordering::Release);
                }
                Ok(())
            });
            discarded.unwrap();
            let ended = self.now();
            writes.extend(all.map(|page| Write {
                writer,
                page,
                number,
                began,
                ended,
            }));
            thread::sleep(Duration::from_micros(random.below(200)));
        }
        lock(&self.history).writes.extend(writes);
    }

    /// What a lease tells to copy.
    fn copy_lease(&self, lease: &Lease<'_, Synced>) -> BTreeMap<u64, Copied> {
        let mut all = BTreeMap::new();
        for (run, content) in lease.contents() {
            let copied = self.copy([run].into_iter());
            all.extend(copied.into_iter().map(|(page, copied)| match content {
                Content::Data => (page, copied),
                // Acquire: pairs with the Release in `discarder`.
                Content::Zero => {
                    let dropped = self.dropped[page as usize].load(Ordering::Acquire);
                    (page, Copied::Zero(dropped))
                }
            }));
        }
        all
    }

    /// The number of each writer in a copy of these pages.
    fn copy(&self, runs: impl Iterator<Item = IovaRange>) -> BTreeMap<u64, Copied> {
        let all = runs.flat_map(|run| run.start().get() / PAGE..=run.last().get() / PAGE);
        all.map(|page| {
            let numbers = std::array::from_fn(|writer| {
                let writer = writer as u64;
                let mut bytes = [0; 8];
                let at = page * PAGE + writer * 8;
                self.memory.read(at, &mut bytes).unwrap();
                u64::from_le_bytes(bytes)
            });
            (page, Copied::Data(numbers))
        })
        .collect()
    }

    /// Harvests for the unnamed consumer or, with its number, a named one.
    fn consumer(&self, named: Option<(usize, &Consumer<'_>)>, mut random: Random) {
        if let Broken::Step(step) = self.broken {
            leave_out(Some(step));
        }
        let mut harvests = Vec::new();
        while self.goes_on() {
            let from = random.below(BEHIND - FIRST);
            let count = 1 + random.below(BEHIND - FIRST - from);
            harvests.push(self.round(named, FIRST + from, count, random.below(8)));
            if random.below(4) == 0 {
                thread::yield_now();
            }
        }
        lock(&self.history).harvests.extend(harvests);
    }

    /// One harvest, and the end of its lease.
    fn round(
        &self,
        named: Option<(usize, &Consumer<'_>)>,
        first: u64,
        count: u64,
        fate: u64,
    ) -> Harvest {
        let range = pages(first, count);
        let words = [AtomicU64::new(0)];
        let request = HarvestRequest::new(range, Granule::K4).holes(Holes::Stop);
        let began = self.now();
        let bitmap = UserBitmap::shared(&words);
        let answer = match named {
            None => self.space.harvest(&request, bitmap),
            Some((_, consumer)) => consumer.harvest(&request, bitmap),
        };
        let looked = self.now();
        if fate == 2 {
            // Long enough for others to harvest, copy and harvest again.
            thread::sleep(Duration::from_micros(500));
        }
        // It stops if the second area is unmapped.
        let lease = answer.unwrap().partial();
        let behind = lease
            .stopped()
            .map_or(first + count, |stopped| stopped.at.get() / PAGE);
        let harvest = |reported, end| Harvest {
            whose: Some(named.map_or(0, |(number, _)| number)),
            covers: (first, behind),
            began,
            looked,
            reported,
            end,
        };
        if fate == 0 {
            // The lease is not synced, so its pages are read from the bitmap after its end.
            let aborted = match self.broken {
                Broken::ForgetAborts => {
                    std::mem::forget(lease);
                    Default::default()
                }
                _ => lease.abort(),
            };
            let ended = self.now();
            let named = UserBitmap::shared(&words).view(range, Granule::K4).unwrap();
            return harvest(
                self.copy(named.runs()),
                self.end(aborted.outside_bytes, ended),
            );
        }
        let early = (self.broken == Broken::CopyBeforeSync).then(|| self.copy([range].into_iter()));
        let lease = lease.sync().unwrap();
        let synced = self.now();
        let mut reported = self.copy_lease(&lease);
        if let Some(early) = early {
            reported
                .iter_mut()
                .for_each(|(page, numbers)| *numbers = early[page]);
        }
        match fate {
            1 => {
                let aborted = match self.broken {
                    Broken::ForgetAborts => {
                        std::mem::forget(lease);
                        Default::default()
                    }
                    _ => lease.abort(),
                };
                let ended = self.now();
                harvest(reported, self.end(aborted.outside_bytes, ended))
            }
            _ => {
                lease.commit();
                harvest(reported, End::Kept(synced))
            }
        }
    }

    /// Pages outside of all areas were copied, after an unmap had flushed.
    fn end(&self, outside: u64, ended: Stamp) -> End {
        match outside {
            0 => End::PutBack(ended),
            _ => End::Kept(ended),
        }
    }

    /// Unmaps the second area and maps it again.
    fn mapper(&self, mut random: Random) {
        let (first, count) = AREAS[1];
        let range = pages(first, count);
        let mut harvests = Vec::new();
        while self.goes_on() {
            thread::sleep(Duration::from_micros(200 + random.below(2000)));
            let mut words = [0u64];
            let began = self.now();
            let bitmap = UserBitmap::new(&mut words);
            let (_, view) = self.space.unmap(range, Granule::K4, bitmap).unwrap();
            let synced = self.now();
            harvests.push(Harvest {
                whose: None,
                covers: (first, first + count),
                began,
                looked: synced,
                reported: self.copy(view.runs()),
                end: End::Kept(synced),
            });
            let backing = range.start().get();
            match self.space.map(range, backing, Access::ReadWrite) {
                Ok(()) | Err(Error::Busy { .. }) => {}
                Err(error) => panic!("{error}"),
            }
        }
        lock(&self.history).harvests.extend(harvests);
    }
}

/// A run of `time`, on small leaves if `seed` is even. It ends with a harvest of everything.
pub(super) fn record(broken: Broken, time: Duration, seed: u64) -> History {
    let memory = Arc::new(PhysMemory::new(BEHIND * PAGE).unwrap());
    let config = DomainConfig {
        max_leaf: [Granule::K4, Granule::M2][(seed % 2) as usize],
        ..DomainConfig::default()
    };
    let domain = Domain::new(Arc::clone(&memory), config);
    let run = Run {
        space: AddressSpace::with_source(Granule::K4, Arc::clone(&domain)).unwrap(),
        memory,
        broken,
        began: Instant::now(),
        stop: AtomicBool::new(false),
        history: Mutex::default(),
        dropped: (0..BEHIND).map(|_| AtomicU64::new(0)).collect(),
    };
    for (first, count) in AREAS {
        let range = pages(first, count);
        let backing = range.start().get();
        run.space.map(range, backing, Access::ReadWrite).unwrap();
    }
    run.space.start_tracking().unwrap();
    if let Broken::Hardware(breakage) = broken {
        domain.break_hardware(breakage);
    }
    let random = |nth: u64| Random::new(seed.wrapping_mul(31).wrapping_add(nth));
    let joined = |name| run.space.consumer(name, Start::Clean).unwrap();
    let named = [joined("one"), joined("two")];
    let numbered = || [1, 2].into_iter().zip(&named);
    let shared = &run;
    thread::scope(|scope| {
        for nth in 0..2 {
            let device = domain.attach(DeviceConfig::default());
            scope.spawn(move || shared.device(nth, device, random(nth as u64)));
            scope.spawn(move || shared.consumer(None, random(10 + nth as u64)));
        }
        for named in numbered() {
            let random = random(12 + named.0 as u64);
            scope.spawn(move || shared.consumer(Some(named), random));
        }
        scope.spawn(move || shared.cpu(2, random(20)));
        scope.spawn(move || shared.mapper(random(30)));
        scope.spawn(move || shared.discarder(3, random(40)));
        thread::sleep(time);
        // Relaxed: as in `goes_on`.
        shared.stop.store(true, Ordering::Relaxed);
    });
    for named in [None].into_iter().chain(numbered().map(Some)) {
        let last = run.round(named, FIRST, BEHIND - FIRST, 7);
        assert_eq!(last.covers.1, BEHIND, "the areas are there in the end");
        lock(&run.history).harvests.push(last);
    }
    let mut history = lock(&run.history);
    std::mem::take(&mut *history)
}
