//! Harvests in instalments: so many dirty granules, or so much time, at a time.

use std::time::Instant;

use super::lease::Holding;
use super::{HarvestError, HarvestRequest, Lease, Owed};
use crate::bitmap::{CHUNK_BITS, UserBitmap};
use crate::error::Error;
use crate::space::AddressSpace;
use crate::units::{Iova, IovaRange};

/// Bits that a bounded harvest looks at before it looks at its bounds, at least: one word.
const MIN_STEP: u64 = 64;

/// When a bounded harvest stops. Without a bound it goes to the end of the request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HarvestBounds {
    bits: Option<u64>,
    deadline: Option<Instant>,
}

impl HarvestBounds {
    /// No bounds.
    pub const fn new() -> Self {
        HarvestBounds {
            bits: None,
            deadline: None,
        }
    }

    /// Stops when the harvest has turned `bits` bits of the user's bitmap from 0 to 1. It may be up
    /// to 63 more, and as many more as one page of the [largest
    /// source](crate::AddressSpace::alignment) has bits.
    #[must_use]
    pub const fn bits(mut self, bits: u64) -> Self {
        self.bits = Some(bits);
        self
    }

    /// Stops at `deadline`, or as soon after it as 32768 more bits are looked at.
    #[must_use]
    pub const fn until(mut self, deadline: Instant) -> Self {
        self.deadline = Some(deadline);
        self
    }

    /// The bits to look at next; `None` if a bound is reached.
    fn step(&self, taken: u64) -> Option<u64> {
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

/// One instalment.
#[derive(Debug)]
#[must_use = "a lease that is dropped puts everything back: sync it, copy its pages, commit it"]
pub struct BoundedHarvest<'a> {
    /// What was taken. Its range ends below `next`.
    pub lease: Lease<'a, Owed>,
    /// Where to go on, a multiple of the request's granule and of
    /// [`alignment`](AddressSpace::alignment); `None` when the end of the request was reached.
    pub next: Option<Iova>,
}

impl AddressSpace {
    /// As [`harvest`](Self::harvest), but begins at `from` and stops at a bound: the next call goes on at
    /// [`next`](BoundedHarvest::next). Bit 0 of the bitmap is still the first granule of the request, so the calls of a pass can
    /// share one bitmap, one after the other.
    ///
    /// Each call looks at some granules at least, however tight the bounds: who goes on until `next` is `None` has seen the
    /// whole request, and pages that are written all the time at its beginning do not keep it from its end.
    ///
    /// # Errors
    /// As [`harvest`](Self::harvest), the first of them [`Error::BadCursor`] if `from` is not the
    /// start of a granule inside the request, and a multiple of [`alignment`](Self::alignment): the
    /// larger of the two is in the error. A domain that was attached since the last instalment can
    /// raise it; then go on at the next lower multiple.
    pub fn harvest_bounded<'a>(
        &'a self,
        request: &HarvestRequest,
        from: Iova,
        bounds: HarvestBounds,
        bitmap: UserBitmap<'a>,
    ) -> Result<BoundedHarvest<'a>, HarvestError<'a>> {
        let range = request.range();
        let snapshot = self.snapshot();
        // Steps end at pages of all sources: none of them is cut.
        let granule = request.granule().max(snapshot.alignment());
        if !range.contains(from) || !from.is_aligned(granule) {
            return Err(HarvestError::Refused(Error::BadCursor {
                at: from,
                range,
                granule,
            }));
        }
        let (bound, covered) = self
            .check(request, bitmap, &snapshot)
            .map_err(HarvestError::Refused)?;
        // Never empty: both ends are granules of the request.
        let bound = bound.part(IovaRange::new(from, range.last()).unwrap_or(range));
        let mut holding = Holding::begin(self, bound.view(), covered);
        let mut sink = bound.into_sink();
        let mut next = Some(from);
        let mut step = Some(bounds.step(0).unwrap_or(MIN_STEP));
        while let (Some(start), Some(bits)) = (next, step) {
            let bytes = u128::from(bits) << request.granule().lg2();
            let end = u128::from(start.get()) + bytes - 1;
            let last = u64::try_from(end).map_or(Iova::MAX, Iova::new);
            let last = last.granule_last(granule).min(range.last());
            // Never empty: a step has one bit at least.
            let part = IovaRange::new(start, last).unwrap_or(range);
            if let Err(stopped) = self.walk(&mut holding, &snapshot, part, &mut sink) {
                holding.walked(&snapshot);
                return Err(holding.stopped(stopped, &sink));
            }
            next = last.checked_add(1).filter(|next| *next <= range.last());
            step = bounds.step(sink.bits_set());
        }
        holding.walked(&snapshot);
        if let Some(next) = next {
            // `next` lies above `from`: a step was made.
            holding.end_at(Iova::new(next.get() - 1));
        }
        Ok(BoundedHarvest {
            lease: holding.into_lease(&sink),
            next,
        })
    }
}
