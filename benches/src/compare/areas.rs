//! Maps of areas: which one holds an address, and where is room for another.
//!
//! Areas of 1 to 16 pages with holes of 0 to 15 pages between them; see [`workloads::areas`](crate::workloads::areas).

use std::hint::{black_box, spin_loop};

use dirtymap::sync::{AtomicU64, Ordering};
use dirtymap::{AddressSpace, AreaMap, Mapping};

use super::ticks::{self, Clock};
use super::{Contestant, Endless, Family, Report, Settings, Unit, contest, memory, per_operation};
use crate::peers::{
    LockedBTree, LockedRangeMap, ParkingLotBTree, SccTree, SkipList, SwappedOrdMap,
};
use crate::workloads::{Random, addresses, areas, beside};
use crate::{Areas, PAGE};

/// Maps of areas.
pub const FAMILY: Family = Family { name: "areas", run };

/// Addresses that are looked up before one comes again: more than caches remember.
const ADDRESSES: usize = 1 << 18;
/// Lookups of one turn that are timed one by one.
const TIMED: usize = 1 << 16;

/// A peer with its areas.
struct Filled {
    peer: Box<dyn Areas>,
    ours: bool,
    /// Bytes for each area.
    bytes: f64,
}

/// All peers. The first one is what ratios are against: it does what the peers do, and no more.
#[allow(clippy::type_complexity)] // a list of names
const PEERS: [(bool, fn() -> Box<dyn Areas>); 8] = [
    (true, boxed::<AreaMap<Mapping>>),
    (true, boxed::<AddressSpace>),
    (false, boxed::<LockedBTree>),
    (false, boxed::<ParkingLotBTree>),
    (false, boxed::<LockedRangeMap>),
    (false, boxed::<SkipList>),
    (false, boxed::<SccTree>),
    (false, boxed::<SwappedOrdMap>),
];

fn boxed<A: Areas + 'static>() -> Box<dyn Areas> {
    Box::new(A::new())
}

/// All peers, empty.
pub fn peers() -> Vec<Box<dyn Areas>> {
    PEERS.iter().map(|(_, new)| new()).collect()
}

fn fill(settings: &Settings, mappings: &[Mapping]) -> Vec<Filled> {
    let fill = |&(ours, new): &(bool, fn() -> Box<dyn Areas>)| {
        settings.at(format!("mapping {} areas", mappings.len()));
        let (peer, bytes) = memory::grown_by(|| {
            let peer = new();
            mappings.iter().for_each(|mapping| peer.map(*mapping));
            peer
        });
        Filled {
            peer,
            ours,
            bytes: bytes as f64 / mappings.len() as f64,
        }
    };
    PEERS.iter().map(fill).collect()
}

fn run(settings: &Settings, report: &mut Report) {
    let clock = Clock::calibrated();
    for (label, count) in [("1K", 1_000), ("100K", 100_000), ("1M", 1_000_000)] {
        let mappings = areas(count);
        let filled = fill(settings, &mappings);
        let addresses = addresses(&mappings, ADDRESSES);
        let mut random = Random::fixed();
        let shuffled: Vec<Mapping> = (0..ADDRESSES)
            .map(|_| mappings[random.below(count as u64) as usize])
            .collect();
        let mut round = Round {
            settings,
            report,
            label,
            filled: &filled,
        };
        round.compare(&["lookup"], |peer| {
            let mut addresses = Endless::new(&addresses);
            turns(move || {
                let look_up = |count| {
                    addresses.take(count, |some| {
                        black_box(peer.look_up_all(some));
                    })
                };
                vec![per_operation(settings.turn, look_up)]
            })
        });
        let beside_a_writer = [
            "lookup beside a writer",
            "lookup beside a writer, p50",
            "lookup beside a writer, p99",
            "lookup beside a writer, p99.9",
            "remove and insert of that writer",
        ];
        round.compare(&beside_a_writer, |peer| {
            let (mut asked, timed) = (Endless::new(&addresses), &addresses[..TIMED]);
            let shuffled = &shuffled;
            turns(move || {
                look_up_beside_a_writer(settings, clock, peer, &mut asked, timed, shuffled)
            })
        });
        round.compare(&["remove and insert"], |peer| {
            let mut mappings = Endless::new(&shuffled);
            turns(move || {
                let remap = |count| mappings.take(count, |some| peer.remap_all(some));
                vec![per_operation(settings.turn, remap)]
            })
        });
        for (workload, pages) in [
            ("first fit above all areas", 16),
            ("first fit near the bottom", 1),
        ] {
            round.compare(&[workload], |peer| {
                // Not those who find places only to take them.
                peer.first_fit(PAGE)?;
                turns(move || {
                    let find = |count| {
                        for _ in 0..count {
                            black_box(peer.first_fit(black_box(pages * PAGE)));
                        }
                    };
                    vec![per_operation(settings.turn, find)]
                })
            });
        }
        round.compare(&["snapshot and scan, for one area"], |peer| {
            turns(move || {
                let scan = |times| {
                    for _ in 0..times {
                        black_box(peer.scan());
                    }
                };
                vec![per_operation(settings.turn, scan) / count as f64]
            })
        });
        if filled.iter().all(|filled| filled.bytes > 0.0) {
            let cells = filled
                .iter()
                .map(|f| (f.peer.name(), f.ours, vec![f.bytes]));
            let workload = format!("memory for one area, {label}");
            report.add(FAMILY.name, workload, Unit::Bytes, cells.collect());
        }
    }
    report.note(
        FAMILY.name,
        format!(
            "Percentiles are of single lookups, timed by the time stamp counter; the {:.0} ns of reading it twice are in them.",
            clock.overhead()
        ),
    );
}

/// Contests of all peers with areas of one count.
struct Round<'a, 'r> {
    settings: &'a Settings,
    report: &'r mut Report,
    label: &'static str,
    filled: &'a [Filled],
}

/// The turns of one peer; `None` if it does not take part.
type Turns<'a> = Option<Box<dyn FnMut() -> Vec<f64> + 'a>>;

fn turns<'a>(turn: impl FnMut() -> Vec<f64> + 'a) -> Turns<'a> {
    Some(Box::new(turn))
}

impl<'a> Round<'a, '_> {
    fn compare(&mut self, workloads: &[&str], turns: impl Fn(&'a dyn Areas) -> Turns<'a>) {
        let contestants = self.filled.iter().filter_map(|filled| {
            Some(Contestant {
                name: filled.peer.name(),
                ours: filled.ours,
                turn: turns(&*filled.peer)?,
            })
        });
        let contestants = contestants.collect();
        let name = |workload| (format!("{workload}, {}", self.label), Unit::Nanoseconds);
        let workloads: Vec<_> = workloads.iter().map(name).collect();
        contest(
            self.settings,
            self.report,
            FAMILY.name,
            &workloads,
            contestants,
        );
    }
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
    // Relaxed, all accesses of these: statistics, and a place to go on from.
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
