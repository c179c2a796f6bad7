//! End to end: devices write, a harvest takes the dirty pages, a flush reaches the devices, and a
//! lease is committed.
//!
//! Devices sleep during harvests. So the time is that of the library and of the simulated IOMMU,
//! without the response time of threads.

use std::cell::RefCell;
use std::hint::black_box;
use std::sync::Barrier;
use std::time::{Duration, Instant};

use dirtymap::source::{FlushGather, Invalidated, LeafSink, Sink, Stopped};
use dirtymap::sync::{Arc, AtomicBool, Ordering, thread};
use dirtymap::{
    Access, AddressSpace, DirtySource, Error, Granule, HarvestRequest, Iova, IovaRange, Mapping,
    Tracking, UserBitmap,
};
use pagetable_sim::{Device, DeviceConfig, Domain, DomainConfig, PhysMemory};

use super::{Contestant, Family, Report, Settings, Target, Unit, Workload, contest, per_operation};
use crate::PAGE;
use crate::peers::naive_table::NaiveTable;
use crate::workloads::{Random, clusters};

/// From the write of a device to the commit of a lease.
pub const FAMILY: Family = Family {
    name: "end-to-end",
    run,
    grow: None,
};

const GIB: u64 = 1 << 30;
/// Pages of the machine: 64 GiB.
const PAGES: u64 = 64 * GIB / PAGE;

/// A domain whose flushes take as long as those of an IOMMU with many devices, so that other
/// threads come to wait meanwhile.
struct Slow(Arc<Domain>);

impl DirtySource for Slow {
    fn page(&self) -> Granule {
        self.0.page()
    }

    fn map(&self, mapping: &Mapping) -> Result<(), Error> {
        self.0.map(mapping)
    }

    fn unmap(&self, range: IovaRange, gather: &mut FlushGather, dirty: &mut dyn FnMut(IovaRange)) {
        self.0.unmap(range, gather, dirty);
    }

    fn set_tracking(&self, to: Tracking) -> Result<(), Error> {
        self.0.set_tracking(to)
    }

    fn read_and_clear(&self, range: IovaRange, out: &mut LeafSink<'_, '_>) -> Result<(), Stopped> {
        self.0.read_and_clear(range, out)
    }

    fn peek(&self, range: IovaRange, sink: &mut Sink<'_>) -> Result<(), Stopped> {
        self.0.peek(range, sink)
    }

    fn invalidate(&self, gather: &FlushGather) -> Result<Invalidated, Error> {
        thread::sleep(Duration::from_micros(500));
        self.0.invalidate(gather)
    }
}

/// A machine whose devices translate by one domain. All of its memory is backed by the same bytes.
struct Machine {
    space: AddressSpace,
    domain: Arc<Domain>,
    devices: Vec<Device>,
    words: Vec<u64>,
    all: IovaRange,
}

impl Machine {
    #[allow(clippy::unwrap_used)] // a machine that is fit
    fn new(bytes: u64, backing: u64, devices: usize, skip_quiet: bool) -> Self {
        Machine::through(bytes, backing, devices, skip_quiet, |domain| {
            Box::new(domain)
        })
    }

    /// As [`new`](Self::new), with `source` between the space and the domain.
    #[allow(clippy::unwrap_used)] // a machine that is fit
    fn through(
        bytes: u64,
        backing: u64,
        devices: usize,
        skip_quiet: bool,
        source: fn(Arc<Domain>) -> Box<dyn DirtySource>,
    ) -> Self {
        let memory = Arc::new(PhysMemory::new(backing).unwrap());
        let config = DomainConfig {
            max_leaf: Granule::K4,
            skip_quiet,
            ..DomainConfig::default()
        };
        let domain = Domain::new(memory, config);
        let space = AddressSpace::new(Granule::K4);
        let source: Arc<dyn DirtySource> = Arc::from(source(Arc::clone(&domain)));
        space.attach(source).unwrap();
        for start in (0..bytes).step_by(backing as usize) {
            let range = IovaRange::from_len(Iova::new(start), backing).unwrap();
            space.map(range, 0, Access::ReadWrite).unwrap();
        }
        space.start_tracking().unwrap();
        let devices = (0..devices).map(|_| domain.attach(DeviceConfig::default()));
        Machine {
            devices: devices.collect(),
            space,
            domain,
            words: vec![0; (bytes / PAGE / 64) as usize],
            all: IovaRange::from_len(Iova::MIN, bytes).unwrap(),
        }
    }

    /// The devices write to these pages, in turn.
    #[allow(clippy::unwrap_used)] // pages that are mapped
    fn write(&mut self, pages: impl Iterator<Item = u64>) {
        let count = self.devices.len();
        for (nth, page) in pages.enumerate() {
            let device = &mut self.devices[nth % count];
            device.write(Iova::new(page * PAGE), &[1]).unwrap();
        }
        self.devices.iter_mut().for_each(Device::quiesce);
    }

    /// Harvests, flushes and commits, into a zeroed bitmap.
    #[allow(clippy::unwrap_used)] // a range that is mapped
    fn pass(&mut self, parallel: bool) -> Duration {
        self.words.fill(0);
        let request = HarvestRequest::new(self.all, Granule::K4);
        let began = Instant::now();
        let bitmap = UserBitmap::new(&mut self.words);
        let lease = if parallel {
            self.space.harvest(&request.parallel(), bitmap)
        } else {
            self.space.harvest(&request, bitmap)
        };
        lease.unwrap().sync().unwrap().commit();
        began.elapsed()
    }

    fn found(&self) -> u64 {
        let add = |sum: u64, word: &u64| sum.wrapping_mul(31).wrapping_add(*word);
        self.words.iter().fold(0, add)
    }
}

/// Pages that are written to between two harvests.
#[derive(Clone, Copy)]
struct Written {
    name: &'static str,
    count: u64,
    cluster: u64,
    /// Whether the places differ in every round.
    moving: bool,
}

impl Written {
    fn pages(self, round: u64) -> impl Iterator<Item = u64> {
        let clusters = self.count / self.cluster;
        let round = if self.moving { round } else { 0 };
        let places = PAGES / self.cluster;
        (0..clusters).flat_map(move |nth| {
            let at = (round * clusters + nth + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15) % places;
            at * self.cluster..(at + 1) * self.cluster
        })
    }
}

/// The number of dirty pages of a million.
const fn written(name: &'static str, ppm: u64, cluster: u64, moving: bool) -> Written {
    Written {
        name,
        count: PAGES * ppm / 1_000_000,
        cluster,
        moving,
    }
}

const PASSES: [Written; 4] = [
    written("clean", 0, 1, false),
    written("0.01 % in clusters of 256", 100, 256, false),
    written("1 % at random", 10_000, 1, false),
    written("10 % at random", 100_000, 1, false),
];

/// The workloads with skipping, each with its target.
const SKIPS: [(Written, Option<f64>); 5] = [
    (written("clean", 0, 1, false), None),
    (
        written(
            "0.01 % in clusters of 256, the same in every round",
            100,
            256,
            false,
        ),
        Some(50.0),
    ),
    (
        written(
            "0.01 % in clusters of 256, others in every round",
            100,
            256,
            true,
        ),
        Some(50.0),
    ),
    (
        written(
            "0.01 % in clusters of 16, others in every round",
            100,
            16,
            true,
        ),
        None,
    ),
    (
        written("0.01 % single pages, others in every round", 100, 1, true),
        Some(4.0),
    ),
];

fn run(settings: &Settings, report: &mut Report) {
    passes(
        settings,
        report,
        "harvest, flush and lease, 64 GiB, 2 devices",
    );
    skips(
        settings,
        report,
        "harvest, flush and lease, 64 GiB, skipping",
    );
    flushes(settings, report, "flushes for harvests at the same time");
    writes(settings, report, "writes of a device");
    precopy(settings, report, "pre-copy of 1 GiB");
}

/// Whether any of these is requested, because machines take a while to map.
fn wants(settings: &Settings, name: &str, mut all: impl Iterator<Item = Written>) -> bool {
    all.any(|what| format!("{name}, {}", what.name).contains(&settings.matching))
}

fn passes(settings: &Settings, report: &mut Report, name: &str) {
    if !wants(settings, name, PASSES.into_iter()) {
        return;
    }
    settings.at("mapping 64 GiB");
    let machine = RefCell::new(Machine::new(64 * GIB, GIB, 2, false));
    let naive = NaiveTable::new(PAGES, false);
    let words = RefCell::new(vec![0u64; (PAGES / 64) as usize]);
    for what in PASSES
        .into_iter()
        .filter(|what| settings.thorough || what.cluster == 1)
    {
        let runs = clusters(what.count, what.cluster, PAGES);
        let pages: Vec<u64> = runs.into_iter().flatten().collect();
        let (machine, naive, words, pages) = (&machine, &naive, &words, &pages);
        let pass = move |parallel| {
            let mut machine = machine.borrow_mut();
            machine.write(pages.iter().copied());
            machine.pass(parallel).as_nanos() as f64
        };
        let walk = move || {
            pages.iter().for_each(|page| naive.dirty(*page..page + 1));
            let mut words = words.borrow_mut();
            words.fill(0);
            let began = Instant::now();
            naive.harvest(&mut words);
            began.elapsed().as_nanos() as f64
        };
        let found = move |parallel| {
            pass(parallel);
            machine.borrow().found()
        };
        contest(
            settings,
            report,
            FAMILY.name,
            vec![Workload::time(format!("{name}, {}", what.name))],
            vec![
                Contestant::ours("dirtymap", move || vec![pass(false)])
                    .checked(move || found(false)),
                Contestant::ours("dirtymap, parallel", move || vec![pass(true)])
                    .checked(move || found(true)),
                Contestant::peer("entry by entry, no flush", move || vec![walk()]).checked(
                    move || {
                        walk();
                        let add = |sum: u64, word: &u64| sum.wrapping_mul(31).wrapping_add(*word);
                        words.borrow().iter().fold(0, add)
                    },
                ),
            ],
        );
    }
}

/// Skips tables that no device walked through, against a look at each leaf.
fn skips(settings: &Settings, report: &mut Report, name: &str) {
    if !wants(settings, name, SKIPS.into_iter().map(|(what, _)| what)) {
        return;
    }
    settings.at("mapping 2 x 64 GiB");
    let machines = [true, false].map(|skip| RefCell::new(Machine::new(64 * GIB, GIB, 1, skip)));
    let rounds = RefCell::new([0u64; 2]);
    for (what, target) in SKIPS {
        if !settings.thorough && what.cluster < 256 && what.count > 0 {
            continue;
        }
        let (machines, rounds) = (&machines, &rounds);
        let pass = move |which: usize| {
            rounds.borrow_mut()[which] += 1;
            let mut machine = machines[which].borrow_mut();
            machine.write(what.pages(rounds.borrow()[which]));
            machine.pass(false).as_nanos() as f64
        };
        // Tables that are quiet from the start get the state "quiet".
        for _ in 0..4 {
            pass(0);
            pass(1);
        }
        let mut workload = Workload::time(format!("{name}, {}", what.name));
        if let Some(target) = target {
            workload = workload.target(Target::Ratio(target));
        }
        contest(
            settings,
            report,
            FAMILY.name,
            vec![workload],
            vec![
                Contestant::ours("dirtymap, skipping", move || vec![pass(0)]),
                Contestant::peer("every leaf", move || vec![pass(1)]),
            ],
        );
    }
}

/// The number of flushes of the IOMMU for harvests that end at the same time.
#[allow(clippy::unwrap_used)] // ranges that are mapped
fn flushes(settings: &Settings, report: &mut Report, name: &str) {
    let slow = |domain| -> Box<dyn DirtySource> { Box::new(Slow(domain)) };
    let machine = RefCell::new(Machine::through(GIB, GIB, 1, false, slow));
    for threads in [1usize, 2, 4, 8] {
        let machine = &machine;
        let turn = move || {
            let mut machine = machine.borrow_mut();
            // One page for each thread.
            let span = GIB / PAGE / threads as u64;
            machine.write((0..threads as u64).map(|nth| nth * span));
            let before = machine.domain.stats().invalidations;
            let space = &machine.space;
            let barrier = Barrier::new(threads);
            thread::scope(|scope| {
                for nth in 0..threads as u64 {
                    let barrier = &barrier;
                    scope.spawn(move || {
                        let start = Iova::new(nth * span * PAGE);
                        let range = IovaRange::from_len(start, span * PAGE).unwrap();
                        let request = HarvestRequest::new(range, Granule::K4);
                        let mut words = vec![0; (span / 64) as usize];
                        let lease = space
                            .harvest(&request, UserBitmap::new(&mut words))
                            .unwrap();
                        barrier.wait();
                        lease.sync().unwrap().commit();
                    });
                }
            });
            vec![(machine.domain.stats().invalidations - before) as f64]
        };
        contest(
            settings,
            report,
            FAMILY.name,
            vec![
                Workload::new(format!("{name}, {threads} of them"), Unit::Count)
                    .target(Target::AtMost(2.0)),
            ],
            vec![Contestant::ours("dirtymap", turn)],
        );
    }
}

/// The cost of tracking for a device.
#[allow(clippy::unwrap_used)] // pages that are mapped
fn writes(settings: &Settings, report: &mut Report, name: &str) {
    const BYTES: u64 = GIB / 4;
    let [tracked, untracked] = [true, false].map(|on| {
        let mut machine = Machine::new(BYTES, BYTES, 1, false);
        // The memory is touched before the start.
        machine.write(0..BYTES / PAGE);
        match on {
            true => machine.space.start_tracking(),
            false => machine.space.stop_tracking(),
        }
        .unwrap();
        RefCell::new(machine)
    });
    for (what, pages) in [
        ("to 256 pages", 256),
        ("to 256 MiB at random", BYTES / PAGE),
    ] {
        let turn = settings.turn;
        let write = move |machine: &RefCell<Machine>| {
            let mut random = Random::fixed();
            let device = &mut machine.borrow_mut().devices[0];
            let one = per_operation(turn, |times| {
                for _ in 0..times {
                    let iova = Iova::new(random.below(pages) * PAGE);
                    device.write(iova, black_box(&[1; 8])).unwrap();
                }
            });
            device.quiesce();
            vec![1e9 / one]
        };
        let (tracked, untracked) = (&tracked, &untracked);
        contest(
            settings,
            report,
            FAMILY.name,
            vec![Workload::new(format!("{name} {what}"), Unit::Rate)],
            vec![
                Contestant::ours("dirtymap", move || write(tracked)),
                Contestant::ours("dirtymap, harvested all the time", move || {
                    beside_harvests(tracked, pages, turn)
                }),
                Contestant::peer("not tracked", move || write(untracked)),
            ],
        );
    }
}

/// Writes of a device beside a thread that harvests every millisecond.
#[allow(clippy::unwrap_used)] // ranges that are mapped
fn beside_harvests(machine: &RefCell<Machine>, pages: u64, turn: Duration) -> Vec<f64> {
    let machine = &mut *machine.borrow_mut();
    let (space, all, words) = (&machine.space, machine.all, &mut machine.words);
    let device = &mut machine.devices[0];
    let stop = &AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(move || {
            // Relaxed: the end of the scope orders.
            while !stop.load(Ordering::Relaxed) {
                let request = HarvestRequest::new(all, Granule::K4);
                let lease = space.harvest(&request, UserBitmap::new(words)).unwrap();
                lease.sync().unwrap().commit();
                thread::sleep(Duration::from_millis(1));
            }
        });
        let mut random = Random::fixed();
        let one = per_operation(turn, |times| {
            for _ in 0..times {
                let iova = Iova::new(random.below(pages) * PAGE);
                device.write(iova, black_box(&[1; 8])).unwrap();
            }
        });
        // Before the harvester waits for its answer.
        device.quiesce();
        // Relaxed: as above.
        stop.store(true, Ordering::Relaxed);
        vec![1e9 / one]
    })
}

/// Copies all pages, then the pages that became dirty meanwhile, and so on. While four pages are
/// copied, a device writes to one random page.
#[allow(clippy::unwrap_used)] // ranges that are mapped
fn precopy(settings: &Settings, report: &mut Report, name: &str) {
    const LEFT: u64 = 64;
    let machine = RefCell::new(Machine::new(GIB, GIB, 1, false));
    let turn = || {
        let machine = &mut *machine.borrow_mut();
        let mut random = Random::fixed();
        let mut page = vec![0; PAGE as usize];
        let (mut rounds, mut copied) = (0u64, 0u64);
        let mut harvests = Duration::ZERO;
        let mut copy = |runs: &mut dyn Iterator<Item = IovaRange>| {
            let mut count = 0;
            for run in runs {
                for at in (run.start().get()..=run.last().get()).step_by(PAGE as usize) {
                    machine.domain.memory().read(at, &mut page).unwrap();
                    count += 1;
                }
            }
            count
        };
        let mut last = copy(&mut std::iter::once(machine.all));
        let began = Instant::now();
        while last > LEFT {
            rounds += 1;
            for _ in 0..last / 4 {
                let at = random.below(GIB / PAGE) * PAGE;
                machine.devices[0].write(Iova::new(at), &[1]).unwrap();
            }
            machine.devices[0].quiesce();
            machine.words.fill(0);
            let request = HarvestRequest::new(machine.all, Granule::K4);
            let began = Instant::now();
            let bitmap = UserBitmap::new(&mut machine.words);
            let lease = machine.space.harvest(&request, bitmap).unwrap();
            let lease = lease.sync().unwrap();
            harvests += began.elapsed();
            last = copy(&mut lease.runs());
            copied += last;
            lease.commit();
        }
        black_box(&page);
        let whole = began.elapsed().as_nanos() as f64;
        vec![
            rounds as f64,
            copied as f64,
            harvests.as_nanos() as f64,
            whole,
        ]
    };
    contest(
        settings,
        report,
        FAMILY.name,
        vec![
            Workload::new(
                format!("{name}: rounds until {LEFT} pages are left"),
                Unit::Count,
            ),
            Workload::new(format!("{name}: pages copied again"), Unit::Count),
            Workload::time(format!(
                "{name}: harvests, flushes and leases of all rounds"
            )),
            Workload::time(format!("{name}: all rounds")),
        ],
        vec![Contestant::ours("dirtymap", turn)],
    );
}
