//! Lock-free concurrent dirty tracking: **which memory was written since I last looked?**
//!
//! For hypervisors, device emulators, live migration and backup. Devices and CPU threads write to
//! memory at full speed, while a harvester finds out, round after round, which pages it has to copy
//! again. It never misses one.
//!
//! # Where to look
//!
//! | I want to | type or method | page |
//! |---|---|---|
//! | map memory, mark writes, harvest | [`AddressSpace`] | [`guide`] |
//! | mark on a hot path | [`AreaHandle::mark`] | [`guide`] |
//! | harvest everything, round after round | [`AddressSpace::rounds`] | [`guide`] |
//! | harvest a range into my own bitmap | [`AddressSpace::harvest`], [`UserBitmap`] | below |
//! | look without clearing | [`AddressSpace::peek`] | |
//! | copy, commit or abort | [`Lease`] | below |
//! | mark a write that a device completes | [`AddressSpace::begin_write`] | [`monitors`] |
//! | map and unmap while everything runs | [`AddressSpace::unmap`], [`apply`] | [`monitors`] |
//! | let the space choose addresses | [`AddressSpace::map_anywhere`] | |
//! | connect somebody else's log | [`PulledLog`], [`SharedLog`] | |
//! | connect my own IOMMU, and test that | [`DirtySource`], [`source_kit`] | |
//! | read words or bytes that a peer logged | [`DirtyLog`] | [`exchange`] |
//! | get ranges, tables, pieces | [`RunsExt`], [`RunTable`] | [`exchange`] |
//! | keep a bitmap in a file | `FileBitmap`, `BitmapFile` | [`exchange`] |
//! | keep what is dirty over a restart | `BitmapFile::save_space`, `restore_space` | [`exchange`] |
//! | track guest memory of rust-vmm | `vm_memory::SpaceBitmap` | [`vm_memory`] |
//! | track a KVM guest | `kvm::KvmLog` | [`kvm`] |
//! | share a log with vhost-user | `vhost::VhostLog`, `vhost::LogBitmap` | [`vhost`] |
//! | track memory of a process | `pagemap::ProcessMemory` | [`pagemap`] |
//! | do all of it in one harvest | [`AddressSpace::attach`] | [`joint`] |
//! | count what happened | [`AddressSpace::stats`], [`AddressSpace::faults`] | |
//! | decide when to flush | [`FlushPolicy`] | |
//!
//! [`apply`]: AddressSpace::apply
//! [`monitors`]: crate::guide::monitors
//! [`exchange`]: crate::guide::exchange
//! [`vm_memory`]: crate::guide::vm_memory
//! [`kvm`]: crate::guide::kvm
//! [`vhost`]: crate::guide::vhost
//! [`pagemap`]: crate::guide::pagemap
//! [`joint`]: crate::guide::joint
//!
//! ```text
//!  device write -> IOTLB -> leaf, D bit --+
//!                                         +-> harvest of areas -> bitmap -> lease -> sync, commit
//!  CPU write ---> mark -> area's marks ---+          |                         |
//!                                                    +-> gather -> flush queue +
//! ```
//!
//! # Example
//!
//! [`AddressSpace::rounds`] is the short way: everything that is mapped, with a bitmap of its own. This
//! is the long one, for a range and a bitmap of yours:
//!
//! ```
//! use dirtymap::{Access, AddressSpace, Granule, HarvestRequest, ToIovaRange, UserBitmap};
//!
//! # fn main() -> Result<(), dirtymap::Error> {
//! let ram = (0x4000_0000..0x4400_0000).to_iova_range()?; // 64 MiB of guest memory
//! let space = AddressSpace::new(Granule::K4); // with_source(..)? tracks a device as well
//! space.map(ram, 0, Access::ReadWrite)?;
//! space.start_tracking()?; // from here on every write is reported; now copy everything once
//!
//! // Any thread, after it wrote to guest memory:
//! space.mark(0x4000_1ffe..0x4000_2002)?; // touches two pages
//!
//! // The harvester, round after round, with words that are zero:
//! let mut words = vec![0u64; 256]; // one bit for each 4 KiB page
//! let request = HarvestRequest::new(ram, Granule::K4);
//! let lease = space.harvest(&request, UserBitmap::new(&mut words))?;
//! let lease = lease.sync()?; // only a synced lease hands out ranges to copy
//! for run in lease.runs() {
//!     assert_eq!(run, (0x4000_1000..0x4000_3000).to_iova_range()?); // copy it to safety here
//! }
//! lease.commit(); // without this, the pages become dirty again
//! # Ok(())
//! # }
//! ```
//!
//! # Guarantees
//!
//! * **No lost write.** A write that completed before a harvest of its page began is reported by
//!   that harvest, or by another one that is not aborted and whose sync ends after the write. This
//!   holds under any interleaving, with any content of the IOTLBs.
//! * **A harvest is a transaction.** What is not committed is dirty again: after an error, a panic,
//!   or a drop.
//! * **Copy after sync.** The types hand out pages only when no stale translation can be written
//!   through any more.
//! * **Lock-free.** Marks and lookups never block. A harvest blocks only where a source or a file
//!   does (KVM and pagemap wait for locks of the kernel), and briefly for a leaf that the request
//!   covers in part, at the lock of the flush queue. Calls that flush or change the map wait, for
//!   devices to drain and for each other: `sync`, `start_tracking`, a `map` that fails, unmaps,
//!   cuts, batches, attach and detach.
//! * **Inside the bitmap.** No bit outside the request is touched, and set bits stay set.
//!
//! # Trade-offs
//!
//! * The answer is a superset. A page may be reported that was not written (the rest of a large
//!   leaf, an aborted lease), never the reverse.
//! * Mark **after** the write. A write that is marked before it is submitted can be harvested too
//!   early. For writes that a device or another thread completes there is
//!   [`AddressSpace::begin_write`].
//! * Every call that maps or unmaps copies a path of the area tree (copy-on-write). With thousands
//!   of changes a second and few lookups, a locked map is faster.
//! * A reservation copies the list of reserved ranges. The list is meant to be short.
//! * A snapshot keeps memory of replaced tree nodes alive for as long as it is held. A harvest
//!   holds one while it walks.
//! * Readers never free. What an unmapped area owned is freed by a later map or unmap, after some
//!   tens of them at the latest if no snapshot is held.
//!
//! # Features
//!
//! * `mmap` (off by default): `FileBitmap`, a user bitmap in a file that is mapped one window at a
//!   time.
//! * `rayon` (off by default): `HarvestRequest::parallel`, one harvest by the threads of a pool.
//! * `serde` (off by default): counts, reports, `Iova` (a number), `IovaRange` (`start` and
//!   `last`), `Granule` (its bytes) and `RunTable` implement `Serialize`. The last four implement
//!   `Deserialize`, which refuses a value that could not be made.
//! * `bitmap-file` (off by default): `BitmapFile`, a bitmap in a file with a header and checksums,
//!   written crash-safely.
//! * `roaring` (off by default, Rust 1.90): views to and from `RoaringBitmap` and `RoaringTreemap`,
//!   and their portable format with a bound.
//! * `membarrier` (off by default): `AddressSpace::with_asymmetric_marks`, marks without a fence,
//!   by `membarrier(2)` of Linux.
//! * `tracing` (off by default): events with the target `dirtymap` at harvest, sync, commit, abort,
//!   map, unmap, cut, attach, detach, switches and flushes that fail; none at marks. Some are
//!   emitted under locks, so a subscriber must not call what waits.
//! * `vm-memory` (off by default): `vm_memory::SpaceBitmap`, a dirty bitmap for the guest memory of
//!   that crate.
//! * `vhost` (off by default, Linux): the dirty log that vhost-user front ends and back ends share,
//!   for both sides.
//! * `kvm` (off by default, Linux): `kvm::KvmLog`, the dirty logs and rings of KVM as a source.
//! * `pagemap` (off by default, Linux 6.7): `pagemap::ProcessMemory`, memory of this process as a
//!   source.
//!
//! # When not to use it
//!
//! * One thread writes and the same thread looks: a plain bitmap is enough.
//! * You need to know *what* was written, or in which order: that is a log.
//! * The writes must survive a crash of the tracker: the state here is in memory only. The crate
//!   `dirtymap-store` is for those.
//!
//! [DESIGN.md](https://github.com/dirtymap/dirtymap/blob/main/DESIGN.md) has the invariants and why
//! they hold. The crate `pagetable-sim` is an IOMMU to test against.
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
#[cfg(not(any(dirtymap_loom, dirtymap_shuttle)))]
#[allow(clippy::panic)] // a test kit says by a panic what is wrong
pub mod source_kit;

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

// The pages of docs/guide, as modules of the documentation. A page links to another one by
// reference (`[text][kvm]`), and defines the reference at its end as the file beside it. In the
// documentation the definitions of `page` come before the page's own. The first definition counts,
// so the link leads to the module.
#[cfg(any(doc, doctest))]
macro_rules! page {
    ($file:literal) => {
        concat!(
            "[first]: crate::guide\n",
            "[vm-memory]: crate::guide::vm_memory\n",
            "[kvm]: crate::guide::kvm\n",
            "[vhost]: crate::guide::vhost\n",
            "[pagemap]: crate::guide::pagemap\n",
            "[joint]: crate::guide::joint\n",
            "[monitors]: crate::guide::monitors\n",
            "[exchange]: crate::guide::exchange\n",
            "[bugs]: crate::guide::bugs\n",
            "[history]: https://github.com/dirtymap/dirtymap/blob/main/docs/history.md\n",
            "[consumers]: https://github.com/dirtymap/dirtymap/tree/main/tests/consumers\n\n",
            include_str!(concat!("../docs/guide/", $file))
        )
    };
}

#[cfg(any(doc, doctest))]
pub mod guide;
