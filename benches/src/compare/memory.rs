//! Counts allocations.

use std::alloc::{GlobalAlloc, Layout, System};

use dirtymap::sync::{AtomicBool, AtomicU64, Ordering};

/// The allocator of the system, which counts during [`grown_by`].
pub struct Counting;

static ASKED: AtomicBool = AtomicBool::new(false);
/// Bytes allocated less bytes freed; wraps below 0.
static BYTES: AtomicU64 = AtomicU64::new(0);

fn count(bytes: u64) {
    // Relaxed, both: a statistic, of one thread at a time.
    if ASKED.load(Ordering::Relaxed) {
        BYTES.fetch_add(bytes, Ordering::Relaxed);
    }
}

// SAFETY: passes every call to `System`, which keeps the contract.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as u64);
        // SAFETY: the caller's contract is that of `System`.
        unsafe { System.alloc(layout) }
    }

    // Without `alloc`, because memory of the system is zero and stays unprovided until it is
    // touched.
    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as u64);
        // SAFETY: as for `alloc`.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        count((layout.size() as u64).wrapping_neg());
        // SAFETY: the caller's contract is that of `System`, from which every pointer comes.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count((size as u64).wrapping_sub(layout.size() as u64));
        // SAFETY: as for `dealloc`.
        unsafe { System.realloc(pointer, layout, size) }
    }
}

/// The bytes that `build` allocated less those that it freed. 0 if [`Counting`] is not the
/// allocator of the program.
pub fn grown_by<T>(build: impl FnOnce() -> T) -> (T, u64) {
    // Relaxed, all: see `count`.
    BYTES.store(0, Ordering::Relaxed);
    ASKED.store(true, Ordering::Relaxed);
    let built = build();
    ASKED.store(false, Ordering::Relaxed);
    (built, BYTES.load(Ordering::Relaxed))
}

/// The resident bytes of this process, as the system counts them. `None` if the system does not
/// tell.
pub fn resident() -> Option<u64> {
    let counts = std::fs::read_to_string("/proc/self/statm").ok()?;
    let pages: u64 = counts.split(' ').nth(1)?.parse().ok()?;
    // Few systems with this file have other page sizes, and the numbers are compared only with each
    // other.
    Some(pages * 4096)
}

/// The bytes that the system can still provide. `None` if it does not tell.
pub fn available() -> Option<u64> {
    let counts = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = counts
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix(" kB")?.parse().ok()?;
    Some(kib * 1024)
}
