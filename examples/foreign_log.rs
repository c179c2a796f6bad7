//! The log of another program, such as VFIO's or a hypervisor's: a closure reads it.

use std::io;

use dirtymap::{Access, AddressSpace, Granule, IovaRange, PulledLog};

/// In place of the log's call: sets a bit for each page of `range` that was written, and clears the
/// page in the log.
fn read_and_clear(range: IovaRange, words: &mut [u64]) -> io::Result<()> {
    words[0] = u64::from(range.start().get() == 0) << 5; // page 5
    Ok(())
}

fn main() -> Result<(), dirtymap::Error> {
    let space = AddressSpace::tracked(Granule::K4);
    space.map(0..1 << 30, 0, Access::ReadWrite)?;
    space.attach(PulledLog::new(0..1 << 30, Granule::K4, read_and_clear)?)?;
    space.mark(0x8000..0x8001)?; // joins the same lease
    let lease = space.rounds().next()?;
    for run in lease.runs() {
        println!("copy {run}");
    }
    lease.commit();
    Ok(())
}
