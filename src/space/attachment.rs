//! Domains of an address space, and how they come and go while everything runs.
//!
//! The list of attachments hangs on the root of the area tree, with the areas and the rules: one snapshot has areas and
//! domains of one moment.
//!
//! # Each pair once
//! A *pair* is an area and a domain. It is filled by whoever comes second:
//!
//! ```text
//!  map                                             attach
//!  publish the area; see the domains of that root   publish the domain; see the areas from then on
//!  for each domain: lock the area's pairs,          for each area: lock its pairs,
//!    fill it if it is not among them                  fill the domain if it is not among them
//! ```
//!
//! Publications of one root have an order. If the map comes first, the attach sees the area; if the attach does, the map
//! sees the domain. If both see the other, the lock decides, and the record keeps the second from filling again.
//!
//! A **detach** first says that the domain is *leaving*, and then empties the pairs of all areas
//! that it sees; a map publishes its area, and then looks whether the domain is leaving. Each has a
//! full fence between its two steps (F6, F7), so one of them sees the other. If the detach sees the
//! area, the fill either came before, and is emptied, or finds the domain leaving under the same
//! lock; else the map finds it leaving at once. While it leaves, the domain stays in the list, so
//! that every flush reaches it; it goes after a flush that covers all that was emptied. An
//! **unmap** holds the pairs of its areas from the first exchange to the end: whoever waits for the
//! lock finds them closed, and looks at the tree again: see [`pairs`](super::pairs).
//!
//! # What is kept for a domain
//! Pages of its that are dirty although its table no longer says so: put back by an abort, or moved out of the table by
//! an unmap. Each source has its own, so that a harvest of one domain finds them; they are keyed by address. When the
//! domain or the area goes, they move to the marks of the area:
//!
//! ```text
//!  put back                                         unmap, detach
//!  P1  keep the page for each domain of the lease   U1  claim the area; say that the domain is leaving
//!  F3  fence(SeqCst), in `Marks::mark`              F6  fence(SeqCst)
//!  P2  look whether area or domain are going;       U2  take what is kept, mark it
//!      if so, mark the page as well
//! ```
//!
//! If F3 comes first, U2 takes the page; otherwise P2 marks it, and what becomes of marks is the protocol of
//! [`unmap`](super::unmap). Where the page was kept already, P1 is a load that comes before U2, which takes it. A page that
//! P1 keeps after U2 may be kept on, and is dirty in the next area at its address: a superset. That area must not forget
//! it: from its publication on, what is kept there may be its own.

use std::convert::Infallible;

use super::emptying::Emptied;
use super::retired::Source;
use super::rules::{Attachments, Rules};
use super::tracking::Switch;
use super::{AddressSpace, Area, Fault, FaultSource, Outside};
use crate::error::Error;
use crate::events;
use crate::failure::{Failure, attempt, call};
use crate::flush::{FlushCost, FlushGather};
use crate::source::{DirtySource, Marks, Slot, Tracking};
use crate::sync::{Arc, AtomicBool, Ordering, Step, TINY, fence, lock, performs};
use crate::units::{DomainId, Granule, Iova, IovaRange};

/// A source that is attached to a space.
pub(crate) struct Attachment {
    pub(crate) id: DomainId,
    /// The smallest page of the source.
    pub(super) page: Granule,
    /// What the source said to [`DirtySource::identity`].
    identity: Option<usize>,
    /// What the source said to [`DirtySource::flush_cost`].
    cost: FlushCost,
    pub(crate) source: Source,
    /// Pages that are dirty in this domain though its table does not say so.
    pub(crate) kept: Marks,
    /// See [`tracking`](super::tracking).
    pub(super) tracking: Switch,
    leaving: AtomicBool,
}

impl Attachment {
    fn is_leaving(&self) -> bool {
        // Acquire: pairs with the Release in `detach`, directly, or through the lock of the pairs or the tree's root.
        self.leaving.load(Ordering::Acquire)
    }
}

impl std::fmt::Debug for Attachment {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.id)
    }
}

/// All addresses; few in the model checker, where a bitmap of them would be dozens of levels deep.
fn all_kept() -> IovaRange {
    if TINY {
        IovaRange::new(Iova::MIN, Iova::new(0x3_ffff)).unwrap_or(IovaRange::ALL)
    } else {
        IovaRange::ALL
    }
}

impl AddressSpace {
    /// Attaches a domain, such as that of an IOMMU: `source` is filled with the areas that are there and those to come,
    /// tracks if the space does, and is harvested with the others. May run while everything else does. A harvest sees
    /// the domain from its publication on, devices reach all areas when the call returns.
    ///
    /// [`alignment`](Self::alignment) grows to its smallest page, if that is larger.
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
    /// [`Error::CannotAttach`] with the first area that is not made of the domain's pages; what the
    /// source says to tracking, then to an area. The source is then emptied again and not attached;
    /// only if it also fails to flush what it had been filled with, it stays attached, without
    /// translations, until [`detach`](Self::detach) succeeds: its id is in
    /// [`domains`](Self::domains). After a [panic](crate::DirtySource#panics) of the source all is
    /// as after an error.
    pub fn attach(&self, source: impl DirtySource + 'static) -> Result<DomainId, Error> {
        self.retired.drop_all();
        let source = Source::new(Box::new(source), self.retired.clone());
        let attached = attempt(|| {
            // Asked before anything is locked, and once.
            let asked = (source.page(), source.identity(), source.flush_cost());
            let _membership = lock(&self.membership);
            self.attach_source(source, asked)
        });
        attached.map_err(|failure| {
            // The source that was refused is dropped before the call returns.
            match call(|| self.retired.drop_all()) {
                Ok(()) => failure.raise(),
                Err(panic) => failure.then(Failure::Panicked(panic)).raise(),
            }
        })
    }

    /// The part of an attach under the lock of the domains.
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
            kept: Marks::few(all_kept(), self.page()),
            tracking: Switch::new(),
            leaving: AtomicBool::new(false),
        });
        if self.tracks() {
            // Before the first page is mapped: no write goes unseen.
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
                // A flush that fails stays owed, and the domain stays, so that it can be paid.
                return Err(match self.release(&attachment) {
                    Ok(()) => failure,
                    Err(another) => failure.then(another),
                });
            }
        }
        events::attach(id, page);
        Ok(id)
    }

    /// Detaches a domain: empties it, flushes, and forgets it. Nothing is lost: what is dirty in it
    /// moves to the marks of the areas, where harvests of all domains find it; one that runs
    /// meanwhile may report all of an area. On return its devices no longer reach the memory, and
    /// nothing of the source is in use but by harvests that began before. Waits for the flush.
    ///
    /// # Errors
    /// [`Error::NotAttached`]. If a source cannot flush: its error; the domain then stays attached
    /// without translations, and is not filled any more, until a repeated call succeeds. So it does
    /// after a [panic](crate::DirtySource#panics), with what the source left of its translations;
    /// but for one in switching off, which comes last.
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

    /// The domains that are attached, in the order of their coming.
    pub fn domains(&self) -> Vec<DomainId> {
        self.attachments().iter().map(|domain| domain.id).collect()
    }

    /// The rest of a detach.
    fn release(&self, attachment: &Arc<Attachment>) -> Result<(), Failure> {
        // Release: pairs with the Acquire in `is_leaving`.
        attachment.leaving.store(true, Ordering::Release);
        if performs(Step::GoneFence) {
            // SeqCst: F6 of the module's protocol; pairs with F3 in `Marks::mark_inside`, for `put_back`, and with F7 in
            // `AddressSpace::fill`.
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
            // A source that cannot be switched off goes on, which only costs.
            Ok(_) | Err(Failure::Refused(_)) => Ok(()),
        }
    }

    /// Tells the flush queue what it costs to invalidate all domains.
    fn declare_cost(&self) {
        let domains = self.attachments();
        let costs = domains.iter().map(|domain| domain.cost);
        self.flush
            .set_cost(costs.fold(FlushCost::default(), FlushCost::and));
    }

    /// Fills `attachment` with `area`, or what has taken its place, unless it is filled, or one of the
    /// two is going. If the source panics, the pair counts as filled: what it has mapped is emptied
    /// as everything is.
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
            // What is kept at these addresses stays: the area is in the tree, so an abort may just
            // have put pages back.
            let mapped = attempt(|| attachment.source.map(&area.mapping));
            if !matches!(mapped, Err(Failure::Refused(_))) {
                let at = place.unwrap_or_else(|at| at);
                filled.insert(at, Arc::clone(attachment));
            }
            mapped
        })
    }

    /// Empties `attachment` of `area`, or of what has taken its place: what was dirty moves to the
    /// area's marks, after the debt. If the source panics, the pair stays filled, so that it is asked
    /// again.
    fn empty_pair(&self, area: &Area, attachment: &Arc<Attachment>) -> Emptied {
        let mut all = Emptied::default();
        let emptied: Result<(), Infallible> = self.with_pairs(area, |area, filled| {
            all.add(self.empty_open(area, filled, attachment));
            Ok(())
        });
        debug_assert!(emptied.is_ok());
        all
    }

    /// The same, of one area whose pairs are held.
    fn empty_open(
        &self,
        area: &Area,
        filled: &mut Vec<Arc<Attachment>>,
        attachment: &Arc<Attachment>,
    ) -> Emptied {
        let range = area.mapping.range;
        // What is dirty in the table is in flight until it is marked: a harvest that comes between
        // finds all of the area so.
        let _moving = Moving(performs(Step::DetachInFlight).then(|| self.in_flight.publish(range)));
        if performs(Step::DetachFence) {
            // Release: pairs with the Acquire fence between tables and slots in
            // `harvest::lease::take`.
            fence(Ordering::Release);
        }
        let mut emptied = Emptied::default();
        if let Ok(at) = filled.binary_search_by_key(&attachment.id, |other| other.id) {
            emptied = self.empty(attachment, range, &area.marks);
            if emptied.panic.is_none() {
                filled.remove(at);
            }
        }
        // What is kept is marked before it is taken, for harvests that have read the slots; and after
        // that, for aborts that found it kept already.
        for run in attachment.kept.runs(range) {
            area.marks.mark(run);
        }
        if performs(Step::DetachFence) {
            // Release: pairs with the Acquire fence between what is kept and the marks in
            // `harvest::lease::take`.
            fence(Ordering::Release);
        }
        for run in attachment.kept.take_runs(range) {
            area.marks.mark(run);
        }
        emptied
    }

    /// Makes `run`, of a lease over `covered`, dirty again: kept for each domain, and marked, as
    /// far as the lease covers them; what lies outside every area is counted, and recorded as a
    /// fault.
    ///
    /// Nothing was taken after the tree had the version `taken`: what lies in an area that came
    /// later was in another one at the same addresses, and is outside as well.
    pub(crate) fn put_back(&self, run: IovaRange, covered: &Covered, taken: u64) -> Outside {
        let outside = self.in_areas(run, |area, part| {
            if area.is_younger(taken) {
                let mut outside = Outside::default();
                let bytes = part.last().get() - part.start().get();
                outside.add(part.start(), bytes.saturating_add(1));
                return outside;
            }
            for domain in covered.domains() {
                domain.kept.mark(part);
            }
            let going =
                area.is_going() || covered.domains().iter().any(|domain| domain.is_leaving());
            if covered.marks || (going && performs(Step::MarkIfGoing)) {
                area.mark(part)
            } else {
                Outside::default()
            }
        });
        self.report(&outside, FaultSource::Abort);
        outside
    }

    /// The domains of this moment.
    pub(crate) fn attachments(&self) -> Attachments {
        self.areas.snapshot().rules().attachments().clone()
    }

    /// Every mapped range, and the memory behind it, starts and ends at a multiple of this many bytes: the largest of
    /// [`page`](Self::page) and the smallest pages of the attached domains.
    pub fn alignment(&self) -> Granule {
        self.snapshot().alignment()
    }

    /// Records what a device, or whoever knows of it, reports: an access of `domain` to `range` that was blocked.
    pub fn report_fault(&self, domain: DomainId, range: IovaRange) {
        self.faults.record(Fault {
            at: range.start(),
            len: u64::try_from(range.len()).unwrap_or(u64::MAX),
            source: FaultSource::Device(domain),
        });
    }
}

/// What is on its way to the marks. Dropped, it has arrived, or whoever moved it panicked.
struct Moving<'s>(Option<&'s Slot>);

impl Drop for Moving<'_> {
    fn drop(&mut self) {
        if let Some(slot) = self.0 {
            slot.free();
        }
    }
}

/// Refuses a domain whose smallest page is `page`, if an area is not made of such pages.
fn check_areas<'a>(mut areas: impl Iterator<Item = &'a Area>, page: Granule) -> Result<(), Error> {
    let odd = |area: &&Area| {
        let mapping = area.mapping;
        !mapping.range.is_aligned(page) || mapping.backing & page.mask() != 0
    };
    match areas.find(odd) {
        Some(area) => Err(Error::CannotAttach {
            page,
            area: area.mapping.range,
        }),
        None => Ok(()),
    }
}

/// What one harvest covers: which domains of one moment, and whether the marks.
#[derive(Clone, Debug)]
pub(crate) struct Covered {
    all: Attachments,
    /// The one domain, if it is only one.
    only: Option<usize>,
    pub(crate) marks: bool,
}

impl Covered {
    /// All domains, and the marks.
    pub(crate) fn everything(rules: &Rules) -> Self {
        Covered {
            all: rules.attachments().clone(),
            only: None,
            marks: true,
        }
    }

    /// One domain.
    ///
    /// # Errors
    /// [`Error::NotAttached`].
    pub(crate) fn domain(rules: &Rules, id: DomainId) -> Result<Self, Error> {
        let all = rules.attachments().clone();
        Ok(Covered {
            only: Some(all.position(id)?),
            all,
            marks: false,
        })
    }

    /// `domain` alone, which is one of these.
    pub(crate) fn only(&self, domain: &Arc<Attachment>) -> Self {
        Covered {
            only: self.all.position(domain.id).ok(),
            all: self.all.clone(),
            marks: false,
        }
    }

    /// What harvests over these are made of, in a space whose own smallest page is `own`: pages of
    /// all domains that were attached at that moment.
    pub(crate) fn alignment(&self, own: Granule) -> Granule {
        self.all.alignment(own)
    }

    /// The domains.
    pub(crate) fn domains(&self) -> &[Arc<Attachment>] {
        match self.only {
            Some(at) => &self.all[at..=at],
            None => &self.all,
        }
    }
}
