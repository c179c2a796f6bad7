//! Harvests that skip subtrees that no device walked through: for every format that has A above its
//! leaves, no write is lost, and many subtrees are skipped.

#![allow(clippy::unwrap_used)] // helpers of tests

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;

use dirtymap::source::{FlushGather, LeafSink};
use dirtymap::{Access, DirtySource, Granule, Iova, IovaRange, Mapping, Tracking, UserBitmap};
use pagetable_sim::{
    AmdHost, AmdV1, ArmS1, Breakage, Device, DeviceConfig, Domain, DomainConfig, Format,
    PhysMemory, VtdSs, X86_64,
};

const K4: u64 = 4096;
/// The pages below one entry of level 1.
const SPAN: u64 = 512;
const SPANS: u64 = 16;
const ALL: u64 = SPAN * SPANS;

fn pages(first: u64, count: u64) -> IovaRange {
    IovaRange::from_len(Iova::new(first * K4), count * K4).unwrap()
}

/// All pages, mapped one by one, and tracked.
fn domain<F: Format>() -> Arc<Domain<F>> {
    let config = DomainConfig {
        max_leaf: Granule::K4,
        skip_quiet: true,
        ..DomainConfig::default()
    };
    let memory = Arc::new(PhysMemory::new(ALL * K4).unwrap());
    let domain = Domain::with_format(memory, config);
    domain
        .map(&Mapping {
            range: pages(0, ALL),
            backing: 0,
            access: Access::ReadWrite,
        })
        .unwrap();
    domain.set_tracking(Tracking::On).unwrap();
    domain
}

/// The dirty pages of `range`, and the debt for them.
fn read<F: Format>(domain: &Domain<F>, range: IovaRange) -> (Vec<u64>, FlushGather) {
    let mut words = vec![0; range.granules(Granule::K4).div_ceil(64) as usize];
    let mut gather = FlushGather::new();
    let view = UserBitmap::new(&mut words)
        .view(range, Granule::K4)
        .unwrap();
    domain
        .read_and_clear(range, &mut LeafSink::new(&mut view.sink(), &mut gather))
        .unwrap();
    let dirty = view
        .runs()
        .flat_map(|run| run.start().get() / K4..=run.last().get() / K4)
        .collect();
    (dirty, gather)
}

/// Harvests everything and flushes.
fn pass<F: Format>(domain: &Domain<F>) -> Vec<u64> {
    let (dirty, gather) = read(domain, pages(0, ALL));
    domain.invalidate(&gather).unwrap();
    dirty
}

/// The number of dirty pages.
fn peek<F: Format>(domain: &Domain<F>) -> u64 {
    let mut words = vec![0; (ALL / 64) as usize];
    let view = UserBitmap::new(&mut words)
        .view(pages(0, ALL), Granule::K4)
        .unwrap();
    domain.peek(pages(0, ALL), &mut view.sink()).unwrap();
    view.count()
}

/// The number of subtrees that a pass without dirty pages skips.
fn skipped<F: Format>(domain: &Domain<F>) -> u64 {
    let before = domain.stats().skipped;
    assert_eq!(pass(domain), [0u64; 0]);
    domain.stats().skipped - before
}

fn write<F: Format>(device: &mut Device<F>, page: u64) {
    device.write(Iova::new(page * K4), b"written").unwrap();
    device.quiesce();
}

/// Makes everything quiet: clear and flush, look, skip.
fn settle<F: Format>(domain: &Domain<F>) {
    for _ in 0..3 {
        pass(domain);
    }
    assert_eq!(skipped(domain), SPANS, "{}", F::NAME);
}

fn what_is_quiet_is_skipped_until_it_is_written<F: Format>() {
    let domain = domain::<F>();
    assert_eq!(skipped(&domain), 0, "nothing is known yet");
    let mut device = domain.attach(DeviceConfig::default());
    write(&mut device, 3);
    write(&mut device, SPAN + 5);
    assert_eq!(pass(&domain), [3, SPAN + 5]);
    settle(&domain);
    // By a walk from the root, and then by the pointer that it cached.
    for page in [7, 9, 2 * SPAN - 1] {
        write(&mut device, page);
        assert_eq!(peek(&domain), 1);
        assert_eq!(pass(&domain), [page]);
        assert_eq!(peek(&domain), 0);
    }
    // The clear of A, and a write by a cached pointer before the flush, between flush and look, and
    // after the look.
    settle(&domain);
    write(&mut device, 1);
    assert_eq!(pass(&domain), [1]);
    let (none, cleared) = read(&domain, pages(0, ALL));
    assert!(none.is_empty() && cleared.tables());
    write(&mut device, 2);
    domain.invalidate(&cleared).unwrap();
    write(&mut device, 3);
    assert_eq!(pass(&domain), [2, 3]);
    settle(&domain);
    write(&mut device, 4);
    assert_eq!(pass(&domain), [4]);
    // A read walks, too.
    settle(&domain);
    device.read(Iova::new(8 * K4), &mut [0]).unwrap();
    device.quiesce();
    assert_eq!(skipped(&domain), SPANS - 1);
}

fn changes_by_hand_and_of_tracking_are_seen<F: Format>() {
    let domain = domain::<F>();
    let table = domain.table();
    settle(&domain);
    table.make_dirty(pages(17, 1)).unwrap();
    table.set_dirty(Iova::new(3 * SPAN * K4)).unwrap();
    assert_eq!(pass(&domain), [17, 3 * SPAN]);
    settle(&domain);
    // A merge makes the leaf dirty, a split its parts.
    assert!(domain.merge(pages(0, SPAN), F::size(1)).unwrap() > 0);
    assert_eq!(pass(&domain).len() as u64, SPAN);
    let mut gather = FlushGather::new();
    table.make_dirty(pages(1, 1)).unwrap();
    domain.split_at(Iova::new(9 * K4), &mut gather).unwrap();
    domain.invalidate(&gather).unwrap();
    assert_eq!(pass(&domain).len() as u64, SPAN);
    // A range that is unmapped and mapped anew is clean, and is written by a walk.
    domain.unmap(pages(5 * SPAN, SPAN), &mut gather, &mut |_| ());
    domain.invalidate(&gather).unwrap();
    domain
        .map(&Mapping {
            range: pages(5 * SPAN, SPAN),
            backing: 0,
            access: Access::ReadWrite,
        })
        .unwrap();
    let mut device = domain.attach(DeviceConfig::default());
    write(&mut device, 5 * SPAN + 1);
    assert_eq!(pass(&domain), [5 * SPAN + 1]);
    // Untracked walks set no A, and cache pointers to tables. Enabling makes devices forget them.
    for _ in 0..3 {
        pass(&domain);
    }
    domain.set_tracking(Tracking::Off).unwrap();
    write(&mut device, 6 * SPAN);
    domain.set_tracking(Tracking::On).unwrap();
    write(&mut device, 6 * SPAN + 1);
    assert_eq!(pass(&domain), [6 * SPAN + 1]);
}

/// A harvest that does not take every dirty page makes no subtree quiet.
fn a_look_that_leaves_something_does_not_count<F: Format>() {
    let domain = domain::<F>();
    settle(&domain);
    let mut device = domain.attach(DeviceConfig::default());
    write(&mut device, 1);
    assert_eq!(pass(&domain), [1]);
    let (_, cleared) = read(&domain, pages(0, ALL));
    // By the cached pointer to the table, so A stays clear.
    write(&mut device, 100);
    domain.invalidate(&cleared).unwrap();
    // A is clear, and the flush is over: the next look counts. Its bitmap ends before the page.
    let mut words = [0; 1];
    let view = UserBitmap::new(&mut words)
        .view(pages(0, 64), Granule::K4)
        .unwrap();
    let mut gather = FlushGather::new();
    let mut sink = view.sink();
    let mut out = LeafSink::new(&mut sink, &mut gather);
    domain.read_and_clear(pages(0, ALL), &mut out).unwrap();
    domain.invalidate(&gather).unwrap();
    assert_eq!(pass(&domain), [100]);
    settle(&domain);
}

/// A merge makes a writable leaf that replaces a table dirty. A quiet entry above would make
/// harvests skip the leaf, so the merge makes all entries above hot.
fn a_merge_under_a_quiet_table_is_reported<F: Format>() {
    let domain = domain::<F>();
    // The whole range of one entry of level 2, so that this entry can become quiet.
    let whole = IovaRange::granule_at(Iova::MIN, F::size(2));
    let pass = || {
        let (dirty, gather) = read(&domain, whole);
        domain.invalidate(&gather).unwrap();
        dirty.len() as u64
    };
    for _ in 0..6 {
        assert_eq!(pass(), 0);
    }
    let skipped = domain.stats().skipped;
    assert_eq!(pass(), 0);
    assert_eq!(domain.stats().skipped - skipped, 1, "all of it at once");
    let table = domain.table();
    let mut merged = 0;
    table
        .merge(pages(SPAN, SPAN), F::size(1), |_, _, table| {
            merged += u64::from(table);
        })
        .unwrap();
    assert_eq!((merged, pass()), (1, SPAN), "{}", F::NAME);
}

/// Without a flush of pointers to tables a device uses the one that it caches, and sets no A.
fn a_flush_of_leaves_alone_loses_writes<F: Format>(breakage: Breakage) -> bool {
    let domain = domain::<F>();
    let mut device = domain.attach(DeviceConfig::default());
    write(&mut device, 1);
    domain.break_hardware(breakage);
    for _ in 0..4 {
        pass(&domain);
    }
    write(&mut device, 2);
    pass(&domain) != [2]
}

/// Two devices and two harvesters; returns how many pages of the copy differ in the end.
fn storm<F: Format>(seed: u64) -> usize {
    let domain = domain::<F>();
    let copy: Vec<_> = (0..ALL).map(|_| Mutex::new([0; K4 as usize])).collect();
    let (stop, rounds) = (AtomicBool::new(false), AtomicU64::new(0));
    let rounds = &rounds;
    let round = |range| {
        let (dirty, gather) = read(&domain, range);
        domain.invalidate(&gather).unwrap();
        for page in dirty {
            let mut to = copy[page as usize].lock().unwrap();
            domain.memory().read(page * K4, &mut to[..]).unwrap();
        }
    };
    let random = |seed: u64| {
        let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
        move |below: u64| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 16) % below
        }
    };
    thread::scope(|scope| {
        let devices: Vec<_> = (0..2)
            .map(|me| {
                let mut device = domain.attach(DeviceConfig {
                    iotlb_sets: 4,
                    iotlb_ways: 2,
                    walk_entries: 16,
                    tlb_entries: 4 * me as usize,
                    posted_writes: 20,
                    ..DeviceConfig::DEFAULT
                });
                let mut random = random(seed + me);
                scope.spawn(move || {
                    for _ in 0..60 {
                        // Writes for a while in one or two spans, which are quiet by now, and then
                        // rests.
                        let spans = [random(SPANS), random(SPANS)];
                        for _ in 0..random(200) {
                            let page = spans[random(2) as usize] * SPAN + random(8) * 37;
                            let at = page * K4 + random(500) * 8;
                            device
                                .write(Iova::new(at), &random(1 << 40).to_le_bytes())
                                .unwrap();
                            device.service();
                        }
                        // Relaxed: only says how long to rest.
                        let until = rounds.load(Ordering::Relaxed) + random(6);
                        while rounds.load(Ordering::Relaxed) < until {
                            device.service();
                            thread::yield_now();
                        }
                    }
                })
            })
            .collect();
        for me in 2..4 {
            let (mut random, stop, round) = (random(seed + me), &stop, &round);
            scope.spawn(move || {
                // Relaxed: only says when to stop.
                while !stop.load(Ordering::Relaxed) {
                    match random(6) {
                        0 => {
                            let first = random(ALL);
                            round(pages(first, 1 + random(ALL - first)));
                        }
                        _ => round(pages(0, ALL)),
                    }
                    rounds.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        for device in devices {
            device.join().unwrap();
        }
        stop.store(true, Ordering::Relaxed);
    });
    round(pages(0, ALL));
    assert!(
        domain.stats().skipped > 0,
        "{}: {:?}",
        F::NAME,
        domain.stats()
    );
    let mut now = [0; K4 as usize];
    (0..ALL)
        .filter(|page| {
            domain.memory().read(page * K4, &mut now).unwrap();
            *copy[*page as usize].lock().unwrap() != now
        })
        .count()
}

macro_rules! for_formats_with_a {
    ($($name:ident: $format:ty),* $(,)?) => {$(
        mod $name {
            use super::*;

            #[test]
            fn quiet() {
                what_is_quiet_is_skipped_until_it_is_written::<$format>();
                changes_by_hand_and_of_tracking_are_seen::<$format>();
                a_look_that_leaves_something_does_not_count::<$format>();
                a_merge_under_a_quiet_table_is_reported::<$format>();
            }

            #[test]
            fn breaks_without_flushes_of_tables() {
                assert!(!a_flush_of_leaves_alone_loses_writes::<$format>(Breakage::None));
                assert!(a_flush_of_leaves_alone_loses_writes::<$format>(Breakage::SkipNonLeaf));
            }

            #[test]
            fn no_write_is_lost_in_a_storm() {
                let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
                let seed = now.unwrap().as_nanos() as u64;
                assert_eq!(storm::<$format>(seed), 0, "seed {seed}");
            }
        }
    )*};
}

for_formats_with_a!(
    amd: AmdV1,
    amd_6: AmdHost<6>,
    vtd: VtdSs,
    vtd_3: VtdSs<3>,
    vtd_5: VtdSs<5>,
    x86_64: X86_64,
    x86_64_5: X86_64<5>,
);

#[test]
fn formats_without_a_above_leaves_skip_nothing() {
    let domain = domain::<ArmS1>();
    for _ in 0..4 {
        assert_eq!(skipped(&domain), 0);
    }
    assert_eq!(domain.stats().invalidations, 1, "only that of enabling");
}
