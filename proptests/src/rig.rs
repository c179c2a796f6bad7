//! The hardware side: a domain and its devices, as one dirty source that can be told to fail.
//!
//! An invalidation waits for devices that are awake, and here one thread drives everything. So while the domain
//! invalidates, on a thread of its own, the caller's thread serves the devices. Between two steps no device does
//! anything: writes stay in flight, and runs repeat themselves exactly.

use dirtymap::sync::{Arc, AtomicBool, Mutex, Ordering, lock, relax, thread};
use dirtymap::{
    DirtySource, Error, FlushGather, Granule, Invalidated, Iova, IovaRange, LeafSink, Mapping,
    Sink, Stopped,
};
use pagetable_sim::{Breakage, Device, DeviceConfig, DmaError, Domain, DomainConfig, PhysMemory};

use crate::op::{Config, Sabotage};
use crate::oracle::MEMORY;

/// See the [module](self).
pub(crate) struct Rig {
    domain: Arc<Domain>,
    devices: Mutex<[Tracked; 2]>,
    fail_next: AtomicBool,
}

/// A device, and where its writes in flight may be.
struct Tracked {
    device: Device,
    in_flight: Vec<IovaRange>,
}

/// What a flush that was told to fail says.
#[derive(Debug, thiserror::Error)]
#[error("this flush was told to fail")]
pub(crate) struct ToldToFail;

impl Rig {
    pub(crate) fn new(config: &Config) -> Result<Arc<Rig>, pagetable_sim::Error> {
        let max_leaf = if config.large_leaves {
            Granule::M2
        } else {
            Granule::K4
        };
        let domain = Domain::new(
            Arc::new(PhysMemory::new(MEMORY)?),
            DomainConfig {
                max_leaf,
                ..DomainConfig::default()
            },
        );
        domain.break_hardware(match config.sabotage {
            Sabotage::IgnoreInvalidations => Breakage::IgnoreInvalidations,
            Sabotage::AcknowledgeWithoutDraining => Breakage::AcknowledgeWithoutDraining,
            _ => Breakage::None,
        });
        let device = || Tracked {
            device: domain.attach(DeviceConfig {
                iotlb_sets: config.iotlb_sets,
                iotlb_ways: config.iotlb_ways,
                posted_writes: config.posted_writes,
                ..DeviceConfig::DEFAULT
            }),
            in_flight: Vec::new(),
        };
        let devices = Mutex::new([device(), device()]);
        Ok(Arc::new(Rig {
            domain,
            devices,
            fail_next: AtomicBool::new(false),
        }))
    }

    pub(crate) fn memory(&self) -> &PhysMemory {
        self.domain.memory()
    }

    /// Whether the domain maps `iova`.
    pub(crate) fn translates(&self, iova: Iova) -> bool {
        self.domain.translate(iova).is_some()
    }

    pub(crate) fn write(&self, device: u8, at: Iova, bytes: &[u8]) -> Result<(), DmaError> {
        self.settle(Some(device), at, bytes.len());
        let mut devices = lock(&self.devices);
        let tracked = &mut devices[usize::from(device)];
        tracked
            .in_flight
            .extend(IovaRange::from_len(at, bytes.len() as u64));
        tracked.device.write(at, bytes)
    }

    pub(crate) fn read(&self, device: u8, at: Iova, bytes: &mut [u8]) -> Result<(), DmaError> {
        self.settle(Some(device), at, bytes.len());
        let mut devices = lock(&self.devices);
        devices[usize::from(device)].device.read(at, bytes)
    }

    /// Lands what may be in flight to these bytes from all devices but `except`: so the last of several writers wins,
    /// as in the oracle.
    pub(crate) fn settle(&self, except: Option<u8>, at: Iova, len: usize) {
        let Ok(range) = IovaRange::from_len(at, len as u64) else {
            return;
        };
        for (nth, tracked) in lock(&self.devices).iter_mut().enumerate() {
            if except.map(usize::from) != Some(nth)
                && tracked.in_flight.iter().any(|w| w.intersects(range))
            {
                tracked.land();
            }
        }
    }

    pub(crate) fn land(&self, device: u8) {
        lock(&self.devices)[usize::from(device)].land();
    }

    pub(crate) fn quiesce(&self, device: u8) {
        let mut devices = lock(&self.devices);
        let tracked = &mut devices[usize::from(device)];
        tracked.in_flight.clear();
        tracked.device.quiesce();
    }

    /// The next invalidation fails.
    pub(crate) fn fail_next(&self) {
        // Relaxed: thrown and seen by one thread.
        self.fail_next.store(true, Ordering::Relaxed);
    }

    /// No invalidation was told to fail any more.
    pub(crate) fn heal(&self) {
        // Relaxed: thrown and seen by one thread.
        self.fail_next.store(false, Ordering::Relaxed);
    }

    /// Whether the next invalidation fails.
    pub(crate) fn will_fail(&self) -> bool {
        // Relaxed: thrown and seen by one thread.
        self.fail_next.load(Ordering::Relaxed)
    }

    /// Serves the devices until `flush` is done.
    fn serving<T: Send>(&self, flush: impl FnOnce() -> T + Send) -> T {
        let mut devices = lock(&self.devices);
        thread::scope(|scope| {
            let flush = scope.spawn(flush);
            while !flush.is_finished() {
                devices
                    .iter_mut()
                    .for_each(|tracked| tracked.device.service());
                relax();
            }
            flush
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }
}

impl Tracked {
    fn land(&mut self) {
        self.in_flight.clear();
        self.device.land_all();
    }
}

impl DirtySource for Rig {
    fn page(&self) -> Granule {
        self.domain.page()
    }

    fn split_at(&self, at: Iova, gather: &mut FlushGather) -> Result<(), Error> {
        self.domain.split_at(at, gather)
    }

    fn map(&self, mapping: &Mapping) -> Result<(), Error> {
        DirtySource::map(&self.domain, mapping)
    }

    fn unmap(&self, range: IovaRange, gather: &mut FlushGather, dirty: &mut dyn FnMut(IovaRange)) {
        DirtySource::unmap(&self.domain, range, gather, dirty);
    }

    fn set_tracking(&self, on: bool) -> Result<(), Error> {
        self.serving(|| self.domain.set_tracking(on))
    }

    fn read_and_clear(&self, range: IovaRange, out: &mut LeafSink<'_, '_>) -> Result<(), Stopped> {
        self.domain.read_and_clear(range, out)
    }

    fn peek(&self, range: IovaRange, sink: &mut Sink<'_>) -> Result<(), Stopped> {
        self.domain.peek(range, sink)
    }

    fn invalidate(&self, gather: &FlushGather) -> Result<Invalidated, Error> {
        // Relaxed: thrown and seen by one thread.
        if self.fail_next.swap(false, Ordering::Relaxed) {
            return Err(Error::source_failed(ToldToFail));
        }
        self.serving(|| self.domain.invalidate(gather))
    }
}
