//! The errors of a device's log. Each text says what to do.

use std::io;

use dirtymap::{Granule, IovaRange};

/// The error of a call of a [`DeviceLog`](crate::DeviceLog), or of its device.
///
/// Errors of calls through an [`AddressSpace`](dirtymap::AddressSpace) arrive as
/// [`dirtymap::Error::Source`], whose box can be downcast to this type.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DeviceLogError {
    /// No range to log.
    #[error("a log needs at least one range: those that the device may write to")]
    NoRange,
    /// The page of a log is smaller than the kernel's smallest one.
    #[error("a log with pages of {page}: use at least 4096 bytes")]
    PageTooSmall {
        /// The page that was asked for.
        page: Granule,
    },
    /// An area is mapped that the log does not cover, or not as a whole.
    #[error(
        "{range} is not logged: the ranges of a device's log are fixed when it starts, so make the \
         log with all addresses that the device may ever reach"
    )]
    NotLogged {
        /// The area.
        range: IovaRange,
    },
    /// There is no memory for the bits of an area, or for those of a report.
    #[error("no memory for the bits of {range}: free some, and try again: {error}")]
    NoMemory {
        /// The addresses of the bits.
        range: IovaRange,
        /// The error of the system.
        #[source]
        error: io::Error,
    },
    /// The device or its driver has no log.
    #[error(
        "the device does not log its writes: use the IOMMU's tracking (iommufd), or mark all that \
         the device may write: {error}"
    )]
    CannotLog {
        /// The error of the device.
        #[source]
        error: io::Error,
    },
    /// The device cannot log so many ranges.
    #[error(
        "the device cannot log {ranges} ranges: lower `DeviceLog::max_ranges`, which joins those \
         with the smallest gaps: {error}"
    )]
    TooManyRanges {
        /// The number of ranges, after those with the smallest gaps were joined.
        ranges: usize,
        /// The error of the device.
        #[source]
        error: io::Error,
    },
    /// The device refused to start its log.
    #[error(
        "the device did not start its log, in pages of {page} over {ranges} ranges: it may be \
         logging already, for another program, or cannot log such pages or as much: {error}"
    )]
    NotStarted {
        /// The page that was asked for.
        page: Granule,
        /// The number of ranges.
        ranges: usize,
        /// The error of the device.
        #[source]
        error: io::Error,
    },
    /// The page of the device is no power of two, too large, or grows with each start.
    #[error("asked for {page}, the device logs in pages of {bytes} bytes: use another page")]
    BadPage {
        /// The page that was asked for.
        page: Granule,
        /// The page of the device.
        bytes: u64,
    },
    /// The device refused to stop its log, which goes on.
    #[error("the device did not stop its log: try again: {error}")]
    NotStopped {
        /// The error of the device.
        #[source]
        error: io::Error,
    },
    /// The device has gone. All that it may have written counts as dirty.
    #[error(
        "the device has gone; all of its memory counts as dirty. Detach this domain from the \
         address space, and harvest what it leaves: {error}"
    )]
    Gone {
        /// The error of the device.
        #[source]
        error: io::Error,
    },
    /// The device did not report, and its log is corrupt from then on. All of its memory counts as
    /// dirty. The next harvest starts a new log.
    #[error(
        "the device did not report what it wrote in {range}; all of its memory counts as dirty. \
         Harvest again, which restarts the log: {error}"
    )]
    Lost {
        /// The addresses that were asked for.
        range: IovaRange,
        /// The error of the device.
        #[source]
        error: io::Error,
    },
}

impl DeviceLogError {
    /// Why a start failed.
    pub(super) fn start(page: Granule, ranges: usize, error: io::Error) -> Self {
        match error.raw_os_error() {
            Some(libc::ENOTTY | libc::EOPNOTSUPP) => DeviceLogError::CannotLog { error },
            Some(libc::E2BIG) => DeviceLogError::TooManyRanges { ranges, error },
            Some(libc::ENODEV | libc::ENXIO) => DeviceLogError::Gone { error },
            _ => DeviceLogError::NotStarted {
                page,
                ranges,
                error,
            },
        }
    }

    /// Why a report failed.
    pub(super) fn report(range: IovaRange, error: io::Error) -> Self {
        match error.raw_os_error() {
            Some(libc::ENODEV | libc::ENXIO) => DeviceLogError::Gone { error },
            _ => DeviceLogError::Lost { range, error },
        }
    }
}

impl From<DeviceLogError> for dirtymap::Error {
    fn from(error: DeviceLogError) -> Self {
        dirtymap::Error::source_failed(error)
    }
}
