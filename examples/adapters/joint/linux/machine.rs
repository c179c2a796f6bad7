//! The machine: one address space over all sources of dirty pages.

use std::io;
use std::path::Path;
use std::sync::Arc;

use dirtymap::{Access, AddressSpace, DomainId, Granule, Iova, IovaRange};
use dirtymap_iommufd::IommufdError;
use dirtymap_kvm::KvmMode;
use dirtymap_pagemap::{PagemapError, ProcessMemory};
use dirtymap_vfio::{DeviceLog, DeviceLogError};
use dirtymap_vhost::{LogError, VhostLog};
use pagetable_sim::{Domain, DomainConfig, PhysMemory};

use super::guest::{Guest, GuestError, REACH};
use super::hardware::{Hardware, Rebased};
use super::logging::Played;
use super::memory::Shared;

/// Pages of 4 KiB of the machine.
pub(crate) const PAGES: u64 = 576;
pub(crate) const PAGE: u64 = 4096;
/// The slots of the guest, which are areas too: number, first page, pages. The memory after them
/// does not belong to the guest.
pub(crate) const SLOTS: [(u32, u64, u64); 2] = [(0, 0, 128), (3, 128, 112)];
/// The first page of the memory at the end, which a thread writes to without a mark: the page
/// tables of the processor tell.
pub(crate) const SILENT: u64 = 512;
/// The granule of harvests. It differs from the page of KVM, from that of the vhost log, and from a
/// leaf of the IOMMU.
pub(crate) const GRANULE: Granule = match Granule::from_lg2(14) {
    Some(granule) => granule,
    None => Granule::K4,
};

/// Why the program fails.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Failure {
    #[error("{0}")]
    Tracking(#[from] dirtymap::Error),
    #[error("{0}")]
    Range(#[from] dirtymap::RangeError),
    #[error("{0}")]
    Guest(#[from] GuestError),
    #[error("process memory: {0}")]
    Pagemap(#[from] PagemapError),
    #[error("iommufd: {0}")]
    Iommufd(#[from] IommufdError),
    #[error("the log of a device: {0}")]
    DeviceLog(#[from] DeviceLogError),
    #[error("the log of the back end: {0}")]
    Log(#[from] LogError),
    #[error("the simulated memory: {0}")]
    Memory(#[from] pagetable_sim::Error),
    #[error("a device: {0}")]
    Dma(#[from] pagetable_sim::DmaError),
    #[error("memory: {0}")]
    Io(#[from] io::Error),
    #[error("a writer panicked")]
    Panicked,
}

/// The `n` pages from page `first` on.
pub(crate) fn pages(first: u64, n: u64) -> Result<IovaRange, dirtymap::Error> {
    Ok(IovaRange::from_len(Iova::new(first * PAGE), n * PAGE)?)
}

/// Every page has two halves: one in memory that the guest, the back end and the program write, and
/// one that the devices write, for the simulated IOMMU has a memory of its own. Both belong to the
/// page, and are copied together.
pub(crate) struct Machine {
    pub(crate) space: AddressSpace,
    pub(crate) memory: Arc<Shared>,
    pub(crate) devices: Arc<PhysMemory>,
    pub(crate) domain: Arc<Domain>,
    /// The device that logs its writes.
    pub(crate) logging: Arc<DeviceLog<Played>>,
    /// The device of this machine. Detached before its memory goes.
    _hardware: Option<Hardware>,
    /// The log, as the back end has mapped it.
    pub(crate) back_end: Shared,
    pub(crate) ids: Ids,
    /// Why there is no guest, if there is none.
    pub(crate) no_guest: Option<String>,
    /// Why no IOMMU of this machine takes part, if none does.
    pub(crate) no_hardware: Option<String>,
    /// Why writes without a mark are not looked for, if they are not.
    pub(crate) no_pagemap: Option<String>,
}

/// What the sources are attached as.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ids {
    pub(crate) kvm: Option<DomainId>,
    pub(crate) vhost: DomainId,
    pub(crate) iommu: DomainId,
    pub(crate) pagemap: Option<DomainId>,
    pub(crate) logging: DomainId,
}

impl Machine {
    /// A machine that tracks, and its guest if there is one.
    pub(crate) fn new(
        mode: Option<KvmMode>,
        vfio: Option<&Path>,
    ) -> Result<(Self, Option<Guest>), Failure> {
        let memory = Arc::new(Shared::zeroed(PAGES * PAGE)?);
        let devices = Arc::new(PhysMemory::new(PAGES * PAGE)?);
        let space = AddressSpace::new(Granule::K4);

        let mut slots = Vec::new();
        for (slot, first, n) in SLOTS {
            slots.push((slot, pages(first, n)?));
        }
        let guest = match mode {
            Some(mode) => Guest::new(&memory, &slots, mode)?,
            None => Err("not asked for".into()),
        };
        let (guest, no_guest) = match guest {
            Ok(guest) => (Some(guest), None),
            Err(why) => (None, Some(why)),
        };
        let kvm = match &guest {
            Some(guest) => Some(space.attach(guest.log.clone())?),
            None => None,
        };

        let log = Arc::new(VhostLog::new(Iova::new(PAGES * PAGE - 1))?);
        let sent = log.memory();
        let back_end = Shared::of(sent.file(), sent.size())?;
        let vhost = space.attach(log)?;

        // Leaves of up to 32 KiB: twice the granule of the harvest.
        let config = DomainConfig {
            max_leaf: Granule::from_bytes(32 << 10)?,
            ..DomainConfig::default()
        };
        let domain = Domain::new(devices.clone(), config);
        let base = memory.address();
        let rebased = Rebased {
            domain: domain.clone(),
            base,
        };
        let iommu = space.attach(rebased)?;

        // SAFETY: the areas are the memory above, which is accessed by atomics only. The machine
        // drops the device first.
        let hardware = unsafe { Hardware::open(vfio) }?;
        let (hardware, no_hardware) = match hardware {
            Ok(hardware) => (Some(hardware), None),
            Err(why) => (None, Some(why)),
        };
        if let Some(hardware) = &hardware {
            space.attach(Arc::clone(&hardware.table))?;
        }

        let all = [pages(0, PAGES)?];
        let logging = Arc::new(DeviceLog::new(Played::new(), Granule::K4, &all)?);
        let logs = space.attach(Arc::clone(&logging))?;

        let silent = pages(SILENT, PAGES - SILENT)?;
        let (pagemap, no_pagemap) = match ProcessMemory::new() {
            Ok(process) => {
                process.add(silent, memory.address() + silent.start().get())?;
                (Some(space.attach(process)?), None)
            }
            Err(error @ PagemapError::Unsupported { .. }) => (None, Some(error.to_string())),
            Err(error) => return Err(error.into()),
        };

        // The areas follow each other, so that one harvest goes over all of them.
        for (_, range) in slots {
            space.map(range, base + range.start().get(), Access::ReadWrite)?;
        }
        let (_, first, n) = SLOTS[1];
        let rest = pages(first + n, SILENT - first - n)?;
        for range in [rest, silent] {
            space.map(range, base + range.start().get(), Access::ReadWrite)?;
        }
        space.start_tracking()?;
        if let Some(hardware) = &hardware {
            hardware.attach()?;
        }
        let machine = Machine {
            space,
            memory,
            devices,
            domain,
            logging,
            _hardware: hardware,
            back_end,
            ids: Ids {
                kvm,
                vhost,
                iommu,
                pagemap,
                logging: logs,
            },
            no_guest,
            no_hardware,
            no_pagemap,
        };
        Ok((machine, guest))
    }

    /// How many pages the guest may write to, from page 2 on.
    pub(crate) fn guest_pages() -> u64 {
        SLOTS[1].1 + SLOTS[1].2.min(REACH - SLOTS[1].1) - 2
    }
}
