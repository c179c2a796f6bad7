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
use crate::words::{clear, next_run, set};

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

    /// Adds the pages of `log`, whose bit 0 is page 64 * `at`. Ignores bits after the last page.
    pub fn add_words(&mut self, at: usize, log: &[u64]) {
        for (mine, new) in self.words.iter_mut().skip(at).zip(log) {
            *mine |= new;
        }
        let pages = self.pages();
        mask_tail(&mut self.words, pages);
    }

    /// Adds the part of `range` inside. A page that it touches in part counts as a whole.
    pub fn add_range(&mut self, range: IovaRange) {
        if let Some((first, last)) = self.numbers(range) {
            set(&mut self.words, first, last);
        }
    }

    /// Removes the pages of `log`, whose bit 0 is page 64 * `at`.
    pub fn remove_words(&mut self, at: usize, log: &[u64]) {
        for (mine, gone) in self.words.iter_mut().skip(at).zip(log) {
            *mine &= !gone;
        }
    }

    /// Adds page `number`, counted from 0. Returns whether it exists.
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

    /// Passes the pages of `range` to `out`, and removes each after it is recorded.
    ///
    /// # Errors
    /// [`Stopped`] at the first page that cannot be recorded. The pages from there on stay pending.
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
    /// [`Stopped`] at the first page that cannot be recorded.
    pub fn peek(&self, range: IovaRange, sink: &mut Sink<'_>) -> Result<(), Stopped> {
        self.for_each(range, |run| {
            sink.record(run).map_err(|error| Stopped {
                at: run.start(),
                error,
            })
        })
    }

    /// Calls `each` with the runs of pages of `range`, in order, and removes the pages.
    pub fn drain(&mut self, range: IovaRange, each: &mut dyn FnMut(IovaRange)) {
        let told: Result<(), std::convert::Infallible> = self.for_each(range, |run| {
            each(run);
            Ok(())
        });
        debug_assert!(told.is_ok());
        self.forget(range);
    }

    /// Removes the pages of `range`.
    pub fn forget(&mut self, range: IovaRange) {
        if let Some((first, last)) = self.numbers(range) {
            clear(&mut self.words, first, last);
        }
    }

    /// Removes all pages.
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
        IovaRange::ascending(Iova::new(start), Iova::new(end))
    }

    /// The numbers of the first and the last page that `range` touches, if there are any.
    pub fn numbers(&self, range: IovaRange) -> Option<(u64, u64)> {
        let inside = range.intersection(self.range)?;
        let number = |iova: Iova| (iova.get() - self.range.start().get()) >> self.page.lg2();
        Some((number(inside.start()), number(inside.last())))
    }

    /// The number of pages of the range.
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

/// This number of words, all zero, or an error.
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

#[cfg(all(test, not(dirtymap_loom)))]
#[allow(clippy::unwrap_used)] // helpers of tests
mod tests {
    use super::*;
    use crate::bitmap::UserBitmap;
    use crate::flush::FlushGather;

    fn pages(first: u64, n: u64) -> IovaRange {
        IovaRange::from_len(Iova::new(first << 12), n << 12).unwrap()
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
    fn pages_and_words_past_the_end_are_left_out() {
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

    #[test]
    fn all_pages_are_those_of_its_range() {
        let mut pending = Pending::new(pages(3, 70), Granule::K4).unwrap();
        assert!(pending.add_page(69) && !pending.add_page(70));
        assert_eq!(pending.words(), [0, 1 << 5]);
        pending.add_all();
        let mut told = Vec::new();
        pending.drain(IovaRange::ALL, &mut |run| told.push(run));
        assert_eq!(told, [pages(3, 70)]);
    }
}
