//! One area: a mapped range with its backing, its marks, and where it stands between map and unmap.
//!
//! ```text
//!            fill succeeds            claim                 removed from the tree
//!  Mapping ---------------> Live ---------------> Claimed ----------------------> Gone
//!                             ^-------------------/   \
//!                              give back               \--------------------------> Cut: its pieces take its place
//!                              (another area was busy, or the flush failed)
//! ```
//!
//! An area is in the tree, and so keeps its addresses from being used again, from `Mapping` to `Claimed`. Only
//! the thread that claimed it removes it, after the flush.
//!
//! # Pairs
//! Each area knows in which domains it is filled: its *pairs*, behind a lock that only calls take which map, unmap,
//! attach and detach. So each pair of an area and a domain is filled once and emptied once, however these calls race:
//! see [`attachment`](super::attachment).

use super::attachment::Attachment;
use crate::error::Error;
use crate::source::{Mapping, MarkOrdering, Marks};
use crate::sync::{Arc, AtomicU8, AtomicU64, Mutex, MutexGuard, OnceLock, Ordering, lock};
use crate::units::{Granule, IovaRange};

const MAPPING: u8 = 0;
const LIVE: u8 = 1;
const CLAIMED: u8 = 2;
const GONE: u8 = 3;
const CUT: u8 = 4;

/// The domains in which an area is filled; `None` when the area has gone or was cut, and will not be filled any more.
pub(super) type Pairs = Option<Vec<Arc<Attachment>>>;

/// See the [module](self).
#[derive(Debug)]
pub(crate) struct Area {
    pub(crate) mapping: Mapping,
    /// Shared by the pieces of an area that was cut: so no mark has to move.
    pub(crate) marks: Arc<Marks>,
    state: AtomicU8,
    /// The version of the tree from which on sources may be filled with the area. Pieces of a cut
    /// have that of the whole.
    born: AtomicU64,
    pairs: Mutex<Pairs>,
    /// What the area was cut into; set before the state says so.
    pieces: OnceLock<Vec<Arc<Area>>>,
}

impl Area {
    /// An area whose sources are not filled yet.
    pub(crate) fn new(mapping: Mapping, page: Granule, ordering: MarkOrdering) -> Self {
        Area {
            mapping,
            marks: Arc::new(Marks::new(mapping.range, page, ordering)),
            state: AtomicU8::new(MAPPING),
            born: AtomicU64::new(0),
            pairs: Mutex::new(Some(Vec::new())),
            pieces: OnceLock::new(),
        }
    }

    /// The part `range` of this area as an area of its own, which is live and has the marks and the `pairs` of this one.
    pub(super) fn piece(&self, range: IovaRange, pairs: Pairs) -> Self {
        let skipped = range.start().get() - self.mapping.range.start().get();
        Area {
            mapping: Mapping {
                range,
                backing: self.mapping.backing + skipped,
                access: self.mapping.access,
            },
            marks: Arc::clone(&self.marks),
            state: AtomicU8::new(LIVE),
            born: AtomicU64::new(self.born.load(Ordering::Relaxed)), // Relaxed: as in `is_younger`
            pairs: Mutex::new(pairs),
            pieces: OnceLock::new(),
        }
    }

    /// Says that the area comes with `version` of the tree; before that is published.
    pub(super) fn born_with(&self, version: u64) {
        // Relaxed: whoever finds the area has it from a root that was published after this.
        self.born.store(version, Ordering::Relaxed);
    }

    /// Whether the area was not there yet, for any source, when the tree had `version`: then nothing
    /// that a harvest took by that moment belongs to it.
    pub(super) fn is_younger(&self, version: u64) -> bool {
        // Relaxed: see `born_with`.
        self.born.load(Ordering::Relaxed) > version
    }

    /// Locks the pairs.
    pub(super) fn pairs(&self) -> MutexGuard<'_, Pairs> {
        lock(&self.pairs)
    }

    /// What the area was cut into; nothing if it was not.
    pub(super) fn pieces(&self) -> &[Arc<Area>] {
        self.pieces.get().map_or(&[], Vec::as_slice)
    }

    /// The sources are filled, or will not be: from now on the area can be unmapped.
    pub(crate) fn go_live(&self) {
        // Release: pairs with the Acquire of `claim`; the unmap sees the filled tables. Relaxed on failure: the area is
        // gone already, because a source refused it.
        let _ = self
            .state
            .compare_exchange(MAPPING, LIVE, Ordering::Release, Ordering::Relaxed);
    }

    /// Takes the area for unmapping or cutting; at most one thread succeeds.
    ///
    /// # Errors
    /// [`Error::Busy`] while another call maps, unmaps or cuts it.
    pub(crate) fn claim(&self) -> Result<(), Error> {
        // Acquire on success: pairs with the Release of `go_live` and `give_back`. Relaxed on failure: nothing is read.
        self.state
            .compare_exchange(LIVE, CLAIMED, Ordering::Acquire, Ordering::Relaxed)
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

    /// The area gives way to `pieces`, which are about to replace it in the tree.
    pub(super) fn give_way(&self, pieces: Vec<Arc<Area>>) {
        // Only who claimed the area gets here, and once.
        let _ = self.pieces.set(pieces);
        // Release: pairs with the Acquire in `mark`; whoever sees it sees the pieces.
        self.state.store(CUT, Ordering::Release);
    }

    /// Whether the area is on its way out of the tree, or has left it.
    pub(super) fn is_going(&self) -> bool {
        // Acquire: as in `mark`. The order against `claim` is that of the fences around both: see `attachment`.
        !matches!(self.state.load(Ordering::Acquire), MAPPING | LIVE)
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
        if self.is_mapped() {
            return Ok(());
        }
        self.after_late_mark(range)
    }

    /// The second half of [`mark`](Self::mark): whether what was marked is in an area that has neither gone nor been cut.
    #[inline]
    pub(super) fn is_mapped(&self) -> bool {
        // Acquire: pairs with the Release of `retire` and `give_way`.
        matches!(self.state.load(Ordering::Acquire), MAPPING | LIVE | CLAIMED)
    }

    #[cold]
    fn after_late_mark(&self, range: IovaRange) -> Result<(), Error> {
        // Acquire: as in `is_mapped`.
        match self.state.load(Ordering::Acquire) {
            GONE => Err(Error::Outside { at: range.start() }),
            // The marks are those of the pieces; each of them says whether it is still there.
            CUT => self.pieces().iter().try_for_each(|piece| {
                match piece.mapping.range.intersection(range) {
                    Some(part) => piece.mark(part),
                    None => Ok(()),
                }
            }),
            _ => Ok(()),
        }
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
