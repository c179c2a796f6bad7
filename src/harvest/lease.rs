//! The lease: what a harvest took, until its pages are safe.
//!
//! ```text
//!            sync                commit
//!  Owed ------------> Synced ------------> done: the pages are the consumer's
//!    |                   |
//!    +---- abort, drop --+---------------> every page of the lease is dirty again
//! ```
//!
//! Only a synced lease hands out ranges to copy: before that, writes through stale translations may still land.

use std::fmt;
use std::marker::PhantomData;

use crate::bitmap::{BitmapView, Runs, Sink};
use crate::error::Error;
use crate::events;
use crate::flush::{FlushGather, Ticket};
use crate::source::{LeafSink, Rests, Stopped};
use crate::space::{AddressSpace, Area, Areas, Covered};

use super::committed::Committed;
use crate::sync::{Ordering, Step, fence, performs};
use crate::units::{Granule, Iova, IovaRange};

/// A lease that owes a flush. Nothing may be copied yet.
#[derive(Debug)]
pub struct Owed(());

/// A lease whose flush has finished. Its pages may be copied.
#[derive(Debug)]
pub struct Synced(());

/// What one harvest took: owed, then synced, then committed or aborted. Dropping it aborts it.
///
/// # A lease that is forgotten
/// A lease must end: commit it, abort it, or drop it. One that goes to [`std::mem::forget`], or is
/// leaked in another way, loses writes, of no other pages than its own:
/// * what was written before the harvest is reported by nobody: the dirty bits are cleared, and
///   nothing puts them back;
/// * what is written later is hidden as well, as long as the writer goes by a cached "D is set": the
///   invalidation that the lease owes is known to the lease alone until [`sync`](Self::sync) or the
///   abort hands it over. It lasts until a flush that names the page: by the sync of another lease
///   that has a page in the same range of its gather, by an unmap or a detach, or by switching
///   tracking on. A sync that names other pages need not help.
///
/// A lease that was synced has paid, so it hides nothing that is written later. Harvests take no lock
/// and do not allocate, which is why the debt stays with the lease until then.
#[must_use = "a lease that is dropped puts everything back: sync it, copy its pages, commit it"]
pub struct Lease<'a, State> {
    holding: Holding<'a>,
    state: PhantomData<State>,
}

/// What a harvest found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
pub struct HarvestReport {
    /// Areas that were walked.
    pub areas: u64,
    /// Bits of the lease that went from 0 to 1 in the user's bitmap. Of a harvest that
    /// [stopped](StoppedHarvest), and put back what lies above the stop, it may be fewer, where bits
    /// above it were set before.
    pub bits_set: u64,
    /// Dirty leaves of IO page tables; each owes an invalidation.
    pub leaves: u64,
    /// Windows of the user's bitmap that were opened.
    pub windows: u64,
}

/// What an abort put back.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
pub struct Aborted {
    /// Bytes that are dirty again.
    pub bytes: u64,
    /// Bytes that could not be put back, because no area holds them any more.
    pub outside_bytes: u64,
}

impl<'a, State> Lease<'a, State> {
    /// What the harvest found.
    pub fn report(&self) -> HarvestReport {
        self.holding.report
    }

    /// Makes every page of the lease dirty again. A superset is possible: bits that were set in the user's bitmap
    /// before the harvest count as well. Does not wait for devices; what is owed stays owed, and the next sync of
    /// anybody pays it.
    ///
    /// Allocates where pages were never put back before: 4 KiB for each stretch of 32768 smallest
    /// pages (128 MiB of 4 KiB pages) that has a page of the lease, in each domain that the lease
    /// covers, and some hundred bytes for each 64 of these stretches. So an abort of a TiB of 4 KiB
    /// pages takes at most 33 MiB a domain. The memory is used again by later aborts, and goes when
    /// the domain is detached. The same holds for a lease that is dropped, and for a harvest that
    /// stops where it has to put back what an earlier source gave it.
    pub fn abort(mut self) -> Aborted {
        self.holding.put_back()
    }
}

impl<'a> Lease<'a, Owed> {
    /// Flushes, and so makes the pages of this lease copyable: on return every device has dropped its cached
    /// translations of them, writes in flight have landed, and marks that were skipped are visible. Waits for
    /// devices. One flush serves all who wait.
    ///
    /// # Errors
    /// [`SyncError`] with the lease if a source could not flush; it can be tried again.
    pub fn sync(mut self) -> Result<Lease<'a, Synced>, SyncError<'a>> {
        let flushed = self.holding.flush();
        events::sync(self.holding.range(), &self.holding.gather, flushed.is_ok());
        match flushed {
            Ok(()) => Ok(Lease {
                holding: self.holding,
                state: PhantomData,
            }),
            Err(error) => Err(SyncError {
                error,
                lease: Box::new(self),
            }),
        }
    }
}

impl<'a> Lease<'a, Synced> {
    /// The ranges to copy: maximal runs of dirty granules, in order. Bits that were set in the user's bitmap before
    /// the harvest count as well, and so does each window of a file that cannot be read: see [`Runs::error`].
    pub fn runs(&self) -> Runs<'a> {
        self.holding.runs()
    }

    /// Dirty granules in the user's bitmap, within the lease.
    pub fn dirty(&self) -> u64 {
        match self.holding.is_empty {
            true => 0,
            false => self.holding.view.count(),
        }
    }

    /// The bytes that one bit stands for.
    pub fn granule(&self) -> Granule {
        self.holding.view.granule()
    }

    /// The copies of what lies in `range` are safe: it is not put back, whatever becomes of the rest of the lease. Only granules
    /// that lie in `range` as a whole count. Returns how many dirty ones were not committed before.
    ///
    /// Costs a look at the bitmap's words of `range`, and O(log n) for n parts that do not touch each
    /// other, in any order. Allocates a little for each of these; parts that touch are one, so parts
    /// that are committed one after the other cost no memory each.
    pub fn commit_range(&mut self, range: IovaRange) -> u64 {
        self.holding.commit_part(range)
    }

    /// The copies are safe: nothing is put back.
    pub fn commit(mut self) -> HarvestReport {
        self.holding.commit()
    }
}

impl<State> fmt::Debug for Lease<'_, State> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lease")
            .field("range", &self.holding.view.range())
            .field("report", &self.holding.report)
            .finish_non_exhaustive()
    }
}

/// What a lease holds, whatever its state; puts it back when it is dropped.
pub(super) struct Holding<'a> {
    space: &'a AddressSpace,
    view: BitmapView<'a>,
    /// Whether nothing of the view is in the lease: the walk stopped at its first granule.
    is_empty: bool,
    covered: Covered,
    /// The version of the area tree after the walk. What came later was not walked.
    ended: u64,
    /// The last address that the walk may have touched; `None` before the first area.
    reached: Option<Iova>,
    gather: FlushGather,
    debt: Debt,
    report: HarvestReport,
    /// What was committed by parts, made of whole granules.
    committed: Committed,
    /// Bytes of the report that are neither committed nor put back.
    left: u64,
}

/// Where the lease's gather is.
#[derive(Clone, Copy)]
enum Debt {
    /// Still in the lease.
    Held,
    /// In the queue, under this ticket.
    Queued(Ticket),
    /// Flushed.
    Paid,
    /// Committed or put back: nothing is left to do.
    Settled,
}

impl<'a> Holding<'a> {
    /// A lease that has taken nothing yet.
    pub(super) fn begin(space: &'a AddressSpace, view: BitmapView<'a>, covered: Covered) -> Self {
        space.counters.harvest();
        Holding {
            space,
            view,
            is_empty: false,
            covered,
            ended: u64::MAX,
            reached: None,
            gather: FlushGather::new(),
            debt: Debt::Held,
            report: HarvestReport::default(),
            committed: Committed::new(),
            left: 0,
        }
    }

    /// From now on a panic puts back everything up to `last`.
    pub(super) fn reach(&mut self, last: Iova) {
        self.reached = self.reached.max(Some(last));
    }

    /// Adds what a walk took.
    #[cfg(all(feature = "rayon", not(dirtymap_loom)))]
    pub(super) fn add(&mut self, taken: &FlushGather, areas: u64) {
        self.gather.merge(taken);
        self.report.areas += areas;
    }

    /// Takes what is dirty in `area` and `within`.
    pub(super) fn take(
        &mut self,
        area: &Area,
        within: IovaRange,
        sink: &mut Sink<'_>,
    ) -> Result<(), Stopped> {
        let Some(part) = area.mapping.range.intersection(within) else {
            return Ok(());
        };
        // A walk comes to an area as often as it has pieces, in ascending order.
        let began = area.mapping.range.start();
        let is_new = self.reached.is_none_or(|reached| reached < began);
        self.report.areas += u64::from(is_new);
        // Before the first bit is touched: a walk that panics in here puts back all that it may have recorded.
        self.reach(part.last());
        take(
            self.space,
            &self.covered,
            area,
            part,
            part,
            sink,
            &mut self.gather,
        )
    }

    /// The walk ended at `last`: what lies above belongs to another lease.
    pub(super) fn end_at(&mut self, last: Iova) {
        let walked = IovaRange::new(self.view.range().start(), last).ok();
        if let Some(part) = walked.and_then(|walked| self.view.part(walked)) {
            self.view = part;
        }
    }

    /// The walk stopped at `at`. The lease ends below it: nothing was taken from there on, or is
    /// dirty again when this returns. Returns how many bits of the bitmap that puts back.
    ///
    /// A hole may lie inside a granule; then its bit stays in the lease, for what lies below.
    fn end_below(&mut self, at: Iova) -> u64 {
        let range = self.view.range();
        let below = at.get().checked_sub(1).map(Iova::new);
        let below = below.filter(|last| *last >= range.start());
        let last = below.map(|last| last.granule_last(self.view.granule()));
        let above = match last {
            Some(last) => last.checked_add(1),
            None => Some(range.start()),
        };
        // Sources that came before the one that stopped, and other pieces of a parallel harvest.
        let above = above.zip(self.reached);
        let above = above.and_then(|(first, reached)| IovaRange::new(first, reached).ok());
        let mut bits = 0;
        if let Some(walked) = above
            && let Some(part) = self.view.part(walked.round_out(self.view.granule()))
        {
            bits = part.count();
            if bits > 0 {
                if performs(Step::OweBeforePutBack) {
                    // The debt first, as in an abort: whoever takes the pages from here on pays it.
                    let _ = self.queue();
                }
                let aborted = self.put_back_runs(part, walked);
                self.space.counters.put_back_outside(aborted.outside_bytes);
                let _ = self.queue();
            }
        }
        match last {
            Some(last) => self.end_at(last),
            None => self.is_empty = true,
        }
        self.reached = self.reached.and_then(|reached| Some(reached.min(last?)));
        bits
    }

    /// The walk is over: areas that come from now on have nothing in the lease.
    pub(super) fn walked(&mut self, snapshot: &Areas<'_>) {
        self.ended = snapshot.newest();
    }

    /// The runs of the lease.
    fn runs(&self) -> Runs<'a> {
        match self.is_empty {
            true => Runs::none(self.view),
            false => self.view.runs(),
        }
    }

    /// The addresses of the lease.
    pub(super) fn range(&self) -> IovaRange {
        self.view.range()
    }

    /// The walk stopped inside the range.
    pub(super) fn stopped(self, stopped: Stopped, sink: &Sink<'_>) -> HarvestError<'a> {
        self.stopped_of(stopped, sink.bits_set(), sink.windows())
    }

    /// The same, for several sinks.
    pub(super) fn stopped_of(
        mut self,
        stopped: Stopped,
        bits_set: u64,
        windows: u64,
    ) -> HarvestError<'a> {
        let put_back = self.end_below(stopped.at);
        let bits_set = bits_set.saturating_sub(put_back);
        HarvestError::Stopped(Box::new(StoppedHarvest {
            error: stopped.error,
            at: stopped.at,
            lease: self.into_lease_of(bits_set, windows, Some(stopped.at)),
        }))
    }

    /// The walk is over.
    pub(super) fn into_lease(self, sink: &Sink<'_>) -> Lease<'a, Owed> {
        self.into_lease_of(sink.bits_set(), sink.windows(), None)
    }

    /// The walk is over, or stopped; `bits_set` and `windows` are what its sinks say together.
    pub(super) fn into_lease_of(
        mut self,
        bits_set: u64,
        windows: u64,
        stopped_at: Option<Iova>,
    ) -> Lease<'a, Owed> {
        if !performs(Step::FlushAtSync) {
            let _ = self.flush();
        }
        self.report.bits_set = bits_set;
        self.report.windows = windows;
        self.report.leaves = self.gather.entries();
        self.left = self.bytes(bits_set);
        self.space.counters.leased(self.left);
        events::harvest(self.range(), self.view.granule(), &self.report, stopped_at);
        Lease {
            holding: self,
            state: PhantomData,
        }
    }

    fn flush(&mut self) -> Result<(), Error> {
        if let Some(ticket) = self.queue() {
            self.space.flush_until(ticket)?;
            self.debt = Debt::Paid;
        }
        // F2 of the marks' protocol; also orders the flush before the copies.
        self.space.ordering.before_copies();
        Ok(())
    }

    /// Hands the gather to the queue, if that has not been done yet.
    fn queue(&mut self) -> Option<Ticket> {
        match self.debt {
            Debt::Held => {
                let ticket = self.space.flush.owe(&self.gather);
                self.debt = Debt::Queued(ticket);
                Some(ticket)
            }
            Debt::Queued(ticket) => Some(ticket),
            Debt::Paid | Debt::Settled => None,
        }
    }

    fn commit(&mut self) -> HarvestReport {
        self.debt = Debt::Settled;
        self.space.counters.commit();
        let bytes = std::mem::take(&mut self.left);
        self.space.counters.committed(bytes);
        events::commit(self.range(), bytes);
        self.report
    }

    fn commit_part(&mut self, range: IovaRange) -> u64 {
        let part = self.view.part(range).map(|view| view.range());
        let Some(part) = part.filter(|_| !self.is_empty) else {
            return 0;
        };
        let mut bits = 0;
        for fresh in self.committed.without(part) {
            bits += self.view.part(fresh).map_or(0, |view| view.count());
        }
        self.committed.add(part);
        let bytes = self.bytes(bits).min(self.left);
        self.left -= bytes;
        self.space.counters.committed(bytes);
        events::commit_part(part, bytes);
        bits
    }

    fn put_back(&mut self) -> Aborted {
        if performs(Step::OweBeforePutBack) {
            // The debt first, then the pages: see "Why no write is lost" in the module `harvest`.
            let _ = self.queue();
        }
        let touched = self
            .reached
            .and_then(|last| IovaRange::new(self.view.range().start(), last).ok());
        let aborted = match touched {
            Some(touched) if !self.is_empty => self.put_back_runs(self.view, touched),
            _ => Aborted::default(),
        };
        let _ = self.queue();
        self.debt = Debt::Settled;
        self.space
            .counters
            .aborted(self.left, aborted.outside_bytes);
        self.left = 0;
        events::abort(self.range(), &aborted);
        aborted
    }

    /// Makes the runs of `view` dirty again, as far as they lie in `touched` and are not committed.
    fn put_back_runs(&self, view: BitmapView<'_>, touched: IovaRange) -> Aborted {
        let mut aborted = Aborted::default();
        for run in view.runs() {
            let Some(run) = touched.intersection(run) else {
                break;
            };
            for run in self.committed.without(run) {
                let outside = self.space.put_back(run, &self.covered, self.ended).bytes;
                aborted.outside_bytes = aborted.outside_bytes.saturating_add(outside);
                let all = u64::try_from(run.len()).unwrap_or(u64::MAX);
                aborted.bytes = aborted.bytes.saturating_add(all - outside.min(all));
            }
        }
        aborted
    }

    fn bytes(&self, bits: u64) -> u64 {
        let bytes = u128::from(bits) << self.view.granule().lg2();
        u64::try_from(bytes).unwrap_or(u64::MAX)
    }
}

/// Takes what is dirty in `part` of `area` into `sink` and `gather`: the tables of the domains, then what is in flight, then what
/// is kept for each domain, then the marks. Leaves that stick out of `part` are taken as far as they lie in `limit`.
///
/// A source that stops ends it for those that follow. The place where it stopped is rounded down to
/// the pages of all sources, so that none of them is cut, and told as the beginning of a granule of
/// the sink, so that no bit below it stands for anything above it. What earlier sources gave from
/// there on is in the sink: the caller puts it back.
pub(super) fn take(
    space: &AddressSpace,
    covered: &Covered,
    area: &Area,
    part: IovaRange,
    limit: IovaRange,
    sink: &mut Sink<'_>,
    gather: &mut FlushGather,
) -> Result<(), Stopped> {
    let page = covered.alignment(space.page());
    // What one source could not process ends the part for all that follow: below it, the lease has everything.
    let mut rest = Some(part);
    let mut outcome = Ok(());
    for domain in covered.domains() {
        let Some(part) = rest else { break };
        sink.limit_to(if outcome.is_ok() { limit } else { part });
        let keep = |run| {
            // Whatever area the leaf belongs to, it may be younger than this walk.
            let outside = space.put_back(run, &covered.only(domain), u64::MAX);
            space.counters.put_back_outside(outside.bytes);
        };
        let rests = Rests {
            in_flight: &space.in_flight,
            keep: &keep,
            flush: &space.flush,
        };
        let mut out = LeafSink::keeping(sink, gather, rests);
        if let Err(stopped) = domain.source.read_and_clear(part, &mut out) {
            (rest, outcome) = below(part, stopped, page);
        }
    }
    // Acquire: pairs with the Release fence in `LeafSink`; whoever found a leaf clean sees its rest in flight.
    fence(Ordering::Acquire);
    if let Some(part) = rest {
        sink.limit_to(part);
        if let Err(error) = space.in_flight.visit(part, |write| sink.record(write)) {
            let at = part.start();
            (rest, outcome) = below(part, Stopped { at, error }, page);
        }
    }
    // The tables came first: what an unmap takes out of them comes to what is kept, and then to the marks.
    let kept = covered.domains().iter().map(|domain| &domain.kept);
    for marks in kept.chain(covered.marks.then_some(&*area.marks)) {
        let Some(part) = rest else { break };
        // Acquire: pairs with the Release fence of a detach; whoever found what is kept gone sees it marked.
        fence(Ordering::Acquire);
        sink.limit_to(part);
        if let Err(stopped) = marks.read_and_clear(part, sink) {
            (rest, outcome) = below(part, stopped, page);
        }
    }
    outcome.map_err(|stopped: Stopped| Stopped {
        at: stopped.at.granule_start(sink.granule()),
        ..stopped
    })
}

/// What is left of `part` below the page at which a source stopped, and the stop, at an address inside `part`.
fn below(
    part: IovaRange,
    stopped: Stopped,
    page: Granule,
) -> (Option<IovaRange>, Result<(), Stopped>) {
    let at = stopped.at.granule_start(page);
    let at = if part.contains(at) { at } else { part.start() };
    let rest = at
        .get()
        .checked_sub(1)
        .and_then(|last| IovaRange::new(part.start(), Iova::new(last)).ok());
    let error = stopped.error;
    (rest, Err(Stopped { at, error }))
}

impl Drop for Holding<'_> {
    fn drop(&mut self) {
        if !matches!(self.debt, Debt::Settled) {
            self.put_back();
        }
    }
}

/// Why a harvest gave no whole lease.
#[derive(Debug, thiserror::Error)]
pub enum HarvestError<'a> {
    /// The request was refused before anything was touched.
    #[error("{0}")]
    Refused(Error),
    /// The harvest stopped inside the range.
    #[error("{0}")]
    Stopped(Box<StoppedHarvest<'a>>),
}

/// A harvest that stopped inside its range: below [`at`](Self::at) the lease has all that was dirty,
/// from there on nothing was taken from anybody.
///
/// What a source gave before another one stopped below it is put back before the harvest returns, as
/// an abort would; its bits may stay set in the user's bitmap, and belong to no lease.
#[derive(Debug, thiserror::Error)]
#[error("the harvest stopped at {at}: {error}")]
pub struct StoppedHarvest<'a> {
    /// Why it stopped.
    pub error: Error,
    /// The first address that was not processed: that of a hole, or the beginning of a granule of the
    /// request and of a page of every source.
    pub at: Iova,
    /// The lease for what was processed.
    pub lease: Lease<'a, Owed>,
}

/// A sync that failed. What the lease owes stays owed.
#[derive(Debug, thiserror::Error)]
#[error("the flush failed, so nothing of the lease may be copied: {error}")]
pub struct SyncError<'a> {
    /// Why the flush failed.
    pub error: Error,
    /// The lease, to be synced again or aborted.
    pub lease: Box<Lease<'a, Owed>>,
}

/// Keeps the reason and puts the lease back.
impl From<HarvestError<'_>> for Error {
    fn from(error: HarvestError<'_>) -> Self {
        match error {
            HarvestError::Refused(error) => error,
            HarvestError::Stopped(stopped) => stopped.error,
        }
    }
}

/// Keeps the reason and puts the lease back.
impl From<SyncError<'_>> for Error {
    fn from(error: SyncError<'_>) -> Self {
        error.error
    }
}
