//! The backup: a consumer of its own. Every few seconds it copies the pages that were written since
//! its last increment to a destination of its own. Its first increment is everything.

use std::time::{Duration, Instant};

use dirtymap::{Consumer, Rounds};
use pagetable_sim::Format;

use crate::Failure;
use crate::compare::Comparison;
use crate::destination::Destination;
use crate::machine::{Machine, PAGE};
use crate::progress::Progress;
use crate::replay;
use crate::report::IncrementRecord;

/// The interval at which it looks whether the machine has stopped.
const NAP: Duration = Duration::from_millis(10);

/// See the [module](self).
pub(crate) struct Backup<'a, F: Format> {
    destination: Destination<'a, F>,
    rounds: Rounds<'a>,
    progress: &'a Progress,
    began: Instant,
    increments: Vec<IncrementRecord>,
}

impl<'a, F: Format> Backup<'a, F> {
    /// A backup for `consumer`, whose first harvest reports everything.
    pub(crate) fn new(
        machine: &'a Machine<F>,
        consumer: &Consumer<'a>,
        progress: &'a Progress,
    ) -> Result<Self, Failure> {
        Ok(Backup {
            destination: Destination::new(machine)?,
            rounds: consumer.rounds(),
            progress,
            began: Instant::now(),
            increments: Vec::new(),
        })
    }

    /// Takes an increment at once, and then every `every`, until the machine stops.
    pub(crate) fn run(
        &mut self,
        every: Duration,
        replay: &replay::Progress,
    ) -> Result<(), Failure> {
        self.increment()?;
        let mut next = every;
        while !replay.is_stopped() {
            if self.began.elapsed() < next {
                std::thread::sleep(NAP);
                continue;
            }
            next = self.began.elapsed() + every;
            self.increment()?;
        }
        Ok(())
    }

    /// Takes one increment.
    pub(crate) fn increment(&mut self) -> Result<(), Failure> {
        let started = self.began.elapsed();
        let lease = self.rounds.next()?;
        let mut bytes = 0;
        for run in lease.runs() {
            // A run may go on from one area into the next one.
            bytes += self.destination.copy(run, |_| ())?;
            lease.commit_range(run);
        }
        let report = lease.commit();
        self.destination.whole();
        let record = IncrementRecord {
            increment: self.increments.len() as u32,
            started_ms: started.as_millis() as u64,
            dirty_pages: report.bits_set,
            bytes_copied: bytes,
            took_us: (self.began.elapsed() - started).as_micros() as u64,
        };
        self.progress.increment_ends(&record);
        debug_assert_eq!(record.dirty_pages, bytes / PAGE.bytes());
        self.increments.push(record);
        Ok(())
    }

    /// Compares the memory with the backup, byte for byte. The machine must have stopped.
    pub(crate) fn compare(&self) -> Result<Comparison, Failure> {
        self.destination.compare()
    }

    /// The records of the increments.
    pub(crate) fn into_increments(self) -> Vec<IncrementRecord> {
        self.increments
    }
}
