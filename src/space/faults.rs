//! The newest faults: accesses to addresses that no area holds.

use crate::sync::{AtomicU64, Mutex, Ordering, lock};
use crate::units::{DomainId, Iova};
use std::collections::VecDeque;

/// How many faults are kept.
const KEPT: usize = 64;

/// One access outside every area.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// The first address outside. For a call by a handle that sticks out of its area, none of which
    /// counts, the first of the call.
    pub at: Iova,
    /// Bytes outside, all stretches of the call together; at most `u64::MAX`.
    pub len: u64,
    /// Who came there.
    pub source: FaultSource,
}

/// Who touched addresses outside every area.
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
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Faults {
    /// At most 64, the oldest first.
    pub recent: Vec<Fault>,
    /// How many more there were: replaced by newer ones, or not recorded because another thread was at it, for nobody
    /// waits to record a fault.
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

    /// Keeps `fault`, unless another thread is at the ring. Never waits.
    #[cold]
    pub(super) fn record(&self, fault: Fault) {
        let replaced = match self.recent.try_lock() {
            Ok(mut recent) => {
                let full = recent.len() == KEPT;
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
