//! Which process a log belongs to.

use std::io;
use std::ptr::NonNull;

use crate::page;

/// The process that made a log.
///
/// A child of `fork` inherits the descriptors of the log, which still act on the memory of the
/// parent, and the shared memory of rings. Numbers of processes do not tell the two apart for
/// certain: the first child in a new PID namespace is process 1, as its parent may be, and numbers
/// are used again. So one page of memory tells: the kernel wipes it in every copy of the address
/// space (`MADV_WIPEONFORK`). A child that shares the memory (`vfork`) is the same process here.
/// A check costs a load.
#[derive(Debug)]
pub struct Maker {
    page: NonNull<u8>,
    len: usize,
    id: u32,
}

// SAFETY: the page is memory of the process. No thread writes to it after `new`, and only the one
// `Maker` of it unmaps it.
unsafe impl Send for Maker {}
// SAFETY: as above: all threads only read.
unsafe impl Sync for Maker {}

impl Maker {
    /// This process.
    ///
    /// # Errors
    /// What the kernel says, which has `MADV_WIPEONFORK` since Linux 4.14.
    pub fn new() -> io::Result<Self> {
        let len = page().bytes() as usize;
        // SAFETY: a new mapping, at an address of the kernel's choice.
        let address = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        if address == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let page = NonNull::new(address.cast()).ok_or(io::ErrorKind::AddrNotAvailable)?;
        let id = std::process::id();
        let maker = Maker { page, len, id };
        // SAFETY: of the mapping above, which no child of `fork` needs.
        let wiped = unsafe { libc::madvise(address, len, libc::MADV_WIPEONFORK) };
        if wiped != 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: inside the mapping, to which nothing else refers yet.
        unsafe { maker.page.write_volatile(1) };
        Ok(maker)
    }

    /// The number of the process that made the log, if this process is another one.
    pub fn of_another_process(&self) -> Option<u32> {
        // SAFETY: inside the mapping, which lives as long as `self`. Only the kernel writes to it,
        // before the first instruction of a child.
        let here = unsafe { self.page.read_volatile() } != 0;
        (!here).then_some(self.id)
    }
}

impl Drop for Maker {
    fn drop(&mut self) {
        // SAFETY: the mapping of `new`, of this length, to which nothing else refers.
        unsafe { libc::munmap(self.page.as_ptr().cast(), self.len) };
    }
}
