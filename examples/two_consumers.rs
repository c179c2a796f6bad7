//! A backup tool with two consumers: a full backup and then increments to one host, and a replica
//! on another. Each is told every write, whatever the other takes; a failed increment comes again.

use std::io;

use dirtymap::{Access, AddressSpace, Consumer, Granule, IovaRange, Start};

fn increment(to: &Consumer<'_>, send: impl Fn(IovaRange) -> io::Result<()>) -> io::Result<u64> {
    let lease = to.rounds().next().map_err(io::Error::other)?;
    for run in lease.runs() {
        send(run)?; // an error drops the lease: its pages are dirty again, for this consumer
    }
    Ok(lease.commit().bits_set)
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let disk = AddressSpace::tracked(Granule::K4);
    disk.map(0..1 << 20, 0, Access::ReadWrite)?;
    let backup = disk.consumer("backup", Start::Dirty)?; // everything first
    let replica = disk.consumer("replica", Start::LikeOf(&backup))?;
    println!("backup: {} pages", increment(&backup, |_| Ok(()))?);
    println!("replica: {} pages", increment(&replica, |_| Ok(()))?);
    disk.mark(0x3000..0x5000)?; // any thread, after it wrote
    println!("backup: {} pages", increment(&backup, |_| Ok(()))?);
    let failed = increment(&replica, |_| Err(io::Error::other("the host is down")));
    println!(
        "replica: {failed:?}; then {} pages",
        increment(&replica, |_| Ok(()))?
    );
    Ok(())
}
