//! The lease: the pages that a harvest took, until their copies are safe.
//!
//! ```text
//!            sync                commit
//!  Owed ------------> Synced ------------> done: the pages are the consumer's
//!    |                   |
//!    +---- abort, drop --+---------------> every page of the lease is dirty again
//! ```
//!
//! Only a synced lease hands out ranges to copy, because writes through stale translations may land
//! until then.

use std::fmt;
use std::marker::PhantomData;

use super::backing::{Backing, Recorder};
use super::held::{Held, SpaceRef};
use super::look::{Look, below, look};
use super::shared;
use crate::bitmap::{BitmapView, Runs, Sink, Words};
use crate::error::Error;
use crate::events;
use crate::failure::Failure;
use crate::flush::{FlushGather, Ticket};
use crate::ranges::{RangeSet, without};
use crate::report::{Aborted, HarvestReport};
use crate::source::Stopped;
use crate::space::{
    AddressSpace, Area, Areas, Audience, Covered, Entry, Lineage, MemberCounts, Walk,
};
use crate::sync::{AtomicU64, Mutex, Ordering, Step, lock, performs};
use crate::units::{Granule, Iova, IovaRange};

/// A lease that owes a flush. Nothing may be copied yet.
#[derive(Debug)]
pub struct Owed(());

/// A lease whose flush has finished. Its pages may be copied.
#[derive(Debug)]
pub struct Synced(());

/// The pages that one harvest took. A lease is owed, then synced, then committed or aborted. A drop
/// aborts it.
///
/// ```
/// # use dirtymap::{Access, AddressSpace, Granule};
/// # fn main() -> Result<(), dirtymap::Error> {
/// # let space = AddressSpace::tracked(Granule::K4);
/// # space.map(0..1 << 20, 0, Access::ReadWrite)?;
/// space.mark(0x3000..0x3001)?;
/// let lease = space.rounds().harvest()?; // owes a flush
/// let lease = lease.sync()?; // its pages can be copied
/// lease.abort(); // or dropped: dirty again
/// assert_eq!(space.rounds().next()?.commit().bits_set, 1);
/// assert_eq!(space.rounds().next()?.dirty(), 0);
/// # Ok(())
/// # }
/// ```
///
/// A `Lease<'static, _>`, for other threads, structs and trait objects, comes from
/// [`Rounds::shared`](super::Rounds::shared). A lease into a bitmap of the caller's lives as long
/// as that bitmap and the space.
///
/// # A lease that is forgotten
/// A lease must end: commit it, abort it, or drop it. A lease that goes to [`std::mem::forget`], or
/// is leaked in another way, loses writes to its own pages, and to no others:
/// * writes before the harvest are never reported, because the dirty bits are cleared, and nothing
///   puts them back;
/// * later writes are hidden as well, as long as the writer uses a cached "D is set": only the
///   lease knows the invalidation that it owes, until [`sync`](Self::sync) or the abort hands it
///   over. This lasts until a flush that names the page: by the sync of another lease that has a
///   page in the same range of its gather, by an unmap or a detach, or by a switch of tracking to
///   on. A sync that names other pages may not help.
///
/// A lease that was synced has paid its debt, so it hides no later writes. The debt stays with the
/// lease until the sync, because in this way harvests take no lock and do not allocate.
#[must_use = "a lease that is dropped puts everything back: sync it, copy its pages, commit it"]
pub struct Lease<'a, State> {
    holding: Holding<'a>,
    state: PhantomData<State>,
}

impl<'a, State> Lease<'a, State> {
    /// What the harvest found.
    pub fn report(&self) -> HarvestReport {
        self.holding.report
    }

    /// The addresses that the lease covers: those of the request, or the part of them below the
    /// address at which the harvest stopped or reached its bound.
    pub fn range(&self) -> IovaRange {
        self.holding.range()
    }

    /// The bytes that one bit stands for.
    pub fn granule(&self) -> Granule {
        self.holding.granule()
    }

    /// The address and the error of the stop, if the harvest stopped: a source or the bitmap failed
    /// there, or a hole begins there and the request stops at holes. Everything below that address
    /// is in the lease; from it on nothing was taken. Pages above it that another source had
    /// already reported are dirty again, as after an abort. Their bits may stay set in the user's
    /// bitmap, and belong to no lease.
    ///
    /// The address is that of a hole, or the start of a granule of the request and of a page of
    /// every source.
    pub fn stopped(&self) -> Option<&Stopped> {
        self.holding.stopped.as_ref()
    }

    /// The address at which a next harvest goes on, by
    /// [`resume_at`](crate::HarvestRequest::resume_at): this harvest stopped there, or reached its
    /// bound. `None` if it reached the end of its request.
    pub fn next(&self) -> Option<Iova> {
        let stopped = self.stopped().map(|stopped| stopped.at);
        stopped.or(self.holding.next)
    }

    /// The name of the lease's consumer; `None` for one of the unnamed consumer.
    pub fn consumer(&self) -> Option<&str> {
        let own = self.holding.covered.audience.own();
        own.map(|own| own.name()).filter(|name| !name.is_empty())
    }

    /// The epoch that a commit of the lease makes, and its parent. A copy of the parent becomes a
    /// copy of the epoch, if the pages of the lease are copied over it. `None` in a space that has
    /// never had a [consumer](crate::Consumer).
    ///
    /// The result holds for a commit now. It changes only if another lease of the same consumer is
    /// committed, or a part of one. So a program with several leases at a time uses the result of
    /// [`commit_epoch`](Self::commit_epoch). Waits for a short lock that commits take as well.
    ///
    /// ```
    /// use dirtymap::harvest::Parent;
    /// # use dirtymap::{Access, AddressSpace, Granule, Start};
    ///
    /// # fn main() -> Result<(), dirtymap::Error> {
    /// # let space = AddressSpace::tracked(Granule::K4);
    /// # space.map(0..1 << 20, 0, Access::ReadWrite)?;
    /// let backup = space.consumer("backup", Start::Dirty)?;
    /// let full = backup.rounds().next()?;
    /// let first = full.lineage().map(|lineage| lineage.epoch);
    /// let parent = full.lineage().map(|lineage| lineage.parent);
    /// assert!(matches!(parent, Some(Parent::Everything(_))));
    /// full.commit();
    /// backup.rounds().next()?.abort(); // makes no epoch
    /// let lineage = backup.rounds().next()?.lineage();
    /// assert_eq!(lineage.map(|next| next.parent), first.map(Parent::Epoch));
    /// # Ok(())
    /// # }
    /// ```
    pub fn lineage(&self) -> Option<Lineage> {
        let own = self.holding.covered.audience.own()?;
        Some(own.epochs.lineage(self.holding.entry()?))
    }

    /// Makes every page of the lease dirty again. A superset is possible: bits that were set in the
    /// user's bitmap before the harvest count as well. Does not wait for devices. The debt stays
    /// owed, and the next sync of any lease pays it.
    ///
    /// Allocates where pages were never put back before: 4 KiB for each stretch of 32768 smallest
    /// pages (128 MiB of 4 KiB pages) that has a page of the lease, in each domain that the lease
    /// covers, and some hundred bytes for each 64 of these stretches. So an abort of a TiB of 4 KiB
    /// pages takes at most 33 MiB a domain. The memory is used again by later aborts, and goes when
    /// the domain is detached. The same holds for a lease that is dropped, and for a harvest that
    /// stops where it has to put back what an earlier source gave it.
    ///
    /// ```
    /// # use dirtymap::{Access, AddressSpace, Granule};
    /// # fn main() -> Result<(), dirtymap::Error> {
    /// # let space = AddressSpace::tracked(Granule::K4);
    /// # space.map(0..1 << 20, 0, Access::ReadWrite)?;
    /// space.mark(0x3000..0x4000)?;
    /// let aborted = space.rounds().next()?.abort(); // a copy has failed
    /// assert_eq!(aborted.bytes, 0x1000);
    /// assert_eq!(space.rounds().next()?.dirty(), 1); // the page is dirty again
    /// # Ok(())
    /// # }
    /// ```
    #[doc(alias = "bdrv_reclaim_dirty_bitmap")]
    pub fn abort(mut self) -> Aborted {
        self.holding.put_back()
    }
}

impl<'a> Lease<'a, Owed> {
    /// Flushes, and so makes the pages of this lease copyable: on return every device has dropped
    /// its cached translations of them, writes in flight have landed, and the data of markers that
    /// found their page marked is visible. Waits for devices. Threads that wait at the same time
    /// share a flush (group commit).
    ///
    /// # Errors
    /// The error of the [stop](Self::stopped), unless [`partial`](Self::partial) was called; then
    /// that of a source that could not flush. The lease is put back then. To keep it after a flush
    /// that fails, and to try again, call [`flush`](Self::flush) first.
    pub fn sync(mut self) -> Result<Lease<'a, Synced>, Error> {
        if !self.holding.is_partial
            && let Some(stopped) = self.holding.stopped.take()
        {
            return Err(stopped.error);
        }
        self.flush()?;
        Ok(Lease {
            holding: self.holding,
            state: PhantomData,
        })
    }

    /// Accepts a partial scan, whose lease has the pages below the [stop](Self::stopped). Without
    /// this call, such a lease does not [`sync`](Self::sync), so that no consumer takes it for one
    /// of the whole request. Changes nothing if the harvest did not stop.
    ///
    /// ```
    /// use dirtymap::{
    ///     Access, AddressSpace, Granule, HarvestRequest, Holes, ToIovaRange, UserBitmap,
    /// };
    ///
    /// # fn main() -> Result<(), dirtymap::Error> {
    /// let space = AddressSpace::tracked(Granule::K4);
    /// space.map(0..8 << 12, 0, Access::ReadWrite)?;
    /// space.mark(0x3000..0x3001)?;
    /// let request = HarvestRequest::new((0..64 << 12).to_iova_range()?, Granule::K4);
    /// let request = request.holes(Holes::Stop);
    ///
    /// let mut words = [0; 1];
    /// let lease = space.harvest(&request, UserBitmap::new(&mut words))?;
    /// assert!(lease.sync().is_err()); // the hole; page 3 is dirty again
    ///
    /// let mut words = [0; 1];
    /// let lease = space.harvest(&request, UserBitmap::new(&mut words))?;
    /// let at = lease.next();
    /// let lease = lease.partial().sync()?;
    /// assert_eq!((lease.dirty(), at), (1, Some(0x8000.into())));
    /// lease.commit();
    /// # Ok(())
    /// # }
    /// ```
    pub fn partial(mut self) -> Self {
        self.holding.is_partial = true;
        self
    }

    /// The flush of [`sync`](Self::sync), which then returns at once: for a consumer that keeps the
    /// lease and tries again if a source could not flush. Waits for devices.
    ///
    /// ```
    /// # use dirtymap::{Access, AddressSpace, Granule};
    /// # fn main() -> Result<(), dirtymap::Error> {
    /// # let space = AddressSpace::tracked(Granule::K4);
    /// # space.map(0..1 << 20, 0, Access::ReadWrite)?;
    /// let mut lease = space.rounds().harvest()?;
    /// for _ in 0..3 {
    ///     if lease.flush().is_ok() {
    ///         break; // else try again, with the same lease
    ///     }
    /// }
    /// lease.sync()?.commit();
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// The error of the source. The lease stays as it was, and its debt stays owed.
    pub fn flush(&mut self) -> Result<(), Error> {
        let flushed = self.holding.flush();
        let gather = &self.holding.gather;
        let owed = (gather.ranges().len(), gather.entries());
        events::sync(self.range(), owed, flushed.is_ok());
        flushed
    }
}

impl<'a> Lease<'a, Synced> {
    /// The ranges to copy: maximal runs of dirty granules, in order. A run may go on into the next
    /// area, whose backing need not follow. To copy by backing address, cut it:
    /// `run.intersection(area.range)` for each `area` of [`AddressSpace::mappings`].
    ///
    /// Bits that were set in the
    /// user's bitmap before the harvest count as well, and so does each window of a file that
    /// cannot be read: see [`Runs::error`].
    pub fn runs(&self) -> Runs<'_> {
        self.holding.runs()
    }

    /// The space that knows which pages of the lease read as zero, unless the lease covers only
    /// one domain, and the version of the tree at the beginning of the harvest.
    pub(super) fn for_contents(&self) -> (Option<&AddressSpace>, u64) {
        let holding = &self.holding;
        let all = holding.covered.marks.then_some(&*holding.space);
        (all, holding.begun)
    }

    /// The words of the user's bitmap that are not zero, as far as the lease covers them: for a
    /// consumer that passes words on instead of [`runs`](Self::runs). Bit 0 of word 0 is the first
    /// granule of [`range`](Self::range).
    ///
    /// ```
    /// # use dirtymap::{Access, AddressSpace, Granule};
    /// # fn main() -> Result<(), dirtymap::Error> {
    /// # let space = AddressSpace::tracked(Granule::K4);
    /// # space.map(0..1 << 20, 0, Access::ReadWrite)?;
    /// space.mark(0x3000..0x5000)?;
    /// let lease = space.rounds().next()?;
    /// assert!(lease.words().eq([(0, 0b11 << 3)]));
    /// lease.commit();
    /// # Ok(())
    /// # }
    /// ```
    pub fn words(&self) -> Words<'_> {
        let view = self.holding.held.view();
        match self.holding.is_empty {
            true => Words::none(&view),
            false => view.words(),
        }
    }

    /// The backing addresses of the pages at the time when they were written; `None` unless the
    /// harvest [recorded](super::HarvestRequest::with_backing) them. See [`Backing`] for an
    /// example.
    pub fn backing(&self) -> Option<&Backing> {
        self.holding.backing.as_ref()
    }

    /// Dirty granules in the user's bitmap, within the lease.
    pub fn dirty(&self) -> u64 {
        match self.holding.is_empty {
            true => 0,
            false => self.holding.held.view().count(),
        }
    }

    /// The copies of the pages in `range` are safe: they are not put back, however the rest of the
    /// lease ends. Only whole granules inside `range` count. Returns how many dirty ones were not
    /// committed before.
    ///
    /// Costs a look at the bitmap's words of `range`, and O(log n) for n parts that do not touch
    /// each other, in any order. Allocates a little for each of these. Parts that touch are joined,
    /// so parts that are committed in order cost no memory each.
    ///
    /// Several threads may commit parts of one lease at the same time. They wait for each other.
    ///
    /// ```
    /// # use dirtymap::{Access, AddressSpace, Granule, ToIovaRange};
    /// # fn main() -> Result<(), dirtymap::Error> {
    /// # let space = AddressSpace::tracked(Granule::K4);
    /// # space.map(0..1 << 20, 0, Access::ReadWrite)?;
    /// space.mark(0x3000..0x5000)?;
    /// let lease = space.rounds().next()?;
    /// assert_eq!(lease.commit_range((0x3000..0x4000).to_iova_range()?), 1); // is on disk
    /// assert_eq!(lease.abort().bytes, 4096); // the other page
    /// # Ok(())
    /// # }
    /// ```
    pub fn commit_range(&self, range: IovaRange) -> u64 {
        self.holding.commit_part(range)
    }

    /// The copies are safe: nothing is put back.
    pub fn commit(self) -> HarvestReport {
        self.commit_epoch().0
    }

    /// As [`commit`](Self::commit), and returns the [`lineage`](Self::lineage) at the moment of the
    /// commit: the epoch that the commit makes, and its parent. If a lease whose harvest ended
    /// later was committed before this one, the epoch gets a new number.
    ///
    /// ```
    /// use dirtymap::harvest::Parent;
    /// # use dirtymap::{Access, AddressSpace, Granule, Start};
    ///
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let space = AddressSpace::tracked(Granule::K4);
    /// # space.map(0..1 << 20, 0, Access::ReadWrite)?;
    /// let backup = space.consumer("backup", Start::Clean)?;
    /// let joined = backup.epoch();
    /// space.mark(0x3000..0x3001)?;
    /// let (report, lineage) = backup.rounds().next()?.commit_epoch();
    /// let lineage = lineage.ok_or("a space without consumers")?;
    /// assert_eq!(report.bits_set, 1);
    /// assert_eq!(lineage.parent, Parent::Epoch(joined));
    /// assert_eq!(lineage.epoch, backup.epoch());
    /// # Ok(())
    /// # }
    /// ```
    pub fn commit_epoch(mut self) -> (HarvestReport, Option<Lineage>) {
        self.holding.commit()
    }
}

impl Lease<'_, Owed> {
    /// The consumer for which the pages were taken, and those to which they were left.
    pub(super) fn audience(&self) -> &Audience {
        &self.holding.covered.audience
    }
}

impl<State> fmt::Debug for Lease<'_, State> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lease")
            .field("range", &self.range())
            .field("stopped", &self.stopped())
            .field("report", &self.holding.report)
            .finish_non_exhaustive()
    }
}

/// What the sinks of a walk recorded.
#[derive(Default)]
pub(super) struct Recorded {
    bits_set: u64,
    windows: u64,
    /// No bit above this address was set.
    up_to: Option<Iova>,
}

impl Recorded {
    /// Adds what one sink recorded.
    pub(super) fn add(&mut self, sink: &Sink<'_>) {
        self.bits_set += sink.bits_set();
        self.windows += sink.windows();
        self.up_to = self.up_to.max(sink.recorded_to());
    }

    /// Adds what other sinks recorded.
    #[cfg(all(feature = "rayon", not(dirtymap_loom)))]
    pub(super) fn merge(&mut self, other: &Recorded) {
        self.bits_set += other.bits_set;
        self.windows += other.windows;
        self.up_to = self.up_to.max(other.up_to);
    }
}

/// The contents of a lease in any state. The drop puts them back.
pub(super) struct Holding<'a> {
    space: SpaceRef<'a>,
    held: Held<'a>,
    /// The address and the error of a stop.
    stopped: Option<Stopped>,
    /// Whether the consumer knows that the walk stopped.
    is_partial: bool,
    /// The address at which a bounded harvest goes on.
    next: Option<Iova>,
    /// Whether nothing of the view is in the lease: the walk stopped at its first granule.
    is_empty: bool,
    covered: Covered,
    /// The version of the area tree that is walked.
    begun: u64,
    /// The version of the area tree after the walk. Later areas were not walked.
    ended: u64,
    /// The last address that the walk may have touched; `None` before the first area.
    reached: Option<Iova>,
    /// The last address of an area below which everything is in the lease: no hole above it is.
    walked_to: Option<Iova>,
    gather: FlushGather,
    /// Leaves whose debt the queue has already.
    handed_over: u64,
    debt: Debt,
    report: HarvestReport,
    /// The recorder of the backing while the walk runs, if the request asks for it.
    recorder: Option<Recorder>,
    /// The same after the walk.
    backing: Option<Backing>,
    /// The parts that were committed, in whole granules.
    committed: Mutex<RangeSet>,
    /// The number of the lease, once the walk has ended.
    number: Option<u64>,
    /// What was pending as a whole: see `space::bounds`.
    whole: Vec<IovaRange>,
    /// Whether harvests that use an older store of the consumer have ended, and are flushed.
    has_caught_up: bool,
    /// Bytes of the report that are neither committed nor put back. Changed under the lock of
    /// `committed`, or by the owner of the lease.
    left: AtomicU64,
}

/// The place of the lease's gather.
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
    pub(super) fn begin(
        space: SpaceRef<'a>,
        held: Held<'a>,
        covered: Covered,
        recorder: Option<Recorder>,
        begun: u64,
    ) -> Self {
        space.counters.harvest();
        let mut number = None;
        if let Some(member) = covered.audience.own() {
            member.begin();
            if !performs(Step::NumberAtEnd) {
                number = Some(member.epochs.number());
            }
        }
        Holding {
            space,
            held,
            stopped: None,
            is_partial: false,
            next: None,
            is_empty: false,
            covered,
            begun,
            ended: u64::MAX,
            reached: None,
            walked_to: None,
            gather: FlushGather::new(),
            handed_over: 0,
            debt: Debt::Held,
            report: HarvestReport::default(),
            recorder,
            backing: None,
            committed: Mutex::new(RangeSet::new()),
            number,
            whole: Vec::new(),
            has_caught_up: false,
            left: AtomicU64::new(0),
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

    /// Takes the dirty pages in `area` and `within`.
    pub(super) fn take(
        &mut self,
        area: &Area,
        within: IovaRange,
        sink: &mut Sink<'_>,
    ) -> Result<(), Stopped> {
        let Some(part) = area.mapping.range.intersection(within) else {
            return Ok(());
        };
        // A walk reaches an area once for each of its pieces, in ascending order.
        let began = area.mapping.range.start();
        let is_new = self.reached.is_none_or(|reached| reached < began);
        self.report.areas += u64::from(is_new);
        // Before the first bit is touched: a walk that panics from here on puts back everything
        // that it may have recorded.
        self.reach(part.last());
        let looked = if self.covered.audience.own().is_none() {
            look(
                &self.space,
                &self.covered,
                area,
                (part, part),
                (sink, None),
                Look::Take(&mut self.gather),
            )
        } else {
            let gather = &mut self.gather;
            let (handed, looked) =
                shared::take(&self.space, &self.covered, area, part, sink, gather);
            self.handed_over += handed;
            self.take_whole(part, looked, sink)
        };
        self.walk_to(walked_to(part, &looked));
        if let Some(recorder) = &mut self.recorder {
            recorder.looked(area, part);
        }
        looked
    }

    /// Takes the pages of `part` that are pending as a whole, up to the stop of the look before.
    /// Does the same with a younger store, if the consumer got one meanwhile: see `space::bounds`.
    fn take_whole(
        &mut self,
        part: IovaRange,
        looked: Result<(), Stopped>,
        sink: &mut Sink<'_>,
    ) -> Result<(), Stopped> {
        let page = self.covered.alignment(self.space.page());
        let (part, outcome) = match looked {
            Ok(()) => (Some(part), Ok(())),
            Err(stopped) => below(part, stopped, page),
        };
        let Some(part) = part else {
            return shared::rounded(outcome, sink);
        };
        sink.limit_to(part);
        while let Some(own) = self.covered.audience.own() {
            // In the lease before they are recorded: a panic or an error puts them back.
            let first = self.whole.len();
            self.whole.extend(own.whole.take(part));
            let mut taken = self.whole[first..].iter();
            let mut further = taken.try_for_each(|run| {
                let at = run.start();
                let recorded = sink.record(*run);
                recorded.map_err(|error| Stopped { at, error })
            });
            let younger = self.space.younger_store(own);
            if let Some(younger) = &younger {
                further = further.and_then(|()| younger.pending.read_and_clear(part, sink));
            }
            if let Err(stopped) = further {
                // What is not recorded is pending as before; what is, the stop puts back.
                let back = self.whole.drain(first..);
                back.for_each(|run| own.whole.put_back(run, &self.space.walks));
                let at = stopped.at.granule_start(page).max(part.start());
                return shared::rounded(Err(Stopped { at, ..stopped }), sink);
            }
            match younger {
                Some(younger) => self.covered.audience.move_to(younger),
                None => break,
            }
        }
        shared::rounded(outcome, sink)
    }

    /// All areas of `range` were walked. So the rest of the ranges that are pending as a whole
    /// there is holes, and is removed, because areas that are mapped from now on begin clean.
    ///
    /// A store that the consumer got in the middle of the walk is younger than the areas of the
    /// walk, and stays as it is.
    pub(super) fn walked_all(&mut self, range: IovaRange, entered: &Walk<'_>) {
        if let Some(own) = self
            .covered
            .audience
            .own()
            .filter(|_| !self.covered.audience.has_moved())
        {
            own.whole.forget(range, entered);
        }
    }

    /// The lease, as the epochs of its consumer see it.
    fn entry(&self) -> Option<Entry> {
        let own = self.covered.audience.own()?;
        Some(Entry {
            number: self.number?,
            whole: (!self.whole.is_empty()).then_some(own.stores),
        })
    }

    /// Everything up to `last`, if there is one, is in the lease.
    pub(super) fn walk_to(&mut self, last: Option<Iova>) {
        self.walked_to = self.walked_to.max(last);
    }

    /// The walk ended at `last`. Pages above it belong to another lease.
    fn end_at(&mut self, last: Iova) {
        if let Ok(walked) = IovaRange::new(self.range().start(), last) {
            self.held.narrow(walked);
        }
    }

    /// The walk stopped at `at`, and recorded nothing above `recorded`. The lease ends below the
    /// stop: nothing was taken from there on, or is dirty again when this returns. Returns how many
    /// bits of the bitmap that puts back.
    ///
    /// A hole may begin inside a granule. The bit of that granule stays in the lease, for the bytes
    /// below the hole.
    fn end_below(&mut self, at: Iova, recorded: Option<Iova>) -> u64 {
        let (range, granule) = (self.range(), self.granule());
        let below = at.get().checked_sub(1).map(Iova::new);
        let below = below.filter(|last| *last >= range.start());
        let last = below.map(|last| last.granule_last(granule));
        let first = match last {
            Some(last) => last.checked_add(1),
            None => Some(range.start()),
        };
        // The pages of sources before the one that stopped, and those of other pieces of a parallel
        // harvest.
        let above = first.zip(self.reached.min(recorded));
        let above = above.and_then(|(first, last)| IovaRange::new(first, last).ok());
        let mut bits = 0;
        if let Some(above) = above
            && let part = above.round_out(granule)
            && let Some(set) = self.held.view().part(part).and_then(|part| readable(&part))
        {
            bits = set;
            if performs(Step::OweBeforeStop) {
                // The debt first, as in an abort: the sync of the thread that takes the pages pays
                // it.
                let _ = self.queue();
            }
            self.put_back_whole(above);
            let aborted = self.put_back_runs(part, above);
            self.space.counters.put_back_outside(aborted.outside_bytes);
            let _ = self.queue();
        }
        match last {
            Some(last) => self.end_at(last),
            None => self.is_empty = true,
        }
        self.reached = self.walked_to.and_then(|walked| Some(walked.min(last?)));
        bits
    }

    /// What the lease has of `above` as a whole is pending as a whole again. Page by page, another
    /// lease would not know that it has to [catch up](AddressSpace::catch_up).
    fn put_back_whole(&mut self, above: IovaRange) {
        let Some(own) = self.covered.audience.own() else {
            return;
        };
        let mut kept = Vec::new();
        for run in self.whole.drain(..) {
            kept.extend(without(run, [above]));
            if let Some(back) = run.intersection(above) {
                own.whole.put_back(back, &self.space.walks);
            }
        }
        self.whole = kept;
    }

    /// Whether the harvest leaves what it takes to other consumers, or has taken from them.
    #[cfg(all(feature = "rayon", not(dirtymap_loom)))]
    pub(super) fn is_shared(&self) -> bool {
        self.covered.audience.own().is_some()
    }

    /// What is harvested.
    #[cfg(all(feature = "rayon", not(dirtymap_loom)))]
    pub(super) fn space(&self) -> &AddressSpace {
        &self.space
    }

    /// What of it.
    #[cfg(all(feature = "rayon", not(dirtymap_loom)))]
    pub(super) fn covered(&self) -> &Covered {
        &self.covered
    }

    /// As [`walked`](Self::walked), for threads with a snapshot of their own each.
    #[cfg(all(feature = "rayon", not(dirtymap_loom)))]
    pub(super) fn walked_by_now(&mut self) {
        self.ended = self.space.snapshot().newest();
    }

    /// The walk has ended: areas that are mapped from now on have no page in the lease.
    pub(super) fn walked(&mut self, snapshot: &Areas<'_>) {
        self.ended = snapshot.newest();
        self.backing = self.recorder.take().map(|all| all.finish(&self.space));
    }

    /// The runs of the lease.
    fn runs(&self) -> Runs<'_> {
        let view = self.held.view();
        match self.is_empty {
            true => Runs::none(view),
            false => view.runs(),
        }
    }

    /// The addresses of the lease.
    fn range(&self) -> IovaRange {
        self.held.view().range()
    }

    fn granule(&self) -> Granule {
        self.held.view().granule()
    }

    /// The walk has reached the end of the request, a bound, or a stop; `recorded` is what
    /// its sinks say together.
    pub(super) fn into_lease(
        mut self,
        walked: Result<Option<Iova>, Stopped>,
        recorded: Recorded,
    ) -> Lease<'a, Owed> {
        let mut bits_set = recorded.bits_set;
        match walked {
            Ok(next) => {
                self.next = next;
                if let Some(last) = next.and_then(|next| next.get().checked_sub(1)) {
                    self.end_at(Iova::new(last));
                }
            }
            Err(stopped) => {
                bits_set = bits_set.saturating_sub(self.end_below(stopped.at, recorded.up_to));
                self.stopped = Some(stopped);
            }
        }
        if !performs(Step::FlushAtSync) {
            let _ = self.flush();
        }
        if let Some(member) = self.covered.audience.own() {
            // What the walk took happens before this: see `space::epochs`.
            self.number.get_or_insert_with(|| member.epochs.number());
        }
        self.report.bits_set = bits_set;
        self.report.windows = recorded.windows;
        self.report.leaves = self.gather.entries() + self.handed_over;
        let bytes = self.bytes(bits_set);
        self.left = AtomicU64::new(bytes);
        self.space.counters.leased(bytes);
        self.count(|counts| &counts.leased, bytes);
        let stopped_at = self.stopped.as_ref().map(|stopped| stopped.at);
        events::harvest(self.range(), self.granule(), &self.report, stopped_at);
        Lease {
            holding: self,
            state: PhantomData,
        }
    }

    fn flush(&mut self) -> Result<(), Error> {
        if !self.whole.is_empty() && !self.has_caught_up && performs(Step::CatchUp) {
            // C3 and C4 of the protocol in `space::bounds`.
            self.space.catch_up().map_err(Failure::raise)?;
            self.has_caught_up = true;
        }
        if let Some(ticket) = self.queue() {
            self.space.flush_until(ticket)?;
            self.debt = Debt::Paid;
        }
        // F2 of the marks' protocol; also orders the flush before the copies.
        self.space.ordering.before_copies(Step::SyncFence);
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

    fn commit(&mut self) -> (HarvestReport, Option<Lineage>) {
        let own = self.covered.audience.own().zip(self.entry());
        let lineage = own.map(|(own, entry)| {
            let committed = lock(&self.committed);
            let rest = self.runs().flat_map(|run| committed.without(run));
            own.epochs.commit(entry, rest, &own.room())
        });
        self.debt = Debt::Settled;
        self.space.counters.commit();
        let bytes = self.take_left();
        self.space.counters.committed(bytes);
        self.count(|counts| &counts.committed, bytes);
        self.end();
        events::commit(self.range(), bytes);
        (self.report, lineage)
    }

    fn commit_part(&self, range: IovaRange) -> u64 {
        let view = self.held.view();
        let part = view.part(range).map(|view| view.range());
        let Some(part) = part.filter(|_| !self.is_empty) else {
            return 0;
        };
        let mut committed = lock(&self.committed);
        let mut bits = 0;
        for fresh in committed.without(part) {
            bits += view.part(fresh).map_or(0, |view| view.count());
        }
        if bits > 0
            && let Some((own, entry)) = self.covered.audience.own().zip(self.entry())
        {
            let fresh = committed.without(part).filter_map(|part| view.part(part));
            let runs = fresh.flat_map(|view| view.runs());
            own.epochs.commit_part(entry, runs, &own.room());
        }
        committed.add(part);
        // Relaxed, both: the lock orders them.
        let left = self.left.load(Ordering::Relaxed);
        let bytes = self.bytes(bits).min(left);
        self.left.store(left - bytes, Ordering::Relaxed);
        drop(committed);
        self.space.counters.committed(bytes);
        self.count(|counts| &counts.committed, bytes);
        events::commit_part(part, bytes);
        bits
    }

    fn put_back(&mut self) -> Aborted {
        if performs(Step::OweBeforePutBack) {
            // The debt first, then the pages: see "Why no write is lost" in the module `harvest`.
            let _ = self.queue();
        }
        if let Some(own) = self.covered.audience.own() {
            let committed = lock(&self.committed);
            let rests = self.whole.iter().flat_map(|run| committed.without(*run));
            rests.for_each(|rest| own.whole.put_back(rest, &self.space.walks));
        }
        let touched = self
            .reached
            .and_then(|last| IovaRange::new(self.range().start(), last).ok());
        let aborted = match touched {
            Some(touched) if !self.is_empty => self.put_back_runs(self.range(), touched),
            _ => Aborted::default(),
        };
        let _ = self.queue();
        self.debt = Debt::Settled;
        let left = self.take_left();
        self.space.counters.aborted(left, aborted.outside_bytes);
        self.count(|counts| &counts.aborted, left);
        if let Some((own, entry)) = self.covered.audience.own().zip(self.entry()) {
            own.epochs.abort(entry);
        }
        if let Some(own) = self.covered.audience.own() {
            self.space.keep_own_in_bounds(own);
        }
        self.end();
        events::abort(self.range(), &aborted);
        aborted
    }

    /// Adds to a count of the lease's consumer.
    fn count(&self, which: impl FnOnce(&MemberCounts) -> &AtomicU64, bytes: u64) {
        if let Some(member) = self.covered.audience.own() {
            MemberCounts::add(which(&member.counts), bytes);
        }
    }

    /// The lease is committed or put back.
    fn end(&self) {
        if let Some(member) = self.covered.audience.own() {
            member.counts.end();
        }
    }

    fn take_left(&mut self) -> u64 {
        // Relaxed: exclusive access.
        let left = self.left.load(Ordering::Relaxed);
        self.left = AtomicU64::new(0);
        left
    }

    /// Makes the runs in `part`, which consists of whole granules, dirty again, as far as they lie
    /// in `touched` and are not committed.
    fn put_back_runs(&self, part: IovaRange, touched: IovaRange) -> Aborted {
        let mut aborted = Aborted::default();
        let committed = lock(&self.committed);
        let view = self.held.view();
        for run in view.part(part).iter().flat_map(BitmapView::runs) {
            let Some(run) = touched.intersection(run) else {
                break;
            };
            for run in committed.without(run) {
                let outside = self.space.put_back(run, &self.covered, self.ended).bytes;
                aborted.outside_bytes = aborted.outside_bytes.saturating_add(outside);
                let all = u64::try_from(run.len()).unwrap_or(u64::MAX);
                aborted.bytes = aborted.bytes.saturating_add(all - outside.min(all));
            }
        }
        aborted
    }

    fn bytes(&self, bits: u64) -> u64 {
        let bytes = u128::from(bits) << self.granule().lg2();
        u64::try_from(bytes).unwrap_or(u64::MAX)
    }
}

/// The last address of `part` that a look at it has processed.
pub(super) fn walked_to(part: IovaRange, looked: &Result<(), Stopped>) -> Option<Iova> {
    match looked {
        Ok(()) => Some(part.last()),
        Err(stopped) if stopped.at > part.start() => Some(Iova::new(stopped.at.get() - 1)),
        Err(_) => None,
    }
}

/// How many bits of `view` are set, up to the first window that cannot be read; `None` if all of it
/// is clean.
fn readable(view: &BitmapView<'_>) -> Option<u64> {
    let (mut words, mut bits) = (view.words(), None);
    while let Some((_, word)) = words.next() {
        let ones = u64::from(word.count_ones());
        bits = Some(bits.unwrap_or(0) + if words.error().is_none() { ones } else { 0 });
        if words.error().is_some() {
            break;
        }
    }
    bits
}

impl Drop for Holding<'_> {
    fn drop(&mut self) {
        if !matches!(self.debt, Debt::Settled) {
            self.put_back();
        }
    }
}
