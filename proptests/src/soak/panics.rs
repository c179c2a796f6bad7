//! Sources that panic now and then, in any callback, and the calls that catch it.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Arc;

use dirtymap::source::{FlushGather, Invalidated, LeafSink, Sink, Stopped};
use dirtymap::sync::{AtomicBool, AtomicU64, Ordering};
use dirtymap::{DirtySource, Error, Granule, Iova, IovaRange, Mapping, Tracking};
use pagetable_sim::{Domain, Format};

use crate::Random;

/// On average one of this number of calls panics.
const ONE_IN: u64 = 400;

/// The payload of a source's panic.
struct Told;

/// Whether sources panic, the number of panics, and the seed.
#[derive(Default)]
pub(super) struct Panics {
    on: AtomicBool,
    calls: AtomicU64,
    count: AtomicU64,
    seed: u64,
}

impl Panics {
    pub(super) fn new(seed: u64) -> Self {
        Panics {
            seed,
            ..Panics::default()
        }
    }

    /// Switches panics on or off.
    pub(super) fn switch(&self, on: bool) {
        // Relaxed: the actors rest, or have not begun.
        self.on.store(on, Ordering::Relaxed);
    }

    pub(super) fn count(&self) -> u64 {
        // Relaxed: a statistic.
        self.count.load(Ordering::Relaxed)
    }

    /// Whether this call panics, and if so whether that is after its work.
    fn turn(&self) -> Option<bool> {
        // Relaxed, all: a switch and two counts.
        if !self.on.load(Ordering::Relaxed) {
            return None;
        }
        let call = self.calls.fetch_add(1, Ordering::Relaxed);
        let mut dice = Random::new(self.seed ^ call.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        let panics = dice.below(ONE_IN) == 0;
        panics.then(|| {
            self.count.fetch_add(1, Ordering::Relaxed);
            dice.below(2) == 0
        })
    }

    /// Performs `work`, or panics before or after it.
    fn around<T>(&self, work: impl FnOnce() -> T) -> T {
        match self.turn() {
            None => work(),
            Some(after) => {
                if after {
                    drop(work());
                }
                // Not by `panic!`, so that no panic hook runs.
                resume_unwind(Box::new(Told));
            }
        }
    }
}

/// Performs `call`. `None` if a source panicked in it. Any other panic is raised again.
pub(super) fn caught<T>(call: impl FnOnce() -> T) -> Option<T> {
    let told = |panic: &Box<dyn Any + Send>| panic.is::<Told>();
    match catch_unwind(AssertUnwindSafe(call)) {
        Ok(done) => Some(done),
        Err(panic) if told(&panic) => None,
        Err(panic) => resume_unwind(panic),
    }
}

/// A domain that panics now and then.
pub(super) struct Panicking<F: Format> {
    pub(super) domain: Arc<Domain<F>>,
    pub(super) panics: Arc<Panics>,
}

impl<F: Format> DirtySource for Panicking<F> {
    fn page(&self) -> Granule {
        self.panics.around(|| DirtySource::page(&*self.domain))
    }

    fn map(&self, mapping: &Mapping) -> Result<(), Error> {
        self.panics
            .around(|| DirtySource::map(&*self.domain, mapping))
    }

    fn unmap(&self, range: IovaRange, gather: &mut FlushGather, dirty: &mut dyn FnMut(IovaRange)) {
        self.panics
            .around(|| DirtySource::unmap(&*self.domain, range, gather, dirty));
    }

    fn split_at(&self, at: Iova, gather: &mut FlushGather) -> Result<(), Error> {
        self.panics
            .around(|| DirtySource::split_at(&*self.domain, at, gather))
    }

    fn set_tracking(&self, to: Tracking) -> Result<(), Error> {
        DirtySource::set_tracking(&*self.domain, to)
    }

    fn read_and_clear(&self, range: IovaRange, out: &mut LeafSink<'_, '_>) -> Result<(), Stopped> {
        self.panics
            .around(|| DirtySource::read_and_clear(&*self.domain, range, out))
    }

    fn peek(&self, range: IovaRange, sink: &mut Sink<'_>) -> Result<(), Stopped> {
        self.panics
            .around(|| DirtySource::peek(&*self.domain, range, sink))
    }

    fn invalidate(&self, gather: &FlushGather) -> Result<Invalidated, Error> {
        self.panics
            .around(|| DirtySource::invalidate(&*self.domain, gather))
    }
}
