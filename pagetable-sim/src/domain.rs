//! A domain: one page table, the devices that translate by it, and the switch for dirty tracking.
//!
//! ```text
//!  Domain (software's side) --map, unmap, harvest--> table <--walk, set D-- Device (hardware's side)
//!     |                                                                       |   |
//!     +--invalidate--> port of each device --acknowledged when dropped, drained--+   +--> memory
//! ```

use dirtymap::sync::{Arc, AtomicBool, AtomicU8, AtomicU64, Mutex, Ordering, fence, lock};
use dirtymap::{
    DirtySource, FlushGather, Granule, Invalidated, Iova, IovaRange, LeafSink, Mapping, Sink,
    Stopped,
};

use crate::device::{Device, DeviceConfig};
use crate::error::Error;
use crate::fmt::{AmdV1, Format, LeafSizes, granule};
use crate::memory::PhysMemory;
use crate::port::Port;
use crate::table::{Leaf, Table};

/// The shape of a domain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DomainConfig {
    /// Leaves are not larger than this. Large leaves make tracking coarse; below the smallest page it counts as the
    /// smallest page.
    pub max_leaf: Granule,
    /// Enabling tracking splits leaves that are larger than this, so that tracking is finer than the mapping.
    pub split_on_enable: Option<Granule>,
}

impl Default for DomainConfig {
    /// Leaves as large as the format has them.
    fn default() -> Self {
        DomainConfig {
            max_leaf: granule(63),
            split_on_enable: None,
        }
    }
}

/// Ways in which the hardware can be made to break its promises, to show that users of it would notice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
#[repr(u8)]
pub enum Breakage {
    /// The hardware works.
    #[default]
    None = 0,
    /// Invalidations return at once and reach no device.
    IgnoreInvalidations,
    /// Devices drop what they cached and acknowledge, while their posted writes stay in flight.
    AcknowledgeWithoutDraining,
}

/// What a domain counted. Each number is exact; together they are of one moment only while nothing goes on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DomainStats {
    /// Devices that are attached.
    pub devices: u64,
    /// Accesses of devices that were blocked.
    pub faults: u64,
    /// How often a device turned a leaf's D from 0 to 1.
    pub dirty_walks: u64,
    /// Calls that invalidated something.
    pub invalidations: u64,
    /// Invalidation commands sent to devices: ranges times devices.
    pub commands: u64,
    /// Ranges that were to be unmapped and were refused, because they cut through a leaf or cannot be mapped at all.
    pub refused_unmaps: u64,
}

/// What the devices of a domain are wired to.
pub(crate) struct Hardware<F: Format> {
    pub(crate) memory: Arc<PhysMemory>,
    pub(crate) table: Table<F>,
    tracking: AtomicBool,
    breakage: AtomicU8,
    ports: Mutex<Vec<Arc<Port>>>,
    faults: AtomicU64,
    dirty_walks: AtomicU64,
}

/// One page table, the devices that translate by it, and the switch for dirty tracking: the hardware's side of a
/// [`DirtySource`](dirtymap::DirtySource).
///
/// `F` is the format of the table: [`Domain::new`] makes a domain of AMD v1, [`Domain::with_format`] one of any format.
///
/// Shared by `Arc`. Mapping, unmapping, harvesting and DMA never wait for each other; `invalidate` and enabling wait
/// for every device that is awake.
pub struct Domain<F: Format = AmdV1> {
    hardware: Arc<Hardware<F>>,
    config: DomainConfig,
    /// Held by who switches tracking.
    switch: Mutex<()>,
    invalidations: AtomicU64,
    commands: AtomicU64,
    refused_unmaps: AtomicU64,
}

impl Domain {
    /// The smallest page that a domain of AMD v1 maps: ranges and backing addresses are multiples of it. For other
    /// formats see [`Format::PAGE`].
    pub const PAGE: Granule = AmdV1::PAGE;

    /// A domain of AMD v1 that maps nothing and tracks nothing, over `memory`.
    pub fn new(memory: Arc<PhysMemory>, config: DomainConfig) -> Arc<Domain> {
        Domain::with_format(memory, config)
    }
}

impl<F: Format> Domain<F> {
    /// A domain of the format `F` that maps nothing and tracks nothing, over `memory`. The format is named, as in
    /// `Domain::<VtdSs>::with_format(memory, config)`.
    pub fn with_format(memory: Arc<PhysMemory>, config: DomainConfig) -> Arc<Self> {
        Arc::new(Domain {
            hardware: Arc::new(Hardware {
                memory,
                table: Table::new(),
                tracking: AtomicBool::new(false),
                breakage: AtomicU8::new(Breakage::None as u8),
                ports: Mutex::new(Vec::new()),
                faults: AtomicU64::new(0),
                dirty_walks: AtomicU64::new(0),
            }),
            config,
            switch: Mutex::new(()),
            invalidations: AtomicU64::new(0),
            commands: AtomicU64::new(0),
            refused_unmaps: AtomicU64::new(0),
        })
    }

    /// Attaches a new device, with an empty IOTLB. It leaves the domain when it is dropped.
    pub fn attach(&self, config: DeviceConfig) -> Device<F> {
        Device::new(Arc::clone(&self.hardware), config)
    }

    /// The memory that the domain maps.
    pub fn memory(&self) -> &Arc<PhysMemory> {
        &self.hardware.memory
    }

    /// The table that devices walk. What is split, merged or protected in it by hand is not invalidated by the domain.
    pub fn table(&self) -> &Table<F> {
        &self.hardware.table
    }

    /// As [`DirtySource::map`], by leaves whose sizes are among `sizes`.
    ///
    /// # Errors
    /// [`Error::OutsideMemory`] if the memory behind it is not all there, else as [`Table::map`].
    pub fn map_leaves(&self, mapping: &Mapping, sizes: impl Into<LeafSizes>) -> Result<(), Error> {
        let &Mapping {
            range,
            backing,
            access,
        } = mapping;
        let len = u64::try_from(range.len()).unwrap_or(u64::MAX);
        self.hardware.memory.check(backing, len)?;
        self.hardware.table.map(range, backing, access, sizes)
    }

    /// The leaf that maps `iova`, if there is one.
    pub fn translate(&self, iova: Iova) -> Option<Leaf> {
        self.hardware.table.translate(iova)
    }

    /// Whether devices set dirty bits.
    pub fn is_tracking(&self) -> bool {
        self.hardware.is_tracking()
    }

    /// Makes the hardware break its promises from now on; [`Breakage::None`] repairs it. What was lost stays lost.
    pub fn break_hardware(&self, breakage: Breakage) {
        // Relaxed: a switch for tests, thrown before the scenario begins.
        self.hardware
            .breakage
            .store(breakage as u8, Ordering::Relaxed);
    }

    /// What was counted so far.
    pub fn stats(&self) -> DomainStats {
        // Relaxed, all: counts order nothing.
        DomainStats {
            devices: lock(&self.hardware.ports).len() as u64,
            faults: self.hardware.faults.load(Ordering::Relaxed),
            dirty_walks: self.hardware.dirty_walks.load(Ordering::Relaxed),
            invalidations: self.invalidations.load(Ordering::Relaxed),
            commands: self.commands.load(Ordering::Relaxed),
            refused_unmaps: self.refused_unmaps.load(Ordering::Relaxed),
        }
    }

    /// Has all devices drop what they cached for `ranges`, and land what they have in flight; returns when all have.
    fn invalidate_ranges(&self, ranges: &[IovaRange]) -> Invalidated {
        let mut done = Invalidated::default();
        if ranges.is_empty() || self.hardware.breakage() == Breakage::IgnoreInvalidations {
            return done;
        }
        // A device that joins after this has nothing cached, and the lock orders its walks after the changes that we
        // invalidate.
        let ports = lock(&self.hardware.ports).clone();
        let ranges = Arc::new(ranges.to_vec());
        let asked: Vec<_> = ports.iter().map(|port| (port, port.ask(&ranges))).collect();
        // SeqCst: F2 of the protocol in `port`, once for all devices; pairs with F1 in `Port::wake`.
        fence(Ordering::SeqCst);
        for (port, receipt) in &asked {
            if let Some(receipt) = receipt {
                done.add(port.wait(receipt));
            }
        }
        done.commands = (ranges.len() * ports.len()) as u64;
        // Relaxed, both: counts order nothing.
        self.invalidations.fetch_add(1, Ordering::Relaxed);
        self.commands.fetch_add(done.commands, Ordering::Relaxed);
        done
    }
}

impl<F: Format> DirtySource for Domain<F> {
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
            // Relaxed: a count. A caller who unmaps what was mapped never gets here.
            self.refused_unmaps.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Enabling goes clear, split if the domain is configured so, switch, flush:
    ///
    /// * the **flush comes last**. Translations cached while tracking was off count as dirty and never look at the
    ///   table, and those cached with a D that the clear has removed would not either; only after the flush does every
    ///   write walk;
    /// * the **switch comes before the flush**, or a device could cache an entry as untracked right after it;
    /// * the **clear comes before the switch**, so that it removes only what is left from an earlier tracking, and no D
    ///   that a write sets while tracking is being enabled.
    fn set_tracking(&self, on: bool) -> Result<(), dirtymap::Error> {
        let _switch = lock(&self.switch);
        if self.hardware.is_tracking() == on {
            return Ok(());
        }
        if on {
            self.hardware.table.clean();
            if let Some(largest) = self.config.split_on_enable {
                // Owed to the flush below, which drops the old leaves from all devices.
                self.hardware.table.split_everything(largest, |_, _| ());
            }
        }
        // Release: the clear comes first. That devices see the switch in time is not this store's work but that of the
        // flush: they look at the switch after they answered, or after they woke behind F2.
        self.hardware.tracking.store(on, Ordering::Release);
        if on {
            self.invalidate_ranges(&[IovaRange::ALL]);
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
        Ok(self.invalidate_ranges(gather.ranges()))
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

impl<F: Format> Hardware<F> {
    /// Gives a new device its port.
    pub(crate) fn join(&self) -> Arc<Port> {
        let port = Arc::new(Port::new());
        lock(&self.ports).push(Arc::clone(&port));
        port
    }

    /// Takes the port of a device that sleeps and never wakes again.
    pub(crate) fn leave(&self, port: &Arc<Port>) {
        lock(&self.ports).retain(|other| !Arc::ptr_eq(other, port));
    }

    #[inline]
    pub(crate) fn is_tracking(&self) -> bool {
        // Relaxed: see `set_tracking`; a device that reads the old value is flushed before enabling returns.
        self.tracking.load(Ordering::Relaxed)
    }

    pub(crate) fn breakage(&self) -> Breakage {
        // Relaxed: a switch for tests.
        match self.breakage.load(Ordering::Relaxed) {
            1 => Breakage::IgnoreInvalidations,
            2 => Breakage::AcknowledgeWithoutDraining,
            _ => Breakage::None,
        }
    }

    pub(crate) fn count_fault(&self) {
        // Relaxed: a count.
        self.faults.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn count_dirty_walk(&self) {
        // Relaxed: a count, next to a compare-exchange on the table.
        self.dirty_walks.fetch_add(1, Ordering::Relaxed);
    }
}
