//! The log of one region of guest memory, as the daemon makes it of what a front end sent.

use std::fmt;
use std::io;
use std::ptr;

use vhost_user_backend::bitmap::{MemRegionBitmap, MmapLogReg};
use vm_memory::{Address, GuestMemoryRegion};

use super::marks::Marks;
use super::memory::{LOG_PAGE, LogError, check_process, maker};
use super::received;
use dirtymap::sync::Arc;
use dirtymap_host::Maker;

/// The part of a log that belongs to one region of guest memory.
pub struct RegionLog {
    /// Before the memory, so that it goes before it.
    marks: Marks,
    memory: Arc<MmapLogReg>,
    maker: Maker,
}

impl fmt::Debug for RegionLog {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (start, last) = self.marks.region();
        f.debug_struct("RegionLog")
            .field("start", &start)
            .field("last", &last)
            .finish_non_exhaustive()
    }
}

impl From<LogError> for io::Error {
    fn from(error: LogError) -> Self {
        io::Error::new(io::ErrorKind::InvalidData, error)
    }
}

impl MemRegionBitmap for RegionLog {
    /// Looks at what the front end sent before anything is marked there, so that no mark ends this
    /// process.
    ///
    /// # Errors
    /// `InvalidData` with a [`LogError`], in this order: [`EmptyRegion`](LogError::EmptyRegion)
    /// also if the region ends past 2^64, [`UnknownLength`](LogError::UnknownLength),
    /// [`TooShort`](LogError::TooShort), [`Unsealed`](LogError::Unsealed),
    /// [`NoMemory`](LogError::NoMemory), [`NoMaker`](LogError::NoMaker). Lengths are rounded up: a
    /// page of which the region has a part has a bit.
    fn new<R: GuestMemoryRegion>(region: &R, memory: Arc<MmapLogReg>) -> io::Result<Self> {
        if !received::is_sealed(&memory) && !received::unsealed_are_accepted() {
            // What is wrong with the lengths is told first.
            received::check_length(&memory, span(region)?)?;
            return Err(LogError::Unsealed.into());
        }
        Self::of(region, memory)
    }
}

/// The first and the last guest physical address of `region`.
fn span<R: GuestMemoryRegion>(region: &R) -> Result<(u64, u64), LogError> {
    let (start, len) = (region.start_addr().raw_value(), region.len());
    let last = len
        .checked_sub(1)
        .and_then(|more| start.checked_add(more))
        .ok_or(LogError::EmptyRegion { start, len })?;
    Ok((start, last))
}

impl RegionLog {
    /// As [`new`](MemRegionBitmap::new), of a log that was seen to be sealed, or is taken as it is.
    pub(super) fn of<R: GuestMemoryRegion>(
        region: &R,
        memory: Arc<MmapLogReg>,
    ) -> io::Result<Self> {
        let (start, last) = span(region)?;
        received::check_length(&memory, (start, last))?;
        // The address of the mapping; nothing is accessed. A mapping has a byte at least.
        let base = ptr::from_ref(&memory[0]).expose_provenance();
        let byte = |address: u64| (address >> LOG_PAGE.lg2() >> 3) as usize;
        received::check_memory(base, byte(start)..byte(last) + 1)?;
        let maker = maker()?;
        // SAFETY:
        // - aligned: a mapping begins at a page.
        // - in bounds: the mapping has the bytes of the region, as `check_length` saw, and consists
        //   of whole pages, in which whole words lie.
        // - alive: `memory` holds the mapping, and goes after the marks. It was made by a system
        //   call, outside of what the compiler knows, and its address is exposed.
        // - behind it is memory, as `check_memory` saw, and the seal of its file keeps it there;
        //   without a seal an access raises a signal, which is no access to memory of anybody else.
        // - in this process, all accesses to the log go by way of `Marks`, which are of words
        //   alone, and by the front end's `LogMemory`, which has another mapping and uses words
        //   too.
        let marks = unsafe { Marks::new(base, start, last) };
        Ok(RegionLog {
            marks,
            memory,
            maker,
        })
    }

    pub(super) fn mark(&self, offset: u64, len: u64) {
        self.marks.mark(offset, len);
    }

    pub(super) fn is_dirty(&self, offset: u64) -> bool {
        self.marks.is_dirty(offset)
    }

    /// The whole log.
    ///
    /// # Errors
    /// [`LogError::Forked`] in a child of a fork.
    pub(super) fn memory(&self) -> Result<Arc<MmapLogReg>, LogError> {
        check_process(&self.maker)?;
        Ok(Arc::clone(&self.memory))
    }
}
