//! Runs a model with the protocol as it is, and with single steps left out.
#![allow(dead_code, unreachable_pub)] // helpers of tests; each file uses a part of them

use std::sync::Mutex as StdMutex;
use std::sync::atomic::{AtomicUsize as StdUsize, Ordering::SeqCst};

use dirtymap::sync::{Step, leave_out};

/// One model at a time: the step that is left out is global.
static ONE_AT_A_TIME: StdMutex<()> = StdMutex::new(());

/// Runs `model`, which says whether the contract held, as it is: it must hold in every execution. Then without each
/// of `steps`: it must fail in one. A model reports instead of panicking, because a panic unwinds through objects
/// of the model checker.
pub fn holds_only_with(steps: &[Step], model: impl Fn() -> bool + Sync + Send + Copy + 'static) {
    let _one = ONE_AT_A_TIME.lock().unwrap_or_else(|e| e.into_inner());
    let (executions, failures) = explore(None, model);
    println!("holds in {executions} executions");
    assert!(executions > 1, "the model explored nothing");
    assert_eq!(failures, 0, "the contract is broken");
    for step in steps {
        let (executions, failures) = explore(Some(*step), model);
        println!("without {step:?}: fails in {failures} of {executions} executions");
        assert!(
            failures > 0,
            "without {step:?} the model still holds: it proves nothing"
        );
    }
}

/// All executions of `model` without `step`, and how many of them broke the contract.
fn explore(
    step: Option<Step>,
    model: impl Fn() -> bool + Sync + Send + Copy + 'static,
) -> (usize, usize) {
    static EXECUTIONS: StdUsize = StdUsize::new(0);
    static FAILURES: StdUsize = StdUsize::new(0);
    EXECUTIONS.store(0, SeqCst);
    FAILURES.store(0, SeqCst);
    leave_out(step);
    let mut builder = loom::model::Builder::new();
    builder.max_branches = 10_000;
    builder.check(move || {
        EXECUTIONS.fetch_add(1, SeqCst);
        if !model() {
            FAILURES.fetch_add(1, SeqCst);
        }
    });
    leave_out(None);
    (EXECUTIONS.load(SeqCst), FAILURES.load(SeqCst))
}
