//! Logs in shared memory that follow each other: what is marked in any of them is found.
//!
//! # The swap
//! ```text
//!  front end                                    back end
//!  S1  make a fresh log, list it after the old
//!  S2  send it                                  marks in the old one
//!                                               replaces it, waits until no thread marks
//!                                               in the old one, answers
//!  S3  got the answer                           marks in the fresh one
//!  S4  OR what is left of the old into the fresh
//!  S5  take the old one off the list
//! ```
//!
//! *Never invisible:* a harvest looks at all logs of the list. Before S1 a back end has no fresh
//! log to mark in; between S1 and S5 both are on the list; and when the old one leaves it,
//! everything in it is in the fresh one. S4 clears nothing: a harvest that takes a page out of the
//! old one meanwhile has reported it, and it may be reported once more. *Nothing later:* after S3
//! no thread marks in the old log, so S4 has the last of it.

use super::replaceable::Replaceable;
use dirtymap::sync::{Arc, AtomicU64, Mutex, Ordering, Step, lock, performs};

/// The words of a log, little endian on every host.
pub(super) trait LogWords {
    fn words(&self) -> &[AtomicU64];
}

/// Logs, the newest last. There is always one.
#[derive(Debug)]
pub(super) struct LogList<L> {
    /// The logs that harvests look at: a copy of `list`.
    shown: Replaceable<Vec<Arc<L>>>,
    /// Held for each change of it.
    list: Mutex<Vec<Arc<L>>>,
}

impl<L: LogWords> LogList<L> {
    pub(super) fn new(first: L) -> Self {
        let list = vec![Arc::new(first)];
        let shown = Replaceable::default();
        shown.replace(Box::new(list.clone()));
        LogList {
            shown,
            list: Mutex::new(list),
        }
    }

    pub(super) fn newest(&self) -> Arc<L> {
        let list = lock(&self.list);
        Arc::clone(&list[list.len() - 1])
    }

    /// S1: lists what `make` makes of the newest log, and which is not shorter. Waits for harvests
    /// under way.
    ///
    /// # Errors
    /// Those of `make`; the list stays as it was.
    pub(super) fn push<E>(&self, make: impl FnOnce(&L) -> Result<L, E>) -> Result<Arc<L>, E> {
        let mut list = lock(&self.list);
        let fresh = Arc::new(make(&list[list.len() - 1])?);
        list.push(Arc::clone(&fresh));
        if performs(Step::ListFirst) {
            self.shown.replace(Box::new(list.clone()));
        }
        Ok(fresh)
    }

    /// S4 and S5: no thread marks in the logs before `fresh`. Returns how many bits were left
    /// there. Waits for harvests under way.
    pub(super) fn acknowledge(&self, fresh: &Arc<L>) -> u64 {
        let mut list = lock(&self.list);
        let place = list.iter().position(|log| Arc::ptr_eq(log, fresh));
        let mut carried = 0;
        for old in list.drain(..place.unwrap_or(0)) {
            if performs(Step::CarryOver) {
                carried += carry_over(old.words(), fresh.words());
            }
        }
        self.shown.replace(Box::new(list.clone()));
        carried
    }

    /// Calls `read` with the logs that there are.
    pub(super) fn read<R>(&self, read: impl FnOnce(&[Arc<L>]) -> R) -> R {
        self.shown
            .read(|logs| read(logs.map_or(&[], Vec::as_slice)))
    }
}

/// ORs what is left of `old` into `fresh`, which is not shorter; how many bits there were.
fn carry_over(old: &[AtomicU64], fresh: &[AtomicU64]) -> u64 {
    let mut carried = 0;
    for (old, fresh) in old.iter().zip(fresh) {
        // Acquire: pairs with the Release of a mark; passes on the data that it speaks of.
        let left = old.load(Ordering::Acquire);
        if left != 0 {
            carried += u64::from(left.count_ones());
            // Release: pairs with the Acquire in `seen`.
            fresh.fetch_or(left, Ordering::Release);
        }
    }
    carried
}

/// What is set of `mask` in a word, in any log.
pub(super) fn seen<L: LogWords>(logs: &[Arc<L>], word: usize, mask: u64) -> u64 {
    let each = logs.iter().filter_map(|log| log.words().get(word));
    // Acquire: pairs with the Release of a mark, by a back end or in `carry_over`.
    let or = each.fold(0, |or, word| or | word.load(Ordering::Acquire));
    u64::from_le(or) & mask
}

/// Clears `mask` in a word of all logs; what of it was set.
pub(super) fn clear<L: LogWords>(logs: &[Arc<L>], word: usize, mask: u64) -> u64 {
    let each = logs.iter().filter_map(|log| log.words().get(word));
    // Acquire: as in `seen`. Release: a harvest that finds the page clean sees it recorded; one
    // that does not finds it here.
    let or = each.fold(0, |or, word| {
        or | word.fetch_and(!mask.to_le(), Ordering::AcqRel)
    });
    u64::from_le(or) & mask
}
