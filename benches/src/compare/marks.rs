//! Marks: the cost of one write of a CPU thread.
//!
//! | workload | pages |
//! |---|---|
//! | hot | 128 MiB that are dirty already, in random order |
//! | cold | random ones of all; a harvest, which is not timed, cleans them for the next turn |
//! | ranges | random ones, aligned to their length: when they are clean, and once again |
//! | writers | hot, and one in 80 a random one of all; beside harvests, or without |
//!
//! Harvests beside writers follow each other after 10 ms, after 20 µs, or at once. Without a pause,
//! the faster harvester comes back sooner, and leaves more marks a page that is clean.

use std::cell::RefCell;
use std::hint::{black_box, spin_loop};
use std::time::{Duration, Instant};

use dirtymap::sync::{AtomicBool, AtomicU64, Ordering, thread};

use super::row::median;
use super::{
    Contestant, Endless, Family, Report, Role, Scale, Settings, Target, Workload, contest,
    per_operation,
};
use crate::peers::{
    Asymmetric, Fenced, Flat, HiBitSet, LockedRoaring, Tested, ThroughHandle, ThroughSpace,
    TwoLevels, VmMemory, VmMemoryModel,
};
use crate::workloads::{Random, beside, distinct};
use crate::{PAGE, Peer, Tracker};

/// Marks.
pub const FAMILY: Family = Family {
    name: "marks",
    run,
    grow: Some(grow),
};

/// Pages that are marked again and again.
const HOT: u64 = 1 << 15;
/// The harvester's pause.
const PAUSE: Duration = Duration::from_millis(10);
/// A pause that is long beside the harvests of all peers, if the memory is small.
const SHORT: Duration = Duration::from_micros(20);

type New = fn(u64) -> Box<dyn Tracker>;
type NewPeer = fn(u64) -> Box<dyn Peer>;
/// The numbers of one turn. The bitmap is for harvests.
type Turn<'a> = dyn Fn(&mut dyn Tracker, &mut [u64]) -> Vec<f64> + 'a;

/// Our library alone, to which ratios are relative. The unordered array is no peer, because it
/// loses writes.
const SELF_ORDERED: [(Role, New); 11] = [
    (Role::Ours, new::<ThroughHandle>),
    (Role::Ours, new::<Asymmetric>),
    (Role::Ours, new::<ThroughSpace>),
    (Role::Peer, new::<VmMemory>),
    (Role::Peer, new::<VmMemoryModel>),
    (Role::Peer, new::<Flat>),
    (Role::Peer, new::<Flat<Fenced>>),
    (Role::Limit, new::<TwoLevels>),
    (Role::Limit, new::<Flat<Tested>>),
    (Role::Peer, new::<LockedRoaring>),
    (Role::Peer, new::<HiBitSet>),
];

/// Our library with the fences of marks in harvests.
const ORDERED_BY_HARVESTS: [(Role, New); 5] = [
    (Role::Ours, new::<Asymmetric>),
    (Role::Peer, new::<VmMemory>),
    (Role::Peer, new::<VmMemoryModel>),
    (Role::Peer, new::<Flat>),
    (Role::Limit, new::<Flat<Tested>>),
];

/// The peers that can be harvested beside marks.
const CONCURRENT: [(Role, NewPeer); 9] = [
    (Role::Ours, new_peer::<ThroughHandle>),
    (Role::Ours, new_peer::<Asymmetric>),
    (Role::Peer, new_peer::<VmMemory>),
    (Role::Peer, new_peer::<VmMemoryModel>),
    (Role::Peer, new_peer::<Flat>),
    (Role::Peer, new_peer::<Flat<Fenced>>),
    (Role::Limit, new_peer::<TwoLevels>),
    (Role::Limit, new_peer::<Flat<Tested>>),
    (Role::Peer, new_peer::<LockedRoaring>),
];

fn new<T: Tracker + 'static>(pages: u64) -> Box<dyn Tracker> {
    Box::new(T::new(pages))
}

fn new_peer<P: Peer + 'static>(pages: u64) -> Box<dyn Peer> {
    Box::new(P::new(pages))
}

fn run(settings: &Settings, report: &mut Report) {
    // 1 TiB, or 64 GiB.
    let pages = if settings.thorough { 1 << 28 } else { 1 << 24 };
    let round = &mut Round::new(settings, report, FAMILY.name, pages);
    hot(round);
    let workload = Workload::time("cold page").target(Target::RatioTo("flat", 1.0 / 1.8));
    cold(round, workload.bound("two levels"), &SELF_ORDERED);
    ranges(round);
    writers(round);
    let size = if settings.thorough { "1 TiB" } else { "64 GiB" };
    beside_harvests(round, size, Duration::ZERO);
    let small = &mut Round::new(settings, report, FAMILY.name, HOT);
    beside_harvests(small, "128 MiB", SHORT);
    report.note(
        FAMILY.name,
        "`flat-unordered` loses writes and is no peer: it shows the cost of a look at a mark.\n\
         `hibitset` cannot be harvested beside marks."
            .to_owned(),
    );
}

/// The peers for the growth of a cold mark with the memory. The harvests of vm-memory take seconds
/// above a terabyte, and roaring counts pages with 32 bits.
const GROWN: [(Role, New); 4] = [
    (Role::Ours, new::<ThroughHandle>),
    (Role::Peer, new::<Flat>),
    (Role::Peer, new::<LockedRoaring>),
    (Role::Peer, new::<VmMemory>),
];

fn grow(settings: &Settings, report: &mut Report, family: &'static str) {
    for lg2 in settings.decades() {
        let bytes = 1u64 << lg2;
        let round = &mut Round::new(settings, report, family, bytes / PAGE);
        let workload = Workload::grown("mark of a cold page", bytes as f64, Scale::Bytes);
        let peers = match lg2 {
            ..=40 => &GROWN[..],
            41..44 => &GROWN[..3],
            _ => &GROWN[..2],
        };
        cold(round, workload, peers);
    }
}

/// Contests over one memory.
struct Round<'a> {
    settings: &'a Settings,
    report: &'a mut Report,
    family: &'static str,
    pages: u64,
    /// The bitmap of harvests.
    bitmap: RefCell<Vec<u64>>,
}

impl<'a> Round<'a> {
    fn new(
        settings: &'a Settings,
        report: &'a mut Report,
        family: &'static str,
        pages: u64,
    ) -> Self {
        Round {
            settings,
            report,
            family,
            pages,
            bitmap: RefCell::new(vec![0; (pages / 64) as usize]),
        }
    }

    /// A contest of `peers`. `mark` marks the pages that are checked, in clean memory, and leaves
    /// them marked.
    fn compare(
        &mut self,
        workloads: Vec<Workload>,
        peers: &[(Role, New)],
        mark: &dyn Fn(&dyn Tracker),
        turn: &Turn<'_>,
    ) {
        let wanted = |workload: &Workload| workload.name.contains(&self.settings.matching);
        if !workloads.iter().any(wanted) {
            return;
        }
        let peers: Vec<_> = peers
            .iter()
            .map(|(role, new)| (*role, RefCell::new(new(self.pages))))
            .collect();
        let bitmap = &self.bitmap;
        let contestants = peers.iter().map(|(role, peer)| {
            let name = peer.borrow().name();
            let turn = move || turn(&mut **peer.borrow_mut(), &mut bitmap.borrow_mut());
            Contestant::new(name, *role, turn).checked(move || {
                let (mut peer, mut bitmap) = (peer.borrow_mut(), bitmap.borrow_mut());
                peer.harvest_alone(&mut bitmap);
                mark(&**peer);
                bitmap.fill(0);
                peer.harvest_alone(&mut bitmap);
                mark(&**peer);
                sum(&bitmap)
            })
        });
        let contestants = contestants.collect();
        contest(
            self.settings,
            self.report,
            self.family,
            workloads,
            contestants,
        );
    }
}

/// A number that depends on each word and its place.
pub(super) fn sum(words: &[u64]) -> u64 {
    words.iter().fold(0, |sum: u64, word| {
        (sum.rotate_left(5) ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15)
    })
}

fn hot(round: &mut Round<'_>) {
    let turn = round.settings.turn;
    let pages = distinct(HOT, HOT);
    let mark = |peer: &dyn Tracker| peer.mark_pages(&pages);
    let timed = |peer: &mut dyn Tracker, _: &mut [u64]| {
        let mut pages = Endless::new(&pages);
        let mark = |count| pages.take(count, |some| peer.mark_pages(black_box(some)));
        vec![per_operation(turn, mark)]
    };
    let workload = Workload::time("hot page")
        .target(Target::Ratio(0.95))
        .target(Target::AtMostOf("dirtymap-space", 8.0))
        .bound("fence");
    round.compare(vec![workload], &SELF_ORDERED, &mark, &timed);
    let workload = Workload::time("hot page, ordered by harvests")
        .target(Target::RatioTo("flat", 4.0))
        .target(Target::AtMost(1.2))
        .bound("look");
    round.compare(vec![workload], &ORDERED_BY_HARVESTS, &mark, &timed);

    // The pages of one cache line of bits.
    let line: Vec<u64> = (0..512).collect();
    let mark = |peer: &dyn Tracker| peer.mark_pages(&line);
    let timed = |peer: &mut dyn Tracker, _: &mut [u64]| {
        let peer = &*peer;
        let mut number = 0.0;
        beside(
            || peer.mark_pages(black_box(&line)),
            || {
                let mut pages = Endless::new(&line);
                let mark = |count| pages.take(count, |some| peer.mark_pages(black_box(some)));
                number = per_operation(turn, mark);
            },
        );
        vec![number]
    };
    let workload = Workload::time("hot page, its line marked by two threads")
        .target(Target::RatioTo("vm-memory", 1.0))
        .target(Target::RatioTo("flat", 1.0))
        .bound("fence");
    round.compare(vec![workload], &SELF_ORDERED, &mark, &timed);
}

fn cold(round: &mut Round<'_>, workload: Workload, peers: &[(Role, New)]) {
    let count = if round.settings.thorough {
        1 << 18
    } else {
        1 << 14
    };
    let mut random = Random::fixed();
    let pages: Vec<u64> = (0..count).map(|_| random.below(round.pages)).collect();
    let mark = |peer: &dyn Tracker| peer.mark_pages(&pages);
    let timed = |peer: &mut dyn Tracker, bitmap: &mut [u64]| {
        peer.harvest_alone(bitmap);
        let began = Instant::now();
        peer.mark_pages(black_box(&pages));
        vec![began.elapsed().as_nanos() as f64 / count as f64]
    };
    round.compare(vec![workload], peers, &mark, &timed);
}

fn ranges(round: &mut Round<'_>) {
    let thorough = round.settings.thorough;
    let workload = |label: &str, clean: &str| {
        let workload = Workload::time(format!("{label}, {clean}"));
        workload.target(Target::RatioTo("flat", 1.0))
    };
    for (label, len, count) in [
        ("2 MiB", 2 << 20, if thorough { 4096 } else { 512 }),
        ("1 GiB", 1 << 30, if thorough { 32 } else { 4 }),
    ] {
        let starts: Vec<u64> = distinct(count, round.pages * PAGE / len)
            .iter()
            .map(|nth| nth * len)
            .collect();
        let mark = |peer: &dyn Tracker| peer.mark_ranges(&starts, len);
        let timed = |peer: &mut dyn Tracker, bitmap: &mut [u64]| {
            peer.harvest_alone(bitmap);
            let time = |_| {
                let began = Instant::now();
                peer.mark_ranges(black_box(&starts), black_box(len));
                began.elapsed().as_nanos() as f64 / count as f64
            };
            ["clean", "again"].map(time).to_vec()
        };
        let workloads = vec![workload(label, "clean"), workload(label, "again")];
        round.compare(workloads, &SELF_ORDERED, &mark, &timed);
    }
}

fn writers(round: &mut Round<'_>) {
    for writers in [1, 2] {
        let who = ["1 writer", "2 writers"][writers - 1];
        let alone = vec![Workload::time(format!("mark, {who}"))];
        write_beside(round, writers, None, alone);
        let workloads = vec![
            Workload::time(format!("mark, {who} and a harvester")),
            Workload::time(format!("harvest beside {who}")),
        ];
        write_beside(round, writers, Some(PAUSE), workloads);
    }
}

/// Marks beside a harvester with a short pause, or none.
fn beside_harvests(round: &mut Round<'_>, size: &str, pause: Duration) {
    let often = match pause.as_micros() {
        0 => "without pause".to_owned(),
        pause => format!("every {pause} µs"),
    };
    let name = |what: &str| format!("{what}, {size}, harvested {often}");
    let workloads = vec![
        Workload::time(name("mark")),
        Workload::time(name("that harvest")),
    ];
    write_beside(round, 1, Some(pause), workloads);
}

/// Marks of some writers, beside a harvester with this pause if there is one.
fn write_beside(
    round: &mut Round<'_>,
    writers: usize,
    pause: Option<Duration>,
    workloads: Vec<Workload>,
) {
    const RARE: u64 = 80;
    let wanted = |workload: &Workload| workload.name.contains(&round.settings.matching);
    if !workloads.iter().any(wanted) {
        return;
    }
    let mut random = Random::fixed();
    let list = |_| {
        let mut page = || match random.below(RARE) {
            0 => random.below(round.pages),
            _ => random.below(HOT),
        };
        (0..1 << 17).map(|_| page()).collect()
    };
    let lists: Vec<Vec<u64>> = (0..writers).map(list).collect();
    let peers: Vec<_> = CONCURRENT
        .iter()
        .map(|(role, new)| (*role, new(round.pages)))
        .collect();
    let (settings, bitmap, lists) = (round.settings, &round.bitmap, &lists);
    let contestants = peers.iter().map(|(role, peer)| {
        let peer = &**peer;
        let turn = move || {
            let mut bitmap = bitmap.borrow_mut();
            let harvest = pause.map(|pause| (pause, &mut **bitmap));
            write(settings, peer, lists, harvest)
        };
        Contestant::new(peer.name(), *role, turn).checked(move || {
            let mut bitmap = bitmap.borrow_mut();
            lists.iter().for_each(|list| peer.mark_pages(list));
            bitmap.fill(0);
            peer.harvest(&mut bitmap);
            sum(&bitmap)
        })
    });
    let contestants = contestants.collect();
    contest(settings, round.report, round.family, workloads, contestants);
}

/// Sleeps, or spins where the system cannot sleep for so short a time.
fn wait(pause: Duration) {
    if pause > SHORT {
        return thread::sleep(pause);
    }
    let began = Instant::now();
    while began.elapsed() < pause {
        spin_loop();
    }
}

/// Nanoseconds for a mark of each writer and, if there are a pause and a bitmap for harvests, for a
/// harvest.
fn write(
    settings: &Settings,
    peer: &dyn Peer,
    lists: &[Vec<u64>],
    harvest: Option<(Duration, &mut [u64])>,
) -> Vec<f64> {
    const STEP: usize = 1 << 10;
    let duration = if settings.thorough {
        6 * PAUSE
    } else {
        2 * PAUSE
    };
    let (stopped, marked) = (AtomicBool::new(false), AtomicU64::new(0));
    let mut harvests = Vec::new();
    let mut spent = Duration::ZERO;
    thread::scope(|scope| {
        for list in lists {
            let (stopped, marked) = (&stopped, &marked);
            scope.spawn(move || {
                let mut pages = Endless::new(list);
                // Relaxed, all accesses of both: a flag that publishes nothing, and a count.
                while !stopped.load(Ordering::Relaxed) {
                    pages.take(STEP, |some| peer.mark_pages(black_box(some)));
                    marked.fetch_add(STEP as u64, Ordering::Relaxed);
                }
            });
        }
        while marked.load(Ordering::Relaxed) == 0 {
            thread::yield_now();
        }
        let (before, began) = (marked.load(Ordering::Relaxed), Instant::now());
        match harvest {
            None => thread::sleep(duration),
            Some((pause, bitmap)) => {
                while began.elapsed() < duration {
                    wait(pause);
                    let began = Instant::now();
                    peer.harvest(bitmap);
                    harvests.push(began.elapsed().as_nanos() as f64);
                }
            }
        }
        spent = began.elapsed() * lists.len() as u32;
        stopped.store(true, Ordering::Relaxed);
        let marks = marked.load(Ordering::Relaxed) - before;
        harvests.insert(0, spent.as_nanos() as f64 / marks.max(1) as f64);
    });
    match harvests.split_first() {
        Some((mark, harvests)) if !harvests.is_empty() => vec![*mark, median(harvests)],
        _ => harvests,
    }
}
