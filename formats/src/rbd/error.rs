//! Why an increment is not read, written or merged.

use std::io;

use dirtymap::IovaRange;

/// What is wrong with a stream, or with what was to be written to one. Each names the place.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RbdError {
    /// The system refused, or the stream ends early.
    #[error("{place} at byte {at} of the stream cannot be transferred: {source}")]
    Io {
        /// What was read or written.
        place: &'static str,
        /// Where it begins in the stream.
        at: u64,
        /// Of the system.
        source: io::Error,
    },
    /// The stream does not keep to the format.
    #[error("{place} at byte {at} of the stream is {found:#x}: {why}")]
    Damaged {
        /// The part of a record.
        place: &'static str,
        /// Where it begins in the stream.
        at: u64,
        /// What is there.
        found: u64,
        /// What is wrong with it.
        why: &'static str,
    },
    /// The bytes of the disk could not be read.
    #[error("the disk cannot be read at byte {at}: {source}")]
    Data {
        /// The offset in the disk.
        at: u64,
        /// Of the system.
        source: io::Error,
    },
    /// A record was to be written that the format does not allow there.
    #[error("the bytes {offset:#x}+{len:#x} cannot be written: {why}")]
    Record {
        /// The offset in the disk.
        offset: u64,
        /// How many bytes.
        len: u64,
        /// What is wrong with them.
        why: &'static str,
    },
    /// A run of dirty bytes begins past the end of the disk.
    #[error("the run {run} lies past the end of the disk, which has {size} bytes")]
    Outside {
        /// The run.
        run: IovaRange,
        /// Bytes of the disk.
        size: u64,
    },
    /// The disk does not have the size that the increment names.
    #[error(
        "the increment is of a disk of {size} bytes, but this one has {found}: grow or cut it first"
    )]
    Size {
        /// Bytes of the disk by the increment.
        size: u64,
        /// Bytes of the disk that was passed.
        found: u64,
    },
    /// The name of a snapshot is too long.
    #[error("the name of a snapshot has {len} bytes, but 4096 is the limit")]
    Name {
        /// Its length.
        len: u64,
    },
    /// Two increments do not follow each other.
    #[error("the first increment leads to {to:?}, but the second one starts from {from:?}")]
    Apart {
        /// Where the first one ends.
        to: Option<String>,
        /// Where the second one begins.
        from: Option<String>,
    },
}

impl RbdError {
    pub(super) fn io(place: &'static str, at: u64) -> impl FnOnce(io::Error) -> RbdError {
        move |source| RbdError::Io { place, at, source }
    }
}
