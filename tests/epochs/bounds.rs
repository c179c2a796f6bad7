//! A consumer that holds too much is told everything, once.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, OnceLock, Weak};

use dirtymap::harvest::{Bounds, Parent, Why};
use dirtymap::source::{FlushGather, LeafSink, Sink, Stopped};
use dirtymap::{
    Access, AddressSpace, Consumer, DirtySource, Error, Granule, HarvestRequest, IovaRange,
    SharedLog, Start, Tracking, UserBitmap,
};

use super::{PAGE, next, numbers, of, pages, since, space};

/// Less than the 4 KiB of the first page that is pending.
const TIGHT: Bounds = Bounds {
    bytes: 1,
    deltas: 64,
    age: u64::MAX,
};

/// What the unnamed consumer leaves to the others.
fn leave(space: &AddressSpace, first: u64, n: u64) {
    space.mark(pages(first, n)).unwrap();
    space.rounds().next().unwrap().commit();
}

/// A consumer with a tight bound, for which everything is pending.
fn full(space: &AddressSpace) -> Consumer<'_> {
    let one = space.consumer("one", Start::Clean).unwrap();
    one.set_bounds(TIGHT);
    leave(space, 3, 1);
    assert!(one.stats().everything);
    one.set_bounds(Bounds::default());
    one
}

#[test]
fn a_consumer_that_never_comes_is_told_everything_once() {
    let space = space(300);
    space.map(pages(500, 4), 0, Access::ReadWrite).unwrap();
    let one = space.consumer("one", Start::Clean).unwrap();
    let (_, before) = next(&one);
    one.set_bounds(TIGHT);
    for page in 0..100 {
        leave(&space, page, 1);
        assert_eq!(one.stats().held_bytes, 0, "page {page}");
    }
    let stats = one.stats();
    assert_eq!((stats.everything, stats.pending_bytes), (true, 0));
    assert_eq!(stats.dropped, 100);
    // Everything that is mapped, and said so.
    let all: Vec<u64> = (0..300).chain(500..504).collect();
    let (told, whole) = next(&one);
    assert_eq!((told, whole.parent), (all, Parent::Everything(Why::Bounds)));
    // Then it goes on.
    one.set_bounds(Bounds::default());
    leave(&space, 7, 1);
    let (told, after) = next(&one);
    assert_eq!((told, after.parent), (vec![7], of(whole)));
    assert!(!one.stats().everything);
    assert_ne!(of(before), after.parent);
}

/// Age: harvests of others since its own last one.
#[test]
fn a_consumer_that_is_late_is_told_everything() {
    let space = space(64);
    let one = space.consumer("one", Start::Clean).unwrap();
    one.set_bounds(Bounds {
        age: 2,
        ..Bounds::default()
    });
    leave(&space, 1, 1);
    leave(&space, 2, 1);
    assert_eq!(next(&one).0, [1, 2]);
    (0..3).for_each(|page| leave(&space, page, 1));
    let (told, lineage) = next(&one);
    assert_eq!(told.len(), 64);
    assert_eq!(lineage.parent, Parent::Everything(Why::Bounds));
    assert_eq!(next(&one).0.len(), 0);
}

/// A lease that has everything, and is aborted: everything is pending again, but for the parts that
/// were committed.
#[test]
fn an_abort_of_everything_makes_everything_pending() {
    let space = space(64);
    let one = full(&space);
    let lease = one.rounds().next().unwrap();
    assert_eq!(lease.dirty(), 64);
    lease.commit_range(pages(10, 20));
    let aborted = lease.abort();
    assert_eq!((aborted.bytes, aborted.outside_bytes), (44 * PAGE, 0));
    assert_eq!(one.stats().pending_bytes, 0, "page by page");
    drop(one.rounds().harvest().unwrap());
    let (told, lineage) = next(&one);
    assert_eq!(told, (0..10).chain(30..64).collect::<Vec<u64>>());
    assert!(matches!(lineage.parent, Parent::Epoch(_)), "of the part");
    assert_eq!(next(&one).0.len(), 0);
}

/// A lease of everything of which a part was committed, and the rest aborted. The next lease has
/// the rest alone. It said that it was everything, and a tool that began a new copy with it lost
/// the part.
#[test]
fn the_rest_of_everything_is_an_increment() {
    let space = space(64);
    let one = full(&space);
    let lease = one.rounds().next().unwrap();
    lease.commit_range(pages(10, 20));
    let whole = lease.lineage().unwrap();
    assert_eq!(whole.parent, Parent::Everything(Why::Bounds));
    lease.abort();
    let (told, rest) = next(&one);
    assert_eq!((told.len(), rest.parent), (44, of(whole)));
}

/// Harvests of parts of the range: each part is told once. A peek takes nothing.
#[test]
fn everything_is_told_part_by_part() {
    let space = space(128);
    let one = space
        .consumer_of("one", pages(0, 128), Start::Clean)
        .unwrap();
    one.set_bounds(TIGHT);
    leave(&space, 3, 1);
    one.set_bounds(Bounds::default());
    let told = |first: u64, n: u64| {
        let mut words = [0; 2];
        let request = HarvestRequest::new(pages(first, n), Granule::K4);
        let seen = one.peek(&request, UserBitmap::new(&mut words)).unwrap();
        let seen: Vec<u64> = seen.bits().map(|bit| bit + first).collect();
        let mut words = [0; 2];
        let lease = one.harvest(&request, UserBitmap::new(&mut words)).unwrap();
        let lease = lease.sync().unwrap();
        let told = numbers(lease.runs());
        assert_eq!(told, seen);
        lease.commit();
        told
    };
    assert_eq!(told(64, 64), (64..128).collect::<Vec<u64>>());
    assert_eq!(told(64, 64), []);
    assert!(one.stats().everything);
    assert_eq!(told(0, 128), (0..64).collect::<Vec<u64>>());
    assert!(!one.stats().everything);
}

/// A harvest that stops: what lies above the stop is pending as before.
#[test]
fn everything_above_a_stop_stays_pending() {
    let space = space(64);
    space.map(pages(100, 28), 0, Access::ReadWrite).unwrap();
    let one = full(&space);
    let request = HarvestRequest::new(pages(0, 128), Granule::K4);
    let mut words = [0; 2];
    let request_to_hole = request.holes(dirtymap::Holes::Stop);
    let lease = one.harvest(&request_to_hole, UserBitmap::new(&mut words));
    let lease = lease.unwrap().partial().sync().unwrap();
    assert_eq!(numbers(lease.runs()), (0..64).collect::<Vec<u64>>());
    lease.commit();
    assert_eq!(next(&one).0, (100..128).collect::<Vec<u64>>());
}

/// An unmap returns all of its area, because the consumer has not been told any of it.
#[test]
fn an_unmap_returns_what_is_pending_as_a_whole() {
    let space = space(64);
    let one = full(&space);
    let mut words = [0; 1];
    let (_, view) = space
        .unmap(pages(0, 64), Granule::K4, UserBitmap::new(&mut words))
        .unwrap();
    assert_eq!(view.count(), 64);
    assert_eq!(one.stats().unmapped_bytes, 64 * PAGE);
}

/// A copy of such a consumer is told everything, too; and one that left is told nothing.
#[test]
fn a_copy_is_told_everything_too() {
    let space = space(64);
    let one = full(&space);
    let copy = space.consumer("copy", Start::LikeOf(&one)).unwrap();
    drop(one);
    assert_eq!(next(&copy).0.len(), 64);
    assert_eq!(next(&copy).0.len(), 0);
}

/// The unnamed consumer is bounded as any other.
#[test]
fn the_unnamed_consumer_is_told_everything_once() {
    let space = space(64);
    space.set_unnamed_bounds(TIGHT); // there is none yet
    let one = space.consumer("one", Start::Clean).unwrap();
    space.set_unnamed_bounds(TIGHT);
    space.mark(pages(3, 1)).unwrap();
    assert_eq!(next(&one).0, [3]);
    let lease = space.rounds().next().unwrap();
    assert_eq!(lease.dirty(), 64);
    assert!(
        matches!(lease.lineage(), Some(told) if told.parent == Parent::Everything(Why::Bounds))
    );
    lease.commit();
    assert_eq!(space.rounds().next().unwrap().commit().bits_set, 0);
}

/// A lease over the old store: its commit is an epoch of its own, and its abort puts back nothing
/// that is not told.
#[test]
fn a_lease_over_a_store_that_was_dropped_goes_on() {
    for commits in [true, false] {
        let space = space(64);
        let one = space.consumer("one", Start::Clean).unwrap();
        let joined = one.cursor();
        leave(&space, 1, 1);
        let old = one.rounds().next().unwrap();
        one.set_bounds(TIGHT);
        leave(&space, 2, 1);
        assert!(one.stats().everything);
        one.set_bounds(Bounds::default());
        if commits {
            let (_, lineage) = old.commit_epoch();
            assert_eq!(lineage.unwrap().parent, Parent::Epoch(joined.epoch()));
            assert_eq!(since(&one, joined.epoch()), Ok(vec![1]));
        } else {
            old.abort();
        }
        let (told, lineage) = next(&one);
        assert_eq!(
            (told.len(), lineage.parent),
            (64, Parent::Everything(Why::Bounds))
        );
        assert_eq!(next(&one).0.len(), 0);
        assert_eq!(since(&one, joined.epoch()).unwrap().len(), 64);
    }
}

/// The dirty bits of a source are flushed for such a lease, whatever other leases owe.
#[test]
fn everything_includes_the_pages_of_sources() {
    let space = space(64);
    let log: Arc<[AtomicU64]> = Arc::new([AtomicU64::new(0)]);
    let shared = SharedLog::new(0..64 * PAGE, Granule::K4, Arc::clone(&log)).unwrap();
    space.attach(shared).unwrap();
    let one = full(&space);
    log[0].store(1 << 9, SeqCst);
    let owed = space.rounds().harvest().unwrap();
    assert_eq!(next(&one).0.len(), 64);
    log[0].store(1 << 10, SeqCst);
    drop(owed);
    assert_eq!(next(&one).0, [10]);
}

/// Everything is pending, and a harvest asks for the pages of a mask. The rest stays pending.
#[test]
fn everything_outside_of_a_mask_stays_pending() {
    let space = space(64);
    let one = full(&space);
    let (mut mask, mut words) = ([0b11 << 5], [0]);
    let all = pages(0, 64);
    let mask = UserBitmap::new(&mut mask).view(all, Granule::K4).unwrap();
    let request = HarvestRequest::new(all, Granule::K4).masked(mask);
    let lease = one.harvest(&request, UserBitmap::new(&mut words)).unwrap();
    assert_eq!(lease.sync().unwrap().commit().bits_set, 2);
    let rest: Vec<u64> = (0..5).chain(7..64).collect();
    assert_eq!(next(&one).0, rest);
    assert_eq!(next(&one).0, []);
}

/// A bound of age counts from the consumer's own last harvest.
#[test]
fn a_harvest_begins_a_new_age() {
    let space = space(64);
    let one = space.consumer("one", Start::Clean).unwrap();
    let age = 2;
    one.set_bounds(Bounds {
        age,
        ..Bounds::default()
    });
    for _ in 0..3 {
        for page in 0..age {
            leave(&space, page, 1);
            assert!(!one.stats().everything);
        }
        assert_eq!(next(&one).0, [0, 1]);
    }
}

/// An abort that puts back more than the bounds allow: everything is pending, and no memory is
/// held.
#[test]
fn an_abort_keeps_the_bounds() {
    let space = space(64);
    let one = space.consumer("one", Start::Clean).unwrap();
    one.set_bounds(TIGHT);
    space.mark(pages(5, 1)).unwrap();
    one.rounds().next().unwrap().abort();
    let stats = one.stats();
    assert_eq!((stats.held_bytes, stats.everything), (0, true));
    assert_eq!(next(&one).0, (0..64).collect::<Vec<u64>>());
}

/// A lease is aborted whose store was dropped meanwhile, after a younger lease has taken everything
/// and is committed. The pages were put back into the store that was dropped, at which no harvest
/// looks.
#[test]
fn an_abort_over_a_store_that_was_dropped_makes_its_pages_dirty_again() {
    let space = space(64);
    let one = space.consumer("one", Start::Clean).unwrap();
    space.mark(pages(5, 2)).unwrap();
    let mut rounds = one.rounds();
    let older = rounds.next().unwrap();
    one.set_bounds(TIGHT);
    leave(&space, 9, 1);
    assert!(one.stats().everything);
    one.set_bounds(Bounds::default());
    assert_eq!(next(&one).0.len(), 64);
    older.abort();
    assert_eq!(next(&one).0, [5, 6]);
    assert_eq!(next(&one).0, []);
    // Beyond the bounds of the consumer, everything is pending once more.
    space.mark(pages(5, 2)).unwrap();
    let older = rounds.next().unwrap();
    one.set_bounds(TIGHT);
    leave(&space, 9, 1);
    assert_eq!(next(&one).0.len(), 64);
    older.abort();
    let stats = one.stats();
    assert_eq!((stats.held_bytes, stats.everything), (0, true));
}

/// The memory of pending pages leaves less to the deltas.
#[test]
fn deltas_have_the_room_that_pending_pages_leave() {
    let space = space(1000);
    let one = space.consumer("one", Start::Clean).unwrap();
    one.set_bounds(Bounds {
        bytes: 6000,
        ..Bounds::default()
    });
    let early = one.cursor();
    for page in (0..600).step_by(2) {
        space.mark(pages(page, 1)).unwrap();
    }
    next(&one);
    assert!(one.stats().delta_bytes < 6000);
    assert_eq!(since(&one, early.epoch()).unwrap().len(), 300);
    leave(&space, 3, 1); // 4096 bytes, and 1024 of lists
    next(&one);
    assert_eq!(since(&one, early.epoch()), Err(Why::Bounds));
}

/// In the first look at the second area, another consumer harvests, and drops the store of the one
/// that looks.
#[derive(Default)]
struct Meanwhile {
    space: OnceLock<Weak<AddressSpace>>,
    done: AtomicBool,
}

impl DirtySource for Meanwhile {
    fn set_tracking(&self, _: Tracking) -> Result<(), Error> {
        Ok(())
    }

    fn unmap(&self, _: IovaRange, _: &mut FlushGather, _: &mut dyn FnMut(IovaRange)) {}

    fn read_and_clear(&self, range: IovaRange, _: &mut LeafSink<'_, '_>) -> Result<(), Stopped> {
        let space = self.space.get().and_then(Weak::upgrade);
        if let Some(space) = space.filter(|_| range.start() == pages(64, 1).start())
            && !self.done.swap(true, SeqCst)
        {
            leave(&space, 3, 1);
        }
        Ok(())
    }

    fn peek(&self, _: IovaRange, _: &mut Sink<'_>) -> Result<(), Stopped> {
        Ok(())
    }
}

/// A harvest has passed the first area. Then another harvest leaves a page there in the old store
/// of the consumer, and drops the store. The new store has everything, and the walk has not seen
/// the first area for it, so what is left there is no hole.
#[test]
fn a_store_that_comes_during_a_walk_is_not_taken_for_holes() {
    let space = Arc::new(space(64));
    space.map(pages(64, 64), 0, Access::ReadWrite).unwrap();
    let source = Arc::new(Meanwhile::default());
    space.attach(Arc::clone(&source)).unwrap();
    let one = space.consumer("one", Start::Clean).unwrap();
    one.set_bounds(TIGHT);
    source.space.set(Arc::downgrade(&space)).unwrap();
    let told = next(&one).0;
    assert!(source.done.load(SeqCst) && one.stats().everything);
    assert_eq!(told, (64..128).collect::<Vec<u64>>());
    one.set_bounds(Bounds::default());
    assert_eq!(next(&one).0, (0..64).collect::<Vec<u64>>());
    assert_eq!(next(&one).0, []);
}
