//! The library beside all peers in one process, which take turns in rounds. Each family has one
//! table.
//!
//! ```text
//!  Family --for each workload--> Contest: all peers, in rounds --samples--> Report
//!                                                             table, JSON, plots <--+
//! ```
//!
//! A shared machine has slow and fast phases, some of them longer than a round. So the peers take
//! turns within a round, and each ratio is of one round. The tables show the least and the median
//! over all rounds.
//!
//! # A family
//! A family is one file, and one line in [`FAMILIES`]. Its `run` builds the peers and calls
//! [`contest`] for each set of workloads that are measured together:
//!
//! ```
//! use dirtymap_benches::compare::{
//!     Contestant, Report, Settings, Target, Workload, contest, per_operation,
//! };
//! use std::hint::black_box;
//!
//! let settings = Settings::quick();
//! let mut report = Report::default();
//! let numbers: Vec<u64> = (0..1000).collect();
//! let (numbers, turn) = (&numbers, settings.turn);
//! let by_loop = move |times| {
//!     for _ in 0..times {
//!         black_box(black_box(numbers).iter().sum::<u64>());
//!     }
//! };
//! let by_fold = move |times| {
//!     for _ in 0..times {
//!         black_box(black_box(numbers).iter().fold(0, |sum, n| sum + n));
//!     }
//! };
//! contest(
//!     &settings,
//!     &mut report,
//!     "sums",
//!     vec![Workload::time("sum of 1000").target(Target::Ratio(0.5))],
//!     vec![
//!         Contestant::ours("loop", move || vec![per_operation(turn, by_loop)])
//!             .checked(|| numbers.iter().sum()),
//!         Contestant::peer("fold", move || vec![per_operation(turn, by_fold)])
//!             .checked(|| 499_500),
//!     ],
//! );
//! assert!(report.problems().is_empty());
//! println!("{}", report.table("sums"));
//! ```
//!
//! Its `grow`, if it has one, runs its main operations over some decades of size, as
//! [`grown`](Workload::grown) workloads. It reports them under the family of its argument. The
//! family `growth` calls it.
//!
//! # Time
//! A contest ends when all rounds are done, or after [`Settings::least_rounds`] with the round in
//! which the time of [`Settings::contest`] is over. So a family takes as long as its contests and
//! their preparation. With [`Settings::thorough`] that is one to four minutes for each family, with
//! [`Settings::quick`] some seconds, because workloads with a longer preparation are left out.

use std::io::{IsTerminal, stderr};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

use crate::PAGE_LG2;

pub mod areas;
pub mod consumers;
pub mod document;
pub mod end_to_end;
pub mod growth;
pub mod harvest;
pub mod marks;
pub mod memory;
mod plot;
mod report;
mod row;
pub mod tables;
pub(crate) mod ticks;

pub use report::Report;
pub use row::{Role, Scale, Target, Unit, Workload};

/// Workloads that are measured and shown together.
pub struct Family {
    /// Its name for `--only`.
    pub name: &'static str,
    /// Runs all its contests.
    pub run: fn(&Settings, &mut Report),
    /// Runs its main operations over some decades of size, and reports them under the family of
    /// this name.
    pub grow: Option<fn(&Settings, &mut Report, &'static str)>,
}

/// All families, in the order in which they are run.
pub const FAMILIES: &[Family] = &[
    marks::FAMILY,
    harvest::FAMILY,
    consumers::FAMILY,
    tables::FAMILY,
    end_to_end::FAMILY,
    areas::FAMILY,
    growth::FAMILY,
];

/// How much to measure.
pub struct Settings {
    /// The number of turns of each peer, if there is time.
    pub rounds: usize,
    /// The least number of turns of each peer.
    pub least_rounds: usize,
    /// The length of a turn, for workloads that can be repeated at will.
    pub turn: Duration,
    /// The time after which a contest ends with the current round.
    pub contest: Duration,
    /// Whether the numbers are to be kept. Otherwise workloads with a long preparation are left
    /// out.
    pub thorough: bool,
    /// Only workloads whose name contains this.
    pub matching: String,
    /// The progress of the run, on standard error.
    progress: ProgressBar,
}

impl Settings {
    /// A minute or two for all families, to see the effect of a change, and that nothing is broken.
    pub fn quick() -> Self {
        Settings {
            rounds: 3,
            least_rounds: 2,
            turn: Duration::from_millis(2),
            contest: Duration::from_millis(150),
            thorough: false,
            matching: String::new(),
            progress: progress(),
        }
    }

    /// Some minutes, for numbers to keep.
    pub fn thorough() -> Self {
        Settings {
            rounds: 15,
            least_rounds: 3,
            turn: Duration::from_millis(15),
            contest: Duration::from_secs(2),
            thorough: true,
            ..Settings::quick()
        }
    }

    /// Sizes of memories for what grows with them, in bytes, as logarithms: 1 GiB to 64 TiB, or
    /// less. Without those for which the system has too little memory.
    pub fn decades(&self) -> impl Iterator<Item = u32> + use<> {
        /// Bitmaps that are in use at the same time, of all peers and of the callers.
        const BITMAPS: u64 = 7;
        let lg2s: &[u32] = if self.thorough {
            &[30, 36, 40, 43, 46]
        } else {
            &[30, 33, 36]
        };
        let available = memory::available().unwrap_or(u64::MAX);
        let fits = move |lg2: &u32| {
            let fits = BITMAPS << (lg2 - PAGE_LG2 - 3) <= available;
            if !fits {
                eprintln!("growth: left out 2^{lg2} bytes: there is too little memory");
            }
            fits
        };
        lg2s.iter().copied().filter(fits)
    }

    /// Shows the current work.
    pub fn at(&self, what: impl Into<String>) {
        self.progress.set_message(what.into());
        self.progress.tick();
    }

    /// Prints the beginning of a contest, on outputs that cannot show a changing line.
    fn begin(&self, what: &str) {
        if self.progress.is_hidden() {
            eprintln!("{what}");
        }
    }
}

fn progress() -> ProgressBar {
    if !stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let progress = ProgressBar::new_spinner();
    if let Ok(style) = ProgressStyle::with_template("{spinner} [{elapsed_precise}] {msg}") {
        progress.set_style(style);
    }
    progress
}

/// A contestant: a peer with its state.
pub struct Contestant<'a> {
    name: &'static str,
    role: Role,
    turn: Box<dyn FnMut() -> Vec<f64> + 'a>,
    check: Option<Box<dyn FnMut() -> u64 + 'a>>,
}

impl<'a> Contestant<'a> {
    /// A contestant with this `role`. A turn returns a number for each of the contest's workloads.
    pub fn new(name: &'static str, role: Role, turn: impl FnMut() -> Vec<f64> + 'a) -> Self {
        Contestant {
            name,
            role,
            turn: Box::new(turn),
            check: None,
        }
    }

    /// One of ours.
    pub fn ours(name: &'static str, turn: impl FnMut() -> Vec<f64> + 'a) -> Self {
        Contestant::new(name, Role::Ours, turn)
    }

    /// A peer.
    pub fn peer(name: &'static str, turn: impl FnMut() -> Vec<f64> + 'a) -> Self {
        Contestant::new(name, Role::Peer, turn)
    }

    /// A limit: the best that the machine allows.
    pub fn limit(name: &'static str, turn: impl FnMut() -> Vec<f64> + 'a) -> Self {
        Contestant::new(name, Role::Limit, turn)
    }

    /// The same, with an output: a sum over all results of the work. It is computed before the
    /// first round and after the last one, is not timed, and must be the same for all contestants
    /// that have one.
    pub fn checked(mut self, output: impl FnMut() -> u64 + 'a) -> Self {
        self.check = Some(Box::new(output));
        self
    }
}

/// Runs the turns of all contestants, and records their numbers as those of `workloads`. Outputs
/// that differ, and values that are not numbers, are [problems](Report::problems).
pub fn contest(
    settings: &Settings,
    report: &mut Report,
    family: &'static str,
    workloads: Vec<Workload>,
    mut contestants: Vec<Contestant<'_>>,
) {
    let wanted = |workload: &Workload| workload.name.contains(&settings.matching);
    let Some(first) = workloads.iter().find(|workload| wanted(workload)) else {
        return;
    };
    let what = format!("{family}: {}", first.name);
    settings.begin(&what);
    check(report, family, &what, &mut contestants);
    // samples[contestant][workload][round]
    let mut samples = vec![vec![Vec::new(); workloads.len()]; contestants.len()];
    let began = Instant::now();
    for round in 0..settings.rounds {
        if round >= settings.least_rounds && began.elapsed() >= settings.contest {
            break;
        }
        for step in 0..contestants.len() {
            // The first contestant changes with each round.
            let at = (step + round) % contestants.len();
            settings.at(format!(
                "{what}: {}, round {}",
                contestants[at].name,
                round + 1
            ));
            let numbers = (contestants[at].turn)();
            for (samples, number) in samples[at].iter_mut().zip(numbers) {
                samples.push(number);
            }
        }
    }
    check(report, family, &what, &mut contestants);
    for (at, workload) in workloads.into_iter().enumerate() {
        let cells = contestants.iter().zip(&mut samples);
        let cells =
            cells.map(|(who, samples)| (who.name, who.role, std::mem::take(&mut samples[at])));
        report.add(family, workload, cells.collect());
    }
}

/// Compares the outputs of all contestants that have one.
fn check(
    report: &mut Report,
    family: &'static str,
    what: &str,
    contestants: &mut [Contestant<'_>],
) {
    let mut first: Option<(&'static str, u64)> = None;
    for contestant in contestants {
        let Some(output) = contestant.check.as_mut().map(|check| check()) else {
            continue;
        };
        let (name, expected) = *first.get_or_insert((contestant.name, output));
        if output != expected {
            let text = format!(
                "{what}: the outputs of {name} and {} differ",
                contestant.name
            );
            report.problem(family, text);
        }
    }
}

/// Nanoseconds for one operation. `run` performs as many operations as its argument says, and is
/// called for about `turn`.
pub fn per_operation(turn: Duration, mut run: impl FnMut(usize)) -> f64 {
    // Enough operations that the cost of the clock is negligible.
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
            // The runs before were for warming up.
            batch *= 2;
            (operations, spent) = (0, Duration::ZERO);
        }
    }
}

/// The next `count` items of an endless repetition of a list.
pub struct Endless<'a, T> {
    items: &'a [T],
    next: usize,
}

impl<'a, T> Endless<'a, T> {
    /// From the first item on.
    pub fn new(items: &'a [T]) -> Self {
        Endless { items, next: 0 }
    }

    /// Calls `each` with one or more slices that have `count` items together.
    pub fn take(&mut self, mut count: usize, mut each: impl FnMut(&'a [T])) {
        while count > 0 {
            let end = self.items.len().min(self.next + count);
            each(&self.items[self.next..end]);
            count -= end - self.next;
            self.next = end % self.items.len();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn outputs_that_differ_are_a_problem() {
        let of = |outputs: [u64; 2]| {
            let mut report = Report::default();
            let one = || vec![1.0];
            let contestants = vec![
                Contestant::ours("ours", one).checked(|| outputs[0]),
                Contestant::peer("theirs", one).checked(|| outputs[1]),
                Contestant::peer("without", one),
            ];
            let workloads = vec![Workload::time("w")];
            contest(&Settings::quick(), &mut report, "f", workloads, contestants);
            report.problems().len()
        };
        assert_eq!(of([7, 7]), 0);
        assert_eq!(of([7, 8]), 2, "before and after");
    }

    #[test]
    fn a_number_that_a_turn_does_not_give_is_a_problem() {
        let mut report = Report::default();
        let workloads = vec![Workload::time("one"), Workload::time("two")];
        let contestants = vec![Contestant::ours("ours", || vec![1.0])];
        contest(&Settings::quick(), &mut report, "f", workloads, contestants);
        assert_eq!(report.problems(), ["f: two: ours has no samples"]);
    }
}
