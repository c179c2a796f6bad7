//! A run that hangs fails. A lock that stays held after a panic shows as a call that never returns.

use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;

use dirtymap::space::SpaceStats;

use crate::{Config, Op, Rule, Violation, run};

/// Far more than the longest program takes on a loaded machine.
const PATIENCE: Duration = Duration::from_secs(120);

/// As [`run`], on a thread of its own, with this time limit.
pub(crate) fn run_watched(ops: &[Op], config: &Config) -> Result<SpaceStats, Violation> {
    let (ops, config) = (ops.to_vec(), *config);
    let (say, hear) = channel();
    let (step, count) = (ops.len(), ops.len());
    let runner = std::thread::spawn(move || {
        let _ = say.send(run(&ops, &config));
    });
    match hear.recv_timeout(PATIENCE) {
        Ok(outcome) => outcome,
        Err(RecvTimeoutError::Timeout) => Err(Violation {
            rule: Rule::Answer,
            step,
            text: format!("a program of {count} steps does not end"),
        }),
        Err(RecvTimeoutError::Disconnected) => match runner.join() {
            Err(panic) => std::panic::resume_unwind(panic),
            Ok(()) => Err(Violation {
                rule: Rule::Answer,
                step,
                text: "a program ended without a word".to_owned(),
            }),
        },
    }
}
