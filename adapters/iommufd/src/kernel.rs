//! The calls of the kernel, and nothing else: what is unsafe about the page tables is here.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use dirtymap::{Access, Granule, Iova, IovaRange, Mapping};
use dirtymap_host::Maker;

use crate::error::{IommufdError, TRIES};
use crate::uapi::{self, Sized32, Span};

/// The calls of the kernel that the logic of the adapter needs. Tests have an implementation of
/// their own.
pub(crate) trait Kernel: Send + Sync {
    /// The descriptor that devices are bound to.
    fn fd(&self) -> Option<BorrowedFd<'_>>;

    /// IOMMU_IOAS_ALLOC: the number of a new IOAS.
    fn ioas_alloc(&self) -> io::Result<u32>;

    /// IOMMU_DESTROY.
    fn destroy(&self, id: u32) -> io::Result<()>;

    /// IOMMU_IOAS_IOVA_RANGES: how many ranges there are, and the alignment. Fills `spans` as far
    /// as it goes.
    fn iova_ranges(&self, ioas: u32, spans: &mut [Span]) -> io::Result<(usize, u64)>;

    /// IOMMU_OPTION_HUGE_PAGES, off: leaves are as small as a page of the host.
    fn small_pages(&self, ioas: u32) -> io::Result<()>;

    /// IOMMU_IOAS_MAP at fixed addresses.
    fn map(&self, ioas: u32, mapping: &Mapping) -> io::Result<()>;

    /// IOMMU_IOAS_UNMAP of one mapping.
    fn unmap(&self, ioas: u32, range: IovaRange) -> io::Result<()>;

    /// IOMMU_HWPT_ALLOC with dirty tracking: the number of the new page table.
    fn hwpt_alloc(&self, device: u32, ioas: u32) -> io::Result<u32>;

    /// IOMMU_HWPT_SET_DIRTY_TRACKING. Switched on, all leaves become clean, even if it was on.
    fn track(&self, hwpt: u32, on: bool) -> io::Result<()>;

    /// IOMMU_HWPT_GET_DIRTY_BITMAP: sets a bit of `bits` for each page of `range` that was
    /// written. `clear` makes them clean, and flushes. `bits` has one bit for each page.
    fn dirty(
        &self,
        hwpt: u32,
        range: IovaRange,
        page: Granule,
        clear: bool,
        bits: &mut [u64],
    ) -> io::Result<()>;
}

/// Makes a call again when a signal interrupted it.
pub(crate) fn uninterrupted<T>(mut call: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    let mut tries = 1;
    loop {
        match call() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted && tries < TRIES => tries += 1,
            done => return done,
        }
    }
}

/// A file of iommufd.
#[derive(Debug)]
pub(crate) struct Iommu {
    fd: OwnedFd,
    maker: Maker,
}

pub(crate) const PATH: &str = "/dev/iommu";

impl Iommu {
    pub(crate) fn open() -> Result<Self, IommufdError> {
        let file = uninterrupted(|| File::options().read(true).write(true).open(PATH));
        Self::new(file.map_err(open_error)?.into())
    }

    pub(crate) fn new(fd: OwnedFd) -> Result<Self, IommufdError> {
        let maker = Maker::new().map_err(|error| IommufdError::call("MADV_WIPEONFORK", error))?;
        Ok(Iommu { fd, maker })
    }
}

/// Why the file was not opened.
pub(crate) fn open_error(error: io::Error) -> IommufdError {
    let path = PATH;
    match error.raw_os_error() {
        Some(libc::EACCES | libc::EPERM) => IommufdError::NoPermission { path, error },
        Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => IommufdError::NoIommufd { path, error },
        _ => IommufdError::call("the open of /dev/iommu", error),
    }
}

/// Makes a call that reads and writes one struct.
///
/// # Safety
/// The kernel reads and writes `arg`, and whatever memory its fields name: that must be right for
/// `call`.
pub(crate) unsafe fn ioctl<T: Sized32>(
    fd: BorrowedFd<'_>,
    call: libc::Ioctl,
    arg: &mut T,
) -> io::Result<()> {
    let arg: *mut T = arg;
    // SAFETY: as promised by the caller; the first field of `arg` is its size.
    match unsafe { libc::ioctl(fd.as_raw_fd(), call, arg) } {
        0.. => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

impl Iommu {
    /// The file, for a call.
    ///
    /// # Errors
    /// In a child of `fork`, where the kernel would clear pages that the parent needs, and write
    /// the bits into the memory of the child.
    fn here(&self) -> io::Result<BorrowedFd<'_>> {
        match self.maker.of_another_process() {
            None => Ok(self.fd.as_fd()),
            Some(maker) => Err(io::Error::other(format!(
                "this process is a child of {maker}, which opened iommufd: use it there, or open \
                 another one"
            ))),
        }
    }

    /// A call whose struct names no memory of this process.
    fn plain<T: Sized32>(&self, call: libc::Ioctl, arg: &mut T) -> io::Result<()> {
        // SAFETY: the calls of this file that come here name numbers of objects, and addresses of
        // devices.
        unsafe { ioctl(self.here()?, call, arg) }
    }
}

/// First address and length, as iommufd takes them.
fn span(range: IovaRange) -> io::Result<(u64, u64)> {
    let len = u64::try_from(range.len()).map_err(|_| io::Error::from_raw_os_error(libc::EOVERFLOW));
    Ok((range.start().get(), len?))
}

impl Kernel for Iommu {
    fn fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.fd.as_fd())
    }

    fn ioas_alloc(&self) -> io::Result<u32> {
        let mut arg = uapi::IoasAlloc {
            size: uapi::IoasAlloc::SIZE,
            flags: 0,
            out_ioas_id: 0,
        };
        self.plain(uapi::IOAS_ALLOC, &mut arg)?;
        Ok(arg.out_ioas_id)
    }

    fn destroy(&self, id: u32) -> io::Result<()> {
        let size = uapi::Destroy::SIZE;
        self.plain(uapi::DESTROY, &mut uapi::Destroy { size, id })
    }

    fn iova_ranges(&self, ioas: u32, spans: &mut [Span]) -> io::Result<(usize, u64)> {
        let mut arg = uapi::IovaRanges {
            size: uapi::IovaRanges::SIZE,
            ioas_id: ioas,
            num_iovas: u32::try_from(spans.len()).unwrap_or(u32::MAX),
            reserved: 0,
            allowed_iovas: spans.as_mut_ptr().expose_provenance() as u64,
            out_iova_alignment: 0,
        };
        // SAFETY: the kernel writes at most `num_iovas` pairs to `spans`, which has as many.
        match unsafe { ioctl(self.here()?, uapi::IOAS_IOVA_RANGES, &mut arg) } {
            Err(error) if error.raw_os_error() != Some(libc::EMSGSIZE) => Err(error),
            // EMSGSIZE: there are more; the number and the alignment are right all the same.
            _ => Ok((arg.num_iovas as usize, arg.out_iova_alignment)),
        }
    }

    fn small_pages(&self, ioas: u32) -> io::Result<()> {
        let mut arg = uapi::IommuOption {
            size: uapi::IommuOption::SIZE,
            option_id: uapi::OPTION_HUGE_PAGES,
            op: uapi::OPTION_SET,
            reserved: 0,
            object_id: ioas,
            val64: 0,
        };
        self.plain(uapi::OPTION, &mut arg)
    }

    fn map(&self, ioas: u32, mapping: &Mapping) -> io::Result<()> {
        let (iova, length) = span(mapping.range)?;
        let rights = match mapping.access {
            Access::Read => uapi::MAP_READABLE,
            Access::Write => uapi::MAP_WRITEABLE,
            Access::ReadWrite => uapi::MAP_READABLE | uapi::MAP_WRITEABLE,
        };
        let mut arg = uapi::IoasMap {
            size: uapi::IoasMap::SIZE,
            flags: uapi::MAP_FIXED_IOVA | rights,
            ioas_id: ioas,
            reserved: 0,
            user_va: mapping.backing,
            length,
            iova,
        };
        // SAFETY: the kernel pins the memory and lets devices reach it; the caller of `Ioas::new`
        // promised that devices may.
        unsafe { ioctl(self.here()?, uapi::IOAS_MAP, &mut arg) }
    }

    fn unmap(&self, ioas: u32, range: IovaRange) -> io::Result<()> {
        let (iova, length) = span(range)?;
        let mut arg = uapi::IoasUnmap {
            size: uapi::IoasUnmap::SIZE,
            ioas_id: ioas,
            iova,
            length,
        };
        self.plain(uapi::IOAS_UNMAP, &mut arg)
    }

    fn hwpt_alloc(&self, device: u32, ioas: u32) -> io::Result<u32> {
        let mut arg = uapi::HwptAlloc {
            size: uapi::HwptAlloc::SIZE,
            flags: uapi::ALLOC_DIRTY_TRACKING,
            dev_id: device,
            pt_id: ioas,
            out_hwpt_id: 0,
            reserved: 0,
            data_type: 0,
            data_len: 0,
            data_uptr: 0,
        };
        self.plain(uapi::HWPT_ALLOC, &mut arg)?;
        Ok(arg.out_hwpt_id)
    }

    fn track(&self, hwpt: u32, on: bool) -> io::Result<()> {
        let mut arg = uapi::SetDirtyTracking {
            size: uapi::SetDirtyTracking::SIZE,
            flags: if on { uapi::DIRTY_TRACKING_ENABLE } else { 0 },
            hwpt_id: hwpt,
            reserved: 0,
        };
        self.plain(uapi::HWPT_SET_DIRTY_TRACKING, &mut arg)
    }

    fn dirty(
        &self,
        hwpt: u32,
        range: IovaRange,
        page: Granule,
        clear: bool,
        bits: &mut [u64],
    ) -> io::Result<()> {
        if range.granules(page) > bits.len() as u128 * 64 {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let (iova, length) = span(range)?;
        let mut arg = uapi::GetDirtyBitmap {
            size: uapi::GetDirtyBitmap::SIZE,
            hwpt_id: hwpt,
            flags: if clear { 0 } else { uapi::NO_CLEAR },
            reserved: 0,
            iova,
            length,
            page_size: page.bytes(),
            data: bits.as_mut_ptr().expose_provenance() as u64,
        };
        // SAFETY: the kernel sets bits of `data`, one for each page of `range`; there are as many.
        // A leaf extends past no range that comes here: see "Pieces" in the crate.
        unsafe { ioctl(self.here()?, uapi::HWPT_GET_DIRTY_BITMAP, &mut arg) }?;
        // The kernel's words are little endian.
        bits.iter_mut().for_each(|word| *word = u64::from_le(*word));
        Ok(())
    }
}

/// The ranges of `spans` that are ranges.
pub(crate) fn ranges(spans: &[Span]) -> Vec<IovaRange> {
    let range = |span: &Span| IovaRange::new(Iova::new(span.start), Iova::new(span.last)).ok();
    spans.iter().filter_map(range).collect()
}
