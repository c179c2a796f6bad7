//! A value that is set once, and read without blocking, in one word.

use std::fmt;
use std::marker::PhantomData;
use std::ptr;
use std::sync::Mutex;
use std::sync::atomic::AtomicPtr;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};

/// As a `OnceLock<Box<T>>`, in half of its size, for parts that few objects have. The model checker
/// does not see it, so an atomic of its user must order the store and the loads.
pub struct OnceBox<T> {
    /// Null, or from `Box::into_raw`; it stays until the drop.
    value: AtomicPtr<T>,
    /// Shared only if `T` may be sent and shared: a value is set by one thread, read by others, and
    /// dropped by any of them.
    owns: PhantomData<(Box<T>, Mutex<T>)>,
}

impl<T> OnceBox<T> {
    /// Without a value. Allocates nothing.
    pub const fn new() -> Self {
        OnceBox {
            value: AtomicPtr::new(ptr::null_mut()),
            owns: PhantomData,
        }
    }

    /// The value, if it was set.
    #[inline]
    pub fn get(&self) -> Option<&T> {
        // Acquire: pairs with the Release in `set`. If it sees the pointer, it sees the value.
        let value = self.value.load(Acquire);
        // SAFETY: null, or from `Box::into_raw` in `set`. It is freed by the drop alone, and no
        // exclusive reference exists before.
        unsafe { value.as_ref() }
    }

    /// The value, which is that of `new` if none was set. Of several threads that set it at the
    /// same time one wins, and all of them get its value. Lock-free.
    pub fn get_or_init(&self, new: impl FnOnce() -> T) -> &T {
        match self.get() {
            Some(value) => value,
            None => self.set(Box::new(new())),
        }
    }

    #[cold]
    fn set(&self, value: Box<T>) -> &T {
        let ours = Box::into_raw(value);
        // Release on success: publishes the value, for the Acquire in `get`. Acquire on failure:
        // another thread has set its value first, and we use that one.
        let set = (self.value).compare_exchange(ptr::null_mut(), ours, Release, Acquire);
        let value = match set {
            Ok(_) => ours,
            Err(theirs) => {
                // SAFETY: from `Box::into_raw` above, and not published.
                drop(unsafe { Box::from_raw(ours) });
                theirs
            }
        };
        // SAFETY: as in `get`, and not null.
        unsafe { &*value }
    }
}

impl<T> Default for OnceBox<T> {
    fn default() -> Self {
        Self::new()
    }
}

impl<T: fmt::Debug> fmt::Debug for OnceBox<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("OnceBox").field(&self.get()).finish()
    }
}

impl<T> Drop for OnceBox<T> {
    fn drop(&mut self) {
        // Relaxed: exclusive access.
        let value = self.value.load(Relaxed);
        if !value.is_null() {
            // SAFETY: from `Box::into_raw` in `set`, and the reference to it here is the last.
            drop(unsafe { Box::from_raw(value) });
        }
    }
}

#[cfg(all(test, not(any(dirtymap_loom, dirtymap_shuttle))))]
mod tests {
    use super::*;
    use std::sync::{Arc, Barrier};

    /// Threads set a value at the same time: all get one of them, and each value is dropped once.
    #[test]
    fn threads_that_set_a_value_at_once_get_the_same() {
        const THREADS: usize = 4;
        let rounds = if cfg!(miri) { 5 } else { 500 };
        for _ in 0..rounds {
            let (counted, barrier) = (Arc::new(()), Barrier::new(THREADS));
            let once = OnceBox::new();
            let set = |nth: usize| {
                barrier.wait();
                let (got, _) = once.get_or_init(|| (nth, Arc::clone(&counted)));
                *got
            };
            let got: Vec<usize> = std::thread::scope(|scope| {
                let set = &set;
                let threads = [0, 1, 2, 3].map(|nth| scope.spawn(move || set(nth)));
                let got = threads.into_iter().map(|thread| thread.join());
                got.filter_map(Result::ok).collect()
            });
            assert_eq!(got, vec![got[0]; THREADS]);
            assert_eq!(once.get().map(|(nth, _)| *nth), Some(got[0]));
            assert_eq!(Arc::strong_count(&counted), 2, "the others were dropped");
            drop(once);
            assert_eq!(Arc::strong_count(&counted), 1);
        }
    }

    #[test]
    fn a_value_that_was_never_set_is_none_and_costs_a_word() {
        let once = OnceBox::<[u8; 100]>::default();
        assert!(once.get().is_none());
        assert_eq!(size_of_val(&once), size_of::<usize>());
    }
}
