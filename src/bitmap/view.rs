//! A user bitmap through one request, which gives each bit its address.

use super::window::Backing;
use crate::units::{Granule, Iova, IovaRange};

/// A user bitmap as one request sees it: which address each bit stands for, and where the request
/// ends.
///
/// ```
/// use dirtymap::{Granule, ToIovaRange, UserBitmap};
///
/// # fn main() -> Result<(), dirtymap::Error> {
/// let mut words = [0b1011];
/// let view = UserBitmap::new(&mut words).view((0..64 << 12).to_iova_range()?, Granule::K4)?;
/// assert_eq!(view.count(), 3);
/// assert!(view.bits().eq([0, 1, 3]));
/// assert!(view.runs().eq([(0..0x2000).to_iova_range()?, (0x3000..0x4000).to_iova_range()?]));
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Copy, Debug)]
pub struct BitmapView<'a> {
    pub(super) backing: Backing<'a>,
    pub(super) shift: u64,
    pub(super) range: IovaRange,
    pub(super) granule: Granule,
}

impl<'a> BitmapView<'a> {
    /// The addresses that the bits of the view stand for.
    pub fn range(&self) -> IovaRange {
        self.range
    }

    /// The bytes that one bit stands for.
    pub fn granule(&self) -> Granule {
        self.granule
    }

    /// The view of the granules that lie inside `range` as a whole, over the same bits of the
    /// bitmap. `None` if there are none. Numbers of words and bits count from the first of them.
    pub fn part(&self, range: IovaRange) -> Option<BitmapView<'a>> {
        let (first, last) = self.positions_within(range)?;
        Some(BitmapView {
            range: self.addresses(first - self.shift, last - self.shift),
            shift: first,
            ..*self
        })
    }

    pub(super) fn backing(&self) -> Backing<'a> {
        self.backing
    }

    /// The position of bit 0 in the row of words; see [`window`](super::window).
    #[inline]
    pub(super) fn shift(&self) -> u64 {
        self.shift
    }

    /// The number of the last bit.
    pub fn last_bit(&self) -> u64 {
        (self.range.last().get() - self.range.start().get()) >> self.granule.lg2()
    }

    /// The view of `part`, which the caller knows to be made of whole granules of this one.
    pub(crate) fn narrowed(&self, part: IovaRange) -> BitmapView<'a> {
        debug_assert!(
            self.range.covers(part) && part.is_aligned(self.granule),
            "{part} is no part of {} in granules of {}",
            self.range,
            self.granule
        );
        BitmapView {
            range: part,
            shift: self.positions(part).0,
            ..*self
        }
    }

    pub(super) fn last_position(&self) -> u64 {
        self.last_bit() + self.shift
    }

    /// The positions of the bits that `inside`, a part of the range, touches.
    #[inline]
    pub(super) fn positions(&self, inside: IovaRange) -> (u64, u64) {
        let base = self.range.start().get();
        let at = |iova: Iova| ((iova.get() - base) >> self.granule.lg2()) + self.shift;
        (at(inside.start()), at(inside.last()))
    }

    /// The positions of the bits that lie within `range` as a whole.
    pub(super) fn positions_within(&self, range: IovaRange) -> Option<(u64, u64)> {
        let inside = range.intersection(self.range)?;
        let (first, last) = self.positions(inside);
        // The range starts and ends at granules, so rounding in cannot leave it.
        let first = first + u64::from(!inside.start().is_aligned(self.granule));
        let cut = inside.last().granule_last(self.granule) != inside.last();
        let last = last.checked_sub(u64::from(cut))?;
        (first <= last).then_some((first, last))
    }

    /// The last address of the bits that lie in the same `bits` bits of the row as the one of
    /// `start`; `bits` is a multiple of 64, so pieces that are cut there share no words.
    #[cfg(all(feature = "rayon", not(dirtymap_loom)))]
    pub(crate) fn piece_last(&self, start: Iova, bits: u64) -> Iova {
        let bit = (start.get() - self.range.start().get()) >> self.granule.lg2();
        let last = ((bit + self.shift) / bits + 1) * bits - 1 - self.shift;
        self.addresses(bit, last.min(self.last_bit())).last()
    }

    /// The addresses of the bits `first..=last`.
    pub(crate) fn addresses(&self, first: u64, last: u64) -> IovaRange {
        let base = self.range.start().get();
        let start = Iova::new(base + (first << self.granule.lg2()));
        let last = Iova::new(base + (last << self.granule.lg2()) + self.granule.mask());
        IovaRange::ascending(start, last)
    }
}
