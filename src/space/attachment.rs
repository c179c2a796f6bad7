//! Domains of an address space, and how they are attached and detached while everything else runs.
//!
//! The root of the area tree carries the list of attachments, with the areas and the rules. So one
//! snapshot has the areas and the domains of one moment.
//!
//! # Each pair once
//! A *pair* is an area and a domain. It is filled by the later of the two, map or attach:
//!
//! ```text
//!  map                                              attach
//!  publish the area; see the domains of that root   publish the domain; then list the areas
//!  for each domain: lock the area's pairs,          for each area: lock its pairs,
//!    fill it if it is not among them                  fill the domain if it is not among them
//! ```
//!
//! The publications of roots have one order. If the map comes first, the attach sees the area. If
//! the attach comes first, the map sees the domain. If both see the other, the lock decides which
//! of them fills the pair, and the list of pairs keeps the other one from filling it again.
//!
//! A **detach** first says that the domain is *leaving*, and then empties the pairs of all areas
//! that it sees. A map first publishes its area, and then looks whether the domain is leaving. This
//! is store buffering (Dekker), so each has a full fence between its two steps, F6 in the detach
//! and F7 in the map:
//! - if F7 comes first, the detach sees the area. The fill took the lock of the pairs earlier, and
//!   the detach empties the pair; or the fill takes the lock later, and finds the domain leaving.
//! - if F6 comes first, the map finds the domain leaving, and does not fill it.
//!
//! While a domain leaves, it stays in the list, so that every flush reaches it. It is removed after
//! a flush that covers all that was emptied. An **unmap** holds the pairs of its areas from the
//! first exchange to the end. A thread that waits for that lock finds the pairs closed, and looks
//! at the tree again: see [`pairs`](super::pairs).
//!
//! # The put-back store of a domain
//! It holds the pages that are dirty in the domain although the domain's table no longer says so:
//! an abort put them back, or an unmap moved them out of the table. Each domain has its own store,
//! keyed by address, so that a harvest of that domain alone finds its pages. When the domain or the
//! area goes, the pages in the store move to the marks of the area. An abort races with that move,
//! which is store buffering again:
//!
//! ```text
//!  put back                                         unmap, detach
//!  P1  mark the page in the put-back store of       U1  claim the area; say that the domain
//!      each domain of the lease                         is leaving
//!  F3  fence(SeqCst), in `Marks::mark`              F6  fence(SeqCst)
//!  P2  look whether area or domain are going;       U2  take the pages in the store, mark them
//!      if so, mark the page as well
//! ```
//!
//! - If F3 comes first, U2 takes the page.
//! - If F6 comes first, P2 sees that the area or the domain is going, and marks the page. The
//!   protocol of [`unmap`](super::unmap) says which thread counts that mark.
//!
//! If the page was in the store already, P1 is a load that finds it there before U2, which takes
//! it. A page that P1 stores after U2 may stay in the store, and is then dirty in the next area at
//! its address: a superset. The next area must not clear it, because a page in the store at the
//! addresses of that area may belong to it, from its publication on, or in a batch from the promise
//! of its addresses on.

use std::convert::Infallible;
use std::mem;

use super::domain::{Attachment, Attachments, Covered};
use super::emptying::Emptied;
use super::outside::Outside;
use super::retired::Source;
use super::switch::Switch;
use super::{AddressSpace, Area, Fault, FaultSource};
use crate::error::Error;
use crate::events;
use crate::failure::{Failure, attempt, call};
use crate::flush::{FlushCost, FlushGather};
use crate::marks::{FlightSlot, Marks};
use crate::source::{DirtySource, Tracking};
use crate::sync::{Arc, AtomicBool, Ordering, Step, fence, lock, performs};
use crate::units::{DomainId, Granule, IovaRange};

impl AddressSpace {
    /// Attaches a domain, such as that of an IOMMU. `source` is filled with all areas, those that
    /// exist and those that are mapped later; it tracks writes if the space does, and is harvested
    /// together with the others. The call may run while everything else does. A harvest includes
    /// the domain from its publication on; devices reach all areas when the call returns. Waits for
    /// other changes of the domains, and may wait for devices.
    ///
    /// [`alignment`](Self::alignment) grows to the smallest page of the source, if that is larger.
    ///
    /// What a source says that was written before it tracks is discarded: in a space that tracks,
    /// before the attach. Attach a log before its writers begin, or mark these pages yourself.
    ///
    /// ```
    /// # use dirtymap::{Access, AddressSpace, Granule, SharedLog};
    /// # use std::sync::Arc;
    /// # use std::sync::atomic::{AtomicU64, Ordering};
    /// # fn main() -> Result<(), dirtymap::Error> {
    /// # let space = AddressSpace::tracked(Granule::K4);
    /// # space.map(0..1 << 20, 0, Access::ReadWrite)?;
    /// let log: Arc<[AtomicU64]> = (0..4).map(|_| AtomicU64::new(0)).collect();
    /// let domain = space.attach(SharedLog::new(0..1 << 20, Granule::K4, Arc::clone(&log))?)?;
    /// log[0].fetch_or(1 << 3, Ordering::Release); // a device wrote page 3
    /// assert_eq!(space.rounds().domain(domain).next()?.commit().bits_set, 1);
    /// space.detach(domain)?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// In this order: [`Error::AttachedTwice`], as far as [`DirtySource::identity`] can tell;
    /// [`Error::CannotAttach`] with the first area that is not made of the domain's pages; then the
    /// error of the source, from the switch of tracking and then from an area. The source is then
    /// emptied again and not attached. If the source also fails to flush what it was filled with,
    /// it stays attached, without translations, until [`detach`](Self::detach) succeeds; its id is
    /// in [`domains`](Self::domains). A [panic](crate::DirtySource#panics) of the source has the
    /// same effects as an error.
    #[doc(alias = "IOMMU_HWPT_ALLOC")]
    #[doc(alias = "iopt_table_add_domain")]
    pub fn attach(&self, source: impl DirtySource + 'static) -> Result<DomainId, Error> {
        self.retired.drop_all();
        let source = Source::new(Box::new(source), self.retired.clone());
        let attached = attempt(|| {
            // Asked once, before any lock is taken.
            let asked = (source.page(), source.identity(), source.flush_cost());
            let _membership = lock(&self.membership);
            self.attach_source(source, asked)
        });
        attached.map_err(|failure| {
            // The refused source is dropped before the call returns.
            match call(|| self.retired.drop_all()) {
                Ok(()) => failure.raise(),
                Err(panic) => failure.then(Failure::Panicked(panic)).raise(),
            }
        })
    }

    /// The part of an attach that needs the lock of the domains.
    fn attach_source(
        &self,
        source: Source,
        (page, identity, cost): (Granule, Option<usize>, FlushCost),
    ) -> Result<DomainId, Failure> {
        let attached = self.attachments();
        let is_twin = |other: &&Arc<Attachment>| identity.is_some() && other.identity == identity;
        if let Some(twin) = attached.iter().find(is_twin) {
            return Err(Error::AttachedTwice { domain: twin.id }.into());
        }
        check_areas(
            self.areas.snapshot().iter(IovaRange::ALL).map(|e| e.area),
            page,
        )?;
        let id = self.next_domain();
        let attachment = Arc::new(Attachment {
            id,
            page,
            identity,
            cost,
            source,
            put_back: Marks::everywhere(self.page()),
            tracking: Switch::new(),
            leaving: AtomicBool::new(false),
        });
        let _restart = self.discards.restart();
        if self.tracks() {
            // Before the first page is mapped, so that no write is missed.
            attachment
                .switch(Tracking::On)
                .map_err(|failure| attachment.switch_back(failure))?;
        }
        let too_early = (!performs(Step::LookAfterPublish)).then(|| self.all_areas());
        let published = self.areas.update(|edit| {
            check_areas(edit.iter(IovaRange::ALL).map(|e| e.area), page)?;
            edit.set_rules(
                edit.rules()
                    .with_attachments(|all| all.push(Arc::clone(&attachment))),
            );
            Ok(())
        });
        if let Err(error) = published {
            return Err(attachment.switch_back(Failure::Refused(error)));
        }
        self.declare_cost();
        for area in too_early.unwrap_or_else(|| self.all_areas()) {
            if let Err(failure) = self.fill_pair(&area, &attachment) {
                // If that flush fails, its debt stays owed, and the domain stays attached, so that
                // it can be paid.
                return Err(match self.release(&attachment) {
                    Ok(()) => failure,
                    Err(another) => failure.then(another),
                });
            }
        }
        // What its devices wrote before may not be tracked.
        self.forget_zeros();
        events::attach(id, page);
        Ok(id)
    }

    /// Detaches a domain: empties it, flushes, and removes it from the space. No dirty page is
    /// lost: the pages that are dirty in the domain move to the marks of the areas, where harvests
    /// of all domains find them. If the domain does not track, each consumer begins a new chain of
    /// epochs, because writes of its devices are in no increment. A harvest that runs meanwhile may
    /// report all of an area. On return
    /// the devices of the domain no longer reach the memory, and only harvests that began before
    /// still use the source. Waits for the flush.
    ///
    /// # Errors
    /// [`Error::NotAttached`]; or the error of a source that cannot flush: then the domain stays
    /// attached without translations, and is not filled any more, until a repeated call succeeds.
    /// The same holds after a [panic](crate::DirtySource#panics) of the source, with the
    /// translations that the source may have left. A panic in the switch of tracking to off, the
    /// last step, leaves the domain detached.
    #[doc(alias = "iopt_table_remove_domain")]
    pub fn detach(&self, domain: DomainId) -> Result<(), Error> {
        self.retired.drop_all();
        {
            let _membership = lock(&self.membership);
            let attachment = Arc::clone(self.attachments().find(domain)?);
            self.release(&attachment).map_err(Failure::raise)?;
        }
        events::detach(domain);
        Ok(())
    }

    /// The attached domains, in the order in which they were attached.
    pub fn domains(&self) -> Vec<DomainId> {
        self.attachments().iter().map(|domain| domain.id).collect()
    }

    /// The steps of a detach after the domain was found.
    fn release(&self, attachment: &Arc<Attachment>) -> Result<(), Failure> {
        // Release: pairs with the Acquire in `is_leaving`.
        attachment.leaving.store(true, Ordering::Release);
        if performs(Step::LeaveFence) {
            // SeqCst: F6 of the module's protocols, between `leaving` and the looks at areas and
            // stores. Pairs with F3 in `Marks::mark_inside`, for `put_back`: if F3 comes first, we
            // take the page from the store; if F6 comes first, `put_back` marks it. Pairs with F7
            // in `AddressSpace::fill`: if F7 comes first, we see the area; if F6 comes first, the
            // map sees `leaving`.
            fence(Ordering::SeqCst);
        }
        let mut emptied = Emptied {
            ticket: Some(self.flush.owe(&FlushGather::new())),
            panic: None,
        };
        for area in self.all_areas() {
            emptied.add(self.empty_pair(&area, attachment));
        }
        self.settle(emptied)?;
        if !attachment.tracking.is_on() {
            // Its devices wrote what no trace tells of. Before it leaves the list: up to then no
            // page counts as zero.
            self.forget_zeros();
            self.members().restart_epochs();
        }
        let _: Result<(), Error> = self.areas.update(|edit| {
            let without = edit
                .rules()
                .with_attachments(|all| all.retain(|other| other.id != attachment.id));
            edit.set_rules(without);
            Ok(())
        });
        self.declare_cost();
        match attachment.switch(Tracking::Off) {
            Err(panicked @ Failure::Panicked(_)) => Err(panicked),
            // A source that cannot be switched off keeps tracking, which costs time and loses
            // nothing.
            Ok(_) | Err(Failure::Refused(_)) => Ok(()),
        }
    }

    /// Tells the flush queue the cost of an invalidation in all domains.
    fn declare_cost(&self) {
        let domains = self.attachments();
        let costs = domains.iter().map(|domain| domain.cost);
        self.flush
            .set_cost(costs.fold(FlushCost::default(), FlushCost::and));
    }

    /// Fills `area` into `attachment`, or the areas that are in its place, unless the pair is
    /// filled or the domain is leaving. If the source panics, the pair counts as filled, so that a
    /// later unmap or detach empties what the source may have mapped.
    pub(super) fn fill_pair(
        &self,
        area: &Area,
        attachment: &Arc<Attachment>,
    ) -> Result<(), Failure> {
        self.with_pairs(area, |area, filled| {
            let place = filled.binary_search_by_key(&attachment.id, |other| other.id);
            if (place.is_ok() && performs(Step::FillOnce))
                || (attachment.is_leaving() && performs(Step::RefuseLeaving))
            {
                return Ok(());
            }
            // The put-back store is not cleared here: the area is in the tree, so an abort may just
            // have put pages back.
            let mapped = attempt(|| attachment.source.map(&area.mapping()));
            if !matches!(mapped, Err(Failure::Refused(_))) {
                let at = place.unwrap_or_else(|at| at);
                change(filled, |list| list.insert(at, Arc::clone(attachment)));
            }
            mapped
        })
    }

    /// Empties `area`, or the areas that are in its place, in `attachment`. Dirty pages move to the
    /// area's marks, after their debt was handed over. If the source panics, the pair stays filled,
    /// so that the source is asked again.
    fn empty_pair(&self, area: &Area, attachment: &Arc<Attachment>) -> Emptied {
        let mut all = Emptied::default();
        let emptied: Result<(), Infallible> = self.with_pairs(area, |area, filled| {
            all.add(self.empty_open(area, filled, attachment));
            Ok(())
        });
        debug_assert!(emptied.is_ok());
        all
    }

    /// The same, for one area whose pairs the caller holds.
    fn empty_open(
        &self,
        area: &Area,
        filled: &mut Box<[Arc<Attachment>]>,
        attachment: &Arc<Attachment>,
    ) -> Emptied {
        let range = area.range();
        // The dirty pages of the table count as in flight until they are marked: a harvest that
        // runs meanwhile finds the whole area in flight.
        let _moving = Moving(performs(Step::DetachInFlight).then(|| self.in_flight.publish(range)));
        if performs(Step::DetachFence) {
            // Release: orders the slot before the changes of the table. Pairs with the Acquire
            // fence between tables and slots in `harvest::walk::look`. If that harvest reads the
            // table after such a change, it sees the slot or, after its end, the marks; if before,
            // it takes the page itself.
            fence(Ordering::Release);
        }
        let mut emptied = Emptied::default();
        if let Ok(at) = filled.binary_search_by_key(&attachment.id, |other| other.id) {
            emptied = self.empty(attachment, range, area.marks());
            if emptied.panic.is_none() {
                change(filled, |list| drop(list.remove(at)));
            }
        }
        // Mark before removing, so that a harvest past the slots still sees the pages. Mark again
        // afterwards, because an abort that found a page in the store already did nothing.
        for run in attachment.put_back.runs(range) {
            area.marks().mark(run);
        }
        if performs(Step::MarkHidden) {
            self.mark_hidden(area, range, &attachment.put_back);
        }
        if performs(Step::MovedFence) {
            // Release: orders these marks before the removal. Pairs with the Acquire fence between
            // the put-back stores and the marks in `harvest::walk::look`. If that harvest finds
            // the store empty, it sees the marks; if not, it takes the page from the store.
            fence(Ordering::Release);
        }
        for run in attachment.put_back.take_runs(range) {
            area.marks().mark(run);
        }
        emptied
    }

    /// Marks what a harvest hides in the put-back store of a domain that leaves. A harvest of
    /// another consumer that does not know the domain looks for hidden words in the marks alone.
    pub(crate) fn mark_hidden(&self, area: &Area, range: IovaRange, store: &Marks) {
        let mut hidden = Vec::new();
        // Acquire: pairs with the Release fence after a claim in `harvest::shared`. If the summary
        // was found clear because of that harvest, its claim, or the end of it, is seen.
        fence(Ordering::Acquire);
        self.visit_hidden(range, std::iter::once(store), &mut |start, mask| {
            store.add_runs(start, mask, &mut hidden);
        });
        // Acquire: pairs with the Release of the clear of a word, in `take::clear`. The removal of
        // the domain publishes it: a harvest that does not know the domain sees a page in flight,
        // or pending, if that page was found clear here.
        fence(Ordering::Acquire);
        hidden.into_iter().for_each(|run| area.marks().mark(run));
    }

    /// Makes `run`, of a lease over `covered`, dirty again: in the put-back store of each domain,
    /// and in the marks, as far as the lease covers them. The parts outside every area are counted,
    /// and recorded as a fault.
    ///
    /// Everything in the lease was taken when the tree had at most the version `taken`. So in an
    /// area that was mapped later, a page of the lease belonged to an earlier area at the same
    /// addresses, and is outside as well.
    ///
    /// At the addresses of an area that a batch is about to map, a source may already be filled,
    /// and the page may belong to the new area. So the page also goes to the put-back stores of the
    /// domains, where the new area has it. It still counts as outside, because it may belong to an
    /// area that is gone.
    ///
    /// In a space with consumers, the store of the lease's consumer takes the place of those of the
    /// domains, and of the marks. It is the store that the consumer has now: a younger lease may
    /// have taken what became pending as a whole when the store of this lease was dropped. The
    /// pages of a consumer that has left count as outside.
    pub(crate) fn put_back(&self, run: IovaRange, covered: &Covered, taken: u64) -> Outside {
        let own = covered.audience.own();
        let younger = own.and_then(|own| self.younger_store(own));
        let member = younger.as_ref().or(own);
        if member.is_some_and(|member| member.has_left()) {
            let mut outside = Outside::default();
            outside.add_range(run);
            return outside;
        }
        let store = |part| match member {
            Some(member) => member.put_back(part, &self.walks),
            None => {
                for domain in covered.domains() {
                    domain.put_back.mark(part);
                }
            }
        };
        // Before the look at the areas: a promise becomes an area in one step.
        for promised in self.snapshot().rules().promised_parts(run) {
            store(promised);
        }
        let outside = self.in_areas(run, |area, part| {
            let mut outside = Outside::default();
            if area.is_younger(taken) {
                outside.add_range(part);
                return outside;
            }
            store(part);
            // The store of a consumer stays where it is when a domain leaves.
            let leaving = || covered.domains().iter().any(|domain| domain.is_leaving());
            let going = area.is_going() || (member.is_none() && leaving());
            let marks = covered.marks && member.is_none();
            if marks || (going && performs(Step::MarkIfGoing)) {
                outside = area.mark(part);
            }
            outside
        });
        self.report(&outside, FaultSource::Abort);
        outside
    }

    /// The domains of this moment.
    pub(crate) fn attachments(&self) -> Attachments {
        self.areas.snapshot().rules().attachments().clone()
    }

    /// Every mapped range, and its backing address, starts and ends at a multiple of this many
    /// bytes: the largest of [`page`](Self::page) and the smallest pages of the attached domains.
    #[doc(alias = "iova_alignment")]
    pub fn alignment(&self) -> Granule {
        self.snapshot().alignment()
    }

    /// Records that an access of a device in `domain` to `range` was blocked, as the device or its
    /// driver reports.
    #[doc(alias = "report_iommu_fault")]
    pub fn report_fault(&self, domain: DomainId, range: IovaRange) {
        self.faults.record(Fault {
            at: range.start(),
            len: u64::try_from(range.len()).unwrap_or(u64::MAX),
            source: FaultSource::Device(domain),
        });
    }
}

/// Changes the list of the domains of an area.
fn change(filled: &mut Box<[Arc<Attachment>]>, change: impl FnOnce(&mut Vec<Arc<Attachment>>)) {
    let mut list = mem::take(filled).into_vec();
    change(&mut list);
    *filled = list.into_boxed_slice();
}

/// An area whose dirty pages are moving to the marks. Dropped after they have arrived, or when the
/// thread that moves them panics.
struct Moving<'s>(Option<&'s FlightSlot>);

impl Drop for Moving<'_> {
    fn drop(&mut self) {
        if let Some(slot) = self.0 {
            slot.free();
        }
    }
}

/// Refuses a domain whose smallest page is `page` if an area is not made of such pages.
fn check_areas<'a>(mut areas: impl Iterator<Item = &'a Area>, page: Granule) -> Result<(), Error> {
    let odd = |area: &&Area| {
        let mapping = area.mapping();
        !mapping.range.is_aligned(page) || mapping.backing & page.mask() != 0
    };
    match areas.find(odd) {
        Some(area) => Err(Error::CannotAttach {
            page,
            area: area.range(),
        }),
        None => Ok(()),
    }
}
