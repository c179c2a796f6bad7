//! The log as a source of dirty state.

use super::{KvmError, KvmLog};
use crate::bitmap::Sink;
use crate::error::Error;
use crate::flush::{FlushGather, Invalidated};
use crate::source::{DirtySource, LeafSink, Mapping, Stopped};
use crate::units::{Granule, Iova, IovaRange};

impl DirtySource for KvmLog {
    fn page(&self) -> Granule {
        self.page
    }

    /// Any area: what of it lies in slots is tracked.
    fn map(&self, _: &Mapping) -> Result<(), Error> {
        Ok(())
    }

    /// Reports and forgets what is dirty; slots stay as they are.
    fn unmap(&self, range: IovaRange, gather: &mut FlushGather, dirty: &mut dyn FnMut(IovaRange)) {
        self.reap();
        gather.add(range, self.page);
        for (slot, part) in self.parts(range) {
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

    fn set_tracking(&self, on: bool) -> Result<(), Error> {
        self.switch(on).map_err(Error::source_failed)
    }

    fn read_and_clear(&self, range: IovaRange, out: &mut LeafSink<'_, '_>) -> Result<(), Stopped> {
        self.reap();
        self.parts(range)
            .try_for_each(|(slot, part)| slot.take(&*self.kernel, self.mode, part, out))
    }

    fn peek(&self, range: IovaRange, sink: &mut Sink<'_>) -> Result<(), Stopped> {
        self.reap();
        self.parts(range)
            .try_for_each(|(slot, part)| slot.peek(&*self.kernel, self.mode, part, sink))
    }

    /// The calls that clear a log flush before they return. For rings the flush is KVM_RESET_DIRTY_RINGS.
    fn invalidate(&self, gather: &FlushGather) -> Result<Invalidated, Error> {
        if self.mode.is_ring() {
            // With this lock no page is pending whose entry is not handed back yet: see `reap`.
            let _rings = self.rings();
            self.kernel.reset_rings().map_err(|error| {
                let call = "KVM_RESET_DIRTY_RINGS";
                Error::source_failed(KvmError::Call { call, error })
            })?;
        }
        let _ = gather;
        Ok(Invalidated::default())
    }
}
