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
//! The pieces of an area share its marks, and its place in each source but for the leaves: nothing dirty moves. The old
//! area knows its pieces from before they are published, so that a mark by an old handle or snapshot, which lands in the
//! shared marks, also asks the pieces whether they are still there.

use std::convert::Infallible;

use super::area::{Area, Pairs};
use super::plan::{Piece, Plan, Touched, check_new};
use super::{AddressSpace, Unmapped};
use crate::bitmap::Sink;
use crate::error::Error;
use crate::events;
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
    /// # Errors
    /// [`Error::Change`] with the first change that is refused or that a source refuses, in the order that each documents;
    /// [`Error::Busy`] if another call maps, unmaps or cuts one of the areas; that of a source that cannot flush. Nothing is
    /// changed then, but as [`map`](Self::map) and [`unmap_discarding`](Self::unmap_discarding) say for a failed
    /// flush, devices may no longer reach what was to be unmapped, and what was to be mapped may stay taken.
    pub fn apply(&self, changes: &[Change]) -> Result<Unmapped, Error> {
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
        let unmapped = self.execute(&plan, None)?;
        events::batch(changes.len(), &unmapped);
        Ok(unmapped)
    }

    /// Cuts the area that holds `at` in two, of which the right one begins there. What is dirty stays dirty, in the part
    /// that it is in. Returns whether there was something to cut: not where an area begins, or where there is none.
    /// [Handles](crate::AreaHandle) of the area go on to mark both.
    ///
    /// Waits for a flush if a source had to split leaves.
    ///
    /// # Errors
    /// [`Error::UnalignedCut`] (multiples of [`alignment`](Self::alignment)), [`Error::Busy`] if another call maps,
    /// unmaps or cuts the area, then what a source says that cannot split a leaf or flush. The area stays whole then.
    pub fn cut(&self, at: Iova) -> Result<bool, Error> {
        let mut plan = Plan::default();
        plan.cut(at, &self.areas.snapshot(), self.page())?;
        self.execute(&plan, None)?;
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
        mut record: Option<&mut Sink<'_>>,
    ) -> Result<Unmapped, Error> {
        let mut claimed = Claimed::new(plan)?;
        if performs(Step::GoneFence) {
            // SeqCst: F6 of the protocol in `attachment`; pairs with F3 in `Marks::mark_inside`, for `put_back`.
            fence(Ordering::SeqCst);
        }
        let mut promised = self.promise(plan)?;
        self.fill_new(plan)?;
        let mut ticket = self.split(&claimed)?;
        if plan.going().next().is_some() {
            // Empty, too, it waits for a flush under way, which may cover what an earlier call owed.
            ticket = Some(self.flush.owe(&FlushGather::new()));
        }
        for (touched, pairs) in &mut claimed.areas {
            for piece in touched.pieces.iter().filter(|piece| piece.goes) {
                ticket = self
                    .empty_part(piece.range, touched.is_cut(), pairs)
                    .or(ticket);
            }
        }
        if let Some(ticket) = ticket
            && performs(Step::FlushBeforeReuse)
        {
            self.flush_until(ticket)?;
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
        self.publish(plan, &mut claimed, &mut promised)?;
        let unmapped = self.collect(plan, record);
        if unmapped.areas != 0 {
            // F2 of the marks' protocol: who marked without a write to the mark is seen by the copies.
            self.ordering.before_copies();
        }
        Ok(unmapped)
    }

    /// Takes the addresses of new areas.
    fn promise<'a>(&'a self, plan: &'a Plan) -> Result<Promised<'a>, Error> {
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
        Ok(Promised {
            space: self,
            plan,
            ranges,
        })
    }

    /// Fills the new areas in all domains. The domains stay the same: `apply` holds the lock of their coming and going.
    fn fill_new(&self, plan: &Plan) -> Result<(), Error> {
        if plan.new.is_empty() {
            return Ok(());
        }
        let domains = self.attachments();
        for (index, area) in &plan.new {
            for domain in domains.iter() {
                self.fill_pair(area, domain)
                    .map_err(|error| in_change(*index, error))?;
            }
        }
        Ok(())
    }

    /// Splits the leaves at all borders of pieces. Returns the ticket of what that owes, if it owes anything.
    fn split(&self, claimed: &Claimed<'_>) -> Result<Option<Ticket>, Error> {
        let mut gather = FlushGather::new();
        let mut outcome = Ok(());
        for (touched, pairs) in &claimed.areas {
            for (border, domain) in touched.pieces[1..].iter().flat_map(|piece| {
                let domains = pairs.iter().flatten();
                domains.map(|domain| (piece.range.start(), domain))
            }) {
                if outcome.is_ok() {
                    outcome = domain.source.split_at(border, &mut gather);
                }
            }
        }
        let ticket = (!gather.is_empty()).then(|| self.flush.owe(&gather));
        outcome.map(|()| ticket)
    }

    /// Ends the translations of `range`, an area or, if `is_part`, a part of one whose pairs these are. What was dirty is
    /// kept for its domain, behind the debt. Returns the ticket of that debt, if there is one.
    pub(super) fn empty_part(
        &self,
        range: IovaRange,
        is_part: bool,
        pairs: &mut Pairs,
    ) -> Option<Ticket> {
        let mut ticket = None;
        let filled = pairs.get_or_insert_default();
        for domain in filled.iter() {
            ticket = Some(self.empty(domain, range, &domain.kept));
        }
        if !is_part {
            // Only now: a source that panics is asked again.
            filled.clear();
        }
        ticket
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

    /// Makes the plan the state of the tree.
    fn publish(
        &self,
        plan: &Plan,
        claimed: &mut Claimed<'_>,
        promised: &mut Promised<'_>,
    ) -> Result<(), Error> {
        let mut cut = Vec::new();
        for (touched, pairs) in &claimed.areas {
            let filled = || pairs.iter().flatten().cloned().collect();
            let piece = |piece: &Piece| {
                // What goes is closed from the start: an attach that saw the whole area comes to its pieces.
                let closed = piece.goes && performs(Step::ClosePieces);
                let pairs = (!closed).then(filled);
                Arc::new(touched.area.piece(piece.range, pairs))
            };
            let pieces: Vec<_> = if touched.is_cut() {
                touched.pieces.iter().map(piece).collect()
            } else {
                Vec::new()
            };
            if touched.is_cut() && performs(Step::GiveWay) {
                touched.area.give_way(pieces.clone());
            }
            cut.push(pieces);
        }
        self.areas.update(|edit| {
            for ((touched, _), pieces) in claimed.areas.iter().zip(&cut) {
                edit.remove(touched.area.mapping.range.start());
                for (piece, area) in touched.pieces.iter().zip(pieces) {
                    if !piece.goes {
                        edit.insert(piece.range, area)?;
                    }
                }
            }
            for (_, area) in &plan.new {
                edit.insert(area.mapping.range, area)?;
            }
            if !promised.ranges.is_empty() {
                edit.set_rules(edit.rules().keep_promise(&promised.ranges));
            }
            Ok::<(), Error>(())
        })?;
        promised.ranges.clear();
        plan.new.iter().for_each(|(_, area)| area.go_live());
        for ((touched, pairs), pieces) in claimed.areas.iter_mut().zip(cut) {
            if touched.is_cut() {
                for (piece, area) in touched.pieces.iter().zip(&pieces) {
                    if piece.goes {
                        area.retire();
                    }
                }
            } else {
                touched.area.retire();
            }
            if performs(Step::ClosePairs) {
                **pairs = None;
            }
        }
        claimed.published = true;
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

/// Addresses that are promised to the new areas of a plan. Dropped before these are published, it empties them, flushes,
/// and gives the addresses free.
struct Promised<'a> {
    space: &'a AddressSpace,
    plan: &'a Plan,
    /// Empty when the promise was kept.
    ranges: Vec<IovaRange>,
}

impl Drop for Promised<'_> {
    fn drop(&mut self) {
        if self.ranges.is_empty() {
            return;
        }
        let new = || self.plan.new.iter().map(|(_, area)| area);
        let mut ticket = None;
        for area in new() {
            let range = area.mapping.range;
            ticket = self
                .space
                .empty_part(range, false, &mut area.pairs())
                .or(ticket);
        }
        let flushed = match ticket {
            Some(ticket) => self.space.flush_until(ticket),
            None => Ok(()),
        };
        // If devices may still reach them, the addresses stay taken: by areas without translations.
        let _: Result<(), Error> = self.space.areas.update(|edit| {
            edit.set_rules(edit.rules().keep_promise(&self.ranges));
            if flushed.is_err() {
                for area in new() {
                    edit.insert(area.mapping.range, area)?;
                }
            }
            Ok(())
        });
        new().for_each(|area| area.go_live());
    }
}

fn in_change(index: usize, error: Error) -> Error {
    Error::Change {
        index,
        error: Box::new(error),
    }
}
