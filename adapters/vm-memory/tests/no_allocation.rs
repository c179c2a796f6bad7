//! Marks do not allocate, once the memory that they mark is known.
#![cfg(unix)]
#![allow(clippy::unwrap_used)] // helpers of tests

#[path = "../../../tests/common_allocations/mod.rs"]
mod common_allocations;

use common_allocations::allocations;
use dirtymap::IovaRange;
use dirtymap_vm_memory::SpaceBitmap;
use vm_memory::bitmap::{Bitmap, NewBitmap};

#[test]
fn marks_of_guest_memory_allocate_nothing() {
    let region = SpaceBitmap::with_len(1 << 30);
    let sparse = SpaceBitmap::new(region.space(), IovaRange::ALL);
    let round = || {
        for bitmap in [&region, &sparse] {
            bitmap.slice_at(5 << 12).mark_dirty(100, 1 << 20);
            bitmap.mark_dirty(0, 8);
            assert!(bitmap.dirty_at(5 << 12));
            drop(bitmap.begin_write(9 << 12, 512).unwrap());
        }
    };
    round();
    assert_eq!(allocations(round), 0);
}
