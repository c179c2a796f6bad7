//! The queue, in one thread or in an order that the test fixes. `tests/loom.rs` explores its races.
#![allow(clippy::unwrap_used)] // helpers of tests

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::*;
use crate::error::Error;
use crate::units::{Granule, Iova, IovaRange, RangeError};

fn gather(start: u64) -> FlushGather {
    let mut gather = FlushGather::new();
    gather.add(
        IovaRange::from_len(Iova::new(start), 4096).unwrap(),
        Granule::K4,
    );
    gather
}

fn flushes(gather: &FlushGather) -> Result<Invalidated, Error> {
    Ok(Invalidated {
        commands: gather.ranges().len() as u64,
        bytes: gather.bytes(),
        ..Invalidated::default()
    })
}

fn fails(_: &FlushGather) -> Result<Invalidated, Error> {
    Err(Error::Range(RangeError::ZeroLength { start: Iova::MIN }))
}

/// Records the order in which frees run.
#[derive(Clone, Default)]
struct Freed(Arc<Mutex<Vec<u64>>>);

impl Freed {
    fn note(&self, n: u64) -> impl FnOnce() + Send + use<> {
        let freed = self.clone();
        move || freed.0.lock().unwrap().push(n)
    }

    fn order(&self) -> Vec<u64> {
        self.0.lock().unwrap().clone()
    }
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
            flushes(g)
        })
        .unwrap();
    assert_eq!(asked, 2);
    queue.wait(first, |_| panic!("already covered")).unwrap();
    let stats = queue.stats();
    assert_eq!(
        stats,
        FlushStats {
            owed: 2,
            retired: 2,
            merged: 1,
            flushes: 1,
            waits: 1,
            ranges: 2,
            bytes: 8192,
            entries_owed: 2,
            entries: 2,
            invalidated: Invalidated {
                commands: 2,
                bytes: 8192,
                ..Invalidated::default()
            },
            ..FlushStats::default()
        }
    );
}

/// Linux began to skip flushes whose range was empty, and broke drivers that never set a range.
/// Here "empty" is a state of its own, and only a gather without additions is in it.
#[test]
fn an_empty_gather_needs_no_flush() {
    let queue = FlushQueue::new();
    let freed = Freed::default();
    let ticket = queue.owe_then(&FlushGather::new(), freed.note(0));
    queue.wait(ticket, |_| panic!("nothing is owed")).unwrap();
    assert_eq!((queue.stats().retired, queue.stats().flushes), (1, 0));
    assert_eq!(freed.order(), [0]);
}

#[test]
fn what_a_failed_flush_carried_stays_owed() {
    let queue = FlushQueue::new();
    let ticket = queue.owe(&gather(0));
    assert!(queue.wait(ticket, fails).is_err());
    let panicking = catch_unwind(AssertUnwindSafe(|| {
        let _ = queue.wait(ticket, |_| panic!("a broken invalidator"));
    }));
    assert!(panicking.is_err());
    let stats = queue.stats();
    assert_eq!((stats.failed, stats.pending, stats.retired), (2, 1, 0));
    assert_eq!((stats.entries_owed, stats.entries_pending), (1, 1));
    // The empty gather of another thread finds the debt and pays it.
    let other = queue.owe(&FlushGather::new());
    let mut seen = 0;
    queue
        .wait(other, |g| {
            seen = g.entries();
            flushes(g)
        })
        .unwrap();
    assert_eq!(seen, 1);
    queue.wait(ticket, |_| panic!("paid")).unwrap();
    let stats = queue.stats();
    assert_eq!((stats.owed, stats.retired, stats.pending), (2, 2, 0));
}

#[test]
fn frees_run_once_and_in_order_after_the_flush_that_failed_first() {
    let queue = FlushQueue::new();
    let freed = Freed::default();
    let mut ticket = queue.owe_then(&gather(0), freed.note(0));
    for n in 1..4 {
        assert!(queue.wait(ticket, fails).is_err());
        assert!(freed.order().is_empty());
        assert_eq!(queue.stats().frees_pending, n);
        // Handed over after the failure, so it runs after the frees that the failure put back.
        ticket = queue.owe_then(&gather(n << 20), freed.note(n));
    }
    let failing = queue.wait(ticket, |g| {
        // Handed over during the flush, so it belongs to the next generation.
        let _ = queue.owe_then(&gather(9 << 20), freed.note(4));
        fails(g)
    });
    assert!(failing.is_err());
    queue
        .wait(ticket, |g| {
            assert!(
                freed.order().is_empty(),
                "nothing is free while the flush runs"
            );
            assert_eq!(g.ranges().len(), 5);
            flushes(g)
        })
        .unwrap();
    assert_eq!(freed.order(), [0, 1, 2, 3, 4]);
    queue.wait(ticket, |_| panic!("paid")).unwrap();
    let stats = queue.stats();
    assert_eq!(
        (stats.frees_owed, stats.frees_released, stats.frees_pending),
        (5, 5, 0)
    );
}

#[test]
fn a_free_that_panics_takes_no_other_with_it() {
    let queue = FlushQueue::new();
    let freed = Freed::default();
    let _ = queue.owe_then(&gather(0), freed.note(0));
    let _ = queue.owe_then(&gather(0), || panic!("the first"));
    let _ = queue.owe_then(&gather(0), freed.note(1));
    let _ = queue.owe_then(&gather(0), || panic!("the second"));
    let ticket = queue.owe_then(&gather(0), freed.note(2));
    let panic = catch_unwind(AssertUnwindSafe(|| queue.wait(ticket, flushes))).unwrap_err();
    assert_eq!(panic.downcast_ref(), Some(&"the first"));
    assert_eq!(freed.order(), [0, 1, 2]);
    let stats = queue.stats();
    assert_eq!((stats.frees_released, stats.retired), (5, 5));
    // The queue goes on.
    let ticket = queue.owe_then(&gather(0), freed.note(3));
    queue.wait(ticket, flushes).unwrap();
    assert_eq!(freed.order(), [0, 1, 2, 3]);
}

/// A payload whose destructor panics with another payload like it, for ever. It has no size, so
/// that no memory leaks where one is forgotten.
struct Bomb;

impl Drop for Bomb {
    fn drop(&mut self) {
        std::panic::resume_unwind(Box::new(Bomb));
    }
}

/// Only the first of several panics goes on. The payload of another one was dropped in between, and
/// its destructor panicked: the frees after it never ran, and from then on none ran in this queue.
#[test]
fn a_free_whose_payload_panics_in_its_drop_takes_no_other_with_it() {
    for dropped in [false, true] {
        let queue = FlushQueue::new();
        let freed = Freed::default();
        let bomb = || std::panic::resume_unwind(Box::new(Bomb));
        let _ = queue.owe_then(&gather(0), || panic!("the first"));
        let _ = queue.owe_then(&gather(0), bomb);
        let _ = queue.owe_then(&gather(0), freed.note(0));
        let _ = queue.owe_then(&gather(0), bomb);
        let ticket = queue.owe_then(&gather(0), freed.note(1));
        let panic = if dropped {
            catch_unwind(AssertUnwindSafe(|| drop(queue))).unwrap_err()
        } else {
            let waited = catch_unwind(AssertUnwindSafe(|| queue.wait(ticket, flushes)));
            assert_eq!(
                (queue.stats().frees_released, queue.stats().retired),
                (5, 5)
            );
            let ticket = queue.owe_then(&gather(0), freed.note(2));
            queue.wait(ticket, flushes).unwrap();
            assert_eq!(freed.order(), [0, 1, 2], "the queue goes on");
            waited.unwrap_err()
        };
        assert_eq!(panic.downcast_ref(), Some(&"the first"));
        assert_eq!(freed.order()[..2], [0, 1]);
    }
}

/// A queue that is dropped while a panic unwinds runs its frees, and adds no second panic.
#[test]
fn a_queue_that_is_dropped_during_a_panic_is_silent() {
    let freed = Freed::default();
    let panic = catch_unwind(AssertUnwindSafe(|| {
        let queue = FlushQueue::new();
        let _ = queue.owe_then(&gather(0), || {
            std::panic::resume_unwind(Box::new(Bomb));
        });
        let _ = queue.owe_then(&gather(0), freed.note(0));
        std::panic::resume_unwind(Box::new("the consumer"));
    }));
    assert_eq!(panic.unwrap_err().downcast_ref(), Some(&"the consumer"));
    assert_eq!(freed.order(), [0]);
}

/// The thread that runs frees looks for more before it stops, and still runs them alone: a free of
/// a third batch waits for one of the second batch that blocks.
#[test]
fn a_free_of_a_third_batch_waits_for_one_of_the_second() {
    let queue = Arc::new(FlushQueue::new());
    let freed = Freed::default();
    let (began, has_begun) = std::sync::mpsc::channel();
    let (unblock, blocked) = std::sync::mpsc::channel::<()>();
    let first = queue.owe_then(&gather(0), {
        let (queue, freed) = (Arc::clone(&queue), freed.clone());
        move || {
            let note = freed.note(1);
            let second = queue.owe_then(&gather(1 << 20), move || {
                began.send(()).unwrap();
                blocked.recv().unwrap();
                note();
            });
            queue.wait(second, flushes).unwrap();
            freed.note(0)();
        }
    });
    let beside = std::thread::scope(|threads| {
        threads.spawn(|| queue.wait(first, flushes).unwrap());
        has_begun.recv().unwrap();
        let third = queue.owe_then(&gather(2 << 20), freed.note(2));
        queue.wait(third, flushes).unwrap();
        let beside = freed.order();
        unblock.send(()).unwrap();
        beside
    });
    assert_eq!(beside, [0], "the second has not ended");
    assert_eq!(freed.order(), [0, 1, 2]);
}

#[test]
fn a_free_may_use_the_queue_and_wait_for_what_it_owes() {
    let queue = Arc::new(FlushQueue::new());
    let freed = Freed::default();
    let ticket = queue.owe_then(&gather(0), {
        let (queue, freed) = (queue.clone(), freed.clone());
        move || {
            let ticket = queue.owe_then(&gather(1 << 20), freed.note(2));
            queue.wait(ticket, flushes).unwrap();
            freed.note(0)();
        }
    });
    let _ = queue.owe_then(&gather(0), freed.note(1));
    queue.wait(ticket, flushes).unwrap();
    assert_eq!(freed.order(), [0, 1, 2], "its own free waits for its turn");
    assert_eq!(queue.stats().flushes, 2);
}

#[test]
fn a_queue_that_is_dropped_runs_what_is_left_in_order_without_a_flush() {
    let freed = Freed::default();
    let queue = FlushQueue::new();
    let ticket = queue.owe_then(&gather(0), freed.note(0));
    assert!(queue.wait(ticket, fails).is_err());
    let _ = queue.owe_then(&gather(0), || panic!("on purpose"));
    let _ = queue.owe_then(&gather(0), freed.note(1));
    assert!(catch_unwind(AssertUnwindSafe(|| drop(queue))).is_err());
    assert_eq!(freed.order(), [0, 1]);
}

#[test]
fn everything_is_asked_for_when_ranges_cost_more() {
    let queue = FlushQueue::new().with_cost(FlushCost {
        per_range: 10,
        per_leaf: 0,
        full: 25,
    });
    for (ranges, full) in [(2, false), (3, true)] {
        let tickets: Vec<_> = (0..ranges).map(|n| queue.owe(&gather(n << 20))).collect();
        if full {
            // A full invalidation that fails leaves the ranges owed as they were.
            let failing = queue.wait(tickets[0], |g| {
                assert!(g.is_full());
                fails(g)
            });
            assert!(failing.is_err());
        }
        let wait = queue.wait(tickets[0], |g| {
            assert_eq!((g.is_full(), g.entries()), (full, ranges));
            flushes(g)
        });
        wait.unwrap();
    }
    let stats = queue.stats();
    assert_eq!((stats.flushes, stats.full), (2, 1));
    assert_eq!(
        (stats.ranges, stats.bytes),
        (5, 5 * 4096),
        "what was owed, not what was asked for"
    );
    assert_eq!(stats.invalidated.bytes, 2 * 4096 + (1 << 64));
}

#[test]
fn a_debt_is_due_by_count_by_bytes_and_by_age() {
    let now = Instant::now();
    let none = FlushPolicy::default();
    let count = FlushPolicy {
        max_pending: Some(2),
        ..none
    };
    let bytes = FlushPolicy {
        max_bytes: Some(8192),
        ..none
    };
    for (policy, starts) in [(count, [0, 0]), (bytes, [0, 1 << 20])] {
        let queue = FlushQueue::new().with_policy(policy);
        let _ = queue.owe(&gather(starts[0]));
        assert!(!queue.is_due(now));
        assert!(!queue.flush_due(now, |_| panic!("not due")).unwrap());
        let _ = queue.owe(&gather(starts[1]));
        assert!(queue.is_due(now));
        assert!(queue.flush_due(now, fails).is_err());
        assert!(queue.is_due(now), "still");
        assert!(queue.flush_due(now, flushes).unwrap());
        assert!(!queue.is_due(now));
        let stats = queue.stats();
        assert_eq!((stats.forced, stats.flushes, stats.failed), (1, 1, 1));
    }

    let age = Duration::from_secs(1000);
    let queue = FlushQueue::new().with_policy(FlushPolicy {
        max_age: Some(age),
        ..none
    });
    assert_eq!(queue.deadline(), None);
    let before = Instant::now();
    let ticket = queue.owe(&gather(0));
    let deadline = queue.deadline().unwrap();
    assert!(deadline >= before + age && deadline <= Instant::now() + age);
    let _ = queue.owe(&gather(0));
    assert_eq!(queue.deadline(), Some(deadline), "that of the oldest");
    assert!(!queue.is_due(deadline - Duration::from_nanos(1)));
    assert!(queue.is_due(deadline));
    // A thread that waits for its own ticket is not counted as forced.
    queue.wait(ticket, flushes).unwrap();
    assert_eq!((queue.stats().forced, queue.deadline()), (0, None));
    assert!(!queue.is_due(deadline));
}

#[test]
fn a_bound_of_zero_is_reached_by_any_debt_and_not_by_none() {
    let queue = FlushQueue::new().with_policy(FlushPolicy {
        max_pending: Some(0),
        max_bytes: Some(0),
        max_age: Some(Duration::ZERO),
    });
    let now = Instant::now();
    assert!(!queue.flush_due(now, |_| panic!("nothing")).unwrap());
    let _ = queue.owe(&gather(0));
    assert!(queue.flush_due(now, flushes).unwrap());
}

#[test]
fn entries_add_up_when_a_gather_has_stopped_counting() {
    let mut pair = [gather(0), FlushGather::new()];
    for _ in 0..100 {
        let [a, b] = &mut pair;
        a.merge(b);
        b.merge(a);
    }
    assert_eq!(pair[0].entries(), u64::MAX);
    let queue = FlushQueue::new();
    let _ = queue.owe(&pair[0]);
    let ticket = queue.owe(&pair[0]);
    assert_eq!(queue.stats().entries_pending, 2 * u128::from(u64::MAX));
    queue.wait(ticket, flushes).unwrap();
    assert_eq!(queue.stats().entries, 2 * u128::from(u64::MAX));
}

/// A debt that is handed over during a flush that fails joins the debt of that flush.
#[test]
fn entries_add_up_when_a_flush_fails_while_more_is_owed() {
    let queue = FlushQueue::new();
    let ticket = queue.owe(&gather(0));
    let failed = queue.wait(ticket, |_| {
        let _ = queue.owe(&gather(1));
        let at = Iova::new(1);
        Err(Error::CannotSplit { at })
    });
    assert!(failed.is_err());
    assert_eq!(queue.stats().entries_pending, 2);
    queue.wait(ticket, flushes).unwrap();
    let stats = queue.stats();
    assert_eq!((stats.entries, stats.entries_pending), (2, 0), "{stats:?}");
}
