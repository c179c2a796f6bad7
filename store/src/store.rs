//! The store: writers that ask for extents, one leader at a time that writes the log, and the
//! threads that wait for it.
//!
//! ```text
//!  begin_write --> pin --> open? -- yes --------------------------------------> write
//!                            |                                                    ^
//!                            no --> record in the next batch --> wait --+         |
//!                                                                       v         |
//!                     leader: takes the batch, writes, flushes, opens the words --+
//! ```
//!
//! The lock is held to add records and to take turns, never while the disk is waited for. A thread
//! that waits, and finds no leader, becomes the leader for all threads that wait: group commit.

use std::mem;
use std::ops::RangeInclusive;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

use dirtymap::sync::{AtomicU64, Condvar, Mutex, MutexGuard, Ordering, lock, relax, wait};
use dirtymap::{Granule, IovaRange};

use crate::disk::Folder;
use crate::epoch::{Epoch, new_identity};
use crate::error::{Error, Why};
use crate::format::{BLOCK, Header, MAX_LOG};
use crate::gather::{Gather, PATIENCE};
use crate::geometry::{Device, Geometry};
use crate::image::{Image, MAX_OPEN};
use crate::journal::{Counts, Journal, Replayed, impossible, replay};
use crate::options::Options;
use crate::record::Record;
use crate::words::Words;

/// Crash-safe dirty state of one device; see the [crate](crate).
pub struct Store {
    pub(crate) words: Words,
    /// Bytes of the device, which grow.
    len: AtomicU64,
    extent: Granule,
    page: Granule,
    identity: u128,
    recovery: Recovery,
    queue: Mutex<Queue>,
    /// A batch is durable, the leader is done, or the store failed.
    turn: Condvar,
}

/// What waits for the leader.
struct Queue {
    /// Taken by the thread that leads.
    journal: Option<Box<Journal>>,
    /// Of the next batch.
    records: Vec<Record>,
    /// Extents that are open, as of the last batch.
    open: usize,
    /// Extents that the next batches open.
    opening: usize,
    /// Threads that wait for extents.
    gather: Gather,
    /// After a failure: the folder stays locked for as long as writes may be in flight.
    broken: Option<Box<Journal>>,
    /// Why the store failed, once it has.
    failed: Option<String>,
    counts: Counts,
    log_bytes: u64,
}

/// What [`Store::open`] found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Recovery {
    /// Extents that were open when the store ended. They may have been written, so each consumer
    /// gets all of them.
    pub open_extents: u64,
    /// Batches that were replayed.
    pub batches: u64,
}

/// What a store did since it was opened, and how large it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct StoreStats {
    /// Batches that became durable.
    pub batches: u64,
    /// Flushes of the disk, those of folders included.
    pub flushes: u64,
    /// New logs that took the place of old ones.
    pub switches: u64,
    /// Extents that were opened.
    pub opened: u64,
    /// Extents that were closed.
    pub closed: u64,
    /// Extents that are open.
    pub open: u64,
    /// The length of the log in bytes. While a new log takes its place, there are two.
    pub log_bytes: u64,
}

/// What is known after [`Store::open`].
#[derive(Debug)]
#[allow(clippy::large_enum_variant)] // one for each start of a program, and taken apart at once
pub enum Opened {
    /// The store is whole: each consumer gets what was written since its last commit.
    Known(Store),
    /// Nothing is known, so everything has to be copied.
    Everything(Lost),
}

/// A store that cannot be trusted, and why. What is there stays as it is until
/// [`start_over`](Lost::start_over).
pub struct Lost {
    why: Why,
    folder: Box<dyn Folder>,
    device: Device,
}

impl std::fmt::Debug for Store {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Store")
            .field("len", &self.device_len())
            .field("extent", &self.extent)
            .field("page", &self.page)
            .finish_non_exhaustive()
    }
}

impl std::fmt::Debug for Lost {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Lost")
            .field("why", &self.why)
            .field("device", &self.device)
            .finish_non_exhaustive()
    }
}

impl Lost {
    /// Why nothing is known.
    pub fn why(&self) -> &Why {
        &self.why
    }

    /// Makes a new store in place of what is there. It has no consumers, and an identity of its
    /// own: a consumer of the old store that joins it gets everything.
    ///
    /// # Errors
    /// As [`Store::create`], but for a store that exists.
    pub fn start_over(self, options: &Options) -> Result<Store, Error> {
        Store::make(self.folder, &self.device, options)
    }
}

impl Store {
    /// Makes a store for `device` in `folder`, which has none.
    ///
    /// # Errors
    /// [`Error::DeviceLength`], [`Error::Granules`], [`Error::Hot`] and [`Error::LogBytes`] for
    /// values out of bounds; [`Error::Locked`]; [`Error::Exists`]; [`Error::Io`].
    pub fn create(
        mut folder: impl Folder + 'static,
        device: &Device,
        options: &Options,
    ) -> Result<Store, Error> {
        options.check(device)?;
        reserve(&mut folder)?;
        let there = folder.open("log");
        match there.map_err(Error::io("the folder cannot be looked at"))? {
            Some(_) => Err(Error::Exists),
            None => Store::make(Box::new(folder), device, options),
        }
    }

    /// Opens the store of `device` in `folder`, after a clean end or a crash. On return, the
    /// recovery is durable. Extents and pages are as they were when the store was made; of
    /// `options`, only the bounds of open extents and of the log count.
    ///
    /// # Errors
    /// [`Error::Locked`], [`Error::Io`], and those of bounds. That a store cannot be trusted is no
    /// error, but the answer [`Opened::Everything`].
    pub fn open(
        mut folder: impl Folder + 'static,
        device: &Device,
        options: &Options,
    ) -> Result<Opened, Error> {
        options.bounds()?;
        reserve(&mut folder)?;
        let replayed = match replay(&mut folder, device)? {
            Ok(replayed) => replayed,
            Err(why) => {
                return Ok(Opened::Everything(Lost {
                    why,
                    folder: Box::new(folder),
                    device: *device,
                }));
            }
        };
        let Replayed {
            header,
            mut image,
            sequence,
            open,
            batches,
        } = replayed;
        image.recover();
        let draft = Header {
            generation: header.generation + 1,
            // A batch that was torn has the number `sequence`.
            sequence: sequence + 1,
            log: options.log_bytes,
            ..header
        };
        let recovery = Recovery {
            open_extents: open as u64,
            batches,
        };
        let store = Store::start(Box::new(folder), draft, image, options, recovery)?;
        Ok(Opened::Known(store))
    }

    fn make(folder: Box<dyn Folder>, device: &Device, options: &Options) -> Result<Store, Error> {
        let geometry = options.check(device)?;
        let draft = Header {
            geometry,
            store: new_identity(),
            device: device.id,
            generation: 1,
            checkpoint: 0,
            checkpoint_crc: 0,
            log: options.log_bytes,
            sequence: 1,
        };
        Store::start(
            folder,
            draft,
            Image::default(),
            options,
            Recovery::default(),
        )
    }

    fn start(
        folder: Box<dyn Folder>,
        draft: Header,
        image: Image,
        options: &Options,
        recovery: Recovery,
    ) -> Result<Store, Error> {
        let journal = Journal::begin(folder, draft, image, options.hot as usize)?;
        Ok(Store {
            words: Words::new(),
            len: AtomicU64::new(draft.geometry.len),
            extent: draft.geometry.extent,
            page: draft.geometry.page,
            identity: draft.store,
            recovery,
            queue: Mutex::new(Queue {
                records: Vec::new(),
                open: 0,
                opening: 0,
                gather: Gather::default(),
                broken: None,
                failed: None,
                counts: journal.counts,
                log_bytes: journal.len(),
                journal: Some(Box::new(journal)),
            }),
            turn: Condvar::new(),
        })
    }

    /// What [`open`](Store::open) found; nothing for a store that was made new.
    pub fn recovery(&self) -> Recovery {
        self.recovery
    }

    /// The length of the device in bytes.
    #[inline]
    pub fn device_len(&self) -> u64 {
        // Acquire: pairs with the Release in `grow`; a write to the new part comes after the batch
        // that has it.
        self.len.load(Ordering::Acquire)
    }

    /// The unit of the log: what is reported as a whole if it was open in a crash.
    #[inline]
    pub fn extent(&self) -> Granule {
        self.extent
    }

    /// The unit of the answer.
    pub fn page(&self) -> Granule {
        self.page
    }

    /// The identity of the store, which each of its epochs has.
    pub fn identity(&self) -> u128 {
        self.identity
    }

    pub(crate) fn epoch(&self, consumer: u32, number: u64) -> Epoch {
        Epoch::new(self.identity, consumer, number)
    }

    pub(crate) fn unpin(&self, extents: std::ops::Range<u64>) {
        extents.for_each(|extent| self.words.leave(extent, 0));
    }

    /// Puts the pinned extents that are neither open nor about to be into the next batch.
    #[cold]
    pub(crate) fn request(&self, first: u64, last: u64) -> Result<(), Error> {
        let mut queue = lock(&self.queue);
        queue.check()?;
        let extents = last - first + 1;
        if queue.open + queue.opening + extents as usize > MAX_OPEN {
            return Err(too_many_open(extents));
        }
        for extent in first..=last {
            if !self.words.request(extent) {
                continue;
            }
            queue.opening += 1;
            match queue.records.last_mut() {
                Some(Record::Open { first, count }) if *first + *count == extent => *count += 1,
                _ => queue.records.push(Record::Open {
                    first: extent,
                    count: 1,
                }),
            }
        }
        Ok(())
    }

    /// Waits until all of the pinned extents are open.
    #[cold]
    pub(crate) fn await_open(&self, extents: RangeInclusive<u64>) -> Result<(), Error> {
        let mut queue = lock(&self.queue);
        let mut arrived = false;
        loop {
            if extents.clone().all(|extent| self.words.is_open(extent)) {
                return Ok(());
            }
            queue.check()?;
            if !arrived {
                queue.gather.arrive();
                arrived = true;
            }
            if queue.journal.is_some() && !queue.gather.gathering {
                queue = self.gather(queue);
                if let Some(journal) = queue.journal.take() {
                    queue = self.lead(queue, journal, |_| Ok(None::<()>)).0;
                }
                continue;
            }
            // The thread that leads, or gathers, wakes all when its batch is durable.
            queue = wait(&self.turn, queue);
        }
    }

    /// Yields to the threads that are expected, for as long as more of them come. Another thread
    /// may have taken the journal meanwhile.
    fn gather<'s>(&'s self, mut queue: MutexGuard<'s, Queue>) -> MutexGuard<'s, Queue> {
        let mut patience = PATIENCE;
        queue.gather.gathering = true;
        while !queue.gather.is_complete() && patience > 0 {
            let before = queue.gather.waiting();
            drop(queue);
            relax();
            queue = lock(&self.queue);
            patience = match queue.gather.waiting() > before {
                true => PATIENCE,
                false => patience - 1,
            };
        }
        queue.gather.gathering = false;
        queue
    }

    /// Has the leader add the record that `plan` makes of the image, after all that wait already,
    /// and waits until it is durable.
    pub(crate) fn control<R>(
        &self,
        plan: impl FnOnce(&mut Control<'_>) -> Result<R, Error>,
    ) -> Result<R, Error> {
        let mut queue = lock(&self.queue);
        loop {
            queue.check()?;
            match queue.journal.take() {
                Some(journal) => {
                    let plan = |control: &mut Control<'_>| plan(control).map(Some);
                    let (_queue, result) = self.lead(queue, journal, plan);
                    return result.and_then(|made| made.ok_or_else(missing));
                }
                None => queue = wait(&self.turn, queue),
            }
        }
    }

    /// As if the last batch had served so many threads, for models of the next one.
    #[cfg(all(test, dirtymap_loom))]
    pub(crate) fn expect_companions(&self, count: usize) {
        let mut queue = lock(&self.queue);
        (0..count).for_each(|_| queue.gather.arrive());
        queue.gather.take();
        queue.gather.served();
    }

    /// Adds a record to the next batch, and does not wait for it.
    pub(crate) fn enqueue(&self, record: Record) {
        lock(&self.queue).records.push(record);
    }

    /// Leads: writes all that waits as one batch, with what `plan` adds, and flushes it. The lock
    /// is free meanwhile. Wakes all that wait.
    fn lead<'s, R>(
        &'s self,
        mut queue: MutexGuard<'s, Queue>,
        mut journal: Box<Journal>,
        plan: impl FnOnce(&mut Control<'_>) -> Result<Option<R>, Error>,
    ) -> (MutexGuard<'s, Queue>, Result<Option<R>, Error>) {
        let records = mem::take(&mut queue.records);
        queue.gather.take();
        drop(queue);
        let work = || self.batch(&mut journal, &records, plan);
        // A disk is code of the user, and may panic. Threads that wait must hear of it.
        let outcome = catch_unwind(AssertUnwindSafe(work));
        let mut queue = lock(&self.queue);
        let failed = match &outcome {
            Ok((Ok(()), _)) => None,
            Ok((Err(error), _)) => Some(error.to_string()),
            Err(_) => Some("a disk panicked".to_owned()),
        };
        if failed.is_none() {
            queue.gather.served();
            for record in &records {
                let Record::Open { first, count } = record else {
                    continue;
                };
                (*first..first + count).for_each(|extent| self.words.opened(extent));
                queue.opening -= *count as usize;
            }
            queue.open = journal.image.open.len();
            queue.counts = journal.counts;
            queue.log_bytes = journal.len();
            queue.journal = Some(journal);
        } else {
            queue.failed = failed;
            queue.broken = Some(journal);
        }
        self.turn.notify_all();
        match outcome {
            Ok((Ok(()), planned)) => (queue, planned),
            Ok((Err(error), _)) => (queue, Err(error)),
            Err(panic) => {
                drop(queue);
                resume_unwind(panic);
            }
        }
    }

    /// The outcome of the batch, and that of the plan.
    fn batch<R>(
        &self,
        journal: &mut Journal,
        records: &[Record],
        plan: impl FnOnce(&mut Control<'_>) -> Result<Option<R>, Error>,
    ) -> (Result<(), Error>, Result<Option<R>, Error>) {
        for record in records {
            // An increment that is dropped after its consumer has left is gone.
            let gone = match record {
                Record::Abort { id, epoch } => !has_lease(&journal.image, *id, *epoch),
                _ => false,
            };
            if !gone && let Err(bad) = journal.add(&self.words, record.clone()) {
                return (Err(impossible(bad)), Ok(None));
            }
        }
        let words = &self.words;
        let planned = plan(&mut Control { journal, words });
        (journal.finish(words), planned)
    }

    /// The device has `len` bytes now. The new part is dirty for each consumer.
    ///
    /// # Errors
    /// [`Error::Shrinks`], [`Error::DeviceLength`], and those of the log.
    pub fn grow(&self, len: u64) -> Result<(), Error> {
        self.control(|control| {
            let geometry = control.journal.header.geometry;
            if len < geometry.len {
                return Err(Error::Shrinks {
                    was: geometry.len,
                    asked: len,
                });
            }
            Geometry::new(len, geometry.extent, geometry.page)?;
            if len > geometry.len {
                control.add(Record::Grow { len })?;
            }
            Ok(())
        })?;
        // Release: pairs with the Acquire in `device_len`.
        // Two calls may get here in the other order, and the length never falls.
        self.len.fetch_max(len, Ordering::Release);
        Ok(())
    }

    /// Closes each extent that has no write in flight, durably: a crash after it reports what was
    /// written, to the page. A clean end is this, then dropping the store.
    ///
    /// # Errors
    /// Those of the log.
    pub fn close_extents(&self) -> Result<(), Error> {
        self.control(|control| control.journal.close_all(control.words).map_err(impossible))
    }

    /// What the store did, and how large it is.
    pub fn stats(&self) -> StoreStats {
        let queue = lock(&self.queue);
        let counts = queue.counts;
        StoreStats {
            batches: counts.batches,
            flushes: counts.flushes,
            switches: counts.switches,
            opened: counts.opened,
            closed: counts.closed,
            open: queue.open as u64,
            log_bytes: queue.log_bytes,
        }
    }

    /// The pages of `extent` that `range` touches.
    pub(crate) fn mask(&self, extent: u64, range: IovaRange) -> u32 {
        self.geometry().mask(extent, range)
    }

    /// The pages that `range` touches in its first extent: at least one.
    #[inline]
    pub(crate) fn first_pages(&self, range: IovaRange) -> u32 {
        self.geometry().first_pages(range)
    }

    #[inline]
    fn geometry(&self) -> Geometry {
        Geometry {
            len: 0,
            extent: self.extent,
            page: self.page,
        }
    }
}

/// What a leader hands to a caller that adds records.
pub(crate) struct Control<'j> {
    pub(crate) journal: &'j mut Journal,
    pub(crate) words: &'j Words,
}

impl Control<'_> {
    pub(crate) fn add(&mut self, record: Record) -> Result<(), Error> {
        self.journal.add(self.words, record).map_err(impossible)
    }
}

impl Queue {
    fn check(&self) -> Result<(), Error> {
        match &self.failed {
            None => Ok(()),
            Some(why) => Err(Error::Failed { why: why.clone() }),
        }
    }
}

pub(crate) fn has_lease(image: &Image, id: u32, epoch: u64) -> bool {
    image.consumers.values().any(|consumer| {
        let lease = consumer.lease.as_ref();
        consumer.id == id && lease.is_some_and(|lease| lease.epoch == epoch)
    })
}

fn reserve(folder: &mut dyn Folder) -> Result<(), Error> {
    let locked = folder.lock();
    match locked.map_err(Error::io("the folder cannot be locked"))? {
        true => Ok(()),
        false => Err(Error::Locked),
    }
}

pub(crate) fn too_many_open(extents: u64) -> Error {
    Error::TooManyOpen {
        extents,
        limit: MAX_OPEN as u64,
    }
}

/// A plan that made nothing; none does.
fn missing() -> Error {
    let why = "a batch ended without its plan".to_owned();
    Error::Failed { why }
}

impl Options {
    /// Checks the bounds, for a device.
    pub(crate) fn check(&self, device: &Device) -> Result<Geometry, Error> {
        let geometry = Geometry::new(device.len, self.extent, self.page)?;
        self.bounds()?;
        Ok(geometry)
    }

    /// Checks what does not depend on how the device is divided.
    fn bounds(&self) -> Result<(), Error> {
        let limit = Options::MAX_HOT;
        if self.hot == 0 || self.hot > limit {
            return Err(Error::Hot {
                hot: self.hot,
                limit,
            });
        }
        if !self.log_bytes.is_multiple_of(BLOCK as u64) || self.log_bytes > MAX_LOG {
            return Err(Error::LogBytes {
                bytes: self.log_bytes,
                block: BLOCK as u64,
                limit: MAX_LOG,
            });
        }
        Ok(())
    }
}
