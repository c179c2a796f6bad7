//! The rules of the adapter, over the mock.

use std::sync::Arc;

use dirtymap::bitmap::Sink;
use dirtymap::flush::{FlushGather, Invalidated};
use dirtymap::source::{LeafSink, Stopped};
use dirtymap::source_kit::{Rig, check};
use dirtymap::{
    Access, AddressSpace, DirtySource, Error, Granule, HarvestRequest, Iova, IovaRange, Mapping,
    Scope, Tracking, UserBitmap,
};
use dirtymap_iommufd::{Device, Hwpt, Ioas, IoasOptions, IommufdError, OnUnmap};

use crate::memory::Memory;
use crate::mock::{APERTURE, Flags, GRANULE, Get, Iommu, MockDevice};

/// A mock device and its page table.
pub(crate) struct Setup {
    pub(crate) iommu: Iommu,
    pub(crate) ioas: Ioas,
    pub(crate) device: MockDevice,
    pub(crate) table: Arc<Hwpt>,
    pub(crate) memory: Memory,
}

impl Setup {
    /// With `bytes` of memory to map.
    pub(crate) fn new(
        options: IoasOptions,
        flags: Flags,
        bytes: usize,
    ) -> Result<Self, Box<dyn std::error::Error>> {
        let memory = Memory::new(bytes, flags.huge)?;
        let iommu = Iommu::open()?;
        // SAFETY: only memory of `Memory` is mapped, which is of no Rust value, and which is
        // unmapped after the page table: fields are dropped in order.
        let ioas = unsafe { Ioas::new(&iommu.adapter()?, options) }?;
        let device = iommu.device(ioas.id(), flags)?;
        let table = ioas.hwpt(device.id())?;
        table.attach(&device)?;
        Ok(Setup {
            iommu,
            ioas,
            device,
            table,
            memory,
        })
    }

    /// A space over the page table, with all of the memory mapped at the lowest address.
    pub(crate) fn space(&self, bytes: u64) -> Result<AddressSpace, Error> {
        let space = AddressSpace::with_source(Granule::K4, Arc::clone(&self.table))?;
        space.map(range(0, bytes), self.memory.address(), Access::ReadWrite)?;
        space.start_tracking()?;
        Ok(space)
    }

    /// A device that uses `table` writes at `offset` in the aperture.
    pub(crate) fn write(&self, table: &Hwpt, offset: u64) {
        let at = APERTURE + offset / GRANULE * GRANULE;
        let wrote = self.iommu.write(table.id(), at, &[1], 1);
        assert!(wrote.is_ok(), "the mock writes at {at:#x}: {wrote:?}");
    }
}

/// `bytes` from `offset` on in the aperture of the mock.
pub(crate) fn range(offset: u64, bytes: u64) -> IovaRange {
    match IovaRange::from_len(Iova::new(APERTURE + offset), bytes) {
        Ok(range) => range,
        Err(error) => panic!("{error}"),
    }
}

/// What a harvest of `asked` reports, in offsets of 4 KiB pages.
pub(crate) fn harvest(
    space: &AddressSpace,
    asked: IovaRange,
    scope: Scope,
) -> Result<Vec<u64>, Error> {
    let words = usize::try_from(asked.granules(Granule::K4).div_ceil(64)).unwrap_or(0);
    let mut words = vec![0; words];
    let request = HarvestRequest::new(asked, Granule::K4).in_scope(scope);
    let lease = space.harvest(&request, UserBitmap::new(&mut words))?;
    let lease = lease.sync()?;
    let pages = lease.runs().flat_map(|run| {
        let page = |at: Iova| (at.get() - APERTURE) >> 12;
        page(run.start())..=page(run.last())
    });
    let pages = pages.collect();
    lease.commit();
    Ok(pages)
}

/// The error of the source inside an error of the space.
pub(crate) fn inner<T>(done: Result<T, Error>) -> Option<IommufdError> {
    match done.err()? {
        Error::Source(error) => error.downcast().ok().map(|error| *error),
        _ => None,
    }
}

/// A source whose backing addresses begin in memory of ours: the kit maps from 0 on.
struct InMemory(Arc<Setup>);

impl DirtySource for InMemory {
    fn page(&self) -> Granule {
        self.0.table.page()
    }

    fn map(&self, mapping: &Mapping) -> Result<(), Error> {
        let backing = mapping.backing + self.0.memory.address();
        self.0.table.map(&Mapping {
            backing,
            ..*mapping
        })
    }

    fn unmap(&self, range: IovaRange, gather: &mut FlushGather, dirty: &mut dyn FnMut(IovaRange)) {
        self.0.table.unmap(range, gather, dirty);
    }

    fn set_tracking(&self, to: Tracking) -> Result<(), Error> {
        self.0.table.set_tracking(to)
    }

    fn read_and_clear(&self, range: IovaRange, out: &mut LeafSink<'_, '_>) -> Result<(), Stopped> {
        self.0.table.read_and_clear(range, out)
    }

    fn peek(&self, range: IovaRange, sink: &mut Sink<'_>) -> Result<(), Stopped> {
        self.0.table.peek(range, sink)
    }

    fn invalidate(&self, gather: &FlushGather) -> Result<Invalidated, Error> {
        self.0.table.invalidate(gather)
    }
}

struct Mock(Arc<Setup>);

impl Rig for Mock {
    fn range(&self) -> IovaRange {
        range(0, 1 << 20)
    }

    fn source(&self) -> Arc<dyn DirtySource> {
        Arc::new(InMemory(Arc::clone(&self.0)))
    }

    fn write(&self, iova: Iova) {
        let setup = &self.0;
        let at = iova.get() / GRANULE * GRANULE;
        match setup.iommu.write(setup.table.id(), at, &[1], 1) {
            Ok(_) => (),
            // The mock sets no dirty bit while tracking is off.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => (),
            Err(error) => panic!("the mock writes at {at:#x}: {error}"),
        }
    }
}

/// Runs all checks.
pub(crate) fn run() -> crate::Outcome {
    for (name, check) in [
        ("the kit of the core passes", kit as fn() -> crate::Outcome),
        ("a part of a leaf leaves the rest", parts_of_leaves),
        ("several domains have dirty state of their own", domains),
        ("a device moves while tracking is on", replace),
        ("an unmap tells what was dirty", unmap),
        (
            "an unmap that is told to calls everything dirty",
            unmap_everything,
        ),
        ("what was dirty before the end of tracking is kept", stop),
        ("a second on keeps what is dirty", second_on),
        ("refusals have errors of their own", refusals),
        (
            "errors that the kernel injects lose nothing",
            crate::faults::run,
        ),
    ] {
        check().map_err(|error| format!("{name}: {error}"))?;
        println!("ok: {name}");
    }
    Ok(())
}

fn kit() -> crate::Outcome {
    for piece in [30, 16] {
        let piece = Granule::from_lg2(piece).ok_or("a granule")?;
        let options = IoasOptions::default().small_pages().piece(piece);
        check(|| match Setup::new(options, Flags::default(), 1 << 20) {
            Ok(setup) => Mock(Arc::new(setup)),
            Err(error) => panic!("no mock: {error}"),
        });
    }
    Ok(())
}

/// Leaves of at least 1 MiB, harvested by 256 KiB: every page of a dirty leaf is told once.
fn parts_of_leaves() -> crate::Outcome {
    const BYTES: u64 = 8 << 20;
    let huge = Flags {
        huge: true,
        ..Flags::default()
    };
    let setup = Setup::new(IoasOptions::default(), huge, BYTES as usize)?;
    let space = setup.space(BYTES)?;
    for leaf in [1, 2, 5] {
        setup.write(&setup.table, (leaf << 20) + 0x5000);
    }
    // By one read of all, which no leaf crosses, and which leaves the leaves dirty.
    let mut bits = [0u64; (BYTES >> 12 >> 6) as usize];
    let whole = Get {
        iova: APERTURE,
        length: BYTES,
        page_size: 4096,
        flags: 1,
        reserved: 0,
        data: bits.as_mut_ptr().expose_provenance() as u64,
    };
    setup.iommu.dirty(setup.table.id(), &whole)?;
    let is_dirty = |page: &u64| bits[(page / 64) as usize] >> (page % 64) & 1 != 0;
    let all: Vec<u64> = (0..BYTES >> 12).filter(is_dirty).collect();
    let written = [1, 2, 5].map(|leaf| leaf * 256..(leaf + 1) * 256);
    let has = |page: u64| all.binary_search(&page).is_ok();
    assert!(
        written.into_iter().flatten().all(has),
        "whole leaves: {all:?}"
    );
    let mut told = Vec::new();
    for quarter in (0..32).rev() {
        let asked = range(quarter << 18, 1 << 18);
        told.extend(harvest(&space, asked, Scope::All)?);
    }
    told.sort_unstable();
    assert_eq!(told, all);
    assert_eq!(harvest(&space, range(0, BYTES), Scope::All)?, []);
    Ok(())
}

/// Two page tables of one IOAS.
fn domains() -> crate::Outcome {
    let options = IoasOptions::default().small_pages();
    let setup = Setup::new(options, Flags::default(), 1 << 20)?;
    let other_device = setup.iommu.device(setup.ioas.id(), Flags::default())?;
    let other = setup.ioas.hwpt(other_device.id())?;
    other.attach(&other_device)?;
    let space = AddressSpace::new(Granule::K4);
    let first = space.attach(Arc::clone(&setup.table))?;
    space.attach(Arc::clone(&other))?;
    let all = range(0, 1 << 20);
    space.map(all, setup.memory.address(), Access::ReadWrite)?;
    space.start_tracking()?;
    setup.write(&setup.table, 3 << 12);
    setup.write(&other, 40 << 12);
    assert_eq!(harvest(&space, all, Scope::Domain(first))?, [3]);
    assert_eq!(harvest(&space, all, Scope::All)?, [40]);
    setup.write(&setup.table, 5 << 12);
    setup.write(&other, 6 << 12);
    let mut words = [0; 4];
    space.unmap(all, Granule::K4, UserBitmap::new(&mut words))?;
    assert_eq!(words, [1 << 5 | 1 << 6, 0, 0, 0]);
    // The kernel has let go of the memory: another one can be mapped there.
    space.map(all, setup.memory.address(), Access::ReadWrite)?;
    // A device of the first domain would go on to reach what the second keeps mapped.
    let refused = inner(space.detach(first));
    assert!(
        matches!(refused, Some(IommufdError::DevicesAttached { .. })),
        "{refused:?}"
    );
    setup.write(&setup.table, 7 << 12);
    let unknown = setup.ioas.hwpt(setup.device.id())?;
    let refused = unknown.attach(&setup.device).err();
    assert!(
        matches!(refused, Some(IommufdError::NotTracking { .. })),
        "{refused:?}"
    );
    other.attach(&setup.device)?;
    space.detach(first)?;
    assert_eq!(harvest(&space, all, Scope::All)?, [7]);
    Ok(())
}

fn replace() -> crate::Outcome {
    let options = IoasOptions::default().small_pages();
    let setup = Setup::new(options, Flags::default(), 1 << 20)?;
    let next = setup.ioas.hwpt(setup.device.id())?;
    let space = setup.space(1 << 20)?;
    space.attach(Arc::clone(&next))?;
    space.start_tracking()?;
    setup.write(&setup.table, 3 << 12);
    next.attach(&setup.device)?;
    setup.write(&next, 4 << 12);
    let all = range(0, 1 << 20);
    assert_eq!(harvest(&space, all, Scope::All)?, [3, 4]);
    let old = space.domains().into_iter().next().ok_or("no domain")?;
    setup.write(&setup.table, 7 << 12);
    space.detach(old)?;
    assert_eq!(harvest(&space, all, Scope::All)?, [7]);
    Ok(())
}

fn unmap() -> crate::Outcome {
    let options = IoasOptions::default().small_pages();
    let setup = Setup::new(options, Flags::default(), 1 << 20)?;
    let space = setup.space(1 << 20)?;
    setup.write(&setup.table, 3 << 12);
    setup.write(&setup.table, 200 << 12);
    let mut words = [0; 4];
    let all = range(0, 1 << 20);
    space.unmap(all, Granule::K4, UserBitmap::new(&mut words))?;
    assert_eq!(words, [1 << 3, 0, 0, 1 << 8]);
    space.map(all, setup.memory.address(), Access::ReadWrite)?;
    assert_eq!(harvest(&space, all, Scope::All)?, [], "a new map is clean");
    Ok(())
}

fn unmap_everything() -> crate::Outcome {
    let options = IoasOptions::default().on_unmap(OnUnmap::Everything);
    let setup = Setup::new(options, Flags::default(), 1 << 20)?;
    let space = setup.space(1 << 20)?;
    let mut words = [0; 4];
    space.unmap(range(0, 1 << 20), Granule::K4, UserBitmap::new(&mut words))?;
    assert_eq!(words, [u64::MAX; 4]);
    Ok(())
}

fn stop() -> crate::Outcome {
    let options = IoasOptions::default().small_pages();
    let setup = Setup::new(options, Flags::default(), 1 << 20)?;
    let space = setup.space(1 << 20)?;
    setup.write(&setup.table, 3 << 12);
    space.stop_tracking()?;
    let all = range(0, 1 << 20);
    assert_eq!(harvest(&space, all, Scope::All)?, [3]);
    space.start_tracking()?;
    assert_eq!(harvest(&space, all, Scope::All)?, []);
    Ok(())
}

fn second_on() -> crate::Outcome {
    let options = IoasOptions::default().small_pages();
    let setup = Setup::new(options, Flags::default(), 1 << 20)?;
    let space = setup.space(1 << 20)?;
    setup.write(&setup.table, 3 << 12);
    setup.table.set_tracking(Tracking::On)?;
    let all = range(0, 1 << 20);
    assert_eq!(harvest(&space, all, Scope::All)?, [3]);
    Ok(())
}

fn refusals() -> crate::Outcome {
    let setup = Setup::new(IoasOptions::default(), Flags::default(), 1 << 20)?;
    let blind = Flags {
        no_dirty: true,
        ..Flags::default()
    };
    let blind = setup.iommu.device(setup.ioas.id(), blind)?;
    let refused = setup.ioas.hwpt(blind.id()).err();
    assert!(
        matches!(refused, Some(IommufdError::CannotTrack { .. })),
        "{refused:?}"
    );
    let refused = setup.table.attach(&blind).err();
    assert!(
        matches!(refused, Some(IommufdError::DeviceRefused { .. })),
        "{refused:?}"
    );
    let refused = setup.ioas.hwpt(u32::MAX).err();
    assert!(
        matches!(refused, Some(IommufdError::Call { .. })),
        "{refused:?}"
    );
    let space = setup.space(1 << 20)?;
    let all = IovaRange::new(Iova::new(APERTURE), Iova::new((1 << 31) - 1))?;
    assert_eq!(setup.ioas.usable()?, [all]);
    let map = |at: u64, backing: u64| {
        let range = IovaRange::from_len(Iova::new(at), 1 << 20)?;
        space.map(range, backing, Access::ReadWrite)
    };
    let memory = setup.memory.address();
    let refused = inner(map(0, memory));
    assert!(
        matches!(refused, Some(IommufdError::NotUsable { .. })),
        "{refused:?}"
    );
    let refused = inner(map(APERTURE + (1 << 20), 0x7000_0000_0000));
    assert!(
        matches!(refused, Some(IommufdError::NotMemory { .. })),
        "{refused:?}"
    );
    // Another holder of the IOAS maps.
    let there = (APERTURE + (1 << 20), 4096);
    setup.iommu.map(setup.ioas.id(), there, memory, true)?;
    let refused = inner(map(APERTURE + (1 << 20), memory));
    assert!(
        matches!(refused, Some(IommufdError::Occupied { .. })),
        "{refused:?}"
    );
    Ok(())
}
