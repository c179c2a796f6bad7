//! The contents of a lease in any state: what a walk puts into them, and how they are committed or
//! put back.

use super::backing::{Backing, Recorder};
use super::held::{Held, SpaceRef};
use super::look::{Look, below, look};
use super::shared;
use crate::bitmap::{BitmapView, Runs, Sink};
use crate::error::Error;
use crate::events;
use crate::failure::Failure;
use crate::flush::{FlushGather, Ticket};
use crate::ranges::{RangeSet, without};
use crate::report::{Aborted, HarvestReport};
use crate::source::Stopped;
#[cfg(all(feature = "rayon", not(dirtymap_loom)))]
use crate::space::AddressSpace;
use crate::space::{Area, Areas, Covered, Entry, Lineage, MemberCounts, Walk};
use crate::sync::{AtomicU64, Mutex, Ordering, Step, lock, performs};
use crate::units::{Granule, Iova, IovaRange};

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
    pub(super) space: SpaceRef<'a>,
    pub(super) held: Held<'a>,
    /// The address and the error of a stop.
    pub(super) stopped: Option<Stopped>,
    /// Whether the consumer knows that the walk stopped.
    pub(super) is_partial: bool,
    /// The address at which a bounded harvest goes on.
    pub(super) next: Option<Iova>,
    /// Whether nothing of the view is in the lease: the walk stopped at its first granule.
    pub(super) is_empty: bool,
    pub(super) covered: Covered,
    /// The version of the area tree that is walked.
    pub(super) begun: u64,
    /// The version of the area tree after the walk. Later areas were not walked.
    ended: u64,
    /// The last address that the walk may have touched; `None` before the first area.
    reached: Option<Iova>,
    /// The last address of an area below which everything is in the lease: no hole above it is.
    walked_to: Option<Iova>,
    pub(super) gather: FlushGather,
    /// Leaves whose debt the queue has already.
    handed_over: u64,
    debt: Debt,
    pub(super) report: HarvestReport,
    /// The recorder of the backing while the walk runs, if the request asks for it.
    recorder: Option<Recorder>,
    /// The same after the walk.
    pub(super) backing: Option<Backing>,
    /// The parts that were committed, in whole granules.
    committed: Mutex<RangeSet>,
    /// The number of the lease, once the walk has ended.
    number: Option<u64>,
    /// What was pending as a whole: see `space::bounds`.
    whole: Vec<IovaRange>,
    /// A range in which every area was walked, with [`Walk::put_backs`].
    walked_all: Option<(IovaRange, u64)>,
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
            walked_all: None,
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
        let Some(part) = area.range().intersection(within) else {
            return Ok(());
        };
        // A walk reaches an area once for each of its pieces, in ascending order.
        let began = area.range().start();
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
    /// there is holes, and is removed: see `space::bounds`.
    ///
    /// A store that the consumer got in the middle of the walk is younger than the areas of the
    /// walk, and stays as it is.
    pub(super) fn walked_all(&mut self, range: IovaRange, entered: &Walk<'_>) {
        if !self.covered.audience.has_moved() {
            self.walked_all = Some((range, entered.put_backs()));
            self.forget_holes();
        }
    }

    /// Removes the holes in the range that was walked, if that can be done already.
    fn forget_holes(&mut self) {
        if let Some(own) = self.covered.audience.own().filter(|o| o.has_caught_up())
            && let Some((range, put_backs)) = self.walked_all.take()
        {
            self.space.forget_holes(own, range, put_backs);
        }
    }

    /// The lease, as the epochs of its consumer see it.
    pub(super) fn entry(&self) -> Option<Entry> {
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

    /// What the lease has of `above` as a whole is pending as a whole again.
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
    pub(super) fn runs(&self) -> Runs<'_> {
        let view = self.held.view();
        match self.is_empty {
            true => Runs::none(view),
            false => view.runs(),
        }
    }

    /// The addresses of the lease.
    pub(super) fn range(&self) -> IovaRange {
        self.held.view().range()
    }

    pub(super) fn granule(&self) -> Granule {
        self.held.view().granule()
    }

    /// The walk has reached the end of the request, a bound, or a stop; `recorded` is what
    /// its sinks say together.
    pub(super) fn finish(&mut self, walked: Result<Option<Iova>, Stopped>, recorded: &Recorded) {
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
    }

    pub(super) fn flush(&mut self) -> Result<(), Error> {
        if let Some(own) = self.covered.audience.own() {
            // If a lease with a lower number has the store, it is visible here by that number.
            let younger = self.space.younger_store(own);
            let store = younger.as_ref().unwrap_or(own);
            if !store.has_caught_up() && performs(Step::CatchUp) {
                // C3 and C4 of the protocol in `space::bounds`.
                self.space.catch_up().map_err(Failure::raise)?;
                store.caught_up();
            }
        }
        self.forget_holes();
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

    pub(super) fn commit(&mut self) -> (HarvestReport, Option<Lineage>) {
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

    pub(super) fn commit_part(&self, range: IovaRange) -> u64 {
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

    pub(super) fn put_back(&mut self) -> Aborted {
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
