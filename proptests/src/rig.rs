//! The hardware: a domain and its devices, as one dirty source that fails on request.
//!
//! An invalidation waits for devices that are awake, and here one thread drives everything. So the
//! domain invalidates on a thread of its own, while the caller's thread serves the devices. Between
//! two steps no device acts: writes stay in flight, and runs are exactly repeatable.

use std::panic::resume_unwind;

use dirtymap::source::{FlushGather, Invalidated, LeafSink, Sink, Stopped};
use dirtymap::sync::{Arc, AtomicBool, Mutex, Ordering, lock, relax, thread};
use dirtymap::{Access, DirtySource, Error, Granule, Iova, IovaRange, Mapping, Tracking};
use pagetable_sim::{
    Breakage, Device, DeviceConfig, DmaError, Domain, DomainConfig, Format, PhysMemory,
};

use crate::op::{Config, Sabotage};

/// A domain of any format with its two devices: see the [module](self).
pub(crate) trait Node: DirtySource {
    fn format(&self) -> &'static str;

    /// Whether it has leaves that allow exactly `access`.
    fn grants(&self, access: Access) -> bool;

    /// Whether the domain maps `iova`.
    fn translates(&self, iova: Iova) -> bool;

    fn write(&self, device: u8, at: Iova, bytes: &[u8]) -> Result<(), DmaError>;

    fn read(&self, device: u8, at: Iova, bytes: &mut [u8]) -> Result<(), DmaError>;

    /// Lands the writes in flight that may touch `range`, except for those of device `except`.
    fn settle(&self, except: Option<u8>, range: IovaRange);

    /// Lands the writes in flight. The device stays awake.
    fn land(&self, device: u8);

    /// Lands the writes in flight. The device goes to sleep.
    fn quiesce(&self, device: u8);

    /// A device writes again and again while the domain invalidates. `None` stops it.
    fn keep_busy(&self, busy: Option<Busy>);

    /// Whether the next invalidation fails.
    fn fails(&self) -> &Switch;

    /// Whether the next harvest panics.
    fn dies(&self) -> &Switch;

    /// Merges the leaves of `range` as far as the format can. No other thread uses `range`.
    fn merge(&self, range: IovaRange) -> Result<(), pagetable_sim::Error>;

    /// Splits the leaf that spans `at`, and flushes its cached translations.
    fn split(&self, at: Iova) -> Result<(), Error>;
}

/// A flag that one thread sets and reads.
#[derive(Default)]
pub(crate) struct Switch(AtomicBool);

impl Switch {
    pub(crate) fn set(&self, on: bool) {
        // Relaxed, here and below: one thread.
        self.0.store(on, Ordering::Relaxed);
    }

    pub(crate) fn is_on(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }

    pub(crate) fn take(&self) -> bool {
        self.0.swap(false, Ordering::Relaxed)
    }
}

/// The write of a device during an invalidation.
pub(crate) struct Busy {
    pub(crate) device: u8,
    pub(crate) at: Iova,
    pub(crate) bytes: Vec<u8>,
}

/// The payload of a requested panic of a harvest.
pub(crate) struct ToldToDie;

/// The error of a requested failure of a flush.
#[derive(Debug, thiserror::Error)]
#[error("this flush was told to fail")]
pub(crate) struct ToldToFail;

pub(crate) struct Rig<F: Format> {
    domain: Arc<Domain<F>>,
    devices: Mutex<[Tracked<F>; 2]>,
    busy: Mutex<Option<Busy>>,
    fails: Switch,
    dies: Switch,
    sabotage: Sabotage,
    /// Whether it is the first of its world.
    first: bool,
}

/// A device, and the ranges of its writes in flight.
struct Tracked<F: Format> {
    device: Device<F>,
    in_flight: Vec<IovaRange>,
}

impl<F: Format> Rig<F> {
    /// The domain with the number `nth` of a world.
    pub(crate) fn new(config: &Config, nth: usize, memory: &Arc<PhysMemory>) -> Rig<F> {
        let max_leaf = if config.large_leaves[nth] {
            Granule::M2
        } else {
            Granule::K4
        };
        let config_of = DomainConfig {
            max_leaf,
            ..DomainConfig::default()
        };
        let domain = Domain::<F>::with_format(Arc::clone(memory), config_of);
        domain.break_hardware(match config.sabotage {
            Sabotage::IgnoreInvalidations => Breakage::IgnoreInvalidations,
            Sabotage::AcknowledgeWithoutDraining => Breakage::AcknowledgeWithoutDraining,
            Sabotage::FlushShortByOnePage => Breakage::FlushShortByOnePage,
            Sabotage::SkipNonLeaf => Breakage::SkipNonLeaf,
            Sabotage::DeviceTlbFirst => Breakage::DeviceTlbFirst,
            _ => Breakage::None,
        });
        let device = || Tracked {
            device: domain.attach(DeviceConfig {
                iotlb_sets: config.iotlb_sets,
                iotlb_ways: config.iotlb_ways,
                tlb_entries: config.tlb_entries,
                posted_writes: config.posted_writes,
                ..DeviceConfig::DEFAULT
            }),
            in_flight: Vec::new(),
        };
        let devices = Mutex::new([device(), device()]);
        Rig {
            domain,
            devices,
            busy: Mutex::new(None),
            fails: Switch::default(),
            dies: Switch::default(),
            sabotage: config.sabotage,
            first: nth == 0,
        }
    }

    /// Serves the devices until `flush` is done.
    fn serving<T: Send>(&self, flush: impl FnOnce() -> T + Send) -> T {
        let mut devices = lock(&self.devices);
        let busy = lock(&self.busy);
        thread::scope(|scope| {
            let flush = scope.spawn(flush);
            while !flush.is_finished() {
                for (nth, tracked) in devices.iter_mut().enumerate() {
                    match &*busy {
                        // Answers before the write, which may fault as it did before.
                        Some(busy) if usize::from(busy.device) == nth => {
                            let _ = tracked.write(busy.at, &busy.bytes);
                        }
                        _ => tracked.device.service(),
                    }
                }
                relax();
            }
            flush.join().unwrap_or_else(|panic| resume_unwind(panic))
        })
    }

    /// Whether this domain is left out.
    fn is_left_out(&self) -> bool {
        self.sabotage == Sabotage::HarvestFirstDomainOnly && !self.first
    }
}

impl<F: Format> Tracked<F> {
    fn write(&mut self, at: Iova, bytes: &[u8]) -> Result<(), DmaError> {
        let range = IovaRange::from_len(at, bytes.len() as u64).ok();
        if range.is_some_and(|range| self.in_flight.last() != Some(&range)) {
            self.in_flight.extend(range);
        }
        self.device.write(at, bytes)
    }

    fn land(&mut self) {
        self.in_flight.clear();
        self.device.land_all();
    }
}

impl<F: Format> Node for Rig<F> {
    fn format(&self) -> &'static str {
        F::NAME
    }

    fn grants(&self, access: Access) -> bool {
        F::grants(access)
    }

    fn translates(&self, iova: Iova) -> bool {
        self.domain.translate(iova).is_some()
    }

    fn write(&self, device: u8, at: Iova, bytes: &[u8]) -> Result<(), DmaError> {
        lock(&self.devices)[usize::from(device)].write(at, bytes)
    }

    fn read(&self, device: u8, at: Iova, bytes: &mut [u8]) -> Result<(), DmaError> {
        lock(&self.devices)[usize::from(device)]
            .device
            .read(at, bytes)
    }

    fn settle(&self, except: Option<u8>, range: IovaRange) {
        for (nth, tracked) in lock(&self.devices).iter_mut().enumerate() {
            if except.map(usize::from) != Some(nth)
                && tracked.in_flight.iter().any(|w| w.intersects(range))
            {
                tracked.land();
            }
        }
    }

    fn land(&self, device: u8) {
        lock(&self.devices)[usize::from(device)].land();
    }

    fn quiesce(&self, device: u8) {
        let mut devices = lock(&self.devices);
        let tracked = &mut devices[usize::from(device)];
        tracked.in_flight.clear();
        tracked.device.quiesce();
    }

    fn keep_busy(&self, busy: Option<Busy>) {
        *lock(&self.busy) = busy;
    }

    fn fails(&self) -> &Switch {
        &self.fails
    }

    fn dies(&self) -> &Switch {
        &self.dies
    }

    fn merge(&self, range: IovaRange) -> Result<(), pagetable_sim::Error> {
        let sizes = pagetable_sim::LeafSizes::up_to(Granule::M2);
        self.serving(|| self.domain.merge(range, sizes)).map(drop)
    }

    fn split(&self, at: Iova) -> Result<(), Error> {
        let mut gather = FlushGather::new();
        self.domain.split_at(at, &mut gather)?;
        self.serving(|| self.domain.invalidate(&gather)).map(drop)
    }
}

impl<F: Format> DirtySource for Rig<F> {
    fn page(&self) -> Granule {
        self.domain.page()
    }

    fn split_at(&self, at: Iova, gather: &mut FlushGather) -> Result<(), Error> {
        match self.sabotage {
            Sabotage::SplitNothing => Ok(()),
            _ => self.domain.split_at(at, gather),
        }
    }

    fn map(&self, mapping: &Mapping) -> Result<(), Error> {
        DirtySource::map(&self.domain, mapping)
    }

    fn unmap(&self, range: IovaRange, gather: &mut FlushGather, dirty: &mut dyn FnMut(IovaRange)) {
        match self.sabotage {
            Sabotage::UnmapForgetsDirty => self.domain.unmap(range, gather, &mut |_| ()),
            Sabotage::UnmapOwesNothing => {
                self.domain.unmap(range, &mut FlushGather::new(), dirty);
            }
            _ => DirtySource::unmap(&self.domain, range, gather, dirty),
        }
    }

    fn set_tracking(&self, to: Tracking) -> Result<(), Error> {
        if self.sabotage == Sabotage::TrackWithoutFlush {
            self.domain.break_hardware(Breakage::IgnoreInvalidations);
            let switched = self.serving(|| self.domain.set_tracking(to));
            self.domain.break_hardware(Breakage::None);
            return switched;
        }
        self.serving(|| self.domain.set_tracking(to))
    }

    fn read_and_clear(&self, range: IovaRange, out: &mut LeafSink<'_, '_>) -> Result<(), Stopped> {
        if self.is_left_out() {
            return Ok(());
        }
        if self.dies.take() {
            let middle = range.start().get() + (range.last().get() - range.start().get()) / 2;
            let middle = Iova::new(middle).granule_last(self.page());
            if let Ok(half) = IovaRange::new(range.start(), middle) {
                self.domain.read_and_clear(half, out)?;
            }
            // Not by `panic!`, because the panic hook may end the process.
            resume_unwind(Box::new(ToldToDie));
        }
        self.domain.read_and_clear(range, out)
    }

    fn peek(&self, range: IovaRange, sink: &mut Sink<'_>) -> Result<(), Stopped> {
        if self.is_left_out() {
            return Ok(());
        }
        self.domain.peek(range, sink)
    }

    fn invalidate(&self, gather: &FlushGather) -> Result<Invalidated, Error> {
        if self.fails.take() {
            return match self.sabotage {
                Sabotage::HideFailedFlush => Ok(Invalidated::default()),
                _ => Err(Error::source_failed(ToldToFail)),
            };
        }
        self.serving(|| self.domain.invalidate(gather))
    }
}
