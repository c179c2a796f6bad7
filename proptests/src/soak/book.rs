//! The epochs of a named consumer, as its thread knows them: what was committed since each of its
//! cursors, and the last epoch.

use std::collections::BTreeSet;

use dirtymap::harvest::{Cursor, Epoch, Lineage, Parent, Since, Why};
use dirtymap::{Consumer, IovaRange};

use super::failure::Failure;
use super::layout;

/// See the [module](self).
#[derive(Default)]
pub(super) struct Book {
    cursors: Vec<(Cursor, BTreeSet<u64>)>,
    /// `None` before the first commit.
    newest: Option<Epoch>,
    /// Its bounds were small at some time.
    pub(super) is_bounded: bool,
}

/// Cursors at most.
const MOST: usize = 4;

impl Book {
    /// A lease with these runs was committed. If `gaps`, tracking may have been off for a while.
    pub(super) fn committed(
        &mut self,
        lineage: Option<Lineage>,
        runs: impl IntoIterator<Item = IovaRange>,
        gaps: bool,
    ) -> Result<(), Failure> {
        let Some(lineage) = lineage else {
            return Err(Failure::new("a consumer's commit without a lineage"));
        };
        let right = match (lineage.parent, self.newest) {
            (_, None) => true,
            (Parent::Epoch(parent), Some(newest)) => parent == newest || gaps,
            (Parent::Everything(why), _) => why == Why::Bounds && self.is_bounded,
            (_, _) => gaps,
        };
        if !right {
            let newest = self.newest;
            return Err(Failure::new(format!(
                "{lineage:?} after the epoch {newest:?}"
            )));
        }
        self.newest = Some(lineage.epoch);
        let pages: Vec<u64> = runs.into_iter().flat_map(layout::pages_of).collect();
        for (_, written) in &mut self.cursors {
            written.extend(&pages);
        }
        Ok(())
    }

    pub(super) fn keep(&mut self, consumer: &Consumer<'_>) {
        if self.cursors.len() < MOST {
            self.cursors.push((consumer.cursor(), BTreeSet::new()));
        }
    }

    pub(super) fn release(&mut self, nth: u64) {
        if !self.cursors.is_empty() {
            drop(self.cursors.swap_remove(nth as usize % self.cursors.len()));
        }
    }

    /// Asks for what was committed since each cursor.
    pub(super) fn check(&self, consumer: &Consumer<'_>, gaps: bool) -> Result<(), Failure> {
        for (cursor, right) in &self.cursors {
            match consumer.since(cursor.epoch()) {
                Since::Everything(Why::Bounds) if self.is_bounded => {}
                Since::Everything(Why::Untracked) if gaps => {}
                Since::Runs(written) => {
                    let pages: BTreeSet<u64> = written.runs().flat_map(layout::pages_of).collect();
                    if pages != *right {
                        return Err(Failure::new(format!(
                            "{} pages since {}, not the {} that were committed",
                            pages.len(),
                            cursor.epoch(),
                            right.len()
                        )));
                    }
                }
                Since::Everything(why) => {
                    let epoch = cursor.epoch();
                    return Err(Failure::new(format!("everything since {epoch}: {why}")));
                }
            }
        }
        Ok(())
    }
}
