//! The only user of crossbeam's epoch collector: it pins readers, and after a grace period returns
//! unreachable nodes and areas to the updates.
//!
//! ```text
//!  update --replaced--> open garbage --full--> epoch, one call --> returned --> pool of spare
//!                       (in the pool)          for all of it        (stack)     nodes, for the
//!                                                                               next update
//! ```
//!
//! The collector is the process-wide one of `crossbeam-epoch`. Pinning stores into a word of this
//! thread, without any registration after the first time. Now and then a thread that pins has to
//! run deferred calls of other threads. So one call is deferred for the garbage of many updates,
//! and it only pushes that garbage onto a stack of the tree. Updates take it from there: they use
//! the nodes again, drop the rules at once, and drop the areas step by step. **A reader never frees
//! a node and never drops an area**.
//!
//! # Ownership
//! An update checks the [`Pool`] of the tree out by one exchange, has it alone, and puts it back by
//! a plain store: no other update stores to that word meanwhile. An update that finds no pool,
//! because another one has it, works with one from the stack of further pools, or with a new one,
//! and pushes it onto that stack afterwards. The next update that has the tree's own pool merges
//! the stack into it. No update blocks. All lists and stacks are taken whole, so no address can
//! return between a load and its compare-exchange (no ABA).

use crossbeam_epoch::Guard;
use std::collections::VecDeque;
use std::mem::ManuallyDrop;
use std::ops::{Deref, DerefMut};
use std::ptr;

use super::node::Node;
use super::root::Root;
use crate::sync::{Arc, AtomicPtr, Ordering, Step, TINY, Witness, performs, prefetch, weaken};

/// Spare nodes that a tree keeps: the contents of two lists of garbage, because one comes back
/// while the one before it is being used. More nodes come back after a slow reader, or from updates
/// that found no pool: each update frees one of them, and the part below. So no update pays for all
/// of them, and if a reader is slow again, most of them are still in the pool.
pub(super) const SPARE_NODES: usize = 8 * FULL;
/// The fraction of the nodes beyond that number that an update frees.
const FREED_PART: usize = 256;
/// The fraction of the returned areas that an update drops, in addition to one for each area that
/// it inserts. Allocators are fastest if a block that is freed is the next one to be allocated.
const DROPPED_PART: usize = 32;
/// An area that will be dropped is prefetched when this many others are dropped before it.
const ASKED_AHEAD: usize = 4;
/// Spare roots that a tree keeps: the contents of a few lists of garbage.
const SPARE_ROOTS: usize = 4 * FULL;
/// Empty lists of garbage that a tree keeps.
const SPARE_LISTS: usize = 4;
/// How much garbage is handed to the epoch at once: little enough to bound the memory that it
/// holds, and enough to make the cost for each update negligible.
const FULL: usize = if TINY { 1 } else { 32 };

/// A pin of this thread: nodes and areas that the thread can reach in a tree from now on are not
/// freed before this is dropped.
pub(super) struct Pinned(Guard);

impl Pinned {
    #[inline(always)]
    pub(super) fn new() -> Self {
        Pinned(crossbeam_epoch::pin())
    }

    /// Shows the deferred calls of this thread to all threads, and runs the calls that are due.
    pub(super) fn flush(&self) {
        self.0.flush();
    }
}

/// Nodes, roots, areas and rules that updates made unreachable. Dropping it frees nothing.
pub(super) struct Garbage<T, const F: usize, R> {
    /// The roots that were replaced, without the nodes below them.
    pub(super) roots: Vec<*mut Root<T, F, R>>,
    pub(super) nodes: Vec<*mut Node<T, F>>,
    /// Areas, once for each range that was removed.
    pub(super) areas: Vec<*const T>,
    /// Rules that were replaced.
    pub(super) rules: Vec<*const R>,
    /// The next list in the stack of returned garbage.
    next: *mut Garbage<T, F, R>,
    witness: Witness,
}

impl<T, const F: usize, R> Garbage<T, F, R> {
    fn new() -> Box<Self> {
        Box::new(Garbage {
            roots: Vec::new(),
            nodes: Vec::new(),
            areas: Vec::new(),
            rules: Vec::new(),
            next: ptr::null_mut(),
            witness: Witness::new(),
        })
    }

    fn is_empty(&self) -> bool {
        // Rules are replaced together with a root.
        self.roots.is_empty() && self.nodes.is_empty() && self.areas.is_empty()
    }

    fn is_full(&self) -> bool {
        self.roots.len() >= FULL || self.areas.len() >= FULL || self.nodes.len() >= 4 * FULL
    }

    fn append(&mut self, other: &mut Self) {
        self.roots.append(&mut other.roots);
        self.nodes.append(&mut other.nodes);
        self.areas.append(&mut other.areas);
        self.rules.append(&mut other.rules);
    }
}

/// The memory with which an update works, and which it leaves for the next one.
pub(super) struct Pool<T, const F: usize, R> {
    /// Nodes that no thread reaches, with their old contents.
    nodes: Vec<Box<Node<T, F>>>,
    /// Areas that no thread reaches, with the tree's count of each; the oldest first.
    areas: VecDeque<*const T>,
    /// Roots that no thread reaches.
    #[allow(clippy::vec_box)] // the boxes themselves go round
    roots: Vec<Box<Root<T, F, R>>>,
    /// The garbage of published updates that was not yet handed to the epoch.
    pub(super) open: Box<Garbage<T, F, R>>,
    /// Empty lists, for later use.
    #[allow(clippy::vec_box)] // the boxes themselves go round
    lists: Vec<Box<Garbage<T, F, R>>>,
    /// The counts that the tree will own, one for each range that the update inserts.
    pub(super) added: Vec<Arc<T>>,
    /// The way of the last descent of an edit: the nodes from its root down to the leaf, and the
    /// slot in each. For a later edit only the numbers of slots mean anything.
    pub(super) path: Vec<(*mut Node<T, F>, usize)>,
    /// The next pool in the stack of further pools.
    next: *mut Pool<T, F, R>,
    census: Census,
    witness: Witness,
}

impl<T, const F: usize, R> Pool<T, F, R> {
    fn new(census: Census) -> Box<Self> {
        Box::new(Pool {
            nodes: Vec::new(),
            areas: VecDeque::new(),
            roots: Vec::new(),
            open: Garbage::new(),
            lists: Vec::new(),
            added: Vec::new(),
            path: Vec::new(),
            next: ptr::null_mut(),
            census,
            witness: Witness::new(),
        })
    }

    /// A node without slots.
    pub(super) fn empty(&mut self, level: u8, stamp: u64) -> Box<Node<T, F>> {
        match self.nodes.pop() {
            Some(mut node) => {
                node.clear(level, stamp);
                node
            }
            None => {
                self.census.made();
                Node::empty(level, stamp)
            }
        }
    }

    /// A node with any slots, for a caller that overwrites all of it.
    pub(super) fn spare(&mut self) -> Box<Node<T, F>> {
        match self.nodes.pop() {
            Some(node) => {
                // The next one will be needed as well: an update copies a node of each level.
                if let Some(next) = self.nodes.last() {
                    next.prefetch_whole();
                }
                node
            }
            None => {
                self.census.made();
                Node::empty(0, 0)
            }
        }
    }

    /// A node with the slots of `node`, under another stamp.
    pub(super) fn copy(&mut self, node: &Node<T, F>, stamp: u64) -> Box<Node<T, F>> {
        let mut copy = self.spare();
        copy.copy_from(node, stamp);
        copy
    }

    /// Takes back a node that no thread reaches.
    pub(super) fn recycle(&mut self, node: Box<Node<T, F>>) {
        self.nodes.push(node);
    }

    /// A root with this content.
    pub(super) fn root(&mut self, root: Root<T, F, R>) -> Box<Root<T, F, R>> {
        match self.roots.pop() {
            Some(mut spare) => {
                *spare = root;
                spare
            }
            None => Box::new(root),
        }
    }

    /// Takes back a root that no thread reaches.
    pub(super) fn recycle_root(&mut self, root: Box<Root<T, F, R>>) {
        if self.roots.len() < SPARE_ROOTS {
            self.roots.push(root);
        }
    }

    /// Frees at most `count` spare nodes, and only those beyond the bound.
    pub(super) fn trim(&mut self, count: usize) {
        let too_many = self.nodes.len().saturating_sub(SPARE_NODES);
        for _ in 0..too_many.min(count) {
            if let Some(node) = self.nodes.pop() {
                self.free(node);
            }
        }
    }

    /// Frees a node that no thread reaches.
    pub(super) fn free(&mut self, node: Box<Node<T, F>>) {
        self.census.freed();
        drop(node);
    }

    /// Does a part of the waiting work: frees spare nodes, and drops areas.
    fn tidy(&mut self) {
        let too_many = self.nodes.len().saturating_sub(SPARE_NODES);
        self.trim(1 + too_many / FREED_PART);
        self.drop_areas(self.areas.len() / DROPPED_PART);
    }

    /// Drops at most `count` of the areas that have returned.
    pub(super) fn drop_areas(&mut self, count: usize) {
        for _ in 0..count {
            let Some(area) = self.areas.pop_front() else {
                return;
            };
            if let Some(later) = self.areas.get(ASKED_AHEAD) {
                // In many areas, the counts are a miss of the cache. They lie before the area.
                prefetch(later.cast::<u8>().wrapping_sub(2 * size_of::<usize>()));
            }
            // SAFETY: made by `Arc::into_raw`, and the count is ours, by the contract of `absorb`.
            drop(unsafe { Arc::from_raw(area) });
        }
    }

    /// Recycles the nodes, takes the areas, and drops the rules.
    ///
    /// # Safety
    /// * No thread reaches the garbage, and no other thread frees any of it; its roots and nodes
    ///   were made by `Box::into_raw`.
    /// * The tree's strong count of each area, and of each of the rules, belongs to its pointer.
    unsafe fn absorb(&mut self, mut garbage: Box<Garbage<T, F, R>>) {
        garbage.witness.end();
        for root in garbage.roots.drain(..) {
            // SAFETY: made by `Box::into_raw`, unreachable and freed only here, by our contract.
            self.recycle_root(unsafe { Box::from_raw(root) });
        }
        for node in garbage.nodes.drain(..) {
            // SAFETY: as for the roots. The areas or children that it points to are not touched.
            self.recycle(unsafe { Box::from_raw(node) });
        }
        self.areas.extend(garbage.areas.drain(..));
        for rules in garbage.rules.drain(..) {
            // SAFETY: made by `Arc::into_raw`, and the count is ours, by our contract.
            drop(unsafe { Arc::from_raw(rules) });
        }
        if self.lists.len() < SPARE_LISTS {
            self.lists.push(garbage);
        }
    }

    /// Recycles what was not yet handed to the epoch, without a grace period.
    ///
    /// # Safety
    /// No reader of the tree is left.
    pub(super) unsafe fn absorb_open(&mut self) {
        let open = std::mem::replace(&mut self.open, Garbage::new());
        // SAFETY: what published updates replaced is not reachable from the root. Only a reader
        // could have reached it, and none is left, by our contract. This pool owns it, and gives it
        // up here (Inv. 4).
        unsafe { self.absorb(open) };
    }

    /// Moves everything from `other` into this pool.
    fn merge(&mut self, other: &mut Self) {
        self.open.append(&mut other.open);
        self.nodes.append(&mut other.nodes);
        self.areas.append(&mut other.areas);
        self.roots.append(&mut other.roots);
        self.roots.truncate(SPARE_ROOTS);
    }
}

impl<T, const F: usize, R> Drop for Pool<T, F, R> {
    fn drop(&mut self) {
        for node in std::mem::take(&mut self.nodes) {
            self.free(node);
        }
        self.drop_areas(usize::MAX);
    }
}

/// The place to which the garbage of one tree returns. It outlives the tree while the epoch still
/// has some of it.
pub(super) struct Reclaim<T, const F: usize, R> {
    /// The tree's own pool. Null while an update has it; that update alone stores to this word.
    pool: AtomicPtr<Pool<T, F, R>>,
    /// A stack of the pools of updates that found no pool there.
    further: AtomicPtr<Pool<T, F, R>>,
    /// A stack of garbage that no thread reaches any more.
    returned: AtomicPtr<Garbage<T, F, R>>,
    census: Census,
}

impl<T, const F: usize, R> Reclaim<T, F, R> {
    pub(super) fn new() -> Arc<Self> {
        let census = Census::default();
        Arc::new(Reclaim {
            pool: AtomicPtr::new(Box::into_raw(Pool::new(census.clone()))),
            further: AtomicPtr::new(ptr::null_mut()),
            returned: AtomicPtr::new(ptr::null_mut()),
            census,
        })
    }

    /// A pool for one update, with all garbage that has returned. Drops rules, and some of the
    /// areas, that have returned.
    pub(super) fn checkout(home: &Arc<Self>) -> Checkout<'_, T, F, R> {
        // Acquire: pairs with the Release in `put_back`. If we get that pool, its lists are as the
        // last update left them, and what it holds open was unreachable before. If we get null,
        // another update has the pool, and we use a further one.
        let pool = home.pool.swap(ptr::null_mut(), Ordering::Acquire);
        let (pool, own) = if pool.is_null() {
            (Pool::new(home.census.clone()), false)
        } else {
            // SAFETY: made by `Box::into_raw`, in `new` or `put_back`; the swap gave us it alone.
            (unsafe { Box::from_raw(pool) }, true)
        };
        pool.witness.end();
        let mut checkout = Checkout {
            pool: ManuallyDrop::new(pool),
            own,
            home,
        };
        home.absorb_all(&mut checkout);
        checkout.tidy();
        checkout
    }

    /// Takes the further pools and the returned garbage into `pool`.
    #[inline]
    fn absorb_all(&self, pool: &mut Pool<T, F, R>) {
        // Relaxed, both: only decide whether the swaps there are worth their cost.
        if !self.further.load(Ordering::Relaxed).is_null() {
            self.absorb_further(pool);
        }
        if !self.returned.load(Ordering::Relaxed).is_null() {
            self.absorb_returned(pool);
        }
    }

    /// Merges the further pools into `pool`.
    #[inline(never)]
    fn absorb_further(&self, pool: &mut Pool<T, F, R>) {
        // Acquire: pairs with the Release in `push_further`. If we get a pool, its lists and its
        // link are as the update that pushed it left them. A pool that is pushed later is left to a
        // later update.
        let mut next = self.further.swap(ptr::null_mut(), Ordering::Acquire);
        while !next.is_null() {
            // SAFETY: made by `Box::into_raw` in `push_further`; no other thread took it out of the
            // stack, because the stack is taken whole.
            let mut further = unsafe { Box::from_raw(next) };
            further.witness.end();
            next = std::mem::replace(&mut further.next, ptr::null_mut());
            pool.merge(&mut further);
        }
    }

    /// Takes the garbage that has returned into `pool`.
    #[inline(never)]
    fn absorb_returned(&self, pool: &mut Pool<T, F, R>) {
        // Acquire: pairs with the Release in `give_back`. All reads by threads that could reach
        // this garbage came before; garbage that is pushed later is left to a later update.
        let mut next = self.returned.swap(ptr::null_mut(), Ordering::Acquire);
        while !next.is_null() {
            // SAFETY: made by `Box::into_raw` in `hand_over`; no other thread took it out of the
            // stack, because the stack is taken whole.
            let mut garbage = unsafe { Box::from_raw(next) };
            next = std::mem::replace(&mut garbage.next, ptr::null_mut());
            // SAFETY: it has returned from the epoch: no thread reaches it, and no other thread
            // frees it, by the contract of `hand_over`.
            unsafe { pool.absorb(garbage) };
        }
    }

    /// Puts the tree's own pool where the next update finds it.
    fn put_back(&self, pool: Box<Pool<T, F, R>>) {
        // Release: pairs with the Acquire in `checkout`, and the next update sees our lists.
        // A plain store: the word is null since we took the pool, as no other update stores to it.
        self.pool.store(
            Box::into_raw(pool),
            weaken(Step::PublishPool, Ordering::Release),
        );
    }

    /// Pushes the pool of an update that found no pool.
    fn push_further(&self, pool: Box<Pool<T, F, R>>) {
        let pool = Box::into_raw(pool);
        // Relaxed: a guess, which the compare-exchange checks. The pool that it points to is not
        // read.
        let mut top = self.further.load(Ordering::Relaxed);
        loop {
            // SAFETY: made above, and ours until the compare-exchange succeeds.
            unsafe { (*pool).next = top };
            // Success, Release: pairs with the Acquire in `absorb_further`. The update that takes
            // the stack sees the link above and our lists. Pushes of other threads in between
            // extend the release sequence, because they are read-modify-writes. Failure, Relaxed:
            // as for the load.
            match self.further.compare_exchange_weak(
                top,
                pool,
                weaken(Step::PublishFurther, Ordering::Release),
                Ordering::Relaxed,
            ) {
                Ok(_) => return,
                Err(found) => top = found,
            }
        }
    }

    /// Pushes garbage that no thread reaches any more. This is all that a deferred call does: it
    /// never frees or waits.
    ///
    /// # Safety
    /// `garbage` was made by `Box::into_raw`, and no other thread has it.
    unsafe fn give_back(&self, garbage: *mut Garbage<T, F, R>) {
        // Relaxed: a guess, which the compare-exchange checks. The list that it points to is not
        // read.
        let mut top = self.returned.load(Ordering::Relaxed);
        loop {
            // SAFETY: alive and ours until the compare-exchange succeeds, by our contract.
            unsafe { (*garbage).next = top };
            // Success, Release: pairs with the Acquire in `absorb_returned`. The update that takes
            // the stack sees the link above, and that the readers have left. Pushes of other
            // threads in between extend the release sequence, because they are read-modify-writes.
            // Failure, Relaxed: as for the load.
            match self.returned.compare_exchange_weak(
                top,
                garbage,
                Ordering::Release,
                Ordering::Relaxed,
            ) {
                Ok(_) => return,
                Err(found) => top = found,
            }
        }
    }
}

impl<T, const F: usize, R> Drop for Reclaim<T, F, R> {
    fn drop(&mut self) {
        // Relaxed: exclusive access, so all stores happened before.
        let pool = self.pool.load(Ordering::Relaxed);
        let mut pool = if pool.is_null() {
            // A thread has ended inside of an update without unwinding, as in a model that fails.
            Pool::new(self.census.clone())
        } else {
            // SAFETY: made by `Box::into_raw`, in `new` or `put_back`; `&mut self`, so no update
            // can check it out.
            unsafe { Box::from_raw(pool) }
        };
        self.absorb_all(&mut pool);
        // SAFETY: the tree holds a count of us, and readers borrow the tree: none is left.
        unsafe { pool.absorb_open() };
    }
}

/// A pool that this thread has alone. Dropping it puts the pool back.
pub(super) struct Checkout<'t, T, const F: usize, R> {
    pool: ManuallyDrop<Box<Pool<T, F, R>>>,
    /// Whether it is the tree's own pool.
    own: bool,
    home: &'t Arc<Reclaim<T, F, R>>,
}

impl<T, const F: usize, R> Checkout<'_, T, F, R>
where
    T: Send + Sync + 'static,
    R: Send + Sync + 'static,
{
    /// Hands the open garbage to the epoch if there is enough of it.
    ///
    /// # Safety
    /// As for [`Checkout::hand_over`].
    #[inline]
    pub(super) unsafe fn hand_over_if_full(&mut self, pinned: &Pinned) {
        if self.open.is_full() {
            // SAFETY: our contract.
            unsafe { self.hand_over(pinned) };
        }
    }

    /// Hands the open garbage to the epoch by one deferred call: the garbage returns after every
    /// thread that is pinned now has unpinned (a grace period). Then runs the deferred calls of all
    /// threads that are due.
    ///
    /// # Safety
    /// The open garbage is no longer reachable from the root.
    pub(super) unsafe fn hand_over(&mut self, pinned: &Pinned) {
        if !self.open.is_empty() {
            let list = self.lists.pop().unwrap_or_else(Garbage::new);
            let garbage = Box::into_raw(std::mem::replace(&mut self.open, list));
            let home = Arc::clone(self.home);
            // SAFETY: made by `Box::into_raw` above; a deferred call runs once.
            let give_back = move || unsafe { home.give_back(garbage) };
            if performs(Step::WaitForReaders) {
                // SAFETY:
                // - `give_back` may run on another thread: nodes are plain memory, areas and rules
                //   are `Send + Sync`.
                // - it may outlive this frame and the tree: it owns the garbage and a count of
                //   `home`, and areas and rules are `'static`. The closure is two words, so it is
                //   stored inline: running it frees nothing either.
                unsafe { pinned.0.defer_unchecked(give_back) };
            } else {
                give_back();
            }
        }
        pinned.flush();
    }
}

impl<T, const F: usize, R> Deref for Checkout<'_, T, F, R> {
    type Target = Pool<T, F, R>;

    fn deref(&self) -> &Self::Target {
        &self.pool
    }
}

impl<T, const F: usize, R> DerefMut for Checkout<'_, T, F, R> {
    fn deref_mut(&mut self) -> &mut Self::Target {
        &mut self.pool
    }
}

impl<T, const F: usize, R> Drop for Checkout<'_, T, F, R> {
    fn drop(&mut self) {
        // SAFETY: taken only here, and `pool` is not used again.
        let pool = unsafe { ManuallyDrop::take(&mut self.pool) };
        match self.own {
            true => self.home.put_back(pool),
            false => self.home.push_further(pool),
        }
    }
}

/// Counts the allocated nodes, for tests.
#[derive(Clone, Default)]
pub(super) struct Census {
    #[cfg(all(test, not(dirtymap_loom)))]
    alive: Arc<crate::sync::AtomicUsize>,
}

impl Census {
    fn made(&self) {
        #[cfg(all(test, not(dirtymap_loom)))]
        self.alive.fetch_add(1, Ordering::Relaxed); // Relaxed: a statistic.
    }

    fn freed(&self) {
        #[cfg(all(test, not(dirtymap_loom)))]
        self.alive.fetch_sub(1, Ordering::Relaxed); // Relaxed: a statistic.
    }
}

/// Where the nodes of a tree are while no update runs.
#[cfg(all(test, not(dirtymap_loom)))]
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Whereabouts {
    pub(super) allocated: usize,
    pub(super) pooled: usize,
    /// Replaced, and not yet handed to the epoch.
    pub(super) open: usize,
}

#[cfg(all(test, not(dirtymap_loom)))]
impl<T, const F: usize, R> Reclaim<T, F, R> {
    pub(super) fn whereabouts(home: &Arc<Self>) -> Whereabouts {
        let pool = Reclaim::checkout(home);
        Whereabouts {
            allocated: home.allocated().load(Ordering::Relaxed),
            pooled: pool.nodes.len(),
            open: pool.open.nodes.len(),
        }
    }

    /// The number of nodes that are allocated. The count may be read after the tree is gone.
    pub(super) fn allocated(&self) -> Arc<crate::sync::AtomicUsize> {
        Arc::clone(&self.census.alive)
    }
}
