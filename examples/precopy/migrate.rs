//! The migrator: copy everything, then rounds of harvest, sync and copy, until the rest can be
//! copied with the devices stopped.

use std::num::NonZeroU64;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use dirtymap::meter::Plan;
use dirtymap::space::SpaceStats;
use dirtymap::{Consumer, HarvestRequest, Holes, IovaRange, Rounds, UserBitmap};
use pagetable_sim::Format;

use crate::Failure;
use crate::cli::Sabotage;
use crate::compare::Comparison;
use crate::destination::Destination;
use crate::machine::{Machine, PAGE};
use crate::progress::Progress;
use crate::replay;
use crate::report::{RoundKind, RoundRecord};

/// The least number of rounds before the migrator may stop, without the full copy.
const MIN_ROUNDS: u32 = 5;
/// The number of consecutive rounds that may fail to shrink the dirty set.
const PATIENCE: u32 = 3;
/// The longest copy with the machine stopped.
const DOWNTIME: Duration = Duration::from_millis(50);
/// The same in pages, for a link without a limit.
const SMALL: u64 = 256;

/// The destination, and the link to it.
pub(crate) struct Migration<'a, F: Format> {
    machine: &'a Machine<F>,
    progress: &'a Progress,
    replay: &'a replay::Progress,
    sabotage: Option<Sabotage>,
    /// The consumer to which harvests leave nothing, by sabotage.
    forgotten: Option<Rounds<'a>>,
    destination: Destination<'a, F>,
    bytes_per_second: Option<f64>,
    bitmap: Vec<AtomicU64>,
    began: Instant,
    harvested: Instant,
    rounds: Vec<RoundRecord>,
    /// The time from the start to the end of the last round.
    took: Duration,
}

/// The conditions under which the migrator stops the machine.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Decision {
    Continue,
    SmallEnough,
    StoppedShrinking,
    RoundsUsedUp,
}

impl<'a, F: Format> Migration<'a, F> {
    pub(crate) fn new(
        machine: &'a Machine<F>,
        progress: &'a Progress,
        replay: &'a replay::Progress,
        sabotage: Option<Sabotage>,
        backup: &Consumer<'a>,
        bytes_per_second: Option<f64>,
    ) -> Result<Self, Failure> {
        let words = machine.range.granules(PAGE).div_ceil(64);
        Ok(Migration {
            machine,
            progress,
            replay,
            sabotage,
            forgotten: (sabotage == Some(Sabotage::ForgetConsumer)).then(|| backup.rounds()),
            destination: Destination::new(machine)?,
            bytes_per_second,
            bitmap: (0..words).map(|_| AtomicU64::new(0)).collect(),
            began: Instant::now(),
            harvested: Instant::now(),
            rounds: Vec::new(),
            took: Duration::ZERO,
        })
    }

    /// Copies every page. Tracking must be on, so that the first harvest finds the pages that are
    /// written meanwhile.
    pub(crate) fn copy_everything(&mut self) -> Result<(), Failure> {
        let pages = self.machine.range.granules(PAGE) as u64;
        let started = self.began.elapsed();
        self.progress.round_begins(0, RoundKind::Full, pages, 0.0);
        self.harvested = Instant::now();
        let copying = Instant::now();
        let bytes = self.copy(std::iter::once(self.machine.range))?;
        self.destination.whole();
        self.finish(RoundRecord {
            round: 0,
            kind: RoundKind::Full,
            started_ms: started.as_millis() as u64,
            dirty_pages: pages,
            bytes_copied: bytes,
            harvest_us: 0,
            flush_us: 0,
            copy_us: copying.elapsed().as_micros() as u64,
            invalidation_commands: 0,
            dropped_translations: 0,
            drained_writes: 0,
            dirty_rate_pages_per_s: 0.0,
        });
        Ok(())
    }

    /// Harvests, syncs and copies once.
    pub(crate) fn round(&mut self, kind: RoundKind) -> Result<(), Failure> {
        let round = self.rounds.len() as u32;
        let started = self.began.elapsed();
        let space = &self.machine.space;
        let before = space.stats();
        for word in &self.bitmap {
            word.store(0, Ordering::Relaxed);
        }
        let request = HarvestRequest::new(self.machine.range, PAGE).holes(Holes::Refuse);
        // Put back at the end; an error ends the run.
        let words = std::mem::take(&mut self.bitmap);
        let bitmap = UserBitmap::shared(&words);

        let clock = Instant::now();
        let lease = space.harvest(&request, bitmap)?;
        let harvest = clock.elapsed();
        let interval = self.harvested.elapsed();
        self.harvested = Instant::now();

        let dirty = lease.report().bits_set;
        let rate = dirty as f64 / interval.as_secs_f64().max(1e-6);
        self.progress.round_begins(round, kind, dirty, rate);
        let mut copy = Duration::ZERO;
        let mut bytes = 0;
        if self.sabotage == Some(Sabotage::CopyBeforeSync) {
            // The lease has no ranges before its sync, but the bitmap can be read.
            let clock = Instant::now();
            let bitmap = UserBitmap::shared(&words);
            let view = bitmap.view(self.machine.range, PAGE);
            bytes = self.copy(view.map_err(dirtymap::Error::from)?.runs())?;
            copy = clock.elapsed();
        }

        let clock = Instant::now();
        let lease = lease.sync()?;
        let flush = clock.elapsed();

        if self.sabotage != Some(Sabotage::CopyBeforeSync) {
            let clock = Instant::now();
            bytes = self.copy(lease.runs())?;
            copy = clock.elapsed();
        }
        lease.commit();
        self.bitmap = words;
        if let Some(forgotten) = &mut self.forgotten {
            // The pages that the round has left to that consumer are committed, and not copied.
            forgotten.next()?.commit();
        }

        let did = invalidated_since(&before, &space.stats());
        self.finish(RoundRecord {
            round,
            kind,
            started_ms: started.as_millis() as u64,
            dirty_pages: dirty,
            bytes_copied: bytes,
            harvest_us: harvest.as_micros() as u64,
            flush_us: flush.as_micros() as u64,
            copy_us: copy.as_micros() as u64,
            invalidation_commands: did.commands,
            dropped_translations: did.dropped,
            drained_writes: did.drained,
            dirty_rate_pages_per_s: rate,
        });
        Ok(())
    }

    /// The migration as a plan, if the link has a limit.
    pub(crate) fn plan(&self, max_rounds: u32) -> Option<Plan> {
        let rate = NonZeroU64::new(self.bytes_per_second? as u64)?;
        let mut plan = Plan::new(self.machine.range.len() as u64, rate, DOWNTIME);
        plan.rounds = MIN_ROUNDS.min(max_rounds)..=max_rounds;
        Some(plan)
    }

    /// Whether another round is useful.
    pub(crate) fn decide(&self, max_rounds: u32) -> Decision {
        let small = match self.bytes_per_second {
            Some(rate) => (rate * DOWNTIME.as_secs_f64()) as u64 / PAGE.bytes(),
            None => SMALL,
        };
        decide(&self.rounds, small, max_rounds)
    }

    /// The records of the rounds, and the time of all of them.
    pub(crate) fn into_rounds(self) -> (Vec<RoundRecord>, Duration) {
        (self.rounds, self.took)
    }

    /// Compares source and destination byte for byte. The machine must have stopped.
    pub(crate) fn compare(&self) -> Result<Comparison, Failure> {
        self.destination.compare()
    }

    fn finish(&mut self, record: RoundRecord) {
        self.progress.round_ends(&record);
        self.rounds.push(record);
        self.took = self.began.elapsed();
    }

    /// Copies `ranges` over the link, and waits for the time that a real link takes. Returns the
    /// bytes.
    fn copy(&mut self, ranges: impl Iterator<Item = IovaRange>) -> Result<u64, Failure> {
        let clock = Instant::now();
        let mut copied = 0;
        for range in ranges {
            self.destination.copy(range, |block| {
                copied += block.len() as u64;
                self.progress.copied(block.granules(PAGE) as u64);
                self.progress
                    .replayed(self.replay.issued.load(Ordering::Relaxed));
                if let Some(rate) = self.bytes_per_second {
                    let due = Duration::from_secs_f64(copied as f64 / rate);
                    if let Some(early) = due.checked_sub(clock.elapsed()) {
                        std::thread::sleep(early);
                    }
                }
            })?;
        }
        Ok(copied)
    }
}

/// The decision after the rounds so far, of which the first is the full copy.
fn decide(rounds: &[RoundRecord], small: u64, max_rounds: u32) -> Decision {
    let precopy: Vec<u64> = rounds
        .iter()
        .skip(1)
        .map(|round| round.dirty_pages)
        .collect();
    let done = precopy.len() as u32;
    if done >= max_rounds {
        return Decision::RoundsUsedUp;
    }
    if done < MIN_ROUNDS {
        return Decision::Continue;
    }
    if precopy.last().is_some_and(|dirty| *dirty <= small) {
        return Decision::SmallEnough;
    }
    let (old, new) = precopy.split_at(precopy.len() - PATIENCE as usize);
    match (old.iter().min(), new.iter().min()) {
        (Some(old), Some(new)) if new >= old => Decision::StoppedShrinking,
        _ => Decision::Continue,
    }
}

/// The invalidations between two readings of the counters.
fn invalidated_since(before: &SpaceStats, after: &SpaceStats) -> dirtymap::flush::Invalidated {
    let (before, after) = (before.flush.invalidated, after.flush.invalidated);
    dirtymap::flush::Invalidated {
        commands: after.commands - before.commands,
        bytes: after.bytes - before.bytes,
        dropped: after.dropped - before.dropped,
        drained: after.drained - before.drained,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rounds(dirty: &[u64]) -> Vec<RoundRecord> {
        let full = crate::report::samples::run().rounds.swap_remove(0);
        let mut rounds = vec![full.clone()];
        rounds.extend(dirty.iter().map(|dirty| RoundRecord {
            dirty_pages: *dirty,
            ..full.clone()
        }));
        rounds
    }

    #[test]
    fn goes_on_until_small_or_stuck_or_out_of_rounds() {
        assert_eq!(decide(&rounds(&[]), 10, 30), Decision::Continue);
        assert_eq!(
            decide(&rounds(&[5, 4, 3, 2]), 10, 30),
            Decision::Continue,
            "too few rounds to tell"
        );
        assert_eq!(
            decide(&rounds(&[900, 400, 100, 50, 9]), 10, 30),
            Decision::SmallEnough
        );
        assert_eq!(
            decide(&rounds(&[900, 400, 100, 50, 40]), 10, 30),
            Decision::Continue
        );
        assert_eq!(
            decide(&rounds(&[900, 100, 100, 110, 120]), 10, 30),
            Decision::StoppedShrinking
        );
        assert_eq!(decide(&rounds(&[900, 800]), 10, 2), Decision::RoundsUsedUp);
    }
}
