//! Which bytes of a read were received.

use std::collections::BTreeMap;

use super::error::{NbdError, at_most};

/// The most pieces that lie apart: every second sector of the longest read, and as many again.
const MAX_PIECES: u64 = 1 << 16;

/// The bytes that were received, as pieces that do not touch each other.
#[derive(Debug, Default)]
pub(super) struct Pieces {
    /// The end of each piece, by its start.
    ends: BTreeMap<u64, u64>,
    bytes: u64,
}

impl Pieces {
    /// How many bytes there are.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Adds the bytes from `start` up to `end`, of which there is at least one.
    ///
    /// Each call adds a byte or is refused, so a read of some length ends after as many calls.
    pub(super) fn add(&mut self, start: u64, end: u64) -> Result<(), NbdError> {
        let before = self
            .ends
            .range(..end)
            .next_back()
            .map(|(&at, &to)| (at, to));
        if start >= end || before.is_some_and(|(_, to)| to > start) {
            return Err(NbdError::Invalid {
                place: "the offset of data",
                found: start,
                why: "it comes twice in one reply, counted from the start of the read",
            });
        }
        self.bytes += end - start;
        let end = self.ends.remove(&end).unwrap_or(end);
        if let Some((at, to)) = before
            && to == start
        {
            self.ends.insert(at, end);
            return Ok(());
        }
        let found = self.ends.len() as u64 + 1;
        at_most("the number of pieces of a read", found, MAX_PIECES)?;
        self.ends.insert(start, end);
        Ok(())
    }
}
