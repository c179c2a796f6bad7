//! Harvests by region and by range, their transactions, and memory that grows while others write.

use super::{NONE, PAGE, bytes, harvest, machine, region, taken};
use dirtymap::{Error, UserBitmap};
use dirtymap_vm_memory::SpaceBitmap;
use std::sync::Arc;
use vm_memory::bitmap::Bitmap;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

#[test]
fn a_harvest_by_region_takes_that_region_alone() {
    let (space, memory) = machine(&[(0, 8 * PAGE), (1 << 32, 8 * PAGE)]);
    memory.write_obj(1u8, GuestAddress(3 * PAGE)).unwrap();
    memory
        .write_obj(1u8, GuestAddress((1 << 32) + 5 * PAGE))
        .unwrap();
    // The handle comes from the region, because the trait gives only a slice.
    let ranges: Vec<_> = memory
        .iter()
        .map(|region| (**region).bitmap().range())
        .collect();
    assert_eq!(taken(&space, ranges[1]), [(1 << 20) + 5]);
    assert_eq!(taken(&space, ranges[1]), NONE);
    assert_eq!(taken(&space, ranges[0]), [3]);
}

#[test]
fn a_region_with_a_space_of_its_own_is_harvested_from_address_0() {
    let ranges = [(GuestAddress(0), 1 << 20), (GuestAddress(1 << 32), 1 << 20)];
    let memory = GuestMemoryMmap::<SpaceBitmap>::from_ranges(&ranges).unwrap();
    memory
        .write_obj(1u8, GuestAddress((1 << 32) + 0x1_0000))
        .unwrap();
    let found: Vec<_> = memory
        .iter()
        .map(|region| {
            let bitmap = (**region).bitmap();
            let pages = taken(bitmap.space(), bitmap.range());
            let page = bitmap.space().page().bytes();
            pages.iter().map(|n| n * page).collect::<Vec<_>>()
        })
        .collect();
    assert_eq!(found, [vec![], vec![0x1_0000]]);
}

#[test]
fn a_harvest_by_range_leaves_the_rest_of_the_region() {
    let (space, memory) = machine(&[(0, 64 * PAGE)]);
    memory
        .write_slice(&[1; 8 * 4096], GuestAddress(8 * PAGE))
        .unwrap();
    assert_eq!(taken(&space, bytes(10 * PAGE, 2 * PAGE)), [10, 11]);
    assert_eq!(taken(&space, bytes(0, 64 * PAGE)), [8, 9, 12, 13, 14, 15]);
}

#[test]
fn an_abort_puts_back_and_a_commit_does_not() {
    let (space, memory) = machine(&[(0, 64 * PAGE)]);
    let all = bytes(0, 64 * PAGE);
    memory.write_obj(1u8, GuestAddress(9 * PAGE)).unwrap();
    let mut words = [0];
    let lease = harvest(&space, all, &mut words);
    assert_eq!(lease.dirty(), 1);
    memory.write_obj(2u8, GuestAddress(10 * PAGE)).unwrap();
    lease.abort();
    assert_eq!(taken(&space, all), [9, 10]);
    assert_eq!(taken(&space, all), NONE);
}

/// In a bitmap for all regions, a mark past the end of its region marked the first page of the next
/// one.
#[test]
fn a_mark_past_the_end_of_a_region_marks_no_other_region() {
    let (space, memory) = machine(&[(0, 4 * PAGE), (4 * PAGE, 4 * PAGE)]);
    let (low, _) = memory.to_region_addr(GuestAddress(0)).unwrap();
    (**low).bitmap().mark_dirty(3 * 4096, 2 * 4096);
    assert_eq!(taken(&space, bytes(0, 8 * PAGE)), [3]);
    assert_eq!(space.stats().outside_marks, 1);
}

#[test]
fn a_region_that_was_removed_marks_nothing_in_its_successor() {
    let (space, memory) = machine(&[(0, 4 * PAGE), (1 << 20, 4 * PAGE)]);
    memory
        .write_obj(1u8, GuestAddress((1 << 20) + PAGE))
        .unwrap();
    let (rest, old) = memory
        .remove_region(GuestAddress(1 << 20), 4 * PAGE)
        .unwrap();
    let gone = bytes(1 << 20, 4 * PAGE);
    let mut words = [0];
    space
        .unmap(gone, space.page(), UserBitmap::new(&mut words))
        .unwrap();
    assert_eq!(words, [0b10], "what was dirty came out of the unmap");
    let rest = rest
        .insert_region(Arc::new(region(&space, 1 << 20, 4 * PAGE)))
        .unwrap();
    (**old).bitmap().mark_dirty(0, 1);
    assert_eq!(space.stats().outside_marks, 1);
    rest.write_obj(1u8, GuestAddress((1 << 20) + 2 * PAGE))
        .unwrap();
    assert_eq!(taken(&space, gone), [256 + 2]);
}

#[test]
fn regions_that_overlap_or_are_cut_off_pages_are_refused() {
    let (space, _memory) = machine(&[(0, 4 * PAGE)]);
    let overlap = SpaceBitmap::map(&space, bytes(2 * PAGE, 4 * PAGE));
    assert!(matches!(overlap, Err(Error::Overlap { .. })));
    let unaligned = SpaceBitmap::map(&space, bytes(1 << 20, PAGE + 512));
    assert!(matches!(unaligned, Err(Error::Unaligned { .. })));
}
