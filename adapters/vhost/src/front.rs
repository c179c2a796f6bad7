//! The front end's side: a source that joins harvests. How its logs follow each other is in
//! [`log_list`](crate::log_list).

use super::memory::{LOG_PAGE, LogError, LogMemory, check_process, maker};
use crate::log_list::{LogList, LogWords, clear, seen};
use dirtymap::adapter::words;
use dirtymap::source::{FlushGather, Invalidated, LeafSink, Sink, Stopped};
use dirtymap::sync::{Arc, AtomicBool, AtomicU64, Ordering};
use dirtymap::{AddressSpace, DirtySource, Error, Granule, Iova, IovaRange, Mapping, Tracking};
use dirtymap_host::Maker;

/// Words that are looked at together before a closer look: one cache line.
const LINE: u64 = 8;

/// The dirty log of a vhost or vhost-user front end, and a [`DirtySource`] over it: attach it to a
/// space whose addresses are guest physical addresses, and what back ends mark is in every harvest.
///
/// Bit `n` of the log is the page of 4 KiB at the address `4096 * n` of the space, whatever its own
/// page and wherever its areas begin. Harvests exchange word by word, with back ends running, and
/// clear a bit after it was recorded. What a lease puts back goes to the marks of the space: the
/// log is left to the back ends.
#[derive(Debug)]
pub struct VhostLog {
    logs: LogList<LogMemory>,
    tracking: AtomicBool,
    maker: Maker,
}

/// The marks of back ends outside of every area: see [`VhostLog::outside`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct LogOutside {
    /// How many pages of 4 KiB.
    pub pages: u64,
    /// The first one.
    pub first: Option<Iova>,
}

impl VhostLog {
    /// A clean log for memory up to the address `last`: that of the last byte of RAM. Its size is
    /// rounded up to 8 bytes.
    ///
    /// # Errors
    /// [`LogError::Memory`], [`LogError::NoMaker`].
    pub fn new(last: Iova) -> Result<Self, LogError> {
        Ok(VhostLog {
            logs: LogList::new(LogMemory::new(last)?),
            tracking: AtomicBool::new(false),
            maker: maker()?,
        })
    }

    /// The newest log: what to send with `VHOST_USER_SET_LOG_BASE` to a back end that has none yet.
    pub fn memory(&self) -> Arc<LogMemory> {
        self.logs.newest()
    }

    /// Begins a swap: makes a clean log that reaches `last`, or as far as the newest one if that is
    /// farther. From now on harvests look at both. Send [`Swap::memory`] to every back end, and
    /// when all have answered, say so by [`Swap::acknowledged`].
    ///
    /// Needed when memory grows beyond the log: it can be mapped after the acknowledgement. A swap
    /// that is dropped, because a back end has refused or is gone, leaves both logs in use until
    /// the next one is acknowledged, and gives no room for memory. Waits for harvests that are
    /// under way.
    ///
    /// # Errors
    /// [`LogError::Forked`], [`LogError::Memory`]; nothing has changed then.
    pub fn swap(&self, last: Iova) -> Result<Swap<'_>, LogError> {
        check_process(&self.maker)?;
        let make = |newest: &LogMemory| LogMemory::new(last.max(newest.last()));
        let fresh = self.logs.push(make)?;
        Ok(Swap { log: self, fresh })
    }

    /// What back ends have marked by now for addresses that no area of `space` holds: faults, as
    /// are marks there. Such a bit stays in the log, counts at each call, and is reported by a
    /// harvest once an area is mapped there.
    ///
    /// Reads all of the log that has no area: for now and then, not for each round.
    ///
    /// # Errors
    /// [`LogError::Forked`].
    pub fn outside(&self, space: &AddressSpace) -> Result<LogOutside, LogError> {
        check_process(&self.maker)?;
        let mut found = LogOutside::default();
        self.logs.read(|logs| {
            let mut look = |hole: IovaRange| {
                // A page that lies in an area in part is not counted: harvests report it.
                let pages = hole.round_in(LOG_PAGE);
                for run in pages.into_iter().flat_map(|pages| set_runs(logs, pages)) {
                    // No log has more pages than that.
                    found.pages += run.granules(LOG_PAGE) as u64;
                    found.first.get_or_insert(run.start());
                }
            };
            let mut next = Some(Iova::MIN);
            for area in space.snapshot().mappings(IovaRange::ALL) {
                let below = area.range.start().get().checked_sub(1).map(Iova::new);
                if let Some((start, last)) = next.zip(below)
                    && let Ok(hole) = IovaRange::new(start, last)
                {
                    look(hole);
                }
                next = area.range.last().checked_add(1);
            }
            if let Some(start) = next
                && let Ok(rest) = IovaRange::new(start, Iova::MAX)
            {
                look(rest);
            }
        });
        Ok(found)
    }

    /// The last address that all logs in use have a bit for.
    fn reach(&self) -> Iova {
        self.logs.read(|logs| {
            let ends = logs.iter().map(|log| log.last());
            // There is always a log.
            ends.min().unwrap_or(Iova::MIN)
        })
    }

    /// Refuses a copy in a child of a fork.
    fn own(&self) -> Result<(), Error> {
        check_process(&self.maker).map_err(Error::source_failed)
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

    /// Says that every back end has answered, so that none marks in the earlier logs. The pages
    /// that are left in them are carried over to this log, and the earlier logs are dropped.
    /// Returns the number of those pages. Waits for harvests that are under way. Does nothing in a
    /// child of a fork.
    pub fn acknowledged(self) -> u64 {
        match check_process(&self.log.maker) {
            Ok(()) => self.log.logs.acknowledge(&self.fresh),
            Err(_) => 0,
        }
    }
}

/// The pages of `range`, as the words of a log and the bits in them; words that no log has are left
/// out, and so are, at a glance, lines in which all logs are clean.
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
            // Relaxed: a mark that came before the harvest is seen by any load; a harvest that
            // takes it looks again.
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
            words::masks(first.max(from * 64), last.min(to * 64 + 63))
                .map(|(word, mask)| (word as usize, mask))
        })
}

/// The maximal runs of pages in a word.
fn runs(word: usize, bits: u64) -> impl Iterator<Item = IovaRange> {
    let page = move |bit: u32| Iova::new((word as u64 * 64 + u64::from(bit)) << LOG_PAGE.lg2());
    // Never an error: a run goes upwards.
    words::runs(bits).filter_map(move |(first, last)| {
        IovaRange::new(page(first), page(last).granule_last(LOG_PAGE)).ok()
    })
}

/// The bits of the pages of `run`, which lie in one word.
fn bits(run: IovaRange) -> u64 {
    let bit = |at: Iova| at.get() >> LOG_PAGE.lg2() & 63;
    let masks = words::masks(bit(run.start()), bit(run.last()));
    masks.fold(0, |bits, (_, mask)| bits | mask)
}

/// The runs of pages in `range` that some log has a bit for.
fn set_runs(logs: &[Arc<LogMemory>], range: IovaRange) -> impl Iterator<Item = IovaRange> {
    dirty_words(logs, range).flat_map(|(word, mask)| runs(word, seen(logs, word, mask)))
}

/// A stop at a word, inside of `range`.
fn stopped(word: usize, range: IovaRange, error: Error) -> Stopped {
    let start = Iova::new((word as u64 * 64) << LOG_PAGE.lg2());
    let at = start.max(range.start());
    Stopped { at, error }
}

/// Addresses of the space are guest physical addresses; what is behind them does not matter.
///
/// A back end caches nothing, so there is nothing to invalidate: it marks after each write, and a
/// thread that sees the mark sees the write. Map memory in the space after the log reaches it, and
/// unmap it after back ends have stopped using it.
impl DirtySource for VhostLog {
    fn page(&self) -> Granule {
        LOG_PAGE
    }

    /// Refuses memory that a log in use has no bits for: a back end may mark in that one. What back
    /// ends marked there before is dirty.
    fn map(&self, mapping: &Mapping) -> Result<(), Error> {
        self.own()?;
        let (end, range) = (self.reach(), mapping.range);
        if range.last() > end {
            return Err(Error::source_failed(LogError::TooShort { end, range }));
        }
        Ok(())
    }

    /// In a child of a fork all of `range` counts as dirty, and the log stays as it is.
    fn unmap(&self, range: IovaRange, _: &mut FlushGather, dirty: &mut dyn FnMut(IovaRange)) {
        if self.own().is_err() {
            return dirty(range);
        }
        self.logs.read(|logs| {
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

    /// On clears the log. That back ends mark in it from then on, because they have it and the
    /// feature `VHOST_F_LOG_ALL`, is up to the caller, before.
    fn set_tracking(&self, to: Tracking) -> Result<(), Error> {
        self.own()?;
        // AcqRel: the caller's lock orders it; calls by others are rare, too.
        if !self.tracking.swap(to.is_on(), Ordering::AcqRel) && to.is_on() {
            self.logs.read(|logs| {
                for (word, mask) in dirty_words(logs, IovaRange::ALL) {
                    clear(logs, word, mask);
                }
            });
        }
        Ok(())
    }

    fn read_and_clear(&self, range: IovaRange, out: &mut LeafSink<'_, '_>) -> Result<(), Stopped> {
        self.own().map_err(|error| stopped(0, range, error))?;
        self.logs.read(|logs| {
            for (word, mask) in dirty_words(logs, range) {
                let found = seen(logs, word, mask);
                let mut recorded = 0;
                for run in runs(word, found) {
                    let clear_page = |page| clear(logs, word, bits(page)) != 0;
                    let to_clear = out.take_run(run, LOG_PAGE, clear_page)?;
                    recorded |= to_clear.range().map_or(0, bits);
                }
                // All runs of the word are recorded: one exchange clears it.
                if recorded != 0 {
                    clear(logs, word, recorded);
                }
            }
            Ok(())
        })
    }

    fn peek(&self, range: IovaRange, sink: &mut Sink<'_>) -> Result<(), Stopped> {
        self.own().map_err(|error| stopped(0, range, error))?;
        self.logs.read(|logs| {
            set_runs(logs, range).try_for_each(|run| {
                let at = run.start();
                sink.record(run).map_err(|error| Stopped { at, error })
            })
        })
    }

    fn invalidate(&self, _: &FlushGather) -> Result<Invalidated, Error> {
        Ok(Invalidated::default())
    }
}
