//! The checks of `internal_validate`.

use super::node::Node;
use super::snapshot::Subtree;

impl<'a, T, const F: usize> Subtree<'a, T, F> {
    /// Asserts that there are `areas` areas, ordered and disjoint, and that every annotation, level
    /// and stamp is right.
    pub(super) fn internal_validate(self, areas: usize) {
        let mut seen = Seen::default();
        if let Some(root) = self.root() {
            assert!(root.is_leaf() || root.len() > 1, "a root with one child");
            self.validate_below(root, &mut seen);
        }
        assert_eq!(seen.areas, areas, "a wrong count of areas");
    }

    /// The number of levels, and of nodes on all of them.
    #[cfg(not(dirtymap_loom))]
    pub(super) fn shape(self) -> (usize, usize) {
        let levels = self.root().map_or(0, |root| usize::from(root.level()) + 1);
        (levels, self.root().map_or(0, |root| self.nodes(root)))
    }

    #[cfg(not(dirtymap_loom))]
    fn nodes(self, node: &'a Node<T, F>) -> usize {
        let below = |at| self.nodes(self.child(node, at));
        let slots = if node.is_leaf() { 0 } else { node.len() };
        1 + (0..slots).map(below).sum::<usize>()
    }

    /// Returns the longest hole between areas below `node`. Adds those areas to `seen`.
    fn validate_below(self, node: &'a Node<T, F>, seen: &mut Seen) -> u64 {
        assert!(
            (1..=F).contains(&node.len()),
            "a node without slots, or too many"
        );
        let mut longest = 0;
        for at in 0..node.len() {
            let slot = node.slot(at);
            assert_eq!(node.find(slot.start), at);
            assert_eq!(node.find(slot.last), at);
            if node.is_leaf() {
                assert!(slot.start <= slot.last, "a reversed range");
                assert_eq!(slot.hole, 0, "a hole inside of an area");
                let before = seen.area(slot.start, slot.last);
                // The hole below the first area of the subtree does not count in it.
                longest = longest.max(if at == 0 { 0 } else { before });
                continue;
            }
            let child = self.child(node, at);
            assert_eq!(
                child.level() + 1,
                node.level(),
                "leaves at different depths"
            );
            assert!(
                child.stamp() <= node.stamp(),
                "a child younger than its parent"
            );
            let before = seen.last.map_or(0, |last| slot.start - last - 1);
            longest = longest.max(if at == 0 { 0 } else { before });
            let below = self.validate_below(child, seen);
            assert_eq!(slot.hole, below, "a wrong longest hole");
            longest = longest.max(below);
            let exact = child.as_slot(child);
            assert_eq!(
                (slot.start, slot.last, slot.hole),
                (exact.start, exact.last, exact.hole),
                "a stale annotation"
            );
        }
        assert!(
            node.unused_slots_are_blank(),
            "a slot that is not in use could be found"
        );
        longest
    }
}

/// The areas that the walk has passed.
#[derive(Default)]
struct Seen {
    /// The last address of the last one.
    last: Option<u64>,
    areas: usize,
}

impl Seen {
    /// Adds an area, and returns the length of the hole below it.
    fn area(&mut self, start: u64, last: u64) -> u64 {
        assert!(self.last.is_none_or(|last| last < start), "areas overlap");
        let before = self.last.map_or(start, |last| start - last - 1);
        self.last = Some(last);
        self.areas += 1;
        before
    }
}
