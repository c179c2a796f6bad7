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
//! | several consumers of one memory | [`AddressSpace::consumer`], [`Consumer`] | [`many`] |
//! | ask what was written since an epoch | [`Consumer::since`], [`Lease::lineage`] | [`many`] |
//! | harvest a range into my own bitmap | [`AddressSpace::harvest`], [`UserBitmap`] | below |
//! | look without clearing | [`AddressSpace::peek`] | |
//! | send a lease to another thread, keep it in a struct | [`Rounds::shared`] | |
//! | copy, commit or abort | [`Lease`] | below |
//! | drop storage that reads as zero (TRIM, balloon) | [`AddressSpace::discard`] | [`discards`] |
//! | copy no zeros | [`Lease::contents`] | [`discards`] |
//! | measure the dirty rate, predict a migration | [`Meter`](meter::Meter) | [`many`] |
//! | from device addresses to guest memory | [`Lease::backing`] | |
//! | mark a write that a device completes | [`AddressSpace::begin_write`] | [`monitors`] |
//! | map and unmap while everything runs | [`AddressSpace::unmap`], [`apply`] | [`monitors`] |
//! | let the space choose addresses | [`AddressSpace::map_anywhere`] | |
//! | connect the log of another program | [`PulledLog`], [`SharedLog`] | |
//! | connect my own IOMMU, and test that | [`DirtySource`], [`source_kit`], [`adapter`] | |
//! | read words or bytes that a peer logged | [`DirtyLog`] | [guide](crate::guide::exchange) |
//! | get ranges, tables, pieces | [`RunsExt`], [`RunTable`] | [guide](crate::guide::exchange) |
//! | harvest into a bitmap in a file | `FileBitmap` | |
//! | do all of it in one harvest | [`AddressSpace::attach`] | [joint] |
//! | count what happened | [`AddressSpace::stats`], [`AddressSpace::faults`] | |
//! | decide when to flush | [`FlushPolicy`] | |
//!
//! The root of the crate has what most programs name. The rest is in modules: [`bitmap`] (views,
//! runs, sinks), [`source`] (all that a source of your own names), [`exchange`] (logs, runs,
//! tables), [`space`] (snapshots, counts, faults), [`harvest`] (leases and their reports),
//! [`flush`] (what is owed), [`meter`] (rates).
//!
//! [`apply`]: AddressSpace::apply
//! [`many`]: crate::guide::many
//! [`discards`]: crate::guide::discards
//! [`monitors`]: crate::guide::monitors
//! [`DirtyLog`]: exchange::DirtyLog
//! [`RunsExt`]: exchange::RunsExt
//! [`RunTable`]: exchange::RunTable
//! [joint]: https://github.com/dirtymap/dirtymap/blob/main/examples/adapters/joint.md
//!
//! Adapters and formats are crates of their own. Each has a guide.
//!
//! | I want to | type | crate |
//! |---|---|---|
//! | track guest memory of rust-vmm | `SpaceBitmap` | [dirtymap-vm-memory] |
//! | track a KVM guest | `KvmLog` | [dirtymap-kvm] |
//! | share a log with vhost-user | `VhostLog`, `LogBitmap` | [dirtymap-vhost] |
//! | track memory of a process | `ProcessMemory` | [dirtymap-pagemap] |
//! | track devices by their IOMMU | `Hwpt` | [dirtymap-iommufd] |
//! | track devices by their own log, serve vfio-user | `DeviceLog`, `DmaLogger` | [dirtymap-vfio] |
//! | keep a bitmap in a file, or a Roaring set | `BitmapFile` | [dirtymap-formats] |
//! | keep what is dirty over a restart | `BitmapFile::save_space` | [dirtymap-formats] |
//! | keep what is dirty over a crash | `Store` | [dirtymap-store] |
//!
//! [dirtymap-vm-memory]: https://docs.rs/dirtymap-vm-memory
//! [dirtymap-kvm]: https://docs.rs/dirtymap-kvm
//! [dirtymap-vhost]: https://docs.rs/dirtymap-vhost
//! [dirtymap-pagemap]: https://docs.rs/dirtymap-pagemap
//! [dirtymap-iommufd]: https://docs.rs/dirtymap-iommufd
//! [dirtymap-vfio]: https://docs.rs/dirtymap-vfio
//! [dirtymap-formats]: https://docs.rs/dirtymap-formats
//! [dirtymap-store]: https://docs.rs/dirtymap-store
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
//! [`AddressSpace::rounds`] is the short way: everything that is mapped, with a bitmap of its own.
//! This is the long one, for a range and a bitmap of yours:
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
//! * **Each consumer its own truth.** The harvests of each [`Consumer`] report every write,
//!   whatever the other consumers take, abort or never ask for.
//! * **Lock-free.** Marks and lookups never block. A harvest blocks only where a source or a file
//!   does (KVM and pagemap wait for locks of the kernel, the log of a VFIO device for the device),
//!   and briefly at the lock of the flush queue: for a leaf that the request covers in part, and
//!   with several consumers for each piece of 64 GiB (at 4 KiB a page). Calls that flush or change
//!   the map wait, for devices to drain and for each other: `sync`, `start_tracking`, a `map` that
//!   fails, unmaps, cuts, batches, attach and detach, joins of consumers, and `discard`.
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
//! * `membarrier` (off by default): `AddressSpace::with_asymmetric_marks`, marks without a fence,
//!   by `membarrier(2)` of Linux.
//! * `tracing` (off by default): events with the target `dirtymap` at harvest, sync, commit, abort,
//!   map, unmap, cut, attach, detach, switches and flushes that fail; none at marks. Some are
//!   emitted under locks, so a subscriber must not call what waits.
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
mod ranges;
mod report;
mod units;
mod words;

#[doc(hidden)]
pub mod area;
pub mod bitmap;
mod chunkmap;
pub mod flush;

pub mod exchange;
pub mod harvest;
mod marks;
pub mod meter;
pub mod source;
pub mod space;

pub mod adapter;
#[cfg(not(any(dirtymap_loom, dirtymap_shuttle)))]
#[allow(clippy::panic)] // a test kit says by a panic what is wrong
pub mod source_kit;

// Hidden, and outside of the promise of versions: for crates of this repository, whose models need
// the atomics of the model checker. An adapter elsewhere takes those of std.
#[doc(hidden)]
pub mod sync;

// What the first screens of the README and of the guide use. Everything else is in the modules that
// say what it is for.
pub use error::Error;
pub use units::{Access, DomainId, Granule, Iova, IovaRange, RangeError, ToIovaRange};

#[doc(inline)]
pub use space::{AddressSpace, AreaHandle, Change};

#[cfg(not(dirtymap_loom))]
#[doc(inline)]
pub use source::PulledLog;
#[doc(inline)]
pub use source::{DirtySource, Mapping, SharedLog, Tracking};

#[doc(inline)]
pub use harvest::{
    Consumer, HarvestRequest, Holes, Lease, Owed, Rounds, Scope, Start, Synced, WriteGuard,
};

#[doc(inline)]
pub use bitmap::{BitmapView, SparseBitmap, UserBitmap};

#[doc(inline)]
pub use flush::FlushPolicy;

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
            "[vm-memory]: https://docs.rs/dirtymap-vm-memory/latest/dirtymap_vm_memory/guide/\n",
            "[kvm]: https://docs.rs/dirtymap-kvm/latest/dirtymap_kvm/guide/\n",
            "[vhost]: https://docs.rs/dirtymap-vhost/latest/dirtymap_vhost/guide/\n",
            "[pagemap]: https://docs.rs/dirtymap-pagemap/latest/dirtymap_pagemap/guide/\n",
            "[iommufd]: https://docs.rs/dirtymap-iommufd/latest/dirtymap_iommufd/\n",
            "[vfio]: https://docs.rs/dirtymap-vfio/latest/dirtymap_vfio/guide/\n",
            "[formats]: https://docs.rs/dirtymap-formats/latest/dirtymap_formats/guide/\n",
            "[many]: crate::guide::many\n",
            "[store]: https://docs.rs/dirtymap-store/latest/dirtymap_store/\n",
            "[joint]: https://github.com/dirtymap/dirtymap/blob/main/examples/adapters/joint.md\n",
            "[discards]: crate::guide::discards\n",
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
