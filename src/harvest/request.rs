//! The request of a harvest.

use std::time::Instant;

use crate::bitmap::{BitmapView, CHUNK_BITS};
use crate::units::{DomainId, Granule, Iova, IovaRange};

/// Bits that a bounded harvest looks at between two looks at its bounds, at least: one word.
const MIN_STEP: u64 = 64;

/// A range of addresses, the bytes that one bit of the answer stands for, and how to walk it.
///
/// The options of a harvest:
///
/// * [`in_scope`](Self::in_scope) takes the dirty state of one domain alone.
/// * [`holes`](Self::holes) skips addresses that no area holds, ends there, or is refused.
/// * [`masked`](Self::masked) takes the pages of another bitmap, and leaves the rest dirty.
/// * [`max_bits`](Self::max_bits) and [`until`](Self::until) end at a bound.
///   [`Lease::next`](crate::Lease::next) has its address.
/// * [`resume_at`](Self::resume_at) goes on at that address.
/// * [`with_backing`](Self::with_backing) records the backing addresses of the pages.
/// * `parallel` (feature `rayon`) walks by many threads.
///
/// ```
/// use dirtymap::{Granule, HarvestRequest, Holes, ToIovaRange};
///
/// # fn main() -> Result<(), dirtymap::Error> {
/// let request = HarvestRequest::new((0..1 << 30).to_iova_range()?, Granule::K4)
///     .holes(Holes::Refuse) // as the kernel does
///     .max_bits(4096);      // 16 MiB at a time
/// # let _ = request;
/// # Ok(())
/// # }
/// ```
#[doc(alias = "IOMMU_HWPT_GET_DIRTY_BITMAP")]
#[derive(Clone, Copy, Debug)]
pub struct HarvestRequest<'m> {
    range: IovaRange,
    granule: Granule,
    scope: Scope,
    holes: Holes,
    mask: Option<BitmapView<'m>>,
    from: Option<Iova>,
    bits: Option<u64>,
    deadline: Option<Instant>,
    pub(super) backing: bool,
    #[cfg(all(feature = "rayon", not(dirtymap_loom)))]
    parallel: bool,
}

/// The places whose dirty state a harvest takes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Scope {
    /// All domains, and marks.
    #[default]
    All,
    /// One domain: the writes of its devices, and the pages that earlier leases over it put back,
    /// whichever writer they came from.
    Domain(DomainId),
}

/// The treatment of addresses of the range that no area holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Holes {
    /// Skips them, because nothing there can be dirty.
    #[default]
    Skip,
    /// Ends at the first one: the lease covers the pages below it, and
    /// [`Lease::stopped`](crate::Lease::stopped) has its address.
    Stop,
    /// Is refused before anything is touched, by [`Error::Hole`](crate::Error::Hole). A hole that
    /// appears meanwhile ends it.
    Refuse,
}

impl<'m> HarvestRequest<'m> {
    /// A request for `range` at `granule` bytes a bit. Bit 0 of the bitmap is the first granule of
    /// `range`, which must start and end at multiples of both `granule` and the smallest page of
    /// the space.
    ///
    /// A granule larger than the page makes a bit cover several pages. A smaller one makes a page
    /// set several bits.
    ///
    /// ```
    /// use dirtymap::{AddressSpace, Granule, HarvestRequest, Holes, ToIovaRange};
    ///
    /// # fn main() -> Result<(), dirtymap::Error> {
    /// let ram = (0..1 << 30).to_iova_range()?;
    /// let request = HarvestRequest::new(ram, Granule::K4).holes(Holes::Refuse).max_bits(4096);
    /// assert_eq!(request.range(), ram);
    /// # Ok(())
    /// # }
    /// ```
    pub const fn new(range: IovaRange, granule: Granule) -> Self {
        HarvestRequest {
            range,
            granule,
            scope: Scope::All,
            holes: Holes::Skip,
            mask: None,
            from: None,
            bits: None,
            deadline: None,
            backing: false,
            #[cfg(all(feature = "rayon", not(dirtymap_loom)))]
            parallel: false,
        }
    }

    /// Takes the dirty state of `scope` alone. The default is all of it.
    #[must_use]
    pub const fn in_scope(mut self, scope: Scope) -> Self {
        self.scope = scope;
        self
    }

    /// Sets the treatment of addresses that no area holds. The default skips them.
    #[must_use]
    pub const fn holes(mut self, holes: Holes) -> Self {
        self.holes = holes;
        self
    }

    /// Takes only what is set in `mask`, and leaves everything else dirty. So a consumer can
    /// [peek](crate::AddressSpace::peek) once, and clear each piece right before it copies it: a
    /// page that is written again in between costs one copy instead of two. `KVM_CLEAR_DIRTY_LOG`
    /// is the model.
    ///
    /// `mask` may have another base and granule than the request. Marks and leaves are cleared in
    /// whole pages of all sources inside a run of `mask`. Bits of clean pages do no harm, and holes
    /// matter only at its bits. The harvest records into another bitmap, which must not be the
    /// memory of `mask`, because an abort puts back every bit that is set there.
    ///
    /// ```
    /// # use dirtymap::{Access, AddressSpace, Granule, HarvestRequest, ToIovaRange, UserBitmap};
    /// # fn main() -> Result<(), dirtymap::Error> {
    /// # let space = AddressSpace::tracked(Granule::K4);
    /// # space.map(0..1 << 20, 0, Access::ReadWrite)?;
    /// let ram = (0..1 << 20).to_iova_range()?;
    /// let request = HarvestRequest::new(ram, Granule::K4);
    /// space.mark(0x3000..0x9000)?;
    /// let mut seen = [0; 4];
    /// let seen = space.peek(&request, UserBitmap::new(&mut seen))?;
    /// // Just before these pages are copied:
    /// let first = seen.part((0..0x5000).to_iova_range()?).ok_or(dirtymap::RangeError::ZeroLength {
    ///     start: 0.into(),
    /// })?;
    /// let mut words = [0; 4];
    /// let lease = space.harvest(&request.masked(first), UserBitmap::new(&mut words))?;
    /// assert_eq!(lease.sync()?.commit().bits_set, 2);
    /// # Ok(())
    /// # }
    /// ```
    #[must_use]
    #[doc(alias = "KVM_CLEAR_DIRTY_LOG")]
    pub const fn masked<'n>(self, mask: BitmapView<'n>) -> HarvestRequest<'n>
    where
        'm: 'n,
    {
        HarvestRequest {
            mask: Some(mask),
            ..self
        }
    }

    /// Begins at `from`, a multiple of the granule and of
    /// [`alignment`](crate::AddressSpace::alignment). Bit 0 of the bitmap is still the first
    /// granule of the range, so the harvests of a pass can share one bitmap, one after the other.
    #[must_use]
    pub const fn resume_at(mut self, from: Iova) -> Self {
        self.from = Some(from);
        self
    }

    /// Ends when the harvest has turned `bits` bits of the user's bitmap from 0 to 1. It may be up
    /// to 63 more, and as many more as one page of the [largest
    /// source](crate::AddressSpace::alignment) has bits.
    ///
    /// Each harvest looks at some granules at least, even with the tightest bounds. So a consumer
    /// that goes on until [`Lease::next`](crate::Lease::next) is `None` has seen the whole range,
    /// and pages at its beginning that are written all the time do not prevent that.
    ///
    /// ```
    /// # use dirtymap::{Access, AddressSpace, Granule, HarvestRequest, ToIovaRange, UserBitmap};
    /// # fn main() -> Result<(), dirtymap::Error> {
    /// # let space = AddressSpace::tracked(Granule::K4);
    /// # space.map(0..1 << 20, 0, Access::ReadWrite)?;
    /// let ram = (0..1 << 20).to_iova_range()?;
    /// let request = HarvestRequest::new(ram, Granule::K4).max_bits(64);
    /// space.mark(0..1 << 20)?;
    /// let (mut next, mut bits) = (Some(ram.start()), 0);
    /// while let Some(from) = next {
    ///     let mut words = [0; 4];
    ///     let lease = space.harvest(&request.resume_at(from), UserBitmap::new(&mut words))?;
    ///     next = lease.next();
    ///     bits += lease.sync()?.commit().bits_set;
    /// }
    /// assert_eq!(bits, 256);
    /// # Ok(())
    /// # }
    /// ```
    #[must_use]
    pub const fn max_bits(mut self, bits: u64) -> Self {
        self.bits = Some(bits);
        self
    }

    /// Ends at `deadline`, or as soon after it as 32768 more bits are looked at. The first look
    /// comes before that, as with [`max_bits`](Self::max_bits).
    #[must_use]
    pub const fn until(mut self, deadline: Instant) -> Self {
        self.deadline = Some(deadline);
        self
    }

    /// Records the backing addresses of the pages at the time when they were written, for
    /// [`Lease::backing`](crate::Lease::backing). Takes memory for each area that is walked or that
    /// is unmapped meanwhile, and two short locks, for which unmaps wait as well. The harvest is
    /// walked by the calling thread, also if it is parallel.
    #[must_use]
    pub const fn with_backing(mut self) -> Self {
        self.backing = true;
        self
    }

    /// Walks by the threads of the current rayon pool (`pool.install(..)`), or of the global one. A
    /// harvest with a mask or a bound is still walked by the calling thread.
    ///
    /// Useful for tables that are scattered in memory, or if a tenth of the pages or more are
    /// dirty. One thread reads a clean range at the speed of memory, unless one core cannot use the
    /// whole bandwidth. Allocates some bytes for each 262144 bits of the request, at most a few
    /// megabytes.
    #[cfg(all(feature = "rayon", not(dirtymap_loom)))]
    #[must_use]
    pub const fn parallel(mut self) -> Self {
        self.parallel = true;
        self
    }

    /// The range of the request.
    pub const fn range(&self) -> IovaRange {
        self.range
    }

    /// The bytes of one bit.
    pub const fn granule(&self) -> Granule {
        self.granule
    }

    /// The scope of the request.
    pub const fn scope(&self) -> Scope {
        self.scope
    }

    pub(super) const fn on_hole(&self) -> Holes {
        self.holes
    }

    pub(super) const fn mask(&self) -> Option<&BitmapView<'m>> {
        self.mask.as_ref()
    }

    /// Where to begin.
    pub(super) const fn from(&self) -> Iova {
        match self.from {
            Some(from) => from,
            None => self.range.start(),
        }
    }

    const fn is_bounded(&self) -> bool {
        self.bits.is_some() || self.deadline.is_some()
    }

    #[cfg(all(feature = "rayon", not(dirtymap_loom)))]
    pub(super) const fn is_parallel(&self) -> bool {
        self.parallel && !self.backing && !self.is_bounded() && self.mask.is_none()
    }

    /// The bits of the first step, which is made whatever the bounds; `None` for all there are.
    pub(super) fn first_step(&self) -> Option<u64> {
        let bounded = self.is_bounded();
        bounded.then(|| self.step(0).unwrap_or(MIN_STEP))
    }

    /// The bits of the next step of a bounded harvest that has set `taken` bits; `None` if a bound
    /// is reached.
    pub(super) fn step(&self, taken: u64) -> Option<u64> {
        if self
            .deadline
            .is_some_and(|deadline| Instant::now() >= deadline)
        {
            return None;
        }
        match self.bits {
            None => Some(CHUNK_BITS),
            Some(bits) => {
                let left = bits.saturating_sub(taken);
                (left > 0).then(|| left.clamp(MIN_STEP, CHUNK_BITS))
            }
        }
    }
}
