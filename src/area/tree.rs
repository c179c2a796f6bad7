//! The tree: one atomic root.

use std::fmt;
use std::marker::PhantomData;
use std::ptr;

use super::edit::Edit;
use super::node::Node;
use super::reclaim::{Pinned, Pool, Reclaim};
use super::root::Root;
use super::snapshot::Snapshot;
use crate::sync::{Arc, AtomicPtr, Ordering, Witness, back_off};
#[cfg(test)]
use crate::{error::Error, units::IovaRange};

/// A concurrent map from non-overlapping ranges to shared areas, in nodes of up to `F` slots, with
/// rules of type `R`. See the [module](super).
///
/// Areas that were removed and rules that were replaced are dropped by later updates or by
/// [`AreaTree::reclaim`], after all snapshots of that time are gone. Those that still wait when the
/// tree is dropped may be dropped later, on any thread that uses a tree.
pub(crate) struct AreaTree<T, const F: usize = 16, R = ()> {
    /// Never null.
    root: AtomicPtr<Root<T, F, R>>,
    reclaim: Arc<Reclaim<T, F, R>>,
    owns: PhantomData<(Arc<T>, Arc<R>)>,
}

impl<T, const F: usize, R> AreaTree<T, F, R>
where
    T: Send + Sync + 'static,
    R: Default + Send + Sync + 'static,
{
    /// A tree without areas, under default rules.
    pub(crate) fn new() -> Self {
        let root = Box::new(Root {
            node: ptr::null_mut(),
            areas: 0,
            rules: Arc::into_raw(Arc::new(R::default())),
            version: 0,
            witness: Witness::new(),
        });
        AreaTree {
            root: AtomicPtr::new(Box::into_raw(root)),
            reclaim: Reclaim::new(),
            owns: PhantomData,
        }
    }

    /// The areas and rules of this moment. Never blocks and never retries. Frees and drops nothing.
    #[inline(always)]
    pub(crate) fn snapshot(&self) -> Snapshot<'_, T, F, R> {
        let pinned = Pinned::new();
        // Acquire: pairs with the Release in `Edit::publish`. If we see that root, its rules, nodes
        // and areas are visible; if not, we have an older root, which was published in the same
        // way.
        let root = self.root.load(Ordering::Acquire);
        // SAFETY: loaded from our root with Acquire, after the pin.
        unsafe { Snapshot::new(&self.root, root, pinned) }
    }

    /// Maps `area` at `range`.
    ///
    /// # Errors
    /// [`Error::Overlap`] with the lowest area in the way, and `area` back.
    #[cfg(test)]
    pub(crate) fn insert(&self, range: IovaRange, area: Arc<T>) -> Result<(), (Error, Arc<T>)> {
        self.update(|edit| edit.insert(range, Arc::clone(&area)))
            .map_err(|error| (error, area))
    }

    /// Performs all changes that `change` makes as one atomic step. Lock-free. If another update
    /// was published meanwhile, `change` runs again on the new state, so only the effects of its
    /// last run may remain. Each failed attempt waits a little longer before the next one, up to a
    /// bound.
    ///
    /// # Errors
    /// Those of `change`; then the tree is unchanged.
    pub(crate) fn update<V, E>(
        &self,
        mut change: impl FnMut(&mut Edit<'_, T, F, R>) -> Result<V, E>,
    ) -> Result<V, E> {
        let mut failures = 0;
        loop {
            let pinned = Pinned::new();
            // Acquire: pairs with the Release in `Edit::publish`; the nodes that the edit reads and
            // shares are visible. If a later root exists, the compare-exchange of the edit fails.
            let base = self.root.load(Ordering::Acquire);
            // SAFETY: loaded from our root with Acquire, after the pin; the tree is borrowed for
            // longer.
            let mut edit = unsafe { Edit::new(base, &self.reclaim, &pinned) };
            let result = change(&mut edit)?;
            // SAFETY: `base` was loaded from this root.
            if unsafe { edit.publish(&self.root) } {
                return Ok(result);
            }
            drop(pinned);
            back_off(failures);
            failures += 1;
        }
    }

    /// Drops the areas and rules that no snapshot can reach any more, and advances the epoch by one
    /// step. After three calls while no snapshot exists in the process, nothing waits any more.
    /// Updates do the same for earlier ones, so this is useful only if no other update follows
    /// soon.
    pub(crate) fn reclaim(&self) {
        let mut pool = Reclaim::checkout(&self.reclaim);
        pool.trim(usize::MAX);
        pool.drop_areas(usize::MAX);
        // SAFETY: published updates have replaced what is open.
        unsafe { pool.hand_over(&Pinned::new()) };
    }

    #[cfg(all(test, not(dirtymap_loom)))]
    pub(super) fn reclaimer(&self) -> &Arc<Reclaim<T, F, R>> {
        &self.reclaim
    }

    /// Asserts the invariants of the current state.
    ///
    /// # Panics
    /// If one does not hold.
    #[cfg(all(test, not(dirtymap_loom)))]
    pub(crate) fn internal_validate(&self) {
        self.snapshot().internal_validate();
    }
}

impl<T, const F: usize, R> fmt::Debug for AreaTree<T, F, R>
where
    T: Send + Sync + 'static,
    R: Default + Send + Sync + 'static,
{
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AreaTree")
            .field("areas", &self.snapshot().len())
            .finish_non_exhaustive()
    }
}

impl<T, const F: usize, R> Drop for AreaTree<T, F, R> {
    fn drop(&mut self) {
        // Relaxed: exclusive access, so the last update happened before.
        let root = self.root.load(Ordering::Relaxed);
        // SAFETY: made by `Box::into_raw`, never null. `&mut self`: no reader and no edit is left,
        // so it is ours (Inv. 4).
        let root = unsafe { Box::from_raw(root) };
        let mut pool = Reclaim::checkout(&self.reclaim);
        if !root.node.is_null() {
            // SAFETY: ours like the root, which is used no more.
            unsafe { free_all(root.node, &mut pool) };
        }
        // SAFETY: made by `Arc::into_raw`; the count of the current rules is ours like the root.
        drop(unsafe { Arc::from_raw(root.rules) });
        // SAFETY: as above, no reader is left.
        unsafe { pool.absorb_open() };
    }
}

/// Frees `node` and all nodes below it, and releases the tree's count of each area.
///
/// # Safety
/// No other thread reaches `node`, and it is not used again.
unsafe fn free_all<T, const F: usize, R>(node: *mut Node<T, F>, pool: &mut Pool<T, F, R>) {
    // SAFETY: made by `Box::into_raw`, and ours to free, by our contract.
    let node = unsafe { Box::from_raw(node) };
    for at in 0..node.len() {
        if node.is_leaf() {
            // SAFETY: made by `Arc::into_raw`; the count of this slot is ours, by our contract.
            drop(unsafe { Arc::from_raw(node.area(at)) });
        } else {
            // SAFETY: a child is reached only through its parent, so it is ours too.
            unsafe { free_all(node.child(at), pool) };
        }
    }
    pool.free(node);
}
