//! A source whose pages are larger than those of its space, and which clears many of them at once.
#![allow(dead_code, unreachable_pub, clippy::unwrap_used)] // helpers: each file uses a part

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};

use dirtymap::source::{FlushGather, Invalidated, LeafSink, Sink, Stopped};
use dirtymap::{DirtySource, Error, Granule, Iova, IovaRange, Mapping, Tracking};

/// What happens once, at a place that a test names.
#[derive(Default)]
pub struct Hook(Mutex<Option<Box<dyn FnOnce() + Send>>>);

impl Hook {
    pub fn set(&self, happens: impl FnOnce() + Send + 'static) {
        *self.0.lock().unwrap() = Some(Box::new(happens));
    }

    /// Runs it without the lock, so that another thread may use the source meanwhile.
    fn run(&self) {
        let happens = self.0.lock().unwrap().take();
        if let Some(happens) = happens {
            happens();
        }
    }
}

/// One bit for each page of `page`, from address 0 on. A harvest reads all of its bits, reports
/// them, and clears them afterwards, as KVM_GET_DIRTY_LOG and KVM_CLEAR_DIRTY_LOG do.
pub struct Batching {
    page: Granule,
    log: Vec<AtomicU64>,
    pub before_clear: Hook,
    /// The ranges of all harvests so far.
    pub asked: Mutex<Vec<IovaRange>>,
}

impl Batching {
    /// For addresses below `bytes`.
    pub fn new(page: Granule, bytes: u64) -> Self {
        let words = (bytes >> page.lg2()).div_ceil(64);
        Batching {
            page,
            log: (0..words).map(|_| AtomicU64::new(0)).collect(),
            before_clear: Hook::default(),
            asked: Mutex::default(),
        }
    }

    /// A device wrote the byte at `at`.
    pub fn write(&self, at: u64) {
        let page = at >> self.page.lg2();
        self.log[(page / 64) as usize].fetch_or(1 << (page % 64), SeqCst);
    }

    fn numbers(&self, range: IovaRange) -> (u64, u64) {
        let number = |at: Iova| at.get() >> self.page.lg2();
        (number(range.start()), number(range.last()))
    }

    fn addresses(&self, first: u64, last: u64) -> IovaRange {
        let (start, end) = (first << self.page.lg2(), (last + 1) << self.page.lg2());
        IovaRange::new(Iova::new(start), Iova::new(end - 1)).unwrap()
    }

    /// The runs of pages that are dirty in `range`.
    fn runs(&self, range: IovaRange) -> Vec<IovaRange> {
        let (first, last) = self.numbers(range);
        let is_dirty = |page: &u64| {
            let word = self.log.get((page / 64) as usize);
            word.is_some_and(|word| word.load(SeqCst) >> (page % 64) & 1 == 1)
        };
        let mut runs: Vec<IovaRange> = Vec::new();
        for page in (first..=last).filter(is_dirty) {
            let here = self.addresses(page, page);
            match runs.last_mut() {
                Some(run) if run.last().checked_add(1) == Some(here.start()) => {
                    *run = IovaRange::new(run.start(), here.last()).unwrap();
                }
                _ => runs.push(here),
            }
        }
        runs
    }

    /// Clears the pages of `run`; whether one was dirty.
    fn clear(&self, run: IovaRange) -> bool {
        let (first, last) = self.numbers(run);
        (first..=last).fold(false, |any, page| {
            let bit = 1 << (page % 64);
            any | (self.log[(page / 64) as usize].fetch_and(!bit, SeqCst) & bit != 0)
        })
    }
}

impl DirtySource for Batching {
    fn page(&self) -> Granule {
        self.page
    }

    fn map(&self, _: &Mapping) -> Result<(), Error> {
        Ok(())
    }

    fn unmap(&self, range: IovaRange, gather: &mut FlushGather, dirty: &mut dyn FnMut(IovaRange)) {
        gather.add(range, self.page);
        for run in self.runs(range) {
            self.clear(run);
            dirty(run);
        }
    }

    fn split_at(&self, _: Iova, _: &mut FlushGather) -> Result<(), Error> {
        Ok(())
    }

    fn set_tracking(&self, to: Tracking) -> Result<(), Error> {
        if to.is_on() {
            self.log.iter().for_each(|word| word.store(0, SeqCst));
        }
        Ok(())
    }

    fn read_and_clear(&self, range: IovaRange, out: &mut LeafSink<'_, '_>) -> Result<(), Stopped> {
        self.asked.lock().unwrap().push(range);
        let runs = self.runs(range);
        let mut later = Vec::new();
        for run in runs {
            let to_clear = out.take_run(run, self.page, |page| self.clear(page))?;
            later.extend(to_clear.range());
        }
        self.before_clear.run();
        for run in later {
            self.clear(run);
        }
        Ok(())
    }

    fn peek(&self, range: IovaRange, sink: &mut Sink<'_>) -> Result<(), Stopped> {
        for run in self.runs(range) {
            sink.record(run).map_err(|error| Stopped {
                at: run.start(),
                error,
            })?;
        }
        Ok(())
    }

    fn invalidate(&self, _: &FlushGather) -> Result<Invalidated, Error> {
        Ok(Invalidated::default())
    }
}

/// A source that is always clean, where a harvest can be made to pause.
#[derive(Default)]
pub struct Pause(pub Hook);

impl DirtySource for Pause {
    fn map(&self, _: &Mapping) -> Result<(), Error> {
        Ok(())
    }

    fn unmap(&self, _: IovaRange, _: &mut FlushGather, _: &mut dyn FnMut(IovaRange)) {}

    fn set_tracking(&self, _: Tracking) -> Result<(), Error> {
        Ok(())
    }

    fn read_and_clear(&self, _: IovaRange, _: &mut LeafSink<'_, '_>) -> Result<(), Stopped> {
        self.0.run();
        Ok(())
    }

    fn peek(&self, _: IovaRange, _: &mut Sink<'_>) -> Result<(), Stopped> {
        Ok(())
    }

    fn invalidate(&self, _: &FlushGather) -> Result<Invalidated, Error> {
        Ok(Invalidated::default())
    }
}
