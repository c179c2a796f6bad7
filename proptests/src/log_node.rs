//! A source that clears by batches, like the dirty logs of kernels: one bit for each page, no
//! translations, no caches.
//!
//! ```text
//!  read_and_clear   look at the log --> tell the sink of all runs --> clear them by 64 pages
//!                                        |
//!                                        +-- a page that sticks out: cleared inside the call
//! ```
//!
//! The sink puts back the rest of a page that sticks out as soon as the source reports that the
//! page is clean. So such a page must really be clean by then.

use std::collections::{BTreeMap, BTreeSet};

use dirtymap::source::{FlushGather, Invalidated, LeafSink, Sink, Stopped};
use dirtymap::sync::{Arc, Mutex, lock};
use dirtymap::{Access, DirtySource, Error, Granule, Iova, IovaRange, Mapping, Tracking};
use pagetable_sim::{DmaError, FaultKind, PhysMemory};

use crate::op::{Config, Sabotage};
use crate::pages::{PAGE, pieces};
use crate::rig::{Busy, Node, Switch, ToldToDie, ToldToFail};

/// See the [module](self).
pub(crate) struct LogNode {
    memory: Arc<PhysMemory>,
    page: Granule,
    state: Mutex<State>,
    fails: Switch,
    dies: Switch,
    sabotage: Sabotage,
    first: bool,
}

#[derive(Default)]
struct State {
    /// The mapped ranges, by first address.
    maps: BTreeMap<u64, Mapping>,
    /// The numbers of the pages that were written.
    log: BTreeSet<u64>,
    tracks: bool,
    busy: Option<Busy>,
}

/// The error of a log that refuses a map.
#[derive(Debug, thiserror::Error)]
#[error("{0} is mapped already")]
struct MappedTwice(IovaRange);

impl LogNode {
    /// The domain with the number `nth` of a world, with pages of 2^`lg2` bytes.
    pub(crate) fn new(config: &Config, nth: usize, lg2: u8, memory: &Arc<PhysMemory>) -> LogNode {
        LogNode {
            memory: Arc::clone(memory),
            page: Granule::from_lg2(lg2).unwrap_or(Granule::K4),
            state: Mutex::default(),
            fails: Switch::default(),
            dies: Switch::default(),
            sabotage: config.sabotage,
            first: nth == 0,
        }
    }

    fn is_left_out(&self) -> bool {
        self.sabotage == Sabotage::HarvestFirstDomainOnly && !self.first
    }

    /// The addresses of page number `n`.
    fn addresses(&self, n: u64) -> IovaRange {
        IovaRange::granule_at(Iova::new(n << self.page.lg2()), self.page)
    }

    /// The numbers of the pages in `range` that were written.
    fn written(&self, range: IovaRange) -> Vec<u64> {
        let number = |at: Iova| at.get() >> self.page.lg2();
        let log = &lock(&self.state).log;
        let inside = log.range(number(range.start())..=number(range.last()));
        inside.copied().collect()
    }

    /// An access to bytes of one page of memory.
    fn translate(&self, at: u64, write: bool) -> Result<u64, DmaError> {
        let state = lock(&self.state);
        let map = state.maps.range(..=at).next_back().map(|(_, map)| *map);
        let map = map.filter(|map| map.range.contains(Iova::new(at)));
        let kind = match map {
            None => FaultKind::NotMapped,
            Some(map) if write && !map.access.writes() => FaultKind::ReadOnly,
            Some(map) if !write && !map.access.reads() => FaultKind::WriteOnly,
            Some(map) => return Ok(map.backing + (at - map.range.start().get())),
        };
        let iova = Iova::new(at);
        Err(DmaError { iova, kind })
    }

    fn store(&self, at: u64, bytes: &[u8]) -> Result<(), DmaError> {
        let phys = self.translate(at, true)?;
        let mut state = lock(&self.state);
        if state.tracks {
            state.log.insert(at >> self.page.lg2());
        }
        // Mapped memory exists, because `map` has checked it.
        let _ = self.memory.write(phys, bytes);
        Ok(())
    }
}

impl Node for LogNode {
    fn format(&self) -> &'static str {
        "a log"
    }

    fn grants(&self, _: Access) -> bool {
        true
    }

    fn translates(&self, iova: Iova) -> bool {
        let state = lock(&self.state);
        state.maps.values().any(|map| map.range.contains(iova))
    }

    fn write(&self, _: u8, at: Iova, bytes: &[u8]) -> Result<(), DmaError> {
        pieces(at.get(), bytes.len()).try_for_each(|(at, piece)| self.store(at, &bytes[piece]))
    }

    fn read(&self, _: u8, at: Iova, bytes: &mut [u8]) -> Result<(), DmaError> {
        for (at, piece) in pieces(at.get(), bytes.len()) {
            let phys = self.translate(at, false)?;
            let _ = self.memory.read(phys, &mut bytes[piece]);
        }
        Ok(())
    }

    fn settle(&self, _: Option<u8>, _: IovaRange) {}

    fn land(&self, _: u8) {}

    fn quiesce(&self, _: u8) {}

    fn keep_busy(&self, busy: Option<Busy>) {
        lock(&self.state).busy = busy;
    }

    fn fails(&self) -> &Switch {
        &self.fails
    }

    fn dies(&self) -> &Switch {
        &self.dies
    }

    fn merge(&self, _: IovaRange) -> Result<(), pagetable_sim::Error> {
        Ok(())
    }

    fn split(&self, _: Iova) -> Result<(), Error> {
        Ok(())
    }
}

impl DirtySource for LogNode {
    fn page(&self) -> Granule {
        self.page
    }

    fn map(&self, mapping: &Mapping) -> Result<(), Error> {
        let len = u64::try_from(mapping.range.len()).unwrap_or(u64::MAX);
        let there = self.memory.check(mapping.backing, len);
        there.map_err(Error::source_failed)?;
        let mut state = lock(&self.state);
        let mut maps = state.maps.values();
        if let Some(other) = maps.find(|other| other.range.intersects(mapping.range)) {
            return Err(Error::source_failed(MappedTwice(other.range)));
        }
        state.maps.insert(mapping.range.start().get(), *mapping);
        Ok(())
    }

    fn unmap(&self, range: IovaRange, gather: &mut FlushGather, dirty: &mut dyn FnMut(IovaRange)) {
        let mut gone = Vec::new();
        {
            let mut state = lock(&self.state);
            let maps = std::mem::take(&mut state.maps);
            for map in maps.into_values() {
                let Some(part) = map.range.intersection(range) else {
                    state.maps.insert(map.range.start().get(), map);
                    continue;
                };
                gone.push(part);
                let below = part.start().get().checked_sub(1).map(Iova::new);
                let above = part.last().checked_add(1);
                let rests = [
                    below.and_then(|last| IovaRange::new(map.range.start(), last).ok()),
                    above.and_then(|start| IovaRange::new(start, map.range.last()).ok()),
                ];
                for rest in rests.into_iter().flatten() {
                    let skip = rest.start().get() - map.range.start().get();
                    let backing = map.backing + skip;
                    let rest = Mapping {
                        range: rest,
                        backing,
                        ..map
                    };
                    state.maps.insert(rest.range.start().get(), rest);
                }
            }
        }
        for part in gone {
            if self.sabotage != Sabotage::UnmapOwesNothing {
                gather.add(part, self.page);
            }
        }
        // The whole range, because an unmap that panicked in `dirty` left the other pages in the
        // log.
        for n in self.written(range) {
            lock(&self.state).log.remove(&n);
            if self.sabotage != Sabotage::UnmapForgetsDirty {
                dirty(self.addresses(n));
            }
        }
    }

    /// Each border of pages is a border of leaves.
    fn split_at(&self, at: Iova, _: &mut FlushGather) -> Result<(), Error> {
        match at.is_aligned(self.page) {
            true => Ok(()),
            false => Err(Error::CannotSplit { at }),
        }
    }

    fn set_tracking(&self, to: Tracking) -> Result<(), Error> {
        let mut state = lock(&self.state);
        if to.is_on() && !state.tracks {
            state.log.clear();
        }
        state.tracks = to.is_on();
        Ok(())
    }

    fn read_and_clear(&self, range: IovaRange, out: &mut LeafSink<'_, '_>) -> Result<(), Stopped> {
        if self.is_left_out() {
            return Ok(());
        }
        let dies = self.dies.take();
        let mut told = self.written(range);
        if dies {
            told.truncate(told.len().div_ceil(2));
        }
        let mut later: Vec<u64> = Vec::new();
        let mut taken = Ok(());
        for run in told.chunk_by(|a, b| a + 1 == *b) {
            let (low, high) = (self.addresses(run[0]), self.addresses(run[run.len() - 1]));
            let Ok(run) = IovaRange::new(low.start(), high.last()) else {
                continue;
            };
            let clear = |page: IovaRange| {
                let n = page.start().get() >> self.page.lg2();
                lock(&self.state).log.remove(&n)
            };
            match out.take_run(run, self.page, clear) {
                Ok(recorded) => later.extend(recorded.range().into_iter().flat_map(|run| {
                    let number = |at: Iova| at.get() >> self.page.lg2();
                    number(run.start())..=number(run.last())
                })),
                Err(stopped) => {
                    taken = Err(stopped);
                    break;
                }
            }
        }
        if dies {
            // No reported page is cleared, which is a superset.
            std::panic::resume_unwind(Box::new(ToldToDie));
        }
        for word in later.chunk_by(|a, b| a / 64 == b / 64) {
            let log = &mut lock(&self.state).log;
            match self.sabotage {
                Sabotage::ClearWholeWords => log.retain(|n| n / 64 != word[0] / 64),
                _ => log.retain(|n| !word.contains(n)),
            }
        }
        taken
    }

    fn peek(&self, range: IovaRange, sink: &mut Sink<'_>) -> Result<(), Stopped> {
        if self.is_left_out() {
            return Ok(());
        }
        for n in self.written(range) {
            let page = self.addresses(n);
            sink.record(page).map_err(|error| Stopped {
                at: page.start(),
                error,
            })?;
        }
        Ok(())
    }

    /// The log is in memory before the data, so a flush has nothing to wait for.
    fn invalidate(&self, _: &FlushGather) -> Result<Invalidated, Error> {
        if self.fails.take() && self.sabotage != Sabotage::HideFailedFlush {
            return Err(Error::source_failed(ToldToFail));
        }
        let busy = lock(&self.state).busy.take();
        if let Some(Busy { device, at, bytes }) = busy {
            // The first write checks whether the access is allowed.
            let _ = self.write(device, at, &bytes);
        }
        Ok(Invalidated::default())
    }
}

const _: () = assert!(PAGE == Granule::K4.bytes());
