//! Which parts of an area that was cut have gone.
//!
//! The pieces of a cut share the marks of the whole, and a mark may come by the handle of the whole,
//! or by an old snapshot, long after the cut: see [`unmap`](crate::space) for who counts it. It asks
//! here, not the pieces: so no area knows what became of it, and nothing grows with the number of
//! cuts.
//!
//! Ranges that touch are one. Between two of them there is a piece that is still there, so there are
//! at most as many of them as there are such pieces, and one: what was cut and unmapped before costs
//! nothing. Addresses that have gone never come back to the same marks: what is mapped there anew
//! has marks of its own.

use crate::area::AreaTree;
use crate::sync::Arc;
use crate::units::{Iova, IovaRange};

/// See the [module](self). Marks look at it without waiting; unmaps add to it.
#[derive(Debug)]
pub(super) struct Gone {
    ranges: AreaTree<(), 8>,
    /// What the tree holds at each range.
    nothing: Arc<()>,
}

impl Gone {
    pub(super) fn new() -> Self {
        Gone {
            ranges: AreaTree::new(),
            nothing: Arc::new(()),
        }
    }

    /// Adds `range`, which was there until now.
    pub(super) fn add(&self, range: IovaRange) {
        let added = self.ranges.update(|edit| {
            let mut joined = range;
            let below = range.start().get().checked_sub(1).map(Iova::new);
            let above = range.last().checked_add(1);
            for beside in [below, above].into_iter().flatten() {
                let found = edit.first_intersecting(IovaRange::at(beside));
                if let Some(found) = found.map(|entry| entry.range) {
                    edit.remove(found.start());
                    joined = joined.hull(found);
                }
            }
            edit.insert(joined, &self.nothing)
        });
        debug_assert!(added.is_ok(), "{range} goes twice: {:?}", added.err());
    }

    /// Visits the parts of `range` that have gone, in ascending order.
    pub(super) fn parts(&self, range: IovaRange, mut visit: impl FnMut(IovaRange)) {
        let snapshot = self.ranges.snapshot();
        for entry in snapshot.iter(range) {
            entry
                .range
                .intersection(range)
                .into_iter()
                .for_each(&mut visit);
        }
    }
}
