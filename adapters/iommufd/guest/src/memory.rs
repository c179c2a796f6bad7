//! Memory for mappings, and around bitmaps.

use std::io;

/// The page of the host that this is for.
pub(crate) const PAGE: usize = 4096;

/// What the caller may do with a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Rights {
    /// Read and write.
    Rw,
    /// Read.
    Ro,
    /// Nothing.
    None,
}

/// A mapping of this process, gone when it is dropped.
pub(crate) struct Memory {
    /// Its address, exposed.
    start: usize,
    bytes: usize,
}

impl Memory {
    /// Memory that is present, from large pages of the system if `huge`.
    pub(crate) fn new(bytes: usize, huge: bool) -> io::Result<Self> {
        let huge = if huge { libc::MAP_HUGETLB } else { 0 };
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_POPULATE | huge;
        // SAFETY: a new mapping, at an address of the kernel's choice.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                flags,
                -1,
                0,
            )
        };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let start = start.expose_provenance();
        Ok(Memory { start, bytes })
    }

    fn at(&self, at: usize) -> *mut u8 {
        std::ptr::with_exposed_provenance_mut(self.start + at)
    }

    /// Its address.
    pub(crate) fn address(&self) -> u64 {
        self.start as u64
    }

    /// Makes all bytes `value`.
    pub(crate) fn fill(&self, value: u8) {
        // SAFETY: all of the mapping, which can be written until rights are taken away, and to
        // which no reference exists. The kernel writes to it only during calls.
        unsafe { self.at(0).write_bytes(value, self.bytes) };
    }

    /// The bytes of page `page` now.
    pub(crate) fn page(&self, page: usize) -> [u8; PAGE] {
        assert!((page + 1) * PAGE <= self.bytes, "a page of the mapping");
        let mut bytes = [0; PAGE];
        // SAFETY: a page of the mapping, which can be read; the copy is elsewhere.
        unsafe {
            self.at(page * PAGE)
                .copy_to_nonoverlapping(bytes.as_mut_ptr(), PAGE)
        };
        bytes
    }

    /// Sets the rights of `count` pages from page `first` on.
    pub(crate) fn protect(&self, first: usize, count: usize, rights: Rights) -> io::Result<()> {
        assert!((first + count) * PAGE <= self.bytes, "pages of the mapping");
        let rights = match rights {
            Rights::Rw => libc::PROT_READ | libc::PROT_WRITE,
            Rights::Ro => libc::PROT_READ,
            Rights::None => libc::PROT_NONE,
        };
        // SAFETY: pages of our mapping, to which no reference exists.
        let done = unsafe { libc::mprotect(self.at(first * PAGE).cast(), count * PAGE, rights) };
        match done {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: the mapping of `new`, to which no reference exists.
        unsafe { libc::munmap(self.at(0).cast(), self.bytes) };
    }
}
