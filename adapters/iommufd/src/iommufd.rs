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
    /// [`IommufdError::NoIommufd`], [`IommufdError::NoPermission`]; [`IommufdError::Call`] for
    /// another reason, such as no free descriptor.
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

    /// Forgets a device, by its number in iommufd, whose last file was closed while it used a page
    /// table: by that, the kernel has detached it. Until this call, and as far as another domain
    /// keeps memory mapped, flushes fail with
    /// [`IommufdError::DevicesAttached`](crate::IommufdError::DevicesAttached). Returns whether it
    /// was known.
    ///
    /// For a device that is still attached, in this process or another one, this loses writes: it
    /// goes on to reach memory, and no table is asked. Use [`Hwpt::detach`](crate::Hwpt::detach)
    /// for these.
    pub fn forget_device(&self, device: u32) -> bool {
        self.devices().remove(&device).is_some()
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
