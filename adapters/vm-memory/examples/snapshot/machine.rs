//! The machine: two regions of guest memory over one space, and devices that write them.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use dirtymap::{AddressSpace, Granule, Iova, IovaRange};
use dirtymap_vm_memory::SpaceBitmap;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{
    Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap,
    MemoryRegionAddress,
};

use crate::run::Failure;

/// The granule: it is tracked and copied as a whole.
pub(crate) const PAGE: Granule = Granule::K4;
/// Where the upper half of memory begins, as on machines with devices below 4 GiB.
const HIGH: u64 = 4 << 30;

pub(crate) type Memory = GuestMemoryMmap<SpaceBitmap>;

/// The memory of a virtual machine.
pub(crate) struct Machine {
    pub(crate) space: Arc<AddressSpace>,
    pub(crate) memory: Memory,
    stop: AtomicBool,
    pub(crate) writes: AtomicU64,
}

impl Machine {
    /// A machine with `bytes` of memory, which are not tracked yet.
    pub(crate) fn new(bytes: u64) -> Result<Self, Failure> {
        let space = Arc::new(AddressSpace::new(PAGE));
        let low = (bytes / 2).min(HIGH);
        let regions = [(0, low), (HIGH, bytes - low)];
        let regions: Result<_, Failure> = regions
            .into_iter()
            .map(|(start, len)| region(&space, start, len))
            .collect();
        let memory = GuestMemoryMmap::from_regions(regions?)
            .map_err(|error| Failure::Memory(error.to_string()))?;
        Ok(Machine {
            space,
            memory,
            stop: AtomicBool::new(false),
            writes: AtomicU64::new(0),
        })
    }

    /// The guest physical addresses of each region.
    pub(crate) fn regions(&self) -> Vec<IovaRange> {
        // The bitmap itself, which knows its range: what the trait of regions gives is a slice of
        // it.
        let bitmaps = self.memory.iter().map(|region| (**region).bitmap());
        bitmaps.map(SpaceBitmap::range).collect()
    }

    pub(crate) fn stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
    }

    /// A device that writes by the calls of vm-memory, which mark by themselves. Nine of ten writes
    /// go to a tenth of memory.
    pub(crate) fn network(&self, seed: u64) -> Result<(), Failure> {
        let mut random = Random(seed);
        let mut packet = [0u8; 1500];
        while !self.stop.load(Ordering::Relaxed) {
            let (region, offset) = self.place(&mut random, packet.len() as u64)?;
            let value = random.next().to_le_bytes();
            packet[..8].copy_from_slice(&value);
            region
                .write_slice(&packet, MemoryRegionAddress(offset))
                .map_err(|error| Failure::Memory(error.to_string()))?;
            self.pace(&mut random);
        }
        Ok(())
    }

    /// A device that reads a disk into guest memory through a pointer, which vm-memory does not
    /// see: the write is in flight from before the request is submitted until it has completed.
    pub(crate) fn disk(&self, seed: u64) -> Result<(), Failure> {
        const SECTOR: usize = 512;
        let mut random = Random(seed);
        while !self.stop.load(Ordering::Relaxed) {
            let (region, offset) = self.place(&mut random, SECTOR as u64)?;
            let bitmap = (**region).bitmap();
            let in_flight = bitmap.begin_write(offset as usize, SECTOR)?;
            let slice = region
                .get_slice(MemoryRegionAddress(offset), SECTOR)
                .map_err(|error| Failure::Memory(error.to_string()))?;
            let target = slice.ptr_guard_mut();
            let sector = [random.next() as u8; SECTOR];
            // The request takes a while, and harvests run meanwhile.
            std::thread::yield_now();
            // SAFETY:
            // - valid for 512 bytes: the guard says so, for as long as it lives.
            // - other devices, and the writer of snapshots, may access the same bytes, as a real
            //   device's DMA would; they do so by copies of vm-memory, which tolerate that.
            unsafe { target.as_ptr().copy_from(sector.as_ptr(), SECTOR) };
            drop(in_flight);
            self.pace(&mut random);
        }
        Ok(())
    }

    /// A random address with room for `len` bytes.
    fn place(
        &self,
        random: &mut Random,
        len: u64,
    ) -> Result<(&GuestRegionMmap<SpaceBitmap>, u64), Failure> {
        let regions: [_; 2] = [0, HIGH].map(|start| self.memory.find_region(GuestAddress(start)));
        let region = regions[random.below(2) as usize]
            .ok_or_else(|| Failure::Memory("a region is missing".to_owned()))?;
        let room = region.size() as u64 - len;
        let busy = if random.below(10) > 0 {
            room / 10
        } else {
            room
        };
        Ok((region, random.below(busy + 1)))
    }

    /// Counts a write; makes a pause now and then, so that a machine of a few MiB is not dirty all
    /// over.
    fn pace(&self, random: &mut Random) {
        self.writes.fetch_add(1, Ordering::Relaxed);
        if random.below(16) == 0 {
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
    }
}

/// A region of guest memory that marks in `space`.
fn region(
    space: &Arc<AddressSpace>,
    start: u64,
    len: u64,
) -> Result<GuestRegionMmap<SpaceBitmap>, Failure> {
    let range = IovaRange::from_len(Iova::new(start), len)?;
    let bitmap = SpaceBitmap::map(space, range)?;
    let mapping = MmapRegionBuilder::new_with_bitmap(len as usize, bitmap)
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
        .with_mmap_flags(libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_PRIVATE)
        .build()
        .map_err(|error| {
            Failure::Memory(format!("{len:#x} bytes: {error}; try a smaller --memory"))
        })?;
    GuestRegionMmap::new(mapping, GuestAddress(start))
        .ok_or_else(|| Failure::Memory(format!("{len:#x} bytes at {start:#x} go past 2^64")))
}

/// Numbers that look random: SplitMix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// Below `bound`, which is not 0.
    fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }
}
