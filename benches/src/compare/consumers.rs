//! Several consumers of one memory: what a mark and a harvest cost beside those with one consumer.
//!
//! The first consumer takes what is dirty, and leaves it to all others. Then each of them harvests;
//! of these harvests, that of the second consumer is timed. The marks and the zeroing of the
//! caller's bitmap are not timed. Before the first turn, every page was dirty and harvested by each
//! consumer once.

use std::cell::RefCell;
use std::time::Instant;

use super::marks::sum;
use super::{
    Contestant, Endless, Family, Report, Role, Settings, Target, Workload, contest, per_operation,
};
use crate::PAGE;
use crate::peers::{ByHand, Several, Shared};
use crate::workloads::{distinct, random_bits};

/// Several consumers.
pub const FAMILY: Family = Family {
    name: "consumers",
    run,
    grow: None,
};

/// Pages of the memory: 256 GiB.
const PAGES: u64 = 1 << 26;
/// Pages that are marked again and again.
const HOT: u64 = 1 << 15;
/// The factor by which a mark may cost more than with one consumer: nothing, but for the spread of
/// the measurement.
const SAME: f64 = 1.05;

/// Peers with the number of their consumers.
struct Contest {
    consumers: u64,
    peers: Vec<(&'static str, Role, u64, Box<dyn Shared>)>,
    bitmap: RefCell<Vec<u64>>,
}

fn run(settings: &Settings, report: &mut Report) {
    for consumers in [4, 64] {
        let name = |kind: &str| format!("mark of a {kind} page, {consumers} consumers");
        let workload = |kind: &str| Workload::time(name(kind)).target(Target::TimesLimit(SAME));
        if ["hot", "cold"]
            .iter()
            .any(|kind| name(kind).contains(&settings.matching))
        {
            Contest::new(settings, consumers).mark(settings, report, workload);
        }
    }
    for consumers in [2, 4, 64] {
        for (label, every) in [
            ("0 %", None),
            ("0.1 %", Some(1000)),
            ("1 %", Some(100)),
            ("10 %", Some(10)),
        ] {
            let name = format!("256 GiB, {label} dirty, {consumers} consumers");
            if name.contains(&settings.matching) && (settings.thorough || every != Some(10)) {
                let contest = Contest::new(settings, consumers);
                contest.harvest(settings, report, &name, every);
            }
        }
    }
    report.note(
        FAMILY.name,
        "`one-consumer` is the library with the unnamed consumer alone. The goal of a harvest\n\
         with N consumers is 1 + 0.3 N times its time; *left* is the harvest of the second\n\
         consumer, which takes what the first one has left. `by-hand` is a flat bitmap for each\n\
         consumer, under one mutex, each set by every mark."
            .to_owned(),
    );
}

impl Contest {
    fn new(settings: &Settings, consumers: u64) -> Self {
        let ours = |consumers| Box::new(Several::for_consumers(PAGES, consumers));
        let by_hand = Box::new(ByHand::for_consumers(PAGES, consumers));
        let peers: Vec<(&'static str, Role, u64, Box<dyn Shared>)> = vec![
            ("dirtymap", Role::Ours, consumers, ours(consumers)),
            ("one-consumer", Role::Limit, 1, ours(1)),
            ("by-hand", Role::Peer, consumers, by_hand),
        ];
        let contest = Contest {
            consumers,
            peers,
            bitmap: RefCell::new(vec![0; (PAGES / 64) as usize]),
        };
        for (name, _, consumers, peer) in &contest.peers {
            settings.at(format!("{name}: every page dirty once"));
            peer.mark(0, PAGES * PAGE);
            contest.finish(*consumers, 0, &**peer);
        }
        contest
    }

    /// The harvests of all consumers from `first` on.
    fn finish(&self, consumers: u64, first: u64, peer: &dyn Shared) {
        let mut bitmap = self.bitmap.borrow_mut();
        (first..consumers).for_each(|nth| peer.harvest_for(nth, &mut bitmap));
    }

    /// Harvests of which one page of `every` is dirty, and none without `every`.
    fn harvest(&self, settings: &Settings, report: &mut Report, name: &str, every: Option<u64>) {
        let dirty = every.map(|every| random_bits(PAGES, every));
        let goal = Target::TimesLimit(1.0 + 0.3 * self.consumers as f64);
        let mut workloads = vec![Workload::time(name).target(goal)];
        if every.is_some() {
            workloads.push(Workload::time(format!("{name}, left")).target(goal));
        }
        let contestants = self.peers.iter().map(|(name, role, consumers, peer)| {
            let peer = &**peer;
            let timed = |nth: u64| {
                let mut bitmap = self.bitmap.borrow_mut();
                bitmap.fill(0);
                let began = Instant::now();
                peer.harvest_for(nth, &mut bitmap);
                (began.elapsed().as_nanos() as f64, sum(&bitmap))
            };
            let dirty = dirty.as_ref();
            let turn = move || {
                let Some(dirty) = dirty else {
                    let mut bitmap = self.bitmap.borrow_mut();
                    let harvest = |times| (0..times).for_each(|_| peer.harvest_for(0, &mut bitmap));
                    return vec![per_operation(settings.turn, harvest)];
                };
                peer.mark_bits(dirty);
                let (first, _) = timed(0);
                let left = match *consumers {
                    1 => first,
                    _ => timed(1).0,
                };
                self.finish(*consumers, 2, peer);
                vec![first, left]
            };
            Contestant::new(name, *role, turn).checked(move || {
                dirty.iter().for_each(|dirty| peer.mark_bits(dirty));
                let (_, first) = timed(0);
                let (_, last) = match *consumers {
                    1 => (0.0, first),
                    _ => timed(consumers - 1),
                };
                self.finish(*consumers, 1, peer);
                first ^ last.rotate_left(1)
            })
        });
        let contestants = contestants.collect();
        contest(settings, report, FAMILY.name, workloads, contestants);
    }

    /// Marks of pages that are dirty already, and of clean ones.
    fn mark(&self, settings: &Settings, report: &mut Report, workload: impl Fn(&str) -> Workload) {
        let hot = distinct(HOT, HOT);
        let cold = distinct(1 << 20, PAGES);
        let contestants = self.peers.iter().map(|(name, role, consumers, peer)| {
            let (hot, cold, peer) = (&hot, &cold, &**peer);
            Contestant::new(name, *role, move || {
                peer.mark_pages(hot);
                let mut pages = Endless::new(hot);
                let again = per_operation(settings.turn, |times| {
                    pages.take(times, |pages| peer.mark_pages(pages));
                });
                self.finish(*consumers, 0, peer);
                let began = Instant::now();
                peer.mark_pages(cold);
                let clean = began.elapsed().as_nanos() as f64 / cold.len() as f64;
                self.finish(*consumers, 0, peer);
                vec![again, clean]
            })
        });
        let contestants = contestants.collect();
        let workloads = vec![workload("hot"), workload("cold")];
        contest(settings, report, FAMILY.name, workloads, contestants);
    }
}
