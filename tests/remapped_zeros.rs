//! Discards while areas and domains come and go, and while harvests run.
#![cfg(not(any(dirtymap_loom, dirtymap_shuttle)))]
#![allow(clippy::unwrap_used)] // helpers of tests

mod common;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex};
use std::thread;

use common::{Fake, PAGE, pages};
use dirtymap::harvest::Content::{self, Data, Zero};
use dirtymap::{
    Access, AddressSpace, DomainId, Granule, HarvestRequest, Iova, IovaRange, Lease, Start, Synced,
    UserBitmap,
};

const RW: Access = Access::ReadWrite;

/// A space over one source, which tracks, with an area of 16 pages and a discard in its past: the
/// first one waits for harvests that run.
fn space() -> (Arc<AddressSpace>, Arc<Fake>, DomainId) {
    let source = Arc::new(Fake::default());
    let space = AddressSpace::with_source(Granule::K4, source.clone()).unwrap();
    space.start_tracking().unwrap();
    space.map(pages(0, 16), 0, RW).unwrap();
    discard(&space, 15);
    space.rounds().next().unwrap().commit();
    let domain = space.domains()[0];
    (Arc::new(space), source, domain)
}

fn discard(space: &AddressSpace, page: u64) {
    let done = space.discard(pages(page, 1), || Ok(())).unwrap();
    assert_eq!(done.zero_bytes, u128::from(PAGE));
}

/// First page, number of pages, contents.
fn told(lease: &Lease<'_, Synced>) -> Vec<(u64, u64, Content)> {
    let page = |address: u64| address / PAGE;
    let told = lease.contents();
    told.map(|(run, what)| (page(run.start().get()), page(run.len() as u64), what))
        .collect()
}

/// At the next look of the source: other memory comes to the addresses, page 3 of it is discarded,
/// and a device writes there.
fn remap_at_the_next_look(space: &Arc<AddressSpace>, source: &Arc<Fake>) {
    let remap = {
        let (space, source) = (Arc::clone(space), Arc::clone(source));
        move || {
            space.unmap_discarding(pages(0, 16)).unwrap();
            space.map(pages(0, 16), 1 << 20, RW).unwrap();
            discard(&space, 3);
            source.dirty(3);
        }
    };
    source.with(|state| state.on_read = Some(Box::new(remap)));
}

/// The source knows only addresses. So a harvest whose snapshot has the old area takes the write to
/// the young one. The zero bits that it has to clear are those of the young area: if it clears
/// those of the old one, each consumer is told zero of a page that holds data.
#[test]
fn a_write_through_a_younger_area_is_data_for_every_consumer() {
    let (space, source, _) = space();
    let one = space.consumer("one", Start::Clean).unwrap();
    remap_at_the_next_look(&space, &source);
    let lease = space.rounds().next().unwrap();
    assert_eq!(told(&lease), [(3, 1, Data)], "the lease that took it");
    lease.abort();
    let again = space.rounds().next().unwrap();
    assert_eq!(told(&again), [(3, 1, Data)], "after an abort");
    again.commit();
    let other = one.rounds().next().unwrap();
    assert_eq!(told(&other), [(3, 1, Data)], "another consumer");
    other.commit();
    discard(&space, 3);
    let lease = one.rounds().next().unwrap();
    assert_eq!(told(&lease), [(3, 1, Zero)]);
}

/// The same by a discard, which looks for what is dirty as a harvest does.
#[test]
fn a_write_that_a_discard_takes_through_a_younger_area_is_data() {
    let (space, source, _) = space();
    remap_at_the_next_look(&space, &source);
    space.discard(pages(2, 2), || Ok(())).unwrap();
    let lease = space.rounds().next().unwrap();
    let all = told(&lease);
    assert!(all.iter().all(|(_, _, what)| *what == Data), "{all:?}");
    assert_eq!(lease.dirty(), 2);
}

/// The lease has a page of the area that went while the harvest ran. Its memory still has the
/// write, whatever is zero at its address by now.
#[test]
fn a_page_of_an_area_that_went_during_the_harvest_is_data() {
    let (space, source, _) = space();
    space.map(pages(20, 1), 1 << 30, RW).unwrap();
    source.dirty(3);
    let remap = {
        let space = Arc::clone(&space);
        move || {
            space.unmap_discarding(pages(0, 16)).unwrap();
            space.map(pages(0, 16), 1 << 20, RW).unwrap();
            discard(&space, 3);
        }
    };
    // At the look at the next area.
    let at_second = {
        let source = Arc::clone(&source);
        move || source.with(|state| state.on_read = Some(Box::new(remap)))
    };
    source.with(|state| state.on_read = Some(Box::new(at_second)));
    let lease = space.rounds().with_backing().next().unwrap();
    let backing: Vec<_> = lease.backing().unwrap().of(pages(3, 1)).collect();
    assert_eq!(backing[0].backing, 3 * PAGE);
    assert_eq!(told(&lease), [(3, 1, Data)]);
}

/// A domain that does not track is written, and goes. From then on every write is tracked, but that
/// one was not: a page that was zero may hold its data.
#[test]
fn a_detach_of_a_domain_that_did_not_track_leaves_no_zeros() {
    let (space, _, domain) = space();
    discard(&space, 3);
    space.stop_domain_tracking(domain).unwrap();
    // Its device writes page 3, which leaves no trace.
    space.detach(domain).unwrap();
    let lease = space.rounds().next().unwrap();
    assert_eq!(told(&lease), [(3, 1, Data)]);
    lease.commit();
    discard(&space, 3);
    let lease = space.rounds().next().unwrap();
    assert_eq!(told(&lease), [(3, 1, Zero)]);
}

/// The top of the address space, in the smallest and in ordinary pages.
#[test]
fn the_last_page_of_all_is_discarded() {
    for (page, lg2) in [(Granule::BYTE, 0), (Granule::K4, 12)] {
        let space = AddressSpace::tracked(page);
        let first = u64::MAX - ((64 << lg2) - 1);
        let all = IovaRange::new(Iova::new(first), Iova::MAX).unwrap();
        space.map(all, 0, RW).unwrap();
        let done = space.discard(all, || Ok(())).unwrap();
        assert_eq!((done.zero_bytes, done.dirty_bytes), (all.len(), 0));
        space.mark(u64::MAX..=u64::MAX).unwrap();
        let lease = space.rounds().next().unwrap();
        let told: Vec<_> = lease.contents().collect();
        let last = IovaRange::granule_at(Iova::MAX, page);
        let below = all.below(last.start()).unwrap();
        assert_eq!(told, [(below, Zero), (last, Data)]);
        // Granules that are larger than the area, and than the range.
        lease.abort();
        let granule = Granule::from_lg2(lg2 + 10).unwrap();
        let range = IovaRange::granule_at(Iova::MAX, granule);
        let mut words = [0];
        let request = HarvestRequest::new(range, granule);
        let lease = space
            .harvest(&request, UserBitmap::new(&mut words))
            .unwrap();
        let told: Vec<_> = lease.sync().unwrap().contents().collect();
        let hole = range.below(first.into()).unwrap();
        assert_eq!(told, [(hole, Data), (below, Zero), (last, Data)]);
    }
}

/// A source panics while a discard looks, or flushes. What was dirty is data.
#[test]
fn a_source_that_panics_in_a_discard_leaves_data() {
    for in_flush in [false, true] {
        let (space, source, _) = space();
        source.dirty(3);
        source.dirty(5);
        source.with(|state| {
            state.panic_at = (!in_flush).then_some(4);
            state.panic_in_invalidate = in_flush;
        });
        let discard = || space.discard(pages(2, 4), || panic!("the storage is dropped"));
        assert!(catch_unwind(AssertUnwindSafe(discard)).is_err());
        source.with(|state| {
            state.panic_at = None;
            state.panic_in_invalidate = false;
        });
        let lease = space.rounds().next().unwrap();
        assert_eq!(told(&lease), [(2, 4, Data)]);
        lease.commit();
        self::discard(&space, 4);
        let lease = space.rounds().next().unwrap();
        assert_eq!(told(&lease), [(4, 1, Zero)]);
    }
}

/// A harvest runs that is older than the first discard, and sees it come. It knows no consumer, so
/// it must not take pages by way of a flight: if a source panics then, they are left to nobody.
#[test]
fn a_harvest_that_is_older_than_the_first_discard_loses_nothing() {
    let source = Arc::new(Fake::default());
    let space = AddressSpace::with_source(Granule::K4, source.clone()).unwrap();
    space.start_tracking().unwrap();
    let space = Arc::new(space);
    space.map(pages(0, 16), 0, RW).unwrap();
    space.map(pages(16, 16), 1 << 20, RW).unwrap();
    source.dirty(20);
    let waits = Arc::new(Mutex::new(None));
    let begin = {
        let (space, waits) = (Arc::clone(&space), Arc::clone(&waits));
        move || {
            let snapshot = space.snapshot();
            let first = Arc::clone(&space);
            let thread = thread::spawn(move || discard(&first, 3));
            *waits.lock().unwrap() = Some(thread);
            while snapshot.age() == 0 {
                thread::yield_now(); // until the discard waits for the harvest
            }
        }
    };
    source.with(|state| {
        state.on_read = Some(Box::new(begin)); // at the look at the first area
        state.panic_at = Some(25);
    });
    let panicked = catch_unwind(AssertUnwindSafe(|| space.rounds().harvest().map(drop)));
    assert!(panicked.is_err());
    source.with(|state| state.panic_at = None);
    let thread = waits.lock().unwrap().take().unwrap();
    thread.join().unwrap();
    let lease = space.rounds().next().unwrap();
    let found = lease.runs().any(|run| run.contains(pages(20, 1).start()));
    assert!(found, "page 20 is lost");
}
