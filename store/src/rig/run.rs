//! Runs a program on a store, and keeps what was acknowledged.

use std::collections::BTreeSet;

use super::{CONSUMERS, Loss, Op, PAGE, Page, World, other};
use crate::error::Error;
use crate::increment::Increment;
use crate::intent::{Intent, WriteGuard, Writer};
use crate::store::Store;

/// What a process has in its hands, and what ends with it.
struct Hands<'s> {
    handles: &'s [Writer<'s>],
    /// Announced, and not durable yet, as far as the process knows.
    intents: Vec<Intent<'s>>,
    guards: Vec<WriteGuard<'s>>,
    leases: [Option<Increment<'s>>; CONSUMERS],
}

impl World {
    /// Runs `ops` until the end or the crash, and returns how many were run. What a program cannot
    /// do is left out.
    pub(super) fn run(&mut self, store: &Store, ops: &[Op]) -> Result<usize, Loss> {
        let handles = [store.writer(), store.writer()];
        let mut hands = Hands {
            handles: &handles,
            intents: Vec::new(),
            guards: Vec::new(),
            leases: [const { None }; CONSUMERS],
        };
        let mut run = 0;
        for op in ops {
            if self.sim.has_crashed() {
                break;
            }
            run += 1;
            let (before, asked) = (store.stats().batches, std::mem::take(&mut self.asked));
            self.perform(store, *op, &mut hands)?;
            // A batch opens what was asked for before it. It closes what has no write in flight, up
            // to what stays open.
            self.asked.extend(asked);
            if store.stats().batches > before {
                let pinned = self.pinned(&hands);
                self.recent = std::mem::replace(&mut self.asked, pinned);
            }
        }
        // What is in flight, and what was harvested, ends with the process.
        hands.intents.into_iter().for_each(std::mem::forget);
        hands.guards.into_iter().for_each(std::mem::forget);
        hands.leases.into_iter().for_each(std::mem::forget);
        Ok(run)
    }

    fn pinned(&self, hands: &Hands<'_>) -> BTreeSet<u64> {
        let guards = hands.guards.iter().map(WriteGuard::range);
        let ranges = guards.chain(hands.intents.iter().map(Intent::range));
        let extents = ranges.flat_map(|range| {
            let extent = |byte: u64| byte / PAGE / self.setup.pages_of_extent;
            extent(range.start().get())..=extent(range.last().get())
        });
        extents.collect()
    }

    fn perform<'s>(&mut self, store: &'s Store, op: Op, hands: &mut Hands<'s>) -> Result<(), Loss> {
        let leases = &mut hands.leases;
        match op {
            Op::Begin { page, pages } => self.begin(store, page, pages, None, hands),
            Op::BeginBy { handle, page } => self.begin(store, page, 1, Some(handle), hands),
            Op::Land => self.land(hands, 0),
            Op::LandNewest => self.land(hands, hands.guards.len().saturating_sub(1)),
            Op::Write { page } => {
                self.begin(store, page, 1, None, hands);
                while !hands.guards.is_empty() {
                    self.land(hands, 0);
                }
            }
            Op::Announce { page, pages } => {
                if let Some(range) = self.ask(page, pages)
                    && let Ok(intent) = store.begin_write(range)
                {
                    hands.intents.push(intent);
                }
            }
            Op::Wait if !hands.intents.is_empty() => {
                let guard = hands.intents.remove(0).wait();
                self.issue(guard, hands);
            }
            Op::Withdraw if !hands.intents.is_empty() => drop(hands.intents.remove(0)),
            Op::Join(number) => self.join(store, number),
            Op::Leave(number) if self.copies[number].joined => {
                let copies = &mut self.copies[number];
                copies.unsure = true;
                if store.leave(&copies.name).is_ok() {
                    copies.joined = false;
                    copies.unsure = false;
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
            Op::Harvest(number) if self.copies[number].joined => {
                self.harvest(store, number, &mut leases[number])?;
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
            Op::Commit(number) => self.commit(number, &mut leases[number])?,
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
                let pages = self.pages.len() as u64 + self.setup.pages_of_extent.div_ceil(2);
                self.growing = Some(self.pages.len() as u64);
                // The device grows first, with contents of its own.
                self.resize(pages);
                if store.grow(pages * PAGE).is_ok() {
                    self.growing = None;
                }
            }
            Op::Crash { steps, again } => {
                // One crash waits at a time: the next one comes at once.
                let steps = if self.again.is_some() { 0 } else { steps };
                self.again = Some(again);
                self.sim.crash_at(self.sim.steps() + steps);
            }
            Op::Leave(_) | Op::Rename(_) | Op::Harvest(_) | Op::Wait | Op::Withdraw => {}
        }
        Ok(())
    }

    pub(super) fn resize(&mut self, pages: u64) {
        self.versions += 1;
        let version = self.versions;
        self.pages.resize(pages as usize, Page(vec![version]));
        for copies in &mut self.copies {
            copies.pages.resize(pages as usize, Page(vec![0]));
            let new = (0..pages).rev();
            for page in new.take(self.setup.pages_of_extent as usize) {
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

    /// The bytes of a write to some pages, if the device has the first one.
    fn ask(&mut self, page: u64, pages: u64) -> Option<std::ops::Range<u64>> {
        let end = (page + pages).min(self.pages.len() as u64);
        if page >= end {
            return None;
        }
        let extent = |page: u64| page / self.setup.pages_of_extent;
        self.asked.extend(extent(page)..=extent(end - 1));
        Some(page * PAGE..end * PAGE)
    }

    fn begin<'s>(
        &mut self,
        store: &'s Store,
        page: u64,
        pages: u64,
        handle: Option<usize>,
        hands: &mut Hands<'s>,
    ) {
        let Some(range) = self.ask(page, pages) else {
            return;
        };
        let guard = match handle {
            None => store.begin_write(range).and_then(Intent::wait),
            Some(handle) => hands.handles[handle].begin_write(range),
        };
        self.issue(guard, hands);
    }

    /// The write is issued, if its extents are open.
    fn issue<'s>(&mut self, guard: Result<WriteGuard<'s>, Error>, hands: &mut Hands<'s>) {
        let Ok(guard) = guard else {
            return;
        };
        for page in guard.range().start().get() / PAGE..=guard.range().last().get() / PAGE {
            self.versions += 1;
            self.in_flight.entry(page).or_default().push(self.versions);
            for copies in &mut self.copies {
                copies.dirty.insert(page);
                copies.dirty_since.insert(page);
            }
        }
        hands.guards.push(guard);
        // The write is in flight when the system dies.
        let _ = self.sim.step();
    }

    /// A write lands, and then its guard ends. Of two writes to a page, either may be the last.
    fn land(&mut self, hands: &mut Hands<'_>, number: usize) {
        if hands.guards.is_empty() {
            return;
        }
        let guard = hands.guards.remove(number);
        for page in guard.range().start().get() / PAGE..=guard.range().last().get() / PAGE {
            let versions = self.in_flight.get_mut(&page).unwrap();
            self.pages[page as usize].write(versions.remove(0));
            for copies in &mut self.copies {
                copies.dirty_since.insert(page);
            }
        }
        drop(guard);
    }

    /// The next increment has a number of its own. A consumer has one at a time.
    fn harvest<'s>(
        &mut self,
        store: &'s Store,
        number: usize,
        lease: &mut Option<Increment<'s>>,
    ) -> Result<(), Loss> {
        let copies = &mut self.copies[number];
        let got = match store.harvest(&copies.name, copies.durable) {
            Ok(got) => got,
            Err(Error::Outstanding { .. }) if lease.is_some() => return Ok(()),
            Err(_) if self.sim.has_crashed() => return Ok(()),
            Err(error) => return Err(other(error)),
        };
        if !self.epochs.insert(got.epoch()) {
            return Err(other(format!("{} is there twice", got.epoch())));
        }
        copies.copied = false;
        copies.dirty_since.clear();
        // A lease of a consumer that left, and came back, has ended.
        *lease = Some(got);
        Ok(())
    }

    fn commit(&mut self, number: usize, lease: &mut Option<Increment<'_>>) -> Result<(), Loss> {
        let Some(lease) = lease.take() else {
            return Ok(());
        };
        let epoch = lease.epoch();
        let copies = &mut self.copies[number];
        let (sim, pages) = (&self.sim, &mut self.pages);
        let history = &mut self.history;
        let committed = lease.commit(|| {
            sim.step()?;
            copies.pages.iter_mut().for_each(Page::flush);
            copies.durable = Some(epoch);
            history.push((epoch, copies.pages.clone()));
            sim.step()?;
            pages.iter_mut().for_each(Page::flush);
            Ok(())
        });
        match committed {
            Ok(_) => {
                copies.committed = Some(epoch);
                copies.dirty = copies.dirty_since.clone();
                Ok(())
            }
            Err(Error::Gone { .. }) => Ok(()),
            Err(_) if self.sim.has_crashed() => Ok(()),
            Err(error) => Err(other(error)),
        }
    }
}
