//! Model checking of several consumers of one space. As in `loom.rs`, each model is run again with
//! single steps left out, and must fail then.
#![cfg(dirtymap_loom)]
#![allow(clippy::unwrap_used)] // helpers of tests

mod common_loom;

use common_loom::{OnePage, Source};
use dirtymap::harvest::{Bounds, Since};
use dirtymap::sync::model::{Bound, holds_within};
use dirtymap::sync::{Arc, AtomicU64, Ordering::Relaxed, Step, thread};
use dirtymap::{
    Access, AddressSpace, Consumer, Error, Granule, HarvestRequest, Iova, IovaRange, Rounds, Start,
    UserBitmap,
};

const PAGE: Granule = Granule::K4;
/// One preemption shows all that these models show with two, in a hundredth of the time.
const BOUND: Bound = Bound::between(1, 1);

fn page(n: u64) -> IovaRange {
    IovaRange::from_len(Iova::new(n << 12), 1 << 12).unwrap()
}

/// A space of one page, whose marks were set in the order of `first`.
fn space() -> AddressSpace {
    let space = AddressSpace::tracked(PAGE);
    space.map(page(0), 0, Access::ReadWrite).unwrap();
    space
}

/// Harvests page 0 for `consumer`; whether it was dirty. It is committed after `copy`.
fn harvest(consumer: &Consumer<'_>, mut copy: impl FnMut()) -> bool {
    let words = [AtomicU64::new(0)];
    let request = HarvestRequest::new(page(0), PAGE);
    let lease = consumer.harvest(&request, UserBitmap::shared(&words));
    let lease = lease.unwrap().sync().unwrap();
    let dirty = lease.dirty() == 1;
    if dirty {
        copy();
    }
    lease.commit();
    dirty
}

/// The same, of which only the walk is done.
fn walk(consumer: &Consumer<'_>) -> bool {
    let words = [AtomicU64::new(0)];
    let request = HarvestRequest::new(page(0), PAGE);
    let lease = consumer.harvest(&request, UserBitmap::shared(&words));
    lease.unwrap().sync().unwrap().commit();
    words[0].load(Relaxed) == 1
}

/// The same for the unnamed consumer.
fn walk_unnamed(space: &AddressSpace) -> bool {
    let words = [AtomicU64::new(0)];
    let request = HarvestRequest::new(page(0), PAGE);
    let lease = space.harvest(&request, UserBitmap::shared(&words));
    lease.unwrap().sync().unwrap().commit();
    words[0].load(Relaxed) == 1
}

/// A page that was marked before two harvests of two consumers began is reported by both, though
/// one of them clears the mark while the other looks: in the marks, behind a summary that is
/// cleared, in flight or pending.
#[test]
fn a_mark_is_told_to_each_consumer() {
    let steps = [Step::LeaveToOthers, Step::LookAtFlights, Step::ClaimPiece];
    holds_within(BOUND, &steps, || {
        let space = Arc::new(space());
        let one = Consumer::shared(space.clone(), "one", Start::Clean).unwrap();
        space.mark(page(0)).unwrap();
        let other = thread::spawn(move || walk(&one));
        let told = walk_unnamed(&space);
        other.join().unwrap() && told
    });
}

/// A CPU writes a page that is marked already, and its mark finds it so, while one consumer clears
/// the mark, leaves the page to another, and copies it. Then both harvest once more.
#[test]
fn a_mark_that_is_skipped_is_lost_by_no_consumer() {
    let steps = [Step::MarkFence, Step::LeaveToOthers];
    holds_within(Bound::between(2, 2), &steps, || {
        let space = Arc::new(space());
        let one = Consumer::shared(space.clone(), "one", Start::Clean).unwrap();
        let two = Consumer::shared(space.clone(), "two", Start::Clean).unwrap();
        let area = space.area(Iova::MIN).unwrap();
        area.mark(page(0)).unwrap();
        let data = Arc::new(AtomicU64::new(0));
        let writer = thread::spawn({
            let data = data.clone();
            move || {
                data.store(1, Relaxed);
                area.mark(page(0)).unwrap();
            }
        });
        let (mut copy, mut other) = (0, 0);
        harvest(&one, || copy = data.load(Relaxed));
        harvest(&two, || other = data.load(Relaxed));
        writer.join().unwrap();
        harvest(&one, || copy = data.load(Relaxed));
        harvest(&two, || other = data.load(Relaxed));
        copy == 1 && other == 1
    });
}

/// An abort of one consumer puts back for that consumer, and a harvest of another one finds the
/// page, in every interleaving; it is told once.
#[test]
fn an_abort_of_one_consumer_takes_nothing_from_another() {
    holds_within(BOUND, &[Step::LeaveToOthers], || {
        let space = Arc::new(space());
        let one = Consumer::shared(space.clone(), "one", Start::Clean).unwrap();
        space.mark(page(0)).unwrap();
        let other = thread::spawn(move || {
            let lease = one.rounds().harvest().unwrap();
            let dirty = lease.report().bits_set == 1;
            lease.abort();
            (one, dirty)
        });
        let told = walk_unnamed(&space);
        let (one, dirty) = other.join().unwrap();
        // In flight of the other harvest and then pending: it may be told twice, and no more.
        let again = walk(&one);
        walk(&one);
        told && dirty && again && !walk(&one)
    });
}

/// A space over the page, before it tracks.
fn over(hardware: &Arc<OnePage>) -> AddressSpace {
    let space = AddressSpace::with_source(PAGE, Source(hardware.clone())).unwrap();
    space.map(page(0), 0, Access::ReadWrite).unwrap();
    space.start_tracking().unwrap();
    space
}

/// The dirty bit of a leaf is cleared by one consumer while the other looks at it. The clear has no
/// order of its own.
#[test]
fn a_leaf_is_told_to_each_consumer() {
    let steps = [Step::LeaveToOthers, Step::LookAtFlights, Step::FlightFence];
    holds_within(BOUND, &steps, || {
        let hardware = OnePage::new(true);
        let space = Arc::new(over(&hardware));
        let one = Consumer::shared(space.clone(), "one", Start::Clean).unwrap();
        hardware.device_writes(2);
        let other = thread::spawn(move || walk(&one));
        let told = walk_unnamed(&space);
        other.join().unwrap() && told
    });
}

/// A page that is pending carries its debt: the harvest that takes it pays, and a later write of
/// the device sets the dirty bit anew. The lease of the other consumer is not synced meanwhile.
#[test]
fn what_is_left_to_a_consumer_carries_its_debt() {
    holds_within(BOUND, &[Step::CarryDebt], || {
        let hardware = OnePage::new(true);
        let space = Arc::new(over(&hardware));
        let one = Consumer::shared(space.clone(), "one", Start::Clean).unwrap();
        let two = Consumer::shared(space.clone(), "two", Start::Clean).unwrap();
        hardware.device_writes(2);
        let other = thread::spawn(move || one.rounds().harvest().unwrap());
        let mut copy = 0;
        harvest(&two, || copy = hardware.data.load(Relaxed));
        hardware.device_writes(3);
        let lease = other.join().unwrap();
        harvest(&two, || copy = hardware.data.load(Relaxed));
        drop(lease);
        copy == 3
    });
}

/// A consumer joins while a harvest that does not know it runs, and is told of every write that
/// begins after the join.
#[test]
fn a_consumer_that_joins_is_told_what_comes_after() {
    let steps = [Step::WaitForWalks, Step::FlushAtJoin];
    holds_within(BOUND, &steps, || {
        let hardware = OnePage::new(true);
        let space = Arc::new(over(&hardware));
        hardware.device_writes(2);
        let harvester = thread::spawn({
            let space = space.clone();
            move || Rounds::shared(space).harvest().unwrap()
        });
        // The harvest begins first.
        thread::yield_now();
        let late = Consumer::shared(space.clone(), "late", Start::Clean).unwrap();
        let mut copy = hardware.data.load(Relaxed);
        hardware.device_writes(3);
        let lease = harvester.join().unwrap();
        harvest(&late, || copy = hardware.data.load(Relaxed));
        drop(lease);
        copy == 3
    });
}

/// An unmap that returns what is dirty, against a harvest of another consumer: what some consumer
/// was not told is in the result, or the harvest found it and leaves it there.
#[test]
fn an_unmap_finds_what_is_left_to_a_consumer() {
    holds_within(BOUND, &[Step::LookAtFlights], || {
        let space = Arc::new(space());
        let one = Consumer::shared(space.clone(), "one", Start::Clean).unwrap();
        space.mark(page(0)).unwrap();
        let other = thread::spawn(move || walk(&one));
        // The harvest begins first.
        thread::yield_now();
        let words = [AtomicU64::new(0)];
        let unmapped = space.unmap(page(0), PAGE, UserBitmap::shared(&words));
        unmapped.unwrap();
        // The unnamed consumer was told nothing.
        other.join().unwrap();
        words[0].load(Relaxed) == 1
    });
}

/// Two harvests of one consumer at a time, and a write after the copies of the first one that ends.
/// Copies that are applied in the order of epochs have the write, or the page is dirty.
#[test]
fn copies_in_the_order_of_epochs_have_every_write() {
    holds_within(BOUND, &[Step::NumberAtEnd], || {
        let space = Arc::new(space());
        let one = Consumer::shared(space.clone(), "one", Start::Clean).unwrap();
        let one = Arc::new(one);
        space.mark(page(0)).unwrap();
        let data = Arc::new(AtomicU64::new(1));
        let copy = |one: &Consumer<'_>, data: &AtomicU64| {
            let lease = one.rounds().next().unwrap();
            let copy = (lease.dirty() == 1).then(|| data.load(Relaxed));
            let number = lease.lineage().unwrap().epoch.number();
            lease.commit();
            (number, copy)
        };
        let other = thread::spawn({
            let (space, one, data) = (space.clone(), one.clone(), data.clone());
            move || {
                let copied = copy(&one, &data);
                data.store(2, Relaxed);
                space.mark(page(0)).unwrap();
                copied
            }
        });
        let mut copies = [copy(&one, &data), (0, None)];
        copies[1] = other.join().unwrap();
        copies.sort_unstable();
        let last = copies.iter().rev().find_map(|(_, copy)| *copy);
        last == Some(2) || walk(&one)
    });
}

/// A harvest of the unnamed consumer of one page; whether it was dirty.
fn walk_page(space: &AddressSpace, n: u64) -> bool {
    let words = [AtomicU64::new(0)];
    let request = HarvestRequest::new(page(n), PAGE);
    let lease = space.harvest(&request, UserBitmap::shared(&words));
    lease.unwrap().sync().unwrap().commit();
    words[0].load(Relaxed) == 1
}

/// A consumer whose store is full. The next harvest of another consumer drops the store.
fn with_full_store(space: &Arc<AddressSpace>, n: u64) -> Consumer<'static> {
    let one = Consumer::shared(space.clone(), "one", Start::Clean).unwrap();
    space.mark(page(n)).unwrap();
    walk_page(space, n);
    one.set_bounds(Bounds {
        bytes: 0,
        ..Bounds::default()
    });
    one
}

/// A page that was marked before the harvest of a consumer began is told by it, though another
/// harvest drops the consumer's store meanwhile, and a third one leaves the page in the new store.
#[test]
fn a_store_that_is_dropped_is_told_as_a_whole() {
    let steps = [Step::TellWhole, Step::FollowStore];
    holds_within(BOUND, &steps, || {
        let space = Arc::new(space());
        space.map(page(1), 0, Access::ReadWrite).unwrap();
        let one = with_full_store(&space, 1);
        space.mark(page(0)).unwrap();
        let other = thread::spawn({
            let space = space.clone();
            move || {
                walk_page(&space, 1); // drops the store
                walk_page(&space, 0)
            }
        });
        let told = walk(&one);
        other.join().unwrap();
        // Page 1 was pending in the store that was dropped.
        told && one.stats().everything
    });
}

/// A harvest that uses the old store clears a page that a lease has as a whole. The sync of that
/// lease waits for it and flushes, so a later write of the device leaves a trace.
#[test]
fn a_lease_of_everything_waits_for_harvests_with_the_old_store() {
    holds_within(BOUND, &[Step::CatchUp], || {
        let hardware = OnePage::new(true);
        let space = Arc::new(over(&hardware));
        let one = with_full_store(&space, 0);
        let two = Consumer::shared(space.clone(), "two", Start::Clean).unwrap();
        hardware.device_writes(2);
        let other = thread::spawn({
            let space = space.clone();
            move || Rounds::shared(space).harvest().unwrap()
        });
        // The harvest begins first.
        thread::yield_now();
        walk(&two); // drops the store
        let mut copy = 0;
        harvest(&one, || copy = hardware.data.load(Relaxed));
        hardware.device_writes(3);
        let lease = other.join().unwrap();
        harvest(&one, || copy = hardware.data.load(Relaxed));
        drop(lease);
        copy == 3
    });
}

/// The same harvest of others, and a younger lease, which sees the page in flight and has nothing
/// as a whole. Its sync waits, too: else its copy could be older than that of the lease of
/// everything, although its epoch is the later one.
#[test]
fn a_lease_over_a_new_store_waits_for_harvests_with_the_old_one() {
    holds_within(BOUND, &[Step::CatchUp], || {
        let hardware = OnePage::new(true);
        let space = Arc::new(over(&hardware));
        let one = with_full_store(&space, 0);
        let two = Consumer::shared(space.clone(), "two", Start::Clean).unwrap();
        hardware.device_writes(2);
        let other = thread::spawn({
            let space = space.clone();
            move || Rounds::shared(space).harvest().unwrap()
        });
        // The harvest begins first.
        thread::yield_now();
        walk(&two); // drops the store
        let everything = one.rounds().harvest().unwrap();
        let younger = one.rounds().next().unwrap();
        let seen = (younger.dirty() == 1).then(|| hardware.data.load(Relaxed));
        hardware.device_writes(3);
        let lease = other.join().unwrap();
        let everything = everything.sync().unwrap();
        let mut copy = seen.unwrap_or_else(|| hardware.data.load(Relaxed));
        everything.commit();
        younger.commit();
        harvest(&one, || copy = hardware.data.load(Relaxed));
        drop(lease);
        copy == 3
    });
}

/// The answer of a join.
fn joins_like(one: &Consumer<'static>, space: &Arc<AddressSpace>) -> Option<Consumer<'static>> {
    match Consumer::shared(space.clone(), "two", Start::LikeOf(one)) {
        Ok(two) => Some(two),
        Err(Error::ConsumerBusy { .. }) => None,
        Err(error) => panic!("{error}"),
    }
}

/// A page is marked, and a harvest takes it and leaves it to the first consumer, while a second one
/// joins as a copy of the first. The harvest may not know the second one, which then copies what is
/// pending for the first.
#[test]
fn the_copy_of_a_consumer_has_what_a_harvest_leaves_meanwhile() {
    holds_within(BOUND, &[Step::WaitForWalks], || {
        let space = Arc::new(space());
        let one = Consumer::shared(space.clone(), "one", Start::Clean).unwrap();
        let other = thread::spawn({
            let space = space.clone();
            move || {
                space.mark(page(0)).unwrap();
                walk_unnamed(&space);
            }
        });
        // The harvest begins first.
        thread::yield_now();
        let two = joins_like(&one, &space).unwrap();
        other.join().unwrap();
        walk(&two) && walk(&one)
    });
}

/// A lease of the first consumer has taken a page that was pending, and puts it back, while the
/// second one joins as its copy. Either the join is refused, or the copy is told the page.
#[test]
fn the_copy_of_a_consumer_has_what_a_lease_puts_back_meanwhile() {
    holds_within(BOUND, &[Step::SettledAgain], || {
        let space = Arc::new(space());
        let one = Arc::new(Consumer::shared(space.clone(), "one", Start::Clean).unwrap());
        space.mark(page(0)).unwrap();
        walk_unnamed(&space);
        let other = thread::spawn({
            let one = one.clone();
            move || drop(one.rounds().harvest().unwrap())
        });
        let two = joins_like(&one, &space);
        other.join().unwrap();
        two.is_none_or(|two| walk(&two)) && walk(&one)
    });
}

/// An increment is committed while the younger of two cursors is dropped. It is in the delta of the
/// older one, whichever comes first.
#[test]
fn a_cursor_that_goes_leaves_its_delta_to_the_older_one() {
    holds_within(BOUND, &[Step::MergeDelta], || {
        let space = Arc::new(space());
        let one = Consumer::shared(space.clone(), "one", Start::Clean).unwrap();
        let older = one.cursor();
        one.rounds().next().unwrap().commit();
        let younger = one.cursor();
        space.mark(page(0)).unwrap();
        let lease = one.rounds().next().unwrap();
        let dropper = thread::spawn(move || drop(younger));
        lease.commit();
        dropper.join().unwrap();
        matches!(one.since(older.epoch()), Since::Runs(written) if !written.is_empty())
    });
}
