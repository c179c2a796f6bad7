//! The newest faults: accesses to addresses that no area holds.

use crate::sync::{AtomicU64, Mutex, Ordering, lock};
use crate::units::{DomainId, Iova};
use std::collections::VecDeque;

/// How many faults the ring holds.
const CAPACITY: usize = 64;

/// One access outside every area.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// The first address outside. Via a handle: the first address of the rejected call.
    pub at: Iova,
    /// Bytes outside, summed over the call; saturates at `u64::MAX`.
    pub len: u64,
    /// Where the access came from.
    pub source: FaultSource,
}

/// Where an access outside every area came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultSource {
    /// [`AddressSpace::mark`](crate::AddressSpace::mark).
    Mark,
    /// [`AreaHandle::mark`](crate::AreaHandle::mark).
    Handle,
    /// A lease that was aborted, or dropped, after its areas were unmapped.
    Abort,
    /// A device, as told by [`AddressSpace::report_fault`](crate::AddressSpace::report_fault).
    Device(DomainId),
}

/// The newest faults of a space: see [`AddressSpace::faults`](crate::AddressSpace::faults).
///
/// ```
/// # use dirtymap::{Access, AddressSpace, Granule};
/// # fn main() -> Result<(), dirtymap::Error> {
/// # let space = AddressSpace::tracked(Granule::K4);
/// # space.map(0..1 << 20, 0, Access::ReadWrite)?;
/// assert!(space.mark(0x10_0000..0x10_0001).is_err()); // outside every area
/// let faults = space.faults();
/// assert_eq!(faults.recent[0].at, 0x10_0000.into());
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Faults {
    /// At most 64, the oldest first.
    pub recent: Vec<Fault>,
    /// How many faults are missing: newer ones replaced them, or they were not recorded because
    /// another thread was using the ring. Recording a fault never blocks.
    pub dropped: u64,
}

/// The ring of the newest faults.
#[derive(Debug)]
pub(crate) struct Log {
    recent: Mutex<VecDeque<Fault>>,
    dropped: AtomicU64,
}

impl Log {
    pub(super) fn new() -> Self {
        Log {
            recent: Mutex::new(VecDeque::new()),
            dropped: AtomicU64::new(0),
        }
    }

    /// Records `fault`, unless another thread is using the ring. Never blocks.
    #[cold]
    pub(super) fn record(&self, fault: Fault) {
        let replaced = match self.recent.try_lock() {
            Ok(mut recent) => {
                let full = recent.len() == CAPACITY;
                if full {
                    recent.pop_front();
                }
                recent.push_back(fault);
                full
            }
            Err(_) => true,
        };
        if replaced {
            // Relaxed: a statistic.
            self.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }

    pub(super) fn read(&self) -> Faults {
        let recent = lock(&self.recent);
        Faults {
            recent: recent.iter().copied().collect(),
            // Relaxed: a statistic.
            dropped: self.dropped.load(Ordering::Relaxed),
        }
    }
}
