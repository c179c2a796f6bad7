//! Harvests of marks: a whole terabyte, or twelve, with some dirty pages.
//!
//! The marks, in ascending order, and the zeroing of the caller's bitmap are not timed. Our time is
//! that of `harvest`, `sync` and `commit`. Before the first turn, every page was dirty and
//! harvested once, except for the peers whose turns would take seconds.

use std::cell::RefCell;
use std::time::Instant;

use super::marks::sum;
use super::{
    Contestant, Family, Report, Role, Scale, Settings, Target, Unit, Workload, contest, memory,
    per_operation,
};
use crate::peers::{
    Flat, HiBitSet, LockedRoaring, ThroughHandle, TwoLevels, VmMemory, VmMemoryModel,
};
use crate::workloads::random_bits;
use crate::{PAGE, Tracker};

/// Harvests of marks.
pub const FAMILY: Family = Family {
    name: "harvest",
    run,
    grow: Some(grow),
};

/// All pages, marked in pieces.
const PIECES: &str = "100 % in pieces of 2 MiB";
/// Bytes of a piece.
const PIECE: u64 = 2 << 20;

/// Pages of a large virtual machine: 12 TiB.
const LARGE: u64 = 12 << 28;

/// A share of dirty pages: its name, and the number of pages for each dirty one.
type Share = (&'static str, Option<u64>);

/// A contestant.
struct Entry {
    role: Role,
    new: fn(u64) -> Box<dyn Tracker>,
    /// Whether the time is that of the peer's own vector, without the move into the caller's
    /// bitmap.
    own: bool,
    /// The share of dirty pages from which its turns take seconds, so that it is left out.
    slow: f64,
    /// The most pages for which its turns do not take seconds.
    most: u64,
    /// Whether it marks a range page by page. Its harvest writes to all words anyway.
    by_page: bool,
}

impl Entry {
    /// Whether its growth up to this size is of interest, and does not take minutes.
    fn grows(&self, pages: u64) -> bool {
        self.role != Role::Limit && !self.own && self.slow > 1.0 && pages <= self.most
    }
}

const fn entry<T: Tracker + 'static>(role: Role, slow: f64) -> Entry {
    Entry {
        role,
        new: |pages| Box::new(T::new(pages)),
        own: false,
        slow,
        most: u64::MAX,
        by_page: false,
    }
}

static ENTRIES: [Entry; 8] = [
    entry::<ThroughHandle>(Role::Ours, 2.0),
    Entry {
        most: LARGE,
        by_page: true,
        ..entry::<VmMemory>(Role::Peer, 2.0)
    },
    Entry {
        own: true,
        ..entry::<OwnVector>(Role::Peer, 2.0)
    },
    Entry {
        most: LARGE,
        ..entry::<VmMemoryModel>(Role::Peer, 2.0)
    },
    entry::<Flat>(Role::Peer, 2.0),
    entry::<TwoLevels>(Role::Limit, 2.0),
    entry::<LockedRoaring>(Role::Peer, 0.1),
    entry::<HiBitSet>(Role::Peer, 0.1),
];

/// `vm-memory` as it is: the result is a vector of its own.
struct OwnVector(VmMemory);

impl Tracker for OwnVector {
    fn new(pages: u64) -> Self {
        OwnVector(VmMemory::new(pages))
    }

    fn name(&self) -> &'static str {
        "vm-memory-own-vec"
    }

    #[inline]
    fn mark(&self, start: u64, len: u64) {
        self.0.mark(start, len);
    }

    fn harvest_alone(&mut self, _: &mut [u64]) {
        std::hint::black_box(self.0.get_and_reset());
    }
}

fn run(settings: &Settings, report: &mut Report) {
    let (pages, size) = match settings.thorough {
        true => (1 << 28, "1 TiB"),
        false => (1 << 26, "256 GiB"),
    };
    let time = |share: &Share| Workload::time(format!("{size}, {} dirty", share.0));
    let flat = |share: Share, ratio: f64| {
        let workload = time(&share).target(Target::RatioTo("flat", ratio));
        (share, workload)
    };
    let bound = |(share, workload): (Share, Workload)| (share, workload.bound("lines"));
    let few = ("0.01 %", Some(10_000));
    let contests = [
        flat(("0 %", None), 500.0),
        bound((few, time(&few).target(Target::AtMost(1e6)))),
        bound(flat(("0.1 %", Some(1000)), 1.0 / 0.7)),
        bound(flat(("1 %", Some(100)), 1.0 / 0.7)),
        flat(("10 %", Some(10)), 1.0),
        flat((PIECES, Some(1)), 1.0),
        flat(("100 %", Some(1)), 1.0),
    ];
    let memory = Memory::new(settings, pages, &ENTRIES);
    for (share, workload) in contests {
        memory.harvest(settings, report, FAMILY.name, share, workload);
    }
    drop(memory);
    if settings.thorough {
        large(settings, report);
    }
    // Smaller slabs may come from memory that the allocator already had.
    if settings.thorough {
        resident(settings, report, pages, size);
    }
    report.note(
        FAMILY.name,
        "`hibitset` cannot be marked during its harvest. `vm-memory-own-vec` leaves the pages\n\
         in a vector of its own, all others in the caller's bitmap."
            .to_owned(),
    );
}

/// Ours, vm-memory and a flat array in a virtual machine of 12 TiB, with the dirty rates for
/// which Cloud Hypervisor has measured its dirty log (pull request 7468).
fn large(settings: &Settings, report: &mut Report) {
    let shares: [Share; 4] = [
        ("0 ‰", None),
        ("1 ‰", Some(1000)),
        ("10 ‰", Some(100)),
        ("50 ‰", Some(20)),
    ];
    let name = |share: &Share| format!("12 TiB, {} dirty", share.0);
    if !shares
        .iter()
        .any(|share| name(share).contains(&settings.matching))
    {
        return;
    }
    let memory = Memory::new(settings, LARGE, [&ENTRIES[0], &ENTRIES[1], &ENTRIES[4]]);
    for share in shares {
        let workload = Workload::time(name(&share)).target(Target::Ratio(1.0));
        memory.harvest(settings, report, FAMILY.name, share, workload);
    }
}

fn grow(settings: &Settings, report: &mut Report, family: &'static str) {
    for lg2 in settings.decades() {
        let bytes = 1u64 << lg2;
        let some = ENTRIES.iter().filter(|entry| entry.grows(bytes / PAGE));
        let memory = Memory::new(settings, bytes / PAGE, some);
        for (curve, share) in [
            ("harvest of clean marks", ("0 %", None)),
            ("harvest of marks, 0.1 % dirty", ("0.1 %", Some(1000))),
        ] {
            let workload = Workload::grown(curve, bytes as f64, Scale::Bytes);
            memory.harvest(settings, report, family, share, workload);
        }
    }
}

/// All contestants, each with a memory of one size.
struct Memory {
    pages: u64,
    peers: Vec<(&'static Entry, RefCell<Box<dyn Tracker>>)>,
    /// The bitmap of harvests.
    bitmap: RefCell<Vec<u64>>,
}

impl Memory {
    fn new(
        settings: &Settings,
        pages: u64,
        entries: impl IntoIterator<Item = &'static Entry>,
    ) -> Self {
        let mut bitmap = vec![0u64; (pages / 64) as usize];
        let peers = entries.into_iter().map(|entry| {
            let mut peer = (entry.new)(pages);
            settings.at(format!("{}: every page dirty once", peer.name()));
            if entry.slow > 1.0 && !entry.by_page {
                peer.mark(0, pages * PAGE);
            }
            peer.harvest_alone(&mut bitmap);
            (entry, RefCell::new(peer))
        });
        Memory {
            pages,
            peers: peers.collect(),
            bitmap: RefCell::new(bitmap),
        }
    }

    /// A contest: harvests of a share of the pages.
    fn harvest(
        &self,
        settings: &Settings,
        report: &mut Report,
        family: &'static str,
        (label, every): Share,
        workload: Workload,
    ) {
        if !workload.name.contains(&settings.matching) {
            return;
        }
        let pages = self.pages;
        let dirty = every.map(|every| random_bits(pages, every));
        let part = every.map_or(0.0, |every| 1.0 / every as f64);
        let pieces: Vec<u64> = (0..pages * PAGE).step_by(PIECE as usize).collect();
        let mark = |peer: &dyn Tracker| match (&dirty, every) {
            _ if label == PIECES => peer.mark_ranges(&pieces, PIECE),
            (_, Some(1)) => peer.mark(0, pages * PAGE),
            (Some(dirty), _) => peer.mark_bits(dirty),
            (None, _) => {}
        };
        let (mark, bitmap) = (&mark, &self.bitmap);
        let able = |entry: &Entry| part < entry.slow && !(entry.own && label == PIECES);
        let able = self.peers.iter().filter(|(entry, _)| able(entry));
        let contestants = able.map(|(entry, peer)| {
            let name = peer.borrow().name();
            let turn = move || {
                let (mut peer, mut bitmap) = (peer.borrow_mut(), bitmap.borrow_mut());
                if every.is_none() {
                    // Without marks and zeroing, so harvests repeat without a pause.
                    let harvest = |times| (0..times).for_each(|_| peer.harvest_alone(&mut bitmap));
                    return vec![per_operation(settings.turn, harvest)];
                }
                mark(&**peer);
                bitmap.fill(0);
                let began = Instant::now();
                peer.harvest_alone(&mut bitmap);
                vec![began.elapsed().as_nanos() as f64]
            };
            let contestant = Contestant::new(name, entry.role, turn);
            if entry.own {
                return contestant;
            }
            contestant.checked(move || {
                let (mut peer, mut bitmap) = (peer.borrow_mut(), bitmap.borrow_mut());
                mark(&**peer);
                bitmap.fill(0);
                peer.harvest_alone(&mut bitmap);
                sum(&bitmap)
            })
        });
        let contestants = contestants.collect();
        contest(settings, report, family, vec![workload], contestants);
    }
}

/// The memory that the system has provided for dirty pages, without the caller's bitmap.
fn resident(settings: &Settings, report: &mut Report, pages: u64, size: &str) {
    for (label, every) in [("0.01 %", 10_000), ("1 %", 100)] {
        let name = format!("memory for {size}, {label} dirty");
        if !name.contains(&settings.matching) {
            continue;
        }
        let dirty = random_bits(pages, every);
        let mut cells = Vec::new();
        for entry in ENTRIES.iter().filter(|entry| !entry.own) {
            let before = memory::resident();
            let (peer, allocated) = memory::grown_by(|| {
                let peer = (entry.new)(pages);
                peer.mark_bits(&dirty);
                peer
            });
            let grown = memory::resident().zip(before);
            let grown = grown.map_or(0, |(after, before)| after.saturating_sub(before));
            // Memory that the allocator already had is not counted again.
            let touched = if entry.role == Role::Ours {
                grown
            } else {
                allocated
            };
            cells.push((peer.name(), entry.role, vec![touched as f64]));
        }
        if cells.iter().all(|(_, _, bytes)| bytes[0] > 0.0) {
            let mut workload = Workload::new(name, Unit::Bytes);
            if every == 10_000 {
                workload = workload.target(Target::AtMost(f64::from(8 << 20)));
            }
            report.add(FAMILY.name, workload.bound("index"), cells);
        }
    }
}
