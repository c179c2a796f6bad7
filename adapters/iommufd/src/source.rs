//! A page table as a dirty source.

use dirtymap::bitmap::Sink;
use dirtymap::flush::{FlushGather, Invalidated};
use dirtymap::source::{LeafSink, Stopped};
use dirtymap::sync::MutexGuard;
use dirtymap::{DirtySource, Error, Granule, Iova, IovaRange, Mapping, Tracking};

use crate::error::IommufdError;
use crate::hwpt::Hwpt;
use crate::ioas;
use crate::log::{Log, State, pieces};
use crate::table::Kept;

impl DirtySource for Hwpt {
    fn page(&self) -> Granule {
        self.table().page
    }

    fn map(&self, mapping: &Mapping) -> Result<(), Error> {
        let mut state = self.ioas().lock();
        // Of an earlier map, which failed.
        self.leave_kept(&mut state, None)?;
        let mut entered: u128 = 0;
        for piece in pieces(mapping, self.ioas().options().piece) {
            if let Err(error) = self.enter(&mut state, &piece) {
                let left = self.leave_first(&mut state, mapping.range, entered);
                // Memory that devices still reach matters more than the reason.
                return Err(left.err().unwrap_or(error).into());
            }
            entered += piece.range.len();
        }
        Ok(())
    }

    fn unmap(&self, range: IovaRange, gather: &mut FlushGather, dirty: &mut dyn FnMut(IovaRange)) {
        let mut state = self.ioas().lock();
        let _ = self.table().for_each_log(range, |log, _| {
            if self.leave(&mut state, log, dirty).is_some() {
                gather.add(log.range, self.table().page);
            }
            Ok::<(), std::convert::Infallible>(())
        });
        // The flush of this unmap asks for them, too.
        let logs = self.table().logs();
        for log in logs.undone.iter().filter_map(|at| logs.by_start.get(at)) {
            gather.add(log.range, self.table().page);
        }
    }

    fn split_at(&self, at: Iova, _: &mut FlushGather) -> Result<(), Error> {
        match self
            .table()
            .log_from(at.get(), IovaRange::granule_at(at, Granule::BYTE))
        {
            Some((log, _)) if log.range.start() < at => Err(Error::CannotSplit { at }),
            _ => Ok(()),
        }
    }

    fn set_tracking(&self, to: Tracking) -> Result<(), Error> {
        Ok(self.switch(to.is_on())?)
    }

    fn read_and_clear(&self, range: IovaRange, out: &mut LeafSink<'_, '_>) -> Result<(), Stopped> {
        self.table().for_each_log(range, |log, tracked| {
            let mut state = self.read(log, range, tracked, true)?;
            state.pending.take(range, out)
        })
    }

    fn peek(&self, range: IovaRange, sink: &mut Sink<'_>) -> Result<(), Stopped> {
        self.table().for_each_log(range, |log, tracked| {
            // What is pending and still known to the kernel is one page, and is reported once.
            let state = self.read(log, range, tracked, false)?;
            state.pending.peek(range, sink)
        })
    }

    /// The kernel flushes before a read or an unmap returns. What is left to do is to try again
    /// what an unmap could not end, because devices reach that memory still.
    fn invalidate(&self, gather: &FlushGather) -> Result<Invalidated, Error> {
        if !self.table().logs().kept.is_empty() {
            self.leave_kept(&mut self.ioas().lock(), Some(gather))?;
        }
        Ok(Invalidated::default())
    }
}

impl Hwpt {
    /// Adds the dirty pages of the kernel in a piece to the pending ones.
    fn read<'l>(
        &self,
        log: &'l Log,
        asked: IovaRange,
        tracked: bool,
        clear: bool,
    ) -> Result<MutexGuard<'l, State>, Stopped> {
        let mut state = log.state();
        if tracked && !state.gone {
            let pulled = self.table().pull(log.range, &mut state, clear);
            pulled.map_err(|error| Stopped {
                at: log.range.start().max(asked.start()),
                error: error.into(),
            })?;
        }
        Ok(state)
    }

    /// Undoes the first `len` bytes of a map of `range`.
    ///
    /// # Errors
    /// [`IommufdError::StillMapped`] with the first piece that the kernel refused to unmap. That,
    /// and what devices reach because another domain has it mapped, is left to the next flush.
    fn leave_first(
        &self,
        state: &mut ioas::State,
        range: IovaRange,
        len: u128,
    ) -> Result<(), IommufdError> {
        let Some(last) = u64::try_from(len).ok().and_then(|len| len.checked_sub(1)) else {
            return Ok(());
        };
        let Some(last) = range.start().checked_add(last) else {
            return Ok(());
        };
        let done = IovaRange::new(range.start(), last);
        let mut first = Ok(());
        let _ = self.table().for_each_log(done.unwrap_or(range), |log, _| {
            let left = self.leave(state, log, &mut |_| ());
            if left.is_some() {
                let start = log.range.start().get();
                self.table().logs().undone.insert(start);
            }
            if left == Some(Kept::ByKernel) && first.is_ok() {
                first = Err(IommufdError::StillMapped { range: log.range });
            }
            Ok::<(), std::convert::Infallible>(())
        });
        first
    }
}
