//! A pulled log: a call of another program's interface reads and clears it.

use std::collections::TryReserveError;

use super::pending::{Pending, zeroed};
use super::{DirtySource, LeafSink, Stopped, Tracking};
use crate::bitmap::Sink;
use crate::error::Error;
use crate::flush::FlushGather;
use crate::sync::{Mutex, lock};
use crate::units::{Granule, Iova, IovaRange, ToIovaRange};

/// A dirty log of another program, with a call that reads it into words and clears it: VFIO's
/// device log, a hypervisor whose handle is hidden by a trait, a remote process.
///
/// `pull(range, words)` sets bit `n` of `words` for each page `n` of `range` that was written, and
/// clears it in the log. It is called for parts of the log, which begin at a multiple of 64 pages
/// from its start. The words come zeroed, and bits after the last page are ignored. On
/// return, every later write to such a page must be seen by a later pull: an interface that
/// write-protects flushes its TLBs first.
///
/// The report of a pull is the only trace of a write, so its pages are pending, in memory that
/// [`new`](Self::new) allocates, until a lease has recorded them. A pull that fails or panics may
/// have cleared pages without reporting them, so its whole range becomes dirty.
///
/// Harvests and peeks of one `PulledLog` wait for each other, because they share that memory, and
/// they wait for `pull`. Harvests do not allocate.
///
/// What the log holds when its tracking begins is discarded: at the attach to a space that tracks,
/// otherwise at [`start_tracking`](crate::AddressSpace::start_tracking). Attach it before its
/// writers begin, or mark these pages yourself.
///
/// ```
/// use dirtymap::{Access, AddressSpace, Granule, HarvestRequest, PulledLog, UserBitmap};
/// # use dirtymap::{IovaRange, ToIovaRange};
/// # fn read_and_clear(first_word: usize, words: &mut [u64]) {
/// #     if first_word == 0 { words[0] = 1 << 3; }
/// # }
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let ram = (0..64 << 20).to_iova_range()?;
/// let space = AddressSpace::new(Granule::K4);
/// space.map(ram, 0, Access::ReadWrite)?;
/// let pull = move |part: IovaRange, words: &mut [u64]| -> std::io::Result<()> {
///     let first_page = (part.start().get() - ram.start().get()) / 4096;
///     read_and_clear((first_page / 64) as usize, words); // your ioctl
///     Ok(())
/// };
/// space.attach(PulledLog::new(ram, Granule::K4, pull)?)?;
/// space.start_tracking()?;
/// # Ok(())
/// # }
/// ```
#[doc(alias = "VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT")]
#[derive(Debug)]
pub struct PulledLog<F> {
    range: IovaRange,
    page: Granule,
    state: Mutex<State<F>>,
}

#[derive(Debug)]
struct State<F> {
    pull: F,
    pending: Pending,
    /// The words that a pull fills, one for each 64 pages.
    words: Vec<u64>,
    tracks: bool,
}

impl<F, E> PulledLog<F>
where
    F: FnMut(IovaRange, &mut [u64]) -> Result<(), E> + Send,
    E: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    /// The log of `range`, which has one bit for each `page`. Reserves two bits for each page.
    ///
    /// `pull` is called for parts of `range` that begin at a multiple of 64 pages from its start,
    /// and end at such a multiple or at its end.
    ///
    /// # Errors
    /// In this order: those of the range, [`Error::Unaligned`] unless `range` is made of whole
    /// pages, [`Error::Source`] if there is no memory for the bits.
    pub fn new(range: impl ToIovaRange, page: Granule, pull: F) -> Result<Self, Error> {
        let range = range.to_iova_range()?;
        if !range.is_aligned(page) {
            return Err(Error::Unaligned {
                range,
                granule: page,
            });
        }
        let no_memory = |error: TryReserveError| Error::source_failed(error);
        let pending = Pending::new(range, page).map_err(no_memory)?;
        let words = zeroed(pending.words().len()).map_err(no_memory)?;
        Ok(PulledLog {
            range,
            page,
            state: Mutex::new(State {
                pull,
                pending,
                words,
                tracks: false,
            }),
        })
    }

    /// Pulls the words around `range`. The written pages are pending afterwards.
    fn pull(&self, state: &mut State<F>, range: IovaRange) -> Result<(), Error> {
        let Some((first, last)) = state.pending.numbers(range) else {
            return Ok(());
        };
        let (first, last) = (first & !63, (last | 63).min(state.pending.pages() - 1));
        // Both fit: the words were allocated.
        let (from, to) = ((first / 64) as usize, (last / 64) as usize);
        let asked = state.pending.addresses(first, last);
        let words = &mut state.words[from..=to];
        words.fill(0);
        let mut unknown = Unknown {
            pending: &mut state.pending,
            asked,
            is_known: false,
        };
        (state.pull)(asked, words).map_err(|error| Error::Source(error.into()))?;
        unknown.is_known = true;
        unknown.pending.add_words(from, words);
        Ok(())
    }

    fn stopped(&self, range: IovaRange, error: Error) -> Stopped {
        let at: Iova = range.start().max(self.range.start());
        Stopped { at, error }
    }
}

/// The range of a pull, which is dirty as a whole unless the pull succeeds.
struct Unknown<'a> {
    pending: &'a mut Pending,
    asked: IovaRange,
    is_known: bool,
}

impl Drop for Unknown<'_> {
    fn drop(&mut self) {
        if !self.is_known {
            self.pending.add_range(self.asked);
        }
    }
}

impl<F, E> DirtySource for PulledLog<F>
where
    F: FnMut(IovaRange, &mut [u64]) -> Result<(), E> + Send,
    E: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    fn page(&self) -> Granule {
        self.page
    }

    fn unmap(&self, range: IovaRange, _: &mut FlushGather, dirty: &mut dyn FnMut(IovaRange)) {
        let mut state = lock(&self.state);
        // A pull that fails makes the whole range pending, and the whole range is reported then.
        let _ = self.pull(&mut state, range);
        state.pending.drain(range, dirty);
    }

    fn set_tracking(&self, to: Tracking) -> Result<(), Error> {
        let mut state = lock(&self.state);
        if to.is_on() && !state.tracks {
            self.pull(&mut state, self.range)?;
            state.pending.clear();
        }
        state.tracks = to.is_on();
        Ok(())
    }

    fn read_and_clear(&self, range: IovaRange, out: &mut LeafSink<'_, '_>) -> Result<(), Stopped> {
        let mut state = lock(&self.state);
        self.pull(&mut state, range)
            .map_err(|error| self.stopped(range, error))?;
        state.pending.take(range, out)
    }

    fn peek(&self, range: IovaRange, sink: &mut Sink<'_>) -> Result<(), Stopped> {
        let mut state = lock(&self.state);
        self.pull(&mut state, range)
            .map_err(|error| self.stopped(range, error))?;
        state.pending.peek(range, sink)
    }
}
