//! The checks behind `internal_validate`.

use super::node::Node;
use super::snapshot::Areas;

impl<'a, T, const F: usize> Areas<'a, T, F> {
    /// Asserts that the areas are ordered and disjoint, and that every annotation, level, count and stamp is right.
    pub(super) fn internal_validate(self) {
        let Some(root) = self.root() else { return };
        assert!(root.is_leaf() || root.len() > 1, "a root with one child");
        self.validate_below(root, &mut None);
    }

    /// `behind` is the last address of the area before this subtree.
    fn validate_below(self, node: &'a Node<T, F>, behind: &mut Option<u64>) {
        assert!(
            (1..=F).contains(&node.len()),
            "a node without slots, or too many"
        );
        let mut areas = 0;
        for at in 0..node.len() {
            let slot = node.slot(at);
            assert_eq!(node.find(slot.start), at);
            assert_eq!(node.find(slot.last), at);
            if node.is_leaf() {
                assert!(slot.start <= slot.last, "a reversed range");
                assert!(behind.is_none_or(|last| last < slot.start), "areas overlap");
                *behind = Some(slot.last);
                areas += 1;
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
            self.validate_below(child, behind);
            let exact = child.as_slot(child);
            assert_eq!(
                (slot.start, slot.last),
                (exact.start, exact.last),
                "a stale annotation"
            );
            areas += child.areas;
        }
        assert_eq!(node.areas, areas, "a wrong count of areas");
        assert!(
            node.unused_slots_are_blank(),
            "a slot that is not in use could be found"
        );
    }
}
