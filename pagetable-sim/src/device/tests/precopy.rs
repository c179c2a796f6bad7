//! Devices that write at full speed while a harvester copies: nothing is lost, unless the hardware
//! is broken.

use std::sync::atomic::AtomicU64;

use super::*;
use crate::{ArmS1, RiscvSv48, VtdSs};

/// Two devices write while a harvester copies the pages that it finds; then the devices stop and
/// one last harvest copies the rest. Three writes in four go to four hot pages, which stay cached;
/// each of the others goes to a page of its own, which is written once. After each burst a device
/// only answers requests until a harvest has passed. Returns in how many words the copy differs
/// from the memory.
fn precopy<F: Format>(breakage: Breakage, max_leaf: Granule, config: DeviceConfig) -> usize {
    const HOT: u64 = 4;
    const BURSTS: u64 = 16;
    const BURST: u64 = 64;
    const PAGES: u64 = HOT + 2 * BURSTS * BURST / 4;
    let domain = domain_of::<F>(PAGES, max_leaf);
    let copy = PhysMemory::new(PAGES * K4).unwrap();
    domain.set_tracking(Tracking::On).unwrap();
    domain.break_hardware(breakage);
    let passes = AtomicU64::new(0);
    let running = AtomicU64::new(2);
    let pass = || {
        let (dirty, gather) = harvest(&domain, PAGES);
        domain.invalidate(&gather).unwrap();
        let mut page = [0; K4 as usize];
        for number in dirty {
            domain.memory().read(number * K4, &mut page).unwrap();
            copy.write(number * K4, &page).unwrap();
        }
        passes.fetch_add(1, Ordering::Release);
    };
    let drive = |me: u64| {
        let mut device = domain.attach(config);
        for count in 0..BURSTS * BURST {
            let page = match count % 4 {
                0 => HOT + count / 4 * 2 + me,
                _ => (count / 4 + count) % HOT,
            };
            let offset = count * 40 % 4080 / 16 * 16 + me * 8;
            device
                .write(at(page, offset), &(count + 1).to_le_bytes())
                .unwrap();
            if count % BURST == BURST - 1 {
                let seen = passes.load(Ordering::Acquire);
                while passes.load(Ordering::Acquire) < seen + 2 {
                    device.service();
                    std::thread::yield_now();
                }
            }
        }
        drop(device);
        running.fetch_sub(1, Ordering::Release);
    };
    std::thread::scope(|s| {
        s.spawn(|| drive(0));
        s.spawn(|| drive(1));
        while running.load(Ordering::Acquire) != 0 {
            pass();
        }
    });
    pass();
    let all = |memory: &PhysMemory| bytes(memory, 0, (PAGES * K4) as usize);
    let (source, copied) = (all(domain.memory()), all(&copy));
    source
        .chunks(8)
        .zip(copied.chunks(8))
        .filter(|(a, b)| a != b)
        .count()
}

#[test]
fn concurrent_precopy_loses_nothing() {
    let small = DeviceConfig {
        iotlb_sets: 2,
        iotlb_ways: 2,
        posted_writes: 5,
        ..DeviceConfig::DEFAULT
    };
    for max_leaf in [Granule::K4, Granule::M2] {
        for config in [small, DeviceConfig::default(), IN_FLIGHT].repeat(3) {
            assert_eq!(precopy::<AmdV1>(Breakage::None, max_leaf, config), 0);
        }
        for config in [small, IN_FLIGHT] {
            assert_eq!(precopy::<VtdSs>(Breakage::None, max_leaf, config), 0);
            assert_eq!(precopy::<X86_64>(Breakage::None, max_leaf, config), 0);
            assert_eq!(precopy::<ArmS1>(Breakage::None, max_leaf, config), 0);
            assert_eq!(precopy::<RiscvSv48>(Breakage::None, max_leaf, config), 0);
        }
    }
}

/// Writes stay in flight for so long that pages are copied before they land.
const IN_FLIGHT: DeviceConfig = DeviceConfig {
    iotlb_sets: 64,
    iotlb_ways: 8,
    posted_writes: 900,
    ..DeviceConfig::DEFAULT
};

#[test]
fn concurrent_precopy_on_broken_hardware_loses_writes() {
    let lost = |breakage, config| {
        precopy::<AmdV1>(breakage, Granule::K4, config).min(precopy::<ArmS1>(
            breakage,
            Granule::K4,
            config,
        ))
    };
    assert!(lost(Breakage::IgnoreInvalidations, DeviceConfig::default()) > 0);
    assert!(lost(Breakage::AcknowledgeWithoutDraining, IN_FLIGHT) > 0);
}
