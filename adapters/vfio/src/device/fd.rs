//! The log of a VFIO device, by the calls of the kernel.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use dirtymap::{Granule, IovaRange};
use dirtymap_host::Maker;
use vfio_bindings::bindings::vfio::{
    VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT, VFIO_DEVICE_FEATURE_DMA_LOGGING_START,
    VFIO_DEVICE_FEATURE_DMA_LOGGING_STOP, VFIO_DEVICE_FEATURE_GET, VFIO_DEVICE_FEATURE_SET,
    vfio_device_feature_dma_logging_control, vfio_device_feature_dma_logging_range,
    vfio_device_feature_dma_logging_report,
};

use super::LoggingDevice;

/// `VFIO_DEVICE_FEATURE`, `_IO(';', 117)`.
const DEVICE_FEATURE: libc::Ioctl = ((b';' as u32) << 8 | 117) as libc::Ioctl;

/// A VFIO device by its file: one of `/dev/vfio/devices`, or one that its group returned.
#[derive(Debug)]
pub struct VfioDeviceFd {
    fd: OwnedFd,
    maker: Maker,
}

/// `struct vfio_device_feature` with its payload.
#[repr(C)]
struct Feature<T> {
    argsz: u32,
    flags: u32,
    payload: T,
}

/// The payloads that are used here: structs of the kernel's interface of a multiple of 8 bytes, so
/// that no padding comes before them.
trait Payload {}

impl Payload for vfio_device_feature_dma_logging_control {}
impl Payload for vfio_device_feature_dma_logging_report {}
impl Payload for () {}

impl VfioDeviceFd {
    /// A device by its open file, which the log keeps open.
    ///
    /// # Errors
    /// If the kernel is older than 4.14.
    pub fn new(fd: OwnedFd) -> io::Result<Self> {
        let maker = Maker::new()?;
        Ok(VfioDeviceFd { fd, maker })
    }

    /// Makes the call `feature`. A child of `fork` is refused, because the call would clear a log
    /// that its parent needs.
    ///
    /// # Safety
    /// The memory that the fields of `payload` name is right for `feature`.
    unsafe fn call<T: Payload>(&self, direction: u32, feature: u32, payload: T) -> io::Result<T> {
        if let Some(maker) = self.maker.of_another_process() {
            return Err(io::Error::other(format!(
                "this process is a child of {maker}, which opened the device: use it there"
            )));
        }
        let mut arg = Feature {
            argsz: u32::try_from(size_of::<Feature<T>>()).unwrap_or(u32::MAX),
            flags: direction | feature,
            payload,
        };
        let pointer: *mut Feature<T> = &mut arg;
        // SAFETY: the kernel reads and writes `argsz` bytes of `arg`, all of it, and the memory
        // that the caller has promised to be right.
        match unsafe { libc::ioctl(self.fd.as_raw_fd(), DEVICE_FEATURE, pointer) } {
            0.. => Ok(arg.payload),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

/// The length of a range. All 2^64 addresses are more than a log has.
fn length(range: IovaRange) -> io::Result<u64> {
    u64::try_from(range.len()).map_err(|_| io::Error::from_raw_os_error(libc::EOVERFLOW))
}

impl LoggingDevice for VfioDeviceFd {
    fn start(&self, page: Granule, ranges: &[IovaRange]) -> io::Result<u64> {
        let mut theirs = Vec::with_capacity(ranges.len());
        for range in ranges {
            theirs.push(vfio_device_feature_dma_logging_range {
                iova: range.start().get(),
                length: length(*range)?,
            });
        }
        let too_many = |_| io::Error::from_raw_os_error(libc::E2BIG);
        let control = vfio_device_feature_dma_logging_control {
            page_size: page.bytes(),
            num_ranges: u32::try_from(theirs.len()).map_err(too_many)?,
            __reserved: 0,
            ranges: theirs.as_ptr().expose_provenance() as u64,
        };
        let feature = VFIO_DEVICE_FEATURE_DMA_LOGGING_START;
        // SAFETY: `ranges` has `num_ranges` ranges, which the kernel reads before it returns.
        let control = unsafe { self.call(VFIO_DEVICE_FEATURE_SET, feature, control) }?;
        Ok(control.page_size)
    }

    fn report(&self, range: IovaRange, page: Granule, bits: &mut [u64]) -> io::Result<()> {
        if range.granules(page) > bits.len() as u128 * 64 {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let report = vfio_device_feature_dma_logging_report {
            iova: range.start().get(),
            length: length(range)?,
            page_size: page.bytes(),
            bitmap: bits.as_mut_ptr().expose_provenance() as u64,
        };
        let feature = VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT;
        // SAFETY: `bitmap` has a bit for each page of the range, as was checked.
        unsafe { self.call(VFIO_DEVICE_FEATURE_GET, feature, report) }?;
        // The kernel's words are little endian.
        bits.iter_mut().for_each(|word| *word = u64::from_le(*word));
        Ok(())
    }

    fn stop(&self) -> io::Result<()> {
        let feature = VFIO_DEVICE_FEATURE_DMA_LOGGING_STOP;
        // SAFETY: no memory is named.
        unsafe { self.call(VFIO_DEVICE_FEATURE_SET, feature, ()) }
    }
}

impl AsFd for VfioDeviceFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_structs_are_as_large_as_the_kernel_says() {
        assert_eq!(
            size_of::<Feature<vfio_device_feature_dma_logging_control>>(),
            32
        );
        assert_eq!(
            size_of::<Feature<vfio_device_feature_dma_logging_report>>(),
            40
        );
        assert_eq!(size_of::<Feature<()>>(), 8);
    }

    /// A file that is no VFIO device refuses every call, and says so.
    #[test]
    #[allow(clippy::unwrap_used)]
    fn a_file_that_is_no_device_has_no_log() {
        let file = std::fs::File::open("/dev/null").unwrap();
        let device = VfioDeviceFd::new(file.into()).unwrap();
        let page = Granule::K4;
        let range = IovaRange::granule_at(dirtymap::Iova::MIN, Granule::M2);
        let no_log = |error: io::Error| assert_eq!(error.raw_os_error(), Some(libc::ENOTTY));
        no_log(device.start(page, &[range]).unwrap_err());
        no_log(device.report(range, page, &mut [0; 8]).unwrap_err());
        no_log(device.stop().unwrap_err());
        let short = device.report(range, page, &mut [0; 7]).unwrap_err();
        assert_eq!(short.kind(), io::ErrorKind::InvalidInput);
        let all = device.start(page, &[IovaRange::ALL]).unwrap_err();
        assert_eq!(all.raw_os_error(), Some(libc::EOVERFLOW));
    }
}
