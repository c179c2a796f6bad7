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

    /// Waits a little longer for each failure in a row, up to some 100 ns, so that threads that compete for one word do
    /// not spend their time failing; from then on leaves the core to others.
    pub fn back_off(failures: u32) {
        const SPIN_LG2: u32 = 6;
        if failures > SPIN_LG2 {
            return std::thread::yield_now();
        }
        for _ in 0..1u32 << failures {
            std::hint::spin_loop();
        }
    }

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

    /// Tells the model that this thread waits for others.
    pub fn back_off(_failures: u32) {
        loom::thread::yield_now();
    }

    /// Tells the model that this thread cannot go on before another one has.
    pub fn relax() {
        loom::thread::yield_now();
    }
}

pub use imp::*;

/// Keeps the compiler from moving accesses; to the processor, and to the model checker, it is nothing.
pub use std::sync::atomic::compiler_fence;

/// A full fence, right behind a read-modify-write. On x86-64 that operation is a full barrier already, as every locked instruction
/// is (Intel SDM volume 3, "Memory Ordering"), so only the compiler has to keep the order.
#[inline]
pub fn fence_after_rmw() {
    if cfg!(all(target_arch = "x86_64", not(dirtymap_loom), not(miri))) {
        compiler_fence(Ordering::SeqCst);
    } else {
        fence(Ordering::SeqCst);
    }
}

/// A full fence, right behind an Acquire load, for a load that follows: where a store becomes visible to all other threads at
/// once, as on x86-64, AArch64 and RISC-V, two loads in this order see no more and no less with a fence between them.
#[inline]
pub fn fence_after_look() {
    if cfg!(all(
        any(
            target_arch = "x86_64",
            target_arch = "aarch64",
            target_arch = "riscv64"
        ),
        not(dirtymap_loom),
        not(miri)
    )) {
        compiler_fence(Ordering::SeqCst);
    } else {
        fence(Ordering::SeqCst);
    }
}

/// Set once and read without waiting; invisible to the model checker, so an atomic of its user must order the two.
pub use std::sync::OnceLock;

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
    /// The fences between a mark, or the end of an area or a domain, and the look at the other.
    GoneFence,
    /// Recording a page before its bit is cleared.
    RecordBeforeClear,
    /// Waiting for writes that were already translated.
    DrainInFlight,
    /// Dropping cached translations when a flush asks for it.
    DropCached,
    /// Keeping what is to be freed until its flush has finished.
    FreeAfterFlush,
    /// Running frees in one thread at a time.
    OneReleases,
    /// Giving gathers that come during a flush to the next one.
    NextGeneration,
    /// Owing again what a failed flush carried.
    OweAgain,
    /// Marking the pages of a write in flight before its slot is freed.
    MarkBeforeFree,
    /// Publishing the rest of a leaf that a request covers in part before the leaf is cleared.
    GuardRest,
    /// Handing over the debt of such a rest after the clear; left out, it is handed over before.
    OweAfterClear,
    /// Filling a pair of area and domain only if it is not filled.
    FillOnce,
    /// Leaving pairs unfilled whose domain is leaving.
    RefuseLeaving,
    /// Looking at the areas after a domain was published, not before.
    LookAfterPublish,
    /// Closing the pairs of an area that has gone.
    ClosePairs,
    /// Closing the pairs of a piece that goes in the batch that cuts it out.
    ClosePieces,
    /// Marking what is put back into an area or a domain that is going.
    MarkIfGoing,
    /// Flushing before the addresses of an unmap are free.
    FlushBeforeReuse,
    /// Waiting for the readers of a replaced node of the area tree before it is used again.
    WaitForReaders,
    /// Leading marks by the handle of an area that was cut to its pieces.
    GiveWay,
    /// Saying that what a detach moves to the marks is in flight.
    DetachInFlight,
    /// Looking at what is in flight when an area goes.
    LookInFlight,
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
    /// Making it dirty again when no device caches a pointer to the table any more.
    DirtyBehindFlush,
    /// Clearing a summary before what it stands for is taken, not after.
    SummaryFirst,
    /// The fence between the clear of a summary and the look at what it stands for.
    SummaryFence,
    /// Looking at the summary when a mark is found set.
    SummaryOnSkip,
    /// Publishing the words of a chunk that is whole before it is so no more.
    PublishRest,
    /// Saying that a chunk is being split before its words are set.
    AnnounceSplit,
    /// The fence that `membarrier` runs in a thread that marks.
    Membarrier,
    /// Looking at a subtree only after the flush that follows the clear of its accessed bit.
    LookAfterFlush,
    /// Saying above a change by hand that nothing is known of the subtree any more.
    HeatAbove,
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
