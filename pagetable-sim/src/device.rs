//! A device: its DMA goes through its IOTLB, and its writes are posted.
//!
//! ```text
//!  write(iova, bytes) --page by page--> IOTLB --hit with D----------------+--> FIFO of posted writes --later--> memory
//!                                         |                               |
//!                                         +--miss, or no D--> walk, set D-+
//! ```
//!
//! A write that was translated is done as far as the device knows, and D is set, but its bytes may still be on their
//! way. So a page can be harvested and copied before the write arrives, unless the invalidation that follows the
//! harvest waits for it: that is the "drain" of a flush. A read pushes the device's own earlier writes ahead of it, as
//! reads do on a real bus.
//!
//! Before each operation the device answers its inbox; see [`port`](crate::port).

use std::collections::VecDeque;

use dirtymap::sync::{Arc, Step, performs};
use dirtymap::{Iova, IovaRange};

use crate::domain::{Breakage, Hardware};
use crate::error::{DmaError, FaultKind};
use crate::fmt::{AmdV1, Format};
use crate::iotlb::{Cached, Iotlb};
use crate::port::Port;

/// The shape of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceConfig {
    /// Sets of the IOTLB; rounded up to a power of two, 1 to 65536.
    pub iotlb_sets: usize,
    /// Entries of each set, 1 to 64.
    pub iotlb_ways: usize,
    /// How many writes may be on their way to memory. 0: each write lands at once.
    pub posted_writes: usize,
}

impl Default for DeviceConfig {
    fn default() -> Self {
        DeviceConfig {
            iotlb_sets: 64,
            iotlb_ways: 8,
            posted_writes: 64,
        }
    }
}

/// What a device did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DeviceStats {
    /// Reads that were asked for.
    pub reads: u64,
    /// Writes that were asked for.
    pub writes: u64,
    /// Bytes that were read, or written and posted.
    pub bytes: u64,
    /// Pages translated by the IOTLB alone.
    pub iotlb_hits: u64,
    /// Pages for which nothing usable was cached.
    pub iotlb_misses: u64,
    /// Walks that turned D from 0 to 1.
    pub dirty_walks: u64,
    /// Accesses that were blocked.
    pub faults: u64,
}

/// A device attached to a [`Domain`](crate::Domain). Owned by the thread that drives it.
///
/// From its first operation on the device is **awake**, and an invalidation waits for it until it answers, which it
/// does at its next operation, in [`service`](Self::service), or by going to sleep in [`quiesce`](Self::quiesce) or
/// when dropped. So one thread that drives a device and harvests as well must quiesce the device before it flushes. Its
/// IOTLB keeps its contents over a sleep.
pub struct Device<F: Format = AmdV1> {
    hardware: Arc<Hardware<F>>,
    port: Arc<Port>,
    iotlb: Iotlb,
    posted: VecDeque<Posted>,
    /// Empty buffers for posted writes.
    spare: Vec<Vec<u8>>,
    depth: usize,
    awake: bool,
    stats: DeviceStats,
}

/// A write that was translated and has not arrived.
#[derive(Debug)]
struct Posted {
    phys: u64,
    bytes: Vec<u8>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Direction {
    Read,
    Write,
}

impl<F: Format> Device<F> {
    pub(crate) fn new(hardware: Arc<Hardware<F>>, config: DeviceConfig) -> Self {
        let port = hardware.join();
        Device {
            hardware,
            port,
            iotlb: Iotlb::new(config.iotlb_sets, config.iotlb_ways),
            posted: VecDeque::new(),
            spare: Vec::new(),
            depth: config.posted_writes,
            awake: false,
            stats: DeviceStats::default(),
        }
    }

    /// Writes `bytes` from `iova` on: any length, any alignment, across pages. The bytes are posted: they land when the
    /// FIFO is full, when an invalidation drains it, before a read, or in [`land_all`](Self::land_all). Waits for
    /// nobody.
    ///
    /// # Errors
    /// [`DmaError`] at the first page that could not be written; the pages before it are written.
    pub fn write(&mut self, iova: Iova, bytes: &[u8]) -> Result<(), DmaError> {
        self.begin();
        self.stats.writes += 1;
        let mut rest = bytes;
        let mut at = iova;
        while !rest.is_empty() {
            let phys = self.translate(at, Direction::Write)?;
            let (piece, behind) = rest.split_at(piece_at::<F>(at, rest.len()));
            self.post(phys, piece);
            rest = behind;
            if !rest.is_empty() {
                at = self.next(at, piece.len())?;
            }
        }
        Ok(())
    }

    /// Reads the bytes from `iova` on into `bytes`, after this device's earlier writes. Waits for nobody.
    ///
    /// # Errors
    /// [`DmaError`] at the first page that could not be read; the pages before it are read.
    pub fn read(&mut self, iova: Iova, bytes: &mut [u8]) -> Result<(), DmaError> {
        self.begin();
        self.stats.reads += 1;
        self.land_all();
        let mut rest = bytes;
        let mut at = iova;
        while !rest.is_empty() {
            let phys = self.translate(at, Direction::Read)?;
            let (piece, behind) = rest.split_at_mut(piece_at::<F>(at, rest.len()));
            let done = self.hardware.memory.read(phys, piece);
            debug_assert!(done.is_ok(), "what is mapped lies in memory");
            self.stats.bytes += piece.len() as u64;
            let done = piece.len();
            rest = behind;
            if !rest.is_empty() {
                at = self.next(at, done)?;
            }
        }
        Ok(())
    }

    /// Answers the requests in the inbox. Every operation does so first; a device that is idle but awake should do so
    /// now and then. One load if there is nothing to answer.
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

    /// Lets all posted writes land and goes to sleep: until its next operation nobody waits for this device. What is
    /// cached stays cached.
    pub fn quiesce(&mut self) {
        self.land_all();
        if self.awake {
            self.awake = false;
            self.port.sleep();
        }
    }

    /// What the device did so far.
    pub fn stats(&self) -> DeviceStats {
        self.stats
    }

    /// How many writes are on their way to memory.
    pub fn in_flight(&self) -> usize {
        self.posted.len()
    }

    /// Is awake and has answered its inbox.
    #[inline]
    fn begin(&mut self) {
        if !self.awake {
            self.awake = true;
            if self.port.wake() {
                self.iotlb.invalidate(&[IovaRange::ALL]);
            }
        }
        self.service();
    }

    #[cold]
    fn answer(&mut self) {
        let drains = performs(Step::DrainInFlight)
            && self.hardware.breakage() != Breakage::AcknowledgeWithoutDraining;
        let requests: Vec<_> = self.port.take().collect();
        for request in requests {
            let dropped = if performs(Step::DropCached) {
                self.iotlb.invalidate(request.ranges())
            } else {
                0
            };
            let drained = if drains { self.land_all() } else { 0 };
            request.acknowledge(dropped, drained);
        }
    }

    /// Where `iova` lies in memory, if the device may access it that way. Sets D for a write, unless a cached entry
    /// says it is set.
    #[inline]
    fn translate(&mut self, iova: Iova, direction: Direction) -> Result<u64, DmaError> {
        let tracking = self.hardware.is_tracking();
        if let Some(cached) = self.iotlb.lookup::<F>(iova) {
            // While tracking is off, hardware sets no D: the entry is as good as dirty until the flush that enabling
            // ends with.
            cached.dirty |= !tracking;
            let usable = match direction {
                Direction::Read => cached.access().reads(),
                Direction::Write => cached.access().writes() && cached.dirty,
            };
            if usable {
                self.stats.iotlb_hits += 1;
                return Ok(cached.phys(iova));
            }
        }
        self.walk(iova, direction, tracking)
    }

    /// Translates by the table and caches what it says.
    fn walk(&mut self, iova: Iova, direction: Direction, tracking: bool) -> Result<u64, DmaError> {
        self.stats.iotlb_misses += 1;
        let table = &self.hardware.table;
        if !table.reaches(iova) {
            return Err(self.fault(iova, FaultKind::TooWide));
        }
        let sets_dirty = tracking && direction == Direction::Write;
        let found = if sets_dirty {
            table.set_dirty(iova)
        } else {
            table.translate(iova)
        };
        let Some(leaf) = found else {
            return Err(self.fault(iova, FaultKind::NotMapped));
        };
        match direction {
            Direction::Write if !leaf.access.writes() => {
                return Err(self.fault(iova, FaultKind::ReadOnly));
            }
            Direction::Read if !leaf.access.reads() => {
                return Err(self.fault(iova, FaultKind::WriteOnly));
            }
            _ => (),
        }
        if sets_dirty && !leaf.dirty {
            self.stats.dirty_walks += 1;
            self.hardware.count_dirty_walk();
        }
        let entry = Cached::new(&leaf, leaf.dirty || sets_dirty || !tracking);
        self.iotlb.insert::<F>(iova, entry);
        Ok(entry.phys(iova))
    }

    /// The address `len` bytes further, where an access goes on; past 2^64 - 1 there is none.
    #[inline]
    fn next(&mut self, iova: Iova, len: usize) -> Result<Iova, DmaError> {
        iova.checked_add(len as u64)
            .ok_or_else(|| self.fault(Iova::MAX, FaultKind::TooWide))
    }

    fn fault(&mut self, iova: Iova, kind: FaultKind) -> DmaError {
        self.stats.faults += 1;
        self.hardware.count_fault();
        DmaError { iova, kind }
    }

    /// Sends a translated write on its way.
    #[inline]
    fn post(&mut self, phys: u64, bytes: &[u8]) {
        self.stats.bytes += bytes.len() as u64;
        if self.depth == 0 {
            return self.land(phys, bytes);
        }
        if self.posted.len() >= self.depth {
            self.land_oldest();
        }
        let mut buffer = self.spare.pop().unwrap_or_default();
        buffer.extend_from_slice(bytes);
        self.posted.push_back(Posted {
            phys,
            bytes: buffer,
        });
    }

    fn land_oldest(&mut self) {
        if let Some(Posted { phys, mut bytes }) = self.posted.pop_front() {
            self.land(phys, &bytes);
            bytes.clear();
            self.spare.push(bytes);
        }
    }

    fn land(&self, phys: u64, bytes: &[u8]) {
        let done = self.hardware.memory.write(phys, bytes);
        debug_assert!(done.is_ok(), "what is mapped lies in memory");
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
            .field("awake", &self.awake)
            .field("in_flight", &self.posted.len())
            .field("stats", &self.stats)
            .finish_non_exhaustive()
    }
}

/// How many of `len` bytes from `iova` on lie in one smallest page: the unit in which a device translates and posts.
#[inline]
fn piece_at<F: Format>(iova: Iova, len: usize) -> usize {
    let left = F::PAGE.bytes() - (iova.get() & F::PAGE.mask());
    len.min(left as usize)
}

#[cfg(test)]
#[cfg(not(dirtymap_loom))]
mod tests;
