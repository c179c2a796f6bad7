//! Model: two harvesters over the two halves of one leaf, and a device that makes it dirty anew.
//!
//! The harvests do what those of `harvest::lease` do, without areas and leases, so that the model
//! stays small.

use super::{InFlight, LeafSink, MarkOrdering, Marks, Rests};
use crate::bitmap::UserBitmap;
use crate::flush::{FlushGather, FlushQueue, Invalidated};
use crate::sync::model::{Bound, holds_only_with, holds_within};
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

/// The interrupt of a `membarrier(2)`: the marker looks for it between its steps.
pub(super) mod interrupt {
    use std::sync::atomic::{AtomicBool as StdBool, Ordering::SeqCst};

    use crate::sync::{AtomicU64, Ordering, fence, thread};

    const NOTHING: u64 = 0;
    const ASKED: u64 = 1;
    const DONE: u64 = 2;

    loom::lazy_static! {
        static ref STATE: AtomicU64 = AtomicU64::new(NOTHING);
    }

    /// The marker has been asked and has not run the fence. The kernel would wait longer; other
    /// executions show what it finds afterwards. The model checker does not see this flag: an
    /// access that it sees would order the two threads by itself.
    static PENDING: StdBool = StdBool::new(false);

    /// The kernel's side: interrupts the marker, unless that has ended or was interrupted before.
    pub(in crate::source) fn ask() {
        let order = (Ordering::AcqRel, Ordering::Acquire);
        let asked = STATE.compare_exchange(NOTHING, ASKED, order.0, order.1);
        thread::yield_now();
        let pending = asked.is_ok() && STATE.fetch_and(!0, Ordering::AcqRel) == ASKED;
        PENDING.store(pending, SeqCst);
    }

    /// Whether the interrupt is still on its way.
    pub(super) fn is_pending() -> bool {
        PENDING.swap(false, SeqCst)
    }

    /// The marker's side, between two steps: runs the fence if it is asked for.
    pub(super) fn come_by() {
        // A read-modify-write reads the newest value, as an interrupt arrives without a load.
        if STATE.fetch_and(DONE, Ordering::AcqRel) == ASKED {
            fence(Ordering::SeqCst);
        }
    }

    /// The marker ends: a thread that is not running needs no interrupt.
    pub(super) fn end() {
        STATE.swap(DONE, Ordering::AcqRel);
    }
}

/// Marks without F1, and an interrupt that runs a fence at any point of the marker, as
/// `membarrier(2)` does. The model checker has no interrupts, so the marker looks for one between
/// its steps. The copier continues if the marker has run the fence or has ended. The model cannot
/// show that the compiler keeps the steps in order; a compiler fence does that.
#[test]
fn a_mark_without_a_fence_needs_the_membarrier() {
    holds_only_with(&[Step::Membarrier], a_mark_without_a_fence);
}

/// Returns whether the last copy has the last write.
fn a_mark_without_a_fence() -> bool {
    let marks = Arc::new(Marks::new(pages(0, 0), PAGE, MarkOrdering::Membarrier));
    let data = Arc::new(AtomicU64::new(0));
    // The page was marked, and harvests have seen it: every load finds the mark until it is
    // cleared.
    marks.mark(pages(0, 0));
    let marker = thread::spawn({
        let (marks, data) = (marks.clone(), data.clone());
        move || {
            interrupt::come_by();
            data.store(1, Ordering::Relaxed);
            interrupt::come_by();
            marks.mark(pages(0, 0));
            interrupt::come_by();
            interrupt::end();
        }
    });
    // False if the marker has not run the fence: then the copier would wait longer.
    let copy = |copied: &mut u64| {
        let mut dirty = false;
        marks.take(pages(0, 0), |_, _| dirty = true);
        MarkOrdering::Membarrier.before_copies(Step::SyncFence);
        if interrupt::is_pending() {
            return false;
        }
        if dirty {
            *copied = data.load(Ordering::Relaxed);
        }
        true
    };
    let mut copied = 0;
    let came_by = copy(&mut copied);
    marker.join().unwrap();
    copy(&mut copied);
    !came_by || copied == 1
}

/// A second write in flight makes a second block of slots. A harvester that reaches the block finds
/// it whole, and the range that its slot names.
#[test]
fn a_fresh_block_of_slots_is_whole() {
    holds_only_with(&[Step::PublishBlock], || {
        let registry = Arc::new(InFlight::new());
        // Takes the one slot of the first block.
        let first = registry.publish(pages(0, 0));
        let writer = thread::spawn({
            let registry = registry.clone();
            move || {
                registry.publish(pages(1, 1));
            }
        });
        registry.publish(pages(2, 2));
        let early = in_flight(&registry);
        writer.join().unwrap();
        let late = in_flight(&registry).len();
        first.free();
        early.contains(&pages(0, 0)) && early.contains(&pages(2, 2)) && late == 3
    });
}

/// The ranges that `registry` names, by their first page.
fn in_flight(registry: &InFlight) -> Vec<IovaRange> {
    let mut seen = Vec::new();
    let done: Result<(), std::convert::Infallible> = registry.visit(pages(0, 3), |range| {
        seen.push(range);
        Ok(())
    });
    done.unwrap();
    seen
}

/// A slot that is used again is seen with the range of its new owner, or the marks of that owner
/// are seen.
#[test]
fn a_slot_that_is_used_again_is_seen_whole() {
    holds_only_with(&[Step::PublishSlot], || {
        let registry = Arc::new(InFlight::new());
        let marks = Arc::new(Marks::few(pages(0, 3), PAGE));
        let begun = Arc::new(AtomicU64::new(0));
        let first = registry.publish(pages(0, 0));
        let owner = thread::spawn({
            let (registry, marks, begun) = (registry.clone(), marks.clone(), begun.clone());
            move || {
                let slot = registry.publish(pages(2, 3));
                begun.store(1, Ordering::Release);
                marks.mark(pages(2, 3));
                slot.free();
            }
        });
        first.free();
        let had_begun = begun.load(Ordering::Acquire) == 1;
        let seen = in_flight(&registry);
        let marked = marks.runs(pages(2, 3)) == [pages(2, 3)];
        owner.join().unwrap();
        let theirs = seen.is_empty() || seen == [pages(2, 3)];
        theirs && (!had_begun || marked || !seen.is_empty())
    });
}

/// A slot ends and is used again for another range while a harvester reads it. The harvester sees
/// the range of one owner, or the marks of the owners that have ended.
#[test]
fn a_slot_that_changes_hands_is_not_misread() {
    holds_only_with(&[Step::ChangeBeforeRange], || {
        let registry = Arc::new(InFlight::new());
        let marks = Arc::new(Marks::few(pages(0, 3), PAGE));
        registry.publish(pages(0, 0));
        let owner = thread::spawn({
            let (registry, marks) = (registry.clone(), marks.clone());
            move || {
                marks.mark(pages(0, 0));
                registry.first.slots[0].free();
                registry.publish(pages(2, 3));
            }
        });
        let seen = in_flight(&registry);
        let marked = marks.runs(pages(0, 0)) == [pages(0, 0)];
        owner.join().unwrap();
        let of_one = seen.is_empty() || seen == [pages(0, 0)] || seen == [pages(2, 3)];
        of_one && (marked || seen == [pages(0, 0)])
    });
}

/// The same where the new owner's range lies below the old one: a reader that takes the start of
/// one and the end of the other would find a range that was never in flight.
#[test]
fn a_slot_whose_new_range_lies_below_is_not_misread() {
    holds_only_with(&[Step::ChangeBeforeRange], || {
        let registry = Arc::new(InFlight::new());
        registry.publish(pages(2, 2));
        let owner = thread::spawn({
            let registry = registry.clone();
            move || {
                registry.first.slots[0].free();
                registry.publish(pages(0, 0));
            }
        });
        let seen = in_flight(&registry);
        owner.join().unwrap();
        seen.is_empty() || seen == [pages(2, 2)] || seen == [pages(0, 0)]
    });
}
