//! What orders marks against copies: a fence on both sides, or all of the cost on one.
//!
//! A mark of a page that is marked already is a store of data and a look at the mark, with a full fence between them (F1 of
//! [`marks`](super::marks)), and that fence is most of what it costs. `membarrier(2)` of Linux runs a full fence in every
//! running thread of the process instead, at the moment when somebody is about to copy:
//!
//! ```text
//!  writer                       copier
//!  W1  store data               H1  clear the mark
//!                               F2  membarrier: at some point of the writer's program, a fence there
//!  W2  look at the mark         H2  copy the page
//! ```
//!
//! If that point comes before W2, W2 sees the clear and sets the mark anew; else it comes behind W1, and H2 sees the data.
//! A new mark has its fence F3 in both ways.

use crate::sync::{Ordering, Step, compiler_fence, fence, performs};

/// What orders marks against the copies of the pages that they speak of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum MarkOrdering {
    /// A full fence in each mark, and one in each [`sync`](crate::Lease::sync).
    #[default]
    Fences,
    /// A compiler fence in each mark, and `membarrier(2)` in each `sync`, unmap, and switch of tracking to on.
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

    /// F1: what comes between a data write and the look at its mark.
    #[inline(always)]
    pub(crate) fn before_look(self) {
        match self {
            MarkOrdering::Fences if performs(Step::MarkFence) => {
                // SeqCst: F1 of the protocol of `marks`; pairs with F2 in `before_copies`.
                fence(Ordering::SeqCst);
            }
            // SeqCst: F1; the processor's part of it comes with the membarrier of `before_copies`.
            _ => compiler_fence(Ordering::SeqCst),
        }
    }

    /// F2: what comes between the clear of marks and the copies.
    ///
    /// # Panics
    /// If the system takes back what it promised when the space was made: going on would lose writes.
    pub(crate) fn before_copies(self) {
        if performs(Step::SyncFence) {
            // SeqCst: F2 of the protocol of `marks`; pairs with F1 in `before_look`. Orders a flush before the copies, too.
            fence(Ordering::SeqCst);
        }
        if self == MarkOrdering::Membarrier {
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
    /// Makes this process known as one that uses expedited private barriers; whether the system has them.
    pub(super) fn register() -> bool {
        call(libc::MEMBARRIER_CMD_REGISTER_PRIVATE_EXPEDITED)
    }

    /// Runs a full fence in every running thread of this process. A process that was registered by the parent of a fork
    /// registers anew.
    pub(super) fn issue() -> bool {
        let expedited = || call(libc::MEMBARRIER_CMD_PRIVATE_EXPEDITED);
        expedited() || (register() && expedited()) || call(libc::MEMBARRIER_CMD_GLOBAL)
    }

    fn call(command: libc::c_int) -> bool {
        // SAFETY: this system call takes two numbers and touches no memory of ours.
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

    /// Models bring their own: a fence at any point of the other thread.
    pub(super) fn issue() -> bool {
        crate::sync::TINY
    }
}
