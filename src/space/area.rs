//! One area: a mapped range with its backing, its marks, and where it stands between map and unmap.
//!
//! ```text
//!            fill succeeds            claim                 removed from the tree
//!  Mapping ---------------> Live ---------------> Unmapping ---------------------> Gone
//!                             ^-------------------/
//!                              give back (another area of the batch was busy, or the flush failed)
//! ```
//!
//! An area is in the tree, and so keeps its addresses from being used again, from `Mapping` to `Unmapping`. Only
//! the thread that claimed it removes it, after the flush.

use crate::error::Error;
use crate::source::{Mapping, Marks};
use crate::sync::{AtomicU8, Ordering};
use crate::units::{Granule, IovaRange};

const MAPPING: u8 = 0;
const LIVE: u8 = 1;
const UNMAPPING: u8 = 2;
const GONE: u8 = 3;

/// See the [module](self).
#[derive(Debug)]
pub(crate) struct Area {
    pub(crate) mapping: Mapping,
    pub(crate) marks: Marks,
    state: AtomicU8,
}

impl Area {
    /// An area whose sources are not filled yet.
    pub(crate) fn new(mapping: Mapping, page: Granule) -> Self {
        Area {
            mapping,
            marks: Marks::new(mapping.range, page),
            state: AtomicU8::new(MAPPING),
        }
    }

    /// The sources are filled, or will not be: from now on the area can be unmapped.
    pub(crate) fn go_live(&self) {
        // Release: pairs with the Acquire of `claim`; the unmap sees the filled tables. Relaxed on failure: the area is
        // gone already, because a source refused it.
        let _ = self
            .state
            .compare_exchange(MAPPING, LIVE, Ordering::Release, Ordering::Relaxed);
    }

    /// Takes the area for unmapping; at most one thread succeeds.
    ///
    /// # Errors
    /// [`Error::Busy`] while another call maps or unmaps it.
    pub(crate) fn claim(&self) -> Result<(), Error> {
        // Acquire on success: pairs with the Release of `go_live` and `give_back`. Relaxed on failure: nothing is read.
        self.state
            .compare_exchange(LIVE, UNMAPPING, Ordering::Acquire, Ordering::Relaxed)
            .map(|_| ())
            .map_err(|_| Error::Busy {
                area: self.mapping.range,
            })
    }

    /// Undoes `claim`.
    pub(crate) fn give_back(&self) {
        // Release: pairs with the Acquire of the next `claim`.
        self.state.store(LIVE, Ordering::Release);
    }

    /// The area has left the tree.
    pub(crate) fn retire(&self) {
        // Release: pairs with the Acquire of `is_gone`; whoever sees it can rely on the area being out of the tree.
        self.state.store(GONE, Ordering::Release);
    }

    /// Whether the area has left the tree.
    #[inline]
    pub(crate) fn is_gone(&self) -> bool {
        // Acquire: pairs with the Release of `retire`.
        self.state.load(Ordering::Acquire) == GONE
    }

    /// Marks `range`, which lies inside the area.
    ///
    /// # Errors
    /// [`Error::Outside`] if a part lies outside the area (then nothing is marked), or if the area is gone: see
    /// [`unmap`](super::unmap).
    #[inline]
    pub(crate) fn mark(&self, range: IovaRange) -> Result<(), Error> {
        if !self.mapping.range.covers(range) {
            return Err(self.outside(range));
        }
        self.marks.mark_inside(range);
        if self.is_gone() {
            return Err(Error::Outside { at: range.start() });
        }
        Ok(())
    }

    /// What to say of a `range` that sticks out of the area.
    #[cold]
    fn outside(&self, range: IovaRange) -> Error {
        let own = self.mapping.range;
        let below = range.start() < own.start();
        let at = match own.last().checked_add(1) {
            Some(behind) if !below => behind.max(range.start()),
            _ => range.start(),
        };
        Error::Outside { at }
    }
}
