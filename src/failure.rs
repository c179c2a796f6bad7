//! The failure of a call of users' code: an error or a panic.
//!
//! Sources, invalidators and frees are users' code, and each of their calls may panic. Each goes
//! through [`call`], which catches the panic. So the code that cleans up handles a panic as it
//! handles an error, outside of any unwinding, and may call users' code again. At the end the
//! public call returns the error, or resumes the panic: [`Failure::raise`].

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

use crate::error::Error;

/// The payload of a panic.
pub(crate) type Panic = Box<dyn Any + Send>;

/// The failure of a call of users' code, or of a call that made such calls.
pub(crate) enum Failure {
    /// It returned an error.
    Refused(Error),
    /// It panicked.
    Panicked(Panic),
}

impl Failure {
    /// The error that the public call returns to its caller.
    ///
    /// # Panics
    /// Resumes the panic that was caught, if the failure is one.
    pub(crate) fn raise(self) -> Error {
        match self {
            Failure::Refused(error) => error,
            Failure::Panicked(panic) => resume_unwind(panic),
        }
    }

    /// Combines this failure with one in the cleanup that followed it. A panic wins over an error,
    /// and the first panic over the second. Of two errors the later one wins, because it names the
    /// work that is left.
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

    /// Changes the error, if the failure is one.
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

/// Calls users' code, and catches its panic.
///
/// # Errors
/// The panic. The caller assumes the worst that the code could have done, and resumes the panic
/// later.
pub(crate) fn call<T>(code: impl FnOnce() -> T) -> Result<T, Panic> {
    // Unwind safety: users' code answers for its own state. What we hand to it is either shared,
    // under locks and atomics that are valid at each step, or a value that the caller discards, or
    // assumes to be wrong, after a panic.
    catch_unwind(AssertUnwindSafe(code))
}

/// The same as [`call`], for code that returns an error, or that has caught a panic itself.
///
/// # Errors
/// The error or the panic.
pub(crate) fn attempt<T, E: Into<Failure>>(
    code: impl FnOnce() -> Result<T, E>,
) -> Result<T, Failure> {
    match call(code) {
        Ok(outcome) => outcome.map_err(Into::into),
        Err(panic) => Err(Failure::Panicked(panic)),
    }
}

/// Drops the payload of a panic when another panic goes on in its place. The payload is users'
/// code, too: if its destructor panics, that second payload is leaked, because such a chain could
/// go on for ever.
pub(crate) fn forget(panic: Panic) {
    if let Err(another) = call(|| drop(panic)) {
        std::mem::forget(another);
    }
}

/// Stores the first of several panics, and drops the others.
pub(crate) fn keep_first(first: &mut Option<Panic>, panic: Panic) {
    match first {
        Some(_) => forget(panic),
        None => *first = Some(panic),
    }
}

/// Resumes a panic, unless this thread is panicking already: a second panic would abort the
/// process.
pub(crate) fn go_on(panic: Option<Panic>) {
    match panic {
        Some(panic) if std::thread::panicking() => forget(panic),
        Some(panic) => resume_unwind(panic),
        None => (),
    }
}

#[cfg(all(test, not(dirtymap_loom)))]
mod tests {
    use super::*;

    fn panicked(text: &'static str) -> Failure {
        Failure::Panicked(Box::new(text))
    }

    fn refused(at: u64) -> Failure {
        let at = crate::units::Iova::new(at);
        Failure::Refused(Error::CannotSplit { at })
    }

    fn text(failure: Failure) -> String {
        match failure {
            Failure::Refused(error) => error.to_string(),
            Failure::Panicked(panic) => format!("panic {:?}", panic.downcast_ref::<&str>()),
        }
    }

    /// An error of the undoing, such as a flush that is refused, does not hide the panic that made
    /// it necessary.
    #[test]
    fn a_panic_goes_on_before_any_error_and_the_first_before_the_second() {
        let told = |first: Failure, later: Failure| text(first.then(later));
        let first = "panic Some(\"first\")";
        assert_eq!(told(panicked("first"), refused(1)), first);
        assert_eq!(told(panicked("first"), panicked("later")), first);
        assert_eq!(told(refused(1), panicked("first")), first);
        assert_eq!(told(refused(1), refused(2)), text(refused(2)));
    }
}
