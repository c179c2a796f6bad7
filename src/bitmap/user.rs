//! The bitmap that a caller hands to a harvest, its view through one request, and the sink that records into it.

use super::{Runs, WINDOW_BITS, word_masks, word_runs};
use crate::error::Error;
use crate::sync::{AtomicU64, Ordering};
use crate::units::{Granule, Iova, IovaRange};

/// Memory of the caller that receives dirty bits. It carries its length; no bit outside a request is ever written.
///
/// Several harvests may record into one shared bitmap at a time: bits are OR-ed in atomically.
#[derive(Clone, Copy, Debug)]
pub struct UserBitmap<'a> {
    words: &'a [AtomicU64],
}

impl<'a> UserBitmap<'a> {
    /// A bitmap in words that are the caller's alone for as long as the lease lives.
    #[cfg(not(dirtymap_loom))]
    pub fn new(words: &'a mut [u64]) -> Self {
        let (first, len) = (words.as_mut_ptr().cast::<AtomicU64>(), words.len());
        // SAFETY:
        // - valid for `len` elements of `AtomicU64`: it has the size and bit validity of `u64`, and an alignment of
        //   8, which the `u64`s of every target with 64-bit atomics that we build for have (checked below at
        //   compile time).
        // - shared access only through atomics for `'a`: the caller's exclusive borrow ends with `'a`.
        let words = unsafe { std::slice::from_raw_parts(first, len) };
        const { assert!(align_of::<u64>() == align_of::<AtomicU64>()) };
        UserBitmap { words }
    }

    /// A bitmap in words that others may OR into at the same time.
    ///
    /// Nobody may clear bits of a request's range while the lease of that request lives.
    pub fn shared(words: &'a [AtomicU64]) -> Self {
        UserBitmap { words }
    }

    /// How many bits the bitmap holds.
    pub fn bits(&self) -> u64 {
        (self.words.len() as u64).saturating_mul(64)
    }

    /// Binds the bitmap to a request: bit 0 is `range`'s first granule.
    ///
    /// # Errors
    /// In this order: [`Error::Unaligned`] if `range` does not start and end at multiples of `granule`,
    /// [`Error::BitmapTooShort`] if the bitmap has fewer bits than `range` has granules.
    pub fn view(self, range: IovaRange, granule: Granule) -> Result<BitmapView<'a>, Error> {
        if !range.is_aligned(granule) {
            return Err(Error::Unaligned { range, granule });
        }
        let needed = range.granules(granule);
        if needed > u128::from(self.bits()) {
            return Err(Error::BitmapTooShort {
                bits: self.bits(),
                needed,
                range,
                granule,
            });
        }
        Ok(BitmapView {
            words: self.words,
            range,
            granule,
        })
    }
}

/// A user bitmap as one request sees it: which address each bit stands for, and where the request ends.
#[derive(Clone, Copy, Debug)]
pub struct BitmapView<'a> {
    words: &'a [AtomicU64],
    range: IovaRange,
    granule: Granule,
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

    /// The maximal runs of dirty granules, in order.
    pub fn runs(&self) -> Runs<'a> {
        Runs::new(*self)
    }

    /// How many bits of the view are set.
    pub fn count(&self) -> u64 {
        word_masks(0, self.last_bit())
            .map(|(word, mask)| u64::from((self.word(word) & mask).count_ones()))
            .sum()
    }

    /// A sink that records into this view.
    pub fn sink(&self) -> Sink<'a> {
        Sink {
            view: *self,
            limit: self.range,
            window: &[],
            window_first: 0,
            bits_set: 0,
            windows: 0,
        }
    }

    pub(super) fn last_bit(&self) -> u64 {
        (self.range.last().get() - self.range.start().get()) >> self.granule.lg2()
    }

    pub(super) fn word(&self, index: u64) -> u64 {
        // Relaxed: whoever may read the view owns the lease or the bitmap, which orders it after the harvest.
        u64::from_le(self.words[index as usize].load(Ordering::Relaxed))
    }

    /// The addresses of the bits `first..=last`.
    pub(super) fn addresses(&self, first: u64, last: u64) -> IovaRange {
        let base = self.range.start().get();
        let start = Iova::new(base + (first << self.granule.lg2()));
        let last = Iova::new(base + (last << self.granule.lg2()) + self.granule.mask());
        IovaRange::new(start, last).unwrap_or(self.range)
    }
}

/// What a dirty source writes its findings into during one harvest.
///
/// The source calls [`record`](Sink::record) **before** it clears the state that told it so.
#[derive(Debug)]
pub struct Sink<'a> {
    view: BitmapView<'a>,
    /// What lies outside is not recorded. Inside the view.
    limit: IovaRange,
    window: &'a [AtomicU64],
    window_first: u64,
    bits_set: u64,
    windows: u64,
}

impl<'a> Sink<'a> {
    /// The addresses that can be recorded; everything else is clipped.
    pub fn range(&self) -> IovaRange {
        self.limit
    }

    /// Records nothing outside `part` from now on.
    pub(crate) fn limit_to(&mut self, part: IovaRange) {
        if let Some(inside) = part.intersection(self.view.range) {
            self.limit = inside;
        }
    }

    /// Bits that this sink turned from 0 to 1.
    pub fn bits_set(&self) -> u64 {
        self.bits_set
    }

    /// Windows of the user's bitmap that this sink opened.
    pub fn windows(&self) -> u64 {
        self.windows
    }

    /// Records `range` as dirty: sets each bit whose granule it touches, and none outside the request.
    ///
    /// # Errors
    /// None for bitmaps in memory. Where a window of the bitmap has to be mapped first, the error of that; then the
    /// caller must leave the dirty state as it is.
    #[inline]
    pub fn record(&mut self, range: IovaRange) -> Result<(), Error> {
        let Some(inside) = range.intersection(self.limit) else {
            return Ok(());
        };
        let base = self.view.range.start().get();
        let lg2 = self.view.granule.lg2();
        let first = (inside.start().get() - base) >> lg2;
        let last = (inside.last().get() - base) >> lg2;
        if first / 64 == last / 64 {
            self.or(
                first / 64,
                super::word_mask((first % 64) as u32, (last % 64) as u32),
            );
            return Ok(());
        }
        let mut from = first;
        while from <= last {
            self.open(from);
            let to = last.min(self.window_first + WINDOW_BITS - 1);
            for (word, mask) in word_masks(from, to) {
                self.set(word, mask);
            }
            from = to + 1;
        }
        Ok(())
    }

    /// Records the pages of `mask`: bit `n` stands for the page `n` of size `page` after `start`.
    ///
    /// # Errors
    /// As [`record`](Sink::record).
    #[inline]
    pub fn record_mask(&mut self, start: Iova, page: Granule, mask: u64) -> Result<(), Error> {
        let limit = self.limit;
        // Pages of more than 2^58 bytes: 64 of them do not fit the address space.
        let end = (page.lg2() <= 58)
            .then(|| start.checked_add((63 << page.lg2()) + page.mask()))
            .flatten();
        if page == self.view.granule
            && start.is_aligned(page)
            && start >= limit.start()
            && end.is_some_and(|end| end <= limit.last())
        {
            // All 64 pages lie inside and are bits of their own: the mask as it is, shifted across two words.
            let bit = (start.get() - self.view.range.start().get()) >> page.lg2();
            self.or(bit / 64, mask << (bit % 64));
            if !bit.is_multiple_of(64) {
                self.or(bit / 64 + 1, mask >> (64 - bit % 64));
            }
            return Ok(());
        }
        for (first, last) in word_runs(mask) {
            let address = |pages: u32| u128::from(start.get()) + (u128::from(pages) << page.lg2());
            let Ok(from) = u64::try_from(address(first)) else {
                break; // past the end of the address space
            };
            let to = u64::try_from(address(last + 1) - 1).unwrap_or(u64::MAX);
            self.record(IovaRange::new(Iova::new(from), Iova::new(to))?)?;
        }
        Ok(())
    }

    /// Sets the bits of `mask` in `word`, if there are any.
    #[inline]
    fn or(&mut self, word: u64, mask: u64) {
        if mask != 0 {
            self.open(word * 64);
            self.set(word, mask);
        }
    }

    /// Makes the window that holds `bit` the current one.
    #[inline]
    fn open(&mut self, bit: u64) {
        if self.windows > 0 && bit / WINDOW_BITS == self.window_first / WINDOW_BITS {
            return;
        }
        self.window_first = bit / WINDOW_BITS * WINDOW_BITS;
        let from = (self.window_first / 64) as usize;
        let to = self
            .view
            .words
            .len()
            .min(from + (WINDOW_BITS / 64) as usize);
        self.window = &self.view.words[from..to];
        self.windows += 1;
    }

    #[inline]
    fn set(&mut self, word: u64, mask: u64) {
        let slot = &self.window[(word - self.window_first / 64) as usize];
        // Relaxed: the OR only has to be atomic with those of other harvests; the lease hands the result over.
        let old = slot.fetch_or(mask.to_le(), Ordering::Relaxed);
        self.bits_set += u64::from((mask & !u64::from_le(old)).count_ones());
    }
}

#[cfg(all(test, not(dirtymap_loom)))]
#[allow(clippy::unwrap_used)] // helpers of tests
mod tests {
    use super::*;

    fn range(start: u64, len: u64) -> IovaRange {
        IovaRange::from_len(Iova::new(start), len).unwrap()
    }

    #[test]
    fn never_a_bit_outside_the_request() {
        let pages = 77;
        let request = range(0x10_0000, pages * 4096);
        for first in 0..pages + 4 {
            for len in 1..20 {
                let mut words = vec![0u64; 4];
                words[1] |= 1 << 63; // bit 127: set by somebody else, past the request
                let view = UserBitmap::new(&mut words)
                    .view(request, Granule::K4)
                    .unwrap();
                let mut sink = view.sink();
                sink.record(range(0x10_0000 - 2 * 4096 + first * 4096, len * 4096))
                    .unwrap();
                let set = sink.bits_set();
                let expect: Vec<u64> = (first..first + len)
                    .filter_map(|b| b.checked_sub(2))
                    .filter(|b| *b < pages)
                    .collect();
                assert_eq!(set, expect.len() as u64);
                assert_eq!(view.count(), set);
                let got: Vec<u64> = (0..256)
                    .filter(|b| words[b / 64] >> (b % 64) & 1 == 1)
                    .map(|b| b as u64)
                    .collect();
                let mut all = expect.clone();
                all.push(127);
                assert_eq!(got, all);
            }
        }
    }

    #[test]
    fn a_record_longer_than_a_window_is_recorded_whole() {
        // History: a leaf that straddled the pinned window lost its tail, or wrote behind the window (Linux
        // 2780025e01e2, a4ab7dedaee0). One bit a byte makes three windows out of 48 MiB.
        let byte = Granule::from_bytes(1).unwrap();
        let len = 3 * WINDOW_BITS;
        let mut words = vec![0u64; (len / 64) as usize];
        let view = UserBitmap::new(&mut words)
            .view(range(0, len), byte)
            .unwrap();
        let mut sink = view.sink();
        sink.record(range(WINDOW_BITS - 5, WINDOW_BITS + 10))
            .unwrap();
        assert_eq!((sink.bits_set(), sink.windows()), (WINDOW_BITS + 10, 3));
        let runs: Vec<_> = view.runs().collect();
        assert_eq!(runs, [range(WINDOW_BITS - 5, WINDOW_BITS + 10)]);
    }

    #[test]
    fn coarse_bits_swallow_fine_pages_and_fine_bits_fill() {
        let mut words = [0u64; 1];
        let view = UserBitmap::new(&mut words)
            .view(range(0, 4 << 21), Granule::M2)
            .unwrap();
        view.sink().record(range((1 << 21) + 4096, 4096)).unwrap();
        assert_eq!(words[0], 0b10);
        let mut words = [0u64; 1];
        let half = Granule::from_bytes(2048).unwrap();
        let view = UserBitmap::new(&mut words)
            .view(range(0, 8192), half)
            .unwrap();
        view.sink()
            .record_mask(Iova::MIN, Granule::K4, 0b10)
            .unwrap();
        assert_eq!(words[0], 0b1100);
    }

    #[test]
    fn a_bitmap_that_is_short_by_one_bit_is_refused() {
        let mut words = [0u64; 2];
        let bitmap = UserBitmap::new(&mut words);
        assert!(bitmap.view(range(0, 128 * 4096), Granule::K4).is_ok());
        assert!(matches!(
            bitmap.view(range(0, 129 * 4096), Granule::K4),
            Err(Error::BitmapTooShort {
                bits: 128,
                needed: 129,
                ..
            })
        ));
        assert!(matches!(
            bitmap.view(range(2048, 4096), Granule::K4),
            Err(Error::Unaligned { .. })
        ));
        assert!(matches!(
            bitmap.view(IovaRange::ALL, Granule::from_bytes(1).unwrap()),
            Err(Error::BitmapTooShort { .. })
        ));
        // The whole address space at the coarsest granule is two bits.
        assert!(
            bitmap
                .view(IovaRange::ALL, Granule::from_lg2(63).unwrap())
                .is_ok()
        );
    }

    #[test]
    fn masks_agree_with_ranges_at_every_shift() {
        let mask = 0x8000_F00F_0000_5AC3u64;
        for granule in [
            Granule::K4,
            Granule::from_bytes(2048).unwrap(),
            Granule::from_bytes(8192).unwrap(),
        ] {
            for first in 0..200u64 {
                let request = range(70 * 8192, 130 * 8192);
                let (mut whole, mut single) = ([0u64; 9], [0u64; 9]);
                let view = UserBitmap::new(&mut whole).view(request, granule).unwrap();
                let mut sink = view.sink();
                sink.record_mask(Iova::new(first * 4096), Granule::K4, mask)
                    .unwrap();
                let set = sink.bits_set();
                let view = UserBitmap::new(&mut single).view(request, granule).unwrap();
                for page in (0..64).filter(|page| mask >> page & 1 == 1) {
                    view.sink()
                        .record(range((first + page) * 4096, 4096))
                        .unwrap();
                }
                assert_eq!(set, view.count());
                assert_eq!(whole, single, "page {first} at {granule}");
            }
        }
    }

    #[test]
    fn the_last_byte_of_the_address_space_has_its_bit() {
        let mut words = [0u64; 1];
        let top = range(u64::MAX - 8191, 8192);
        let view = UserBitmap::new(&mut words).view(top, Granule::K4).unwrap();
        view.sink().record(range(u64::MAX, 1)).unwrap();
        assert_eq!(
            view.runs().collect::<Vec<_>>(),
            [range(u64::MAX - 4095, 4096)]
        );
    }
}
