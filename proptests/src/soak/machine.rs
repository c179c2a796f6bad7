//! Domains and devices of any format, behind one type.

use std::sync::Arc;

use dirtymap::{AddressSpace, DomainId, Error, Granule, Iova};
use pagetable_sim::{
    AmdV1, ArmS1, Breakage, Device, DeviceConfig, DmaError, Domain, DomainConfig, DomainStats,
    Format, PhysMemory, RiscvSv48, VtdSs, X86_64,
};

use super::panics::{Panicking, Panics, caught};
use crate::Random;

/// A device of any format.
pub(super) trait Dma: Send {
    fn write(&mut self, at: Iova, bytes: &[u8]) -> Result<(), DmaError>;
    fn read(&mut self, at: Iova, bytes: &mut [u8]) -> Result<(), DmaError>;
    fn service(&mut self);
    fn quiesce(&mut self);
}

impl<F: Format> Dma for Device<F>
where
    Device<F>: Send,
{
    fn write(&mut self, at: Iova, bytes: &[u8]) -> Result<(), DmaError> {
        Device::write(self, at, bytes)
    }

    fn read(&mut self, at: Iova, bytes: &mut [u8]) -> Result<(), DmaError> {
        Device::read(self, at, bytes)
    }

    fn service(&mut self) {
        Device::service(self);
    }

    fn quiesce(&mut self) {
        Device::quiesce(self);
    }
}

/// A domain of any format.
pub(super) trait Machine: Send + Sync {
    /// Attaches it. `None` if it panicked.
    fn join(
        self: Arc<Self>,
        space: &AddressSpace,
        panics: &Arc<Panics>,
    ) -> Option<Result<DomainId, Error>>;
    fn device(&self, config: DeviceConfig) -> Box<dyn Dma>;
    fn break_hardware(&self, breakage: Breakage);
    fn stats(&self) -> DomainStats;
}

impl<F: Format + 'static> Machine for Domain<F>
where
    Domain<F>: Send + Sync,
    Device<F>: Send,
{
    fn join(
        self: Arc<Self>,
        space: &AddressSpace,
        panics: &Arc<Panics>,
    ) -> Option<Result<DomainId, Error>> {
        let panics = Arc::clone(panics);
        caught(|| {
            space.attach(Panicking {
                domain: self,
                panics,
            })
        })
    }

    fn device(&self, config: DeviceConfig) -> Box<dyn Dma> {
        Box::new(self.attach(config))
    }

    fn break_hardware(&self, breakage: Breakage) {
        Domain::break_hardware(self, breakage);
    }

    fn stats(&self) -> DomainStats {
        Domain::stats(self)
    }
}

/// How many formats there are.
pub(super) const FORMATS: u64 = 5;
/// The number of an additional format, with pages of 16 KiB.
pub(super) const LARGE_PAGES: u64 = 5;

/// A domain of format number `format`.
pub(super) fn machine(
    format: u64,
    max_leaf: Granule,
    memory: &Arc<PhysMemory>,
) -> Arc<dyn Machine> {
    let memory = Arc::clone(memory);
    let config = DomainConfig {
        max_leaf,
        ..DomainConfig::default()
    };
    match format {
        0 => Domain::<AmdV1>::with_format(memory, config),
        1 => Domain::<VtdSs>::with_format(memory, config),
        2 => Domain::<ArmS1>::with_format(memory, config),
        3 => Domain::<X86_64>::with_format(memory, config),
        LARGE_PAGES => Domain::<ArmS1<14>>::with_format(memory, config),
        _ => Domain::<RiscvSv48>::with_format(memory, config),
    }
}

/// The configuration of device number `nth`: large and tiny caches, with and without a TLB of its
/// own.
pub(super) fn device_config(nth: u64) -> DeviceConfig {
    let config = DeviceConfig::DEFAULT;
    match nth % 4 {
        0 => config,
        1 => DeviceConfig {
            tlb_entries: 64,
            ..config
        },
        2 => DeviceConfig {
            iotlb_sets: 1,
            iotlb_ways: 4,
            walk_entries: 8,
            posted_writes: 200,
            ..config
        },
        _ => DeviceConfig {
            largest_cached: Granule::K4,
            walk_entries: 0,
            tlb_entries: 16,
            posted_writes: 8,
            ..config
        },
    }
}

/// Leaves of 4 KiB or 2 MiB.
pub(super) fn any_leaf(random: &mut Random) -> Granule {
    match random.below(2) {
        0 => Granule::K4,
        _ => Granule::M2,
    }
}
