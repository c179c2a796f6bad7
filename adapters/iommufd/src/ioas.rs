//! The file of iommufd, and the addresses that its page tables share.

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::sync::{Arc, Weak};

use dirtymap::sync::{Mutex, MutexGuard, lock};
use dirtymap::{Granule, IovaRange, Mapping};

use crate::error::IommufdError;
use crate::hwpt::Hwpt;
use crate::kernel::{Iommu, Kernel, ranges, uninterrupted};
use crate::log::Log;
use crate::uapi::Span;

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

/// What an unmap reports as dirty. The kernel has no call that unmaps and tells, so there is a
/// choice.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnUnmap {
    /// What was dirty when the kernel was asked, just before the unmap. **A write that a device
    /// makes between the two is lost.** For memory that no device uses any more when it is
    /// unmapped, as drivers of guests have it: they end the DMA, and then unmap.
    #[default]
    Asked,
    /// Everything: nothing is lost, and all of the memory is to be copied. For memory that devices
    /// may still write to.
    Everything,
}

/// How an [`Ioas`] maps and reports.
#[derive(Clone, Copy, Debug)]
pub struct IoasOptions {
    pub(crate) piece: Granule,
    pub(crate) page: Option<Granule>,
    pub(crate) small_pages: bool,
    pub(crate) on_unmap: OnUnmap,
}

impl Default for IoasOptions {
    fn default() -> Self {
        IoasOptions {
            piece: Granule::G1,
            page: None,
            small_pages: false,
            on_unmap: OnUnmap::Asked,
        }
    }
}

impl IoasOptions {
    /// The size of a piece: see [the crate](crate#pieces).
    #[must_use]
    pub fn piece(self, piece: Granule) -> Self {
        IoasOptions { piece, ..self }
    }

    /// The bytes that one bit of the kernel's answers stands for: at first the page of the host, or
    /// that of the IOMMU if that is larger. Areas are made of such pages.
    #[must_use]
    pub fn page(self, page: Granule) -> Self {
        let page = Some(page);
        IoasOptions { page, ..self }
    }

    /// Leaves are as small as a page of the host, so no page is reported for the sake of another
    /// one. Walks and translations take longer. (`IOMMU_OPTION_HUGE_PAGES`, off.)
    #[must_use]
    pub fn small_pages(self) -> Self {
        IoasOptions {
            small_pages: true,
            ..self
        }
    }

    /// What an unmap reports as dirty.
    #[must_use]
    pub fn on_unmap(self, on_unmap: OnUnmap) -> Self {
        IoasOptions { on_unmap, ..self }
    }
}

/// Addresses that page tables share (an IO address space): what is mapped is mapped in all of them,
/// and each has dirty state of its own. Clones are the same.
#[derive(Clone, Debug)]
pub struct Ioas(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    iommufd: Iommufd,
    id: u32,
    options: IoasOptions,
    state: Mutex<State>,
}

/// What is mapped, and by which domains. Its lock is taken before that of any log.
#[derive(Debug, Default)]
pub(crate) struct State {
    /// By their first addresses; they do not overlap.
    pub(crate) pieces: BTreeMap<u64, Piece>,
    /// All page tables.
    pub(crate) hwpts: Vec<Weak<Hwpt>>,
}

/// One mapping of the kernel.
#[derive(Debug)]
pub(crate) struct Piece {
    pub(crate) mapping: Mapping,
    /// The page tables whose domain maps it, by their numbers.
    pub(crate) users: Vec<u32>,
}

impl Ioas {
    /// A new IOAS, in which nothing is mapped.
    ///
    /// # Errors
    /// [`IommufdError::Call`], [`IommufdError::Unsupported`].
    ///
    /// # Safety
    /// An address space with a page table of this IOAS gives devices access to the memory of this
    /// process that its mappings name by their backing addresses. Until it is unmapped, devices may
    /// write to it at any time. So it must be memory for which that is fine: mapped all the while,
    /// and of no Rust value that is not made for it.
    pub unsafe fn new(iommufd: &Iommufd, options: IoasOptions) -> Result<Self, IommufdError> {
        let kernel = iommufd.kernel();
        let id = uninterrupted(|| kernel.ioas_alloc())
            .map_err(|error| IommufdError::call("IOMMU_IOAS_ALLOC", error))?;
        let ioas = Ioas(Arc::new(Shared {
            iommufd: iommufd.clone(),
            id,
            options,
            state: Mutex::new(State::default()),
        }));
        if options.small_pages {
            uninterrupted(|| kernel.small_pages(id))
                .map_err(|error| IommufdError::call("IOMMU_OPTION_HUGE_PAGES", error))?;
        }
        Ok(ioas)
    }

    /// Its number in iommufd.
    pub fn id(&self) -> u32 {
        self.0.id
    }

    /// A new page table with dirty tracking, for the IOMMU of a device. It is a source: attach it
    /// to an address space. What is mapped in this IOAS is mapped in it at once.
    ///
    /// # Errors
    /// In this order: [`IommufdError::CannotTrack`]; [`IommufdError::Call`] (`ENOENT`: there is no
    /// device of that number); [`IommufdError::PageTooSmall`]; [`IommufdError::BadPiece`];
    /// [`IommufdError::NoMemory`].
    pub fn hwpt(&self, device: u32) -> Result<Arc<Hwpt>, IommufdError> {
        let hwpt = Hwpt::new(self.clone(), device)?;
        let mut state = self.lock().state;
        state.hwpts.retain(|other| other.strong_count() > 0);
        state.hwpts.push(Arc::downgrade(&hwpt));
        Ok(hwpt)
    }

    /// The ranges that can be mapped, ascending: without what is reserved, or out of reach for the
    /// devices. It shrinks when page tables are added. Reserve the rest in the address space.
    ///
    /// # Errors
    /// [`IommufdError::Call`].
    pub fn usable(&self) -> Result<Vec<IovaRange>, IommufdError> {
        let mut spans = vec![Span::default(); 64];
        loop {
            let (count, _) = self.iova_ranges(&mut spans)?;
            if count <= spans.len() {
                return Ok(ranges(spans.get(..count).unwrap_or_default()));
            }
            spans.resize(count, Span::default());
        }
    }

    /// The alignment of whatever is mapped.
    pub(crate) fn alignment(&self) -> Result<Granule, IommufdError> {
        let (_, alignment) = self.iova_ranges(&mut [])?;
        let bytes = alignment.max(1);
        Granule::from_bytes(bytes).map_err(|error| IommufdError::Call {
            call: "IOMMU_IOAS_IOVA_RANGES",
            error: io::Error::other(error),
        })
    }

    fn iova_ranges(&self, spans: &mut [Span]) -> Result<(usize, u64), IommufdError> {
        uninterrupted(|| self.kernel().iova_ranges(self.id(), spans))
            .map_err(|error| IommufdError::call("IOMMU_IOAS_IOVA_RANGES", error))
    }

    pub(crate) fn options(&self) -> &IoasOptions {
        &self.0.options
    }

    pub(crate) fn iommufd(&self) -> &Iommufd {
        &self.0.iommufd
    }

    pub(crate) fn kernel(&self) -> &dyn Kernel {
        self.0.iommufd.kernel()
    }

    /// What is mapped. A thread that panicked with it left nothing half done.
    pub(crate) fn lock(&self) -> Locked<'_> {
        Locked {
            state: lock(&self.0.state),
            held: Vec::new(),
        }
    }
}

/// The state of an IOAS, locked.
pub(crate) struct Locked<'a> {
    pub(crate) state: MutexGuard<'a, State>,
    /// Page tables that were looked at. Dropped after the lock (fields are dropped in order): the
    /// last count of one may be here, and its drop takes the lock.
    pub(crate) held: Vec<Arc<Hwpt>>,
}

impl Locked<'_> {
    /// All page tables that are there.
    pub(crate) fn hwpts(&mut self) -> &[Arc<Hwpt>] {
        if self.held.is_empty() {
            // None is added while the lock is held, and none is dropped from the list.
            let tables = self.state.hwpts.iter().filter_map(Weak::upgrade);
            self.held.extend(tables);
        }
        &self.held
    }

    /// What another page table than `hwpt`, whose domain has mapped the piece at `start`, knows of
    /// it.
    pub(crate) fn other_user(&mut self, hwpt: u32, start: u64) -> Option<Arc<Log>> {
        let users = self.state.pieces.get(&start)?.users.clone();
        let user = |other: &&Arc<Hwpt>| other.id() != hwpt && users.contains(&other.id());
        let mut others = self.hwpts().iter().filter(user);
        others.find_map(|other| other.logs().by_start.get(&start).cloned())
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        // The last page table has gone. If devices of another hand use it, it stays.
        let _ = self.iommufd.kernel().destroy(self.id);
    }
}
