//! Mutants of the logic that every other test of the core let pass: see "Mutants" in
//! docs/assurance.md. Each test is about one place of the code.
#![cfg(not(dirtymap_loom))]
#![allow(clippy::unwrap_used)] // helpers of tests

mod common;

use common::{Fake, PAGE, pages, two_sources};
use dirtymap::source::{FlushGather, LeafSink, Sink, Stopped};
use dirtymap::{
    Access, AddressSpace, DirtySource, Error, Granule, HarvestRequest, Iova, IovaRange, Start,
    Tracking, UserBitmap,
};
use std::sync::{Arc, Mutex};

const RW: Access = Access::ReadWrite;

/// Tracked pages `0..n` over two sources.
fn tracked(n: u64) -> (AddressSpace, Arc<Fake>, Arc<Fake>) {
    let (space, first, second) = two_sources();
    space.map(pages(0, n), 0, RW).unwrap();
    space.start_tracking().unwrap();
    (space, first, second)
}

fn request(n: u64) -> HarvestRequest<'static> {
    HarvestRequest::new(pages(0, n), Granule::K4)
}

/// In a parallel harvest that stops at holes, a source stops below the hole. The hole counted,
/// because it was known first, and the lease claimed pages that no thread had looked at.
#[cfg(feature = "rayon")]
#[test]
fn a_stop_of_a_source_below_a_hole_is_the_stop_of_all_threads() {
    let (space, first, _) = tracked(64);
    first.with(|s| s.stop_at = Some(10));
    first.dirty(5);
    first.dirty(20);
    let mut words = [0u64; 2];
    let request = request(128).holes(dirtymap::Holes::Stop).parallel();
    let lease = space
        .harvest(&request, UserBitmap::new(&mut words))
        .unwrap();
    assert_eq!(lease.next(), Some(Iova::new(10 * PAGE)));
    assert_eq!(lease.report().bits_set, 1);
}

/// The fault of a write that may not begin names its length.
#[test]
fn a_write_that_begins_outside_is_a_fault_of_its_length() {
    let (space, ..) = tracked(16);
    assert!(space.begin_write(pages(14, 5)).is_err());
    let fault = space.faults().recent[0];
    assert_eq!((fault.at, fault.len), (Iova::new(16 * PAGE), 3 * PAGE));
}

/// An area counts once in a report, also where a piece of the walk ends at the first byte of it.
#[test]
fn an_area_whose_first_byte_is_a_piece_counts_once() {
    let space = AddressSpace::tracked(Granule::BYTE);
    space.map(0..8, 0, RW).unwrap();
    space.mark(0..8).unwrap();
    let all = IovaRange::from_len(Iova::MIN, 8).unwrap();
    let mut mask = [0b101u64];
    let mask = UserBitmap::new(&mut mask).view(all, Granule::BYTE).unwrap();
    let mut words = [0u64];
    let request = HarvestRequest::new(all, Granule::BYTE).masked(mask);
    let lease = space
        .harvest(&request, UserBitmap::new(&mut words))
        .unwrap();
    assert_eq!((lease.report().areas, lease.report().bits_set), (1, 2));
}

/// A consumer without leases has none.
#[test]
fn a_consumer_counts_its_leases() {
    let (space, ..) = tracked(16);
    let one = space.consumer("one", Start::Clean).unwrap();
    assert_eq!(one.stats().leases, 0);
    let lease = one.rounds().harvest().unwrap();
    assert_eq!(one.stats().leases, 1);
    lease.abort();
    assert_eq!(one.stats().leases, 0);
}

/// A source that tracks already is not switched on again: one that clears its log then would lose
/// what is dirty.
#[test]
fn a_switch_that_is_on_is_not_switched_on_again() {
    let (space, first, _) = tracked(16);
    first.with(|s| s.on_tracking = Some(Box::new(|| ())));
    space.start_tracking().unwrap();
    assert!(first.with(|s| s.on_tracking.is_some()));
}

/// A lease is aborted over two areas that touch, of which the upper one was mapped anew meanwhile.
/// What was lost with that is counted.
#[test]
fn an_abort_over_two_areas_counts_what_the_upper_one_lost() {
    let (space, ..) = tracked(8);
    space.map(pages(8, 8), 0, RW).unwrap();
    space.mark(pages(7, 2)).unwrap();
    let mut words = [0u64];
    let lease = space.harvest(&request(16), UserBitmap::new(&mut words));
    let lease = lease.unwrap();
    space.unmap_discarding(pages(8, 8)).unwrap();
    space.map(pages(8, 8), 0, RW).unwrap();
    let aborted = lease.abort();
    assert_eq!((aborted.bytes, aborted.outside_bytes), (PAGE, PAGE));
}

/// A walk passes a hole and stops at the first page of the next area. Bits that others have set for
/// the hole stand for nothing that it took, so its abort counts no page that was lost.
#[test]
fn bits_of_others_in_a_hole_below_a_stop_are_not_put_back() {
    let (space, first, _) = tracked(8);
    space.map(pages(16, 8), 0, RW).unwrap();
    space.mark(pages(3, 1)).unwrap();
    first.with(|s| s.stop_at = Some(16));
    let mut words = [1u64 << 10];
    let lease = space.harvest(&request(24), UserBitmap::new(&mut words));
    let lease = lease.unwrap();
    assert_eq!(lease.next(), Some(Iova::new(16 * PAGE)));
    let aborted = lease.abort();
    assert_eq!((aborted.bytes, aborted.outside_bytes), (PAGE, 0));
}

/// A domain that was detached has no area any more: the unmap of an area does not ask its source.
#[test]
fn a_detached_source_is_asked_nothing() {
    let (space, first, _) = tracked(16);
    let id = space.domains()[0];
    space.detach(id).unwrap();
    first.with(|s| s.on_unmap = Some(Box::new(|| ())));
    space.unmap_discarding(pages(0, 16)).unwrap();
    assert!(first.with(|s| s.on_unmap.is_some()));
}

/// A snapshot counts its areas.
#[test]
fn a_snapshot_counts_its_areas() {
    let (space, ..) = tracked(8);
    space.map(pages(16, 8), 0, RW).unwrap();
    let snapshot = space.snapshot();
    assert_eq!(snapshot.len(), snapshot.mappings(IovaRange::ALL).count());
    assert_eq!(snapshot.len(), 2);
}

/// A source that does not say what was dirty, by the default of its trait, may have seen a write to
/// any page: all of an area that is unmapped is dirty.
#[test]
fn by_default_all_that_a_source_unmaps_is_dirty() {
    struct Silent;

    impl DirtySource for Silent {
        fn set_tracking(&self, _: Tracking) -> Result<(), Error> {
            Ok(())
        }

        fn read_and_clear(&self, _: IovaRange, _: &mut LeafSink<'_, '_>) -> Result<(), Stopped> {
            Ok(())
        }

        fn peek(&self, _: IovaRange, _: &mut Sink<'_>) -> Result<(), Stopped> {
            Ok(())
        }
    }

    let space = AddressSpace::with_source(Granule::K4, Silent).unwrap();
    space.map(pages(0, 8), 0, RW).unwrap();
    let unmapped = space.unmap_discarding(pages(0, 8)).unwrap();
    assert_eq!(unmapped.discarded_bytes, u128::from(8 * PAGE));
}

/// Harvests for several consumers work in pieces of 2^24 pages, and ask sources for whole pages.
#[test]
fn a_source_is_asked_for_whole_pages_in_each_piece() {
    #[derive(Default)]
    struct Asked(Mutex<Vec<IovaRange>>);

    impl DirtySource for Asked {
        fn set_tracking(&self, _: Tracking) -> Result<(), Error> {
            Ok(())
        }

        fn unmap(&self, _: IovaRange, _: &mut FlushGather, _: &mut dyn FnMut(IovaRange)) {}

        fn read_and_clear(
            &self,
            range: IovaRange,
            _: &mut LeafSink<'_, '_>,
        ) -> Result<(), Stopped> {
            self.0.lock().unwrap().push(range);
            Ok(())
        }

        fn peek(&self, _: IovaRange, _: &mut Sink<'_>) -> Result<(), Stopped> {
            Ok(())
        }
    }

    let asked = Arc::new(Asked::default());
    let space = AddressSpace::with_source(Granule::K4, asked.clone()).unwrap();
    let all = pages(0, (2 << 24) + 512);
    space.map(all, 0, RW).unwrap();
    space.start_tracking().unwrap();
    let _other = space.consumer("other", Start::Clean).unwrap();
    let request = HarvestRequest::new(all, Granule::M2);
    let mut words = vec![0u64; 1 << 11];
    let lease = space.harvest(&request, UserBitmap::new(&mut words));
    lease.unwrap().sync().unwrap().commit();
    let pieces = [(0, 1 << 24), (1 << 24, 1 << 24), (2 << 24, 512)];
    assert_eq!(
        *asked.0.lock().unwrap(),
        pieces.map(|(first, n)| pages(first, n))
    );
}
