//! Ranges as they come over the wire.

use dirtymap::{Iova, IovaRange, RangeError, ToIovaRange};

/// A range of device addresses as VFIO and vfio-user write it: not checked yet.
///
/// ```
/// use dirtymap::ToIovaRange;
/// use dirtymap_vfio::DmaRange;
///
/// let range = DmaRange { iova: 0x1000, length: 0x2000 };
/// assert_eq!(range.to_iova_range(), (0x1000..0x3000).to_iova_range());
/// assert!(DmaRange { iova: 0, length: 0 }.to_iova_range().is_err());
/// assert!(DmaRange { iova: u64::MAX, length: 2 }.to_iova_range().is_err());
/// ```
#[doc(alias = "vfio_device_feature_dma_logging_range")]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DmaRange {
    /// The first address.
    pub iova: u64,
    /// The length in bytes.
    pub length: u64,
}

impl ToIovaRange for DmaRange {
    fn to_iova_range(self) -> Result<IovaRange, RangeError> {
        IovaRange::from_len(Iova::new(self.iova), self.length)
    }
}

#[cfg(all(target_os = "linux", feature = "vfio-ioctls"))]
impl From<vfio_ioctls::DmaLoggingRange> for DmaRange {
    fn from(range: vfio_ioctls::DmaLoggingRange) -> Self {
        DmaRange {
            iova: range.iova,
            length: range.length,
        }
    }
}
