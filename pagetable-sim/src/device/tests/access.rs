//! Atomic operations and faults.

use super::*;
use crate::{AmdV1, ArmS1, Fault, RiscvSv48, VtdSs};

#[test]
fn atomic_operations_change_their_operand_only_and_set_d() {
    let domain = domain(4, Granule::K4);
    domain.set_tracking(Tracking::On).unwrap();
    let mut device = domain.attach(DeviceConfig::DEFAULT);
    device.write(at(1, 0), &[0xff; 16]).unwrap();
    assert_eq!(device.in_flight(), 1);
    assert_eq!(device.fetch_add(at(1, 4), 2u32), Ok(u32::MAX));
    assert_eq!(device.in_flight(), 0, "earlier writes go first");
    assert_eq!(device.fetch_add(at(1, 8), 1u64), Ok(u64::MAX));
    assert_eq!(device.compare_and_swap(at(1, 0), 5u32, 6), Ok(u32::MAX));
    assert_eq!(device.compare_and_swap(at(1, 4), 1u32, 6), Ok(1));
    let mut expect = [0xff; 16];
    expect[4..8].copy_from_slice(&6u32.to_le_bytes());
    expect[8..].fill(0);
    assert_eq!(bytes(domain.memory(), K4, 16), expect);
    device.fetch_add(at(2, 0), 0u64).unwrap();
    device.compare_and_swap(at(3, 4088), 1u64, 2).unwrap();
    device.quiesce();
    assert_eq!(harvest(&domain, 4).0, [1, 2, 3], "written or not");
    let stats = device.stats();
    assert_eq!((stats.atomics, stats.bytes), (6, 16 + 4 + 8 + 4 + 4 + 16));
    assert_eq!(device.detach(), stats);
}

#[test]
fn atomic_operations_of_two_devices_do_not_undo_each_other() {
    const ROUNDS: u32 = 10_000;
    let domain = domain(1, Granule::K4);
    std::thread::scope(|s| {
        for me in 0..2 {
            let mut device = domain.attach(DeviceConfig::DEFAULT);
            s.spawn(move || {
                for _ in 0..ROUNDS {
                    device.fetch_add(at(0, 8), 1u64).unwrap();
                    device.fetch_add(at(0, 16 + 4 * me), 1u32).unwrap();
                }
            });
        }
    });
    let mut expect = Vec::new();
    expect.extend(u64::from(2 * ROUNDS).to_le_bytes());
    expect.extend(ROUNDS.to_le_bytes().repeat(2));
    assert_eq!(bytes(domain.memory(), 8, 16), expect);
}

#[test]
fn atomic_operations_need_alignment_and_both_rights() {
    let domain = domain(1, Granule::K4);
    for (page, access) in [(1, Access::Read), (2, Access::Write)] {
        let range = range(BASE + page * K4, K4);
        let backing = 0;
        domain
            .map(&Mapping {
                range,
                backing,
                access,
            })
            .unwrap();
    }
    let mut device = domain.attach(DeviceConfig::DEFAULT);
    for (iova, kind) in [
        (at(0, 4), FaultKind::Unaligned),
        (at(0, 4092), FaultKind::Unaligned),
        (at(1, 0), FaultKind::ReadOnly),
        (at(2, 0), FaultKind::WriteOnly),
        (at(3, 0), FaultKind::NotMapped),
    ] {
        let fault = Err(DmaError { iova, kind });
        assert_eq!(device.fetch_add(iova, 1u64), fault);
        assert_eq!(device.compare_and_swap(iova, 0u64, 1), fault);
    }
    device.write(at(2, 0), &[0]).unwrap();
    assert!(device.fetch_add(at(2, 0), 1u32).is_err(), "cached");
    device.fetch_add(at(0, 4092), 1u32).unwrap();
    device.quiesce();
    assert_eq!(bytes(domain.memory(), 0, 8), [0; 8]);
}

#[test]
fn faults_are_logged_in_order_up_to_a_bound_and_counted_beyond() {
    let domain = domain(1, Granule::K4);
    let mut first = domain.attach(DeviceConfig::DEFAULT);
    let mut second = domain.attach(DeviceConfig::DEFAULT);
    assert_eq!((first.number(), second.number()), (0, 1));
    assert_eq!(domain.take_faults(), crate::Faults::default());
    first.write(at(1, 5), &[1]).unwrap_err();
    second.read(Iova::new(1 << 50), &mut [0]).unwrap_err();
    let taken = domain.take_faults();
    let fault = |device, iova, kind| Fault { device, iova, kind };
    assert_eq!(
        taken.records,
        [
            fault(0, at(1, 5), FaultKind::NotMapped),
            fault(1, Iova::new(1 << 50), FaultKind::TooWide)
        ]
    );
    assert_eq!(taken.dropped, 0);
    for page in 1..=300 {
        second.write(at(page, 0), &[1]).unwrap_err();
    }
    let taken = domain.take_faults();
    assert_eq!((taken.records.len(), taken.dropped), (256, 44));
    let pages: Vec<_> = taken.records.iter().map(|fault| fault.iova).collect();
    assert_eq!(pages, (1..=256).map(|page| at(page, 0)).collect::<Vec<_>>());
    second.write(at(7, 0), &[1]).unwrap_err();
    let taken = domain.take_faults();
    assert_eq!((taken.records.len(), taken.dropped), (1, 0));
    assert_eq!(domain.stats().faults, 303, "dropped or not");
    drop(first);
    assert_eq!(domain.attach(DeviceConfig::DEFAULT).number(), 2);
}

#[test]
fn every_fault_of_racing_devices_is_logged_or_counted() {
    let domain = domain(1, Granule::K4);
    let mut seen = 0;
    std::thread::scope(|s| {
        let writers: Vec<_> = (0..2)
            .map(|_| {
                let mut device = domain.attach(DeviceConfig::DEFAULT);
                s.spawn(move || {
                    for _ in 0..5_000 {
                        device.write(at(9, 0), &[1]).unwrap_err();
                    }
                })
            })
            .collect();
        while !writers.iter().all(|writer| writer.is_finished()) {
            let taken = domain.take_faults();
            assert!(taken.records.len() <= 256);
            seen += taken.records.len() as u64 + taken.dropped;
        }
    });
    let taken = domain.take_faults();
    seen += taken.records.len() as u64 + taken.dropped;
    assert_eq!(seen, 10_000);
}

#[test]
fn reserved_bits_fault_where_the_format_has_them() {
    fn fault<F: Format>() -> Option<FaultKind> {
        let domain = domain_of::<F>(2, Granule::K4);
        let mut device = domain.attach(DeviceConfig::DEFAULT);
        let corrupted = domain.corrupt(at(1, 0));
        assert!(!domain.corrupt(at(2, 0)), "nothing is mapped there");
        device.write(at(0, 0), &[1]).unwrap();
        let done = device.write(at(1, 7), &[1]);
        assert_eq!(done.is_err(), corrupted);
        done.err().map(|error| error.kind)
    }
    assert_eq!(fault::<AmdV1>(), Some(FaultKind::Reserved));
    assert_eq!(fault::<RiscvSv48>(), Some(FaultKind::Reserved));
    assert_eq!(fault::<VtdSs>(), None);
    assert_eq!(fault::<X86_64>(), None);
    assert_eq!(fault::<ArmS1>(), None);
}

/// While tracking is off, the IOTLB takes every entry for dirty. A read of a read-only page caches
/// it like that, and the write that follows must fault all the same: the rights come from the
/// table.
#[test]
fn a_cached_read_of_a_read_only_page_grants_no_write() {
    fn refused<F: Format>(config: DeviceConfig) {
        let domain = domain_of::<F>(1, Granule::K4);
        let mapping = Mapping {
            range: range(BASE + K4, K4),
            backing: 0,
            access: Access::Read,
        };
        domain.map(&mapping).unwrap();
        let mut device = domain.attach(config);
        device.read(at(1, 0), &mut [0; 8]).unwrap();
        assert_eq!(device.stats().iotlb_misses, 1);
        let fault = DmaError {
            iova: at(1, 0),
            kind: FaultKind::ReadOnly,
        };
        assert_eq!(device.write(at(1, 0), &[1]), Err(fault), "{}", F::NAME);
        assert_eq!(device.fetch_add(at(1, 0), 1u64), Err(fault));
        assert_eq!(device.prefetch(at(1, 0), Access::Write), Err(fault));
        device.read(at(1, 0), &mut [0; 8]).unwrap();
        device.quiesce();
        assert_eq!(bytes(domain.memory(), 0, 8), [0; 8]);
    }
    for tlb_entries in [0, 16] {
        let config = DeviceConfig {
            tlb_entries,
            ..DeviceConfig::DEFAULT
        };
        refused::<AmdV1>(config);
        refused::<VtdSs>(config);
        refused::<X86_64>(config);
        refused::<ArmS1>(config);
        refused::<RiscvSv48>(config);
    }
}
