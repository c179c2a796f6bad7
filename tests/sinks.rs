//! A source that records by masks sets no bits outside of the request.
#![cfg(not(any(dirtymap_loom, dirtymap_shuttle)))]
#![allow(clippy::unwrap_used)] // helpers of tests

mod common;

use common::{PAGE, pages};
use dirtymap::source::{FlushGather, Invalidated, LeafSink, Sink, Stopped};
use dirtymap::{
    Access, AddressSpace, DirtySource, Error, Granule, HarvestRequest, Holes, Iova, IovaRange,
    Mapping, Tracking, UserBitmap,
};

/// A source that always reports the same 64 pages as dirty.
struct Word(u64);

impl DirtySource for Word {
    fn map(&self, _: &Mapping) -> Result<(), Error> {
        Ok(())
    }

    fn unmap(&self, _: IovaRange, _: &mut FlushGather, _: &mut dyn FnMut(IovaRange)) {}

    fn set_tracking(&self, _: Tracking) -> Result<(), Error> {
        Ok(())
    }

    fn read_and_clear(&self, _: IovaRange, out: &mut LeafSink<'_, '_>) -> Result<(), Stopped> {
        out.take_many(Iova::new(self.0 * PAGE), Granule::K4, u64::MAX, |some| some)
    }

    fn peek(&self, range: IovaRange, sink: &mut Sink<'_>) -> Result<(), Stopped> {
        let recorded = sink.record_mask(Iova::new(self.0 * PAGE), Granule::K4, u64::MAX);
        recorded.map_err(|error| Stopped {
            at: range.start(),
            error,
        })
    }

    fn invalidate(&self, _: &FlushGather) -> Result<Invalidated, Error> {
        Ok(Invalidated::default())
    }
}

/// The word reaches past the area, below or above: bits of no other page are set.
#[test]
fn a_mask_of_64_pages_sets_the_bits_of_an_area_of_four() {
    for (word, area) in [(64, 64), (64, 100), (64, 124), (60, 64), (3, 64)] {
        let space = AddressSpace::with_source(Granule::K4, Word(word)).unwrap();
        space.map(pages(area, 4), 0, Access::ReadWrite).unwrap();
        space.start_tracking().unwrap();
        // The bits above the request belong to another user of the bitmap.
        let request = HarvestRequest::new(pages(area, 4), Granule::K4);
        let expected = (0..4).fold(0u64, |bits, n| {
            let dirty = (word..word + 64).contains(&(area + n));
            bits | u64::from(dirty) << n
        });
        let mut words = [0u64; 2];
        space.peek(&request, UserBitmap::new(&mut words)).unwrap();
        assert_eq!(words, [expected, 0], "peek of {area} by {word}");
        let mut words = [0u64; 2];
        let lease = space
            .harvest(&request, UserBitmap::new(&mut words))
            .unwrap();
        lease.sync().unwrap().commit();
        assert_eq!(words, [expected, 0], "harvest of {area} by {word}");
    }
}

/// The same for an area that ends inside the request: its source sets no bits of the neighbouring
/// area.
#[test]
fn a_mask_that_reaches_into_the_next_area_leaves_its_bits_alone() {
    let space = AddressSpace::with_source(Granule::K4, Word(0)).unwrap();
    space.map(pages(0, 4), 0, Access::ReadWrite).unwrap();
    space.map(pages(8, 120), 0, Access::ReadWrite).unwrap();
    space.start_tracking().unwrap();
    let mut words = [0u64; 2];
    let all = HarvestRequest::new(pages(0, 128), Granule::K4);
    // The walk stops at the hole, and reports nothing above it.
    let request = all.holes(Holes::Stop);
    let peeked = space.peek(&request, UserBitmap::new(&mut words));
    assert!(matches!(peeked, Err(Error::Hole { .. })));
    assert_eq!(words, [0b1111, 0]);
    // A walk that skips the hole sets the bits of both areas, and none of the hole.
    let mut words = [0u64; 2];
    space.peek(&all, UserBitmap::new(&mut words)).unwrap();
    assert_eq!(words, [!0b1111_0000, 0]);
}
