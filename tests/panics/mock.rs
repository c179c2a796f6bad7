//! A source with its device, in which every step of every callback is a point at which it can
//! panic.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::{Arc, Mutex, MutexGuard};

use dirtymap::source::{FlushCost, FlushGather, Invalidated, LeafSink, Leaves, Sink, Stopped};
use dirtymap::{AddressSpace, DirtySource, Error, Granule, Iova, IovaRange, Mapping, Tracking};

pub const PAGE: u64 = 4096;
/// Pages of a leaf, if they are aligned and mapped together.
const LEAF: u64 = 4;

/// The `n` pages from page `first` on.
pub fn pages(first: u64, n: u64) -> IovaRange {
    IovaRange::from_len(Iova::new(first * PAGE), n * PAGE).unwrap()
}

/// The numbers of the pages of `range`.
pub fn numbers(range: IovaRange) -> std::ops::RangeInclusive<u64> {
    range.start().get() / PAGE..=range.last().get() / PAGE
}

/// Runs the epoch collector until `done`. The garbage of a space waits for all readers of spaces in
/// the process.
pub fn reclaim_until(space: &AddressSpace, done: impl Fn() -> bool) {
    for _ in 0..1_000_000 {
        if done() {
            return;
        }
        space.reclaim();
        std::thread::yield_now();
    }
    panic!("something holds back what was detached");
}

/// The error of a source that refuses.
#[derive(Debug, thiserror::Error)]
#[error("refused on purpose")]
pub struct Refused;

/// The payload of a point's panic.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault(pub String);

/// The payload of the panic of `call`, if it panicked.
pub fn panics<T>(call: impl FnOnce() -> T) -> Result<T, Fault> {
    catch_unwind(AssertUnwindSafe(call)).map_err(|payload| match payload.downcast::<Fault>() {
        Ok(fault) => *fault,
        Err(other) => resume_unwind(other),
    })
}

/// The points that the sources of one test pass, and those of them that panic.
#[derive(Default)]
pub struct Points {
    state: Mutex<Armed>,
}

#[derive(Default)]
struct Armed {
    /// The number of points so far.
    made: Vec<String>,
    /// The number of the point that panics, alone or with all points after it.
    nth: Option<usize>,
    all_from: bool,
    /// Points of this name that panic: the number of points to skip, and the number that panic
    /// after them.
    named: Option<(&'static str, u32, u32)>,
    fired: u32,
}

impl Points {
    fn state(&self) -> MutexGuard<'_, Armed> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// The point number `nth` from now on panics; if `all`, so do those after it.
    pub fn arm_nth(&self, nth: usize, all: bool) {
        let mut state = self.state();
        state.made.clear();
        (state.nth, state.all_from) = (Some(nth), all);
    }

    /// From now on, after `skip` points of this name, `times` of them panic.
    pub fn arm(&self, name: &'static str, skip: u32, times: u32) {
        self.state().named = Some((name, skip, times));
    }

    pub fn disarm(&self) {
        let mut state = self.state();
        (state.nth, state.named) = (None, None);
    }

    /// How many points have panicked.
    pub fn fired(&self) -> u32 {
        self.state().fired
    }

    /// The number of points since they were armed.
    pub fn made(&self) -> Vec<String> {
        self.state().made.clone()
    }

    /// A point.
    pub fn at(&self, name: &str) {
        let mut state = self.state();
        let nth = state.made.len();
        state.made.push(name.to_string());
        let all_from = state.all_from;
        let mut panics = match state.nth {
            Some(at) if all_from => nth >= at,
            at => at == Some(nth),
        };
        if let Some((armed, skip, times)) = &mut state.named
            && *armed == name
        {
            if *skip > 0 {
                *skip -= 1;
            } else if *times > 0 {
                *times -= 1;
                panics = true;
            }
        }
        if panics {
            state.fired += 1;
            drop(state);
            // Says nothing on standard error, unlike `panic!`.
            resume_unwind(Box::new(Fault(format!("{name}, point {nth}"))));
        }
    }
}

#[derive(Default)]
pub struct State {
    /// Leaves by their first page: how many pages, and D.
    table: BTreeMap<u64, (u64, bool)>,
    /// Pages for which the device has cached a translation with "D is set", and the leaf of each
    /// translation. An invalidation of the whole leaf drops it.
    cached: BTreeMap<u64, IovaRange>,
    pub tracking: bool,
    /// Calls of each kind that were counted.
    pub costs_asked: u32,
    pub refuse_map: bool,
    pub refuse_split: bool,
    pub fail_invalidations: u32,
    /// For each invalidation, whether it names tables, and the leaf sizes that it names.
    pub invalidated: Vec<(bool, Option<Leaves>)>,
    /// A range that an unmap reports instead of its first dirty leaf.
    pub tells: Vec<IovaRange>,
}

/// A device that translates by a table of leaves.
pub struct Device {
    points: Arc<Points>,
    state: Mutex<State>,
}

impl Device {
    pub fn new(points: &Arc<Points>) -> Arc<Self> {
        Arc::new(Device {
            points: Arc::clone(points),
            state: Mutex::default(),
        })
    }

    pub fn with<R>(&self, f: impl FnOnce(&mut State) -> R) -> R {
        f(&mut self.state.lock().unwrap_or_else(|e| e.into_inner()))
    }

    /// The device writes page `n`. Returns whether the write reached memory.
    pub fn write(&self, n: u64) -> bool {
        self.with(|s| {
            if s.cached.contains_key(&n) {
                return true; // and leaves no trace
            }
            let Some((first, (count, dirty))) = s.leaf(n) else {
                return false;
            };
            *dirty = true;
            let leaf = pages(first, *count);
            s.cached.insert(n, leaf).is_none()
        })
    }

    /// Whether the device reaches page `n`, by the table or by a cached translation.
    pub fn reaches(&self, n: u64) -> bool {
        self.with(|s| s.cached.contains_key(&n) || s.leaf(n).is_some())
    }

    pub fn caches(&self, n: u64) -> bool {
        self.with(|s| s.cached.contains_key(&n))
    }

    fn leaves(&self, range: IovaRange) -> Vec<(u64, u64, bool)> {
        let (first, last) = numbers(range).into_inner();
        self.with(|s| {
            let leaves = s.table.range(..=last);
            leaves
                .map(|(at, (n, dirty))| (*at, *n, *dirty))
                .filter(|(at, n, _)| at + n > first)
                .collect()
        })
    }
}

impl State {
    fn leaf(&mut self, page: u64) -> Option<(u64, &mut (u64, bool))> {
        let (at, leaf) = self.table.range_mut(..=page).next_back()?;
        (at + leaf.0 > page).then_some((*at, leaf))
    }
}

impl DirtySource for Device {
    fn page(&self) -> Granule {
        self.points.at("page");
        Granule::K4
    }

    fn identity(&self) -> Option<usize> {
        self.points.at("identity");
        None
    }

    fn map(&self, mapping: &Mapping) -> Result<(), Error> {
        self.points.at("map: begun");
        if self.with(|s| s.refuse_map) {
            return Err(Error::source_failed(Refused));
        }
        let (mut next, last) = numbers(mapping.range).into_inner();
        while next <= last {
            let whole = next % LEAF == 0 && next + LEAF - 1 <= last;
            let n = if whole { LEAF } else { 1 };
            let old = self.with(|s| s.table.insert(next, (n, false)));
            assert!(old.is_none(), "page {next} is mapped twice");
            next += n;
            self.points.at("map: leaf");
        }
        self.points.at("map: done");
        Ok(())
    }

    fn unmap(&self, range: IovaRange, gather: &mut FlushGather, dirty: &mut dyn FnMut(IovaRange)) {
        self.points.at("unmap: begun");
        for (at, n, _) in self.leaves(range) {
            let leaf = pages(at, n);
            assert!(range.covers(leaf), "{range} cuts through {leaf}");
            let gone = self.with(|s| s.table.remove(&at));
            self.points.at("unmap: taken");
            gather.add(leaf, Granule::K4);
            self.points.at("unmap: owed");
            if gone.is_some_and(|(_, dirty)| dirty) {
                let told = self.with(|s| std::mem::take(&mut s.tells));
                match told.is_empty() {
                    true => dirty(leaf),
                    false => told.into_iter().for_each(&mut *dirty),
                }
                self.points.at("unmap: told");
            }
        }
        self.points.at("unmap: done");
    }

    fn split_at(&self, at: Iova, gather: &mut FlushGather) -> Result<(), Error> {
        self.points.at("split: begun");
        if self.with(|s| s.refuse_split) {
            return Err(Error::source_failed(Refused));
        }
        let page = at.get() / PAGE;
        let across = self.leaves(pages(page, 1));
        let across = across.into_iter().find(|(first, ..)| *first < page);
        let whole = across.map(|(first, n, dirty)| {
            self.with(|s| s.table.remove(&first));
            self.points.at("split: taken");
            let parts = (first..first + n).map(|part| (part, (1, dirty)));
            self.with(|s| s.table.extend(parts));
            pages(first, n)
        });
        self.points.at("split: parted");
        if let Some(whole) = whole {
            gather.add(whole, Granule::K4);
        }
        self.points.at("split: done");
        Ok(())
    }

    fn set_tracking(&self, to: Tracking) -> Result<(), Error> {
        self.points.at("tracking: begun");
        let was = self.with(|s| std::mem::replace(&mut s.tracking, to.is_on()));
        self.points.at("tracking: said");
        if to.is_on() && !was {
            for (at, n, _) in self.leaves(IovaRange::ALL) {
                self.with(|s| s.table.insert(at, (n, false)));
                self.points.at("tracking: leaf");
            }
            self.with(|s| s.cached.clear());
        }
        self.points.at("tracking: done");
        Ok(())
    }

    fn read_and_clear(&self, range: IovaRange, out: &mut LeafSink<'_, '_>) -> Result<(), Stopped> {
        self.points.at("harvest: begun");
        for (at, n, dirty) in self.leaves(range) {
            self.points.at("harvest: look");
            if !dirty {
                continue;
            }
            let clear = || {
                self.points.at("harvest: recorded");
                let old = self.with(|s| s.table.insert(at, (n, false)));
                self.points.at("harvest: cleared");
                old.is_some_and(|(_, dirty)| dirty)
            };
            let leaf = pages(at, n);
            let taken = out.take(leaf, Granule::K4, clear);
            taken.map_err(|error| Stopped {
                at: leaf.start(),
                error,
            })?;
            self.points.at("harvest: taken");
        }
        self.points.at("harvest: done");
        Ok(())
    }

    fn peek(&self, range: IovaRange, sink: &mut Sink<'_>) -> Result<(), Stopped> {
        self.points.at("peek: begun");
        for (at, n, _) in self.leaves(range).into_iter().filter(|leaf| leaf.2) {
            let leaf = pages(at, n);
            sink.record(leaf).map_err(|error| Stopped {
                at: leaf.start(),
                error,
            })?;
            self.points.at("peek: recorded");
        }
        self.points.at("peek: done");
        Ok(())
    }

    fn invalidate(&self, gather: &FlushGather) -> Result<Invalidated, Error> {
        self.points.at("invalidate: begun");
        let fails = |s: &mut State| {
            let fails = s.fail_invalidations > 0;
            s.fail_invalidations -= u32::from(fails);
            fails
        };
        if self.with(fails) {
            return Err(Error::source_failed(Refused));
        }
        self.with(|s| s.invalidated.push((gather.tables(), gather.leaves())));
        for range in gather.ranges() {
            self.with(|s| s.cached.retain(|_, leaf| !range.covers(*leaf)));
            self.points.at("invalidate: some");
        }
        self.points.at("invalidate: done");
        Ok(Invalidated::default())
    }

    fn flush_cost(&self) -> FlushCost {
        self.points.at("cost");
        self.with(|s| s.costs_asked += 1);
        FlushCost::default()
    }
}

/// A source that a space owns: a device, and a hook for its drop.
pub struct Owned {
    pub device: Arc<Device>,
    pub dropped: Option<Box<dyn FnOnce() + Send + Sync>>,
}

impl Owned {
    pub fn new(device: &Arc<Device>) -> Self {
        Owned {
            device: Arc::clone(device),
            dropped: None,
        }
    }

    pub fn then(self, dropped: impl FnOnce() + Send + Sync + 'static) -> Self {
        Owned {
            device: Arc::clone(&self.device),
            dropped: Some(Box::new(dropped)),
        }
    }
}

impl Drop for Owned {
    fn drop(&mut self) {
        if let Some(dropped) = self.dropped.take() {
            dropped();
        }
    }
}

impl DirtySource for Owned {
    fn page(&self) -> Granule {
        self.device.page()
    }

    fn identity(&self) -> Option<usize> {
        let _ = Device::identity(&self.device);
        Some(Arc::as_ptr(&self.device).addr())
    }

    fn map(&self, mapping: &Mapping) -> Result<(), Error> {
        self.device.map(mapping)
    }

    fn unmap(&self, range: IovaRange, gather: &mut FlushGather, dirty: &mut dyn FnMut(IovaRange)) {
        self.device.unmap(range, gather, dirty);
    }

    fn split_at(&self, at: Iova, gather: &mut FlushGather) -> Result<(), Error> {
        self.device.split_at(at, gather)
    }

    fn set_tracking(&self, to: Tracking) -> Result<(), Error> {
        self.device.set_tracking(to)
    }

    fn read_and_clear(&self, range: IovaRange, out: &mut LeafSink<'_, '_>) -> Result<(), Stopped> {
        self.device.read_and_clear(range, out)
    }

    fn peek(&self, range: IovaRange, sink: &mut Sink<'_>) -> Result<(), Stopped> {
        self.device.peek(range, sink)
    }

    fn invalidate(&self, gather: &FlushGather) -> Result<Invalidated, Error> {
        self.device.invalidate(gather)
    }

    fn flush_cost(&self) -> FlushCost {
        self.device.flush_cost()
    }
}
