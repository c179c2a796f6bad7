//! Ours beside all peers in one process: rounds in turn, one table for each family.
//!
//! ```text
//!  Family --for each workload--> Contest: every peer, round after round --samples--> Report --> table, JSON
//! ```
//!
//! A machine that others use as well has slow and fast phases, some of them longer than a round. So the peers take turns
//! within a round, a ratio is that of one round, and what is shown are the least and the median over all rounds.
//!
//! A family is one file: a list of workloads that it puts to its peers.

use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

pub mod areas;
pub mod memory;
mod report;
pub(crate) mod ticks;

pub use report::Report;

/// Workloads that are measured and shown together.
pub struct Family {
    /// What `--only` calls it.
    pub name: &'static str,
    /// Runs all its contests.
    pub run: fn(&Settings, &mut Report),
}

/// All families, in the order in which they are run.
pub const FAMILIES: &[Family] = &[areas::FAMILY];

/// How thoroughly to measure.
pub struct Settings {
    /// How often each peer has its turn.
    pub rounds: usize,
    /// Only workloads whose name contains this.
    pub matching: String,
    /// How long one turn takes, for workloads that can be repeated at will.
    pub turn: Duration,
    /// Where the run is; on standard error.
    progress: ProgressBar,
}

impl Settings {
    /// Under a minute, to see whether a change is for the better.
    pub fn quick() -> Self {
        Settings::new(3, Duration::from_millis(3))
    }

    /// Some minutes, for numbers to keep.
    pub fn thorough() -> Self {
        Settings::new(15, Duration::from_millis(20))
    }

    fn new(rounds: usize, turn: Duration) -> Self {
        let progress = ProgressBar::new_spinner();
        if let Ok(style) = ProgressStyle::with_template("{spinner} [{elapsed_precise}] {msg}") {
            progress.set_style(style);
        }
        Settings {
            rounds,
            matching: String::new(),
            turn,
            progress,
        }
    }

    /// Says what is done now.
    pub fn at(&self, what: impl Into<String>) {
        self.progress.set_message(what.into());
        self.progress.tick();
    }
}

/// What a number counts.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Unit {
    /// Nanoseconds for one operation.
    Nanoseconds,
    /// Bytes for one item.
    Bytes,
}

/// One who takes turns: a peer with its state.
pub struct Contestant<'a> {
    /// The name of the peer.
    pub name: &'static str,
    /// Whether it is one of ours; ratios are against the first one that is.
    pub ours: bool,
    /// One turn: a number for each of the contest's workloads.
    pub turn: Box<dyn FnMut() -> Vec<f64> + 'a>,
}

/// Lets all take turns, and records `workloads`: what the numbers of a turn stand for.
pub fn contest(
    settings: &Settings,
    report: &mut Report,
    family: &'static str,
    workloads: &[(String, Unit)],
    mut contestants: Vec<Contestant<'_>>,
) {
    if !workloads
        .iter()
        .any(|(name, _)| name.contains(&settings.matching))
    {
        return;
    }
    // samples[contestant][workload][round]
    let mut samples = vec![vec![Vec::new(); workloads.len()]; contestants.len()];
    for round in 0..settings.rounds {
        for step in 0..contestants.len() {
            // Nobody always comes first.
            let at = (step + round) % contestants.len();
            let name = contestants[at].name;
            let (workload, rounds) = (&workloads[0].0, settings.rounds);
            settings.at(format!(
                "{workload}: {name}, round {} of {rounds}",
                round + 1
            ));
            let numbers = (contestants[at].turn)();
            for (samples, number) in samples[at].iter_mut().zip(numbers) {
                samples.push(number);
            }
        }
    }
    for (at, (workload, unit)) in workloads.iter().enumerate() {
        let rows = contestants.iter().zip(&mut samples);
        let rows =
            rows.map(|(who, samples)| (who.name, who.ours, std::mem::take(&mut samples[at])));
        report.add(family, workload.clone(), *unit, rows.collect());
    }
}

/// Nanoseconds for one of the operations that `run` performs as many of as it is told, over about `turn`.
fn per_operation(turn: Duration, mut run: impl FnMut(usize)) -> f64 {
    // Enough of them that the clock does not count.
    let mut batch = 1;
    let (mut operations, mut spent) = (0, Duration::ZERO);
    loop {
        let began = Instant::now();
        run(batch);
        let took = began.elapsed();
        operations += batch;
        spent += took;
        if spent >= turn {
            return spent.as_nanos() as f64 / operations as f64;
        }
        if took < Duration::from_micros(100) {
            // What came before was for warming up.
            batch *= 2;
            (operations, spent) = (0, Duration::ZERO);
        }
    }
}

/// The next `count` items of a list without an end.
struct Endless<'a, T> {
    items: &'a [T],
    next: usize,
}

impl<'a, T> Endless<'a, T> {
    fn new(items: &'a [T]) -> Self {
        Endless { items, next: 0 }
    }

    /// Calls `each` with one or more slices that have `count` items together.
    fn take(&mut self, mut count: usize, mut each: impl FnMut(&'a [T])) {
        while count > 0 {
            let end = self.items.len().min(self.next + count);
            each(&self.items[self.next..end]);
            count -= end - self.next;
            self.next = end % self.items.len();
        }
    }
}
