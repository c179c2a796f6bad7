//! Group commit of flushes: one flush retires every gather that was handed over before it began.

use super::FlushGather;
use crate::error::Error;
use crate::sync::{AtomicU64, Mutex, Ordering, Step, lock, performs};

/// What one invalidation did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Invalidated {
    /// Invalidation commands that were sent.
    pub commands: u64,
    /// Cached translations that were dropped.
    pub dropped: u64,
    /// Writes that had been translated and had to land first.
    pub drained: u64,
}

impl Invalidated {
    /// Adds what another source did for the same gather.
    pub fn add(&mut self, other: Invalidated) {
        self.commands = self.commands.saturating_add(other.commands);
        self.dropped = self.dropped.saturating_add(other.dropped);
        self.drained = self.drained.saturating_add(other.drained);
    }
}

/// The generation whose flush covers a gather.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[must_use = "what was gathered is covered only when its generation has finished"]
pub struct Ticket(u64);

/// Counts of a [`FlushQueue`]. At every moment `owed = retired + pending`, and `flushes` counts those that finished.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FlushStats {
    /// Gathers handed over, empty ones included.
    pub owed: u64,
    /// Gathers whose flush has finished.
    pub retired: u64,
    /// Gathers that wait for a flush, or whose flush is under way.
    pub pending: u64,
    /// Flushes that finished. Generations in which nothing had to be invalidated are not flushes.
    pub flushes: u64,
    /// Flushes that failed; what they carried is owed again.
    pub failed: u64,
    /// Ranges that finished flushes asked for.
    pub ranges: u64,
    /// Bytes of those ranges.
    pub bytes: u128,
    /// Leaves of those ranges that had been cleared or unmapped.
    pub entries: u64,
    /// What the invalidations did.
    pub invalidated: Invalidated,
}

/// Takes gathers from any number of threads and flushes them together: one flush retires every gather that was handed
/// over before it began.
///
/// [`owe`](Self::owe) takes a short lock and never waits for a flush; [`wait`](Self::wait) does. An
/// [`AddressSpace`](crate::AddressSpace) has one of its own; use another where something else owes invalidations.
#[derive(Debug)]
pub struct FlushQueue {
    pending: Mutex<Pending>,
    /// Held by the thread that flushes.
    leader: Mutex<()>,
    /// All generations below this one have finished.
    finished: AtomicU64,
}

#[derive(Debug)]
struct Pending {
    gather: FlushGather,
    /// The generation that `gather` will be flushed as.
    generation: u64,
    /// Gathers merged into `gather`.
    count: u64,
    stats: FlushStats,
}

impl FlushQueue {
    /// A queue in which nothing is owed.
    pub fn new() -> Self {
        FlushQueue {
            pending: Mutex::new(Pending {
                gather: FlushGather::new(),
                generation: 0,
                count: 0,
                stats: FlushStats::default(),
            }),
            leader: Mutex::new(()),
            finished: AtomicU64::new(0),
        }
    }

    /// Hands over what is owed. Does not flush and does not wait for a flush.
    pub fn owe(&self, gather: &FlushGather) -> Ticket {
        let mut pending = lock(&self.pending);
        pending.gather.merge(gather);
        pending.count += 1;
        pending.stats.owed += 1;
        pending.stats.pending += 1;
        Ticket(pending.generation)
    }

    /// Returns when a flush that began after `ticket` was given has finished; performs it by `invalidate` if nobody
    /// else does. What is empty needs no invalidation, but still waits for the flush under way: that one may cover
    /// what the caller relies on.
    ///
    /// # Errors
    /// That of `invalidate`; everything it carried stays owed, and a later call tries again.
    pub fn wait(
        &self,
        ticket: Ticket,
        invalidate: impl FnOnce(&FlushGather) -> Result<Invalidated, Error>,
    ) -> Result<(), Error> {
        // Acquire: pairs with the Release in `Taken::retire`; the flush's effects are visible to us.
        if self.finished.load(Ordering::Acquire) > ticket.0 {
            return Ok(());
        }
        let _leader = performs(Step::WaitForLeader).then(|| lock(&self.leader));
        // Acquire: as above, for the leader that we waited for.
        if self.finished.load(Ordering::Acquire) > ticket.0 {
            return Ok(());
        }
        let mut taken = self.take();
        if taken.gather.is_empty() {
            taken.retire(None);
        } else {
            let done = invalidate(&taken.gather)?;
            taken.retire(Some(done));
        }
        Ok(())
    }

    /// The counts, all from one moment.
    pub fn stats(&self) -> FlushStats {
        lock(&self.pending).stats
    }

    /// Takes what is pending; from now on gathers belong to the next generation.
    fn take(&self) -> Taken<'_> {
        let mut pending = lock(&self.pending);
        pending.generation += 1;
        Taken {
            queue: self,
            gather: std::mem::take(&mut pending.gather),
            count: std::mem::take(&mut pending.count),
            generation: pending.generation,
            retired: false,
        }
    }
}

impl Default for FlushQueue {
    fn default() -> Self {
        FlushQueue::new()
    }
}

/// What a leader flushes. Dropped without `retire`, by an error or a panic of the invalidation, it becomes pending
/// again.
struct Taken<'a> {
    queue: &'a FlushQueue,
    gather: FlushGather,
    count: u64,
    generation: u64,
    retired: bool,
}

impl Taken<'_> {
    fn retire(&mut self, done: Option<Invalidated>) {
        self.retired = true;
        let mut pending = lock(&self.queue.pending);
        let stats = &mut pending.stats;
        stats.retired += self.count;
        stats.pending -= self.count;
        if let Some(done) = done {
            stats.flushes += 1;
            stats.ranges += self.gather.ranges().len() as u64;
            stats.bytes += self.gather.bytes();
            stats.entries = stats.entries.saturating_add(self.gather.entries());
            stats.invalidated.add(done);
        }
        // Release: pairs with the Acquires in `wait`; publishes that the invalidation is complete.
        self.queue
            .finished
            .store(self.generation, Ordering::Release);
    }
}

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        if !self.retired {
            let mut pending = lock(&self.queue.pending);
            pending.gather.merge(&self.gather);
            pending.count += self.count;
            pending.stats.failed += 1;
        }
    }
}

#[cfg(all(test, not(dirtymap_loom)))]
#[allow(clippy::unwrap_used)] // helpers of tests
mod tests {
    use super::*;
    use crate::units::{Granule, Iova, IovaRange};

    fn gather(start: u64) -> FlushGather {
        let mut gather = FlushGather::new();
        gather.add(
            IovaRange::from_len(Iova::new(start), 4096).unwrap(),
            Granule::K4,
        );
        gather
    }

    #[test]
    fn one_flush_retires_all_that_was_owed_before_it() {
        let queue = FlushQueue::new();
        let first = queue.owe(&gather(0));
        let second = queue.owe(&gather(0x10_0000));
        let mut asked = 0;
        queue
            .wait(second, |g| {
                asked = g.ranges().len();
                Ok(Invalidated::default())
            })
            .unwrap();
        assert_eq!(asked, 2);
        queue.wait(first, |_| panic!("already covered")).unwrap();
        let stats = queue.stats();
        assert_eq!(
            (stats.owed, stats.retired, stats.pending, stats.flushes),
            (2, 2, 0, 1)
        );
    }

    #[test]
    fn an_empty_gather_needs_no_flush() {
        let queue = FlushQueue::new();
        let ticket = queue.owe(&FlushGather::new());
        queue.wait(ticket, |_| panic!("nothing is owed")).unwrap();
        assert_eq!((queue.stats().retired, queue.stats().flushes), (1, 0));
    }

    #[test]
    fn what_a_failed_flush_carried_stays_owed() {
        let queue = FlushQueue::new();
        let ticket = queue.owe(&gather(0));
        let failing = |_: &FlushGather| Err(Error::ZeroLength { start: Iova::MIN });
        assert!(queue.wait(ticket, failing).is_err());
        let panicking = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            let _ = queue.wait(ticket, |_| panic!("a broken invalidator"));
        }));
        assert!(panicking.is_err());
        assert_eq!(
            (
                queue.stats().failed,
                queue.stats().pending,
                queue.stats().retired
            ),
            (2, 1, 0)
        );
        // Somebody else's empty gather finds the debt and pays it.
        let other = queue.owe(&FlushGather::new());
        let mut seen = 0;
        queue
            .wait(other, |g| {
                seen = g.entries();
                Ok(Invalidated::default())
            })
            .unwrap();
        assert_eq!(seen, 1);
        queue.wait(ticket, |_| panic!("paid")).unwrap();
        let stats = queue.stats();
        assert_eq!((stats.owed, stats.retired, stats.pending), (2, 2, 0));
    }
}
