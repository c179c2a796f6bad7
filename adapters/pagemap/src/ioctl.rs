//! The calls of the kernel, and nothing else: what is unsafe about this adapter is here.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::ptr::NonNull;

use super::error::PagemapError;
use super::maps;
use super::owners::{self, Owners};
use dirtymap_host as host;
use dirtymap_host::Maker;

/// A run of pages that a scan reports.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Region {
    pub(super) start: u64,
    /// The address after the last byte.
    pub(super) end: u64,
    categories: u64,
}

impl Region {
    #[cfg(test)]
    pub(super) fn new(start: u64, end: u64) -> Self {
        Region {
            start,
            end,
            categories: PAGE_IS_WRITTEN,
        }
    }
}

/// What one scan did.
#[derive(Clone, Copy, Debug)]
pub(super) struct Scanned {
    /// Regions that were filled.
    pub(super) regions: usize,
    /// Where the kernel says that it stopped; it may have come further.
    pub(super) walk_end: u64,
}

/// Which pages a scan reports.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Find {
    /// Pages that were written after they were protected.
    Written,
    /// Pages for which the page tables have no entry, and no marker of protection: they were given
    /// back.
    Nothing,
}

/// The calls of the kernel that the logic of the adapter needs. Tests have an implementation of
/// their own. Addresses are of this process.
pub(super) trait Kernel: Send + Sync {
    /// The process that made this, if it is not the one that asks: a child of `fork`, in which all
    /// of this still acts on the memory of its parent.
    fn of_another_process(&self) -> Option<u32>;

    /// The list of all trackers and their memory.
    fn owners(&self) -> &Owners;

    /// The first address of these pages that is not private anonymous memory.
    fn not_private(&self, start: u64, end: u64) -> io::Result<Option<u64>>;

    /// Whether a scan for writes skips pages that have no page table, as that of Linux 6.7 does.
    /// Later kernels report them, as they report pages without an entry in a table.
    fn skips_tables(&self) -> bool;

    /// A number that is not negative means that the page is present. A negative number says nothing
    /// about the page. Takes at most [`PROBES`] pages.
    fn probe(&self, pages: &[u64], there: &mut [i32]);

    /// UFFDIO_REGISTER for write protection, of whole pages.
    fn register(&self, start: u64, len: u64) -> io::Result<()>;

    /// UFFDIO_UNREGISTER.
    fn unregister(&self, start: u64, len: u64) -> io::Result<()>;

    /// UFFDIO_WRITEPROTECT, on or off.
    fn protect(&self, start: u64, len: u64, on: bool) -> io::Result<()>;

    /// PAGEMAP_SCAN of the pages from `start` up to `end`; if `protect`, those that are found are
    /// protected again by the same step that finds them.
    fn scan(
        &self,
        span: (u64, u64),
        find: Find,
        protect: bool,
        out: &mut [Region],
    ) -> io::Result<Scanned>;

    /// Whether all of these pages are mapped.
    fn is_mapped(&self, start: u64, len: u64) -> bool;
}

const UFFD: u32 = 0xaa;
const UFFDIO_API: libc::Ioctl = libc::_IOWR::<Api>(UFFD, 0x3f);
const UFFDIO_REGISTER: libc::Ioctl = libc::_IOWR::<Register>(UFFD, 0);
const UFFDIO_UNREGISTER: libc::Ioctl = libc::_IOR::<Span>(UFFD, 1);
const UFFDIO_WRITEPROTECT: libc::Ioctl = libc::_IOWR::<Protect>(UFFD, 6);
const UFFD_USER_MODE_ONLY: libc::c_int = 1;
const VERSION: u64 = 0xaa;
const FEATURE_PAGEFAULT_FLAG_WP: u64 = 1;
const FEATURE_WP_HUGETLBFS_SHMEM: u64 = 1 << 12;
const FEATURE_WP_UNPOPULATED: u64 = 1 << 13;
const FEATURE_WP_ASYNC: u64 = 1 << 15;
const REGISTER_MODE_WP: u64 = 1 << 1;
const WRITEPROTECT_MODE_WP: u64 = 1;

const PAGEMAP_SCAN: libc::Ioctl = libc::_IOWR::<Scan>(b'f' as u32, 16);
const SCAN_WP_MATCHING: u64 = 1;
const SCAN_CHECK_WPASYNC: u64 = 1 << 1;
const PAGE_IS_WRITTEN: u64 = 1 << 1;
const PAGE_IS_PRESENT: u64 = 1 << 3;
/// In swap, or with a marker of protection in its place.
const PAGE_IS_SWAPPED: u64 = 1 << 4;

/// Pages of one [`Kernel::probe`].
pub(super) const PROBES: usize = 32;

#[repr(C)]
struct Api {
    version: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
struct Span {
    start: u64,
    len: u64,
}

#[repr(C)]
struct Register {
    span: Span,
    mode: u64,
    ioctls: u64,
}

#[repr(C)]
struct Protect {
    span: Span,
    mode: u64,
}

#[repr(C)]
#[derive(Default)]
struct Scan {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

/// The memory of this process. Dropped, all of it is unprotected again.
pub(super) struct Process {
    uffd: OwnedFd,
    pagemap: File,
    maker: Maker,
    owners: &'static Owners,
    skips_tables: bool,
}

impl Process {
    /// # Errors
    /// [`PagemapError::Unsupported`].
    pub(super) fn new() -> Result<Self, PagemapError> {
        // Faults are resolved by the kernel, so none is ever handed to us: those of the kernel do
        // not matter, and no privilege is needed.
        let flags = libc::O_CLOEXEC | libc::O_NONBLOCK | UFFD_USER_MODE_ONLY;
        // SAFETY: this call takes a number and touches no memory of ours.
        let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) };
        let unsupported = |feature| move |error| PagemapError::Unsupported { feature, error };
        let fd = i32::try_from(fd)
            .ok()
            .filter(|fd| *fd >= 0)
            .ok_or_else(io::Error::last_os_error)
            .map_err(unsupported("userfaultfd"))?;
        // SAFETY: the descriptor was just opened, and no other code has it.
        let uffd = unsafe { OwnedFd::from_raw_fd(fd) };
        let mut api = Api {
            version: VERSION,
            features: FEATURE_PAGEFAULT_FLAG_WP
                | FEATURE_WP_HUGETLBFS_SHMEM
                | FEATURE_WP_UNPOPULATED
                | FEATURE_WP_ASYNC,
            ioctls: 0,
        };
        // SAFETY: the call reads and writes the one struct that it is given.
        check(unsafe { libc::ioctl(uffd.as_raw_fd(), UFFDIO_API, &mut api) })
            .map_err(unsupported("UFFD_FEATURE_WP_ASYNC"))?;
        let pagemap = File::open("/proc/self/pagemap").map_err(unsupported("pagemap"))?;
        let maker = Maker::new().map_err(unsupported("MADV_WIPEONFORK"))?;
        let mut process = Process {
            uffd,
            pagemap,
            maker,
            owners: owners::of_this_process().map_err(unsupported("MADV_WIPEONFORK"))?,
            skips_tables: true,
        };
        // An empty range: asks whether the kernel knows the call.
        process
            .scan((0, 0), Find::Written, false, &mut [Region::default()])
            .map_err(unsupported("PAGEMAP_SCAN"))?;
        process.skips_tables = process.is_skipped().unwrap_or(true);
        Ok(process)
    }

    /// Whether the scan skips a page table that is not there: that of memory which was just mapped,
    /// and is as large as two tables, so that one of them has nothing else.
    fn is_skipped(&self) -> io::Result<bool> {
        let page = host::page().bytes();
        let table = table_bytes(page);
        let scratch = Scratch::new(table.saturating_mul(2))?;
        let start = (scratch.start()).next_multiple_of(table);
        self.register(start, table)?;
        let mut found = [Region::default()];
        let span = (start, start + table);
        let scanned = self.scan(span, Find::Written, false, &mut found)?;
        Ok(scanned.regions != 1 || found[0].start != span.0 || found[0].end != span.1)
    }

    /// As a kernel that skips tables.
    #[cfg(test)]
    pub(super) fn that_skips_tables() -> Result<Self, PagemapError> {
        let mut process = Process::new()?;
        process.skips_tables = true;
        Ok(process)
    }
}

/// Bytes that one page table maps: it is a page of entries of 8 bytes.
pub(super) fn table_bytes(page: u64) -> u64 {
    page.saturating_mul(page / 8)
}

/// A mapping of which no byte is used.
struct Scratch(NonNull<libc::c_void>, usize);

impl Scratch {
    fn new(bytes: u64) -> io::Result<Self> {
        let len = usize::try_from(bytes).map_err(|_| io::ErrorKind::OutOfMemory)?;
        // SAFETY: a new mapping, at an address of the kernel's choice.
        let address = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        match NonNull::new(address) {
            Some(start) if address != libc::MAP_FAILED => Ok(Scratch(start, len)),
            _ => Err(io::Error::last_os_error()),
        }
    }

    fn start(&self) -> u64 {
        self.0.addr().get() as u64
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // SAFETY: the mapping of `new`, of this length, to which nothing refers.
        unsafe { libc::munmap(self.0.as_ptr(), self.1) };
    }
}

impl Kernel for Process {
    fn of_another_process(&self) -> Option<u32> {
        self.maker.of_another_process()
    }

    fn owners(&self) -> &Owners {
        self.owners
    }

    fn not_private(&self, start: u64, end: u64) -> io::Result<Option<u64>> {
        maps::not_private(&std::fs::read("/proc/self/maps")?, start, end)
    }

    fn skips_tables(&self) -> bool {
        self.skips_tables
    }

    /// By `move_pages`, which moves nothing when it is not told where to: one call for many pages.
    fn probe(&self, pages: &[u64], there: &mut [i32]) {
        there.fill(-1);
        let mut addresses = [std::ptr::null::<libc::c_void>(); PROBES];
        for (address, page) in addresses.iter_mut().zip(pages) {
            *address = std::ptr::with_exposed_provenance(*page as usize);
        }
        let count = pages.len().min(there.len()).min(PROBES);
        // SAFETY:
        // - the call reads `count` addresses, and writes as many numbers: both have them;
        // - without a list of nodes it looks, and changes nothing.
        // An error leaves the numbers as they are, which say nothing.
        unsafe {
            libc::syscall(
                libc::SYS_move_pages,
                0,
                count,
                addresses.as_ptr(),
                std::ptr::null::<libc::c_int>(),
                there.as_mut_ptr(),
                0,
            )
        };
    }

    fn register(&self, start: u64, len: u64) -> io::Result<()> {
        let mut register = Register {
            span: Span { start, len },
            mode: REGISTER_MODE_WP,
            ioctls: 0,
        };
        // SAFETY:
        // - the call reads and writes the one struct that it is given;
        // - memory that is registered so keeps its contents and its rights: a write to a protected
        //   page is let through by the kernel.
        check(unsafe { libc::ioctl(self.uffd.as_raw_fd(), UFFDIO_REGISTER, &mut register) })
    }

    fn unregister(&self, start: u64, len: u64) -> io::Result<()> {
        let mut span = Span { start, len };
        // SAFETY: the call reads the one struct that it is given; memory keeps its contents and its
        // rights.
        check(unsafe { libc::ioctl(self.uffd.as_raw_fd(), UFFDIO_UNREGISTER, &mut span) })
    }

    fn protect(&self, start: u64, len: u64, on: bool) -> io::Result<()> {
        let mut protect = Protect {
            span: Span { start, len },
            mode: if on { WRITEPROTECT_MODE_WP } else { 0 },
        };
        // SAFETY: as for `register`.
        check(unsafe { libc::ioctl(self.uffd.as_raw_fd(), UFFDIO_WRITEPROTECT, &mut protect) })
    }

    fn scan(
        &self,
        (start, end): (u64, u64),
        find: Find,
        protect: bool,
        out: &mut [Region],
    ) -> io::Result<Scanned> {
        // The kernel scans for the first mask, alone, three times as fast as for any other.
        let (inverted, mask) = match find {
            Find::Written => (0, PAGE_IS_WRITTEN),
            Find::Nothing => {
                let nothing = PAGE_IS_PRESENT | PAGE_IS_SWAPPED;
                (nothing, nothing)
            }
        };
        let mut scan = Scan {
            size: size_of::<Scan>() as u64,
            // Memory that is not registered must not pass for clean.
            flags: SCAN_CHECK_WPASYNC | if protect { SCAN_WP_MATCHING } else { 0 },
            start,
            end,
            vec: out.as_mut_ptr().expose_provenance() as u64,
            vec_len: out.len() as u64,
            category_inverted: inverted,
            category_mask: mask,
            return_mask: mask,
            ..Scan::default()
        };
        // SAFETY:
        // - the call reads and writes the one struct that it is given;
        // - it writes at most `vec_len` regions to `vec`, which has them;
        // - protection changes nothing that the program sees, as for `register`.
        let regions = unsafe { libc::ioctl(self.pagemap.as_raw_fd(), PAGEMAP_SCAN, &mut scan) };
        check(regions)?;
        Ok(Scanned {
            regions: usize::try_from(regions).unwrap_or(0).min(out.len()),
            walk_end: scan.walk_end,
        })
    }

    fn is_mapped(&self, start: u64, len: u64) -> bool {
        let Ok(len) = usize::try_from(len) else {
            return false;
        };
        // SAFETY: in this form the call only looks whether the pages are mapped.
        let seen = unsafe {
            libc::msync(
                std::ptr::with_exposed_provenance_mut(start as usize),
                len,
                libc::MS_ASYNC,
            )
        };
        seen == 0
    }
}

/// Some calls return a count.
fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
