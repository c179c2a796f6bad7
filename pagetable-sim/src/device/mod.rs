//! A device: its DMA goes through caches of translations, and its writes are posted.
//!
//! ```text
//!  write, page by page --> [device TLB] --miss--> IOTLB --miss, or no D--> walk --> tables
//!                               |                   |                       |
//!                           hit with D          hit with D               set A, D
//!                               +-------------------+-----------------------+
//!                                                                           v
//!                                               memory <-- FIFO of posted writes
//! ```
//!
//! * `translate.rs`: from an address to memory, through the caches;
//! * `dma.rs`: reads, writes and atomic operations.
//!
//! For the device, a write is complete once it is translated and D is set, but its bytes may not be
//! in memory yet. So a page could be harvested and copied before the write arrives. The
//! invalidation that follows the harvest waits for such writes: it drains them. A read pushes the
//! device's own earlier writes ahead of it, as reads do on a real bus.
//!
//! Before each operation the device answers its inbox; see [`port`](crate::port).

mod dma;
mod translate;

use std::collections::VecDeque;

use dirtymap::sync::{Arc, Step, performs};
use dirtymap::{Granule, IovaRange};

use crate::breakage::Breakage;
use crate::cache::SizedCache;
use crate::fmt::{AmdV1, Format, granule};
use crate::hardware::Hardware;
use crate::iotlb::Iotlb;
use crate::port::{Cache, Port};
use crate::table::TableRef;

pub use dma::AtomicOperand;

/// A write that is translated and has not landed.
#[derive(Debug)]
struct Posted {
    phys: u64,
    bytes: Vec<u8>,
}

/// The configuration of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceConfig {
    /// Sets of the IOTLB; rounded up to a power of two, 1 to 65536.
    pub iotlb_sets: usize,
    /// Entries of each set, 1 to 64.
    pub iotlb_ways: usize,
    /// Pointers to tables that are cached, so that walks begin below the root; rounded up to four
    /// times a power of two, at most 262144. 0: each walk begins at the root.
    pub walk_entries: usize,
    /// Translations that the device caches in a TLB of its own, which it asks before the IOTLB
    /// (ATS); rounded up as `walk_entries`. 0: it has none.
    pub tlb_entries: usize,
    /// Translations are cached in naturally aligned pieces of at most this size, though their leaf
    /// may be larger; at least the smallest page. Hardware that caches small pieces of large leaves
    /// needs flushes of whole leaves.
    pub largest_cached: Granule,
    /// The most posted writes. 0: each write lands at once.
    pub posted_writes: usize,
}

impl DeviceConfig {
    /// The value of [`default`](Self::default): an IOTLB of 64 sets of 8 for leaves of any size,
    /// 256 cached pointers to tables, no TLB in the device, 64 posted writes.
    pub const DEFAULT: DeviceConfig = DeviceConfig {
        iotlb_sets: 64,
        iotlb_ways: 8,
        walk_entries: 256,
        tlb_entries: 0,
        largest_cached: granule(63),
        posted_writes: 64,
    };
}

impl Default for DeviceConfig {
    fn default() -> Self {
        DeviceConfig::DEFAULT
    }
}

/// The counts of a device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DeviceStats {
    /// Reads.
    pub reads: u64,
    /// Writes.
    pub writes: u64,
    /// Atomic operations.
    pub atomics: u64,
    /// Bytes that were read, or written and posted, or changed by an atomic operation.
    pub bytes: u64,
    /// Pages translated by the device's own TLB alone.
    pub tlb_hits: u64,
    /// Pages translated by the IOTLB alone.
    pub iotlb_hits: u64,
    /// Pages for which nothing usable was cached, so that the table was walked.
    pub iotlb_misses: u64,
    /// Walks that began at a cached pointer to a table.
    pub short_walks: u64,
    /// Walks that turned D from 0 to 1.
    pub dirty_walks: u64,
    /// Accesses that were blocked.
    pub faults: u64,
}

/// A device attached to a [`Domain`](crate::Domain). Owned by the thread that drives it.
///
/// From its first operation on the device is **awake**, and an invalidation waits until it answers.
/// It answers at its next operation, in [`service`](Self::service), or by going to sleep in
/// [`quiesce`](Self::quiesce) or when it is dropped. So a thread that drives a device and also
/// harvests must quiesce the device before it flushes. The IOTLB keeps its contents over a sleep.
///
/// ```
/// use dirtymap::{Access, DirtySource, Iova, IovaRange, Mapping};
/// use pagetable_sim::{DeviceConfig, Domain, DomainConfig, PhysMemory};
/// use std::sync::Arc;
///
/// let domain = Domain::new(Arc::new(PhysMemory::new(8192)?), DomainConfig::default());
/// let range = IovaRange::from_len(Iova::new(0x10_0000), 8192)?;
/// domain.map(&Mapping { range, backing: 0, access: Access::ReadWrite })?;
///
/// let mut device = domain.attach(DeviceConfig::default());
/// device.write(Iova::new(0x10_0ffe), b"four")?; // across a page border: two posted writes
/// assert_eq!(device.in_flight(), 2);
/// device.fetch_add(Iova::new(0x10_1008), 1u64)?; // lands earlier writes first
/// assert_eq!(device.in_flight(), 0);
/// assert!(device.read(Iova::new(0x10_2000), &mut [0]).is_err());
/// assert_eq!(device.detach().faults, 1);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct Device<F: Format = AmdV1> {
    hardware: Arc<Hardware<F>>,
    port: Arc<Port>,
    iotlb: Iotlb,
    /// The device's own TLB.
    tlb: Option<Iotlb>,
    tables: Option<SizedCache<TableRef<F>>>,
    /// The tables that the last walk went through; empty between walks.
    met: Vec<TableRef<F>>,
    largest_cached: Granule,
    posted: VecDeque<Posted>,
    /// Empty buffers for posted writes.
    spare: Vec<Vec<u8>>,
    depth: usize,
    awake: bool,
    stats: DeviceStats,
}

impl<F: Format> Device<F> {
    pub(crate) fn new(hardware: Arc<Hardware<F>>, config: DeviceConfig) -> Self {
        let port = hardware.join(config.tlb_entries != 0);
        Device {
            hardware,
            port,
            iotlb: Iotlb::new(config.iotlb_sets, config.iotlb_ways),
            tlb: small_cache(config.tlb_entries),
            tables: small_cache(config.walk_entries),
            met: Vec::new(),
            largest_cached: config.largest_cached.max(F::PAGE),
            posted: VecDeque::new(),
            spare: Vec::new(),
            depth: config.posted_writes,
            awake: false,
            stats: DeviceStats::default(),
        }
    }

    /// The number of the device, unique among the first 2^32 that were ever attached to its domain.
    pub fn number(&self) -> u32 {
        self.port.number
    }

    /// Answers the requests in the inbox. Every operation does so first; the thread of a device
    /// that is idle but awake should call this now and then. One load if the inbox is empty.
    #[inline]
    pub fn service(&mut self) {
        if self.port.has_mail() {
            self.answer();
        }
    }

    /// Lets all posted writes land in memory; returns how many there were.
    pub fn land_all(&mut self) -> u64 {
        let landed = self.posted.len() as u64;
        while !self.posted.is_empty() {
            self.land_oldest();
        }
        landed
    }

    /// Lets all posted writes land and goes to sleep: until its next operation no invalidation
    /// waits for this device. It keeps its caches.
    pub fn quiesce(&mut self) {
        self.land_all();
        if self.awake {
            self.awake = false;
            self.port.sleep();
        }
    }

    /// Lets all posted writes land and leaves the domain, as dropping does. Returns the counts.
    pub fn detach(self) -> DeviceStats {
        self.stats
    }

    /// The counts so far.
    pub fn stats(&self) -> DeviceStats {
        self.stats
    }

    /// The number of posted writes.
    pub fn in_flight(&self) -> usize {
        self.posted.len()
    }

    /// Is awake and has answered its inbox.
    #[inline]
    fn begin(&mut self) {
        if !self.awake {
            self.wake();
        }
        self.service();
    }

    fn wake(&mut self) {
        self.awake = true;
        if self.port.wake() {
            let tables = self.hardware.breakage() != Breakage::SkipNonLeaf;
            self.forget(Cache::Iotlb { tables }, &[IovaRange::ALL]);
            self.forget(Cache::DeviceTlb, &[IovaRange::ALL]);
        }
    }

    #[cold]
    fn answer(&mut self) {
        let drains = performs(Step::DrainInFlight)
            && self.hardware.breakage() != Breakage::AcknowledgeWithoutDraining;
        let requests: Vec<_> = self.port.take().collect();
        for request in requests {
            let order = request.order();
            let dropped = self.forget(order.cache, &order.ranges);
            let drained = if drains { self.land_all() } else { 0 };
            request.acknowledge(dropped, drained);
        }
    }

    /// Drops the entries of `cache` for `ranges`, which ascend and are disjoint. Returns their
    /// number.
    fn forget(&mut self, cache: Cache, ranges: &[IovaRange]) -> u64 {
        let leaves = match (cache, &mut self.tlb) {
            (Cache::Iotlb { .. }, _) => Some(&mut self.iotlb),
            (Cache::DeviceTlb, tlb) => tlb.as_mut(),
        };
        let mut dropped = 0;
        if performs(Step::DropCached)
            && let Some(leaves) = leaves
        {
            dropped += leaves.invalidate(ranges);
        }
        if cache == (Cache::Iotlb { tables: true })
            && let Some(tables) = &mut self.tables
        {
            dropped += tables.invalidate(ranges);
        }
        dropped
    }
}

impl<F: Format> Drop for Device<F> {
    fn drop(&mut self) {
        self.quiesce();
        self.hardware.leave(&self.port);
    }
}

impl<F: Format> std::fmt::Debug for Device<F> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Device")
            .field("number", &self.number())
            .field("awake", &self.awake)
            .field("in_flight", &self.posted.len())
            .field("stats", &self.stats)
            .finish_non_exhaustive()
    }
}

/// A cache of about `entries`, in sets of four or less; `None` for 0.
fn small_cache<T>(entries: usize) -> Option<SizedCache<T>> {
    (entries != 0).then(|| SizedCache::new(entries.div_ceil(4), entries.min(4)))
}

#[cfg(test)]
#[cfg(not(dirtymap_loom))]
mod tests;
