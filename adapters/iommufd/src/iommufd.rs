//! The file of iommufd.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use dirtymap::sync::{Mutex, MutexGuard, lock};

use crate::error::IommufdError;
use crate::kernel::{Iommu, Kernel};

/// The open file `/dev/iommu`. Clones are the same file.
#[derive(Clone)]
pub struct Iommufd(Arc<File>);

struct File {
    kernel: Box<dyn Kernel>,
    /// Which page table each device uses, by their numbers: devices that were attached here.
    devices: Mutex<BTreeMap<u32, u32>>,
}

impl Iommufd {
    /// Opens `/dev/iommu`.
    ///
    /// # Errors
    /// [`IommufdError::NoIommufd`], [`IommufdError::NoPermission`].
    pub fn open() -> Result<Self, IommufdError> {
        Ok(Self::over(Iommu::open()?))
    }

    /// An open file `/dev/iommu`, such as one that a manager of devices hands over.
    ///
    /// # Errors
    /// [`IommufdError::Call`] if the kernel is older than 4.14.
    pub fn from_fd(fd: std::os::fd::OwnedFd) -> Result<Self, IommufdError> {
        Ok(Self::over(Iommu::new(fd)?))
    }

    pub(crate) fn over(kernel: impl Kernel + 'static) -> Self {
        Iommufd(Arc::new(File {
            kernel: Box::new(kernel),
            devices: Mutex::new(BTreeMap::new()),
        }))
    }

    pub(crate) fn kernel(&self) -> &dyn Kernel {
        &*self.0.kernel
    }

    /// Which page table each device uses.
    pub(crate) fn devices(&self) -> MutexGuard<'_, BTreeMap<u32, u32>> {
        lock(&self.0.devices)
    }
}

impl fmt::Debug for Iommufd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Iommufd").finish_non_exhaustive()
    }
}
