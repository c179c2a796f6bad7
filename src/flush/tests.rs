//! The queue, deterministically; see `tests/loom.rs` for its races.
#![allow(clippy::unwrap_used)] // helpers of tests

use super::*;
use crate::error::Error;
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
