//! A simulated IOMMU for tests, in which a missing flush loses writes, as on real hardware.
//!
//! ```text
//!  Device::write --> TLBs --miss, or no D--> Table: walk, set A, D <--map, unmap-- Domain
//!       |              |                      |                                      |
//!       |              +-- hit with D:        +--read_and_clear--> sink, gather <----+
//!       |                  no trace at all                           |
//!       +--posted writes--> PhysMemory                               v
//!                ^                                            Domain::invalidate
//!                +--- drained before a device acknowledges <-------- +
//! ```
//!
//! * [`PhysMemory`]: the bytes. Devices write them while others copy them.
//! * [`Format`], for [`AmdV1`], [`VtdSs`], [`X86_64`], [`ArmS1`] and [`Riscv`]: the meaning of an
//!   entry's bits, and the [`LeafSizes`].
//! * [`Table`]: the lock-free page table; hardware sets D in it, a harvest reads and clears it, and
//!   leaves are split, merged and protected at the same time.
//! * [`Device`]: DMA through caches of translations with "D is set" and of pointers to tables, with
//!   writes that land late.
//! * [`Domain`]: ties them together, switches tracking, and invalidates. [`Reach`] is the precision
//!   of invalidations, [`Breakage`] the faults of the hardware.
//!
//! # Example
//! ```
//! use dirtymap::source::{FlushGather, LeafSink};
//! use dirtymap::{Access, DirtySource, Granule, Iova, IovaRange, Mapping, Tracking, UserBitmap};
//! use pagetable_sim::{DeviceConfig, Domain, DomainConfig, PhysMemory};
//! use std::sync::Arc;
//!
//! let memory = Arc::new(PhysMemory::new(1 << 20)?);
//! let config = DomainConfig { max_leaf: Granule::K4, ..DomainConfig::default() };
//! let domain = Domain::new(memory, config);
//! let range = IovaRange::from_len(Iova::new(0x10_0000), 1 << 20)?;
//! domain.map(&Mapping { range, backing: 0, access: Access::ReadWrite })?;
//! domain.set_tracking(Tracking::On)?;
//!
//! let mut device = domain.attach(DeviceConfig::default());
//! device.write(Iova::new(0x10_2ffe), b"four")?; // across a page border
//! device.quiesce(); // this thread flushes below, so the device must not be waited for
//!
//! let mut words = [0u64; 4];
//! let mut gather = FlushGather::new();
//! let view = UserBitmap::new(&mut words).view(range, Granule::K4)?;
//! let mut sink = view.sink();
//! let mut out = LeafSink::new(&mut sink, &mut gather);
//! domain.read_and_clear(range, &mut out).map_err(|s| s.error)?;
//! // Without this flush, the next write through the cached entry goes unseen.
//! domain.invalidate(&gather)?;
//! assert_eq!(words[0], 0b1100);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

#![cfg_attr(docsrs, feature(doc_cfg))]

mod memory;

mod fmt;
mod table;

mod cache;
mod iotlb;

mod fault;
mod port;
mod stack;
mod word;

mod breakage;
mod device;
mod domain;
mod hardware;

mod error;

pub use breakage::Breakage;
pub use device::{AtomicOperand, Device, DeviceConfig, DeviceStats};
pub use domain::{Domain, DomainConfig, DomainStats};
pub use error::{DmaError, Error, FaultKind};
pub use fault::{Fault, Faults};
pub use fmt::{
    AmdHost, AmdV1, ArmS1, Format, Iopte, LeafSizes, MakeClean, Reach, Riscv, RiscvSv39, RiscvSv48,
    RiscvSv57, VtdSs, X86_64,
};
pub use memory::PhysMemory;
pub use table::{Leaf, Table};

#[cfg(all(test, dirtymap_loom))]
mod loom_tests;
