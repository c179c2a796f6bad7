//! The addresses that page tables share.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Weak};

use dirtymap::sync::{Mutex, MutexGuard, lock};
use dirtymap::{Granule, IovaRange, Mapping};

use crate::error::IommufdError;
use crate::iommufd::Iommufd;
use crate::kernel::{Kernel, ranges, uninterrupted};
use crate::log::Log;
use crate::options::IoasOptions;
use crate::table::Table;
use crate::uapi::Span;

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
    all: Vec<Weak<Table>>,
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
    pub(crate) fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.0.state)
    }
}

impl State {
    /// All page tables that are there.
    pub(crate) fn tables(&self) -> impl Iterator<Item = Arc<Table>> {
        self.all.iter().filter_map(Weak::upgrade)
    }

    /// Adds a page table, and forgets those that have gone.
    pub(crate) fn add(&mut self, table: &Arc<Table>) {
        self.all.retain(|other| other.strong_count() > 0);
        self.all.push(Arc::downgrade(table));
    }

    /// What another page table than `table`, whose domain has mapped the piece at `start`, knows of
    /// it.
    pub(crate) fn other_user(&self, table: u32, start: u64) -> Option<Arc<Log>> {
        let users = &self.pieces.get(&start)?.users;
        let mut others = self.tables().filter(|other| other.id != table);
        others.find_map(|other| users.contains(&other.id).then(|| other.log_at(start))?)
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        // The last page table has gone. If devices that others attached use it, it stays.
        let _ = self.iommufd.kernel().destroy(self.id);
    }
}
