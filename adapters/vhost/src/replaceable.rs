//! A value that is read without waiting, and replaced by waiting for its readers.
//!
//! # The protocol
//! ```text
//!  reader                                     replacer, one at a time
//!  W1  store data                             P1  swap the pointer
//!  R1  count itself as inside                 P2  fence(SeqCst)
//!  R2  fence(SeqCst)                          P3  wait until each count has been 0 once
//!  R3  load the pointer, use the value        P4  nobody reads the old value, nor ever will
//!  R4  count itself out
//! ```
//!
//! Either R2 or P2 comes first in the one order of all SeqCst fences:
//! - if R2 does, P3 sees the reader inside and waits for it: whatever it did with the old value
//!   comes before P4;
//! - if P2 does, the reader sees the new value. It counts as inside, but P3 need not wait for it.
//!
//! The same holds for data that the reader wrote before it came (W1): after P4 the replacer sees
//! it, or the reader sees the new value. So a marker that finds no log has written before the log
//! was in place.
//!
//! # Progress
//! There are two counts, and readers use the one that the phase names. A replacer waits for the
//! other one, turns the phase, and waits for the first. Meanwhile a reader enters the first count
//! only if it read the phase before the turn. So a replacer waits for no more readers than are
//! inside. Readers never wait.

use std::ptr;

use dirtymap::sync::{
    AtomicPtr, AtomicUsize, Mutex, Ordering, Step, back_off, fence, fence_after_rmw, lock, performs,
};

/// Threads are spread over so many counts; one in the model checker.
const SHARDS: usize = if cfg!(dirtymap_loom) { 1 } else { 8 };

/// See the [module](self).
#[derive(Debug)]
pub(crate) struct Replaceable<T> {
    current: AtomicPtr<T>,
    inside: [Shard; SHARDS],
    phase: AtomicUsize,
    replacing: Mutex<()>,
}

/// Readers inside, by phase. On cache lines of its own.
#[derive(Debug)]
#[repr(align(128))]
struct Shard([AtomicUsize; 2]);

// SAFETY: the value is owned as by a `Box`, and given away by the thread that replaces it, which
// may be any.
unsafe impl<T: Send> Send for Replaceable<T> {}
// SAFETY: readers on several threads share the value; a replacer may take it out of another
// thread's hands.
unsafe impl<T: Send + Sync> Sync for Replaceable<T> {}

impl<T> Default for Replaceable<T> {
    /// No value yet.
    fn default() -> Self {
        Replaceable {
            current: AtomicPtr::new(ptr::null_mut()),
            inside: std::array::from_fn(|_| Shard([AtomicUsize::new(0), AtomicUsize::new(0)])),
            phase: AtomicUsize::new(0),
            replacing: Mutex::new(()),
        }
    }
}

impl<T> Replaceable<T> {
    /// Calls `read` with the value, if there is one. It must not replace it.
    #[inline]
    pub(crate) fn read<R>(&self, read: impl FnOnce(Option<&T>) -> R) -> R {
        let _inside = self.enter();
        // Acquire: pairs with the Release in `replace`; publishes the value.
        let current = self.current.load(Ordering::Acquire);
        // SAFETY: null, or a value that `replace` gives away only when we have left.
        read(unsafe { current.as_ref() })
    }

    /// Puts `value` in place, and returns the one before it when no thread reads that any more.
    /// Waits for the readers inside.
    pub(crate) fn replace(&self, value: Box<T>) -> Option<Box<T>> {
        let _replacing = lock(&self.replacing);
        let value = Box::into_raw(value);
        // Release: publishes the value to `read`. Acquire: the one before is ours, as it was
        // published.
        let old = self.current.swap(value, Ordering::AcqRel);
        if performs(Step::ReplaceFence) {
            // SeqCst: P2; pairs with R2 in `enter`.
            fence(Ordering::SeqCst);
        }
        if performs(Step::WaitForInside) {
            // Relaxed: only replacers change it, and they hold the lock.
            let phase = self.phase.load(Ordering::Relaxed);
            self.wait_for(phase ^ 1);
            // Relaxed: either count is right; the phase bounds the wait of replacers.
            self.phase.store(phase ^ 1, Ordering::Relaxed);
            self.wait_for(phase);
        }
        // SAFETY: null, or made by `Box::into_raw` above and swapped out once; each reader that
        // could hold it has left.
        (!old.is_null()).then(|| unsafe { Box::from_raw(old) })
    }

    /// P3, for the readers of one phase.
    fn wait_for(&self, phase: usize) {
        for shard in &self.inside {
            let mut looks = 0;
            // Acquire: pairs with the Release in `Inside::drop`; what the reader did is visible.
            while shard.0[phase].load(Ordering::Acquire) != 0 {
                back_off(looks);
                looks += 1;
            }
        }
    }

    #[inline]
    fn enter(&self) -> Inside<'_> {
        // Relaxed: either count is right.
        let phase = self.phase.load(Ordering::Relaxed);
        let count = &self.inside[own_shard()].0[phase & 1];
        // Relaxed: R2, a fence, comes after it and orders it.
        count.fetch_add(1, Ordering::Relaxed);
        if performs(Step::EnterFence) {
            // R2; pairs with P2 in `replace`.
            fence_after_rmw();
        }
        Inside(count)
    }
}

impl<T> Drop for Replaceable<T> {
    fn drop(&mut self) {
        // Relaxed: exclusive access.
        let current = self.current.load(Ordering::Relaxed);
        if !current.is_null() {
            // SAFETY: made by `Box::into_raw` in `replace`; `drop` has the only reference left.
            drop(unsafe { Box::from_raw(current) });
        }
    }
}

/// A reader, from R1 to R4; leaves also when the reading panics.
struct Inside<'a>(&'a AtomicUsize);

impl Drop for Inside<'_> {
    #[inline]
    fn drop(&mut self) {
        // Release: pairs with the Acquire in `wait_for`.
        self.0.fetch_sub(1, Ordering::Release);
    }
}

#[cfg(not(dirtymap_loom))]
fn own_shard() -> usize {
    static THREADS: AtomicUsize = AtomicUsize::new(0);
    // Relaxed: a number; it orders nothing.
    std::thread_local!(static OWN: usize = THREADS.fetch_add(1, Ordering::Relaxed));
    OWN.with(|own| own % SHARDS)
}

#[cfg(dirtymap_loom)]
fn own_shard() -> usize {
    0
}

#[cfg(all(test, not(dirtymap_loom)))]
#[allow(clippy::unwrap_used)] // helpers of tests
mod tests {
    use super::*;
    use dirtymap::sync::{Arc, AtomicBool, AtomicU64, thread};

    #[test]
    fn what_is_replaced_is_handed_out_and_what_is_left_is_dropped() {
        let value = Arc::new(7u64);
        let cell = Replaceable::default();
        assert!(cell.read(|none: Option<&Arc<u64>>| none.is_none()));
        assert_eq!(cell.replace(Box::new(value.clone())), None);
        assert_eq!(cell.read(|some| some.map(|n| **n)), Some(7));
        assert_eq!(
            cell.replace(Box::new(Arc::new(8))),
            Some(Box::new(value.clone()))
        );
        assert_eq!(Arc::strong_count(&value), 1);
        cell.replace(Box::new(value.clone()));
        drop(cell);
        assert_eq!(Arc::strong_count(&value), 1);
    }

    #[test]
    fn a_reader_that_panics_has_left() {
        let cell = Replaceable::default();
        cell.replace(Box::new(1u64));
        let panics = std::panic::AssertUnwindSafe(|| cell.read(|_| panic!("on purpose")));
        assert!(std::panic::catch_unwind(panics).is_err());
        assert_eq!(cell.replace(Box::new(2)), Some(Box::new(1)));
    }

    #[test]
    fn a_replacer_waits_for_readers_inside() {
        let cell = Replaceable::default();
        cell.replace(Box::new(1u64));
        let [inside, replaced, leave] = [(); 3].map(|()| AtomicBool::new(false));
        let wait = |flag: &AtomicBool| {
            while !flag.load(Ordering::Acquire) {
                thread::yield_now();
            }
        };
        thread::scope(|scope| {
            scope.spawn(|| {
                cell.read(|value| {
                    inside.store(true, Ordering::Release);
                    wait(&leave);
                    assert!(!replaced.load(Ordering::Acquire), "it did not wait");
                    assert_eq!(value, Some(&1));
                });
            });
            scope.spawn(|| {
                wait(&inside);
                cell.replace(Box::new(2));
                replaced.store(true, Ordering::Release);
            });
            wait(&inside);
            // A reader that comes after the swap reads the new value, and is not waited for.
            while cell.read(|value| value == Some(&1)) {
                thread::yield_now();
            }
            thread::sleep(std::time::Duration::from_millis(50));
            leave.store(true, Ordering::Release);
        });
        assert!(replaced.load(Ordering::Acquire));
    }

    /// Readers that overlap without end: a replacer that waited for one count to be 0 would wait
    /// for ever.
    #[test]
    fn a_replacer_does_not_wait_for_readers_that_come_later() {
        let cell = Replaceable::default();
        cell.replace(Box::new(Arc::new(AtomicU64::new(0))));
        let stop = AtomicBool::new(false);
        thread::scope(|scope| {
            for _ in 0..2 * SHARDS {
                scope.spawn(|| {
                    while !stop.load(Ordering::Relaxed) {
                        cell.read(|value| {
                            value.unwrap().fetch_add(1, Ordering::Relaxed);
                            thread::yield_now();
                        });
                    }
                });
            }
            for _ in 0..200 {
                let old = cell.replace(Box::new(Arc::new(AtomicU64::new(0)))).unwrap();
                let count = old.load(Ordering::Relaxed);
                thread::yield_now();
                assert_eq!(old.load(Ordering::Relaxed), count, "it is nobody else's");
            }
            stop.store(true, Ordering::Relaxed);
        });
    }
}
