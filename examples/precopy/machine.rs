//! The machine that migrates: its memory, its IOMMU, and one area for each file of the trace.

use std::sync::Arc;

use dirtymap::{Access, AddressSpace, Granule, Iova, IovaRange};
use dirtymap_examples::iolog::Trace;
use pagetable_sim::{Domain, DomainConfig, Format, PhysMemory};

use crate::Failure;
use crate::cli::Sabotage;
use crate::sabotage::{self, Forgetful};

/// The first address of the first area: low addresses stay unmapped, as they usually are.
pub(crate) const BASE: u64 = 1 << 32;
/// The unit of the report and of the last line, independent of the leaves of the IO page table.
pub(crate) const PAGE: Granule = Granule::K4;

/// The area of a file of the trace. Areas follow each other without a hole.
pub(crate) struct FileArea {
    pub(crate) name: String,
    pub(crate) range: IovaRange,
}

/// A machine whose IO page table has the format `F`.
pub(crate) struct Machine<F: Format> {
    pub(crate) memory: Arc<PhysMemory>,
    pub(crate) domain: Arc<Domain<F>>,
    pub(crate) space: AddressSpace,
    pub(crate) files: Vec<FileArea>,
    /// All areas together.
    pub(crate) range: IovaRange,
}

impl<F: Format> Machine<F> {
    /// Lays out one area for each file, large enough for its highest write, in leaves of at most
    /// `leaf`. All areas need `bytes`.
    pub(crate) fn new(
        trace: &Trace,
        bytes: u64,
        leaf: Granule,
        sabotage: Option<Sabotage>,
        seed: u64,
    ) -> Result<Self, Failure> {
        let memory = Arc::new(PhysMemory::new(bytes)?);
        let domain = Domain::<F>::with_format(
            memory.clone(),
            DomainConfig {
                max_leaf: leaf,
                ..DomainConfig::default()
            },
        );
        let space = match sabotage {
            Some(Sabotage::ClearThenLose) => {
                AddressSpace::with_source(PAGE, Forgetful::new(domain.clone(), seed))?
            }
            _ => AddressSpace::with_source(PAGE, domain.clone())?,
        };
        sabotage::break_hardware(&domain, sabotage);
        let mut files = Vec::with_capacity(trace.files.len());
        let mut offset = 0;
        for file in &trace.files {
            let size = file.bytes.next_multiple_of(leaf.bytes());
            let range = IovaRange::from_len(Iova::new(BASE + offset), size)?;
            space.map(range, offset, Access::ReadWrite)?;
            files.push(FileArea {
                name: file.name.clone(),
                range,
            });
            offset += size;
        }
        Ok(Machine {
            memory,
            domain,
            space,
            files,
            range: IovaRange::from_len(Iova::new(BASE), offset)?,
        })
    }

    /// The physical address of `iova`.
    pub(crate) fn phys(&self, iova: Iova) -> u64 {
        iova.get() - BASE
    }
}
