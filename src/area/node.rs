//! A node: up to `F` slots, each an inclusive range and what lies there.
//!
//! Keys have cache lines of their own: a search reads the `last` addresses, two lines at a fan-out of 16, and then one
//! line more, with where the slot leads and its first address. All searches are one primitive, [`Node::find`].

use std::marker::PhantomData;

use crate::units::{Iova, IovaRange};

/// What one slot of a node says.
#[derive(Clone, Copy)]
pub(super) struct Slot {
    /// The first address below.
    pub(super) start: u64,
    /// The last address below.
    pub(super) last: u64,
    /// The length of the longest hole between two neighbouring areas below (Inv. 6); 0 in a leaf.
    pub(super) hole: u64,
    /// In a leaf the area, as `Arc::into_raw` gave it; otherwise the child, as `Box::into_raw` gave it.
    pub(super) pointer: *const (),
}

/// What a search needs of the slot that it found, side by side.
#[derive(Clone, Copy)]
struct Target {
    pointer: *const (),
    start: u64,
}

/// See the [module](self). Slots `0..len` are in use and in ascending order.
#[repr(C, align(64))]
pub(super) struct Node<T, const F: usize> {
    /// The last address below each slot; `u64::MAX` in slots that are not in use, so that a search needs no length.
    last: [u64; F],
    target: [Target; F],
    /// The longest hole below each slot (Inv. 6); a search for a free range skips what cannot hold it.
    hole: [u64; F],
    len: usize,
    /// Areas in this subtree.
    pub(super) areas: usize,
    /// Which edit made the node; see invariant 5.
    stamp: u64,
    /// Levels below this one; a leaf is at level 0.
    level: u8,
    points_to: PhantomData<*const T>,
}

impl<T, const F: usize> Node<T, F> {
    /// A node with at most this many slots is merged with a neighbour if both fit into one.
    pub(super) const SPARSE: usize = F / 4;

    /// A node without slots.
    pub(super) fn empty(level: u8, stamp: u64) -> Box<Self> {
        const {
            assert!(
                F >= 4,
                "a node that is split in the middle must leave two that are not sparse"
            )
        };
        const NOTHING: Target = Target {
            pointer: std::ptr::null(),
            start: 0,
        };
        Box::new(Node {
            last: [u64::MAX; F],
            target: [NOTHING; F],
            hole: [0; F],
            len: 0,
            areas: 0,
            stamp,
            level,
            points_to: PhantomData,
        })
    }

    /// The same slots under another stamp.
    pub(super) fn copy(&self, stamp: u64) -> Box<Self> {
        Box::new(Node { stamp, ..*self })
    }

    /// Makes this node, which nobody reaches, the same as [`Node::copy`] of `node`.
    pub(super) fn copy_from(&mut self, node: &Self, stamp: u64) {
        *self = Node { stamp, ..*node };
    }

    /// Makes this node, which nobody reaches, one without slots.
    pub(super) fn clear(&mut self, level: u8, stamp: u64) {
        // The other fields of a slot are not looked at before it is set.
        self.last = [u64::MAX; F];
        self.len = 0;
        self.areas = 0;
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
        // Over all `F` slots, a constant: what lies below `x` is a prefix, and slots not in use are never below.
        self.last.partition_point(|&last| last < x)
    }

    /// Asks for the cache lines that a search reads, all at once: the search itself asks for each only when it has the one
    /// before.
    #[inline]
    pub(super) fn prefetch(&self) {
        #[cfg(all(target_arch = "x86_64", not(miri)))]
        {
            use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
            // The lines of `last` and `target`.
            for line in 0..F * 24 / 64 {
                let line = std::ptr::from_ref(self)
                    .cast::<i8>()
                    .wrapping_add(line * 64);
                // SAFETY: a hint; it neither faults nor reads, whatever the address.
                unsafe { _mm_prefetch(line, _MM_HINT_T0) };
            }
        }
    }

    pub(super) fn slot(&self, at: usize) -> Slot {
        debug_assert!(at < self.len);
        Slot {
            start: self.target[at].start,
            last: self.last[at],
            hole: self.hole[at],
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
        self.hole[at]
    }

    /// The length of the longest hole between two neighbouring areas below this node: below one of its slots, or
    /// between two of them.
    fn longest_hole(&self) -> u64 {
        let below = self.hole[..self.len].iter().copied().max().unwrap_or(0);
        let between = |at: usize| self.target[at].start - self.last[at - 1] - 1;
        (1..self.len).map(between).fold(below, u64::max)
    }

    /// The addresses below slot `at`.
    #[inline]
    pub(super) fn range(&self, at: usize) -> IovaRange {
        debug_assert!(at < self.len);
        match IovaRange::new(Iova::new(self.target[at].start), Iova::new(self.last[at])) {
            Ok(range) => range,
            Err(_) => unreachable!("what is inserted has the borders of a range"),
        }
    }

    /// The area that slot `at` of a leaf points to.
    #[inline]
    pub(super) fn area(&self, at: usize) -> *const T {
        debug_assert!(self.is_leaf() && at < self.len);
        self.target[at].pointer.cast()
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

    /// Whether all slots lie below `x`.
    pub(super) fn is_below(&self, x: u64) -> bool {
        self.find(x) == self.len
    }

    /// What the parent of this node says of it. `pointer` is that of the node, which must have slots.
    pub(super) fn as_slot(&self, pointer: *const Self) -> Slot {
        Slot {
            start: self.target[0].start,
            last: self.last[self.len - 1],
            hole: self.longest_hole(),
            pointer: pointer.cast(),
        }
    }

    pub(super) fn set(&mut self, at: usize, slot: Slot) {
        debug_assert!(at < self.len);
        self.last[at] = slot.last;
        self.target[at] = Target {
            pointer: slot.pointer,
            start: slot.start,
        };
        self.hole[at] = slot.hole;
    }

    /// Inserts `slot` as number `at`. There must be room.
    pub(super) fn insert(&mut self, at: usize, slot: Slot) {
        debug_assert!(at <= self.len && self.len < F);
        self.last.copy_within(at..self.len, at + 1);
        self.hole.copy_within(at..self.len, at + 1);
        self.target.copy_within(at..self.len, at + 1);
        self.len += 1;
        self.set(at, slot);
    }

    pub(super) fn remove(&mut self, at: usize) {
        debug_assert!(at < self.len);
        self.last.copy_within(at + 1..self.len, at);
        self.hole.copy_within(at + 1..self.len, at);
        self.target.copy_within(at + 1..self.len, at);
        self.len -= 1;
        self.last[self.len] = u64::MAX;
    }

    /// Appends the slots of `right`. There must be room.
    pub(super) fn append(&mut self, right: &Self) {
        debug_assert!(self.level == right.level && self.len + right.len <= F);
        for at in 0..right.len {
            self.insert(self.len, right.slot(at));
        }
        self.areas += right.areas;
    }

    /// Prepends the slots of `left`. There must be room.
    pub(super) fn prepend(&mut self, left: &Self) {
        debug_assert!(self.level == left.level && self.len + left.len <= F);
        for at in 0..left.len {
            self.insert(at, left.slot(at));
        }
        self.areas += left.areas;
    }

    /// Moves the slots from number `from` on into `right`, which is empty. Both nodes' `areas` are left for the caller
    /// to settle.
    pub(super) fn split(&mut self, from: usize, right: &mut Self) {
        debug_assert!(from <= self.len && right.len == 0);
        for at in from..self.len {
            right.insert(at - from, self.slot(at));
            self.last[at] = u64::MAX;
        }
        self.len = from;
    }
}
