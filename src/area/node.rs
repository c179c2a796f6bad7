//! A node: up to `F` slots, each with an inclusive range and a pointer to the area or child there.
//!
//! Keys have cache lines of their own. A search reads the `last` addresses, two lines at a fan-out
//! of 16, and then one more line, which holds the pointer and the first address. All searches use
//! [`Node::find`].

use std::hint::select_unpredictable;
use std::marker::PhantomData;
use std::ops::Range;
use std::ptr;

use crate::sync::prefetch;
use crate::units::{Iova, IovaRange};

/// The contents of one slot of a node.
#[derive(Clone, Copy)]
pub(super) struct NodeSlot {
    /// The first address below.
    pub(super) start: u64,
    /// The last address below.
    pub(super) last: u64,
    /// The length of the longest hole between two neighbouring areas below (Inv. 6); 0 in a leaf.
    pub(super) hole: u64,
    /// In a leaf the area, as `Arc::into_raw` returned it; otherwise the child, as `Box::into_raw`
    /// returned it.
    pub(super) pointer: *const (),
}

/// The hole of a slot whose child an edit has changed and not counted yet. No hole between two
/// areas is that long. It is greater than all numbers of holes, so the longest hole of a node with
/// such a slot is uncounted, too.
pub(super) const UNCOUNTED: u64 = u64::MAX;

/// The fields of a slot that a search needs after it has found the slot, next to each other.
#[derive(Clone, Copy)]
struct Target {
    pointer: *const (),
    start: u64,
}

/// How a change in one place of a node affects its holes: the longest hole that it may have closed,
/// and the longest one that it may have opened.
#[derive(Clone, Copy)]
pub(super) struct HoleChange {
    pub(super) before: u64,
    pub(super) now: u64,
}

impl HoleChange {
    /// No hole has changed.
    pub(super) const NONE: HoleChange = HoleChange { before: 0, now: 0 };
}

/// See the [module](self). Slots `0..len` are in use and in ascending order.
#[repr(C, align(64))]
pub(super) struct Node<T, const F: usize> {
    /// The last address below each slot. It is `u64::MAX` in slots that are not in use, so that a
    /// search needs no length.
    last: [u64; F],
    target: [Target; F],
    /// The length of the longest hole below each slot (Inv. 6). A search for a free range skips
    /// subtrees without a hole that is long enough. Without meaning in a leaf, where no code reads
    /// or copies it.
    hole: [u64; F],
    len: usize,
    /// Identifies the edit that made the node; see invariant 5.
    stamp: u64,
    /// The number of levels below this one; a leaf is at level 0.
    level: u8,
    points_to: PhantomData<*const T>,
}

impl<T, const F: usize> Node<T, F> {
    /// A node with at most this many slots is merged with a neighbour if both fit into one.
    pub(super) const SPARSE: usize = F / 4;

    /// A node without slots.
    #[cold]
    #[inline(never)]
    pub(super) fn empty(level: u8, stamp: u64) -> Box<Self> {
        const {
            assert!(
                F >= 4,
                "a node that is split in the middle must leave two that are not sparse"
            )
        };
        const NOTHING: Target = Target {
            pointer: ptr::null(),
            start: 0,
        };
        Box::new(Node {
            last: [u64::MAX; F],
            target: [NOTHING; F],
            hole: [0; F],
            len: 0,
            stamp,
            level,
            points_to: PhantomData,
        })
    }

    /// Makes this node, which no other thread reaches, one with the slots of `node`, under another
    /// stamp.
    pub(super) fn copy_from(&mut self, node: &Self, stamp: u64) {
        // SAFETY: a node is plain numbers and pointers, whose copy owns nothing; a unique and a
        // shared reference do not overlap. A struct expression would copy the node twice.
        unsafe { ptr::copy_nonoverlapping(node, self, 1) };
        self.stamp = stamp;
    }

    /// Makes this node, which no other thread reaches, the leaf `leaf` with `slot` inserted as
    /// number `at`, under another stamp. `leaf` is not full.
    pub(super) fn copy_inserted(&mut self, leaf: &Self, at: usize, slot: NodeSlot, stamp: u64) {
        debug_assert!(leaf.is_leaf() && at <= leaf.len && leaf.len < F);
        // One pass with a constant length: a copy that is shifted afterwards is written twice.
        for to in 0..F {
            let from = to - usize::from(to > at);
            self.last[to] = leaf.last[from];
            self.target[to] = leaf.target[from];
        }
        self.copy_header(leaf, stamp);
        self.len += 1;
        self.set(at, slot);
    }

    /// Makes this node, which no other thread reaches, the leaf `leaf` without slot `at`, under
    /// another stamp.
    pub(super) fn copy_removed(&mut self, leaf: &Self, at: usize, stamp: u64) {
        debug_assert!(leaf.is_leaf() && at < leaf.len);
        for to in 0..F - 1 {
            let from = to + usize::from(to >= at);
            self.last[to] = leaf.last[from];
            self.target[to] = leaf.target[from];
        }
        self.last[F - 1] = u64::MAX;
        self.copy_header(leaf, stamp);
        self.len -= 1;
    }

    fn copy_header(&mut self, node: &Self, stamp: u64) {
        self.len = node.len;
        self.level = node.level;
        self.stamp = stamp;
    }

    /// Makes this node, which no other thread reaches, one without slots.
    pub(super) fn clear(&mut self, level: u8, stamp: u64) {
        // The other fields of a slot are set before they are read.
        self.last = [u64::MAX; F];
        self.len = 0;
        self.stamp = stamp;
        self.level = level;
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }

    pub(super) fn level(&self) -> u8 {
        self.level
    }

    pub(super) fn stamp(&self) -> u64 {
        self.stamp
    }

    pub(super) fn is_leaf(&self) -> bool {
        self.level == 0
    }

    /// The first slot whose last address is not below `x`; `len` if there is none.
    #[inline]
    pub(super) fn find(&self, x: u64) -> usize {
        #[cfg(test)]
        crate::compared::one();
        // Over all `F` slots, a constant: the slots below `x` are a prefix, and slots not in use
        // are never below it.
        self.last.partition_point(|&last| last < x)
    }

    /// The same in fewer steps that wait for each other, but with more loads: for an edit, which
    /// has nothing else to do meanwhile.
    #[inline]
    pub(super) fn find_alone(&self, x: u64) -> usize {
        #[cfg(test)]
        crate::compared::one();
        // The slots below `x` are a prefix: first how many fours of them, then how many more.
        let fours = (3..F - 1).step_by(4);
        let before = fours.filter(|&at| self.last[at] < x).count() * 4;
        let before = before.min(F - 4);
        before + (0..4).filter(|at| self.last[before + at] < x).count()
    }

    /// Whether slot `at` exists and is the first one whose last address is not below `x`.
    #[inline]
    pub(super) fn is_first(&self, at: usize, x: u64) -> bool {
        at < self.len.min(F) && x <= self.last[at] && (at == 0 || self.last[at - 1] < x)
    }

    /// Prefetches the cache lines that a search reads, all at once. The search itself would load
    /// each line only after the one before it.
    #[inline]
    pub(super) fn prefetch(&self) {
        // The lines of `last` and `target`.
        for line in 0..F * 24 / 64 {
            prefetch(ptr::from_ref(self).cast::<u8>().wrapping_add(line * 64));
        }
    }

    /// Prefetches the areas that the slots of this leaf point to.
    pub(super) fn prefetch_areas(&self) {
        debug_assert!(self.is_leaf());
        for target in &self.target[..self.len] {
            prefetch(target.pointer.cast());
        }
    }

    /// Prefetches all of the node.
    pub(super) fn prefetch_whole(&self) {
        for line in 0..size_of::<Self>() / 64 {
            prefetch(ptr::from_ref(self).cast::<u8>().wrapping_add(line * 64));
        }
    }

    /// Prefetches the lines of a search and those that an edit reads in addition.
    #[inline]
    pub(super) fn prefetch_to_change(&self) {
        self.prefetch();
        prefetch(ptr::from_ref(&self.len).cast());
    }

    pub(super) fn slot(&self, at: usize) -> NodeSlot {
        debug_assert!(at < self.len);
        NodeSlot {
            start: self.target[at].start,
            last: self.last[at],
            hole: self.hole(at),
            pointer: self.target[at].pointer,
        }
    }

    /// The first address below slot `at`.
    #[inline]
    pub(super) fn start(&self, at: usize) -> u64 {
        debug_assert!(at < self.len);
        self.target[at].start
    }

    /// The last address below slot `at`.
    #[inline]
    pub(super) fn last(&self, at: usize) -> u64 {
        debug_assert!(at < self.len);
        self.last[at]
    }

    /// The length of the longest hole between two neighbouring areas below slot `at`; 0 in a leaf.
    #[inline]
    pub(super) fn hole(&self, at: usize) -> u64 {
        debug_assert!(at < self.len);
        match self.level {
            0 => 0,
            _ => self.hole[at],
        }
    }

    /// The length of the longest hole between two neighbouring areas below this node: below one of
    /// its slots, or between two of them.
    #[inline(never)]
    fn longest_hole(&self) -> u64 {
        let len = self.len.min(F);
        // Two chains of comparisons, in one loop and without branches. A loop over the holes alone
        // is compiled to vectors, and the baseline of x86-64 has no maximum of such numbers, so
        // that it takes three times the instructions.
        let (mut between, mut below) = (0, self.hole(0));
        for at in 1..len {
            let gap = self.target[at].start - self.last[at - 1] - 1;
            between = select_unpredictable(gap > between, gap, between);
            if self.level > 0 {
                below = select_unpredictable(self.hole[at] > below, self.hole[at], below);
            }
        }
        between.max(below)
    }

    /// The first slot from number `from` on whose longest hole is uncounted.
    pub(super) fn uncounted(&self, from: usize) -> Option<usize> {
        (from..self.len.min(F)).find(|at| self.hole[*at] == UNCOUNTED)
    }

    /// Sets the length of the longest hole below slot `at` to that of `child`, to which it points.
    pub(super) fn count_hole(&mut self, at: usize, child: &Self) {
        debug_assert!(!self.is_leaf() && at < self.len);
        self.hole[at] = child.longest_hole();
    }

    /// The addresses below slot `at`.
    #[inline]
    pub(super) fn range(&self, at: usize) -> IovaRange {
        debug_assert!(at < self.len);
        // What is inserted has the borders of a range.
        IovaRange::ascending(Iova::new(self.target[at].start), Iova::new(self.last[at]))
    }

    /// The area that slot `at` of a leaf points to.
    #[inline]
    pub(super) fn area(&self, at: usize) -> *const T {
        debug_assert!(self.is_leaf() && at < self.len);
        self.target[at].pointer.cast()
    }

    /// The ranges of `slots` of a leaf, and what the area of each is.
    #[inline]
    pub(super) fn areas_in(
        &self,
        slots: Range<usize>,
    ) -> impl Iterator<Item = (IovaRange, *const T)> {
        debug_assert!(self.is_leaf() && slots.end <= self.len);
        let target = self.target[slots.clone()].iter();
        target.zip(&self.last[slots]).map(|(target, last)| {
            let range = IovaRange::ascending(Iova::new(target.start), Iova::new(*last));
            (range, target.pointer.cast())
        })
    }

    /// The number of slots, the first ones, that start at `x` or below it.
    #[inline]
    pub(super) fn starting_by(&self, x: u64) -> usize {
        match self.target[..self.len].last() {
            // A walk over many leaves passes through all of most of them.
            Some(last) if last.start > x => {
                let slots = &self.target[..self.len];
                slots.partition_point(|target| target.start <= x)
            }
            _ => self.len,
        }
    }

    /// The node that slot `at` points to.
    #[inline]
    pub(super) fn child(&self, at: usize) -> *mut Self {
        debug_assert!(!self.is_leaf() && at < self.len);
        self.target[at].pointer.cast_mut().cast()
    }

    /// Whether a search cannot find a slot that is not in use.
    #[cfg(test)]
    pub(super) fn unused_slots_are_blank(&self) -> bool {
        self.last[self.len..].iter().all(|&last| last == u64::MAX)
    }

    /// The slot by which the parent of this node refers to it. `pointer` points to this node, which
    /// must have slots.
    pub(super) fn as_slot(&self, pointer: *const Self) -> NodeSlot {
        NodeSlot {
            start: self.target[0].start,
            last: self.last[self.len - 1],
            hole: self.longest_hole(),
            pointer: pointer.cast(),
        }
    }

    /// Updates slot `at`, which points to `child`, after `change` in the child. Returns the change
    /// of the holes of this node, or `None` if the slot says the same as before. If `change` does
    /// not say which hole of the child is the longest one, they are counted, or left uncounted if
    /// `later`.
    #[inline(always)]
    pub(super) fn update(
        &mut self,
        at: usize,
        child: &Self,
        change: HoleChange,
        later: bool,
    ) -> Option<HoleChange> {
        let said = self.slot(at);
        let hole = if change.now >= said.hole {
            change.now
        } else if change.before < said.hole {
            // The longest hole is in another place.
            said.hole
        } else if later {
            UNCOUNTED
        } else {
            child.longest_hole()
        };
        let (start, last) = (child.target[0].start, child.last[child.len - 1]);
        if (start, last) == (said.start, said.last) {
            // The holes around it are those of before.
            self.hole[at] = hole;
            return (hole != said.hole).then_some(HoleChange {
                before: said.hole,
                now: hole,
            });
        }
        let before = self.hole_around(at);
        self.set(
            at,
            NodeSlot {
                start,
                last,
                hole,
                pointer: said.pointer,
            },
        );
        let now = self.hole_around(at);
        Some(HoleChange { before, now })
    }

    /// The longest hole below slot `at`, or between it and its neighbours.
    #[inline]
    pub(super) fn hole_around(&self, at: usize) -> u64 {
        self.hole(at)
            .max(self.hole_before(at))
            .max(self.hole_before(at + 1))
    }

    /// The hole between slot `at` and the slot below it; 0 if one of them does not exist.
    #[inline]
    pub(super) fn hole_before(&self, at: usize) -> u64 {
        match (self.target.get(at), self.last.get(at.wrapping_sub(1))) {
            (Some(above), Some(below)) if at < self.len => above.start - below - 1,
            _ => 0,
        }
    }

    pub(super) fn set(&mut self, at: usize, slot: NodeSlot) {
        debug_assert!(at < self.len);
        self.last[at] = slot.last;
        self.target[at] = Target {
            pointer: slot.pointer,
            start: slot.start,
        };
        if self.level > 0 {
            self.hole[at] = slot.hole;
        }
    }

    /// Makes slot `at` point to `child` instead.
    pub(super) fn set_child(&mut self, at: usize, child: *const Self) {
        debug_assert!(!self.is_leaf() && at < self.len);
        self.target[at].pointer = child.cast();
    }

    /// Inserts `slot` as number `at`. The node must not be full.
    pub(super) fn insert(&mut self, at: usize, slot: NodeSlot) {
        debug_assert!(at <= self.len && self.len < F);
        self.last.copy_within(at..self.len, at + 1);
        if self.level > 0 {
            self.hole.copy_within(at..self.len, at + 1);
        }
        self.target.copy_within(at..self.len, at + 1);
        self.len += 1;
        self.set(at, slot);
    }

    pub(super) fn remove(&mut self, at: usize) {
        debug_assert!(at < self.len);
        self.last.copy_within(at + 1..self.len, at);
        if self.level > 0 {
            self.hole.copy_within(at + 1..self.len, at);
        }
        self.target.copy_within(at + 1..self.len, at);
        self.len -= 1;
        self.last[self.len] = u64::MAX;
    }

    /// Appends the slots of `right`. They must fit.
    pub(super) fn append(&mut self, right: &Self) {
        debug_assert!(self.level == right.level && self.len + right.len <= F);
        for at in 0..right.len {
            self.insert(self.len, right.slot(at));
        }
    }

    /// Prepends the slots of `left`. They must fit.
    pub(super) fn prepend(&mut self, left: &Self) {
        debug_assert!(self.level == left.level && self.len + left.len <= F);
        for at in 0..left.len {
            self.insert(at, left.slot(at));
        }
    }

    /// Moves the slots from number `from` on into `right`, which is empty.
    pub(super) fn split(&mut self, from: usize, right: &mut Self) {
        debug_assert!(from <= self.len && right.len == 0);
        for at in from..self.len {
            right.insert(at - from, self.slot(at));
            self.last[at] = u64::MAX;
        }
        self.len = from;
    }
}
