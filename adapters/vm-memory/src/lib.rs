//! Dirty tracking for the guest memory of [`vm-memory`](https://docs.rs/vm-memory/0.18), by its own
//! traits.
//!
//! A [`SpaceBitmap`] is a `Bitmap` of vm-memory whose bits are the marks of an
//! [`AddressSpace`]. Everything that writes through vm-memory (`Bytes`, `VolatileSlice`, device
//! emulation) marks it by itself. A migration or a snapshot harvests the space, together with all
//! else that dirties it.
//!
//! # Before and after
//! A VMM in the style of cloud-hypervisor or firecracker has a bitmap in each region, reads them
//! all, and merges:
//!
//! ```text
//! let memory = GuestMemoryMmap::<AtomicBitmap>::from_ranges(&ranges)?;
//! for (slot, region) in memory.iter().enumerate() {
//!     let kvm = vm.get_dirty_log(slot, region.len())?;  // an error: earlier slots are lost
//!     let own = (**region).bitmap().get_and_reset();    // all of it, into a fresh vector
//!     for (kvm, own) in kvm.iter().zip(&own) { .. }     // pages of 4096 bytes? tail bits?
//! }
//! file.sync_all()?;                                     // an error here: everything is lost
//! ```
//!
//! With one space under all regions:
//!
//! ```
//! use dirtymap_vm_memory::SpaceBitmap;
//! use dirtymap::{AddressSpace, Granule, HarvestRequest, Iova, IovaRange, UserBitmap};
//! use std::sync::Arc;
//! use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap, GuestRegionMmap, mmap::MmapRegionBuilder};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! // with_source(..)?: KVM, an IOMMU, a vhost log
//! let space = Arc::new(AddressSpace::new(Granule::K4));
//! let mut regions = Vec::new();
//! for (start, len) in [(0u64, 1 << 20), (0x1_0000_0000, 2 << 20)] {
//!     let range = IovaRange::from_len(Iova::new(start), len)?;
//!     let bitmap = SpaceBitmap::map(&space, range)?;
//!     let mapping = MmapRegionBuilder::new_with_bitmap(len as usize, bitmap)
//!         .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
//!         .build()?;
//!     regions.push(GuestRegionMmap::new(mapping, GuestAddress(start)).ok_or("past 2^64")?);
//! }
//! let memory = GuestMemoryMmap::from_regions(regions)?;
//! space.start_tracking()?;
//!
//! memory.write_obj(7u64, GuestAddress(0x1_0000_3000))?; // marks page 3 of the second region
//! increment(&space, IovaRange::from_len(Iova::new(0x1_0000_0000), 2 << 20)?)?;
//! # Ok(())
//! # }
//!
//! fn increment(space: &AddressSpace, region: IovaRange) -> Result<(), dirtymap::Error> {
//!     let mut words = [0u64; 8];
//!     let request = HarvestRequest::new(region, Granule::K4);
//!     let lease = space.harvest(&request, UserBitmap::new(&mut words))?;
//!     let lease = lease.sync()?;
//!     for run in lease.runs() {
//!         assert_eq!(run.start(), Iova::new(0x1_0000_3000)); // write it to the file
//!     }
//!     // file.sync_all()?: an error drops the lease, and the pages are dirty again
//!     lease.commit();
//!     Ok(())
//! }
//! ```
//!
//! `GuestMemoryMmap::<SpaceBitmap>::from_ranges` works too: then each region has a space of its
//! own, from address 0 on, with pages of the host's size and tracking on. The handle for harvests
//! comes from the region, not from its slices: `(**region).bitmap().space()`.
//!
//! # Behind a virtual IOMMU
//! `IommuMemory` marks by IOVA. A dense bitmap as long as the guest's memory has no bit for an IOVA
//! of 0x7fff_0000_0000, and a write there is marked nowhere. Give it `SpaceBitmap::new(&iovas,
//! IovaRange::ALL)` over a second space, whose areas are what the IOMMU maps: marks land in their
//! area, and those outside of every area are counted in
//! [`SpaceStats::outside_marks`](dirtymap::space::SpaceStats::outside_marks) and named by
//! [`AddressSpace::faults`].
//!
//! # Traps
//! * **Raw pointers are not tracked.** What is written through `ptr_guard_mut`, `as_ptr` or
//!   `get_host_address`, by the CPU or by an asynchronous read into guest memory, marks nothing.
//!   Mark by hand **after** the write, or hold [`SpaceBitmap::begin_write`] from before it is
//!   submitted until after it has completed.
//! * **A mark before submission is not enough.** A harvest between the two takes the mark, and the
//!   data lands later.
//! * A mark past the end of a bitmap marks no other region, and is counted in the space.
//! * `clone` shares the marks; that of `AtomicBitmap` copies them.

#![cfg_attr(docsrs, feature(doc_cfg))]

mod bitmap;

pub use bitmap::{SpaceBitmap, SpaceSlice};

#[cfg(doc)]
use dirtymap::AddressSpace;

pub use vm_memory;

#[cfg(any(doc, doctest))]
#[doc = include_str!("../docs/guide.md")]
pub mod guide {}

/// The examples of the README are tests.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
