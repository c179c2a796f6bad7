//! Ranges, pages and areas.

use dirtymap::{Access, AddressSpace, Granule, HarvestRequest, UserBitmap};

use super::Bench;
use super::fake::{Fake, pages};
use crate::{DeviceLog, DeviceLogError, MAX_RANGES};

/// A device that logs in pages of 2 MiB clears such a page with each report that touches it. The
/// rest of it belongs to another area, or to no request.
#[test]
fn a_device_with_larger_pages_is_asked_for_whole_ones() {
    let fake = Fake::new(Granule::M2);
    let bench = Bench::new(&fake, &[pages(5, 900)], &[pages(5, 100), pages(200, 600)]);
    assert_eq!(fake.state().ranges, Some(vec![pages(0, 1024)]));
    assert_eq!((fake.count("start"), fake.count("stop")), (2, 1));
    fake.write(pages(700, 1).start());
    fake.write(pages(7, 1).start());
    let mut words = [0; 2];
    let request = HarvestRequest::new(pages(5, 100), Granule::K4);
    let lease = bench
        .space
        .harvest(&request, UserBitmap::new(&mut words))
        .unwrap();
    assert_eq!(lease.sync().unwrap().commit().bits_set, 100);
    assert!(
        fake.state()
            .asked
            .iter()
            .all(|ask| ask.is_aligned(Granule::M2))
    );
    assert_eq!(bench.take(), [pages(200, 600)]);
    assert_eq!(bench.take(), []);
}

/// The pages of a device may be too large for a report, or be none.
#[test]
fn a_page_of_the_device_that_no_report_has_is_refused() {
    let fake = Fake::new(Granule::from_lg2(40).unwrap());
    let log = DeviceLog::new(fake.clone(), Granule::K4, &[pages(5, 100)]).unwrap();
    let space = AddressSpace::with_source(Granule::K4, log).unwrap();
    let error = space.start_tracking().unwrap_err();
    let bytes = 1 << 40;
    assert!(
        matches!(super::inner(&error), DeviceLogError::BadPage { bytes: b, .. } if *b == bytes)
    );
    assert!(fake.state().ranges.is_none(), "the log goes on");
}

#[test]
fn more_ranges_than_the_device_takes_are_joined() {
    let fake = Fake::new(Granule::K4);
    let ranges: Vec<_> = (0..300).map(|n| pages(4 * n + n % 3, 1)).collect();
    let bench = Bench::new(&fake, &ranges, &[ranges[299]]);
    let started = fake.state().ranges.clone().unwrap();
    assert!(started.len() <= MAX_RANGES, "{} ranges", started.len());
    let covered = |range| started.iter().any(|s| s.covers(range));
    assert!(ranges.iter().all(|range| covered(*range)));
    fake.write(ranges[299].start());
    assert_eq!(bench.take(), [ranges[299]]);

    let fake = Fake::new(Granule::K4);
    fake.state().most = 2;
    let log = DeviceLog::new(fake.clone(), Granule::K4, &ranges).unwrap();
    let space = AddressSpace::with_source(Granule::K4, log.max_ranges(2)).unwrap();
    space.start_tracking().unwrap();
    assert!(
        fake.state()
            .ranges
            .as_ref()
            .is_some_and(|ranges| ranges.len() <= 2)
    );
}

/// Areas come and go inside of the ranges, as a guest with a virtual IOMMU maps and unmaps. The
/// reports ask for what is mapped, and no page of an area that has gone appears in a later one.
#[test]
fn areas_come_and_go_while_the_device_logs() {
    let fake = Fake::new(Granule::K4);
    let bench = Bench::new(&fake, &[pages(0, 1 << 30)], &[]);
    bench
        .space
        .map(pages(100, 50), 0, Access::ReadWrite)
        .unwrap();
    bench
        .space
        .map(pages(32768 * 3, 1), 0, Access::ReadWrite)
        .unwrap();
    fake.write(pages(120, 1).start());
    bench.space.cut(pages(130, 1).start()).unwrap();
    fake.write(pages(140, 1).start());
    let mut words = [0];
    let upper = pages(130, 20);
    let (_, dirty) = bench
        .space
        .unmap(upper, Granule::K4, UserBitmap::new(&mut words))
        .unwrap();
    assert!(dirty.runs().eq([pages(140, 1)]));
    bench.space.map(upper, 0, Access::ReadWrite).unwrap();
    assert_eq!(bench.take(), [pages(120, 1)]);
    assert_eq!(fake.state().asked.last(), Some(&pages(32768 * 3, 1)));
    bench.space.unmap_discarding(pages(0, 32768 * 4)).unwrap();
    assert_eq!(super::chunks(&bench.log), 0);
}

/// A report of more pages than the kernel pins bits for at a time is several.
#[test]
fn a_large_area_is_asked_for_in_windows() {
    let fake = Fake::new(Granule::K4);
    let range = pages(3, (1 << 24) + 5);
    let bench = Bench::new(&fake, &[range], &[range]);
    let last = pages((1 << 24) + 7, 1);
    fake.write(last.start());
    assert_eq!(bench.take(), [last]);
    assert_eq!(
        fake.state().asked,
        [pages(3, 1 << 24), pages((1 << 24) + 3, 5)]
    );
}

/// The log ends with its source, so that the next program can start one.
#[test]
fn a_source_that_is_dropped_stops_its_log() {
    let fake = Fake::new(Granule::K4);
    let bench = Bench::new(&fake, &[pages(0, 64)], &[pages(0, 64)]);
    drop(bench);
    assert!(fake.state().ranges.is_none());
}
