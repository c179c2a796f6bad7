//! The memory of this process: which of its pages any thread wrote, without a mark, by the page
//! tables of the processor.
//!
//! ```text
//!  write by a thread ---> page is protected? ---> the kernel unprotects it ---+
//!                                                                             +--> one harvest,
//!  DMA, io_uring, O_DIRECT ---> mark, begin_write ---> marks of the area -----+    lease and abort
//! ```
//!
//! # Use
//! ```
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! use dirtymap_pagemap::{PagemapError, ProcessMemory};
//! use dirtymap::{Access, AddressSpace, Error, HarvestRequest, Iova, IovaRange, UserBitmap};
//! use std::sync::Arc;
//!
//! let memory = match ProcessMemory::new() {
//!     Ok(memory) => Arc::new(memory),
//!     Err(error @ PagemapError::Unsupported { .. }) => {
//!         println!("SKIP: {error}");
//!         return Ok(());
//!     }
//!     Err(error) => return Err(error.into()),
//! };
//! let page = memory.page();
//! let mut heap = vec![0u8; 64 << page.lg2()];
//! // The whole pages of it, reported at their own addresses.
//! let bytes = IovaRange::from_len(Iova::new(heap.as_ptr().addr() as u64), heap.len() as u64)?;
//! let pages = bytes.round_in(page).ok_or("no whole page")?;
//! memory.add(pages, pages.start().get())?;
//!
//! let space = AddressSpace::with_source(page, Arc::clone(&memory))?;
//! space.map(pages, 0, Access::ReadWrite)?;
//! space.start_tracking()?; // from here on, every write is reported
//!
//! let fifth = pages.start().get() + (5 << page.lg2());
//! heap[(fifth - bytes.start().get()) as usize] = 1; // no mark
//!
//! let mut words = [0u64];
//! let lease = space.harvest(&HarvestRequest::new(pages, page), UserBitmap::new(&mut words));
//! let lease = lease?.sync()?;
//! let written = IovaRange::granule_at(Iova::new(fifth), page);
//! assert!(lease.runs().any(|run| run.covers(written))); // with huge pages, its neighbours too
//! lease.commit();
//! memory.remove(pages)?; // before the memory goes
//! # Ok(())
//! # }
//! ```
//! Without this module, a program needs a loop around PAGEMAP_SCAN that knows when the kernel is
//! done, or reads of `/proc/self/pagemap` for soft-dirty bits, eight bytes a page, with a window
//! between read and clear in which writes are lost.
//!
//! # Protocol
//! The memory is registered with userfaultfd for write protection in ASYNC mode: the kernel handles
//! a fault by itself, and takes the protection off the page. PAGEMAP_SCAN finds the pages without
//! protection, and protects each by the same step that reports it, under the lock of its page
//! table, and flushes the processors' TLBs before it lets go. So the report is the last trace of
//! the write: it goes into memory that was reserved when the pages were added, from there into the
//! user bitmap, and is forgotten last. A harvest that fails in between, or asked for a part only,
//! loses nothing. Nothing is left to flush.
//!
//! # Guarantees
//! * Any number of regions: calls follow each other until the kernel has come to the end, wherever
//!   it says that it stopped. A page that found no room in the output is not protected, and comes
//!   with the next call.
//! * Memory that was unmapped meanwhile stops the harvest there, with [`PagemapError::Unmapped`];
//!   what lies below is in the lease. [`remove`](ProcessMemory::remove) it, and unmap its area. In
//!   an unmap it is skipped: memory that is not there has no dirty pages.
//! * Memory that another mapping has taken the place of does not pass for clean: the harvest stops
//!   with [`PagemapError::Call`], and what that call was asked for, 64 MiB at most, stays dirty as
//!   a whole.
//! * Harvests do not allocate.
//!
//! # Pages that are given back
//! MADV_DONTNEED, MADV_REMOVE, a hole in a file (`FALLOC_FL_PUNCH_HOLE`) and the end of a file that
//! moves (`ftruncate`) change what a page holds, and no write takes part.
//!
//! Of private anonymous memory, the mark of protection goes with the page, so the page comes out as
//! written; also when it was read since. When its whole page table goes, as with a huge page, the
//! scan of older kernels says nothing. [`ProcessMemory::new`] asks the kernel which one it is, and
//! on such a kernel one page of each table is looked at too, by `move_pages(2)`: 0.13 ns a page in
//! addition to 0.85 ns for a scan of small pages, and twice the 0.1 ns for huge ones. Where the
//! kernel reports it, nothing is added.
//!
//! Of all other memory, the kernel keeps the mark when the page goes, also for the page of zeroes
//! that is read in its place. That page is present and protected, as a clean one is, so comparing
//! what is present does not find it either. Such memory is refused by [`ProcessMemory::add`]
//! ([`PagemapError::GivenBackUnseen`]), unless the caller promises to mark what is given back:
//! [`GivenBack::Marked`]. The [`guide`] has the table.
//!
//! # Limits
//! * What writes without the processor's page tables is not seen: devices, and the kernel through
//!   pages that it holds, as with O_DIRECT, buffers that are registered with io_uring, or VFIO.
//!   Mark those, with [`begin_write`](dirtymap::AddressSpace::begin_write) while they last. A
//!   `read(2)` into the memory is seen.
//! * A huge page of anonymous memory may be reported as a whole. Where the kernel splits it at the
//!   first write, reports are fine, but the memory is mapped by small pages from then on. A page of
//!   hugetlbfs is reported as a whole, so a request must not cut it: [`PagemapError::NoProgress`].
//! * The first write to each page after a harvest costs a fault, of a microsecond or so.
//! * The memory of a child of `fork` is not tracked, and in a child every call is refused, with
//!   [`PagemapError::OfAnotherProcess`]: what it inherits acts on the memory of its parent. A child
//!   makes a tracker of its own. A child that shares the memory, as one of `vfork`, is the same
//!   process.
//! * Memory that is unmapped, and mapped and added anew to another tracker while this one still has
//!   it, is refused here from then on, with [`PagemapError::TakenOver`], and all of it is dirty for
//!   the unmap of its area. Trackers outside of this library are not detected: the scan of the
//!   kernel does not distinguish them.
//! * The calls take locks of the kernel, of the memory map above all, and each memory has one here:
//!   harvests wait for each other, and for `mmap` and `munmap` of any thread.
//! * Adding or removing memory searches and copies the list of all that was added. So add some
//!   thousand pieces at most, and not each object of a heap.
//! * An area that is unmapped from the space stays memory of the process; writes to it are not
//!   tracked from then on.

#![cfg(target_os = "linux")]
#![cfg_attr(docsrs, feature(doc_cfg))]

mod error;
mod ioctl;
mod maps;
mod memory;
mod owners;
mod source;
mod sweep;
#[cfg(test)]
mod tests;

pub use error::PagemapError;

#[cfg(any(doc, doctest))]
#[doc = include_str!("../docs/guide.md")]
pub mod guide {}

/// The examples of the README are tests.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

use dirtymap::adapter::{Placed, PlacedList};
use dirtymap::source::Stopped;
use dirtymap::sync::{Arc, Mutex, lock};
use dirtymap::{Error, Granule, Iova, IovaRange};
use dirtymap_host as host;
use ioctl::{Kernel, Process};
use memory::Memory;

/// How pages become dirty that are given back to the kernel: by MADV_DONTNEED or MADV_REMOVE, by a
/// hole in the file behind them, or by its end. Their contents are zero from then on, or those of
/// the file. See [Pages that are given back](self#pages-that-are-given-back).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum GivenBack {
    /// They are reported. Private anonymous memory alone can be added so.
    #[default]
    Reported,
    /// The caller promises to [`mark`](dirtymap::AddressSpace::mark) each of them, after it was
    /// given back, whichever part of the program or other process gives it back. Harvests report
    /// none that is not marked, at a smaller cost, from any memory.
    Marked,
}

/// Memory of this process as a [`DirtySource`](dirtymap::DirtySource). See [the module](self).
pub struct ProcessMemory {
    kernel: Box<dyn Kernel>,
    page: Granule,
    /// Replaced as a whole (copy-on-write). The lock is held for a look at the list, never during a
    /// call.
    memory: Mutex<Arc<PlacedList<Memory>>>,
    /// Whether writes are tracked. The lock is held while memory is added, removed or switched.
    tracking: Mutex<bool>,
}

impl ProcessMemory {
    /// Opens a userfaultfd for this process. Needs no privilege.
    ///
    /// # Errors
    /// [`PagemapError::Unsupported`], before Linux 6.7, or where a sandbox forbids it.
    pub fn new() -> Result<Self, PagemapError> {
        Ok(Self::with_kernel(Box::new(Process::new()?), host::page()))
    }

    fn with_kernel(kernel: Box<dyn Kernel>, page: Granule) -> Self {
        ProcessMemory {
            kernel,
            page,
            memory: Mutex::default(),
            tracking: Mutex::new(false),
        }
    }

    /// The page of this system, in which writes are tracked.
    pub fn page(&self) -> Granule {
        self.page
    }

    /// Adds the private anonymous memory of this process that begins at `address`, to be reported
    /// at `range`: the same numbers, or others, such as guest physical addresses. No other
    /// userfaultfd may have it. Tracked at once if the others are. Pages of it that are given back
    /// to the kernel are reported.
    ///
    /// # Errors
    /// In this order: [`PagemapError::OfAnotherProcess`], [`PagemapError::Overlap`],
    /// [`PagemapError::Unaligned`], [`PagemapError::Wraps`], [`PagemapError::Unmapped`],
    /// [`PagemapError::GivenBackUnseen`] for memory of another kind, [`PagemapError::NoMemory`],
    /// [`PagemapError::Call`]. Nothing has changed then.
    pub fn add(&self, range: IovaRange, address: u64) -> Result<(), PagemapError> {
        self.add_with(range, address, GivenBack::Reported)
    }

    /// As [`add`](Self::add). With [`GivenBack::Marked`] memory of any kind can be added: shared,
    /// or of `tmpfs`, `hugetlbfs` or another file, too.
    ///
    /// # Errors
    /// As for [`add`](Self::add), but [`PagemapError::GivenBackUnseen`] only with
    /// [`GivenBack::Reported`].
    pub fn add_with(
        &self,
        range: IovaRange,
        address: u64,
        given_back: GivenBack,
    ) -> Result<(), PagemapError> {
        self.check_process()?;
        let tracking = lock(&self.tracking);
        let memory = self.memory();
        let mut live = memory.iter().filter(|memory| !memory.is_gone());
        if let Some(other) = live.find(|memory| memory.overlaps(range, address)) {
            let other = other.range();
            return Err(PagemapError::Overlap { range, other });
        }
        let new = Memory::new(&*self.kernel, range, address, self.page, given_back)?;
        if *tracking && let Err(error) = new.track(&*self.kernel, true) {
            new.remove(&*self.kernel);
            return Err(error);
        }
        self.change(&memory, Some(new));
        Ok(())
    }

    /// Ends the tracking of what was added as `range`. What was dirty in it stays, for a harvest,
    /// or for the unmap of its area; none of it if it is not mapped any more.
    ///
    /// # Errors
    /// [`PagemapError::OfAnotherProcess`], [`PagemapError::NotAdded`].
    pub fn remove(&self, range: IovaRange) -> Result<(), PagemapError> {
        self.check_process()?;
        let _tracking = lock(&self.tracking);
        let memory = self.memory();
        let mut live = memory.iter().filter(|memory| !memory.is_gone());
        let Some(found) = live.find(|memory| memory.range() == range) else {
            return Err(PagemapError::NotAdded { range });
        };
        found.remove(&*self.kernel);
        self.change(&memory, None);
        Ok(())
    }

    /// Switches all memory, or none.
    fn switch(&self, on: bool) -> Result<(), PagemapError> {
        self.check_process()?;
        let mut tracking = lock(&self.tracking);
        if *tracking == on {
            return Ok(());
        }
        let memory = self.memory();
        let live = || memory.iter().filter(|memory| !memory.is_gone());
        for (done, new) in live().enumerate() {
            if let Err(error) = new.track(&*self.kernel, on) {
                for old in live().take(done) {
                    if old.track(&*self.kernel, !on).is_err() || !on {
                        // What was written while it was off.
                        old.dirty_all();
                    }
                }
                return Err(error);
            }
        }
        if on {
            // All of it is protected by now: what is written from here on is seen, and not
            // forgotten here.
            memory.iter().for_each(|memory| memory.forget());
        }
        *tracking = on;
        Ok(())
    }

    /// Refuses a child of `fork`, before any lock is taken: another thread of the parent may have
    /// held it, and no thread of the child gives it back.
    fn check_process(&self) -> Result<(), PagemapError> {
        match self.kernel.of_another_process() {
            Some(maker) => Err(PagemapError::OfAnotherProcess { maker }),
            None => Ok(()),
        }
    }

    /// As `check_process`, for a harvest that begins at `at`.
    fn check_process_at(&self, at: Iova) -> Result<(), Stopped> {
        self.check_process().map_err(|error| Stopped {
            at,
            error: Error::source_failed(error),
        })
    }

    fn memory(&self) -> Arc<PlacedList<Memory>> {
        Arc::clone(&lock(&self.memory))
    }

    /// Replaces the list, by one with `new`, and without the memory that was removed and has no
    /// pending page.
    fn change(&self, memory: &PlacedList<Memory>, new: Option<Arc<Memory>>) {
        let left = memory.iter().filter(|memory| !memory.is_done());
        let memory = PlacedList::new(left.map(Arc::clone).chain(new).collect());
        *lock(&self.memory) = Arc::new(memory);
    }
}

/// Takes the memory of this tracker off the list. The kernel unprotects it when the userfaultfd is
/// closed.
impl Drop for ProcessMemory {
    fn drop(&mut self) {
        if self.check_process().is_ok() {
            let owners = self.kernel.owners();
            let memory = self.memory();
            memory
                .iter()
                .for_each(|memory| owners.take_back(memory, || ()));
        }
    }
}

impl std::fmt::Debug for ProcessMemory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ProcessMemory")
            .field("page", &self.page)
            .finish_non_exhaustive()
    }
}
