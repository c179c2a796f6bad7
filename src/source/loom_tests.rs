//! Model: two harvesters over the two halves of one leaf, and a device that makes it dirty anew.
//!
//! The harvests do what those of `harvest::lease` do, without areas and leases, so that the model
//! stays small.

use super::{LeafSink, Rests};
use crate::bitmap::UserBitmap;
use crate::flush::{FlushGather, FlushQueue, Invalidated};
use crate::marks::{InFlight, Marks};
use crate::sync::model::{Bound, holds_within};
use crate::sync::{Arc, AtomicU64, Mutex, Ordering, Step, fence, lock, thread};
use crate::units::{Granule, Iova, IovaRange};

const PAGE: Granule = Granule::K4;

fn pages(first: u64, last: u64) -> IovaRange {
    IovaRange::new(Iova::new(first << 12), Iova::new(last << 12 | 0xfff)).unwrap()
}

/// A leaf of two pages; one device has cached that its dirty bit (D) is set. The lock stands for a
/// write in flight.
struct Leaf {
    dirty: AtomicU64,
    cached: Mutex<bool>,
    /// The upper page.
    data: AtomicU64,
    in_flight: InFlight,
    put_back: Marks,
    flush: FlushQueue,
}

impl Leaf {
    fn device_writes(&self, value: u64) {
        let mut cached = lock(&self.cached);
        if !*cached {
            // A read-modify-write, as the compare-exchange of hardware is. With a plain store and a
            // concurrent swap that reads the value before it, loom would allow either order.
            self.dirty.swap(1, Ordering::SeqCst);
            *cached = true;
        }
        self.data.store(value, Ordering::Relaxed);
    }

    /// Reads and clears one page. Returns whether it was reported, and what a lease would owe.
    fn harvest(&self, page: u64) -> (bool, FlushGather) {
        let words = [AtomicU64::new(0)];
        let range = pages(page, page);
        let view = UserBitmap::shared(&words).view(range, PAGE).unwrap();
        let (mut sink, mut gather) = (view.sink(), FlushGather::new());
        let keep = |rest| self.put_back.mark(rest);
        let rests = Rests {
            in_flight: &self.in_flight,
            keep: &keep,
            flush: &self.flush,
            shared: false,
        };
        // Relaxed, as in a scan that only decides whether to look closer; the clear promises no
        // more.
        if self.dirty.load(Ordering::Relaxed) == 1 {
            LeafSink::keeping(&mut sink, &mut gather, rests)
                .take(pages(0, 1), PAGE, || {
                    pause(page);
                    let was_dirty = self.dirty.swap(0, Ordering::Relaxed) == 1;
                    pause(page);
                    was_dirty
                })
                .unwrap();
        }
        fence(Ordering::Acquire);
        self.in_flight
            .visit(range, |write| sink.record(write))
            .unwrap();
        self.put_back.read_and_clear(range, &mut sink).unwrap();
        (view.count() == 1, gather)
    }

    /// Harvests the upper page, flushes, and copies it if it was reported.
    fn pass(&self, copy: &mut u64) {
        let (reported, gather) = self.harvest(1);
        let ticket = self.flush.owe(&gather);
        self.flush
            .wait(ticket, |_| {
                *lock(&self.cached) = false;
                Ok(Invalidated::default())
            })
            .unwrap();
        fence(Ordering::SeqCst);
        if reported {
            *copy = self.data.load(Ordering::Relaxed);
        }
    }
}

/// Yields to the other harvest around the clear of the lower page. A bounded search finds the same
/// failures without it, but only among many times more executions.
fn pause(page: u64) {
    if page == 0 {
        thread::yield_now();
    }
}

/// Returns whether the first pass reported the write before it, and the last copy has the last
/// write.
fn the_rest_of_a_leaf() -> bool {
    let leaf = Arc::new(Leaf {
        dirty: AtomicU64::new(1),
        cached: Mutex::new(true),
        data: AtomicU64::new(1),
        in_flight: InFlight::new(),
        put_back: Marks::few(pages(0, 1), PAGE),
        flush: FlushQueue::new(),
    });
    let lower = thread::spawn({
        let leaf = Arc::clone(&leaf);
        // Its own flush comes later, and would only help.
        move || leaf.harvest(0).0
    });
    let mut copy = 0;
    thread::yield_now();
    leaf.pass(&mut copy);
    let reported = copy == 1;
    leaf.device_writes(2);
    thread::yield_now();
    thread::yield_now();
    leaf.pass(&mut copy);
    leaf.device_writes(3);
    let _ = lower.join().unwrap();
    leaf.pass(&mut copy);
    reported && copy == 3
}

/// Rule 7 of the contract: the rest of a leaf is neither invisible nor lost.
#[test]
fn the_rest_of_a_leaf_is_dirty_all_the_time() {
    let steps = [Step::GuardRest, Step::OweAfterClear, Step::RestFence];
    holds_within(Bound::between(2, 2), &steps, the_rest_of_a_leaf);
}
