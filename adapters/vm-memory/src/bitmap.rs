//! A `Bitmap` of vm-memory over a range of an address space.

use std::fmt;

use vm_memory::bitmap::{Bitmap, BitmapSlice, NewBitmap, WithBitmapSlice};

use dirtymap::sync::Arc;
use dirtymap::{
    Access, AddressSpace, AreaHandle, Error, HarvestRequest, Iova, IovaRange, RangeError,
    UserBitmap, WriteGuard,
};

/// A dirty bitmap for a region of guest memory, or for all addresses behind an IOMMU: byte `n` of
/// it is the address `range().start() + n` of a space.
///
/// Marks are those of [`AddressSpace::mark`]: lock-free, without waiting, to be made after the
/// write, as vm-memory does. What lies outside of the range, or in no area, is counted in
/// [`SpaceStats::outside_marks`](dirtymap::space::SpaceStats::outside_marks). Clones mark the same
/// pages.
///
/// `with_len` and `default` make a space of their own: with tracking on and one area from address 0
/// on, in pages of the host's size; and without any area, so that every mark is counted as outside.
#[derive(Clone)]
pub struct SpaceBitmap {
    space: Arc<AddressSpace>,
    range: IovaRange,
    /// The area of `range`, if there was one for all of it: no lookup is needed then.
    area: Option<AreaHandle>,
}

impl SpaceBitmap {
    /// A bitmap over `range` of `space`, in which areas may come and go. [`IovaRange::ALL`] makes
    /// offsets addresses, which is what `IommuMemory` needs.
    ///
    /// If one area holds all of `range` by now, marks need no lookup, and follow this area: once it
    /// is unmapped they are outside, whatever is mapped in its place.
    pub fn new(space: &Arc<AddressSpace>, range: IovaRange) -> Self {
        let area = space.area(range.start());
        SpaceBitmap {
            space: Arc::clone(space),
            range,
            area: area.filter(|area| area.mapping().range.covers(range)),
        }
    }

    /// Maps `range` as an area of `space`, for devices to read and write, and makes a bitmap over
    /// it: one region of guest memory at its guest physical addresses, which are its backing too.
    /// Others may mark, map and harvest meanwhile.
    ///
    /// # Errors
    /// Those of [`AddressSpace::map`].
    pub fn map(space: &Arc<AddressSpace>, range: IovaRange) -> Result<Self, Error> {
        space.map(range, range.start().get(), Access::ReadWrite)?;
        Ok(Self::new(space, range))
    }

    /// The space to harvest.
    pub fn space(&self) -> &Arc<AddressSpace> {
        &self.space
    }

    /// The addresses that the bytes of the bitmap stand for.
    pub fn range(&self) -> IovaRange {
        self.range
    }

    /// Says that a write to `len` bytes from `offset` on is about to begin, past vm-memory: it is
    /// in flight, and its pages are reported by every harvest, until the guard is dropped. See
    /// [`AddressSpace::begin_write`].
    ///
    /// # Errors
    /// [`RangeError::ZeroLength`]; [`Error::Outside`] with the first address that lies outside of
    /// the bitmap or in no area, which is counted.
    pub fn begin_write(&self, offset: usize, len: usize) -> Result<WriteGuard<'_>, Error> {
        let at = Some(offset as u64);
        match self.clip(at, len) {
            Clip {
                inside: Some(range),
                outside: None,
            } => self.space.begin_write(range),
            Clip {
                outside: Some((at, bytes)),
                ..
            } => {
                self.space.report_outside_mark(at, bytes);
                Err(Error::Outside { at })
            }
            _ => Err(Error::Range(RangeError::ZeroLength {
                start: self.address(at).unwrap_or(Iova::MAX),
            })),
        }
    }

    /// The address of the byte `offset`; `None` past 2^64 - 1.
    fn address(&self, offset: Option<u64>) -> Option<Iova> {
        self.range.start().checked_add(offset?)
    }

    /// Cuts the `len` bytes from `offset` on at the end of the bitmap.
    #[inline]
    fn clip(&self, offset: Option<u64>, len: usize) -> Clip {
        let Some(more) = (len as u64).checked_sub(1) else {
            return Clip::default();
        };
        let Some(first) = self.address(offset) else {
            // Past the last address: it has no name of its own.
            return Clip::outside(Iova::MAX, len as u64);
        };
        if first > self.range.last() {
            return Clip::outside(first, len as u64);
        }
        let last = first.checked_add(more);
        let inside = last.unwrap_or(Iova::MAX).min(self.range.last());
        let taken = inside.get() - first.get();
        Clip {
            // Never an error: `inside` lies at or above `first`.
            inside: IovaRange::new(first, inside).ok(),
            outside: (taken < more)
                .then(|| (inside.checked_add(1).unwrap_or(Iova::MAX), more - taken)),
        }
    }

    #[inline]
    fn mark_at(&self, offset: Option<u64>, len: usize) {
        let Clip { inside, outside } = self.clip(offset, len);
        // The code that finds addresses outside counts them, once for each call.
        let counted = inside.is_some_and(|range| match &self.area {
            Some(area) => area.mark(range).is_err(),
            None => self.space.mark(range).is_err(),
        });
        if let Some((at, bytes)) = outside.filter(|_| !counted) {
            self.space.report_outside_mark(at, bytes);
        }
    }

    /// Whether a harvest would report the page. One of which a source cannot tell is dirty.
    fn is_dirty(&self, offset: Option<u64>) -> bool {
        let Some(iova) = self
            .address(offset)
            .filter(|iova| self.range.contains(*iova))
        else {
            return false;
        };
        let granule = self.space.alignment();
        let page = IovaRange::granule_at(iova, granule);
        let mut word = [0];
        let peeked = self.space.peek(
            &HarvestRequest::new(page, granule),
            UserBitmap::new(&mut word),
        );
        match peeked {
            Ok(view) => view.count() > 0,
            // Nothing is tracked here, so there is nothing to report.
            Err(Error::NeverTracked { .. }) => false,
            Err(_) => true,
        }
    }
}

/// What lies inside of a bitmap and, by its first address and length, what does not.
#[derive(Default)]
struct Clip {
    inside: Option<IovaRange>,
    outside: Option<(Iova, u64)>,
}

impl Clip {
    #[cold]
    fn outside(at: Iova, bytes: u64) -> Self {
        Clip {
            inside: None,
            outside: Some((at, bytes)),
        }
    }
}

impl fmt::Debug for SpaceBitmap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SpaceBitmap")
            .field("range", &self.range)
            .finish_non_exhaustive()
    }
}

/// Without any area: every mark is counted as outside.
impl Default for SpaceBitmap {
    fn default() -> Self {
        SpaceBitmap {
            space: Arc::new(AddressSpace::new(dirtymap_host::page())),
            range: IovaRange::ALL,
            area: None,
        }
    }
}

impl NewBitmap for SpaceBitmap {
    fn with_len(len: usize) -> Self {
        let bare = Self::default();
        let Ok(bytes) = IovaRange::from_len(Iova::MIN, len as u64) else {
            return bare;
        };
        let own = Self::map(&bare.space, bytes.round_out(bare.space.page()));
        // A lone area from address 0 on is never refused. If it were, every mark would be counted
        // as outside.
        match own.and_then(|own| own.space.start_tracking().map(|()| own)) {
            Ok(own) => own,
            Err(_) => bare,
        }
    }
}

impl<'a> WithBitmapSlice<'a> for SpaceBitmap {
    type S = SpaceSlice<'a>;
}

impl Bitmap for SpaceBitmap {
    #[inline]
    fn mark_dirty(&self, offset: usize, len: usize) {
        self.mark_at(Some(offset as u64), len);
    }

    fn dirty_at(&self, offset: usize) -> bool {
        self.is_dirty(Some(offset as u64))
    }

    fn slice_at(&self, offset: usize) -> SpaceSlice<'_> {
        SpaceSlice {
            bitmap: self,
            offset: Some(offset as u64),
        }
    }
}

/// A [`SpaceBitmap`] from some byte on. Slices of slices add up, and never wrap.
#[derive(Clone, Debug)]
pub struct SpaceSlice<'a> {
    bitmap: &'a SpaceBitmap,
    /// `None` past 2^64 - 1.
    offset: Option<u64>,
}

impl SpaceSlice<'_> {
    fn offset(&self, more: usize) -> Option<u64> {
        self.offset?.checked_add(more as u64)
    }
}

impl WithBitmapSlice<'_> for SpaceSlice<'_> {
    type S = Self;
}

impl BitmapSlice for SpaceSlice<'_> {}

impl Bitmap for SpaceSlice<'_> {
    #[inline]
    fn mark_dirty(&self, offset: usize, len: usize) {
        self.bitmap.mark_at(self.offset(offset), len);
    }

    fn dirty_at(&self, offset: usize) -> bool {
        self.bitmap.is_dirty(self.offset(offset))
    }

    fn slice_at(&self, offset: usize) -> Self {
        SpaceSlice {
            bitmap: self.bitmap,
            offset: self.offset(offset),
        }
    }
}
