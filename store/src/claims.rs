//! Claims: a thread with a handle says in a slot of its own which pages it writes, and the leader
//! looks at all slots before it closes extents, and after it took marks.
//!
//! ```text
//!  handle                                leader, closing            leader, harvesting
//!  C1  claims the extent in its slot     L1  says that it closes    L1  takes the marks
//!      fence                                 fence                      fence
//!  C2  looks at the word, marks it       L2  looks at the slots     L2  looks at the slots
//!      the write lands                       closes, if no claim        puts back what is claimed
//!  C3  ends its claim
//! ```
//!
//! One thread claims in a slot, so a claim waits for no other core. Both pairs of C1, C2 and L1, L2
//! are store buffering (Dekker):
//!
//! * If the fence of the handle comes first, L2 sees the claim, or its end. A claim keeps its
//!   extent open, and its pages marked. After the end (Release, Acquire) the leader sees the mark,
//!   and a thread that copies sees the data.
//! * If the fence of the leader comes first, C2 sees L1: the extent is about to be closed, so the
//!   handle takes its claim back and asks as a thread without a handle does; or the page has no
//!   mark, and gets a new one.
//!
//! `proptests/src/protocol/claims.rs` is the model of the steps.

use dirtymap::sync::{Arc, AtomicU64, Mutex, Ordering, fence, fence_after_rmw, lock};

use crate::step::{Step, performs, weaken};

/// What a handle claims: 0 for nothing, or an extent in the upper half and its pages in the lower
/// one. A cache line of its own, with the one that processors fetch beside it.
#[derive(Debug)]
#[repr(align(128))]
pub(crate) struct Slot(AtomicU64);

/// The slots of all handles.
pub(crate) struct Claims {
    slots: Mutex<Vec<Arc<Slot>>>,
}

impl Slot {
    /// Claims `pages` of an open extent (C1), and then marks them by `mark` (C2), which returns
    /// whether the extent is open. Returns false, and claims nothing, if it is not open, or if the
    /// slot is in use.
    #[inline]
    pub(crate) fn claim(&self, extent: u64, pages: u32, mark: impl FnOnce() -> bool) -> bool {
        // Relaxed: one thread claims in this slot. A claim that another thread ends at this moment
        // counts as one.
        if self.0.load(Ordering::Relaxed) != 0 {
            return false;
        }
        // Relaxed: the fence orders it. A read-modify-write continues the release sequence of the
        // claim that ended before, which the leader may not have looked at.
        self.0
            .swap(extent << 32 | u64::from(pages), Ordering::Relaxed);
        if performs(Step::ClaimFence) {
            // SeqCst: pairs with the fence in `Claims::look`. If this one comes first, the leader
            // sees the claim. If that one comes first, the look that follows sees what the leader
            // did to the word.
            fence_after_rmw();
        }
        if mark() {
            return true;
        }
        // Relaxed: nothing was written under the claim.
        self.0.swap(0, Ordering::Relaxed);
        false
    }

    /// The write has landed (C3).
    #[inline]
    pub(crate) fn end(claim: &AtomicU64) {
        // Release: pairs with the Acquire in `Claims::look`; publishes the data of the write, and
        // its mark.
        claim.store(0, weaken(Step::PublishEnd, Ordering::Release));
    }

    /// What is claimed, for the guard that ends it.
    pub(crate) fn word(&self) -> &AtomicU64 {
        &self.0
    }
}

impl Claims {
    pub(crate) fn new() -> Self {
        Claims {
            slots: Mutex::new(Vec::new()),
        }
    }

    /// A slot for a new handle.
    pub(crate) fn add(&self) -> Arc<Slot> {
        let slot = Arc::new(Slot(AtomicU64::new(0)));
        lock(&self.slots).push(Arc::clone(&slot));
        slot
    }

    /// The handle is dropped. A claim whose guard was forgotten stays: its write may be in flight.
    pub(crate) fn remove(&self, slot: &Arc<Slot>) {
        // Relaxed: guards borrow the handle, so this comes after their end.
        if slot.0.load(Ordering::Relaxed) == 0 {
            lock(&self.slots).retain(|other| !Arc::ptr_eq(other, slot));
        }
    }

    /// What is claimed, after the leader changed words (L2): extents and pages, by extent.
    pub(crate) fn look(&self) -> Vec<(u64, u32)> {
        // A handle that is added after this finds the words as the leader left them: the lock
        // orders that.
        let slots = lock(&self.slots);
        if slots.is_empty() {
            return Vec::new();
        }
        if performs(Step::LookFence) {
            // SeqCst: pairs with the fence in `Slot::claim`, where both outcomes are.
            fence(Ordering::SeqCst);
        }
        let mut claims = Vec::new();
        for slot in slots.iter() {
            // Acquire: pairs with the Release in `Slot::end`; after a claim that ended, this thread
            // sees the data of the write and its mark.
            let claim = slot.0.load(weaken(Step::SeeEnd, Ordering::Acquire));
            if claim != 0 {
                claims.push((claim >> 32, claim as u32));
            }
        }
        claims.sort_unstable();
        claims
    }
}

/// The pages of `extent` in what [`Claims::look`] returned.
pub(crate) fn claimed(claims: &[(u64, u32)], extent: u64) -> u32 {
    let from = claims.partition_point(|(other, _)| *other < extent);
    let of_extent = claims[from..].iter();
    let of_extent = of_extent.take_while(|(other, _)| *other == extent);
    of_extent.fold(0, |all, (_, pages)| all | pages)
}
