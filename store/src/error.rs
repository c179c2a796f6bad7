//! The error type, and why an answer is "everything".

use std::io;

use dirtymap::IovaRange;

use crate::epoch::Epoch;

/// Why a call was refused or could not complete. Each text names the value and the limit.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The system refused.
    #[error("{what}: {source}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// The reason of the system.
        source: io::Error,
    },
    /// The log could not be written or flushed before, so what is durable is unknown. Open the
    /// store again: everything that was acknowledged is reported.
    #[error("the store failed before ({why}): open it again, it then reports what was written")]
    Failed {
        /// The first failure.
        why: String,
    },
    /// Another process, or another part of this one, has the store open.
    #[error("the store is open elsewhere: close it there first")]
    Locked,
    /// There is a store already.
    #[error("the folder has a store already: open it, or start over from what `open` answers")]
    Exists,
    /// A range that is none.
    #[error(transparent)]
    Range(#[from] dirtymap::RangeError),
    /// A range that goes past the end of the device.
    #[error("the range {range} goes past the end of the device, which has {len:#x} bytes")]
    PastEnd {
        /// The range.
        range: IovaRange,
        /// The length of the device in bytes.
        len: u64,
    },
    /// A device without bytes, or with more extents than a store can have.
    #[error("a device of {len:#x} bytes has {extents} extents: 1 to {limit} are possible")]
    DeviceLength {
        /// The length in bytes.
        len: u64,
        /// How many extents that makes.
        extents: u64,
        /// The most that are possible.
        limit: u64,
    },
    /// The extent is smaller than the page, or has too many pages.
    #[error("extents of {extent:#x} bytes and pages of {page:#x}: 1 to {limit} pages an extent")]
    Granules {
        /// Bytes of an extent.
        extent: u64,
        /// Bytes of a page.
        page: u64,
        /// The most pages that an extent may have.
        limit: u64,
    },
    /// No extent may be open, or more than the format allows.
    #[error("{hot} open extents: 1 to {limit} are possible")]
    Hot {
        /// How many were asked for.
        hot: u32,
        /// The most that are possible.
        limit: u32,
    },
    /// The room for batches is out of bounds.
    #[error("a log of {bytes:#x} bytes: it is a multiple of {block:#x}, and at most {limit:#x}")]
    LogBytes {
        /// What was asked for.
        bytes: u64,
        /// The unit.
        block: u64,
        /// The most that is possible.
        limit: u64,
    },
    /// Too many writes in flight in one extent.
    #[error("extent {extent} has {limit} writes in flight, which is the limit: end some of them")]
    TooManyWrites {
        /// The number of the extent.
        extent: u64,
        /// The limit.
        limit: u64,
    },
    /// Too many extents would be open, because so many have writes in flight.
    #[error("the write needs {extents} extents open, and at most {limit} are: end other writes")]
    TooManyOpen {
        /// How many the write touches.
        extents: u64,
        /// The most that are open at a time.
        limit: u64,
    },
    /// A device can only grow while its store is open.
    #[error("the device has {was:#x} bytes, and {asked:#x} are fewer: start over to shrink it")]
    Shrinks {
        /// The length now.
        was: u64,
        /// The length that was asked for.
        asked: u64,
    },
    /// No consumer has this name.
    #[error("no consumer is called {name:?}: let it join first")]
    UnknownConsumer {
        /// The name.
        name: String,
    },
    /// The name is taken.
    #[error("a consumer is called {name:?} already: choose another name, or let it leave")]
    NameTaken {
        /// The name.
        name: String,
    },
    /// A name that is empty or too long.
    #[error("a name of {len} bytes: 1 to {limit} are possible")]
    NameLength {
        /// Its length in bytes.
        len: usize,
        /// The limit.
        limit: usize,
    },
    /// Too many consumers.
    #[error("there are {limit} consumers, which is the limit: let one leave first")]
    TooManyConsumers {
        /// The limit.
        limit: usize,
    },
    /// The consumer has an increment that it neither committed nor aborted.
    #[error("{name:?} has increment {number} already: commit or abort that one first")]
    Outstanding {
        /// The consumer.
        name: String,
        /// The number of the increment.
        number: u64,
    },
    /// The increment ended while its consumer was using it, because the consumer left.
    #[error("increment {number} of {name:?} is no longer there: the consumer left meanwhile")]
    Gone {
        /// The consumer.
        name: String,
        /// The number of the increment.
        number: u64,
    },
    /// The consumer's copy, or the device, could not be made durable. Nothing was committed.
    #[error("what was copied is not durable, so nothing is committed: {source}")]
    NotDurable {
        /// What the consumer said.
        source: io::Error,
    },
}

impl Error {
    pub(crate) fn io(what: &'static str) -> impl FnOnce(io::Error) -> Error {
        move |source| Error::Io { what, source }
    }
}

/// For code that returns [`io::Result`]. `io::Error::downcast` gives the [`Error`] back.
impl From<Error> for io::Error {
    fn from(error: Error) -> Self {
        io::Error::other(error)
    }
}

/// Why everything has to be copied: the store does not know what was written since a copy.
///
/// Each reason means the whole device, never a shorter list.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Why {
    /// There is no store. It was never made, or it is lost.
    #[error("there is no store")]
    Missing,
    /// The file does not begin as a store does.
    #[error("the file is no store: it does not begin with \"dmstore\"")]
    Foreign,
    /// The store has a version of the format that this library does not know.
    #[error("the store has version {found} of its format, and {known} is known")]
    Version {
        /// The version of the file.
        found: u32,
        /// The version that this library reads and writes.
        known: u32,
    },
    /// The file ends before its header says so.
    #[error("the store has {len} bytes, and its header says {needed}")]
    Truncated {
        /// Bytes that there are.
        len: u64,
        /// Bytes that there should be.
        needed: u64,
    },
    /// A checksum does not match.
    #[error("the checksum of the {part} does not match")]
    Checksum {
        /// The part of the file.
        part: &'static str,
    },
    /// A part has a right checksum and contents that are not possible.
    #[error("the {part} is damaged: {what}")]
    Damaged {
        /// The part of the file.
        part: &'static str,
        /// What is wrong.
        what: &'static str,
    },
    /// A batch that was flushed is damaged: a later one is whole.
    #[error("batch {lost} of the log is damaged, and batch {later} after it is whole")]
    LostBatch {
        /// The first batch that cannot be read.
        lost: u64,
        /// A later one that can.
        later: u64,
    },
    /// The store belongs to another device.
    #[error("the store belongs to the device {recorded:032x}, and this is {asked:032x}")]
    WrongDevice {
        /// The device of the store.
        recorded: u128,
        /// The device that was asked for.
        asked: u128,
    },
    /// The device changed its size while the store was closed.
    #[error("the device had {recorded:#x} bytes when it was closed, and has {found:#x} now")]
    Resized {
        /// Its length in the store.
        recorded: u64,
        /// Its length now.
        found: u64,
    },
    /// The consumer has joined and committed nothing yet.
    #[error("the consumer is new")]
    New,
    /// The consumer says that it has nothing to build on.
    #[error("the consumer has no parent to build on")]
    NoParent,
    /// The consumer builds on an epoch that this store does not know.
    #[error("the parent {asked} is not known here")]
    UnknownParent {
        /// What the consumer builds on.
        asked: Epoch,
    },
}
