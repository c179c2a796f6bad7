//! The only module that names `std::sync`, `loom` or `shuttle`.
//!
//! Everything concurrent in the library takes its atomics, locks and threads from here, so that the model checkers see
//! the same code that users run. `pagetable-sim` uses it too, through a hidden re-export: one shim, not three.
//!
//! | cfg | feature | atomics, locks, threads | explores |
//! |---|---|---|---|
//! | none | | `std` | nothing |
//! | `dirtymap_loom` | `__loom` | `loom` | all interleavings within a bound, and each value that weak memory lets a load return |
//! | `dirtymap_shuttle` | `__shuttle` | `shuttle` | random interleavings of whole systems; each access is SeqCst |
//!
//! The cfg chooses the code, the feature brings the crate.

#[cfg(all(dirtymap_loom, not(all(crossbeam_loom, feature = "__loom"))))]
compile_error!(
    "loom builds need RUSTFLAGS=\"--cfg dirtymap_loom --cfg crossbeam_loom\" and --features __loom: \
     without the second cfg and the feature crossbeam-epoch is invisible to the model checker, and \
     a broken model passes"
);

#[cfg(all(dirtymap_shuttle, not(feature = "__shuttle")))]
compile_error!("builds with --cfg dirtymap_shuttle need --features __shuttle");

#[cfg(all(dirtymap_loom, dirtymap_shuttle))]
compile_error!("one model checker at a time");

#[cfg(any(dirtymap_loom, dirtymap_shuttle))]
pub mod model;
mod step;
mod witness;

pub use step::*;
pub use witness::Witness;

/// Whether everything has the size of a model: tables of two entries, chunks of two words, so that models reach every border.
pub const TINY: bool = cfg!(any(dirtymap_loom, dirtymap_shuttle));

#[cfg(not(any(dirtymap_loom, dirtymap_shuttle)))]
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

#[cfg(dirtymap_shuttle)]
mod imp {
    pub use shuttle::sync::atomic::{
        AtomicBool, AtomicPtr, AtomicU8, AtomicU64, AtomicUsize, Ordering, fence,
    };
    pub use shuttle::sync::{Arc, Mutex, MutexGuard};
    pub use shuttle::thread;

    /// Lets other threads run.
    pub fn back_off(_failures: u32) {
        shuttle::thread::yield_now();
    }

    /// Lets other threads run, one of which has to make progress.
    pub fn relax() {
        shuttle::thread::yield_now();
    }
}

pub use imp::*;

/// Keeps the compiler from moving accesses; to the processor, and to the model checker, it is nothing.
pub use std::sync::atomic::compiler_fence;

/// A full fence, right behind a read-modify-write. On x86-64 that operation is a full barrier already, as every locked instruction
/// is (Intel SDM volume 3, "Memory Ordering"), so only the compiler has to keep the order.
#[inline]
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
        not(dirtymap_shuttle),
        not(miri)
    )) {
        compiler_fence(Ordering::SeqCst);
    } else {
        fence(Ordering::SeqCst);
    }
}

/// Set once and read without waiting; invisible to the model checker, so an atomic of its user must order the two.
pub use std::sync::OnceLock;

/// A lock of the standard library, whatever checks the model: for lists that are pushed to and
/// taken whole, with no other lock and no step of a protocol inside. So no schedule can stop in it,
/// and it orders nothing that a model looks at. Destructors may take it after an execution of a
/// model has ended.
pub use std::sync::Mutex as InnerLock;

/// Locks `list`, as [`lock`] does.
pub fn lock_inner<T>(list: &InnerLock<T>) -> std::sync::MutexGuard<'_, T> {
    list.lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// Locks `mutex`, also when a thread panicked while it held it: what the library guards with a mutex is valid at every
/// step, so a panic elsewhere must not take the accounting down with it.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
}
