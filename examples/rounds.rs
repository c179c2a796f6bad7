//! A PC with a hole below 4 GiB: all of its memory in one lease, round after round.

use dirtymap::{Access, AddressSpace, Error, Granule};

const GIB: u64 = 1 << 30;

fn main() -> Result<(), Error> {
    let space = AddressSpace::tracked(Granule::K4);
    space.map(0..3 * GIB, 0, Access::ReadWrite)?;
    space.map(4 * GIB..5 * GIB, 3 * GIB, Access::ReadWrite)?;
    let mut rounds = space.rounds();
    for round in 1..=3u64 {
        space.mark(round * 0x1000..round * 0x1000 + 8)?; // any thread, after it wrote
        space.mark(4 * GIB..4 * GIB + round)?;
        let lease = rounds.next()?; // holes skipped, flushed, with a bitmap of its own
        for run in lease.runs() {
            println!("round {round}: copy {run}"); // an error here: dirty again
            lease.commit_range(run);
        }
        lease.commit();
    }
    Ok(())
}
