//! What a harvest or a sync answers when it gives no whole lease.

use super::lease::{Lease, Owed};
use crate::error::Error;
use crate::units::Iova;

/// Why a harvest gave no whole lease.
#[derive(Debug, thiserror::Error)]
pub enum HarvestError<'a> {
    /// The request was refused before anything was touched.
    #[error("{0}")]
    Refused(Error),
    /// The harvest stopped inside the range.
    #[error("{0}")]
    Stopped(Box<StoppedHarvest<'a>>),
}

/// A harvest that stopped inside its range: below [`at`](Self::at) the lease has all that was
/// dirty, from there on nothing was taken from anybody.
///
/// What a source gave before another one stopped below it is put back before the harvest returns,
/// as an abort would; its bits may stay set in the user's bitmap, and belong to no lease. Only then
/// does a harvest take the short lock of the flush queue, and allocate: see [`Lease::abort`].
#[derive(Debug, thiserror::Error)]
#[error("the harvest stopped at {at}: {error}")]
pub struct StoppedHarvest<'a> {
    /// Why it stopped.
    pub error: Error,
    /// The first address that was not processed: that of a hole, or the beginning of a granule of
    /// the request and of a page of every source.
    pub at: Iova,
    /// The lease for what was processed.
    pub lease: Lease<'a, Owed>,
}

/// A sync that failed. What the lease owes stays owed.
#[derive(Debug, thiserror::Error)]
#[error("the flush failed, so nothing of the lease may be copied: {error}")]
pub struct SyncError<'a> {
    /// Why the flush failed.
    pub error: Error,
    /// The lease, to be synced again or aborted.
    pub lease: Box<Lease<'a, Owed>>,
}

/// Keeps the reason and puts the lease back.
impl From<HarvestError<'_>> for Error {
    fn from(error: HarvestError<'_>) -> Self {
        match error {
            HarvestError::Refused(error) => error,
            HarvestError::Stopped(stopped) => stopped.error,
        }
    }
}

/// Keeps the reason and puts the lease back.
impl From<SyncError<'_>> for Error {
    fn from(error: SyncError<'_>) -> Self {
        error.error
    }
}
