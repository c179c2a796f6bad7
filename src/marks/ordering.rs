//! What orders marks against copies: a fence on both sides, or all of the cost on the side of the
//! copy.
//!
//! A mark of a page that is marked already stores data and then loads the mark, with a full fence
//! in between (F1 of [`marks`](super::marks)). That fence is most of what such a mark costs. An
//! *asymmetric fence* moves the cost: `membarrier(2)` of Linux runs a full fence in every running
//! thread of the process, at the moment when a thread is about to copy:
//!
//! ```text
//!  writer                       copier
//!  W1  store data               H1  clear the mark
//!                               F2  membarrier: a fence at some point of the writer's program
//!  W2  load the mark            H2  copy the page
//! ```
//!
//! That point lies before W2 or after W1 (or both, between the two):
//! - if it lies before W2, W2 sees the clear of H1, so it sets the mark again;
//! - if it lies after W1, H2 sees the store of W1, so the copy has the data.
//!
//! A mark that was clear is set, and then followed by the fence F3, in both ways of ordering.

use crate::sync::{Ordering, Step, compiler_fence, fence, performs};

/// What orders marks against the copies of the marked pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum MarkOrdering {
    /// A full fence in each mark, and one in each [`sync`](crate::Lease::sync), unmap, and switch
    /// of tracking to on.
    #[default]
    Fences,
    /// A compiler fence in each mark, and `membarrier(2)` in each [`sync`](crate::Lease::sync),
    /// unmap, and switch of tracking to on.
    Membarrier,
}

impl MarkOrdering {
    /// [`Membarrier`](Self::Membarrier) if the system has it, else [`Fences`](Self::Fences).
    #[cfg_attr(not(feature = "membarrier"), expect(dead_code))]
    pub(crate) fn asymmetric() -> Self {
        match imp::register() {
            true => MarkOrdering::Membarrier,
            false => MarkOrdering::Fences,
        }
    }

    /// F1: orders the data write before the load of its mark.
    #[inline(always)]
    pub(crate) fn before_look(self) {
        match self {
            MarkOrdering::Fences if performs(Step::MarkFence) => {
                // SeqCst: F1 of the protocol of `marks`; pairs with F2 in `before_copies`. If F1
                // comes first, the copy has the data; if F2 comes first, the load that follows sees
                // the clear of the mark.
                fence(Ordering::SeqCst);
            }
            // SeqCst: F1 for the compiler alone. The processor runs its fence when the membarrier
            // of `before_copies` interrupts it; the module has both outcomes.
            _ => compiler_fence(Ordering::SeqCst),
        }
    }

    /// F2: orders the clear of marks before the copies. `step` names the call.
    ///
    /// # Panics
    /// If the system no longer grants `membarrier(2)`, which it granted when the space was made: to
    /// go on would lose writes.
    #[cfg_attr(dirtymap_loom, track_caller)]
    pub(crate) fn before_copies(self, step: Step) {
        if performs(step) {
            // SeqCst: F2 of the protocol of `marks`; pairs with F1 in `before_look`. If F1 comes
            // first, the copies have the data; if F2 comes first, the marker sees the clear and
            // marks again. Also orders a flush before the copies.
            fence(Ordering::SeqCst);
        }
        if self == MarkOrdering::Membarrier && performs(Step::Membarrier) {
            assert!(
                imp::issue(),
                "membarrier(2) has failed after it was registered"
            );
        }
    }
}

#[cfg(all(
    feature = "membarrier",
    target_os = "linux",
    not(dirtymap_loom),
    not(dirtymap_shuttle),
    not(miri)
))]
mod imp {
    /// Registers this process for expedited private barriers. Returns whether the system has them.
    pub(super) fn register() -> bool {
        call(libc::MEMBARRIER_CMD_REGISTER_PRIVATE_EXPEDITED)
    }

    /// Runs a full fence in every running thread of this process. Returns false if the system
    /// refuses. A child of a fork that is not registered yet registers first.
    pub(super) fn issue() -> bool {
        let expedited = || call(libc::MEMBARRIER_CMD_PRIVATE_EXPEDITED);
        expedited() || (register() && expedited()) || call(libc::MEMBARRIER_CMD_GLOBAL)
    }

    fn call(command: libc::c_int) -> bool {
        // SAFETY: this system call takes numbers and touches no memory of ours.
        unsafe { libc::syscall(libc::SYS_membarrier, command, 0, 0) == 0 }
    }
}

#[cfg(not(all(
    feature = "membarrier",
    target_os = "linux",
    not(dirtymap_loom),
    not(dirtymap_shuttle),
    not(miri)
)))]
mod imp {
    pub(super) fn register() -> bool {
        false
    }

    /// In models this succeeds: they run a fence at any point of the other thread themselves.
    pub(super) fn issue() -> bool {
        #[cfg(all(test, dirtymap_loom))]
        super::super::loom_tests::interrupt::ask();
        crate::sync::TINY
    }
}
