//! The parts of a range outside of all areas.

use crate::units::{Iova, IovaRange};

/// The parts of a range that lie in no area: the first address, and the number of bytes.
#[derive(Debug, Default)]
pub(crate) struct Outside {
    pub(crate) first: Option<Iova>,
    pub(crate) bytes: u64,
}

impl Outside {
    pub(super) fn add(&mut self, at: Iova, bytes: u64) {
        self.first.get_or_insert(at);
        self.bytes = self.bytes.saturating_add(bytes);
    }

    pub(super) fn add_range(&mut self, range: IovaRange) {
        self.add(
            range.start(),
            u64::try_from(range.len()).unwrap_or(u64::MAX),
        );
    }

    /// Adds parts that lie above.
    pub(super) fn join(&mut self, above: Outside) {
        if let Some(at) = above.first {
            self.add(at, above.bytes);
        }
    }
}
