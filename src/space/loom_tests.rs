//! Models: an unmap against a harvest of a consumer, a join against a harvest that begins, and the
//! record of areas that leave during a harvest: see [`past`](super::past).

use super::past::Past;
use super::recent::mark_in;
use super::walks::Walks;
use super::whole::Whole;
use super::{AddressSpace, Area};
use crate::bitmap::UserBitmap;
use crate::harvest::{Consumer, HarvestRequest, Start};
use crate::source::Mapping;
use crate::sync::model::{Bound, holds_within};
use crate::sync::{Arc, AtomicU64, Ordering, Ordering::Relaxed, Step, relax, thread};
use crate::units::{Access, Granule, Iova, IovaRange};

const PAGE: Granule = Granule::K4;

fn page() -> IovaRange {
    IovaRange::from_len(Iova::MIN, 1 << 12).unwrap()
}

/// A harvest begins while a consumer joins: it leaves the consumer what it takes, or the join waits
/// for it. The root is a number here: a harvest pins the epoch before it loads the root, which is a
/// full fence, but for a thread that holds a snapshot already.
#[test]
fn a_join_waits_for_a_harvest_or_is_known_to_it() {
    holds_within(Bound::between(1, 2), &[Step::WaitForWalks], || {
        let walks = Arc::new(Walks::new());
        let (root, taken) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
        let harvest = thread::spawn({
            let (walks, root, taken) = (walks.clone(), root.clone(), taken.clone());
            move || {
                let _walk = walks.enter();
                let knows = root.load(Relaxed) == 1;
                taken.store(1, Relaxed);
                knows
            }
        });
        root.store(1, Relaxed);
        walks.wait();
        let ended = taken.load(Relaxed) == 1;
        harvest.join().unwrap() || ended
    });
}

/// Two threads wait for harvests, as two syncs of leases of everything, or a sync and a join, may.
/// One of them waits twice. A harvest that began before the other one called has ended when it
/// returns.
#[test]
fn two_threads_that_wait_for_harvests_wait_for_each() {
    let steps = [Step::WaitForWalks, Step::TurnAlone];
    holds_within(Bound::between(3, 3), &steps, || {
        let walks = Arc::new(Walks::new());
        let (begun, ended) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
        let harvest = thread::spawn({
            let (walks, begun, ended) = (walks.clone(), begun.clone(), ended.clone());
            move || {
                let _walk = walks.enter();
                begun.store(1, Ordering::Release);
                ended.store(1, Relaxed);
            }
        });
        let other = thread::spawn({
            let walks = walks.clone();
            move || {
                walks.wait();
                walks.wait();
            }
        });
        let runs = begun.load(Ordering::Acquire) == 1;
        walks.wait();
        let waited = !runs || ended.load(Relaxed) == 1;
        harvest.join().unwrap();
        other.join().unwrap();
        waited
    });
}

/// A lease of everything is aborted, while another harvest of its consumer walks the area and finds
/// no other area. Either harvest has the area, or it is pending as a whole.
#[test]
fn a_harvest_forgets_nothing_that_is_put_back_meanwhile() {
    holds_within(Bound::USUAL, &[Step::SayPutBack], || {
        let (walks, whole) = (Arc::new(Walks::new()), Arc::new(Whole::new()));
        let harvest = thread::spawn({
            let (walks, whole) = (walks.clone(), whole.clone());
            move || {
                let walk = walks.enter();
                let told = !whole.take(page()).is_empty();
                whole.forget([IovaRange::ALL], (walk.put_backs(), &walks));
                told
            }
        });
        whole.put_back(page(), &walks);
        harvest.join().unwrap() || !whole.parts(page()).is_empty()
    });
}

/// A space with a consumer, and a page that is marked.
fn marked() -> (Arc<AddressSpace>, Consumer<'static>, Arc<Area>) {
    let space = AddressSpace::tracked(PAGE);
    space.map(page(), 0, Access::ReadWrite).unwrap();
    let space = Arc::new(space);
    let one = Consumer::shared(space.clone(), "one", Start::Clean).unwrap();
    space.mark(page()).unwrap();
    let area = space.all_areas().remove(0);
    (space, one, area)
}

/// The consumer harvests the page.
fn harvest(one: &Consumer<'_>) {
    let words = [AtomicU64::new(0)];
    let request = HarvestRequest::new(page(), PAGE);
    let lease = one.harvest(&request, UserBitmap::shared(&words));
    lease.unwrap().abort();
}

/// The looks of an unmap, while a consumer harvests the page for itself: what the unmap finds is
/// all that the other consumers are ever told. The caller of the unmap has held a snapshot since
/// before the harvest. So no snapshot of the unmap performs a fence, and it sees nothing of the
/// harvest but by its own fences.
fn beside_a_harvest(look: fn(&AddressSpace, &Area) -> bool) -> bool {
    let (space, one, area) = marked();
    let (held, begun) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
    let unmap = thread::spawn({
        let (held, begun) = (held.clone(), begun.clone());
        move || {
            let _snapshot = space.snapshot();
            // Relaxed, both, and below: they order nothing.
            held.store(1, Relaxed);
            while begun.load(Relaxed) == 0 {
                relax();
            }
            look(&space, &area)
        }
    });
    while held.load(Relaxed) == 0 {
        relax();
    }
    begun.store(1, Relaxed);
    harvest(&one);
    unmap.join().unwrap()
}

/// The models fail by what a load returns that comes late; no thread has to be preempted for it.
const BOUND: Bound = Bound::between(0, 0);
const STEPS: [Step; 3] = [Step::LeaveToOthers, Step::LookAtFlights, Step::ClaimPiece];

/// What an unmap records before it takes its area out of the tree.
#[test]
fn an_unmap_records_what_a_harvest_of_a_consumer_takes() {
    holds_within(BOUND, &STEPS, || {
        beside_a_harvest(|space, area| {
            let words = [AtomicU64::new(0)];
            let view = UserBitmap::shared(&words).view(page(), PAGE).unwrap();
            let mut sink = view.sink();
            area.marks().peek(page(), &mut sink).unwrap();
            space.record_members(area, page(), &mut sink).unwrap();
            words[0].load(Relaxed) == 1
        })
    });
}

/// What an unmap counts after that.
#[test]
fn an_unmap_counts_what_a_harvest_of_a_consumer_takes() {
    holds_within(BOUND, &STEPS, || {
        beside_a_harvest(|space, area| {
            let mut found = false;
            let mut count = |_: Iova, mask: u64| found |= mask != 0;
            area.marks().take(page(), &mut count);
            space.late_pages(area, page(), count);
            found
        })
    });
}

/// An unmap has taken an area out of the tree, and has not said so in the area yet. Another thread
/// maps other memory at its addresses, writes to it, and marks. It remembers the old area, in which
/// the mark of the new one would be lost.
#[test]
fn a_mark_in_a_remembered_area_is_one_of_the_mapped_area() {
    holds_within(Bound::between(1, 1), &[Step::LookForClaim], || {
        let space = AddressSpace::tracked(PAGE);
        space.map(page(), 0, Access::ReadWrite).unwrap();
        let old = space.all_areas().remove(0);
        let space = Arc::new(space);
        let marker = thread::spawn({
            let space = space.clone();
            move || {
                if space.map(page(), 1 << 12, Access::ReadWrite).is_err() {
                    return true; // the old area is still there
                }
                let set = || {
                    old.marks().mark(page());
                    true
                };
                if !mark_in(&old, set) {
                    space.mark(page()).unwrap();
                }
                let new = space.all_areas().remove(0);
                new.marks().runs(page()) == [page()]
            }
        });
        space.unmap_discarding(page()).unwrap();
        marker.join().unwrap()
    });
}

/// A harvest, and the unmap of an area that is in no root which the harvest walks. One of the
/// two has the dirty page of the area, and knows that it is of that area.
#[test]
fn a_page_of_an_area_that_leaves_is_attributed_to_it() {
    holds_within(Bound::USUAL, &[Step::RecordLeaving], || {
        let area = Mapping {
            range: IovaRange::from_len(Iova::MIN, 1 << 12).unwrap(),
            backing: 0,
            access: Access::ReadWrite,
        };
        let past = Past::new();
        // The dirty bit of its page, and whether the root has it.
        let dirty = Arc::new(AtomicU64::new(1));
        let root = Arc::new(AtomicU64::new(1));
        let unmap = {
            let (past, dirty, root) = (past.clone(), dirty.clone(), root.clone());
            thread::spawn(move || {
                let was_dirty = dirty.swap(0, Ordering::AcqRel) == 1; // U1
                past.record([area].into_iter()); // U2
                root.store(0, Ordering::Release); // U3
                was_dirty
            })
        };
        let watch = past.watch(); // W1
        let was_dirty = dirty.swap(0, Ordering::AcqRel) == 1; // W3
        let is_in_root = root.load(Ordering::Acquire) == 1; // W4
        let is_named = is_in_root || watch.left().contains(&area); // W5
        unmap.join().unwrap() || was_dirty && is_named
    });
}
