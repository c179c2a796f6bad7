//! The sink, into which a source records dirty pages.

use super::BitmapView;
use super::window::Window;
use crate::chunkmap::Place;
use crate::error::{BitmapError, Error};
use crate::units::{Granule, Iova, IovaRange};
use crate::words::{word_mask, word_masks, word_runs};

impl<'a> BitmapView<'a> {
    /// A sink that records into this view.
    pub fn sink(&self) -> Sink<'a> {
        Sink::new(*self, false)
    }
}

/// Receives the dirty pages of a source during one harvest.
///
/// The source calls [`record`](Sink::record) **before** it clears the state that told it so.
///
/// ```
/// use dirtymap::{Granule, Iova, ToIovaRange, UserBitmap};
///
/// # fn main() -> Result<(), dirtymap::Error> {
/// let mut words = [0];
/// let view = UserBitmap::new(&mut words).view((0..64 << 12).to_iova_range()?, Granule::K4)?;
/// let mut sink = view.sink();
/// sink.record((0x2ffe..0x3002).to_iova_range()?)?; // a write that touches two pages
/// sink.record_mask(Iova::new(0x8000), Granule::K4, 0b11)?; // two pages of a log
/// assert_eq!(sink.bits_set(), 4);
/// assert_eq!(words, [0b11_0000_1100]);
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Sink<'a> {
    view: BitmapView<'a>,
    /// The part of the view into which pages are recorded.
    limit: IovaRange,
    window: Window<'a>,
    /// Whether no other thread writes to the bits meanwhile.
    exclusive: bool,
    bits_set: u64,
    windows: u64,
    /// The first word of the lowest window that was opened.
    bottom: u64,
    /// The first word above every window that was opened.
    top: u64,
}

impl<'a> Sink<'a> {
    pub(super) fn new(view: BitmapView<'a>, exclusive: bool) -> Self {
        Sink {
            limit: view.range(),
            view,
            window: Window::none(),
            exclusive,
            bits_set: 0,
            windows: 0,
            bottom: u64::MAX,
            top: 0,
        }
    }

    /// The addresses that can be recorded. Other addresses are clipped.
    pub fn range(&self) -> IovaRange {
        self.limit
    }

    /// The bytes that one bit stands for.
    pub(crate) fn granule(&self) -> Granule {
        self.view.granule()
    }

    /// Restricts the sink to `part` from now on.
    pub(crate) fn limit_to(&mut self, part: IovaRange) {
        if let Some(inside) = part.intersection(self.view.range()) {
            self.limit = inside;
        }
    }

    /// The number of bits that this sink has changed from 0 to 1.
    pub fn bits_set(&self) -> u64 {
        self.bits_set
    }

    /// Windows of the user's bitmap that this sink opened.
    pub fn windows(&self) -> u64 {
        self.windows
    }

    /// The last address that may have been recorded; `None` if nothing was.
    pub(crate) fn recorded_to(&self) -> Option<Iova> {
        let position = self.top.saturating_mul(64).checked_sub(1)?;
        let bit = position.min(self.view.last_position()) - self.view.shift();
        Some(self.view.addresses(bit, bit).last())
    }

    /// The addresses that may have been recorded; `None` if nothing was.
    pub(crate) fn recorded_in(&self) -> Option<IovaRange> {
        let first = self.bottom.saturating_mul(64).max(self.view.shift()) - self.view.shift();
        let last = self.recorded_to()?;
        let start = self.view.addresses(first, first).start();
        IovaRange::new(start.min(last), last).ok()
    }

    /// Records `range` as dirty: sets each bit whose granule it touches, and none outside the
    /// request.
    ///
    /// # Errors
    /// None for bitmaps in memory. For a file [`BitmapError::Shrank`], [`BitmapError::Window`] or
    /// [`BitmapError::NoSpace`], if the next window cannot be mapped or filled; then a part of
    /// `range` may be recorded, and the caller must leave the dirty state as it is.
    #[doc(alias = "iova_bitmap_set")]
    #[inline]
    pub fn record(&mut self, range: IovaRange) -> Result<(), Error> {
        Ok(self.put(range)?)
    }

    /// Records the pages of `mask`: bit `n` stands for the page `n` of size `page` after `start`.
    ///
    /// # Errors
    /// As [`record`](Sink::record).
    #[inline]
    pub fn record_mask(&mut self, start: Iova, page: Granule, mask: u64) -> Result<(), Error> {
        Ok(self.put_mask(start, page, mask)?)
    }

    /// As [`record`](Self::record), with the bitmap's own error.
    #[inline]
    pub(crate) fn put(&mut self, range: IovaRange) -> Result<(), BitmapError> {
        let Some(inside) = range.intersection(self.limit) else {
            return Ok(());
        };
        let (first, last) = self.view.positions(inside);
        if first / 64 == last / 64 {
            return self.or(
                first / 64,
                word_mask((first % 64) as u32, (last % 64) as u32),
            );
        }
        for (word, mask) in word_masks(first, last) {
            self.or(word, mask)?;
        }
        Ok(())
    }

    /// As [`record_mask`](Self::record_mask), with the bitmap's own error.
    #[inline(always)]
    pub(crate) fn put_mask(
        &mut self,
        start: Iova,
        page: Granule,
        mask: u64,
    ) -> Result<(), BitmapError> {
        let limit = self.limit;
        // Pages of more than 2^58 bytes: 64 of them do not fit the address space.
        let end = (page.lg2() <= 58)
            .then(|| start.checked_add((63 << page.lg2()) + page.mask()))
            .flatten();
        if page == self.view.granule()
            && start.is_aligned(page)
            && start >= limit.start()
            && end.is_some_and(|end| end <= limit.last())
        {
            // All 64 pages lie inside and are bits of their own: the mask as it is, shifted across
            // two words.
            let base = self.view.range().start().get();
            let bit = ((start.get() - base) >> page.lg2()) + self.view.shift();
            self.or(bit / 64, mask << (bit % 64))?;
            if !bit.is_multiple_of(64) {
                self.or(bit / 64 + 1, mask >> (64 - bit % 64))?;
            }
            return Ok(());
        }
        self.put_each(start, page, mask)
    }

    /// As [`put_mask`](Self::put_mask), if the 64 pages from `start` on lie inside of
    /// [`range`](Self::range) and are one word, in a window that is open and that no other thread
    /// writes to. Else does nothing and returns false. `mask` has `count` bits set.
    #[inline(always)]
    pub(crate) fn put_word(&mut self, start: Iova, page: Granule, mask: u64, count: u32) -> bool {
        // Pages of more than 2^57 bytes: 64 of them do not fit the address space.
        let bytes = || (63 << page.lg2()) + page.mask();
        let end = (page.lg2() <= 57).then(|| start.checked_add(bytes()));
        let inside = start >= self.limit.start()
            && end.flatten().is_some_and(|end| end <= self.limit.last());
        if !inside || !start.is_aligned(page) {
            return false;
        }
        let Some(word) = self.first_word(start, page) else {
            return false;
        };
        let Some(set) = self.place(word, 1).record_first(mask) else {
            return false;
        };
        // In a bitmap that was clean, the count is that of the mask.
        let bits = if set == mask { count } else { set.count_ones() };
        self.bits_set += u64::from(bits);
        true
    }

    /// As [`put_mask`](Self::put_mask), run by run.
    #[cold]
    fn put_each(&mut self, start: Iova, page: Granule, mask: u64) -> Result<(), BitmapError> {
        for (first, last) in word_runs(mask) {
            let address = |pages: u32| u128::from(start.get()) + (u128::from(pages) << page.lg2());
            let Ok(from) = u64::try_from(address(first)) else {
                break; // past the end of the address space
            };
            let to = u64::try_from(address(last + 1) - 1).unwrap_or(u64::MAX);
            self.put(IovaRange::ascending(Iova::new(from), Iova::new(to)))?;
        }
        Ok(())
    }

    /// Whether recording may fail.
    #[inline]
    pub(crate) fn may_fail(&self) -> bool {
        self.view.backing().may_fail()
    }

    /// Opens the window for `range`, if one window holds all of it. Then records there do not fail
    /// until another window is opened. Returns whether it did.
    ///
    /// # Errors
    /// As [`record`](Sink::record).
    pub(crate) fn secure(&mut self, range: IovaRange) -> Result<bool, BitmapError> {
        let Some(inside) = range.intersection(self.limit) else {
            return Ok(true);
        };
        let (first, last) = self.view.positions(inside);
        if !self.window.holds(first / 64) {
            self.open(first / 64)?;
        }
        Ok(self.window.holds(last / 64))
    }

    /// If words of pages of size `page`, the first of which is the page at `base`, are words of the
    /// bitmap: which one the first of them is, modulo 2^64.
    pub(crate) fn first_word(&self, base: Iova, page: Granule) -> Option<u64> {
        let number = |iova: Iova| iova.get() >> page.lg2();
        let bit = number(base)
            .wrapping_sub(number(self.view.range().start()))
            .wrapping_add(self.view.shift());
        // There are more single bytes than a signed number can count.
        (page == self.view.granule() && page.lg2() > 0 && bit.is_multiple_of(64))
            .then_some((bit.cast_signed() >> 6).cast_unsigned())
    }

    /// Sets the bits of `mask` in `word`, if there are any; they lie in [`range`](Self::range).
    ///
    /// # Errors
    /// As [`record`](Sink::record).
    #[inline(always)]
    pub(crate) fn or(&mut self, word: u64, mask: u64) -> Result<(), BitmapError> {
        if mask != 0 {
            if !self.window.holds(word) {
                self.open(word)?;
            }
            let set = match self.exclusive {
                true => self.window.or_alone(word, mask),
                false => self.window.or(word, mask),
            };
            self.bits_set += count(set);
        }
        Ok(())
    }

    /// As [`or`](Self::or), for words from `word` on, by their places and with their masks.
    ///
    /// # Errors
    /// As `or`, and the place of the first word that was not recorded.
    #[inline]
    pub(crate) fn or_words(
        &mut self,
        word: u64,
        masks: impl Iterator<Item = (u16, u64)>,
    ) -> Result<(), (u16, BitmapError)> {
        for (place, mask) in masks {
            let recorded = self.or(word.wrapping_add(u64::from(place)), mask);
            recorded.map_err(|error| (place, error))?;
        }
        Ok(())
    }

    /// Up to `words` words from `word` on, in which bits may be recorded without a call for each,
    /// as long as the caller counts those that were clear: see [`count_set`](Self::count_set).
    /// Empty if other threads record there, or if the window is not open yet.
    #[inline]
    pub(crate) fn place(&self, word: u64, words: u64) -> Place<'_> {
        match self.exclusive {
            true => Place::new(self.window.words(word, words)),
            false => Place::NONE,
        }
    }

    /// Counts `bits` that were recorded in a [`place`](Self::place).
    #[inline]
    pub(crate) fn count_set(&mut self, bits: u64) {
        self.bits_set += bits;
    }

    /// Makes the window that holds `word` the current one.
    #[cold]
    fn open(&mut self, word: u64) -> Result<(), BitmapError> {
        // The old window is closed before the new one is opened, so there is never more than one.
        self.window = Window::none();
        self.window = self
            .view
            .backing()
            .window(word, self.view.last_position())?;
        self.bottom = self.bottom.min(self.window.first());
        self.top = self.top.max(self.window.end());
        self.windows += 1;
        Ok(())
    }
}

/// The number of set bits. Words of dense bitmaps and of almost empty ones take a short path,
/// because not all processors have an instruction for it.
#[inline]
fn count(bits: u64) -> u64 {
    match bits {
        u64::MAX => 64,
        bits if bits & bits.wrapping_sub(1) == 0 => u64::from(bits != 0),
        bits => u64::from(bits.count_ones()),
    }
}
