//! The results of a replay: numbers, and the first failures.

use std::collections::BTreeMap;
use std::fmt;

/// The number of failures that are printed in full.
const TOLD: usize = 20;

#[derive(Clone, Copy, Default)]
struct Count {
    passed: u64,
    failed: u64,
}

/// The results of a replay.
#[derive(Default)]
pub(crate) struct Report {
    /// Sequences that began.
    pub(crate) sequences: u64,
    /// Probes of the size of a structure that does not exist here.
    pub(crate) skipped: u64,
    classes: BTreeMap<&'static str, Count>,
    exceptions: BTreeMap<&'static str, u64>,
    failures: Vec<String>,
}

impl Report {
    /// Counts one operation: right, perhaps by an exception, or wrong.
    pub(crate) fn add(
        &mut self,
        class: &'static str,
        verdict: Result<Option<&'static str>, String>,
    ) {
        let count = self.classes.entry(class).or_default();
        match verdict {
            Ok(exception) => {
                count.passed += 1;
                if let Some(name) = exception {
                    *self.exceptions.entry(name).or_default() += 1;
                }
            }
            Err(failure) => {
                count.failed += 1;
                if self.failures.len() < TOLD {
                    self.failures.push(failure);
                }
            }
        }
    }

    /// Operations that were right.
    pub(crate) fn passed(&self) -> u64 {
        self.classes.values().map(|count| count.passed).sum()
    }

    /// Operations that were wrong.
    pub(crate) fn failed(&self) -> u64 {
        self.classes.values().map(|count| count.failed).sum()
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for failure in &self.failures {
            writeln!(f, "FAILED {failure}")?;
        }
        writeln!(f, "{:<60} {:>8} {:>8}", "operations", "passed", "failed")?;
        for (class, count) in &self.classes {
            writeln!(f, "{class:<60} {:>8} {:>8}", count.passed, count.failed)?;
        }
        writeln!(f, "{:<60} {:>8}", "stricter than the kernel", "times")?;
        for (name, times) in &self.exceptions {
            writeln!(f, "{name:<60} {times:>8}")?;
        }
        writeln!(
            f,
            "{} sequences, {} probes of sizes skipped",
            self.sequences, self.skipped
        )?;
        write!(f, "{} passed, {} failed", self.passed(), self.failed())
    }
}
