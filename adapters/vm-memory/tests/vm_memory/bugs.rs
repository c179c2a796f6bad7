//! Lost pages in hypervisors with bitmaps of their own, each as a test.

use super::{NONE, PAGE, bytes, harvest, machine, taken};
use dirtymap::source::{FlushGather, Invalidated, LeafSink, Sink, Stopped};
use dirtymap::{
    AddressSpace, DirtySource, Error, Granule, HarvestRequest, Holes, Iova, IovaRange, Mapping,
    RangeError, Tracking, UserBitmap,
};
use dirtymap_vm_memory::SpaceBitmap;
use std::sync::Arc;
use vm_memory::bitmap::{Bitmap, NewBitmap};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

/// Raw pointers: a block device read a disk through pointers of guest memory, nothing was marked,
/// and guests were corrupted after a migration. No bitmap can see such writes. The program has to
/// mark them, or hold a guard.
#[test]
fn a_write_through_a_raw_pointer_is_not_tracked_and_a_mark_by_hand_is() {
    let (space, memory) = machine(&[(0, 16 * PAGE)]);
    let all = bytes(0, 16 * PAGE);
    let slice = memory.get_slice(GuestAddress(3 * PAGE), 512).unwrap();
    let guard = slice.ptr_guard_mut();
    // SAFETY: the guard keeps 512 bytes of this memory mapped, and no other code uses them.
    unsafe { guard.as_ptr().write_bytes(7, 512) };
    assert_eq!(taken(&space, all), NONE, "vm-memory does not see it");
    slice.bitmap().mark_dirty(0, 512);
    assert_eq!(taken(&space, all), [3]);
}

/// Mark before submission: a harvest between the submission and the completion of an asynchronous
/// read took the mark; the data landed later, and no harvest reported it.
#[test]
fn a_read_that_completes_after_a_harvest_is_reported_by_the_next() {
    let (space, memory) = machine(&[(0, 16 * PAGE)]);
    let all = bytes(0, 16 * PAGE);
    let (region, _) = memory.to_region_addr(GuestAddress(0)).unwrap();
    let bitmap = (**region).bitmap();
    let guard = bitmap.begin_write(3 * 4096 + 100, 512).unwrap();
    assert_eq!(taken(&space, all), [3], "submitted");
    let pointer = memory.get_host_address(GuestAddress(3 * PAGE)).unwrap();
    // SAFETY: inside the region of 16 pages, which stays mapped, and no other code uses it.
    unsafe { pointer.write(7) };
    assert_eq!(taken(&space, all), [3], "in flight, whatever was taken");
    drop(guard);
    assert_eq!(taken(&space, all), [3], "completed");
    assert_eq!(taken(&space, all), NONE);
}

#[test]
fn a_write_that_cannot_begin_is_counted() {
    let (space, memory) = machine(&[(0, 16 * PAGE), (16 * PAGE, 16 * PAGE)]);
    let (region, _) = memory.to_region_addr(GuestAddress(0)).unwrap();
    let bitmap = (**region).bitmap();
    let end = 16 * 4096;
    // The write reaches into the next region, which has a bitmap of its own.
    let across = bitmap.begin_write(end - 1, 2);
    assert!(matches!(across, Err(Error::Outside { at }) if at.get() == end as u64));
    assert!(matches!(
        bitmap.begin_write(usize::MAX, 2),
        Err(Error::Outside { .. })
    ));
    assert!(matches!(
        bitmap.begin_write(0, 0),
        Err(Error::Range(RangeError::ZeroLength { .. }))
    ));
    assert_eq!(space.stats().outside_marks, 2);
    assert_eq!(taken(&space, bytes(0, 32 * PAGE)), NONE);
}

/// A snapshot failed after it had read and cleared some logs, and the next snapshot lacked those
/// pages. Here the second region cannot be read, and after that a write to the file fails.
#[test]
fn a_snapshot_that_fails_loses_nothing() {
    let (space, memory) = machine(&[(0, 16 * PAGE), (1 << 20, 16 * PAGE)]);
    memory.write_obj(1u8, GuestAddress(3 * PAGE)).unwrap();
    memory
        .write_obj(1u8, GuestAddress((1 << 20) + PAGE))
        .unwrap();
    let dirty = [3, 257];
    let attempt = |second: u64, file_fails: bool| {
        let mut words = [[0u64; 1]; 2];
        let [low, high] = &mut words;
        let low = harvest(&space, bytes(0, 16 * PAGE), low);
        let request = HarvestRequest::new(bytes(second, 16 * PAGE), Granule::K4).holes(Holes::Stop);
        let high = space.harvest(&request, UserBitmap::new(high))?.sync()?;
        if file_fails {
            return Ok::<_, Error>(0); // fsync failed; both leases are dropped
        }
        let dirty = low.dirty() + high.dirty();
        low.commit();
        high.commit();
        Ok(dirty)
    };
    let hole = attempt(2 << 20, false);
    assert!(matches!(hole, Err(Error::Hole { .. })));
    assert_eq!(attempt(1 << 20, true).unwrap(), 0);
    assert_eq!(attempt(1 << 20, false).unwrap(), dirty.len() as u64);
    assert_eq!(attempt(1 << 20, false).unwrap(), 0);
}

/// The code assumed pages of 4096 bytes on hosts with larger ones: every page number was wrong.
#[test]
fn the_page_is_that_of_the_space_or_of_the_host() {
    // SAFETY: this call takes a number, returns one, and touches no memory of ours.
    let host = unsafe { libc::sysconf(libc::_SC_PAGESIZE) } as u64;
    let own = SpaceBitmap::with_len(1 << 20);
    assert_eq!(own.space().page().bytes(), host);

    let space = Arc::new(AddressSpace::new(Granule::from_bytes(65536).unwrap()));
    let bitmap = SpaceBitmap::map(&space, bytes(1 << 20, 1 << 20)).unwrap();
    space.start_tracking().unwrap();
    bitmap.mark_dirty(3 * 65536 + 5 * 4096, 1);
    assert!(bitmap.dirty_at(3 * 65536) && bitmap.dirty_at(4 * 65536 - 1));
    assert!(!bitmap.dirty_at(5 * 4096));
    assert_eq!(taken(&space, bitmap.range()), [16 + 3]);
}

/// The length of a region that is no multiple of the page was rounded down, and its last bytes had
/// no bit.
#[test]
fn the_last_bytes_of_a_region_have_a_page() {
    let bitmap = SpaceBitmap::with_len(65536 + 1);
    bitmap.mark_dirty(65536, 1);
    assert!(bitmap.dirty_at(65536));
    assert_eq!(bitmap.space().stats().outside_marks, 0);
}

/// A harvest that is refused has touched nothing.
#[test]
fn a_harvest_of_more_than_the_memory_is_refused_whole_if_asked_for() {
    let (space, memory) = machine(&[(0, 16 * PAGE)]);
    memory.write_obj(1u8, GuestAddress(3 * PAGE)).unwrap();
    let mut words = [0];
    let request = HarvestRequest::new(bytes(0, 64 * PAGE), Granule::K4).holes(Holes::Refuse);
    let refused = space.harvest(&request, UserBitmap::new(&mut words));
    assert!(matches!(refused, Err(Error::Hole { .. })));
    drop(refused);
    assert_eq!(words, [0]);
    assert_eq!(taken(&space, bytes(0, 16 * PAGE)), [3]);
}

/// A source that cannot be read, as a kernel's log that answers with an error.
#[derive(Debug)]
struct Unreadable;

#[derive(Debug, thiserror::Error)]
#[error("broken on purpose")]
struct Broken;

fn broken() -> Error {
    Error::source_failed(Broken)
}

impl DirtySource for Unreadable {
    fn map(&self, _: &Mapping) -> Result<(), Error> {
        Ok(())
    }

    fn unmap(&self, _: IovaRange, _: &mut FlushGather, _: &mut dyn FnMut(IovaRange)) {}

    fn split_at(&self, _: Iova, _: &mut FlushGather) -> Result<(), Error> {
        Ok(())
    }

    fn set_tracking(&self, _: Tracking) -> Result<(), Error> {
        Ok(())
    }

    fn read_and_clear(&self, range: IovaRange, _: &mut LeafSink<'_, '_>) -> Result<(), Stopped> {
        let (at, error) = (range.start(), broken());
        Err(Stopped { at, error })
    }

    fn peek(&self, range: IovaRange, _: &mut Sink<'_>) -> Result<(), Stopped> {
        let (at, error) = (range.start(), broken());
        Err(Stopped { at, error })
    }

    fn invalidate(&self, _: &FlushGather) -> Result<Invalidated, Error> {
        Ok(Invalidated::default())
    }
}

/// infra#2092: a snapshot asked for each page whether it is dirty, took an error for "clean", and
/// left those pages out.
#[test]
fn a_page_of_which_a_source_cannot_tell_is_dirty() {
    let (space, memory) = machine(&[(0, 16 * PAGE)]);
    let (region, _) = memory.to_region_addr(GuestAddress(0)).unwrap();
    let bitmap = (**region).bitmap();
    assert!(!bitmap.dirty_at(4096));
    let domain = space.attach(Unreadable).unwrap();
    assert!(bitmap.dirty_at(4096) && bitmap.slice_at(4096).dirty_at(4096));
    // Addresses without memory are clean, which is no failure.
    let all = SpaceBitmap::new(&space, IovaRange::ALL);
    assert!(!all.dirty_at(16 * 4096) && !bitmap.dirty_at(16 * 4096));
    space.detach(domain).unwrap();
    assert!(!bitmap.dirty_at(4096));
}

/// A write across the end of a bitmap whose area is gone is outside in both of its parts, and
/// counts as one write.
#[test]
fn a_write_across_the_end_of_a_bitmap_without_area_counts_once() {
    let space = Arc::new(AddressSpace::new(Granule::K4));
    let bitmap = SpaceBitmap::map(&space, bytes(0, 4 * PAGE)).unwrap();
    let by_lookup = SpaceBitmap::new(&space, bytes(0, 4 * PAGE));
    space.unmap_discarding(bytes(0, 4 * PAGE)).unwrap();
    let late = SpaceBitmap::new(&space, bytes(0, 4 * PAGE));
    for (n, bitmap) in [bitmap, by_lookup, late].iter().enumerate() {
        bitmap.mark_dirty(3 * 4096, 2 * 4096);
        assert_eq!(space.stats().outside_marks, n as u64 + 1);
    }
}
