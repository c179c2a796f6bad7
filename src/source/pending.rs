//! Pending pages: a kernel interface has reported and thereby cleared them, and no lease has
//! recorded them yet.
//!
//! Some interfaces clear the pages that they report. The report is then the only trace of a write,
//! so it goes into memory that was allocated before, and only from there into a user bitmap: a
//! failure after that loses nothing.

use std::collections::TryReserveError;

use crate::bitmap::Sink;
use crate::source::{LeafSink, Stopped};
use crate::units::{Granule, Iova, IovaRange};
use crate::words::word_masks;

/// One bit for each page of a range, for one thread at a time.
#[derive(Debug)]
pub(crate) struct Pending {
    range: IovaRange,
    page: Granule,
    words: Vec<u64>,
}

impl Pending {
    /// Clean pages of `range`, which is made of whole pages.
    ///
    /// # Errors
    /// If there is no memory for the bits.
    pub(crate) fn new(range: IovaRange, page: Granule) -> Result<Self, TryReserveError> {
        let words = zeroed(words_for(range, page))?;
        Ok(Pending { range, page, words })
    }

    /// Adds the pages of a log, whose bit 0 is the first page. Ignores bits after the last page.
    #[cfg(feature = "kvm")]
    pub(crate) fn add(&mut self, log: &[u64]) {
        self.add_words(0, log);
    }

    /// Adds the pages of `log`, whose bit 0 is page 64 * `at`. Ignores bits after the last page.
    pub(crate) fn add_words(&mut self, at: usize, log: &[u64]) {
        for (mine, new) in self.words.iter_mut().skip(at).zip(log) {
            *mine |= new;
        }
        let pages = self.pages();
        mask_tail(&mut self.words, pages);
    }

    /// Adds the part of `range` inside. A page that it touches in part counts as a whole.
    pub(crate) fn add_range(&mut self, range: IovaRange) {
        if let Some((first, last)) = self.numbers(range) {
            set(&mut self.words, first, last);
        }
    }

    #[cfg(feature = "kvm")]
    /// Removes the pages of a log whose bit 0 is page `first`, a multiple of 64.
    pub(crate) fn remove(&mut self, first: u64, log: &[u64]) {
        let mine = self.words.iter_mut().skip((first / 64) as usize);
        for (mine, gone) in mine.zip(log) {
            *mine &= !gone;
        }
    }

    #[cfg(feature = "kvm")]
    /// Adds page `number`. Returns whether it exists.
    pub(crate) fn add_page(&mut self, number: u64) -> bool {
        let known = number < self.pages();
        if known {
            self.words[(number / 64) as usize] |= 1 << (number % 64);
        }
        known
    }

    /// Adds all pages.
    #[cfg(any(feature = "kvm", feature = "pagemap"))]
    pub(crate) fn add_all(&mut self) {
        self.add_range(self.range);
    }

    /// Passes the pages of `range` to `out`, and removes each after it is recorded.
    pub(crate) fn take(
        &mut self,
        range: IovaRange,
        out: &mut LeafSink<'_, '_>,
    ) -> Result<(), Stopped> {
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

    /// Records the pages of `range`, and keeps them.
    pub(crate) fn peek(&self, range: IovaRange, sink: &mut Sink<'_>) -> Result<(), Stopped> {
        self.for_each(range, |run| {
            sink.record(run).map_err(|error| Stopped {
                at: run.start(),
                error,
            })
        })
    }

    /// Passes the pages of `range` to `each`, and removes them.
    pub(crate) fn drain(&mut self, range: IovaRange, each: &mut dyn FnMut(IovaRange)) {
        let told: Result<(), std::convert::Infallible> = self.for_each(range, |run| {
            each(run);
            Ok(())
        });
        debug_assert!(told.is_ok());
        self.forget(range);
    }

    /// Removes the pages of `range`.
    pub(crate) fn forget(&mut self, range: IovaRange) {
        if let Some((first, last)) = self.numbers(range) {
            clear(&mut self.words, first, last);
        }
    }

    /// Removes all pages.
    pub(crate) fn clear(&mut self) {
        self.words.fill(0);
    }

    /// Whether no page is pending.
    #[cfg(any(test, feature = "kvm", feature = "pagemap"))]
    pub(crate) fn is_empty(&self) -> bool {
        self.words.iter().all(|word| *word == 0)
    }

    /// The bits of the pages, by 64.
    pub(crate) fn words(&self) -> &[u64] {
        &self.words
    }

    /// The addresses of the pages `first` to `last`, which exist.
    pub(crate) fn addresses(&self, first: u64, last: u64) -> IovaRange {
        let start = self.range.start().get() + (first << self.page.lg2());
        let end = self.range.start().get() + (last << self.page.lg2()) + self.page.mask();
        // Never an error: a run goes upwards.
        IovaRange::new(Iova::new(start), Iova::new(end)).unwrap_or(self.range)
    }

    /// The numbers of the first and the last page that `range` touches, if there are any.
    pub(crate) fn numbers(&self, range: IovaRange) -> Option<(u64, u64)> {
        let inside = range.intersection(self.range)?;
        let number = |iova: Iova| (iova.get() - self.range.start().get()) >> self.page.lg2();
        Some((number(inside.start()), number(inside.last())))
    }

    /// The number of pages of the range.
    pub(crate) fn pages(&self) -> u64 {
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

/// The part of `range` below `at`.
#[cfg(any(feature = "kvm", feature = "pagemap"))]
pub(crate) fn below(range: IovaRange, at: Iova) -> Option<IovaRange> {
    let last = at.get().checked_sub(1).map(Iova::new)?;
    IovaRange::new(range.start(), last).ok()
}

/// The number of words for one bit for each page of `range`; `usize::MAX` if no memory can hold
/// them.
pub(crate) fn words_for(range: IovaRange, page: Granule) -> usize {
    usize::try_from(range.granules(page).div_ceil(64)).unwrap_or(usize::MAX)
}

/// This number of words, all zero, or an error.
pub(crate) fn zeroed(words: usize) -> Result<Vec<u64>, TryReserveError> {
    let mut zeroed = Vec::new();
    zeroed.try_reserve_exact(words)?;
    zeroed.resize(words, 0);
    Ok(zeroed)
}

/// Clears the bits after page `pages - 1`: some kernels set them.
pub(crate) fn mask_tail(words: &mut [u64], pages: u64) {
    let used = pages % 64;
    if used != 0
        && let Some(last) = words.get_mut((pages / 64) as usize)
    {
        *last &= (1 << used) - 1;
    }
}

/// Sets the bits `first` to `last`.
pub(crate) fn set(words: &mut [u64], first: u64, last: u64) {
    for (word, mask) in word_masks(first, last) {
        words[word as usize] |= mask;
    }
}

/// Clears the bits `first` to `last`.
pub(crate) fn clear(words: &mut [u64], first: u64, last: u64) {
    for (word, mask) in word_masks(first, last) {
        words[word as usize] &= !mask;
    }
}

/// The first run of bits that are set, from `first` to `last`.
pub(crate) fn next_run(words: &[u64], first: u64, last: u64) -> Option<(u64, u64)> {
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

    #[cfg(feature = "kvm")]
    /// hyperlight met a hypervisor whose logs had bits above the last page; a run of them reached
    /// past the memory.
    #[test]
    fn bits_behind_the_last_page_are_no_pages() {
        let mut pending = Pending::new(pages(16, 70), Granule::K4).unwrap();
        pending.add(&[u64::MAX; 2]);
        let mut told = Vec::new();
        pending.drain(IovaRange::ALL, &mut |run| told.push(run));
        assert_eq!(told, [pages(16, 70)]);
        assert!(pending.is_empty());
        assert!(pending.add_page(69));
        assert!(!pending.add_page(70));
        assert!(!pending.add_page(u64::MAX));
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
