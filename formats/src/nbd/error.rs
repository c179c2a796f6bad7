//! Why a connection ends, or an export cannot be made.

use std::io;

use dirtymap::IovaRange;

/// What is wrong with a peer, with a connection, or with what was to be served. Each names the
/// place: the field of the protocol at which the connection ends.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NbdError {
    /// The connection failed, or ended inside a message.
    #[error("the connection failed at {place}: {source}")]
    Io {
        /// The field that was sent or received.
        place: &'static str,
        /// Of the system.
        source: io::Error,
    },
    /// The peer does not speak this protocol, or lost its place in it.
    #[error("{place} is {found:#x}, but {expected:#x} is expected there")]
    Magic {
        /// The field.
        place: &'static str,
        /// What the peer sent.
        found: u64,
        /// What belongs there.
        expected: u64,
    },
    /// The peer sent a number or a length that is not allowed there.
    #[error("{place} is {found}, but {limit} is the limit")]
    Limit {
        /// The field.
        place: &'static str,
        /// What the peer sent.
        found: u64,
        /// The most that is taken.
        limit: u64,
    },
    /// The peer sent what has no meaning there.
    #[error("{place} is {found:#x}: {why}")]
    Invalid {
        /// The field.
        place: &'static str,
        /// What the peer sent.
        found: u64,
        /// What is wrong with it.
        why: &'static str,
    },
    /// The server answered with an error.
    #[error("the server refuses {place} with code {code:#x}: {text}")]
    Refused {
        /// What was asked for.
        place: &'static str,
        /// Of the protocol.
        code: u32,
        /// What the server says, as far as it is text.
        text: String,
    },
    /// The server does not have the context that was asked for.
    #[error("the export has no metadata context {name:?}")]
    NoContext {
        /// Its name.
        name: String,
    },
    /// A name is longer than the protocol allows, or given twice.
    #[error("the name {name:?} {why}")]
    Name {
        /// The name, cut to 64 characters.
        name: String,
        /// What is wrong with it.
        why: &'static str,
    },
    /// A run of dirty bytes begins past the end of the export.
    #[error("the run {run} lies past the end of the export, which has {size} bytes")]
    Outside {
        /// The run.
        run: IovaRange,
        /// Bytes of the export.
        size: u64,
    },
}

impl NbdError {
    pub(super) fn io(place: &'static str) -> impl FnOnce(io::Error) -> NbdError {
        move |source| NbdError::Io { place, source }
    }

    pub(super) fn name(name: &str, why: &'static str) -> NbdError {
        let name = name.chars().take(64).collect();
        NbdError::Name { name, why }
    }
}

/// `found`, unless it exceeds `limit`.
pub(super) fn at_most(place: &'static str, found: u64, limit: u64) -> Result<u64, NbdError> {
    if found > limit {
        return Err(NbdError::Limit {
            place,
            found,
            limit,
        });
    }
    Ok(found)
}
