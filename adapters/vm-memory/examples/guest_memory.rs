//! Incremental snapshots of guest memory of `vm-memory` with a hole; an error puts everything back.

use std::error::Error;
use std::fs::File;
use std::sync::Arc;

use dirtymap::{AddressSpace, Granule, Rounds, ToIovaRange};
use dirtymap_vm_memory::SpaceBitmap;
use libc::{PROT_READ, PROT_WRITE};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap, GuestRegionMmap};

type Guest = GuestMemoryMmap<SpaceBitmap>;

fn guest(space: &Arc<AddressSpace>, regions: &[(u64, usize)]) -> Result<Guest, Box<dyn Error>> {
    let mut mapped = Vec::new();
    for (start, len) in regions {
        let range = (*start..start + *len as u64).to_iova_range()?;
        let memory = MmapRegionBuilder::new_with_bitmap(*len, SpaceBitmap::map(space, range)?);
        let memory = memory.with_mmap_prot(PROT_READ | PROT_WRITE).build()?;
        let region = GuestRegionMmap::new(memory, GuestAddress(*start));
        mapped.push(region.ok_or("past the last address")?);
    }
    Ok(Guest::from_regions(mapped)?)
}

fn snapshot(rounds: &mut Rounds, guest: &Guest, file: &mut File) -> Result<u64, Box<dyn Error>> {
    let lease = rounds.next()?;
    for run in lease.runs() {
        guest.write_all_volatile_to(GuestAddress(run.start().get()), file, run.len() as usize)?;
    }
    file.sync_all()?; // an error up to here drops the lease: all pages are dirty again
    Ok(lease.commit().bits_set)
}

fn main() -> Result<(), Box<dyn Error>> {
    let space = Arc::new(AddressSpace::tracked(Granule::K4));
    let guest = guest(&space, &[(0, 1 << 20), (1 << 32, 2 << 20)])?;
    let mut rounds = Rounds::shared(space);
    for round in 1..=3u64 {
        guest.write_obj(round, GuestAddress(0x3000))?; // device models write
        guest.write_obj(round, GuestAddress((1 << 32) + 0x5ffc))?;
        println!(
            "snapshot {round}: {} pages",
            snapshot(&mut rounds, &guest, &mut tempfile::tempfile()?)?
        );
    }
    Ok(())
}
