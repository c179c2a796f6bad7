//! The mock IOMMU of iommufd's own tests, and iommufd itself, call by call.
//!
//! Every argument is a struct whose first word is its size; here it is made of its fields by their
//! offsets.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use dirtymap_iommufd::{Device, Iommufd};

/// The smallest page of the mock.
pub(crate) const GRANULE: u64 = 2048;
/// The first address that its devices reach.
pub(crate) const APERTURE: u64 = 16 << 20;

const DESTROY: u32 = 0x80;
const IOAS_ALLOC: u32 = 0x81;
const IOVA_RANGES: u32 = 0x84;
const IOAS_MAP: u32 = 0x85;
const IOAS_UNMAP: u32 = 0x86;
const OPTION: u32 = 0x87;
const HWPT_ALLOC: u32 = 0x89;
const SET_TRACKING: u32 = 0x8b;
const GET_DIRTY: u32 = 0x8c;
const TEST: u32 = 0xa0;

const OP_REPLACE: u32 = 10;
const OP_DEVICE: u32 = 12;
const OP_DIRTY: u32 = 13;

/// What is special about a mock device.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Flags {
    /// Its IOMMU cannot track.
    pub(crate) no_dirty: bool,
    /// Its IOMMU has leaves of 1 MiB. Newer mocks (7.3) have leaves of any power of two, as the
    /// memory is contiguous, and no such device: then it is one without this flag.
    pub(crate) huge: bool,
}

/// An argument of a call.
struct Arg([u64; 9]);

impl Arg {
    fn new(size: u32) -> Self {
        Arg([0; 9]).u32(0, size)
    }

    fn u32(mut self, at: usize, value: u32) -> Self {
        let shift = at % 8 * 8;
        self.0[at / 8] |= u64::from(value) << shift;
        self
    }

    fn u64(mut self, at: usize, value: u64) -> Self {
        self.0[at / 8] = value;
        self
    }

    fn get(&self, at: usize) -> u32 {
        (self.0[at / 8] >> (at % 8 * 8)) as u32
    }
}

/// An open file of iommufd.
pub(crate) struct Iommu(File);

impl Iommu {
    pub(crate) fn open() -> io::Result<Self> {
        Ok(Iommu(
            File::options().read(true).write(true).open("/dev/iommu")?,
        ))
    }

    /// The same file, for the adapter.
    pub(crate) fn adapter(&self) -> Result<Iommufd, Box<dyn std::error::Error>> {
        Ok(Iommufd::from_fd(OwnedFd::from(self.0.try_clone()?))?)
    }

    fn try_clone(&self) -> io::Result<Self> {
        Ok(Iommu(self.0.try_clone()?))
    }

    fn call(&self, number: u32, arg: &mut Arg) -> io::Result<()> {
        let request = (u64::from(b';') << 8 | u64::from(number)) as libc::Ioctl;
        // SAFETY: the kernel reads and writes the struct, which has the size that its first word
        // says, and the memory that the callers name by address: bitmaps of their size, and memory
        // of no Rust value.
        match unsafe { libc::ioctl(self.0.as_raw_fd(), request, arg.0.as_mut_ptr()) } {
            0.. => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    pub(crate) fn destroy(&self, id: u32) -> io::Result<()> {
        self.call(DESTROY, &mut Arg::new(8).u32(4, id))
    }

    pub(crate) fn ioas(&self) -> io::Result<u32> {
        let mut arg = Arg::new(12);
        self.call(IOAS_ALLOC, &mut arg)?;
        Ok(arg.get(8))
    }

    pub(crate) fn set_huge_pages(&self, ioas: u32, on: bool) -> io::Result<()> {
        let arg = Arg::new(24).u32(4, 1).u32(12, ioas).u64(16, on.into());
        self.call(OPTION, &mut { arg })
    }

    /// The ranges that can be mapped, and the alignment.
    pub(crate) fn usable(&self, ioas: u32) -> io::Result<(Vec<(u64, u64)>, u64)> {
        let mut ranges = vec![[0u64; 2]; 16];
        let at = ranges.as_mut_ptr().expose_provenance() as u64;
        let mut arg = Arg::new(32).u32(4, ioas).u32(8, 16).u64(16, at);
        self.call(IOVA_RANGES, &mut arg)?;
        ranges.truncate(arg.get(8) as usize);
        let pairs = ranges.iter().map(|[first, last]| (*first, *last));
        Ok((pairs.collect(), arg.0[3]))
    }

    /// Maps `length` bytes at `va`. The caller keeps the memory for as long as it is mapped.
    pub(crate) fn map(
        &self,
        ioas: u32,
        (iova, length): (u64, u64),
        va: u64,
        writeable: bool,
    ) -> io::Result<()> {
        let flags = 1 | 4 | if writeable { 2 } else { 0 };
        let arg = Arg::new(40).u32(4, flags).u32(8, ioas);
        self.call(IOAS_MAP, &mut arg.u64(16, va).u64(24, length).u64(32, iova))
    }

    /// Returns how many bytes went.
    pub(crate) fn unmap(&self, ioas: u32, iova: u64, length: u64) -> io::Result<u64> {
        let mut arg = Arg::new(24).u32(4, ioas).u64(8, iova).u64(16, length);
        self.call(IOAS_UNMAP, &mut arg)?;
        Ok(arg.0[2])
    }

    pub(crate) fn hwpt(&self, device: u32, ioas: u32, tracks: bool) -> io::Result<u32> {
        let flags = if tracks { 2 } else { 0 };
        let mut arg = Arg::new(40).u32(4, flags).u32(8, device).u32(12, ioas);
        self.call(HWPT_ALLOC, &mut arg)?;
        Ok(arg.get(16))
    }

    pub(crate) fn track(&self, hwpt: u32, flags: u32) -> io::Result<()> {
        self.call(SET_TRACKING, &mut Arg::new(16).u32(4, flags).u32(8, hwpt))
    }

    /// Reads dirty bits into the bitmap at `data`. The caller keeps memory there for all bits that
    /// the kernel may set: for the range, and for leaves that extend past it.
    pub(crate) fn dirty(&self, hwpt: u32, get: &Get) -> io::Result<()> {
        let arg = Arg::new(48)
            .u32(4, hwpt)
            .u32(8, get.flags)
            .u32(12, get.reserved);
        let arg = arg.u64(16, get.iova).u64(24, get.length);
        self.call(GET_DIRTY, &mut arg.u64(32, get.page_size).u64(40, get.data))
    }

    /// Lets the mock write to the granules of `bits` from `iova` on. Returns how many it counts.
    pub(crate) fn write(&self, hwpt: u32, iova: u64, bits: &[u64], count: u64) -> io::Result<u64> {
        assert!(count <= bits.len() as u64 * 64, "a bit for each granule");
        let at = bits.as_ptr().expose_provenance() as u64;
        let arg = Arg::new(72).u32(4, OP_DIRTY).u32(8, hwpt);
        let arg = arg.u64(24, iova).u64(32, count * GRANULE);
        let mut arg = arg.u64(40, GRANULE).u64(48, at);
        self.call(TEST, &mut arg)?;
        Ok(arg.0[7])
    }

    fn make_device(&self, ioas: u32, flags: Flags) -> io::Result<Arg> {
        let bits = u32::from(flags.no_dirty) | u32::from(flags.huge) << 1;
        let arg = Arg::new(72).u32(4, OP_DEVICE).u32(8, ioas);
        let mut arg = arg.u32(28, bits);
        self.call(TEST, &mut arg)?;
        Ok(arg)
    }

    /// A device of the mock, which at first uses a page table of its own without tracking.
    pub(crate) fn device(&self, ioas: u32, flags: Flags) -> io::Result<MockDevice> {
        let made = self.make_device(ioas, flags);
        let arg = match made.as_ref().map_err(io::Error::raw_os_error) {
            Err(Some(libc::EINVAL)) if flags.huge => {
                let flags = Flags {
                    huge: false,
                    ..flags
                };
                self.make_device(ioas, flags)?
            }
            _ => made?,
        };
        Ok(MockDevice {
            iommu: self.try_clone()?,
            stdev: arg.get(16),
            id: arg.get(24),
        })
    }
}

/// The arguments of a read of dirty bits.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Get {
    pub(crate) iova: u64,
    pub(crate) length: u64,
    pub(crate) page_size: u64,
    pub(crate) flags: u32,
    pub(crate) reserved: u32,
    pub(crate) data: u64,
}

/// A device of the mock.
pub(crate) struct MockDevice {
    iommu: Iommu,
    stdev: u32,
    id: u32,
}

impl Device for MockDevice {
    fn id(&self) -> u32 {
        self.id
    }

    fn attach(&self, hwpt: u32) -> io::Result<()> {
        let arg = Arg::new(72).u32(4, OP_REPLACE).u32(8, self.stdev);
        self.iommu.call(TEST, &mut arg.u32(16, hwpt))
    }

    fn detach(&self) -> io::Result<()> {
        self.iommu.destroy(self.stdev)
    }
}

/// The number of an error; 0 for none.
pub(crate) fn errno<T>(done: &io::Result<T>) -> i32 {
    done.as_ref()
        .err()
        .map_or(0, |error| error.raw_os_error().unwrap_or(-1))
}
