//! The rate meter: a consumer of its own, which looks every quarter of a second. At the end each
//! look is compared with a log of all writes.
//!
//! ```text
//!  phase       0          1         2          3         4
//!           |---------|--look 0--|---------|--look 1--|------
//!  writes      |--a--|     |--b--|             |--c--|
//! ```
//!
//! Look 0 must have the pages of `a`, which began and ended in the phase before it. Both looks may
//! have those of `b`, which overlaps look 0. No look has a page that no write touched, with one
//! exception: if a page is in flight in a harvest of another consumer during a look, the next look
//! finds it once more.

use std::sync::atomic::{AtomicU64, Ordering, fence};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use dirtymap::IovaRange;
use dirtymap::meter::{Meter, Plan, Prediction};

use crate::Failure;
use crate::machine::{BASE, PAGE};
use crate::replay;
use crate::report::{LookRecord, MeterCheck};

/// The interval of the looks.
const EVERY: Duration = Duration::from_millis(250);
/// A write that is so old counts half.
pub(crate) const HALF_LIFE: Duration = Duration::from_secs(5);
const NAP: Duration = Duration::from_millis(10);

/// The phase of the meter: odd during a look.
#[derive(Default)]
pub(crate) struct Phase(AtomicU64);

impl Phase {
    /// The phase before a write begins, or after it has ended.
    pub(crate) fn read(&self) -> u64 {
        // SeqCst: the write comes before or after this in the order of all SeqCst fences.
        fence(Ordering::SeqCst);
        let phase = self.0.load(Ordering::SeqCst);
        fence(Ordering::SeqCst);
        phase
    }

    fn next(&self) {
        fence(Ordering::SeqCst);
        self.0.fetch_add(1, Ordering::SeqCst);
        fence(Ordering::SeqCst);
    }
}

/// One write, or a piece of one: its pages, and the phases in which it began and ended.
#[derive(Clone, Copy)]
pub(crate) struct Written {
    pub(crate) range: IovaRange,
    pub(crate) phases: (u64, u64),
}

/// See the [module](self).
pub(crate) struct Rate<'a> {
    meter: Mutex<Meter<'a>>,
    phase: &'a Phase,
    began: Instant,
    looks: Mutex<Vec<Look>>,
}

/// The result of a look.
struct Look {
    record: LookRecord,
    bytes: u64,
    runs: Vec<IovaRange>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<'a> Rate<'a> {
    pub(crate) fn new(meter: Meter<'a>, phase: &'a Phase) -> Self {
        Rate {
            meter: Mutex::new(meter),
            phase,
            began: Instant::now(),
            looks: Mutex::default(),
        }
    }

    /// Looks again and again, until the machine stops.
    pub(crate) fn run(&self, replay: &replay::Progress) -> Result<(), Failure> {
        let (mut last, mut next) = (Duration::ZERO, EVERY);
        while !replay.is_stopped() {
            let now = self.began.elapsed();
            if now < next {
                std::thread::sleep(NAP);
                continue;
            }
            self.look(now - last)?;
            (last, next) = (now, now + EVERY);
        }
        Ok(())
    }

    /// Looks once more, after the machine has stopped.
    pub(crate) fn last_look(&self) -> Result<(), Failure> {
        let before = lock(&self.looks).last().map_or(0, |look| look.record.at_ms);
        let before = Duration::from_millis(before);
        self.look(self.began.elapsed().saturating_sub(before))
    }

    fn look(&self, elapsed: Duration) -> Result<(), Failure> {
        let mut meter = lock(&self.meter);
        let at = self.began.elapsed();
        self.phase.next();
        let looked = meter.look(elapsed);
        self.phase.next();
        let bytes = looked?;
        let record = LookRecord {
            at_ms: at.as_millis() as u64,
            dirty_pages: bytes / PAGE.bytes(),
            rate_bytes_per_s: meter.rate(),
            took_us: (self.began.elapsed() - at).as_micros() as u64,
        };
        let runs = meter.runs().collect();
        lock(&self.looks).push(Look {
            record,
            bytes,
            runs,
        });
        Ok(())
    }

    /// What the migration will take, by the looks so far.
    pub(crate) fn predict(&self, mut plan: Plan) -> Prediction {
        let looks = lock(&self.looks);
        // A harvest and a flush of the migration take as long as those of a look.
        let all: u64 = looks.iter().map(|look| look.record.took_us).sum();
        plan.overhead = Duration::from_micros(all / (looks.len() as u64).max(1));
        drop(looks);
        lock(&self.meter).predict(&plan)
    }

    /// The rate by area.
    pub(crate) fn rate_of(&self, area: IovaRange) -> f64 {
        lock(&self.meter).rate_of(area)
    }

    /// Compares the looks with `log`, which has every write. The pages of the IO page table have
    /// `leaf` pages each.
    pub(crate) fn check(&self, log: &[Written], pages: u64, leaf: u64) -> MeterCheck {
        let looks = lock(&self.looks);
        let none = || vec![Pages::new(pages); looks.len()];
        let (mut must, mut may) = (none(), none());
        for written in log {
            let (first, last) = numbers(written.range);
            let (began, ended) = written.phases;
            if began == ended && began % 2 == 0 {
                must[(began / 2) as usize].add(first, last);
            }
            // Those that it overlaps, and the one after it.
            let (low, high) = (began / 2, ended.div_ceil(2));
            let (first, last) = (first / leaf * leaf, last / leaf * leaf + leaf - 1);
            for look in low..=high.min(looks.len() as u64 - 1) {
                may[look as usize].add(first, last.min(pages - 1));
            }
        }
        let mut check = MeterCheck::default();
        let mut before = Pages::new(pages);
        for ((look, must), may) in looks.iter().zip(&must).zip(&may) {
            let mut found = Pages::new(pages);
            for run in &look.runs {
                let (first, last) = numbers(*run);
                found.add(first, last);
            }
            check.pages += found.count();
            check.missed += must.minus(&found).count();
            let without_write = found.minus(may);
            let excess = without_write.minus(&before);
            check.excess += excess.count();
            check.twice += without_write.count() - excess.count();
            check.miscounted += found.count().abs_diff(look.bytes / PAGE.bytes());
            before = found;
        }
        check
    }

    /// The records of the looks.
    pub(crate) fn into_looks(self) -> Vec<LookRecord> {
        let looks = self
            .looks
            .into_inner()
            .unwrap_or_else(PoisonError::into_inner);
        looks.into_iter().map(|look| look.record).collect()
    }
}

/// The numbers of the first and the last page of `range`.
fn numbers(range: IovaRange) -> (u64, u64) {
    let number = |at: dirtymap::Iova| (at.get() - BASE) >> PAGE.lg2();
    (number(range.start()), number(range.last()))
}

/// A set of pages.
#[derive(Clone)]
struct Pages(Vec<u64>);

impl Pages {
    fn new(pages: u64) -> Self {
        Pages(vec![0; pages.div_ceil(64) as usize])
    }

    fn add(&mut self, first: u64, last: u64) {
        for page in first..=last {
            self.0[(page / 64) as usize] |= 1 << (page % 64);
        }
    }

    fn count(&self) -> u64 {
        self.0.iter().map(|word| u64::from(word.count_ones())).sum()
    }

    /// Those that are not in `other`.
    fn minus(&self, other: &Pages) -> Pages {
        let words = self.0.iter().zip(&other.0);
        Pages(words.map(|(mine, theirs)| mine & !theirs).collect())
    }
}
