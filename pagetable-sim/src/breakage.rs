//! Faults of the hardware, and of the software that drives it.

/// Faults of invalidations, which a test of their users has to notice.
///
/// ```
/// use dirtymap::{Access, DirtySource, Granule, Iova, IovaRange, Mapping, Tracking};
/// use pagetable_sim::{Breakage, DeviceConfig, Domain, DomainConfig, PhysMemory};
/// use std::sync::Arc;
///
/// let domain = Domain::new(Arc::new(PhysMemory::new(4096)?), DomainConfig::default());
/// let range = IovaRange::from_len(Iova::new(0x1000), 4096)?;
/// domain.map(&Mapping { range, backing: 0, access: Access::ReadWrite })?;
/// let mut device = domain.attach(DeviceConfig::default());
/// device.write(range.start(), b"untracked")?;
/// device.quiesce();
///
/// domain.break_hardware(Breakage::IgnoreInvalidations);
/// domain.set_tracking(Tracking::On)?; // ends with a flush, which reaches no device
/// device.write(range.start(), b"lost")?;
/// assert!(!domain.translate(range.start()).unwrap().dirty);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
#[repr(u8)]
pub enum Breakage {
    /// The hardware works.
    #[default]
    None = 0,
    /// Invalidations return at once and reach no device.
    IgnoreInvalidations,
    /// Devices drop their cached entries and acknowledge, while their posted writes stay in flight.
    AcknowledgeWithoutDraining,
    /// Each range to be invalidated loses its last smallest page, and is not rounded out.
    FlushShortByOnePage,
    /// Invalidations name leaves only: devices keep their pointers to tables.
    SkipNonLeaf,
    /// Invalidations reach the TLBs of devices before the IOTLBs that refill them.
    DeviceTlbFirst,
}

// SAFETY: an enumeration of one byte without fields: it has no padding, and no byte of it is
// uninitialised.
unsafe impl bytemuck::NoUninit for Breakage {}
