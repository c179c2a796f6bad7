//! Memory that comes and goes.

use std::sync::Arc;

use dirtymap::{AddressSpace, Error, Granule, Iova, UserBitmap};

use crate::logs::Log;
use crate::{PAGE, RW, pages, range, take};

/// A device behind an IOMMU writes by IOVA. A bitmap as long as memory has no bit for an IOVA of
/// 0x7fff_0000_0000, and marks past its end are ignored in silence: no map had the write.
#[test]
fn a_write_at_a_high_iova_is_found_and_one_outside_is_an_error() {
    let high = range(0x7fff_0000_0000, 16 * PAGE);
    let space = AddressSpace::new(Granule::K4);
    space.map(high, 0, RW).unwrap();
    space.start_tracking().unwrap();
    let write = range(0x7fff_0000_3ffe, 4);
    space.mark(write).unwrap();
    assert_eq!(take(&space, high), [range(0x7fff_0000_3000, 2 * PAGE)]);
    // A write across the end of the area: the part inside is marked, the rest is an error, a count
    // and an entry of `faults`.
    let across = range(0x7fff_0000_fffe, 4);
    let error = space.mark(across).unwrap_err();
    assert!(matches!(error, Error::Outside { at } if at.get() == 0x7fff_0001_0000));
    assert_eq!(space.stats().outside_marks, 1);
    assert_eq!(space.faults().recent[0].at, Iova::new(0x7fff_0001_0000));
    assert_eq!(take(&space, high), [range(0x7fff_0000_f000, PAGE)]);
}

/// A back end kept the log of the moment at which logging began. Memory that was plugged in later
/// got a map without a log, and writes of devices to it were not logged until the log was next
/// replaced.
#[test]
fn memory_that_is_plugged_in_after_logging_began_is_logged() {
    let log = Arc::new(Log::new(pages(0, 64), Granule::K4));
    let space = AddressSpace::new(Granule::K4);
    space.map(pages(0, 16), 0, RW).unwrap();
    space.start_tracking().unwrap();
    space.attach(log.clone()).unwrap();
    space.map(pages(32, 16), 0, RW).unwrap();
    log.write(pages(40, 1));
    space.mark(pages(41, 1)).unwrap();
    assert_eq!(take(&space, pages(32, 16)), [pages(40, 2)]);
}

/// The converse: the logger looked at new mappings only, and missed those from before logging
/// began.
#[test]
fn memory_from_before_logging_began_is_logged() {
    let log = Arc::new(Log::new(pages(0, 64), Granule::K4));
    let space = AddressSpace::new(Granule::K4);
    space.attach(log.clone()).unwrap();
    space.map(pages(0, 16), 0, RW).unwrap();
    let handle = space.area(Iova::MIN).unwrap();
    space.start_tracking().unwrap();
    log.write(pages(3, 1));
    handle.mark(pages(5, 1)).unwrap();
    assert_eq!(take(&space, pages(0, 16)), [pages(3, 1), pages(5, 1)]);
}

/// A region was unplugged during a migration. Its dirty pages were dropped with its maps, although
/// its memory still existed and had not been copied.
#[test]
fn what_was_dirty_when_memory_goes_is_handed_over() {
    let log = Arc::new(Log::new(pages(0, 64), Granule::K4));
    let space = AddressSpace::new(Granule::K4);
    space.attach(log.clone()).unwrap();
    space.map(pages(0, 16), 0, RW).unwrap();
    space.start_tracking().unwrap();
    log.write(pages(3, 1));
    space.mark(pages(5, 1)).unwrap();
    let mut words = [0u64];
    let (unmapped, dirty) = space
        .unmap(pages(0, 16), Granule::K4, UserBitmap::new(&mut words))
        .unwrap();
    assert!(dirty.runs().eq([pages(3, 1), pages(5, 1)]));
    assert_eq!(
        (unmapped.dirty_bytes, unmapped.discarded_bytes),
        (2 * u128::from(PAGE), 0)
    );
}

/// A device was disconnected before its log was read for the last time. The log was dropped, and
/// with it the last writes of the device.
#[test]
fn what_a_device_wrote_before_it_went_is_there_when_it_is_gone() {
    let log = Arc::new(Log::new(pages(0, 64), Granule::K4));
    let space = AddressSpace::new(Granule::K4);
    let device = space.attach(log.clone()).unwrap();
    space.map(pages(0, 16), 0, RW).unwrap();
    space.start_tracking().unwrap();
    log.write(pages(3, 1));
    space.detach(device).unwrap();
    assert_eq!(take(&space, pages(0, 16)), [pages(3, 1)]);
}

/// A disk grew past the end of its map, and changes of blocks past that end were no longer
/// reported.
#[test]
fn memory_that_grows_keeps_what_is_dirty_and_tracks_the_rest() {
    let space = AddressSpace::new(Granule::K4);
    space.map(pages(0, 40_000), 0, RW).unwrap();
    space.start_tracking().unwrap();
    space.mark(pages(39_999, 1)).unwrap();
    space.map(pages(40_000, 60_000), 40_000 * PAGE, RW).unwrap();
    space.mark(pages(99_999, 1)).unwrap();
    // One write across the border of the two areas.
    space.mark(range(40_000 * PAGE - 1, 2)).unwrap();
    let expect = [pages(39_999, 2), pages(99_999, 1)];
    assert_eq!(take(&space, pages(0, 100_000)), expect);
}
