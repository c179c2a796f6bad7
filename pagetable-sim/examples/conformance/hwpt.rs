//! One recorded domain: a simulated one that maps by given leaves.

use std::cell::Cell;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use dirtymap::source::{FlushGather, Invalidated, LeafSink, Sink, Stopped};
use dirtymap::{DirtySource, DomainId, Granule, Iova, IovaRange, Mapping, Tracking};
use pagetable_sim::{AmdHost, Domain, DomainConfig, LeafSizes, PhysMemory};

/// AMD v1 with the pages of the kernel's mock, 2 KiB.
type Mock = AmdHost<4, 11>;

/// One domain of a sequence.
pub(crate) struct Hwpt {
    /// Its name in the address space.
    pub(crate) id: DomainId,
    /// The source that the address space harvests.
    pub(crate) source: Arc<Source>,
    /// Whether it can track.
    pub(crate) tracks: bool,
    /// Whether tracking was ever on.
    pub(crate) ever_tracked: Cell<bool>,
}

impl Hwpt {
    /// Whether writes are tracked.
    pub(crate) fn is_tracking(&self) -> bool {
        self.source.domain.is_tracking()
    }
}

/// First address, size and count of leaves.
pub(crate) type Leaves = (u64, u64, u64);

/// A domain that maps by given leaves.
pub(crate) struct Source {
    domain: Arc<Domain<Mock>>,
    /// The leaves of the next map. If there are none, the domain chooses them.
    leaves: Mutex<Vec<Leaves>>,
}

impl Source {
    /// A domain without mappings, over `memory`.
    pub(crate) fn new(memory: &Arc<PhysMemory>) -> Self {
        Source {
            domain: Domain::with_format(Arc::clone(memory), DomainConfig::default()),
            leaves: Mutex::default(),
        }
    }

    /// Sets the leaves of the next map. If there are none, the domain chooses them.
    pub(crate) fn map_next_by(&self, leaves: &[Leaves]) {
        *self.leaves() = leaves.to_vec();
    }

    /// Makes exactly the leaves dirty that `ranges` touch.
    pub(crate) fn set_dirty(
        &self,
        ranges: impl Iterator<Item = IovaRange>,
    ) -> Result<(), dirtymap::Error> {
        self.domain.table().clean();
        ranges.into_iter().try_for_each(|range| self.write(range))
    }

    /// Makes the leaves that `range` touches dirty.
    pub(crate) fn write(&self, range: IovaRange) -> Result<(), dirtymap::Error> {
        Ok(self.domain.table().make_dirty(range)?)
    }

    fn leaves(&self) -> MutexGuard<'_, Vec<Leaves>> {
        self.leaves.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl DirtySource for Source {
    fn page(&self) -> Granule {
        self.domain.page()
    }

    fn map(&self, mapping: &Mapping) -> Result<(), dirtymap::Error> {
        let leaves = std::mem::take(&mut *self.leaves());
        if leaves.is_empty() {
            return self.domain.map(mapping);
        }
        for (start, size, count) in leaves {
            let offset = start.wrapping_sub(mapping.range.start().get());
            let run = Mapping {
                range: IovaRange::from_len(Iova::new(start), size.saturating_mul(count))?,
                backing: mapping.backing.wrapping_add(offset),
                access: mapping.access,
            };
            let sizes = LeafSizes::only(Granule::from_bytes(size)?);
            if let Err(error) = self.domain.map_leaves(&run, sizes) {
                self.unmap(mapping.range, &mut FlushGather::new(), &mut |_| ());
                return Err(error.into());
            }
        }
        Ok(())
    }

    fn unmap(&self, range: IovaRange, gather: &mut FlushGather, dirty: &mut dyn FnMut(IovaRange)) {
        self.domain.unmap(range, gather, dirty);
    }

    fn set_tracking(&self, to: Tracking) -> Result<(), dirtymap::Error> {
        self.domain.set_tracking(to)
    }

    fn read_and_clear(&self, range: IovaRange, out: &mut LeafSink<'_, '_>) -> Result<(), Stopped> {
        self.domain.read_and_clear(range, out)
    }

    fn peek(&self, range: IovaRange, sink: &mut Sink<'_>) -> Result<(), Stopped> {
        self.domain.peek(range, sink)
    }

    fn invalidate(&self, gather: &FlushGather) -> Result<Invalidated, dirtymap::Error> {
        self.domain.invalidate(gather)
    }
}
