//! An actor that maps and unmaps slots. After an unmap it copies the returned pages. From then on,
//! until the next map, no device may change the memory.

use dirtymap::sync::{AtomicU64, MutexGuard, thread};
use dirtymap::{Access, Change, Error, Granule, Iova, IovaRange, SparseBitmap, UserBitmap};

use super::failure::Failure;
use super::layout::{self, LANE, LARGE, PAGE, SMALL};
use super::panics::caught;
use super::tally::Count;
use super::world::{Slot, SlotState, World};
use super::writer;
use crate::Random;

/// A slot that is locked by this mapper.
type Held<'w> = (&'w Slot, MutexGuard<'w, SlotState>);

/// See the [module](self).
pub(super) struct Mapper<'w> {
    world: &'w World,
    actor: usize,
    random: Random,
}

impl<'w> Mapper<'w> {
    pub(super) fn new(world: &'w World, nth: u32) -> Self {
        Mapper {
            world,
            actor: nth as usize,
            random: world.random(2, nth.into()),
        }
    }

    pub(super) fn run(mut self) -> Result<(), Failure> {
        while self.world.control.goes_on(|| ()) {
            match self.random.below(16) {
                0 => self.anywhere()?,
                1 => self.swap()?,
                2 => self.large()?,
                _ => self.small()?,
            }
            thread::yield_now();
        }
        Ok(())
    }

    fn hold(&self, nth: usize) -> Option<Held<'w>> {
        let slot = &self.world.slots[nth];
        Some((slot, slot.take()?))
    }

    /// One to four neighbours, all of them mapped or none.
    fn small(&mut self) -> Result<(), Failure> {
        let first = self.random.below(SMALL as u64) as usize;
        let most = 1 + self.random.below(4) as usize;
        let mut held: Vec<Held<'w>> = Vec::new();
        for nth in first..SMALL.min(first + most) {
            match self.hold(nth) {
                Some(one) if held.first().is_none_or(|(_, s)| s.mapped == one.1.mapped) => {
                    held.push(one);
                }
                _ => break,
            }
        }
        match held.first() {
            None => Ok(()),
            Some((_, state)) if state.mapped => self.unmap(&mut held),
            Some(_) => held
                .iter_mut()
                .try_for_each(|(slot, state)| self.map(slot, state, 1)),
        }
    }

    /// A slot of the size of a large leaf: one area or two.
    fn large(&mut self) -> Result<(), Failure> {
        let nth = SMALL + self.random.below(LARGE as u64) as usize;
        let Some((slot, mut state)) = self.hold(nth) else {
            return Ok(());
        };
        if state.mapped {
            return self.unmap(&mut [(slot, state)]);
        }
        let parts = 1 + self.random.below(2);
        self.map(slot, &mut state, parts)
    }

    /// Maps `slot` as this number of areas.
    fn map(&self, slot: &Slot, state: &mut SlotState, parts: u64) -> Result<(), Failure> {
        self.verify_frozen(slot, state)?;
        slot.step();
        let pages = slot.pages / parts;
        let mut panicked = false;
        for part in 0..parts {
            let first = slot.first + part * pages;
            let range = layout::range(first, pages);
            self.world.events.note(self.actor, "maps", range);
            let map = || self.world.space.map(range, first * PAGE, Access::ReadWrite);
            let mapped = loop {
                if let Some(mapped) = caught(map) {
                    break mapped;
                }
                self.clear_away(range)?;
                self.world.tally.add(Count::Panicked, 1);
                panicked = true;
            };
            mapped.map_err(|error| Failure::call("map", range, error))?;
        }
        if panicked {
            // Writes of devices to a partial map are never reported.
            self.world.copy_range(slot.range());
        }
        state.mapped = true;
        slot.step();
        self.world.tally.add(Count::Maps, parts);
        Ok(())
    }

    /// A map panicked. Unmaps the rest of it in `range`.
    fn clear_away(&self, range: IovaRange) -> Result<(), Failure> {
        loop {
            match caught(|| self.world.space.unmap_discarding(range)) {
                Some(Ok(_) | Err(Error::NothingMapped { .. })) => return Ok(()),
                Some(Err(error)) => return Err(Failure::call("unmap", range, error)),
                None => self.world.tally.add(Count::Panicked, 1),
            }
        }
    }

    /// Repeats a call until no source panics in it.
    fn stubbornly<T>(&self, mut call: impl FnMut() -> T) -> T {
        loop {
            match caught(&mut call) {
                Some(done) => return done,
                None => self.world.tally.add(Count::Panicked, 1),
            }
        }
    }

    /// Unmaps neighbours, in one of several ways.
    fn unmap(&mut self, held: &mut [Held<'w>]) -> Result<(), Failure> {
        let slots = held.iter().map(|(slot, _)| *slot);
        let pages: u64 = slots.map(|slot| slot.pages).sum();
        let first = held[0].0.first;
        let range = layout::range(first, pages);
        if self.random.below(4) == 0 {
            let at = first + self.random.below(pages);
            let at = at / self.world.options.unit() * self.world.options.unit();
            self.cut(layout::iova(at))?;
        }
        held.iter().for_each(|(slot, _)| slot.step());
        match self.random.below(8) {
            0 => {
                self.world
                    .events
                    .note(self.actor, "unmaps, discarding", range);
                let done = self.stubbornly(|| self.world.space.unmap_discarding(range));
                done.map_err(|error| Failure::call("unmap_discarding", range, error))?;
                self.world.tally.add(Count::Discards, 1);
                // Discarded pages are never reported.
                self.world.copy_range(range);
            }
            1 if pages < 128 => {
                self.unmap_middle(first, pages)?;
                self.unmap_returning(range)?;
            }
            _ => self.unmap_returning(range)?,
        }
        for (slot, state) in held {
            slot.step();
            self.freeze(slot, state);
        }
        Ok(())
    }

    fn cut(&self, at: Iova) -> Result<(), Failure> {
        let page = IovaRange::granule_at(at, Granule::K4);
        self.world.events.note(self.actor, "cuts at", page);
        match self.stubbornly(|| self.world.space.cut(at)) {
            Ok(_) => self.world.tally.add(Count::Cuts, 1),
            // The domain with large leaves cannot split them.
            Err(Error::Source(_)) => self.world.tally.add(Count::CutsRefused, 1),
            Err(error) => return Err(Failure::call("cut", page, error)),
        }
        Ok(())
    }

    /// Replaces the areas of a range by the same areas without its middle, as one batch.
    fn unmap_middle(&mut self, first: u64, pages: u64) -> Result<(), Failure> {
        let unit = self.world.options.unit();
        let from = 1 + self.random.below(pages / unit - 2);
        let n = 1 + self.random.below(pages / unit - 1 - from);
        let (from, n) = (from * unit, n * unit);
        let middle = layout::range(first + from, n);
        let changes = [
            Change::Cut {
                at: layout::iova(first + from),
            },
            Change::Cut {
                at: layout::iova(first + from + n),
            },
            Change::Unmap { range: middle },
        ];
        self.apply("cuts out, discarding", middle, &changes)?;
        self.world.copy_range(middle);
        Ok(())
    }

    fn apply(
        &self,
        what: &'static str,
        range: IovaRange,
        changes: &[Change],
    ) -> Result<(), Failure> {
        self.world.events.note(self.actor, what, range);
        let applied = loop {
            if let Some(applied) = caught(|| self.world.space.apply(changes)) {
                break applied;
            }
            // If the undo panicked as well, the addresses of the map are still taken.
            for change in changes {
                if let Change::Map { range, .. } = change {
                    self.clear_away(*range)?;
                }
            }
            self.world.tally.add(Count::Panicked, 1);
        };
        applied.map_err(|error| Failure::call(what, range, error))?;
        self.world.tally.add(Count::Batches, 1);
        Ok(())
    }

    /// Unmaps, and copies the dirty pages.
    fn unmap_returning(&mut self, range: IovaRange) -> Result<(), Failure> {
        self.world.events.note(self.actor, "unmaps", range);
        let pages = (range.len() / u128::from(PAGE)) as u64;
        let words: Vec<AtomicU64> = (0..pages.div_ceil(64)).map(|_| AtomicU64::new(0)).collect();
        let sparse = SparseBitmap::new(pages);
        let kind = self.random.below(2);
        let (unmapped, view) = loop {
            let bitmap = match kind {
                0 => UserBitmap::sparse(&sparse),
                _ => UserBitmap::shared(&words),
            };
            match caught(|| self.world.space.unmap(range, Granule::K4, bitmap)) {
                Some(done) => break done,
                None => self.world.tally.add(Count::Panicked, 1),
            }
        }
        .map_err(|error| Failure::call("unmap", range, error))?;
        if unmapped.discarded_bytes != 0 {
            let error = format!("{} bytes discarded", unmapped.discarded_bytes);
            return Err(Failure::call("unmap", range, error));
        }
        self.world.tally.add(Count::Unmaps, unmapped.areas);
        self.world.copy_runs(view.runs());
        Ok(())
    }

    /// Maps one slot and unmaps another as one batch.
    fn swap(&mut self) -> Result<(), Failure> {
        let nth = self.random.below(SMALL as u64 - 1) as usize;
        let (Some(mut one), Some(mut two)) = (self.hold(nth), self.hold(nth + 1)) else {
            return Ok(());
        };
        let (goes, comes) = match (one.1.mapped, two.1.mapped) {
            (true, false) => (&mut one, &mut two),
            (false, true) => (&mut two, &mut one),
            _ => return Ok(()),
        };
        self.verify_frozen(comes.0, &comes.1)?;
        comes.0.step();
        goes.0.step();
        let changes = [
            Change::Map {
                range: comes.0.range(),
                backing: comes.0.first * PAGE,
                access: Access::ReadWrite,
            },
            Change::Unmap {
                range: goes.0.range(),
            },
        ];
        self.world
            .events
            .note(self.actor, "maps in a batch", comes.0.range());
        self.apply("swaps out, discarding", goes.0.range(), &changes)?;
        goes.0.step();
        comes.0.step();
        comes.1.mapped = true;
        self.world.tally.add(Count::Maps, 1);
        self.world.copy_range(goes.0.range());
        if self.world.options.panics {
            // As in `map`.
            self.world.copy_range(comes.0.range());
        }
        self.freeze(goes.0, &mut goes.1);
        Ok(())
    }

    /// Maps a range that is never written at the lowest free address, and unmaps it.
    fn anywhere(&mut self) -> Result<(), Failure> {
        let space = &self.world.space;
        let unit = self.world.options.unit();
        let pages = (1 + self.random.below(layout::SCRATCH)).next_multiple_of(unit);
        let backing = layout::PAGES * PAGE;
        let map = || space.map_anywhere(pages * PAGE, backing, Access::ReadWrite);
        let range = match caught(map) {
            Some(Ok(range)) => range,
            // The rest after a panic is unmapped at the end.
            Some(Err(Error::NoSpace { .. })) if self.world.options.panics => return Ok(()),
            Some(Err(error)) => {
                return Err(Failure::call("map_anywhere", layout::scratch(), error));
            }
            None => {
                self.world.tally.add(Count::Panicked, 1);
                return Ok(());
            }
        };
        self.world.events.note(self.actor, "maps anywhere", range);
        if !layout::scratch().covers(range) {
            let error = "it lies outside of what is allowed";
            return Err(Failure::call("map_anywhere", range, error));
        }
        let unmapped = self.stubbornly(|| space.unmap_discarding(range));
        unmapped.map_err(|error| Failure::call("unmap_discarding", range, error))?;
        self.world.tally.add(Count::Anywhere, 1);
        Ok(())
    }

    /// Stores the contents of the devices' lanes in a slot that was unmapped.
    fn freeze(&self, slot: &Slot, state: &mut SlotState) {
        state.mapped = false;
        let bytes = self.world.device_bytes();
        if bytes != 0 {
            for (page, lanes) in (slot.first..).zip(state.frozen.chunks_exact_mut(bytes)) {
                self.world.memory.read(page * PAGE, lanes).unwrap();
            }
        }
    }

    /// Checks that no device wrote to the slot since it was unmapped.
    fn verify_frozen(&self, slot: &Slot, state: &SlotState) -> Result<(), Failure> {
        let bytes = self.world.device_bytes();
        if bytes == 0 {
            return Ok(());
        }
        let mut now = vec![0; bytes];
        for (page, lanes) in (slot.first..).zip(state.frozen.chunks_exact(bytes)) {
            self.world.memory.read(page * PAGE, &mut now).unwrap();
            let pairs = now.chunks(LANE as usize).zip(lanes.chunks(LANE as usize));
            if let Some((lane, (new, old))) = pairs.enumerate().find(|(_, (new, old))| new != old) {
                let (new, old) = (writer::number(new).0, writer::number(old).0);
                let who = self.world.writer(lane);
                let what = format!(
                    "{who} changed memory that was unmapped: lane {lane} had write {old} after the \
                     unmap, now {new}"
                );
                return Err(Failure::new(what).at(page));
            }
        }
        Ok(())
    }
}
