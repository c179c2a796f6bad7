//! The caches of devices, the entries that an invalidation must reach, and the writes that are lost
//! if it does not.

use super::*;
use crate::{AmdV1, ArmS1, RiscvSv48, VtdSs};

const M2: u64 = 1 << 21;

/// A device that caches leaves of 4 KiB only, however large the leaf in the table is.
const PIECES: DeviceConfig = DeviceConfig {
    largest_cached: Granule::K4,
    ..DeviceConfig::DEFAULT
};

/// A device with a TLB of its own.
const ATS: DeviceConfig = DeviceConfig {
    tlb_entries: 16,
    ..DeviceConfig::DEFAULT
};

fn map<F: Format>(domain: &Domain<F>, range: IovaRange, backing: u64) {
    let access = Access::ReadWrite;
    domain
        .map(&Mapping {
            range,
            backing,
            access,
        })
        .unwrap();
}

/// Unmaps and flushes.
fn unmap<F: Format>(domain: &Domain<F>, range: IovaRange) -> FlushGather {
    let mut gather = FlushGather::new();
    domain.unmap(range, &mut gather, &mut |_| ());
    domain.invalidate(&gather).unwrap();
    gather
}

/// Writes to the pages of `first`, harvests and flushes on hardware with `breakage`, writes to them
/// again, and returns the pages that the next harvest reports.
fn written_again(breakage: Breakage, config: DeviceConfig, first: &[u64]) -> Vec<u64> {
    let domain = domain(32, Granule::K4);
    domain.set_tracking(Tracking::On).unwrap();
    domain.break_hardware(breakage);
    let mut device = domain.attach(config);
    let write = |device: &mut Device, value| {
        for page in first {
            device.write(at(*page, 0), &[value]).unwrap();
        }
        device.quiesce();
    };
    write(&mut device, 1);
    let (dirty, gather) = harvest(&domain, 32);
    assert_eq!(dirty, first);
    domain.invalidate(&gather).unwrap();
    write(&mut device, 2);
    for page in first {
        assert_eq!(bytes(domain.memory(), page * K4, 1), [2]);
    }
    harvest(&domain, 32).0
}

#[test]
fn a_flush_that_is_short_by_one_page_loses_a_write() {
    let pages = [5, 6, 7, 9];
    for config in [DeviceConfig::DEFAULT, ATS] {
        assert_eq!(written_again(Breakage::None, config, &pages), pages);
        let found = written_again(Breakage::FlushShortByOnePage, config, &pages);
        assert_eq!(found, [5, 6], "the last page of each range is stale");
    }
}

/// A mask from the length of the range alone names the pages 6 and 7 here, and leaves page 8
/// cached.
#[test]
fn a_flush_across_a_power_of_two_reaches_both_sides() {
    for config in [DeviceConfig::DEFAULT, ATS] {
        assert_eq!(written_again(Breakage::None, config, &[7, 8]), [7, 8]);
        assert_eq!(written_again(Breakage::None, config, &[15, 16]), [15, 16]);
    }
}

/// A flush that covers only the requested part, and not the whole leaf, leaves the rest of the leaf
/// cached in a device that caches pieces of leaves.
#[test]
fn a_flush_of_a_part_of_a_large_leaf_leaves_the_rest_reachable() {
    for whole in [true, false] {
        let memory = Arc::new(PhysMemory::new(M2).unwrap());
        let domain = Domain::new(memory, DomainConfig::default());
        let leaf = range(BASE, M2);
        map(&domain, leaf, 0);
        let mut device = domain.attach(PIECES);
        device.write(at(0, 0), &[1]).unwrap();
        device.write(at(300, 0), &[1]).unwrap();
        device.quiesce();
        let mut gather = FlushGather::new();
        domain.unmap(leaf, &mut gather, &mut |_| ());
        assert_eq!(gather.ranges(), [leaf], "an unmap owes the whole leaf");
        if !whole {
            gather = FlushGather::new();
            gather.add(range(BASE, K4), Granule::K4);
        }
        domain.invalidate(&gather).unwrap();
        assert!(device.write(at(0, 0), &[2]).is_err());
        assert_eq!(device.write(at(300, 0), &[2]).is_err(), whole);
    }
}

#[test]
fn a_part_of_a_leaf_that_is_named_with_its_size_is_flushed_whole() {
    let memory = Arc::new(PhysMemory::new(M2).unwrap());
    let domain = Domain::new(memory, DomainConfig::default());
    map(&domain, range(BASE, M2), 0);
    domain.set_tracking(Tracking::On).unwrap();
    let mut device = domain.attach(PIECES);
    device.write(at(300, 0), &[1]).unwrap();
    device.quiesce();
    let mut gather = FlushGather::new();
    gather.add(range(BASE, K4), Granule::M2);
    domain.invalidate(&gather).unwrap();
    let before = device.stats().iotlb_misses;
    device.write(at(300, 0), &[2]).unwrap();
    assert_eq!(device.stats().iotlb_misses, before + 1);
}

#[test]
fn pieces_of_large_leaves_translate_as_the_leaf_does() {
    let memory = Arc::new(PhysMemory::new(2 * M2).unwrap());
    let domain = Domain::new(memory, DomainConfig::default());
    map(&domain, range(BASE, M2), M2);
    for config in [PIECES, ATS] {
        let mut device = domain.attach(config);
        for page in [0, 1, 511] {
            for value in [1, 2] {
                device.write(at(page, 9), &[value]).unwrap();
                device.land_all();
                let phys = M2 + page * K4 + 9;
                assert_eq!(bytes(domain.memory(), phys, 1), [value]);
            }
        }
    }
}

#[test]
fn what_is_invalidated_beyond_what_was_asked_for_is_counted() {
    fn flush<F: Format>(first: u64, pages: u64) -> (u64, u128, u128) {
        let domain = domain_of::<F>(4, Granule::K4);
        let _device = domain.attach(DeviceConfig::DEFAULT);
        let _second = domain.attach(ATS);
        let mut gather = FlushGather::new();
        gather.add(range(first * K4, pages * K4), Granule::K4);
        let done = domain.invalidate(&gather).unwrap();
        let stats = domain.stats();
        assert_eq!((stats.commands, stats.invalidations), (done.commands, 1));
        let in_pages = |bytes| bytes / u128::from(K4);
        (
            done.commands,
            in_pages(stats.bytes_asked),
            in_pages(stats.bytes_invalidated),
        )
    }
    assert_eq!(flush::<AmdV1>(7, 2), (3, 2, 16));
    assert_eq!(flush::<VtdSs>(8, 8), (3, 8, 8));
    assert_eq!(flush::<X86_64>(0x7ff, 2), (3, 2, 0x1000));
    assert_eq!(flush::<ArmS1>(7, 3), (3, 3, 3));
    assert_eq!(flush::<ArmS1>(7, 512), (3, 512, 1 << 52));
    assert_eq!(flush::<RiscvSv48>(7, 512), (3, 512, 512));
    assert_eq!(flush::<RiscvSv48>(7, 513), (3, 513, 1 << 52));
}

#[test]
fn one_device_can_be_invalidated_alone() {
    let domain = domain(4, Granule::K4);
    let mut devices = [(); 2].map(|_| domain.attach(ATS));
    for device in &mut devices {
        device.write(at(0, 0), &[1]).unwrap();
        device.quiesce();
    }
    let done = domain.invalidate_device(1).unwrap();
    assert_eq!(done.commands, 2, "its IOTLB and its own TLB");
    for (device, misses) in devices.iter_mut().zip([1, 2]) {
        device.write(at(0, 0), &[2]).unwrap();
        assert_eq!(device.stats().iotlb_misses, misses);
        device.quiesce();
    }
    let unknown = domain.invalidate_device(2).unwrap_err();
    assert_eq!(unknown.to_string(), "no device 2 is attached");
    domain.invalidate_all();
    for (device, misses) in devices.iter_mut().zip([2, 3]) {
        device.write(at(0, 0), &[3]).unwrap();
        assert_eq!(device.stats().iotlb_misses, misses);
    }
}

#[test]
fn a_walk_notes_accesses_in_the_entries_above_only_if_it_reads_them() {
    fn walks<F: Format>() {
        let domain = domain_of::<F>(600, Granule::K4);
        let accessed = |page| domain.hardware().table.upper_accessed(at(page, 0));
        let nothing = vec![false; F::LEVELS as usize - 1];
        let everything = vec![F::TABLE_ACCESSED != 0; F::LEVELS as usize - 1];
        let mut device = domain.attach(DeviceConfig::DEFAULT);
        device.write(at(0, 0), &[1]).unwrap();
        assert_eq!(accessed(0), nothing, "nothing is noted while untracked");
        device.quiesce();
        domain.break_hardware(Breakage::SkipNonLeaf);
        domain.set_tracking(Tracking::On).unwrap();
        domain.break_hardware(Breakage::None);
        device.write(at(1, 0), &[1]).unwrap();
        assert_eq!(device.stats().short_walks, 1);
        assert_eq!(accessed(1), nothing, "the walk began below");
        // The next 2 MiB have a table of their own, so the walk begins one level higher and reads
        // one entry.
        device.read(at(512, 0), &mut [0]).unwrap();
        assert_eq!(device.stats().short_walks, 2);
        let last = accessed(512).pop();
        assert_eq!(last, everything.last().copied());
        assert_eq!(accessed(0), nothing);
        let mut other = domain.attach(DeviceConfig {
            walk_entries: 0,
            ..DeviceConfig::DEFAULT
        });
        other.read(at(2, 0), &mut [0]).unwrap();
        assert_eq!(other.stats().short_walks, 0);
        assert_eq!(accessed(0), everything, "from the root");
        device.quiesce();
        assert_eq!(harvest(&domain, 600).0, [1]);
        assert_eq!(accessed(0), everything, "a harvest of D leaves A alone");
        domain.unmap(range(BASE, 600 * K4), &mut FlushGather::new(), &mut |_| ());
        assert_eq!(
            other.write(at(3, 0), &[1]).unwrap_err().kind,
            FaultKind::NotMapped
        );
    }
    walks::<AmdV1>();
    walks::<VtdSs<5>>();
    walks::<X86_64>();
    walks::<ArmS1>();
    walks::<RiscvSv48>();
}

/// A device has been in a table that is then unmapped and replaced by one large leaf. Returns the
/// result of its next write there, and the number of reported pages.
fn write_after_a_table_was_replaced<F: Format>(
    breakage: Breakage,
    config: DeviceConfig,
    asleep: bool,
) -> (Result<(), FaultKind>, usize) {
    let memory = Arc::new(PhysMemory::new(M2).unwrap());
    let domain = Domain::<F>::with_format(Arc::clone(&memory), DomainConfig::default());
    domain.set_tracking(Tracking::On).unwrap();
    domain.break_hardware(breakage);
    let mut device = domain.attach(config);
    map(&domain, range(BASE, K4), 0);
    device.write(at(0, 0), &[1]).unwrap();
    device.quiesce();
    let gather = unmap(&domain, range(BASE, K4));
    assert!(!gather.tables(), "the table stays");
    // The flush is done; this walk reads the pointer to the empty table once more.
    device.write(at(3, 0), &[1]).unwrap_err();
    if asleep {
        device.quiesce();
    }
    map(&domain, range(BASE, M2), 0);
    let done = device.write(at(7, 0), &[2]);
    device.quiesce();
    let landed = bytes(&memory, 7 * K4, 1) == [2];
    assert_eq!(landed, done.is_ok());
    (done.map_err(|e| e.kind), harvest(&domain, 512).0.len())
}

#[test]
fn without_the_non_leaf_invalidation_a_device_goes_by_a_retired_table() {
    for asleep in [false, true] {
        for config in [DeviceConfig::DEFAULT, ATS] {
            let good = write_after_a_table_was_replaced::<AmdV1>(Breakage::None, config, asleep);
            assert_eq!(good, (Ok(()), 512));
            let good = write_after_a_table_was_replaced::<ArmS1>(Breakage::None, config, asleep);
            assert_eq!(good, (Ok(()), 512));
            let bad =
                write_after_a_table_was_replaced::<AmdV1>(Breakage::SkipNonLeaf, config, asleep);
            assert_eq!(bad, (Err(FaultKind::NotMapped), 0), "the write is lost");
            let bad =
                write_after_a_table_was_replaced::<VtdSs>(Breakage::SkipNonLeaf, config, asleep);
            assert_eq!(bad, (Err(FaultKind::NotMapped), 0), "the write is lost");
        }
    }
    let no_cache = DeviceConfig {
        walk_entries: 0,
        ..DeviceConfig::DEFAULT
    };
    let good = write_after_a_table_was_replaced::<AmdV1>(Breakage::SkipNonLeaf, no_cache, false);
    assert_eq!(good, (Ok(()), 512), "nothing is cached");
}

#[test]
fn a_flush_of_leaves_keeps_pointers_to_tables_and_one_of_tables_drops_them() {
    let domain = domain(4, Granule::K4);
    let mut device = domain.attach(DeviceConfig::DEFAULT);
    device.write(at(0, 0), &[1]).unwrap();
    let walks = |device: &mut Device| {
        device.write(at(0, 0), &[1]).unwrap();
        device.quiesce();
        (device.stats().iotlb_misses, device.stats().short_walks)
    };
    assert_eq!(walks(&mut device), (1, 0));
    let mut gather = FlushGather::new();
    gather.add(IovaRange::ALL, Granule::K4);
    domain.invalidate(&gather).unwrap();
    assert_eq!(walks(&mut device), (2, 1));
    gather.add_table(range(BASE, M2));
    let done = domain.invalidate(&gather).unwrap();
    assert_eq!(done.commands, 1);
    assert_eq!(walks(&mut device), (3, 1));
    domain.invalidate_all();
    assert_eq!(walks(&mut device), (4, 1));
}

#[test]
fn a_translation_for_writing_is_dirty_before_anything_is_written() {
    let domain = domain(8, Granule::K4);
    domain.set_tracking(Tracking::On).unwrap();
    let mut device = domain.attach(ATS);
    device.prefetch(at(1, 0), Access::Write).unwrap();
    device.prefetch(at(2, 0), Access::Read).unwrap();
    assert!(device.prefetch(at(8, 0), Access::Write).is_err());
    device.quiesce();
    assert_eq!(harvest(&domain, 8).0, [1], "and is reported: a superset");
    device.write(at(1, 0), &[1]).unwrap();
    device.write(at(1, 1), &[1]).unwrap();
    let stats = device.stats();
    assert_eq!((stats.tlb_hits, stats.iotlb_hits), (2, 0));
    assert_eq!((stats.writes, stats.iotlb_misses), (2, 3));
}

/// A device writes to one page all the while, also between the two rounds of the flush that a
/// harvest owes. Afterwards the page is copied, and the device writes once more. Returns whether
/// the next harvest finds that.
fn last_write_is_found(breakage: Breakage, config: DeviceConfig) -> bool {
    let domain = domain(8, Granule::K4);
    domain.set_tracking(Tracking::On).unwrap();
    domain.break_hardware(breakage);
    let mut device = domain.attach(config);
    device.write(at(5, 0), &[1]).unwrap();
    let (dirty, gather) = harvest(&domain, 8);
    assert_eq!(dirty, [5]);
    std::thread::scope(|scope| {
        let flush = scope.spawn(|| domain.invalidate(&gather).unwrap());
        while !flush.is_finished() {
            device.write(at(5, 0), &[2]).unwrap();
        }
        assert_eq!(flush.join().unwrap().commands, 2);
    });
    device.quiesce();
    // All writes up to now may be reported here, flushed and copied. The device sleeps: no flush
    // waits for it.
    let (_, gather) = harvest(&domain, 8);
    if !gather.is_empty() {
        domain.invalidate(&gather).unwrap();
    }
    device.write(at(5, 0), &[3]).unwrap();
    device.quiesce();
    assert_eq!(bytes(domain.memory(), 5 * K4, 1), [3]);
    harvest(&domain, 8).0 == [5]
}

#[test]
fn a_device_tlb_that_is_flushed_before_its_iotlb_refills_from_it() {
    for _ in 0..20 {
        assert!(last_write_is_found(Breakage::None, ATS));
        assert!(!last_write_is_found(Breakage::DeviceTlbFirst, ATS));
    }
}

/// A leaf that a harvest covers in part keeps its D, and owed no flush: the sync drained no write,
/// and the part was copied before the write had landed.
#[test]
fn a_part_of_a_leaf_is_drained_before_it_is_copied() {
    let memory = Arc::new(PhysMemory::new(2 << 20).unwrap());
    let domain = Domain::new(Arc::clone(&memory), DomainConfig::default());
    let leaf = range(1 << 30, 2 << 20);
    domain
        .map(&Mapping {
            range: leaf,
            backing: 0,
            access: Access::ReadWrite,
        })
        .unwrap();
    domain.set_tracking(Tracking::On).unwrap();
    let mut device = domain.attach(DeviceConfig::default());
    device.write(leaf.start(), &[7]).unwrap();
    let mut words = [0u64; 1];
    let part = range(1 << 30, K4);
    let view = UserBitmap::new(&mut words).view(part, Granule::K4).unwrap();
    let mut gather = FlushGather::new();
    domain
        .read_and_clear(part, &mut LeafSink::new(&mut view.sink(), &mut gather))
        .unwrap();
    assert_eq!((view.count(), gather.ranges()), (1, &[part][..]));
    std::thread::scope(|scope| {
        let flush = scope.spawn(|| domain.invalidate(&gather).unwrap());
        while !flush.is_finished() {
            device.service();
        }
    });
    let mut copy = [0];
    memory.read(0, &mut copy).unwrap();
    assert_eq!(
        copy,
        [7],
        "the write had been translated before the harvest"
    );
}
