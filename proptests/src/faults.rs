//! A source that fails on request: it panics at its n-th next callback, or stops at an address.
//!
//! ```text
//!  space --callback--> Source --the same callback--> the node of the world
//!                        |
//!                        +-- panics before it, in the middle of it, or after it
//!                        +-- keeps a ledger of what `unmap` and `split_at` owe and nobody paid
//! ```
//!
//! Each request is performed once. A panic in the middle comes after the source has mapped,
//! reported or cleared a half.

use std::any::Any;
use std::ops::Deref;
use std::panic::resume_unwind;

use dirtymap::source::{FlushCost, FlushGather, Invalidated, LeafSink, Sink, Stopped};
use dirtymap::sync::{Arc, Mutex, lock};
use dirtymap::{DirtySource, Error, Granule, Iova, IovaRange, Mapping, Tracking};

use crate::op::{Callback, Moment, Sabotage};
use crate::rig::Node;

/// The payload of a requested panic.
pub(crate) struct ToldToPanic;

/// Whether `panic` is a requested one.
pub(crate) fn was_told(panic: &(dyn Any + Send)) -> bool {
    panic.is::<ToldToPanic>() || panic.is::<crate::rig::ToldToDie>()
}

/// The error of a requested stop.
#[derive(Debug, thiserror::Error)]
#[error("this source was told to stop")]
pub(crate) struct ToldToStop;

/// See the [module](self).
pub(crate) struct Faulty {
    node: Box<dyn Node>,
    sabotage: Sabotage,
    orders: Mutex<Orders>,
}

#[derive(Default)]
struct Orders {
    /// For each callback, the number of calls that succeed before the one that panics.
    panics: [Option<(u8, Moment)>; Callback::ALL.len()],
    /// The number of panics of invalidations since it was last read.
    broken_flushes: u64,
    /// The address at which the next harvest that reaches it stops.
    stop: Option<Iova>,
    /// Whether the last switch of tracking panicked: it may have been performed or not.
    in_doubt: bool,
    /// The ranges of each `unmap` that panicked, and the places of each `split_at` that did. The
    /// whole range, and the whole area, may be reported as dirty.
    blurred: Vec<IovaRange>,
    /// What is owed.
    owed: Vec<IovaRange>,
}

impl Faulty {
    pub(crate) fn new(node: impl Node + 'static, sabotage: Sabotage) -> Self {
        Faulty {
            node: Box::new(node),
            sabotage,
            orders: Mutex::default(),
        }
    }

    /// The next `calls` calls of `callback` succeed, and the one after them panics.
    pub(crate) fn panic_at(&self, callback: Callback, calls: u8, moment: Moment) {
        lock(&self.orders).panics[callback as usize] = Some((calls, moment));
    }

    /// The next harvest that reaches `at` stops there.
    pub(crate) fn stop_at(&self, at: Option<Iova>) {
        lock(&self.orders).stop = at;
    }

    /// Where the next harvest stops.
    pub(crate) fn stop(&self) -> Option<Iova> {
        lock(&self.orders).stop
    }

    /// Withdraws all requested panics and stops.
    pub(crate) fn heal(&self) {
        let mut orders = lock(&self.orders);
        orders.panics = Default::default();
        orders.stop = None;
        self.node.fails().set(false);
        self.node.dies().set(false);
    }

    /// The ranges that may be reported as dirty, because an unmap or a split in them panicked.
    pub(crate) fn take_blurred(&self) -> Vec<IovaRange> {
        std::mem::take(&mut lock(&self.orders).blurred)
    }

    /// How many invalidations have panicked since the last time.
    pub(crate) fn take_broken_flushes(&self) -> u64 {
        std::mem::take(&mut lock(&self.orders).broken_flushes)
    }

    /// Whether it may still track although its space has switched it off, because the switch of a
    /// detach panicked.
    pub(crate) fn is_in_doubt(&self) -> bool {
        lock(&self.orders).in_doubt
    }

    /// The debts that are not paid.
    pub(crate) fn owed(&self) -> Vec<IovaRange> {
        lock(&self.orders).owed.clone()
    }

    /// Whether this call of `callback` panics, and at which moment.
    fn turn(&self, callback: Callback) -> Option<Moment> {
        let mut orders = lock(&self.orders);
        match &mut orders.panics[callback as usize] {
            Some((0, moment)) => {
                let moment = *moment;
                orders.panics[callback as usize] = None;
                Some(moment)
            }
            Some((calls, _)) => {
                *calls -= 1;
                None
            }
            None => None,
        }
    }

    /// Performs `all`, or panics before it, or after it; in the middle, `half` comes first.
    fn around<T>(&self, callback: Callback, half: impl FnOnce(), all: impl FnOnce() -> T) -> T {
        match self.turn(callback) {
            None => all(),
            Some(moment) => {
                match moment {
                    Moment::Before => {}
                    Moment::Middle => half(),
                    Moment::After => drop(all()),
                }
                panic_now()
            }
        }
    }

    /// The lower half of `range`, in whole pages. A single page is not split.
    fn half(&self, range: IovaRange) -> IovaRange {
        let middle = range.start().get() + (range.last().get() - range.start().get()) / 2;
        let middle = Iova::new(middle).granule_last(self.node.page());
        IovaRange::new(range.start(), middle.min(range.last())).unwrap_or(range)
    }

    /// Adds the debt of `owe` to `gather` and to the ledger. May panic.
    fn owing<T>(&self, gather: &mut FlushGather, owe: impl FnOnce(&mut FlushGather) -> T) -> T {
        struct Ledger<'f> {
            source: &'f Faulty,
            all: &'f mut FlushGather,
            fresh: FlushGather,
        }
        impl Drop for Ledger<'_> {
            fn drop(&mut self) {
                self.all.merge(&self.fresh);
                lock(&self.source.orders)
                    .owed
                    .extend_from_slice(self.fresh.ranges());
            }
        }
        let mut ledger = Ledger {
            source: self,
            all: gather,
            fresh: FlushGather::new(),
        };
        owe(&mut ledger.fresh)
    }

    /// The debts of `gather` are paid.
    fn paid(&self, gather: &FlushGather) {
        let all = gather.is_full();
        let covered = |owed: &IovaRange| gather.ranges().iter().any(|range| range.covers(*owed));
        lock(&self.orders)
            .owed
            .retain(|owed| !all && !covered(owed));
    }
}

/// Not by `panic!`, because the panic hook may end the process.
fn panic_now() -> ! {
    resume_unwind(Box::new(ToldToPanic))
}

impl Deref for Faulty {
    type Target = dyn Node;

    fn deref(&self) -> &Self::Target {
        &*self.node
    }
}

/// A node as the space sees it.
pub(crate) struct Source(pub(crate) Arc<Faulty>);

impl Deref for Source {
    type Target = Faulty;

    fn deref(&self) -> &Faulty {
        &self.0
    }
}

impl DirtySource for Source {
    fn page(&self) -> Granule {
        self.around(Callback::Page, || (), || self.node.page())
    }

    fn identity(&self) -> Option<usize> {
        let own = || Some(Arc::as_ptr(&self.0).addr());
        self.around(Callback::Identity, || (), own)
    }

    fn map(&self, mapping: &Mapping) -> Result<(), Error> {
        let half = Mapping {
            range: self.half(mapping.range),
            ..*mapping
        };
        self.around(
            Callback::Map,
            || drop(self.node.map(&half)),
            || self.node.map(mapping),
        )
    }

    fn unmap(&self, range: IovaRange, gather: &mut FlushGather, dirty: &mut dyn FnMut(IovaRange)) {
        let moment = self.turn(Callback::Unmap);
        if moment.is_some() {
            lock(&self.orders).blurred.push(range);
        }
        if moment == Some(Moment::Before) {
            panic_now();
        }
        self.owing(gather, |gather| {
            self.node.unmap(range, gather, &mut |leaf| {
                dirty(leaf);
                if moment == Some(Moment::Middle) {
                    panic_now();
                }
            });
        });
        if moment.is_some() {
            panic_now();
        }
    }

    fn split_at(&self, at: Iova, gather: &mut FlushGather) -> Result<(), Error> {
        let moment = self.turn(Callback::SplitAt);
        if moment.is_some() {
            let page = IovaRange::granule_at(at, self.node.page());
            lock(&self.orders).blurred.push(page);
        }
        if moment == Some(Moment::Before) {
            panic_now();
        }
        let done = self.owing(gather, |gather| self.node.split_at(at, gather));
        if moment.is_some() {
            panic_now();
        }
        done
    }

    fn set_tracking(&self, to: Tracking) -> Result<(), Error> {
        lock(&self.orders).in_doubt = true;
        let done = self.around(Callback::SetTracking, || (), || self.node.set_tracking(to));
        lock(&self.orders).in_doubt = false;
        done
    }

    fn read_and_clear(&self, range: IovaRange, out: &mut LeafSink<'_, '_>) -> Result<(), Stopped> {
        match self.turn(Callback::ReadAndClear) {
            None => {}
            Some(Moment::Before) => panic_now(),
            Some(Moment::Middle) => {
                let _ = self.node.read_and_clear(self.half(range), out);
                panic_now();
            }
            Some(Moment::After) => {
                let _ = self.node.read_and_clear(range, out);
                panic_now();
            }
        }
        let stop = {
            let mut orders = lock(&self.orders);
            let here = |at: &mut Iova| range.contains(*at);
            orders.stop.take_if(here)
        };
        let Some(at) = stop else {
            return self.node.read_and_clear(range, out);
        };
        let page = self.node.page();
        let mut below = at.granule_start(page).get().checked_sub(1);
        if self.sabotage == Sabotage::StopShort {
            below = below.and_then(|last| last.checked_sub(page.bytes()));
        }
        let below = below.and_then(|last| IovaRange::new(range.start(), Iova::new(last)).ok());
        if let Some(below) = below {
            self.node.read_and_clear(below, out)?;
        }
        Err(Stopped {
            at,
            error: Error::source_failed(ToldToStop),
        })
    }

    fn peek(&self, range: IovaRange, sink: &mut Sink<'_>) -> Result<(), Stopped> {
        match self.turn(Callback::Peek) {
            None => self.node.peek(range, sink),
            Some(moment) => {
                if moment != Moment::Before {
                    let _ = self.node.peek(self.half(range), sink);
                }
                panic_now()
            }
        }
    }

    fn invalidate(&self, gather: &FlushGather) -> Result<Invalidated, Error> {
        let moment = self.turn(Callback::Invalidate);
        if moment.is_some() {
            lock(&self.orders).broken_flushes += 1;
        }
        if moment.is_some() && self.sabotage == Sabotage::HidePanickedFlush {
            return Ok(Invalidated::default());
        }
        if moment == Some(Moment::Before) {
            panic_now();
        }
        let done = self.node.invalidate(gather)?;
        if moment.is_some() {
            // No caller learned that it was done.
            panic_now();
        }
        self.paid(gather);
        Ok(done)
    }

    fn flush_cost(&self) -> FlushCost {
        self.around(Callback::FlushCost, || (), || self.node.flush_cost())
    }
}
