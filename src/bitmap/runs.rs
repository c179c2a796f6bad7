//! The contents of a view: words, bits, and maximal ranges of addresses.
//!
//! All of them read forward through one window at a time. A window of a file that cannot be mapped
//! counts as dirty throughout, and the iterator's `error` reports it: a caller that ignores it
//! copies too much, never too little.

use super::BitmapView;
use super::window::{Backing, Window};
use crate::error::BitmapError;
use crate::units::IovaRange;
use crate::words::word_mask;

impl<'a> BitmapView<'a> {
    /// The words that are not zero, in order.
    pub fn words(&self) -> Words<'a> {
        Words::new(self)
    }

    /// The numbers of the set bits, in order.
    pub fn bits(&self) -> Bits<'a> {
        Bits::new(self)
    }

    /// The maximal runs of dirty granules, in order.
    pub fn runs(&self) -> Runs<'a> {
        Runs::new(*self)
    }

    /// The number of set bits of the view. Windows of a file that cannot be read count as set.
    pub fn count(&self) -> u64 {
        self.words()
            .map(|(_, word)| u64::from(word.count_ones()))
            .sum()
    }
}

/// Reads the words of a bitmap in ascending order, window by window.
#[derive(Debug)]
pub(super) struct Reader<'a> {
    backing: Backing<'a>,
    window: Window<'a>,
    /// The last position that may be read.
    last: u64,
}

impl<'a> Reader<'a> {
    pub(super) fn new(backing: Backing<'a>, last: u64) -> Self {
        Reader {
            backing,
            window: Window::none(),
            last,
        }
    }

    /// The first word from `word` on that is not zero, with the window that holds it; `None` if all
    /// are zero.
    ///
    /// # Errors
    /// With the first word of the window that could not be opened.
    pub(super) fn seek(
        &mut self,
        mut word: u64,
    ) -> Result<Option<(u64, &Window<'a>)>, (u64, BitmapError)> {
        while word <= self.last / 64 {
            if !self.window.holds(word) {
                // The old window is closed before the new one is opened, so there is never more
                // than one.
                self.window = Window::none();
                match self.backing.next_window(word, self.last) {
                    Ok(Some(window)) => self.window = window,
                    Ok(None) => return Ok(None),
                    Err(error) => return Err((word, error)),
                }
                word = word.max(self.window.first());
            }
            match self.window.find(word, self.last / 64) {
                Some(found) => return Ok(Some((found, &self.window))),
                None => word = self.window.end(),
            }
        }
        Ok(None)
    }

    /// From now on the window that holds `word` counts as dirty.
    fn give_up(&mut self, word: u64) {
        self.window = self.backing.unreadable(word);
    }
}

/// The words of a view that are not zero, in ascending order, as `(index, bits)`: bit `b` of word
/// `index` is bit `64 * index + b` of the view. Bits past the end of the request are zero.
#[derive(Debug)]
pub struct Words<'a> {
    reader: Reader<'a>,
    shift: u64,
    /// The last bit of the view.
    last: u64,
    /// The next word to yield.
    next: u64,
    /// The word of the row that was read last.
    read: Option<(u64, u64)>,
    error: Option<BitmapError>,
}

impl<'a> Words<'a> {
    pub(super) fn new(view: &BitmapView<'a>) -> Self {
        Words {
            reader: Reader::new(view.backing(), view.last_bit() + view.shift()),
            shift: view.shift(),
            last: view.last_bit(),
            next: 0,
            read: None,
            error: None,
        }
    }

    /// None of them.
    pub(crate) fn none(view: &BitmapView<'a>) -> Self {
        Words {
            next: u64::MAX,
            ..Words::new(view)
        }
    }

    /// The error of a window that could not be read, whose bits count as dirty.
    pub fn error(&self) -> Option<&BitmapError> {
        self.error.as_ref()
    }

    /// The same as [`error`](Self::error), by value.
    pub fn take_error(&mut self) -> Option<BitmapError> {
        self.error.take()
    }

    /// The first word of the row from `word` on that is not zero, and its bits.
    fn seek(&mut self, mut word: u64) -> Option<(u64, u64)> {
        if let Some((at, bits)) = self.read
            && at >= word
        {
            return Some((at, bits));
        }
        loop {
            match self.reader.seek(word) {
                Ok(found) => {
                    self.read = found.map(|(at, window)| (at, window.load(at)));
                    return self.read;
                }
                Err((at, error)) => {
                    self.error.get_or_insert(error);
                    self.reader.give_up(at);
                    // The words before were zero. A step back would close the stand-in and fail
                    // again.
                    word = at;
                }
            }
        }
    }
}

impl Iterator for Words<'_> {
    type Item = (u64, u64);

    fn next(&mut self) -> Option<(u64, u64)> {
        let (skip, low) = (self.shift / 64, self.shift % 64);
        while self.next <= self.last / 64 {
            // Word `n` of the view is the upper part of word `n + skip` of the row, then the lower
            // part of the next.
            let (at, bits) = self.seek(self.next + skip)?;
            let mut word = 0;
            let straddles = u64::from(low != 0);
            self.next = self.next.max((at - skip).saturating_sub(straddles));
            if at == self.next + skip {
                word = bits >> low;
            }
            if low != 0
                && let Some((at, bits)) = self.seek(self.next + skip + 1)
                && at == self.next + skip + 1
            {
                word |= bits << (64 - low);
            }
            let index = self.next;
            self.next += 1;
            if index > self.last / 64 {
                return None;
            }
            word &= word_mask(0, (self.last - index * 64).min(63) as u32);
            if word != 0 {
                return Some((index, word));
            }
        }
        None
    }
}

/// The numbers of the set bits of a view, in ascending order.
#[derive(Debug)]
pub struct Bits<'a> {
    words: Words<'a>,
    index: u64,
    rest: u64,
}

impl<'a> Bits<'a> {
    pub(super) fn new(view: &BitmapView<'a>) -> Self {
        Bits {
            words: Words::new(view),
            index: 0,
            rest: 0,
        }
    }

    /// The error of a window that could not be read, whose bits count as dirty.
    pub fn error(&self) -> Option<&BitmapError> {
        self.words.error()
    }
}

impl Iterator for Bits<'_> {
    type Item = u64;

    fn next(&mut self) -> Option<u64> {
        if self.rest == 0 {
            (self.index, self.rest) = self.words.next()?;
        }
        let bit = self.rest.trailing_zeros();
        self.rest &= self.rest - 1;
        Some(self.index * 64 + u64::from(bit))
    }
}

/// The maximal runs of set bits as `(first, last)`, out of ascending words that are not zero.
#[derive(Clone, Debug)]
pub(crate) struct RunBits<W> {
    words: W,
    index: u64,
    rest: u64,
}

impl<W: Iterator<Item = (u64, u64)>> RunBits<W> {
    pub(crate) fn new(words: W) -> Self {
        RunBits {
            words,
            index: 0,
            rest: 0,
        }
    }
}

impl<W: Iterator<Item = (u64, u64)>> Iterator for RunBits<W> {
    type Item = (u64, u64);

    #[inline]
    fn next(&mut self) -> Option<(u64, u64)> {
        if self.rest == 0 {
            (self.index, self.rest) = self.words.next()?;
        }
        let first = self.index * 64 + u64::from(self.rest.trailing_zeros());
        loop {
            let from = self.rest.trailing_zeros();
            let len = (!(self.rest >> from)).trailing_zeros();
            self.rest &= !word_mask(from, from + len - 1);
            let end = self.index * 64 + u64::from(from + len);
            if from + len == 64 {
                // The run reaches the end of its word: it goes on if the next word begins with a
                // set bit.
                (self.index, self.rest) = self.words.next().unwrap_or((0, 0));
                if self.rest & 1 == 1 && self.index * 64 == end {
                    continue;
                }
            }
            return Some((first, end - 1));
        }
    }
}

/// The maximal runs of set bits of a view, as address ranges in ascending order. Runs go on across
/// words, chunks and windows; bits past the end of the request do not count.
#[derive(Debug)]
pub struct Runs<'a> {
    view: BitmapView<'a>,
    bits: RunBits<Words<'a>>,
}

impl<'a> Runs<'a> {
    pub(super) fn new(view: BitmapView<'a>) -> Self {
        Runs {
            bits: RunBits::new(Words::new(&view)),
            view,
        }
    }

    /// None of them.
    pub(crate) fn none(view: BitmapView<'a>) -> Self {
        Runs {
            bits: RunBits::new(Words::none(&view)),
            view,
        }
    }

    /// The error of a window that could not be read, whose bits count as dirty.
    pub fn error(&self) -> Option<&BitmapError> {
        self.bits.words.error()
    }

    /// The next run, unless a window could not be read on the way to it: for callers that had
    /// rather stop than take the bits of such a window for dirty.
    ///
    /// # Errors
    /// [`BitmapError::Shrank`] or [`BitmapError::Window`] with the window of a file.
    pub fn next_readable(&mut self) -> Result<Option<IovaRange>, BitmapError> {
        let run = self.next();
        match self.bits.words.take_error() {
            Some(error) => Err(error),
            None => Ok(run),
        }
    }
}

impl Iterator for Runs<'_> {
    type Item = IovaRange;

    fn next(&mut self) -> Option<IovaRange> {
        let (first, last) = self.bits.next()?;
        Some(self.view.addresses(first, last))
    }
}

#[cfg(all(test, not(dirtymap_loom)))]
#[allow(clippy::unwrap_used)] // helpers of tests
mod tests {
    use crate::bitmap::UserBitmap;
    use crate::units::{Granule, Iova, IovaRange};

    #[test]
    fn a_clean_word_closes_an_open_run() {
        // History: a merge that skipped zero words without closing the run glued pages together and
        // dropped others.
        let mut words = [1u64 << 63, 0, 1];
        let all = IovaRange::from_len(Iova::MIN, 192 * 4096).unwrap();
        let view = UserBitmap::new(&mut words).view(all, Granule::K4).unwrap();
        let runs: Vec<_> = view
            .runs()
            .map(|r| (r.start().get() / 4096, r.last().get() / 4096))
            .collect();
        assert_eq!(runs, [(63, 63), (128, 128)]);
    }

    #[test]
    fn runs_agree_with_bits_at_every_length() {
        let pattern = [0xF0F0_0000_FFFF_0001u64, u64::MAX, 0x8000_0000_0000_0001];
        for bits in 1..=192u64 {
            let mut words = pattern;
            let all = IovaRange::from_len(Iova::MIN, bits * 4096).unwrap();
            let view = UserBitmap::new(&mut words).view(all, Granule::K4).unwrap();
            let mut from_runs = vec![];
            let mut previous_end = None;
            for run in view.runs() {
                let (a, b) = (run.start().get() / 4096, run.last().get() / 4096);
                assert_ne!(previous_end, Some(a), "runs are maximal");
                previous_end = Some(b + 1);
                from_runs.extend(a..=b);
            }
            let expect: Vec<u64> = (0..bits)
                .filter(|b| pattern[(b / 64) as usize] >> (b % 64) & 1 == 1)
                .collect();
            assert_eq!(from_runs, expect);
            assert_eq!(view.count(), expect.len() as u64);
        }
    }
}
