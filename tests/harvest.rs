//! Harvest and lease through the public interface: modes, errors in their documented order, and
//! harvests that stop half-way.
#![cfg(not(dirtymap_loom))]
#![allow(clippy::unwrap_used)] // helpers of tests

mod common;

use common::{Fake, PAGE, pages};
use dirtymap::bitmap::BitmapError;
use dirtymap::{
    Access, AddressSpace, Error, Granule, HarvestRequest, Holes, Iova, IovaRange, UserBitmap,
};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

/// Pages 0..8 and 8..16 in two areas that touch, and 20..24 after a hole. Tracking is on.
fn space() -> (AddressSpace, Arc<Fake>) {
    let fake = Arc::new(Fake::default());
    let space = AddressSpace::with_source(Granule::K4, fake.clone()).unwrap();
    for (first, n) in [(0, 8), (8, 8), (20, 4)] {
        space
            .map(pages(first, n), first * PAGE, Access::ReadWrite)
            .unwrap();
    }
    space.start_tracking().unwrap();
    (space, fake)
}

fn request(range: IovaRange) -> HarvestRequest<'static> {
    HarvestRequest::new(range, Granule::K4)
}

/// Harvests, syncs and commits. Returns the bits.
fn take(space: &AddressSpace, range: IovaRange) -> u64 {
    let mut words = [0u64];
    let lease = space
        .harvest(&request(range), UserBitmap::new(&mut words))
        .unwrap();
    lease.sync().unwrap().commit();
    words[0]
}

/// The dirty pages, by a peek.
fn dirty(space: &AddressSpace, range: IovaRange) -> u64 {
    let mut words = [0u64];
    space
        .peek(&request(range), UserBitmap::new(&mut words))
        .unwrap();
    words[0]
}

#[test]
fn devices_and_marks_come_out_of_one_harvest() {
    let (space, fake) = space();
    fake.dirty(3);
    fake.dirty(8);
    space.mark(pages(9, 2)).unwrap();
    space.mark(pages(3, 1)).unwrap();
    assert_eq!(dirty(&space, pages(0, 16)), 0b111_0000_1000);
    let mut words = [1 << 63 | 1 << 15];
    let lease = space
        .harvest(&request(pages(0, 16)), UserBitmap::new(&mut words))
        .unwrap();
    let report = lease.report();
    assert_eq!(
        (report.areas, report.bits_set, report.leaves, report.windows),
        (2, 4, 2, 1)
    );
    let lease = lease.sync().unwrap();
    let runs: Vec<_> = lease.runs().collect();
    assert_eq!(
        runs,
        [pages(3, 1), pages(8, 3), pages(15, 1)],
        "with what was set before"
    );
    assert_eq!((lease.dirty(), lease.granule()), (5, Granule::K4));
    lease.commit();
    assert_eq!(words, [0b111_0000_1000 | 1 << 63 | 1 << 15]);
    assert_eq!(take(&space, pages(0, 16)), 0, "read and cleared");
    let stats = space.stats();
    assert_eq!(
        (
            stats.leased_bytes,
            stats.committed_bytes,
            stats.aborted_bytes
        ),
        (4 * PAGE, 4 * PAGE, 0)
    );
    assert_eq!(
        fake.with(|s| s.invalidated.clone()),
        [pages(3, 1), pages(8, 1)],
        "marks need no invalidation"
    );
}

#[test]
fn requests_are_refused_in_order_and_nothing_is_touched() {
    let fake = Arc::new(Fake::default());
    let space = AddressSpace::with_source(Granule::K4, fake.clone()).unwrap();
    space.map(pages(0, 64), 0, Access::ReadWrite).unwrap();
    fake.dirty(1);
    let refuse = |request: &HarvestRequest<'_>, words: &mut [u64]| match space
        .harvest(request, UserBitmap::new(words))
    {
        Err(error) => error,
        other => panic!("{other:?}"),
    };
    let odd = IovaRange::from_len(Iova::new(2048), 2048).unwrap();
    let fine = Granule::from_bytes(2048).unwrap();
    let two = Granule::from_bytes(8192).unwrap();
    let error = refuse(&HarvestRequest::new(odd, fine), &mut []);
    assert!(
        matches!(
            error,
            Error::Unaligned {
                granule: Granule::K4,
                ..
            }
        ),
        "to the smallest page first"
    );
    let error = refuse(&HarvestRequest::new(pages(1, 2), two), &mut []);
    assert!(
        matches!(error, Error::Unaligned { granule, .. } if granule == two),
        "then to the granule"
    );
    let error = refuse(&request(pages(0, 65)), &mut [0]);
    assert!(
        matches!(
            error,
            Error::Bitmap(BitmapError::TooShort {
                bits: 64,
                needed: 65,
                ..
            })
        ),
        "short by one bit"
    );
    let error = refuse(&request(pages(0, 64)), &mut [0]);
    assert!(matches!(error, Error::NeverTracked { .. }));
    space.start_tracking().unwrap();
    fake.dirty(1);
    let error = refuse(&request(pages(0, 65)).holes(Holes::Refuse), &mut [0, 0]);
    assert!(matches!(error, Error::Hole { at, .. } if at.get() == 64 * PAGE));
    assert_eq!(
        take(&space, pages(0, 64)),
        0b10,
        "no refusal has cleared anything"
    );
}

#[test]
fn a_hole_stops_the_harvest_and_the_lease_has_what_came_before() {
    // History: holes and driver errors surfaced as success with a partial bitmap (Linux, up to
    // today).
    let (space, fake) = space();
    fake.dirty(15);
    fake.dirty(20);
    let mut words = [0u64];
    let to_the_hole = |range| request(range).holes(Holes::Stop);
    let lease = space
        .harvest(&to_the_hole(pages(0, 24)), UserBitmap::new(&mut words))
        .unwrap();
    let stopped = lease.stopped().unwrap();
    assert!(matches!(stopped.error, Error::Hole { .. }));
    assert_eq!(stopped.at, Iova::new(16 * PAGE));
    lease.partial().sync().unwrap().commit();
    assert_eq!(words, [1 << 15]);
    assert_eq!(
        take(&space, pages(20, 4)),
        1,
        "behind the hole nothing was touched"
    );
    let mut words = [0u64];
    let at_start = space
        .harvest(&to_the_hole(pages(16, 4)), UserBitmap::new(&mut words))
        .unwrap();
    assert_eq!(at_start.stopped().unwrap().at, Iova::new(16 * PAGE));
    assert!(matches!(at_start.sync(), Err(Error::Hole { .. })));
}

#[test]
fn abort_and_drop_put_everything_back() {
    let (space, fake) = space();
    for way in 0..3 {
        fake.dirty(2);
        space.mark(pages(9, 1)).unwrap();
        let mut words = [0u64];
        let lease = space
            .harvest(&request(pages(0, 16)), UserBitmap::new(&mut words))
            .unwrap();
        assert_eq!(dirty(&space, pages(0, 16)), 0, "all of it is in the lease");
        match way {
            0 => assert_eq!(lease.abort().bytes, 2 * PAGE),
            1 => drop(lease),
            _ => drop(lease.sync().unwrap()),
        }
        assert_eq!(take(&space, pages(0, 16)), 1 << 2 | 1 << 9);
    }
    let stats = space.stats();
    assert_eq!(
        stats.leased_bytes,
        stats.committed_bytes + stats.aborted_bytes
    );
    assert_eq!(stats.flush.owed, stats.flush.retired);
}

#[test]
fn the_next_sync_pays_what_an_aborted_lease_owed() {
    // Without that flush, the device would go on to write page 2 through a stale translation, and
    // leave no trace.
    let (space, fake) = space();
    fake.dirty(2);
    let mut words = [0u64];
    let lease = space
        .harvest(&request(pages(0, 16)), UserBitmap::new(&mut words))
        .unwrap();
    lease.abort();
    assert!(
        fake.with(|s| s.invalidated.is_empty()),
        "an abort does not wait for devices"
    );
    assert_eq!(take(&space, pages(0, 16)), 1 << 2);
    assert_eq!(fake.with(|s| s.invalidated.clone()), [pages(2, 1)]);
}

#[test]
fn what_was_unmapped_meanwhile_is_counted_and_not_put_back() {
    let (space, fake) = space();
    fake.dirty(7);
    fake.dirty(8);
    let mut words = [0u64];
    let lease = space
        .harvest(&request(pages(0, 16)), UserBitmap::new(&mut words))
        .unwrap();
    space.unmap_discarding(pages(8, 8)).unwrap();
    let aborted = lease.abort();
    assert_eq!((aborted.bytes, aborted.outside_bytes), (PAGE, PAGE));
    assert_eq!(space.stats().put_back_outside_bytes, PAGE);
    assert_eq!(take(&space, pages(0, 8)), 1 << 7);
}

#[test]
fn a_failed_flush_leaves_the_lease_whole_and_a_failed_sync_puts_it_back() {
    let (space, fake) = space();
    fake.dirty(4);
    fake.with(|s| s.fail_invalidations = 1);
    let mut words = [0u64];
    let mut lease = space
        .harvest(&request(pages(0, 8)), UserBitmap::new(&mut words))
        .unwrap();
    let failed = lease.flush().unwrap_err();
    assert!(failed.to_string().contains("broken on purpose"));
    let flush = space.stats().flush;
    assert_eq!(
        (flush.owed, flush.pending, flush.retired, flush.failed),
        (1, 1, 0, 1)
    );
    let lease = lease.sync().unwrap();
    assert_eq!(lease.runs().collect::<Vec<_>>(), [pages(4, 1)]);
    lease.commit();
    let flush = space.stats().flush;
    assert_eq!(
        (flush.owed, flush.pending, flush.retired, flush.flushes),
        (1, 0, 1, 1),
        "not owed twice"
    );
    // Without an earlier flush, the failed sync consumes the lease.
    fake.dirty(5);
    fake.with(|s| s.fail_invalidations = 1);
    let mut words = [0u64];
    let lease = space
        .harvest(&request(pages(0, 8)), UserBitmap::new(&mut words))
        .unwrap();
    let failed = lease.sync().unwrap_err();
    assert!(failed.to_string().contains("broken on purpose"));
    assert_eq!(space.stats().aborts, 1);
    assert_eq!(take(&space, pages(0, 8)), 1 << 5);
}

#[test]
fn a_source_that_stops_or_panics_at_any_page_loses_nothing() {
    for panics in [false, true] {
        for n in 0..16 {
            let (space, fake) = space();
            (0..16).for_each(|page| fake.dirty(page));
            fake.with(|s| {
                if panics {
                    s.panic_at = Some(n)
                } else {
                    s.stop_at = Some(n)
                }
            });
            let mut words = [0u64];
            let outcome = catch_unwind(AssertUnwindSafe(|| {
                let lease = space
                    .harvest(&request(pages(0, 16)), UserBitmap::new(&mut words))
                    .unwrap();
                assert_eq!(lease.stopped().unwrap().at, Iova::new(n * PAGE));
                assert_eq!(lease.report().bits_set, n);
                // The lease is dropped here, which puts everything back.
            }));
            assert_eq!(outcome.is_err(), panics);
            fake.with(|s| (s.panic_at, s.stop_at) = (None, None));
            assert_eq!(take(&space, pages(0, 16)), 0xffff, "page {n}");
        }
    }
}

#[test]
fn a_consumer_that_panics_aborts() {
    let (space, fake) = space();
    fake.dirty(5);
    let panicked = catch_unwind(AssertUnwindSafe(|| {
        let mut words = [0u64];
        let lease = space
            .harvest(&request(pages(0, 8)), UserBitmap::new(&mut words))
            .unwrap()
            .sync()
            .unwrap();
        assert_eq!(lease.dirty(), 0, "the copy fails");
    }));
    assert!(panicked.is_err());
    assert_eq!(take(&space, pages(0, 8)), 1 << 5);
}

#[test]
fn granules_coarser_and_finer_than_the_page() {
    let (space, fake) = space();
    fake.dirty(5);
    space.mark(pages(8, 1)).unwrap();
    let mut words = [0u64];
    let coarse = HarvestRequest::new(pages(0, 16), Granule::from_bytes(4 * PAGE).unwrap());
    let lease = space.harvest(&coarse, UserBitmap::new(&mut words)).unwrap();
    lease.abort(); // puts back whole granules: a superset
    assert_eq!(words, [0b0110]);
    let mut words = [0u64];
    let fine = HarvestRequest::new(pages(0, 16), Granule::from_bytes(PAGE / 2).unwrap());
    let lease = space.harvest(&fine, UserBitmap::new(&mut words)).unwrap();
    lease.sync().unwrap().commit();
    assert_eq!(words, [0x00ff_ff00]);
}

#[test]
fn shared_bitmaps_are_or_ed_into_by_several_harvests() {
    use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
    let (space, fake) = space();
    fake.dirty(1);
    fake.dirty(12);
    let words = [AtomicU64::new(0)];
    let whole = request(pages(0, 16));
    let first = space.harvest(&whole, UserBitmap::shared(&words)).unwrap();
    fake.dirty(2);
    let second = space.harvest(&whole, UserBitmap::shared(&words)).unwrap();
    assert_eq!((first.report().bits_set, second.report().bits_set), (2, 1));
    second.sync().unwrap().commit();
    first.sync().unwrap().commit();
    assert_eq!(words[0].load(Relaxed), 1 << 1 | 1 << 2 | 1 << 12);
}

#[test]
fn errors_turn_into_the_library_error_and_put_back() {
    fn migrate(space: &AddressSpace, holes: Holes) -> Result<(), Box<dyn std::error::Error>> {
        let mut words = [0u64];
        let request = request(pages(0, 24)).holes(holes);
        space
            .harvest(&request, UserBitmap::new(&mut words))?
            .sync()?
            .commit();
        Ok(())
    }
    let (space, fake) = space();
    fake.dirty(3);
    for holes in [Holes::Stop, Holes::Refuse] {
        let error = migrate(&space, holes).unwrap_err();
        assert!(matches!(error.downcast_ref(), Some(Error::Hole { .. })));
    }
    assert_eq!(take(&space, pages(0, 16)), 1 << 3);
}
