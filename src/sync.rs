//! The only file that names `std::sync` or `loom`.
//!
//! Everything concurrent in the library takes its atomics, locks and threads from here, so that the model checker sees
//! the same code that users run. `pagetable-sim` uses it too, through a hidden re-export: one shim, not two.

#[cfg(all(dirtymap_loom, not(crossbeam_loom)))]
compile_error!(
    "loom builds need both cfgs, RUSTFLAGS=\"--cfg dirtymap_loom --cfg crossbeam_loom\": without the second one \
     crossbeam-epoch is invisible to the model checker and a broken model passes"
);

#[cfg(not(dirtymap_loom))]
mod imp {
    pub use std::sync::atomic::{
        AtomicBool, AtomicPtr, AtomicU8, AtomicU64, AtomicUsize, Ordering, fence,
    };
    pub use std::sync::{Arc, Mutex, MutexGuard};
    pub use std::thread;

    /// Waits a little for another thread to make progress.
    pub fn relax() {
        std::thread::yield_now();
    }
}

#[cfg(dirtymap_loom)]
mod imp {
    pub use loom::sync::atomic::{
        AtomicBool, AtomicPtr, AtomicU8, AtomicU64, AtomicUsize, Ordering, fence,
    };
    pub use loom::sync::{Arc, Mutex, MutexGuard};
    pub use loom::thread;

    /// Tells the model that this thread cannot go on before another one has.
    pub fn relax() {
        loom::thread::yield_now();
    }
}

pub use imp::*;

/// Locks `mutex`, also when a thread panicked while it held it: what the library guards with a mutex is valid at every
/// step, so a panic elsewhere must not take the accounting down with it.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// Steps of the protocols that a model can leave out, to show that the checks notice. Compiled into loom builds only.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Step {
    /// The fence between the data write and the test of the mark.
    MarkFence = 1,
    /// The fence between clearing marks and copying pages.
    SyncFence,
    /// Owing the gather before the pages of an aborted lease become dirty again.
    OweBeforePutBack,
    /// Waiting for a flush that another thread has begun with our gather.
    WaitForLeader,
    /// The fences between a mark, or the end of an area, and the look at the other.
    GoneFence,
    /// Recording a page before its bit is cleared.
    RecordBeforeClear,
    /// Waiting for writes that were already translated.
    DrainInFlight,
    /// Dropping cached translations when a flush asks for it.
    DropCached,
    /// Dropping those that are larger than what the flush names.
    DropLarger,
    /// Looking at every entry of a leaf for its dirty bit.
    ReadEveryEntry,
    /// Making every entry of a leaf clean.
    CleanEveryEntry,
    /// Making the parts of a split leaf dirty if the leaf was.
    DirtyParts,
    /// Making all of a group dirty before an entry with D leaves it in a split.
    SpreadDirty,
    /// Making a leaf that takes the place of a table dirty.
    DirtyWhole,
}

#[cfg(dirtymap_loom)]
static LEFT_OUT: std::sync::atomic::AtomicU8 = std::sync::atomic::AtomicU8::new(0);

/// Leaves `step` out of every run of the model from now on; `None` restores the protocol.
#[cfg(dirtymap_loom)]
pub fn leave_out(step: Option<Step>) {
    LEFT_OUT.store(
        step.map_or(0, |s| s as u8),
        std::sync::atomic::Ordering::SeqCst,
    );
}

/// Whether the protocol performs `step`. Always true outside of loom builds, and optimised away there.
#[inline(always)]
pub fn performs(step: Step) -> bool {
    #[cfg(dirtymap_loom)]
    {
        LEFT_OUT.load(std::sync::atomic::Ordering::SeqCst) != step as u8
    }
    #[cfg(not(dirtymap_loom))]
    {
        let _ = step;
        true
    }
}
