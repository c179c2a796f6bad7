//! The failures that a run can report.

use std::fmt;

/// A promise that was broken.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{rule}, at step {step}: {text}")]
pub struct Violation {
    /// Which promise.
    pub rule: Rule,
    /// The step of the program; its length for the checks at the end.
    pub step: usize,
    /// The observed and the expected result.
    pub text: String,
}

/// The promises that a run checks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rule {
    /// In the end the copy equals the memory, byte for byte.
    Lost,
    /// A harvest reports the pages that were written before.
    Unreported,
    /// A harvest reports no page that cannot be dirty.
    Excess,
    /// No bit outside the request is written, and bits that are set stay set.
    Bitmap,
    /// The counts add up.
    Accounting,
    /// A call does what its documentation says, or refuses with the right error and changes
    /// nothing.
    Answer,
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Rule::Lost => "a write was lost",
            Rule::Unreported => "a dirty page was not reported",
            Rule::Excess => "a clean page was reported",
            Rule::Bitmap => "a bit changed that must not",
            Rule::Accounting => "the counts are wrong",
            Rule::Answer => "a wrong answer",
        })
    }
}

/// Ok if `holds`; otherwise a violation of `rule`, whose step the runner fills in.
pub(crate) fn check(
    holds: bool,
    rule: Rule,
    text: impl FnOnce() -> String,
) -> Result<(), Violation> {
    if holds {
        Ok(())
    } else {
        Err(violation(rule, text()))
    }
}

/// Ok if both are equal.
pub(crate) fn same<T: fmt::Debug + PartialEq>(
    rule: Rule,
    what: &str,
    got: T,
    right: T,
) -> Result<(), Violation> {
    check(got == right, rule, || {
        format!("{what}: {got:?} instead of {right:?}")
    })
}

pub(crate) fn violation(rule: Rule, text: String) -> Violation {
    Violation {
        rule,
        step: 0,
        text,
    }
}
