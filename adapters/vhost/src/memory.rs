//! The shared memory of a log, and how its bits are laid out.

use std::ffi::c_int;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use memmap2::{MmapOptions, MmapRaw};

use crate::log_list::LogWords;
use dirtymap::sync::AtomicU64;
use dirtymap::{Granule, Iova, IovaRange};
use dirtymap_host::Maker;

/// What one bit of a log stands for, whatever the page of the guest, of the host and of the space:
/// `VHOST_LOG_PAGE`.
pub const LOG_PAGE: Granule = Granule::K4;

/// Why a log cannot be made or used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LogError {
    /// The system gives no shared memory of this size.
    #[error("no shared memory of {bytes} bytes for a log can be had: {error}")]
    Memory {
        /// The size asked for, in bytes.
        bytes: u64,
        /// What the system says.
        #[source]
        error: io::Error,
    },
    /// Memory beyond the end of the log, or of one that back ends may still have.
    #[error(
        "a log in use ends at {end}, below the memory {range}: swap in one that reaches {}, and \
         map the memory when all back ends have answered",
        range.last()
    )]
    TooShort {
        /// The last address that has a bit.
        end: Iova,
        /// The memory.
        range: IovaRange,
    },
    /// A region of no bytes, or one that ends past the last address.
    #[error("a region of {len:#x} bytes at {start:#x} has no last page")]
    EmptyRegion {
        /// Where it begins.
        start: u64,
        /// Its length in bytes.
        len: u64,
    },
    /// `vhost-user-backend` does not tell the length of a log in the way that this version expects.
    #[error(
        "the vhost-user-backend of this build does not tell how long a log is: use version \
         0.23.0 or 0.24.0"
    )]
    UnknownLength,
    /// The front end's file can be made shorter, and a mark would end this process then.
    #[error(
        "the file of the log has no F_SEAL_SHRINK, or /proc does not tell: seal it, or call \
         `accept_unsealed_logs` if the front end is trusted"
    )]
    Unsealed,
    /// There is no memory for a part of the log: the front end's file is shorter than it said.
    #[error(
        "the log has no memory at its byte {at:#x}: its file is shorter than the front end says"
    )]
    NoMemory {
        /// The first byte without memory, of those that the region needs.
        at: u64,
    },
    /// The log belongs to the process that this one was forked from.
    #[error(
        "the log is that of process {owner}, and this is its child {process}: it needs its own"
    )]
    Forked {
        /// The process that made the log, or got it.
        owner: u32,
        /// This process.
        process: u32,
    },
    /// The system gives no page that tells this process from a child of `fork`.
    #[error(
        "no page that a child of `fork` gets wiped (madvise(MADV_WIPEONFORK), Linux 4.14) can be \
         had: {error}"
    )]
    NoMaker {
        /// What the system says.
        #[source]
        error: io::Error,
    },
}

/// This process, as the one that a log belongs to.
pub(super) fn maker() -> Result<Maker, LogError> {
    Maker::new().map_err(|error| LogError::NoMaker { error })
}

/// Refuses a child of `fork`.
pub(super) fn check_process(maker: &Maker) -> Result<(), LogError> {
    match maker.of_another_process() {
        Some(owner) => Err(LogError::Forked {
            owner,
            process: std::process::id(),
        }),
        None => Ok(()),
    }
}

/// The shared memory of one log: a sealed memfd, mapped here and, once it was sent, by back ends.
#[derive(Debug)]
pub struct LogMemory {
    file: File,
    map: MmapRaw,
    words: usize,
}

impl LogMemory {
    /// A clean log for all addresses up to `last`.
    pub(super) fn new(last: Iova) -> Result<Self, LogError> {
        let pages = (last.get() >> LOG_PAGE.lg2()) + 1; // 2^52 at most
        let bytes = pages.div_ceil(64) * 8;
        Self::with_size(bytes).map_err(|error| LogError::Memory { bytes, error })
    }

    fn with_size(bytes: u64) -> io::Result<Self> {
        let too_large = |_| io::Error::from(io::ErrorKind::FileTooLarge);
        let len = usize::try_from(bytes).map_err(too_large)?;
        let file = memfd()?;
        file.set_len(bytes)?;
        // With the seals, neither side can take pages of the file away. An access to such a page
        // would end the other process.
        seal(
            &file,
            libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL,
        )?;
        let map = MmapOptions::new().len(len).map_raw(&file)?;
        Ok(LogMemory {
            file,
            map,
            words: len / 8,
        })
    }

    /// The memfd, to be sent to back ends. Its size is sealed.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// The size in bytes, a multiple of 8: `mmap_size` of the message.
    pub fn size(&self) -> u64 {
        self.words as u64 * 8
    }

    /// Where the log begins in its file: `mmap_offset` of the message.
    pub fn offset(&self) -> u64 {
        0
    }

    /// The last address that has a bit.
    pub fn last(&self) -> Iova {
        let pages = self.words as u64 * 64;
        Iova::new(((pages - 1) << LOG_PAGE.lg2()) | LOG_PAGE.mask())
    }
}

impl LogWords for LogMemory {
    fn words(&self) -> &[AtomicU64] {
        let first = self.map.as_mut_ptr().cast::<AtomicU64>();
        // SAFETY:
        // - valid for `words` elements for as long as `self`: the mapping has `8 * words` bytes,
        //   begins at a page, and the seals keep its file from getting shorter.
        // - shared: this process reaches the mapping through these atomics alone. Others have the
        //   same memory, and mark in it by atomic operations, as the protocol demands; what they do
        //   otherwise gives other bits, not other types.
        unsafe { std::slice::from_raw_parts(first, self.words) }
    }
}

fn memfd() -> io::Result<File> {
    let flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
    // SAFETY: the name is a string that ends with 0 and outlives the call.
    let fd = unsafe { libc::memfd_create(c"vhost-log".as_ptr(), flags) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a descriptor that was just made for us; no other code owns it.
    Ok(File::from(unsafe { OwnedFd::from_raw_fd(fd) }))
}

fn seal(file: &File, seals: c_int) -> io::Result<()> {
    // SAFETY: this call takes numbers and touches no memory of ours.
    match unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, seals) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
