//! Marks and harvests do not allocate, once the memory that they mark is known.
#![cfg(not(dirtymap_loom))]
#![allow(clippy::unwrap_used)] // helpers of tests

mod common;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use common::pages;
use dirtymap::{
    Access, AddressSpace, DirtySource, Error, FlushGather, Granule, HarvestBounds, HarvestRequest,
    Invalidated, Iova, IovaRange, LeafSink, Mapping, Sink, Stopped, UserBitmap,
};
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};

/// Counts the allocations of this thread.
struct Counting;

thread_local! {
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

// SAFETY: hands everything on to the system's allocator, as it came.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.with(|count| count.set(count.get() + 1));
        // SAFETY: by the caller.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: by the caller; every block came from `System`.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn allocations(work: impl FnOnce()) -> u64 {
    let before = ALLOCATIONS.with(Cell::get);
    work();
    ALLOCATIONS.with(Cell::get) - before
}

/// One dirty bit over 64 pages.
#[derive(Default)]
struct OneLeaf(AtomicBool);

impl DirtySource for OneLeaf {
    fn map(&self, _: &Mapping) -> Result<(), Error> {
        Ok(())
    }

    fn unmap(&self, _: IovaRange, _: &mut FlushGather, _: &mut dyn FnMut(IovaRange)) {}

    fn set_tracking(&self, _: bool) -> Result<(), Error> {
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

#[test]
fn marks_and_harvests_allocate_nothing() {
    let source = std::sync::Arc::new(OneLeaf::default());
    let space = AddressSpace::new(Granule::K4)
        .with_source(source.clone())
        .unwrap();
    space.map(pages(0, 1 << 18), 0, Access::ReadWrite).unwrap();
    space.set_tracking(true).unwrap();
    let mut words = vec![0u64; 1 << 12];
    let area = space.area(Iova::MIN).unwrap();
    let mut round = || {
        area.mark(pages(5, 3)).unwrap();
        space.mark(pages(1 << 15, 70_000)).unwrap();
        drop(space.begin_write(pages(9, 1)).unwrap());
        // The first one splits a chunk of marks that is dirty as a whole.
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
            let bounds = HarvestBounds::new().bits(100);
            let part = space
                .harvest_bounded(
                    &request,
                    pages(first, n).start(),
                    bounds,
                    UserBitmap::new(&mut words),
                )
                .unwrap();
            let _ = part.lease.abort();
        }
    };
    // The first round allocates the chunks of marks, and what the epoch keeps for each thread.
    round();
    assert_eq!(allocations(&mut round), 0);
}
