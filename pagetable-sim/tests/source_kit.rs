//! The test kit for sources, over domains of the simulator: a sound one keeps the rules, and the
//! kit sees hardware that does not.

#![allow(clippy::unwrap_used)] // helpers of tests

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex};

use dirtymap::source_kit::{Rig, check};
use dirtymap::{DirtySource, Granule, Iova, IovaRange};
use pagetable_sim::{
    AmdV1, ArmS1, Breakage, Device, DeviceConfig, Domain, DomainConfig, Format, PhysMemory, VtdSs,
};

const PAGES: u64 = 256;

/// A domain, and a device that writes by what it has cached.
struct Machine<F: Format> {
    domain: Arc<Domain<F>>,
    device: Mutex<Device<F>>,
}

impl<F: Format> Machine<F> {
    fn new(breakage: Breakage) -> Self {
        let memory = Arc::new(PhysMemory::new(PAGES * 4096).unwrap());
        let config = DomainConfig {
            max_leaf: Granule::K4,
            ..DomainConfig::default()
        };
        let domain = Domain::<F>::with_format(memory, config);
        domain.break_hardware(breakage);
        let device = Mutex::new(domain.attach(DeviceConfig::default()));
        Machine { domain, device }
    }
}

impl<F: Format> Rig for Machine<F> {
    fn range(&self) -> IovaRange {
        IovaRange::from_len(Iova::new(0x20_0000), PAGES * 4096).unwrap()
    }

    fn source(&self) -> Arc<dyn DirtySource> {
        Arc::new(Arc::clone(&self.domain))
    }

    fn write(&self, iova: Iova) {
        let mut device = self.device.lock().unwrap();
        device.write(iova, b"written").unwrap();
        // Lands what is posted. The caches stay, and a flush does not wait for this device.
        device.quiesce();
    }
}

#[test]
fn domains_keep_the_rules() {
    check(|| Machine::<AmdV1>::new(Breakage::None));
    check(|| Machine::<VtdSs>::new(Breakage::None));
    check(|| Machine::<ArmS1>::new(Breakage::None));
}

#[test]
fn devices_that_ignore_invalidations_are_noticed() {
    let broken = || check(|| Machine::<AmdV1>::new(Breakage::IgnoreInvalidations));
    let panic = catch_unwind(AssertUnwindSafe(broken)).unwrap_err();
    let text = panic.downcast_ref::<String>().unwrap();
    assert!(
        text.contains("a write after the flush is seen again"),
        "{text}"
    );
}
