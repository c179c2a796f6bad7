//! Devices on a domain: DMA, faults, and flushes that are done, forgotten, or broken.

mod access;
mod caches;
mod precopy;

use std::sync::atomic::{AtomicBool, Ordering};

use super::*;
use crate::{DmaError, Domain, DomainConfig, DomainStats, FaultKind, PhysMemory, X86_64};
use dirtymap::source::{FlushGather, LeafSink};
use dirtymap::{Access, DirtySource, Iova, Mapping, Tracking, UserBitmap};

const K4: u64 = 1 << 12;
const BASE: u64 = 0x4000_0000;

fn range(start: u64, len: u64) -> IovaRange {
    IovaRange::from_len(Iova::new(start), len).unwrap()
}

/// A domain that maps `pages` pages from `BASE` on to the memory from 0 on.
fn domain(pages: u64, max_leaf: Granule) -> Arc<Domain> {
    domain_of(pages, max_leaf)
}

/// The same in any format.
fn domain_of<F: Format>(pages: u64, max_leaf: Granule) -> Arc<Domain<F>> {
    let memory = Arc::new(PhysMemory::new(pages * K4).unwrap());
    let domain = Domain::with_format(
        memory,
        DomainConfig {
            max_leaf,
            ..DomainConfig::default()
        },
    );
    let mapping = Mapping {
        range: range(BASE, pages * K4),
        backing: 0,
        access: Access::ReadWrite,
    };
    domain.map(&mapping).unwrap();
    domain
}

/// Reads and clears; returns the dirty pages, counted from `BASE`, and the debt. No flush.
fn harvest<F: Format>(domain: &Domain<F>, pages: u64) -> (Vec<u64>, FlushGather) {
    let mut words = vec![0u64; pages.div_ceil(64) as usize];
    let all = range(BASE, pages * K4);
    let mut gather = FlushGather::new();
    let view = UserBitmap::new(&mut words).view(all, Granule::K4).unwrap();
    domain
        .read_and_clear(all, &mut LeafSink::new(&mut view.sink(), &mut gather))
        .unwrap();
    let dirty = view
        .runs()
        .flat_map(|r| ((r.start().get() - BASE) / K4)..=((r.last().get() - BASE) / K4))
        .collect();
    (dirty, gather)
}

fn at(page: u64, offset: u64) -> Iova {
    Iova::new(BASE + page * K4 + offset)
}

fn bytes(memory: &PhysMemory, phys: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    memory.read(phys, &mut bytes).unwrap();
    bytes
}

#[test]
fn writes_cross_pages_at_any_length_and_alignment() {
    for max_leaf in [Granule::K4, Granule::M2] {
        let domain = domain(1024, max_leaf);
        let mut device = domain.attach(DeviceConfig {
            posted_writes: 3,
            ..DeviceConfig::default()
        });
        let mut model = vec![0u8; 1024 * K4 as usize];
        let mut x = 0x1234_5678_9abc_def1u64;
        for round in 0..300 {
            x ^= x << 13;
            x ^= x >> 7;
            x ^= x << 17;
            let offset = (x >> 20) as usize % (model.len() - 20_000);
            let len = (x >> 50) as usize % 17_000;
            let data: Vec<u8> = (0..len)
                .map(|i| (i as u8).wrapping_mul(7).wrapping_add(round as u8))
                .collect();
            device.write(at(0, offset as u64), &data).unwrap();
            model[offset..offset + len].copy_from_slice(&data);
            assert!(device.in_flight() <= 3);
            if round % 16 == 0 {
                let mut back = vec![0; len + 100];
                device.read(at(0, offset as u64), &mut back).unwrap();
                assert_eq!(
                    back,
                    model[offset..offset + len + 100],
                    "a read sees the device's own writes"
                );
            }
        }
        device.quiesce();
        assert!(bytes(domain.memory(), 0, model.len()) == model);
        let stats = device.stats();
        assert_eq!(
            (stats.writes, stats.faults, stats.dirty_walks),
            (300, 0, 0),
            "not tracked yet"
        );
    }
}

#[test]
fn faults_are_typed_counted_and_leave_what_was_done() {
    let domain = domain(2, Granule::K4);
    let grant = |page, access| {
        let range = range(BASE + page * K4, K4);
        domain
            .map(&Mapping {
                range,
                backing: 0,
                access,
            })
            .unwrap();
    };
    grant(2, Access::Read);
    grant(4, Access::Write);
    let mut device = domain.attach(DeviceConfig::default());
    let fault = |iova, kind| Err(DmaError { iova, kind });
    let mut buffer = [0; 8];
    assert_eq!(
        device.write(at(1, 4090), &[9; 20]),
        fault(at(2, 0), FaultKind::ReadOnly)
    );
    assert_eq!(
        device.read(at(2, 4090), &mut buffer),
        fault(at(3, 0), FaultKind::NotMapped)
    );
    assert_eq!(
        device.read(at(4, 0), &mut buffer),
        fault(at(4, 0), FaultKind::WriteOnly)
    );
    assert_eq!(
        device.write(Iova::new(1 << 48), &[1]),
        fault(Iova::new(1 << 48), FaultKind::TooWide)
    );
    assert_eq!(
        device.write(Iova::MAX, &[1, 2]),
        fault(Iova::MAX, FaultKind::TooWide)
    );
    device.write(at(4, 0), &[5]).unwrap();
    assert_eq!(
        device.read(at(4, 0), &mut buffer),
        fault(at(4, 0), FaultKind::WriteOnly),
        "cached, and refused"
    );
    device.write(Iova::MAX, &[]).unwrap();
    device.quiesce();
    assert_eq!(
        bytes(domain.memory(), K4 + 4090, 6),
        [9; 6],
        "the page before the fault is written"
    );
    assert_eq!((device.stats().faults, domain.stats().faults), (6, 6));
    let error = device.read(at(4, 0), &mut buffer).unwrap_err();
    assert_eq!(
        error.to_string(),
        "DMA fault at 0x40004000: the mapping is write-only"
    );
}

#[test]
fn dma_does_not_go_on_past_the_last_address() {
    let memory = Arc::new(PhysMemory::new(K4).unwrap());
    let domain = Domain::<X86_64>::with_format(memory, DomainConfig::default());
    let range = IovaRange::granule_at(Iova::MAX, Granule::K4);
    let access = Access::ReadWrite;
    let mapping = |access| Mapping {
        range,
        backing: 0,
        access,
    };
    assert!(domain.map(&mapping(Access::Write)).is_err());
    domain.map(&mapping(access)).unwrap();
    domain.set_tracking(Tracking::On).unwrap();
    let mut device = domain.attach(DeviceConfig::default());
    let start = Iova::new(u64::MAX - 2);
    device.write(start, &[1, 2, 3]).unwrap();
    let fault = Err(DmaError {
        iova: Iova::MAX,
        kind: FaultKind::TooWide,
    });
    assert_eq!(device.write(start, &[4, 5, 6, 7]), fault);
    let mut back = [0; 3];
    device.read(start, &mut back).unwrap();
    assert_eq!(back, [4, 5, 6], "the byte past the end is not the last one");
    assert_eq!(device.read(start, &mut [0; 4]), fault);
    assert_eq!(device.stats().faults, 2);
    assert!(domain.translate(Iova::MAX).unwrap().dirty);
}

#[test]
fn a_mapping_must_have_memory_behind_it() {
    let domain = domain(2, Granule::K4);
    for (backing, len) in [(K4, 2 * K4), (2 * K4, K4), (u64::MAX - 4095, K4)] {
        let range = range(0, len);
        let refused = domain
            .map(&Mapping {
                range,
                backing,
                access: Access::Read,
            })
            .unwrap_err();
        assert_eq!(refused.errno(), 5);
        assert!(
            refused
                .to_string()
                .contains("outside the memory, which has 0x2000 bytes"),
            "{refused}"
        );
        assert!(domain.translate(Iova::MIN).is_none());
    }
}

#[test]
fn a_write_is_reported_once_flushed_and_again_when_written_again() {
    let domain = domain(8, Granule::K4);
    domain.set_tracking(Tracking::On).unwrap();
    let mut device = domain.attach(DeviceConfig::default());
    device.write(at(2, 4095), &[1, 2]).unwrap();
    device.write(at(3, 0), &[3]).unwrap();
    assert_eq!(device.stats().dirty_walks, 2);
    device.quiesce();
    let (dirty, gather) = harvest(&domain, 8);
    assert_eq!(dirty, [2, 3]);
    assert_eq!(gather.ranges(), [range(BASE + 2 * K4, 2 * K4)]);
    let done = domain.invalidate(&gather).unwrap();
    assert_eq!(done.commands, 1);
    assert_eq!(harvest(&domain, 8).0, [0u64; 0]);
    device.write(at(3, 0), &[4]).unwrap();
    assert_eq!(
        harvest(&domain, 8).0,
        [3],
        "the sleeper dropped its entry when it woke"
    );
    assert_eq!(domain.stats().dirty_walks, 3);
}

#[test]
fn a_forgotten_flush_loses_the_next_write() {
    let domain = domain(8, Granule::K4);
    domain.set_tracking(Tracking::On).unwrap();
    let mut device = domain.attach(DeviceConfig::default());
    device.write(at(5, 0), &[1]).unwrap();
    device.quiesce();
    assert_eq!(harvest(&domain, 8).0, [5]);
    // No invalidation here.
    device.write(at(5, 0), &[2]).unwrap();
    device.quiesce();
    assert_eq!(bytes(domain.memory(), 5 * K4, 1), [2], "memory changed");
    assert_eq!(harvest(&domain, 8).0, [0u64; 0], "and no harvest knows");
    assert_eq!(device.stats().iotlb_hits, 1);
}

#[test]
fn a_flush_of_too_little_loses_the_next_write() {
    let domain = domain(8, Granule::K4);
    domain.set_tracking(Tracking::On).unwrap();
    let mut device = domain.attach(DeviceConfig::default());
    device.write(at(5, 4000), &[1; 100]).unwrap();
    device.quiesce();
    assert_eq!(harvest(&domain, 8).0, [5, 6]);
    let mut short = FlushGather::new();
    short.add(range(BASE + 5 * K4, K4), Granule::K4);
    domain.invalidate(&short).unwrap();
    device.write(at(5, 4000), &[2; 100]).unwrap();
    assert_eq!(harvest(&domain, 8).0, [5]);
}

#[test]
fn ignored_invalidations_lose_the_next_write() {
    let domain = domain(8, Granule::K4);
    domain.set_tracking(Tracking::On).unwrap();
    domain.break_hardware(Breakage::IgnoreInvalidations);
    let mut device = domain.attach(DeviceConfig::default());
    for (value, expect) in [(1, vec![5]), (2, vec![])] {
        device.write(at(5, 0), &[value]).unwrap();
        device.quiesce();
        let (dirty, gather) = harvest(&domain, 8);
        assert_eq!(dirty, expect);
        let done = domain.invalidate(&gather).unwrap();
        assert_eq!(done, dirtymap::flush::Invalidated::default());
    }
    assert_eq!(bytes(domain.memory(), 5 * K4, 1), [2]);
}

/// Writes, harvests and flushes while the device answers on a thread of its own; returns the byte
/// that the copy after the flush holds.
fn copy_after_flush(breakage: Breakage) -> (u8, Vec<u64>) {
    let domain = domain(8, Granule::K4);
    domain.set_tracking(Tracking::On).unwrap();
    domain.break_hardware(breakage);
    let mut device = domain.attach(DeviceConfig::default());
    device.write(at(5, 0), &[7]).unwrap();
    let (dirty, gather) = harvest(&domain, 8);
    assert_eq!(dirty, [5]);
    assert_eq!(bytes(domain.memory(), 5 * K4, 1), [0], "posted, not landed");
    let flushed = AtomicBool::new(false);
    let copy = std::thread::scope(|s| {
        s.spawn(|| {
            while !flushed.load(Ordering::Acquire) {
                device.service();
                std::thread::yield_now();
            }
        });
        let done = domain.invalidate(&gather).unwrap();
        let copy = bytes(domain.memory(), 5 * K4, 1)[0];
        flushed.store(true, Ordering::Release);
        assert_eq!((done.commands, done.dropped), (1, 1));
        assert_eq!(done.drained, u64::from(breakage == Breakage::None));
        copy
    });
    drop(device);
    assert_eq!(bytes(domain.memory(), 5 * K4, 1), [7]);
    (copy, harvest(&domain, 8).0)
}

#[test]
fn a_flush_waits_for_posted_writes() {
    assert_eq!(copy_after_flush(Breakage::None), (7, vec![]));
}

#[test]
fn an_acknowledgement_without_draining_loses_the_posted_write() {
    assert_eq!(
        copy_after_flush(Breakage::AcknowledgeWithoutDraining),
        (0, vec![])
    );
}

#[test]
fn enabling_forgets_what_was_cached_untracked() {
    let domain = domain(8, Granule::K4);
    let mut device = domain.attach(DeviceConfig::default());
    device.write(at(1, 0), &[1]).unwrap();
    let mut byte = [0];
    device.read(at(2, 0), &mut byte).unwrap();
    device.write(at(2, 0), &[1]).unwrap();
    assert_eq!(
        device.stats().iotlb_misses,
        2,
        "untracked, a read caches as well as a write does"
    );
    device.quiesce();
    assert_eq!(
        harvest(&domain, 8).0,
        [0u64; 0],
        "hardware sets no D while tracking is off"
    );
    domain.set_tracking(Tracking::On).unwrap();
    device.write(at(1, 0), &[2]).unwrap();
    device.write(at(2, 0), &[2]).unwrap();
    device.quiesce();
    domain.set_tracking(Tracking::On).unwrap();
    assert_eq!(
        harvest(&domain, 8).0,
        [1, 2],
        "a second enable keeps what is dirty"
    );
    device.write(at(3, 0), &[2]).unwrap();
    device.quiesce();
    domain.set_tracking(Tracking::Off).unwrap();
    device.write(at(4, 0), &[2]).unwrap();
    device.quiesce();
    assert_eq!(
        harvest(&domain, 8).0,
        [3],
        "disabling keeps what is dirty and sets nothing more"
    );
    device.write(at(3, 0), &[2]).unwrap();
    device.quiesce();
    domain.set_tracking(Tracking::On).unwrap();
    assert_eq!(harvest(&domain, 8).0, [0u64; 0], "enabling begins clean");
    // Without the flush, entries that were cached untracked hide the next writes.
    domain.set_tracking(Tracking::Off).unwrap();
    device.write(at(6, 0), &[2]).unwrap();
    device.quiesce();
    domain.break_hardware(Breakage::IgnoreInvalidations);
    domain.set_tracking(Tracking::On).unwrap();
    device.write(at(6, 0), &[3]).unwrap();
    assert_eq!(harvest(&domain, 8).0, [0u64; 0]);
}

#[test]
fn a_cached_read_does_not_hide_a_write() {
    let domain = domain(8, Granule::K4);
    domain.set_tracking(Tracking::On).unwrap();
    let mut device = domain.attach(DeviceConfig::default());
    let mut byte = [0];
    device.read(at(1, 0), &mut byte).unwrap();
    device.write(at(1, 0), &[1]).unwrap();
    device.write(at(1, 1), &[1]).unwrap();
    let stats = device.stats();
    assert_eq!(
        (stats.iotlb_hits, stats.iotlb_misses, stats.dirty_walks),
        (1, 2, 1)
    );
    assert_eq!(harvest(&domain, 8).0, [1]);
}

#[test]
fn unmapped_memory_is_reachable_until_it_is_flushed() {
    let domain = domain(8, Granule::K4);
    domain.set_tracking(Tracking::On).unwrap();
    let mut device = domain.attach(DeviceConfig::default());
    device.write(at(1, 0), &[1]).unwrap();
    device.quiesce();
    let mut gather = FlushGather::new();
    let mut dirty = Vec::new();
    domain.unmap(range(BASE, 8 * K4), &mut gather, &mut |leaf| {
        dirty.push(leaf)
    });
    assert_eq!(
        dirty.iter().map(|leaf| leaf.len()).sum::<u128>(),
        u128::from(K4)
    );
    assert_eq!(
        (gather.entries(), gather.ranges()),
        (8, &[range(BASE, 8 * K4)][..])
    );
    device.write(at(1, 0), &[2]).unwrap();
    device.quiesce();
    assert_eq!(
        bytes(domain.memory(), K4, 1),
        [2],
        "stale, as real hardware"
    );
    domain.invalidate(&gather).unwrap();
    assert_eq!(
        device.write(at(1, 0), &[3]).unwrap_err().kind,
        FaultKind::NotMapped
    );

    domain
        .map(&Mapping {
            range: range(0, 1 << 12),
            backing: 0,
            access: Access::Read,
        })
        .unwrap();
    domain.unmap(range(0, 5), &mut gather, &mut |_| {
        panic!("nothing is there")
    });
    assert_eq!(domain.stats().refused_unmaps, 1);
}

#[test]
fn devices_come_and_go() {
    let domain = domain(8, Granule::K4);
    let mut first = domain.attach(DeviceConfig::default());
    let second = domain.attach(DeviceConfig {
        iotlb_sets: 1,
        iotlb_ways: 1,
        posted_writes: 0,
        ..DeviceConfig::DEFAULT
    });
    first.write(at(0, 0), &[1]).unwrap();
    assert_eq!(domain.stats().devices, 2);
    drop(first);
    assert_eq!(
        bytes(domain.memory(), 0, 1),
        [1],
        "a device that goes lands its writes"
    );
    domain.set_tracking(Tracking::On).unwrap();
    let stats = DomainStats {
        devices: 1,
        invalidations: 1,
        commands: 1,
        bytes_asked: 1 << 64,
        bytes_invalidated: 1 << 64,
        ..DomainStats::default()
    };
    assert_eq!(domain.stats(), stats);
    drop(second);
    assert_eq!(domain.stats().devices, 0);
}

#[test]
fn enabling_splits_leaves_so_that_tracking_is_finer() {
    let memory = Arc::new(PhysMemory::new(1024 * K4).unwrap());
    let config = DomainConfig {
        split_on_enable: Some(Granule::K4),
        ..DomainConfig::default()
    };
    let domain = Domain::new(memory, config);
    let mapping = Mapping {
        range: range(BASE, 1024 * K4),
        backing: 0,
        access: Access::ReadWrite,
    };
    domain.map(&mapping).unwrap();
    assert_eq!(domain.translate(at(3, 0)).unwrap().range, mapping.range);
    let mut device = domain.attach(DeviceConfig::default());
    // Cached as a whole, and treated as dirty, because tracking is off.
    device.write(at(3, 0), b"before").unwrap();
    device.quiesce();
    domain.set_tracking(Tracking::On).unwrap();
    assert_eq!(
        domain.translate(at(3, 0)).unwrap().range,
        range(BASE + 3 * K4, K4)
    );
    assert_eq!(harvest(&domain, 1024).0, [0u64; 0]);
    device.write(at(3, 5), b"after").unwrap();
    device.write(at(700, 0), b"after").unwrap();
    assert_eq!(harvest(&domain, 1024).0, [3, 700]);
}
