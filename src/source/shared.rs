//! A log in shared memory: another program sets bits, and harvests take them.

use super::{DirtySource, LeafSink, Stopped, Tracking};
use crate::bitmap::Sink;
use crate::error::{BitmapError, Error};
use crate::flush::FlushGather;
use crate::sync::{AtomicBool, AtomicU64, Ordering};
use crate::units::{Granule, Iova, IovaRange, ToIovaRange};
use crate::words::{word_masks, word_runs};

/// A dirty log in memory that its writers share with the harvests: bit `n` of the words is page `n`
/// of its range, least significant bit first.
///
/// A writer sets the bit of a page **after** its write, by `fetch_or` with [`Ordering::Release`] or
/// stronger, at each write. A writer that first looks, and skips a bit that is set, needs a full
/// fence between its write and the look. It may still lose the write, because a harvest of this
/// source owes no flush. A harvest takes a word by one `fetch_and`, so it never waits.
///
/// The words may be any value that implements `AsRef<[AtomicU64]>`: an `Arc<[AtomicU64]>` (which
/// `Arc::from(vec)` makes), a `Vec`, a mapping of your own.
///
/// What the log holds when its tracking begins is discarded: at the attach to a space that tracks,
/// otherwise at [`start_tracking`](crate::AddressSpace::start_tracking). Attach it before its
/// writers begin, or mark these pages yourself.
///
/// ```
/// use dirtymap::{
///     Access, AddressSpace, Granule, HarvestRequest, SharedLog, ToIovaRange, UserBitmap,
/// };
/// use std::sync::Arc;
/// use std::sync::atomic::{AtomicU64, Ordering};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let words: Arc<[AtomicU64]> = (0..4).map(|_| AtomicU64::new(0)).collect();
/// let ram = (0..256 * 4096).to_iova_range()?;
/// let space = AddressSpace::new(Granule::K4);
/// space.map(ram, 0, Access::ReadWrite)?;
/// space.attach(SharedLog::new(ram, Granule::K4, Arc::clone(&words))?)?;
/// space.start_tracking()?;
///
/// words[1].fetch_or(1 << 6, Ordering::Release); // a device wrote page 70
///
/// let mut bits = [0; 4];
/// let request = HarvestRequest::new(ram, Granule::K4);
/// let lease = space.harvest(&request, UserBitmap::new(&mut bits))?;
/// lease.sync()?.commit();
/// assert_eq!(bits, [0, 1 << 6, 0, 0]);
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct SharedLog<W> {
    range: IovaRange,
    page: Granule,
    words: W,
    tracks: AtomicBool,
}

impl<W: AsRef<[AtomicU64]> + Send + Sync> SharedLog<W> {
    /// The log of `range`, with one bit for each `page` of it in `words`.
    ///
    /// # Errors
    /// In this order: those of the range, [`Error::Unaligned`] unless `range` is made of whole
    /// pages, [`BitmapError::TooShort`] if there are fewer bits than pages.
    pub fn new(range: impl ToIovaRange, page: Granule, words: W) -> Result<Self, Error> {
        let range = range.to_iova_range()?;
        if !range.is_aligned(page) {
            return Err(Error::Unaligned {
                range,
                granule: page,
            });
        }
        let bits = (words.as_ref().len() as u64).saturating_mul(64);
        let needed = range.granules(page);
        if needed > u128::from(bits) {
            return Err(Error::Bitmap(BitmapError::TooShort {
                bits,
                needed,
                range,
                granule: page,
            }));
        }
        Ok(SharedLog {
            range,
            page,
            words,
            tracks: AtomicBool::new(false),
        })
    }

    /// The words of the log that have bits of `range`: their first page, the mask of the bits, and
    /// the word.
    fn words(&self, range: IovaRange) -> impl Iterator<Item = (Iova, u64, &AtomicU64)> {
        let base = self.range.start().get();
        let number = |iova: Iova| (iova.get() - base) >> self.page.lg2();
        let bits = range.intersection(self.range).map(|inside| {
            let (first, last) = (number(inside.start()), number(inside.last()));
            word_masks(first, last)
        });
        bits.into_iter().flatten().filter_map(move |(word, mask)| {
            // Never past the address space: the word has a page of the range.
            let start = Iova::new(base + ((word * 64) << self.page.lg2()));
            let index = usize::try_from(word).ok()?;
            Some((start, mask, self.words.as_ref().get(index)?))
        })
    }

    /// Takes the bits of `mask`. Returns those that were set.
    fn take(word: &AtomicU64, mask: u64) -> u64 {
        // Acquire: pairs with the Release of the writer that set the bit; its data is visible to
        // the copies of this lease. Release: a thread that sees the bit clear sees it recorded
        // before.
        word.fetch_and(!mask, Ordering::AcqRel) & mask
    }
}

impl<W: AsRef<[AtomicU64]> + Send + Sync> DirtySource for SharedLog<W> {
    fn page(&self) -> Granule {
        self.page
    }

    fn unmap(&self, range: IovaRange, _: &mut FlushGather, dirty: &mut dyn FnMut(IovaRange)) {
        for (start, mask, word) in self.words(range) {
            for (first, last) in word_runs(Self::take(word, mask)) {
                let page = |n: u32| Iova::new(start.get() + (u64::from(n) << self.page.lg2()));
                let last = page(last).granule_last(self.page);
                if let Ok(run) = IovaRange::new(page(first), last) {
                    dirty(run);
                }
            }
        }
    }

    fn set_tracking(&self, to: Tracking) -> Result<(), Error> {
        // Relaxed: the lock of the space orders the switches, and nothing else looks at it.
        let tracked = self.tracks.swap(to.is_on(), Ordering::Relaxed);
        if to.is_on() && !tracked {
            for (_, mask, word) in self.words(self.range) {
                Self::take(word, mask);
            }
        }
        Ok(())
    }

    fn read_and_clear(&self, range: IovaRange, out: &mut LeafSink<'_, '_>) -> Result<(), Stopped> {
        for (start, mask, word) in self.words(range) {
            // Acquire: as in `take`, for a page that another harvest clears first.
            let seen = word.load(Ordering::Acquire) & mask;
            out.take_many(start, self.page, seen, |mask| Self::take(word, mask))?;
        }
        Ok(())
    }

    fn peek(&self, range: IovaRange, sink: &mut Sink<'_>) -> Result<(), Stopped> {
        for (start, mask, word) in self.words(range) {
            // Acquire: as in `read_and_clear`.
            let seen = word.load(Ordering::Acquire) & mask;
            sink.record_mask(start, self.page, seen)
                .map_err(|error| Stopped {
                    at: start.max(range.start()),
                    error,
                })?;
        }
        Ok(())
    }
}
