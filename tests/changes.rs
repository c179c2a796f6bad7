//! Cuts, batches, and unmaps that return what was dirty.
#![cfg(not(dirtymap_loom))]
#![allow(clippy::unwrap_used)] // helpers of tests

mod common;

use common::{Fake, PAGE, pages, two_sources};
use dirtymap::bitmap::BitmapError;
use dirtymap::space::{Fault, FaultSource, Faults};
use dirtymap::{
    Access, AddressSpace, BitmapView, Change, Error, Granule, HarvestRequest, Iova, IovaRange,
    SparseBitmap, UserBitmap,
};
use std::sync::{Arc, Mutex};

const RW: Access = Access::ReadWrite;

fn tracked() -> (AddressSpace, Arc<Fake>, Arc<Fake>) {
    let (space, first, second) = two_sources();
    space.map(pages(0, 16), 16 * PAGE, RW).unwrap();
    space.start_tracking().unwrap();
    (space, first, second)
}

fn at(page: u64) -> Iova {
    Iova::new(page * PAGE)
}

fn take(space: &AddressSpace, range: IovaRange) -> u64 {
    let mut words = [0u64];
    let request = HarvestRequest::new(range, Granule::K4);
    let lease = space.harvest(&request, UserBitmap::new(&mut words));
    lease.unwrap().sync().unwrap().commit();
    words[0]
}

fn mapped(space: &AddressSpace) -> Vec<IovaRange> {
    space.mappings().iter().map(|m| m.range).collect()
}

fn runs(view: BitmapView<'_>) -> Vec<IovaRange> {
    view.runs().collect()
}

#[test]
fn an_unmap_returns_what_was_dirty_anywhere() {
    let (space, first, second) = tracked();
    space.map(pages(20, 4), 0, RW).unwrap();
    first.dirty(1);
    second.dirty(2);
    space.mark(pages(3, 1)).unwrap();
    // In the put-back stores of the domains, by an abort.
    first.dirty(5);
    let mut words = [0u64];
    let request = HarvestRequest::new(pages(0, 16), Granule::K4);
    let lease = space
        .harvest(&request, UserBitmap::new(&mut words))
        .unwrap();
    lease.abort();
    first.dirty(22);
    let flushes = space.stats().flush.flushes;
    let sparse = SparseBitmap::new(1 << 52);
    let (unmapped, view) = space
        .unmap(IovaRange::ALL, Granule::K4, UserBitmap::sparse(&sparse))
        .unwrap();
    assert_eq!(runs(view), [pages(1, 3), pages(5, 1), pages(22, 1)]);
    assert_eq!((unmapped.areas, unmapped.bytes), (2, 20 * u128::from(PAGE)));
    assert_eq!(unmapped.dirty_bytes, 5 * u128::from(PAGE));
    assert_eq!(unmapped.discarded_bytes, 0);
    let stats = space.stats();
    assert_eq!(stats.unmapped_dirty_bytes, 5 * PAGE);
    assert_eq!(stats.flush.flushes, flushes + 1, "one flush for the batch");
    assert!(first.with(|s| s.mapped.is_empty()) && second.with(|s| s.mapped.is_empty()));
}

/// Every other page of an area of three is dirty: as many runs as an area can have. An unmap
/// reports these and no more.
#[test]
fn an_unmap_of_as_many_runs_as_can_be_reports_no_other_page() {
    let (space, first, _) = two_sources();
    space.map(pages(0, 3), 0, RW).unwrap();
    space.start_tracking().unwrap();
    [0, 2].iter().for_each(|page| first.dirty(*page));
    let mut words = [0u64];
    let bitmap = UserBitmap::new(&mut words);
    let (unmapped, _) = space.unmap(pages(0, 3), Granule::K4, bitmap).unwrap();
    assert_eq!(unmapped.dirty_bytes, 2 * u128::from(PAGE));
    assert_eq!(words, [0b101]);
}

/// QEMU unmapped memory although its request for the dirty pages had failed, and ignored the error:
/// the migration went on without these pages.
#[test]
fn an_unmap_with_a_bad_bitmap_touches_nothing() {
    let (space, first, _) = tracked();
    first.dirty(1);
    let mut words = [0u64];
    let unmap = |range, granule, words: &mut [u64]| {
        space
            .unmap(range, granule, UserBitmap::new(words))
            .unwrap_err()
    };
    let byte = Granule::BYTE;
    assert!(matches!(
        unmap(pages(1, 1), Granule::M2, &mut words),
        Error::Unaligned { .. }
    ));
    assert!(matches!(
        unmap(pages(0, 16), byte, &mut words),
        Error::Bitmap(BitmapError::TooShort { .. })
    ));
    assert!(matches!(
        unmap(pages(0, 8), Granule::K4, &mut words),
        Error::PartOfArea { .. }
    ));
    assert!(matches!(
        unmap(pages(30, 8), Granule::K4, &mut words),
        Error::NothingMapped { .. }
    ));
    first.with(|s| s.fail_invalidations = 1);
    assert_eq!(unmap(pages(0, 16), Granule::K4, &mut words).errno(), 5);
    assert_eq!(words, [0]);
    assert_eq!(mapped(&space), [pages(0, 16)]);
    assert_eq!(take(&space, pages(0, 16)), 1 << 1);
}

#[test]
fn a_lease_over_an_area_that_was_unmapped_counts_as_outside() {
    let (space, first, _) = tracked();
    first.dirty(3);
    let mut words = [0u64];
    let request = HarvestRequest::new(pages(0, 16), Granule::K4);
    let lease = space
        .harvest(&request, UserBitmap::new(&mut words))
        .unwrap();
    let mut rest = [0u64];
    let (unmapped, _) = space
        .unmap(pages(0, 16), Granule::K4, UserBitmap::new(&mut rest))
        .unwrap();
    assert_eq!((rest, unmapped.dirty_bytes), ([0], 0), "it is in the lease");
    let aborted = lease.abort();
    assert_eq!((aborted.bytes, aborted.outside_bytes), (0, PAGE));
}

#[test]
fn a_cut_loses_nothing_and_splits_leaves() {
    let (space, first, second) = tracked();
    first.dirty(3);
    second.dirty(12);
    space.mark(pages(7, 2)).unwrap();
    let handle = space.area(at(0)).unwrap();
    assert!(space.cut(at(8)).unwrap());
    for source in [&first, &second] {
        assert_eq!(source.with(|s| s.split.clone()), [at(8)]);
        assert_eq!(source.with(|s| s.invalidated.clone()), [pages(0, 16)]);
    }
    assert_eq!(mapped(&space), [pages(0, 8), pages(8, 8)]);
    assert_eq!(space.lookup(at(8)).unwrap().backing, 24 * PAGE);
    handle.mark(pages(9, 1)).unwrap();
    assert_eq!(take(&space, pages(0, 8)), 1 << 3 | 1 << 7);
    assert_eq!(take(&space, pages(8, 8)), 1 << 0 | 1 << 1 | 1 << 4);
    space.mark(pages(7, 2)).unwrap();
    let gone = space.unmap_discarding(pages(8, 8)).unwrap();
    assert_eq!((gone.areas, gone.discarded_bytes), (1, u128::from(PAGE)));
    assert!(matches!(handle.mark(pages(7, 2)), Err(Error::Outside { at: a }) if a == at(8)));
    handle.mark(pages(6, 1)).unwrap();
    assert_eq!(take(&space, pages(0, 8)), 1 << 6 | 1 << 7);
    assert_eq!(first.with(|s| s.mapped.clone()), [pages(0, 8)]);
    // A piece is cut like an area. A domain that is attached later is filled with the pieces.
    assert!(space.cut(at(2)).unwrap());
    let late = Arc::new(Fake::default());
    space.attach(late.clone()).unwrap();
    assert_eq!(late.with(|s| s.mapped.clone()), [pages(0, 2), pages(2, 6)]);
    handle.mark(pages(1, 2)).unwrap();
    assert_eq!(take(&space, pages(0, 8)), 0b110);
}

#[test]
fn a_lease_is_put_back_after_a_cut() {
    let (space, first, _) = tracked();
    first.dirty(3);
    first.dirty(12);
    let mut words = [0u64];
    let request = HarvestRequest::new(pages(0, 16), Granule::K4);
    let lease = space
        .harvest(&request, UserBitmap::new(&mut words))
        .unwrap();
    space.cut(at(8)).unwrap();
    assert_eq!(lease.abort().bytes, 2 * PAGE);
    assert_eq!(take(&space, pages(8, 8)), 1 << 4);
    assert_eq!(take(&space, pages(0, 16)), 1 << 3);
}

#[test]
fn cuts_refuse_in_order_and_change_nothing() {
    let (space, first, second) = tracked();
    space.map(pages(16, 4), 0, RW).unwrap();
    let error = space.cut(Iova::new(5)).unwrap_err();
    assert!(matches!(error, Error::UnalignedCut { granule: Granule::K4, at } if at.get() == 5));
    assert_eq!(error.errno(), 22);
    // Nothing to cut: where an area begins, between areas, in a hole, at both ends.
    for nothing in [at(0), at(16), at(20), at(100), Iova::new(u64::MAX - 4095)] {
        assert!(!space.cut(nothing).unwrap(), "{nothing}");
    }
    second.with(|s| s.refuse_split = true);
    assert_eq!(space.cut(at(8)).unwrap_err().errno(), 5);
    assert_eq!(mapped(&space), [pages(0, 16), pages(16, 4)]);
    second.with(|s| s.refuse_split = false);
    first.with(|s| s.fail_invalidations = 1);
    assert_eq!(space.cut(at(9)).unwrap_err().errno(), 5);
    assert_eq!(mapped(&space), [pages(0, 16), pages(16, 4)]);
    assert!(space.cut(at(8)).unwrap());
    space.unmap_discarding(IovaRange::ALL).unwrap();
    assert!(first.with(|s| s.mapped.is_empty()));
}

#[test]
fn a_batch_cuts_out_the_middle_in_one_step() {
    let (space, first, _) = tracked();
    first.dirty(3);
    first.dirty(9);
    let handle = space.area(at(0)).unwrap();
    let unmapped = space
        .apply(&[
            Change::Cut { at: at(12) },
            Change::Cut { at: at(8) },
            Change::Unmap { range: pages(8, 4) },
            Change::Map {
                range: pages(32, 1),
                backing: 0,
                access: RW,
            },
        ])
        .unwrap();
    assert_eq!(
        (unmapped.areas, unmapped.discarded_bytes),
        (1, u128::from(PAGE))
    );
    assert_eq!(mapped(&space), [pages(0, 8), pages(12, 4), pages(32, 1)]);
    let mut in_source = first.with(|s| s.mapped.clone());
    in_source.sort_by_key(|range| range.start());
    assert_eq!(in_source, mapped(&space));
    assert!(handle.mark(pages(9, 1)).is_err());
    handle.mark(pages(7, 1)).unwrap();
    handle.mark(pages(12, 1)).unwrap();
    assert_eq!(take(&space, pages(0, 8)), 1 << 3 | 1 << 7);
    assert_eq!(take(&space, pages(12, 4)), 1);
    assert_eq!(space.apply(&[]).unwrap().areas, 0);
}

#[test]
fn a_batch_is_all_or_nothing_and_names_the_change() {
    let (space, first, second) = tracked();
    space.reserve(pages(40, 1)).unwrap();
    first.dirty(3);
    let map = |first, n| Change::Map {
        range: pages(first, n),
        backing: 0,
        access: RW,
    };
    let unmap = |first, n| Change::Unmap {
        range: pages(first, n),
    };
    let cut = |page| Change::Cut { at: at(page) };
    let refused = |changes: &[Change]| match space.apply(changes).unwrap_err() {
        Error::Change { index, error } => (index, *error),
        other => panic!("{other}"),
    };
    let is = |(index, error): (usize, Error), expected, errno| {
        assert_eq!((index, error.errno()), (expected, errno), "{error}");
    };
    is(refused(&[map(20, 1), map(15, 2)]), 1, 17);
    is(refused(&[map(20, 2), map(21, 1)]), 1, 17);
    is(refused(&[unmap(0, 16), map(0, 16)]), 1, 17);
    is(refused(&[map(20, 1), map(40, 1)]), 1, 22);
    is(refused(&[map(20, 1), unmap(20, 1)]), 1, 16);
    is(refused(&[map(20, 2), cut(21)]), 1, 16);
    is(refused(&[cut(8), unmap(0, 9)]), 1, 2);
    is(refused(&[unmap(0, 16), unmap(0, 16)]), 1, 2);
    is(
        refused(&[map(20, 1), Change::Cut { at: Iova::new(1) }]),
        1,
        22,
    );
    let wraps = Change::Map {
        range: pages(20, 2),
        backing: u64::MAX - 4095,
        access: RW,
    };
    is(refused(&[wraps]), 0, 75);
    // A source refuses the second map: the first one is unmapped again, and flushed.
    second.with(|s| s.refuse_map_at = Some(pages(24, 1)));
    is(refused(&[unmap(0, 16), map(20, 1), map(24, 1)]), 2, 5);
    assert_eq!(
        first.with(|s| s.invalidated.clone()),
        [pages(20, 1), pages(24, 1)]
    );
    assert_eq!(mapped(&space), [pages(0, 16)]);
    assert_eq!(first.with(|s| s.mapped.clone()), [pages(0, 16)]);
    // The flush fails: all areas stay mapped, and their dirty pages stay dirty.
    second.with(|s| s.refuse_map_at = None);
    first.with(|s| s.fail_invalidations = 1);
    assert_eq!(
        space
            .apply(&[unmap(0, 16), map(20, 1)])
            .unwrap_err()
            .errno(),
        5
    );
    assert_eq!(mapped(&space), [pages(0, 16)]);
    assert_eq!(take(&space, pages(0, 16)), 1 << 3);
    // The addresses are free again.
    space.map(pages(20, 5), 0, RW).unwrap();
}

#[test]
fn a_batch_that_cannot_take_back_what_it_filled_keeps_the_addresses() {
    let (space, first, second) = tracked();
    second.with(|s| s.refuse_map_at = Some(pages(24, 1)));
    first.with(|s| s.fail_invalidations = 1);
    let map = |first| Change::Map {
        range: pages(first, 1),
        backing: 0,
        access: RW,
    };
    assert!(space.apply(&[map(20), map(24)]).is_err());
    assert!(matches!(
        space.map(pages(20, 1), 0, RW),
        Err(Error::Overlap { .. })
    ));
    space.unmap_discarding(pages(20, 8)).unwrap();
    assert!(first.with(|s| s.invalidated.contains(&pages(20, 1))));
    space.map(pages(20, 1), 0, RW).unwrap();
}

#[test]
fn readers_see_a_batch_whole() {
    let space = AddressSpace::with_source(Granule::K4, Arc::new(Fake::default())).unwrap();
    space.map(pages(0, 8), 0, RW).unwrap();
    let swap = |from: u64, to: u64| {
        let range = pages(to, 8);
        let gone = Change::Unmap {
            range: pages(from, 8),
        };
        [
            gone,
            Change::Map {
                range,
                backing: 0,
                access: RW,
            },
        ]
    };
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| {
            for _ in 0..300 {
                space.apply(&swap(0, 100)).unwrap();
                space.apply(&swap(100, 0)).unwrap();
            }
        });
        while !writer.is_finished() {
            let seen = mapped(&space);
            assert!(seen == [pages(0, 8)] || seen == [pages(100, 8)], "{seen:?}");
        }
    });
}

#[test]
fn a_snapshot_stays_as_it_was() {
    let (space, ..) = tracked();
    let snapshot = space.snapshot();
    space.map(pages(20, 1), 0, Access::Read).unwrap();
    let late = space.attach(Arc::new(Fake::default())).unwrap();
    let all = |snapshot: &dirtymap::space::SpaceSnapshot<'_>| {
        let ranges = snapshot.mappings(IovaRange::ALL).map(|m| m.range);
        ranges.collect::<Vec<_>>()
    };
    assert_eq!(all(&snapshot), [pages(0, 16)]);
    assert_eq!((snapshot.len(), snapshot.domains().count()), (1, 2));
    assert!(snapshot.lookup(at(20)).is_none() && !snapshot.is_empty());
    assert!(snapshot.age() > 0);
    let now = space.snapshot();
    assert_eq!(now.age(), 0);
    assert_eq!(all(&now), [pages(0, 16), pages(20, 1)]);
    assert_eq!(now.domains().last(), Some(late));
    assert_eq!(now.lookup(at(20)).unwrap().access, Access::Read);
    assert_eq!(now.mappings(pages(16, 2)).count(), 0);
}

/// Each publication counts as one: that of an area, a rule, a domain, or a whole batch.
#[test]
fn a_snapshot_knows_its_age() {
    let (space, ..) = tracked();
    let snapshot = space.snapshot();
    assert_eq!(snapshot.age(), 0);
    space.reserve(pages(100, 1)).unwrap();
    assert_eq!(snapshot.age(), 1);
    space.set_allowed(&[pages(50, 1)]).unwrap();
    assert_eq!(snapshot.age(), 2);
    space.reserve(pages(50, 1)).unwrap_err();
    assert_eq!(snapshot.age(), 2, "what is refused changes nothing");
    space.cut(at(8)).unwrap();
    let range = pages(8, 8);
    let changes = [Change::Cut { at: at(12) }, Change::Unmap { range }];
    space.apply(&changes[..1]).unwrap();
    assert_eq!(snapshot.age(), 4);
    assert_eq!((space.snapshot().age(), snapshot.len()), (0, 1));
}

/// An unmap of three areas, the last of which is being mapped, is refused, and leaves the others as
/// they were: the second stayed claimed for ever.
#[test]
fn an_unmap_that_is_refused_gives_all_areas_back() {
    let (space, first, _) = tracked();
    space.unmap_discarding(pages(0, 16)).unwrap();
    let space = Arc::new(space);
    space.map(pages(0, 4), 0, RW).unwrap();
    space.map(pages(4, 4), 0, RW).unwrap();
    let (inner, seen) = (Arc::downgrade(&space), Arc::new(Mutex::new(None)));
    let report = seen.clone();
    first.with(|s| {
        s.on_map = Some(Box::new(move || {
            let space = inner.upgrade().unwrap();
            *report.lock().unwrap() = space.unmap_discarding(pages(0, 12)).err();
        }));
    });
    space.map(pages(8, 4), 0, RW).unwrap();
    let busy = seen.lock().unwrap().take();
    assert!(matches!(busy, Some(Error::Busy { area }) if area == pages(8, 4)));
    for nth in 0..3 {
        let unmapped = space.unmap_discarding(pages(4 * nth, 4)).unwrap();
        assert_eq!(unmapped.areas, 1);
    }
}

#[test]
fn faults_are_kept_newest_last_and_counted() {
    let (space, ..) = tracked();
    assert_eq!(space.faults(), Faults::default());
    assert!(space.mark(pages(14, 4)).is_err());
    let handle = space.area(at(0)).unwrap();
    assert!(handle.mark(pages(16, 1)).is_err());
    let domain = space.domains()[0];
    space.report_fault(domain, pages(40, 2));
    let fault = |page, pages: u64, source| Fault {
        at: at(page),
        len: pages * PAGE,
        source,
    };
    let expected = [
        fault(16, 2, FaultSource::Mark),
        fault(16, 1, FaultSource::Handle),
        fault(40, 2, FaultSource::Device(domain)),
    ];
    assert_eq!(space.faults().recent, expected);
    for n in 0..100 {
        assert!(space.mark(pages(100 + n, 1)).is_err());
    }
    assert!(space.mark(IovaRange::ALL).is_err());
    let faults = space.faults();
    assert_eq!((faults.recent.len(), faults.dropped), (64, 40));
    let newest = faults.recent[63];
    assert_eq!((newest.at, newest.len), (at(16), u64::MAX - 16 * PAGE + 1));
    assert_eq!(space.stats().outside_marks, 103);
}

#[test]
fn marks_outside_from_many_threads_are_all_counted() {
    let (space, ..) = tracked();
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for n in 0..1000 {
                    assert!(space.mark(pages(100 + n, 1)).is_err());
                }
            });
        }
    });
    let faults = space.faults();
    assert_eq!(faults.recent.len() as u64 + faults.dropped, 4000);
}

/// Map, cut, unmap at both ends and in the largest sizes: one page, half of all addresses, all of
/// them.
#[test]
fn the_largest_and_the_smallest_areas_are_cut_and_unmapped() {
    let space = AddressSpace::new(Granule::K4);
    let half = IovaRange::from_len(Iova::MIN, 1 << 63).unwrap();
    let upper = IovaRange::from_len(Iova::new(1 << 63), 1 << 63).unwrap();
    space.map(IovaRange::ALL, 0, RW).unwrap();
    space.start_tracking().unwrap();
    space
        .mark(IovaRange::from_len(Iova::MAX, 1).unwrap())
        .unwrap();
    assert!(space.cut(upper.start()).unwrap());
    let top = IovaRange::granule_at(Iova::MAX, Granule::K4);
    assert!(space.cut(top.start()).unwrap());
    assert_eq!(space.lookup(Iova::MAX).unwrap().backing, top.start().get());
    assert_eq!(space.unmap_discarding(half).unwrap().bytes, 1 << 63);
    let sparse = SparseBitmap::new(1 << 52);
    let (unmapped, view) = space
        .unmap(IovaRange::ALL, Granule::K4, UserBitmap::sparse(&sparse))
        .unwrap();
    assert_eq!((unmapped.areas, unmapped.bytes), (2, 1 << 63));
    assert_eq!(runs(view), [top]);
    space.map(upper, 0, RW).unwrap();
    space.map(half, 0, RW).unwrap();
    space.map(top, 0, RW).unwrap_err();
}

/// The refusals of the kernel's IOMMU_IOAS_MAP, UNMAP, CUT, RESERVE and ALLOW that a caller here
/// can make too, with the same numbers.
#[test]
fn refusals_have_the_numbers_of_the_kernel() {
    let space = AddressSpace::new(Granule::K4);
    space.map(pages(10, 4), 0, RW).unwrap();
    space.reserve(pages(30, 2)).unwrap();
    let odd = |start, len| IovaRange::from_len(Iova::new(start), len).unwrap();
    let top = u64::MAX - 4095;
    let map = |range, backing| space.map(range, backing, RW);
    let number = |refused: Result<(), Error>| refused.unwrap_err().errno();
    // MAP, fixed.
    let nothing = IovaRange::from_len(at(0), 0).map(drop);
    assert_eq!(number(nothing.map_err(Error::from)), 22);
    assert_eq!(
        number(
            IovaRange::from_len(Iova::new(top), 8192)
                .map(drop)
                .map_err(Error::from)
        ),
        75
    );
    assert_eq!(number(map(odd(PAGE, PAGE + 1), 0)), 22);
    assert_eq!(number(map(odd(1, PAGE), 0)), 22);
    assert_eq!(number(map(pages(31, 1), 0)), 22);
    assert_eq!(number(map(pages(13, 1), 0)), 17);
    assert_eq!(number(map(pages(1, 1), 1)), 22);
    assert_eq!(number(map(pages(1, 2), top)), 75);
    // MAP, anywhere.
    let anywhere = |len, backing| space.map_anywhere(len, backing, RW).map(drop);
    assert_eq!(number(anywhere(0, 0)), 22);
    assert_eq!(number(anywhere(PAGE + 1, 0)), 22);
    assert_eq!(number(anywhere(top, 0)), 28);
    // UNMAP: of a part of an area; of nothing; of everything in an empty space, which succeeds in
    // the kernel and is an error here.
    let unmap = |range| space.unmap_discarding(range).map(drop);
    assert_eq!(number(unmap(pages(10, 2))), 2);
    assert_eq!(number(unmap(pages(0, 2))), 2);
    // CUT.
    assert_eq!(number(space.cut(Iova::new(10 * PAGE + 1)).map(drop)), 22);
    // RESERVE and ALLOW.
    assert_eq!(number(space.reserve(pages(13, 1))), 98);
    space.set_allowed(&[pages(50, 1)]).unwrap();
    assert_eq!(number(space.reserve(pages(50, 1))), 98);
    space.reserve(pages(31, 2)).unwrap();
    assert_eq!(number(space.set_allowed(&[pages(31, 1)])), 98);
    assert_eq!(number(space.set_allowed(&[pages(60, 2), pages(61, 2)])), 22);
    assert_eq!(number(space.release_reserved(pages(1, 1))), 2);
    assert_eq!(space.ranges().allowed, [pages(50, 1)]);
    assert_eq!(mapped(&space), [pages(10, 4)]);
}

/// A source that looks at its space during an unmap and during a batch that maps. The addresses of
/// both are taken until the call ends.
#[test]
fn addresses_of_a_batch_are_taken_until_its_end() {
    let (space, first, second) = tracked();
    let space = Arc::new(space);
    let map = |n| Change::Map {
        range: pages(n, 2),
        backing: 0,
        access: RW,
    };
    let (inner, seen) = (
        Arc::downgrade(&space),
        Arc::new(std::sync::Mutex::new(Vec::new())),
    );
    let report = seen.clone();
    second.with(|s| {
        s.on_map = Some(Box::new(move || {
            let space = inner.upgrade().unwrap();
            report.lock().unwrap().extend([
                space.map(pages(21, 1), 0, RW).unwrap_err().errno(),
                space.map(pages(0, 1), 0, RW).unwrap_err().errno(),
                space.reserve(pages(20, 1)).unwrap_err().errno(),
                space.unmap_discarding(pages(0, 16)).unwrap_err().errno(),
                space.cut(at(8)).unwrap_err().errno(),
                i32::from(space.lookup(at(20)).is_some()),
            ]);
            space.set_allowed(&[pages(20, 3)]).unwrap();
            assert_eq!(space.map_anywhere(PAGE, 0, RW).unwrap(), pages(22, 1));
        }));
    });
    space
        .apply(&[
            Change::Unmap {
                range: pages(0, 16),
            },
            map(20),
        ])
        .unwrap();
    assert_eq!(*seen.lock().unwrap(), [17, 17, 98, 16, 16, 0]);
    assert_eq!(mapped(&space), [pages(20, 2), pages(22, 1)]);
    assert!(first.with(|s| s.mapped.contains(&pages(20, 2))));
}

/// Of the three areas of an unmap, the last one is busy. The unmap releases its claims of both
/// others.
#[test]
fn an_unmap_that_finds_an_area_busy_gives_back_all_that_it_has_claimed() {
    let fake = Arc::new(Fake::default());
    let space = Arc::new(AddressSpace::new(Granule::K4));
    space.attach(fake.clone()).unwrap();
    space.map(pages(0, 4), 0, RW).unwrap();
    space.map(pages(4, 4), 0, RW).unwrap();
    let (inner, busy) = (
        Arc::downgrade(&space),
        Arc::new(std::sync::Mutex::new(None)),
    );
    let report = Arc::clone(&busy);
    fake.with(|s| {
        s.on_map = Some(Box::new(move || {
            let space = inner.upgrade().unwrap();
            *report.lock().unwrap() = space.unmap_discarding(pages(0, 12)).err();
        }));
    });
    space.map(pages(8, 3), 0, RW).unwrap();
    let busy = busy.lock().unwrap().take().unwrap();
    assert!(matches!(busy, Error::Busy { area } if area == pages(8, 3)));
    for range in [pages(0, 4), pages(4, 4), pages(8, 3)] {
        assert_eq!(space.unmap_discarding(range).unwrap().areas, 1);
    }
}
