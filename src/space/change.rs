//! Changes of the set of areas, one or many at a time, each one atomic step for readers.
//!
//! ```text
//!  plan        from one snapshot: which areas are touched, where they are cut, which pieces go
//!  claim       all touched areas, or none; hold their pairs to the end
//!  promise     the addresses of new areas: taken, though not in the tree yet
//!  fill        the new areas, in all domains            a source may fail up to `flush`: then
//!  split       leaves that span a cut                   new areas are emptied and flushed, and
//!  empty       what goes: end translations, owe,        the others stay in the tree; some may
//!              put dirty pages into the store           have lost their translations
//!  flush       once for everything
//!  publish     one edit of the tree: gone, cut and new areas, and the end of the promise
//!  collect     the dirty pages of what went
//! ```
//!
//! So a reader sees all of a batch or nothing. Devices see it earlier: they reach new areas before
//! these are in the tree, and lose the areas that go before these leave the tree. In between no
//! other call can map the addresses of either.
//!
//! # Cut
//! The pieces of an area share its marks, and its place in each source apart from the leaves that
//! are split: nothing dirty moves. The old area says that it was cut before the pieces are
//! published. So a mark by an old handle or snapshot, which lands in the shared marks, also looks
//! which parts have gone.

use std::convert::Infallible;

use super::AddressSpace;
use super::area::{Area, Pairs};
use super::domain::Attachment;
use super::emptying::Emptied;
use super::plan::{Change, Plan, Touched, check_new};
use crate::bitmap::Sink;
use crate::error::Error;
use crate::events;
use crate::failure::{Failure, attempt};
use crate::flush::{FlushGather, Ticket};
use crate::report::Unmapped;
use crate::sync::{Arc, MutexGuard, Ordering, Step, fence, lock, performs};
use crate::units::{Iova, IovaRange};

impl AddressSpace {
    /// Performs `changes` in order, as one atomic step: a reader sees all of them or none. So cuts
    /// and an unmap can replace the middle of an area, and areas can swap places, without a moment
    /// in which a harvest sees neither.
    ///
    /// The dirty pages of areas that are unmapped are **discarded**. A batch can neither cut nor
    /// unmap an area that it maps, and it cannot map addresses that it unmaps, because addresses
    /// become free only after the flush. The call waits for one flush if it unmaps or splits. While
    /// it maps, no domain is attached or detached.
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
    /// [`Error::Change`] with the first change that is refused, or that a source refuses, in the
    /// order that each change documents; [`Error::Busy`] if another call maps, unmaps or cuts one
    /// of the areas; the error of a source that cannot flush; [`Error::Change`] with a cut through
    /// the pages of a domain that was attached meanwhile. Then no area has changed. As
    /// [`map`](Self::map) and [`unmap_discarding`](Self::unmap_discarding) say for a failed flush,
    /// devices may no longer reach the areas to unmap, and the addresses to map may stay taken.
    ///
    /// A [panic](crate::DirtySource#panics) of a source has the same effects as an error, and the
    /// areas that the source was asked to unmap, or to split, count as dirty.
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

    /// Cuts the area that holds `at` in two; the upper part begins at `at`. Dirty pages stay dirty,
    /// each in its part. Returns whether there was something to cut: false if an area begins at
    /// `at`, or if no area holds it. [Handles](crate::AreaHandle) of the area continue to mark both
    /// parts.
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
    /// [`Error::UnalignedCut`] (multiples of [`alignment`](Self::alignment)); [`Error::Busy`] if
    /// another call maps, unmaps or cuts the area; then the error of a source that cannot split a
    /// leaf or flush; then [`Error::UnalignedCut`] again, if a domain with larger pages was
    /// attached meanwhile. Then the area stays whole. It also stays whole after a
    /// [panic](crate::DirtySource#panics) of a source, and all of it is dirty.
    pub fn cut(&self, at: Iova) -> Result<bool, Error> {
        self.retired.drop_all();
        let mut plan = Plan::default();
        plan.cut(0, at, &self.areas.snapshot(), self.page())?;
        self.execute(&plan, None).map_err(|error| match error {
            // The plan has only one change.
            Error::Change { error, .. } => *error,
            other => other,
        })?;
        let cut = !plan.touched.is_empty();
        if cut {
            events::cut(at);
        }
        Ok(cut)
    }

    /// Performs `plan`. Records the dirty pages of the areas that are unmapped in `record`, or
    /// discards them.
    pub(super) fn execute(
        &self,
        plan: &Plan,
        record: Option<&mut Sink<'_>>,
    ) -> Result<Unmapped, Error> {
        let mut claimed = Claimed::new(plan)?;
        if performs(Step::ClaimFence) {
            // SeqCst: F6 of the protocol in `attachment`, between the claim and the looks at the
            // put-back stores; pairs with F3 in `Marks::mark_inside`, for `put_back`. If F3 comes
            // first, we find the page in the store; if F6 comes first, `put_back` sees the claim
            // and marks the page.
            fence(Ordering::SeqCst);
        }
        let promised = self.promise(plan)?;
        // If any call in here panics, the claims and locks are released, and then the panic goes
        // on.
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

    /// The steps of [`execute`](Self::execute) that may fail after the addresses are promised.
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
            // Even if it is empty, it waits for a flush under way, which may cover the debt of an
            // earlier call.
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
        // Acquire: pairs with the Release fence in `LeafSink` and with `FlightSlot::free`. A
        // harvest that took a leaf before `empty_part` looked at it has published the rest in a
        // slot, which we see; or it has freed the slot, and we see the rest in the put-back store.
        fence(Ordering::Acquire);
        let mut moved = Vec::new();
        let published = self
            .record(plan, record.as_deref_mut(), &mut moved)
            .and_then(|()| self.publish(plan, claimed, promised));
        if let Err(error) = published {
            // The areas stay: a harvest of one domain finds there what it would have found.
            for (domain, runs) in moved {
                runs.iter().for_each(|run| domain.put_back.mark(*run));
            }
            return Err(error.into());
        }
        let unmapped = self.collect(plan, record);
        if unmapped.areas != 0 {
            // F2 of the marks' protocol: the copies come after it. They have the data of each
            // marker that found its mark set, or that marker sees the clear and marks again.
            self.ordering.before_copies(Step::UnmapFence);
        }
        Ok(unmapped)
    }

    /// Moves all dirty pages of the areas that are unmapped to the marks, and records them while
    /// everything can still be undone. Pages that come from domains are added to `moved`.
    fn record(
        &self,
        plan: &Plan,
        mut record: Option<&mut Sink<'_>>,
        moved: &mut Vec<(Arc<Attachment>, Vec<IovaRange>)>,
    ) -> Result<(), Error> {
        for (area, range) in plan.going() {
            self.mark_in_flight(area, range);
            moved.extend(self.mark_put_back(area, range));
            if let Some(sink) = record.as_deref_mut() {
                let recorded = area.marks().peek(range, sink);
                recorded.map_err(|stopped| stopped.error)?;
                self.record_members(area, range, sink)?;
            }
        }
        Ok(())
    }

    /// Takes the addresses of new areas, and returns them.
    fn promise(&self, plan: &Plan) -> Result<Vec<IovaRange>, Error> {
        let ranges: Vec<IovaRange> = plan.new.iter().map(|(_, area)| area.range()).collect();
        if !ranges.is_empty() {
            self.areas.update(|edit| {
                for (index, area) in &plan.new {
                    let range = area.range();
                    let existing = edit.first_intersecting(range).map(|entry| entry.range);
                    check_new(&area.mapping(), edit.rules(), existing, self.page())
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
    /// flushes, and releases their addresses. If devices may still reach them, areas without
    /// translations keep the addresses taken.
    fn break_promise(&self, plan: &Plan, promised: &[IovaRange], failure: Failure) -> Failure {
        if promised.is_empty() {
            return failure;
        }
        let new = || plan.new.iter().map(|(_, area)| area);
        let mut emptied = Emptied::default();
        for area in new() {
            let range = area.range();
            emptied.add(self.empty_part(range, false, &mut area.pairs()));
        }
        let flushed = self.settle(emptied);
        if flushed.is_ok() {
            // Devices may already have written there.
            for area in new() {
                let range = area.range();
                let _ = self.mark_put_back(area, range);
                self.count_discarded(area.marks().clear(range));
            }
        }
        let _: Result<(), Error> = self.areas.update(|edit| {
            edit.set_rules(edit.rules().end_promise(promised));
            if flushed.is_err() {
                for area in new() {
                    edit.insert(area.range(), Arc::clone(area))?;
                }
            }
            Ok(())
        });
        new().for_each(|area| area.go_live());
        match flushed {
            Err(panicked @ Failure::Panicked(_)) => failure.then(panicked),
            // The failure of the batch says more than the failure to undo it.
            Ok(()) | Err(Failure::Refused(_)) => failure,
        }
    }

    /// Fills the new areas into all domains. The list of domains does not change: `apply` holds its
    /// lock.
    fn fill_new(&self, plan: &Plan) -> Result<(), Failure> {
        if plan.new.is_empty() {
            return Ok(());
        }
        let domains = self.attachments();
        // Release: pairs with the Acquire fence in `look`, for `Recorder::looked`. A harvest that
        // takes a page which was written through a new area sees that the old area at its addresses
        // has gone: it left before these addresses were promised.
        fence(Ordering::Release);
        for (index, area) in &plan.new {
            for domain in domains.iter() {
                self.fill_pair(area, domain)
                    .map_err(|failure| failure.map_error(|error| in_change(*index, error)))?;
            }
        }
        Ok(())
    }

    /// Splits the leaves at all borders of pieces. Returns the ticket of the debt, if there is any;
    /// the debt is handed over in every case. If a source panics, all of its area counts as dirty,
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
                        let range = touched.area.range();
                        self.owe_all_of(&mut gather, range, domain);
                        unsure = Some((domain, range));
                    }
                }
            }
        }
        let ticket = (!gather.is_empty()).then(|| self.flush.owe(&gather));
        if let Some((domain, range)) = unsure {
            // After the debt was handed over.
            domain.put_back.mark(range);
        }
        outcome.map(|()| ticket)
    }

    /// Ends the translations of `range`: an area or, if `is_part`, a part of one; `pairs` are those
    /// of the area. Hands over the debt, and then puts the dirty pages into the put-back store of
    /// each domain.
    pub(super) fn empty_part(&self, range: IovaRange, is_part: bool, pairs: &mut Pairs) -> Emptied {
        let mut all = Emptied::default();
        let filled = pairs.get_or_insert_default();
        // All of them, even if some panic.
        let stays = |domain: &&Arc<Attachment>| {
            let emptied = self.empty(domain, range, &domain.put_back);
            let asked_again = emptied.panic.is_some();
            all.add(emptied);
            // The pair of a part stays, because it belongs to the whole area.
            is_part || asked_again
        };
        *filled = filled.iter().filter(stays).cloned().collect();
        all
    }

    /// Marks the ranges in flight in `area`, which is being unmapped: the rest of a leaf that a
    /// harvest is moving, and pages that are being written.
    fn mark_in_flight(&self, area: &Area, range: IovaRange) {
        if performs(Step::LookInFlight) {
            let done: Result<(), Infallible> = self.in_flight.visit(range, |part| {
                area.marks().mark(part);
                Ok(())
            });
            debug_assert!(done.is_ok());
        }
    }

    /// Moves the put-back pages of all domains to the marks of `area`. The area is being unmapped,
    /// and the caller holds its pairs. Returns the moved pages, for a caller whose area may stay.
    pub(super) fn mark_put_back(
        &self,
        area: &Area,
        range: IovaRange,
    ) -> Vec<(Arc<Attachment>, Vec<IovaRange>)> {
        let mut moved = Vec::new();
        for domain in self.attachments().iter() {
            let stored = domain.put_back.take_runs(range);
            stored.iter().for_each(|run| area.marks().mark(*run));
            if !stored.is_empty() {
                moved.push((Arc::clone(domain), stored));
            }
        }
        moved
    }

    /// Publishes the plan as the state of the tree, unless it would cut the pages of a domain that
    /// was attached meanwhile.
    fn publish(
        &self,
        plan: &Plan,
        claimed: &mut Claimed<'_>,
        promised: &[IovaRange],
    ) -> Result<(), Error> {
        let mut pieces = Vec::new();
        for (touched, pairs) in claimed.areas.iter().filter(|(t, _)| t.is_cut()) {
            for range in touched.pieces(false) {
                // Filled into the domains of the whole. A piece that goes is never in the tree, so
                // an attach that finds the pairs of the whole closed finds only the pieces that
                // stay.
                let filled = pairs.iter().flatten().cloned().collect();
                pieces.push(Arc::new(Area::piece(&touched.area, range, Some(filled))));
            }
            if performs(Step::GiveWay) {
                touched.area.give_way();
            }
        }
        self.past
            .record(plan.going().map(|(area, range)| area.part(range)));
        self.areas.update(|edit| {
            if performs(Step::CheckCutAgain) {
                plan.check_again(edit.rules(), self.page())
                    .map_err(|(index, error)| in_change(index, error))?;
            }
            for (touched, _) in &claimed.areas {
                edit.remove(touched.area.range().start());
            }
            for area in pieces.iter().chain(plan.new.iter().map(|(_, area)| area)) {
                edit.insert(area.range(), Arc::clone(area))?;
            }
            if !promised.is_empty() {
                edit.set_rules(edit.rules().end_promise(promised));
            }
            Ok::<(), Error>(())
        })?;
        // From here on nothing is undone.
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
                // After the area has left the tree: a thread that finds the pairs closed looks at
                // the tree again.
                **pairs = None;
            }
        }
        if performs(Step::GoneFence) {
            // SeqCst: F4 of the protocol in `unmap`, between the state and the look at the marks;
            // pairs with F3 in `Marks::mark_inside`. If F3 comes first, `collect` sees the mark and
            // counts it; if F4 comes first, the marker sees that the area has gone.
            fence(Ordering::SeqCst);
        }
        Ok(())
    }

    /// Takes the marks of the areas that were unmapped, and counts them.
    fn collect(&self, plan: &Plan, mut record: Option<&mut Sink<'_>>) -> Unmapped {
        let page = self.page();
        let (mut recorded, mut discarded) = (0u128, 0u128);
        let mut unmapped = Unmapped::default();
        for (area, range) in plan.going() {
            unmapped.areas += 1;
            unmapped.bytes += range.len();
            let whole = self.mark_pending(area, range);
            for part in whole.iter() {
                let _ = area.marks().clear(part);
                let done = record.as_deref_mut().map(|sink| sink.record(part).is_ok());
                let pages = if done == Some(true) {
                    &mut recorded
                } else {
                    &mut discarded
                };
                *pages += part.len() >> page.lg2();
            }
            let mut count = |start, mask: u64| {
                let done = match record.as_deref_mut() {
                    Some(sink) => sink.record_mask(start, page, mask).is_ok(),
                    None => false,
                };
                let pages = if done { &mut recorded } else { &mut discarded };
                *pages += u128::from(mask.count_ones());
            };
            for part in whole.without(range) {
                area.marks().take(part, &mut count);
            }
            self.late_pages(area, range, count);
        }
        unmapped.dirty_bytes = recorded << page.lg2();
        unmapped.discarded_bytes = discarded << page.lg2();
        self.counters.unmapped(unmapped.dirty_bytes);
        self.counters.discarded(unmapped.discarded_bytes);
        unmapped
    }
}

/// The areas of a plan, claimed, with their pairs held. If it is dropped before they are published,
/// it gives them back.
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
        // No deadlock: an attach or a detach takes one of these locks at a time, and a thread that
        // holds several has claimed the areas.
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
