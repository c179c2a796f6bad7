//! Marks and harvests do not allocate, once each chunk of marks exists.
#![cfg(not(dirtymap_loom))]
#![allow(clippy::unwrap_used)] // helpers of tests

mod common;
mod common_allocations;

use common::pages;
use common_allocations::{allocated_bytes, allocations};
use dirtymap::source::{FlushGather, Invalidated, LeafSink, Sink, Stopped};
use dirtymap::{
    Access, AddressSpace, DirtySource, Error, Granule, HarvestRequest, Iova, IovaRange, Mapping,
    Tracking, UserBitmap,
};
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};

/// One dirty bit over 64 pages.
#[derive(Default)]
struct OneLeaf(AtomicBool);

impl DirtySource for OneLeaf {
    fn map(&self, _: &Mapping) -> Result<(), Error> {
        Ok(())
    }

    fn unmap(&self, _: IovaRange, _: &mut FlushGather, _: &mut dyn FnMut(IovaRange)) {}

    fn set_tracking(&self, _: Tracking) -> Result<(), Error> {
        Ok(())
    }

    fn read_and_clear(&self, range: IovaRange, out: &mut LeafSink<'_, '_>) -> Result<(), Stopped> {
        let leaf = pages(0, 64);
        if range.intersects(leaf) && self.0.load(SeqCst) {
            out.take(leaf, Granule::K4, || self.0.swap(false, SeqCst))
                .map_err(|error| Stopped {
                    at: range.start(),
                    error,
                })?;
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

/// A space may have millions of areas. An area was 192 bytes beside the nodes of the tree, in two
/// allocations: its marks had one of their own, with counts and with room for what few areas have.
#[test]
fn an_area_without_domains_is_one_allocation_with_its_marks() {
    let space = AddressSpace::tracked(Granule::K4);
    let map = |nth: u64| {
        let area = pages(2 * nth, 1);
        space.map(area, 0, Access::ReadWrite).unwrap();
    };
    // Maps that use nodes of earlier ones again allocate the area alone.
    let mut fewest = (u64::MAX, u64::MAX);
    for nth in 0..1000 {
        let mut count = 0;
        let bytes = allocated_bytes(|| count = allocations(|| map(nth)));
        fewest = fewest.min((count, bytes));
        space.unmap_discarding(IovaRange::ALL).unwrap();
        space.reclaim();
    }
    assert_eq!(fewest, (1, 112), "allocations and bytes of an area");
}

#[test]
fn marks_and_harvests_allocate_nothing() {
    let source = std::sync::Arc::new(OneLeaf::default());
    let space = AddressSpace::with_source(Granule::K4, source.clone()).unwrap();
    space.map(pages(0, 1 << 18), 0, Access::ReadWrite).unwrap();
    space.start_tracking().unwrap();
    let mut words = vec![0u64; 1 << 12];
    let area = space.area(Iova::MIN).unwrap();
    let mut round = || {
        area.mark(pages(5, 3)).unwrap();
        space.mark(pages(1 << 15, 70_000)).unwrap();
        drop(space.begin_write(pages(9, 1)).unwrap());
        // The first harvest splits a chunk of marks that is dirty as a whole.
        for (first, n) in [(1 << 15, 64), (0, 1 << 18), (0, 8), (32, 32)] {
            source.0.store(true, SeqCst);
            let request = HarvestRequest::new(pages(first, n), Granule::K4);
            let lease = space
                .harvest(&request, UserBitmap::new(&mut words))
                .unwrap();
            let lease = lease.sync().unwrap();
            assert!(lease.runs().count() > 0);
            lease.commit();
            drop(
                space
                    .harvest(&request, UserBitmap::new(&mut words))
                    .unwrap(),
            );
            space.peek(&request, UserBitmap::new(&mut words)).unwrap();
            let part = space
                .harvest(
                    &request.resume_at(pages(first, n).start()).max_bits(100),
                    UserBitmap::new(&mut words),
                )
                .unwrap();
            let _ = part.abort();
        }
    };
    // The first round allocates the chunks of marks, and the state of each thread in the epoch
    // collector.
    round();
    assert_eq!(allocations(&mut round), 0);
}

/// Parts of a lease that are committed in order are joined to one range, so their number costs no
/// memory.
#[test]
fn parts_that_are_committed_in_order_allocate_once() {
    const N: u64 = 1 << 14;
    let space = AddressSpace::new(Granule::K4);
    space.map(pages(0, N), 0, Access::ReadWrite).unwrap();
    space.start_tracking().unwrap();
    space.mark(pages(0, N)).unwrap();
    let mut words = vec![0u64; (N / 64) as usize];
    let request = HarvestRequest::new(pages(0, N), Granule::K4);
    let bitmap = UserBitmap::new(&mut words);
    let lease = space.harvest(&request, bitmap).unwrap().sync().unwrap();
    let all = allocations(|| {
        for n in 0..N {
            assert_eq!(lease.commit_range(pages(n, 1)), 1);
        }
    });
    assert!(all <= 1, "{all} allocations for {N} parts in order");
    lease.commit();
}

/// An abort allocates as the documentation of `Lease::abort` says: a chunk of 4 KiB for each 32768
/// pages and domain, some hundred bytes for each 64 chunks, and nothing if the same pages are
/// aborted again.
#[test]
fn an_abort_allocates_no_more_than_it_says() {
    const CHUNKS: u64 = 640;
    let n = CHUNKS << 15;
    for domains in [0, 1, 3] {
        let space = AddressSpace::new(Granule::K4);
        for _ in 0..domains {
            space.attach(OneLeaf::default()).unwrap();
        }
        space.map(pages(0, n), 0, Access::ReadWrite).unwrap();
        space.start_tracking().unwrap();
        let mut words = vec![0u64; (n / 64) as usize];
        let mut abort = || {
            space.mark(pages(0, n)).unwrap();
            let request = HarvestRequest::new(pages(0, n), Granule::K4);
            let bitmap = UserBitmap::new(&mut words);
            let lease = space.harvest(&request, bitmap).unwrap();
            allocated_bytes(|| {
                let _ = lease.abort();
            })
        };
        let first = abort();
        let chunks = domains * CHUNKS * 4096;
        let all = chunks + chunks / 32 + domains * (64 << 10);
        assert!(
            (chunks..=all).contains(&first),
            "{first} of {domains} domains"
        );
        assert_eq!(abort(), 0, "the second time");
    }
}
