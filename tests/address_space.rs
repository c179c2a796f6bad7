//! Map, unmap, mark and tracking through the public interface, with errors in their documented
//! order.
#![cfg(not(dirtymap_loom))]
#![allow(clippy::unwrap_used)] // helpers of tests

mod common;

use common::{Fake, PAGE, pages, two_sources};
use dirtymap::{Access, AddressSpace, Error, Granule, Iova, IovaRange};
use std::sync::Arc;

fn space() -> (AddressSpace, Arc<Fake>) {
    let fake = Arc::new(Fake::default());
    (
        AddressSpace::with_source(Granule::K4, fake.clone()).unwrap(),
        fake,
    )
}

#[test]
fn map_refuses_in_order_and_changes_nothing() {
    let (space, fake) = space();
    space.map(pages(10, 10), 0, Access::ReadWrite).unwrap();
    let odd = IovaRange::from_len(Iova::new(10 * PAGE + 1), PAGE).unwrap();
    let map = |range, backing| space.map(range, backing, Access::ReadWrite).unwrap_err();
    assert!(matches!(map(odd, 1), Error::Unaligned { range, .. } if range == odd));
    assert!(matches!(
        map(pages(10, 1), 1),
        Error::UnalignedBacking { backing: 1, .. }
    ));
    let top = u64::MAX - (PAGE - 1);
    assert!(
        matches!(map(pages(10, 2), top), Error::BackingWraps { backing, .. } if backing == top)
    );
    for range in [
        pages(10, 10),
        pages(9, 2),
        pages(19, 2),
        pages(12, 1),
        pages(0, 100),
    ] {
        let error = map(range, 0);
        assert!(
            matches!(error, Error::Overlap { existing, .. } if existing == pages(10, 10)),
            "{error}"
        );
        assert_eq!(error.errno(), 17);
    }
    assert_eq!(space.mappings().len(), 1);
    assert_eq!(fake.with(|s| s.mapped.clone()), [pages(10, 10)]);
}

#[test]
fn areas_reach_both_ends_of_the_address_space() {
    let (space, _) = space();
    let top = IovaRange::from_len(Iova::new(u64::MAX - (PAGE - 1)), PAGE).unwrap();
    space.map(top, 0, Access::ReadWrite).unwrap();
    space.map(pages(0, 1), 0, Access::Read).unwrap();
    assert_eq!(space.lookup(Iova::MAX).unwrap().range, top);
    assert_eq!(space.lookup(Iova::MIN).unwrap().access, Access::Read);
    assert_eq!(space.lookup(Iova::new(PAGE)), None);
    space
        .mark(IovaRange::from_len(Iova::MAX, 1).unwrap())
        .unwrap();
    assert_eq!(space.unmap_discarding(IovaRange::ALL).unwrap().areas, 2);
    // The whole space as one area: 2^64 bytes, and no memory is allocated for them.
    space.map(IovaRange::ALL, 0, Access::ReadWrite).unwrap();
    space
        .mark(IovaRange::from_len(Iova::MAX, 1).unwrap())
        .unwrap();
    assert_eq!(
        space.unmap_discarding(IovaRange::ALL).unwrap().bytes,
        1 << 64
    );
}

#[test]
fn unmap_is_whole_areas_and_all_or_nothing() {
    let (space, fake) = space();
    space.map(pages(0, 4), 0, Access::ReadWrite).unwrap();
    space.map(pages(8, 4), 4 * PAGE, Access::ReadWrite).unwrap();
    let unmap = |range| space.unmap_discarding(range).unwrap_err();
    assert!(matches!(unmap(pages(4, 4)), Error::NothingMapped { .. }));
    assert_eq!(unmap(pages(4, 4)).errno(), 2);
    // The first area lies inside the range, the second one sticks out: both stay mapped.
    assert!(matches!(unmap(pages(0, 9)), Error::PartOfArea { area, .. } if area == pages(8, 4)));
    assert_eq!(space.mappings().len(), 2);
    fake.dirty(9);
    space.mark(pages(1, 2)).unwrap();
    let gone = space.unmap_discarding(pages(0, 100)).unwrap();
    assert_eq!((gone.areas, gone.bytes), (2, 8 * u128::from(PAGE)));
    assert_eq!(gone.discarded_bytes, 3 * u128::from(PAGE));
    assert_eq!(space.stats().discarded_bytes, 3 * PAGE);
    assert!(space.mappings().is_empty());
    assert_eq!(
        fake.with(|s| s.invalidated.clone()),
        [pages(0, 4), pages(8, 4)],
        "flushed before reuse"
    );
    space.map(pages(0, 100), 0, Access::ReadWrite).unwrap();
}

#[test]
fn an_unmap_that_cannot_flush_keeps_the_addresses_taken() {
    let (space, fake) = space();
    space.map(pages(0, 4), 0, Access::ReadWrite).unwrap();
    fake.with(|s| s.fail_invalidations = 1);
    let error = space.unmap_discarding(pages(0, 4)).unwrap_err();
    assert_eq!(
        (
            error.errno(),
            error.to_string().contains("broken on purpose")
        ),
        (5, true)
    );
    assert!(matches!(
        space.map(pages(0, 4), 0, Access::ReadWrite),
        Err(Error::Overlap { .. })
    ));
    // The debt stayed owed, so the retry pays it.
    assert_eq!(space.unmap_discarding(pages(0, 4)).unwrap().areas, 1);
    assert_eq!(fake.with(|s| s.invalidated.clone()), [pages(0, 4)]);
}

/// A map failed half-way. Linux did not report how far it had come, and unmapped the wrong end.
#[test]
fn a_map_that_one_source_refuses_is_undone_in_the_others() {
    let (space, first, second) = two_sources();
    second.with(|s| s.refuse_map = true);
    assert!(matches!(
        space.map(pages(0, 4), 0, Access::ReadWrite),
        Err(Error::Source(_))
    ));
    assert!(space.mappings().is_empty());
    assert!(first.with(|s| s.mapped.is_empty()));
    assert_eq!(first.with(|s| s.invalidated.clone()), [pages(0, 4)]);
    second.with(|s| s.refuse_map = false);
    space.map(pages(0, 4), 0, Access::ReadWrite).unwrap();
}

#[test]
fn a_refused_map_that_cannot_be_taken_back_can_be_unmapped_later() {
    let (space, first, second) = two_sources();
    second.with(|s| s.refuse_map = true);
    first.with(|s| s.fail_invalidations = 1);
    assert!(space.map(pages(0, 4), 0, Access::ReadWrite).is_err());
    let again = space.map(pages(0, 4), 0, Access::ReadWrite).unwrap_err();
    assert!(
        matches!(again, Error::Overlap { .. }),
        "no reuse before the flush"
    );
    space.unmap_discarding(pages(0, 4)).unwrap();
    assert_eq!(first.with(|s| s.invalidated.clone()), [pages(0, 4)]);
    second.with(|s| s.refuse_map = false);
    space.map(pages(0, 4), 0, Access::ReadWrite).unwrap();
}

#[test]
fn marks_outside_are_loud_and_marks_inside_count_all_the_same() {
    let (space, _) = space();
    space.map(pages(2, 2), 0, Access::ReadWrite).unwrap();
    space.map(pages(6, 2), 2 * PAGE, Access::ReadWrite).unwrap();
    let at = |range| match space.mark(range) {
        Err(Error::Outside { at }) => Some(at.get() / PAGE),
        Ok(()) => None,
        Err(other) => panic!("{other}"),
    };
    assert_eq!(at(pages(2, 2)), None);
    assert_eq!(at(pages(0, 10)), Some(0));
    assert_eq!(at(pages(2, 6)), Some(4));
    assert_eq!(at(pages(7, 2)), Some(8));
    assert_eq!(at(IovaRange::ALL), Some(0));
    assert_eq!(space.stats().outside_marks, 4);
    let handle = space.area(Iova::new(6 * PAGE)).unwrap();
    assert_eq!(handle.mapping().backing, 2 * PAGE);
    handle.mark(pages(6, 2)).unwrap();
    assert!(matches!(handle.mark(pages(5, 2)), Err(Error::Outside { at }) if at.get() == 5 * PAGE));
    assert!(matches!(handle.mark(pages(7, 2)), Err(Error::Outside { at }) if at.get() == 8 * PAGE));
    space.unmap_discarding(pages(6, 2)).unwrap();
    assert!(
        matches!(handle.mark(pages(6, 1)), Err(Error::Outside { .. })),
        "a handle outlives its area"
    );
    assert!(space.area(Iova::new(6 * PAGE)).is_none());
}

#[test]
fn tracking_twice_keeps_what_is_dirty() {
    // History: a second enable discarded all pending dirty bits (Linux, up to today).
    let (space, fake) = space();
    space.map(pages(0, 4), 0, Access::ReadWrite).unwrap();
    space.mark(pages(0, 1)).unwrap();
    fake.dirty(1);
    space.start_tracking().unwrap();
    assert!(
        fake.with(|s| s.dirty.is_empty()),
        "the first switch on makes the baseline clean"
    );
    fake.dirty(2);
    space.start_tracking().unwrap();
    assert!(fake.with(|s| s.dirty.contains(&2)));
    space.stop_tracking().unwrap();
    space.stop_tracking().unwrap();
    assert!(
        fake.with(|s| s.dirty.contains(&2)),
        "off keeps what is dirty for a last harvest"
    );
}

#[test]
fn tracking_that_one_source_refuses_is_off_in_all() {
    let (space, first, second) = two_sources();
    second.with(|s| s.refuse_tracking = true);
    assert!(space.start_tracking().is_err());
    assert!(!first.with(|s| s.tracking));
    second.with(|s| s.refuse_tracking = false);
    space.start_tracking().unwrap();
    assert!(first.with(|s| s.tracking) && second.with(|s| s.tracking));
}

#[test]
fn racing_maps_of_one_range_have_one_winner() {
    for _ in 0..50 {
        let (space, fake) = space();
        let won: usize = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..4)
                .map(|n| {
                    let space = &space;
                    scope.spawn(move || {
                        usize::from(space.map(pages(n, 4), 0, Access::ReadWrite).is_ok())
                    })
                })
                .collect();
            threads.into_iter().map(|t| t.join().unwrap()).sum()
        });
        assert_eq!(won, 1);
        assert_eq!(fake.with(|s| s.mapped.len()), 1);
    }
}
