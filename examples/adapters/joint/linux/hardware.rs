//! A device of this machine behind its IOMMU, by iommufd, if one is given: its page table is one
//! more source of the lease. The program has no driver for the device, so it cannot make it write.

use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use dirtymap::bitmap::Sink;
use dirtymap::source::{FlushCost, FlushGather, Invalidated, LeafSink, Stopped};
use dirtymap::{DirtySource, Error, Iova, IovaRange, Mapping, Tracking};
use dirtymap_iommufd::{Hwpt, Ioas, IoasOptions, Iommufd, IommufdError, VfioDevice};
use pagetable_sim::Domain;

/// A device and the page table that it is to use.
pub(crate) struct Hardware {
    pub(crate) table: Arc<Hwpt>,
    pub(crate) device: VfioDevice,
}

impl Hardware {
    /// The device at `path`, or the reason for which there is none.
    ///
    /// # Safety
    /// What the address space of its page table maps is memory that devices may write at any time,
    /// until it is unmapped.
    pub(crate) unsafe fn open(path: Option<&Path>) -> Result<Result<Self, String>, IommufdError> {
        let iommufd = match Iommufd::open() {
            Ok(iommufd) => iommufd,
            Err(error) => return Ok(Err(error.to_string())),
        };
        let Some(path) = path else {
            return Ok(Err(
                "no device is given: --vfio /dev/vfio/devices/NAME".into()
            ));
        };
        let file = match File::options().read(true).write(true).open(path) {
            Ok(file) => file,
            Err(error) => return Ok(Err(format!("{}: {error}", path.display()))),
        };
        let device = VfioDevice::bind(file.into(), &iommufd)?;
        // SAFETY: as promised by the caller.
        let ioas = unsafe { Ioas::new(&iommufd, IoasOptions::default()) }?;
        let table = ioas.hwpt(device.id())?;
        Ok(Ok(Hardware { table, device }))
    }

    /// The device may reach what is mapped. Called when the space tracks.
    pub(crate) fn attach(&self) -> Result<(), IommufdError> {
        self.table.attach(&self.device)
    }
}

impl Drop for Hardware {
    fn drop(&mut self) {
        // Before its file is closed. If it fails, closing the file detaches it.
        let _ = self.table.detach(&self.device);
    }
}

/// The simulated IOMMU, whose memory begins at address 0. Areas are backed by addresses of this
/// process, as iommufd needs them: `base` is that of the first one.
pub(crate) struct Rebased {
    pub(crate) domain: Arc<Domain>,
    pub(crate) base: u64,
}

impl DirtySource for Rebased {
    fn page(&self) -> dirtymap::Granule {
        self.domain.page()
    }

    fn map(&self, mapping: &Mapping) -> Result<(), Error> {
        self.domain.map(&Mapping {
            backing: mapping.backing - self.base,
            ..*mapping
        })
    }

    fn unmap(&self, range: IovaRange, gather: &mut FlushGather, dirty: &mut dyn FnMut(IovaRange)) {
        self.domain.unmap(range, gather, dirty);
    }

    fn split_at(&self, at: Iova, gather: &mut FlushGather) -> Result<(), Error> {
        self.domain.split_at(at, gather)
    }

    fn set_tracking(&self, to: Tracking) -> Result<(), Error> {
        self.domain.set_tracking(to)
    }

    fn read_and_clear(&self, range: IovaRange, out: &mut LeafSink<'_, '_>) -> Result<(), Stopped> {
        self.domain.read_and_clear(range, out)
    }

    fn peek(&self, range: IovaRange, sink: &mut Sink<'_>) -> Result<(), Stopped> {
        self.domain.peek(range, sink)
    }

    fn invalidate(&self, gather: &FlushGather) -> Result<Invalidated, Error> {
        self.domain.invalidate(gather)
    }

    fn flush_cost(&self) -> FlushCost {
        self.domain.flush_cost()
    }
}
