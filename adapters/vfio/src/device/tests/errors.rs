//! Every call of the device fails, and nothing is lost.

use dirtymap::{Access, Error, Granule, HarvestRequest, UserBitmap};

use super::fake::{Fake, Fault, pages};
use super::{Bench, inner};
use crate::{DeviceLog, DeviceLogError};

const RAM: u64 = 64;

fn bench(fake: &Fake) -> Bench {
    Bench::new(fake, &[pages(0, RAM)], &[pages(0, 32), pages(40, 8)])
}

fn all() -> Vec<dirtymap::IovaRange> {
    vec![pages(0, 32), pages(40, 8)]
}

/// By the kernel's documentation a log is corrupt after any error: a report may have cleared what
/// it did not tell, in other ranges too. So all areas are dirty, and a new log is started.
#[test]
fn after_a_report_that_fails_everything_is_dirty_and_a_new_log_is_started() {
    for errno in [
        libc::EIO,
        libc::EINVAL,
        libc::EFAULT,
        libc::ENOMEM,
        libc::ENOENT,
    ] {
        for late in [false, true] {
            let fake = Fake::new(Granule::K4);
            let bench = bench(&fake);
            fake.write(pages(3, 1).start());
            fake.write(pages(41, 1).start());
            fake.fail(Fault {
                late,
                ..Fault::once("report", errno)
            });
            let error = bench.try_take().unwrap_err();
            assert!(
                matches!(inner(&error), DeviceLogError::Lost { .. }),
                "{error}"
            );
            assert_eq!(bench.take(), all(), "errno {errno}, late {late}");
            assert_eq!((fake.count("start"), fake.count("stop")), (2, 1));
            assert_eq!(bench.log.restarts(), 1);
            fake.write(pages(5, 1).start());
            assert_eq!(bench.take(), [pages(5, 1)]);
        }
    }
}

/// The device is unplugged: the pages stay dirty through any number of harvests, and the detach
/// marks them.
#[test]
fn a_device_that_has_gone_leaves_everything_dirty() {
    let fake = Fake::new(Granule::K4);
    let bench = bench(&fake);
    let domain = bench.space.domains()[0];
    fake.write(pages(3, 1).start());
    for call in ["report", "start", "start"] {
        fake.fail(Fault::always(call, libc::ENODEV));
        let error = bench.try_take().unwrap_err();
        assert!(
            matches!(inner(&error), DeviceLogError::Gone { .. }),
            "{error}"
        );
    }
    bench.space.detach(domain).unwrap();
    assert_eq!(bench.take(), all());
}

/// A signal interrupts the report, which may have cleared a part by then.
#[test]
fn a_report_that_is_interrupted_is_made_again_and_everything_is_dirty() {
    let fake = Fake::new(Granule::K4);
    let bench = bench(&fake);
    fake.write(pages(3, 1).start());
    fake.fail(Fault::once("report", libc::EINTR));
    assert_eq!(bench.take(), all());
    assert_eq!(bench.log.restarts(), 0);
    fake.fail(Fault::always("report", libc::EINTR));
    let error = bench.try_take().unwrap_err();
    assert!(
        matches!(inner(&error), DeviceLogError::Lost { .. }),
        "{error}"
    );
    fake.mend();
    assert_eq!(bench.take(), all());
}

#[test]
fn a_report_that_panics_loses_nothing() {
    let fake = Fake::new(Granule::K4);
    let bench = bench(&fake);
    fake.write(pages(3, 1).start());
    fake.fail(Fault {
        panics: true,
        ..Fault::once("report", 0)
    });
    let taken = std::panic::AssertUnwindSafe(|| bench.take());
    std::panic::catch_unwind(taken).unwrap_err();
    assert_eq!(bench.take(), all());
}

/// The new log cannot be started for a while. Unmaps and switches meanwhile tell everything.
#[test]
fn a_log_that_cannot_be_restarted_keeps_everything_dirty() {
    let fake = Fake::new(Granule::K4);
    let bench = bench(&fake);
    assert_eq!(bench.take(), []);
    fake.fail(Fault::once("report", libc::EIO));
    bench.try_take().unwrap_err();
    fake.fail(Fault::always("start", libc::EINVAL));
    let error = bench.try_take().unwrap_err();
    assert!(
        matches!(inner(&error), DeviceLogError::NotStarted { .. }),
        "{error}"
    );
    let mut words = [0];
    let range = pages(40, 8);
    let bitmap = UserBitmap::new(&mut words);
    let (_, dirty) = bench.space.unmap(range, Granule::K4, bitmap).unwrap();
    assert!(dirty.runs().eq([range]));
    bench.space.stop_tracking().unwrap();
    assert_eq!(bench.take(), [pages(0, 32)]);
    assert_eq!(bench.take(), []);
    fake.mend();
    bench.space.start_tracking().unwrap();
    fake.write(pages(3, 1).start());
    assert_eq!(bench.take(), [pages(3, 1)]);
}

#[test]
fn each_refusal_of_a_start_says_what_to_do() {
    type Right = fn(&DeviceLogError) -> bool;
    let cases: [(i32, Right); 5] = [
        (libc::ENOTTY, |e| {
            matches!(e, DeviceLogError::CannotLog { .. })
        }),
        (libc::EOPNOTSUPP, |e| {
            matches!(e, DeviceLogError::CannotLog { .. })
        }),
        (libc::E2BIG, |e| {
            matches!(e, DeviceLogError::TooManyRanges { ranges: 1, .. })
        }),
        (libc::ENODEV, |e| matches!(e, DeviceLogError::Gone { .. })),
        (libc::EINVAL, |e| {
            matches!(e, DeviceLogError::NotStarted { ranges: 1, .. })
        }),
    ];
    for (errno, is_right) in cases {
        let fake = Fake::new(Granule::K4);
        let bench = Bench::quiet(&fake, &[pages(0, RAM)], &[pages(0, 32)]);
        fake.fail(Fault::once("start", errno));
        let error = bench.space.start_tracking().unwrap_err();
        assert!(is_right(inner(&error)), "errno {errno}: {error}");
        bench.space.start_tracking().unwrap();
        fake.write(pages(3, 1).start());
        assert_eq!(bench.take(), [pages(3, 1)]);
    }
}

/// A log that could not be stopped goes on, and can be stopped later. What it had is kept.
#[test]
fn a_stop_that_fails_keeps_the_log() {
    let fake = Fake::new(Granule::K4);
    let bench = bench(&fake);
    fake.write(pages(3, 1).start());
    fake.fail(Fault::once("stop", libc::EIO));
    let error = bench.space.stop_tracking().unwrap_err();
    assert!(
        matches!(inner(&error), DeviceLogError::NotStopped { .. }),
        "{error}"
    );
    fake.write(pages(4, 1).start());
    bench.space.stop_tracking().unwrap();
    assert_eq!(bench.take(), [pages(3, 2)]);
    assert!(fake.state().ranges.is_none());
}

/// Without memory for the bits the device is not asked, because it would clear what it cannot tell.
#[test]
fn without_memory_for_the_bits_the_device_is_not_asked() {
    let fake = Fake::new(Granule::K4);
    let mut log = DeviceLog::new(fake.clone(), Granule::K4, &[pages(0, RAM)]).unwrap();
    log.pool = dirtymap_host::BitPool::without_memory();
    let space = dirtymap::AddressSpace::with_source(Granule::K4, log).unwrap();
    space.map(pages(0, 32), 0, Access::ReadWrite).unwrap();
    space.start_tracking().unwrap();
    fake.write(pages(3, 1).start());
    let error = space.rounds().next().unwrap_err();
    assert!(
        matches!(inner(&error), DeviceLogError::NoMemory { .. }),
        "{error}"
    );
    assert_eq!(fake.count("report"), 0);
}

#[test]
fn bad_input_is_refused_before_the_device_is_asked() {
    let fake = Fake::new(Granule::K4);
    let small = Granule::from_lg2(11).unwrap();
    let refused = |page, ranges: &[_]| DeviceLog::new(fake.clone(), page, ranges).unwrap_err();
    assert!(matches!(refused(Granule::K4, &[]), DeviceLogError::NoRange));
    let error = refused(small, &[pages(0, 1)]);
    assert!(matches!(error, DeviceLogError::PageTooSmall { page } if page == small));
    let bench = bench(&fake);
    for range in [pages(60, 8), pages(64, 1), pages(1 << 40, 1)] {
        let error = bench.space.map(range, 0, Access::ReadWrite).unwrap_err();
        assert!(matches!(inner(&error), DeviceLogError::NotLogged { range: r } if *r == range));
        assert!(bench.space.lookup(range.start()).is_none());
    }
    // The device cannot write there.
    bench.space.map(pages(64, 1), 0, Access::Read).unwrap();
    bench.space.unmap_discarding(pages(64, 1)).unwrap();
}

/// A peek has to ask the device, which clears: the pages are pending then.
#[test]
fn a_peek_loses_nothing() {
    let fake = Fake::new(Granule::K4);
    let bench = bench(&fake);
    fake.write(pages(3, 1).start());
    let request = HarvestRequest::new(pages(0, RAM), Granule::K4);
    for _ in 0..2 {
        let mut words = [0];
        let seen = bench
            .space
            .peek(&request, UserBitmap::new(&mut words))
            .unwrap();
        assert_eq!(seen.count(), 1);
    }
    fake.fail(Fault::once("report", libc::EIO));
    let mut words = [0];
    let error = bench.space.peek(&request, UserBitmap::new(&mut words));
    assert!(matches!(error, Err(Error::Source(_))));
    assert_eq!(bench.take(), all());
}

/// The corrupt log cannot be stopped at first, so the new one cannot be started. The next harvest
/// tries both again: a log that was taken for gone after the first try would never be stopped.
#[test]
fn a_corrupt_log_that_could_not_be_stopped_is_stopped_by_the_next_harvest() {
    let fake = Fake::new(Granule::K4);
    let bench = bench(&fake);
    fake.fail(Fault::once("report", libc::EIO));
    bench.try_take().unwrap_err();
    fake.fail(Fault::once("stop", libc::EIO));
    let error = bench.try_take().unwrap_err();
    assert!(
        matches!(inner(&error), DeviceLogError::NotStarted { .. }),
        "{error}"
    );
    assert_eq!(bench.take(), all());
    fake.fail(Fault::once("report", libc::EIO));
    bench.try_take().unwrap_err();
    fake.fail(Fault::once("stop", libc::EIO));
    bench.try_take().unwrap_err();
    bench.space.stop_tracking().unwrap();
    assert!(fake.state().ranges.is_none(), "the device still logs");
}

/// The device logs in larger pages than it was asked for, so the log is stopped and started again.
/// The stop failed. From then on each start found a log that no call had stopped.
#[test]
fn a_log_that_a_failed_start_left_is_stopped_by_the_next_start() {
    let fake = Fake::new(Granule::M2);
    let bench = Bench::quiet(&fake, &[pages(0, RAM)], &[pages(0, 32)]);
    fake.fail(Fault::once("stop", libc::EIO));
    let error = bench.space.start_tracking().unwrap_err();
    assert!(
        matches!(inner(&error), DeviceLogError::NotStopped { .. }),
        "{error}"
    );
    bench.space.start_tracking().unwrap();
    fake.write(pages(3, 1).start());
    assert_eq!(bench.take(), [pages(0, 32)]);
}

/// The same after a switch to "off", whose stop failed because the log was corrupt.
#[test]
fn a_corrupt_log_that_a_switch_to_off_left_is_stopped_by_the_next_start() {
    let fake = Fake::new(Granule::K4);
    let bench = bench(&fake);
    fake.fail(Fault::once("report", libc::EIO));
    bench.try_take().unwrap_err();
    fake.fail(Fault::always("stop", libc::EIO));
    bench.space.stop_tracking().unwrap();
    fake.mend();
    assert!(fake.state().ranges.is_some(), "the device still logs");
    bench.space.start_tracking().unwrap();
    fake.write(pages(3, 1).start());
    assert_eq!(bench.take(), [pages(3, 1)]);
}

/// A source that is dropped after such an end stops what the device still logs.
#[test]
fn a_log_that_a_failed_start_left_is_stopped_when_the_source_is_dropped() {
    let fake = Fake::new(Granule::M2);
    let bench = Bench::quiet(&fake, &[pages(0, RAM)], &[pages(0, 32)]);
    fake.fail(Fault::once("stop", libc::EIO));
    bench.space.start_tracking().unwrap_err();
    drop(bench);
    assert!(fake.state().ranges.is_none(), "the device still logs");
}
