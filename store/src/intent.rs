//! A write: announced, then in flight.

use dirtymap::IovaRange;
use dirtymap::sync::AtomicU64;

use crate::error::Error;
use crate::store::Store;
use crate::words::Words;

/// A write that was announced and must not be issued yet. Made by
/// [`Store::begin_write`](Store::begin_write).
#[must_use = "the write must not be issued before `wait` has returned"]
#[derive(Debug)]
pub struct Intent<'s> {
    pins: Pins<'s>,
    open: bool,
}

/// A write in flight. Dropping it says that the write has landed, or failed: the device has it, or
/// any part of it, and will not change the bytes any more.
///
/// While the guard lives, its extents stay open. One that is forgotten keeps them open until the
/// store is opened again.
#[must_use = "dropping the guard says that the write has landed"]
#[derive(Debug)]
pub struct WriteGuard<'s> {
    pins: Pins<'s>,
}

/// Extents that are pinned.
#[derive(Debug)]
struct Pins<'s> {
    store: &'s Store,
    range: IovaRange,
    first: u64,
    last: u64,
    /// The word of the first extent.
    word: &'s AtomicU64,
    /// Whether the write was issued.
    issued: bool,
}

impl<'s> Intent<'s> {
    #[inline]
    pub(crate) fn new(
        store: &'s Store,
        word: &'s AtomicU64,
        range: IovaRange,
        (first, last): (u64, u64),
        open: bool,
    ) -> Self {
        Intent {
            pins: Pins {
                store,
                range,
                first,
                last,
                word,
                issued: false,
            },
            open,
        }
    }

    /// Whether [`wait`](Intent::wait) would return at once.
    pub fn is_durable(&self) -> bool {
        let Pins { first, last, .. } = self.pins;
        self.open || (first..=last).all(|extent| self.pins.store.words.is_open(extent))
    }

    /// Waits until the extents of the write are durably open. After that, the write may be issued.
    /// Threads that wait together share one write of the log and one flush.
    ///
    /// # Errors
    /// [`Error::Io`] and [`Error::Failed`]: the write must not be issued.
    #[inline]
    pub fn wait(mut self) -> Result<WriteGuard<'s>, Error> {
        if !self.open {
            self.pins
                .store
                .await_open(self.pins.first, self.pins.last)?;
        }
        self.pins.issued = true;
        Ok(WriteGuard { pins: self.pins })
    }
}

impl WriteGuard<'_> {
    /// The bytes that the write touches.
    pub fn range(&self) -> IovaRange {
        self.pins.range
    }
}

impl Drop for Pins<'_> {
    #[inline]
    fn drop(&mut self) {
        let pages = |extent| match self.issued {
            true => self.store.mask(extent, self.range),
            false => 0,
        };
        if self.first == self.last {
            return Words::leave_word(self.word, pages(self.first));
        }
        for extent in self.first..=self.last {
            self.store.words.leave(extent, pages(extent));
        }
    }
}
