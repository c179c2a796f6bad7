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
//! A **detach** first says that the domain is *leaving*, and then empties the pairs of all areas that it sees; a map
//! publishes its area, and then looks whether the domain is leaving. Each has a full fence between its two steps (F6, F7), so
//! one of them sees the other. If the detach sees the area, the fill either came before, and is emptied, or finds the domain
//! leaving under the same lock; else the map finds it leaving at once. While it leaves, the domain stays
//! in the list, so that every flush reaches it; it goes after a flush that covers all that was emptied. An **unmap**
//! holds the pairs of its areas from the first exchange to the end: whoever waits for the lock finds them gone.
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

use super::rules::{Attachments, Rules};
use super::tracking::Switch;
use super::{AddressSpace, Area, Fault, FaultSource, Outside};
use crate::error::Error;
use crate::events;
use crate::flush::{FlushCost, FlushGather, Ticket};
use crate::source::{DirtySource, Marks, Slot};
use crate::sync::{Arc, AtomicBool, Ordering, Step, TINY, fence, lock, performs};
use crate::units::{DomainId, Granule, Iova, IovaRange};

/// A source that is attached to a space.
pub(crate) struct Attachment {
    pub(crate) id: DomainId,
    /// The smallest page of the source.
    pub(super) page: Granule,
    pub(crate) source: Box<dyn DirtySource>,
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
    /// # Errors
    /// In this order: [`Error::AttachedTwice`], as far as [`DirtySource::identity`] can tell; [`Error::CannotAttach`]
    /// with the first area that is not made of the domain's pages; what the source says to tracking, then to an area.
    /// The source is then emptied again and not attached; only if it also fails to flush what it had been filled with,
    /// it stays attached, without translations, until [`detach`](Self::detach) succeeds: its id is in
    /// [`domains`](Self::domains).
    pub fn attach(&self, source: impl DirtySource + 'static) -> Result<DomainId, Error> {
        let _membership = lock(&self.membership);
        let page = source.page();
        let (identity, attached) = (source.identity(), self.attachments());
        if let Some(twin) = attached
            .iter()
            .find(|other| identity.is_some() && other.source.identity() == identity)
        {
            return Err(Error::AttachedTwice { domain: twin.id });
        }
        check_areas(
            self.areas.snapshot().iter(IovaRange::ALL).map(|e| e.area),
            page,
        )?;
        let id = self.next_domain();
        let attachment = Arc::new(Attachment {
            id,
            page,
            source: Box::new(source),
            kept: Marks::few(all_kept(), self.page()),
            tracking: Switch::new(),
            leaving: AtomicBool::new(false),
        });
        if self.tracks() {
            // Before the first page is mapped: no write goes unseen.
            attachment.switch(true)?;
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
            let _ = attachment.switch(false);
            return Err(error);
        }
        self.declare_cost();
        for area in too_early.unwrap_or_else(|| self.all_areas()) {
            if let Err(error) = self.fill_pair(&area, &attachment) {
                // The flush that failed stays owed, and the domain stays, so that it can be paid.
                self.release(&attachment)?;
                return Err(error);
            }
        }
        events::attach(id, page);
        Ok(id)
    }

    /// Detaches a domain: empties it, flushes, and forgets it. Nothing is lost: what is dirty in it moves to the marks
    /// of the areas, where harvests of all domains find it; one that runs meanwhile may report all of an area. On return its devices no longer reach the memory, and
    /// nothing of the source is in use but by harvests that began before. Waits for the flush.
    ///
    /// # Errors
    /// [`Error::NotAttached`]. If a source cannot flush: its error; the domain then stays attached without
    /// translations, and is not filled any more, until a repeated call succeeds.
    pub fn detach(&self, domain: DomainId) -> Result<(), Error> {
        let _membership = lock(&self.membership);
        let attachment = Arc::clone(self.attachments().find(domain)?);
        self.release(&attachment)?;
        events::detach(domain);
        Ok(())
    }

    /// The domains that are attached, in the order of their coming.
    pub fn domains(&self) -> Vec<DomainId> {
        self.attachments().iter().map(|domain| domain.id).collect()
    }

    /// The rest of a detach.
    fn release(&self, attachment: &Arc<Attachment>) -> Result<(), Error> {
        // Release: pairs with the Acquire in `is_leaving`.
        attachment.leaving.store(true, Ordering::Release);
        if performs(Step::GoneFence) {
            // SeqCst: F6 of the module's protocol; pairs with F3 in `Marks::mark_inside`, for `put_back`, and with F7 in
            // `AddressSpace::fill`.
            fence(Ordering::SeqCst);
        }
        let ticket = self.flush.owe(&FlushGather::new());
        let mut last = ticket;
        for area in self.all_areas() {
            last = self.empty_pair(&area, attachment).unwrap_or(last);
        }
        self.flush_until(last)?;
        let _: Result<(), Error> = self.areas.update(|edit| {
            let without = edit
                .rules()
                .with_attachments(|all| all.retain(|other| other.id != attachment.id));
            edit.set_rules(without);
            Ok(())
        });
        self.declare_cost();
        // A source that cannot be switched off goes on, which only costs.
        let _ = attachment.switch(false);
        Ok(())
    }

    /// Tells the flush queue what it costs to invalidate all domains.
    fn declare_cost(&self) {
        let domains = self.attachments();
        let costs = domains.iter().map(|domain| domain.source.flush_cost());
        self.flush
            .set_cost(costs.fold(FlushCost::default(), FlushCost::and));
    }

    /// Fills `attachment` with `area`, unless it is filled, or one of the two is going.
    pub(super) fn fill_pair(&self, area: &Area, attachment: &Arc<Attachment>) -> Result<(), Error> {
        let mut pairs = area.pairs();
        let Some(filled) = &mut *pairs else {
            drop(pairs);
            return area
                .pieces()
                .iter()
                .try_for_each(|piece| self.fill_pair(piece, attachment));
        };
        let known = filled.iter().any(|other| other.id == attachment.id);
        if (known && performs(Step::FillOnce))
            || (attachment.is_leaving() && performs(Step::RefuseLeaving))
        {
            return Ok(());
        }
        // What is kept at these addresses stays: the area is in the tree, so an abort may just have put pages back.
        attachment.source.map(&area.mapping)?;
        filled.push(Arc::clone(attachment));
        Ok(())
    }

    /// Empties `attachment` of `area`: what was dirty moves to the area's marks, behind the debt. Returns the ticket of
    /// that debt, if there is one.
    fn empty_pair(&self, area: &Area, attachment: &Arc<Attachment>) -> Option<Ticket> {
        let mut pairs = area.pairs();
        let Some(filled) = &mut *pairs else {
            drop(pairs);
            let pieces = area.pieces().iter();
            return pieces
                .filter_map(|piece| self.empty_pair(piece, attachment))
                .last();
        };
        let range = area.mapping.range;
        // What is dirty in the table is in flight until it is marked: a harvest that comes between finds all of the area so.
        let _moving = Moving(performs(Step::DetachInFlight).then(|| self.in_flight.publish(range)));
        if performs(Step::DetachFence) {
            // Release: pairs with the Acquire fence between tables and slots in `harvest::lease::take`.
            fence(Ordering::Release);
        }
        let at = filled.iter().position(|other| other.id == attachment.id);
        let ticket = at.map(|at| {
            let ticket = self.empty(attachment, range, &area.marks);
            filled.remove(at);
            ticket
        });
        // What is kept is marked before it is taken, for harvests that have read the slots; and behind that, for who found it
        // kept already.
        for run in attachment.kept.runs(range) {
            area.marks.mark(run);
        }
        if performs(Step::DetachFence) {
            // Release: pairs with the Acquire fence between what is kept and the marks in `harvest::lease::take`.
            fence(Ordering::Release);
        }
        for run in attachment.kept.take_runs(range) {
            area.marks.mark(run);
        }
        ticket
    }

    /// Ends the translations of `range` in `attachment`, owes their flush, and marks in `marks` what was dirty. Returns the
    /// ticket of the debt.
    pub(super) fn empty(&self, attachment: &Attachment, range: IovaRange, marks: &Marks) -> Ticket {
        let mut owing = Owing {
            space: self,
            range,
            gather: FlushGather::new(),
        };
        let mut dirty = Vec::new();
        attachment
            .source
            .unmap(range, &mut owing.gather, &mut |leaf| {
                append(&mut dirty, leaf)
            });
        let gather = owing.gather.clone();
        std::mem::forget(owing);
        let mark_all = || dirty.iter().for_each(|run| marks.mark(*run));
        // The debt first, then the pages: see "Why no write is lost" in the module `harvest`.
        if performs(Step::OweBeforePutBack) {
            let ticket = self.flush.owe(&gather);
            mark_all();
            ticket
        } else {
            mark_all();
            self.flush.owe(&gather)
        }
    }

    /// Makes `run`, of a lease over `covered`, dirty again: kept for each domain, and marked, as far
    /// as the lease covers them; what lies outside every area is counted, and recorded as a fault.
    ///
    /// Nothing was taken after the tree had the version `taken`: what lies in an area that came later
    /// was in another one at the same addresses, and is outside as well.
    pub(crate) fn put_back(&self, run: IovaRange, covered: &Covered, taken: u64) -> Outside {
        let outside = self.in_areas(run, |area, part| {
            if area.is_younger(taken) {
                return false;
            }
            for domain in covered.domains() {
                domain.kept.mark(part);
            }
            let going =
                area.is_going() || covered.domains().iter().any(|domain| domain.is_leaving());
            if covered.marks || (going && performs(Step::MarkIfGoing)) {
                area.mark(part).is_ok()
            } else {
                true
            }
        });
        self.report(&outside, FaultSource::Abort);
        outside
    }

    /// The domains of this moment.
    pub(crate) fn attachments(&self) -> Attachments {
        self.areas.snapshot().rules().attachments().clone()
    }

    /// All areas from now on, as a list, so that the snapshot does not keep memory alive while devices are waited for.
    fn all_areas(&self) -> Vec<Arc<Area>> {
        let snapshot = self.areas.snapshot();
        snapshot
            .iter(IovaRange::ALL)
            .map(|entry| entry.to_arc())
            .collect()
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

/// A gather that is being filled. Dropped by a source that panics, it owes all that may have been touched.
struct Owing<'a> {
    space: &'a AddressSpace,
    range: IovaRange,
    gather: FlushGather,
}

impl Drop for Owing<'_> {
    fn drop(&mut self) {
        self.gather.add(self.range, self.space.page());
        let _ = self.space.flush.owe(&self.gather);
    }
}

/// Adds `leaf` to ascending `runs`, to the last one if they touch.
fn append(runs: &mut Vec<IovaRange>, leaf: IovaRange) {
    if let Some(last) = runs.last_mut()
        && last.last().checked_add(1) == Some(leaf.start())
        && let Ok(joined) = IovaRange::new(last.start(), leaf.last())
    {
        *last = joined;
    } else {
        runs.push(leaf);
    }
}
