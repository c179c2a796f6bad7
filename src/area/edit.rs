//! Edits: private copies of the nodes on the path (copy-on-write), and one compare-exchange that
//! publishes all of them.

use std::ptr;

use super::node::{HoleChange, Node, NodeSlot};
use super::reclaim::{Checkout, Pinned, Pool, Reclaim};
use super::root::Root;
use super::snapshot::{Entry, Iter, Subtree};
use crate::error::Error;
use crate::sync::{Arc, AtomicPtr, Ordering, Step, Witness, prefetch, weaken};
use crate::units::{Granule, Iova, IovaRange};

/// A new state of the tree: the areas at the beginning of the edit, with the changes so far.
///
/// If it is dropped without being published, the tree is unchanged.
pub(crate) struct Edit<'p, T, const F: usize = 16, R = ()> {
    /// The root that the edit began with.
    base: *mut Root<T, F, R>,
    /// The topmost node as edited; null without areas.
    root: *mut Node<T, F>,
    /// New rules, if they were replaced.
    rules: Option<Arc<R>>,
    /// The stamp of the nodes that this edit made. These, and no others, may be changed and freed
    /// here (Inv. 5).
    stamp: u64,
    /// Where nodes come from. Its open garbage begins with that of earlier updates. At the end
    /// follows what becomes unreachable if this edit is published.
    pool: Checkout<'p, T, F, R>,
    /// The number of areas, as edited.
    areas: usize,
    /// Whether a node may have uncounted holes.
    uncounted: bool,
    /// The numbers of nodes and of areas in the open garbage that come from earlier updates. Until
    /// this edit is published, it adds no others.
    before: (usize, usize),
    /// Keeps alive what `base` leads to.
    pinned: &'p Pinned,
}

/// What happened to a node when an area was inserted below it.
enum Inserted<T, const F: usize> {
    /// The node holds the area.
    Within,
    /// The node was full. Its upper part is now this node.
    Split(*mut Node<T, F>),
}

impl<'p, T, const F: usize, R> Edit<'p, T, F, R> {
    /// # Safety
    /// `base` was loaded with Acquire from the root of a tree that outlives `'p`, while `pinned`
    /// was pinned.
    pub(super) unsafe fn new(
        base: *mut Root<T, F, R>,
        reclaim: &'p Arc<Reclaim<T, F, R>>,
        pinned: &'p Pinned,
    ) -> Self {
        // SAFETY: a tree's root is never null; alive and unchanged while we are pinned (Inv. 2 and
        // 3), by our contract.
        let before = unsafe { &*base };
        before.witness.look();
        let root = before.node;
        // SAFETY: null or a node; alive and unchanged like the root.
        let base_stamp = unsafe { root.as_ref() }.map_or(0, Node::stamp);
        let pool = Reclaim::checkout(reclaim);
        Edit {
            base,
            root,
            rules: None,
            stamp: base_stamp + 1,
            areas: before.areas,
            uncounted: false,
            before: (pool.open.nodes.len(), pool.open.areas.len()),
            pool,
            pinned,
        }
    }

    fn areas(&self) -> Subtree<'_, T, F> {
        // SAFETY:
        // - a node or null: `root` always is.
        // - alive and unchanged while `self` is borrowed: a node of this edit changes only by `&mut
        //   self`; any other node is published, so it never changes (Inv. 2) and stays while we are
        //   pinned (Inv. 3); and an area that was inserted here is counted in `added`.
        unsafe { Subtree::below(self.root) }
    }

    /// The number of areas.
    #[cfg(all(test, not(dirtymap_loom)))]
    pub(crate) fn len(&self) -> usize {
        self.areas
    }

    /// The lowest area that shares an address with `range`.
    pub(crate) fn first_intersecting(&self, range: IovaRange) -> Option<Entry<'_, T>> {
        self.areas().first_intersecting(range)
    }

    /// The areas that share an address with `range`, in ascending order.
    pub(crate) fn iter(&self, range: IovaRange) -> Iter<'_, T, F> {
        self.areas().iter(range)
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

    /// The rules, as edited.
    pub(crate) fn rules(&self) -> &R {
        match &self.rules {
            Some(rules) => rules,
            // SAFETY: the root is alive and unchanged while we are pinned, by the contract of
            // `new`, and so are its rules (Inv. 2 and 3).
            None => unsafe { self.base_root().rules() },
        }
    }

    /// The version that the tree has after this is published: see
    /// [`Snapshot::version`](super::Snapshot::version).
    pub(crate) fn version(&self) -> u64 {
        self.base_root().version + 1
    }

    /// The root that the edit began with.
    fn base_root(&self) -> &Root<T, F, R> {
        // SAFETY: a tree's root is never null; alive and unchanged while we are pinned, by the
        // contract of `new`.
        unsafe { &*self.base }
    }

    /// Replaces the rules.
    pub(crate) fn set_rules(&mut self, rules: R) {
        self.rules = Some(Arc::new(rules));
    }

    /// Asks for the node of `level` on the way to the leaf of `x` ahead, which a later change of
    /// this edit will search: the processor fetches it during the changes before. Does nothing in a
    /// tree of few levels, which a cache holds whole.
    pub(crate) fn ask_for(&self, x: Iova, level: u8) {
        // SAFETY: null, or a node below the root, which is alive; no unique reference to it exists.
        let Some(mut node) = (unsafe { self.root.as_ref() }) else {
            return;
        };
        if node.level() < 3 {
            return;
        }
        while node.level() > level {
            // Above the last slot, the last child grows.
            let child = node.child(node.find_alone(x.get()).min(node.len() - 1));
            // SAFETY: alive like its parent; no unique reference to it exists.
            let below = unsafe { &*child };
            if node.level() == level + 1 {
                below.prefetch_to_change();
                return;
            }
            node = below;
        }
    }

    /// Maps `area` at `range`. The same area may be mapped at several ranges.
    ///
    /// # Errors
    /// [`Error::Overlap`] with the lowest existing area that overlaps `range`; nothing is changed.
    pub(crate) fn insert(&mut self, range: IovaRange, area: Arc<T>) -> Result<(), Error> {
        let slot = NodeSlot {
            start: range.start().get(),
            last: range.last().get(),
            hole: 0,
            pointer: Arc::as_ptr(&area).cast(),
        };
        if self.root.is_null() {
            self.root = Box::into_raw(self.pool.empty(0, self.stamp));
        }
        let (leaf, at) = self.descend(slot.start, true);
        // SAFETY: below the root, so alive; not used again after it is changed.
        let shared = unsafe { &*leaf };
        if at < shared.len() && shared.start(at) <= slot.last {
            let existing = shared.range(at);
            return Err(Error::Overlap { range, existing });
        }
        if shared.len() == F {
            self.insert_and_split(slot);
        } else {
            let before = shared.hole_before(at);
            let leaf = if shared.stamp() == self.stamp {
                // SAFETY: made by this edit, so no other thread reaches it; `shared` is not used
                // again.
                unsafe { &mut *leaf }.insert(at, slot);
                leaf
            } else {
                self.pool.open.nodes.push(leaf);
                let mut copy = self.pool.spare();
                copy.copy_inserted(shared, at, slot, self.stamp);
                Box::into_raw(copy)
            };
            // SAFETY: made by this edit; not borrowed.
            let now = unsafe { &*leaf }.hole_around(at);
            // SAFETY: `leaf` replaces the one to which the descent has led.
            unsafe { self.climb(leaf, HoleChange { before, now }) };
        }
        self.areas += 1;
        self.pool.added.push(area);
        self.pool.drop_areas(1);
        Ok(())
    }

    /// The same for a leaf that is full.
    #[inline(never)]
    fn insert_and_split(&mut self, slot: NodeSlot) {
        // SAFETY: a node; alive, and no unique reference to it exists.
        let root = unsafe { &*self.root };
        let found = root.find(slot.start);
        let highest = found == root.len();
        self.root = self.owned(self.root);
        // SAFETY: made by this edit: by the line above. Nothing borrows it.
        let inserted = unsafe { self.insert_below(self.root, found, slot, highest) };
        if let Inserted::Split(right) = inserted {
            self.grow(right);
        }
    }

    /// Unmaps the area that starts at `start`, and returns it. Returns `None`, and changes nothing,
    /// if there is none.
    pub(crate) fn remove(&mut self, start: Iova) -> Option<Entry<'_, T>> {
        if self.root.is_null() {
            return None;
        }
        let (leaf, at) = self.descend(start.get(), false);
        // SAFETY: below the root, so alive; not used again after it is changed.
        let shared = unsafe { &*leaf };
        if at == shared.len() || shared.start(at) != start.get() {
            return None;
        }
        let (range, pointer) = (shared.range(at), shared.area(at));
        // The caller reads the area, while the nodes of the path are still to be copied.
        prefetch(pointer.cast());
        self.pool.open.areas.push(pointer);
        self.areas -= 1;
        if shared.len() - 1 <= Node::<T, F>::SPARSE {
            self.remove_and_merge(start);
        } else {
            let before = shared.hole_around(at);
            let leaf = if shared.stamp() == self.stamp {
                // SAFETY: made by this edit, so no other thread reaches it; `shared` is not used
                // again.
                unsafe { &mut *leaf }.remove(at);
                leaf
            } else {
                self.pool.open.nodes.push(leaf);
                let mut copy = self.pool.spare();
                copy.copy_removed(shared, at, self.stamp);
                Box::into_raw(copy)
            };
            // SAFETY: made by this edit; not borrowed.
            let now = unsafe { &*leaf }.hole_before(at);
            // SAFETY: `leaf` replaces the one to which the descent has led.
            unsafe { self.climb(leaf, HoleChange { before, now }) };
        }
        // SAFETY:
        // - from `Arc::into_raw`: leaves hold nothing else.
        // - alive while the edit is borrowed: the count of the tree is released only by the update
        //   that publishes the removal, and not before we unpin (Inv. 3); or, if this edit inserted
        //   the area, the count is in `added`, which only grows until the edit is published.
        Some(unsafe { Entry::new(range, pointer) })
    }

    /// The same for a leaf that is left with few slots or none.
    #[inline(never)]
    fn remove_and_merge(&mut self, start: Iova) {
        // SAFETY: a node, as it holds an area; alive, and no unique reference to it exists.
        let found = unsafe { &*self.root }.find(start.get());
        self.root = self.owned(self.root);
        // SAFETY: made by this edit: by the line above. It holds an area that starts at `start`, by
        // the caller's search.
        unsafe { self.remove_below(self.root, found, start) };
        self.shrink();
    }

    /// The leaf below the root, which is not null, in which `x` is or belongs, and its first slot
    /// whose last address is not below `x`. Leaves the way there in the pool, for
    /// [`Edit::climb`]. Nothing is copied, because what is found there may end the change.
    ///
    /// `near` says that this change is likely to be where the last one was. Then each node is asked
    /// first for the slot of the way before: the processor predicts that branch and goes on, where
    /// a search is a chain of loads.
    #[inline(always)]
    fn descend(&mut self, x: u64, near: bool) -> (*mut Node<T, F>, usize) {
        let mut node = self.root;
        let path = &mut self.pool.path;
        for depth in 0.. {
            // SAFETY: a node below the root is alive, and no unique reference to it exists.
            let shared = unsafe { &*node };
            if depth == path.len() {
                path.push((node, 0));
            }
            let (on_path, at) = &mut path[depth];
            *on_path = node;
            if !near || !shared.is_first(*at, x) {
                *at = shared.find_alone(x);
            }
            if shared.is_leaf() {
                let found = (node, *at);
                path.truncate(depth + 1);
                return found;
            }
            // Above the last slot, the last child grows.
            *at = (*at).min(shared.len() - 1);
            node = shared.child(*at);
            // SAFETY: alive like its parent, and no unique reference to it exists.
            unsafe { &*node }.prefetch_to_change();
        }
        unreachable!("no tree is that high")
    }

    /// Makes `child` replace the leaf to which the last descent has led, which it differs from by
    /// `change` in its holes. The nodes above it are copied from there upwards, each once, or
    /// changed in place. A loop, because a recursion would return the change in memory: it
    /// writes two words and reads them by one load, which waits until both have left the store
    /// buffer.
    ///
    /// # Safety
    /// `child` was made by this edit, from that leaf, and nothing but it has changed since. No
    /// reference to a node of the path exists.
    #[inline]
    unsafe fn climb(&mut self, mut child: *mut Node<T, F>, mut change: HoleChange) {
        for depth in (0..self.pool.path.len() - 1).rev() {
            let (node, at) = self.pool.path[depth];
            let node = self.owned(node);
            // SAFETY: `owned` made it one of this edit; not borrowed, by our contract.
            let own = unsafe { &mut *node };
            let again = own.child(at) == child;
            own.set_child(at, child);
            // A node that was changed before is likely to be changed again. A leaf is counted at
            // once, because later it is a miss of the cache.
            let later = again && own.level() > 1;
            // SAFETY: made by this edit; not borrowed.
            let below = unsafe { &*child };
            match own.update(at, below, change, later) {
                Some(next) => change = next,
                // The nodes above are of this edit, too (Inv. 5), and what they say still holds.
                None if again => return,
                None => change = HoleChange::NONE,
            }
            self.uncounted |= later;
            child = node;
        }
        self.root = child;
    }

    /// Publishes the edit as the state of the tree whose root is `root`, if `base` is still the
    /// current root. Returns whether it did.
    ///
    /// # Safety
    /// `root` is where `base` was loaded from.
    pub(super) unsafe fn publish(mut self, root: &AtomicPtr<Root<T, F, R>>) -> bool
    where
        T: Send + Sync + 'static,
        R: Send + Sync + 'static,
    {
        let (node, rules, version) = {
            let base = self.base_root();
            (base.node, base.rules, base.version)
        };
        if self.root == node && self.rules.is_none() {
            // Nothing was changed, or an empty tree is empty again. Areas that were inserted and
            // removed again are dropped with the edit.
            return true;
        }
        if self.uncounted {
            // SAFETY: null, or a node below the root of this edit, which nothing borrows.
            unsafe { count_holes(self.root, self.stamp) };
        }
        let next = Box::into_raw(self.pool.root(Root {
            node: self.root,
            areas: self.areas,
            rules: self.rules.as_ref().map_or(rules, Arc::as_ptr),
            version: version + 1,
            witness: Witness::new(),
        }));
        // Success, Release: pairs with the Acquires in `AreaTree::snapshot` and `AreaTree::update`.
        // A thread that sees this root sees the rules, nodes and areas of this edit and, because
        // `base` was loaded with Acquire, all that it shares with older roots. A thread that does
        // not see it has an older root, whose memory its pin keeps. Failure, Relaxed: the value
        // found is ignored; the next attempt loads the root again.
        let published = root
            .compare_exchange(
                self.base,
                next,
                weaken(Step::PublishRoot, Ordering::Release),
                Ordering::Relaxed,
            )
            .is_ok();
        if published {
            // From here on the nodes are not ours to free.
            self.root = ptr::null_mut();
            while let Some(area) = self.pool.added.pop() {
                // The tree owns the count now.
                let _ = Arc::into_raw(area);
            }
            // The open lists are garbage now. Their nodes were reachable from `base` and are not
            // from the new root, and nothing that is unreachable becomes reachable again. Only the
            // thread that performed this compare-exchange adds them (Inv. 4).
            self.pool.open.roots.push(self.base);
            if let Some(new) = self.rules.take() {
                // The tree owns the count of the new rules now; that of the old rules is garbage.
                let _ = Arc::into_raw(new);
                self.pool.open.rules.push(rules);
            }
            self.before = (self.pool.open.nodes.len(), self.pool.open.areas.len());
            // SAFETY: see above; garbage of earlier updates was left there by the threads that
            // published them.
            unsafe { self.pool.hand_over_if_full(self.pinned) };
        } else {
            // SAFETY: made by `Box::into_raw` above, and no other thread has seen it. The nodes
            // below it are freed with the edit.
            self.pool.recycle_root(unsafe { Box::from_raw(next) });
        }
        published
    }

    /// A node with the slots of `node` that this edit may change: `node` itself, or a copy that
    /// replaces it.
    fn owned(&mut self, node: *mut Node<T, F>) -> *mut Node<T, F> {
        // SAFETY: a node below the root; alive, and no unique reference to it exists.
        let shared = unsafe { &*node };
        if shared.stamp() == self.stamp {
            return node;
        }
        self.pool.open.nodes.push(node);
        Box::into_raw(self.pool.copy(shared, self.stamp))
    }

    /// Retires a node that is no longer below the root of the edit.
    fn discard(&mut self, node: *mut Node<T, F>) {
        // SAFETY: alive: only this edit frees its own nodes, and others live while we are pinned.
        if unsafe { &*node }.stamp() == self.stamp {
            // SAFETY: made by `Box::into_raw` in this edit, and nothing points to it any more.
            self.pool.recycle(unsafe { Box::from_raw(node) });
        } else {
            self.pool.open.nodes.push(node);
        }
    }

    /// Makes the child in slot `at` of `parent` a node of this edit. Returns the child, and its
    /// first slot whose last address is not below `x`.
    ///
    /// # Safety
    /// `parent` was made by this edit, is not a leaf, and has a slot `at`. No reference to it
    /// exists.
    unsafe fn owned_child(
        &mut self,
        parent: *mut Node<T, F>,
        at: usize,
        x: u64,
    ) -> (*mut Node<T, F>, usize) {
        // SAFETY: made by this edit, so no other thread reaches it, and not borrowed, by our
        // contract.
        let parent = unsafe { &mut *parent };
        let slot = parent.slot(at);
        // SAFETY: a node below the root; alive, and no unique reference to it exists.
        // Searches the old node, which a search read a moment ago; the copy is not in a cache yet.
        let found = unsafe { &*parent.child(at) }.find(x);
        let child = self.owned(parent.child(at));
        // Right away, so that at every moment the nodes of the edit are exactly those below its
        // root.
        parent.set(
            at,
            NodeSlot {
                pointer: child.cast_const().cast(),
                ..slot
            },
        );
        (child, found)
    }

    /// Inserts `slot` into the leaf below `node` in which it belongs. If `node` was full, its upper
    /// half is returned as a node of its own. If `slot` lies above all areas of the tree
    /// (`highest`), only the new slot moves to that node, so that ascending inserts leave full
    /// nodes.
    ///
    /// `found` is the first slot of `node` whose last address is not below that of `slot`.
    ///
    /// # Safety
    /// `node` was made by this edit, and no reference to it or to nodes below it exists. The
    /// addresses of `slot` are free.
    unsafe fn insert_below(
        &mut self,
        node: *mut Node<T, F>,
        found: usize,
        slot: NodeSlot,
        highest: bool,
    ) -> Inserted<T, F> {
        // SAFETY: alive, by our contract; not used again after the child is made our own.
        let before = unsafe { &*node };
        let (at, slot) = if before.is_leaf() {
            (found, slot)
        } else {
            // Above the last slot, the last child grows.
            let at = found.min(before.len() - 1);
            // SAFETY: `node` is not a leaf and has a slot `at`; the rest is our contract.
            let (child, found) = unsafe { self.owned_child(node, at, slot.start) };
            // SAFETY: `owned_child` made it one of this edit; the rest is our contract.
            let inserted = unsafe { self.insert_below(child, found, slot, highest) };
            // SAFETY: made by this edit and not borrowed: the call has returned.
            let rest = unsafe { &*child };
            // SAFETY: as above, for `node`.
            let node = unsafe { &mut *node };
            match inserted {
                Inserted::Within => {
                    node.set(at, rest.as_slot(child));
                    return Inserted::Within;
                }
                Inserted::Split(right) => {
                    node.set(at, rest.as_slot(child));
                    // SAFETY: made by this edit just now, not borrowed.
                    (at + 1, unsafe { &*right }.as_slot(right))
                }
            }
        };
        // SAFETY: made by this edit, and no reference to it is left.
        let node = unsafe { &mut *node };
        if node.len() < F {
            node.insert(at, slot);
            return Inserted::Within;
        }
        // The path to a highest area is the right edge, where the new slot is always the last.
        let mut right = self.pool.empty(node.level(), self.stamp);
        node.split(if highest { F } else { F / 2 }, &mut right);
        if at <= node.len() && !highest {
            node.insert(at, slot);
        } else {
            right.insert(at - node.len(), slot);
        }
        Inserted::Split(Box::into_raw(right))
    }

    /// Puts a new root above the root of this edit and `right`, which was split from it.
    fn grow(&mut self, right: *mut Node<T, F>) {
        // SAFETY: made by this edit, not borrowed.
        let left = unsafe { &*self.root };
        let left_slot = left.as_slot(self.root);
        let mut root = self.pool.empty(left.level() + 1, self.stamp);
        // SAFETY: as above.
        let right_node = unsafe { &*right };
        root.insert(0, left_slot);
        root.insert(1, right_node.as_slot(right));
        self.root = Box::into_raw(root);
    }

    /// Removes the area that starts at `start`, in or below slot `at` of `node`. `node` may be left
    /// without slots; nodes below it are not.
    ///
    /// # Safety
    /// `node` was made by this edit, no reference to it or to nodes below it exists, and an area in
    /// or below its slot `at` starts at `start`.
    unsafe fn remove_below(&mut self, node: *mut Node<T, F>, at: usize, start: Iova) {
        // SAFETY: alive, by our contract; not used again after this line.
        if unsafe { &*node }.is_leaf() {
            // SAFETY: made by this edit, not borrowed.
            unsafe { &mut *node }.remove(at);
            return;
        }
        // SAFETY: `node` is not a leaf, and the slot exists, because an area below it ends at or
        // above `start`.
        let (child, found) = unsafe { self.owned_child(node, at, start.get()) };
        // SAFETY: `owned_child` made it one of this edit; it holds `start` as slots are exact.
        unsafe { self.remove_below(child, found, start) };
        // SAFETY: made by this edit and not borrowed: the call has returned.
        let node = unsafe { &mut *node };
        // SAFETY: as above.
        let rest = unsafe { &*child };
        if rest.len() == 0 {
            node.remove(at);
            self.discard(child);
            return;
        }
        node.set(at, rest.as_slot(child));
        if rest.len() <= Node::<T, F>::SPARSE {
            // SAFETY: both were made by this edit, and neither is borrowed elsewhere.
            unsafe { self.merge(node, at, child) };
        }
    }

    /// Moves the slots of a neighbour into `child`, if they fit. Slot `at` of `node` points to
    /// `child`.
    ///
    /// # Safety
    /// `node` and `child` were made by this edit. No reference to `child` or to other nodes below
    /// `node` exists.
    unsafe fn merge(&mut self, node: &mut Node<T, F>, at: usize, child: *mut Node<T, F>) {
        let left = at.checked_sub(1);
        let right = Some(at + 1).filter(|&right| right < node.len());
        for neighbour in [left, right].into_iter().flatten() {
            let pointer = node.child(neighbour);
            // SAFETY: a node below the root; alive, not borrowed, and not `child`.
            let other = unsafe { &*pointer };
            // SAFETY: made by this edit, by our contract, and not borrowed.
            let rest = unsafe { &mut *child };
            if rest.len() + other.len() > F {
                continue;
            }
            if neighbour < at {
                rest.prepend(other);
            } else {
                rest.append(other);
            }
            node.set(at, rest.as_slot(child));
            node.remove(neighbour);
            self.discard(pointer);
            return;
        }
    }

    /// Drops roots that have one child.
    fn shrink(&mut self) {
        loop {
            // SAFETY: a node below the root of this edit; alive, not borrowed.
            let root = unsafe { &*self.root };
            let below = match root.len() {
                0 => ptr::null_mut(),
                1 if !root.is_leaf() => root.child(0),
                _ => return,
            };
            let dropped = std::mem::replace(&mut self.root, below);
            self.discard(dropped);
            if self.root.is_null() {
                return;
            }
        }
    }
}

impl<T, const F: usize, R> Drop for Edit<'_, T, F, R> {
    fn drop(&mut self) {
        // The nodes and areas that the edit meant to replace stay with the tree. If it was
        // published, there are none.
        self.pool.open.nodes.truncate(self.before.0);
        self.pool.open.areas.truncate(self.before.1);
        if !self.root.is_null() {
            // SAFETY: the edit was not published, so no other thread reaches its nodes, and they
            // are not used again.
            unsafe { recycle_stamped(self.root, self.stamp, &mut self.pool) };
        }
        self.pool.added.clear();
    }
}

/// Recycles the nodes from `node` down that carry `stamp`. Parents of such nodes carry it too (Inv.
/// 5).
///
/// # Safety
/// `node` is alive. Nodes with that stamp were made by `Box::into_raw`, and no other thread reaches
/// them, now or later.
unsafe fn recycle_stamped<T, const F: usize, R>(
    node: *mut Node<T, F>,
    stamp: u64,
    pool: &mut Pool<T, F, R>,
) {
    // SAFETY: alive, by our contract.
    let shared = unsafe { &*node };
    if shared.stamp() != stamp {
        return;
    }
    if !shared.is_leaf() {
        for at in 0..shared.len() {
            // SAFETY: children are alive like their parent; the rest is our contract.
            unsafe { recycle_stamped(shared.child(at), stamp, pool) };
        }
    }
    // SAFETY: ours, by our contract; the reference is not used again.
    pool.recycle(unsafe { Box::from_raw(node) });
}

/// Counts the holes that edits below `node` have left uncounted, from the leaves upwards: once for
/// each node, however many changes there were. Only a node of the edit has such slots, and the
/// child in such a slot is one of the edit, too.
///
/// # Safety
/// `node` is null or below the root of the edit of that stamp, and no reference to it or to a node
/// below it exists.
unsafe fn count_holes<T, const F: usize>(node: *mut Node<T, F>, stamp: u64) {
    // SAFETY: alive or null, by our contract.
    match unsafe { node.as_ref() } {
        Some(shared) if shared.stamp() == stamp && !shared.is_leaf() => {}
        _ => return,
    }
    // SAFETY: made by this edit, so no other thread reaches it; not borrowed, by our contract.
    let own = unsafe { &mut *node };
    let mut from = 0;
    while let Some(at) = own.uncounted(from) {
        let child = own.child(at);
        // SAFETY: a child of `node`, which is not `node`; the rest is our contract.
        unsafe { count_holes(child, stamp) };
        // SAFETY: alive like its parent, and not borrowed: the call has returned.
        own.count_hole(at, unsafe { &*child });
        from = at + 1;
    }
}
