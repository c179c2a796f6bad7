//! The port between a domain and one device: invalidation requests go in, acknowledgements come out.
//!
//! A device never waits: it uses its IOTLB, and between two operations it answers the requests in its inbox, if there
//! are any. A device that sleeps answers nothing, and nobody may wait for it: it has no write in flight, and it looks
//! into its inbox before it uses its IOTLB again. An invalidator must tell the two apart without a lock:
//!
//! ```text
//!  device                                       invalidator (what it invalidates is changed in the table already)
//!  D1  active := true                           I1  push the request
//!  F1  fence(SeqCst)                            F2  fence(SeqCst)
//!  D2  look into the inbox; answer              I2  look at `active`
//!  D3  use the IOTLB, walk, post writes             false: done
//!  ... (answers between operations)                 true:  wait for the answer, or for `active` = false
//!  D4  land all posted writes
//!  D5  active := false
//! ```
//!
//! Either F1 or F2 comes first in the one order of all SeqCst fences:
//! - if F1 does, I2 sees D1 (or the D5 of that activity, or something newer). If it sees true, it waits. If it sees a
//!   false of D5, all that this activity had in flight has landed and is visible, and the next activity begins with a
//!   new F1 that comes after F2: the other branch;
//! - if F2 does, D2 sees the request of I1, and every walk from D3 on sees the table as the invalidator left it. What
//!   I2 sees does not matter: the device answers before it uses its IOTLB.
//!
//! The answer comes after the device has dropped the cached entries **and** landed its posted writes. It is a Release
//! that the invalidator acquires, so memory read after an invalidation holds every write that was translated before it.
//!
//! Requests to a sleeping device stay in its inbox and are as precise as any other, so a range that somebody forgot to
//! flush stays cached over the sleep. After [`MAX_UNREAD`] of them the device is told to drop everything instead, so
//! that an inbox cannot grow without bound.

use std::ptr;

use dirtymap::sync::{Arc, AtomicBool, AtomicPtr, AtomicU64, AtomicUsize, Ordering, fence, relax};
use dirtymap::{Invalidated, IovaRange};

/// How many requests a sleeping device collects one by one; one in the model checker, so that models reach the bound.
const MAX_UNREAD: usize = if cfg!(dirtymap_loom) { 1 } else { 256 };

/// See the [module](self).
pub(crate) struct Port {
    active: AtomicBool,
    /// A stack of requests, the newest first; null if there are none.
    inbox: AtomicPtr<Request>,
    /// About how many requests are in the inbox.
    unread: AtomicUsize,
    /// The inbox was full while the device slept: it drops everything when it wakes.
    overflow: AtomicBool,
}

/// One request: drop what is cached for these addresses, land what is in flight.
pub(crate) struct Request {
    ranges: Arc<Vec<IovaRange>>,
    receipt: Arc<Receipt>,
    next: *mut Request,
}

/// Where the device acknowledges a request.
#[derive(Debug)]
pub(crate) struct Receipt {
    answered: AtomicBool,
    dropped: AtomicU64,
    drained: AtomicU64,
}

impl Port {
    /// The port of a device that sleeps, with an empty inbox.
    pub(crate) fn new() -> Self {
        Port {
            active: AtomicBool::new(false),
            inbox: AtomicPtr::new(ptr::null_mut()),
            unread: AtomicUsize::new(0),
            overflow: AtomicBool::new(false),
        }
    }

    // The invalidator's side.

    /// Asks the device to drop what it has cached for `ranges`, which ascend and are disjoint (I1). Does not wait.
    /// `None` if the device sleeps and was told to drop everything.
    pub(crate) fn ask(&self, ranges: &Arc<Vec<IovaRange>>) -> Option<Arc<Receipt>> {
        // Relaxed: an estimate that bounds the inbox; nothing is decided by it that would not be right either way.
        if self.unread.load(Ordering::Relaxed) >= MAX_UNREAD && self.overflow() {
            return None;
        }
        let receipt = Arc::new(Receipt {
            answered: AtomicBool::new(false),
            dropped: AtomicU64::new(0),
            drained: AtomicU64::new(0),
        });
        self.push(Box::new(Request {
            ranges: Arc::clone(ranges),
            receipt: Arc::clone(&receipt),
            next: ptr::null_mut(),
        }));
        Some(receipt)
    }

    /// Waits until the device has answered, or sleeps (I2). The caller has performed F2, `fence(SeqCst)`, since it
    /// asked.
    pub(crate) fn wait(&self, receipt: &Receipt) -> Invalidated {
        loop {
            // Acquire: pairs with the Release in `Request::acknowledge`; what the device landed before it is visible.
            if receipt.answered.load(Ordering::Acquire) {
                return Invalidated {
                    // Relaxed, both: ordered by the Acquire above.
                    dropped: receipt.dropped.load(Ordering::Relaxed),
                    drained: receipt.drained.load(Ordering::Relaxed),
                    ..Invalidated::default()
                };
            }
            // Acquire: pairs with the Release in `sleep`; what the device landed before it is visible.
            if !self.active.load(Ordering::Acquire) {
                return Invalidated::default();
            }
            relax();
        }
    }

    /// Tells a sleeping device to drop everything when it wakes. False if it does not sleep; then a request is needed.
    fn overflow(&self) -> bool {
        // Relaxed: ordered by the fence, as I1 by F2.
        self.overflow.store(true, Ordering::Relaxed);
        // SeqCst: an F2 of its own, for `overflow` in place of the inbox; pairs with F1 in `wake`.
        fence(Ordering::SeqCst);
        // Acquire: as in `wait`.
        !self.active.load(Ordering::Acquire)
    }

    fn push(&self, request: Box<Request>) {
        // Relaxed: an estimate.
        self.unread.fetch_add(1, Ordering::Relaxed);
        let request = Box::into_raw(request);
        // Relaxed: we only link to the old top; whoever takes the stack reads what is behind it.
        let mut top = self.inbox.load(Ordering::Relaxed);
        loop {
            // SAFETY: `request` came from `Box::into_raw` above and is not published yet, so it is ours alone.
            unsafe { (*request).next = top };
            // Release on success: publishes the request, and the changes of the table that it speaks of; pairs with the
            // Acquire in `take`. The requests below were published by their own pushes, whose release sequences this
            // one continues. Relaxed on failure: as the load above. A top that was taken and pushed again meanwhile is
            // no matter: we link to whatever is the top and never look into it.
            match self.inbox.compare_exchange_weak(
                top,
                request,
                Ordering::Release,
                Ordering::Relaxed,
            ) {
                Ok(_) => return,
                Err(now) => top = now,
            }
        }
    }

    // The device's side.

    /// Begins to be active (D1, F1). Returns whether everything cached must be dropped. The device looks into its inbox
    /// next.
    pub(crate) fn wake(&self) -> bool {
        // Relaxed: ordered by the fence.
        self.active.store(true, Ordering::Relaxed);
        // SeqCst: F1 of the module's protocol; pairs with F2 in `Domain::invalidate` and in `overflow`.
        fence(Ordering::SeqCst);
        // Relaxed load: ordered by the fence. Acquire swap: the changes of the table came before the flag was set.
        self.overflow.load(Ordering::Relaxed) && self.overflow.swap(false, Ordering::Acquire)
    }

    /// Ceases to be active (D5); everything in flight has landed (D4).
    pub(crate) fn sleep(&self) {
        // Release: publishes what was landed; pairs with the Acquire in `wait`.
        self.active.store(false, Ordering::Release);
    }

    /// Whether there are requests (D2). All that this costs, between operations, is one load.
    #[inline]
    pub(crate) fn has_mail(&self) -> bool {
        // Relaxed: ordered by F1 after waking, and otherwise it is seen a little later; `take` acquires.
        !self.inbox.load(Ordering::Relaxed).is_null()
    }

    /// Takes all requests, the newest first.
    pub(crate) fn take(&self) -> Requests<'_> {
        // Acquire: pairs with the Release of every push below the top; publishes the requests and what they speak of.
        let top = self.inbox.swap(ptr::null_mut(), Ordering::Acquire);
        Requests { port: self, top }
    }
}

impl std::fmt::Debug for Port {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Port").finish_non_exhaustive()
    }
}

impl Drop for Port {
    fn drop(&mut self) {
        drop(self.take());
    }
}

// SAFETY: all fields are atomics; the requests that `inbox` leads to are owned by whoever swaps the pointer out, and
// are `Send`: ranges, a receipt of atomics, and the pointer to the next one.
unsafe impl Send for Port {}
// SAFETY: as for `Send`; shared access is by atomic operations only.
unsafe impl Sync for Port {}

impl Request {
    /// What to drop: ascending and disjoint.
    pub(crate) fn ranges(&self) -> &[IovaRange] {
        &self.ranges
    }

    /// Tells the invalidator that everything is dropped and landed.
    pub(crate) fn acknowledge(&self, dropped: u64, drained: u64) {
        let receipt = &self.receipt;
        // Relaxed, both: published by the Release below.
        receipt.dropped.store(dropped, Ordering::Relaxed);
        receipt.drained.store(drained, Ordering::Relaxed);
        // Release: publishes the landed writes; pairs with the Acquire in `Port::wait`.
        receipt.answered.store(true, Ordering::Release);
    }
}

/// Requests that were taken out of an inbox. Those that are not iterated over are freed without an answer.
pub(crate) struct Requests<'a> {
    port: &'a Port,
    top: *mut Request,
}

impl Iterator for Requests<'_> {
    type Item = Box<Request>;

    fn next(&mut self) -> Option<Box<Request>> {
        if self.top.is_null() {
            return None;
        }
        // SAFETY: made by `Box::into_raw` in `push`; the swap in `take` made the whole stack ours, and each is taken
        // once.
        let request = unsafe { Box::from_raw(self.top) };
        self.top = request.next;
        // Relaxed: an estimate.
        self.port.unread.fetch_sub(1, Ordering::Relaxed);
        Some(request)
    }
}

impl Drop for Requests<'_> {
    fn drop(&mut self) {
        self.for_each(drop);
    }
}

#[cfg(test)]
#[cfg(not(dirtymap_loom))]
mod tests {
    use super::*;

    #[test]
    fn an_inbox_of_a_sleeper_is_bounded() {
        let port = Port::new();
        let ranges = Arc::new(vec![IovaRange::ALL]);
        for _ in 0..MAX_UNREAD {
            let receipt = port.ask(&ranges).unwrap();
            assert_eq!(port.wait(&receipt), Invalidated::default());
        }
        assert!(port.ask(&ranges).is_none());
        assert_eq!(Arc::strong_count(&ranges), MAX_UNREAD + 1);
        assert!(port.wake(), "everything must go");
        assert!(port.ask(&ranges).is_some(), "one that is awake is asked");
        assert_eq!(port.take().count(), MAX_UNREAD + 1);
        assert!(!port.has_mail());
        port.sleep();
        assert!(port.wake(), "asked for again in between");
        assert!(!port.wake());
    }

    #[test]
    fn requests_are_freed_with_the_port() {
        let ranges = Arc::new(vec![IovaRange::ALL]);
        let port = Port::new();
        port.ask(&ranges);
        port.ask(&ranges);
        drop(port);
        assert_eq!(Arc::strong_count(&ranges), 1);
    }
}
