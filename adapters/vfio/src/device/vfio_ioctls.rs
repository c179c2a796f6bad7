//! The devices of the crate vfio-ioctls.

use std::io;

use dirtymap::{Granule, IovaRange};
use vfio_ioctls::{DmaLoggingRange, VfioDevice, VfioError};

use super::LoggingDevice;

/// Each report of that crate allocates its words. [`VfioDeviceFd`](crate::VfioDeviceFd) does not.
impl LoggingDevice for VfioDevice {
    fn start(&self, page: Granule, ranges: &[IovaRange]) -> io::Result<u64> {
        let ranges: io::Result<Vec<_>> = ranges.iter().map(|range| theirs(*range)).collect();
        self.start_dma_logging(page.bytes(), &ranges?)
            .map_err(io_error)
    }

    fn report(&self, range: IovaRange, page: Granule, bits: &mut [u64]) -> io::Result<()> {
        let words = self
            .report_dma_logging(theirs(range)?, page.bytes())
            .map_err(io_error)?;
        for (mine, word) in bits.iter_mut().zip(words) {
            *mine |= u64::from_le(word);
        }
        Ok(())
    }

    fn stop(&self) -> io::Result<()> {
        self.stop_dma_logging().map_err(io_error)
    }
}

fn theirs(range: IovaRange) -> io::Result<DmaLoggingRange> {
    let length = u64::try_from(range.len());
    Ok(DmaLoggingRange {
        iova: range.start().get(),
        length: length.map_err(|_| io::Error::from_raw_os_error(libc::EOVERFLOW))?,
    })
}

/// The error of the kernel, if it is one.
fn io_error(error: VfioError) -> io::Error {
    match error {
        VfioError::VfioDeviceFeature(error) => io::Error::from_raw_os_error(error.errno()),
        error => io::Error::other(error),
    }
}
