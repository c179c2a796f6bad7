//! The hardware that a domain and its devices share: memory, the table, the switches, the ports of
//! the devices, and the fault log.

use dirtymap::sync::{Arc, AtomicBool, AtomicU64, Mutex, Ordering, lock};

use crate::breakage::Breakage;
use crate::fault::{Fault, FaultLog, Faults};
use crate::fmt::Format;
use crate::memory::PhysMemory;
use crate::port::Port;
use crate::table::Table;
use crate::word::Atomic;

/// See the [module](self).
pub(crate) struct Hardware<F: Format> {
    pub(crate) memory: Arc<PhysMemory>,
    pub(crate) table: Table<F>,
    tracking: AtomicBool,
    breakage: Atomic<Breakage>,
    ports: Mutex<Vec<Arc<Port>>>,
    /// The number of devices that were ever attached.
    joined: AtomicU64,
    fault_log: FaultLog,
    faults: AtomicU64,
    dirty_walks: AtomicU64,
}

impl<F: Format> Hardware<F> {
    /// Hardware without devices that works and does not track.
    pub(crate) fn new(memory: Arc<PhysMemory>, table: Table<F>) -> Self {
        Hardware {
            memory,
            table,
            tracking: AtomicBool::new(false),
            breakage: Atomic::new(Breakage::None),
            ports: Mutex::new(Vec::new()),
            joined: AtomicU64::new(0),
            fault_log: FaultLog::new(),
            faults: AtomicU64::new(0),
            dirty_walks: AtomicU64::new(0),
        }
    }

    /// Gives a new device its port.
    pub(crate) fn join(&self, has_tlb: bool) -> Arc<Port> {
        // Relaxed: a count.
        let number = self.joined.fetch_add(1, Ordering::Relaxed) as u32;
        let port = Arc::new(Port::new(number, has_tlb));
        lock(&self.ports).push(Arc::clone(&port));
        port
    }

    /// Removes the port of a device that sleeps and never wakes again.
    pub(crate) fn leave(&self, port: &Arc<Port>) {
        lock(&self.ports).retain(|other| !Arc::ptr_eq(other, port));
    }

    /// The ports of all devices. A device that joins later has nothing cached, and the lock orders
    /// its walks after the changes that are invalidated.
    pub(crate) fn ports(&self) -> Vec<Arc<Port>> {
        lock(&self.ports).clone()
    }

    /// The number of devices that are attached.
    pub(crate) fn devices(&self) -> u64 {
        lock(&self.ports).len() as u64
    }

    /// Whether hardware sets A and D.
    #[inline]
    pub(crate) fn is_tracking(&self) -> bool {
        // Relaxed: a device that reads the old value is flushed before enabling returns; see
        // `Domain::set_tracking`.
        self.tracking.load(Ordering::Relaxed)
    }

    /// Throws the switch that devices look at.
    pub(crate) fn set_tracking(&self, on: bool) {
        // Relaxed: devices read the switch alone. The flush that follows orders it: they look at
        // it after they have answered the flush, or after they woke, which is after its F2. By then
        // they see the clear of old dirty bits, too. A write before that, whose D the clear may
        // remove, has landed when the flush ends.
        self.tracking.store(on, Ordering::Relaxed);
    }

    pub(crate) fn breakage(&self) -> Breakage {
        // Relaxed: a switch for tests.
        self.breakage.load(Ordering::Relaxed)
    }

    pub(crate) fn break_it(&self, breakage: Breakage) {
        // Relaxed: a switch for tests, thrown before the scenario begins.
        self.breakage.store(breakage, Ordering::Relaxed);
    }

    /// Counts and logs a blocked access.
    pub(crate) fn fault(&self, fault: Fault) {
        // Relaxed: a count.
        self.faults.fetch_add(1, Ordering::Relaxed);
        self.fault_log.add(fault);
    }

    /// The number of blocked accesses, logged or not.
    pub(crate) fn faults(&self) -> u64 {
        // Relaxed: a count.
        self.faults.load(Ordering::Relaxed)
    }

    /// Empties the fault log.
    pub(crate) fn take_faults(&self) -> Faults {
        self.fault_log.take()
    }

    /// Counts a walk that turned a D from 0 to 1.
    pub(crate) fn count_dirty_walk(&self) {
        // Relaxed: a count, next to a compare-exchange on the table.
        self.dirty_walks.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn dirty_walks(&self) -> u64 {
        // Relaxed: a count.
        self.dirty_walks.load(Ordering::Relaxed)
    }
}
