//! An actor that harvests random ranges and scopes, with every end that a lease can have. It copies
//! page by page.
//!
//! An abort reports whether some pages of the lease were unmapped meanwhile. No later harvest
//! reports these, and their memory is final, because the unmap has flushed. The harvester copies
//! them by its bitmap.

use std::sync::Arc;
use std::time::Duration;

use dirtymap::harvest::{Bounds, Synced};
use dirtymap::sync::{AtomicU64, leave_out, lock, thread};
use dirtymap::{Consumer, Error, Granule, HarvestRequest, Holes, Lease, Scope, Start, UserBitmap};

use super::book::Book;
use super::failure::Failure;
use super::layout::{self, PAGES};
use super::options::Sabotage;
use super::panics::caught;
use super::tally::Count;
use super::world::{World, name};
use crate::Random;

/// The end of a lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fate {
    /// Synced, copied, committed.
    Commit,
    /// Synced, copied in part, aborted.
    AbortSynced,
    /// Aborted before its flush.
    AbortOwed,
    /// Dropped before its flush.
    Drop,
    /// Synced, copied, forgotten.
    Forget,
}

/// How a consumer goes about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Rhythm {
    /// Without pauses.
    Restless,
    /// It takes its time between a harvest and the end of the lease.
    Holding,
    /// It comes rarely.
    Rare,
}

/// See the [module](self).
pub(super) struct Harvester<'w> {
    world: &'w World,
    actor: usize,
    /// For which consumer; 0 is the unnamed one.
    whose: usize,
    random: Random,
    words: Vec<AtomicU64>,
}

impl<'w> Harvester<'w> {
    pub(super) fn new(world: &'w World, nth: u32) -> Self {
        let others = world.options.mappers + world.options.attachers;
        Harvester {
            world,
            actor: (others + nth) as usize,
            whose: 0,
            random: world.random(3, nth.into()),
            words: Vec::new(),
        }
    }

    /// The one that harvests for the named consumer `whose`.
    pub(super) fn of_consumer(world: &'w World, whose: usize) -> Self {
        let nth = world.options.harvesters + whose as u32 - 1;
        Harvester {
            whose,
            ..Harvester::new(world, nth)
        }
    }

    /// The rhythm of the named consumers differs. All others are restless.
    fn rhythm(&self) -> Rhythm {
        match self.whose {
            0 => Rhythm::Restless,
            named => [Rhythm::Restless, Rhythm::Holding, Rhythm::Rare][(named - 1) % 3],
        }
    }

    /// The named consumer leaves, and comes back as a new one: it is told everything that is
    /// mapped, or copies it after the join, or is a copy of another one.
    fn come_back(&mut self) -> Result<(), Failure> {
        let world = self.world;
        let everything = dirtymap::IovaRange::ALL;
        world
            .events
            .note(self.actor, "leaves and comes back", everything);
        let mut place = lock(&world.consumers[self.whose - 1]);
        world.tally.add(Count::Joins, 1);
        loop {
            let kind = self.random.below(4);
            let other = 1 + self.random.below(world.consumers.len() as u64) as usize;
            let model = match world.consumer_if_free(other) {
                Some(model) if kind == 0 && other != self.whose => Some(model),
                _ => None,
            };
            let clean = kind < 2;
            let start = match &model {
                Some(model) => Start::LikeOf(model),
                None if clean => Start::Clean,
                None => Start::Dirty,
            };
            // The old one leaves when it is replaced, so the new one has another name.
            let name = format!("{} of {}", self.random.bits(), name(self.whose));
            match caught(|| Consumer::shared(Arc::clone(&world.space), &name, start)) {
                Some(Ok(consumer)) => {
                    *lock(&world.books[self.whose - 1]) = Book::default();
                    *place = Arc::new(consumer);
                }
                // The other one has a lease most of the time.
                Some(Err(Error::ConsumerBusy { .. })) if model.is_some() => continue,
                Some(Err(error)) => return Err(Failure::call("join", everything, error)),
                None => {
                    world.tally.add(Count::Panicked, 1);
                    continue;
                }
            }
            if model.is_some() {
                world.tally.add(Count::Copied, 1);
                world.copy_of(other, self.whose, layout::slot(0).0);
            }
            // What was unmapped while there was no consumer is told by nobody.
            let clean = clean && model.is_none();
            let first = if clean { 0 } else { layout::slot(0).0 };
            world.copy_for(self.whose, layout::range(first, PAGES - first));
            return Ok(());
        }
    }

    pub(super) fn run(mut self) -> Result<(), Failure> {
        leave_out(self.world.options.left_out());
        while self.world.control.goes_on(|| ()) {
            if self.whose != 0 && self.random.below(64) == 0 {
                self.come_back()?;
            }
            if self.rhythm() == Rhythm::Rare {
                thread::sleep(Duration::from_millis(self.random.below(40)));
            }
            self.epochs()?;
            let request = self.request();
            if self.random.below(16) == 0 {
                self.peek(&request)?;
            }
            let fate = match self.random.below(8) {
                0 => Fate::AbortSynced,
                1 => Fate::AbortOwed,
                2 => Fate::Drop,
                3 if self.world.options.forget && self.random.below(64) == 0 => Fate::Forget,
                _ => Fate::Commit,
            };
            let bits = match self.random.below(4) {
                0 => 1 + self.random.below(200),
                _ => u64::MAX,
            };
            self.round(&request, fate, bits)?;
        }
        Ok(())
    }

    /// A range, a granule and a scope.
    fn request(&mut self) -> HarvestRequest<'static> {
        let random = &mut self.random;
        let trims = u64::from(self.world.options.discarders != 0);
        let (first, pages) = match random.below(4 + 2 * trims) {
            // A slot, or a part of it with parts of its neighbours.
            0 => {
                let (first, pages) =
                    layout::slot(random.below((layout::SMALL + layout::LARGE) as u64) as usize);
                (first, random.below(3) * pages / 2 + pages)
            }
            // A part of a permanent area, which cuts through leaves.
            1 => {
                let (first, pages) = layout::STATIC[random.below(3) as usize];
                let from = random.below(pages);
                (first + from, 1 + random.below(pages - from))
            }
            // The two areas that touch.
            2 => (0, layout::STATIC[0].1 + layout::STATIC[1].1),
            3 => (layout::slot(0).0, PAGES),
            // A part of the pages that are discarded.
            _ => {
                let (first, pages) = layout::TRIMMED;
                let from = random.below(pages);
                (first + from, 1 + random.below(pages - from))
            }
        };
        let pages = pages.min(PAGES - first);
        let unit = self.world.options.unit();
        let (first, end) = (first / unit * unit, (first + pages).next_multiple_of(unit));
        let pages = end - first;
        let lg2 = match random.below(4) {
            0 => 11,
            1 if first % 4 == 0 && pages.is_multiple_of(4) => 14,
            _ => 12,
        };
        let granule = Granule::from_lg2(lg2).unwrap();
        let scope = match random.below(3) {
            0 => Scope::Domain(self.world.ids[random.below(self.world.ids.len() as u64) as usize]),
            _ => Scope::All,
        };
        let holes = match random.below(2) {
            0 => Holes::Skip,
            _ => Holes::Stop,
        };
        HarvestRequest::new(layout::range(first, pages), granule)
            .in_scope(scope)
            .holes(holes)
    }

    fn clear_words(&mut self, request: &HarvestRequest<'_>) {
        let bits = request.range().granules(request.granule()) as usize;
        self.words.clear();
        self.words
            .resize_with(bits.div_ceil(64), || AtomicU64::new(0));
    }

    fn peek(&mut self, request: &HarvestRequest<'_>) -> Result<(), Failure> {
        self.clear_words(request);
        self.world.tally.add(Count::Peeks, 1);
        let space = &self.world.space;
        let consumer = self.world.consumer(self.whose);
        let peek = || match &consumer {
            None => space.peek(request, UserBitmap::shared(&self.words)),
            Some(consumer) => consumer.peek(request, UserBitmap::shared(&self.words)),
        };
        match caught(peek) {
            Some(Ok(_) | Err(Error::Hole { .. })) => Ok(()),
            Some(Err(error)) => Err(Failure::call("peek", request.range(), error)),
            None => {
                self.world.tally.add(Count::Panicked, 1);
                Ok(())
            }
        }
    }

    /// One harvest, and the end of its lease. Returns the number of bits that it set.
    ///
    /// The approximate bound of bits.
    pub(super) fn round(
        &mut self,
        request: &HarvestRequest<'_>,
        fate: Fate,
        bits: u64,
    ) -> Result<u64, Failure> {
        let range = request.range();
        let (world, tally) = (self.world, &self.world.tally);
        let sabotage = world.options.sabotage;
        self.clear_words(request);
        let bitmap = || UserBitmap::shared(&self.words);
        let failed = |what: &str, error: &Error| Failure::call(what, range, error);
        let view = bitmap().view(range, request.granule());
        let view = view.map_err(|error| failed("view", &error.into()))?;
        world.events.note(self.actor, text(request, fate), range);
        tally.add(Count::Harvests, 1);
        // A drop does not say what was outside: all of it may have been.
        let whose = self.whose;
        let copy =
            |runs: dirtymap::bitmap::Runs<'_>| runs.for_each(|run| world.copy_for(whose, run));
        let dropped = |view: dirtymap::BitmapView<'_>| {
            if layout::slot(0).0 <= *layout::pages_of(range).end() {
                tally.add(Count::OutsideAborts, 1);
                copy(view.runs());
            }
        };
        let consumer = world.consumer(whose);
        let mut asked = *request;
        if fate != Fate::Forget && bits != u64::MAX {
            tally.add(Count::Bounded, 1);
            asked = asked.max_bits(bits);
        }
        let harvest = || match &consumer {
            None => world.space.harvest(&asked, bitmap()),
            Some(consumer) => consumer.harvest(&asked, bitmap()),
        };
        let Some(harvested) = caught(harvest) else {
            tally.add(Count::Panicked, 1);
            dropped(view);
            return Ok(1);
        };
        let lease = harvested.map_err(|error| failed("harvest", &error))?;
        let lease = match lease.stopped().map(|stopped| &stopped.error) {
            None => lease,
            Some(Error::Hole { .. }) => {
                tally.add(Count::Holes, 1);
                lease.partial()
            }
            Some(error) => return Err(failed("harvest", error)),
        };
        let bits = lease.report().bits_set;
        if self.rhythm() == Rhythm::Holding && self.random.below(4) == 0 {
            thread::sleep(Duration::from_micros(self.random.below(4000)));
        }
        if fate == Fate::Drop && sabotage == Some(Sabotage::ForgetLease) {
            std::mem::forget(lease);
            return Ok(bits);
        }
        if fate != Fate::Commit && sabotage == Some(Sabotage::ForgetAbort) {
            let _ = lease
                .sync()
                .map_err(|error| failed("sync", &error))?
                .commit();
            return Ok(bits);
        }
        let outside = match fate {
            Fate::Drop => {
                drop(lease);
                tally.add(Count::Drops, 1);
                // A drop does not report pages outside, so all of them may have been.
                layout::slot(0).0 <= *layout::pages_of(range).end()
            }
            Fate::AbortOwed => {
                tally.add(Count::Aborts, 1);
                lease.abort().outside_bytes != 0
            }
            Fate::Commit | Fate::AbortSynced | Fate::Forget => {
                let early = sabotage == Some(Sabotage::CopyBeforeSync);
                if early {
                    copy(view.runs());
                }
                let Some(lease) = caught(|| lease.sync()) else {
                    // The panic dropped it.
                    tally.add(Count::Panicked, 1);
                    dropped(view);
                    return Ok(1);
                };
                let lease = lease.map_err(|error| failed("sync", &error))?;
                if fate != Fate::AbortSynced {
                    if !early {
                        world.copy_lease(whose, &lease);
                    }
                    if fate == Fate::Forget {
                        tally.add(Count::Forgotten, 1);
                        tally.add(Count::ForgottenBytes, bits << request.granule().lg2());
                        std::mem::forget(lease);
                        return Ok(bits);
                    }
                    self.commit(lease)?;
                    tally.add(Count::Commits, 1);
                    return Ok(bits);
                }
                if let Some(run) = lease.runs().next() {
                    world.copy_for(whose, run);
                }
                tally.add(Count::Aborts, 1);
                lease.abort().outside_bytes != 0
            }
        };
        if outside {
            tally.add(Count::OutsideAborts, 1);
            copy(view.runs());
        }
        Ok(bits)
    }

    /// Commits a lease, of which a named consumer keeps the epoch.
    fn commit(&self, lease: Lease<'_, Synced>) -> Result<(), Failure> {
        let Some(book) = self.whose.checked_sub(1) else {
            lease.commit();
            return Ok(());
        };
        let runs: Vec<dirtymap::IovaRange> = lease.runs().collect();
        let mut book = lock(&self.world.books[book]);
        let (_, lineage) = lease.commit_epoch();
        book.committed(lineage, runs, self.world.options.panics)
    }

    /// Keeps, drops or asks for epochs, and changes the bounds.
    fn epochs(&mut self) -> Result<(), Failure> {
        let Some(consumer) = self.world.consumer(self.whose) else {
            return Ok(());
        };
        let (world, tally) = (self.world, &self.world.tally);
        let mut book = lock(&world.books[self.whose - 1]);
        match self.random.below(32) {
            0 => {
                book.keep(&consumer);
                tally.add(Count::Cursors, 1);
            }
            1 => book.release(self.random.bits()),
            2 | 3 => {
                book.check(&consumer, world.options.panics)?;
                tally.add(Count::Since, 1);
            }
            4 if world.options.bounds => {
                let bytes = [0, 4096, 1 << 30, 1 << 30][self.random.below(4) as usize];
                let age = [3, u64::MAX, u64::MAX][self.random.below(3) as usize];
                book.is_bounded = true;
                consumer.set_bounds(Bounds {
                    bytes,
                    age,
                    ..Bounds::default()
                });
            }
            _ => {}
        }
        Ok(())
    }

    /// Harvests everything that is mapped, and commits. Returns the number of set bits.
    pub(super) fn everything(&mut self, scope: Scope) -> Result<u64, Failure> {
        let mut bits = 0;
        let mut ranges: Vec<dirtymap::IovaRange> = Vec::new();
        for mapping in self.world.space.mappings() {
            let range = mapping.range;
            match ranges.last_mut() {
                Some(last) if last.last().checked_add(1) == Some(range.start()) => {
                    *last = dirtymap::IovaRange::new(last.start(), range.last()).unwrap();
                }
                _ => ranges.push(range),
            }
        }
        for range in ranges {
            let request = HarvestRequest::new(range, Granule::K4).in_scope(scope);
            bits += self.round(&request, Fate::Commit, u64::MAX)?;
        }
        Ok(bits)
    }

    /// The comparison, for the consumer `whose`.
    pub(super) fn of_comparison(world: &'w World, whose: usize) -> Self {
        let nth = world.options.harvesters + world.options.consumers;
        Harvester {
            whose,
            ..Harvester::new(world, nth)
        }
    }
}

fn text(request: &HarvestRequest<'_>, fate: Fate) -> &'static str {
    match (request.scope(), fate) {
        (Scope::All, Fate::Commit) => "harvests, to commit,",
        (Scope::All, Fate::AbortSynced) => "harvests, to abort after the sync,",
        (Scope::All, Fate::AbortOwed) => "harvests, to abort,",
        (Scope::All, Fate::Drop) => "harvests, to drop,",
        (_, Fate::Forget) => "harvests, to forget,",
        (Scope::Domain(_), Fate::Commit) => "harvests a domain, to commit,",
        (Scope::Domain(_), Fate::AbortSynced) => "harvests a domain, to abort after the sync,",
        (Scope::Domain(_), Fate::AbortOwed) => "harvests a domain, to abort,",
        (Scope::Domain(_), Fate::Drop) => "harvests a domain, to drop,",
    }
}
