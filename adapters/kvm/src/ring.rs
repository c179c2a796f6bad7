//! The dirty ring of one virtual processor: a producer in the kernel, a consumer here.
//!
//! ```text
//!  kernel                                   we
//!  K1  payload := slot, offset              R1  flags is DIRTY?     Acquire, pairs with K2
//!  K2  flags := DIRTY           (release)   R2  read and check the payload, keep the page
//!                                           R3  flags := RESET      Release, pairs with K3
//!  K3  flags is RESET?           (acquire)
//!  K4  re-protect the page, flush
//!  K5  flags := 0                (release)
//! ```
//!
//! Between R3 and K4 the guest writes to the page unseen, so the page may be copied only after K4,
//! which is KVM_RESET_DIRTY_RINGS: the flush that a lease owes. The memory of a ring is mapped into
//! this process, so a stray write of any code in it may hit it: an entry is checked before it is
//! computed with.

use std::io;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use kvm_bindings::KVM_DIRTY_LOG_PAGE_OFFSET;
use kvm_ioctls::VcpuFd;

use super::error::KvmError;
use dirtymap::Granule;

const DIRTY: u32 = 1;
const RESET: u32 = 2;

/// One entry, as the kernel lays it out.
#[repr(C)]
#[derive(Debug, Default)]
pub(super) struct Entry {
    flags: AtomicU32,
    slot: AtomicU32,
    offset: AtomicU64,
}

impl Entry {
    /// Takes the page out, if one is there: `keep` has its slot and its number in that, as they
    /// were found.
    fn take(&self, keep: impl FnOnce(u32, u64)) -> bool {
        // Acquire: R1, pairs with the kernel's release of the flags after the payload.
        if self.flags.load(Ordering::Acquire) & (DIRTY | RESET) != DIRTY {
            return false;
        }
        // Relaxed: R1, an Acquire, comes before it.
        let slot = self.slot.load(Ordering::Relaxed);
        // Relaxed: R1, an Acquire, comes before it.
        let offset = self.offset.load(Ordering::Relaxed);
        keep(slot, offset);
        // Release: R3, pairs with the kernel's acquire of the flags before it reads the payload and
        // uses the entry again.
        self.flags.store(RESET, Ordering::Release);
        true
    }
}

/// Takes the pages out of `entries`, from `next` on, and moves `next` past them. At most one round,
/// so that it ends while a processor writes all the time.
pub(super) fn reap(entries: &[Entry], next: &mut usize, mut keep: impl FnMut(u32, u64)) -> usize {
    for taken in 0..entries.len() {
        match entries.get(*next) {
            Some(entry) if entry.take(&mut keep) => *next = (*next + 1) % entries.len(),
            _ => return taken,
        }
    }
    entries.len()
}

/// Where the entries of a ring lie.
pub(super) trait Memory: Send {
    /// All of them.
    fn entries(&self) -> &[Entry];
}

/// The ring of one processor, and how far it is read.
pub(super) struct Ring {
    memory: Box<dyn Memory>,
    next: usize,
}

impl Ring {
    /// Reads `memory` from its first entry on.
    pub(super) fn new(memory: Box<dyn Memory>) -> Self {
        Ring { memory, next: 0 }
    }

    /// Whether KVM has taken back what was handed back, which a reset of the same thread did.
    pub(super) fn is_taken_back(&self) -> bool {
        let entries = self.memory.entries();
        let before = self.next.checked_sub(1).unwrap_or(entries.len() - 1);
        entries.get(before).is_none_or(|entry| {
            // Relaxed: the kernel wrote it in a call of this thread, under the lock of the rings.
            entry.flags.load(Ordering::Relaxed) & RESET == 0
        })
    }

    /// As [`reap`].
    pub(super) fn reap(&mut self, keep: impl FnMut(u32, u64)) -> usize {
        reap(self.memory.entries(), &mut self.next, keep)
    }
}

/// The memory that the kernel shares.
pub(super) struct Mapped {
    entries: NonNull<Entry>,
    len: usize,
}

// SAFETY: the ring is memory of the process, used through atomics, and only the one `Mapped` of it
// unmaps it.
unsafe impl Send for Mapped {}

impl Mapped {
    /// Maps the ring of `vcpu`, which must have `entries` entries.
    ///
    /// KVM maps any number of pages of any processor, and an access to a page that is not of a
    /// ring ends in SIGBUS. A ring that is longer than what is read of it is worse: entries are
    /// missed. So the length is checked from both sides, by MADV_POPULATE_READ, which looks at
    /// pages as an access does, and returns an error where the access raises a signal. It is a
    /// plain `madvise`, which filters of system calls let through, and needs neither `/proc` nor a
    /// right to trace.
    pub(super) fn new(vcpu: &VcpuFd, entries: u32, page: Granule) -> Result<Self, KvmError> {
        let called = |call| move |error| KvmError::Call { call, error };
        let none = || KvmError::NoSuchRing { entries };
        let len = entries as usize;
        let bytes = len * size_of::<Entry>();
        let offset = u64::from(KVM_DIRTY_LOG_PAGE_OFFSET) << page.lg2();
        let map = |bytes| {
            // SAFETY: a new mapping, at an address of the kernel's choice.
            let address = unsafe {
                libc::mmap(
                    std::ptr::null_mut(),
                    bytes,
                    libc::PROT_READ | libc::PROT_WRITE,
                    libc::MAP_SHARED,
                    vcpu.as_raw_fd(),
                    offset.cast_signed(),
                )
            };
            if address == libc::MAP_FAILED {
                return Err(called("mmap")(io::Error::last_os_error()));
            }
            Ok(address)
        };
        // One page more than the ring should have, for as long as it takes to look at it.
        let address = map(bytes + page.bytes() as usize)?;
        let ring = has_pages(address, bytes);
        let above = has_pages(address.wrapping_byte_add(bytes), page.bytes() as usize);
        // SAFETY: the mapping of above, to which nothing refers.
        unsafe { libc::munmap(address, bytes + page.bytes() as usize) };
        const LOOK: &str = "madvise(MADV_POPULATE_READ)";
        if !ring.map_err(called(LOOK))? || above.map_err(called(LOOK))? {
            return Err(none());
        }
        let entries = NonNull::new(map(bytes)?.cast()).ok_or_else(none)?;
        Ok(Mapped { entries, len })
    }
}

/// Whether an access to any of these bytes of a mapping finds memory.
fn has_pages(address: *mut libc::c_void, bytes: usize) -> io::Result<bool> {
    // SAFETY: of a mapping of the caller, whose contents stay as they are.
    if unsafe { libc::madvise(address, bytes, libc::MADV_POPULATE_READ) } == 0 {
        return Ok(true);
    }
    match io::Error::last_os_error() {
        error if error.raw_os_error() == Some(libc::EFAULT) => Ok(false),
        error => Err(error),
    }
}

impl Memory for Mapped {
    fn entries(&self) -> &[Entry] {
        // SAFETY:
        // - the mapping holds `len` entries, is page-aligned, and lives as long as `self`;
        // - entries are atomics, of which every content is valid, so the kernel may write them
        //   meanwhile.
        unsafe { std::slice::from_raw_parts(self.entries.as_ptr(), self.len) }
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        // SAFETY: the mapping of `new`, of this length, to which nothing else refers.
        unsafe { libc::munmap(self.entries.as_ptr().cast(), self.len * size_of::<Entry>()) };
    }
}

/// The kernel's side, for tests.
#[cfg(test)]
impl Entry {
    /// Writes an entry; whether it was free.
    pub(super) fn push(&self, slot: u32, offset: u64) -> bool {
        if self.flags.load(Ordering::Acquire) != 0 {
            return false;
        }
        self.slot.store(slot, Ordering::Relaxed);
        self.offset.store(offset, Ordering::Relaxed);
        self.flags.store(DIRTY, Ordering::Release);
        true
    }

    /// Uses an entry again that was handed back; what it named.
    pub(super) fn recycle(&self) -> Option<(u32, u64)> {
        if self.flags.load(Ordering::Acquire) & RESET == 0 {
            return None;
        }
        let named = (
            self.slot.load(Ordering::Relaxed),
            self.offset.load(Ordering::Relaxed),
        );
        self.flags.store(0, Ordering::Release);
        Some(named)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_come_out_once_in_order_and_wait_for_the_reset() {
        let ring: Vec<Entry> = (0..4).map(|_| Entry::default()).collect();
        let (mut next, mut seen) = (0, Vec::new());
        for round in 0..5u64 {
            for n in 0..3 {
                assert!(ring[((round * 3 + n) % 4) as usize].push(n as u32, round));
            }
            let taken = reap(&ring, &mut next, |slot, offset| seen.push((slot, offset)));
            assert_eq!(taken, 3);
            assert_eq!(reap(&ring, &mut next, |_, _| panic!("not there")), 0);
            assert_eq!(seen, [(0, round), (1, round), (2, round)]);
            seen.clear();
            assert_eq!(ring.iter().filter_map(Entry::recycle).count(), 3);
        }
    }

    #[test]
    fn a_full_ring_is_taken_whole_and_a_taken_one_not_twice() {
        let ring: Vec<Entry> = (0..4).map(|_| Entry::default()).collect();
        for (n, entry) in (0..).zip(&ring) {
            assert!(entry.push(0, n));
        }
        let (mut next, mut seen) = (0, Vec::new());
        assert_eq!(reap(&ring, &mut next, |_, offset| seen.push(offset)), 4);
        assert_eq!(seen, [0, 1, 2, 3]);
        // Not reset yet: its first entry is ours still.
        assert_eq!(reap(&ring, &mut next, |_, _| panic!("twice")), 0);
    }

    /// The entry before the first one is the last one. A ring whose last entry is still handed back
    /// belongs to another machine, also when its first entry is free.
    #[test]
    fn the_entry_before_the_first_one_is_the_last_one() {
        let entries: std::sync::Arc<Vec<_>> =
            std::sync::Arc::new((0..4).map(|_| Entry::default()).collect());
        let mut ring = Ring::new(Box::new(std::sync::Arc::clone(&entries)));
        assert!(ring.is_taken_back(), "nothing was handed back");
        for (n, entry) in (0..).zip(&*entries) {
            assert!(entry.push(0, n));
        }
        assert_eq!(ring.reap(|_, _| ()), 4);
        for entry in &entries[..3] {
            assert!(entry.recycle().is_some());
            assert!(!ring.is_taken_back(), "the last entry is still handed back");
        }
        assert!(entries[3].recycle().is_some());
        assert!(ring.is_taken_back());
    }

    /// A processor and its reaper race: every page arrives once, with the payload that belongs to
    /// it.
    #[test]
    fn a_producer_and_the_reaper_agree() {
        let ring: Vec<Entry> = (0..64).map(|_| Entry::default()).collect();
        const PAGES: u64 = 200_000;
        std::thread::scope(|scope| {
            let ring = &ring;
            scope.spawn(move || {
                let mut reset = 0;
                for page in 0..PAGES {
                    while !ring[(page % 64) as usize].push((page % 7) as u32, page) {
                        while ring[reset].recycle().is_some() {
                            reset = (reset + 1) % 64;
                        }
                        std::hint::spin_loop();
                    }
                }
            });
            let (mut next, mut expected) = (0, 0);
            while expected < PAGES {
                reap(ring, &mut next, |slot, page| {
                    assert_eq!((slot, page), ((expected % 7) as u32, expected));
                    expected += 1;
                });
            }
        });
    }
}
