//! Devices that use a page table.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use crate::error::IommufdError;
use crate::iommufd::Iommufd;
use crate::kernel::{ioctl, uninterrupted};
use crate::uapi::{self, Sized32};

/// A device that is bound to iommufd. [`VfioDevice`] is one; implement it for handles of your own.
pub trait Device {
    /// Its number in iommufd.
    fn id(&self) -> u32;

    /// Lets the device use the page table `hwpt`, by one step if it used another one until then.
    ///
    /// # Errors
    /// If the kernel refuses; then the device uses the one that it used before.
    fn attach(&self, hwpt: u32) -> io::Result<()>;

    /// Ends the use of the page table: the device reaches no memory.
    ///
    /// # Errors
    /// If the kernel refuses.
    fn detach(&self) -> io::Result<()>;
}

/// A device of VFIO, by its file in `/dev/vfio/devices`.
#[derive(Debug)]
pub struct VfioDevice {
    fd: OwnedFd,
    id: u32,
}

impl VfioDevice {
    /// Binds the device to iommufd (`VFIO_DEVICE_BIND_IOMMUFD`). That ends with the file.
    ///
    /// # Errors
    /// [`IommufdError::Unsupported`] if the file is not one of a VFIO device;
    /// [`IommufdError::Call`] if the kernel refuses: the device is bound elsewhere (`EINVAL`), or
    /// belongs to a group that is not free (`EPERM`, `EBUSY`).
    pub fn bind(fd: OwnedFd, iommufd: &Iommufd) -> Result<Self, IommufdError> {
        let call = "VFIO_DEVICE_BIND_IOMMUFD";
        let iommu = iommufd.kernel().fd().map(|fd| fd.as_raw_fd());
        let mut arg = uapi::VfioBind {
            size: uapi::VfioBind::SIZE,
            flags: 0,
            iommufd: iommu.unwrap_or(-1),
            out_devid: 0,
        };
        // SAFETY: the struct names no memory, only the descriptor of iommufd, which is open.
        uninterrupted(|| unsafe { ioctl(fd.as_fd(), uapi::VFIO_BIND_IOMMUFD, &mut arg) })
            .map_err(|error| IommufdError::call(call, error))?;
        Ok(VfioDevice {
            fd,
            id: arg.out_devid,
        })
    }

    /// The number of the device in iommufd, for [`Ioas::hwpt`](crate::Ioas::hwpt).
    pub fn id(&self) -> u32 {
        self.id
    }
}

impl AsFd for VfioDevice {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Device for VfioDevice {
    fn id(&self) -> u32 {
        self.id
    }

    fn attach(&self, hwpt: u32) -> io::Result<()> {
        let mut arg = uapi::VfioAttach {
            size: uapi::VfioAttach::SIZE,
            flags: 0,
            pt_id: hwpt,
        };
        // SAFETY: the struct names no memory. What the device reaches by the page table was
        // promised to `Ioas::new`.
        unsafe { ioctl(self.fd.as_fd(), uapi::VFIO_ATTACH_IOMMUFD_PT, &mut arg) }
    }

    fn detach(&self) -> io::Result<()> {
        let mut arg = uapi::VfioDetach {
            size: uapi::VfioDetach::SIZE,
            flags: 0,
        };
        // SAFETY: the struct names no memory, and the device reaches less than before.
        unsafe { ioctl(self.fd.as_fd(), uapi::VFIO_DETACH_IOMMUFD_PT, &mut arg) }
    }
}
