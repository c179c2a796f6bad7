//! The only module that names `std::sync`, `loom` or `shuttle`.
//!
//! Everything concurrent in the library takes its atomics, locks and threads from here, so that the
//! model checkers see the code that users run. The simulator and the adapters of this repository
//! use it too, because it is public and hidden: one shim for all. It is outside of the promise of
//! versions. An adapter elsewhere takes the atomics of std.
//!
//! | cfg | feature | atomics, locks, threads from |
//! |---|---|---|
//! | none | | `std` |
//! | `dirtymap_loom` | `__loom` | `loom` |
//! | `dirtymap_shuttle` | `__shuttle` | `shuttle` |
//!
//! The cfg selects the code, and the feature adds the crate to the build.
//!
//! * `std` explores nothing.
//! * `loom` explores all interleavings within a bound, with each value that a weak memory model
//!   lets a load return.
//! * `shuttle` explores random interleavings of whole systems. To it, each access is SeqCst.

#[cfg(all(dirtymap_loom, not(all(crossbeam_loom, feature = "__loom"))))]
compile_error!(
    "loom builds need RUSTFLAGS=\"--cfg dirtymap_loom --cfg crossbeam_loom\" and \
     --features __loom: without the second cfg and the feature, crossbeam-epoch is invisible \
     to the model checker, and a broken model passes"
);

#[cfg(all(dirtymap_shuttle, not(feature = "__shuttle")))]
compile_error!("builds with --cfg dirtymap_shuttle need --features __shuttle");

#[cfg(all(dirtymap_loom, dirtymap_shuttle))]
compile_error!("one model checker at a time");

#[cfg(any(dirtymap_loom, dirtymap_shuttle))]
pub mod model;
mod once;
mod pair;
#[cfg(dirtymap_loom)]
mod sites;
mod step;
mod witness;

pub use once::OnceBox;
pub use pair::PairExchange;
pub use step::*;
pub use witness::Witness;

/// Whether everything has the size of a model: tables of two entries, chunks of two words. So
/// models reach every border.
pub const TINY: bool = cfg!(any(dirtymap_loom, dirtymap_shuttle));

/// Prefetches a cache line: a hint, which changes no result.
#[inline]
pub(crate) fn prefetch(line: *const u8) {
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: a hint; it neither faults nor reads, for any address.
        unsafe { _mm_prefetch(line.cast(), _MM_HINT_T0) };
    }
    #[cfg(not(all(target_arch = "x86_64", not(miri))))]
    let _ = line;
}

#[cfg(not(any(dirtymap_loom, dirtymap_shuttle)))]
mod imp {
    pub use std::sync::atomic::{
        AtomicBool, AtomicPtr, AtomicU8, AtomicU64, AtomicUsize, Ordering, fence,
    };
    pub use std::sync::{Arc, Condvar, Mutex, MutexGuard};
    pub use std::thread;

    /// Waits a little longer after each consecutive failure, up to some 100 ns, so that threads
    /// that compete for one word do not fail again and again. After more failures it yields the
    /// core to other threads.
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
    pub use super::sites::{AtomicBool, AtomicPtr, AtomicU8, AtomicU64, AtomicUsize, fence};
    pub use loom::sync::atomic::Ordering;
    pub use loom::sync::{Arc, Condvar, Mutex, MutexGuard};
    pub use loom::thread;

    /// Tells the model that this thread waits for others.
    pub fn back_off(_failures: u32) {
        loom::thread::yield_now();
    }

    /// Tells the model that this thread cannot continue before another one does.
    pub fn relax() {
        loom::thread::yield_now();
    }
}

#[cfg(dirtymap_shuttle)]
mod imp {
    pub use shuttle::sync::atomic::{
        AtomicBool, AtomicPtr, AtomicU8, AtomicU64, AtomicUsize, Ordering, fence,
    };
    pub use shuttle::sync::{Arc, Condvar, Mutex, MutexGuard};
    pub use shuttle::thread;

    /// Lets other threads run.
    pub fn back_off(_failures: u32) {
        shuttle::thread::yield_now();
    }

    /// Lets other threads run; one of them has to make progress.
    pub fn relax() {
        shuttle::thread::yield_now();
    }
}

pub use imp::*;

/// Orders accesses for the compiler only. It has no effect on the processor, nor in the model
/// checker.
pub use std::sync::atomic::compiler_fence;

/// A full fence, right after a read-modify-write. On x86-64 such an operation is a full barrier
/// already, as every locked instruction is (Intel SDM volume 3, "Memory Ordering"), so only the
/// compiler has to keep the order.
#[inline]
#[cfg_attr(dirtymap_loom, track_caller)]
pub fn fence_after_rmw() {
    if cfg!(all(
        target_arch = "x86_64",
        not(dirtymap_loom),
        not(dirtymap_shuttle),
        not(miri)
    )) {
        compiler_fence(Ordering::SeqCst);
    } else {
        fence(Ordering::SeqCst);
    }
}

/// A full fence, right after an Acquire load, for a load that follows. On machines where a store
/// becomes visible to all other threads at once, such as x86-64, AArch64 and RISC-V, two loads in
/// this order see the same with a fence between them as without one.
#[inline]
#[cfg_attr(dirtymap_loom, track_caller)]
pub fn fence_after_look() {
    if cfg!(all(
        any(
            target_arch = "x86_64",
            target_arch = "aarch64",
            target_arch = "riscv64"
        ),
        not(dirtymap_loom),
        not(dirtymap_shuttle),
        not(miri)
    )) {
        compiler_fence(Ordering::SeqCst);
    } else {
        fence(Ordering::SeqCst);
    }
}

/// A full fence, right after looks that were all Acquire and, if `changed`, a read-modify-write
/// among them.
#[inline]
#[cfg_attr(dirtymap_loom, track_caller)]
pub fn fence_after_looks(changed: bool) {
    match changed {
        true => fence_after_rmw(),
        false => fence_after_look(),
    }
}

/// Set once and read without blocking. The model checker does not see it, so an atomic of its user
/// must order the store and the loads.
pub use std::sync::OnceLock;

/// A lock of the standard library in all builds, for lists that are pushed to and taken whole. No
/// other lock is taken and no step of a protocol happens while it is held, so no model has to stop
/// a thread inside, and it orders nothing that a model checks. Destructors may take it after an
/// execution of a model has ended.
pub use std::sync::Mutex as InnerLock;

/// Locks `list`, as [`lock`] does.
pub fn lock_inner<T>(list: &InnerLock<T>) -> std::sync::MutexGuard<'_, T> {
    list.lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// Locks `mutex`, even if a thread panicked while it held it: the data under each mutex of the
/// library is valid at every step, so a panic elsewhere must not block the accounting.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// Waits on `condvar` with `guard`, even if a thread panicked while it held the mutex; see
/// [`lock`].
pub fn wait<'m, T>(condvar: &Condvar, guard: MutexGuard<'m, T>) -> MutexGuard<'m, T> {
    condvar
        .wait(guard)
        .unwrap_or_else(std::sync::PoisonError::into_inner)
}
