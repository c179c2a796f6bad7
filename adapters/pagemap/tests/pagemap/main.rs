//! The adapter of process memory on the kernel of this machine. If the kernel does not support it,
//! each test reports that it is skipped.
#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used)] // helpers of tests

#[path = "../../../../tests/common_skip/mod.rs"]
mod common_skip;
mod given_back;
mod mappings;
mod trackers;
mod writes;

use std::collections::BTreeSet;
use std::fs::File;
use std::io::Write;
use std::os::fd::{AsRawFd, FromRawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed, Ordering::SeqCst};

use common_skip::skip;
use dirtymap::{Access, AddressSpace, HarvestRequest, Iova, IovaRange, UserBitmap};
use dirtymap_pagemap::{GivenBack, PagemapError, ProcessMemory};

/// The features of the kernel, or `None` after a message with the reason.
fn tracker() -> Option<Arc<ProcessMemory>> {
    match ProcessMemory::new() {
        Ok(memory) => Some(Arc::new(memory)),
        Err(error @ PagemapError::Unsupported { .. }) => {
            skip(error);
            None
        }
        Err(error) => panic!("{error}"),
    }
}

/// Anonymous memory of `pages` pages, of 4 KiB on most machines. It is unmapped when it is dropped.
struct Map {
    address: *mut u8,
    pages: u64,
    page: u64,
}

// SAFETY: memory of the process, written through atomics and volatile writes.
unsafe impl Sync for Map {}

impl Map {
    fn flags(pages: u64, page: u64, flags: i32, fd: i32) -> std::io::Result<Self> {
        let bytes = (pages * page) as usize;
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping, where the kernel likes.
        let address = unsafe { libc::mmap(std::ptr::null_mut(), bytes, protection, flags, fd, 0) };
        if address == libc::MAP_FAILED {
            return Err(std::io::Error::last_os_error());
        }
        Ok(Map {
            address: address.cast(),
            pages,
            page,
        })
    }

    /// Without huge pages.
    fn new(pages: u64, page: u64) -> Self {
        let map = Map::flags(pages, page, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1).unwrap();
        map.advise(0, pages, libc::MADV_NOHUGEPAGE);
        map
    }

    fn at(&self, page: u64) -> *mut u8 {
        assert!(page <= self.pages);
        // SAFETY: inside the mapping, or one past its end.
        unsafe { self.address.add((page * self.page) as usize) }
    }

    fn host(&self) -> u64 {
        self.address.addr() as u64
    }

    fn word(&self, page: u64) -> &AtomicU64 {
        assert!(page < self.pages);
        // SAFETY: aligned, inside the mapping, which lives as long as the reference, and used as an
        // atomic alone.
        unsafe { &*self.at(page).cast() }
    }

    fn write(&self, page: u64) {
        self.word(page).fetch_add(1, SeqCst);
    }

    fn advise(&self, first: u64, n: u64, advice: i32) {
        // SAFETY: of memory of this mapping, whose contents no reference promises.
        let result =
            unsafe { libc::madvise(self.at(first).cast(), (n * self.page) as usize, advice) };
        assert!(result == 0 || advice == libc::MADV_NOHUGEPAGE || advice == libc::MADV_HUGEPAGE);
    }

    fn unmap(&self, first: u64, n: u64) {
        let bytes = (n * self.page) as usize;
        // SAFETY: of memory of this mapping, which the test does not use any more.
        let result = unsafe { libc::munmap(self.at(first).cast(), bytes) };
        assert_eq!(result, 0);
    }
}

impl Drop for Map {
    fn drop(&mut self) {
        // SAFETY: of memory of this mapping, to which no reference is left; parts that are gone do
        // no harm.
        unsafe { libc::munmap(self.address.cast(), (self.pages * self.page) as usize) };
    }
}

/// A file in memory, with these flags of `memfd_create`.
fn memfd(flags: libc::c_uint) -> std::io::Result<File> {
    // SAFETY: a name that ends with a zero.
    let fd = unsafe { libc::memfd_create(c"dirtymap".as_ptr(), libc::MFD_CLOEXEC | flags) };
    if fd < 0 {
        return Err(std::io::Error::last_os_error());
    }
    // SAFETY: the descriptor was just opened, and nothing else has it.
    Ok(unsafe { File::from_raw_fd(fd) })
}

/// Runs `call` in a child of `fork`, and returns its result.
///
/// The child has one thread, and copies of all locks as they were. So `call` must take no lock that
/// another test may hold, and must not print.
fn in_child(call: impl FnOnce() -> u8) -> i32 {
    // SAFETY: the child runs `call`, which keeps to what is said above, and ends.
    let pid = unsafe { libc::fork() };
    assert!(pid >= 0, "{}", std::io::Error::last_os_error());
    if pid == 0 {
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(call));
        // SAFETY: ends the child at once: no destructor and no handler of the parent runs.
        unsafe { libc::_exit(i32::from(result.unwrap_or(u8::MAX))) };
    }
    let mut status = 0;
    // SAFETY: of the child above; the call writes one number.
    let waited = unsafe { libc::waitpid(pid, &raw mut status, 0) };
    assert_eq!(waited, pid);
    assert!(libc::WIFEXITED(status), "the child was killed: {status:#x}");
    libc::WEXITSTATUS(status)
}

/// A tracked space over `map`, at addresses of its own.
struct Tracked {
    space: AddressSpace,
    memory: Arc<ProcessMemory>,
    pages: u64,
    page: u64,
}

/// The addresses at which it is reported.
const BASE: u64 = 1 << 46;

impl Tracked {
    fn new(memory: Arc<ProcessMemory>, map: &Map) -> Self {
        Tracked::with(memory, map, GivenBack::Reported)
    }

    fn with(memory: Arc<ProcessMemory>, map: &Map, given_back: GivenBack) -> Self {
        let page = memory.page();
        let space = AddressSpace::with_source(page, Arc::clone(&memory)).unwrap();
        let tracked = Tracked {
            space,
            memory,
            pages: map.pages,
            page: page.bytes(),
        };
        let all = tracked.range(0, map.pages);
        let added = tracked.memory.add_with(all, map.host(), given_back);
        added.unwrap();
        tracked.space.map(all, 0, Access::ReadWrite).unwrap();
        tracked.space.start_tracking().unwrap();
        tracked
    }

    fn range(&self, first: u64, n: u64) -> IovaRange {
        IovaRange::from_len(Iova::new(BASE + first * self.page), n * self.page).unwrap()
    }

    fn words(&self) -> Vec<u64> {
        vec![0; self.pages.div_ceil(64) as usize]
    }

    fn request(&self, first: u64, n: u64) -> HarvestRequest<'static> {
        HarvestRequest::new(self.range(first, n), self.memory.page())
    }

    fn numbers(&self, runs: impl Iterator<Item = IovaRange>) -> Vec<u64> {
        let page = |iova: Iova| (iova.get() - BASE) / self.page;
        runs.flat_map(|run| page(run.start())..=page(run.last()))
            .collect()
    }

    fn harvest(&self, first: u64, n: u64) -> Vec<u64> {
        let mut words = self.words();
        let request = self.request(first, n);
        let lease = self
            .space
            .harvest(&request, UserBitmap::new(&mut words))
            .unwrap();
        let lease = lease.sync().unwrap();
        let found = self.numbers(lease.runs());
        lease.commit();
        found
    }

    fn harvest_all(&self) -> Vec<u64> {
        self.harvest(0, self.pages)
    }
}

/// xorshift64*.
struct Random(u64);

impl Random {
    fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) % n
    }
}
