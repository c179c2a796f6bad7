//! Device threads that write through vm-memory, against harvests that copy: at the end both sides
//! are equal.

use super::{PAGE, bytes, machine, region};
use dirtymap::{AddressSpace, Granule, HarvestRequest, IovaRange, UserBitmap};
use dirtymap_vm_memory::SpaceBitmap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use vm_memory::{
    Bytes, GuestAddress, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryBackend, GuestMemoryMmap,
};

type Memory = GuestMemoryMmap<SpaceBitmap>;

/// Copies the dirty pages of `range`. Every third copy stops half-way, and the lease is dropped.
fn pass(space: &AddressSpace, memory: &Memory, range: IovaRange, copy: &mut [u8], n: usize) {
    let mut words = vec![0; (range.granules(Granule::K4) as usize).div_ceil(64)];
    let request = HarvestRequest::new(range, Granule::K4);
    let lease = space
        .harvest(&request, UserBitmap::new(&mut words))
        .unwrap();
    let lease = lease.sync().unwrap();
    let fails_at = (n % 3 == 2).then_some(lease.dirty() as usize / 2);
    for (at, run) in lease.runs().enumerate() {
        if Some(at) == fails_at {
            return;
        }
        let start = run.start().get();
        let place = (start - range.start().get()) as usize;
        let into = &mut copy[place..place + run.len() as usize];
        memory.read_slice(into, GuestAddress(start)).unwrap();
    }
    lease.commit();
}

#[test]
fn no_write_is_lost_between_markers_and_harvests() {
    const PAGES: u64 = 512;
    let (space, memory) = machine(&[(0, PAGES / 2 * PAGE), (PAGES / 2 * PAGE, PAGES / 2 * PAGE)]);
    let all = bytes(0, PAGES * PAGE);
    let mut copy = vec![0u8; (PAGES * PAGE) as usize];
    let stop = AtomicBool::new(false);
    let written = AtomicU64::new(0);
    std::thread::scope(|scope| {
        for device in 0..2u64 {
            let (memory, stop, written) = (&memory, &stop, &written);
            scope.spawn(move || {
                let mut n = device;
                while !stop.load(Ordering::Relaxed) {
                    n = n
                        .wrapping_mul(6364136223846793005)
                        .wrapping_add(1442695040888963407);
                    // Each device writes words of its own in every page. Some writes cross pages.
                    let at = (n >> 33) % (PAGES - 1) * PAGE + 4088 + device * 4;
                    memory
                        .write_slice(&(n as u32).to_le_bytes(), GuestAddress(at))
                        .unwrap();
                    written.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        for n in 0..60 {
            while written.load(Ordering::Relaxed) < n * 200 {
                std::thread::yield_now();
            }
            pass(&space, &memory, all, &mut copy, n as usize);
        }
        stop.store(true, Ordering::Relaxed);
    });
    pass(&space, &memory, all, &mut copy, 0);
    let mut source = vec![0u8; copy.len()];
    memory.read_slice(&mut source, GuestAddress(0)).unwrap();
    let differs = source
        .chunks(4096)
        .zip(copy.chunks(4096))
        .position(|(a, b)| a != b);
    assert_eq!(differs, None, "the first page that differs");
    assert_eq!(space.stats().outside_marks, 0);
}

/// `AtomicBitmap::enlarge` needs exclusive access. Here memory grows by regions, under writers and
/// harvests.
#[test]
fn memory_grows_while_others_mark_and_harvest() {
    const REGION: u64 = 64 * PAGE;
    const REGIONS: u64 = 24;
    let (space, memory) = machine(&[(0, REGION)]);
    let atomic = GuestMemoryAtomic::new(memory);
    let stop = AtomicBool::new(false);
    let mut copy = vec![0u8; (REGION * REGIONS) as usize];
    let mut harvested = 0;
    std::thread::scope(|scope| {
        let (atomic, stop) = (&atomic, &stop);
        scope.spawn(move || {
            let mut n = 0u64;
            while !stop.load(Ordering::Relaxed) {
                let memory = atomic.memory();
                let end = memory.last_addr().0;
                n = n
                    .wrapping_mul(6364136223846793005)
                    .wrapping_add(1442695040888963407);
                let at = GuestAddress((n >> 20) % (end - 8));
                memory.write_slice(&n.to_le_bytes(), at).unwrap();
            }
        });
        for n in 1..REGIONS {
            let grown = {
                let memory = atomic.memory();
                memory
                    .insert_region(Arc::new(region(&space, n * REGION, REGION)))
                    .unwrap()
            };
            atomic.lock().unwrap().replace(grown);
            for _ in 0..4 {
                let memory = atomic.memory();
                pass(
                    &space,
                    &memory,
                    bytes(0, (n + 1) * REGION),
                    &mut copy,
                    harvested,
                );
                harvested += 1;
            }
        }
        stop.store(true, Ordering::Relaxed);
    });
    let memory = atomic.memory();
    assert_eq!(memory.num_regions() as u64, REGIONS);
    pass(&space, &memory, bytes(0, REGIONS * REGION), &mut copy, 0);
    let mut source = vec![0u8; copy.len()];
    memory.read_slice(&mut source, GuestAddress(0)).unwrap();
    assert!(source == copy, "a page of a memory that grew was lost");
    assert_eq!(space.stats().outside_marks, 0);
}
