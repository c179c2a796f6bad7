//! One test for each way in which a panic of a source lost something.

use std::sync::Arc;

use dirtymap::flush::Leaves;
use dirtymap::{
    Access, AddressSpace, Change, DomainId, Error, Granule, HarvestRequest, Iova, IovaRange, Scope,
    SparseBitmap, UserBitmap,
};

use crate::mock::{Device, Owned, Points, numbers, pages, panics};

const RW: Access = Access::ReadWrite;

/// A space over `n` devices, pages 0 to 15 in one area, tracking on.
fn tracked(n: usize) -> (AddressSpace, Arc<Points>, Vec<Arc<Device>>) {
    let points = Arc::new(Points::default());
    let devices: Vec<_> = (0..n).map(|_| Device::new(&points)).collect();
    let space = AddressSpace::new(Granule::K4);
    for device in &devices {
        space.attach(Arc::clone(device)).unwrap();
    }
    space.map(pages(0, 16), 0, RW).unwrap();
    space.start_tracking().unwrap();
    (space, points, devices)
}

/// Harvests pages 0 to 15 of `scope` and commits.
fn take_in(space: &AddressSpace, scope: Scope) -> u64 {
    let mut words = [0u64];
    let request = HarvestRequest::new(pages(0, 16), Granule::K4).in_scope(scope);
    let lease = space.harvest(&request, UserBitmap::new(&mut words));
    lease.unwrap().sync().unwrap().commit();
    words[0]
}

fn take(space: &AddressSpace) -> u64 {
    take_in(space, Scope::All)
}

fn unmap(space: &AddressSpace, range: IovaRange) -> Result<u64, Error> {
    let mut words = [0u64];
    space.unmap(range, Granule::K4, UserBitmap::new(&mut words))?;
    Ok(words[0])
}

fn reaches_nothing(devices: &[Arc<Device>], range: IovaRange) {
    for page in numbers(range) {
        assert!(devices.iter().all(|d| !d.reaches(page)), "page {page}");
    }
}

const UNMAPPING: [&str; 5] = [
    "unmap: begun",
    "unmap: taken",
    "unmap: owed",
    "unmap: told",
    "unmap: done",
];

/// A source took its leaves out of the table, reported some, and panicked. The debt survived. The
/// pages that it had taken were lost, whether reported or not: the next harvest was empty.
#[test]
fn an_unmap_that_panics_half_way_loses_no_dirty_page() {
    for (point, skip) in UNMAPPING.into_iter().flat_map(|p| [(p, 0), (p, 1)]) {
        for records in [false, true] {
            let (space, points, devices) = tracked(2);
            let written = [(0, 3), (0, 9), (1, 6)];
            written
                .iter()
                .for_each(|(d, n)| assert!(devices[*d].write(*n)));
            points.arm(point, skip, 1);
            let mut words = [0u64];
            let panicked = match records {
                true => panics(|| {
                    let bitmap = UserBitmap::new(&mut words);
                    space.unmap(pages(0, 16), Granule::K4, bitmap).map(|_| ())
                }),
                false => panics(|| space.unmap_discarding(pages(0, 16)).map(|_| ())),
            };
            assert!(panicked.is_err(), "{point}");
            assert_eq!(space.mappings().len(), 1, "{point}: nothing is unmapped");
            assert_eq!(space.stats().discarded_bytes, 0);
            let found = take(&space);
            let all = 1 << 3 | 1 << 6 | 1 << 9;
            assert_eq!(found & all, all, "{point}, {skip}: a write is lost");
            // The cached translations of devices are owed, and the next call that flushes pays this
            // debt.
            assert_eq!(unmap(&space, pages(0, 16)).unwrap(), 0, "{point}, {skip}");
            reaches_nothing(&devices, pages(0, 16));
            assert_eq!(space.stats().flush.pending, 0);
        }
    }
}

/// The work of a source before its panic is unknown: it may have split or freed tables, and its
/// leaves may have any size. So the invalidation names tables and all sizes.
#[test]
fn an_unmap_that_panics_owes_tables_and_leaves_of_all_sizes() {
    let (space, points, devices) = tracked(1);
    points.arm("unmap: taken", 0, 1);
    assert!(panics(|| space.unmap_discarding(pages(0, 16))).is_err());
    let mut words = [0u64];
    let request = HarvestRequest::new(pages(0, 16), Granule::K4);
    let lease = space.harvest(&request, UserBitmap::new(&mut words));
    lease.unwrap().sync().unwrap().commit();
    let all = Leaves {
        smallest: Granule::K4,
        largest: Granule::from_bytes(16 << 12).unwrap(),
    };
    let told = devices[0].with(|s| s.invalidated.clone());
    assert_eq!(told.last(), Some(&(true, Some(all))), "{told:?}");
}

/// The same without a harvest in between: the pages that the first call took are in the result of
/// the second.
#[test]
fn an_unmap_that_panicked_is_repeated_and_reports_all() {
    for point in UNMAPPING {
        let (space, points, devices) = tracked(1);
        assert!(devices[0].write(3) && devices[0].write(9));
        points.arm(point, 0, 1);
        assert!(panics(|| unmap(&space, pages(0, 16))).is_err());
        let found = unmap(&space, pages(0, 16)).unwrap();
        assert_eq!(found & (1 << 3 | 1 << 9), 1 << 3 | 1 << 9, "{point}");
        assert!(space.mappings().is_empty());
        reaches_nothing(&devices, pages(0, 16));
    }
}

/// A detach moves dirty state to the marks. When the source panicked in the middle, nothing reached
/// the marks. The repeated detach found an empty table, and dropped the domain.
#[test]
fn a_detach_that_panics_half_way_loses_no_dirty_page() {
    for (point, skip) in UNMAPPING.into_iter().flat_map(|p| [(p, 0), (p, 1)]) {
        let (space, points, devices) = tracked(2);
        space.map(pages(20, 4), 0, RW).unwrap();
        assert!(devices[0].write(3) && devices[0].write(9) && devices[0].write(21));
        let id = space.domains()[0];
        points.arm(point, skip, 1);
        assert!(panics(|| space.detach(id)).is_err(), "{point}");
        assert!(
            space.domains().contains(&id),
            "{point}: it is there until a detach succeeds"
        );
        space.detach(id).unwrap();
        reaches_nothing(&devices[..1], pages(0, 24));
        let all = 1 << 3 | 1 << 9;
        assert_eq!(take(&space) & all, all, "{point}, {skip}");
        assert_ne!(
            unmap(&space, pages(20, 4)).unwrap() & 0b10,
            0,
            "{point}, {skip}"
        );
    }
}

/// A source reports pages outside of the area, or too many: 256 TiB instead of one leaf, in an area
/// of 16 pages, exhausted the memory.
#[test]
fn what_an_unmap_tells_outside_of_its_area_is_not_believed() {
    for detaches in [false, true] {
        let (space, _, devices) = tracked(1);
        space.map(pages(20, 4), 0, RW).unwrap();
        assert!(devices[0].write(3));
        let huge = IovaRange::from_len(Iova::MIN, 1 << 48).unwrap();
        devices[0].with(|s| s.tells = vec![huge]);
        if detaches {
            space.detach(space.domains()[0]).unwrap();
            assert_eq!(take(&space), 0xffff);
        } else {
            assert_eq!(unmap(&space, pages(0, 16)).unwrap(), 0xffff);
        }
        assert_eq!(unmap(&space, pages(20, 4)).unwrap(), 0, "another area");
    }
}

/// The number of recorded leaves is bounded by the pages of the area as well. Past that bound, the
/// whole area is dirty.
#[test]
fn an_unmap_that_tells_the_same_again_and_again_is_bounded() {
    let (space, _, devices) = tracked(1);
    assert!(devices[0].write(3));
    let again = [pages(9, 1), pages(3, 1)].repeat(1000);
    devices[0].with(|s| s.tells = again);
    assert_eq!(unmap(&space, pages(0, 16)).unwrap(), 0xffff);
}

const MAPPING: [(&str, u32); 5] = [
    ("map: begun", 0),
    ("map: leaf", 0),
    ("map: leaf", 1),
    ("map: done", 0),
    // The panic is in the second domain.
    ("map: leaf", 2),
];

/// A pair was recorded after the source had returned. If the source panicked half-way, no record
/// said that it translates the area. The unmap did not call it, and the addresses were free while
/// devices reached them.
#[test]
fn a_map_that_panics_leaves_nothing_mapped() {
    for (point, skip) in MAPPING {
        let (space, points, devices) = tracked(2);
        points.arm(point, skip, 1);
        let range = pages(20, 8);
        assert!(panics(|| space.map(range, 0, RW)).is_err(), "{point}");
        reaches_nothing(&devices, range);
        assert_eq!(space.mappings().len(), 1);
        space.map(range, 0, RW).unwrap();
        assert!(devices.iter().all(|d| d.write(21)));
        assert_eq!(unmap(&space, range).unwrap(), 0xf, "leaves of four pages");
        reaches_nothing(&devices, range);
    }
}

#[test]
fn a_batch_whose_map_panics_leaves_nothing_mapped() {
    for (point, skip) in MAPPING {
        let (space, points, devices) = tracked(2);
        let range = pages(20, 8);
        let map = Change::Map {
            range,
            backing: 0,
            access: RW,
        };
        let unmap = Change::Unmap {
            range: pages(0, 16),
        };
        assert!(devices[1].write(5));
        points.arm(point, skip, 1);
        assert!(panics(|| space.apply(&[unmap, map])).is_err(), "{point}");
        reaches_nothing(&devices, range);
        assert_eq!(space.mappings().len(), 1, "{point}");
        assert_ne!(take(&space) & 1 << 5, 0);
        space.apply(&[unmap, map]).unwrap();
        assert_eq!(space.mappings()[0].range, range);
        reaches_nothing(&devices, pages(0, 16));
    }
}

#[test]
fn an_attach_that_panics_at_its_third_area_is_emptied() {
    for (point, skip) in [("map: begun", 2), ("map: leaf", 5), ("map: done", 2)] {
        let (space, points, _) = tracked(1);
        space.map(pages(20, 4), 0, RW).unwrap();
        space.map(pages(30, 8), 0, RW).unwrap();
        let late = Device::new(&points);
        points.arm(point, skip, 1);
        assert!(panics(|| space.attach(late.clone())).is_err(), "{point}");
        assert_eq!(space.domains().len(), 1, "{point}");
        reaches_nothing(std::slice::from_ref(&late), pages(0, 40));
        assert!(!late.with(|s| s.tracking));
        let id = space.attach(late.clone()).unwrap();
        assert!(late.write(33));
        space.detach(id).unwrap();
        assert_eq!(unmap(&space, pages(30, 8)).unwrap(), 0xf << 2);
    }
}

/// A source maps a part and panics, and then also panics in the unmap that undoes it. The addresses
/// stay taken until a later unmap succeeds.
#[test]
fn a_map_whose_undoing_panics_too_keeps_its_addresses() {
    let range = pages(20, 8);
    let map = Change::Map {
        range,
        backing: 0,
        access: RW,
    };
    for batch in [false, true] {
        for undoing in ["unmap: taken", "invalidate: begun"] {
            let (space, points, devices) = tracked(2);
            // The first two of the points that count are those of the map.
            devices[1].with(|s| s.refuse_map = true);
            points.arm(undoing, 0, 1);
            let mapped = panics(|| match batch {
                true => space.apply(&[map]).map(|_| ()),
                false => space.map(range, 0, RW),
            });
            assert!(mapped.unwrap_err().0.starts_with(undoing));
            devices[1].with(|s| s.refuse_map = false);
            let overlap = space.map(range, 0, RW).unwrap_err();
            assert!(matches!(overlap, Error::Overlap { .. }), "{overlap}");
            space.unmap_discarding(range).unwrap();
            reaches_nothing(&devices, range);
            space.map(range, 0, RW).unwrap();
        }
    }
}

/// Two borders in one batch. The second split panicked or was refused, and the stale translation of
/// the leaf that the first one had split was not owed.
#[test]
fn the_debt_of_a_split_outlives_a_panic_in_the_next() {
    for point in [
        "split: begun",
        "split: taken",
        "split: parted",
        "split: done",
    ] {
        let (space, points, devices) = tracked(1);
        assert!(devices[0].write(1) && devices[0].write(6));
        assert_eq!(take(&space), 0xff, "leaves of four pages");
        // The device caches "D is set" again.
        assert!(devices[0].write(1) && devices[0].write(6));
        let cut = |page| Change::Cut {
            at: pages(page, 1).start(),
        };
        points.arm(point, 1, 1);
        assert!(panics(|| space.apply(&[cut(2), cut(6)])).is_err());
        assert_eq!(space.mappings().len(), 1, "{point}: the area stays whole");
        assert!(space.stats().flush.pending > 0, "{point}");
        assert_eq!(take(&space) & 0x42, 0x42, "{point}");
        for page in [1, 6] {
            assert!(!devices[0].caches(page), "{point}: page {page} is stale");
        }
        space.apply(&[cut(2), cut(6)]).unwrap();
        assert_eq!(space.mappings().len(), 3);
    }
    // The same with a refusal.
    let (space, points, devices) = tracked(2);
    devices[1].with(|s| s.refuse_split = true);
    assert!(devices[0].write(1));
    assert!(space.cut(pages(2, 1).start()).is_err());
    assert!(space.stats().flush.pending > 0);
    assert_ne!(take(&space) & 0b10, 0);
    assert!(!devices[0].caches(1) && points.fired() == 0);
}

/// The destructor of a batch flushed again while the panic of its flush unwound. A second panic
/// during unwinding aborts the process.
#[test]
fn a_batch_whose_flushes_all_panic_ends_in_one_panic() {
    let (space, points, devices) = tracked(2);
    assert!(devices[0].write(3));
    let range = pages(20, 8);
    let unmap_first = Change::Unmap {
        range: pages(0, 16),
    };
    let map = Change::Map {
        range,
        backing: 0,
        access: RW,
    };
    points.arm("invalidate: begun", 0, u32::MAX);
    assert!(panics(|| space.apply(&[unmap_first, map])).is_err());
    assert!(panics(|| space.apply(&[unmap_first])).is_err());
    points.disarm();
    // Devices may still reach the new addresses, so these stay taken.
    assert_eq!(space.mappings().len(), 2);
    assert_ne!(take(&space) & 1 << 3, 0);
    space.unmap_discarding(IovaRange::ALL).unwrap();
    reaches_nothing(&devices, pages(0, 32));
    space.apply(&[map]).unwrap();
}

/// A source that panicked in a switch to off may be off. The next switch to on took it for on, and
/// did not call it: its writes were never seen again.
#[test]
fn a_source_that_panicked_in_a_switch_is_asked_by_the_next_one() {
    for point in ["tracking: begun", "tracking: said", "tracking: done"] {
        for one in [false, true] {
            let (space, points, devices) = tracked(3);
            let ids: Vec<DomainId> = space.domains();
            let switch = |on| match (one, on) {
                (true, true) => space.start_domain_tracking(ids[1]),
                (true, false) => space.stop_domain_tracking(ids[1]),
                (false, true) => space.start_tracking(),
                (false, false) => space.stop_tracking(),
            };
            points.arm(point, u32::from(!one), 1);
            assert!(panics(|| switch(false)).is_err());
            assert_eq!(points.fired(), 1);
            assert!(
                !devices[0].with(|s| s.tracking) || one,
                "the others are switched"
            );
            assert!(!devices[2].with(|s| s.tracking) || one);
            switch(true).unwrap();
            assert!(devices.iter().all(|d| d.with(|s| s.tracking)), "{point}");
            // The converse: a failed switch is taken back in all sources.
            switch(false).unwrap();
            points.arm(point, u32::from(!one), 1);
            assert!(panics(|| switch(true)).is_err());
            assert!(
                one || devices.iter().all(|d| !d.with(|s| s.tracking)),
                "{point}"
            );
            switch(false).unwrap();
            assert!(
                one || devices.iter().all(|d| !d.with(|s| s.tracking)),
                "{point}"
            );
            switch(true).unwrap();
            assert!(devices.iter().all(|d| d.with(|s| s.tracking)));
            assert!(devices[1].write(2));
            assert_eq!(take(&space), 0xf);
        }
    }
}

/// A switch to on panics in one source, and so does the undo in all of them. Each source is still
/// called, marks stay, and the next switch repairs the state.
#[test]
fn a_switch_on_whose_taking_back_panics_is_repaired_by_the_next() {
    let (space, points, devices) = tracked(2);
    space.mark(pages(7, 1)).unwrap();
    space.stop_tracking().unwrap();
    points.arm("tracking: said", 1, 3);
    assert!(panics(|| space.start_tracking()).is_err());
    points.disarm();
    assert_eq!(take(&space), 1 << 7);
    space.start_tracking().unwrap();
    assert!(devices.iter().all(|d| d.with(|s| s.tracking)));
    assert!(devices[0].write(0) && devices[1].write(4));
    assert_eq!(take(&space), 0xff);
}

/// A source that panicked in its first switch, and again when that was taken back, is in doubt. It
/// has no baseline, so a harvest must not take it for clean.
#[test]
fn a_source_whose_first_switch_panicked_was_never_tracked() {
    let points = Arc::new(Points::default());
    let space = AddressSpace::new(Granule::K4);
    space.attach(Device::new(&points)).unwrap();
    space.map(pages(0, 16), 0, RW).unwrap();
    points.arm("tracking: begun", 0, 2);
    assert!(panics(|| space.start_tracking()).is_err());
    assert_eq!(points.fired(), 2);
    points.disarm();
    for repaired in [false, true] {
        let mut words = [0u64];
        let request = HarvestRequest::new(pages(0, 16), Granule::K4);
        let refused = space.harvest(&request, UserBitmap::new(&mut words));
        let refused = refused.map(drop);
        assert!(
            matches!(refused, Err(Error::NeverTracked { .. })),
            "repaired {repaired}: {refused:?}"
        );
        // It is called again because it is in doubt. It is off, as it always was.
        space.stop_tracking().unwrap();
    }
}

#[test]
fn an_attach_that_panics_before_it_is_published_leaves_no_trace() {
    for point in [
        "page",
        "identity",
        "cost",
        "tracking: begun",
        "tracking: done",
    ] {
        let (space, points, _) = tracked(1);
        let late = Device::new(&points);
        points.arm(point, 0, 1);
        assert!(
            panics(|| space.attach(Owned::new(&late))).is_err(),
            "{point}"
        );
        assert_eq!(
            Arc::strong_count(&late),
            1,
            "{point}: the source is dropped"
        );
        assert_eq!(space.domains().len(), 1);
        // No lock is held.
        space.attach(late).unwrap();
        space.stop_tracking().unwrap();
    }
}

/// The documentation says that `flush_cost` is called once, when the source is attached. It was
/// called again at each attach and detach of another domain.
#[test]
fn the_cost_of_flushes_is_asked_once() {
    let (space, points, devices) = tracked(1);
    let other = space.attach(Device::new(&points)).unwrap();
    space.detach(other).unwrap();
    assert_eq!(devices[0].with(|s| s.costs_asked), 1);
}

/// Every callback of a harvest may panic, and every callback of the calls that follow it.
#[test]
fn a_harvest_a_peek_or_a_sync_that_panics_takes_nothing() {
    for point in [
        "harvest: begun",
        "harvest: recorded",
        "harvest: cleared",
        "harvest: taken",
        "harvest: done",
        "peek: recorded",
        "invalidate: begun",
        "invalidate: some",
        "invalidate: done",
    ] {
        let (space, points, devices) = tracked(2);
        assert!(devices[0].write(3) && devices[1].write(9));
        points.arm(point, 0, 1);
        let outcome = panics(|| {
            let request = HarvestRequest::new(pages(0, 16), Granule::K4);
            let (peeked, taken) = (SparseBitmap::new(16), SparseBitmap::new(16));
            space.peek(&request, UserBitmap::sparse(&peeked)).unwrap();
            let lease = space.harvest(&request, UserBitmap::sparse(&taken));
            lease.unwrap().sync().unwrap().commit();
        });
        assert!(outcome.is_err(), "{point}");
        assert!(devices[0].write(3), "it may be cached");
        let found = take(&space);
        assert_eq!(found & (1 << 3 | 1 << 9), 1 << 3 | 1 << 9, "{point}");
        let stats = space.stats();
        assert_eq!(stats.harvests, stats.commits + stats.aborts);
        assert_eq!(
            stats.leased_bytes,
            stats.committed_bytes + stats.aborted_bytes
        );
        assert!(!devices[0].caches(3) && stats.flush.pending == 0);
    }
}
