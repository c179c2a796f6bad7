//! A harvest that panics at any of its steps loses nothing. One pass counts the steps, each further
//! pass panics at one of them.
#![cfg(not(dirtymap_loom))]
#![allow(clippy::unwrap_used)] // helpers of tests

mod common;

use common::{PAGE, pages};
use dirtymap::source::{FlushGather, Invalidated, LeafSink, Sink, Stopped};
use dirtymap::{
    Access, AddressSpace, DirtySource, Error, Granule, HarvestRequest, IovaRange, Mapping,
    Tracking, UserBitmap,
};
use std::collections::BTreeSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};

/// Pages of a leaf.
const LEAF: u64 = 4;
/// No step panics.
const NEVER: u64 = u64::MAX;

/// The number of steps so far, and the step that panics.
struct Steps {
    made: AtomicU64,
    fatal: AtomicU64,
}

impl Steps {
    fn step(&self) {
        let nth = self.made.fetch_add(1, SeqCst);
        assert_ne!(nth, self.fatal.load(SeqCst), "stopped on purpose");
    }
}

/// Four leaves. A bit of `dirty` for each dirty one, a bit of `stale` for each whose set dirty bit
/// a device has cached.
struct Leaves {
    dirty: AtomicU64,
    stale: AtomicU64,
    steps: Arc<Steps>,
}

impl DirtySource for Leaves {
    fn map(&self, _: &Mapping) -> Result<(), Error> {
        Ok(())
    }

    fn unmap(&self, _: IovaRange, _: &mut FlushGather, _: &mut dyn FnMut(IovaRange)) {}

    fn set_tracking(&self, _: Tracking) -> Result<(), Error> {
        Ok(())
    }

    fn read_and_clear(&self, range: IovaRange, out: &mut LeafSink<'_, '_>) -> Result<(), Stopped> {
        for nth in 0..4 {
            let leaf = pages(nth * LEAF, LEAF);
            self.steps.step(); // before the take
            if !leaf.intersects(range) || self.dirty.load(SeqCst) >> nth & 1 == 0 {
                continue;
            }
            let clear = || {
                self.steps.step(); // recorded and owed, not cleared
                let old = self.dirty.fetch_and(!(1 << nth), SeqCst);
                self.steps.step(); // cleared, and nobody knows the answer
                old >> nth & 1 == 1
            };
            out.take(leaf, Granule::K4, clear)
                .map_err(|error| Stopped {
                    at: leaf.start(),
                    error,
                })?;
            self.steps.step(); // taken
        }
        Ok(())
    }

    fn peek(&self, _: IovaRange, _: &mut Sink<'_>) -> Result<(), Stopped> {
        Ok(())
    }

    fn invalidate(&self, gather: &FlushGather) -> Result<Invalidated, Error> {
        self.steps.step(); // before the flush
        for nth in 0..4 {
            let whole = |range: &&IovaRange| range.covers(pages(nth * LEAF, LEAF));
            if gather.ranges().iter().any(|range| whole(&range)) {
                self.stale.fetch_and(!(1 << nth), SeqCst);
            }
        }
        self.steps.step(); // flushed, and not retired
        Ok(Invalidated::default())
    }
}

/// Harvests `range`, with a step between all calls, and commits the first half before the rest.
/// Returns the committed pages.
fn consume(space: &AddressSpace, steps: &Steps, range: IovaRange, safe: &mut BTreeSet<u64>) {
    let mut words = [0u64];
    let request = HarvestRequest::new(range, Granule::K4);
    let lease = space
        .harvest(&request, UserBitmap::new(&mut words))
        .unwrap();
    steps.step(); // leased
    let lease = lease.sync().unwrap();
    steps.step(); // synced
    let numbers = |run: IovaRange| run.start().get() / PAGE..=run.last().get() / PAGE;
    let copied: BTreeSet<u64> = lease.runs().flat_map(numbers).collect();
    lease.commit_range(pages(0, 6));
    safe.extend(copied.range(..6));
    steps.step(); // the first half is committed
    lease.commit();
    safe.extend(copied);
}

#[test]
fn a_harvest_that_is_stopped_at_any_step_loses_nothing() {
    // The whole request; a part of the leaves at both ends; a part of one leaf.
    for (first, n) in [(0, 16), (2, 11), (5, 1)] {
        let mut fatal = 0;
        loop {
            let steps = Arc::new(Steps {
                made: AtomicU64::new(0),
                fatal: AtomicU64::new(NEVER),
            });
            let leaves = Arc::new(Leaves {
                dirty: AtomicU64::new(0b1111),
                stale: AtomicU64::new(0b1111),
                steps: steps.clone(),
            });
            let space = AddressSpace::with_source(Granule::K4, leaves.clone()).unwrap();
            space.map(pages(0, 16), 0, Access::ReadWrite).unwrap();
            space.start_tracking().unwrap();
            space.mark(pages(7, 2)).unwrap();
            let mut safe = BTreeSet::new();
            steps.made.store(0, SeqCst);
            steps.fatal.store(fatal, SeqCst);
            let outcome = catch_unwind(AssertUnwindSafe(|| {
                consume(&space, &steps, pages(first, n), &mut safe);
            }));
            steps.fatal.store(NEVER, SeqCst);
            // A device that has cached "D is set" writes again and leaves no trace. Only a sync
            // that pays the debt finds the write.
            let untraced = leaves.stale.load(SeqCst) & !leaves.dirty.load(SeqCst);
            let mut rest = BTreeSet::new();
            consume(&space, &steps, pages(0, 16), &mut rest);
            let all: BTreeSet<u64> = safe.union(&rest).copied().collect();
            assert_eq!(all, (0..16).collect(), "step {fatal} of {first}+{n}");
            for page in (0..16).filter(|page| untraced >> (page / LEAF) & 1 == 1) {
                assert!(
                    rest.contains(&page),
                    "page {page}, step {fatal} of {first}+{n}"
                );
            }
            assert_eq!(
                leaves.stale.load(SeqCst),
                0,
                "all debts are paid, step {fatal}"
            );
            let stats = space.stats();
            assert_eq!(
                stats.leased_bytes,
                stats.committed_bytes + stats.aborted_bytes
            );
            if outcome.is_ok() {
                assert!(fatal > 10, "only {fatal} steps");
                break;
            }
            fatal += 1;
        }
    }
}
