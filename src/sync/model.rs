//! Runs models: the protocol as it is, and with single steps left out.
//!
//! A model returns whether the contract held. It does not panic, because a panic would unwind
//! through objects of the model checker.

use std::any::type_name;
use std::io::Write;
use std::sync::Mutex as StdMutex;
use std::sync::atomic::{AtomicBool as StdBool, AtomicUsize as StdUsize, Ordering::SeqCst};

#[cfg(dirtymap_loom)]
use super::sites;
use super::{Step, leave_out};

/// One model at a time: the step that is left out is global, and so are the counts.
static ONE_AT_A_TIME: StdMutex<()> = StdMutex::new(());

static EXECUTIONS: StdUsize = StdUsize::new(0);
static FAILURES: StdUsize = StdUsize::new(0);

/// A [`Witness`](super::Witness) has seen a race in this execution.
static BROKEN: StdBool = StdBool::new(false);

/// This execution broke the memory model, even if the model returns true.
pub fn broken() {
    BROKEN.store(true, SeqCst);
}

/// Whether this execution broke the memory model.
pub fn is_broken() -> bool {
    BROKEN.load(SeqCst)
}

/// The result of an exploration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Explored {
    /// Executions that were explored.
    pub executions: usize,
    /// The number of those that broke the contract.
    pub failures: usize,
}

/// Whether the run asks for more than the daily runs do.
pub fn is_deep() -> bool {
    std::env::var_os("DIRTYMAP_DEEP").is_some()
}

/// One execution of `model`, counted.
fn count(model: impl Fn() -> bool) {
    BROKEN.store(false, SeqCst);
    EXECUTIONS.fetch_add(1, SeqCst);
    let held = model();
    if !held || is_broken() {
        FAILURES.fetch_add(1, SeqCst);
    }
}

fn counted(explore: impl FnOnce()) -> Explored {
    EXECUTIONS.store(0, SeqCst);
    FAILURES.store(0, SeqCst);
    explore();
    Explored {
        executions: EXECUTIONS.load(SeqCst),
        failures: FAILURES.load(SeqCst),
    }
}

/// The name of the function that is, or contains, `M`.
pub fn name_of<M>(_: &M) -> &'static str {
    let name = type_name::<M>();
    let name = name.split('<').next().unwrap_or(name);
    let mut parts = name.rsplit("::").filter(|part| *part != "{{closure}}");
    parts.next().unwrap_or(name)
}

/// Appends to the file that `DIRTYMAP_CAUGHT` names that `model` fails without `step`. Does nothing
/// if the variable is not set.
///
/// # Panics
/// If the file cannot be written: a run whose record is lost proves less than it claims.
pub fn caught(step: Step, model: &str) {
    let Some(path) = std::env::var_os("DIRTYMAP_CAUGHT") else {
        return;
    };
    let line = format!("{step:?} {model}\n");
    let file = std::fs::File::options()
        .create(true)
        .append(true)
        .open(path);
    let written = file.and_then(|mut file| file.write_all(line.as_bytes()));
    assert!(written.is_ok(), "no record of what was caught: {written:?}");
}

/// Returns whether `access` panics, and prints nothing. The model checker panics at a race that a
/// witness has seen.
#[cfg(dirtymap_loom)]
pub(super) fn panics(access: impl FnOnce()) -> bool {
    static SILENT: StdBool = StdBool::new(false);
    // Installed once, around the hook that is there: the model checkers have hooks of their own.
    static FILTER: std::sync::Once = std::sync::Once::new();
    FILTER.call_once(|| {
        let others = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            if !SILENT.load(SeqCst) {
                others(panic);
            }
        }));
    });
    let before = SILENT.swap(true, SeqCst);
    let panics = std::panic::catch_unwind(std::panic::AssertUnwindSafe(access)).is_err();
    SILENT.store(before, SeqCst);
    panics
}

/// Restores the protocol, also when an exploration panics.
struct Restore;

impl Drop for Restore {
    fn drop(&mut self) {
        leave_out(None);
    }
}

/// Pseudorandom numbers, the same in every run (splitmix64): the choices of a seed besides the
/// schedule.
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// The numbers of `seed`.
    pub fn new(seed: u64) -> Self {
        Random(seed)
    }

    /// The next number below `bound`, which is not 0.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        (mixed ^ (mixed >> 31)) % bound
    }
}

/// The one seed that `DIRTYMAP_SEED` names, or else `count` seeds.
///
/// # Panics
/// If the variable is not a number.
pub fn seeds(count: u64) -> std::ops::Range<u64> {
    match std::env::var("DIRTYMAP_SEED") {
        Ok(seed) => match seed.parse() {
            Ok(seed) => seed..seed + 1,
            Err(_) => panic!("DIRTYMAP_SEED={seed} is no number"),
        },
        Err(_) => 0..count,
    }
}

#[cfg(dirtymap_loom)]
mod imp {
    use super::*;

    /// Set in the processes that [`breaks_without`] starts.
    const ALONE: &str = "DIRTYMAP_WITHOUT";

    /// The file of what the weakened sites did: see [`sites_are_weakened`].
    const SITES: &str = "DIRTYMAP_SITES";

    /// The bound of preemptions in an execution.
    #[derive(Clone, Copy, Debug)]
    pub struct Bound {
        least: usize,
        most: usize,
        executions: Option<usize>,
    }

    impl Bound {
        /// As many as `LOOM_MAX_PREEMPTIONS` says.
        pub const USUAL: Bound = Bound::between(0, usize::MAX);

        /// At least `least`, because fewer find nothing, and at most `most`, because more take too
        /// long. One more in deep runs.
        pub const fn between(least: usize, most: usize) -> Self {
            Bound {
                least,
                most,
                executions: None,
            }
        }

        /// At most this many executions.
        pub const fn up_to(self, executions: usize) -> Self {
            Bound {
                executions: Some(executions),
                ..self
            }
        }

        fn builder(self) -> loom::model::Builder {
            let mut builder = loom::model::Builder::new();
            builder.max_branches = 20_000;
            let most = self.most.saturating_add(usize::from(is_deep()));
            let usual = builder.preemption_bound.unwrap_or(3);
            builder.preemption_bound = Some(usual.max(self.least).min(most));
            builder
        }
    }

    /// Explores `model` as it is: it must hold in every execution. Then explores it without each of
    /// `steps`: it must fail in at least one execution. The model returns whether the contract
    /// held.
    ///
    /// # Panics
    /// If the model fails as it is, holds without a step, or has only one execution, so that there
    /// was nothing to explore.
    pub fn holds_only_with<M>(steps: &[Step], model: M)
    where
        M: Fn() -> bool + Sync + Send + Copy + 'static,
    {
        holds_within(Bound::USUAL, steps, model);
    }

    /// The same as [`holds_only_with`], within the bound `bound`.
    ///
    /// # Panics
    /// As [`holds_only_with`].
    pub fn holds_within<M>(bound: Bound, steps: &[Step], model: M)
    where
        M: Fn() -> bool + Sync + Send + Copy + 'static,
    {
        let name = name_of(&model);
        if std::env::var_os(ALONE).is_some() {
            return; // in a process for another model of the same test
        }
        if sites_are_weakened(bound, model) {
            return;
        }
        let whole = explore(bound, None, model);
        println!("{name} holds in {} executions", whole.executions);
        assert!(whole.executions > 1, "{name} explored nothing");
        assert_eq!(whole.failures, 0, "{name}: the contract is broken");
        fails_without(bound, steps, model);
    }

    /// The second half of [`holds_within`]: the model must fail without each of `steps`.
    ///
    /// # Panics
    /// As [`holds_only_with`].
    pub fn fails_without<M>(bound: Bound, steps: &[Step], model: M)
    where
        M: Fn() -> bool + Sync + Send + Copy + 'static,
    {
        let name = name_of(&model);
        if std::env::var_os(SITES).is_some() {
            return; // the first half has weakened what the model reaches
        }
        for step in steps {
            let broken = explore(bound, Some(*step), model);
            let Explored {
                executions,
                failures,
            } = broken;
            println!("{name} without {step:?}: fails in {failures} of {executions} executions");
            assert!(
                failures > 0,
                "{name} still holds without {step:?}: it proves nothing"
            );
            caught(*step, name);
        }
    }

    /// The same for a step without which the model checker itself stops, in the middle of objects
    /// that do not unwind. The test `test`, which calls this, is run again in a process of its own,
    /// which must end with a race or a deadlock.
    ///
    /// # Panics
    /// If it does not.
    pub fn breaks_without<M>(step: Step, test: &str, model: M)
    where
        M: Fn() -> bool + Sync + Send + Copy + 'static,
    {
        let name = name_of(&model);
        if std::env::var_os(SITES).is_some() {
            return; // as in `fails_without`
        }
        if std::env::var_os(ALONE).is_some() {
            leave_out(Some(step));
            Bound::USUAL.builder().check(move || count(model));
            return;
        }
        let run = std::env::current_exe().and_then(|this| {
            std::process::Command::new(this)
                .args([test, "--exact", "--nocapture"])
                .env(ALONE, format!("{step:?}"))
                .output()
        });
        let dies = run.is_ok_and(|run| {
            !run.status.success()
                && ["Causality violation", "deadlock"]
                    .iter()
                    .any(|end| String::from_utf8_lossy(&run.stderr).contains(end))
        });
        assert!(
            dies,
            "{name} still holds without {step:?}: it proves nothing"
        );
        println!("{name} without {step:?}: a race or a deadlock");
        caught(step, name);
    }

    /// If `DIRTYMAP_SITES` names a file, weakens each ordering that the model reaches, one at a
    /// time, and appends to the file what happens: a line `reached SITE`, and then `try SITE MODEL`
    /// followed by `caught SITE MODEL` or `holds SITE MODEL`. A site that the file has as caught or
    /// as tried by this model is not tried again. A trial ends after as many seconds as
    /// `DIRTYMAP_SITES_SECONDS` says. An execution may end the process, in the middle of objects
    /// that do not unwind: then the file ends with the `try`. Returns false if there is no file.
    ///
    /// # Panics
    /// If the file cannot be read or written.
    pub fn sites_are_weakened<M>(bound: Bound, model: M) -> bool
    where
        M: Fn() -> bool + Sync + Send + Copy + 'static,
    {
        let Some(path) = std::env::var_os(SITES) else {
            return false;
        };
        let _one = ONE_AT_A_TIME.lock().unwrap_or_else(|e| e.into_inner());
        let name = name_of(&model);
        let record = std::fs::read_to_string(&path).unwrap_or_default();
        let known: std::collections::HashSet<&str> = record.lines().collect();
        let append = |line: String| {
            let file = std::fs::File::options()
                .create(true)
                .append(true)
                .open(&path);
            let written = file.and_then(|mut file| file.write_all(format!("{line}\n").as_bytes()));
            assert!(written.is_ok(), "no record of the sites: {written:?}");
        };
        let within = |executions: usize, seconds: u64| {
            let mut builder = bound.builder();
            builder.max_permutations = Some(executions);
            builder.max_duration = Some(std::time::Duration::from_secs(seconds));
            // The model checker looks at both bounds where it would write a checkpoint.
            builder.checkpoint_interval = 20;
            builder
        };
        let seconds = std::env::var("DIRTYMAP_SITES_SECONDS");
        let seconds: u64 = seconds.ok().and_then(|s| s.parse().ok()).unwrap_or(20);
        let reached = sites::collect(|| within(2_000, 5).check(move || count(model)));
        for site in &reached {
            let line = format!("reached {site}");
            if !known.contains(&*line) {
                append(line);
            }
        }
        let caught = |site: &str| {
            let start = format!("caught {site} ");
            known.iter().any(|line| line.starts_with(&start))
        };
        for site in reached {
            let tried = format!("try {site} {name}");
            if caught(&site.to_string()) || known.contains(&*tried) {
                continue;
            }
            append(tried);
            let explored = sites::without(&site, || {
                let mut found = Explored {
                    executions: 0,
                    failures: 0,
                };
                let mut check = |executions| {
                    let builder = within(executions, seconds);
                    found = counted(|| {
                        if panics(|| builder.check(move || count(model))) {
                            FAILURES.fetch_add(1, SeqCst);
                        }
                    });
                    found.failures > 0
                };
                let _ = check(100) || check(usize::MAX);
                found
            });
            let verdict = if explored.failures > 0 {
                "caught"
            } else {
                "holds"
            };
            println!(
                "{verdict} {site} {name}: {} executions",
                explored.executions
            );
            append(format!("{verdict} {site} {name}"));
        }
        true
    }

    /// Explores `model` without `step`: all executions; or, for a model that must fail, only until
    /// it has failed.
    pub fn explore<M>(bound: Bound, step: Option<Step>, model: M) -> Explored
    where
        M: Fn() -> bool + Sync + Send + Copy + 'static,
    {
        let _one = ONE_AT_A_TIME.lock().unwrap_or_else(|e| e.into_inner());
        let _restore = Restore;
        leave_out(step);
        let up_to = |permutations: Option<usize>| {
            let mut builder = bound.builder();
            builder.max_permutations = permutations;
            // The model checker looks at the bound where it would write a checkpoint.
            builder.checkpoint_interval = permutations.unwrap_or(usize::MAX);
            let check = || builder.check(move || count(model));
            counted(|| match step {
                None => check(),
                // The model checker panics at a race, which is as good a failure as any.
                Some(_) if panics(check) => {
                    FAILURES.fetch_add(1, SeqCst);
                }
                Some(_) => (),
            })
        };
        let first = step.is_some().then_some([100, 2_000, 40_000]);
        let fewer = |permutations: &usize| bound.executions.is_none_or(|most| *permutations < most);
        for permutations in first.into_iter().flatten().filter(fewer) {
            let explored = up_to(Some(permutations));
            if explored.failures > 0 || explored.executions + 1 < permutations {
                return explored;
            }
        }
        up_to(bound.executions)
    }
}

#[cfg(dirtymap_shuttle)]
mod imp {
    use super::*;
    use shuttle::scheduler::{PctScheduler, RandomScheduler, Scheduler};
    use shuttle::{Config, FailurePersistence, Runner};

    /// Preemptions that the PCT scheduler places, plus one.
    const DEPTH: usize = 4;
    /// Executions of the PCT scheduler for a seed. The first one tells it how long they are.
    const EXECUTIONS: usize = 4;

    /// Runs `model` under the random and the PCT scheduler for `count` seeds (one if
    /// `DIRTYMAP_SEED` is set): it must hold. Then runs it without each of `steps`, for at most ten
    /// times as many seeds: it must fail. The model gets the seed, and returns whether the contract
    /// held.
    ///
    /// # Panics
    /// If the model fails as it is, or holds without a step.
    pub fn holds_only_with<M>(count: u64, steps: &[Step], model: M)
    where
        M: Fn(u64) -> bool + Sync + Send + Copy + 'static,
    {
        let _one = ONE_AT_A_TIME.lock().unwrap_or_else(|e| e.into_inner());
        let _restore = Restore;
        let name = name_of(&model);
        let count = if is_deep() { count * 20 } else { count };
        let mut executions = 0;
        for seed in seeds(count) {
            for (scheduler, explored) in explore(seed, model) {
                executions += explored.executions;
                assert_eq!(
                    explored.failures, 0,
                    "{name} does not hold: seed {seed}, {scheduler} scheduler; \
                     DIRTYMAP_SEED={seed} repeats it"
                );
            }
        }
        println!("{name} holds in {executions} executions");
        for step in steps {
            leave_out(Some(*step));
            let found = seeds(count * 10).find_map(|seed| {
                let of = |explored: Explored| explored.failures > 0;
                let failed = explore(seed, model).into_iter().find(|(_, e)| of(*e));
                failed.map(|(scheduler, _)| (seed, scheduler))
            });
            match found {
                Some((seed, scheduler)) => {
                    println!(
                        "{name} without {step:?}: fails at seed {seed}, {scheduler} scheduler"
                    );
                    caught(*step, name);
                }
                None => panic!("{name} still holds without {step:?}: it proves nothing"),
            }
        }
    }

    /// The result of one seed, for each scheduler.
    fn explore<M>(seed: u64, model: M) -> [(&'static str, Explored); 2]
    where
        M: Fn(u64) -> bool + Sync + Send + Copy + 'static,
    {
        let random = RandomScheduler::new_from_seed(seed, 1);
        let pct = PctScheduler::new_from_seed(seed, DEPTH, EXECUTIONS);
        [
            ("random", run(random, seed, model)),
            ("PCT", run(pct, seed, model)),
        ]
    }

    fn run<M>(scheduler: impl Scheduler + 'static, seed: u64, model: M) -> Explored
    where
        M: Fn(u64) -> bool + Sync + Send + Copy + 'static,
    {
        let mut config = Config::new();
        config.stack_size = 1 << 19;
        config.failure_persistence = FailurePersistence::None;
        let runner = Runner::new(scheduler, config);
        counted(|| {
            runner.run(move || {
                count(|| model(seed));
                // To the epoch, all threads of an execution are one thread, and it outlives the
                // execution. What they deferred must not run in another execution.
                for _ in 0..64 {
                    crossbeam_epoch::pin().flush();
                }
            });
        })
    }
}

pub use imp::*;
