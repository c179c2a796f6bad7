//! Lock-free concurrent dirty tracking: **which memory was written since I last looked?**
//!
//! For hypervisors, device emulators, live migration and backup: devices and CPU threads write to memory at full
//! speed while a harvester finds out, round after round, which pages have to be copied again, and never misses one.
//!
//! ```text
//!  device write --> IOTLB --> leaf, D bit ---+
//!                                            +--> harvest over areas --> user bitmap --> lease --> sync --> commit
//!  CPU write ----> mark --> area's marks ----+            |                                |
//!                                                         +--> gather --> flush queue -----+
//! ```
//!
//! # Example
//!
//! ```
//! use dirtymap::{Access, AddressSpace, Granule, HarvestRequest, Iova, IovaRange, UserBitmap};
//!
//! # fn main() -> Result<(), dirtymap::Error> {
//! let ram = IovaRange::from_len(Iova::new(0x4000_0000), 64 << 20)?; // 64 MiB of guest memory
//! let space = AddressSpace::new(Granule::K4); // with_source(.., iommu_domain)? tracks devices as well
//! space.map(ram, 0, Access::ReadWrite)?;
//! space.start_tracking()?; // from here on every write is reported; now copy everything once
//!
//! // Any thread, after it wrote to guest memory:
//! space.mark(IovaRange::from_len(Iova::new(0x4000_1ffe), 4)?)?; // touches two pages
//!
//! // The harvester, round after round:
//! let mut words = vec![0u64; 256]; // one bit for each 4 KiB page
//! let lease = space.harvest(&HarvestRequest::new(ram, Granule::K4), UserBitmap::new(&mut words))?;
//! let lease = lease.sync()?; // only a synced lease hands out ranges to copy
//! for run in lease.runs() {
//!     assert_eq!(run, IovaRange::from_len(Iova::new(0x4000_1000), 8192)?); // copy it to safety here
//! }
//! lease.commit(); // without this, the pages become dirty again
//! # Ok(())
//! # }
//! ```
//!
//! # Guarantees
//!
//! * **No lost write.** A write that completed before a harvest of its page began is reported by that harvest, or
//!   by another one that is not aborted and whose sync ends after the write. Under any interleaving, with any IOTLB
//!   content.
//! * **A harvest is a transaction.** What is not committed becomes dirty again: after an error, a panic, or a plain
//!   drop.
//! * **Copy after sync.** The types keep you from copying pages while stale translations may still be written
//!   through.
//! * **Lock-free.** Marks, lookups and harvests never wait. Only `sync`, `start_tracking`, `map` when it fails, unmap,
//!   cuts, batches, attach and detach wait, for devices to drain and for each other.
//! * **Inside the bitmap.** No bit outside the request is touched, and set bits stay set.
//!
//! # Trade-offs
//!
//! * The answer is a superset: a page may be reported that was not written (the rest of a large leaf, an aborted
//!   lease). Never the reverse.
//! * Mark **after** the write. A write that is marked before it is submitted can be harvested too early; for writes that
//!   others complete there is [`AddressSpace::begin_write`].
//! * Every call that maps or unmaps copies a path of the area tree: with thousands of changes a second and few
//!   lookups, a locked map is faster.
//! * A reservation copies the list of reserved ranges: they are meant to be a handful.
//! * A snapshot that is held keeps memory of replaced tree nodes alive; harvests hold one for as long as they walk.
//! * What an area that was unmapped owned is freed by a later map or unmap, some tens of them at the latest if no
//!   snapshot is held: readers never free.
//!
//! # Features
//!
//! * `mmap` (off by default): `FileBitmap`, a user bitmap in a file that is mapped one window at a time.
//! * `rayon` (off by default): `AddressSpace::harvest_parallel`, one harvest by the threads of a pool.
//! * `serde` (off by default): counts, reports, `Iova` (a number), `IovaRange` (`start` and `last`), `Granule` (its bytes) and `RunTable` implement
//!   `Serialize`; the last four `Deserialize`, which refuses what could not be made.
//! * `bitmap-file` (off by default): `BitmapFile`, a bitmap in a file with a header and checksums, written crash-safely.
//! * `roaring` (off by default, Rust 1.90): views to and from `RoaringBitmap` and `RoaringTreemap`, and their portable format with a bound.
//! * `membarrier` (off by default): `AddressSpace::with_asymmetric_marks`, marks without a fence, by `membarrier(2)` of Linux.
//! * `tracing` (off by default): events with the target `dirtymap` at harvest, sync, commit, abort, map, unmap, cut, attach, detach,
//!   switches and flushes that fail; none at marks. Some come under locks: a subscriber must not call what waits.
//! * `vm-memory` (off by default): `vm_memory::SpaceBitmap`, a dirty bitmap for the guest memory of that crate.
//! * `vhost` (off by default, Linux): the dirty log that vhost-user front ends and back ends share, for both sides.
//! * `kvm` (off by default, Linux): `kvm::KvmLog`, the dirty logs and rings of KVM as a source.
//! * `pagemap` (off by default, Linux 6.7): `pagemap::ProcessMemory`, memory of this process as a source.
//!
//! # When not to use it
//!
//! * One thread writes and the same thread looks: a plain bitmap does it.
//! * You need to know *what* was written, or in which order: that is a log.
//! * The writes must survive a crash of the tracker: the state here is in memory only.
//!
//! [DESIGN.md](https://github.com/dirtymap/dirtymap/blob/main/DESIGN.md) has the invariants and why they hold; the
//! `pagetable-sim` crate is an IOMMU to test against.
#![cfg_attr(docsrs, feature(doc_cfg))]

#[cfg(not(all(target_pointer_width = "64", target_has_atomic = "64")))]
compile_error!(
    "dirtymap needs a target with 64-bit pointers and 64-bit atomics: the number of a page is an \
     index into words of 64 bits, and those are atomic"
);

#[macro_use]
mod compared;
mod error;
mod events;
mod failure;
mod units;

mod area;
mod bitmap;
mod flush;

mod exchange;
mod harvest;
mod source;
mod space;

mod adapters;

#[doc(hidden)]
pub mod sync;

#[doc(hidden)]
pub use area::AreaMap;

pub use error::Error;
pub use units::{Access, DomainId, Granule, Iova, IovaRange, ToIovaRange};

pub use space::{
    AddressSpace, AreaHandle, Change, Fault, FaultSource, Faults, SpaceRanges, SpaceSnapshot,
    SpaceStats, Unmapped,
};

#[cfg(not(dirtymap_loom))]
pub use source::PulledLog;
#[cfg(not(any(dirtymap_loom, dirtymap_shuttle)))]
pub use source::kit as source_kit;
pub use source::{
    DirtySource, LeafSink, Mapping, MarkOrdering, SharedLog, Stopped, ToClear, Tracking,
};

pub use harvest::{
    Aborted, HarvestReport, HarvestRequest, Holes, Lease, Owed, Rounds, Scope, Synced, WriteGuard,
};

#[cfg(all(feature = "kvm", target_os = "linux", not(dirtymap_loom)))]
pub use adapters::kvm;
#[cfg(all(feature = "pagemap", target_os = "linux", not(dirtymap_loom)))]
pub use adapters::pagemap;

#[cfg(all(feature = "mmap", not(dirtymap_loom)))]
pub use bitmap::FileBitmap;
pub use bitmap::{
    BitmapView, Bits, CHUNK_BITS, Runs, Sink, SparseBitmap, UserBitmap, WINDOW_BITS, Words,
};

#[cfg(all(feature = "bitmap-file", not(dirtymap_loom)))]
pub use exchange::{BitmapFile, BitmapFileError, Restored, Truncate};
pub use exchange::{DirtyLog, LogRuns, MergedRuns, Pieces, RunTable, RunsExt, merge_runs};
#[cfg(all(feature = "roaring", not(dirtymap_loom)))]
pub use exchange::{read_roaring, read_treemap};

pub use flush::{
    FlushCost, FlushGather, FlushPolicy, FlushQueue, FlushStats, Invalidated, Leaves, Ticket,
};

#[cfg(all(feature = "vhost", target_os = "linux", not(dirtymap_loom)))]
pub use adapters::vhost;
#[cfg(all(feature = "vm-memory", not(dirtymap_loom)))]
pub use adapters::vm_memory;

/// The examples of the README are tests.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

/// The examples of the guide are tests.
#[cfg(doctest)]
mod guide {
    #[doc = include_str!("../docs/guide/README.md")]
    struct First;
    #[doc = include_str!("../docs/guide/exchange.md")]
    struct Exchange;
    #[doc = include_str!("../docs/guide/monitors.md")]
    struct Monitors;
    #[doc = include_str!("../docs/guide/joint.md")]
    struct Joint;
    #[cfg(all(feature = "kvm", target_os = "linux"))]
    #[doc = include_str!("../docs/guide/kvm.md")]
    struct Kvm;
    #[cfg(all(feature = "pagemap", target_os = "linux"))]
    #[doc = include_str!("../docs/guide/pagemap.md")]
    struct Pagemap;
    #[cfg(all(feature = "vhost", target_os = "linux"))]
    #[doc = include_str!("../docs/guide/vhost.md")]
    struct Vhost;
    #[cfg(all(feature = "vm-memory", unix))]
    #[doc = include_str!("../docs/guide/vm-memory.md")]
    struct VmMemory;
}
