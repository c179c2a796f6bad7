//! The object of a sequence: one address space, and a domain of it for each recorded one.
//!
//! The calls make the same checks, in the same order, as the kernel's interface to an address
//! space.

use std::cell::Cell;
use std::sync::Arc;

use dirtymap::{
    Access, AddressSpace, DirtySource, DomainId, Granule, HarvestRequest, Holes, Iova, IovaRange,
    Mapping, Scope, UserBitmap,
};
use pagetable_sim::PhysMemory;

use super::hwpt::{Hwpt, Source};
use super::parse::{BACKING, GRANULE, Get, Map, Sequence};
use super::ranges::Ranges;

/// The error with which a call is refused.
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
    /// A device writes, and its domain does not track.
    #[error("tracking is off")]
    NotTracking,
    /// The interface takes numbers below 2^64 - 1.
    #[error("a start or a length of 2^64 - 1")]
    TooLarge,
    /// A start or a length that is not made of smallest pages.
    #[error("the start or the length is no multiple of {0}")]
    Unaligned(Granule),
    /// The library's own refusal.
    #[error(transparent)]
    Space(#[from] dirtymap::Error),
    /// The library refuses to make a range or a granule.
    #[error(transparent)]
    Range(#[from] dirtymap::RangeError),
}

impl Refusal {
    /// Its errno.
    pub(crate) fn errno(&self) -> i32 {
        match self {
            Refusal::Flags | Refusal::CannotTrack => 95,
            Refusal::NoSuchHwpt => 2,
            Refusal::NotTracking | Refusal::Unaligned(_) => 22,
            Refusal::TooLarge => 75,
            Refusal::Space(error) => error.errno(),
            Refusal::Range(error) => error.errno(),
        }
    }
}

/// The address space of a sequence.
pub(crate) struct Ioas {
    space: AddressSpace,
    hwpts: Vec<Hwpt>,
}

impl Ioas {
    /// The address space of `sequence`, without mappings.
    pub(crate) fn new(sequence: &Sequence, memory: &Arc<PhysMemory>) -> Result<Self, Refusal> {
        let space = AddressSpace::new(Granule::from_bytes(sequence.iova_alignment)?);
        let usable =
            Ranges::new(sequence.iova_ranges.iter().filter_map(|(first, last)| {
                IovaRange::new(Iova::new(*first), Iova::new(*last)).ok()
            }));
        for reserved in Ranges::new([IovaRange::ALL]).without(&usable).iter() {
            space.reserve(reserved)?;
        }
        let mut hwpts = Vec::new();
        for shape in &sequence.hwpts {
            let source = Arc::new(Source::new(memory));
            hwpts.push(Hwpt {
                id: space.attach(Arc::clone(&source))?,
                source,
                tracks: shape.alloc_dirty_tracking,
                ever_tracked: Cell::new(false),
            });
        }
        Ok(Ioas { space, hwpts })
    }

    /// All domains.
    pub(crate) fn hwpts(&self) -> &[Hwpt] {
        &self.hwpts
    }

    /// The domain of that number.
    pub(crate) fn hwpt(&self, number: i64) -> Result<&Hwpt, Refusal> {
        usize::try_from(number)
            .ok()
            .and_then(|nth| self.hwpts.get(nth))
            .ok_or(Refusal::NoSuchHwpt)
    }

    /// Maps in all domains, by the leaves recorded for each.
    pub(crate) fn map(&self, map: &Map) -> Result<(), Refusal> {
        below_max(map.iova, map.length)?;
        let page = self.space.alignment();
        if (map.iova | map.length) & page.mask() != 0 {
            return Err(Refusal::Unaligned(page));
        }
        let range = IovaRange::from_len(Iova::new(map.iova), map.length)?;
        let access = if map.writeable {
            Access::ReadWrite
        } else {
            Access::Read
        };
        for (nth, hwpt) in (0..).zip(&self.hwpts) {
            let layout = map.layout.iter().find(|layout| layout.hwpt == nth);
            hwpt.source
                .map_next_by(layout.map_or(&[], |layout| &layout.ptes));
        }
        // Leaves stay aligned, because the memory of a mapping has the alignment of the recorded
        // one.
        let backing = map.iova % BACKING + (map.va_off & page.mask());
        Ok(self.space.map(range, backing, access)?)
    }

    /// Unmaps in all domains, and returns the number of bytes. 2^64 - 1 bytes from 0 on stand for
    /// everything, even in an empty space.
    pub(crate) fn unmap(&self, iova: u64, len: u64) -> Result<u128, Refusal> {
        let everything = (iova, len) == (0, u64::MAX);
        let range = if everything {
            IovaRange::ALL
        } else {
            below_max(iova, len)?;
            IovaRange::from_len(Iova::new(iova), len)?
        };
        match self.space.unmap_discarding(range) {
            Err(dirtymap::Error::NothingMapped { .. }) if everything => Ok(0),
            done => Ok(done?.bytes),
        }
    }

    /// Switches tracking in one domain.
    pub(crate) fn track(&self, hwpt: &Hwpt, on: bool) -> Result<(), Refusal> {
        if !hwpt.tracks {
            return Err(Refusal::CannotTrack);
        }
        match on {
            true => self.space.start_domain_tracking(hwpt.id)?,
            false => self.space.stop_domain_tracking(hwpt.id)?,
        }
        hwpt.ever_tracked.set(hwpt.ever_tracked.get() || on);
        Ok(())
    }

    /// A device of the domain writes to `granules`, as far as they are mapped, read-only or not.
    pub(crate) fn write(&self, hwpt: &Hwpt, granules: &[(u64, u64)]) -> Result<(), Refusal> {
        if !hwpt.is_tracking() {
            return Err(Refusal::NotTracking);
        }
        let mut written = Vec::new();
        for (start, count) in granules {
            written.push(IovaRange::from_len(
                Iova::new(*start),
                count.saturating_mul(GRANULE),
            )?);
        }
        for range in Ranges::new(written).and(&self.mapped()).iter() {
            hwpt.source.write(range)?;
        }
        Ok(())
    }

    /// Reads the dirty state of the domain into `bitmap`, and cleans it if `clear`. Returns the
    /// first hole if the range has one. The part below it was read.
    pub(crate) fn read(
        &self,
        hwpt: &Hwpt,
        get: &Get,
        clear: bool,
        bitmap: &mut [u8],
    ) -> Result<Option<Iova>, Refusal> {
        let range = IovaRange::from_len(Iova::new(get.iova), get.length)?;
        let granule = Granule::from_bytes(get.page_size)?;
        let done = self.harvest(hwpt.id, range, granule, clear, UserBitmap::bytes(bitmap));
        done.map_err(|error| {
            use dirtymap::Error::{Bitmap, NeverTracked};
            use dirtymap::bitmap::BitmapError::TooShort;
            match error {
                // A domain that cannot track is refused last, after the range is checked.
                NeverTracked { .. } | Bitmap(TooShort { .. }) if !hwpt.tracks => {
                    Refusal::CannotTrack
                }
                error => error.into(),
            }
        })
    }

    fn harvest(
        &self,
        domain: DomainId,
        range: IovaRange,
        granule: Granule,
        clear: bool,
        bitmap: UserBitmap<'_>,
    ) -> Result<Option<Iova>, dirtymap::Error> {
        let request = HarvestRequest::new(range, granule)
            .in_scope(Scope::Domain(domain))
            .holes(Holes::Stop);
        if !clear {
            return match self.space.peek(&request, bitmap) {
                Ok(_) => Ok(None),
                Err(dirtymap::Error::Hole { at, .. }) => Ok(Some(at)),
                Err(error) => Err(error),
            };
        }
        let lease = self.space.harvest(&request, bitmap)?;
        let hole = lease.stopped().and_then(|stopped| match stopped.error {
            dirtymap::Error::Hole { at, .. } => Some(at),
            _ => None,
        });
        // The kernel clears the part below a hole. Any other stop is an error here.
        let lease = if hole.is_some() {
            lease.partial()
        } else {
            lease
        };
        lease.sync()?.commit();
        Ok(hole)
    }

    /// The mapped addresses.
    pub(crate) fn mapped(&self) -> Ranges {
        Ranges::new(self.space.mappings().into_iter().map(|m| m.range))
    }

    /// The dirty addresses of the domain: in its table, and in the space's put-back store for it.
    pub(crate) fn dirty(&self, hwpt: &Hwpt) -> Result<Ranges, Refusal> {
        let granule = Granule::from_bytes(GRANULE)?;
        let mut all = Vec::new();
        for Mapping { range, .. } in self.space.mappings() {
            let mut words = vec![0; words(range, granule)];
            let request = HarvestRequest::new(range, granule).in_scope(Scope::Domain(hwpt.id));
            let view = match self.space.peek(&request, UserBitmap::new(&mut words)) {
                Ok(view) => view,
                // The space refuses the request, and its put-back store is empty then.
                Err(dirtymap::Error::NeverTracked { .. }) => {
                    let view = UserBitmap::new(&mut words).view(range, granule);
                    let view = view.map_err(dirtymap::Error::from)?;
                    let peeked = hwpt.source.peek(range, &mut view.sink());
                    peeked.map_err(|stopped| stopped.error)?;
                    view
                }
                Err(error) => return Err(error.into()),
            };
            all.extend(view.runs());
        }
        Ok(Ranges::new(all))
    }

    /// Makes exactly the leaves of `dirty` dirty in the domain.
    pub(crate) fn set(&self, hwpt: &Hwpt, dirty: &Ranges) -> Result<(), Refusal> {
        if hwpt.ever_tracked.get() {
            // Takes the pages of the put-back store.
            let granule = Granule::from_bytes(GRANULE)?;
            for Mapping { range, .. } in self.space.mappings() {
                let mut words = vec![0; words(range, granule)];
                self.harvest(hwpt.id, range, granule, true, UserBitmap::new(&mut words))?;
            }
        }
        Ok(hwpt.source.set_dirty(dirty.and(&self.mapped()).iter())?)
    }
}

/// The words of a bitmap for `range`.
fn words(range: IovaRange, granule: Granule) -> usize {
    usize::try_from(range.granules(granule).div_ceil(64)).unwrap_or(usize::MAX)
}

/// The checks that the interface makes first.
fn below_max(iova: u64, len: u64) -> Result<(), Refusal> {
    if iova == u64::MAX || len == u64::MAX {
        return Err(Refusal::TooLarge);
    }
    Ok(())
}
