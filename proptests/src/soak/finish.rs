//! The end: everything is unmapped and detached, and nothing must be left.

use std::sync::Arc;
use std::time::{Duration, Instant};

use dirtymap::sync::thread;
use dirtymap::{Access, AddressSpace, Granule, IovaRange};
use pagetable_sim::PhysMemory;

use super::layout;
use super::tally::Count;
use super::world::World;

/// The time within which readers must release the last domains.
const PATIENCE: Duration = Duration::from_secs(5);

/// Unmaps and detaches everything, prints the table, and returns a line about the rest.
///
/// # Errors
/// A report, if anything is left.
pub(super) fn take_down(world: World, elapsed: Duration) -> Result<String, String> {
    let failed = |what: &str| Err(format!("FAILED at the end: {what}"));
    let done = world.space.unmap_discarding(IovaRange::ALL);
    let done = done.map_err(|error| format!("FAILED at the end: unmap: {error}"))?;
    if done.discarded_bytes != 0 {
        return failed(&format!("{done:?} after everything was harvested"));
    }
    let ids = world.space.domains();
    if !world.ids.iter().all(|id| ids.contains(id)) {
        return failed("a permanent domain is not attached any more");
    }
    for id in ids {
        let detached = world.space.detach(id);
        detached.map_err(|error| format!("FAILED at the end: detach: {error}"))?;
    }
    let stats = world.space.stats();
    print!("{}", world.tally.table(elapsed, &stats));
    let (areas, domains) = (world.space.mappings().len(), world.space.domains().len());
    let flush = stats.flush;
    if areas != 0 || domains != 0 || flush.pending != 0 || flush.frees_pending != 0 {
        return failed(&format!("{areas} areas, {domains} domains, {flush:?}"));
    }
    let memory = Arc::clone(&world.memory);
    // A forgotten lease keeps the domains that it covered.
    let forgotten = world.tally.get(Count::Forgotten);
    println!("panics of sources: {}", world.panics.count());
    drop(world);
    let kept = match forgotten {
        0 => match domains_left(&memory) {
            0 => "0 domains in memory",
            left => return failed(&format!("{left} domains are still in memory")),
        },
        _ => "domains of forgotten leases in memory",
    };
    Ok(format!(
        "left: {areas} areas, {domains} domains attached, {kept}, {} debts\n",
        flush.pending
    ))
}

/// How many domains are still in memory: each of them holds `memory`. Values that other threads
/// replaced are freed by later readers and writers of any space.
fn domains_left(memory: &Arc<PhysMemory>) -> usize {
    let began = Instant::now();
    loop {
        let left = Arc::strong_count(memory) - 1;
        if left == 0 || began.elapsed() > PATIENCE {
            return left;
        }
        let space = AddressSpace::new(Granule::K4);
        for _ in 0..256 {
            let range = layout::range(0, 1);
            space.map(range, 0, Access::Read).unwrap();
            space.unmap_discarding(range).unwrap();
        }
        thread::sleep(Duration::from_millis(1));
    }
}
