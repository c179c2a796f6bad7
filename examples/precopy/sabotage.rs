//! The faults of `--sabotage` inside the simulated hardware. The comparison at the end must detect
//! each of them.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use dirtymap::source::{FlushGather, Invalidated, LeafSink, Sink, Stopped};
use dirtymap::{DirtySource, Error, Granule, IovaRange, Mapping, Tracking, UserBitmap};
use pagetable_sim::{Breakage, Domain, Format};

use crate::cli::Sabotage;
use crate::replay::mix;

/// Installs the faults of `sabotage` inside the hardware. The other faults are in the code of their
/// steps.
pub(crate) fn break_hardware<F: Format>(domain: &Domain<F>, sabotage: Option<Sabotage>) {
    match sabotage {
        Some(Sabotage::SkipFlush) => domain.break_hardware(Breakage::IgnoreInvalidations),
        Some(Sabotage::NoDrain) => domain.break_hardware(Breakage::AcknowledgeWithoutDraining),
        _ => {}
    }
}

/// A domain that loses some of the dirty bits that it clears, and owes no flush for them: one 2 MiB
/// piece in sixteen at each harvest.
pub(crate) struct Forgetful<F: Format> {
    inner: Arc<Domain<F>>,
    seed: u64,
    calls: AtomicU64,
}

impl<F: Format> Forgetful<F> {
    pub(crate) fn new(inner: Arc<Domain<F>>, seed: u64) -> Self {
        Forgetful {
            inner,
            seed,
            calls: AtomicU64::new(0),
        }
    }
}

impl<F: Format> DirtySource for Forgetful<F> {
    fn read_and_clear(&self, range: IovaRange, out: &mut LeafSink<'_, '_>) -> Result<(), Stopped> {
        let call = self.calls.fetch_add(1, Ordering::Relaxed);
        let mut start = range.start();
        while start <= range.last() {
            let last = start.granule_last(Granule::M2).min(range.last());
            let stopped = |error| Stopped { at: start, error };
            let piece = IovaRange::new(start, last).map_err(|error| stopped(error.into()))?;
            if mix(self.seed ^ mix(call) ^ start.get()).is_multiple_of(16) {
                let mut nowhere = [0u64; 512];
                let view = UserBitmap::new(&mut nowhere)
                    .view(piece, Granule::K4)
                    .map_err(|error| stopped(error.into()))?;
                let (mut sink, mut gather) = (view.sink(), FlushGather::new());
                self.inner
                    .read_and_clear(piece, &mut LeafSink::new(&mut sink, &mut gather))?;
            } else {
                self.inner.read_and_clear(piece, out)?;
            }
            match last.checked_add(1) {
                Some(next) => start = next,
                None => break,
            }
        }
        Ok(())
    }

    fn map(&self, mapping: &Mapping) -> Result<(), Error> {
        self.inner.map(mapping)
    }

    fn unmap(&self, range: IovaRange, gather: &mut FlushGather, dirty: &mut dyn FnMut(IovaRange)) {
        self.inner.unmap(range, gather, dirty);
    }

    fn set_tracking(&self, to: Tracking) -> Result<(), Error> {
        self.inner.set_tracking(to)
    }

    fn peek(&self, range: IovaRange, sink: &mut Sink<'_>) -> Result<(), Stopped> {
        self.inner.peek(range, sink)
    }

    fn invalidate(&self, gather: &FlushGather) -> Result<Invalidated, Error> {
        self.inner.invalidate(gather)
    }
}
