//! Group commit of flushes: one flush retires every gather that was handed over before it began.

use std::time::Instant;

use super::debt::{Free, SharedDebt, run_all};
use super::{FlushCost, FlushGather, FlushPolicy, FlushStats, Invalidated};
use crate::error::Error;
use crate::failure::go_on;
use crate::sync::{AtomicU64, Mutex, Ordering, Step, lock, performs, weaken};

/// The generation whose flush covers a gather. Later generations compare greater.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[must_use = "what was gathered is covered only when its generation has finished"]
pub struct Ticket(u64);

/// Takes gathers from any number of threads and flushes them together (*group commit*): one flush
/// retires every gather that was handed over before it began. The DMA
/// layer of Linux has such a queue (`iova_fq`).
///
/// [`owe`](Self::owe) and [`owe_then`](Self::owe_then) take a short lock and never wait for a
/// flush; [`wait`](Self::wait) and [`flush_due`](Self::flush_due) do. An
/// [`AddressSpace`](crate::AddressSpace) has a queue of its own; use another where something else
/// owes invalidations.
///
/// The queue contains no invalidator. A thread that may have to flush passes one, as a closure over
/// IOTLBs, kernel interfaces or several of them. All callers of one queue must pass the same one,
/// because a leader flushes for the other threads.
///
/// ```
/// use dirtymap::flush::{FlushGather, FlushQueue, Invalidated};
/// use dirtymap::{FlushPolicy, Granule, Iova, IovaRange};
/// use std::time::Instant;
///
/// # fn main() -> Result<(), dirtymap::Error> {
/// let queue = FlushQueue::new().with_policy(FlushPolicy {
///     max_pending: Some(256),
///     ..FlushPolicy::default()
/// });
/// let range = IovaRange::from_len(Iova::new(0x1000), 0x1000)?;
/// let mut gather = FlushGather::new();
/// gather.add(range, Granule::K4); // after the translation was removed
/// let _ = queue.owe_then(&gather, move || println!("{range} can be used again"));
/// // Every 256th call flushes, for all that came before it.
/// queue.flush_due(Instant::now(), |gather| {
///     // Send one command for each of gather.ranges(), and wait for the devices.
///     Ok(Invalidated::default())
/// })?;
/// # Ok(())
/// # }
/// ```
///
/// # Dropping it
/// A queue that is dropped does not flush: the thread that drops it has detached the devices
/// before. Frees that were handed over run.
///
/// # Panics
/// Dropping it panics if a free panics, after all others have run.
#[doc(alias = "iova_fq")]
#[doc(alias = "queue_iova")]
#[derive(Debug)]
pub struct FlushQueue {
    policy: FlushPolicy,
    state: Mutex<State>,
    /// Held by the thread that flushes.
    leader: Mutex<()>,
    /// All generations below this one have finished.
    finished: AtomicU64,
}

/// Valid whenever the lock is free, also during a flush: see [`FlushStats::is_consistent`].
#[derive(Debug, Default)]
struct State {
    /// The debt that no flush has taken yet.
    debt: SharedDebt,
    cost: FlushCost,
    /// The generation that `debt` will be flushed as.
    generation: u64,
    /// Frees whose flush has finished, oldest first.
    ready: Vec<Free>,
    /// A thread is running frees, and will look at `ready` before it stops.
    releasing: bool,
    stats: FlushStats,
}

impl State {
    /// Changes the counts. The identities hold again afterwards.
    fn count(&mut self, change: impl FnOnce(&mut FlushStats)) {
        change(&mut self.stats);
        debug_assert!(self.stats.is_consistent(), "{:?}", self.stats);
    }
}

impl FlushQueue {
    /// A queue in which nothing is owed. It has no bounds, and no declared cost: it flushes ranges,
    /// and only when a thread waits.
    pub fn new() -> Self {
        FlushQueue {
            policy: FlushPolicy::default(),
            state: Mutex::new(State::default()),
            leader: Mutex::new(()),
            finished: AtomicU64::new(0),
        }
    }

    /// Sets the bounds at which a debt is due.
    #[must_use]
    pub fn with_policy(mut self, policy: FlushPolicy) -> Self {
        self.set_policy(policy);
        self
    }

    /// Declares what invalidations cost. When the ranges of a debt would cost more than a full
    /// invalidation, the invalidator gets a gather that [is full](FlushGather::is_full).
    #[must_use]
    pub fn with_cost(self, cost: FlushCost) -> Self {
        self.set_cost(cost);
        self
    }

    pub(crate) fn set_policy(&mut self, policy: FlushPolicy) {
        self.policy = policy;
    }

    /// Declares what invalidations cost from the next flush on.
    pub(crate) fn set_cost(&self, cost: FlushCost) {
        lock(&self.state).cost = cost;
    }

    /// Hands over the debt of `gather`. Takes a short lock; neither flushes nor waits for a flush.
    pub fn owe(&self, gather: &FlushGather) -> Ticket {
        self.hand_over(gather, None)
    }

    /// Hands over the debt of `gather`, together with a call that frees what may be used again only
    /// after that debt is paid: the memory of tables, IOVA ranges, pages. Takes a short lock;
    /// neither flushes nor waits for a flush.
    ///
    /// `free` runs exactly once: after the end of a flush that began after this call, however many
    /// flushes failed before; or when the queue is dropped. Frees run one at a time, in the order
    /// in which they were handed over, without any lock of the queue. They run on a thread that
    /// waits for a flush, or on one that is running frees already. So when [`wait`](Self::wait)
    /// returns, `free` has run or is about to.
    ///
    /// ```
    /// use dirtymap::flush::{FlushGather, FlushQueue, Invalidated};
    /// use dirtymap::{Granule, ToIovaRange};
    /// use std::sync::Arc;
    /// use std::sync::atomic::{AtomicBool, Ordering};
    ///
    /// # fn main() -> Result<(), dirtymap::Error> {
    /// let queue = FlushQueue::new();
    /// let mut gather = FlushGather::new();
    /// gather.add((0x1000..0x2000).to_iova_range()?, Granule::K4);
    /// let freed = Arc::new(AtomicBool::new(false));
    /// let table = Arc::clone(&freed);
    /// let ticket = queue.owe_then(&gather, move || table.store(true, Ordering::Release));
    /// assert!(!freed.load(Ordering::Acquire)); // a device may still walk the table
    /// queue.wait(ticket, |_| Ok(Invalidated::default()))?;
    /// assert!(freed.load(Ordering::Acquire));
    /// # Ok(())
    /// # }
    /// ```
    pub fn owe_then(&self, gather: &FlushGather, free: impl FnOnce() + Send + 'static) -> Ticket {
        self.hand_over(gather, Some(Free::new(free)))
    }

    fn hand_over(&self, gather: &FlushGather, free: Option<Free>) -> Ticket {
        let mut state = lock(&self.state);
        let frees = u64::from(free.is_some());
        if self.policy.max_age.is_some() && state.debt.oldest.is_none() {
            state.debt.oldest = Some(Instant::now());
        }
        state.debt.add(gather);
        if performs(Step::FreeAfterFlush) {
            state.debt.frees.extend(free);
        } else {
            state.ready.extend(free);
        }
        state.count(|stats| {
            stats.owed += 1;
            stats.pending += 1;
            stats.entries_owed += u128::from(gather.entries());
            stats.entries_pending += u128::from(gather.entries());
            stats.frees_owed += frees;
            stats.frees_pending += frees;
        });
        Ticket(state.generation)
    }

    /// Returns when a flush that began after `ticket` was given has finished. If no other thread
    /// performs that flush, this call does, by `invalidate`. An empty debt needs no invalidation,
    /// but the call still waits for the flush under way, which may cover other memory that the
    /// caller relies on.
    ///
    /// The call then runs the frees that this flush allows, unless another thread is running frees.
    /// `invalidate` must not wait on the same queue, because other threads wait for it. A free may.
    ///
    /// # Errors
    /// The error of `invalidate`; everything that this flush carried stays owed, and a later call
    /// tries again.
    ///
    /// # Panics
    /// If a free panics, its panic goes on after all the others have run. In a destructor that runs
    /// because of another panic, it is dropped instead.
    pub fn wait(
        &self,
        ticket: Ticket,
        invalidate: impl FnOnce(&FlushGather) -> Result<Invalidated, Error>,
    ) -> Result<(), Error> {
        self.settle(ticket, false, invalidate)
    }

    /// Whether the debt that no flush has taken yet reaches a bound of the [`FlushPolicy`] at the
    /// time `now`.
    pub fn is_due(&self, now: Instant) -> bool {
        self.due_ticket(now).is_some()
    }

    /// When the debt reaches its greatest age; `None` if no debt waits for a flush, or age is no
    /// bound. A failed flush does not make the debt younger.
    pub fn deadline(&self) -> Option<Instant> {
        lock(&self.state)
            .debt
            .oldest
            .and_then(|oldest| self.policy.deadline(oldest))
    }

    /// If the debt [is due](Self::is_due), does the same as [`wait`](Self::wait) for all of it and
    /// returns true; otherwise returns false.
    ///
    /// Every thread that hands over a gather calls this right afterwards: a thread that reaches a
    /// bound then waits, so the debt stays bounded however slow the flushes are. A timer calls it
    /// for the bound on age: at [`deadline`](Self::deadline) to meet the bound, or every `max_age`
    /// to reach at most twice the bound.
    ///
    /// # Errors
    /// As for [`wait`](Self::wait); the debt stays due.
    ///
    /// # Panics
    /// As for [`wait`](Self::wait).
    pub fn flush_due(
        &self,
        now: Instant,
        invalidate: impl FnOnce(&FlushGather) -> Result<Invalidated, Error>,
    ) -> Result<bool, Error> {
        let Some(ticket) = self.due_ticket(now) else {
            return Ok(false);
        };
        self.settle(ticket, true, invalidate)?;
        Ok(true)
    }

    /// The ticket of the debt, if it is due.
    fn due_ticket(&self, now: Instant) -> Option<Ticket> {
        let state = lock(&self.state);
        let debt = &state.debt;
        let too_old = || {
            let deadline = debt.oldest.and_then(|oldest| self.policy.deadline(oldest));
            deadline.is_some_and(|deadline| now >= deadline)
        };
        let is_due = debt.gathers > 0
            && (self.policy.is_reached(debt.gathers, || debt.gather.bytes()) || too_old());
        is_due.then_some(Ticket(state.generation))
    }

    fn settle(
        &self,
        ticket: Ticket,
        forced: bool,
        invalidate: impl FnOnce(&FlushGather) -> Result<Invalidated, Error>,
    ) -> Result<(), Error> {
        if self.has_finished(ticket) {
            return Ok(());
        }
        lock(&self.state).count(|stats| stats.waits += 1);
        {
            let _leader = performs(Step::WaitForLeader).then(|| lock(&self.leader));
            if self.has_finished(ticket) {
                return Ok(()); // the leader that we waited for runs the frees
            }
            let mut taken = self.take();
            if taken.debt.gather.is_empty() {
                taken.retire(|_| ());
            } else if taken.full {
                let done = invalidate(&taken.debt.gather.to_full())?;
                taken.retire(|stats| {
                    stats.flushed(done, forced);
                    stats.full += 1;
                });
            } else {
                let done = invalidate(&taken.debt.gather)?;
                taken.retire(|stats| stats.flushed(done, forced));
            }
        }
        self.release();
        Ok(())
    }

    fn has_finished(&self, ticket: Ticket) -> bool {
        // Acquire: pairs with the Release in `GroupFlush::retire`. If this load sees that store,
        // the flush is complete, and its effects are visible here; if it sees an older one, the
        // caller waits.
        self.finished.load(Ordering::Acquire) > ticket.0
    }

    /// Runs the frees that are ready, unless another thread does so. The panic of a free goes on
    /// when all have run.
    fn release(&self) {
        let mut ready = {
            let mut state = lock(&self.state);
            let another_releases = state.releasing && performs(Step::OneReleases);
            if another_releases || state.ready.is_empty() {
                return;
            }
            state.releasing = true;
            std::mem::take(&mut state.ready)
        };
        let mut panic = None;
        while !ready.is_empty() {
            let count = ready.len() as u64;
            run_all(ready, &mut panic);
            let mut state = lock(&self.state);
            state.count(|stats| {
                stats.frees_released += count;
                stats.frees_pending -= count;
            });
            ready = std::mem::take(&mut state.ready);
            state.releasing = !ready.is_empty();
        }
        go_on(panic);
    }

    /// The counts, all read under one lock.
    pub fn stats(&self) -> FlushStats {
        lock(&self.state).stats
    }

    /// Takes all that is pending. From now on gathers belong to the next generation.
    fn take(&self) -> GroupFlush<'_> {
        let mut state = lock(&self.state);
        let generation = state.generation + 1;
        if performs(Step::NextGeneration) {
            state.generation = generation;
        }
        GroupFlush {
            queue: self,
            full: state.cost.prefers_full(&state.debt.gather),
            debt: std::mem::take(&mut state.debt),
            generation,
            retired: false,
        }
    }
}

impl Default for FlushQueue {
    fn default() -> Self {
        FlushQueue::new()
    }
}

impl Drop for FlushQueue {
    fn drop(&mut self) {
        // The ready frees have run: the thread that makes them ready also borrows the queue until
        // they have.
        let frees = std::mem::take(&mut lock(&self.state).debt.frees);
        let mut panic = None;
        run_all(frees, &mut panic);
        go_on(panic);
    }
}

/// The debt that a leader flushes. If it is dropped without `retire`, because of an error or a
/// panic of the invalidation, the debt becomes pending again.
struct GroupFlush<'a> {
    queue: &'a FlushQueue,
    debt: SharedDebt,
    /// Whether one full invalidation is cheaper than the ranges.
    full: bool,
    generation: u64,
    retired: bool,
}

impl GroupFlush<'_> {
    /// The generation has finished. `flushed` counts what was done.
    fn retire(&mut self, flushed: impl FnOnce(&mut FlushStats)) {
        self.retired = true;
        let debt = std::mem::take(&mut self.debt);
        let mut state = lock(&self.queue.state);
        state.ready.extend(debt.frees);
        state.count(|stats| {
            flushed(stats);
            stats.retired += debt.gathers;
            stats.pending -= debt.gathers;
            stats.merged += debt.gathers.saturating_sub(1);
            stats.ranges = stats
                .ranges
                .saturating_add(debt.gather.ranges().len() as u64);
            stats.bytes = stats.bytes.saturating_add(debt.gather.bytes());
            stats.entries += debt.entries;
            stats.entries_pending -= debt.entries;
        });
        // Release: pairs with the Acquire in `has_finished`. A thread that sees this number also
        // sees that the invalidation is complete; a thread that sees an older one waits.
        let order = weaken(Step::PublishFinished, Ordering::Release);
        self.queue.finished.store(self.generation, order);
    }
}

impl Drop for GroupFlush<'_> {
    fn drop(&mut self) {
        if !self.retired {
            let mut state = lock(&self.queue.state);
            if performs(Step::OweAgain) {
                let newer = std::mem::replace(&mut state.debt, std::mem::take(&mut self.debt));
                state.debt.append(newer);
            }
            state.count(|stats| stats.failed += 1);
        }
    }
}
