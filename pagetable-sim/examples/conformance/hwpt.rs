//! One recorded domain: an address space over a simulated one.

use std::sync::{Arc, Mutex, PoisonError};

use dirtymap::{
    Access, AddressSpace, DirtySource, FlushGather, Granule, HarvestError, HarvestRequest,
    Invalidated, Iova, IovaRange, LeafSink, Mapping, Sink, Stopped, UserBitmap,
};
use pagetable_sim::{AmdHost, Domain, DomainConfig, LeafSizes, PhysMemory};

use super::parse::{GRANULE, Sequence};
use super::ranges::Ranges;

/// AMD v1 with the pages of the kernel's mock, 2 KiB.
type Mock = AmdHost<4, 11>;

/// What is mapped behind an address: it, modulo this. Leaves up to it stay aligned, and the memory small.
const BACKING: u64 = 4 << 30;

/// Why a call is refused.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Refusal {
    /// Flags that the interface does not have, or a reserved word.
    #[error("flags that do not exist")]
    Flags,
    /// No such domain.
    #[error("there is no such domain")]
    NoSuchHwpt,
    /// The domain was made without tracking.
    #[error("the domain cannot track")]
    CannotTrack,
    /// A device writes, and nothing tracks it.
    #[error("tracking is off")]
    NotTracking,
    /// The library's own refusal.
    #[error(transparent)]
    Space(#[from] dirtymap::Error),
}

impl Refusal {
    /// The number that goes with it.
    pub(crate) fn errno(&self) -> i32 {
        match self {
            Refusal::Flags | Refusal::CannotTrack => 95,
            Refusal::NoSuchHwpt => 2,
            Refusal::NotTracking => 22,
            Refusal::Space(error) => error.errno(),
        }
    }
}

/// What a read came to.
pub(crate) struct Answer {
    /// What was walked: the request, or what lies below its first hole.
    pub(crate) walked: Ranges,
    /// The hole.
    pub(crate) hole: Option<dirtymap::Error>,
}

/// One domain of a sequence. All domains of a sequence translate the same addresses; here each has an address space of its
/// own.
pub(crate) struct Hwpt {
    space: AddressSpace,
    source: Source,
    /// Whether it can track.
    pub(crate) tracks: bool,
}

impl Hwpt {
    /// The domain number `nth` of `sequence`, without mappings.
    pub(crate) fn new(
        sequence: &Sequence,
        nth: usize,
        memory: &Arc<PhysMemory>,
    ) -> Result<Self, Refusal> {
        let source = Source(Arc::new(Wired {
            domain: Domain::with_format(Arc::clone(memory), DomainConfig::default()),
            leaves: Mutex::default(),
        }));
        let page = Granule::from_bytes(sequence.iova_alignment)?;
        let space = AddressSpace::new(page).with_source(source.clone())?;
        let usable =
            Ranges::new(sequence.iova_ranges.iter().filter_map(|(first, last)| {
                IovaRange::new(Iova::new(*first), Iova::new(*last)).ok()
            }));
        for reserved in Ranges::new([IovaRange::ALL]).without(&usable).iter() {
            space.reserve(reserved)?;
        }
        Ok(Hwpt {
            space,
            source,
            tracks: sequence
                .hwpts
                .get(nth)
                .is_some_and(|h| h.alloc_dirty_tracking),
        })
    }

    /// Maps `len` bytes from `iova` on, by the recorded leaves: first address, size, count.
    pub(crate) fn map(
        &self,
        iova: u64,
        len: u64,
        writeable: bool,
        leaves: &[(u64, u64, u64)],
    ) -> Result<(), Refusal> {
        let range = IovaRange::from_len(Iova::new(iova), len)?;
        let access = if writeable {
            Access::ReadWrite
        } else {
            Access::Read
        };
        *self.source.leaves() = leaves.to_vec();
        Ok(self.space.map(range, iova % BACKING, access)?)
    }

    /// Unmaps; how many bytes went.
    pub(crate) fn unmap(&self, iova: u64, len: u64) -> Result<u128, Refusal> {
        let range = IovaRange::from_len(Iova::new(iova), len)?;
        Ok(self.space.unmap_discarding(range)?.bytes)
    }

    /// Whether writes are tracked.
    pub(crate) fn is_tracking(&self) -> bool {
        self.source.0.domain.is_tracking()
    }

    /// Switches tracking.
    pub(crate) fn track(&self, on: bool) -> Result<(), Refusal> {
        if !self.tracks {
            return Err(Refusal::CannotTrack);
        }
        Ok(self.space.set_tracking(on)?)
    }

    /// A device writes to `granules`; it does not care what it may write to.
    pub(crate) fn write(&self, granules: &[(u64, u64)]) -> Result<(), Refusal> {
        if !self.is_tracking() {
            return Err(Refusal::NotTracking);
        }
        for (start, count) in granules {
            let range = IovaRange::from_len(Iova::new(*start), count * GRANULE)?;
            let written = self.source.0.domain.table().make_dirty(range);
            written.map_err(dirtymap::Error::source_failed)?;
        }
        Ok(())
    }

    /// Reads the dirty state into `bitmap`, and cleans it if `clear`.
    pub(crate) fn read(
        &self,
        iova: u64,
        len: u64,
        page_size: u64,
        clear: bool,
        bitmap: &mut [u8],
    ) -> Result<Answer, Refusal> {
        let range = IovaRange::from_len(Iova::new(iova), len)?;
        let request = HarvestRequest::new(range, Granule::from_bytes(page_size)?);
        let bitmap = UserBitmap::bytes(bitmap);
        let hole = if clear {
            match self.space.harvest(&request, bitmap) {
                Ok(lease) => {
                    lease.sync().map_err(|failed| failed.error)?.commit();
                    None
                }
                Err(HarvestError::Stopped(stopped)) => {
                    stopped
                        .lease
                        .sync()
                        .map_err(|failed| failed.error)?
                        .commit();
                    Some(stopped.error)
                }
                Err(HarvestError::Refused(error)) => return Err(self.refused(error)),
            }
        } else {
            match self.space.peek(&request, bitmap) {
                Ok(_) => None,
                Err(error @ dirtymap::Error::Hole { .. }) => Some(error),
                Err(error) => return Err(self.refused(error)),
            }
        };
        let walked = match &hole {
            None => Some(range),
            Some(dirtymap::Error::Hole { at, .. }) if *at > range.start() => {
                IovaRange::new(range.start(), Iova::new(at.get() - 1)).ok()
            }
            Some(_) => None,
        };
        Ok(Answer {
            walked: Ranges::new(walked),
            hole,
        })
    }

    /// A domain that cannot track says so last, when the range is fine.
    fn refused(&self, error: dirtymap::Error) -> Refusal {
        use dirtymap::Error::{BitmapTooShort, NeverTracked};
        match error {
            NeverTracked { .. } | BitmapTooShort { .. } if !self.tracks => Refusal::CannotTrack,
            error => error.into(),
        }
    }

    /// What is dirty: in the table, and the rests of leaves that the space keeps.
    pub(crate) fn dirty(&self) -> Result<Ranges, Refusal> {
        let granule = Granule::from_bytes(GRANULE)?;
        let mut all = Vec::new();
        for Mapping { range, .. } in self.space.mappings() {
            let words = usize::try_from(range.granules(granule).div_ceil(64)).unwrap_or(0);
            let mut words = vec![0u64; words];
            let view = UserBitmap::new(&mut words).view(range, granule)?;
            self.source
                .peek(range, &mut view.sink())
                .map_err(|stopped| stopped.error)?;
            all.extend(view.runs());
            let request = HarvestRequest::new(range, granule);
            match self.space.peek(&request, UserBitmap::new(&mut words)) {
                Ok(_) => {
                    let view = UserBitmap::new(&mut words).view(range, granule)?;
                    all.extend(view.runs());
                }
                // Nothing was ever kept.
                Err(dirtymap::Error::NeverTracked { .. }) => (),
                Err(error) => return Err(error.into()),
            }
        }
        Ok(Ranges::new(all))
    }

    /// Makes exactly the leaves of `dirty` dirty.
    pub(crate) fn set(&self, dirty: &Ranges) -> Result<(), Refusal> {
        // Takes what the space keeps, if it ever kept anything.
        for Mapping { range, .. } in self.space.mappings() {
            let len = u64::try_from(range.len()).unwrap_or(u64::MAX);
            let mut bitmap = vec![0; usize::try_from(len / (8 * GRANULE)).unwrap_or(0) + 1];
            match self.read(range.start().get(), len, GRANULE, true, &mut bitmap) {
                Err(
                    Refusal::CannotTrack | Refusal::Space(dirtymap::Error::NeverTracked { .. }),
                ) => {}
                done => {
                    done?;
                }
            }
        }
        let table = self.source.0.domain.table();
        table.clean();
        for range in dirty.iter() {
            table
                .make_dirty(range)
                .map_err(dirtymap::Error::source_failed)?;
        }
        Ok(())
    }

    /// The leaves that map the first and the last address of each of `ranges`.
    pub(crate) fn leaves_at_borders(&self, ranges: &Ranges) -> Ranges {
        let borders = ranges
            .iter()
            .flat_map(|range| [range.start(), range.last()]);
        Ranges::new(
            borders
                .filter_map(|at| self.source.0.domain.translate(at))
                .map(|leaf| leaf.range),
        )
    }
}

/// A domain that maps by the leaves it is told.
#[derive(Clone)]
struct Source(Arc<Wired>);

struct Wired {
    domain: Arc<Domain<Mock>>,
    /// First address, size and count of the leaves of the next map; none for those that the domain chooses.
    leaves: Mutex<Vec<(u64, u64, u64)>>,
}

impl Source {
    fn leaves(&self) -> std::sync::MutexGuard<'_, Vec<(u64, u64, u64)>> {
        self.0.leaves.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl DirtySource for Source {
    fn map(&self, mapping: &Mapping) -> Result<(), dirtymap::Error> {
        let leaves = std::mem::take(&mut *self.leaves());
        if leaves.is_empty() {
            return self.0.domain.map(mapping);
        }
        for (start, size, count) in leaves {
            let offset = start.wrapping_sub(mapping.range.start().get());
            let run = Mapping {
                range: IovaRange::from_len(Iova::new(start), size.saturating_mul(count))?,
                backing: mapping.backing.wrapping_add(offset),
                access: mapping.access,
            };
            let sizes = LeafSizes::only(Granule::from_bytes(size)?);
            if let Err(error) = self.0.domain.map_leaves(&run, sizes) {
                self.unmap(mapping.range, &mut FlushGather::new(), &mut |_| ());
                return Err(error.into());
            }
        }
        Ok(())
    }

    fn unmap(&self, range: IovaRange, gather: &mut FlushGather, dirty: &mut dyn FnMut(IovaRange)) {
        self.0.domain.unmap(range, gather, dirty);
    }

    fn set_tracking(&self, on: bool) -> Result<(), dirtymap::Error> {
        self.0.domain.set_tracking(on)
    }

    fn read_and_clear(&self, range: IovaRange, out: &mut LeafSink<'_, '_>) -> Result<(), Stopped> {
        self.0.domain.read_and_clear(range, out)
    }

    fn peek(&self, range: IovaRange, sink: &mut Sink<'_>) -> Result<(), Stopped> {
        self.0.domain.peek(range, sink)
    }

    fn invalidate(&self, gather: &FlushGather) -> Result<Invalidated, dirtymap::Error> {
        self.0.domain.invalidate(gather)
    }
}
