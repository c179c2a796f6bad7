//! Models of marks without a fence, and of the slots of writes in flight.

use super::crossing::Crossing;
use super::{InFlight, MarkOrdering, Marks, Pending};
use crate::chunkmap::{CHUNK_WORDS, Handed};
use crate::sync::model::holds_only_with;
use crate::sync::{Arc, AtomicU64, Ordering, Step, fence, thread};
use crate::units::{Granule, Iova, IovaRange};

const PAGE: Granule = Granule::K4;

fn pages(first: u64, last: u64) -> IovaRange {
    IovaRange::new(Iova::new(first << 12), Iova::new(last << 12 | 0xfff)).unwrap()
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
    pub(in crate::marks) fn ask() {
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

/// A thread that finds a zero bit set sees that the discard which has set it is at work.
#[test]
fn a_zero_bit_shows_the_discard() {
    holds_only_with(&[], || {
        let marks = Arc::new(Marks::new(pages(0, 1), PAGE, MarkOrdering::Fences));
        marks.zeros_or_new().set(pages(1, 1)); // of an earlier discard
        let at_work = Arc::new(InFlight::new());
        let discard = thread::spawn({
            let (marks, at_work) = (marks.clone(), at_work.clone());
            move || {
                at_work.publish(pages(0, 0));
                marks.zeros_or_new().set(pages(0, 0));
            }
        });
        let zero = marks.zeros().map(|zeros| zeros.runs(pages(0, 0)));
        let mut seen = false;
        let looked: Result<(), std::convert::Infallible> = at_work.visit(pages(0, 0), |_| {
            seen = true;
            Ok(())
        });
        discard.join().unwrap();
        looked.is_ok() && (seen || zero.is_none_or(|runs| runs.is_empty()))
    });
}

/// The first discard of an area makes the bitmap of its zero bits, while another thread looks.
#[test]
fn the_zero_bits_of_an_area_are_published() {
    holds_only_with(&[], || {
        let marks = Arc::new(Marks::new(pages(0, 1), PAGE, MarkOrdering::Fences));
        let discard = thread::spawn({
            let marks = marks.clone();
            move || marks.zeros_or_new().set(pages(0, 0))
        });
        let zero = marks.zeros().map(|zeros| zeros.runs(pages(0, 0)));
        discard.join().unwrap();
        let after = marks.zeros().map(|zeros| zeros.runs(pages(0, 0)).len());
        zero.is_none_or(|runs| runs.len() <= 1) && after == Some(1)
    });
}

/// What is pending in one word: the third page.
fn pending() -> Arc<Pending> {
    let pending = Arc::new(Pending::new(PAGE));
    leave(&pending, 0b100);
    pending
}

/// A harvest leaves pages of the word to the consumer.
fn leave(pending: &Pending, mask: u64) {
    // SeqCst: as a harvest does before it leaves anything.
    fence(Ordering::SeqCst);
    Handed::of(&[(0, mask)], |left| pending.leave(0, left));
}

/// Takes the pages of the word.
fn take(pending: &Pending) -> u64 {
    let mut taken = 0;
    pending.take(pages(0, 63), |_, mask| taken |= mask);
    taken
}

/// Two harvests leave pages of one word to a consumer at the same time, by plain loads and stores.
/// Without the claim, or without its order, the store of one overwrites that of the other.
#[test]
fn what_two_harvests_leave_to_a_consumer_is_pending() {
    holds_only_with(&[Step::ClaimLeft, Step::PublishLeft], || {
        let pending = pending();
        let other = thread::spawn({
            let pending = pending.clone();
            move || leave(&pending, 0b1)
        });
        leave(&pending, 0b10);
        other.join().unwrap();
        take(&pending) == 0b111 && take(&pending) == 0
    });
}

/// A harvest leaves a page while the consumer takes others of the same word: the page is taken, or
/// it is still pending. The take of a chunk that is claimed may find pages that it finds again.
#[test]
fn what_is_left_while_a_consumer_takes_is_taken_or_pending() {
    holds_only_with(&[Step::ClaimLeft, Step::PublishLeft], || {
        let pending = pending();
        let other = thread::spawn({
            let pending = pending.clone();
            move || leave(&pending, 0b1)
        });
        let taken = take(&pending);
        other.join().unwrap();
        let later = take(&pending);
        taken | later == 0b101 && take(&pending) == 0
    });
}

/// A harvest leaves a page while the consumer looks: the list of what was left before moves to
/// words, and the look finds it in one of the two.
#[test]
fn a_look_finds_a_list_that_moves_to_words() {
    holds_only_with(&[Step::PublishLeft], || {
        let pending = pending();
        let reader = thread::spawn({
            let pending = pending.clone();
            move || pending.runs(pages(0, 63))
        });
        leave(&pending, 0b1);
        let seen = reader.join().unwrap();
        let found = |page| seen.iter().any(|run| run.covers(pages(page, page)));
        found(2) && !found(1)
    });
}

/// Two takes of one consumer at the same time: a page that one of them finds, the consumer has.
/// None is lost, and none comes back.
#[test]
fn what_two_takes_of_a_consumer_find_does_not_come_back() {
    holds_only_with(&[], || {
        let pending = pending();
        let other = thread::spawn({
            let pending = pending.clone();
            move || take(&pending)
        });
        let taken = take(&pending);
        taken | other.join().unwrap() == 0b100 && take(&pending) == 0
    });
}

/// The first bit of chunk 2.
const FAR: u64 = 2 * CHUNK_WORDS * 64;

/// The words that a look finds in a crossing.
fn crossed(crossing: &Crossing) -> Vec<(u64, u64)> {
    let mut seen = Vec::new();
    let looked: Result<(), std::convert::Infallible> = crossing.visit(|bit, mask| {
        seen.push((bit, mask));
        Ok(())
    });
    looked.unwrap();
    seen
}

/// A crossing ends and begins anew for another chunk while another harvest looks at it. What that
/// harvest sees are words of one chunk, each at its place.
#[test]
fn lines_of_two_crossings_do_not_mix() {
    let steps = [
        Step::ChangeBeforeWords,
        Step::PublishCrossing,
        Step::PublishLine,
    ];
    holds_only_with(&steps, || {
        let crossing = Arc::new(Crossing::new());
        crossing.begin(0);
        crossing.put_line(0, &[1]);
        let reader = thread::spawn({
            let crossing = crossing.clone();
            move || crossed(&crossing)
        });
        crossing.end(|_, _| ());
        crossing.begin(2);
        crossing.put_line(0, &[2]);
        let seen = reader.join().unwrap();
        seen.is_empty() || seen == [(0, 1)] || seen == [(FAR, 2)]
    });
}

/// The same of an area which begins inside of a line: a word comes in two parts.
#[test]
fn words_of_two_crossings_do_not_mix() {
    holds_only_with(&[Step::ChangeBeforeWords], || {
        let crossing = Arc::new(Crossing::new());
        crossing.begin(0);
        crossing.put(0, 1);
        let reader = thread::spawn({
            let crossing = crossing.clone();
            move || crossed(&crossing)
        });
        crossing.end(|_, _| ());
        crossing.begin(2);
        crossing.put(0, 2);
        crossing.put(0, 4);
        let seen = reader.join().unwrap();
        let one = [(0, 1), (FAR, 2), (FAR, 6)].map(|word| vec![word]);
        seen.is_empty() || one.contains(&seen)
    });
}

/// The same of pages that are listed.
#[test]
fn lists_of_two_crossings_do_not_mix() {
    let steps = [Step::ChangeBeforeWords, Step::PublishCrossing];
    holds_only_with(&steps, || {
        let crossing = Arc::new(Crossing::new());
        crossing.begin(0);
        crossing.list(0, crossing.first_listed(), &[1]);
        let reader = thread::spawn({
            let crossing = crossing.clone();
            move || crossed(&crossing)
        });
        crossing.end(|_, _| ());
        crossing.begin(2);
        crossing.list(0, crossing.first_listed(), &[2]);
        let seen = reader.join().unwrap();
        seen.is_empty() || seen == [(0, 1)] || seen == [(FAR, 2)]
    });
}

/// A harvest takes a mark by a crossing, and leaves it to another consumer. That one finds the page
/// marked, in the crossing, or pending.
#[test]
fn a_mark_that_is_taken_is_in_a_crossing_or_pending() {
    holds_only_with(&[], || {
        taken_by_a_crossing(|crossing, mask| crossing.put_line(0, &[mask]))
    });
}

/// The same of pages that are listed. The list of a later crossing shows that the earlier one has
/// ended, so its pages are pending.
#[test]
fn a_mark_that_is_taken_is_in_a_list_or_pending() {
    holds_only_with(&[Step::ChangeBeforeWords], || {
        taken_by_a_crossing(|crossing, mask| {
            crossing.list(0, crossing.first_listed(), &[mask]);
        })
    });
}

/// Whether a reader finds both marks that two crossings take, one after the other.
fn taken_by_a_crossing(put: fn(&Crossing, u64)) -> bool {
    let crossing = Arc::new(Crossing::new());
    let marks = Arc::new([AtomicU64::new(1), AtomicU64::new(2)]);
    let pending = Arc::new([AtomicU64::new(0), AtomicU64::new(0)]);
    let reader = thread::spawn({
        let (crossing, marks, pending) = (crossing.clone(), marks.clone(), pending.clone());
        move || {
            // Relaxed, and a fence: as in `harvest::shared`.
            let mut found = [0, 1].map(|nth: usize| marks[nth].load(Ordering::Relaxed));
            fence(Ordering::Acquire);
            for (bit, mask) in crossed(&crossing) {
                found[usize::from(bit == FAR)] |= mask;
            }
            fence(Ordering::Acquire);
            for (found, pending) in found.iter_mut().zip(&*pending) {
                *found |= pending.load(Ordering::Relaxed);
            }
            found
        }
    });
    for (nth, chunk) in [0, 2].into_iter().enumerate() {
        // Relaxed: no other thread changes the mark.
        let mask = marks[nth].load(Ordering::Relaxed);
        crossing.begin(chunk);
        put(&crossing, mask);
        // As in `take::clear`.
        marks[nth].fetch_and(0, Ordering::AcqRel);
        crossing.end(|_, handed| {
            let (_, mask) = handed.masks().next().unwrap();
            // Relaxed: the end of the crossing publishes it.
            pending[nth].store(mask, Ordering::Relaxed);
        });
    }
    reader.join().unwrap() == [1, 2]
}
