//! The back end's side: a bitmap for guest memory that marks in the log of the front end.
//!
//! # The mark path
//! No lock and no wait: a mark counts itself as a reader of the region's log, ORs masks of up to 64 pages into it, and leaves. See
//! [`replaceable`](crate::adapters::replaceable) for what this owes to the front end: `replace` returns, and so the answer to
//! `VHOST_USER_SET_LOG_BASE` is sent, when nobody marks in the old log any more.
//!
//! # Marks without a log
//! Whoever finds no log has written before there was one, and the first copy of the front end has it. Only that a region
//! may be *added* while others have a log: what is written there until it has one is remembered, as one range, and marked in the
//! first log that it gets.

use std::fmt;
use std::io;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr;

use ::vm_memory::bitmap::{Bitmap, BitmapSlice, NewBitmap, WithBitmapSlice};
use ::vm_memory::{Address, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};
use vhost_user_backend::bitmap::{BitmapReplace, MemRegionBitmap, MmapLogReg};

use super::memory::LOG_PAGE;
use crate::adapters::replaceable::Replaceable;
use crate::bitmap::word_masks;
use crate::sync::{Arc, AtomicU64, Mutex, Ordering, lock};

/// The part of a log that belongs to one region of guest memory.
pub struct RegionLog {
    memory: Arc<MmapLogReg>,
    /// The first and the last guest physical address of the region.
    start: u64,
    last: u64,
    /// Where the log lies in this process.
    base: usize,
    /// The words all of whose bytes belong to pages of the region, and so to the log: its own end is not told.
    whole: Range<u64>,
}

impl fmt::Debug for RegionLog {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RegionLog")
            .field("start", &self.start)
            .field("last", &self.last)
            .finish_non_exhaustive()
    }
}

fn invalid(text: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, text)
}

impl MemRegionBitmap for RegionLog {
    /// # Errors
    /// `InvalidData` if the region is empty, ends past 2^64, or the log has no bit for its last page. Lengths are rounded up: a page
    /// of which the region has a part has a bit.
    fn new<R: GuestMemoryRegion>(region: &R, memory: Arc<MmapLogReg>) -> io::Result<Self> {
        let (start, len) = (region.start_addr().raw_value(), region.len());
        let last = len
            .checked_sub(1)
            .and_then(|more| start.checked_add(more))
            .ok_or_else(|| invalid(format!("a region of {len:#x} bytes at {start:#x}")))?;
        let byte = |address: u64| address >> LOG_PAGE.lg2() >> 3;
        let end = usize::try_from(byte(last)).ok();
        // The log does not tell its length; its index panics past the end, and that is the one way to ask.
        let reaches = |end: usize| {
            let look = || memory[end].load(Ordering::Relaxed);
            catch_unwind(AssertUnwindSafe(look)).is_ok()
        };
        if !end.is_some_and(reaches) {
            return Err(invalid(format!(
                "the log has no bit for the last page of the region [{start:#x}, {last:#x}]"
            )));
        }
        let base = ptr::from_ref(&memory[0]).expose_provenance();
        let whole = match base % align_of::<AtomicU64>() {
            0 => byte(start).div_ceil(8)..(byte(last) + 1) / 8,
            _ => 0..0,
        };
        Ok(RegionLog {
            memory,
            start,
            last,
            base,
            whole,
        })
    }
}

impl RegionLog {
    /// The pages of `len` bytes from `offset` on, as far as they lie in the region; `None` if none does.
    fn pages(&self, offset: u64, len: u64) -> Option<(u64, u64)> {
        let first = self
            .start
            .checked_add(offset)
            .filter(|at| *at <= self.last)?;
        let last = first.saturating_add(len.checked_sub(1)?).min(self.last);
        Some((first >> LOG_PAGE.lg2(), last >> LOG_PAGE.lg2()))
    }

    fn mark(&self, offset: u64, len: u64) {
        let Some((first, last)) = self.pages(offset, len) else {
            return;
        };
        for (word, mask) in word_masks(first, last) {
            self.set(word, mask);
        }
    }

    /// Sets the bits of one word, each of which belongs to a page of the region.
    fn set(&self, word: u64, mask: u64) {
        if self.whole.contains(&word) {
            // Release: pairs with the Acquire of the front end that reads and clears it; publishes the data.
            self.word(word).fetch_or(mask.to_le(), Ordering::Release);
            return;
        }
        for (n, byte) in mask.to_le_bytes().into_iter().enumerate() {
            if byte != 0 {
                // Release: as above.
                self.memory[word as usize * 8 + n].fetch_or(byte, Ordering::Release);
            }
        }
    }

    /// One of the words in `whole`.
    fn word(&self, word: u64) -> &AtomicU64 {
        debug_assert!(self.whole.contains(&word));
        let at = ptr::with_exposed_provenance::<AtomicU64>(self.base + word as usize * 8);
        // SAFETY:
        // - in bounds: all bytes of the word lie at or before the last byte of the region, of which `new` has seen that the
        //   log has it, and aligned, which `new` has seen too.
        // - alive: the mapping is that of `memory`, which `self` holds; it was made by a system call, outside of what the
        //   compiler knows, and its address was exposed.
        // - shared: all that have the mapping go at it by atomic operations, as the protocol demands; those of other processes
        //   may be of other sizes, as in every log that is shared with them.
        unsafe { &*at }
    }

    fn is_dirty(&self, offset: u64) -> bool {
        let Some((page, _)) = self.pages(offset, 1) else {
            return false;
        };
        // Relaxed: a hint for whoever asks.
        let byte = self.memory[(page / 8) as usize].load(Ordering::Relaxed);
        byte >> (page % 8) & 1 == 1
    }
}

/// A bitmap for the guest memory of a vhost-user back end: `GuestMemoryMmap<LogBitmap>`, and `type Bitmap = LogBitmap`.
///
/// Clones mark the same region. `default` is a bitmap of unknown length.
#[derive(Clone, Debug, Default)]
pub struct LogBitmap {
    region: Arc<Region>,
}

#[derive(Debug)]
struct Region {
    log: Replaceable<RegionLog>,
    /// Bytes of the region.
    len: u64,
    early: Early,
    outside: AtomicU64,
}

impl Default for Region {
    fn default() -> Self {
        Region {
            log: Replaceable::default(),
            len: u64::MAX,
            early: Early::default(),
            outside: AtomicU64::new(0),
        }
    }
}

impl LogBitmap {
    /// Whether marks go to a log.
    pub fn has_log(&self) -> bool {
        self.region.log.read(|log| log.is_some())
    }

    /// The first and the last byte of what was written while there was no log, counted from the start of the region. The first log
    /// gets the whole range marked.
    pub fn early(&self) -> Option<(u64, u64)> {
        self.region.early.get()
    }

    /// How many marks reached past the end of the region.
    pub fn outside_marks(&self) -> u64 {
        // Relaxed: a statistic.
        self.region.outside.load(Ordering::Relaxed)
    }

    fn mark(&self, offset: Option<u64>, len: usize) {
        if len == 0 {
            return;
        }
        let len = len as u64;
        let room = offset.and_then(|offset| self.region.len.checked_sub(offset));
        if room.is_none_or(|room| len > room) {
            // Relaxed: a statistic.
            self.region.outside.fetch_add(1, Ordering::Relaxed);
        }
        let Some((offset, room)) = offset.zip(room).filter(|(_, room)| *room > 0) else {
            return;
        };
        let len = len.min(room);
        self.region.log.read(|log| match log {
            Some(log) => log.mark(offset, len),
            None => self
                .region
                .early
                .add(offset, offset.saturating_add(len - 1)),
        });
    }

    fn is_dirty(&self, offset: Option<u64>) -> bool {
        let Some(offset) = offset else {
            return false;
        };
        self.region.log.read(|log| match log {
            Some(log) => log.is_dirty(offset),
            None => (self.region.early.get())
                .is_some_and(|(first, last)| first <= offset && offset <= last),
        })
    }

    fn memory(&self) -> Option<Arc<MmapLogReg>> {
        self.region.log.read(|log| Some(Arc::clone(&log?.memory)))
    }
}

impl BitmapReplace for LogBitmap {
    type InnerBitmap = RegionLog;

    /// Waits until no thread marks in the log before this one; then none will.
    fn replace(&self, log: RegionLog) {
        drop(self.region.log.replace(Box::new(log)));
        // Who found no log has left by now, and what it wrote is remembered.
        if let Some((first, last)) = self.region.early.take() {
            self.mark_range(first, last);
        }
    }
}

impl LogBitmap {
    fn mark_range(&self, first: u64, last: u64) {
        self.region.log.read(|log| {
            if let Some(log) = log {
                log.mark(first, (last - first).saturating_add(1));
            }
        });
    }
}

impl NewBitmap for LogBitmap {
    fn with_len(len: usize) -> Self {
        let len = len as u64;
        LogBitmap {
            region: Arc::new(Region {
                len,
                ..Region::default()
            }),
        }
    }
}

impl<'a> WithBitmapSlice<'a> for LogBitmap {
    type S = LogSlice<'a>;
}

impl Bitmap for LogBitmap {
    fn mark_dirty(&self, offset: usize, len: usize) {
        self.mark(Some(offset as u64), len);
    }

    /// Whether the page is marked in the log, as far as the front end has not read it yet.
    fn dirty_at(&self, offset: usize) -> bool {
        self.is_dirty(Some(offset as u64))
    }

    fn slice_at(&self, offset: usize) -> LogSlice<'_> {
        LogSlice {
            bitmap: self,
            offset: Some(offset as u64),
        }
    }
}

/// A [`LogBitmap`] from some byte on. Slices of slices add up, and never wrap.
#[derive(Clone, Debug)]
pub struct LogSlice<'a> {
    bitmap: &'a LogBitmap,
    /// `None` past 2^64 - 1.
    offset: Option<u64>,
}

impl LogSlice<'_> {
    fn offset(&self, more: usize) -> Option<u64> {
        self.offset?.checked_add(more as u64)
    }
}

impl WithBitmapSlice<'_> for LogSlice<'_> {
    type S = Self;
}

impl BitmapSlice for LogSlice<'_> {}

impl Bitmap for LogSlice<'_> {
    fn mark_dirty(&self, offset: usize, len: usize) {
        self.bitmap.mark(self.offset(offset), len);
    }

    fn dirty_at(&self, offset: usize) -> bool {
        self.bitmap.is_dirty(self.offset(offset))
    }

    fn slice_at(&self, offset: usize) -> Self {
        LogSlice {
            bitmap: self.bitmap,
            offset: self.offset(offset),
        }
    }
}

/// One range that holds all that was written without a log.
#[derive(Debug)]
struct Early {
    first: AtomicU64,
    last: AtomicU64,
}

impl Default for Early {
    fn default() -> Self {
        Early {
            first: AtomicU64::new(u64::MAX),
            last: AtomicU64::new(0),
        }
    }
}

impl Early {
    /// Stores nothing if the range has it.
    fn add(&self, first: u64, last: u64) {
        // Relaxed, here and below: `Replaceable` orders it before the first log's coming.
        if first < self.first.load(Ordering::Relaxed) {
            self.first.fetch_min(first, Ordering::Relaxed);
        }
        if last > self.last.load(Ordering::Relaxed) {
            self.last.fetch_max(last, Ordering::Relaxed);
        }
    }

    fn get(&self) -> Option<(u64, u64)> {
        let first = self.first.load(Ordering::Relaxed);
        let last = self.last.load(Ordering::Relaxed);
        (first <= last).then_some((first, last))
    }

    /// When nobody adds any more.
    fn take(&self) -> Option<(u64, u64)> {
        let taken = self.get();
        self.first.store(u64::MAX, Ordering::Relaxed);
        self.last.store(0, Ordering::Relaxed);
        taken
    }
}

/// Gives the log to regions that come after it.
///
/// A vhost-user daemon hands the log to the regions that there are when `VHOST_USER_SET_LOG_BASE` comes, and forgets it. Regions
/// that are added later, and all of them after a new table of memory, would be written to without a trace until the front end happens to
/// send a log again. The back end is told of them by `update_memory`: call [`update`](Self::update) there.
#[derive(Debug, Default)]
pub struct LogFollower {
    known: Mutex<Vec<LogBitmap>>,
}

impl LogFollower {
    /// Gives every region of `memory` without a log the one that others of it have, or those of the last call had. Returns how
    /// many regions that were. What was written to them before is marked.
    ///
    /// # Errors
    /// `InvalidData` if the log does not reach the end of a region: the front end has to send a longer one, and until then
    /// writes to that region are remembered. The other regions have the log all the same.
    pub fn update(&self, memory: &GuestMemoryMmap<LogBitmap>) -> io::Result<usize> {
        let regions = || memory.iter().map(|region| (region, (**region).bitmap()));
        let mut known = lock(&self.known);
        let log = regions()
            .map(|(_, bitmap)| bitmap)
            .chain(known.iter())
            .find_map(LogBitmap::memory);
        // A table without regions, on the way to another one, does not forget the log.
        if regions().next().is_some() {
            known.clear();
            known.extend(regions().map(|(_, bitmap)| bitmap.clone()));
        }
        let Some(log) = log else {
            return Ok(0);
        };
        let mut given = 0;
        let mut refused = None;
        for (region, bitmap) in regions().filter(|(_, bitmap)| !bitmap.has_log()) {
            match RegionLog::new(region, Arc::clone(&log)) {
                Ok(part) => {
                    bitmap.replace(part);
                    given += 1;
                }
                Err(error) => refused = Some(error),
            }
        }
        refused.map_or(Ok(given), Err)
    }
}
