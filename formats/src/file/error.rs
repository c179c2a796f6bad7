//! The error of bitmap files.

use std::io;

use dirtymap::Error;
use dirtymap::bitmap::BitmapError;

/// The error of a bitmap file that could not be written or read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BitmapFileError {
    /// The system refused.
    #[error("the bitmap file cannot be accessed: {0}")]
    Io(#[from] io::Error),
    /// The file ends early.
    #[error("the bitmap file has {len} bytes, but {needed} are needed")]
    Truncated {
        /// Bytes that the file has.
        len: u64,
        /// Bytes that it needs.
        needed: u64,
    },
    /// The file does not begin as a bitmap file does.
    #[error("this is not a bitmap file: it does not begin with \"dirtymap\"")]
    Foreign,
    /// The file is of another version of the format.
    #[error("the bitmap file has version {found} of its format, but only {known} is known")]
    Version {
        /// The version of the file.
        found: u32,
        /// The version that can be read.
        known: u32,
    },
    /// The file does not hold what was written.
    #[error("the bitmap file is damaged: {0}")]
    Damaged(&'static str),
    /// There are more bits than such a file may have.
    #[error("{bits} bits are too many for a bitmap file: at most {limit} are allowed")]
    TooLarge {
        /// The number of bits.
        bits: u64,
        /// The greatest allowed number.
        limit: u64,
    },
    /// The place appends: the header, which is written last, cannot be written to its beginning.
    /// The contents are unchanged.
    #[error("a write to byte 0 of the file goes to byte {at}: open it without append")]
    Appends {
        /// The byte at which a write to byte 0 lands.
        at: u64,
    },
    /// The bitmap in memory could not be read or recorded into.
    #[error("{0}")]
    Bitmap(#[from] Error),
}

impl From<BitmapError> for BitmapFileError {
    fn from(error: BitmapError) -> Self {
        BitmapFileError::Bitmap(error.into())
    }
}
