//! Why an image, or a bitmap in it, is not read or not written.

use std::io;

use dirtymap::{Error, Granule, IovaRange};

/// What is wrong with an image, with a bitmap in it, or with what was to be written. Each names the
/// place.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum QcowError {
    /// The system refused, or the file ends early.
    #[error("{place} at byte {at:#x} cannot be accessed: {source}")]
    Io {
        /// The part of the image.
        place: &'static str,
        /// Where it is in the file.
        at: u64,
        /// Of the system.
        source: io::Error,
    },
    /// The image does not keep to the format.
    #[error("{place} at byte {at:#x} is {found:#x}: {why}")]
    Damaged {
        /// The part of the image.
        place: &'static str,
        /// Where it is in the file.
        at: u64,
        /// What is there.
        found: u64,
        /// What is wrong with it.
        why: &'static str,
    },
    /// A bitmap's table has another size than the disk and the granule give, so it is that of
    /// another disk. All of the disk counts as dirty.
    #[error(
        "the size of a bitmap's table at byte {at:#x} is {found}, but the disk and the granule \
         give {expected}: the disk has another size, so all of it counts as dirty"
    )]
    TableSize {
        /// Where the size is in the file.
        at: u64,
        /// The entries that the table is said to have.
        found: u64,
        /// The entries that it has to have.
        expected: u64,
    },
    /// Two parts of the image share bytes of the file.
    #[error("{place} and {other} overlap at byte {at:#x} of the file")]
    Overlap {
        /// One part.
        place: &'static str,
        /// The other one.
        other: &'static str,
        /// Where they meet.
        at: u64,
    },
    /// The image is in a state, or of a kind, in which this is not done.
    #[error("{place} is {found:#x}: {why}")]
    Unsupported {
        /// The part of the image.
        place: &'static str,
        /// What is there.
        found: u64,
        /// Why that is in the way.
        why: &'static str,
    },
    /// A program that does not know bitmaps has written the image, so none of them is true. All of
    /// the disk counts as dirty.
    #[error(
        "a program that does not know bitmaps has written the image: all of the disk counts as \
         dirty, and `discard` takes the bitmaps away"
    )]
    Stale,
    /// The program that had the image open last did not finish with this bitmap, or still has it
    /// open. All of the disk counts as dirty.
    #[error(
        "the bitmap {name:?} is in use, or was when its program ended: all of the disk counts as \
         dirty, until the bitmap is written anew or removed"
    )]
    InUse {
        /// Of the bitmap.
        name: String,
    },
    /// There is no such bitmap.
    #[error("the image has no bitmap {name:?}")]
    NoBitmap {
        /// That was asked for.
        name: String,
    },
    /// A name or a size that a bitmap, or an image, cannot have.
    #[error("{place} is {found}, but {limit} is the limit")]
    Limit {
        /// What it is of.
        place: &'static str,
        /// What was given.
        found: u64,
        /// The least or the most that is possible.
        limit: u64,
    },
    /// A granule that a bitmap, or clusters that an image, cannot have.
    #[error("{place} are {found} each, but {least} to {most} are possible")]
    Granule {
        /// What they are of.
        place: &'static str,
        /// What was given.
        found: Granule,
        /// The smallest.
        least: Granule,
        /// The largest.
        most: Granule,
    },
    /// A run of dirty bytes begins past the end of the disk.
    #[error("the run {run} lies past the end of the disk, which has {size} bytes")]
    Outside {
        /// The run.
        run: IovaRange,
        /// Bytes of the disk.
        size: u64,
    },
    /// A bitmap in memory cannot take what was read.
    #[error("{0}")]
    Bitmap(#[from] Error),
}

impl QcowError {
    pub(super) fn io(place: &'static str, at: u64) -> impl FnOnce(io::Error) -> QcowError {
        move |source| QcowError::Io { place, at, source }
    }
}

/// `found`, unless it exceeds `limit`.
pub(super) fn at_most(place: &'static str, found: u64, limit: u64) -> Result<u64, QcowError> {
    if found > limit {
        return Err(QcowError::Limit {
            place,
            found,
            limit,
        });
    }
    Ok(found)
}
