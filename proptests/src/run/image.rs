//! The copies of consumers that follow the lineage of their leases, and cursors.

use std::collections::{BTreeMap, BTreeSet};

use dirtymap::harvest::{Cursor, Epoch};

use crate::pages::{Bytes, PAGE};

/// A copy that a consumer keeps by the lineage of its leases, as a backup tool does.
#[derive(Clone, Debug, Default)]
pub(super) struct Image {
    /// `None` before the space has consumers.
    pub(super) epoch: Option<Epoch>,
    /// By page. An absent page is zero.
    pub(super) pages: BTreeMap<u64, Box<Bytes>>,
    /// Pages of areas that were mapped since the consumer joined, which it copies by itself.
    pub(super) mapped: BTreeSet<u64>,
    /// Writes that were not tracked are missing. The next lineage has to say so.
    pub(super) is_stale: bool,
}

/// What a lease has copied: addresses, and the bytes from there on, within a page.
pub(super) type Fresh = Vec<(u64, Vec<u8>)>;

/// A cursor of a consumer with a number, which joined as the one with the other number.
pub(super) struct Kept {
    pub(super) whose: usize,
    pub(super) join: u64,
    pub(super) cursor: Cursor,
}

impl Image {
    pub(super) fn apply(&mut self, fresh: &Fresh) {
        for (at, bytes) in fresh {
            let from = (at % PAGE) as usize;
            let page = self.pages.entry(at / PAGE);
            let page = page.or_insert_with(|| Box::new([0; PAGE as usize]));
            page[from..from + bytes.len()].copy_from_slice(bytes);
        }
    }
}
