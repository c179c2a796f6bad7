//! The flush queue under many threads: how few flushes they need, and that it has none of the flaws
//! of Linux's queue of deferred flushes (`dma-iommu.c`). The tests force the interleavings that
//! matter: a flush blocks until the other threads have arrived.
#![cfg(not(dirtymap_loom))]
#![allow(clippy::unwrap_used)] // helpers of tests

mod common;

use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Barrier, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use common::{Fake, pages};
use dirtymap::flush::{FlushCost, FlushGather, FlushQueue, Invalidated};
use dirtymap::{
    Access, AddressSpace, Error, FlushPolicy, Granule, HarvestRequest, IovaRange, UserBitmap,
};

fn gather(page: u64) -> FlushGather {
    let mut gather = FlushGather::new();
    gather.add(pages(page, 1), Granule::K4);
    gather
}

fn flushes(gather: &FlushGather) -> Result<Invalidated, Error> {
    Ok(Invalidated {
        commands: gather.ranges().len() as u64,
        bytes: gather.bytes(),
        ..Invalidated::default()
    })
}

/// A flush that blocks: it sends on `began` when it begins, and ends when it receives from `go`.
struct Standing {
    began: Receiver<()>,
    go: Sender<()>,
}

fn standing() -> (Standing, impl FnOnce() + Send + 'static) {
    let (say, began) = channel();
    let (go, wait) = channel();
    let stand = move || {
        say.send(()).unwrap();
        wait.recv().unwrap();
    };
    (Standing { began, go }, stand)
}

/// Polls until `condition` holds. Fails after a time that only a hang takes.
fn until(condition: impl Fn() -> bool) {
    let begun = Instant::now();
    while !condition() {
        assert!(begun.elapsed() < Duration::from_secs(60), "a hang");
        thread::yield_now();
    }
}

/// A queue, and the numbers of the items that it has freed.
struct Rig {
    queue: FlushQueue,
    freed: Arc<Mutex<Vec<u64>>>,
}

impl Rig {
    fn new(policy: FlushPolicy) -> Self {
        Rig {
            queue: FlushQueue::new().with_policy(policy),
            freed: Arc::default(),
        }
    }

    fn owe(&self, n: u64) -> dirtymap::flush::Ticket {
        let freed = self.freed.clone();
        self.queue
            .owe_then(&gather(2 * n), move || freed.lock().unwrap().push(n))
    }

    fn freed(&self) -> Vec<u64> {
        self.freed.lock().unwrap().clone()
    }

    /// The queue is empty, and each of `0..n` was freed once, in order.
    fn check_all_freed(&self, n: u64) {
        assert_eq!(self.freed(), (0..n).collect::<Vec<_>>());
        let stats = self.queue.stats();
        assert_eq!((stats.pending, stats.frees_pending), (0, 0), "{stats:?}");
        assert_eq!((stats.retired, stats.frees_released), (n, n), "{stats:?}");
    }
}

/// In Linux's queue, a full ring flushes and frees the entries whose flush has ended. Entries that
/// were added during another CPU's flush wait for that one, so the ring's own flush frees nothing.
/// The next entry fills the last slot, and the full ring reads as empty.
#[test]
fn a_full_queue_leaks_nothing_while_another_flush_is_under_way() {
    let rig = Rig::new(FlushPolicy {
        max_pending: Some(4),
        ..FlushPolicy::default()
    });
    let (standing, stand) = standing();
    thread::scope(|scope| {
        let first = rig.owe(0);
        let rig = &rig;
        scope.spawn(move || {
            let invalidate = |gather: &FlushGather| {
                stand();
                flushes(gather)
            };
            rig.queue.wait(first, invalidate).unwrap();
        });
        standing.began.recv().unwrap();
        for n in 1..5 {
            let _ = rig.owe(n);
        }
        assert!(rig.queue.is_due(Instant::now()), "full");
        let full = scope.spawn(|| rig.queue.flush_due(Instant::now(), flushes).unwrap());
        until(|| rig.queue.stats().waits == 2);
        for n in 5..9 {
            let _ = rig.owe(n);
        }
        assert!(
            rig.freed().is_empty(),
            "the flush under way has not finished"
        );
        standing.go.send(()).unwrap();
        assert!(full.join().unwrap());
    });
    rig.check_all_freed(9);
    let stats = rig.queue.stats();
    assert_eq!((stats.flushes, stats.forced, stats.merged), (2, 1, 7));
}

/// The same timing with Linux's timer: its flush frees nothing, and the timer is armed again only
/// by the next entry.
#[test]
fn a_timer_strands_nothing_while_another_flush_is_under_way_or_fails() {
    let rig = Rig::new(FlushPolicy {
        max_age: Some(Duration::from_secs(1000)),
        ..FlushPolicy::default()
    });
    let (standing, stand) = standing();
    thread::scope(|scope| {
        let first = rig.owe(0);
        let rig = &rig;
        scope.spawn(move || {
            let invalidate = |gather: &FlushGather| {
                stand();
                flushes(gather)
            };
            rig.queue.wait(first, invalidate).unwrap();
        });
        standing.began.recv().unwrap();
        let _ = rig.owe(1);
        let now = rig.queue.deadline().unwrap();
        let timer = scope.spawn(move || rig.queue.flush_due(now, flushes).unwrap());
        until(|| rig.queue.stats().waits == 2);
        assert!(
            rig.freed().is_empty(),
            "the flush under way has not finished"
        );
        standing.go.send(()).unwrap();
        assert!(timer.join().unwrap());
    });
    rig.check_all_freed(2);
    assert_eq!(rig.queue.deadline(), None, "nothing to wake up for");

    // A debt that arrives during the flush of the timer has a deadline of its own. A debt whose
    // flush failed keeps its deadline.
    let _ = rig.owe(2);
    let armed = rig.queue.deadline();
    let failing = rig.queue.flush_due(armed.unwrap(), |_| {
        assert_eq!(rig.queue.deadline(), None);
        let _ = rig.owe(3);
        assert!(rig.queue.deadline() >= armed);
        Err(Error::source_failed(common::Broken))
    });
    assert!(failing.is_err());
    assert_eq!(rig.queue.deadline(), armed);
    let flushed = rig.queue.flush_due(armed.unwrap(), |gather| {
        let _ = rig.owe(4);
        flushes(gather)
    });
    assert!(flushed.unwrap());
    assert_eq!(rig.freed(), [0, 1, 2, 3]);
    let armed = rig.queue.deadline().unwrap();
    assert!(rig.queue.flush_due(armed, flushes).unwrap());
    rig.check_all_freed(5);
}

/// Linux's queue always invalidates everything. Here neighbours are joined to one range, and all
/// other translations stay cached.
#[test]
fn neighbours_are_one_range_in_one_flush_of_their_bytes_only() {
    let queue = FlushQueue::new();
    let tickets: Vec<_> = (0..100).rev().map(|n| queue.owe(&gather(n))).collect();
    for ticket in tickets {
        let wait = queue.wait(ticket, |gather| {
            assert_eq!(gather.ranges(), [pages(0, 100)]);
            flushes(gather)
        });
        wait.unwrap();
    }
    let stats = queue.stats();
    assert_eq!((stats.flushes, stats.full, stats.merged), (1, 0, 99));
    assert_eq!(stats.invalidated.bytes, 100 * 4096);
}

/// In Linux's queue no thread waits for the running flush, however much is pending. Here a thread
/// that hands over a debt waits once a bound is reached. So the debt in the queue and that of the
/// running flush each stay within the bound plus one gather for each thread.
#[test]
fn what_is_pending_stays_bounded_under_many_threads() {
    const MAX: u64 = 8;
    const THREADS: u64 = 4;
    const EACH: u64 = 300;
    let queue = FlushQueue::new().with_policy(FlushPolicy {
        max_pending: Some(MAX),
        ..FlushPolicy::default()
    });
    let most = Mutex::new(0);
    thread::scope(|scope| {
        for thread in 0..THREADS {
            let (queue, most) = (&queue, &most);
            scope.spawn(move || {
                for n in 0..EACH {
                    let _ = queue.owe_then(&gather(thread * 10_000 + 2 * n), || ());
                    let stats = queue.stats();
                    {
                        let mut most = most.lock().unwrap();
                        *most = stats.pending.max(*most);
                    }
                    let slow = |gather: &FlushGather| {
                        thread::yield_now();
                        flushes(gather)
                    };
                    queue.flush_due(Instant::now(), slow).unwrap();
                }
            });
        }
    });
    let most = most.into_inner().unwrap();
    assert!(most <= 2 * (MAX - 1 + THREADS), "{most} were pending");
    let stats = queue.stats();
    assert!(stats.pending < MAX, "{stats:?}");
    assert!(stats.flushes <= THREADS * EACH / MAX + 1, "{stats:?}");
    assert_eq!(stats.forced, stats.flushes);
    assert_eq!(stats.frees_released, stats.retired);
}

#[test]
fn tickets_taken_before_the_first_wait_need_one_flush_and_a_second_if_one_is_under_way() {
    for threads in [1, 2, 4, 8] {
        for under_way in [false, true] {
            let queue = FlushQueue::new();
            let (standing, stand) = standing();
            let all_owe = Barrier::new(threads as usize);
            thread::scope(|scope| {
                if under_way {
                    let ticket = queue.owe(&gather(1000));
                    let queue = &queue;
                    scope.spawn(move || {
                        let invalidate = |gather: &FlushGather| {
                            stand();
                            flushes(gather)
                        };
                        queue.wait(ticket, invalidate).unwrap();
                    });
                    standing.began.recv().unwrap();
                }
                for n in 0..threads {
                    let (queue, all_owe) = (&queue, &all_owe);
                    scope.spawn(move || {
                        let ticket = queue.owe(&gather(2 * n));
                        all_owe.wait();
                        queue.wait(ticket, flushes).unwrap();
                    });
                }
                if under_way {
                    until(|| queue.stats().waits == threads + 1);
                    standing.go.send(()).unwrap();
                }
            });
            let stats = queue.stats();
            let before = u64::from(under_way);
            assert_eq!(stats.flushes, 1 + before, "{stats:?}");
            assert_eq!((stats.retired, stats.pending), (threads + before, 0));
            assert_eq!(stats.merged, threads - 1);
        }
    }
}

/// Eight pages of one source, all dirty.
fn dirty_space() -> (AddressSpace, Arc<Fake>) {
    let fake = Arc::new(Fake::default());
    let space = AddressSpace::with_source(Granule::K4, fake.clone()).unwrap();
    space.map(pages(0, 8), 0, Access::ReadWrite).unwrap();
    space.start_tracking().unwrap();
    (0..8).for_each(|page| fake.dirty(page));
    (space, fake)
}

fn request(page: u64) -> HarvestRequest<'static> {
    HarvestRequest::new(pages(page, 1), Granule::K4)
}

#[test]
fn harvesters_that_sync_together_need_two_flushes() {
    for harvesters in [1, 2, 4, 8] {
        let (space, fake) = dirty_space();
        let before = space.stats().flush;
        let (standing, stand) = standing();
        fake.with(|s| s.on_invalidate = Some(Box::new(stand)));
        thread::scope(|scope| {
            for page in 0..harvesters {
                let space = &space;
                scope.spawn(move || {
                    let mut words = [0];
                    let lease = space
                        .harvest(&request(page), UserBitmap::new(&mut words))
                        .unwrap();
                    let lease = lease.sync().unwrap();
                    assert_eq!(lease.runs().collect::<Vec<_>>(), [pages(page, 1)]);
                    lease.commit();
                });
            }
            // The first flush blocks until all others have handed over.
            standing.began.recv().unwrap();
            until(|| space.stats().flush.owed == before.owed + harvesters);
            standing.go.send(()).unwrap();
        });
        let after = space.stats().flush;
        assert!(after.flushes - before.flushes <= 2, "{after:?}");
        assert_eq!(after.retired - before.retired, harvesters);
        assert_eq!(after.pending, 0);
    }
}

#[test]
fn the_debts_of_leases_that_were_dropped_are_paid_by_the_next_sync() {
    let (space, _) = dirty_space();
    let before = space.stats().flush;
    for page in 0..7 {
        let mut words = [0];
        let lease = space.harvest(&request(page), UserBitmap::new(&mut words));
        drop(lease.unwrap());
    }
    let owing = space.stats().flush;
    assert_eq!((owing.flushes, owing.pending), (before.flushes, 7));
    assert_eq!(owing.entries_pending, 7);
    let mut words = [0];
    let lease = space
        .harvest(&request(7), UserBitmap::new(&mut words))
        .unwrap();
    lease.sync().unwrap().commit();
    let after = space.stats().flush;
    assert_eq!((after.flushes, after.pending), (before.flushes + 1, 0));
    assert_eq!((after.ranges, after.bytes), (1, 8 * 4096));
    assert_eq!((after.entries, after.entries_pending), (8, 0));
}

#[test]
fn the_debts_of_leases_that_were_dropped_can_be_due() {
    let (space, fake) = dirty_space();
    let space = space.with_flush_policy(FlushPolicy {
        max_pending: Some(2),
        max_age: Some(Duration::from_secs(1000)),
        ..FlushPolicy::default()
    });
    assert_eq!(space.flush_deadline(), None);
    let abort = |page| {
        let mut words = [0];
        let lease = space.harvest(&request(page), UserBitmap::new(&mut words));
        let _ = lease.unwrap().abort();
    };
    abort(0);
    let now = Instant::now();
    let deadline = space.flush_deadline().unwrap();
    assert!(!space.flush_due(now).unwrap());
    fake.with(|s| s.fail_invalidations = 1);
    assert!(space.flush_due(deadline).is_err());
    assert!(space.flush_due(deadline).unwrap(), "by age");
    abort(1);
    abort(2);
    assert!(space.flush_due(now).unwrap(), "by count");
    let flush = space.stats().flush;
    assert_eq!((flush.forced, flush.failed, flush.pending), (2, 1, 0));
}

#[test]
fn the_sources_of_a_space_decide_together_when_everything_is_cheaper() {
    let sources = [100, 900].map(|full| {
        let fake = Arc::new(Fake::default());
        fake.with(|s| {
            s.flush_cost = FlushCost {
                per_range: 250,
                per_leaf: 0,
                full,
            }
        });
        fake
    });
    let [first, second] = sources.clone();
    let space = AddressSpace::with_source(Granule::K4, first).unwrap();
    space.attach(second).unwrap();
    space.map(pages(0, 8), 0, Access::ReadWrite).unwrap();
    space.start_tracking().unwrap();
    for (dirty, full) in [(&[0, 2][..], false), (&[0, 2, 4], true)] {
        for page in dirty {
            sources[0].dirty(*page);
        }
        let before = space.stats().flush.full;
        let mut words = [0];
        let all = HarvestRequest::new(pages(0, 8), Granule::K4);
        let lease = space.harvest(&all, UserBitmap::new(&mut words)).unwrap();
        lease.sync().unwrap().commit();
        assert_eq!(space.stats().flush.full - before, u64::from(full));
        for source in &sources {
            let asked = source.with(|s| std::mem::take(&mut s.invalidated));
            assert_eq!(asked == [IovaRange::ALL], full, "{asked:?}");
        }
    }
}
