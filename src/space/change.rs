//! Changes of which areas there are, one or many at a time, as one atomic step for readers.
//!
//! ```text
//!  plan        from one snapshot: which areas are touched, into which pieces they are cut, which of these go
//!  claim       all areas that are touched, or none; hold their pairs to the end
//!  promise     the addresses of new areas: taken, though not in the tree yet
//!  fill        the new areas, in all domains                 up to here, and in the next two lines, a source may refuse:
//!  split       leaves that lie across a cut                  then new areas are emptied and flushed, and all is as it was
//!  empty       what goes: end translations, owe, keep what was dirty
//!  flush       once for everything
//!  publish     one edit of the tree: gone, cut and new areas, and the promise kept
//!  collect     what was dirty in what went
//! ```
//!
//! So a reader sees all of a batch or nothing. Devices see it earlier in one way and later in none: they reach new areas
//! before these are in the tree, and what goes no longer when it leaves the tree. In between nobody else can map the
//! addresses of either.
//!
//! # Cut
//! The pieces of an area share its marks, and its place in each source but for the leaves:
//! nothing dirty moves. The old area says that it was cut before the pieces are published, so that
//! a mark by an old handle or snapshot, which lands in the shared marks, also asks what has gone of
//! them.

use std::convert::Infallible;

use super::area::{Area, Pairs};
use super::emptying::Emptied;
use super::plan::{Plan, Touched, check_new};
use super::{AddressSpace, Unmapped};
use crate::bitmap::Sink;
use crate::error::Error;
use crate::events;
use crate::failure::{Failure, attempt};
use crate::flush::{FlushGather, Ticket};
use crate::sync::{Arc, MutexGuard, Ordering, Step, fence, lock, performs};
use crate::units::{Access, Iova, IovaRange};

/// One change of a batch: see [`AddressSpace::apply`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// As [`AddressSpace::map`].
    Map {
        /// The device-visible addresses.
        range: IovaRange,
        /// Where the memory behind them begins.
        backing: u64,
        /// What devices may do.
        access: Access,
    },
    /// As [`AddressSpace::unmap_discarding`].
    Unmap {
        /// What to unmap: whole areas, or what the cuts before it in the batch made of them.
        range: IovaRange,
    },
    /// As [`AddressSpace::cut`].
    Cut {
        /// The first address of the right part.
        at: Iova,
    },
}

impl AddressSpace {
    /// Performs `changes` in order, as one atomic step: a reader sees all of them or none. So cuts and an unmap replace
    /// the middle of an area, and areas swap places without a moment in which a harvest sees neither.
    ///
    /// What was dirty in areas that are unmapped is **discarded**. An area that the batch maps it can neither cut nor
    /// unmap, nor can it map what it unmaps: addresses are free only after the flush. Waits for one flush if it unmaps
    /// or splits; domains neither come nor go meanwhile if it maps.
    ///
    /// ```
    /// # use dirtymap::{Access, AddressSpace, Change, Granule, ToIovaRange};
    /// # fn main() -> Result<(), dirtymap::Error> {
    /// # let space = AddressSpace::tracked(Granule::K4);
    /// # space.map(0..1 << 20, 0, Access::ReadWrite)?;
    /// // The middle goes, and other memory comes, in one step.
    /// let middle = (0x4000..0x8000).to_iova_range()?;
    /// space.apply(&[
    ///     Change::Cut { at: middle.start() },
    ///     Change::Cut { at: 0x8000.into() },
    ///     Change::Unmap { range: middle },
    /// ])?;
    /// assert_eq!(space.mappings().len(), 2);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`Error::Change`] with the first change that is refused or that a source refuses,
    /// in the order that each documents; [`Error::Busy`] if another call maps, unmaps or cuts one
    /// of the areas; that of a source that cannot flush; [`Error::Change`] with a cut through the
    /// pages of a domain that came meanwhile. Nothing is changed then, but as [`map`](Self::map)
    /// and [`unmap_discarding`](Self::unmap_discarding) say for a failed flush, devices may no
    /// longer reach what was to be unmapped, and what was to be mapped may stay taken.
    ///
    /// After a [panic](crate::DirtySource#panics) of a source all is as after an error, but that what
    /// it was asked to unmap, or to split, counts as dirty.
    pub fn apply(&self, changes: &[Change]) -> Result<Unmapped, Error> {
        self.retired.drop_all();
        let unmapped = self.apply_all(changes)?;
        events::batch(changes.len(), &unmapped);
        Ok(unmapped)
    }

    fn apply_all(&self, changes: &[Change]) -> Result<Unmapped, Error> {
        let maps = changes
            .iter()
            .any(|change| matches!(change, Change::Map { .. }));
        let _membership = maps.then(|| lock(&self.membership));
        let mut plan = Plan::default();
        {
            let snapshot = self.areas.snapshot();
            for (index, change) in changes.iter().enumerate() {
                plan.add(index, change, &snapshot, (self.page(), self.ordering))
                    .map_err(|error| in_change(index, error))?;
            }
        }
        self.execute(&plan, None)
    }

    /// Cuts the area that holds `at` in two, of which the right one begins there. What is dirty stays dirty, in the part
    /// that it is in. Returns whether there was something to cut: not where an area begins, or where there is none.
    /// [Handles](crate::AreaHandle) of the area go on to mark both.
    ///
    /// Waits for a flush if a source had to split leaves.
    ///
    /// ```
    /// # use dirtymap::{Access, AddressSpace, Granule};
    /// # fn main() -> Result<(), dirtymap::Error> {
    /// # let space = AddressSpace::tracked(Granule::K4);
    /// # space.map(0..1 << 20, 0, Access::ReadWrite)?;
    /// assert!(space.cut(0x8000.into())?);
    /// space.unmap_discarding(0x8000..1 << 20)?; // the right part
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`Error::UnalignedCut`] (multiples of [`alignment`](Self::alignment)),
    /// [`Error::Busy`] if another call maps, unmaps or cuts the area, then what a source says that
    /// cannot split a leaf or flush, then [`Error::UnalignedCut`] again, if a domain with larger
    /// pages came meanwhile. The area stays whole then, and
    /// after a [panic](crate::DirtySource#panics) of a source, which leaves all of the area dirty.
    pub fn cut(&self, at: Iova) -> Result<bool, Error> {
        self.retired.drop_all();
        let mut plan = Plan::default();
        plan.cut(0, at, &self.areas.snapshot(), self.page())?;
        self.execute(&plan, None).map_err(|error| match error {
            // There is only one.
            Error::Change { error, .. } => *error,
            other => other,
        })?;
        let cut = !plan.touched.is_empty();
        if cut {
            events::cut(at);
        }
        Ok(cut)
    }

    /// Performs `plan`; records what was dirty in what goes in `record`, or discards it.
    pub(super) fn execute(
        &self,
        plan: &Plan,
        record: Option<&mut Sink<'_>>,
    ) -> Result<Unmapped, Error> {
        let mut claimed = Claimed::new(plan)?;
        if performs(Step::GoneFence) {
            // SeqCst: F6 of the protocol in `attachment`; pairs with F3 in `Marks::mark_inside`, for `put_back`.
            fence(Ordering::SeqCst);
        }
        let promised = self.promise(plan)?;
        // A panic of whatever is called in here gives back what was taken, and goes on then.
        let done = attempt(|| self.perform(plan, &mut claimed, &promised, record));
        done.map_err(|failure| {
            let failure = match claimed.published {
                true => failure,
                false => self.break_promise(plan, &promised, failure),
            };
            drop(claimed);
            failure.raise()
        })
    }

    /// The steps of [`execute`](Self::execute) from the first one on that may fail.
    fn perform(
        &self,
        plan: &Plan,
        claimed: &mut Claimed<'_>,
        promised: &[IovaRange],
        mut record: Option<&mut Sink<'_>>,
    ) -> Result<Unmapped, Failure> {
        self.fill_new(plan)?;
        let mut emptied = Emptied {
            ticket: self.split(claimed)?,
            panic: None,
        };
        if plan.going().next().is_some() {
            // Empty, too, it waits for a flush under way, which may cover what an earlier call owed.
            emptied.ticket = Some(self.flush.owe(&FlushGather::new()));
        }
        for (touched, pairs) in &mut claimed.areas {
            for range in touched.pieces(true) {
                emptied.add(self.empty_part(range, touched.is_cut(), pairs));
            }
        }
        if emptied.panic.is_some() || performs(Step::FlushBeforeReuse) {
            self.settle(emptied)?;
        }
        // Acquire: pairs with the Release fence in `LeafSink` and with `Slot::free`; whatever took a leaf before `empty_part`
        // looked at it has said so in a slot, or has kept the rest.
        fence(Ordering::Acquire);
        for (area, range) in plan.going() {
            self.mark_in_flight(area, range);
            self.mark_kept(area, range);
            if let Some(sink) = record.as_deref_mut() {
                // Recorded while everything can still be taken back.
                let recorded = area.marks.peek(range, sink);
                recorded.map_err(|stopped| stopped.error)?;
            }
        }
        self.publish(plan, claimed, promised)?;
        let unmapped = self.collect(plan, record);
        if unmapped.areas != 0 {
            // F2 of the marks' protocol: who marked without a write to the mark is seen by the copies.
            self.ordering.before_copies();
        }
        Ok(unmapped)
    }

    /// Takes the addresses of new areas, and says which.
    fn promise(&self, plan: &Plan) -> Result<Vec<IovaRange>, Error> {
        let ranges: Vec<IovaRange> = plan
            .new
            .iter()
            .map(|(_, area)| area.mapping.range)
            .collect();
        if !ranges.is_empty() {
            self.areas.update(|edit| {
                for (index, area) in &plan.new {
                    let range = area.mapping.range;
                    let existing = edit.first_intersecting(range).map(|entry| entry.range);
                    check_new(&area.mapping, edit.rules(), existing, self.page())
                        .map_err(|error| in_change(*index, error))?;
                    // Sources are filled next, before the area is in the tree.
                    area.born_with(edit.version());
                }
                edit.set_rules(edit.rules().promise(&ranges));
                Ok::<(), Error>(())
            })?;
        }
        Ok(ranges)
    }

    /// Undoes a batch that ended in `failure` before it was published: empties the new areas,
    /// flushes, and gives their addresses free. If devices may still reach them, the addresses stay
    /// taken: by areas without translations.
    fn break_promise(&self, plan: &Plan, promised: &[IovaRange], failure: Failure) -> Failure {
        if promised.is_empty() {
            return failure;
        }
        let new = || plan.new.iter().map(|(_, area)| area);
        let mut emptied = Emptied::default();
        for area in new() {
            let range = area.mapping.range;
            emptied.add(self.empty_part(range, false, &mut area.pairs()));
        }
        let flushed = self.settle(emptied);
        if flushed.is_ok() {
            // Devices may have written there already.
            for area in new() {
                let range = area.mapping.range;
                self.mark_kept(area, range);
                self.discard(area.marks.clear(range));
            }
        }
        let _: Result<(), Error> = self.areas.update(|edit| {
            edit.set_rules(edit.rules().keep_promise(promised));
            if flushed.is_err() {
                for area in new() {
                    edit.insert(area.mapping.range, area)?;
                }
            }
            Ok(())
        });
        new().for_each(|area| area.go_live());
        match flushed {
            Err(panicked @ Failure::Panicked(_)) => failure.then(panicked),
            // What made the batch fail says more than that its undoing has failed.
            Ok(()) | Err(Failure::Refused(_)) => failure,
        }
    }

    /// Fills the new areas in all domains. The domains stay the same: `apply` holds the lock of their coming and going.
    fn fill_new(&self, plan: &Plan) -> Result<(), Failure> {
        if plan.new.is_empty() {
            return Ok(());
        }
        let domains = self.attachments();
        for (index, area) in &plan.new {
            for domain in domains.iter() {
                self.fill_pair(area, domain)
                    .map_err(|failure| failure.map_error(|error| in_change(*index, error)))?;
            }
        }
        Ok(())
    }

    /// Splits the leaves at all borders of pieces. Returns the ticket of what that owes, if it owes
    /// anything; it is owed whatever the outcome. All of an area whose source panics is dirty then,
    /// as after an unmap that panics.
    fn split(&self, claimed: &Claimed<'_>) -> Result<Option<Ticket>, Failure> {
        let mut gather = FlushGather::new();
        let mut outcome = Ok(());
        let mut unsure = None;
        for (touched, pairs) in &claimed.areas {
            for (border, domain) in touched.pieces.keys().skip(1).flat_map(|border| {
                let domains = pairs.iter().flatten();
                domains.map(move |domain| (*border, domain))
            }) {
                if outcome.is_ok() {
                    outcome = attempt(|| domain.source.split_at(border, &mut gather));
                    if matches!(outcome, Err(Failure::Panicked(_))) {
                        let range = touched.area.mapping.range;
                        self.owe_all_of(&mut gather, range, domain);
                        unsure = Some((domain, range));
                    }
                }
            }
        }
        let ticket = (!gather.is_empty()).then(|| self.flush.owe(&gather));
        if let Some((domain, range)) = unsure {
            // Behind the debt.
            domain.kept.mark(range);
        }
        outcome.map(|()| ticket)
    }

    /// Ends the translations of `range`, an area or, if `is_part`, a part of one whose pairs these are. What was dirty is
    /// kept for its domain, behind the debt.
    pub(super) fn empty_part(&self, range: IovaRange, is_part: bool, pairs: &mut Pairs) -> Emptied {
        let mut all = Emptied::default();
        let filled = pairs.get_or_insert_default();
        // All of them, whichever panic.
        filled.retain(|domain| {
            let emptied = self.empty(domain, range, &domain.kept);
            let asked_again = emptied.panic.is_some();
            all.add(emptied);
            // Of a part the pair stays: it is that of the whole area.
            is_part || asked_again
        });
        all
    }

    /// Marks what is in flight in `area`, which is going: the rest of a leaf that a harvest is moving, and pages that are
    /// being written.
    fn mark_in_flight(&self, area: &Area, range: IovaRange) {
        if performs(Step::LookInFlight) {
            let done: Result<(), Infallible> = self.in_flight.visit(range, |part| {
                area.marks.mark(part);
                Ok(())
            });
            debug_assert!(done.is_ok());
        }
    }

    /// Moves what is kept for all domains to the marks of `area`, which is going and whose pairs are held.
    pub(super) fn mark_kept(&self, area: &Area, range: IovaRange) {
        for domain in self.attachments().iter() {
            let kept = domain.kept.take_runs(range);
            kept.into_iter().for_each(|run| area.marks.mark(run));
        }
    }

    /// Makes the plan the state of the tree, unless a domain has come whose pages it would cut.
    fn publish(
        &self,
        plan: &Plan,
        claimed: &mut Claimed<'_>,
        promised: &[IovaRange],
    ) -> Result<(), Error> {
        let mut pieces = Vec::new();
        for (touched, pairs) in claimed.areas.iter().filter(|(t, _)| t.is_cut()) {
            for range in touched.pieces(false) {
                // In the domains of the whole. What goes is in the tree at no time: an attach that
                // finds the whole closed finds what stays, and nothing else.
                let filled = pairs.iter().flatten().cloned().collect();
                pieces.push(Arc::new(touched.area.piece(range, Some(filled))));
            }
            if performs(Step::GiveWay) {
                touched.area.give_way();
            }
        }
        self.areas.update(|edit| {
            if performs(Step::CheckCutAgain) {
                plan.check_again(edit.rules(), self.page())
                    .map_err(|(index, error)| in_change(index, error))?;
            }
            for (touched, _) in &claimed.areas {
                edit.remove(touched.area.mapping.range.start());
            }
            for area in pieces.iter().chain(plan.new.iter().map(|(_, area)| area)) {
                edit.insert(area.mapping.range, area)?;
            }
            if !promised.is_empty() {
                edit.set_rules(edit.rules().keep_promise(promised));
            }
            Ok::<(), Error>(())
        })?;
        // What is published is not given back.
        claimed.published = true;
        plan.new.iter().for_each(|(_, area)| area.go_live());
        for (touched, pairs) in &mut claimed.areas {
            if touched.is_cut() {
                touched
                    .pieces(true)
                    .for_each(|range| touched.area.say_gone(range));
            } else {
                touched.area.retire();
            }
            if performs(Step::ClosePairs) {
                // After the area has left the tree: whoever finds them closed looks there again.
                **pairs = None;
            }
        }
        if performs(Step::GoneFence) {
            // SeqCst: F4 of the protocol in `unmap`; pairs with F3 in `Marks::mark_inside`.
            fence(Ordering::SeqCst);
        }
        Ok(())
    }

    /// Takes the marks of what went.
    fn collect(&self, plan: &Plan, mut record: Option<&mut Sink<'_>>) -> Unmapped {
        let page = self.page();
        let (mut recorded, mut discarded) = (0u64, 0u64);
        let mut unmapped = Unmapped::default();
        for (area, range) in plan.going() {
            unmapped.areas += 1;
            unmapped.bytes += range.len();
            area.marks.take(range, |start, mask| {
                let done = match record.as_deref_mut() {
                    Some(sink) => sink.record_mask(start, page, mask).is_ok(),
                    None => false,
                };
                let pages = if done { &mut recorded } else { &mut discarded };
                *pages += u64::from(mask.count_ones());
            });
        }
        unmapped.dirty_bytes = u128::from(recorded) << page.lg2();
        unmapped.discarded_bytes = u128::from(discarded) << page.lg2();
        self.counters.unmapped(unmapped.dirty_bytes);
        self.counters.discarded(unmapped.discarded_bytes);
        unmapped
    }
}

/// The areas of a plan, claimed and with their pairs held. Dropped before they are published, it gives them back.
struct Claimed<'p> {
    areas: Vec<(&'p Touched, MutexGuard<'p, Pairs>)>,
    published: bool,
}

impl<'p> Claimed<'p> {
    /// Claims all or none.
    fn new(plan: &'p Plan) -> Result<Self, Error> {
        let touched: Vec<&Touched> = plan.touched.values().collect();
        for (claimed, one) in touched.iter().enumerate() {
            if let Err(busy) = one.area.claim() {
                touched[..claimed].iter().for_each(|t| t.area.give_back());
                return Err(busy);
            }
        }
        // Attach and detach take one of these locks at a time, and whoever holds several has claimed the areas.
        let areas = touched.into_iter().map(|t| (t, t.area.pairs())).collect();
        Ok(Claimed {
            areas,
            published: false,
        })
    }
}

impl Drop for Claimed<'_> {
    fn drop(&mut self) {
        if !self.published {
            self.areas.iter().for_each(|(t, _)| t.area.give_back());
        }
    }
}

fn in_change(index: usize, error: Error) -> Error {
    Error::Change {
        index,
        error: Box::new(error),
    }
}
