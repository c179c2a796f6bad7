//! A write: announced, then in flight.

use std::cell::Cell;
use std::marker::PhantomData;
use std::ops::RangeInclusive;

use dirtymap::sync::{Arc, AtomicU64};
use dirtymap::{Iova, IovaRange, ToIovaRange};

use crate::claims::Slot;
use crate::error::Error;
use crate::image::MAX_OPEN;
use crate::store::{Store, too_many_open};
use crate::words::{MAX_PINS, Words};

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

/// A handle for the writes of one thread. A write to an open extent costs it less than
/// [`Store::begin_write`] does: one locked operation on a cache line of its own, and another one on
/// the word of the extent if the page is not dirty yet. Made by [`Store::writer`].
///
/// One write of the handle at a time has the advantage: another one that begins meanwhile is as
/// without a handle. So is every write after a guard of the handle was forgotten.
#[derive(Debug)]
pub struct Writer<'s> {
    store: &'s Store,
    slot: Arc<Slot>,
    /// One thread at a time claims in the slot.
    not_sync: PhantomData<Cell<()>>,
}

/// Extents that stay open.
#[derive(Debug)]
struct Pins<'s> {
    store: &'s Store,
    range: IovaRange,
    /// The word of the first extent, or of the slot.
    word: &'s AtomicU64,
    /// The pages of the first extent that the write touches. 0 until it is issued.
    pages: u32,
    kind: Kind,
}

/// What keeps them open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// A claim of the only extent, in the slot of a handle.
    Claim,
    /// A pin of the only extent.
    One,
    /// Pins of several extents.
    Several,
}

impl Store {
    /// Announces a write to the bytes `range`. [`Intent::wait`] returns once the extents that it
    /// touches are durably open, and only then may the write be issued. If they are open, that is
    /// at once, without a lock.
    ///
    /// ```
    /// # use dirtymap_store::{Device, DirFolder, Options, Store};
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let dir = tempfile::tempdir()?;
    /// # let folder = DirFolder::new(dir.path().join("store"))?;
    /// # let store = Store::create(folder, &Device { id: 7, len: 1 << 30 }, &Options::new())?;
    /// let write = store.begin_write(0x5000..0x6000)?.wait()?;
    /// // ... the device is written here, by this thread or by another one ...
    /// drop(write); // it has landed
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// Announcing many writes and then waiting for each costs one flush.
    ///
    /// # Errors
    /// [`Error::Range`] and [`Error::PastEnd`]; [`Error::TooManyWrites`]; [`Error::TooManyOpen`];
    /// [`Error::Failed`], if an extent is not open.
    #[inline]
    pub fn begin_write(&self, range: impl ToIovaRange) -> Result<Intent<'_>, Error> {
        let range = range.to_iova_range()?;
        let len = self.device_len();
        if range.last().get() >= len {
            return Err(Error::PastEnd { range, len });
        }
        let first = range.start().get() >> self.extent().lg2();
        let last = range.last().get() >> self.extent().lg2();
        let word = self.words.word(first);
        if first == last {
            // Most writes are in one extent, and find it open.
            match Words::pin_word(word) {
                Some(true) => return Ok(Intent::new(self, word, range, true, true)),
                Some(false) => Words::leave_word(word, 0),
                None => {}
            }
        }
        self.begin_cold(word, range, first, last)
    }

    /// A handle for the writes of one thread.
    ///
    /// ```
    /// # use dirtymap_store::{Device, DirFolder, Options, Store};
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let dir = tempfile::tempdir()?;
    /// # let folder = DirFolder::new(dir.path().join("store"))?;
    /// # let store = Store::create(folder, &Device { id: 7, len: 1 << 30 }, &Options::new())?;
    /// let writer = store.writer();
    /// for page in 0..4 {
    ///     let write = writer.begin_write(page * 4096..(page + 1) * 4096)?;
    ///     // ... the device is written here ...
    ///     drop(write); // it has landed
    /// }
    /// # Ok(())
    /// # }
    /// ```
    pub fn writer(&self) -> Writer<'_> {
        Writer {
            store: self,
            slot: self.words.claims.add(),
            not_sync: PhantomData,
        }
    }

    /// The same where extents are not open, or several.
    #[cold]
    fn begin_cold<'s>(
        &'s self,
        word: &'s AtomicU64,
        range: IovaRange,
        first: u64,
        last: u64,
    ) -> Result<Intent<'s>, Error> {
        let mut open = true;
        let extents = last - first + 1;
        if extents > MAX_OPEN as u64 {
            return Err(too_many_open(extents));
        }
        for extent in first..=last {
            match self.words.pin(extent) {
                Some(is_open) => open &= is_open,
                None => {
                    self.unpin(first..extent);
                    return Err(Error::TooManyWrites {
                        extent,
                        limit: MAX_PINS,
                    });
                }
            }
        }
        if !open && let Err(error) = self.request(first, last) {
            self.unpin(first..last + 1);
            return Err(error);
        }
        Ok(Intent::new(self, word, range, first == last, open))
    }
}

impl Writer<'_> {
    /// Announces a write to the bytes `range`, and waits until the extents that it touches are
    /// durably open. Then the write may be issued. If they are open, that is at once, without a
    /// lock. The pages are dirty from now on, also if the write is not issued after all.
    ///
    /// # Errors
    /// Those of [`Store::begin_write`] and [`Intent::wait`].
    #[inline]
    pub fn begin_write(&self, range: impl ToIovaRange) -> Result<WriteGuard<'_>, Error> {
        let store = self.store;
        let range = range.to_iova_range()?;
        let len = store.device_len();
        if range.last().get() >= len {
            return Err(Error::PastEnd { range, len });
        }
        let extent = range.start().get() >> store.extent().lg2();
        if extent == range.last().get() >> store.extent().lg2() {
            let pages = store.first_pages(range);
            let mark = || store.words.mark_open(extent, pages);
            if self.slot.claim(extent, pages, mark) {
                return Ok(WriteGuard {
                    pins: Pins {
                        store,
                        range,
                        word: self.slot.word(),
                        pages,
                        kind: Kind::Claim,
                    },
                });
            }
        }
        begin_without(store, range)
    }
}

/// The same without a handle.
#[cold]
fn begin_without(store: &Store, range: IovaRange) -> Result<WriteGuard<'_>, Error> {
    store.begin_write(range)?.wait()
}

impl Drop for Writer<'_> {
    fn drop(&mut self) {
        self.store.words.claims.remove(&self.slot);
    }
}

impl<'s> Intent<'s> {
    /// The bytes that the write will touch.
    pub fn range(&self) -> IovaRange {
        self.pins.range
    }

    #[inline]
    fn new(store: &'s Store, word: &'s AtomicU64, range: IovaRange, one: bool, open: bool) -> Self {
        let kind = if one { Kind::One } else { Kind::Several };
        let pins = Pins {
            store,
            range,
            word,
            pages: 0,
            kind,
        };
        Intent { pins, open }
    }

    /// Whether [`wait`](Intent::wait) would return at once.
    pub fn is_durable(&self) -> bool {
        let store = self.pins.store;
        self.open
            || self
                .pins
                .extents()
                .all(|extent| store.words.is_open(extent))
    }

    /// Waits until the extents of the write are durably open. After that, the write may be issued.
    /// Threads that wait together share one write of the log and one flush.
    ///
    /// # Errors
    /// [`Error::Io`] and [`Error::Failed`]: the write must not be issued.
    #[inline]
    pub fn wait(mut self) -> Result<WriteGuard<'s>, Error> {
        if !self.open {
            self.pins.store.await_open(self.pins.extents())?;
        }
        self.pins.pages = self.pins.store.first_pages(self.pins.range);
        Ok(WriteGuard { pins: self.pins })
    }
}

impl WriteGuard<'_> {
    /// The bytes that the write touches.
    pub fn range(&self) -> IovaRange {
        self.pins.range
    }
}

impl Pins<'_> {
    fn extents(&self) -> RangeInclusive<u64> {
        let extent = |byte: Iova| byte.get() >> self.store.extent().lg2();
        extent(self.range.start())..=extent(self.range.last())
    }

    /// Ends a write to several extents.
    #[cold]
    fn leave_all(&self) {
        for extent in self.extents() {
            let pages = match self.pages {
                0 => 0,
                _ => self.store.mask(extent, self.range),
            };
            self.store.words.leave(extent, pages);
        }
    }
}

impl Drop for Pins<'_> {
    #[inline]
    fn drop(&mut self) {
        match self.kind {
            Kind::Claim => Slot::end(self.word),
            Kind::One => Words::leave_word(self.word, self.pages),
            Kind::Several => self.leave_all(),
        }
    }
}
