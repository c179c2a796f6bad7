//! The errors of a log for a client.

use dirtymap::{Error, Granule, Iova, IovaRange, RangeError};

/// The error of a call of a [`DmaLogger`](crate::DmaLogger). Nothing was changed then, with one
/// exception: bits may be set in the bitmap of a report that failed, and all of them stay dirty.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LogError {
    /// A page of the log is no power of two, or smaller than 4096 bytes.
    #[error("a page of {page_size} bytes: ask for a power of two that is at least 4096")]
    BadPageSize {
        /// The page that the client asked for.
        page_size: u64,
    },
    /// A start without a range, or with more than there may be.
    #[error("{count} ranges to log: name 1 to {most}. Join those with the smallest gaps")]
    RangeCount {
        /// How many there are.
        count: usize,
        /// The most that there may be.
        most: usize,
    },
    /// A range has no byte, or extends past the last address.
    #[error(transparent)]
    Range(#[from] RangeError),
    /// A range does not begin and end at a page of the log.
    #[error("{range} does not begin and end at multiples of the page that is asked for, {page}")]
    Unaligned {
        /// The range.
        range: IovaRange,
        /// The page that the client asked for.
        page: Granule,
    },
    /// Two ranges of a start have an address in common.
    #[error("{range} overlaps {other}: log each address once")]
    Overlap {
        /// The second of the two.
        range: IovaRange,
        /// The first of the two.
        other: IovaRange,
    },
    /// The bitmap of a report is shorter than its range.
    #[error(
        "a bitmap of {bytes} bytes for {range}, which has {needed} pages of {page}: make room for \
         a bit for each page"
    )]
    ShortBitmap {
        /// The range of the report.
        range: IovaRange,
        /// The bytes that one bit stands for.
        page: Granule,
        /// The bytes of the bitmap.
        bytes: usize,
        /// The bits that it needs.
        needed: u128,
    },
    /// A second start. The log of the first one goes on.
    #[error("the log has been started: stop it first")]
    Started,
    /// A report or a stop of a log that is not started.
    #[error("the log is not started: start it first")]
    NotStarted,
    /// A report asks for addresses that are not logged. An answer of "clean" could be wrong.
    #[error("{at} is not logged: start the log with all ranges that will be asked for")]
    NotLogged {
        /// The first such address.
        at: Iova,
    },
    /// A message of the client does not follow the protocol.
    #[error("the message about the log is malformed: {why}")]
    BadMessage {
        /// The fault of the message.
        why: &'static str,
    },
    /// The reply to a report would be larger than a message.
    #[error("a report of {needed} bytes: at most {most} fit in a message. Ask for smaller ranges")]
    TooLarge {
        /// The bytes of the reply.
        needed: u128,
        /// The most bytes of one.
        most: usize,
    },
    /// The address space refused, or one of its sources failed.
    #[error(transparent)]
    Space(#[from] Error),
}

impl LogError {
    /// The number that Linux returns for the same refusal, for the reply to the client.
    pub const fn errno(&self) -> i32 {
        match self {
            LogError::Range(error) => error.errno(),
            LogError::RangeCount { count: 1.., .. } | LogError::TooLarge { .. } => 7, // E2BIG
            LogError::Space(_) => 5,                                                  // EIO
            _ => 22,                                                                  // EINVAL
        }
    }
}
