//! Which parts of an area that was cut have left the tree.
//!
//! The pieces of a cut share the marks of the whole. A mark may come by a handle of the whole, or
//! by an old snapshot, long after the cut: [`unmap`](crate::space) describes which side counts it.
//! Such a mark looks here, and not at the pieces. So an area needs no record of its pieces, and
//! nothing grows with the number of cuts.
//!
//! Ranges that touch are joined. Between two of them lies a piece that is still in the tree, so
//! there is at most one range more than there are such pieces: earlier cuts and unmaps cost
//! nothing. Addresses that have left never come back to the same marks, because an area that is
//! mapped there later has marks of its own.

use crate::area::AreaTree;
use crate::sync::Arc;
use crate::units::{Iova, IovaRange};

/// See the [module](self). Marks read it without blocking; unmaps add to it.
#[derive(Debug)]
pub(super) struct Gone {
    ranges: AreaTree<(), 8>,
    /// The value of each range in the tree.
    nothing: Arc<()>,
}

impl Gone {
    pub(super) fn new() -> Self {
        Gone {
            ranges: AreaTree::new(),
            nothing: Arc::new(()),
        }
    }

    /// Adds `range`, which was in the tree until now.
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
            edit.insert(joined, Arc::clone(&self.nothing))
        });
        debug_assert!(added.is_ok(), "{range} goes twice: {:?}", added.err());
    }

    /// Visits the parts of `range` that have left the tree, in ascending order.
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

#[cfg(all(test, not(dirtymap_loom)))]
#[allow(clippy::unwrap_used)] // helpers of tests
mod tests {
    use super::*;

    fn pages(first: u64, n: u64) -> IovaRange {
        IovaRange::from_len(Iova::new(first << 12), n << 12).unwrap()
    }

    /// Asserts which pages have left, and that there is one range for each run of them.
    fn check(gone: &Gone, runs: &[IovaRange]) {
        let mut parts = Vec::new();
        gone.parts(IovaRange::ALL, |part| parts.push(part));
        assert_eq!(parts, runs);
        assert_eq!(gone.ranges.snapshot().len(), runs.len());
        gone.ranges.internal_validate();
    }

    #[test]
    fn what_goes_side_by_side_is_one_range() {
        let gone = Gone::new();
        check(&gone, &[]);
        // From both ends, the middle last; the pages between stay.
        for page in 0..100 {
            gone.add(pages(1000 + page, 1));
            gone.add(pages(1999 - page, 1));
        }
        check(&gone, &[pages(1000, 100), pages(1900, 100)]);
        gone.add(pages(1102, 1));
        check(&gone, &[pages(1000, 100), pages(1102, 1), pages(1900, 100)]);
        gone.add(pages(1100, 2));
        check(&gone, &[pages(1000, 103), pages(1900, 100)]);
        let mut parts = Vec::new();
        gone.parts(pages(1050, 900), |part| parts.push(part));
        assert_eq!(parts, [pages(1050, 53), pages(1900, 50)]);
        gone.add(pages(1103, 797));
        check(&gone, &[pages(1000, 1000)]);
    }

    #[test]
    fn the_borders_of_the_address_space_do_not_wrap() {
        let gone = Gone::new();
        let top = IovaRange::granule_at(Iova::MAX, crate::units::Granule::K4);
        gone.add(pages(0, 1));
        gone.add(top);
        check(&gone, &[pages(0, 1), top]);
        let rest = IovaRange::new(pages(1, 1).start(), Iova::new(top.start().get() - 1));
        gone.add(rest.unwrap());
        check(&gone, &[IovaRange::ALL]);
    }
}
