//! The memory that the kernel writes the bits of a report into.
//!
//! The kernel pins the pages of a bitmap while it walks. If it cannot, it drops the bits of such a
//! page in silence, and the pages that they stood for become clean all the same. So the bits go
//! into memory of our own, which is made present before each call.
//!
//! Some kernels write past the end of a bitmap when a leaf extends past the request. Past the end
//! lies a page without access, where the kernel drops what it writes.

use std::io;
use std::ptr::NonNull;

use dirtymap::sync::{Mutex, lock};

/// A bitmap in pages of its own, with a page without access at its end.
#[derive(Debug)]
struct Scratch {
    start: NonNull<u64>,
    /// Words that can be used.
    words: usize,
    /// Bytes of the mapping, the last page included.
    mapped: usize,
}

// SAFETY: the memory belongs to this value alone, and no thread is tied to it.
unsafe impl Send for Scratch {}

/// The page of the host.
fn host_page() -> usize {
    crate::page().bytes() as usize
}

impl Scratch {
    /// Room for at least `words` words.
    fn new(words: usize) -> io::Result<Self> {
        let page = host_page();
        let too_much = || io::Error::from(io::ErrorKind::OutOfMemory);
        let bytes = words.max(1).checked_mul(8).ok_or_else(too_much)?;
        let bytes = bytes.checked_next_multiple_of(page).ok_or_else(too_much)?;
        let mapped = bytes.checked_add(page).ok_or_else(too_much)?;
        // SAFETY: a new mapping, at an address of the kernel's choice.
        let address = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                mapped,
                libc::PROT_NONE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        let Some(start) = NonNull::new(address).filter(|_| address != libc::MAP_FAILED) else {
            return Err(io::Error::last_os_error());
        };
        // Dropped, it is unmapped, also if the next call fails.
        let scratch = Scratch {
            start: start.cast(),
            words: bytes / 8,
            mapped,
        };
        // SAFETY: the first pages of the mapping above, to which nothing refers yet.
        let opened = unsafe { libc::mprotect(address, bytes, libc::PROT_READ | libc::PROT_WRITE) };
        match opened {
            0 => Ok(scratch),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// The first `words` words, all zero, in pages that are present. As many as there are, if that
    /// is fewer.
    fn zeroed(&mut self, words: usize) -> io::Result<&mut [u64]> {
        let words = words.min(self.words);
        // SAFETY: whole pages of our mapping; the call makes them present and changes no byte.
        let present = unsafe {
            libc::madvise(
                self.start.as_ptr().cast(),
                (words * 8).next_multiple_of(host_page()),
                libc::MADV_POPULATE_WRITE,
            )
        };
        if present != 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY:
        // - the mapping is aligned to a page, readable and writable for `self.words` words;
        // - anonymous memory is zero until it is written, so every word is initialized;
        // - the slice borrows `self` mutably, so nothing else refers to it meanwhile.
        let bits = unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), words) };
        bits.fill(0);
        Ok(bits)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // SAFETY: the mapping of `new`, of this length, to which nothing refers any more.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.mapped) };
    }
}

/// A pool of bitmaps for calls of a kernel. Each harvest that runs at the same time has one of its
/// own. At most 16 of them are kept for later harvests.
///
/// ```
/// # fn main() -> std::io::Result<()> {
/// let pool = dirtymap_host::BitPool::new(512)?;
/// let first = pool.with(512, |bits| {
///     bits[0] = 1; // or a system call writes there
///     bits[0]
/// })?;
/// assert_eq!(first, 1);
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct BitPool {
    words: usize,
    waiting: Mutex<Vec<Scratch>>,
}

impl BitPool {
    /// A pool of bitmaps of `words` words of 64 bits each, with one bitmap in it.
    ///
    /// # Errors
    /// If the system has no memory for a bitmap.
    pub fn new(words: usize) -> io::Result<Self> {
        let mut waiting = Vec::new();
        waiting
            .try_reserve_exact(KEPT)
            .map_err(|_| io::ErrorKind::OutOfMemory)?;
        waiting.push(Scratch::new(words)?);
        Ok(BitPool {
            words,
            waiting: Mutex::new(waiting),
        })
    }

    /// A pool that has no bitmap and can make none, for tests of systems without memory.
    #[doc(hidden)]
    pub fn without_memory() -> Self {
        BitPool {
            words: usize::MAX,
            waiting: Mutex::new(Vec::new()),
        }
    }

    /// Calls `with` with `words` words that are zero and present, or with all words of a bitmap, if
    /// those are fewer. Takes a short lock before and after the call, and none during it.
    ///
    /// # Errors
    /// If the system has no memory for a bitmap, or cannot make it present. Then `with` is not
    /// called.
    pub fn with<T>(&self, words: usize, with: impl FnOnce(&mut [u64]) -> T) -> io::Result<T> {
        let found = lock(&self.waiting).pop();
        let mut scratch = match found {
            Some(scratch) => scratch,
            None => Scratch::new(self.words)?,
        };
        let done = scratch.zeroed(words).map(with);
        let mut waiting = lock(&self.waiting);
        if waiting.len() < KEPT {
            waiting.push(scratch);
        }
        done
    }
}

/// The most bitmaps that are kept.
const KEPT: usize = 16;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_use_begins_with_zeros() {
        let pool = BitPool::new(1).unwrap();
        for round in 0..3 {
            let seen = pool.with(512, |bits| {
                assert_eq!(bits.len(), 512, "whole pages");
                let seen = bits.iter().any(|word| *word != 0);
                bits.fill(u64::MAX);
                seen
            });
            assert!(!seen.unwrap(), "round {round}");
        }
    }

    #[test]
    fn nothing_can_be_written_past_the_end() {
        let scratch = Scratch::new(512).unwrap();
        let end = scratch.start.addr().get() + scratch.words * 8;
        // A call that writes one byte there is refused.
        let mut pair = [0; 2];
        // SAFETY: the call writes two numbers to where they are.
        assert_eq!(unsafe { libc::pipe(pair.as_mut_ptr()) }, 0);
        for (at, read) in [(end - 1, 1), (end, -1)] {
            // SAFETY: the byte is of this process, and only this function uses the pipe.
            unsafe { libc::write(pair[1], [7u8].as_ptr().cast(), 1) };
            let to = std::ptr::with_exposed_provenance_mut(at);
            // SAFETY: the kernel checks the address; inside, the byte is of `scratch`.
            assert_eq!(unsafe { libc::read(pair[0], to, 1) }, read, "at {at:#x}");
        }
        for fd in pair {
            // SAFETY: the descriptor is ours, and is not used again.
            unsafe { libc::close(fd) };
        }
    }

    #[test]
    fn more_words_than_memory_are_an_error() {
        Scratch::new(usize::MAX).unwrap_err();
        Scratch::new(usize::MAX / 8 - 600).unwrap_err();
    }
}
