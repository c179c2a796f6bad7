//! Recovers, and compares with what was acknowledged.

use std::collections::BTreeSet;

use super::{CONSUMERS, Loss, PAGE, Page, World, other};
use crate::disk::{Landed, SimFolder};
use crate::epoch::Epoch;
use crate::error::{Error, Why};
use crate::store::{Opened, Store};

/// Old epochs that are named as parents.
const NAMED: usize = 6;

impl World {
    /// What may be there after the crash becomes what is there. The store is opened and every
    /// consumer is asked. `Err` if a write is lost.
    pub(super) fn recover(&self, landed: &mut impl Landed) -> Result<(World, Store), Loss> {
        self.recover_in(self.sim.crash(landed))
    }

    /// The same, on a folder that was found.
    pub(super) fn recover_in(&self, sim: SimFolder) -> Result<(World, Store), Loss> {
        let mut world = World {
            sim,
            in_flight: Default::default(),
            asked: BTreeSet::new(),
            recent: BTreeSet::new(),
            growing: None,
            again: None,
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
        let options = self.setup.options();
        let opened = Store::open(self.sim.clone(), &self.device(), &options);
        match opened {
            Ok(Opened::Known(store)) => Ok(store),
            // The device was larger than the store knew. That means everything.
            Ok(Opened::Everything(lost)) if growing.is_some() => {
                for copies in &mut self.copies {
                    copies.joined = false;
                    copies.committed = None;
                }
                lost.start_over(&options).map_err(other)
            }
            Ok(Opened::Everything(lost)) => Err(other(format!("everything: {}", lost.why()))),
            Err(error) => Err(other(format!("cannot be opened: {error}"))),
        }
    }

    /// Asks each consumer, and compares with what may be on the disks.
    fn check(&mut self, store: &Store, before: &World) -> Result<(), Loss> {
        let names: Vec<String> = all_names(store).map_err(other)?;
        for number in 0..CONSUMERS {
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
    /// may rely on either. Then with epochs of long ago, and of other consumers, for a copy of that
    /// time. Returns the pages that were reported.
    fn check_one(
        &mut self,
        store: &Store,
        number: usize,
        before: &World,
    ) -> Result<BTreeSet<u64>, Loss> {
        let copies = self.copies[number].clone();
        let all = store.consumers().map_err(other)?;
        let listed = all.into_iter().find(|info| info.name == copies.name);
        let listed = listed.and_then(|info| info.committed);
        if copies.committed.is_some() && listed < copies.committed {
            return Err(other(format!(
                "{} has committed {:?}, and {listed:?} is known",
                copies.name, copies.committed
            )));
        }
        let mut reported = BTreeSet::new();
        if listed.is_some() && listed != copies.durable {
            reported = self.check_parent(store, number, before, listed)?;
        }
        reported.extend(self.check_parent(store, number, before, copies.durable)?);
        let history = self.history.clone();
        for (epoch, pages) in history.iter().rev().take(NAMED) {
            self.check_old(store, &copies.name, *epoch, pages)?;
        }
        Ok(reported)
    }

    /// Whatever parent is accepted, a copy of it with the increment on top is whole.
    fn check_old(
        &mut self,
        store: &Store,
        name: &str,
        epoch: Epoch,
        pages: &[Page],
    ) -> Result<(), Loss> {
        let increment = store.harvest(name, Some(epoch)).map_err(other)?;
        if !self.epochs.insert(increment.epoch()) {
            return Err(other(format!("{} is there twice", increment.epoch())));
        }
        match increment.everything() {
            Some(Why::UnknownParent { asked }) if *asked == epoch => {}
            Some(Why::New) => {}
            Some(why) => return Err(other(format!("{epoch} is a parent, and: {why}"))),
            None if increment.parent() == Some(epoch) => {}
            None => return Err(other(format!("{epoch} was named: {increment:?}"))),
        }
        let runs = increment.runs();
        let reported: BTreeSet<u64> = runs.into_iter().flat_map(pages_of).collect();
        let whose = format!("{name} has of {epoch}");
        self.compare(&reported, pages, &whose)
    }

    /// A page that is not reported has one version, the same on both sides.
    fn compare(&self, reported: &BTreeSet<u64>, copy: &[Page], whose: &str) -> Result<(), Loss> {
        for (number, page) in (0..).zip(&self.pages) {
            let copy = copy.get(number as usize).map(|page| &page.0);
            let same = copy.is_some_and(|copy| {
                let mut device = page.0.iter();
                device.all(|version| copy.iter().all(|other| other == version))
            });
            if !same && !reported.contains(&number) {
                return Err(Loss::Write(format!(
                    "page {number} has {:?}, the copy that {whose} has {copy:?}",
                    page.0
                )));
            }
        }
        Ok(())
    }

    fn check_parent(
        &mut self,
        store: &Store,
        number: usize,
        before: &World,
        parent: Option<Epoch>,
    ) -> Result<BTreeSet<u64>, Loss> {
        let copies = &self.copies[number];
        let increment = store.harvest(&copies.name, parent).map_err(other)?;
        if !self.epochs.insert(increment.epoch()) {
            return Err(other(format!("{} is there twice", increment.epoch())));
        }
        if copies.committed.is_some() && increment.everything().is_some() {
            return Err(other(format!("everything: {:?}", increment.everything())));
        }
        let runs = increment.runs();
        let reported: BTreeSet<u64> = runs.into_iter().flat_map(pages_of).collect();
        self.compare(&reported, &copies.pages, &format!("{} keeps", copies.name))?;
        // Tight: whole extents that were open, and nothing else that was not written.
        let extent = |page: &u64| page / self.setup.pages_of_extent;
        let not_written = reported.difference(&copies.dirty);
        let excess: BTreeSet<u64> = not_written.map(extent).collect();
        let mut open: BTreeSet<u64> = before.in_flight.keys().map(extent).collect();
        open.extend(before.asked.union(&before.recent));
        let open = self.setup.hot as usize + open.len();
        if increment.everything().is_none() && excess.len() > open {
            return Err(other(format!(
                "{excess:?} are reported, were not written, and at most {open} were open"
            )));
        }
        drop(increment);
        Ok(reported)
    }
}

fn pages_of(run: dirtymap::IovaRange) -> std::ops::RangeInclusive<u64> {
    run.start().get() / PAGE..=run.last().get() / PAGE
}

fn all_names(store: &Store) -> Result<Vec<String>, Error> {
    let all = store.consumers()?;
    Ok(all.into_iter().map(|consumer| consumer.name).collect())
}
