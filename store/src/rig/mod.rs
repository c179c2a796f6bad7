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

mod hostile;
mod programs;
mod random;
mod sabotage;

use std::collections::{BTreeMap, BTreeSet};

use dirtymap::Granule;

use crate::disk::{Landed, SimFolder};
use crate::epoch::Epoch;
use crate::error::Error;
use crate::geometry::Device;
use crate::increment::Increment;
use crate::intent::WriteGuard;
use crate::options::Options;
use crate::store::{Opened, Store};

/// Bytes of a page. An extent has two.
const PAGE: u64 = 4096;
const PAGES_OF_EXTENT: u64 = 2;
/// Pages of the device at first.
pub(super) const PAGES: u64 = 6;
/// Extents that stay open.
const HOT: u32 = 1;
const ID: u128 = 0xd15c;

fn options() -> Options {
    let extent = Granule::from_bytes(PAGE * PAGES_OF_EXTENT).unwrap();
    let options = Options::new().extent(extent).page(Granule::K4);
    options.hot(HOT).log_bytes(2 * 4096)
}

/// An operation of a program. Consumers are 0 and 1, pages are counted from the start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Op {
    /// Announces a write, waits, issues it.
    Begin {
        page: u64,
        pages: u64,
    },
    /// The oldest write in flight lands.
    Land,
    /// Both.
    Write {
        page: u64,
    },
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
    sim: SimFolder,
    pages: Vec<Page>,
    /// Versions of writes in flight: page by page.
    in_flight: BTreeMap<u64, Vec<u32>>,
    versions: u32,
    copies: [Copies; 2],
    /// The device had this many pages before a call that was cut off.
    growing: Option<u64>,
    /// Extents that the last calls asked for: they may be open.
    asked: BTreeSet<u64>,
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
    /// A store on a folder of its own, and two consumers, none of which has joined.
    pub(super) fn new() -> World {
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
            sim: SimFolder::new(),
            pages: vec![Page(vec![0]); PAGES as usize],
            in_flight: BTreeMap::new(),
            versions: 0,
            copies: [copies("one"), copies("two")],
            growing: None,
            asked: BTreeSet::new(),
        }
    }

    fn device(&self) -> Device {
        let len = self.pages.len() as u64 * PAGE;
        Device { id: ID, len }
    }

    /// Makes the store. False if it crashes.
    pub(super) fn create(&self) -> Option<Store> {
        Store::create(self.sim.clone(), &self.device(), &options()).ok()
    }

    /// Runs `ops` until the end or the crash. What a program cannot do is left out.
    pub(super) fn run(&mut self, store: &Store, ops: &[Op]) {
        let mut guards = Vec::new();
        let mut leases = [None, None];
        for op in ops {
            if self.sim.has_crashed() {
                break;
            }
            self.perform(store, *op, &mut guards, &mut leases);
        }
        // What is in flight, and what was harvested, ends with the process.
        guards.into_iter().for_each(std::mem::forget);
        leases.into_iter().for_each(std::mem::forget);
    }

    fn perform<'s>(
        &mut self,
        store: &'s Store,
        op: Op,
        guards: &mut Vec<WriteGuard<'s>>,
        leases: &mut [Option<Increment<'s>>; 2],
    ) {
        match op {
            Op::Begin { page, pages } => self.begin(store, page, pages, guards),
            Op::Land => self.land(guards),
            Op::Write { page } => {
                self.begin(store, page, 1, guards);
                while !guards.is_empty() {
                    self.land(guards);
                }
            }
            Op::Join(number) => self.join(store, number),
            Op::Leave(number) if self.copies[number].joined && leases[number].is_none() => {
                let copies = &mut self.copies[number];
                copies.unsure = true;
                if store.leave(&copies.name).is_ok() {
                    copies.joined = false;
                    copies.unsure = false;
                    copies.durable = None;
                    copies.committed = None;
                }
            }
            Op::Rename(number) if self.copies[number].joined => {
                let copies = &mut self.copies[number];
                copies.unsure = true;
                if store.rename(&copies.name, &copies.other_name).is_ok() {
                    std::mem::swap(&mut copies.name, &mut copies.other_name);
                    copies.unsure = false;
                }
            }
            Op::Harvest(number) if self.copies[number].joined && leases[number].is_none() => {
                let copies = &mut self.copies[number];
                let lease = store.harvest(&copies.name, copies.durable);
                if lease.is_ok() {
                    copies.copied = false;
                    copies.dirty_since.clear();
                }
                leases[number] = lease.ok();
            }
            Op::Copy(number) => {
                self.copies[number].copied = leases[number].is_some();
                for run in leases[number].iter().flat_map(|lease| lease.runs()) {
                    for page in run.start().get() / PAGE..=run.last().get() / PAGE {
                        let version = self.pages[page as usize].now();
                        self.copies[number].pages[page as usize].write(version);
                    }
                }
            }
            Op::Commit(number) if !self.copies[number].copied => {}
            Op::Commit(number) => self.commit(number, &mut leases[number]),
            Op::Abort(number) => {
                // Whether the abort is durable matters to nobody.
                let _ = leases[number].take().map(Increment::abort);
            }
            Op::Drop(number) => drop(leases[number].take()),
            Op::FlushDevice => {
                if self.sim.step().is_ok() {
                    self.pages.iter_mut().for_each(Page::flush);
                }
            }
            Op::CloseExtents => {
                let _ = store.close_extents();
            }
            Op::Grow => {
                let pages = self.pages.len() as u64 + PAGES_OF_EXTENT / 2;
                self.growing = Some(self.pages.len() as u64);
                // The device grows first, with contents of its own.
                self.resize(pages);
                if store.grow(pages * PAGE).is_ok() {
                    self.growing = None;
                }
            }
            Op::Leave(_) | Op::Rename(_) | Op::Harvest(_) => {}
        }
    }

    fn resize(&mut self, pages: u64) {
        self.versions += 1;
        let version = self.versions;
        self.pages.resize(pages as usize, Page(vec![version]));
        for copies in &mut self.copies {
            copies.pages.resize(pages as usize, Page(vec![0]));
            let new = (0..pages).rev().take(PAGES_OF_EXTENT as usize);
            for page in new {
                copies.dirty.insert(page);
                copies.dirty_since.insert(page);
            }
        }
    }

    fn join(&mut self, store: &Store, number: usize) {
        let copies = &mut self.copies[number];
        if copies.joined {
            return;
        }
        copies.unsure = true;
        if store.join(&copies.name).is_ok() {
            copies.joined = true;
            copies.unsure = false;
        }
    }

    fn begin<'s>(
        &mut self,
        store: &'s Store,
        page: u64,
        pages: u64,
        guards: &mut Vec<WriteGuard<'s>>,
    ) {
        let end = (page + pages).min(self.pages.len() as u64);
        if page >= end {
            return;
        }
        let (first, last) = (page / PAGES_OF_EXTENT, (end - 1) / PAGES_OF_EXTENT);
        self.asked = (first..=last).collect();
        let intent = store.begin_write(page * PAGE..end * PAGE);
        let Ok(guard) = intent.and_then(|intent| intent.wait()) else {
            return; // it must not be issued
        };
        for page in page..end {
            self.versions += 1;
            self.in_flight.entry(page).or_default().push(self.versions);
            for copies in &mut self.copies {
                copies.dirty.insert(page);
                copies.dirty_since.insert(page);
            }
        }
        guards.push(guard);
        // The write is in flight when the system dies.
        let _ = self.sim.step();
    }

    /// The oldest write lands, and then its guard ends.
    fn land(&mut self, guards: &mut Vec<WriteGuard<'_>>) {
        if guards.is_empty() {
            return;
        }
        let guard = guards.remove(0);
        for page in guard.range().start().get() / PAGE..=guard.range().last().get() / PAGE {
            let versions = self.in_flight.get_mut(&page).unwrap();
            self.pages[page as usize].write(versions.remove(0));
            for copies in &mut self.copies {
                copies.dirty_since.insert(page);
            }
        }
        drop(guard);
    }

    fn commit(&mut self, number: usize, lease: &mut Option<Increment<'_>>) {
        let Some(lease) = lease.take() else { return };
        let epoch = lease.epoch();
        let copies = &mut self.copies[number];
        let (sim, pages) = (&self.sim, &mut self.pages);
        let committed = lease.commit(|| {
            sim.step()?;
            copies.pages.iter_mut().for_each(Page::flush);
            copies.durable = Some(epoch);
            sim.step()?;
            pages.iter_mut().for_each(Page::flush);
            Ok(())
        });
        if committed.is_ok() {
            copies.committed = Some(epoch);
            copies.dirty = copies.dirty_since.clone();
        }
    }

    /// What may be there after the crash becomes what is there. The store is opened and every
    /// consumer is asked. `Err` if a write is lost.
    pub(super) fn recover(&self, landed: &mut impl Landed) -> Result<(World, Store), Loss> {
        self.recover_in(self.sim.crash(landed))
    }

    /// The same, on a folder that was found.
    fn recover_in(&self, sim: SimFolder) -> Result<(World, Store), Loss> {
        let mut world = World {
            sim,
            in_flight: BTreeMap::new(),
            asked: BTreeSet::new(),
            growing: None,
            ..self.clone()
        };
        for (page, versions) in &self.in_flight {
            world.pages[*page as usize].0.extend(versions);
        }
        let store = world.open(self.growing)?;
        world.check(&store, self)?;
        Ok((world, store))
    }

    fn open(&mut self, growing: Option<u64>) -> Result<Store, Loss> {
        let opened = Store::open(self.sim.clone(), &self.device(), &options());
        match opened {
            Ok(Opened::Known(store)) => Ok(store),
            // The device was larger than the store knew. That means everything.
            Ok(Opened::Everything(lost)) if growing.is_some() => {
                for copies in &mut self.copies {
                    copies.joined = false;
                    copies.durable = None;
                    copies.committed = None;
                }
                lost.start_over(&options()).map_err(other)
            }
            Ok(Opened::Everything(lost)) => Err(other(format!("everything: {}", lost.why()))),
            Err(error) => Err(other(format!("cannot be opened: {error}"))),
        }
    }

    /// Asks each consumer, and compares with what may be on the disks.
    fn check(&mut self, store: &Store, before: &World) -> Result<(), Loss> {
        let names: Vec<String> = all_names(store).map_err(other)?;
        for number in 0..2 {
            let copies = &mut self.copies[number];
            // A new store was made, and its maker crashed.
            copies.unsure |= before.growing.is_some() && names.is_empty();
            let is_there = names.contains(&copies.name);
            let is_renamed = names.contains(&copies.other_name);
            if copies.unsure && !is_there && is_renamed {
                std::mem::swap(&mut copies.name, &mut copies.other_name);
            }
            let found = is_there || is_renamed && copies.unsure;
            if copies.joined && !copies.unsure && !found {
                return Err(other(format!("{} is gone", copies.name)));
            }
            if copies.unsure && !found {
                copies.durable = None;
                copies.committed = None;
            }
            copies.joined = found;
            copies.unsure = false;
            if found {
                // What was open stays reported until the next commit, whatever crashes before it.
                let reported = self.check_one(store, number, before)?;
                self.copies[number].dirty.extend(reported);
            }
        }
        Ok(())
    }

    /// Asks with the parent that the copy names, and with the one that the store does: a consumer
    /// may rely on either. Returns the pages that were reported.
    fn check_one(
        &self,
        store: &Store,
        number: usize,
        before: &World,
    ) -> Result<BTreeSet<u64>, Loss> {
        let copies = &self.copies[number];
        let all = store.consumers().map_err(other)?;
        let listed = all.into_iter().find(|info| info.name == copies.name);
        let listed = listed.and_then(|info| info.committed);
        let mut reported = BTreeSet::new();
        if listed.is_some() && listed != copies.durable {
            reported = self.check_parent(store, number, before, listed)?;
        }
        reported.extend(self.check_parent(store, number, before, copies.durable)?);
        Ok(reported)
    }

    fn check_parent(
        &self,
        store: &Store,
        number: usize,
        before: &World,
        parent: Option<Epoch>,
    ) -> Result<BTreeSet<u64>, Loss> {
        let copies = &self.copies[number];
        let increment = store.harvest(&copies.name, parent).map_err(other)?;
        if copies.committed.is_some() && increment.everything().is_some() {
            return Err(other(format!("everything: {:?}", increment.everything())));
        }
        let mut reported = BTreeSet::new();
        for run in increment.runs() {
            reported.extend(run.start().get() / PAGE..=run.last().get() / PAGE);
        }
        for page in 0..self.pages.len() as u64 {
            let device = &self.pages[page as usize].0;
            let copy = &copies.pages[page as usize].0;
            let same = device
                .iter()
                .all(|version| copy.iter().all(|other| other == version));
            if !same && !reported.contains(&page) {
                return Err(Loss::Write(format!(
                    "page {page} has {device:?}, the copy of {} has {copy:?}",
                    copies.name
                )));
            }
        }
        // Tight: whole extents that were open, and nothing else that was not written.
        let extent = |page: &u64| page / PAGES_OF_EXTENT;
        let not_written = reported.difference(&copies.dirty);
        let excess: BTreeSet<u64> = not_written.map(extent).collect();
        let in_flight: BTreeSet<u64> = before.in_flight.keys().map(extent).collect();
        let open = HOT as usize + in_flight.len() + before.asked.len();
        if increment.everything().is_none() && excess.len() > open {
            return Err(other(format!(
                "{excess:?} are reported, were not written, and at most {open} were open"
            )));
        }
        drop(increment);
        Ok(reported)
    }
}

fn all_names(store: &Store) -> Result<Vec<String>, Error> {
    let all = store.consumers()?;
    Ok(all.into_iter().map(|consumer| consumer.name).collect())
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
    rest.run(&store, before);
    let first = rest.sim.steps();
    rest.run(&store, program);
    // One more: everything that is done, and then the crash.
    for step in first..=rest.sim.steps() + 1 {
        let mut world = World::new();
        world.sim.crash_at(step + 1);
        let Some(store) = world.create() else {
            continue;
        };
        world.run(&store, &ops);
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
