//! The dirty log that vhost-user front ends and back ends share, for both sides.
//!
//! On Linux. The log is shared memory: one bit for each 4096 bytes of guest
//! physical address, from address 0 on, the least significant bit of a byte first. Back ends set
//! bits after they wrote guest memory; the front end, which migrates, reads and clears them.
//!
//! # The front end: before and after
//! A VMM in the style of cloud-hypervisor makes a new log for every harvest, and hands the old one
//! to hand-written code:
//!
//! ```text
//! let size = last_ram_addr / (4096 * 8) + 1;          // no multiple of 8: the tail is cut off
//! let old = self.log.replace(memfd_and_mmap(size)?);  // a round trip to each device, each time
//! vu.set_log_base(0, Some(region_of(&self.log)))?;    // an error here: the old log is gone
//! for region in mem.iter() { table.extend(ranges(&old[..])) } // and merged with KVM's by hand
//! ```
//!
//! [`VhostLog`] is a [`DirtySource`](dirtymap::DirtySource): attached to the space of guest
//! physical addresses, its bits are in the lease of each harvest, beside those of all other
//! sources, and come back when that is aborted.
//!
//! ```
//! use dirtymap_vhost::VhostLog;
//! use dirtymap::{AddressSpace, Granule, Iova};
//! use std::sync::Arc;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! // Areas are mapped at their guest physical addresses.
//! let space = AddressSpace::new(Granule::K4);
//! let log = Arc::new(VhostLog::new(Iova::new(0x1_3fff_ffff))?); // the last byte of RAM
//! space.attach(Arc::clone(&log))?;
//!
//! let memory = log.memory();
//! // front_end.set_log_base(0, Some(VhostUserDirtyLogRegion {
//! //     mmap_size: memory.size(), mmap_offset: memory.offset(),
//! //     mmap_handle: memory.file().as_raw_fd() }))?;
//! // front_end.set_features(features | 1 << VHOST_F_LOG_ALL)?;
//! // When all back ends have answered; then copy everything, harvest, copy, ...
//! space.start_tracking()?;
//!
//! // Memory has grown beyond the log:
//! let swap = log.swap(Iova::new(0x2_3fff_ffff))?; // harvests look at both logs from here on
//! // front_end.set_log_base(0, Some(.. swap.memory() ..))?: an error drops the swap, and nothing
//! // is lost
//! swap.acknowledged(); // what is left of the old log is carried over, and it is given up
//! # assert_eq!(memory.size(), 0x14_0000 / 8);
//! # Ok(())
//! # }
//! ```
//!
//! # The back end: before and after
//! ```text
//! // Before: a lock for each mark, an operation for each page, lengths rounded down.
//! type Bitmap = BitmapMmapRegion;
//! // After.
//! type Bitmap = LogBitmap;
//!
//! fn update_memory(&mut self, memory: GM<LogBitmap>) -> io::Result<()> {
//!     self.follower.update(&memory.memory())?; // regions that come after the log are logged too
//!     ..
//! }
//! ```
//!
//! # Front ends that are not trusted
//! Before a region takes a log, it looks at the length, at the memory behind the log, and at the
//! seal that keeps the file from getting shorter: see [`RegionLog`] for the errors, and
//! [`accept_unsealed_logs`] for front ends that do not seal.
//!
//! # Traps
//! * **Read the log after the device has stopped**, once more; it stays readable when the back end
//!   and its connection are gone.
//! * **What is written through raw pointers marks nothing**, as with every bitmap of vm-memory.
//! * `vhost-user-backend` 0.24 never stops logging: it does not look at `VHOST_F_LOG_ALL`. A log
//!   that is given up stays mapped in the back end until the next one.
//! * Bits for addresses that are in no area of the space stay in the log; no harvest asks for them.
//!   [`VhostLog::outside`] counts them.
//! * **`fork`**: a child has the log and not what guards it. Harvests, swaps and
//!   [`LogFollower::update`] are refused there by [`LogError::Forked`]; a [`LogBitmap`] of before
//!   the fork must not be used.

#![cfg(target_os = "linux")]
#![cfg_attr(docsrs, feature(doc_cfg))]

// Foreign types are unknown to the model checker. What happens concurrently is generic code beside
// them, and that is modelled.
#[cfg(any(not(dirtymap_loom), test))]
mod log_list;
#[cfg(any(not(dirtymap_loom), test))]
mod replaceable;

#[cfg(all(test, dirtymap_loom))]
#[allow(clippy::unwrap_used)] // helpers of tests
mod loom_tests;

#[cfg(not(dirtymap_loom))]
mod back;
#[cfg(not(dirtymap_loom))]
mod front;
#[cfg(not(dirtymap_loom))]
mod marks;
#[cfg(not(dirtymap_loom))]
mod memory;
#[cfg(all(test, not(dirtymap_loom)))]
#[allow(clippy::unwrap_used)] // helpers of tests
mod parts_tests;
#[cfg(not(dirtymap_loom))]
mod received;
#[cfg(not(dirtymap_loom))]
mod region;

#[cfg(not(dirtymap_loom))]
pub use back::{LogBitmap, LogFollower, LogSlice};
#[cfg(not(dirtymap_loom))]
pub use front::{LogOutside, Swap, VhostLog};
#[cfg(not(dirtymap_loom))]
pub use memory::{LOG_PAGE, LogError, LogMemory};
#[cfg(not(dirtymap_loom))]
pub use received::accept_unsealed_logs;
#[cfg(not(dirtymap_loom))]
pub use region::RegionLog;

#[cfg(not(dirtymap_loom))]
pub use {vhost_user_backend, vm_memory};

#[cfg(any(doc, doctest))]
#[doc = include_str!("../docs/guide.md")]
pub mod guide {}

/// The examples of the README are tests.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
