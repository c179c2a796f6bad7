//! Which addresses are free: allocation, reserved and allowed ranges, and every refusal of map and
//! unmap with its errno.
#![cfg(not(dirtymap_loom))]
#![allow(clippy::unwrap_used)] // helpers of tests

mod common;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, Weak, mpsc};

use common::{Fake, PAGE, pages};
use dirtymap::source::{FlushGather, Invalidated, LeafSink, Sink, Stopped};
use dirtymap::{
    Access, AddressSpace, DirtySource, Error, Granule, HarvestRequest, Holes, Iova, IovaRange,
    Mapping, RangeError, Tracking, UserBitmap,
};

const M2: u64 = 2 << 20;
const RW: Access = Access::ReadWrite;

fn space() -> AddressSpace {
    AddressSpace::new(Granule::K4)
}

fn bytes(start: u64, len: u64) -> IovaRange {
    IovaRange::from_len(Iova::new(start), len).unwrap()
}

fn inclusive(start: u64, last: u64) -> IovaRange {
    IovaRange::new(Iova::new(start), Iova::new(last)).unwrap()
}

/// Where `map_anywhere` puts `len` bytes with backing 0.
fn place(space: &AddressSpace, len: u64) -> u64 {
    space.map_anywhere(len, 0, RW).unwrap().start().get()
}

#[test]
fn alignment_follows_the_length_and_the_backing() {
    // (length, backing, expected start) in pages, in an empty space, where page 0 is never used.
    for (len, backing, start) in [
        (1, 0, 1),
        (2, 0, 2),
        (3, 0, 4),
        (8, 0, 8),
        (9, 0, 16),
        (512, 0, 512),
        (513, 0, 512),
        (1 << 20, 0, 512),
        (8, 4, 4),
        (8, 6, 2),
        (8, 5, 1),
        (512, 1 << 30, 512),
        (512, 256, 256),
        (1 << 30, 3, 1),
    ] {
        let range = space()
            .map_anywhere(len * PAGE, backing * PAGE, RW)
            .unwrap();
        assert_eq!(range, pages(start, len), "{len} pages at {backing}");
    }
}

#[test]
fn the_lowest_free_place_is_taken() {
    let space = space();
    for first in [1, 3, 4, 9, 16] {
        space.map(pages(first, 1), 0, RW).unwrap();
    }
    assert_eq!(place(&space, PAGE), 2 * PAGE);
    assert_eq!(place(&space, 3 * PAGE), 12 * PAGE, "aligned to 4 pages");
    assert_eq!(place(&space, 2 * PAGE), 6 * PAGE);
    assert_eq!(place(&space, PAGE), 5 * PAGE);
    assert_eq!(place(&space, PAGE), 8 * PAGE);
    space.unmap_discarding(pages(3, 2)).unwrap();
    assert_eq!(place(&space, PAGE), 3 * PAGE);
    assert_eq!(place(&space, M2), M2);
    assert_eq!(place(&space, M2), 2 * M2);
    let mapping = space.lookup(Iova::new(2 * M2)).unwrap();
    assert_eq!((mapping.range, mapping.access), (bytes(2 * M2, M2), RW));
}

#[test]
fn map_anywhere_refuses_in_order_and_changes_nothing() {
    let fake = Arc::new(Fake::default());
    let space = AddressSpace::with_source(Granule::K4, fake.clone()).unwrap();
    space.set_allowed(&[pages(4, 2)]).unwrap();
    let refused = |len, backing| space.map_anywhere(len, backing, RW).unwrap_err();
    let top = u64::MAX - (PAGE - 1);

    assert!(matches!(
        refused(0, 1),
        Error::Range(RangeError::ZeroLength { .. })
    ));
    for len in [1, PAGE - 1, PAGE + 1, u64::MAX] {
        let error = refused(len, 1);
        assert!(matches!(error, Error::UnalignedLength { len: l, .. } if l == len));
        assert_eq!(error.errno(), 22);
    }
    let error = refused(2 * PAGE, top + 1 - 2);
    assert!(matches!(error, Error::UnalignedBacking { .. }), "{error}");
    let error = refused(2 * PAGE, top);
    assert!(matches!(error, Error::BackingWraps { backing, .. } if backing == top));
    assert_eq!(error.errno(), 75);
    let error = refused(4 * PAGE, 0);
    assert!(matches!(error, Error::NoSpace { len, alignment }
            if len == 4 * PAGE && alignment.bytes() == 4 * PAGE));
    assert_eq!(error.errno(), 28);
    assert!(space.mappings().is_empty() && fake.with(|s| s.mapped.is_empty()));

    fake.with(|s| s.refuse_map = true);
    assert_eq!(refused(PAGE, 0).errno(), 5);
    assert!(space.mappings().is_empty());
    fake.with(|s| s.refuse_map = false);
    // What could not be filled is free again.
    assert_eq!(place(&space, 2 * PAGE), 4 * PAGE);
    assert_eq!(fake.with(|s| s.mapped.clone()), [pages(4, 2)]);
}

/// Linux rounded an address near 2^64 up to 0, and gave a range that overlapped another area, or a
/// reserved one.
#[test]
fn allocation_near_the_top_does_not_wrap() {
    // History: rounding up near the last address wrapped, and the mapping overlapped another or a
    // reserved range.
    let space = space();
    let last_page = bytes(u64::MAX - (PAGE - 1), PAGE);
    space
        .set_allowed(&[inclusive(u64::MAX - 3 * PAGE + 1, u64::MAX)])
        .unwrap();
    // Of the three highest pages, the last one is never allocated.
    assert!(matches!(
        space.map_anywhere(3 * PAGE, PAGE, RW),
        Err(Error::NoSpace { .. })
    ));
    // The next multiple of 2 MiB would be 2^64.
    assert!(matches!(
        space.map_anywhere(M2, 0, RW),
        Err(Error::NoSpace { .. })
    ));
    assert_eq!(place(&space, PAGE), last_page.start().get() - 2 * PAGE);
    assert_eq!(place(&space, PAGE), last_page.start().get() - PAGE);
    assert!(matches!(
        space.map_anywhere(PAGE, 0, RW),
        Err(Error::NoSpace { .. })
    ));
    space.map(last_page, 0, RW).unwrap();
    assert_eq!(space.mappings().len(), 3);

    // The same below an area, and below a reserved range, that end at the last address.
    for reserve in [false, true] {
        let space = self::space();
        let high = inclusive(u64::MAX - M2 + 1, u64::MAX);
        space
            .map(inclusive(0, u64::MAX - 2 * M2 - PAGE), 0, RW)
            .unwrap();
        if reserve {
            space.reserve(high).unwrap();
        } else {
            space.map(high, 0, RW).unwrap();
        }
        assert_eq!(place(&space, M2), high.start().get() - M2);
        assert!(matches!(
            space.map_anywhere(M2, 0, RW),
            Err(Error::NoSpace { .. })
        ));
        assert_eq!(place(&space, PAGE), high.start().get() - M2 - PAGE);
        assert!(matches!(
            space.map_anywhere(PAGE, 0, RW),
            Err(Error::NoSpace { .. })
        ));
    }
}

#[test]
fn areas_of_one_page_and_of_half_the_space() {
    let space = space();
    assert_eq!(place(&space, 1 << 63), M2);
    assert!(matches!(
        space.map_anywhere(1 << 63, 0, RW),
        Err(Error::NoSpace { .. })
    ));
    assert_eq!(place(&space, PAGE), PAGE);
    assert_eq!(place(&space, PAGE), 2 * PAGE);
    assert_eq!(place(&space, M2), (1 << 63) + M2);
    // A length above the largest power of two: the greatest alignment, and no shift overflows.
    let error = space
        .map_anywhere(u64::MAX - (PAGE - 1), 0, RW)
        .unwrap_err();
    assert!(matches!(
        error,
        Error::NoSpace {
            alignment: Granule::M2,
            ..
        }
    ));

    // Pages so large that only the first and the last one exist.
    let two = AddressSpace::new(Granule::from_lg2(63).unwrap());
    assert!(matches!(
        two.map_anywhere(1 << 63, 0, RW),
        Err(Error::NoSpace { .. })
    ));
    // Pages above 2 MiB: the page is the alignment.
    let large = AddressSpace::new(Granule::G1);
    assert_eq!(place(&large, 1 << 30), 1 << 30);
    // Pages of one byte.
    let small = AddressSpace::new(Granule::from_lg2(0).unwrap());
    assert_eq!((place(&small, 1), place(&small, 3)), (1, 4));
}

#[test]
fn fixed_maps_refuse_in_order() {
    let space = space();
    space.map(pages(10, 4), 0, RW).unwrap();
    space.reserve(bytes(20 * PAGE + 5, 1)).unwrap();
    let refused = |range, backing| space.map(range, backing, RW).unwrap_err();
    let top = u64::MAX - (PAGE - 1);
    // Each request also has all the faults of the requests after it.
    let all = inclusive(1, u64::MAX);
    assert!(matches!(refused(all, 1), Error::Unaligned { .. }));
    let both = pages(10, 11);
    assert!(matches!(
        refused(both, top + 1 - 2),
        Error::UnalignedBacking { .. }
    ));
    assert!(matches!(refused(both, top), Error::BackingWraps { .. }));
    let error = refused(both, 0);
    assert!(matches!(error, Error::Reserved { range, reserved }
            if range == both && reserved == bytes(20 * PAGE + 5, 1)));
    assert_eq!(error.errno(), 22);
    let error = refused(pages(13, 2), 0);
    assert!(matches!(error, Error::Overlap { existing, .. } if existing == pages(10, 4)));
    assert_eq!(error.errno(), 17);
    // An empty range, and one that wraps, cannot be constructed.
    assert_eq!(
        IovaRange::from_len(Iova::new(PAGE), 0).unwrap_err().errno(),
        22
    );
    assert_eq!(
        IovaRange::from_len(Iova::new(top), PAGE + 1)
            .unwrap_err()
            .errno(),
        75
    );
    assert_eq!(space.mappings().len(), 1);
}

#[test]
fn unmap_refuses_in_order() {
    let space = space();
    space.map(pages(10, 4), 0, RW).unwrap();
    space.map(pages(20, 4), 0, RW).unwrap();
    space.reserve(pages(16, 2)).unwrap();
    let refused = |range| space.unmap_discarding(range).unwrap_err();
    for part in [
        pages(10, 3),
        pages(11, 3),
        pages(12, 1),
        pages(0, 11),
        pages(13, 20),
    ] {
        let error = refused(part);
        assert!(matches!(error, Error::PartOfArea { area, .. } if area == pages(10, 4)));
        assert_eq!(error.errno(), 2);
    }
    assert!(
        matches!(refused(pages(10, 12)), Error::PartOfArea { area, .. } if area == pages(20, 4))
    );
    assert_eq!(space.mappings().len(), 2, "all or nothing");
    // A reserved range is not an area: an unmap finds nothing in it, and passes over it.
    for nothing in [pages(0, 10), pages(14, 6), pages(16, 2), pages(24, 100)] {
        let error = refused(nothing);
        assert!(matches!(error, Error::NothingMapped { .. }));
        assert_eq!(error.errno(), 2);
    }
    assert_eq!(space.unmap_discarding(IovaRange::ALL).unwrap().areas, 2);
    assert!(matches!(
        space.map(pages(16, 1), 0, RW),
        Err(Error::Reserved { .. })
    ));
}

/// A source that looks at its own space while an area is filled.
#[derive(Default)]
struct Nosy {
    space: OnceLock<Weak<AddressSpace>>,
    seen: Mutex<Vec<Error>>,
}

impl DirtySource for Nosy {
    fn map(&self, mapping: &Mapping) -> Result<(), Error> {
        let Some(space) = self.space.get().and_then(Weak::upgrade) else {
            return Ok(());
        };
        let range = mapping.range;
        self.seen.lock().unwrap().extend([
            space.map(range, 0, RW).unwrap_err(),
            space.unmap_discarding(range).unwrap_err(),
            space.reserve(range).unwrap_err(),
        ]);
        Ok(())
    }
    fn unmap(&self, _: IovaRange, _: &mut FlushGather, _: &mut dyn FnMut(IovaRange)) {}
    fn set_tracking(&self, _: Tracking) -> Result<(), Error> {
        Ok(())
    }
    fn read_and_clear(&self, _: IovaRange, _: &mut LeafSink<'_, '_>) -> Result<(), Stopped> {
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
fn an_area_in_transition_holds_its_addresses() {
    let nosy = Arc::new(Nosy::default());
    let space = Arc::new(AddressSpace::with_source(Granule::K4, nosy.clone()).unwrap());
    nosy.space.set(Arc::downgrade(&space)).unwrap();
    let range = space.map_anywhere(4 * PAGE, 0, RW).unwrap();
    {
        let seen = nosy.seen.lock().unwrap();
        assert!(matches!(seen[0], Error::Overlap { existing, .. } if existing == range));
        assert!(matches!(seen[1], Error::Busy { area } if area == range));
        assert!(matches!(seen[2], Error::CannotReserve { existing, .. } if existing == range));
        let errnos: Vec<_> = seen.iter().map(Error::errno).collect();
        assert_eq!(errnos, [17, 16, 98]);
    }
    assert_eq!(space.unmap_discarding(range).unwrap().areas, 1);
}

#[test]
fn reserved_ranges_count() {
    let space = space();
    space.map(pages(8, 4), 0, RW).unwrap();
    space.set_allowed(&[pages(20, 4)]).unwrap();
    for (range, existing) in [
        (pages(0, 9), pages(8, 4)),
        (bytes(12 * PAGE - 1, 1), pages(8, 4)),
        (pages(11, 100), pages(8, 4)),
        (pages(19, 2), pages(20, 4)),
        (bytes(24 * PAGE - 1, 2), pages(20, 4)),
    ] {
        let error = space.reserve(range).unwrap_err();
        assert!(
            matches!(error, Error::CannotReserve { range: r, existing: e }
                if r == range && e == existing),
            "{error}"
        );
        assert_eq!(error.errno(), 98);
    }
    space.set_allowed(&[]).unwrap();

    // Reservations may overlap, and one of them is made twice.
    for range in [
        pages(2, 4),
        pages(4, 3),
        pages(4, 3),
        pages(0, 1),
        pages(7, 1),
    ] {
        space.reserve(range).unwrap();
    }
    assert_eq!(space.ranges().reserved, [pages(0, 1), pages(2, 6)]);
    assert_eq!(place(&space, PAGE), PAGE);
    assert_eq!(place(&space, PAGE), 12 * PAGE);
    let error = space.release_reserved(pages(2, 6)).unwrap_err();
    assert!(matches!(error, Error::NotReserved { range } if range == pages(2, 6)));
    assert_eq!(error.errno(), 2);
    space.release_reserved(pages(4, 3)).unwrap();
    assert_eq!(space.ranges().reserved, [pages(0, 1), pages(2, 6)]);
    space.release_reserved(pages(4, 3)).unwrap();
    assert_eq!(
        space.ranges().reserved,
        [pages(0, 1), pages(2, 4), pages(7, 1)]
    );
    assert!(space.release_reserved(pages(4, 3)).is_err());
    assert_eq!(place(&space, PAGE), 6 * PAGE);
    space.release_reserved(pages(2, 4)).unwrap();
    space.map(pages(2, 4), 0, RW).unwrap();

    // The whole space, up to the last address.
    let full = self::space();
    full.reserve(IovaRange::ALL).unwrap();
    full.reserve(IovaRange::ALL).unwrap();
    assert!(matches!(
        full.map_anywhere(PAGE, 0, RW),
        Err(Error::NoSpace { .. })
    ));
    assert_eq!(full.ranges().holes, []);
    full.release_reserved(IovaRange::ALL).unwrap();
    full.release_reserved(IovaRange::ALL).unwrap();
    assert_eq!(full.ranges().holes, [IovaRange::ALL]);
}

#[test]
fn allowed_ranges_restrict_only_allocation() {
    let space = space();
    space.reserve(pages(100, 1)).unwrap();
    let refused = |ranges: &[IovaRange]| space.set_allowed(ranges).unwrap_err();
    space.set_allowed(&[pages(64, 4)]).unwrap();
    let error = refused(&[pages(50, 2), pages(40, 2), pages(41, 4)]);
    assert!(matches!(error, Error::AllowedTwice { range, other }
            if range == pages(40, 2) && other == pages(41, 4)));
    assert_eq!(error.errno(), 22);
    let error = refused(&[pages(0, 4), pages(99, 2)]);
    assert!(matches!(error, Error::CannotAllow { range, reserved }
            if range == pages(99, 2) && reserved == pages(100, 1)));
    assert_eq!(error.errno(), 98);
    // With both faults, the overlap is reported.
    assert_eq!(refused(&[pages(99, 2), pages(100, 2)]).errno(), 22);
    assert_eq!(
        space.ranges().allowed,
        [pages(64, 4)],
        "a refused swap changes nothing"
    );

    // The order of ranges is free, and ranges that touch are joined. The first page is never
    // allocated.
    space
        .set_allowed(&[pages(70, 2), bytes(0, 2 * PAGE), pages(68, 2)])
        .unwrap();
    assert_eq!(space.ranges().allowed, [pages(0, 2), pages(68, 4)]);
    assert_eq!(place(&space, 4 * PAGE), 68 * PAGE);
    assert_eq!(place(&space, PAGE), PAGE);
    assert!(matches!(
        space.map_anywhere(PAGE, 0, RW),
        Err(Error::NoSpace { .. })
    ));
    // A map at a fixed address ignores the allowed ranges. An area stays when its range is no
    // longer allowed.
    space.map(pages(0, 1), 0, RW).unwrap();
    space.map(pages(500, 1), 0, RW).unwrap();
    // A single byte may be allowed, although no page fits.
    space.set_allowed(&[bytes(7, 1)]).unwrap();
    assert!(matches!(
        space.map_anywhere(PAGE, 0, RW),
        Err(Error::NoSpace { .. })
    ));
    space.set_allowed(&[]).unwrap();
    assert_eq!(place(&space, PAGE), 2 * PAGE);
    assert_eq!(space.mappings().len(), 5);
}

#[test]
fn what_is_reserved_is_a_hole_to_everyone_else() {
    let space = space();
    space.map(pages(0, 4), 0, RW).unwrap();
    space.map(pages(6, 4), 0, RW).unwrap();
    space.reserve(pages(4, 2)).unwrap();
    space.start_tracking().unwrap();
    assert!(space.lookup(Iova::new(4 * PAGE)).is_none());
    assert!(space.area(Iova::new(5 * PAGE)).is_none());
    assert!(matches!(space.mark(pages(3, 4)), Err(Error::Outside { at }) if at.get() == 4 * PAGE));
    let mut words = [0u64; 1];
    let request = HarvestRequest::new(pages(0, 10), Granule::K4).holes(Holes::Stop);
    let lease = space
        .harvest(&request, UserBitmap::new(&mut words))
        .unwrap();
    let stopped = lease.stopped().unwrap();
    assert_eq!(stopped.at.get(), 4 * PAGE);
    assert!(matches!(stopped.error, Error::Hole { at, .. } if at.get() == 4 * PAGE));
    lease.partial().sync().unwrap().commit();
    assert_eq!(words, [1 << 3]);
    assert_eq!(space.mappings().len(), 2);
    assert_eq!(space.unmap_discarding(pages(0, 10)).unwrap().areas, 2);
}

#[test]
fn the_report_is_a_partition_of_all_addresses() {
    let space = space();
    assert_eq!(space.ranges().holes, [IovaRange::ALL]);
    space.map(pages(0, 2), 0, RW).unwrap();
    space.map(pages(2, 1), 0, RW).unwrap();
    space.map(pages(5, 1), 0, Access::Read).unwrap();
    space.reserve(bytes(4 * PAGE, 10)).unwrap();
    space.reserve(bytes(u64::MAX, 1)).unwrap();
    let ranges = space.ranges();
    let mapped: Vec<_> = ranges.mappings.iter().map(|m| m.range).collect();
    assert_eq!(mapped, [pages(0, 2), pages(2, 1), pages(5, 1)]);
    assert_eq!(ranges.mappings, space.mappings());
    assert_eq!(
        ranges.holes,
        [
            pages(3, 1),
            bytes(4 * PAGE + 10, PAGE - 10),
            inclusive(6 * PAGE, u64::MAX - 1)
        ]
    );
    let all = mapped.iter().chain(&ranges.holes).chain(&ranges.reserved);
    assert_eq!(all.map(|range| range.len()).sum::<u128>(), 1 << 64);
    // Each hole that is reported can be mapped, as far as it has whole pages.
    space.map(ranges.holes[0], 0, RW).unwrap();
    space
        .map(inclusive(6 * PAGE, u64::MAX - PAGE), 0, RW)
        .unwrap();
}

/// Linux dropped its lock in the middle of an unmap and began again at the start, where a map had
/// used the addresses that were free by then: it unmapped the new area.
#[test]
fn an_unmap_never_takes_what_was_mapped_in_its_place() {
    // History: an unmap that went on from its start after it had let go of its lock took, or
    // stumbled over, a mapping that had reused the addresses (Linux, 2026).
    const ROUNDS: u64 = 3000;
    let space = AddressSpace::with_source(Granule::K4, Arc::new(Fake::default())).unwrap();
    // Few addresses, so that they are reused at once.
    space.set_allowed(&[pages(1, 8)]).unwrap();
    let (sender, receiver) = mpsc::channel::<(IovaRange, u64)>();
    std::thread::scope(|scope| {
        let space = &space;
        scope.spawn(move || {
            let mut kept = Vec::new();
            for n in 1..=ROUNDS {
                let backing = n * PAGE;
                let range = loop {
                    match space.map_anywhere(PAGE, backing, RW) {
                        Ok(range) => break range,
                        Err(Error::NoSpace { .. }) => std::thread::yield_now(),
                        Err(other) => panic!("{other}"),
                    }
                };
                kept.push((range, backing));
                // An area that was not handed over yet is still mapped.
                for (range, backing) in &kept {
                    let found = space.lookup(range.start()).map(|m| m.backing);
                    assert_eq!(found, Some(*backing), "somebody else's unmap took {range}");
                }
                if kept.len() > 3 {
                    sender.send(kept.remove(0)).unwrap();
                }
            }
        });
        scope.spawn(move || {
            for (range, backing) in receiver {
                assert_eq!(
                    space.lookup(range.start()).map(|m| m.backing),
                    Some(backing)
                );
                let done = space.unmap_discarding(range).unwrap();
                assert_eq!(done.areas, 1);
            }
        });
    });
    assert_eq!(space.mappings().len(), 3);
}

#[test]
fn racing_maps_reservations_and_allocations_agree() {
    for _ in 0..30 {
        let space = space();
        space.set_allowed(&[pages(1, 64)]).unwrap();
        let start = AtomicBool::new(false);
        std::thread::scope(|scope| {
            for half in [0, 1] {
                let (space, start) = (&space, &start);
                scope.spawn(move || {
                    while !start.load(Ordering::Acquire) {
                        std::hint::spin_loop();
                    }
                    for n in 0..32 {
                        // Each range is wanted by a map and by a reservation.
                        let wanted = pages(100 + n * 2, 2);
                        if half == 0 {
                            let _ = space.map(wanted, 0, RW);
                        } else {
                            let _ = space.reserve(wanted);
                        }
                        space.map_anywhere(PAGE, 0, RW).unwrap();
                    }
                });
            }
            start.store(true, Ordering::Release);
        });
        let ranges = space.ranges();
        let low = ranges
            .mappings
            .iter()
            .filter(|m| m.range.last() < Iova::new(65 * PAGE));
        assert_eq!(low.count(), 64);
        let taken: Vec<_> = ranges.mappings.iter().map(|m| m.range).collect();
        assert!(
            taken
                .iter()
                .all(|t| ranges.reserved.iter().all(|r| !t.intersects(*r)))
        );
        let high = taken
            .iter()
            .chain(&ranges.reserved)
            .filter(|r| r.start() >= Iova::new(100 * PAGE));
        assert_eq!(high.map(|r| r.len()).sum::<u128>(), 64 * u128::from(PAGE));
        assert!(space.map_anywhere(PAGE, 0, RW).is_err());
    }
}

#[test]
fn a_hundred_thousand_areas() {
    const COUNT: u64 = 100_000;
    let space = space();
    for n in 0..COUNT {
        assert_eq!(place(&space, PAGE), (n + 1) * PAGE);
    }
    // Single holes, searched from the lowest address up.
    for n in [COUNT - 1, 70_001, 500] {
        space.unmap_discarding(pages(n, 1)).unwrap();
    }
    assert_eq!(
        place(&space, 2 * PAGE),
        (COUNT + 2) * PAGE,
        "no hole is long enough"
    );
    for n in [500, 70_001, COUNT - 1, COUNT + 1] {
        assert_eq!(place(&space, PAGE), n * PAGE);
    }
    assert_eq!(space.ranges().holes.len(), 2);
    assert_eq!(
        space.unmap_discarding(IovaRange::ALL).unwrap().areas,
        COUNT + 2
    );
    assert_eq!(space.ranges().holes, [IovaRange::ALL]);
}
