//! The fault log of a domain: the accesses of its devices that were blocked, for software to read.

use dirtymap::Iova;
use dirtymap::sync::{AtomicU64, Ordering, TINY};

use crate::error::FaultKind;
use crate::stack::Stack;

/// The number of faults that a domain stores until they are taken. Small in the model checker.
pub(crate) const CAPACITY: u64 = if TINY { 1 } else { 256 };

/// An access that was blocked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// The number of the device, see [`Device::number`](crate::Device::number).
    pub device: u32,
    /// The first address that was not accessed.
    pub iova: Iova,
    /// Why.
    pub kind: FaultKind,
}

/// The faults that [`Domain::take_faults`](crate::Domain::take_faults) took.
///
/// ```
/// use dirtymap::Iova;
/// use pagetable_sim::{DeviceConfig, Domain, DomainConfig, FaultKind, PhysMemory};
/// use std::sync::Arc;
///
/// let domain = Domain::new(Arc::new(PhysMemory::new(4096)?), DomainConfig::default());
/// let mut device = domain.attach(DeviceConfig::default());
/// assert!(device.write(Iova::new(0x1000), b"nowhere").is_err());
/// let faults = domain.take_faults();
/// assert_eq!((faults.records[0].kind, faults.dropped), (FaultKind::NotMapped, 0));
/// # Ok::<(), pagetable_sim::Error>(())
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Faults {
    /// The faults, the oldest first.
    pub records: Vec<Fault>,
    /// The number of further faults since the last call, for which the log had no room.
    pub dropped: u64,
}

/// A bounded log. Devices never wait for its reader, nor for each other.
pub(crate) struct FaultLog {
    records: Stack<Fault>,
    /// The number of records that are in the log or have a place in it.
    held: AtomicU64,
    dropped: AtomicU64,
}

impl FaultLog {
    pub(crate) fn new() -> Self {
        FaultLog {
            records: Stack::new(),
            held: AtomicU64::new(0),
            dropped: AtomicU64::new(0),
        }
    }

    /// Stores `fault` if there is room, else counts it as dropped.
    pub(crate) fn add(&self, fault: Fault) {
        // Relaxed, all: counts. A place is reserved before it is filled, so the bound holds at
        // every moment.
        if self.held.fetch_add(1, Ordering::Relaxed) < CAPACITY {
            self.records.push(fault);
        } else {
            self.held.fetch_sub(1, Ordering::Relaxed);
            self.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Empties the log.
    pub(crate) fn take(&self) -> Faults {
        let mut records: Vec<_> = self.records.take().collect();
        records.reverse();
        // Relaxed, both: counts. The places are free once the records are out.
        self.held.fetch_sub(records.len() as u64, Ordering::Relaxed);
        let dropped = self.dropped.swap(0, Ordering::Relaxed);
        Faults { records, dropped }
    }
}
