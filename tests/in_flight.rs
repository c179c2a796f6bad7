//! Unmaps while dirty state moves from one place to another: the rest of a leaf that a harvest is
//! moving, and writes in flight.
#![cfg(not(dirtymap_loom))]
#![allow(clippy::unwrap_used)] // helpers of tests

mod common;

use common::{Fake, PAGE, pages};
use dirtymap::source::{FlushGather, Invalidated, LeafSink, Sink, Stopped};
use dirtymap::{
    Access, AddressSpace, DirtySource, Error, Granule, HarvestRequest, IovaRange, Mapping,
    Tracking, UserBitmap,
};
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Arc, Mutex};

type Happening = Box<dyn FnOnce() + Send>;

/// One leaf of the pages 0 to 3. Its hook runs right after a harvest has cleared D.
#[derive(Default)]
struct OneLeaf {
    dirty: AtomicBool,
    on_clear: Mutex<Option<Happening>>,
}

impl DirtySource for OneLeaf {
    fn map(&self, _: &Mapping) -> Result<(), Error> {
        Ok(())
    }

    fn unmap(&self, range: IovaRange, gather: &mut FlushGather, dirty: &mut dyn FnMut(IovaRange)) {
        gather.add(range, Granule::K4);
        if self.dirty.swap(false, SeqCst) {
            dirty(pages(0, 4));
        }
    }

    fn set_tracking(&self, _: Tracking) -> Result<(), Error> {
        Ok(())
    }

    fn read_and_clear(&self, range: IovaRange, out: &mut LeafSink<'_, '_>) -> Result<(), Stopped> {
        let clear = || {
            let was_dirty = self.dirty.swap(false, SeqCst);
            let happen = self.on_clear.lock().unwrap().take();
            if let Some(happen) = happen {
                happen();
            }
            was_dirty
        };
        out.take(pages(0, 4), Granule::K4, clear)
            .map_err(|error| Stopped {
                at: range.start(),
                error,
            })
    }

    fn peek(&self, _: IovaRange, _: &mut Sink<'_>) -> Result<(), Stopped> {
        Ok(())
    }

    fn invalidate(&self, _: &FlushGather) -> Result<Invalidated, Error> {
        Ok(Invalidated::default())
    }
}

/// Harvests page 1 of a leaf, and calls `unmap` at the moment when the leaf is clean and its rest
/// is in flight.
fn while_the_rest_moves(
    unmap: impl FnOnce(&AddressSpace) + Send + 'static,
) -> (Arc<AddressSpace>, u64) {
    let leaf = Arc::new(OneLeaf::default());
    let space = Arc::new(AddressSpace::new(Granule::K4));
    space.attach(leaf.clone()).unwrap();
    space.map(pages(0, 4), 0, Access::ReadWrite).unwrap();
    space.start_tracking().unwrap();
    leaf.dirty.store(true, SeqCst);
    *leaf.on_clear.lock().unwrap() = Some(Box::new({
        let space = space.clone();
        move || unmap(&space)
    }));
    let mut words = [0u64];
    let request = HarvestRequest::new(pages(1, 1), Granule::K4);
    let lease = space
        .harvest(&request, UserBitmap::new(&mut words))
        .unwrap();
    lease.sync().unwrap().commit();
    (space, words[0])
}

#[test]
fn an_unmap_returns_the_rest_of_a_leaf_that_a_harvest_is_moving() {
    let found = Arc::new(Mutex::new(0));
    let (space, harvested) = while_the_rest_moves({
        let found = found.clone();
        move |space| {
            let mut words = [0u64];
            let (unmapped, _) = space
                .unmap(pages(0, 4), Granule::K4, UserBitmap::new(&mut words))
                .unwrap();
            *found.lock().unwrap() = words[0];
            assert_eq!(unmapped.dirty_bytes, 3 * u128::from(PAGE));
        }
    });
    assert_eq!((harvested, *found.lock().unwrap()), (0b1, 0b1101));
    // The rest of the leaf arrives after its area is gone.
    assert_eq!(space.stats().put_back_outside_bytes, 3 * PAGE);
    assert_eq!(space.faults().recent.len(), 2);
}

#[test]
fn an_unmap_that_discards_counts_the_rest() {
    let (space, harvested) = while_the_rest_moves(|space| {
        let unmapped = space.unmap_discarding(pages(0, 4)).unwrap();
        assert_eq!(unmapped.discarded_bytes, 3 * u128::from(PAGE));
    });
    assert_eq!(harvested, 0b1);
    assert_eq!(space.stats().discarded_bytes, 3 * PAGE);
}

#[test]
fn an_unmap_returns_the_pages_of_a_write_in_flight() {
    let fake = Arc::new(Fake::default());
    let space = AddressSpace::new(Granule::K4);
    space.attach(fake).unwrap();
    space.map(pages(0, 8), 0, Access::ReadWrite).unwrap();
    space.map(pages(8, 8), 0, Access::ReadWrite).unwrap();
    space.start_tracking().unwrap();
    let across = space.begin_write(pages(6, 4)).unwrap();
    let mut words = [0u64];
    space
        .unmap(pages(0, 8), Granule::K4, UserBitmap::new(&mut words))
        .unwrap();
    assert_eq!(words[0], 0b1100_0000);
    // The part of the write in the other area is still in flight, and is marked when the write
    // ends.
    drop(across);
    assert_eq!(space.stats().outside_marks, 1);
    let mut words = [0u64];
    space
        .unmap(pages(8, 8), Granule::K4, UserBitmap::new(&mut words))
        .unwrap();
    assert_eq!(words[0], 0b11);
}
