//! Programs on a store over a disk that lies, with a crash at every step, compared with what was
//! acknowledged.
//!
//! ```text
//!  program --> run until the crash --> every folder that may be found --> open --> for each
//!              (world: what was                                                    consumer:
//!               acknowledged)                                                      check
//! ```
//!
//! The world knows, for each page of the device and of each copy, every version that may be there
//! after a crash: the durable one and those that were written later. A page that is not reported
//! must have one version, and the same on both sides.
#![allow(clippy::unwrap_used)] // helpers of tests

mod check;
mod hostile;
mod programs;
mod random;
mod run;
mod sabotage;

use std::collections::{BTreeMap, BTreeSet};

use dirtymap::Granule;

use crate::disk::{Landed, SimFolder};
use crate::epoch::Epoch;
use crate::geometry::Device;
use crate::options::Options;
use crate::store::Store;

/// Bytes of a page.
const PAGE: u64 = 4096;
/// Pages of the device at first.
pub(super) const PAGES: u64 = 6;
/// Consumers of a program.
const CONSUMERS: usize = 3;
const ID: u128 = 0xd15c;

/// How a store is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Setup {
    /// A power of two.
    pub(super) pages_of_extent: u64,
    /// Extents that stay open.
    pub(super) hot: u32,
    /// Blocks for batches.
    pub(super) room: u64,
}

impl Setup {
    /// Extents of two pages, of which one stays open, and a log of two batches.
    const USUAL: Setup = Setup {
        pages_of_extent: 2,
        hot: 1,
        room: 2,
    };

    fn options(self) -> Options {
        let extent = Granule::from_bytes(PAGE * self.pages_of_extent).unwrap();
        let options = Options::new().extent(extent).page(Granule::K4);
        options.hot(self.hot).log_bytes(self.room * 4096)
    }
}

fn options() -> Options {
    Setup::USUAL.options()
}

/// An operation of a program. Consumers are 0, 1 and 2, pages are counted from the start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Op {
    /// Announces a write, waits, issues it.
    Begin {
        page: u64,
        pages: u64,
    },
    /// The same by a handle, 0 or 1.
    BeginBy {
        handle: usize,
        page: u64,
    },
    /// The oldest write in flight lands.
    Land,
    /// The newest one does.
    LandNewest,
    /// A write begins and lands, and so do all that are in flight.
    Write {
        page: u64,
    },
    /// Announces a write.
    Announce {
        page: u64,
        pages: u64,
    },
    /// Waits for the oldest write that was announced, and issues it.
    Wait,
    /// The oldest write that was announced is not issued.
    Withdraw,
    Join(usize),
    Leave(usize),
    Rename(usize),
    Harvest(usize),
    Copy(usize),
    Commit(usize),
    Abort(usize),
    /// The increment is dropped without a word.
    Drop(usize),
    FlushDevice,
    CloseExtents,
    Grow,
    /// The system dies so many steps of the disk later. The recovery dies after `again` of its
    /// steps, and is repeated.
    Crash {
        steps: u64,
        again: u64,
    },
}

/// Every version that a page may have after a crash. The last one is what a reader sees now.
#[derive(Clone, Debug)]
struct Page(Vec<u32>);

impl Page {
    fn now(&self) -> u32 {
        self.0[self.0.len() - 1]
    }

    fn write(&mut self, version: u32) {
        self.0.push(version);
    }

    fn flush(&mut self) {
        self.0 = vec![self.now()];
    }
}

/// What a consumer has.
#[derive(Clone, Debug)]
struct Copies {
    joined: bool,
    /// A call that changes whether it has joined, or its name, was cut off by the crash.
    unsure: bool,
    name: String,
    other_name: String,
    pages: Vec<Page>,
    /// The increment is copied, to the last page.
    copied: bool,
    /// The epoch that is durable with the copy, and that of the last acknowledged commit.
    durable: Option<Epoch>,
    committed: Option<Epoch>,
    /// Pages that were written since the harvest of the last commit, and since the last harvest.
    dirty: BTreeSet<u64>,
    dirty_since: BTreeSet<u64>,
}

/// What was acknowledged.
#[derive(Clone, Debug)]
pub(super) struct World {
    setup: Setup,
    sim: SimFolder,
    pages: Vec<Page>,
    /// Versions of writes in flight: page by page.
    in_flight: BTreeMap<u64, Vec<u32>>,
    versions: u32,
    copies: [Copies; CONSUMERS],
    /// The device had this many pages before a call that was cut off.
    growing: Option<u64>,
    /// Extents that were asked for since the last batch, or have writes in flight: they may be
    /// open. Those that were asked for before it were opened by it.
    asked: BTreeSet<u64>,
    recent: BTreeSet<u64>,
    /// Every increment that was acknowledged.
    epochs: BTreeSet<Epoch>,
    /// Every copy that was durable, with its epoch.
    history: Vec<(Epoch, Vec<Page>)>,
    /// A crash is near, and the recovery dies at this step.
    again: Option<u64>,
}

/// What went wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Loss {
    /// A write that a consumer does not have, and that is not reported.
    Write(String),
    /// Something else that must not be.
    Other(String),
}

fn other(what: impl ToString) -> Loss {
    Loss::Other(what.to_string())
}

impl World {
    /// A store on a folder of its own, and consumers, none of which has joined.
    pub(super) fn new() -> World {
        World::with(Setup::USUAL)
    }

    pub(super) fn with(setup: Setup) -> World {
        let copies = |name: &str| Copies {
            joined: false,
            unsure: false,
            name: name.to_owned(),
            other_name: format!("{name} too"),
            pages: vec![Page(vec![0]); PAGES as usize],
            copied: false,
            durable: None,
            committed: None,
            dirty: BTreeSet::new(),
            dirty_since: BTreeSet::new(),
        };
        World {
            setup,
            sim: SimFolder::new(),
            pages: vec![Page(vec![0]); PAGES as usize],
            in_flight: BTreeMap::new(),
            versions: 0,
            copies: [copies("one"), copies("two"), copies("three")],
            growing: None,
            asked: BTreeSet::new(),
            recent: BTreeSet::new(),
            epochs: BTreeSet::new(),
            history: Vec::new(),
            again: None,
        }
    }

    fn device(&self) -> Device {
        let len = self.pages.len() as u64 * PAGE;
        Device { id: ID, len }
    }

    /// Makes the store. False if it crashes.
    pub(super) fn create(&self) -> Option<Store> {
        Store::create(self.sim.clone(), &self.device(), &self.setup.options()).ok()
    }
}

/// Every way in which a crash may leave a folder, one after the other.
#[derive(Debug, Default)]
pub(super) struct EachWay {
    /// What was picked, of how many ways.
    picks: Vec<(u32, u32)>,
    at: usize,
    done: bool,
}

impl EachWay {
    /// Goes on to the next way; false at the end.
    pub(super) fn next(&mut self) -> bool {
        if self.done {
            return false;
        }
        self.at = 0;
        true
    }

    /// The way has been looked at.
    pub(super) fn advance(&mut self) {
        self.picks.truncate(self.at);
        while let Some((pick, ways)) = self.picks.pop() {
            if pick + 1 < ways {
                self.picks.push((pick + 1, ways));
                return;
            }
        }
        self.done = true;
    }
}

impl Landed for EachWay {
    fn pick(&mut self, ways: u32) -> u32 {
        if self.at == self.picks.len() {
            self.picks.push((0, ways));
        }
        self.at += 1;
        self.picks[self.at - 1].0
    }
}

/// Runs a program with a crash at each of its steps, and looks at every folder that may be found.
/// Returns how many it looked at, or the first loss that `counts`.
pub(super) fn explore_for(
    before: &[Op],
    program: &[Op],
    counts: impl Fn(&Loss) -> bool,
) -> Result<u64, String> {
    let ops: Vec<Op> = before.iter().chain(program).copied().collect();
    let mut found = 0;
    let whole = World::new();
    let mut rest = whole.clone();
    rest.sim = SimFolder::new();
    let store = rest.create().unwrap();
    let run = |world: &mut World, store: &Store, ops: &[Op]| match world.run(store, ops) {
        Err(loss) if counts(&loss) => Err(format!("{program:?}: {loss:?}")),
        _ => Ok(()),
    };
    run(&mut rest, &store, before)?;
    let first = rest.sim.steps();
    run(&mut rest, &store, program)?;
    // One more: everything that is done, and then the crash.
    for step in first..=rest.sim.steps() + 1 {
        let mut world = World::new();
        world.sim.crash_at(step + 1);
        let Some(store) = world.create() else {
            continue;
        };
        run(&mut world, &store, &ops)?;
        let mut ways = EachWay::default();
        while ways.next() {
            if let Err(loss) = world.recover(&mut ways)
                && counts(&loss)
            {
                return Err(format!("{program:?}, step {step}: {loss:?}"));
            }
            found += 1;
            ways.advance();
        }
    }
    Ok(found)
}

/// As [`explore_for`], for any loss.
pub(super) fn explore(before: &[Op], program: &[Op]) -> Result<u64, String> {
    explore_for(before, program, |_| true)
}
