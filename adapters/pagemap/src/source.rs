//! Process memory as a source of dirty state.

use super::ProcessMemory;
use dirtymap::source::{FlushGather, Invalidated, LeafSink, Sink, Stopped};
use dirtymap::{DirtySource, Error, Granule, Iova, IovaRange, Mapping, Tracking};

impl DirtySource for ProcessMemory {
    fn page(&self) -> Granule {
        self.page
    }

    /// Any area: what of it was added is tracked.
    fn map(&self, _: &Mapping) -> Result<(), Error> {
        self.check_process().map_err(Error::source_failed)
    }

    /// Reports and forgets what is dirty; the memory stays as it is. In a child of `fork` all of it
    /// is dirty.
    fn unmap(&self, range: IovaRange, gather: &mut FlushGather, dirty: &mut dyn FnMut(IovaRange)) {
        gather.add(range, self.page);
        if self.check_process().is_err() {
            return dirty(range);
        }
        for (memory, part) in self.memory().touched(range) {
            memory.drain(&*self.kernel, part, dirty);
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

    fn read_and_clear(&self, range: IovaRange, out: &mut LeafSink<'_, '_>) -> Result<(), Stopped> {
        self.check_process_at(range.start())?;
        self.memory()
            .touched(range)
            .try_for_each(|(memory, part)| memory.take(&*self.kernel, part, out))
    }

    fn peek(&self, range: IovaRange, sink: &mut Sink<'_>) -> Result<(), Stopped> {
        self.check_process_at(range.start())?;
        self.memory()
            .touched(range)
            .try_for_each(|(memory, part)| memory.peek(&*self.kernel, part, sink))
    }

    /// The call that protects pages has flushed when it returns.
    fn invalidate(&self, _: &FlushGather) -> Result<Invalidated, Error> {
        self.check_process().map_err(Error::source_failed)?;
        Ok(Invalidated::default())
    }
}
