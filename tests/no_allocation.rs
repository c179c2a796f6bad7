//! Marks and harvests do not allocate, once each chunk of marks exists.
#![cfg(not(dirtymap_loom))]
#![allow(clippy::unwrap_used)] // helpers of tests

mod common;
#[cfg(all(any(feature = "kvm", feature = "pagemap"), target_os = "linux"))]
mod common_skip;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use common::pages;
use dirtymap::{
    Access, AddressSpace, DirtySource, Error, FlushGather, Granule, HarvestRequest, Invalidated,
    Iova, IovaRange, LeafSink, Mapping, Sink, Stopped, Tracking, UserBitmap,
};
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};

/// The allocations of this thread so far.
struct Counting;

thread_local! {
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
    static BYTES: Cell<u64> = const { Cell::new(0) };
}

// SAFETY: passes each call to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.with(|count| count.set(count.get() + 1));
        BYTES.with(|bytes| bytes.set(bytes.get() + layout.size() as u64));
        // SAFETY: by the caller.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: by the caller; every block came from `System`.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn allocations(work: impl FnOnce()) -> u64 {
    let before = ALLOCATIONS.with(Cell::get);
    work();
    ALLOCATIONS.with(Cell::get) - before
}

/// One dirty bit over 64 pages.
#[derive(Default)]
struct OneLeaf(AtomicBool);

impl DirtySource for OneLeaf {
    fn map(&self, _: &Mapping) -> Result<(), Error> {
        Ok(())
    }

    fn unmap(&self, _: IovaRange, _: &mut FlushGather, _: &mut dyn FnMut(IovaRange)) {}

    fn set_tracking(&self, _: Tracking) -> Result<(), Error> {
        Ok(())
    }

    fn read_and_clear(&self, range: IovaRange, out: &mut LeafSink<'_, '_>) -> Result<(), Stopped> {
        let leaf = pages(0, 64);
        if range.intersects(leaf) && self.0.load(SeqCst) {
            out.take(leaf, Granule::K4, || self.0.swap(false, SeqCst))
                .map_err(|error| Stopped {
                    at: range.start(),
                    error,
                })?;
        }
        Ok(())
    }

    fn peek(&self, _: IovaRange, _: &mut Sink<'_>) -> Result<(), Stopped> {
        Ok(())
    }

    fn invalidate(&self, _: &FlushGather) -> Result<Invalidated, Error> {
        Ok(Invalidated::default())
    }
}

#[test]
fn marks_and_harvests_allocate_nothing() {
    let source = std::sync::Arc::new(OneLeaf::default());
    let space = AddressSpace::with_source(Granule::K4, source.clone()).unwrap();
    space.map(pages(0, 1 << 18), 0, Access::ReadWrite).unwrap();
    space.start_tracking().unwrap();
    let mut words = vec![0u64; 1 << 12];
    let area = space.area(Iova::MIN).unwrap();
    let mut round = || {
        area.mark(pages(5, 3)).unwrap();
        space.mark(pages(1 << 15, 70_000)).unwrap();
        drop(space.begin_write(pages(9, 1)).unwrap());
        // The first harvest splits a chunk of marks that is dirty as a whole.
        for (first, n) in [(1 << 15, 64), (0, 1 << 18), (0, 8), (32, 32)] {
            source.0.store(true, SeqCst);
            let request = HarvestRequest::new(pages(first, n), Granule::K4);
            let lease = space
                .harvest(&request, UserBitmap::new(&mut words))
                .unwrap();
            let lease = lease.sync().unwrap();
            assert!(lease.runs().count() > 0);
            lease.commit();
            drop(
                space
                    .harvest(&request, UserBitmap::new(&mut words))
                    .unwrap(),
            );
            space.peek(&request, UserBitmap::new(&mut words)).unwrap();
            let part = space
                .harvest(
                    &request.resume_at(pages(first, n).start()).max_bits(100),
                    UserBitmap::new(&mut words),
                )
                .unwrap();
            let _ = part.abort();
        }
    };
    // The first round allocates the chunks of marks, and the state of each thread in the epoch
    // collector.
    round();
    assert_eq!(allocations(&mut round), 0);
}

/// Parts of a lease that are committed in order are joined to one range, so their number costs no
/// memory.
#[test]
fn parts_that_are_committed_in_order_allocate_once() {
    const N: u64 = 1 << 14;
    let space = AddressSpace::new(Granule::K4);
    space.map(pages(0, N), 0, Access::ReadWrite).unwrap();
    space.start_tracking().unwrap();
    space.mark(pages(0, N)).unwrap();
    let mut words = vec![0u64; (N / 64) as usize];
    let request = HarvestRequest::new(pages(0, N), Granule::K4);
    let bitmap = UserBitmap::new(&mut words);
    let lease = space.harvest(&request, bitmap).unwrap().sync().unwrap();
    let all = allocations(|| {
        for n in 0..N {
            assert_eq!(lease.commit_range(pages(n, 1)), 1);
        }
    });
    assert!(all <= 1, "{all} allocations for {N} parts in order");
    lease.commit();
}

/// An abort allocates as the documentation of `Lease::abort` says: a chunk of 4 KiB for each 32768
/// pages and domain, some hundred bytes for each 64 chunks, and nothing if the same pages are
/// aborted again.
#[test]
fn an_abort_allocates_no_more_than_it_says() {
    const CHUNKS: u64 = 640;
    let n = CHUNKS << 15;
    for domains in [0, 1, 3] {
        let space = AddressSpace::new(Granule::K4);
        for _ in 0..domains {
            space.attach(OneLeaf::default()).unwrap();
        }
        space.map(pages(0, n), 0, Access::ReadWrite).unwrap();
        space.start_tracking().unwrap();
        let mut words = vec![0u64; (n / 64) as usize];
        let mut abort = || {
            space.mark(pages(0, n)).unwrap();
            let request = HarvestRequest::new(pages(0, n), Granule::K4);
            let bitmap = UserBitmap::new(&mut words);
            let lease = space.harvest(&request, bitmap).unwrap();
            let before = BYTES.with(Cell::get);
            let _ = lease.abort();
            BYTES.with(Cell::get) - before
        };
        let first = abort();
        let chunks = domains * CHUNKS * 4096;
        let all = chunks + chunks / 32 + domains * (64 << 10);
        assert!(
            (chunks..=all).contains(&first),
            "{first} of {domains} domains"
        );
        assert_eq!(abort(), 0, "the second time");
    }
}

/// For a log that is cleared by the read, the memory for the answer is allocated before the read.
#[cfg(all(feature = "pagemap", target_os = "linux"))]
#[test]
fn harvests_of_process_memory_allocate_nothing() {
    use dirtymap::pagemap::ProcessMemory;
    let memory = match ProcessMemory::new() {
        Ok(memory) => memory,
        Err(error) => return common_skip::skip(error),
    };
    let memory = std::sync::Arc::new(memory);
    let page = memory.page();
    let mut block = vec![0u8; 3000 << page.lg2()];
    let first = block
        .as_ptr()
        .addr()
        .next_multiple_of(page.bytes() as usize);
    let range = IovaRange::from_len(Iova::new(first as u64), 2998 << page.lg2()).unwrap();
    memory.add(range, first as u64).unwrap();
    let space = AddressSpace::with_source(page, memory.clone()).unwrap();
    space.map(range, 0, Access::ReadWrite).unwrap();
    space.start_tracking().unwrap();
    let mut words = vec![0u64; 2998usize.div_ceil(64)];
    let from = first - block.as_ptr().addr();
    let mut round = || {
        // More regions than one call of PAGEMAP_SCAN reports.
        for page_of_two in (0..2998 << page.lg2()).step_by(2 << page.lg2()) {
            block[from + page_of_two] += 1;
        }
        let request = HarvestRequest::new(range, page);
        let lease = space
            .harvest(&request, UserBitmap::new(&mut words))
            .unwrap();
        let lease = lease.sync().unwrap();
        assert!(lease.dirty() >= 1499);
        lease.commit();
    };
    round();
    assert_eq!(allocations(&mut round), 0);
    memory.remove(range).unwrap();
}

#[cfg(all(feature = "kvm", target_os = "linux"))]
#[test]
fn harvests_of_kvm_allocate_nothing() {
    use dirtymap::kvm::{KvmLog, KvmMode};
    let manual = |initially_set| KvmMode::Manual { initially_set };
    for mode in [KvmMode::Clearing, manual(false), manual(true)] {
        let vm = kvm_ioctls::Kvm::new().and_then(|kvm| kvm.create_vm());
        let Ok(Ok(log)) = vm.as_ref().map(|vm| KvmLog::new(vm, mode)) else {
            common_skip::skip(format_args!("{mode:?}: this machine has no such KVM"));
            continue;
        };
        let log = std::sync::Arc::new(log);
        let page = log.page();
        let block = vec![0u8; 101 << page.lg2()];
        let host = block.as_ptr().addr() as u64;
        let range = IovaRange::from_len(Iova::MIN, 100 << page.lg2()).unwrap();
        // SAFETY: the block lives until the slot is removed, and no guest runs.
        unsafe { log.add_slot(0, range, host.next_multiple_of(page.bytes())) }.unwrap();
        let space = AddressSpace::with_source(page, log.clone()).unwrap();
        space.map(range, 0, Access::ReadWrite).unwrap();
        space.start_tracking().unwrap();
        let mut words = [0u64; 2];
        let mut round = || {
            let request = HarvestRequest::new(range, page);
            let lease = space
                .harvest(&request, UserBitmap::new(&mut words))
                .unwrap();
            lease.sync().unwrap().commit();
        };
        let first = allocations(&mut round);
        assert_eq!((first, allocations(&mut round)), (0, 0), "{mode:?}");
        log.remove_slot(0).unwrap();
    }
}

#[cfg(feature = "vm-memory")]
#[test]
fn marks_of_guest_memory_allocate_nothing() {
    use dirtymap::vm_memory::SpaceBitmap;
    use vm_memory::bitmap::{Bitmap, NewBitmap};

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

#[cfg(all(feature = "vhost", target_os = "linux"))]
#[test]
fn harvests_of_a_vhost_log_allocate_nothing() {
    use dirtymap::vhost::VhostLog;
    use std::os::unix::fs::FileExt;

    let all = pages(0, 1 << 18);
    let log = std::sync::Arc::new(VhostLog::new(all.last()).unwrap());
    let space = AddressSpace::with_source(Granule::K4, log.clone()).unwrap();
    space.map(all, 0, Access::ReadWrite).unwrap();
    space.start_tracking().unwrap();
    let memory = log.memory();
    let mut words = vec![0u64; 1 << 12];
    let mut round = || {
        words.fill(0);
        memory.file().write_all_at(&[0b1011], 9).unwrap();
        let request = HarvestRequest::new(all, Granule::K4);
        let lease = space
            .harvest(&request, UserBitmap::new(&mut words))
            .unwrap();
        let lease = lease.sync().unwrap();
        assert_eq!(lease.dirty(), 3);
        lease.commit();
    };
    round();
    assert_eq!(allocations(&mut round), 0);
}
