//! The checks that vm-memory has for its own bitmap hold for this one: each way to write marks the
//! written pages, after the write.

use super::{PAGE, is, machine, region};
use dirtymap::{AddressSpace, Granule, IovaRange};
use dirtymap_vm_memory::SpaceBitmap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use vm_memory::bitmap::{AtomicBitmap, Bitmap, NewBitmap};
use vm_memory::{
    Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion,
    MemoryRegionAddress, MmapRegion, VolatileMemory, VolatileSlice,
};

/// The host's page, which vm-memory's bitmap uses.
fn host_page() -> usize {
    // SAFETY: this call takes a number, returns one, and touches no memory of ours.
    unsafe { libc::sysconf(libc::_SC_PAGESIZE) as usize }
}

#[test]
fn a_mark_shows_in_the_bitmap_and_in_its_slices() {
    let bitmap = SpaceBitmap::with_len(0x10_0000);
    let page = host_page();
    let slice = bitmap.slice_at(page);
    let deeper = slice.slice_at(page);
    assert!(is(false, &bitmap, 0, 4 * page));
    bitmap.mark_dirty(page + 5, 10);
    assert!(is(false, &bitmap, 0, page));
    assert!(is(true, &bitmap, page, page) && is(true, &slice, 0, page));
    assert!(is(false, &bitmap, 2 * page, page) && is(false, &deeper, 0, page));
    deeper.mark_dirty(0, 1);
    slice.clone().mark_dirty(2 * page, page + 1);
    assert!(is(true, &bitmap, page, 4 * page));
    assert!(is(false, &bitmap, 5 * page, page));
    assert_eq!(bitmap.space().stats().outside_marks, 0);
}

#[test]
fn a_slice_of_volatile_memory_and_what_is_made_from_it_mark_their_bytes() {
    let region = MmapRegion::<SpaceBitmap>::new(0x1_0000).unwrap();
    let bitmap = region.bitmap();
    let whole: VolatileSlice<_> = region.as_volatile_slice();
    let part = region.get_slice(0x1000, 8).unwrap();
    assert!(is(false, bitmap, 0, 0x1_0000));
    whole.write_obj(1u64, 0x1000).unwrap();
    assert!(is(true, whole.bitmap(), 0x1000, 8) && is(true, part.bitmap(), 0, 8));

    let reference = region.get_ref::<u64>(0x2000).unwrap();
    assert!(is(false, bitmap, 0x2000, 8));
    reference.store(1);
    assert!(is(true, bitmap, 0x2000, 8));

    let array = region.get_array_ref::<u64>(0x3000, 4).unwrap();
    assert!(is(false, bitmap, 0x3000, 8));
    array.store(0, 1);
    assert!(is(true, bitmap, 0x3000, 8));
    // In an array that crosses a page, only the element is marked.
    let across = region.get_array_ref::<u64>(0x4ff8, 2).unwrap();
    across.store(1, 1);
    assert!(is(false, bitmap, 0x4000, 0x1000) && is(true, bitmap, 0x5000, 8));
    across.copy_from(&[2, 3]);
    assert!(is(true, bitmap, 0x4000, 8));

    whole.offset(0x6000).unwrap().copy_from(&[1u8; 8]);
    assert!(is(true, bitmap, 0x6000, 8) && is(false, bitmap, 0x7000, 0x1000));
    part.copy_to_volatile_slice(whole.offset(0x7000).unwrap());
    assert!(is(true, bitmap, 0x7000, 8) && is(false, bitmap, 0x8000, 0x1000));
    // A read marks nothing.
    let _: u64 = whole.read_obj(0x8000).unwrap();
    assert!(is(false, bitmap, 0x8000, 0x1000));
}

/// Each way of `Bytes` to write, each at a page of its own from the second page on. `is` tells
/// whether a range is all dirty, or all clean.
fn every_way_to_write<A, M: Bytes<A>>(
    memory: &M,
    at: impl Fn(usize) -> A,
    is: impl Fn(bool, usize, usize) -> bool,
) where
    M::E: std::fmt::Debug,
{
    let data = vec![1u8; 1024];
    type Way<'w, A, M> = (usize, &'w dyn Fn(&M, A));
    let ways: [Way<'_, A, M>; 5] = [
        (1024, &|m, at| assert_eq!(m.write(&data, at).unwrap(), 1024)),
        (1024, &|m, at| m.write_slice(&data, at).unwrap()),
        (8, &|m, at| m.write_obj(1u64, at).unwrap()),
        (8, &|m, at| m.store(1u64, at, Ordering::Relaxed).unwrap()),
        (1024, &|m, at| {
            m.read_exact_volatile_from(at, &mut data.as_slice(), 1024)
                .unwrap();
        }),
    ];
    for (n, (len, way)) in ways.into_iter().enumerate() {
        let offset = 0x2000 * (n + 1);
        assert!(is(false, offset, 0x2000), "way {n} before the write");
        way(memory, at(offset));
        assert!(is(true, offset, len), "way {n}");
        assert!(is(false, offset + 0x1000, 0x1000), "behind way {n}");
    }
}

#[test]
fn every_way_to_write_a_region_marks_it() {
    let space = Arc::new(AddressSpace::new(Granule::K4));
    let region = region(&space, 0x1_0000, 0x1_0000);
    space.start_tracking().unwrap();
    every_way_to_write(
        &region,
        |offset| MemoryRegionAddress(offset as u64),
        |dirty, start, len| is(dirty, &GuestMemoryRegion::bitmap(&region), start, len),
    );
    let slice = region.get_slice(MemoryRegionAddress(0xf000), 8).unwrap();
    region.write_obj(1u64, MemoryRegionAddress(0xf000)).unwrap();
    assert!(is(true, slice.bitmap(), 0, 8));
}

#[test]
fn every_way_to_write_guest_memory_marks_it() {
    let whole = |memory: &GuestMemoryMmap<SpaceBitmap>| {
        every_way_to_write(
            memory,
            |offset| GuestAddress(offset as u64),
            |dirty, start, len| {
                memory
                    .get_slices(GuestAddress(start as u64), len)
                    .all(|slice| {
                        let slice = slice.unwrap();
                        is(dirty, slice.bitmap(), 0, slice.len())
                    })
            },
        );
    };
    // One space under two regions that touch, and a space in each.
    let (space, memory) = machine(&[(0, 0x5000), (0x5000, 0xb000)]);
    whole(&memory);
    assert_eq!(space.stats().outside_marks, 0);
    if host_page() as u64 == PAGE {
        let ranges = [(GuestAddress(0), 0x5000), (GuestAddress(0x5000), 0xb000)];
        whole(&GuestMemoryMmap::from_ranges(&ranges).unwrap());
    }
}

#[test]
fn a_write_across_two_regions_marks_both() {
    let (space, memory) = machine(&[(0, 0x2000), (0x2000, 0x2000)]);
    memory
        .write_slice(&[1; 0x1800], GuestAddress(0x1000))
        .unwrap();
    assert_eq!(super::taken(&space, super::bytes(0, 0x4000)), [1, 2]);
}

/// Random marks inside, across the end and past it, by slices of slices: the same pages become
/// dirty as in vm-memory's own bitmap.
#[test]
fn random_marks_agree_with_the_bitmap_of_vm_memory() {
    let len = 100 * host_page();
    let (ours, theirs) = (SpaceBitmap::with_len(len), AtomicBitmap::with_len(len));
    let mut n = 1u64;
    let mut below = |bound: usize| {
        n = n
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        (n >> 33) as usize % bound
    };
    for round in 0..400 {
        let (from, then, offset) = (below(len), below(len / 50), below(len / 100));
        let bytes = below([2, host_page(), len / 2][round % 3]);
        ours.slice_at(from).slice_at(then).mark_dirty(offset, bytes);
        theirs
            .slice_at(from)
            .slice_at(then)
            .mark_dirty(offset, bytes);
        let pages = (0..len).step_by(host_page());
        let differ = pages
            .clone()
            .find(|page| ours.dirty_at(*page) != theirs.dirty_at(*page));
        assert_eq!(
            differ, None,
            "{bytes} bytes from {from} + {then} + {offset}"
        );
        // Clears everything now and then, because otherwise all pages are dirty soon.
        if round % 10 == 9 {
            super::taken(ours.space(), ours.range());
            theirs.reset();
        }
    }
}

/// Firecracker has `Option<AtomicBitmap>`, and no bitmap at all while nothing is tracked.
#[test]
fn an_optional_bitmap_marks_or_does_nothing() {
    let some = Some(SpaceBitmap::with_len(0x4000));
    some.slice_at(0x1000).mark_dirty(0, 1);
    assert!(some.dirty_at(0x1000));
    None::<SpaceBitmap>.mark_dirty(0, 1);
}

#[test]
fn a_mark_of_no_bytes_marks_nothing() {
    let bitmap = SpaceBitmap::with_len(0x4000);
    bitmap.mark_dirty(0, 0);
    bitmap.slice_at(0x1000).mark_dirty(0xff, 0);
    bitmap.mark_dirty(usize::MAX, 0);
    SpaceBitmap::default().mark_dirty(0, 0);
    assert!(is(false, &bitmap, 0, 0x4000));
    assert_eq!(bitmap.space().stats().outside_marks, 0);
}

#[test]
fn what_lies_past_the_end_is_counted_and_named() {
    let bitmap = SpaceBitmap::with_len(4 * host_page());
    let end = 4 * host_page();
    bitmap.mark_dirty(end, 1);
    bitmap.mark_dirty(end - 1, 2); // the page inside is marked all the same
    bitmap.slice_at(end).mark_dirty(7, 1);
    bitmap.mark_dirty(0, usize::MAX);
    assert!(is(true, &bitmap, 0, end));
    assert!(!bitmap.dirty_at(end) && !bitmap.dirty_at(usize::MAX));
    assert_eq!(bitmap.space().stats().outside_marks, 4);
    let faults = bitmap.space().faults().recent;
    let named: Vec<_> = faults.iter().map(|f| (f.at.get(), f.len)).collect();
    let end = end as u64;
    let rest = usize::MAX as u64 - end;
    assert_eq!(named, [(end, 1), (end, 1), (end + 7, 1), (end, rest)]);
}

/// A slice of a slice whose offsets wrap marked the first pages of its region instead.
#[test]
fn offsets_stack_without_wrapping() {
    for range in [IovaRange::ALL, super::bytes(0, 0x4000)] {
        let own = SpaceBitmap::with_len(0x4000);
        let bitmap = SpaceBitmap::new(own.space(), range);
        let far = bitmap.slice_at(usize::MAX).slice_at(2);
        far.mark_dirty(0, 1);
        far.slice_at(0x1000).mark_dirty(0x1000, 0x1000);
        bitmap
            .slice_at(usize::MAX)
            .mark_dirty(usize::MAX, usize::MAX);
        assert!(is(false, &bitmap, 0, 0x4000) && !far.dirty_at(0));
        assert_eq!(bitmap.space().stats().outside_marks, 3);
    }
}

#[test]
fn a_bitmap_without_length_counts_every_mark() {
    for bitmap in [SpaceBitmap::default(), SpaceBitmap::with_len(0)] {
        bitmap.mark_dirty(0, 1);
        bitmap.slice_at(0x1000).mark_dirty(0, 0x1000);
        assert!(!bitmap.dirty_at(0));
        assert_eq!(bitmap.space().stats().outside_marks, 2);
    }
}

#[test]
fn clones_mark_the_same_pages() {
    let bitmap = SpaceBitmap::with_len(0x4000);
    bitmap.clone().mark_dirty(0x1000, 1);
    assert!(bitmap.dirty_at(0x1000));
}
