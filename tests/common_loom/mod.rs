//! The hardware of models with one page and one device.

use dirtymap::source::{FlushGather, Invalidated, LeafSink, Sink, Stopped};
use dirtymap::sync::{Arc, AtomicU64, Mutex, Ordering::Relaxed, lock};
use dirtymap::{DirtySource, Error, Granule, IovaRange, Tracking};

const PAGE: Granule = Granule::K4;

/// A page with a dirty bit, and one device whose IOTLB holds "D is set". The lock stands for a
/// write in flight: an invalidation waits for it.
pub(crate) struct OnePage {
    dirty: AtomicU64,
    cached: Mutex<bool>,
    pub(crate) data: AtomicU64,
}

impl OnePage {
    /// Clean, or dirty, and then the device has cached that and has written 1.
    pub(crate) fn new(is_dirty: bool) -> Arc<Self> {
        Arc::new(OnePage {
            dirty: AtomicU64::new(is_dirty.into()),
            cached: Mutex::new(is_dirty),
            data: AtomicU64::new(is_dirty.into()),
        })
    }

    pub(crate) fn device_writes(&self, value: u64) {
        let mut cached = lock(&self.cached);
        if !*cached {
            // A read-modify-write, as the compare-exchange of hardware is: see `loom.rs`.
            self.dirty.swap(1, dirtymap::sync::Ordering::SeqCst);
            *cached = true;
        }
        self.data.store(value, Relaxed);
    }
}

pub(crate) struct Source(pub(crate) Arc<OnePage>);

impl DirtySource for Source {
    fn unmap(&self, _: IovaRange, _: &mut FlushGather, _: &mut dyn FnMut(IovaRange)) {}

    fn set_tracking(&self, _: Tracking) -> Result<(), Error> {
        Ok(())
    }

    fn read_and_clear(&self, range: IovaRange, out: &mut LeafSink<'_, '_>) -> Result<(), Stopped> {
        let dirty = &self.0.dirty;
        // Relaxed, both: a scan promises no more.
        if dirty.load(Relaxed) == 0 {
            return Ok(());
        }
        let clear = || dirty.swap(0, Relaxed) == 1;
        out.take(range, PAGE, clear).map_err(|error| Stopped {
            at: range.start(),
            error,
        })
    }

    fn peek(&self, _: IovaRange, _: &mut Sink<'_>) -> Result<(), Stopped> {
        Ok(())
    }

    fn invalidate(&self, _: &FlushGather) -> Result<Invalidated, Error> {
        *lock(&self.0.cached) = false;
        Ok(Invalidated::default())
    }
}
