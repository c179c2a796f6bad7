//! The back end's side: a bitmap for guest memory that marks in the log of the front end.
//!
//! # The mark path
//! No lock and no wait: a mark counts itself as a reader of the region's log, ORs masks of up to 64
//! pages into it, and leaves. See [`replaceable`](crate::replaceable) for what this owes
//! to the front end: `replace` returns, and so the answer to `VHOST_USER_SET_LOG_BASE` is sent,
//! when no thread marks in the old log any more.
//!
//! # Marks without a log
//! A mark that finds no log follows a write that came before the log, and the first copy of the
//! front end has that write. One case remains: a region may be *added* while others have a log. The
//! writes to it until it has one are remembered, as one range, which is marked in the first log
//! that it gets.

use std::io;

use vhost_user_backend::bitmap::{BitmapReplace, MmapLogReg};
use vm_memory::bitmap::{Bitmap, BitmapSlice, NewBitmap, WithBitmapSlice};
use vm_memory::{GuestMemoryBackend, GuestMemoryMmap};

use super::memory::LogError;
use super::region::RegionLog;
use crate::replaceable::Replaceable;
use dirtymap::sync::{Arc, AtomicU64, Mutex, Ordering, lock};

/// A bitmap for the guest memory of a vhost-user back end: `GuestMemoryMmap<LogBitmap>`, and `type
/// Bitmap = LogBitmap`.
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

    /// The first and the last byte of what was written while there was no log, counted from the
    /// start of the region. The first log gets the whole range marked.
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

    fn memory(&self) -> Option<Result<Arc<MmapLogReg>, LogError>> {
        self.region.log.read(|log| log.map(RegionLog::memory))
    }
}

impl BitmapReplace for LogBitmap {
    type InnerBitmap = RegionLog;

    /// Waits until no thread marks in the previous log. From then on no thread does.
    fn replace(&self, log: RegionLog) {
        drop(self.region.log.replace(Box::new(log)));
        // Each thread that found no log has left by now, and `early` has what it wrote.
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

    /// To be called when no thread adds any more.
    fn take(&self) -> Option<(u64, u64)> {
        let taken = self.get();
        self.first.store(u64::MAX, Ordering::Relaxed);
        self.last.store(0, Ordering::Relaxed);
        taken
    }
}

/// Gives the log to regions that come after it.
///
/// A vhost-user daemon hands the log to the regions that there are when `VHOST_USER_SET_LOG_BASE`
/// comes, and forgets it. Regions that are added later, and all of them after a new table of
/// memory, would be written to without a trace until the front end happens to send a log again. The
/// back end is told of them by `update_memory`: call [`update`](Self::update) there.
#[derive(Debug, Default)]
pub struct LogFollower {
    known: Mutex<Vec<LogBitmap>>,
}

impl LogFollower {
    /// Gives every region of `memory` without a log the one that others of it have, or those of the
    /// last call had. Returns the number of those regions. What was written to them before is
    /// marked.
    ///
    /// # Errors
    /// `InvalidData` with a [`LogError`]: [`TooShort`](LogError::TooShort) or
    /// [`NoMemory`](LogError::NoMemory) if the log does not reach the end of a region. The front
    /// end has to send a longer one, and until then writes to that region are remembered. The other
    /// regions have the log all the same. [`Forked`](LogError::Forked) in a child of a fork: no
    /// region is touched.
    pub fn update(&self, memory: &GuestMemoryMmap<LogBitmap>) -> io::Result<usize> {
        let regions = || memory.iter().map(|region| (region, (**region).bitmap()));
        let mut known = lock(&self.known);
        let log = regions()
            .map(|(_, bitmap)| bitmap)
            .chain(known.iter())
            .find_map(LogBitmap::memory)
            .transpose()?;
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
            match RegionLog::of(region, Arc::clone(&log)) {
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
