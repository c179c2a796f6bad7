//! The bitmap for `vm-memory` with the types of that crate: its guest memory, slices, guards and
//! IOMMU.
#![cfg(unix)]
#![allow(clippy::unwrap_used)] // helpers of tests

mod bugs;
mod cases;
mod concurrent;
mod harvest;
mod iommu;

use dirtymap::{AddressSpace, Granule, HarvestRequest, Iova, IovaRange, Lease, Synced, UserBitmap};
use dirtymap_vm_memory::SpaceBitmap;
use std::sync::Arc;
use vm_memory::bitmap::Bitmap;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{GuestAddress, GuestMemoryMmap, GuestRegionMmap};

const PAGE: u64 = 4096;
/// No page was dirty.
const NONE: [u64; 0] = [];

fn bytes(start: u64, len: u64) -> IovaRange {
    IovaRange::from_len(Iova::new(start), len).unwrap()
}

/// A region of anonymous memory at `start`, mapped in `space`.
fn region(space: &Arc<AddressSpace>, start: u64, len: u64) -> GuestRegionMmap<SpaceBitmap> {
    let bitmap = SpaceBitmap::map(space, bytes(start, len)).unwrap();
    let mapping = MmapRegionBuilder::new_with_bitmap(len as usize, bitmap)
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
        .build()
        .unwrap();
    GuestRegionMmap::new(mapping, GuestAddress(start)).unwrap()
}

/// A tracked space with pages of 4 KiB, and a memory with a region for each start and length.
fn machine(regions: &[(u64, u64)]) -> (Arc<AddressSpace>, GuestMemoryMmap<SpaceBitmap>) {
    let space = Arc::new(AddressSpace::new(Granule::K4));
    let regions = regions
        .iter()
        .map(|(start, len)| region(&space, *start, *len))
        .collect();
    space.start_tracking().unwrap();
    (space, GuestMemoryMmap::from_regions(regions).unwrap())
}

fn harvest<'a>(
    space: &'a AddressSpace,
    range: IovaRange,
    words: &'a mut [u64],
) -> Lease<'a, Synced> {
    let request = HarvestRequest::new(range, space.page());
    let lease = space.harvest(&request, UserBitmap::new(words)).unwrap();
    lease.sync().unwrap()
}

/// Harvests `range` and commits. Returns the dirty pages, by number from address 0.
fn taken(space: &AddressSpace, range: IovaRange) -> Vec<u64> {
    let page = space.page();
    let mut words = vec![0; (range.granules(page) as usize).div_ceil(64)];
    let lease = harvest(space, range, &mut words);
    let pages = lease
        .runs()
        .flat_map(|run| run.start().get() >> page.lg2()..=run.last().get() >> page.lg2())
        .collect();
    lease.commit();
    pages
}

/// Whether all pages of the range are clean, or all are dirty.
fn is(dirty: bool, bitmap: &impl Bitmap, start: usize, len: usize) -> bool {
    (start..start + len).all(|offset| bitmap.dirty_at(offset) == dirty)
}
