//! Maps of areas: the lookup of an address, and the search for free addresses.
//!
//! Areas of 1 to 16 pages with holes of 0 to 15 pages between them; see
//! [`workloads::areas`](crate::workloads::areas).

use std::hint::{black_box, spin_loop};

use dirtymap::area::AreaMap;
use dirtymap::sync::{AtomicU64, Ordering};
use dirtymap::{AddressSpace, Mapping};

use super::ticks::{self, Clock};
use super::{
    Contestant, Endless, Family, Report, Role, Scale, Settings, Target, Unit, Workload, contest,
    memory, per_operation,
};
use crate::peers::{
    CountedBTree, LockedBTree, LockedRangeMap, ParkingLotBTree, SccTree, SkipList, SwappedOrdMap,
};
use crate::workloads::{Random, addresses, areas, beside};
use crate::{Areas, PAGE, sum};

/// Maps of areas.
pub const FAMILY: Family = Family {
    name: "areas",
    run,
    grow: Some(grow),
};

/// Addresses that are looked up before one repeats: more than caches hold.
const ADDRESSES: usize = 1 << 18;
/// Changes of one batch.
const BATCH: usize = 1000;
/// Lookups of one turn that are timed one by one.
const TIMED: usize = 1 << 16;

/// A peer with its areas.
struct Filled {
    peer: Box<dyn Areas>,
    role: Role,
    /// Bytes for each area.
    bytes: f64,
}

type New = (Role, fn() -> Box<dyn Areas>);

/// The tree alone, which does the same work as the peers.
const TREE: New = (Role::Ours, boxed::<AreaMap<Mapping>>);

/// All peers. Ratios are relative to the first one.
const PEERS: [New; 9] = [
    TREE,
    (Role::Ours, boxed::<AddressSpace>),
    (Role::Peer, boxed::<LockedBTree>),
    (Role::Peer, boxed::<ParkingLotBTree>),
    (Role::Peer, boxed::<LockedRangeMap>),
    (Role::Peer, boxed::<SkipList>),
    (Role::Peer, boxed::<SccTree>),
    (Role::Peer, boxed::<SwappedOrdMap>),
    (Role::Limit, boxed::<CountedBTree>),
];

/// The peers whose growth is shown: one of each kind.
const GROWN: [New; 4] = [
    TREE,
    (Role::Peer, boxed::<LockedBTree>),
    (Role::Peer, boxed::<SkipList>),
    (Role::Peer, boxed::<SccTree>),
];

fn boxed<A: Areas + 'static>() -> Box<dyn Areas> {
    Box::new(A::new())
}

/// All peers, empty.
pub fn peers() -> Vec<Box<dyn Areas>> {
    PEERS.iter().map(|(_, new)| new()).collect()
}

fn fill(settings: &Settings, peers: &[New], mappings: &[Mapping]) -> Vec<Filled> {
    let fill = |&(role, new): &New| {
        settings.at(format!("mapping {} areas", mappings.len()));
        let (peer, bytes) = memory::grown_by(|| {
            let peer = new();
            mappings.iter().for_each(|mapping| peer.map(*mapping));
            peer
        });
        Filled {
            peer,
            role,
            bytes: bytes as f64 / mappings.len() as f64,
        }
    };
    peers.iter().map(fill).collect()
}

/// Areas, and the queries on them.
struct Asked {
    mappings: Vec<Mapping>,
    addresses: Vec<u64>,
    /// Some of the areas, at random.
    shuffled: Vec<Mapping>,
}

impl Asked {
    fn of(count: usize) -> Self {
        let mappings = areas(count);
        let mut random = Random::fixed();
        Asked {
            addresses: addresses(&mappings, ADDRESSES),
            shuffled: (0..ADDRESSES)
                .map(|_| mappings[random.below(count as u64) as usize])
                .collect(),
            mappings,
        }
    }
}

fn run(settings: &Settings, report: &mut Report) {
    let clock = Clock::calibrated();
    for (label, count) in [("1K", 1_000), ("100K", 100_000), ("1M", 1_000_000)] {
        let asked = Asked::of(count);
        let filled = fill(settings, &PEERS, &asked.mappings);
        let mut round = Round {
            settings,
            report,
            family: FAMILY.name,
            filled: &filled,
            asked: &asked,
        };
        let time = |name: &str| Workload::time(format!("{name}, {label}"));
        round.look_up(time("lookup").target(Target::Ratio(1.8)).bound("area"));
        round.look_up_beside_a_lookup(time("lookup beside another reader"));
        // In a million areas, a lookup waits for the memory; in a thousand, for the nodes that the
        // writer has changed. There the goal is to be ahead.
        let ahead = if count == 100_000 { 2.5 } else { 1.0 };
        round.look_up_beside_a_writer(
            clock,
            vec![
                time("lookup beside a writer").target(Target::Ratio(ahead)),
                time("lookup beside a writer, p50"),
                time("lookup beside a writer, p99"),
                time("lookup beside a writer, p99.9"),
                time("remove and insert of that writer"),
            ],
        );
        let change = time("remove and insert")
            .target(Target::RatioTo("crossbeam-skiplist", 1.0))
            .target(Target::RatioTo("scc-treeindex", 1.0))
            .target(Target::RatioTo("arc-swap-imbl", 1.0));
        round.remap(change);
        let batch = time("remove and insert, batches of 1,000");
        let batch = batch.target(Target::RatioTo("rwlock-btreemap", 1.0));
        round.remap_in_batches(batch.bound("area"));
        let mut worst = time("first fit above all areas");
        if count == 1_000_000 {
            worst = worst
                .target(Target::AtMost(100.0))
                .target(Target::Ratio(10_000.0));
        }
        round.fit(worst, 16);
        round.fit(time("first fit near the bottom"), 1);
        round.map_anywhere(time("map above all areas, and unmap"), 16);
        round.map_anywhere(time("map near the bottom, and unmap"), 1);
        let scan = time("snapshot and scan, for one area");
        round.scan(scan.target(Target::RatioTo("rwlock-btreemap", 1.0 / 1.5)));
        if filled.iter().all(|filled| filled.bytes > 0.0) {
            let mut workload = Workload::new(format!("memory for one area, {label}"), Unit::Bytes);
            // Spare nodes dominate in small trees.
            if count > 1_000 {
                workload = workload.target(Target::AtMostOf("dirtymap-space", 160.0));
            }
            let cells = filled
                .iter()
                .map(|filled| (filled.peer.name(), filled.role, vec![filled.bytes]));
            report.add(FAMILY.name, workload, cells.collect());
        }
    }
    report.note(
        FAMILY.name,
        format!(
            "Percentiles are of single lookups, timed by the time stamp counter, and include the\n\
             {:.0} ns of two readings.",
            clock.overhead()
        ),
    );
}

fn grow(settings: &Settings, report: &mut Report, family: &'static str) {
    let asked = [1_000, 10_000, 100_000, 1_000_000].map(Asked::of);
    let filled: Vec<_> = asked
        .iter()
        .map(|asked| fill(settings, &GROWN, &asked.mappings))
        .collect();
    let mut each = |curve: &str, contest: &dyn Fn(&mut Round<'_, '_>, Workload)| {
        for (asked, filled) in asked.iter().zip(&filled) {
            let mut round = Round {
                settings,
                report,
                family,
                filled,
                asked,
            };
            let workload = Workload::grown(curve, asked.mappings.len() as f64, Scale::Items);
            contest(&mut round, workload);
        }
    };
    each("lookup in areas", &|round, workload| {
        round.look_up(workload)
    });
    each("remove and insert of an area", &|round, workload| {
        round.remap(workload);
    });
    each("first fit above all areas", &|round, workload| {
        round.fit(workload, 16);
    });
}

/// Contests of all peers with areas of one count.
struct Round<'a, 'r> {
    settings: &'a Settings,
    report: &'r mut Report,
    family: &'static str,
    filled: &'a [Filled],
    asked: &'a Asked,
}

/// The turns of one peer.
type Turns<'a> = Box<dyn FnMut() -> Vec<f64> + 'a>;

impl<'a> Round<'a, '_> {
    fn look_up(&mut self, workload: Workload) {
        let (settings, asked) = (self.settings, self.asked);
        self.compare(vec![workload], sum_of_lookups, |peer| {
            let mut addresses = Endless::new(&asked.addresses);
            Some(Box::new(move || {
                let look_up = |count| {
                    addresses.take(count, |some| {
                        black_box(peer.look_up_all(some));
                    })
                };
                vec![per_operation(settings.turn, look_up)]
            }))
        });
    }

    fn look_up_beside_a_lookup(&mut self, workload: Workload) {
        let (settings, asked) = (self.settings, self.asked);
        self.compare(vec![workload], sum_of_lookups, |peer| {
            let mut addresses = Endless::new(&asked.addresses);
            let others = &asked.addresses[..1 << 10];
            Some(Box::new(move || {
                let mut number = 0.0;
                let other = || {
                    black_box(peer.look_up_all(others));
                };
                beside(other, || {
                    let look_up = |count| {
                        addresses.take(count, |some| {
                            black_box(peer.look_up_all(some));
                        });
                    };
                    number = per_operation(settings.turn, look_up);
                });
                vec![number]
            }))
        });
    }

    fn look_up_beside_a_writer(&mut self, clock: Clock, workloads: Vec<Workload>) {
        let (settings, asked) = (self.settings, self.asked);
        let timed = if settings.thorough { TIMED } else { TIMED / 8 };
        self.compare(workloads, sum_of_lookups, |peer| {
            let (mut addresses, timed) =
                (Endless::new(&asked.addresses), &asked.addresses[..timed]);
            Some(Box::new(move || {
                look_up_beside_a_writer(
                    settings,
                    clock,
                    peer,
                    &mut addresses,
                    timed,
                    &asked.shuffled,
                )
            }))
        });
    }

    fn remap(&mut self, workload: Workload) {
        let (settings, asked) = (self.settings, self.asked);
        self.compare(
            vec![workload],
            |peer, _| peer.scan(),
            |peer| {
                let mut mappings = Endless::new(&asked.shuffled);
                Some(Box::new(move || {
                    let remap = |count| mappings.take(count, |some| peer.remap_all(some));
                    vec![per_operation(settings.turn, remap)]
                }))
            },
        );
    }

    fn remap_in_batches(&mut self, workload: Workload) {
        let (settings, asked) = (self.settings, self.asked);
        self.compare(
            vec![workload],
            |peer, _| peer.scan(),
            |peer| {
                // Without the peers that have no such step.
                if !peer.remap_batch(&[]) {
                    return None;
                }
                let mut mappings = Endless::new(&asked.shuffled);
                Some(Box::new(move || {
                    let remap = |count| {
                        mappings.take(count, |some| {
                            for batch in some.chunks(BATCH) {
                                peer.remap_batch(batch);
                            }
                        });
                    };
                    vec![per_operation(settings.turn, remap)]
                }))
            },
        );
    }

    fn fit(&mut self, workload: Workload, pages: u64) {
        let settings = self.settings;
        let place = move |peer: &dyn Areas| peer.first_fit(black_box(pages * PAGE));
        self.compare(
            vec![workload],
            move |peer, _| place(peer).map_or(0, |range| range.start().get()),
            |peer| {
                // Without the peers that find a place only to map it.
                place(peer)?;
                Some(Box::new(move || {
                    let find = |count| {
                        for _ in 0..count {
                            black_box(place(peer));
                        }
                    };
                    vec![per_operation(settings.turn, find)]
                }))
            },
        );
    }

    fn map_anywhere(&mut self, workload: Workload, pages: u64) {
        let settings = self.settings;
        let map = move |peer: &dyn Areas| peer.map_anywhere(black_box(pages * PAGE));
        self.compare(
            vec![workload],
            |peer, _| peer.scan(),
            |peer| {
                // Without the peers that cannot do it in one step.
                peer.unmap(map(peer)?);
                Some(Box::new(move || {
                    let each = |count| {
                        (0..count)
                            .filter_map(|_| map(peer))
                            .for_each(|place| peer.unmap(place));
                    };
                    vec![per_operation(settings.turn, each)]
                }))
            },
        );
    }

    fn scan(&mut self, workload: Workload) {
        let (settings, count) = (self.settings, self.asked.mappings.len());
        self.compare(
            vec![workload],
            |peer, _| peer.scan(),
            |peer| {
                Some(Box::new(move || {
                    let scan = |times| {
                        for _ in 0..times {
                            black_box(peer.scan());
                        }
                    };
                    vec![per_operation(settings.turn, scan) / count as f64]
                }))
            },
        );
    }

    fn compare(
        &mut self,
        workloads: Vec<Workload>,
        output: impl Fn(&dyn Areas, &Asked) -> u64 + Copy + 'a,
        turns: impl Fn(&'a dyn Areas) -> Option<Turns<'a>>,
    ) {
        let asked = self.asked;
        let contestants = self.filled.iter().filter_map(|filled| {
            let peer = &*filled.peer;
            let contestant = Contestant::new(peer.name(), filled.role, turns(peer)?);
            Some(contestant.checked(move || output(peer, asked)))
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

/// The results of some lookups.
fn sum_of_lookups(peer: &dyn Areas, asked: &Asked) -> u64 {
    let found = asked.addresses[..1 << 12].iter();
    sum(found.filter_map(|iova| peer.lookup(*iova)))
}

/// Lookups while another thread removes areas and inserts them again without pause.
fn look_up_beside_a_writer(
    settings: &Settings,
    clock: Clock,
    peer: &dyn Areas,
    asked: &mut Endless<'_, u64>,
    timed: &[u64],
    shuffled: &[Mapping],
) -> Vec<f64> {
    const STEP: usize = 16;
    // Relaxed, all accesses of these: statistics, and the place at which to continue.
    let remapped = AtomicU64::new(0);
    let write = || {
        let at = remapped.load(Ordering::Relaxed) as usize % (shuffled.len() - STEP);
        peer.remap_all(&shuffled[at..at + STEP]);
        remapped.fetch_add(STEP as u64, Ordering::Relaxed);
    };
    let mut numbers = Vec::new();
    beside(write, || {
        while remapped.load(Ordering::Relaxed) == 0 {
            spin_loop();
        }
        let (before, began) = (remapped.load(Ordering::Relaxed), ticks::now());
        let look_up = |count| {
            asked.take(count, |some| {
                black_box(peer.look_up_all(some));
            });
        };
        numbers.push(per_operation(settings.turn, look_up));
        let mut ticks = peer.time_each(timed, clock.ticks(20 * settings.turn));
        ticks.sort_unstable();
        for per_mille in [500, 990, 999] {
            numbers.push(clock.percentile(&ticks, per_mille));
        }
        let written = (remapped.load(Ordering::Relaxed) - before).max(1);
        numbers.push(clock.nanoseconds(ticks::now() - began) / written as f64);
    });
    numbers
}
