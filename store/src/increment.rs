//! Consumers, and the increments that they copy.

use std::io;

use dirtymap::exchange::RunTable;

use crate::epoch::Epoch;
use crate::error::{Error, Why};
use crate::image::{Image, MAX_CONSUMERS};
use crate::record::{MAX_NAME, Record};
use crate::step::{Step, performs};
use crate::store::Store;

/// A consumer: a program that copies what was written.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ConsumerInfo {
    /// Its name.
    pub name: String,
    /// Its last durable commit.
    pub committed: Option<Epoch>,
    /// The increment that it has, and has neither committed nor aborted. `None` after an
    /// [`open`](Store::open): a crash aborts it.
    pub outstanding: Option<Epoch>,
}

/// What a consumer has to copy. Dropping it without a commit makes it dirty again. One that is
/// forgotten ([`std::mem::forget`]) keeps its consumer from the next harvest until the store is
/// opened again.
#[must_use = "an increment that is dropped is dirty again"]
#[derive(Debug)]
pub struct Increment<'s> {
    store: &'s Store,
    name: String,
    id: u32,
    number: u64,
    parent: Option<Epoch>,
    why: Option<Why>,
    runs: RunTable,
    over: bool,
}

impl Store {
    /// A consumer joins, durably. Its first increment is everything.
    ///
    /// # Errors
    /// [`Error::NameLength`], [`Error::NameTaken`], [`Error::TooManyConsumers`], and those of the
    /// log.
    pub fn join(&self, name: &str) -> Result<(), Error> {
        check_name(name)?;
        self.control(|control| {
            let image = &control.journal.image;
            if image.consumers.contains_key(name) {
                return Err(name_taken(name));
            }
            if image.consumers.len() >= MAX_CONSUMERS {
                return Err(Error::TooManyConsumers {
                    limit: MAX_CONSUMERS,
                });
            }
            control.add(Record::Join {
                id: control.journal.image.next_id(),
                name: name.to_owned(),
            })
        })
    }

    /// A consumer leaves, durably. What is dirty for it is forgotten.
    ///
    /// # Errors
    /// [`Error::UnknownConsumer`], and those of the log.
    pub fn leave(&self, name: &str) -> Result<(), Error> {
        self.control(|control| {
            let id = id_of(&control.journal.image, name)?;
            control.add(Record::Leave { id })
        })
    }

    /// A consumer gets another name, durably. All else of it stays.
    ///
    /// # Errors
    /// [`Error::NameLength`], [`Error::UnknownConsumer`], [`Error::NameTaken`], and those of the
    /// log.
    pub fn rename(&self, old: &str, new: &str) -> Result<(), Error> {
        check_name(new)?;
        self.control(|control| {
            let image = &control.journal.image;
            let id = id_of(image, old)?;
            if image.consumers.contains_key(new) {
                return Err(name_taken(new));
            }
            control.add(Record::Rename {
                id,
                name: new.to_owned(),
            })
        })
    }

    /// All consumers, by name.
    ///
    /// # Errors
    /// Those of the log.
    pub fn consumers(&self) -> Result<Vec<ConsumerInfo>, Error> {
        self.control(|control| {
            let all = control.journal.image.consumers.iter();
            let info = all.map(|(name, consumer)| ConsumerInfo {
                name: name.clone(),
                committed: (consumer.committed > 0)
                    .then(|| self.epoch(consumer.id, consumer.committed)),
                outstanding: consumer
                    .lease
                    .as_ref()
                    .map(|lease| self.epoch(consumer.id, lease.epoch)),
            });
            Ok(info.collect())
        })
    }

    /// The next increment of a consumer: what was written since `parent`, the epoch of the copy
    /// that it has. It is durable in the log that the consumer has it.
    ///
    /// `parent` is the last commit of the consumer, or an increment since then that it made durable
    /// and did not commit: a crash cut the commit off, or it was aborted or dropped. Any other
    /// parent, and none, means everything.
    ///
    /// Each write that ended before the call is in the increment. A write in flight is in a later
    /// one; one by a handle may be in both.
    ///
    /// # Errors
    /// [`Error::UnknownConsumer`], [`Error::Outstanding`], and those of the log.
    pub fn harvest(&self, name: &str, parent: Option<Epoch>) -> Result<Increment<'_>, Error> {
        self.control(|control| {
            let id = id_of(&control.journal.image, name)?;
            let Some(consumer) = control.journal.image.consumers.get(name) else {
                return Err(unknown(name));
            };
            if let Some(lease) = &consumer.lease {
                return Err(Error::Outstanding {
                    name: name.to_owned(),
                    number: lease.epoch,
                });
            }
            let number = consumer.next;
            let known = |parent: Epoch| {
                let number = parent.number();
                let there = (consumer.committed..consumer.next).contains(&number) && number > 0;
                // The same number of another consumer, or of one that had the name before, means
                // other pages.
                there && parent == self.epoch(id, number)
            };
            let why = match parent {
                _ if consumer.new => Some(Why::New),
                None => Some(Why::NoParent),
                Some(parent) if known(parent) => None,
                Some(asked) => Some(Why::UnknownParent { asked }),
            };
            control.add(Record::Harvest {
                id,
                epoch: number,
                whole: why.is_some(),
            })?;
            let journal = &control.journal;
            let geometry = journal.header.geometry;
            let lease = journal.image.consumers.get(name);
            let lease = lease.and_then(|consumer| consumer.lease.as_ref());
            let runs = match (&why, lease) {
                (None, Some(lease)) => geometry.runs(&lease.delta),
                _ => geometry.whole(),
            };
            Ok((number, id, why, runs))
        })
        .map(|(number, id, why, runs)| Increment {
            store: self,
            name: name.to_owned(),
            id,
            number,
            parent: parent.filter(|_| why.is_none()),
            why,
            runs,
            over: false,
        })
    }
}

impl<'s> Increment<'s> {
    /// The name that its consumer had when it was made.
    pub fn consumer(&self) -> &str {
        &self.name
    }

    /// Its epoch: the parent of the next one.
    pub fn epoch(&self) -> Epoch {
        self.store.epoch(self.id, self.number)
    }

    /// What it builds on; `None` if it is everything.
    pub fn parent(&self) -> Option<Epoch> {
        self.parent
    }

    /// Why it is everything, if it is.
    pub fn everything(&self) -> Option<&Why> {
        self.why.as_ref()
    }

    /// What has to be copied: whole pages, inside the device.
    pub fn runs(&self) -> &RunTable {
        &self.runs
    }

    /// Commits the increment, durably, once `durable` has returned. That makes durable
    ///
    /// 1. the consumer's copy, with the epoch of the increment; and
    /// 2. the device: the copy may hold bytes that the device only caches. If a power failure took
    ///    them from the device, it would differ from the copy, and nothing would say so.
    ///
    /// Nothing is dropped before that. What was written since the harvest is in the next increment.
    ///
    /// # Errors
    /// [`Error::NotDurable`] with what `durable` returned: the increment is dirty again.
    /// [`Error::Gone`] if the consumer left meanwhile. Those of the log: whether the commit is
    /// durable is unknown then, and either is correct.
    pub fn commit(mut self, durable: impl FnOnce() -> io::Result<()>) -> Result<Epoch, Error> {
        let durable = || durable().map_err(|source| Error::NotDurable { source });
        if performs(Step::CopyBeforeCommit) {
            durable()?;
            self.finish(true)?;
        } else {
            self.finish(true)?;
            durable()?;
        }
        Ok(self.epoch())
    }

    /// Makes the increment dirty again, durably.
    ///
    /// # Errors
    /// As [`commit`](Increment::commit), without the first one.
    pub fn abort(mut self) -> Result<(), Error> {
        self.finish(false)
    }

    fn finish(&mut self, commit: bool) -> Result<(), Error> {
        self.over = true;
        let Increment { id, number, .. } = *self;
        self.store.control(|control| {
            if !crate::store::has_lease(&control.journal.image, id, number) {
                return Err(Error::Gone {
                    name: self.name.clone(),
                    number,
                });
            }
            control.add(if commit {
                Record::Commit { id, epoch: number }
            } else {
                Record::Abort { id, epoch: number }
            })
        })
    }
}

impl Drop for Increment<'_> {
    fn drop(&mut self) {
        if !self.over {
            self.store.enqueue(Record::Abort {
                id: self.id,
                epoch: self.number,
            });
        }
    }
}

fn check_name(name: &str) -> Result<(), Error> {
    if (1..=MAX_NAME).contains(&name.len()) {
        return Ok(());
    }
    Err(Error::NameLength {
        len: name.len(),
        limit: MAX_NAME,
    })
}

fn id_of(image: &Image, name: &str) -> Result<u32, Error> {
    let consumer = image.consumers.get(name);
    consumer
        .map(|consumer| consumer.id)
        .ok_or_else(|| unknown(name))
}

fn unknown(name: &str) -> Error {
    Error::UnknownConsumer {
        name: name.to_owned(),
    }
}

fn name_taken(name: &str) -> Error {
    Error::NameTaken {
        name: name.to_owned(),
    }
}
