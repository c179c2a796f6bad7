//! Group commit of flushes: one flush retires every gather that was handed over before it began.

use std::time::Instant;

use super::debt::{Debt, Free, run_all};
use super::{FlushCost, FlushGather, FlushPolicy, FlushStats, Invalidated};
use crate::error::Error;
use crate::failure::go_on;
use crate::sync::{AtomicU64, Mutex, Ordering, Step, lock, performs, weaken};

/// The generation whose flush covers a gather.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[must_use = "what was gathered is covered only when its generation has finished"]
pub struct Ticket(u64);

/// Takes gathers from any number of threads and flushes them together: one flush retires every gather that was handed
/// over before it began.
///
/// [`owe`](Self::owe) and [`owe_then`](Self::owe_then) take a short lock and never wait for a flush;
/// [`wait`](Self::wait) and [`flush_due`](Self::flush_due) do. An [`AddressSpace`](crate::AddressSpace) has a queue of
/// its own; use another where something else owes invalidations.
///
/// The queue knows no invalidator: whoever may have to flush brings one, as a closure over IOTLBs, kernel interfaces or
/// several of them. All callers of one queue must bring the same: a leader flushes for the others.
///
/// ```
/// use dirtymap::{FlushGather, FlushPolicy, FlushQueue, Granule, Invalidated, Iova, IovaRange};
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
/// A queue that is dropped does not flush: who drops it has detached the devices. Frees that were handed over run.
#[derive(Debug)]
pub struct FlushQueue {
    policy: FlushPolicy,
    state: Mutex<State>,
    /// Held by the thread that flushes.
    leader: Mutex<()>,
    /// All generations below this one have finished.
    finished: AtomicU64,
}

/// Valid whenever the lock is free, also while a flush is under way: see [`FlushStats::is_consistent`].
#[derive(Debug, Default)]
struct State {
    /// What no flush has taken yet.
    debt: Debt,
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
    /// Changes the counts, after which the identities hold again.
    fn count(&mut self, change: impl FnOnce(&mut FlushStats)) {
        change(&mut self.stats);
        debug_assert!(self.stats.is_consistent(), "{:?}", self.stats);
    }
}

impl FlushQueue {
    /// A queue in which nothing is owed, that flushes ranges, and only for those who wait.
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

    /// Declares what invalidations cost: when the ranges of a debt would cost more than a full invalidation, the
    /// invalidator gets a gather that [is full](FlushGather::is_full).
    #[must_use]
    pub fn with_cost(self, cost: FlushCost) -> Self {
        self.set_cost(cost);
        self
    }

    pub(crate) fn set_policy(&mut self, policy: FlushPolicy) {
        self.policy = policy;
    }

    /// What flushes cost from the next one on.
    pub(crate) fn set_cost(&self, cost: FlushCost) {
        lock(&self.state).cost = cost;
    }

    /// Hands over what is owed. Does not flush and does not wait for a flush.
    pub fn owe(&self, gather: &FlushGather) -> Ticket {
        self.hand_over(gather, None)
    }

    /// Hands over what is owed, and what may be freed or used again only when it is paid: the memory of tables, IOVA
    /// ranges, pages. Does not flush and does not wait for a flush.
    ///
    /// `free` runs exactly once, after a flush that began after this call has finished, however many have failed
    /// before; or when the queue is dropped. Frees run one at a time, in the order in which they were handed over,
    /// without any lock of the queue, on a thread that waits for a flush or on one that runs frees already. So when
    /// [`wait`](Self::wait) returns, `free` has run or is about to.
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

    /// Returns when a flush that began after `ticket` was given has finished; performs it by `invalidate` if nobody
    /// else does. What is empty needs no invalidation, but still waits for the flush under way: that one may cover
    /// what the caller relies on.
    ///
    /// Then runs the frees that this flush allows, unless another thread is running frees. `invalidate` must not wait
    /// on the same queue: it is what the others wait for. A free may.
    ///
    /// # Errors
    /// That of `invalidate`; everything it carried stays owed, and a later call tries again.
    ///
    /// # Panics
    /// If a free panics, its panic goes on after all the others have run; not in a destructor that
    /// runs because of another panic, where it is dropped.
    pub fn wait(
        &self,
        ticket: Ticket,
        invalidate: impl FnOnce(&FlushGather) -> Result<Invalidated, Error>,
    ) -> Result<(), Error> {
        self.settle(ticket, false, invalidate)
    }

    /// Whether the debt that no flush has taken yet reaches a bound of the [`FlushPolicy`] at the time `now`.
    pub fn is_due(&self, now: Instant) -> bool {
        self.due_ticket(now).is_some()
    }

    /// When the debt reaches its greatest age; `None` if nothing is owed that no flush has taken, or age is no bound.
    /// A failed flush does not make the debt younger.
    pub fn deadline(&self) -> Option<Instant> {
        lock(&self.state)
            .debt
            .oldest
            .and_then(|oldest| self.policy.deadline(oldest))
    }

    /// If the debt [is due](Self::is_due), does as [`wait`](Self::wait) for all of it and returns true. For all who
    /// hand over, right after it: who comes when a bound is reached waits, so the debt stays bounded however slow
    /// the flushes are. And for a timer, which keeps the bound of age by calling this at [`deadline`](Self::deadline),
    /// or at most doubles it by calling this every `max_age`.
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
                return Ok(()); // the leader that we waited for releases
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
        // Acquire: pairs with the Release in `Taken::retire`; the flush's effects are visible to us.
        self.finished.load(Ordering::Acquire) > ticket.0
    }

    /// Runs what may be freed, unless another thread does so. The panic of a free goes on when all have run.
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

    /// The counts, all from one moment.
    pub fn stats(&self) -> FlushStats {
        lock(&self.state).stats
    }

    /// Takes what is pending; from now on gathers belong to the next generation.
    fn take(&self) -> Taken<'_> {
        let mut state = lock(&self.state);
        let generation = state.generation + 1;
        if performs(Step::NextGeneration) {
            state.generation = generation;
        }
        Taken {
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
        // What is ready has run: whoever makes it ready stays until it has.
        let frees = std::mem::take(&mut lock(&self.state).debt.frees);
        let mut panic = None;
        run_all(frees, &mut panic);
        go_on(panic);
    }
}

/// What a leader flushes. Dropped without `retire`, by an error or a panic of the invalidation, it becomes pending
/// again.
struct Taken<'a> {
    queue: &'a FlushQueue,
    debt: Debt,
    /// One invalidation of everything is cheaper than the ranges.
    full: bool,
    generation: u64,
    retired: bool,
}

impl Taken<'_> {
    /// The generation has finished: `flushed` counts what was done.
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
        // Release: pairs with the Acquire in `has_finished`; publishes that the invalidation is complete.
        let order = weaken(Step::PublishFinished, Ordering::Release);
        self.queue.finished.store(self.generation, order);
    }
}

impl Drop for Taken<'_> {
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
