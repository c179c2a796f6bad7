//! The comparison, while all writers rest: the copy against the memory, and the memory against the
//! last write of each writer.
//!
//! First each permanent domain is harvested alone. After that, the lanes of its devices must be
//! complete in the copy. Then everything is harvested until nothing is dirty. After that, all bytes
//! must be equal.

use dirtymap::sync::{AtomicU64, Ordering};
use dirtymap::{Error, Scope};

use super::failure::Failure;
use super::harvester::Harvester;
use super::layout::{self, LANE, PAGE, PAGES};
use super::tally::Count;
use super::world::{DOMAINS, World};
use super::writer::{lane_bytes, number};

/// After this number of harvests nothing may be dirty.
const ROUNDS: u32 = 3;

/// Compares everything; the actors rest.
fn compare(world: &World) -> Result<(), Failure> {
    if world.options.panics {
        // The rest of a failed map anywhere, whose undo panicked as well. No mapper is in the
        // middle of a call.
        let scratch = layout::scratch();
        match world.space.unmap_discarding(scratch) {
            Ok(_) | Err(Error::NothingMapped { .. }) => {}
            Err(error) => return Err(Failure::call("unmap", scratch, error)),
        }
    }
    let mut harvester = Harvester::of_comparison(world, 0);
    let devices = world.options.devices as usize;
    for (nth, id) in world.ids.iter().enumerate() {
        harvester.everything(Scope::Domain(*id))?;
        for page in 0..PAGES {
            world.compare(0, page, |copy, _| {
                let own = (nth..devices).step_by(DOMAINS);
                own.into_iter().try_for_each(|lane| {
                    let what = format!("the copy after a harvest of domain {nth} alone");
                    check_lane(world, page, lane, copy, &what)
                })
            })?;
        }
    }
    for whose in 0..=world.consumers.len() {
        compare_for(world, whose)?;
    }
    identities(world)
}

/// Compares everything that one consumer has copied.
fn compare_for(world: &World, whose: usize) -> Result<(), Failure> {
    let mut harvester = Harvester::of_comparison(world, whose);
    let copied = match whose {
        0 => "the copy".to_owned(),
        _ => format!("the copy of {}", super::world::name(whose)),
    };
    let mut rounds = 0;
    while harvester.everything(Scope::All)? != 0 {
        rounds += 1;
        if rounds == ROUNDS {
            return Err(Failure::new("pages become dirty while all writers rest"));
        }
    }
    for page in 0..PAGES {
        world.compare(whose, page, |copy, memory| {
            for lane in 0..world.shadows.len() {
                check_lane(world, page, lane, memory, "the memory")?;
                check_lane(world, page, lane, copy, &copied)?;
            }
            match copy == memory {
                true => Ok(()),
                false => Err(Failure::new("bytes differ in a lane without a writer").at(page)),
            }
        })?;
    }
    Ok(())
}

/// Checks that the lane in `bytes`, a page of `what`, has the last write of its writer.
fn check_lane(
    world: &World,
    page: u64,
    lane: usize,
    bytes: &[u8; PAGE as usize],
    what: &str,
) -> Result<(), Failure> {
    // Relaxed: the writer rests.
    let expected = world.shadows[lane][page as usize].load(Ordering::Relaxed);
    let found = &bytes[lane * LANE as usize..(lane + 1) * LANE as usize];
    if *found == lane_bytes(expected) {
        return Ok(());
    }
    let (written, by) = number(found);
    Err(Failure::new(format!(
        "lost write: page {page}, lane {lane}, written by {}: {what} has write {written} of lane \
         {by}, expected write {}",
        world.writer(lane),
        expected >> 8,
    ))
    .at(page))
}

/// Each lease was committed or aborted, and each debt was flushed.
fn identities(world: &World) -> Result<(), Failure> {
    let stats = world.space.stats();
    let ended = stats.committed_bytes + stats.aborted_bytes;
    if stats.leased_bytes != ended + world.tally.get(Count::ForgottenBytes) {
        return Err(Failure::new(format!("a lease has no end: {stats:?}")));
    }
    let flush = stats.flush;
    if flush.owed != flush.retired + flush.pending || flush.entries_pending != 0 {
        return Err(Failure::new(format!(
            "a debt is left after the flush: {flush:?}"
        )));
    }
    Ok(())
}

/// The lanes that changed from one comparison to the next.
pub(super) struct Progress {
    seen: Vec<Vec<u64>>,
    writes: u64,
}

impl Progress {
    pub(super) fn new(world: &World) -> Self {
        Progress {
            seen: vec![vec![0; PAGES as usize]; world.shadows.len()],
            writes: 0,
        }
    }

    /// Compares everything, and counts the verified lanes. The actors rest.
    pub(super) fn compare(&mut self, world: &World) -> Result<(), Failure> {
        compare(world)?;
        self.count(world);
        Ok(())
    }

    fn count(&mut self, world: &World) {
        let load = |shadow: &AtomicU64| shadow.load(Ordering::Relaxed); // the writers rest
        let mut changed = 0;
        for (seen, shadow) in self.seen.iter_mut().zip(&world.shadows) {
            for (seen, shadow) in seen.iter_mut().zip(shadow) {
                let now = load(shadow);
                changed += u64::from(now != *seen);
                *seen = now;
            }
        }
        let writes = world.tally.writes();
        world.tally.add(Count::Lanes, changed);
        world.tally.add(Count::Verified, writes - self.writes);
        world.tally.add(Count::Checkpoints, 1);
        self.writes = writes;
    }
}
