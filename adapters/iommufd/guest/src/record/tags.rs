//! How the answer to a read is classified. A replay compares a plain one bit for bit.

use super::bitmap::Bitmap;
use super::model::{Areas, Run};
use crate::mock::Get;

/// What is known about a read.
pub(crate) struct Read<'a> {
    pub(crate) get: &'a Get,
    pub(crate) errno: i32,
    /// Whether tracking is on.
    pub(crate) tracked: bool,
    /// None for a NULL pointer.
    pub(crate) bitmap: Option<&'a Bitmap>,
    pub(crate) areas: &'a Areas,
    /// What was dirty before.
    pub(crate) dirty: &'a [Run],
}

impl Read<'_> {
    pub(crate) fn tags(&self) -> Vec<&'static str> {
        let mut tags = Vec::new();
        if self.errno != 0 {
            return vec!["error"];
        }
        if !self.tracked {
            tags.push("tracking-off");
        }
        let Get {
            iova,
            length,
            page_size,
            ..
        } = *self.get;
        if !page_size.is_power_of_two() {
            tags.push("np2-page-size");
        }
        let bits = length.checked_div(page_size).unwrap_or(0);
        if !self.bitmap.is_some_and(|bitmap| bitmap.can_hold(bits)) {
            tags.push("bad-buffer");
        }
        let end = iova.saturating_add(length);
        let (reached, areas) = self.areas.walk(iova, end);
        if areas == 0 {
            tags.push("unmapped-start");
        } else if reached < end {
            tags.push("gap");
        }
        if areas > 1 {
            tags.push("multi-area");
        }
        // An old walk goes wrong at a leaf that begins below the range, dirty or not.
        if self.areas.leaf(iova).is_some_and(|(start, _)| start < iova) {
            tags.push(match self.is_dirty(iova) {
                true => "straddle-start-lost",
                false => "straddle-start",
            });
        }
        let last = end - 1;
        let above = self.areas.leaf(last).map(|(start, len)| start + len);
        if above.is_some_and(|above| above > end) {
            tags.push(match self.is_dirty(last) {
                true => "straddle-end",
                false => "straddle-end-clean",
            });
        }
        if tags.is_empty() {
            tags.push("plain");
        }
        if self.bitmap.is_some_and(|bitmap| bitmap.off % 8 != 0) {
            tags.push("unaligned-data");
        }
        tags
    }

    fn is_dirty(&self, iova: u64) -> bool {
        self.dirty
            .iter()
            .any(|(start, len)| iova >= *start && iova - start < *len)
    }
}
