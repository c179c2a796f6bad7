//! Pages that a kernel interface has reported, and forgotten by that, until a lease records them.
//!
//! Some interfaces clear what they report. What they said is then the only trace of a write, so it
//! goes into memory that was reserved before, and only from there into a user bitmap: a failure
//! after that loses nothing.

use std::collections::TryReserveError;

use crate::bitmap::{Sink, word_masks};
use crate::source::{LeafSink, Stopped};
use crate::units::{Granule, Iova, IovaRange};

/// One bit for each page of a range, for one thread at a time: set for the pages that a log has
/// reported and, by that, forgotten, until a lease has recorded them. See the
/// [module](crate::adapter) for an example.
#[derive(Debug)]
pub struct Pending {
    range: IovaRange,
    page: Granule,
    words: Vec<u64>,
}

impl Pending {
    /// Clean pages: all that `range` touches.
    ///
    /// # Errors
    /// If there is no memory for the bits.
    pub fn new(range: IovaRange, page: Granule) -> Result<Self, TryReserveError> {
        let range = range.round_out(page);
        // No memory holds `usize::MAX` words.
        let words = usize::try_from(range.granules(page).div_ceil(64)).unwrap_or(usize::MAX);
        let words = zeroed(words)?;
        Ok(Pending { range, page, words })
    }

    /// Adds the pages of `log`, whose bit 0 is page 64 * `at`. Bits after the last page are not
    /// pages.
    pub fn add_words(&mut self, at: usize, log: &[u64]) {
        for (mine, new) in self.words.iter_mut().skip(at).zip(log) {
            *mine |= new;
        }
        let pages = self.pages();
        mask_tail(&mut self.words, pages);
    }

    /// Adds `range`, as far as it lies inside; pages that it touches count whole.
    pub fn add_range(&mut self, range: IovaRange) {
        if let Some((first, last)) = self.numbers(range) {
            set(&mut self.words, first, last);
        }
    }

    /// Forgets the pages of `log`, whose bit 0 is page 64 * `at`.
    pub fn remove_words(&mut self, at: usize, log: &[u64]) {
        for (mine, gone) in self.words.iter_mut().skip(at).zip(log) {
            *mine &= !gone;
        }
    }

    /// Adds page `number`, counted from 0. Returns whether there is one.
    pub fn add_page(&mut self, number: u64) -> bool {
        let known = number < self.pages();
        if known {
            self.words[(number / 64) as usize] |= 1 << (number % 64);
        }
        known
    }

    /// Adds all pages.
    pub fn add_all(&mut self) {
        self.add_range(self.range);
    }

    /// Hands the pages of `range` to `out`, and forgets each when it is recorded.
    ///
    /// # Errors
    /// [`Stopped`] where a page cannot be recorded. The pages from there on stay pending.
    pub fn take(&mut self, range: IovaRange, out: &mut LeafSink<'_, '_>) -> Result<(), Stopped> {
        let Some((mut first, last)) = self.numbers(range) else {
            return Ok(());
        };
        while let Some((from, to)) = next_run(&self.words, first, last) {
            let run = self.addresses(from, to);
            let to_clear = out.take_run(run, self.page, |page| {
                self.forget(page);
                true
            })?;
            if let Some(recorded) = to_clear.range() {
                self.forget(recorded);
            }
            first = to + 1;
        }
        Ok(())
    }

    /// Records the pages of `range`, which stay pending.
    ///
    /// # Errors
    /// [`Stopped`] where a page cannot be recorded.
    pub fn peek(&self, range: IovaRange, sink: &mut Sink<'_>) -> Result<(), Stopped> {
        self.for_each(range, |run| {
            sink.record(run).map_err(|error| Stopped {
                at: run.start(),
                error,
            })
        })
    }

    /// Calls `each` with the runs of pages of `range`, in order, and forgets the pages.
    pub fn drain(&mut self, range: IovaRange, each: &mut dyn FnMut(IovaRange)) {
        let told: Result<(), std::convert::Infallible> = self.for_each(range, |run| {
            each(run);
            Ok(())
        });
        debug_assert!(told.is_ok());
        self.forget(range);
    }

    /// Forgets the pages of `range`.
    pub fn forget(&mut self, range: IovaRange) {
        if let Some((first, last)) = self.numbers(range) {
            clear(&mut self.words, first, last);
        }
    }

    /// Forgets all pages.
    pub fn clear(&mut self) {
        self.words.fill(0);
    }

    /// Whether no page is pending.
    pub fn is_empty(&self) -> bool {
        self.words.iter().all(|word| *word == 0)
    }

    /// The bits: that of page `n` is bit `n % 64` of word `n / 64`.
    pub fn words(&self) -> &[u64] {
        &self.words
    }

    /// The addresses of the pages `first` to `last`. Numbers past the last page stand for it.
    pub fn addresses(&self, first: u64, last: u64) -> IovaRange {
        let end = self.pages() - 1;
        let (first, last) = (first.min(end), last.min(end).max(first.min(end)));
        let start = self.range.start().get() + (first << self.page.lg2());
        let end = self.range.start().get() + (last << self.page.lg2()) + self.page.mask();
        // Never an error: a run goes upwards.
        IovaRange::new(Iova::new(start), Iova::new(end)).unwrap_or(self.range)
    }

    /// The numbers of the first and the last page that `range` touches, if there are any.
    pub fn numbers(&self, range: IovaRange) -> Option<(u64, u64)> {
        let inside = range.intersection(self.range)?;
        let number = |iova: Iova| (iova.get() - self.range.start().get()) >> self.page.lg2();
        Some((number(inside.start()), number(inside.last())))
    }

    /// How many pages the range has.
    pub fn pages(&self) -> u64 {
        ((self.range.last().get() - self.range.start().get()) >> self.page.lg2()) + 1
    }

    fn for_each<E>(
        &self,
        range: IovaRange,
        mut each: impl FnMut(IovaRange) -> Result<(), E>,
    ) -> Result<(), E> {
        let Some((mut first, last)) = self.numbers(range) else {
            return Ok(());
        };
        while let Some((from, to)) = next_run(&self.words, first, last) {
            each(self.addresses(from, to))?;
            first = to + 1;
        }
        Ok(())
    }
}

/// So many words, all zero, or an error.
pub(crate) fn zeroed(words: usize) -> Result<Vec<u64>, TryReserveError> {
    let mut zeroed = Vec::new();
    zeroed.try_reserve_exact(words)?;
    zeroed.resize(words, 0);
    Ok(zeroed)
}

/// Clears the bits after page `pages - 1`: some kernels set them.
fn mask_tail(words: &mut [u64], pages: u64) {
    let used = pages % 64;
    if used != 0
        && let Some(last) = words.get_mut((pages / 64) as usize)
    {
        *last &= (1 << used) - 1;
    }
}

/// Sets the bits `first` to `last`, as far as `words` has them.
pub fn set(words: &mut [u64], first: u64, last: u64) {
    for_each_mask(words, first, last, |word, mask| *word |= mask);
}

/// Clears the bits `first` to `last`, as far as `words` has them.
pub fn clear(words: &mut [u64], first: u64, last: u64) {
    for_each_mask(words, first, last, |word, mask| *word &= !mask);
}

/// Calls `change` with each word that has some of the bits `first` to `last`, and their mask.
fn for_each_mask(words: &mut [u64], first: u64, last: u64, change: impl Fn(&mut u64, u64)) {
    let Some(last) = last_of(words, last) else {
        return;
    };
    for (word, mask) in word_masks(first, last) {
        change(&mut words[word as usize], mask);
    }
}

/// The last bit up to `last` that `words` has; `None` without words.
fn last_of(words: &[u64], last: u64) -> Option<u64> {
    let end = (words.len() as u64).checked_mul(64);
    Some(last.min(end.unwrap_or(u64::MAX).checked_sub(1)?))
}

/// The first run of bits that are set, from `first` to `last`, as its first and its last bit.
pub fn next_run(words: &[u64], first: u64, last: u64) -> Option<(u64, u64)> {
    let last = last_of(words, last)?;
    let from = next_where(words, first, last, 0)?;
    let to = next_where(words, from, last, u64::MAX).map_or(last, |clear| clear - 1);
    Some((from, to))
}

/// The first bit, from `first` to `last`, that differs from those of `skip`.
fn next_where(words: &[u64], first: u64, last: u64, skip: u64) -> Option<u64> {
    if first > last {
        return None;
    }
    let mut word = first / 64;
    let mut differs = (words.get(word as usize)? ^ skip) & (u64::MAX << (first % 64));
    while differs == 0 {
        word += 1;
        if word > last / 64 {
            return None;
        }
        differs = words.get(word as usize)? ^ skip;
    }
    let found = word * 64 + u64::from(differs.trailing_zeros());
    (found <= last).then_some(found)
}

#[cfg(all(test, not(dirtymap_loom)))]
#[allow(clippy::unwrap_used)] // helpers of tests
mod tests {
    use super::*;
    use crate::bitmap::UserBitmap;
    use crate::flush::FlushGather;

    fn pages(first: u64, n: u64) -> IovaRange {
        IovaRange::from_len(Iova::new(first << 12), n << 12).unwrap()
    }

    /// Every run between every two borders, against a look at each bit.
    #[test]
    fn runs_are_what_the_bits_say() {
        let words = [
            0x8000_0000_0000_0001,
            0xffff_ffff_ffff_ffff,
            0x0000_00ff_0000_00f0,
        ];
        let bit = |n: u64| words[(n / 64) as usize] >> (n % 64) & 1 == 1;
        for first in (0..192).step_by(7) {
            for last in first..192 {
                let mut seen = Vec::new();
                let mut at = first;
                while let Some((from, to)) = next_run(&words, at, last) {
                    seen.extend(from..=to);
                    assert!(to == last || !bit(to + 1), "a run that ends too early");
                    at = to + 1;
                }
                let set: Vec<u64> = (first..=last).filter(|n| bit(*n)).collect();
                assert_eq!(seen, set, "from {first} to {last}");
            }
        }
    }

    /// hyperlight met a hypervisor whose logs had bits above the last page; a run of them reached
    /// past the memory.
    #[test]
    fn bits_behind_the_last_page_are_no_pages() {
        let mut pending = Pending::new(pages(16, 70), Granule::K4).unwrap();
        pending.add_words(0, &[u64::MAX; 2]);
        let mut told = Vec::new();
        pending.drain(IovaRange::ALL, &mut |run| told.push(run));
        assert_eq!(told, [pages(16, 70)]);
        assert!(pending.is_empty());
        assert!(pending.add_page(69));
        assert!(!pending.add_page(70));
        assert!(!pending.add_page(u64::MAX));
    }

    /// An adapter's kernel may name pages and words that are not there. They are left out, and
    /// nothing wraps.
    #[test]
    fn numbers_past_the_end_name_nothing() {
        let mut words = [u64::MAX; 2];
        assert_eq!(next_run(&words, 100, u64::MAX), Some((100, 127)));
        assert_eq!(next_run(&words, 128, u64::MAX), None);
        assert_eq!(next_run(&[], 0, 5), None);
        clear(&mut words, 100, u64::MAX);
        assert_eq!(words, [u64::MAX, (1 << 36) - 1]);
        set(&mut words, 128, 300);
        set(&mut words, 127, 300);
        assert_eq!(words, [u64::MAX, 1 << 63 | ((1 << 36) - 1)]);
        set(&mut [], 0, 9);

        // A range that begins and ends inside of pages has them whole, up to the last address.
        let range = IovaRange::new(Iova::new(u64::MAX - 8200), Iova::MAX).unwrap();
        let mut pending = Pending::new(range, Granule::K4).unwrap();
        assert_eq!(pending.pages(), 3);
        pending.add_words(1, &[u64::MAX]);
        pending.add_words(usize::MAX, &[u64::MAX]);
        assert!(pending.is_empty());
        pending.add_words(0, &[u64::MAX, u64::MAX]);
        pending.remove_words(1, &[u64::MAX]);
        pending.remove_words(0, &[0b10, u64::MAX]);
        assert_eq!(pending.words(), [0b101]);
        let last = IovaRange::new(Iova::new(u64::MAX - 4095), Iova::MAX).unwrap();
        assert_eq!(pending.addresses(2, u64::MAX), last);
        assert_eq!(pending.addresses(u64::MAX, 0), last);
    }

    #[test]
    fn what_is_taken_is_recorded_first_and_the_rest_stays() {
        let mut pending = Pending::new(pages(0, 256), Granule::K4).unwrap();
        pending.add_range(pages(60, 10));
        pending.add_range(pages(200, 1));
        let mut words = [0u64; 4];
        let bound = UserBitmap::new(&mut words)
            .bind(pages(0, 256), Granule::K4)
            .unwrap();
        let mut sink = bound.into_sink();
        let mut gather = FlushGather::new();
        let mut out = LeafSink::new(&mut sink, &mut gather);
        pending.take(pages(64, 100), &mut out).unwrap();
        assert_eq!(gather.ranges(), [pages(64, 6)]);
        assert_eq!(words, [0, 0x3f, 0, 0]);
        let mut told = Vec::new();
        pending.drain(IovaRange::ALL, &mut |run| told.push(run));
        assert_eq!(told, [pages(60, 4), pages(200, 1)]);
    }
}
