//! The only user of the epoch: pins readers and frees what nobody can reach any more.
//!
//! The collector is the process-wide one of `crossbeam-epoch`: to pin is to store into a word of this thread, without
//! any registration after the first time.

use crossbeam_epoch::Guard;

use super::node::Node;
use super::tree::Root;
use crate::sync::Arc;

/// A thread that is pinned: what it can reach in a tree from now on is not freed before this is dropped.
pub(super) struct Pinned(Guard);

impl Pinned {
    pub(super) fn new() -> Self {
        Pinned(crossbeam_epoch::pin())
    }

    /// Frees `garbage` when every thread that is pinned now has unpinned; by one deferred call.
    ///
    /// # Safety
    /// * `garbage` can no longer be reached from the root, and nobody else frees any of it.
    /// * This thread has been pinned since before it became unreachable.
    pub(super) unsafe fn retire<T, const F: usize, R>(&self, garbage: Garbage<T, F, R>)
    where
        T: Send + Sync + 'static,
        R: Send + Sync + 'static,
    {
        let has_areas = !garbage.areas.is_empty();
        // SAFETY: for `free`,
        // - nobody reaches the garbage: by our contract, only threads that are pinned now can have reached it, and the
        //   call runs after all of them have unpinned.
        // - freed once: by our contract nobody else frees it, and a deferred call runs once.
        let free = move || unsafe { garbage.free() };
        // SAFETY:
        // - `free` may run on another thread: nodes are plain memory, areas and rules are `Send + Sync`.
        // - `free` may outlive this frame and the tree: it owns all that it touches, and areas and rules are `'static`.
        unsafe { self.0.defer_unchecked(free) };
        if has_areas {
            // An area may own much memory. Out of this thread's bag, whoever pins next can free it.
            self.0.flush();
        }
    }

    /// Hands what this thread has retired to all threads, and frees what has become free.
    #[cfg(test)]
    pub(super) fn flush(&self) {
        self.0.flush();
    }
}

/// What a published edit made unreachable. Dropped without [`Garbage::free`] it frees nothing: an edit that is not
/// published leaves the nodes and areas that it meant to replace with the tree.
pub(super) struct Garbage<T, const F: usize, R> {
    /// The root that was replaced, or null. Without the nodes below it.
    pub(super) root: *mut Root<T, F, R>,
    pub(super) nodes: Vec<*mut Node<T, F>>,
    /// Areas, once for each range that was removed.
    pub(super) areas: Vec<*const T>,
}

impl<T, const F: usize, R> Garbage<T, F, R> {
    pub(super) fn new() -> Self {
        Garbage {
            root: std::ptr::null_mut(),
            nodes: Vec::new(),
            areas: Vec::new(),
        }
    }

    /// # Safety
    /// * The root, unless null, and the nodes were made by `Box::into_raw`, nobody reaches them, and nobody else frees them.
    /// * The tree's strong count of each area goes with its pointer.
    unsafe fn free(self) {
        if !self.root.is_null() {
            // SAFETY: as for the nodes below. It releases its own count of the rules.
            drop(unsafe { Box::from_raw(self.root) });
        }
        for node in self.nodes {
            // SAFETY: made by `Box::into_raw`, unreachable and freed only here, by our contract. What it points to is
            // not touched.
            drop(unsafe { Box::from_raw(node) });
        }
        for area in self.areas {
            // SAFETY: made by `Arc::into_raw`, and the count is ours, by our contract.
            drop(unsafe { Arc::from_raw(area) });
        }
    }
}
