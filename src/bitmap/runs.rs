//! Dirty bits as maximal ranges of addresses.

use super::BitmapView;
use crate::units::IovaRange;

/// The maximal runs of set bits of a view, as address ranges in ascending order. Runs go on across words, chunks and
/// windows; bits past the end of the request do not count.
#[derive(Clone, Debug)]
pub struct Runs<'a> {
    view: BitmapView<'a>,
    /// The next bit to look at; past the last one when the view is done.
    next: u64,
}

impl<'a> Runs<'a> {
    pub(super) fn new(view: BitmapView<'a>) -> Self {
        Runs { view, next: 0 }
    }

    /// The first bit at or after `from` that is set (or clear, where `set` is false).
    fn seek(&self, from: u64, set: bool) -> Option<u64> {
        let last = self.view.last_bit();
        let mut bit = from;
        while bit <= last {
            let word = self.view.word(bit / 64);
            let hits = if set { word } else { !word } >> (bit % 64);
            if hits != 0 {
                let found = bit + u64::from(hits.trailing_zeros());
                return (found <= last).then_some(found);
            }
            bit = (bit / 64 + 1) * 64;
        }
        None
    }
}

impl Iterator for Runs<'_> {
    type Item = IovaRange;

    fn next(&mut self) -> Option<IovaRange> {
        let first = self.seek(self.next, true)?;
        let end = self
            .seek(first, false)
            .unwrap_or_else(|| self.view.last_bit() + 1);
        self.next = end;
        Some(self.view.addresses(first, end - 1))
    }
}

#[cfg(all(test, not(dirtymap_loom)))]
#[allow(clippy::unwrap_used)] // helpers of tests
mod tests {
    use crate::bitmap::UserBitmap;
    use crate::units::{Granule, Iova, IovaRange};

    #[test]
    fn a_clean_word_closes_an_open_run() {
        // History: a merge that skipped zero words without closing the run glued pages together and dropped others.
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
