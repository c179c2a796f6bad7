//! A dirty log of another program, as it is in memory.

use crate::bitmap::{BitmapView, RunBits};
use crate::error::BitmapError;
use crate::units::{Granule, Iova, IovaRange};
use crate::words::word_mask;

/// A dirty log of a kernel, a device or another process, read only.
///
/// Bit `n` stands for `[base + n * granule, base + (n + 1) * granule)`, least significant bit
/// first. A log of bytes has any length and need not be aligned. Words are little endian on every
/// host, as those of a [`UserBitmap`](crate::UserBitmap). **Bits above the end of the range do not
/// count**, set or not.
///
/// Its pages go into a bitmap by [`or_into`](Self::or_into), into an address space by marks of its
/// [`runs`](Self::runs), and together with other logs into one list by
/// [`merge_runs`](crate::exchange::merge_runs).
///
/// ```
/// use dirtymap::exchange::DirtyLog;
/// use dirtymap::{Granule, ToIovaRange};
///
/// # fn main() -> Result<(), dirtymap::Error> {
/// let slot = (0x10_0000..0x14_0000).to_iova_range()?; // bit 0 is its first page
/// let log = DirtyLog::words(&[0b110], slot, Granule::K4)?;
/// assert_eq!(log.count(), 2);
/// assert_eq!(log.runs().next(), Some((0x10_1000..0x10_3000).to_iova_range()?));
/// # Ok(())
/// # }
/// ```
#[doc(alias = "kvm_dirty_log")]
#[doc(alias = "cpu_physical_memory_set_dirty_lebitmap")]
#[derive(Clone, Copy, Debug)]
pub struct DirtyLog<'a> {
    form: Form<'a>,
    range: IovaRange,
    granule: Granule,
}

#[derive(Clone, Copy, Debug)]
enum Form<'a> {
    Words(&'a [u64]),
    Bytes(&'a [u8]),
}

impl<'a> DirtyLog<'a> {
    /// The log in `words`; bit 0 is the first granule of `range`.
    ///
    /// # Errors
    /// In this order: [`BitmapError::Unaligned`] if `range` does not start and end at multiples of
    /// `granule`, [`BitmapError::TooShort`] if there are fewer bits than `range` has granules.
    pub fn words(
        words: &'a [u64],
        range: IovaRange,
        granule: Granule,
    ) -> Result<Self, BitmapError> {
        Self::new(
            Form::Words(words),
            (words.len() as u64).saturating_mul(64),
            range,
            granule,
        )
    }

    /// The log in `bytes`; bit 0 is the first granule of `range`.
    ///
    /// # Errors
    /// As [`words`](Self::words).
    pub fn bytes(bytes: &'a [u8], range: IovaRange, granule: Granule) -> Result<Self, BitmapError> {
        Self::new(
            Form::Bytes(bytes),
            (bytes.len() as u64).saturating_mul(8),
            range,
            granule,
        )
    }

    fn new(
        form: Form<'a>,
        bits: u64,
        range: IovaRange,
        granule: Granule,
    ) -> Result<Self, BitmapError> {
        if !range.is_aligned(granule) {
            return Err(BitmapError::Unaligned { range, granule });
        }
        let needed = range.granules(granule);
        if needed > u128::from(bits) {
            return Err(BitmapError::TooShort {
                bits,
                needed,
                range,
                granule,
            });
        }
        Ok(DirtyLog {
            form,
            range,
            granule,
        })
    }

    /// The addresses of the log.
    pub fn range(&self) -> IovaRange {
        self.range
    }

    /// The bytes that one bit stands for.
    pub fn granule(&self) -> Granule {
        self.granule
    }

    /// The maximal runs of dirty granules, in order.
    pub fn runs(&self) -> LogRuns<'a> {
        LogRuns {
            log: *self,
            bits: RunBits::new(LogWords {
                log: *self,
                next: 0,
            }),
        }
    }

    /// The number of dirty granules.
    pub fn count(&self) -> u64 {
        let words = LogWords {
            log: *self,
            next: 0,
        };
        words.map(|(_, word)| u64::from(word.count_ones())).sum()
    }

    /// ORs the dirty bytes of this log into `target`, and returns how many bits that set there.
    /// Granules and bases may differ: a bit of `target` is set if any of its bytes is dirty here.
    /// Bits outside `target`'s range are not touched.
    ///
    /// # Errors
    /// [`BitmapError::Shrank`] or [`BitmapError::Window`] if `target` is a file of which a window
    /// cannot be mapped. Bits that were set before stay set.
    pub fn or_into(&self, target: &BitmapView<'_>) -> Result<u64, BitmapError> {
        let mut sink = target.sink();
        for (index, word) in (LogWords {
            log: *self,
            next: 0,
        }) {
            // Bits above the range are masked, so each of these stands for an address.
            let start = self.addresses(index * 64, index * 64).start();
            sink.put_mask(start, self.granule, word)?;
        }
        Ok(sink.bits_set())
    }

    fn last_bit(&self) -> u64 {
        (self.range.last().get() - self.range.start().get()) >> self.granule.lg2()
    }

    /// The addresses of the bits `first..=last`.
    fn addresses(&self, first: u64, last: u64) -> IovaRange {
        let base = self.range.start().get();
        let start = Iova::new(base + (first << self.granule.lg2()));
        let last = Iova::new(base + (last << self.granule.lg2()) + self.granule.mask());
        IovaRange::ascending(start, last)
    }
}

/// The words of a log that are not zero. Bits above the end of the range are zero.
#[derive(Clone, Debug)]
struct LogWords<'a> {
    log: DirtyLog<'a>,
    next: u64,
}

impl LogWords<'_> {
    /// The first word from `next` on that is not zero.
    fn seek(&self) -> Option<(u64, u64)> {
        let next = usize::try_from(self.next).ok()?;
        match self.log.form {
            Form::Words(words) => {
                let rest = words.get(next..)?;
                let nth = rest.iter().position(|word| *word != 0)?;
                Some((self.next + nth as u64, u64::from_le(rest[nth])))
            }
            Form::Bytes(bytes) => {
                let (words, tail) = bytes.get(next.checked_mul(8)?..)?.as_chunks::<8>();
                let nth = words.iter().position(|word| *word != [0; 8]);
                let word = match nth {
                    Some(nth) => words[nth],
                    // The bytes above the last whole word.
                    None => std::array::from_fn(|nth| tail.get(nth).copied().unwrap_or(0)),
                };
                let index = self.next + nth.unwrap_or(words.len()) as u64;
                (word != [0; 8]).then_some((index, u64::from_le_bytes(word)))
            }
        }
    }
}

impl Iterator for LogWords<'_> {
    type Item = (u64, u64);

    fn next(&mut self) -> Option<(u64, u64)> {
        let (index, word) = self.seek()?;
        self.next = index + 1;
        let left = self.log.last_bit().checked_sub(index * 64)?;
        let word = word & word_mask(0, left.min(63) as u32);
        // Only in the last word can all set bits be above the end.
        (word != 0).then_some((index, word))
    }
}

/// The maximal runs of dirty granules of a [`DirtyLog`], in order.
#[derive(Clone, Debug)]
pub struct LogRuns<'a> {
    log: DirtyLog<'a>,
    bits: RunBits<LogWords<'a>>,
}

impl Iterator for LogRuns<'_> {
    type Item = IovaRange;

    fn next(&mut self) -> Option<IovaRange> {
        let (first, last) = self.bits.next()?;
        Some(self.log.addresses(first, last))
    }
}

#[cfg(all(test, not(dirtymap_loom)))]
#[allow(clippy::unwrap_used)] // helpers of tests
mod tests {
    use super::*;
    use crate::bitmap::UserBitmap;

    fn range(start: u64, len: u64) -> IovaRange {
        IovaRange::from_len(Iova::new(start), len).unwrap()
    }

    #[test]
    fn a_log_says_what_a_view_of_the_same_bits_says() {
        let pattern = [0xF0F0_0000_FFFF_0001u64, u64::MAX, 0, 1 << 63, 1];
        let bytes: Vec<u8> = pattern.iter().flat_map(|word| word.to_le_bytes()).collect();
        for bits in 1..=5 * 64 {
            let all = range(7 << 12, bits << 12);
            let mut words = pattern;
            let view = UserBitmap::new(&mut words).view(all, Granule::K4).unwrap();
            let expect: Vec<_> = view.runs().collect();
            // No more bytes than the bits need: any length, words cut anywhere.
            let short = &bytes[..bits.div_ceil(8) as usize];
            for log in [
                DirtyLog::words(&pattern, all, Granule::K4).unwrap(),
                DirtyLog::bytes(&bytes, all, Granule::K4).unwrap(),
                DirtyLog::bytes(short, all, Granule::K4).unwrap(),
            ] {
                assert_eq!(log.runs().collect::<Vec<_>>(), expect, "{bits} bits");
                assert_eq!(log.count(), view.count());
            }
        }
    }

    #[test]
    fn or_into_converts_as_views_do() {
        let pattern = [0x8000_00F0_0000_5AC3u64, 0b1011];
        let log_range = range(70 << 12, 68 << 12);
        let log = DirtyLog::words(&pattern, log_range, Granule::K4).unwrap();
        for granule in [1 << 11, 1 << 12, 1 << 14].map(|bytes| Granule::from_bytes(bytes).unwrap())
        {
            let target = range(76 << 12, 48 << 12);
            let (mut from_log, mut from_view) = ([0u64; 3], [0u64; 3]);
            let view = UserBitmap::new(&mut from_log)
                .view(target, granule)
                .unwrap();
            let set = log.or_into(&view).unwrap();
            assert_eq!(set, view.count());
            let mut same = pattern;
            let source = UserBitmap::new(&mut same)
                .view(log_range, Granule::K4)
                .unwrap();
            let view = UserBitmap::new(&mut from_view)
                .view(target, granule)
                .unwrap();
            source.or_into(&view).unwrap();
            assert_eq!(from_log, from_view, "{granule}");
        }
    }

    #[test]
    fn a_log_that_is_too_short_or_off_is_refused() {
        assert!(matches!(
            DirtyLog::bytes(&[0; 2], range(0, 17 << 12), Granule::K4),
            Err(BitmapError::TooShort {
                bits: 16,
                needed: 17,
                ..
            })
        ));
        assert!(matches!(
            DirtyLog::words(&[0], range(512, 4096), Granule::K4),
            Err(BitmapError::Unaligned { .. })
        ));
        let top = range(u64::MAX - 4095, 4096);
        let log = DirtyLog::bytes(&[0xFF], top, Granule::K4).unwrap();
        assert_eq!(log.runs().collect::<Vec<_>>(), [top]);
    }
}
