//! A lease that owns its space and its bitmap: it goes to another thread, in a struct, through a
//! channel.

use std::sync::{Arc, mpsc};
use std::{error::Error, thread};

use dirtymap::{Access, AddressSpace, Granule, Lease, Rounds, Synced};

struct Job(u64, Lease<'static, Synced>);

fn main() -> Result<(), Box<dyn Error>> {
    let space = Arc::new(AddressSpace::tracked(Granule::K4));
    space.map(0..1 << 30, 0, Access::ReadWrite)?;
    let (jobs, inbox) = mpsc::channel::<Job>();
    let copier = thread::spawn(move || {
        for Job(round, lease) in inbox {
            println!("round {round}: copy {:?}", lease.runs().collect::<Vec<_>>());
            lease.commit();
        }
    });
    let mut rounds = Rounds::shared(Arc::clone(&space));
    for round in 1..=3u64 {
        space.mark(round * 0x1000..round * 0x1000 + 8)?;
        jobs.send(Job(round, rounds.next()?))?;
    }
    drop(jobs);
    copier.join().map_err(|_| "the copier panicked".into())
}
