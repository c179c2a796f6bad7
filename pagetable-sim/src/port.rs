//! The port between a domain and one device: invalidation requests go in, acknowledgements come
//! out.
//!
//! A device never waits: it uses its IOTLB, and between two operations it answers the requests in
//! its inbox, if there are any. A device that sleeps answers nothing, and an invalidator must not
//! wait for it: it has no write in flight, and it looks into its inbox before it uses its IOTLB
//! again. An invalidator must distinguish the two without a lock:
//!
//! ```text
//!  device                                       invalidator, which has changed the table
//!  D1  active := true                           I1  push the request
//!  F1  fence(SeqCst)                            F2  fence(SeqCst)
//!  D2  look into the inbox; answer              I2  look at `active`
//!  D3  use the IOTLB, walk, post writes             false: done
//!  ... (answers between operations)                 true:  wait for the answer, or for false
//!  D4  land all posted writes
//!  D5  active := false
//! ```
//!
//! Either F1 or F2 comes first in the one order of all SeqCst fences:
//! - if F1 does, I2 sees D1 (or the D5 of that activity, or something newer). If it sees true, it
//!   waits. If it sees a false of D5, all that this activity had in flight has landed and is
//!   visible, and the next activity begins with a new F1 that comes after F2: the other branch;
//! - if F2 does, D2 sees the request of I1, and every walk from D3 on sees the table as the
//!   invalidator left it. The result of I2 does not matter: the device answers before it uses its
//!   IOTLB.
//!
//! The answer comes after the device has dropped the cached entries **and** landed its posted
//! writes. It is a Release that the invalidator acquires, so memory read after an invalidation
//! holds every write that was translated before it.
//!
//! Requests to a sleeping device stay in its inbox and are as precise as any other, so a range
//! whose flush was forgotten stays cached over the sleep. After [`MAX_UNREAD`] of them the device
//! is told to drop everything instead, so that an inbox cannot grow without bound.

use dirtymap::IovaRange;
use dirtymap::flush::Invalidated;
use dirtymap::sync::{
    Arc, AtomicBool, AtomicU64, AtomicUsize, Ordering, Step, TINY, fence, performs, relax, weaken,
};

use crate::stack::{Stack, Taken};

/// The most requests that a sleeping device collects one by one. It is one in the model checker, so
/// that models reach the bound.
const MAX_UNREAD: usize = if TINY { 1 } else { 256 };

/// See the [module](self).
pub(crate) struct Port {
    /// The number of the device.
    pub(crate) number: u32,
    /// Whether the device has a TLB of its own.
    pub(crate) has_tlb: bool,
    active: AtomicBool,
    inbox: Stack<Request>,
    /// About how many requests are in the inbox.
    unread: AtomicUsize,
    /// The inbox was full while the device slept: it drops everything when it wakes.
    overflow: AtomicBool,
}

/// The entries that devices are to drop. They also land their writes in flight.
pub(crate) struct Order {
    /// Ascending and disjoint.
    pub(crate) ranges: Vec<IovaRange>,
    pub(crate) cache: Cache,
}

/// The cache that an order names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Cache {
    /// The IOTLB, and the cached pointers to tables too if `tables` is set.
    Iotlb { tables: bool },
    /// The TLB of the device.
    DeviceTlb,
}

/// One order to one device.
pub(crate) struct Request {
    order: Arc<Order>,
    receipt: Arc<Receipt>,
}

/// The place at which the device acknowledges a request.
#[derive(Debug)]
pub(crate) struct Receipt {
    answered: AtomicBool,
    dropped: AtomicU64,
    drained: AtomicU64,
}

impl Port {
    /// The port of a device that sleeps, with an empty inbox.
    pub(crate) fn new(number: u32, has_tlb: bool) -> Self {
        Port {
            number,
            has_tlb,
            active: AtomicBool::new(false),
            inbox: Stack::new(),
            unread: AtomicUsize::new(0),
            overflow: AtomicBool::new(false),
        }
    }

    // The invalidator's side.

    /// Asks the device to perform `order` (I1). Does not wait. `None` if the device sleeps and has
    /// to drop everything when it wakes. A caller that relies on the device's writes performs F2,
    /// `fence(SeqCst)`, after it has asked.
    pub(crate) fn ask(&self, order: &Arc<Order>) -> Option<Arc<Receipt>> {
        // Relaxed: an estimate that bounds the inbox; both branches are right at any value.
        if self.unread.load(Ordering::Relaxed) >= MAX_UNREAD && self.overflow() {
            return None;
        }
        let receipt = Arc::new(Receipt {
            answered: AtomicBool::new(false),
            dropped: AtomicU64::new(0),
            drained: AtomicU64::new(0),
        });
        // Relaxed: an estimate.
        self.unread.fetch_add(1, Ordering::Relaxed);
        // The push is a Release: it publishes the changes of the table that the order covers.
        self.inbox.push(Request {
            order: Arc::clone(order),
            receipt: Arc::clone(&receipt),
        });
        Some(receipt)
    }

    /// Waits until the device has answered, or sleeps (I2). The caller has performed F2,
    /// `fence(SeqCst)`, after it asked.
    pub(crate) fn wait(&self, receipt: &Receipt) -> Invalidated {
        loop {
            // Acquire: pairs with the Release in `Request::acknowledge`; writes that the device
            // landed before it are visible.
            if receipt.answered.load(Ordering::Acquire) {
                return Invalidated {
                    // Relaxed, both: ordered by the Acquire above.
                    dropped: receipt.dropped.load(Ordering::Relaxed),
                    drained: receipt.drained.load(Ordering::Relaxed),
                    ..Invalidated::default()
                };
            }
            // Acquire: pairs with the Release in `sleep`; writes that the device landed before it
            // are visible.
            if !self.active.load(Ordering::Acquire) {
                return Invalidated::default();
            }
            relax();
        }
    }

    /// Tells a sleeping device to drop everything when it wakes. False if it does not sleep; then a
    /// request is needed.
    fn overflow(&self) -> bool {
        // Release: pairs with the Acquire swap in `wake`. A device that takes the flag sees the
        // changes of the table that came before, also if it took the flag before our fence. If it
        // did not, the fence decides, as for I1.
        self.overflow.store(true, Ordering::Release);
        if performs(Step::OverflowFence) {
            // SeqCst: an F2 of its own, for `overflow` in place of the inbox; pairs with F1 in
            // `wake`. If F1 is first, the look below sees the device awake, and the caller asks it.
            // If F2 is first, the device sees `overflow` when it wakes.
            fence(Ordering::SeqCst);
        }
        // Relaxed: the caller performs F2 after it has asked, which makes this an Acquire: writes
        // that the device landed before it fell asleep are visible after that.
        !self.active.load(Ordering::Relaxed)
    }

    // The device's side.

    /// Begins to be active (D1, F1). Returns whether everything cached must be dropped. The device
    /// looks into its inbox next.
    pub(crate) fn wake(&self) -> bool {
        // Relaxed: ordered by the fence.
        self.active.store(true, Ordering::Relaxed);
        if performs(Step::WakeFence) {
            // SeqCst: F1 of the module's protocol; pairs with F2 in `Domain::invalidate_at` and in
            // `overflow`. If F1 is first, the invalidator sees the device awake, and waits. If F2
            // is first, the device sees the request or the overflow below.
            fence(Ordering::SeqCst);
        }
        // Relaxed load: ordered by the fence. Acquire swap: pairs with the Release in `overflow`;
        // the changes of the table came before the flag was set.
        self.overflow.load(Ordering::Relaxed) && self.overflow.swap(false, Ordering::Acquire)
    }

    /// Ceases to be active (D5); everything in flight has landed (D4).
    pub(crate) fn sleep(&self) {
        // Release: publishes the writes that were landed; pairs with the Acquire in `wait`.
        let order = weaken(Step::PublishAsleep, Ordering::Release);
        self.active.store(false, order);
    }

    /// Whether there are requests (D2). The cost between operations is one load.
    #[inline]
    pub(crate) fn has_mail(&self) -> bool {
        // Ordered by F1 after waking; otherwise it is seen a little later, and `take` acquires.
        !self.inbox.is_empty()
    }

    /// Takes all requests, the newest first: they only drop cached entries, so their order does not
    /// matter.
    pub(crate) fn take(&self) -> Requests<'_> {
        Requests {
            port: self,
            taken: self.inbox.take(),
        }
    }
}

impl std::fmt::Debug for Port {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Port").finish_non_exhaustive()
    }
}

impl Request {
    /// The entries to drop.
    pub(crate) fn order(&self) -> &Order {
        &self.order
    }

    /// Tells the invalidator that everything is dropped and landed.
    pub(crate) fn acknowledge(&self, dropped: u64, drained: u64) {
        let receipt = &self.receipt;
        // Relaxed, both: published by the Release below.
        receipt.dropped.store(dropped, Ordering::Relaxed);
        receipt.drained.store(drained, Ordering::Relaxed);
        // Release: publishes the landed writes; pairs with the Acquire in `Port::wait`.
        let order = weaken(Step::PublishLanded, Ordering::Release);
        receipt.answered.store(true, order);
    }
}

/// Requests that were taken out of an inbox. Requests that are not iterated over are freed without
/// an answer.
pub(crate) struct Requests<'a> {
    port: &'a Port,
    taken: Taken<Request>,
}

impl Iterator for Requests<'_> {
    type Item = Request;

    fn next(&mut self) -> Option<Request> {
        let request = self.taken.next()?;
        // Relaxed: an estimate.
        self.port.unread.fetch_sub(1, Ordering::Relaxed);
        Some(request)
    }
}

#[cfg(test)]
#[cfg(not(dirtymap_loom))]
mod tests {
    use super::*;

    fn everything() -> Arc<Order> {
        Arc::new(Order {
            ranges: vec![IovaRange::ALL],
            cache: Cache::DeviceTlb,
        })
    }

    #[test]
    fn an_inbox_of_a_sleeper_is_bounded() {
        let port = Port::new(0, false);
        let order = everything();
        for _ in 0..MAX_UNREAD {
            let receipt = port.ask(&order).unwrap();
            assert_eq!(port.wait(&receipt), Invalidated::default());
        }
        assert!(port.ask(&order).is_none());
        assert_eq!(Arc::strong_count(&order), MAX_UNREAD + 1);
        assert!(port.wake(), "everything must go");
        assert!(port.ask(&order).is_some(), "one that is awake is asked");
        assert_eq!(port.take().count(), MAX_UNREAD + 1);
        assert!(!port.has_mail());
        port.sleep();
        assert!(port.wake(), "asked for again in between");
        assert!(!port.wake());
    }

    #[test]
    fn requests_are_freed_with_the_port() {
        let order = everything();
        let port = Port::new(0, false);
        port.ask(&order);
        port.ask(&order);
        drop(port);
        assert_eq!(Arc::strong_count(&order), 1);
    }
}
