//! The errors of the adapter. Each text says what to do.

use std::io;

use dirtymap::{Granule, IovaRange};

/// The number of tries of a call that signals interrupt.
pub(crate) const TRIES: u32 = 32;

/// The error of a call of an [`Ioas`](crate::Ioas) or a [`Hwpt`](crate::Hwpt), or of the kernel.
///
/// Errors of calls through an [`AddressSpace`](dirtymap::AddressSpace) arrive as
/// [`dirtymap::Error::Source`], whose box can be downcast to this type.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum IommufdError {
    /// This kernel has no iommufd.
    #[error(
        "there is no {path}: load the module iommufd, or use a kernel (6.7 or newer) with \
         CONFIG_IOMMUFD: {error}"
    )]
    NoIommufd {
        /// The file that is missing.
        path: &'static str,
        /// The error of the kernel.
        #[source]
        error: io::Error,
    },
    /// The file of iommufd may not be opened.
    #[error(
        "{path} may not be opened for reading and writing: give this process access to it: {error}"
    )]
    NoPermission {
        /// The file.
        path: &'static str,
        /// The error of the kernel.
        #[source]
        error: io::Error,
    },
    /// The kernel does not know a call.
    #[error("this kernel has no {call} (Linux 6.7 or newer has): {error}")]
    Unsupported {
        /// The call by its name in the documentation.
        call: &'static str,
        /// The error of the kernel.
        #[source]
        error: io::Error,
    },
    /// The IOMMU of a device does not track writes.
    #[error(
        "the IOMMU of device {device} cannot track writes: let the device log its own (VFIO's DMA \
         logging), or mark all that the device may write: {error}"
    )]
    CannotTrack {
        /// The device by its number in iommufd.
        device: u32,
        /// The error of the kernel.
        #[source]
        error: io::Error,
    },
    /// A device cannot use a page table that tracks, or not this one.
    #[error(
        "device {device} cannot use the page table {hwpt}: its IOMMU is another one, or does not \
         track writes. Allocate a page table for this device: {error}"
    )]
    DeviceRefused {
        /// The device by its number in iommufd.
        device: u32,
        /// The page table by its number in iommufd.
        hwpt: u32,
        /// The error of the kernel.
        #[source]
        error: io::Error,
    },
    /// Another page table of the IOAS tracks writes, and this one does not.
    #[error(
        "the page table {hwpt} does not track writes, and {other} of the same IOAS does: attach \
         it to the address space, then the device to it"
    )]
    NotTracking {
        /// The page table that a device was to use, by its number in iommufd.
        hwpt: u32,
        /// The page table that tracks.
        other: u32,
    },
    /// A device would reach memory that other domains map, and the domain of its page table not.
    #[error(
        "devices of the page table {hwpt} would reach {range}, which only other domains map: \
         attach it to the address space, then the device to it"
    )]
    NotMapped {
        /// The page table that a device was to use, by its number in iommufd.
        hwpt: u32,
        /// The first addresses of that kind.
        range: IovaRange,
    },
    /// The page of one bit is smaller than the page of the IOMMU.
    #[error(
        "a page of {page}: the smallest page of this IOMMU is {smallest}, ask for that or more"
    )]
    PageTooSmall {
        /// The page that was asked for.
        page: Granule,
        /// The smallest one.
        smallest: Granule,
    },
    /// The size of a piece is not one that a harvest can read by one call.
    #[error(
        "a piece of {piece} with pages of {page}: a piece has at least one page, and at most 2^24"
    )]
    BadPiece {
        /// The size of a piece that was asked for.
        piece: Granule,
        /// The page of one bit.
        page: Granule,
    },
    /// Other memory is mapped at these addresses in the kernel.
    #[error(
        "{range} is mapped in the IOAS already, by another holder of it or to other memory: give \
         each address space an IOAS of its own, and all its domains the same mappings"
    )]
    Occupied {
        /// The addresses to map.
        range: IovaRange,
    },
    /// The addresses are reserved, or the devices cannot reach them.
    #[error(
        "{range} cannot be mapped: reserve in the address space what Ioas::usable leaves out: \
         {error}"
    )]
    NotUsable {
        /// The addresses to map.
        range: IovaRange,
        /// The error of the kernel.
        #[source]
        error: io::Error,
    },
    /// The backing address is not that of memory which can be pinned.
    #[error(
        "the memory for {range} cannot be pinned from address {backing:#x} on: it has to be \
         mapped, and writable if devices write: {error}"
    )]
    NotMemory {
        /// The addresses to map.
        range: IovaRange,
        /// The address in this process.
        backing: u64,
        /// The error of the kernel.
        #[source]
        error: io::Error,
    },
    /// The kernel may not pin as much memory, or has none.
    #[error(
        "no memory to map or pin {range}: raise RLIMIT_MEMLOCK, or give this process \
         CAP_IPC_LOCK: {error}"
    )]
    NoMemory {
        /// The addresses that the memory is for.
        range: IovaRange,
        /// The error of the kernel.
        #[source]
        error: io::Error,
    },
    /// The memory of a bitmap cannot be made present. The kernel was not called, so nothing is
    /// lost.
    #[error("the memory for the bits of {range} cannot be made present; harvest again: {error}")]
    BitmapNotPresent {
        /// The addresses of the bits.
        range: IovaRange,
        /// The error of the kernel.
        #[source]
        error: io::Error,
    },
    /// The device or its page table has gone. All that it was asked for counts as dirty.
    #[error(
        "the device of the page table {hwpt} has gone; all of {range} counts as dirty. Detach this \
         domain from the address space, and harvest what it leaves: {error}"
    )]
    Gone {
        /// The page table by its number in iommufd.
        hwpt: u32,
        /// The addresses that were asked for.
        range: IovaRange,
        /// The error of the kernel.
        #[source]
        error: io::Error,
    },
    /// The kernel did not say what was written. All that it was asked for counts as dirty.
    #[error(
        "the page table {hwpt} does not tell what was written; all of {range} counts as dirty: \
         {error}"
    )]
    Unknown {
        /// The page table by its number in iommufd.
        hwpt: u32,
        /// The addresses that were asked for.
        range: IovaRange,
        /// The error of the kernel.
        #[source]
        error: io::Error,
    },
    /// The kernel refused to end a translation, so devices still reach the memory. It may be that
    /// of a map which failed: then maps and flushes fail until one of them has ended it.
    #[error(
        "{range} is still mapped in the kernel, which refused to unmap it; it counts as dirty. \
         Unmap it, or map or flush, again when no other driver has it pinned"
    )]
    StillMapped {
        /// The first addresses of that kind.
        range: IovaRange,
    },
    /// Devices of a domain still reach memory that it unmapped, by the mapping of another domain.
    #[error(
        "the devices {devices:?} of the page table {hwpt} still reach {range}, which another \
         domain of the same IOAS keeps mapped: move or detach these devices first, and forget \
         (Iommufd::forget_device) those whose file was closed"
    )]
    DevicesAttached {
        /// The page table by its number in iommufd.
        hwpt: u32,
        /// The devices by their numbers in iommufd, ascending.
        devices: Vec<u32>,
        /// The first addresses of that kind.
        range: IovaRange,
    },
    /// Signals kept interrupting a call.
    #[error("signals interrupted {call} {times} times in a row: try again with less of them")]
    Interrupted {
        /// The call by its name in the documentation.
        call: &'static str,
        /// How often it was tried.
        times: u32,
    },
    /// The kernel refused a call for another reason.
    #[error("{call} failed: {error}")]
    Call {
        /// The call by its name in the documentation.
        call: &'static str,
        /// The error of the kernel.
        #[source]
        error: io::Error,
    },
}

impl IommufdError {
    /// A failure of `call` without a variant of its own. If signals interrupted the call, it was
    /// tried [`TRIES`] times.
    pub(crate) fn call(call: &'static str, error: io::Error) -> Self {
        match error.raw_os_error() {
            Some(libc::ENOTTY) => IommufdError::Unsupported { call, error },
            Some(libc::EINTR) => IommufdError::Interrupted { call, times: TRIES },
            _ => IommufdError::Call { call, error },
        }
    }
}

impl From<IommufdError> for dirtymap::Error {
    fn from(error: IommufdError) -> Self {
        dirtymap::Error::source_failed(error)
    }
}
