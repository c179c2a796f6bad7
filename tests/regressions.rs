//! Bugs that were found in this library, each with its story.
#![cfg(not(dirtymap_loom))]
#![allow(clippy::unwrap_used)] // helpers of tests

mod common;

use common::{Fake, PAGE, leaked, pages, two_sources};
use dirtymap::{
    Access, AddressSpace, Change, Error, Granule, HarvestRequest, Iova, IovaRange, Scope,
    SparseBitmap, UserBitmap,
};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

/// Pages 0 to 15 in one area, two sources, tracking on.
fn tracked() -> (AddressSpace, Arc<Fake>, Arc<Fake>) {
    let (space, first, second) = two_sources();
    space.map(pages(0, 16), 0, Access::ReadWrite).unwrap();
    space.start_tracking().unwrap();
    (space, first, second)
}

fn take(space: &AddressSpace, range: IovaRange) -> u64 {
    let mut words = [0u64];
    let request = HarvestRequest::new(range, Granule::K4);
    let lease = space
        .harvest(&request, UserBitmap::new(&mut words))
        .unwrap();
    lease.sync().unwrap().commit();
    words[0]
}

/// The second of two sources refused to be switched off. The first one was already off, and the
/// space took all for on: the next switch to on did nothing, and the first source never tracked
/// again.
#[test]
fn a_switch_off_that_fails_half_way_is_undone_by_the_next_switch_on() {
    let (space, first, second) = tracked();
    second.with(|s| s.refuse_tracking = true);
    assert!(space.stop_tracking().is_err());
    second.with(|s| s.refuse_tracking = false);
    second.dirty(3);
    space.start_tracking().unwrap();
    assert!(first.with(|s| s.tracking) && second.with(|s| s.tracking));
    assert_eq!(
        take(&space, pages(0, 16)),
        1 << 3,
        "the one that stayed on kept its state"
    );
}

/// Marks were cleared before the sources were switched, so a switch that failed had discarded pages
/// of the last harvest.
#[test]
fn a_switch_on_that_fails_keeps_the_marks() {
    let (space, first, _) = tracked();
    space.mark(pages(1, 1)).unwrap();
    space.stop_tracking().unwrap();
    first.with(|s| s.refuse_tracking = true);
    assert!(space.start_tracking().is_err());
    assert_eq!(take(&space, pages(0, 16)), 1 << 1);
}

/// One source stopped at page 5, and the marks and the other source were not looked at, although
/// the error said that everything below page 5 was in the lease. A consumer that continued after
/// page 5 lost them.
#[test]
fn below_a_stop_the_lease_has_everything() {
    let (space, first, second) = tracked();
    first.with(|s| s.stop_at = Some(5));
    second.dirty(4);
    second.dirty(9);
    space.mark(pages(2, 1)).unwrap();
    let mut words = [0u64];
    let request = HarvestRequest::new(pages(0, 16), Granule::K4);
    let lease = space
        .harvest(&request, UserBitmap::new(&mut words))
        .unwrap();
    assert_eq!(lease.stopped().unwrap().at, Iova::new(5 * PAGE));
    lease.partial().sync().unwrap().commit();
    assert_eq!(words[0], 1 << 2 | 1 << 4);
    first.with(|s| s.stop_at = None);
    assert_eq!(
        take(&space, pages(0, 16)),
        1 << 9,
        "above it nothing was touched"
    );
}

/// An unmap removed the leaves with their dirty bits, and then its flush failed: the area was still
/// mapped, and a harvest found it clean.
#[test]
fn an_unmap_that_fails_leaves_dirty_what_was_dirty() {
    let (space, first, second) = tracked();
    first.dirty(3);
    space.mark(pages(7, 1)).unwrap();
    second.with(|s| s.fail_invalidations = 1);
    assert!(space.unmap_discarding(pages(0, 16)).is_err());
    assert_eq!(space.stats().discarded_bytes, 0);
    assert_eq!(take(&space, pages(0, 16)), 1 << 3 | 1 << 7);
    space.mark(pages(7, 1)).unwrap();
    let gone = space.unmap_discarding(pages(0, 16)).unwrap();
    assert_eq!(gone.discarded_bytes, u128::from(PAGE));
    assert_eq!(space.stats().discarded_bytes, PAGE);
}

/// A panic in the flush left the area claimed, so each later call got `Busy`.
#[test]
fn an_unmap_that_panics_can_be_repeated() {
    let (space, first, _) = tracked();
    first.with(|s| s.panic_in_invalidate = true);
    let panicked = catch_unwind(AssertUnwindSafe(|| space.unmap_discarding(pages(0, 16))));
    assert!(panicked.is_err());
    first.with(|s| s.panic_in_invalidate = false);
    space.unmap_discarding(pages(0, 16)).unwrap();
    assert_eq!(
        first.with(|s| s.invalidated.clone()),
        [pages(0, 16)],
        "no reuse before the flush"
    );
}

/// A source was attached when areas were mapped and tracking was on. It got no mappings and did not
/// track, in silence.
#[test]
fn a_source_that_comes_late_is_mapped_and_tracks() {
    let (space, _, _) = tracked();
    let late = Arc::new(Fake::default());
    space.attach(late.clone()).unwrap();
    assert!(late.with(|s| s.tracking && s.mapped == [pages(0, 16)]));
    late.dirty(2);
    assert_eq!(take(&space, pages(0, 16)), 1 << 2);
}

/// A mark by the handle of an area that is gone was an error, but not counted.
#[test]
fn a_mark_by_a_stale_handle_is_counted() {
    let (space, _, _) = tracked();
    let handle = space.area(Iova::MIN).unwrap();
    space.unmap_discarding(pages(0, 16)).unwrap();
    assert!(matches!(
        handle.mark(pages(1, 1)),
        Err(Error::Outside { .. })
    ));
    assert_eq!(space.stats().outside_marks, 1);
}

/// Pages of a mask past 2^64 wrapped to address 0, and a mask that did not start at a page lost the
/// tail of its last page.
#[test]
fn masks_neither_wrap_nor_lose_their_tail() {
    let mut words = [0u64; 2];
    let low = IovaRange::from_len(Iova::MIN, 128 * PAGE).unwrap();
    let view = UserBitmap::new(&mut words).view(low, Granule::K4).unwrap();
    let mut sink = view.sink();
    sink.record_mask(Iova::new(u64::MAX - (PAGE - 1)), Granule::K4, u64::MAX)
        .unwrap();
    assert_eq!(view.count(), 0);
    sink.record_mask(Iova::new(2048), Granule::K4, 1).unwrap();
    assert_eq!(view.runs().collect::<Vec<_>>(), [pages(0, 2)]);
}

/// Pages of one byte, over the whole address space: the number of the highest page is 2^64 - 1.
#[test]
fn pages_of_one_byte_reach_the_top() {
    let byte = Granule::from_bytes(1).unwrap();
    let space = AddressSpace::new(byte);
    space.map(IovaRange::ALL, 0, Access::ReadWrite).unwrap();
    space.start_tracking().unwrap();
    let top = IovaRange::from_len(Iova::MAX, 1).unwrap();
    space.mark(top).unwrap();
    let mut words = [0u64];
    let last = IovaRange::from_len(Iova::new(u64::MAX - 63), 64).unwrap();
    let lease = space
        .harvest(
            &HarvestRequest::new(last, byte),
            UserBitmap::new(&mut words),
        )
        .unwrap();
    assert_eq!(lease.sync().unwrap().runs().collect::<Vec<_>>(), [top]);
}

/// An attach looks at the areas once, and then fills them one by one. Meanwhile a batch cut one of
/// them and unmapped its middle. The attach went on to the pieces, and also mapped the middle,
/// whose addresses were free by then. The devices of the new domain wrote to memory of another
/// owner. Found by the soak.
#[test]
fn an_attach_does_not_fill_what_a_batch_has_cut_out() {
    let space = Arc::new(AddressSpace::new(Granule::K4));
    space.map(pages(0, 4), 0, Access::ReadWrite).unwrap();
    space.map(pages(8, 9), 0, Access::ReadWrite).unwrap();
    let late = Arc::new(Fake::default());
    let batching = Arc::clone(&space);
    late.with(|s| {
        s.on_map = Some(Box::new(move || {
            let cut = |page| Change::Cut {
                at: pages(page, 1).start(),
            };
            let range = pages(11, 3);
            let changes = [cut(11), cut(14), Change::Unmap { range }];
            batching.apply(&changes).unwrap();
        }));
    });
    let id = space.attach(late.clone()).unwrap();
    let filled = late.with(|s| s.mapped.clone());
    assert_eq!(filled, [pages(0, 4), pages(8, 3), pages(14, 3)]);
    // The area that has the addresses now is filled and emptied as usual.
    space.map(pages(11, 3), 0, Access::ReadWrite).unwrap();
    space.start_tracking().unwrap();
    late.dirty(12);
    space.detach(id).unwrap();
    assert!(late.with(|s| s.mapped.is_empty()));
    assert_eq!(take(&space, pages(8, 9)), 1 << 4);
}

/// A lease over one domain was aborted after its area was in the tree, and before this domain was
/// filled with it. The pages went to the put-back store of the domain, which the fill then cleared,
/// because it took them for pages of an earlier area. The abort reported them as dirty again, and
/// they were lost.
///
/// A lease that is older than the area has no page of it: the lease's pages are outside, and those
/// of the area stay clean.
#[test]
fn what_is_put_back_while_an_area_is_filled_stays_dirty() {
    for both in [false, true] {
        for older in [false, true] {
            let (space, first, second) = two_sources();
            let space: &'static AddressSpace = leaked(space);
            space.map(pages(0, 16), 0, Access::ReadWrite).unwrap();
            space.start_tracking().unwrap();
            let last = Scope::Domain(space.domains()[1]);
            let scope = if both { Scope::All } else { last };
            let request = HarvestRequest::new(pages(0, 16), Granule::K4).in_scope(scope);
            let lease = {
                let second = second.clone();
                move || {
                    second.dirty(3);
                    let bitmap = UserBitmap::new(leaked([0u64]));
                    space.harvest(&request, bitmap).unwrap()
                }
            };
            let before = older.then(&lease);
            space.unmap_discarding(pages(0, 16)).unwrap();
            // The other domain is filled first.
            first.with(|s| {
                s.on_map = Some(Box::new(move || {
                    let aborted = before.unwrap_or_else(lease).abort();
                    let expected = if older { (0, 4096) } else { (4096, 0) };
                    assert_eq!((aborted.bytes, aborted.outside_bytes), expected);
                }));
            });
            space.map(pages(0, 16), 0, Access::ReadWrite).unwrap();
            let mut words = [0u64];
            let alone = HarvestRequest::new(pages(0, 16), Granule::K4).in_scope(last);
            let lease = space.harvest(&alone, UserBitmap::new(&mut words)).unwrap();
            lease.sync().unwrap().commit();
            let found = if older { 0 } else { 1 << 3 };
            assert_eq!(words[0], found, "both: {both}, older: {older}");
        }
    }
}

/// `len >> shift` pages for a range that begins inside a page is one too few: the last page was
/// neither marked nor copied.
#[test]
fn a_mark_covers_every_page_that_it_touches() {
    for off in [0, 1, 2048, PAGE - 1] {
        for len in [1, 2, PAGE - 1, PAGE, PAGE + 1, 2 * PAGE] {
            let (space, _, _) = tracked();
            let start = Iova::new(3 * PAGE + off);
            let range = IovaRange::from_len(start, len).unwrap();
            let touched = ((off + len - 1) >> 12) + 1;
            let expected = ((1 << touched) - 1) << 3;
            space.area(start).unwrap().mark(range).unwrap();
            assert_eq!(take(&space, pages(0, 16)), expected, "{off} + {len}");
            space.mark(range).unwrap();
            assert_eq!(take(&space, pages(0, 16)), expected, "{off} + {len}");
        }
    }
}

/// A map published its area, which a thread marked, and filled the first of two domains, through
/// which a device wrote. Then the second domain refused, and the area was removed. The mark was
/// neither reported nor counted, and the page of the device was dirty in the next area at these
/// addresses.
#[test]
fn what_is_dirty_in_a_map_that_fails_is_counted_as_discarded() {
    let (space, first, second) = two_sources();
    let space = Arc::new(space);
    space.start_tracking().unwrap();
    let (marked, device) = (Arc::clone(&space), Arc::clone(&first));
    second.with(|s| {
        s.refuse_map = true;
        s.on_map = Some(Box::new(move || {
            marked.mark(pages(2, 1)).unwrap();
            device.dirty(5);
        }));
    });
    let map = || space.map(pages(0, 16), 0, Access::ReadWrite);
    assert!(map().is_err());
    assert_eq!(space.stats().discarded_bytes, 2 * PAGE);
    second.with(|s| s.refuse_map = false);
    map().unwrap();
    assert_eq!(take(&space, pages(0, 16)), 0);
}

/// The same in a batch: the page that the device had written was neither reported nor counted, and
/// was dirty in the next area.
#[test]
fn what_is_dirty_in_a_batch_that_fails_is_counted_as_discarded() {
    let (space, first, second) = two_sources();
    space.start_tracking().unwrap();
    let device = Arc::clone(&first);
    second.with(|s| {
        s.refuse_map = true;
        s.on_map = Some(Box::new(move || device.dirty(5)));
    });
    let range = pages(0, 16);
    let map = Change::Map {
        range,
        backing: 0,
        access: Access::ReadWrite,
    };
    assert!(space.apply(&[map]).is_err());
    assert_eq!(space.stats().discarded_bytes, PAGE);
    second.with(|s| s.refuse_map = false);
    space.apply(&[map]).unwrap();
    assert_eq!(take(&space, range), 0);
}

/// Harvests that walk by pieces counted an area once for each of its pieces.
#[test]
fn an_area_is_counted_once_however_many_pieces_it_is_walked_in() {
    let space = AddressSpace::new(Granule::K4);
    let range = pages(0, 3 << 15);
    let halves = (pages(0, 1 << 15), pages(1 << 15, 2 << 15));
    space.map(halves.0, 0, Access::ReadWrite).unwrap();
    space.map(halves.1, 0, Access::ReadWrite).unwrap();
    space.start_tracking().unwrap();
    let sparse = SparseBitmap::new(3 << 15);
    let bitmap = || UserBitmap::sparse(&sparse);
    let request = HarvestRequest::new(range, Granule::K4);
    let bounded = space.harvest(&request.resume_at(Iova::MIN), bitmap());
    assert_eq!(bounded.unwrap().report().areas, 2);
    let mut words = [0b1011u64, 0, 1];
    let start = pages((1 << 15) - 2, 192);
    let mask = UserBitmap::new(&mut words)
        .view(start, Granule::K4)
        .unwrap();
    let masked = space.harvest(&request.masked(mask), bitmap()).unwrap();
    assert_eq!(masked.report().areas, 2);
}

/// The list of pieces of a parallel harvest grew with the request: for all of a 64-bit space at 4
/// KiB it was 256 GiB long, and the process was aborted, although a sparse bitmap holds such a
/// request and no page was dirty.
#[cfg(feature = "rayon")]
#[test]
fn a_parallel_harvest_of_the_whole_address_space() {
    let space = AddressSpace::new(Granule::K4);
    space.map(IovaRange::ALL, 0, Access::ReadWrite).unwrap();
    space.start_tracking().unwrap();
    for at in [Iova::MIN, Iova::MAX] {
        space
            .mark(IovaRange::granule_at(at, Granule::BYTE))
            .unwrap();
    }
    let sparse = SparseBitmap::new(1 << 52);
    let request = HarvestRequest::new(IovaRange::ALL, Granule::K4);
    let lease = space
        .harvest(&request.parallel(), UserBitmap::sparse(&sparse))
        .unwrap();
    assert_eq!((lease.report().areas, lease.report().bits_set), (1, 2));
    lease.sync().unwrap().commit();
}

/// A detach took dirty pages out of the table of its domain, and marked them later. A harvest in
/// between, perhaps the last one, found them in neither place.
#[test]
fn a_harvest_during_a_detach_finds_what_is_on_its_way() {
    let (space, first, _) = tracked();
    let space: &'static AddressSpace = leaked(space);
    first.dirty(3);
    let found = Arc::new(std::sync::Mutex::new(0));
    first.with(|s| {
        let found = Arc::clone(&found);
        s.on_unmap = Some(Box::new(move || {
            let harvest = std::thread::spawn(|| take(space, pages(0, 16)));
            *found.lock().unwrap() = harvest.join().unwrap();
        }));
    });
    space.detach(space.domains()[0]).unwrap();
    let found = *found.lock().unwrap();
    assert_eq!(found & 1 << 3, 1 << 3);
}
