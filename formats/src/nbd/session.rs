//! What a client and a server have agreed on, and what became of it.

use super::export::{Context, Export};

/// What became of a connection that ended as the protocol has it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Session {
    /// The export that the client chose. A client that only asks what there is chooses none.
    pub export: Option<String>,
    /// Whether the client said that it is done. Otherwise it closed the connection between two
    /// requests, as a client that was killed does too.
    pub said_goodbye: bool,
    /// Requests of all kinds.
    pub requests: u64,
    /// Replies to requests for block status, a reply for each context.
    pub status_replies: u64,
    /// Extents in them.
    pub extents: u64,
    /// Bytes of the disk that were sent.
    pub bytes_read: u64,
    /// Requests that were refused.
    pub refused: u64,
}

/// How the peers have agreed to talk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Mode {
    Simple,
    Structured,
    Extended,
}

/// What a client chose for the second part of a connection.
pub(super) struct Chosen<'e, 'a> {
    pub(super) export: &'e Export<'a>,
    /// With the numbers that the client knows them by.
    pub(super) contexts: Vec<(u32, &'e Context)>,
    pub(super) mode: Mode,
}
