//! The log as a dirty source.

use std::collections::btree_map::Entry;
use std::io;
use std::sync::Arc;

use dirtymap::adapter::Pending;
use dirtymap::bitmap::Sink;
use dirtymap::flush::FlushGather;
use dirtymap::source::{LeafSink, Stopped};
use dirtymap::sync::lock;
use dirtymap::{Access, DirtySource, Error, Granule, Iova, IovaRange, Mapping, Tracking};

use super::{CHUNK_LG2, DeviceLog, DeviceLogError, LoggingDevice, State, touched, uninterrupted};

impl<D: LoggingDevice> DirtySource for DeviceLog<D> {
    fn page(&self) -> Granule {
        self.page
    }

    fn map(&self, mapping: &Mapping) -> Result<(), Error> {
        let range = mapping.range;
        if mapping.access == Access::Read {
            return Ok(()); // no device writes there
        }
        if !self.covers(range) {
            return Err(DeviceLogError::NotLogged { range }.into());
        }
        let mut state = lock(&self.state);
        let reserved = self.reserve(&mut state, range);
        match &reserved {
            Ok(()) => state.mapped.add(range),
            Err(_) => self.free_chunks(&mut state, range),
        }
        Ok(reserved?)
    }

    fn unmap(&self, range: IovaRange, _: &mut FlushGather, dirty: &mut dyn FnMut(IovaRange)) {
        let mut state = lock(&self.state);
        if self.pull(&mut state, range).is_err() {
            let parts: Vec<_> = state.mapped.parts(range).collect();
            parts.into_iter().for_each(&mut *dirty);
        }
        for chunk in touched(&mut state.chunks, range) {
            chunk.drain(range, dirty);
        }
        state.mapped.remove(range);
        self.free_chunks(&mut state, range);
    }

    /// A log has no leaves.
    fn split_at(&self, _: Iova, _: &mut FlushGather) -> Result<(), Error> {
        Ok(())
    }

    fn set_tracking(&self, to: Tracking) -> Result<(), Error> {
        let mut state = lock(&self.state);
        if to.is_on() == state.tracked {
            return Ok(());
        }
        if to.is_on() {
            state.log = Some(Arc::new(self.start(&mut state)?));
            state.chunks.values_mut().for_each(Pending::clear);
        } else {
            if self.pull(&mut state, IovaRange::ALL).is_err() {
                state.add_all();
            }
            let stopped = uninterrupted(|| self.device.stop()).0;
            state.may_log = stopped.is_err();
            // Without a log, the device refuses to stop one. Or the stop of a corrupt log failed:
            // the next start tries again.
            if let Some(error) = stopped.err().filter(|_| state.log.is_some()) {
                return Err(DeviceLogError::NotStopped { error }.into());
            }
            state.log = None;
            state.corrupt = false;
        }
        state.tracked = to.is_on();
        Ok(())
    }

    fn read_and_clear(&self, range: IovaRange, out: &mut LeafSink<'_, '_>) -> Result<(), Stopped> {
        let mut state = self.pulled(range)?;
        touched(&mut state.chunks, range).try_for_each(|chunk| chunk.take(range, out))
    }

    fn peek(&self, range: IovaRange, sink: &mut Sink<'_>) -> Result<(), Stopped> {
        let mut state = self.pulled(range)?;
        touched(&mut state.chunks, range).try_for_each(|chunk| chunk.peek(range, sink))
    }
}

impl<D: LoggingDevice> DeviceLog<D> {
    /// The state, after the pages that the device has logged in `range` are pending in it.
    fn pulled(&self, range: IovaRange) -> Result<dirtymap::sync::MutexGuard<'_, State>, Stopped> {
        let mut state = lock(&self.state);
        match self.pull(&mut state, range) {
            Ok(()) => Ok(state),
            Err(error) => Err(Stopped {
                at: range.start(),
                error: error.into(),
            }),
        }
    }

    /// The bytes of a chunk.
    fn chunk(&self) -> Granule {
        let lg2 = self.page.lg2().saturating_add(CHUNK_LG2);
        Granule::from_lg2(lg2).unwrap_or(self.page)
    }

    /// Makes the chunks of `range`.
    fn reserve(&self, state: &mut State, range: IovaRange) -> Result<(), DeviceLogError> {
        let mut next = Some(range.start());
        while let Some(at) = next {
            let chunk = IovaRange::granule_at(at, self.chunk());
            if let Entry::Vacant(place) = state.chunks.entry(chunk.start()) {
                let error = io::Error::from(io::ErrorKind::OutOfMemory);
                let pending = Pending::new(chunk, self.page)
                    .map_err(|_| DeviceLogError::NoMemory { range, error })?;
                place.insert(pending);
            }
            next = chunk
                .last()
                .checked_add(1)
                .filter(|next| *next <= range.last());
        }
        Ok(())
    }

    /// Frees the chunks that `range` touches and in which nothing is mapped.
    fn free_chunks(&self, state: &mut State, range: IovaRange) {
        let whole = range.round_out(self.chunk());
        let starts: Vec<Iova> = state
            .chunks
            .range(whole.start()..=whole.last())
            .map(|(start, _)| *start)
            .collect();
        for start in starts {
            let chunk = IovaRange::granule_at(start, self.chunk());
            if state.mapped.parts(chunk).next().is_none() {
                state.chunks.remove(&start);
            }
        }
    }
}
