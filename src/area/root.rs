//! The root of a tree, which one compare-exchange publishes.

use super::node::Node;
use crate::sync::Witness;

/// All areas, and the rules for inserts, as one update publishes them. Dropping it frees no node.
pub(super) struct Root<T, const F: usize, R> {
    /// Null while there are no areas.
    pub(super) node: *mut Node<T, F>,
    /// The number of areas.
    pub(super) areas: usize,
    /// The pointer that `Arc::into_raw` returned. The tree owns one count of its rules, however
    /// many successive roots carry them.
    pub(super) rules: *const R,
    /// The number of updates that were published before, over the life of the tree.
    pub(super) version: u64,
    pub(super) witness: Witness,
}

impl<T, const F: usize, R> Root<T, F, R> {
    /// # Safety
    /// The rules are alive as long as the root is borrowed: they are retired with the last root
    /// that carries them.
    pub(super) unsafe fn rules(&self) -> &R {
        // SAFETY: from `Arc::into_raw`, so valid; alive, by our contract; rules do not change.
        unsafe { &*self.rules }
    }
}
