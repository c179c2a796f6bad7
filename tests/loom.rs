//! Model checking of the public protocols: every interleaving with a bounded number of preemptions,
//! and every value that the memory model lets a load return.
//!
//! Run by `.ci/run loom`. Each model asserts that it explored more than one execution, and each is
//! run again with one step of the protocol left out. It must then fail, otherwise it proves
//! nothing.
#![cfg(dirtymap_loom)]
#![allow(clippy::unwrap_used)] // helpers of tests

use std::sync::atomic::{AtomicUsize as StdUsize, Ordering::SeqCst};

use dirtymap::flush::FlushQueue;
use dirtymap::source::{FlushGather, Invalidated, LeafSink, Sink, Stopped};
use dirtymap::sync::model::{Bound, breaks_without, holds_only_with, holds_within};
use dirtymap::sync::{Arc, AtomicU64, Mutex, Ordering::Relaxed, Step, lock, thread};
use dirtymap::{
    Access, AddressSpace, DirtySource, Error, FlushPolicy, Granule, HarvestRequest, Iova,
    IovaRange, Mapping, RangeError, Tracking, UserBitmap,
};

const PAGE: Granule = Granule::K4;

fn page(n: u64) -> IovaRange {
    IovaRange::from_len(Iova::new(n << 12), 1 << 12).unwrap()
}

/// Harvests page 0, syncs, copies `data` if it was dirty, commits.
fn harvest_and_copy(space: &AddressSpace, data: &AtomicU64, copy: &mut u64) {
    let words = [AtomicU64::new(0)];
    let lease = space
        .harvest(
            &HarvestRequest::new(page(0), PAGE),
            UserBitmap::shared(&words),
        )
        .unwrap();
    let lease = lease.sync().unwrap();
    if lease.dirty() == 1 {
        *copy = data.load(Relaxed);
    }
    lease.commit();
}

/// Rule 1 for marks: the writer skips a page that is already marked, while the harvester clears the
/// mark and copies.
#[test]
fn a_mark_that_is_skipped_is_never_lost() {
    holds_only_with(
        &[Step::MarkFence, Step::SyncFence, Step::RecordMarks],
        || {
            let space = AddressSpace::new(PAGE);
            space.map(page(0), 0, Access::ReadWrite).unwrap();
            space.start_tracking().unwrap();
            let area = space.area(Iova::MIN).unwrap();
            area.mark(page(0)).unwrap();
            let data = Arc::new(AtomicU64::new(0));
            let writer = {
                let data = data.clone();
                thread::spawn(move || {
                    data.store(1, Relaxed);
                    area.mark(page(0)).unwrap();
                })
            };
            let mut copy = 0;
            harvest_and_copy(&space, &data, &mut copy);
            writer.join().unwrap();
            harvest_and_copy(&space, &data, &mut copy);
            copy == 1
        },
    );
}

/// A page with a dirty bit, and one device whose IOTLB holds "D is set". The lock stands for a
/// write in flight: an invalidation waits for it.
struct OnePage {
    dirty: AtomicU64,
    cached: Mutex<bool>,
    data: AtomicU64,
}

impl OnePage {
    fn device_writes(&self, value: u64) {
        let mut cached = lock(&self.cached);
        if !*cached {
            // A read-modify-write, like the compare-exchange of hardware. Loom may order a plain
            // store before a concurrent swap that has read an older value.
            self.dirty.swap(1, dirtymap::sync::Ordering::SeqCst);
            *cached = true;
        }
        self.data.store(value, Relaxed);
    }
}

struct Source(Arc<OnePage>);

impl DirtySource for Source {
    fn map(&self, _: &Mapping) -> Result<(), Error> {
        Ok(())
    }

    fn unmap(&self, _: IovaRange, _: &mut FlushGather, _: &mut dyn FnMut(IovaRange)) {}

    fn set_tracking(&self, _: Tracking) -> Result<(), Error> {
        Ok(())
    }

    fn read_and_clear(&self, range: IovaRange, out: &mut LeafSink<'_, '_>) -> Result<(), Stopped> {
        let dirty = &self.0.dirty;
        if dirty.load(dirtymap::sync::Ordering::SeqCst) == 0 {
            return Ok(());
        }
        let clear = || dirty.swap(0, dirtymap::sync::Ordering::SeqCst) == 1;
        out.take(range, PAGE, clear).map_err(|error| Stopped {
            at: range.start(),
            error,
        })
    }

    fn peek(&self, _: IovaRange, _: &mut Sink<'_>) -> Result<(), Stopped> {
        Ok(())
    }

    fn invalidate(&self, _: &FlushGather) -> Result<Invalidated, Error> {
        *lock(&self.0.cached) = false;
        Ok(Invalidated::default())
    }
}

/// Invariant 4: an abort hands over its debt before its pages become dirty again. Otherwise the
/// second harvest takes the page, syncs without a flush, and the device's next write goes through
/// the stale translation.
#[test]
fn an_abort_owes_before_it_puts_back() {
    holds_only_with(&[Step::OweBeforePutBack], || {
        let hardware = Arc::new(OnePage {
            dirty: AtomicU64::new(1),
            cached: Mutex::new(true),
            data: AtomicU64::new(1),
        });
        let space = AddressSpace::with_source(PAGE, Source(hardware.clone())).unwrap();
        space.map(page(0), 0, Access::ReadWrite).unwrap();
        space.start_tracking().unwrap();
        let space = Arc::new(space);
        let aborter = {
            let space = space.clone();
            thread::spawn(move || {
                let words = [AtomicU64::new(0)];
                let lease = space
                    .harvest(
                        &HarvestRequest::new(page(0), PAGE),
                        UserBitmap::shared(&words),
                    )
                    .unwrap();
                lease.abort();
            })
        };
        let mut copy = 0;
        harvest_and_copy(&space, &hardware.data, &mut copy);
        hardware.device_writes(2);
        aborter.join().unwrap();
        harvest_and_copy(&space, &hardware.data, &mut copy);
        copy == 2
    });
}

/// A clean source that stops each harvest of more than one page.
struct StopsAtTwo;

impl DirtySource for StopsAtTwo {
    fn map(&self, _: &Mapping) -> Result<(), Error> {
        Ok(())
    }

    fn unmap(&self, _: IovaRange, _: &mut FlushGather, _: &mut dyn FnMut(IovaRange)) {}

    fn set_tracking(&self, _: Tracking) -> Result<(), Error> {
        Ok(())
    }

    fn read_and_clear(&self, range: IovaRange, _: &mut LeafSink<'_, '_>) -> Result<(), Stopped> {
        let at = range.start();
        match range == page(0) {
            true => Ok(()),
            false => Err(Stopped {
                at,
                error: Error::Range(RangeError::ZeroLength { start: at }),
            }),
        }
    }

    fn peek(&self, _: IovaRange, _: &mut Sink<'_>) -> Result<(), Stopped> {
        Ok(())
    }

    fn invalidate(&self, _: &FlushGather) -> Result<Invalidated, Error> {
        Ok(Invalidated::default())
    }
}

/// Rule 15, and invariant 4: a harvest that stops hands over its debt, and then puts back the pages
/// of an earlier source. Otherwise the second harvest takes the page, syncs without a flush, and
/// the device's next write goes through the stale translation.
/// Two preemptions miss the step as three do, in a tenth of the time.
#[test]
fn a_stop_owes_before_it_puts_back() {
    holds_within(Bound::between(2, 2), &[Step::OweBeforeStop], || {
        let hardware = Arc::new(OnePage {
            dirty: AtomicU64::new(1),
            cached: Mutex::new(true),
            data: AtomicU64::new(1),
        });
        let space = AddressSpace::with_source(PAGE, Source(hardware.clone())).unwrap();
        space.attach(StopsAtTwo).unwrap();
        let both = IovaRange::new(Iova::MIN, page(1).last()).unwrap();
        space.map(both, 0, Access::ReadWrite).unwrap();
        space.start_tracking().unwrap();
        let space = Arc::new(space);
        let stopper = {
            let space = space.clone();
            thread::spawn(move || {
                let words = [AtomicU64::new(0)];
                let request = HarvestRequest::new(both, PAGE);
                let lease = space.harvest(&request, UserBitmap::shared(&words)).unwrap();
                assert!(lease.stopped().is_some());
            })
        };
        let mut copy = 0;
        harvest_and_copy(&space, &hardware.data, &mut copy);
        hardware.device_writes(2);
        stopper.join().unwrap();
        harvest_and_copy(&space, &hardware.data, &mut copy);
        copy == 2
    });
}

/// The translations of pages 0 and 2 that devices have cached.
type Stale = [AtomicU64; 2];

fn one_page(n: u64) -> FlushGather {
    let mut gather = FlushGather::new();
    gather.add(page(2 * n), PAGE);
    gather
}

fn invalidate(stale: &Stale, gather: &FlushGather) -> Result<Invalidated, Error> {
    for n in 0..2 {
        if gather.ranges().contains(&page(2 * n)) {
            stale[n as usize].store(0, Relaxed);
        }
    }
    Ok(Invalidated::default())
}

fn both_stale() -> Arc<Stale> {
    Arc::new([AtomicU64::new(1), AtomicU64::new(1)])
}

/// Owes page `n`, waits, and returns whether it was invalidated then.
fn owe_and_wait(n: u64, queue: &FlushQueue, stale: &Stale) -> bool {
    let ticket = queue.owe(&one_page(n));
    queue
        .wait(ticket, |gather| invalidate(stale, gather))
        .unwrap();
    stale[n as usize].load(Relaxed) == 0
}

/// Invariant 5: when `wait` returns, the thread's range is invalidated, by whichever thread. Two
/// threads need at most two flushes.
#[test]
fn a_ticket_is_honoured_by_a_flush_that_began_later() {
    holds_only_with(&[Step::WaitForLeader, Step::PublishFinished], || {
        let (queue, stale) = (Arc::new(FlushQueue::new()), both_stale());
        let other = {
            let (queue, stale) = (queue.clone(), stale.clone());
            thread::spawn(move || owe_and_wait(1, &queue, &stale))
        };
        let ours = owe_and_wait(0, &queue, &stale);
        let theirs = other.join().unwrap();
        let stats = queue.stats();
        let accounted = (stats.owed, stats.retired, stats.pending) == (2, 2, 0);
        ours && theirs && accounted && stats.flushes <= 2
    });
}

/// Invariant 5 at a bound: two threads that hand over a debt find the queue full, and flush for
/// themselves or for each other. Afterwards nothing is pending, and the debt of each was
/// invalidated.
#[test]
fn a_full_queue_is_flushed_by_the_thread_that_owes() {
    holds_only_with(&[Step::NextGeneration, Step::WaitForLeader], || {
        let queue = FlushQueue::new().with_policy(FlushPolicy {
            max_pending: Some(1),
            ..FlushPolicy::default()
        });
        let (queue, stale) = (Arc::new(queue), both_stale());
        let owe_and_flush_due = |n: u64, queue: &FlushQueue, stale: &Stale| {
            let ticket = queue.owe(&one_page(n));
            let now = std::time::Instant::now();
            let done = queue.flush_due(now, |gather| invalidate(stale, gather));
            // If another thread has taken the debt, none is due: that thread's flush covers it, and
            // this thread waits for it.
            if !done.unwrap() {
                let waited = queue.wait(ticket, |gather| invalidate(stale, gather));
                waited.unwrap();
            }
            stale[n as usize].load(Relaxed) == 0
        };
        let other = {
            let (queue, stale) = (queue.clone(), stale.clone());
            thread::spawn(move || owe_and_flush_due(1, &queue, &stale))
        };
        let ours = owe_and_flush_due(0, &queue, &stale);
        let theirs = other.join().unwrap();
        let stats = queue.stats();
        ours && theirs && (stats.owed, stats.retired, stats.pending) == (2, 2, 0)
    });
}

/// Invariant 5: a flush does not cover a debt that is handed over while it runs.
#[test]
fn what_comes_during_a_flush_is_left_to_the_next() {
    holds_only_with(&[Step::NextGeneration], || {
        let (queue, stale) = (Arc::new(FlushQueue::new()), both_stale());
        let owing = {
            let queue = queue.clone();
            thread::spawn(move || queue.owe(&one_page(1)))
        };
        let ours = owe_and_wait(0, &queue, &stale);
        let ticket = owing.join().unwrap();
        queue
            .wait(ticket, |gather| invalidate(&stale, gather))
            .unwrap();
        ours && stale[1].load(Relaxed) == 0
    });
}

/// Counts the frees of page 0, and those of them that ran too early.
#[derive(Default)]
struct Freed {
    all: StdUsize,
    early: StdUsize,
}

/// Owes page 0, with a free that counts in `freed`.
fn owe_freeing(
    queue: &FlushQueue,
    stale: &Arc<Stale>,
    freed: &std::sync::Arc<Freed>,
) -> dirtymap::flush::Ticket {
    let (stale, freed) = (stale.clone(), freed.clone());
    queue.owe_then(&one_page(0), move || {
        freed.all.fetch_add(1, SeqCst);
        if stale[0].load(Relaxed) == 1 {
            freed.early.fetch_add(1, SeqCst);
        }
    })
}

/// Invariant 7: a free runs once, and sees the flush that covers it, whichever threads flush and
/// run it.
#[test]
fn what_is_freed_was_flushed_before() {
    holds_only_with(&[Step::FreeAfterFlush], || {
        let (queue, stale) = (Arc::new(FlushQueue::new()), both_stale());
        let freed = std::sync::Arc::<Freed>::default();
        let other = {
            let (queue, stale) = (queue.clone(), stale.clone());
            thread::spawn(move || owe_and_wait(1, &queue, &stale))
        };
        let ticket = owe_freeing(&queue, &stale, &freed);
        queue
            .wait(ticket, |gather| invalidate(&stale, gather))
            .unwrap();
        let theirs = other.join().unwrap();
        let stats = queue.stats();
        let once = freed.all.load(SeqCst) == 1 && stats.frees_released == 1;
        theirs && once && freed.early.load(SeqCst) == 0
    });
}

/// Invariant 5: a flush that fails, with another thread's gather in it, loses neither gathers nor
/// frees.
#[test]
fn a_flush_that_fails_leaves_all_of_it_owed() {
    holds_only_with(&[Step::OweAgain, Step::FreeAfterFlush], || {
        let (queue, stale) = (Arc::new(FlushQueue::new()), both_stale());
        let freed = std::sync::Arc::<Freed>::default();
        let other = {
            let (queue, stale) = (queue.clone(), stale.clone());
            thread::spawn(move || owe_and_wait(1, &queue, &stale))
        };
        let ticket = owe_freeing(&queue, &stale, &freed);
        let failing = queue.wait(ticket, |_| {
            Err(Error::Range(RangeError::ZeroLength { start: Iova::MIN }))
        });
        let theirs = other.join().unwrap();
        if failing.is_err() {
            queue
                .wait(ticket, |gather| invalidate(&stale, gather))
                .unwrap();
        }
        let stats = queue.stats();
        let once = freed.all.load(SeqCst) == 1 && stats.frees_released == 1;
        let accounted = (stats.retired, stats.pending) == (2, 0);
        let ours = stale[0].load(Relaxed) == 0;
        ours && theirs && once && accounted && freed.early.load(SeqCst) == 0
    });
}

/// Frees run in the order in which they were handed over, on whichever threads. None is left when a
/// thread leaves its own to another one.
#[test]
fn frees_keep_their_order_across_threads() {
    holds_only_with(&[Step::OneReleases], || {
        let queue = Arc::new(FlushQueue::new());
        // An access of the model, so that both orders of the two frees are explored.
        let turn = Arc::new(AtomicU64::new(0));
        let ran_as = std::sync::Arc::new([const { StdUsize::new(usize::MAX) }; 2]);
        let owe_and_wait = {
            let ran_as = ran_as.clone();
            move |n: usize, queue: &FlushQueue| {
                let (turn, ran_as) = (turn.clone(), ran_as.clone());
                let ticket = queue.owe_then(&one_page(0), move || {
                    ran_as[n].store(turn.fetch_add(1, Relaxed) as usize, SeqCst);
                });
                let ok = |_: &FlushGather| Ok(Invalidated::default());
                queue.wait(ticket, ok).unwrap();
                ticket
            }
        };
        let other = {
            let (queue, owe_and_wait) = (queue.clone(), owe_and_wait.clone());
            thread::spawn(move || owe_and_wait(1, &queue))
        };
        let ours = owe_and_wait(0, &queue);
        let theirs = other.join().unwrap();
        let ran = ran_as.each_ref().map(|n| n.load(SeqCst));
        let in_order = ours == theirs || (ours < theirs) == (ran[0] < ran[1]);
        let both = ran.iter().all(|n| *n < 2) && queue.stats().frees_pending == 0;
        both && in_order
    });
}

/// Two harvesters on one word: each marked page is in at least one of the two leases, and none
/// stays dirty.
#[test]
fn two_harvesters_share_a_word() {
    holds_only_with(&[Step::RecordMarks], || {
        let space = AddressSpace::new(PAGE);
        let both = IovaRange::new(page(0).start(), page(1).last()).unwrap();
        space.map(both, 0, Access::ReadWrite).unwrap();
        space.start_tracking().unwrap();
        space.mark(both).unwrap();
        let space = Arc::new(space);
        let harvest = move |space: &AddressSpace| {
            let words = [AtomicU64::new(0)];
            let lease = space
                .harvest(&HarvestRequest::new(both, PAGE), UserBitmap::shared(&words))
                .unwrap();
            lease.sync().unwrap().commit();
            words[0].load(Relaxed)
        };
        let other = {
            let space = space.clone();
            thread::spawn(move || harvest(&space))
        };
        let ours = harvest(&space);
        let theirs = other.join().unwrap();
        let left = harvest(&space);
        ours | theirs == 0b11 && left == 0
    });
}

/// A page of a source that reports runs, and clears them by a call of its own.
struct Runs(Arc<OnePage>);

impl DirtySource for Runs {
    fn map(&self, _: &Mapping) -> Result<(), Error> {
        Ok(())
    }

    fn unmap(&self, _: IovaRange, _: &mut FlushGather, _: &mut dyn FnMut(IovaRange)) {}

    fn set_tracking(&self, _: Tracking) -> Result<(), Error> {
        Ok(())
    }

    fn read_and_clear(&self, range: IovaRange, out: &mut LeafSink<'_, '_>) -> Result<(), Stopped> {
        if self.0.dirty.load(Relaxed) == 1 {
            let inside = out.take_run(range, PAGE, |_| false)?;
            assert!(inside.range() == Some(page(0)));
            self.0.dirty.swap(0, Relaxed);
        }
        Ok(())
    }

    fn peek(&self, _: IovaRange, _: &mut Sink<'_>) -> Result<(), Stopped> {
        Ok(())
    }

    fn invalidate(&self, _: &FlushGather) -> Result<Invalidated, Error> {
        Ok(Invalidated::default())
    }
}

/// Of two harvesters of a source that is dirty, one has its page at least.
fn two_harvesters_of<S: DirtySource + 'static>(source: fn(Arc<OnePage>) -> S) -> bool {
    let hardware = Arc::new(OnePage {
        dirty: AtomicU64::new(1),
        cached: Mutex::new(true),
        data: AtomicU64::new(1),
    });
    let space = AddressSpace::with_source(PAGE, source(hardware)).unwrap();
    space.map(page(0), 0, Access::ReadWrite).unwrap();
    space.start_tracking().unwrap();
    let space = Arc::new(space);
    let harvest = move |space: &AddressSpace| {
        let words = [AtomicU64::new(0)];
        let request = HarvestRequest::new(page(0), PAGE);
        let lease = space.harvest(&request, UserBitmap::shared(&words)).unwrap();
        lease.sync().unwrap().commit();
        words[0].load(Relaxed)
    };
    let other = {
        let space = space.clone();
        thread::spawn(move || harvest(&space))
    };
    let ours = harvest(&space);
    ours | other.join().unwrap() == 1
}

/// The same for a leaf of a source: it is recorded before it is clean.
#[test]
fn two_harvesters_share_a_leaf() {
    holds_only_with(&[Step::RecordLeaf], || two_harvesters_of(Source));
}

/// The same for a run of a source that clears many pages by one call.
#[test]
fn two_harvesters_share_a_run() {
    holds_only_with(&[Step::RecordRun], || two_harvesters_of(Runs));
}

/// A mark that races an unmap is counted by one of the two: by the unmap as discarded, or by the
/// marker as outside.
#[test]
fn a_mark_and_an_unmap_do_not_miss_each_other() {
    holds_only_with(&[Step::GoneFence], || {
        let space = AddressSpace::new(PAGE);
        space.map(page(0), 0, Access::ReadWrite).unwrap();
        space.start_tracking().unwrap();
        let handle = space.area(Iova::MIN).unwrap();
        let marker = thread::spawn(move || handle.mark(page(0)).is_ok());
        let discarded = space.unmap_discarding(page(0)).unwrap().discarded_bytes;
        let marked = marker.join().unwrap();
        !(marked && discarded == 0)
    });
}

/// A write in flight ends while a harvester looks: its pages are in flight or marked, never
/// neither.
#[test]
fn a_write_in_flight_is_never_invisible() {
    holds_only_with(&[Step::MarkBeforeFree], || {
        let space = AddressSpace::new(PAGE);
        space.map(page(0), 0, Access::ReadWrite).unwrap();
        space.start_tracking().unwrap();
        let space = Arc::new(space);
        let data = Arc::new(AtomicU64::new(0));
        let begun = Arc::new(AtomicU64::new(0));
        let writer = {
            let (space, data, begun) = (space.clone(), data.clone(), begun.clone());
            thread::spawn(move || {
                let guard = space.begin_write(page(0)).unwrap();
                // Release: pairs with the Acquire below; a harvest that sees it began during or
                // after the write.
                begun.store(1, dirtymap::sync::Ordering::Release);
                data.store(1, Relaxed);
                drop(guard);
            })
        };
        let in_flight = begun.load(dirtymap::sync::Ordering::Acquire) == 1;
        let mut copy = 2;
        harvest_and_copy(&space, &data, &mut copy);
        let reported = copy != 2;
        writer.join().unwrap();
        harvest_and_copy(&space, &data, &mut copy);
        // What was copied during the write is copied again after it.
        copy == 1 && (reported || !in_flight)
    });
}

/// Rule 9 of the contract: while a write hangs in a device and another thread waits for it in a
/// sync, marks, lookups, harvests and aborts still return.
fn a_flush_that_hangs() -> bool {
    let hardware = Arc::new(OnePage {
        dirty: AtomicU64::new(1),
        cached: Mutex::new(true),
        data: AtomicU64::new(1),
    });
    let space = AddressSpace::with_source(PAGE, Source(hardware.clone())).unwrap();
    space.map(page(0), 0, Access::ReadWrite).unwrap();
    space.start_tracking().unwrap();
    hardware.dirty.store(1, Relaxed);
    let space = Arc::new(space);
    let hangs = lock(&hardware.cached);
    let waits = {
        let (space, hardware) = (space.clone(), hardware.clone());
        thread::spawn(move || harvest_and_copy(&space, &hardware.data, &mut 0))
    };
    space.mark(page(0)).unwrap();
    let words = [AtomicU64::new(0)];
    let request = HarvestRequest::new(page(0), PAGE);
    let lease = space.harvest(&request, UserBitmap::shared(&words)).unwrap();
    let aborted = lease.abort().outside_bytes == 0;
    let found = space.lookup(Iova::MIN).is_some();
    drop(hangs);
    waits.join().unwrap();
    aborted && found
}

#[test]
fn what_waits_for_nobody_ends_while_a_flush_hangs() {
    // The two threads meet in the flush only, not in the harvests.
    holds_within(Bound::between(1, 1), &[], a_flush_that_hangs);
    let test = "what_waits_for_nobody_ends_while_a_flush_hangs";
    breaks_without(Step::FlushAtSync, test, a_flush_that_hangs);
}
