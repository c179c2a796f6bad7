//! The log for a client, against a model of one flag for each page.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use dirtymap::bitmap::Sink;
use dirtymap::source::{LeafSink, Stopped};
use dirtymap::{
    Access, AddressSpace, DirtySource, Error, Granule, Iova, IovaRange, Tracking, UserBitmap,
};

use super::{DmaLogger, DmaRange, LogError};

const PAGE: u64 = 4096;
const RW: Access = Access::ReadWrite;
const NONE: [u64; 0] = [];

fn dma(first: u64, pages: u64) -> DmaRange {
    DmaRange {
        iova: first * PAGE,
        length: pages * PAGE,
    }
}

fn pages(first: u64, n: u64) -> IovaRange {
    IovaRange::from_len(Iova::new(first * PAGE), n * PAGE).unwrap()
}

fn logger(page: Granule) -> DmaLogger {
    DmaLogger::new(Arc::new(AddressSpace::new(page)), "device")
}

/// The numbers of the pages that a report sets.
fn report(log: &DmaLogger, range: DmaRange, page: u64) -> Vec<u64> {
    let mut bits = vec![0; (range.length / page).div_ceil(8) as usize];
    log.report(range, page, &mut bits).unwrap();
    let first = range.iova / page;
    let is_set = |n: &u64| bits[((n - first) / 8) as usize] >> ((n - first) % 8) & 1 == 1;
    (first..first + range.length / page)
        .filter(is_set)
        .collect()
}

/// The bugs of libvfio-user with pages of two sizes: numbers of bits in eight bits. A page of the
/// space is 1024 pages of the client, and the other way round.
#[test]
fn pages_of_client_and_space_may_differ_by_more_than_256() {
    let log = logger(Granule::from_lg2(22).unwrap());
    log.space().map(pages(0, 4096), 0, RW).unwrap();
    assert_eq!(log.start(PAGE, &[dma(0, 4096)]).unwrap().lg2(), 22);
    log.space().mark(pages(1030, 1)).unwrap();
    assert_eq!(report(&log, dma(0, 4096), PAGE), Vec::from_iter(1024..2048));
    assert_eq!(report(&log, dma(0, 4096), PAGE), NONE);

    let log = logger(Granule::K4);
    log.space().map(pages(0, 4096), 0, RW).unwrap();
    assert_eq!(log.start(1 << 22, &[dma(0, 4096)]).unwrap(), Granule::K4);
    log.space().mark(pages(600, 1)).unwrap();
    log.space().mark(pages(3000, 1)).unwrap();
    assert_eq!(report(&log, dma(0, 4096), 1 << 22), [0, 2]);
    assert_eq!(report(&log, dma(0, 4096), PAGE), NONE);
}

/// A page of the space that a report covers in part is not clean around the report, and what was
/// reported is: else the last pages of two regions in one page would be dirty for ever.
#[test]
fn the_rest_of_a_page_stays_and_what_was_reported_does_not() {
    let log = logger(Granule::from_lg2(16).unwrap());
    log.space().map(pages(0, 64), 0, RW).unwrap();
    log.start(PAGE, &[dma(0, 64)]).unwrap();
    log.space().mark(pages(17, 1)).unwrap();
    assert_eq!(report(&log, dma(20, 4), PAGE), [20, 21, 22, 23]);
    assert_eq!(report(&log, dma(20, 4), PAGE), NONE);
    let rest = Vec::from_iter((16..20).chain(24..32));
    assert_eq!(report(&log, dma(0, 64), PAGE), rest);
    assert_eq!(report(&log, dma(0, 64), PAGE), NONE);
}

/// A client asks for sections of its memory: parts of areas, several areas, holes. libvfio-user
/// answers only for a range that is one mapping, to the byte (its issue 824).
#[test]
fn a_report_covers_parts_of_areas_and_holes() {
    let log = logger(Granule::K4);
    let space = log.space();
    space.map(pages(10, 10), 0, RW).unwrap();
    space.map(pages(20, 10), 0, RW).unwrap();
    space.map(pages(40, 10), 0, RW).unwrap();
    log.start(PAGE, &[dma(0, 50), dma(50, 50)]).unwrap();
    for page in [12, 19, 20, 41] {
        space.mark(pages(page, 1)).unwrap();
    }
    assert_eq!(report(&log, dma(15, 75), PAGE), [19, 20, 41]);
    assert_eq!(report(&log, dma(60, 10), PAGE), NONE);
    assert_eq!(report(&log, dma(0, 100), PAGE), [12]);
}

/// The log of an area began with the map that was there at the start of logging (libvfio-user 540,
/// cloud-hypervisor 8567): areas that come later are logged, and what was dirty in an area that
/// goes is told, also if another one has come to the same addresses.
#[test]
fn the_log_follows_map_and_unmap() {
    let log = logger(Granule::K4);
    let space = log.space();
    log.start(PAGE, &[dma(0, 100)]).unwrap();
    assert_eq!(report(&log, dma(0, 100), PAGE), NONE);
    space.map(pages(10, 10), 0, RW).unwrap();
    space.mark(pages(12, 1)).unwrap();
    space.mark(pages(14, 1)).unwrap();
    let mut told = Vec::new();
    log.unmap(pages(0, 50), |run| told.push(run)).unwrap();
    assert_eq!(told, [pages(12, 1), pages(14, 1)]);
    space.map(pages(10, 3), 0x10_0000, RW).unwrap();
    space.mark(pages(11, 1)).unwrap();
    assert_eq!(report(&log, dma(10, 3), PAGE), [11, 12]);
    assert_eq!(report(&log, dma(0, 100), PAGE), [14]);
    assert_eq!(report(&log, dma(0, 100), PAGE), NONE);
}

/// A migration of the emulator and two clients look at one memory, each with its own log.
#[test]
fn logs_and_harvests_of_one_space_do_not_take_from_each_other() {
    let space = Arc::new(AddressSpace::new(Granule::K4));
    let logs = ["a", "b"].map(|name| DmaLogger::new(Arc::clone(&space), name));
    space.map(pages(0, 64), 0, RW).unwrap();
    logs[0].start(PAGE, &[dma(0, 64)]).unwrap();
    space.mark(pages(3, 1)).unwrap();
    assert_eq!(space.rounds().next().unwrap().commit().bits_set, 1);
    logs[1].start(PAGE, &[dma(0, 64)]).unwrap();
    space.mark(pages(4, 1)).unwrap();
    assert_eq!(space.rounds().next().unwrap().commit().bits_set, 1);
    assert_eq!(report(&logs[1], dma(0, 64), PAGE), [4]);
    assert_eq!(report(&logs[0], dma(0, 64), PAGE), [3, 4]);
    logs[0].stop().unwrap();
    assert_eq!(space.consumers(), ["b"]);
}

/// A source that fails when it is told to.
struct Failing(Arc<AtomicBool>);

impl DirtySource for Failing {
    fn set_tracking(&self, _: Tracking) -> Result<(), Error> {
        Ok(())
    }

    fn read_and_clear(&self, range: IovaRange, _: &mut LeafSink<'_, '_>) -> Result<(), Stopped> {
        let error = Error::source_failed(std::io::Error::other("no answer"));
        match self.0.load(Ordering::Relaxed) {
            true => Err(Stopped {
                at: range.start(),
                error,
            }),
            false => Ok(()),
        }
    }

    fn peek(&self, _: IovaRange, _: &mut Sink<'_>) -> Result<(), Stopped> {
        Ok(())
    }
}

/// The log of a device in the kernel is corrupt after an error. Ours is as before.
#[test]
fn a_report_that_fails_loses_nothing() {
    let log = logger(Granule::from_lg2(16).unwrap());
    let fails = Arc::new(AtomicBool::new(false));
    log.space().attach(Failing(Arc::clone(&fails))).unwrap();
    log.space().map(pages(0, 64), 0, RW).unwrap();
    log.start(PAGE, &[dma(0, 64)]).unwrap();
    log.space().mark(pages(0, 1)).unwrap();
    assert_eq!(report(&log, dma(0, 8), PAGE).len(), 8);
    log.space().mark(pages(16, 1)).unwrap();
    fails.store(true, Ordering::Relaxed);
    let error = log.report(dma(0, 64), PAGE, &mut [0; 8]).unwrap_err();
    assert!(
        matches!(error, LogError::Space(Error::Source(_))),
        "{error}"
    );
    assert_eq!(error.errno(), 5);
    fails.store(false, Ordering::Relaxed);
    assert_eq!(report(&log, dma(0, 64), PAGE), Vec::from_iter(8..32));
}

#[test]
fn bad_input_is_refused_in_order() {
    let log = logger(Granule::K4);
    let mut bits = [0; 1];
    let mut report = |range, page| log.report(range, page, &mut bits).unwrap_err();
    for page in [0, 1, 512, 4095, 6000, 12288, u64::MAX] {
        let error = report(dma(0, 0), page);
        assert!(matches!(error, LogError::BadPageSize { page_size } if page_size == page));
        let error = log.start(page, &[]).unwrap_err();
        assert!(matches!(error, LogError::BadPageSize { .. }));
    }
    assert!(matches!(report(dma(0, 0), PAGE), LogError::Range(_)));
    let wraps = DmaRange {
        iova: u64::MAX - 4095,
        length: 8192,
    };
    assert!(matches!(report(wraps, PAGE), LogError::Range(_)));
    assert_eq!(report(wraps, PAGE).errno(), 75);
    assert!(matches!(
        report(dma(1, 2), 8192),
        LogError::Unaligned { .. }
    ));
    assert!(matches!(
        report(dma(0, 9), PAGE),
        LogError::ShortBitmap {
            bytes: 1,
            needed: 9,
            ..
        }
    ));
    assert!(matches!(report(dma(0, 8), PAGE), LogError::NotStarted));
    assert!(matches!(log.stop(), Err(LogError::NotStarted)));

    let start = |ranges: &[DmaRange]| log.start(PAGE, ranges).unwrap_err();
    assert!(matches!(start(&[]), LogError::RangeCount { count: 0, .. }));
    assert_eq!(start(&[]).errno(), 22);
    let many: Vec<_> = (0..257).map(|n| dma(2 * n, 1)).collect();
    assert!(matches!(
        start(&many),
        LogError::RangeCount {
            count: 257,
            most: 256
        }
    ));
    assert_eq!(start(&many).errno(), 7);
    assert!(matches!(start(&[dma(0, 1), dma(5, 0)]), LogError::Range(_)));
    assert!(matches!(start(&[wraps]), LogError::Range(_)));
    let odd = DmaRange {
        iova: 1,
        length: PAGE,
    };
    assert!(matches!(start(&[odd]), LogError::Unaligned { .. }));
    let error = start(&[dma(8, 4), dma(0, 9)]);
    assert!(matches!(error, LogError::Overlap { range, other }
        if range == pages(8, 4) && other == pages(0, 9)));
    assert!(
        log.space().consumers().is_empty(),
        "a start that fails begins nothing"
    );

    log.start(PAGE, &many[..256]).unwrap();
    assert!(matches!(start(&[dma(0, 1)]), LogError::Started));
    for (range, at) in [
        (dma(0, 2), 1),
        (dma(1, 1), 1),
        (dma(511, 1), 511),
        (dma(600, 1), 600),
    ] {
        let error = log.report(range, PAGE, &mut [0]).unwrap_err();
        assert!(
            matches!(error, LogError::NotLogged { at: a } if a.get() == at * PAGE),
            "{error}"
        );
    }
}

/// Bits outside of the report stay as they were, and the last address can be logged.
#[test]
fn a_report_stays_inside_of_its_bitmap() {
    let log = logger(Granule::K4);
    let top = (1 << 52) - 8;
    log.space().map(pages(top, 8), 0, RW).unwrap();
    log.start(PAGE, &[dma(top, 8)]).unwrap();
    log.space().mark(pages(top, 8)).unwrap();
    let mut bits = [0b0100_0000, 0xaa];
    let reported = log.report(dma(top + 2, 5), PAGE, &mut bits).unwrap();
    assert_eq!((bits, reported.bits_set), ([0b0101_1111, 0xaa], 5));
    let mut whole = [0];
    log.report(dma(top, 8), PAGE, &mut whole).unwrap();
    assert_eq!(whole, [0b1000_0011]);
}

/// Random programs over pages of several sizes, against a set of bytes in pages of 4096.
#[test]
fn random_programs_report_what_a_set_of_pages_says() {
    let mut state = 7u64;
    let mut below = |bound: u64| {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        (state >> 33) % bound
    };
    for round in 0..300 {
        let space_lg2 = [9, 12, 14, 16][below(4) as usize];
        let space_page = (1u64 << space_lg2).max(PAGE) / PAGE;
        let log = logger(Granule::from_lg2(space_lg2).unwrap());
        let mut dirty: BTreeSet<u64> = BTreeSet::new();
        let mut mapped: BTreeSet<u64> = BTreeSet::new();
        log.start(PAGE, &[dma(0, 128)]).unwrap();
        for _ in 0..60 {
            match below(4) {
                0 => {
                    let area = below(8) * 16;
                    if mapped.insert(area) {
                        log.space().map(pages(area, 16), 0, RW).unwrap();
                    } else if below(2) == 0 {
                        // An unmap returns what any consumer has not been told, the unnamed one
                        // too.
                        log.space().rounds().next().unwrap().commit();
                        log.unmap(pages(area, 16), |_| ()).unwrap();
                        mapped.remove(&area);
                    }
                }
                1 | 2 => {
                    let page = below(128);
                    if log.space().mark(pages(page, 1)).is_ok() {
                        let first = page / space_page * space_page;
                        dirty.extend(first..first + space_page);
                    }
                }
                _ => {
                    let lg2 = below(5);
                    let first = below(128) >> lg2 << lg2;
                    let n = (1 + below(128 - first)).next_multiple_of(1 << lg2);
                    let n = n.min(128 - first);
                    let told = report(&log, dma(first, n), PAGE << lg2);
                    let asked: Vec<u64> = dirty.range(first..first + n).copied().collect();
                    let mut expect: Vec<u64> = asked.iter().map(|page| page >> lg2).collect();
                    expect.dedup();
                    assert_eq!(told, expect, "round {round}");
                    asked.iter().for_each(|page| {
                        dirty.remove(page);
                    });
                }
            }
        }
    }
}

/// The callback of an unmap ran under the lock of the log. An emulator that called the log from
/// there waited for itself, for ever.
#[test]
fn the_callback_of_an_unmap_may_call_the_log() {
    let log = logger(Granule::K4);
    log.start(PAGE, &[dma(0, 64)]).unwrap();
    log.space().map(pages(0, 32), 0, RW).unwrap();
    log.space().map(pages(32, 32), 0, RW).unwrap();
    log.space().mark(pages(3, 1)).unwrap();
    log.space().mark(pages(40, 1)).unwrap();
    let mut reported = Vec::new();
    log.unmap(pages(0, 32), |run| {
        assert_eq!(run, pages(3, 1));
        reported = report(&log, dma(0, 64), PAGE);
        log.unmap(pages(32, 32), |_| ()).unwrap();
        log.stop().unwrap();
    })
    .unwrap();
    assert_eq!(reported, [3, 40], "the log has page 3 before the callback");
}

/// A stop freed the log first and the name of its consumer later. A start in between found the name
/// in use, and the client got the error of a broken device.
#[test]
fn a_start_beside_a_stop_finds_the_log_started_or_free() {
    let log = logger(Granule::K4);
    let turns = || {
        for _ in 0..3000 {
            match log.start(PAGE, &[dma(0, 64)]) {
                Ok(_) | Err(LogError::Started) => (),
                Err(other) => panic!("{other}"),
            }
            match log.stop() {
                Ok(()) | Err(LogError::NotStarted) => (),
                Err(other) => panic!("{other}"),
            }
        }
    };
    std::thread::scope(|scope| {
        scope.spawn(turns);
        scope.spawn(turns);
    });
}

/// A client that sends anything gets an error, and reserves no memory by a length.
#[test]
fn messages_that_are_none_are_refused() {
    let log = logger(Granule::K4);
    let message = |argsz: u32, flags: u32, rest: &[u64]| -> Vec<u8> {
        let mut bytes = [argsz.to_le_bytes(), flags.to_le_bytes()].concat();
        rest.iter()
            .for_each(|word| bytes.extend(word.to_le_bytes()));
        bytes
    };
    let ask = |bytes: &[u8]| log.device_feature(bytes, 1 << 20);
    let is_bad = |bytes: &[u8]| matches!(ask(bytes), Err(LogError::BadMessage { .. }));
    for len in 0..8 {
        assert!(is_bad(&message(8, 1 << 17 | 7, &[])[..len]), "{len} bytes");
    }
    assert!(matches!(ask(&message(8, 1 << 16 | 2, &[])), Ok(None)));
    for feature in [6, 7, 8] {
        let probe = message(8, 1 << 18 | feature, &[]);
        assert_eq!(ask(&probe).unwrap().unwrap(), probe);
        assert!(is_bad(&message(8, feature, &[])));
        let wrong = if feature == 8 { 1 << 17 } else { 1 << 16 };
        assert!(is_bad(&message(8, wrong | feature, &[1, 1])));
        assert!(is_bad(&message(8, 1 << 18 | wrong | feature, &[])));
    }
    let start = message(40, 1 << 17 | 6, &[PAGE, 1, 0, 1 << 20]);
    for len in 8..40 {
        assert!(is_bad(&start[..len]), "{len} bytes of a start");
    }
    assert!(is_bad(&message(
        40,
        1 << 17 | 6,
        &[PAGE, u64::from(u32::MAX), 0, PAGE]
    )));
    let reply = ask(&start).unwrap().unwrap();
    assert_eq!(reply, start);
    assert!(matches!(ask(&start), Err(LogError::Started)));
    let get = 1 << 16 | 8;
    for len in 8..32 {
        assert!(is_bad(&message(40, get, &[0, PAGE, PAGE])[..len]));
    }
    assert!(is_bad(&message(39, get, &[0, PAGE, PAGE])));
    let all = message(u32::MAX, get, &[0, u64::MAX, PAGE]);
    assert!(matches!(ask(&all), Err(LogError::TooLarge { .. })));
    let none = message(40, get, &[0, PAGE, 0]);
    assert!(matches!(
        ask(&none),
        Err(LogError::BadPageSize { page_size: 0 })
    ));
    assert_eq!(
        ask(&message(40, get, &[0, PAGE, PAGE]))
            .unwrap()
            .unwrap()
            .len(),
        40
    );
    let stop = message(8, 1 << 17 | 7, &[]);
    assert_eq!(ask(&stop).unwrap().unwrap(), stop);
    assert!(matches!(ask(&stop), Err(LogError::NotStarted)));
}

/// What an unmap of the space returns is not in the log: the caller has it.
#[test]
fn an_unmap_past_the_log_has_the_pages_itself() {
    let log = logger(Granule::K4);
    log.space().map(pages(0, 64), 0, RW).unwrap();
    log.start(PAGE, &[dma(0, 64)]).unwrap();
    log.space().mark(pages(3, 1)).unwrap();
    let mut words = [0];
    let bitmap = UserBitmap::new(&mut words);
    log.space()
        .unmap(pages(0, 64), Granule::K4, bitmap)
        .unwrap();
    assert_eq!(words, [1 << 3]);
    assert_eq!(report(&log, dma(0, 64), PAGE), NONE);
}

/// The client maps, lets a device write, and unmaps, at ever new addresses that it does not log. No
/// report returns these, so they take no memory: 4 KiB for each 128 MiB in which there was one.
#[test]
fn what_no_report_can_return_is_not_kept() {
    let log = logger(Granule::from_lg2(14).unwrap());
    log.start(PAGE, &[dma(0, 62), dma(100, 4)]).unwrap();
    for area in [pages(0, 64), pages(96, 16), pages(1 << 20, 64)] {
        log.space().map(area, 0, RW).unwrap();
        log.space().mark(area).unwrap();
        log.unmap(area, |_| ()).unwrap();
    }
    let kept = || {
        let session = log.session.lock().unwrap();
        session.as_ref().unwrap().left().unwrap().count()
    };
    assert_eq!(kept(), 62 + 4);
    assert_eq!(report(&log, dma(0, 62), PAGE), Vec::from_iter(0..62));
    assert_eq!(report(&log, dma(100, 4), PAGE), Vec::from_iter(100..104));
    // A page of the space that reaches past the log.
    log.space().map(pages(0, 64), 0, RW).unwrap();
    log.space().mark(pages(61, 3)).unwrap();
    assert_eq!(report(&log, dma(61, 1), PAGE), [61]);
    assert_eq!(kept(), 1, "page 60");
}
