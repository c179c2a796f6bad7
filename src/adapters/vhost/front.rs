//! The front end's side: logs that are swapped, and a source that joins harvests.
//!
//! # The swap
//! ```text
//!  front end                                    back end
//!  S1  make a fresh log, list it behind the old
//!  S2  send it                                  marks in the old one
//!                                               replaces it, waits until nobody marks in the old one, answers
//!  S3  got the answer                           marks in the fresh one
//!  S4  OR what is left of the old into the fresh
//!  S5  take the old one off the list
//! ```
//!
//! *Never invisible:* a harvest looks at all logs of the list. Before S1 a back end has no fresh log to mark in; between S1 and S5
//! both are on the list; and when the old one leaves it, everything in it is in the fresh one. S4 clears nothing: a harvest that takes
//! a page out of the old one meanwhile has reported it, and it may be reported once more.
//! *Nothing later:* after S3 nobody marks in the old log, so S4 has the last of it.

use super::memory::{LOG_PAGE, LogError, LogMemory};
use crate::adapters::replaceable::Replaceable;
use crate::bitmap::{Sink, word_mask, word_runs};
use crate::error::Error;
use crate::flush::{FlushGather, Invalidated};
use crate::source::{DirtySource, LeafSink, Mapping, Stopped};
use crate::sync::{Arc, AtomicBool, AtomicU64, Mutex, Ordering, lock};
use crate::units::{Granule, Iova, IovaRange};

/// Words that are looked at together before a closer look: one cache line.
const LINE: u64 = 8;

/// What a harvest looks at: the newest log last.
type Logs = Vec<Arc<LogMemory>>;

/// The dirty log of a vhost or vhost-user front end, and a [`DirtySource`] over it: attach it to a space whose addresses are
/// guest physical addresses, and what back ends mark is in every harvest.
///
/// Bit `n` of the log is the page of 4 KiB at the address `4096 * n` of the space, whatever its own page and wherever its areas
/// begin. Harvests exchange word by word, with back ends running, and clear a bit after it was recorded. What a lease puts back
/// goes to the marks of the space: the log is left to the back ends.
#[derive(Debug)]
pub struct VhostLog {
    /// What harvests see of `list`.
    shown: Replaceable<Logs>,
    /// Held by who changes it.
    list: Mutex<Logs>,
    tracking: AtomicBool,
}

impl VhostLog {
    /// A clean log for memory up to the address `last`: that of the last byte of RAM. Its size is rounded up to 8 bytes.
    ///
    /// # Errors
    /// [`LogError::Memory`].
    pub fn new(last: Iova) -> Result<Self, LogError> {
        let list = vec![Arc::new(LogMemory::new(last)?)];
        let shown = Replaceable::default();
        shown.replace(Box::new(list.clone()));
        Ok(VhostLog {
            shown,
            list: Mutex::new(list),
            tracking: AtomicBool::new(false),
        })
    }

    /// The newest log: what to send with `VHOST_USER_SET_LOG_BASE` to a back end that has none yet.
    pub fn memory(&self) -> Arc<LogMemory> {
        let list = lock(&self.list);
        // Never empty: it is made with one log, and only what is older than the newest is taken off.
        Arc::clone(&list[list.len() - 1])
    }

    /// Begins a swap: makes a clean log that reaches `last` or as far as the newest one, whatever is farther. From now on
    /// harvests look at both. Send [`Swap::memory`] to every back end, and when all have answered, say so by
    /// [`Swap::acknowledged`].
    ///
    /// Needed when memory grows beyond the log. A swap that is dropped, because a back end has refused or is gone, leaves
    /// both logs in use until the next one is acknowledged. Waits for harvests that are under way.
    ///
    /// # Errors
    /// [`LogError::Memory`]; nothing has changed then.
    pub fn swap(&self, last: Iova) -> Result<Swap<'_>, LogError> {
        let fresh = Arc::new(LogMemory::new(last.max(self.memory().last()))?);
        let mut list = lock(&self.list);
        list.push(Arc::clone(&fresh));
        self.shown.replace(Box::new(list.clone()));
        drop(list);
        Ok(Swap { log: self, fresh })
    }

    /// Calls `read` with the logs that there are.
    fn read<R>(&self, read: impl FnOnce(&[Arc<LogMemory>]) -> R) -> R {
        self.shown
            .read(|logs| read(logs.map_or(&[], Vec::as_slice)))
    }
}

/// A log that back ends are about to take up: see [`VhostLog::swap`].
#[must_use = "until the swap is acknowledged, harvests look at both logs"]
#[derive(Debug)]
pub struct Swap<'a> {
    log: &'a VhostLog,
    fresh: Arc<LogMemory>,
}

impl Swap<'_> {
    /// The fresh log, to be sent.
    pub fn memory(&self) -> &LogMemory {
        &self.fresh
    }

    /// Every back end has answered: none marks in the logs before this one. What is left of them is carried over, and they are
    /// given up. Returns how many pages that were. Waits for harvests that are under way.
    pub fn acknowledged(self) -> u64 {
        let mut list = lock(&self.log.list);
        let place = list.iter().position(|log| Arc::ptr_eq(log, &self.fresh));
        let mut carried = 0;
        for old in list.drain(..place.unwrap_or(0)) {
            carried += carry_over(old.words(), self.fresh.words());
        }
        self.log.shown.replace(Box::new(list.clone()));
        carried
    }
}

/// S4: ORs what is left of `old` into `fresh`, which is not shorter; how many bits there were.
fn carry_over(old: &[AtomicU64], fresh: &[AtomicU64]) -> u64 {
    let mut carried = 0;
    for (old, fresh) in old.iter().zip(fresh) {
        // Acquire: pairs with the Release of a mark; passes on the data that it speaks of.
        let left = old.load(Ordering::Acquire);
        if left != 0 {
            carried += u64::from(left.count_ones());
            // Release: pairs with the Acquire in `seen`.
            fresh.fetch_or(left, Ordering::Release);
        }
    }
    carried
}

/// The pages of `range`, as the words of a log and the bits in them; words that no log has are left out, and so are, at a
/// glance, lines in which all logs are clean.
fn dirty_words(logs: &[Arc<LogMemory>], range: IovaRange) -> impl Iterator<Item = (usize, u64)> {
    let (first, last) = (
        range.start().get() >> LOG_PAGE.lg2(),
        range.last().get() >> LOG_PAGE.lg2(),
    );
    let words = logs.iter().map(|log| log.words().len()).max().unwrap_or(0) as u64;
    let lines = first / 64 / LINE..=last / 64 / LINE;
    let glance = move |line: &u64| {
        let (from, to) = (line * LINE, (line * LINE + LINE).min(words));
        logs.iter().any(|log| {
            let line = log.words().get(from as usize..to as usize);
            // Relaxed: a mark that came before the harvest is seen by any load; who takes it looks again.
            let or = |or, word: &AtomicU64| or | word.load(Ordering::Relaxed);
            line.map_or(log.words().len() as u64 > from, |line| {
                line.iter().fold(0, or) != 0
            })
        })
    };
    let end = words.div_ceil(LINE);
    lines
        .take_while(move |line| *line < end)
        .filter(glance)
        .flat_map(move |line| {
            let from = (line * LINE).max(first / 64);
            let to = (line * LINE + LINE - 1).min(last / 64).min(words - 1);
            (from..=to).map(move |word| {
                let low = first.saturating_sub(word * 64) as u32;
                let high = (last - word * 64).min(63) as u32;
                (word as usize, word_mask(low, high))
            })
        })
}

/// What is set of `mask` in a word, in any log.
fn seen(logs: &[Arc<LogMemory>], word: usize, mask: u64) -> u64 {
    let each = logs.iter().filter_map(|log| log.words().get(word));
    // Acquire: pairs with the Release of a mark, by a back end or in `carry_over`.
    let or = each.fold(0, |or, word| or | word.load(Ordering::Acquire));
    u64::from_le(or) & mask
}

/// Clears `mask` in a word of all logs; what of it was set.
fn clear(logs: &[Arc<LogMemory>], word: usize, mask: u64) -> u64 {
    let each = logs.iter().filter_map(|log| log.words().get(word));
    // Acquire: as in `seen`. Release: whoever finds a page clean finds it recorded.
    let or = each.fold(0, |or, word| {
        or | word.fetch_and(!mask.to_le(), Ordering::AcqRel)
    });
    u64::from_le(or) & mask
}

/// The maximal runs of pages in a word.
fn runs(word: usize, bits: u64) -> impl Iterator<Item = IovaRange> {
    let page = move |bit: u32| Iova::new((word as u64 * 64 + u64::from(bit)) << LOG_PAGE.lg2());
    // Never an error: a run goes upwards.
    word_runs(bits).filter_map(move |(first, last)| {
        IovaRange::new(page(first), page(last).granule_last(LOG_PAGE)).ok()
    })
}

/// A stop at a word, inside of `range`.
fn stopped(word: usize, range: IovaRange, error: Error) -> Stopped {
    let start = Iova::new((word as u64 * 64) << LOG_PAGE.lg2());
    let at = start.max(range.start());
    Stopped { at, error }
}

/// Addresses of the space are guest physical addresses; what is behind them does not matter.
///
/// A back end caches nothing, so there is nothing to invalidate: it marks after each write, and who sees the mark sees the
/// write. The space is to be told of memory after the log reaches it, and to forget it after back ends have.
impl DirtySource for VhostLog {
    fn page(&self) -> Granule {
        LOG_PAGE
    }

    /// Refuses memory that the newest log has no bits for. What back ends marked there before is dirty.
    fn map(&self, mapping: &Mapping) -> Result<(), Error> {
        let (end, range) = (self.memory().last(), mapping.range);
        if range.last() > end {
            return Err(Error::source_failed(LogError::TooShort { end, range }));
        }
        Ok(())
    }

    fn unmap(&self, range: IovaRange, _: &mut FlushGather, dirty: &mut dyn FnMut(IovaRange)) {
        self.read(|logs| {
            for (word, mask) in dirty_words(logs, range) {
                let found = seen(logs, word, mask);
                runs(word, found).for_each(&mut *dirty);
                // What came between the two.
                let late = clear(logs, word, mask) & !found;
                runs(word, late).for_each(&mut *dirty);
            }
        });
    }

    /// Each page has a bit of its own.
    fn split_at(&self, at: Iova, _: &mut FlushGather) -> Result<(), Error> {
        match at.is_aligned(LOG_PAGE) {
            true => Ok(()),
            false => Err(Error::CannotSplit { at }),
        }
    }

    /// On clears the log. That back ends mark in it from then on, because they have it and the feature
    /// `VHOST_F_LOG_ALL`, is up to the caller, before.
    fn set_tracking(&self, on: bool) -> Result<(), Error> {
        // AcqRel: the caller's lock orders it; calls by others are rare, too.
        if !self.tracking.swap(on, Ordering::AcqRel) && on {
            self.read(|logs| {
                for (word, mask) in dirty_words(logs, IovaRange::ALL) {
                    clear(logs, word, mask);
                }
            });
        }
        Ok(())
    }

    fn read_and_clear(&self, range: IovaRange, out: &mut LeafSink<'_, '_>) -> Result<(), Stopped> {
        self.read(|logs| {
            for (word, mask) in dirty_words(logs, range) {
                let found = seen(logs, word, mask);
                let mut runs = runs(word, found).peekable();
                while let Some(run) = runs.next() {
                    // All runs of the word are recorded, then one exchange clears it.
                    let more = runs.peek().is_some();
                    let clear = || more || clear(logs, word, found) != 0;
                    out.take(run, LOG_PAGE, clear)
                        .map_err(|error| stopped(word, range, error))?;
                }
            }
            Ok(())
        })
    }

    fn peek(&self, range: IovaRange, sink: &mut Sink<'_>) -> Result<(), Stopped> {
        self.read(|logs| {
            for (word, mask) in dirty_words(logs, range) {
                for run in runs(word, seen(logs, word, mask)) {
                    sink.record(run)
                        .map_err(|error| stopped(word, range, error))?;
                }
            }
            Ok(())
        })
    }

    fn invalidate(&self, _: &FlushGather) -> Result<Invalidated, Error> {
        Ok(Invalidated::default())
    }
}
