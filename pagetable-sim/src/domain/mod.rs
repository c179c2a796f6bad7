//! A domain: one page table, the devices that translate by it, and the switch for dirty tracking.
//!
//! ```text
//!  Domain (software) --map, unmap, harvest--> table <--walk, set D-- Device (hardware)
//!     |                                                               |   |
//!     +--invalidate--> port of each device --drop, drain, acknowledge-+   +--> memory
//! ```
//!
//! Invalidations are in `invalidate.rs`.

mod invalidate;

use dirtymap::source::{FlushGather, Invalidated, LeafSink, Sink, Stopped};
use dirtymap::sync::{Arc, AtomicU64, Mutex, Ordering, Step, lock, performs};
use dirtymap::{DirtySource, Granule, Iova, IovaRange, Mapping, Tracking};

use crate::breakage::Breakage;
use crate::device::{Device, DeviceConfig};
use crate::error::Error;
use crate::fault::Faults;
use crate::fmt::{AmdV1, Format, LeafSizes, granule};
use crate::hardware::Hardware;
use crate::memory::PhysMemory;
use crate::table::{Leaf, Table};

/// The configuration of a domain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DomainConfig {
    /// The largest size of a leaf. Large leaves make tracking coarse. A value below the smallest
    /// page counts as the smallest page.
    pub max_leaf: Granule,
    /// Enabling tracking splits leaves that are larger than this, so that tracking is finer than
    /// the mapping.
    pub split_on_enable: Option<Granule>,
    /// Harvests skip tables that no device walked through since they were found clean, where the
    /// format has A above its leaves ([`Format::TABLE_ACCESSED`]). For that they owe a flush of
    /// pointers to tables each time that a table is found clean for the first time. Reads set A as
    /// writes do, so where devices read all the time, each harvest flushes.
    pub skip_quiet: bool,
}

impl Default for DomainConfig {
    /// Leaves as large as the format has them, no splits, and no skips.
    fn default() -> Self {
        DomainConfig {
            max_leaf: granule(63),
            split_on_enable: None,
            skip_quiet: false,
        }
    }
}

/// The counts of a domain. Each number is exact. Together they are of one moment only while no
/// other call runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DomainStats {
    /// Devices that are attached.
    pub devices: u64,
    /// Accesses of devices that were blocked, whether the log had room for them or not.
    pub faults: u64,
    /// How often a device turned a leaf's D from 0 to 1.
    pub dirty_walks: u64,
    /// Calls that invalidated something.
    pub invalidations: u64,
    /// Invalidation commands sent: ranges times devices, and once more for devices that have a TLB.
    pub commands: u64,
    /// Bytes that callers asked to invalidate.
    pub bytes_asked: u128,
    /// Bytes that the commands for them named: [`Format::REACH`] rounds out.
    pub bytes_invalidated: u128,
    /// Ranges whose unmap was refused, because they cut through a leaf or cannot be mapped at all.
    pub refused_unmaps: u64,
    /// Subtrees that harvests skipped: see [`DomainConfig::skip_quiet`].
    pub skipped: u64,
}

/// The counts of invalidations.
#[derive(Clone, Copy, Debug, Default)]
struct Counts {
    invalidations: u64,
    commands: u64,
    bytes_asked: u128,
    bytes_invalidated: u128,
}

/// One page table, the devices that translate by it, and the switch for dirty tracking: the side of
/// the hardware of a [`DirtySource`](dirtymap::DirtySource).
///
/// `F` is the format of the table: [`Domain::new`] makes a domain of AMD v1,
/// [`Domain::with_format`] one of any format.
///
/// Shared by `Arc`. Mapping, unmapping, harvesting and DMA never block each other; invalidations
/// and enabling wait for every device that is awake.
///
/// ```
/// use dirtymap::{Access, DirtySource, Iova, IovaRange, Mapping, Tracking};
/// use pagetable_sim::{DeviceConfig, Domain, DomainConfig, PhysMemory, VtdSs};
/// use std::sync::Arc;
///
/// let memory = Arc::new(PhysMemory::new(1 << 20)?);
/// let domain = Domain::<VtdSs>::with_format(memory, DomainConfig::default());
/// let range = IovaRange::from_len(Iova::new(0x4000_0000), 1 << 20)?;
/// domain.map(&Mapping { range, backing: 0, access: Access::ReadWrite })?;
/// domain.set_tracking(Tracking::On)?;
/// domain.attach(DeviceConfig::default()).write(range.start(), b"dirty")?;
/// assert!(domain.translate(range.start()).unwrap().dirty);
/// assert_eq!(domain.stats().dirty_walks, 1);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct Domain<F: Format = AmdV1> {
    hardware: Arc<Hardware<F>>,
    config: DomainConfig,
    /// Held during a switch of tracking.
    switch: Mutex<()>,
    counts: Mutex<Counts>,
    /// Held during a flush of pointers to tables.
    tables: Mutex<()>,
    refused_unmaps: AtomicU64,
}

impl Domain {
    /// The smallest page that a domain of AMD v1 maps: ranges and backing addresses are multiples
    /// of it. For other formats see [`Format::PAGE`].
    pub const PAGE: Granule = AmdV1::PAGE;

    /// A domain of AMD v1 over `memory` that maps nothing and tracks nothing.
    pub fn new(memory: Arc<PhysMemory>, config: DomainConfig) -> Arc<Domain> {
        Domain::with_format(memory, config)
    }
}

impl<F: Format> Domain<F> {
    /// A domain of the format `F` over `memory` that maps nothing and tracks nothing. The caller
    /// names the format, as in `Domain::<VtdSs>::with_format(memory, config)`.
    pub fn with_format(memory: Arc<PhysMemory>, config: DomainConfig) -> Arc<Self> {
        let table = if config.skip_quiet {
            Table::skipping()
        } else {
            Table::new()
        };
        Arc::new(Domain {
            hardware: Arc::new(Hardware::new(memory, table)),
            config,
            switch: Mutex::new(()),
            counts: Mutex::new(Counts::default()),
            tables: Mutex::new(()),
            refused_unmaps: AtomicU64::new(0),
        })
    }

    /// Attaches a new device, with empty caches. It leaves the domain when it is dropped.
    pub fn attach(&self, config: DeviceConfig) -> Device<F> {
        Device::new(Arc::clone(&self.hardware), config)
    }

    /// The hardware that the devices share.
    #[cfg(all(test, not(dirtymap_loom)))]
    pub(crate) fn hardware(&self) -> &Hardware<F> {
        &self.hardware
    }

    /// The memory that the domain maps.
    pub fn memory(&self) -> &Arc<PhysMemory> {
        &self.hardware.memory
    }

    /// The table that devices walk. The domain does not invalidate changes that are made in it by
    /// hand.
    pub fn table(&self) -> &Table<F> {
        &self.hardware.table
    }

    /// As [`DirtySource::map`], by leaves whose sizes are among `sizes`. Devices forget their
    /// pointers to a table that a leaf replaces before they translate again.
    ///
    /// # Errors
    /// [`Error::OutsideMemory`] if a part of the backing lies outside the memory, else as
    /// [`Table::map`].
    pub fn map_leaves(&self, mapping: &Mapping, sizes: impl Into<LeafSizes>) -> Result<(), Error> {
        let &Mapping {
            range,
            backing,
            access,
        } = mapping;
        let len = u64::try_from(range.len()).unwrap_or(u64::MAX);
        self.hardware.memory.check(backing, len)?;
        if self.hardware.table.map(range, backing, access, sizes)? {
            self.forget_tables(range);
        }
        Ok(())
    }

    /// Merges leaves as [`Table::merge`], and has devices forget the tables that leaves replaced.
    /// If there are such tables, waits for every device that is awake. Returns the number of new
    /// leaves.
    ///
    /// # Errors
    /// As [`Table::merge`].
    pub fn merge(&self, range: IovaRange, sizes: impl Into<LeafSizes>) -> Result<u64, Error> {
        let mut gather = FlushGather::new();
        let mut replaced = Vec::new();
        let mut count = 0;
        self.hardware
            .table
            .merge(range, sizes, |leaf, size, table| {
                count += 1;
                gather.add(leaf, size);
                if table {
                    gather.add_table(leaf);
                    replaced.push(leaf);
                }
            })?;
        if !replaced.is_empty() {
            self.invalidate_gather(&gather);
        }
        for leaf in replaced {
            let writable = self
                .translate(leaf.start())
                .is_some_and(|l| l.access.writes());
            if writable && performs(Step::DirtyBehindFlush) {
                self.hardware.table.make_dirty(leaf)?;
            }
        }
        Ok(count)
    }

    /// The leaf that maps `iova`, if there is one.
    pub fn translate(&self, iova: Iova) -> Option<Leaf> {
        self.hardware.table.translate(iova)
    }

    /// Whether devices set dirty bits.
    pub fn is_tracking(&self) -> bool {
        self.hardware.is_tracking()
    }

    /// Takes the faults that were logged, and the number of those that were dropped since the last
    /// call. Devices never wait for it.
    pub fn take_faults(&self) -> Faults {
        self.hardware.take_faults()
    }

    /// Sets the reserved bits of the leaf that maps `iova`, as a memory error would: the next walk
    /// there faults. False if nothing is mapped there, or the format has no reserved bits
    /// ([`Format::RESERVED`]).
    pub fn corrupt(&self, iova: Iova) -> bool {
        self.hardware.table.corrupt(iova)
    }

    /// Gives the hardware a fault from now on; [`Breakage::None`] repairs it. Lost writes stay
    /// lost.
    pub fn break_hardware(&self, breakage: Breakage) {
        self.hardware.break_it(breakage);
    }

    /// The counts so far.
    pub fn stats(&self) -> DomainStats {
        let counts = *lock(&self.counts);
        DomainStats {
            devices: self.hardware.devices(),
            faults: self.hardware.faults(),
            dirty_walks: self.hardware.dirty_walks(),
            invalidations: counts.invalidations,
            commands: counts.commands,
            bytes_asked: counts.bytes_asked,
            bytes_invalidated: counts.bytes_invalidated,
            // Relaxed: a count.
            refused_unmaps: self.refused_unmaps.load(Ordering::Relaxed),
            skipped: self.hardware.table.skipped(),
        }
    }
}

impl<F: Format> DirtySource for Domain<F> {
    fn page(&self) -> Granule {
        F::PAGE
    }

    /// As [`Table::split_at`]; owes the flush of the leaf that was split.
    fn split_at(&self, at: Iova, gather: &mut FlushGather) -> Result<(), dirtymap::Error> {
        let owe = |leaf, size| gather.add(leaf, size);
        Ok(self.hardware.table.split_at(at, owe)?)
    }

    /// Refused as by [`Domain::map_leaves`].
    fn map(&self, mapping: &Mapping) -> Result<(), dirtymap::Error> {
        Ok(self.map_leaves(mapping, self.config.max_leaf)?)
    }

    fn unmap(&self, range: IovaRange, gather: &mut FlushGather, dirty: &mut dyn FnMut(IovaRange)) {
        let done = self.hardware.table.unmap(range, |leaf, size, was_dirty| {
            gather.add(leaf, size);
            if was_dirty {
                dirty(leaf);
            }
        });
        if done.is_err() {
            // Relaxed: a count. A caller that unmaps a mapped range never gets here.
            self.refused_unmaps.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Enabling clears, splits if the domain is configured so, switches and flushes:
    ///
    /// * the **flush comes last**. Translations cached while tracking was off count as dirty and
    ///   never look at the table, and neither do those that were cached with a D that the clear has
    ///   removed. Only after the flush does every write walk;
    /// * the **switch comes before the flush**, or a device could cache an entry as untracked right
    ///   after it;
    /// * the **clear comes before the switch**, so that what is left from an earlier tracking goes.
    ///   A device may see the switch first. A write whose D the clear then removes has landed when
    ///   the flush ends: the full copy that follows has it.
    fn set_tracking(&self, to: Tracking) -> Result<(), dirtymap::Error> {
        let on = to.is_on();
        let _switch = lock(&self.switch);
        if self.hardware.is_tracking() == on {
            return Ok(());
        }
        if on {
            self.hardware.table.clean();
            if let Some(largest) = self.config.split_on_enable {
                // The flush below drops the old leaves from all devices.
                self.hardware.table.split_everything(largest, |_, _| ());
            }
        }
        self.hardware.set_tracking(on);
        if on {
            // Walks that were not tracked set no A, and devices keep the cached entries until the
            // flush. Pages that are written while tracking is being enabled must not be skipped.
            if performs(Step::HeatAll) {
                self.hardware.table.heat_all();
            }
            self.invalidate_all();
        }
        Ok(())
    }

    fn read_and_clear(&self, range: IovaRange, out: &mut LeafSink<'_, '_>) -> Result<(), Stopped> {
        self.hardware.table.read_and_clear(range, out)
    }

    fn peek(&self, range: IovaRange, sink: &mut Sink<'_>) -> Result<(), Stopped> {
        self.hardware.table.peek(range, sink)
    }

    fn invalidate(&self, gather: &FlushGather) -> Result<Invalidated, dirtymap::Error> {
        Ok(self.invalidate_gather(gather))
    }
}

impl<F: Format> std::fmt::Debug for Domain<F> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Domain")
            .field("format", &F::NAME)
            .field("tracking", &self.is_tracking())
            .field("config", &self.config)
            .field("stats", &self.stats())
            .finish_non_exhaustive()
    }
}
