//! A panic is an error: what calls of users' code end with, if not with success.
//!
//! Sources, invalidators and frees are users' code, and each of their calls may panic. Each goes
//! through [`call`], so all that cleans up sees a panic as it sees an error, outside of any
//! unwinding: it may call users' code again. The public call that is at the top at last returns the
//! error, or lets the panic go on: [`Failure::raise`].

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

use crate::error::Error;

/// What a panic carries.
pub(crate) type Panic = Box<dyn Any + Send>;

/// Why a call of users' code, or one that made such calls, did not succeed.
pub(crate) enum Failure {
    /// It said no.
    Refused(Error),
    /// It did not come back.
    Panicked(Panic),
}

impl Failure {
    /// What the public call gives to its caller: the error.
    ///
    /// # Panics
    /// With the panic that was caught, if it was one: it goes on here.
    pub(crate) fn raise(self) -> Error {
        match self {
            Failure::Refused(error) => error,
            Failure::Panicked(panic) => resume_unwind(panic),
        }
    }

    /// This failure, and what failed in cleaning up after it: a panic goes on before any error, and
    /// the first before the second; of two errors the later one says what is left to do.
    pub(crate) fn then(self, later: Failure) -> Failure {
        match (self, later) {
            (Failure::Panicked(first), Failure::Panicked(second)) => {
                forget(second);
                Failure::Panicked(first)
            }
            (first @ Failure::Panicked(_), Failure::Refused(_)) => first,
            (Failure::Refused(_), later) => later,
        }
    }

    /// The failure of a part.
    pub(crate) fn map_error(self, map: impl FnOnce(Error) -> Error) -> Failure {
        match self {
            Failure::Refused(error) => Failure::Refused(map(error)),
            panicked => panicked,
        }
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Failure::Refused(error)
    }
}

/// Calls users' code.
///
/// # Errors
/// The panic that it ended with. The caller treats it as the worst that the code could have done,
/// and lets it go on later.
pub(crate) fn call<T>(code: impl FnOnce() -> T) -> Result<T, Panic> {
    // What users' code leaves half done is its own: it has what it was given by shared reference,
    // under locks and by atomics that hold at each step, or it writes to values whose callers throw
    // them away, or take the worst for granted.
    catch_unwind(AssertUnwindSafe(code))
}

/// As [`call`], of code that can refuse, or has caught a panic itself.
///
/// # Errors
/// Its error, or its panic.
pub(crate) fn attempt<T, E: Into<Failure>>(
    code: impl FnOnce() -> Result<T, E>,
) -> Result<T, Failure> {
    match call(code) {
        Ok(outcome) => outcome.map_err(Into::into),
        Err(panic) => Err(Failure::Panicked(panic)),
    }
}

/// Drops a panic that another one goes on instead of. It is users' code, too: a payload whose
/// destructor panics leaves one more, which is leaked, for that could go on for ever.
pub(crate) fn forget(panic: Panic) {
    if let Err(another) = call(|| drop(panic)) {
        std::mem::forget(another);
    }
}

/// Keeps the first panic of several.
pub(crate) fn keep_first(first: &mut Option<Panic>, panic: Panic) {
    match first {
        Some(_) => forget(panic),
        None => *first = Some(panic),
    }
}

/// Lets a panic go on, unless one goes by already: a second one would end the process.
pub(crate) fn go_on(panic: Option<Panic>) {
    match panic {
        Some(panic) if std::thread::panicking() => forget(panic),
        Some(panic) => resume_unwind(panic),
        None => (),
    }
}
