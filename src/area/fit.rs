//! First fit: the lowest free range that is long enough.
//!
//! One descent in ascending order of addresses, with a floor that moves to the end of each area. A
//! subtree whose longest hole (Inv. 6) is shorter than the requested length is skipped as if it
//! were one area. The search looks at holes between subtrees from their parent.
//!
//! # Cost
//! O(F log n) if every hole of `len` bytes can hold the range: one descent along the floor that
//! finds nothing, and the one that finds the range. That is so for an alignment of 1, and if areas
//! start and end at multiples of the alignment. Otherwise each hole that is long enough but not
//! aligned can cost one more descent. A hole of `len + alignment - 1` bytes always fits.

use super::node::Node;
use super::snapshot::Subtree;
use crate::units::{Granule, Iova, IovaRange};

impl<'a, T, const F: usize> Subtree<'a, T, F> {
    /// The lowest `len` bytes inside `within` that no area holds and that start at a multiple of
    /// `alignment`. `len` is not 0.
    pub(super) fn first_fit(
        self,
        within: IovaRange,
        len: u64,
        alignment: Granule,
    ) -> Option<IovaRange> {
        let mut search = Search {
            floor: Some(within.start().get()),
            last: within.last().get(),
            len,
            alignment,
        };
        let found = self
            .root()
            .and_then(|root| self.fit_below(root, &mut search));
        found.or_else(|| search.hole_to(within.last().get()))
    }

    /// Looks at the holes inside `node` and right below it, and moves the floor above it.
    fn fit_below(self, node: &'a Node<T, F>, search: &mut Search) -> Option<IovaRange> {
        let first = search.floor.map_or(node.len(), |floor| node.find(floor));
        for at in first..node.len() {
            // The hole below the slot.
            let start = node.start(at);
            if let Some(before) = start.checked_sub(1) {
                let found = search.hole_to(before);
                if found.is_some() {
                    return found;
                }
            }
            if start > search.last {
                search.floor = None;
            }
            search.floor?;
            if node.hole(at) >= search.len {
                search.move_to(start);
                let found = self.fit_below(self.child(node, at), search);
                if found.is_some() {
                    return found;
                }
                search.floor?;
            }
            search.floor = node.last(at).checked_add(1);
        }
        None
    }
}

struct Search {
    /// The lowest address that may still be used; `None` above the last address.
    floor: Option<u64>,
    /// The last address that may be used.
    last: u64,
    len: u64,
    alignment: Granule,
}

impl Search {
    /// The range, if it fits between the floor and `last`, inside the bounds.
    fn hole_to(&self, last: u64) -> Option<IovaRange> {
        let last = last.min(self.last);
        // Checked: near 2^64 there may be no aligned address above the floor.
        let start = self
            .floor?
            .checked_add(self.alignment.mask())
            .map(|end| end & !self.alignment.mask())?;
        let range = IovaRange::from_len(Iova::new(start), self.len).ok()?;
        (range.last().get() <= last).then_some(range)
    }

    fn move_to(&mut self, start: u64) {
        self.floor = self.floor.map(|floor| floor.max(start));
    }
}
