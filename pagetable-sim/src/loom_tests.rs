//! Models of the port alone: a device that works by what it has cached, and an invalidator.
//!
//! The models of whole domains, in `tests/loom`, have the same protocol with a page table and a
//! memory in the place of two words. These are small enough to weaken each ordering by itself.

use dirtymap::IovaRange;
use dirtymap::sync::model::holds_only_with;
use dirtymap::sync::{Arc, AtomicU64, Ordering, Step, fence, thread};

use crate::port::{Cache, Order, Port};

/// A table of one word, and a memory of one word.
struct Hardware {
    port: Port,
    /// 0 until the invalidator changes it.
    table: AtomicU64,
    /// The number of the last write by the old table that has landed.
    memory: AtomicU64,
}

/// A device with a cache of one entry.
#[derive(Default)]
struct Device {
    cached: Option<u64>,
    /// Writes by the old table so far.
    writes: u64,
}

impl Device {
    /// Wakes, answers, writes by what is cached or else by the table, answers, and sleeps.
    fn works(&mut self, hardware: &Hardware) {
        if hardware.port.wake() {
            self.cached = None;
        }
        self.answers(hardware);
        // Relaxed: as a walk reads a leaf whose table it has already.
        let read = || hardware.table.load(Ordering::Relaxed);
        if *self.cached.get_or_insert_with(read) == 0 {
            self.writes += 1;
            // Relaxed: as memory is.
            hardware.memory.store(self.writes, Ordering::Relaxed);
        }
        self.answers(hardware);
        hardware.port.sleep();
    }

    fn answers(&mut self, hardware: &Hardware) {
        if hardware.port.has_mail() {
            for request in hardware.port.take() {
                self.cached = None;
                request.acknowledge(0, 0);
            }
        }
    }
}

fn everything() -> Arc<Order> {
    Arc::new(Order {
        ranges: vec![IovaRange::ALL],
        cache: Cache::Iotlb { tables: false },
    })
}

/// A device works twice while an invalidator changes the table and invalidates. Returns whether all
/// writes by the old table had landed when the invalidation returned. `earlier` requests are in the
/// inbox before.
fn an_invalidation(earlier: usize) -> bool {
    let hardware = Arc::new(Hardware {
        port: Port::new(0, false),
        table: AtomicU64::new(0),
        memory: AtomicU64::new(0),
    });
    for _ in 0..earlier {
        hardware.port.ask(&everything());
    }
    let device = thread::spawn({
        let hardware = Arc::clone(&hardware);
        move || {
            let mut device = Device::default();
            device.works(&hardware);
            device.works(&hardware);
            device.writes
        }
    });
    // Relaxed: what publishes the change is the request.
    hardware.table.store(1, Ordering::Relaxed);
    let receipt = hardware.port.ask(&everything());
    // SeqCst: F2, as in `Domain::invalidate_at`.
    fence(Ordering::SeqCst);
    if let Some(receipt) = receipt {
        hardware.port.wait(&receipt);
    }
    // Relaxed: as a copy of the memory.
    let landed = hardware.memory.load(Ordering::Relaxed);
    device.join().is_ok_and(|writes| writes == landed)
}

/// The device is asked, or is told to drop everything when it wakes.
fn an_invalidation_of_a_device_that_comes_and_goes() -> bool {
    an_invalidation(0)
}

/// The inbox is full, so the device is told to drop everything when it wakes.
fn an_invalidation_with_a_full_inbox() -> bool {
    an_invalidation(1)
}

#[test]
fn writes_by_an_old_table_land_before_an_invalidation_returns() {
    let steps = [Step::WakeFence, Step::PublishLanded, Step::PublishAsleep];
    holds_only_with(&steps, an_invalidation_of_a_device_that_comes_and_goes);
}

/// The flag that tells a sleeping device to drop everything was set without Release. A device that
/// was about to sleep could take the flag before it saw the change of the table. It cached the old
/// table again, and at its next operation nothing was left that told it to drop that.
#[test]
fn a_device_that_drops_everything_sees_the_change_before() {
    let steps = [Step::OverflowFence];
    holds_only_with(&steps, an_invalidation_with_a_full_inbox);
}
