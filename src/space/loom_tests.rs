//! Model checking of the record of areas that leave: see [`past`](super::past).

use super::past::Past;
use crate::source::Mapping;
use crate::sync::model::{Bound, holds_within};
use crate::sync::{Arc, AtomicU64, Ordering, Step, thread};
use crate::units::{Access, Iova, IovaRange};

/// A harvest, and the unmap of an area that is in no root which the harvest walks. One of the
/// two has the dirty page of the area, and knows that it is of that area.
#[test]
fn a_page_of_an_area_that_leaves_is_attributed_to_it() {
    holds_within(Bound::USUAL, &[Step::RecordLeaving], || {
        let area = Mapping {
            range: IovaRange::from_len(Iova::MIN, 1 << 12).unwrap(),
            backing: 0,
            access: Access::ReadWrite,
        };
        let past = Past::new();
        // The dirty bit of its page, and whether the root has it.
        let dirty = Arc::new(AtomicU64::new(1));
        let root = Arc::new(AtomicU64::new(1));
        let unmap = {
            let (past, dirty, root) = (past.clone(), dirty.clone(), root.clone());
            thread::spawn(move || {
                let was_dirty = dirty.swap(0, Ordering::AcqRel) == 1; // U1
                past.record([area].into_iter()); // U2
                root.store(0, Ordering::Release); // U3
                was_dirty
            })
        };
        let watch = past.watch(); // W1
        let was_dirty = dirty.swap(0, Ordering::AcqRel) == 1; // W3
        let is_in_root = root.load(Ordering::Acquire) == 1; // W4
        let is_named = is_in_root || watch.left().contains(&area); // W5
        unmap.join().unwrap() || was_dirty && is_named
    });
}
