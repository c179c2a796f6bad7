//! The log as a source of dirty state.

use super::KvmLog;
use dirtymap::source::{FlushGather, Invalidated, LeafSink, Sink, Stopped};
use dirtymap::{DirtySource, Error, Granule, Iova, IovaRange, Mapping, Tracking};

impl DirtySource for KvmLog {
    fn page(&self) -> Granule {
        self.page
    }

    /// Any area: what of it lies in slots is tracked.
    fn map(&self, _: &Mapping) -> Result<(), Error> {
        self.check_process().map_err(Error::source_failed)
    }

    /// Reports and forgets what is dirty; slots stay as they are. In a child of `fork` all of it
    /// is.
    fn unmap(&self, range: IovaRange, gather: &mut FlushGather, dirty: &mut dyn FnMut(IovaRange)) {
        if self.check_process().is_err() {
            gather.add(range, self.page);
            return dirty(range);
        }
        self.reap();
        gather.add(range, self.page);
        for (slot, part) in self.slots().placed.touched(range) {
            slot.drain(&*self.kernel, self.mode, part, dirty);
        }
    }

    /// Every border of pages is one.
    fn split_at(&self, at: Iova, _: &mut FlushGather) -> Result<(), Error> {
        if at.is_aligned(self.page) {
            Ok(())
        } else {
            Err(Error::CannotSplit { at })
        }
    }

    fn set_tracking(&self, to: Tracking) -> Result<(), Error> {
        self.switch(to.is_on()).map_err(Error::source_failed)
    }

    /// Slot by slot, ascending by first address. Slots of two of KVM's address spaces may share
    /// addresses: when one stops, the others still hand out all below the stop, and what earlier
    /// ones handed out from there on is dirty again.
    fn read_and_clear(&self, range: IovaRange, out: &mut LeafSink<'_, '_>) -> Result<(), Stopped> {
        self.check_process_at(range.start())?;
        self.reap();
        let slots = self.slots();
        let (mut rest, mut outcome) = (Some(range), Ok(()));
        for (n, (slot, part)) in slots.placed.touched(range).enumerate() {
            let Some(part) = rest.and_then(|rest| part.intersection(rest)) else {
                continue;
            };
            let Err(stopped) = slot.take(&*self.kernel, self.mode, part, out) else {
                continue;
            };
            if let Ok(above) = IovaRange::new(stopped.at, range.last()) {
                let earlier = slots.placed.touched(range).take(n);
                earlier.for_each(|(earlier, _)| earlier.dirty(above));
            }
            rest = range.below(stopped.at);
            outcome = Err(stopped);
        }
        outcome
    }

    fn peek(&self, range: IovaRange, sink: &mut Sink<'_>) -> Result<(), Stopped> {
        self.check_process_at(range.start())?;
        self.reap();
        let slots = self.slots();
        slots
            .placed
            .touched(range)
            .try_for_each(|(slot, part)| slot.peek(&*self.kernel, self.mode, part, sink))
    }

    /// The calls that clear a log flush before they return. For rings the flush is
    /// KVM_RESET_DIRTY_RINGS.
    fn invalidate(&self, gather: &FlushGather) -> Result<Invalidated, Error> {
        self.check_process().map_err(Error::source_failed)?;
        if self.mode.is_ring() {
            // With this lock no page is pending whose entry is not handed back yet: see `reap`.
            let rings = self.rings();
            self.reset(&rings).map_err(Error::source_failed)?;
        }
        let _ = gather;
        Ok(Invalidated::default())
    }
}
