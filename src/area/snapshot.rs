//! Readers: the areas of one moment.

use std::marker::PhantomData;

use super::node::Node;
use super::reclaim::Pinned;
use super::root::Root;
use crate::sync::{Arc, AtomicPtr, Ordering};
use crate::units::{Granule, Iova, IovaRange};

/// One range and the area that is mapped there.
#[derive(Debug)]
pub(crate) struct Entry<'a, T> {
    pub(crate) range: IovaRange,
    pub(crate) area: &'a T,
    /// The same area, as `Arc::into_raw` returned it.
    pointer: *const T,
}

impl<T> Entry<'_, T> {
    /// # Safety
    /// `pointer` is from `Arc::into_raw`, and the area is alive as long as it is borrowed here.
    pub(super) unsafe fn new(range: IovaRange, pointer: *const T) -> Self {
        Entry {
            range,
            // SAFETY: alive, by our contract.
            area: unsafe { &*pointer },
            pointer,
        }
    }

    /// A strong count of the area, which may outlive the snapshot and the tree.
    pub(crate) fn to_arc(self) -> Arc<T> {
        // SAFETY:
        // - from `Arc::into_raw`: leaves hold nothing else.
        // - alive: the count of the tree is not released while `self.area` is borrowed (Inv. 3).
        unsafe { Arc::increment_strong_count(self.pointer) };
        // SAFETY: from `Arc::into_raw`, and the count that it takes over is the one made above.
        unsafe { Arc::from_raw(self.pointer) }
    }
}

impl<T> Clone for Entry<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Entry<'_, T> {}

/// The areas below one root. They do not change for `'a`.
pub(super) struct Subtree<'a, T, const F: usize> {
    root: Option<&'a Node<T, F>>,
    areas: PhantomData<&'a T>,
}

impl<T, const F: usize> Clone for Subtree<'_, T, F> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T, const F: usize> Copy for Subtree<'_, T, F> {}

impl<'a, T, const F: usize> Subtree<'a, T, F> {
    /// # Safety
    /// `root` is null or a node. It, all nodes and all areas below it stay alive, and none of the
    /// nodes changes, for `'a`.
    pub(super) unsafe fn below(root: *const Node<T, F>) -> Self {
        Subtree {
            // SAFETY: null or valid for `'a`, by our contract.
            root: unsafe { root.as_ref() },
            areas: PhantomData,
        }
    }

    pub(super) fn root(self) -> Option<&'a Node<T, F>> {
        self.root
    }

    /// The node below slot `at` of `parent`, which is one of these nodes and not a leaf.
    pub(super) fn child(self, parent: &'a Node<T, F>, at: usize) -> &'a Node<T, F> {
        // SAFETY: slots of nodes above the leaves point to nodes; alive and unchanged for `'a` by
        // the contract of `below`.
        unsafe { &*parent.child(at) }
    }

    fn entry(self, leaf: &'a Node<T, F>, at: usize) -> Entry<'a, T> {
        // SAFETY: slots of leaves hold what `Arc::into_raw` returned; the areas are alive for `'a`
        // by the contract of `below`.
        unsafe { Entry::new(leaf.range(at), leaf.area(at)) }
    }

    /// The first area whose last address is not below `x`: its leaf and slot.
    #[inline]
    fn find(self, x: Iova) -> Option<(&'a Node<T, F>, usize)> {
        let mut node = self.root?;
        let mut at = node.find(x.get());
        if at == node.len() {
            return None;
        }
        // The last address of a slot is exact, so below the root the search finds a slot in every
        // node.
        for _ in 0..node.level() {
            node = self.child(node, at);
            node.prefetch();
            at = node.find(x.get());
        }
        Some((node, at))
    }

    /// The node above the leaves that has the first area above `x`; not if the root is a leaf.
    fn parent_above(self, x: Iova) -> Option<&'a Node<T, F>> {
        let (mut node, x) = (self.root?, x.checked_add(1)?);
        let mut at = node.find(x.get());
        if at == node.len() || node.is_leaf() {
            return None;
        }
        for _ in 1..node.level() {
            node = self.child(node, at);
            at = node.find(x.get());
        }
        Some(node)
    }

    pub(super) fn lookup(self, iova: Iova) -> Option<Entry<'a, T>> {
        let (leaf, at) = self.find(iova)?;
        leaf.range(at).contains(iova).then(|| self.entry(leaf, at))
    }

    pub(super) fn first_intersecting(self, range: IovaRange) -> Option<Entry<'a, T>> {
        let (leaf, at) = self.find(range.start())?;
        leaf.range(at)
            .intersects(range)
            .then(|| self.entry(leaf, at))
    }

    pub(super) fn iter(self, range: IovaRange) -> Iter<'a, T, F> {
        let mut iter = Iter {
            areas: self,
            leaf: None,
            at: 0,
            parent: None,
            next: None,
            last: range.last(),
        };
        iter.seek(range.start());
        iter
    }

    pub(super) fn contiguous(self, range: IovaRange) -> Contiguous<'a, T, F> {
        Contiguous {
            iter: self.iter(range),
            uncovered: Some(range.start()),
        }
    }
}

/// The areas that intersect a range, in ascending order.
pub(crate) struct Iter<'a, T, const F: usize = 16> {
    areas: Subtree<'a, T, F>,
    /// The leaf of the next area, which may lie above the range, and the slot there.
    leaf: Option<&'a Node<T, F>>,
    at: usize,
    /// The node above that leaf, and the slot of the leaf there.
    parent: Option<(&'a Node<T, F>, usize)>,
    /// The node after that one, if it was looked up ahead.
    next: Option<&'a Node<T, F>>,
    /// The last address of the range.
    last: Iova,
}

impl<'a, T, const F: usize> Iter<'a, T, F> {
    /// Moves to the first area whose last address is not below `x`.
    fn seek(&mut self, x: Iova) {
        (self.leaf, self.parent) = (None, None);
        let Some(mut node) = self.areas.root else {
            return;
        };
        let mut at = node.find(x.get());
        if at == node.len() {
            return;
        }
        for _ in 0..node.level() {
            self.parent = Some((node, at));
            node = self.areas.child(node, at);
            node.prefetch();
            at = node.find(x.get());
        }
        (self.leaf, self.at) = (Some(node), at);
    }

    /// Moves to the leaf after the present one, whose areas end at `last`.
    #[inline(never)]
    fn next_leaf(&mut self, last: Iova) {
        self.leaf = None;
        let Some((mut parent, mut at)) = self.parent else {
            return;
        };
        at += 1;
        if at == parent.len() {
            let next = self.next.take();
            let Some(next) = next.or_else(|| self.areas.parent_above(last)) else {
                return;
            };
            (parent, at) = (next, 0);
        }
        (self.leaf, self.at) = (Some(self.areas.child(parent, at)), 0);
        self.parent = Some((parent, at));
        if parent.last(at) < self.last.get() {
            self.prefetch_after(parent, at);
        }
    }

    /// The walk goes on after the leaf below slot `at` of `parent`: asks for the areas of a later
    /// leaf and for a leaf after it, so that their misses of the cache overlap with the visits of
    /// those before.
    fn prefetch_after(&mut self, parent: &'a Node<T, F>, at: usize) {
        // How many leaves ahead each is prefetched: a leaf before its slots are read for its areas,
        // and a parent before its slots are read for its leaves.
        const AREAS: usize = 1;
        const LEAF: usize = 2;
        const PARENT: usize = 4;
        if at + PARENT >= parent.len() && self.next.is_none() {
            let last = Iova::new(parent.last(parent.len() - 1));
            self.next = self.areas.parent_above(last);
            self.next.into_iter().for_each(Node::prefetch_to_change);
        }
        let leaf_after = |leaves: usize| {
            let at = at + leaves;
            if at < parent.len() {
                return Some(self.areas.child(parent, at));
            }
            let (next, at) = (self.next?, at - parent.len());
            (at < next.len()).then(|| self.areas.child(next, at))
        };
        if let Some(leaf) = leaf_after(AREAS) {
            leaf.prefetch_areas();
        }
        if let Some(leaf) = leaf_after(LEAF) {
            leaf.prefetch_to_change();
        }
    }
}

impl<'a, T, const F: usize> Iterator for Iter<'a, T, F> {
    type Item = Entry<'a, T>;

    #[inline]
    fn next(&mut self) -> Option<Self::Item> {
        let leaf = self.leaf?;
        let entry = self.areas.entry(leaf, self.at);
        if entry.range.start() > self.last {
            self.leaf = None;
            return None;
        }
        self.at += 1;
        if entry.range.last() >= self.last {
            self.leaf = None;
        } else if self.at == leaf.len() {
            self.next_leaf(entry.range.last());
        }
        Some(entry)
    }

    /// Leaf by leaf, without the questions that `next` asks for each area.
    #[inline]
    fn fold<V, G: FnMut(V, Self::Item) -> V>(mut self, mut value: V, mut visit: G) -> V {
        while let Some(leaf) = self.leaf {
            let end = leaf.starting_by(self.last.get()).max(self.at);
            for (range, area) in leaf.areas_in(self.at..end) {
                // SAFETY: as in `Subtree::entry`.
                value = visit(value, unsafe { Entry::new(range, area) });
            }
            if end < leaf.len() || leaf.last(end - 1) >= self.last.get() {
                break;
            }
            self.next_leaf(Iova::new(leaf.last(end - 1)));
        }
        value
    }
}

/// The areas that cover a range without a hole, in ascending order. At the first hole, the iterator
/// yields the first address that no area holds, and ends.
pub(crate) struct Contiguous<'a, T, const F: usize = 16> {
    iter: Iter<'a, T, F>,
    /// The first address of the range that no area so far holds.
    uncovered: Option<Iova>,
}

impl<'a, T, const F: usize> Iterator for Contiguous<'a, T, F> {
    type Item = Result<Entry<'a, T>, Iova>;

    fn next(&mut self) -> Option<Self::Item> {
        let at = self.uncovered.take()?;
        match self.iter.next() {
            Some(entry) if entry.range.start() <= at => {
                if entry.range.last() < self.iter.last {
                    self.uncovered = entry.range.last().checked_add(1);
                }
                Some(Ok(entry))
            }
            _ => Some(Err(at)),
        }
    }
}

/// The areas and rules of a tree at the moment of [`AreaTree::snapshot`]. Later updates are not
/// visible in it.
///
/// A live snapshot holds back the epoch of the process, as an RCU reader holds back a grace period:
/// nothing that is removed meanwhile is freed, from this tree or another one. Updates continue, and
/// allocate fresh memory for each. Keep it short; [`Snapshot::age`] says how many updates were
/// published since.
pub(crate) struct Snapshot<'t, T, const F: usize = 16, R = ()> {
    root: *const Root<T, F, R>,
    /// Keeps the root and what it leads to alive.
    pinned: Pinned,
    /// Where the tree has its newest root.
    newest: &'t AtomicPtr<Root<T, F, R>>,
}

impl<'t, T, const F: usize, R> Snapshot<'t, T, F, R> {
    /// # Safety
    /// * `newest` is the root of a tree, which is not dropped while it is borrowed.
    /// * `root` was loaded from it with Acquire while `pinned` was pinned.
    pub(super) unsafe fn new(
        newest: &'t AtomicPtr<Root<T, F, R>>,
        root: *const Root<T, F, R>,
        pinned: Pinned,
    ) -> Self {
        Snapshot {
            root,
            pinned,
            newest,
        }
    }

    #[inline]
    fn root(&self) -> &Root<T, F, R> {
        // SAFETY:
        // - valid: a tree's root is never null, by the contract of `new`.
        // - alive while `self` is borrowed: `pinned` was pinned when the root was loaded (Inv. 3),
        //   and the tree, which is borrowed as long as `self` lives, is not dropped.
        // - unchanged: published roots do not change (Inv. 2).
        let root = unsafe { &*self.root };
        root.witness.look();
        root
    }

    #[inline]
    fn areas(&self) -> Subtree<'_, T, F> {
        // SAFETY: a node or null; alive and unchanged while `self` is borrowed, like the root (Inv.
        // 2 and 3).
        unsafe { Subtree::below(self.root().node) }
    }

    /// The number of updates that were published before this moment, over the life of the tree.
    pub(crate) fn version(&self) -> u64 {
        self.root().version
    }

    /// The number of updates that were published by now, over the life of the tree.
    pub(crate) fn newest(&self) -> u64 {
        let _pinned = &self.pinned;
        // Acquire: pairs with the Release in `Edit::publish`; the version of that root is visible.
        let root = self.newest.load(Ordering::Acquire);
        // SAFETY: never null, by the contract of `new`; loaded under a pin, so alive (Inv. 3), and
        // unchanged (Inv. 2).
        let root = unsafe { &*root };
        root.witness.look();
        root.version
    }

    /// The number of updates that were published since this moment. At 0 the areas and rules are
    /// still current.
    pub(crate) fn age(&self) -> u64 {
        // Never below 0: the root was read before, and versions only grow.
        self.newest() - self.version()
    }

    /// The rules.
    pub(crate) fn rules(&self) -> &R {
        // SAFETY: alive and unchanged while `self` is borrowed, like the root (Inv. 2 and 3).
        unsafe { self.root().rules() }
    }

    /// The number of areas.
    pub(crate) fn len(&self) -> usize {
        self.root().areas
    }

    /// The area that holds `iova`.
    #[inline]
    pub(crate) fn lookup(&self, iova: Iova) -> Option<Entry<'_, T>> {
        self.areas().lookup(iova)
    }

    /// The lowest area that shares an address with `range`.
    #[cfg(all(test, not(dirtymap_loom)))]
    pub(crate) fn first_intersecting(&self, range: IovaRange) -> Option<Entry<'_, T>> {
        self.areas().first_intersecting(range)
    }

    /// The areas that share an address with `range`, in ascending order.
    pub(crate) fn iter(&self, range: IovaRange) -> Iter<'_, T, F> {
        self.areas().iter(range)
    }

    /// The areas that cover `range`, up to the first hole: see [`Contiguous`].
    pub(crate) fn contiguous(&self, range: IovaRange) -> Contiguous<'_, T, F> {
        self.areas().contiguous(range)
    }

    /// The lowest `len` bytes inside `within` that no area holds and that start at a multiple of
    /// `alignment`: see [`Subtree::first_fit`].
    pub(crate) fn first_fit(
        &self,
        within: IovaRange,
        len: u64,
        alignment: Granule,
    ) -> Option<IovaRange> {
        self.areas().first_fit(within, len, alignment)
    }

    /// The number of levels, and of nodes on all of them.
    #[cfg(all(test, not(dirtymap_loom)))]
    pub(crate) fn shape(&self) -> (usize, usize) {
        self.areas().shape()
    }

    /// Asserts invariants 1, 5 and 6, and that every annotation, level and count is exact.
    ///
    /// # Panics
    /// If one does not hold.
    #[cfg(test)]
    pub(crate) fn internal_validate(&self) {
        self.areas().internal_validate(self.len());
    }
}
