//! The kernel's walk beside ours: the same number of leaves, of which as many are dirty.
//!
//! Linux 6.12's mock keeps its leaves in an array of the kernel, that of 7.3 in a real AMD v1
//! table. Both walks run in this system, so an emulator slows them alike. Without an assertion:
//! times are no checks.

use std::sync::Arc;
use std::time::{Duration, Instant};

use dirtymap::{
    Access, AddressSpace, DirtySource, Granule, HarvestRequest, Iova, IovaRange, Mapping,
    UserBitmap,
};
use pagetable_sim::{AmdHost, Domain, DomainConfig, LeafSizes, PhysMemory};

use crate::memory::Memory;
use crate::mock::{APERTURE, Flags, GRANULE, Get, Iommu};
use dirtymap_iommufd::Device;

/// AMD v1 with the pages of the mock.
type Mock = AmdHost<4, 11>;

const BYTES: u64 = 64 << 20;
const LEAVES: usize = (BYTES / GRANULE) as usize;
/// Each walk is timed that often; the fastest counts.
const ROUNDS: usize = 5;

pub(crate) fn run() -> crate::Outcome {
    println!("{LEAVES} granules of 2 KiB; microseconds of the fastest of {ROUNDS} walks");
    println!(
        "{:>12} {:>10} {:>10} {:>8}",
        "dirty", "kernel", "ours", "ratio"
    );
    for every in [0, 97, 2, 1] {
        let mut words = vec![0u64; LEAVES / 64];
        for leaf in (0..LEAVES).filter(|leaf| every != 0 && leaf % every == 0) {
            words[leaf / 64] |= 1 << (leaf % 64);
        }
        let dirty = words.iter().map(|word| word.count_ones()).sum::<u32>();
        let kernel = kernel(&words)?;
        let ours = ours(&words)?;
        let ratio = kernel.as_secs_f64() / ours.as_secs_f64();
        let (kernel, ours) = (kernel.as_micros(), ours.as_micros());
        println!("{dirty:>12} {kernel:>10} {ours:>10} {ratio:>8.2}");
    }
    Ok(())
}

fn kernel(written: &[u64]) -> Result<Duration, Box<dyn std::error::Error>> {
    let memory = Memory::new(BYTES as usize, false)?;
    let mut bits = vec![0u64; LEAVES / 64];
    let iommu = Iommu::open()?;
    let ioas = iommu.ioas()?;
    let device = iommu.device(ioas, Flags::default())?;
    let hwpt = iommu.hwpt(device.id(), ioas, true)?;
    iommu.map(ioas, (APERTURE, BYTES), memory.address(), true)?;
    iommu.track(hwpt, 1)?;
    let mut fastest = Duration::MAX;
    for _ in 0..ROUNDS {
        iommu.write(hwpt, APERTURE, written, LEAVES as u64)?;
        bits.fill(0);
        let began = Instant::now();
        iommu.dirty(
            hwpt,
            &Get {
                iova: APERTURE,
                length: BYTES,
                page_size: GRANULE,
                flags: 0,
                reserved: 0,
                data: bits.as_mut_ptr().expose_provenance() as u64,
            },
        )?;
        fastest = fastest.min(began.elapsed());
        for (nth, word) in written.iter().enumerate() {
            assert_eq!(word & !bits[nth], 0, "the kernel lost a write");
        }
    }
    iommu.unmap(ioas, APERTURE, BYTES)?;
    Ok(fastest)
}

fn ours(written: &[u64]) -> Result<Duration, Box<dyn std::error::Error>> {
    let memory = Arc::new(PhysMemory::new(BYTES)?);
    let domain = Domain::<Mock>::with_format(memory, DomainConfig::default());
    let granule = Granule::from_bytes(GRANULE)?;
    let range = IovaRange::from_len(Iova::new(APERTURE), BYTES)?;
    let space = AddressSpace::new(granule);
    space.attach(Small(Arc::clone(&domain)))?;
    space.map(range, 0, Access::ReadWrite)?;
    space.start_tracking()?;
    let mut bits = vec![0; LEAVES / 64];
    let mut fastest = Duration::MAX;
    for _ in 0..ROUNDS {
        for (nth, word) in written.iter().enumerate() {
            for bit in (0..64).filter(|bit| word >> bit & 1 != 0) {
                let at = Iova::new(APERTURE + (nth as u64 * 64 + bit) * GRANULE);
                domain
                    .table()
                    .make_dirty(IovaRange::granule_at(at, granule))?;
            }
        }
        bits.fill(0);
        let request = HarvestRequest::new(range, granule);
        let began = Instant::now();
        let lease = space.harvest(&request, UserBitmap::new(&mut bits))?;
        let lease = lease.sync()?;
        fastest = fastest.min(began.elapsed());
        lease.commit();
        assert_eq!(bits, written, "what was written, and nothing else");
    }
    Ok(fastest)
}

/// A domain that maps by leaves of one granule.
struct Small(Arc<Domain<Mock>>);

impl DirtySource for Small {
    fn page(&self) -> Granule {
        self.0.page()
    }

    fn map(&self, mapping: &Mapping) -> Result<(), dirtymap::Error> {
        let sizes = LeafSizes::only(Granule::from_bytes(GRANULE)?);
        Ok(self.0.map_leaves(mapping, sizes)?)
    }

    fn unmap(
        &self,
        range: IovaRange,
        gather: &mut dirtymap::flush::FlushGather,
        dirty: &mut dyn FnMut(IovaRange),
    ) {
        self.0.unmap(range, gather, dirty);
    }

    fn set_tracking(&self, to: dirtymap::Tracking) -> Result<(), dirtymap::Error> {
        self.0.set_tracking(to)
    }

    fn read_and_clear(
        &self,
        range: IovaRange,
        out: &mut dirtymap::source::LeafSink<'_, '_>,
    ) -> Result<(), dirtymap::source::Stopped> {
        self.0.read_and_clear(range, out)
    }

    fn peek(
        &self,
        range: IovaRange,
        sink: &mut dirtymap::bitmap::Sink<'_>,
    ) -> Result<(), dirtymap::source::Stopped> {
        self.0.peek(range, sink)
    }

    fn invalidate(
        &self,
        gather: &dirtymap::flush::FlushGather,
    ) -> Result<dirtymap::flush::Invalidated, dirtymap::Error> {
        self.0.invalidate(gather)
    }
}
