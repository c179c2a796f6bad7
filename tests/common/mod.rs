//! A minimal dirty source, with faults on demand.
#![allow(dead_code, unreachable_pub, clippy::unwrap_used)] // each test uses a part

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};

use dirtymap::source::{FlushCost, FlushGather, Invalidated, LeafSink, Sink, Stopped};
use dirtymap::{AddressSpace, DirtySource, Error, Granule, Iova, IovaRange, Mapping, Tracking};

pub const PAGE: u64 = 4096;

/// The `n` pages from page `first` on.
pub fn pages(first: u64, n: u64) -> IovaRange {
    IovaRange::from_len(Iova::new(first * PAGE), n * PAGE).unwrap()
}

/// Keeps `value` until the program ends, and never drops it. A list refers to it, because the
/// address sanitizer reports memory to which nothing refers.
pub fn leaked<'a, T: 'a>(value: T) -> &'a mut T {
    static LEAKED: Mutex<Vec<usize>> = Mutex::new(Vec::new());
    let value: &'a mut T = Box::leak(Box::new(value));
    LEAKED
        .lock()
        .unwrap()
        .push(std::ptr::from_mut(value).addr());
    value
}

/// An empty space over two sources.
pub fn two_sources() -> (AddressSpace, Arc<Fake>, Arc<Fake>) {
    let (first, second) = (Arc::new(Fake::default()), Arc::new(Fake::default()));
    let space = AddressSpace::with_source(Granule::K4, first.clone()).unwrap();
    space.attach(second.clone()).unwrap();
    (space, first, second)
}

/// The error that a [`Fake`] gives on demand.
#[derive(Debug, thiserror::Error)]
#[error("broken on purpose")]
pub struct Broken;

#[derive(Default)]
pub struct State {
    pub mapped: Vec<IovaRange>,
    /// Leaves, by their first page.
    pub dirty: BTreeSet<u64>,
    /// Pages of a leaf; 0 means 1.
    pub leaf_pages: u64,
    pub invalidated: Vec<IovaRange>,
    /// Calls of `read_and_clear`.
    pub looks: u64,
    pub tracking: bool,
    /// The smallest page of the source. With `None` it has no requirement.
    pub page: Option<Granule>,
    /// Where leaves were split.
    pub split: Vec<Iova>,
    pub refuse_split: bool,
    /// The calls that fail from now on.
    pub refuse_map: bool,
    pub refuse_map_at: Option<IovaRange>,
    pub stop_at: Option<u64>,
    /// How far inside the page of `stop_at` the stop lies.
    pub stop_inside: u64,
    /// The page that the stop reports instead.
    pub stop_says: Option<u64>,
    pub panic_at: Option<u64>,
    pub fail_invalidations: u32,
    pub flush_cost: FlushCost,
    pub panic_in_invalidate: bool,
    pub refuse_tracking: bool,
    /// Runs once, before the source looks at this page.
    pub on_page: Option<(u64, Box<dyn FnOnce() + Send>)>,
    /// Runs once, at the next harvest or peek, before the source looks at anything.
    pub on_read: Option<Box<dyn FnOnce() + Send>>,
    /// Runs once, before the next area is mapped.
    pub on_map: Option<Box<dyn FnOnce() + Send>>,
    /// Runs once, before the next switch of tracking.
    pub on_tracking: Option<Box<dyn FnOnce() + Send>>,
    /// Runs once, when the next unmap has taken dirty pages and not reported them yet.
    pub on_unmap: Option<Box<dyn FnOnce() + Send>>,
    /// Runs once, before the next invalidation.
    pub on_invalidate: Option<Box<dyn FnOnce() + Send>>,
}

impl State {
    /// The first page of the leaf that holds page `n`.
    fn leaf(&self, n: u64) -> u64 {
        n - n % self.leaf_pages.max(1)
    }
}

/// One dirty bit for each leaf, under one lock.
#[derive(Default)]
pub struct Fake(pub Mutex<State>);

impl Fake {
    pub fn with<R>(&self, f: impl FnOnce(&mut State) -> R) -> R {
        f(&mut self.0.lock().unwrap_or_else(|e| e.into_inner()))
    }

    /// A device writes page `n`.
    pub fn dirty(&self, n: u64) {
        self.with(|s| s.dirty.insert(s.leaf(n)));
    }
}

fn numbers(range: IovaRange) -> std::ops::RangeInclusive<u64> {
    range.start().get() / PAGE..=range.last().get() / PAGE
}

impl DirtySource for Fake {
    fn page(&self) -> Granule {
        self.with(|s| s.page.unwrap_or(Granule::BYTE))
    }

    fn split_at(&self, at: Iova, gather: &mut FlushGather) -> Result<(), Error> {
        self.with(|s| {
            if s.refuse_split {
                return Err(Error::source_failed(Broken));
            }
            let below = Iova::new(at.get() - 1);
            let whole = |range: &IovaRange| range.contains(below) && range.contains(at);
            if let Some(nth) = s.mapped.iter().position(whole) {
                let range = s.mapped.remove(nth);
                gather.add(range, Granule::K4);
                s.mapped.push(IovaRange::new(range.start(), below).unwrap());
                s.mapped.push(IovaRange::new(at, range.last()).unwrap());
                s.split.push(at);
            }
            Ok(())
        })
    }

    fn map(&self, mapping: &Mapping) -> Result<(), Error> {
        if let Some(happen) = self.with(|s| s.on_map.take()) {
            happen();
        }
        self.with(|s| {
            if s.refuse_map || s.refuse_map_at == Some(mapping.range) {
                return Err(Error::source_failed(Broken));
            }
            s.mapped.push(mapping.range);
            Ok(())
        })
    }

    fn unmap(&self, range: IovaRange, gather: &mut FlushGather, dirty: &mut dyn FnMut(IovaRange)) {
        let (gone, leaf_pages) = self.with(|s| {
            if s.mapped.iter().any(|mapped| range.covers(*mapped)) {
                gather.add(range, Granule::K4);
            }
            s.mapped.retain(|mapped| !range.covers(*mapped));
            let cut = s.mapped.iter().any(|mapped| mapped.intersects(range));
            assert!(!cut, "{range} cuts through a leaf");
            let gone: Vec<u64> = s.dirty.range(numbers(range)).copied().collect();
            gone.iter().for_each(|n| assert!(s.dirty.remove(n)));
            (gone, s.leaf_pages.max(1))
        });
        if let Some(happen) = self.with(|s| s.on_unmap.take()) {
            happen();
        }
        gone.into_iter().for_each(|n| dirty(pages(n, leaf_pages)));
    }

    fn set_tracking(&self, to: Tracking) -> Result<(), Error> {
        if let Some(happen) = self.with(|s| s.on_tracking.take()) {
            happen();
        }
        self.with(|s| {
            if s.refuse_tracking {
                return Err(Error::source_failed(Broken));
            }
            if to.is_on() && !s.tracking {
                s.dirty.clear();
            }
            s.tracking = to.is_on();
            Ok(())
        })
    }

    fn read_and_clear(&self, range: IovaRange, out: &mut LeafSink<'_, '_>) -> Result<(), Stopped> {
        self.with(|s| s.looks += 1);
        if let Some(happen) = self.with(|s| s.on_read.take()) {
            happen();
        }
        self.with(|s| {
            let (mut next, last) = (*numbers(range).start(), *numbers(range).end());
            while next <= last {
                let n = next;
                let leaf = s.leaf(n);
                next = leaf + s.leaf_pages.max(1);
                let at = Iova::new(n * PAGE);
                if let Some((_, happen)) = s.on_page.take_if(|(page, _)| *page == n) {
                    happen();
                }
                if s.stop_at == Some(n) {
                    let at = s.stop_says.map_or(at, |page| Iova::new(page * PAGE));
                    return Err(Stopped {
                        at: Iova::new(at.get() + s.stop_inside),
                        error: Error::source_failed(Broken),
                    });
                }
                assert_ne!(s.panic_at, Some(n), "a source that panics");
                if s.dirty.contains(&leaf) {
                    let span = pages(leaf, s.leaf_pages.max(1));
                    out.take(span, Granule::K4, || s.dirty.remove(&leaf))
                        .map_err(|error| Stopped { at, error })?;
                }
            }
            Ok(())
        })
    }

    fn peek(&self, range: IovaRange, sink: &mut Sink<'_>) -> Result<(), Stopped> {
        self.with(|s| {
            let first = s.leaf(*numbers(range).start());
            for n in s.dirty.range(first..=*numbers(range).end()) {
                let at = Iova::new(n * PAGE);
                sink.record(pages(*n, s.leaf_pages.max(1)))
                    .map_err(|error| Stopped { at, error })?;
            }
            Ok(())
        })
    }

    fn invalidate(&self, gather: &FlushGather) -> Result<Invalidated, Error> {
        if let Some(happen) = self.with(|s| s.on_invalidate.take()) {
            happen();
        }
        self.with(|s| {
            assert!(!s.panic_in_invalidate, "an invalidation that panics");
            if s.fail_invalidations > 0 {
                s.fail_invalidations -= 1;
                return Err(Error::source_failed(Broken));
            }
            s.invalidated.extend(gather.ranges());
            Ok(Invalidated {
                commands: gather.ranges().len() as u64,
                bytes: gather.bytes(),
                ..Invalidated::default()
            })
        })
    }

    fn flush_cost(&self) -> FlushCost {
        self.with(|s| s.flush_cost)
    }
}
