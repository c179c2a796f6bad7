//! One piece of an area, as one page table sees it.

use std::collections::TryReserveError;

use dirtymap::adapter::Pending;
use dirtymap::sync::{Mutex, MutexGuard, lock};
use dirtymap::{Granule, IovaRange, Mapping};

/// A piece of an area.
#[derive(Debug)]
pub(crate) struct Log {
    pub(crate) range: IovaRange,
    state: Mutex<State>,
}

/// The dirty pages of a piece.
#[derive(Debug)]
pub(crate) struct State {
    /// Pages that are dirty, and that the kernel does not report any more.
    pub(crate) pending: Pending,
    /// Whether the translation has ended, so that the kernel has no dirty pages of it.
    pub(crate) gone: bool,
    /// Whether the pending pages are also pending in the table of another domain.
    pub(crate) copied: bool,
}

impl Log {
    pub(crate) fn new(range: IovaRange, page: Granule) -> Result<Self, TryReserveError> {
        Ok(Log {
            range,
            state: Mutex::new(State {
                pending: Pending::new(range, page)?,
                gone: false,
                copied: false,
            }),
        })
    }

    /// What is known. A thread that panicked with it left nothing half done.
    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }
}

/// The pieces of a mapping: what lies between two multiples of `size`.
pub(crate) fn pieces(mapping: &Mapping, size: Granule) -> impl Iterator<Item = Mapping> {
    let whole = *mapping;
    let mut next = Some(whole.range.start());
    std::iter::from_fn(move || {
        let start = next?;
        let last = start.granule_last(size).min(whole.range.last());
        next = (last < whole.range.last())
            .then(|| last.checked_add(1))
            .flatten();
        let offset = start.get() - whole.range.start().get();
        Some(Mapping {
            range: IovaRange::new(start, last).ok()?,
            backing: whole.backing.wrapping_add(offset),
            access: whole.access,
        })
    })
}
