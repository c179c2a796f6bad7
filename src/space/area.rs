//! One area: a mapped range with its backing address, its marks, and its state between map and
//! unmap.
//!
//! ```text
//!            fill succeeds          claim               out of the tree
//!  Mapping -------------> Live ----------------> Claimed --------------> Gone
//!                           ^------------------/    \
//!                            give back               \--> Cut: its pieces replace it in the tree
//!                            (another area was busy, the flush failed, or the cut was refused)
//! ```
//!
//! An area is in the tree from `Mapping` to `Claimed`, and so keeps its addresses from being used
//! again. Only the thread that claimed it removes it, after the flush.
//!
//! # Pairs
//! Each area has a list of the domains into which it is filled: its *pairs*, under a lock that only
//! map, unmap, cut, attach and detach take. So each pair of an area and a domain is filled once and
//! emptied once, however these calls race: see [`attachment`](super::attachment).
//!
//! # Cut
//! The pieces share the marks of the whole, so no mark moves: each piece keeps the first whole,
//! which has the marks, in memory. The whole has no record of its pieces. A thread that still uses
//! it, by a handle or an old snapshot, learns from the marks which parts have gone since, and from
//! the tree where its pairs are. So a piece that is cut again is dropped like an area that has
//! gone, and nothing records how often an area was cut.
//!
//! The marks take the memory of the whole for as long as one piece remains: a bit for each page
//! that was ever marked, in unmapped parts too, rounded up to groups of 512 chunks (2 MiB of bits,
//! as far as the system has backed them).
//!
//! # Memory
//! A space may have millions of areas. So an area that was never cut is one allocation with its
//! marks, and stores its range once, as that of its marks.

use super::domain::Attachment;
use super::outside::Outside;
use crate::area::Entry;
use crate::error::Error;
use crate::marks::{MarkOrdering, Marks};
use crate::source::Mapping;
use crate::sync::{Arc, AtomicU8, AtomicU64, Mutex, MutexGuard, Ordering, Step, lock, performs};
use crate::units::{Access, Granule, IovaRange};

/// The state of an area: see the [module](self).
#[derive(Clone, Copy, PartialEq, Eq)]
struct State(u8);

impl State {
    const MAPPING: State = State(0);
    const LIVE: State = State(1);
    const CLAIMED: State = State(2);
    const GONE: State = State(3);
    const CUT: State = State(4);

    /// In the tree, and not cut.
    #[inline]
    fn is_mapped(self) -> bool {
        self.is_settled() || self == Self::CLAIMED
    }

    /// Neither claimed, gone nor cut.
    #[inline]
    fn is_settled(self) -> bool {
        matches!(self, Self::MAPPING | Self::LIVE)
    }
}

/// The state in memory.
#[derive(Debug)]
struct AtomicState(AtomicU8);

impl AtomicState {
    fn new(state: State) -> Self {
        AtomicState(AtomicU8::new(state.0))
    }

    #[inline]
    fn load(&self, order: Ordering) -> State {
        State(self.0.load(order))
    }

    fn store(&self, state: State, order: Ordering) {
        self.0.store(state.0, order);
    }

    /// Replaces `old` by `new`; says whether the area was in that state.
    fn replace(&self, (old, new): (State, State), success: Ordering, failure: Ordering) -> bool {
        let done = self.0.compare_exchange(old.0, new.0, success, failure);
        done.is_ok()
    }
}

/// The domains into which an area is filled, in the order of their ids; `None` if the area has gone
/// or was cut, and is not filled any more. A slice, because lists of domains seldom change, and
/// each area has one.
pub(super) type Pairs = Option<Box<[Arc<Attachment>]>>;

/// See the [module](self).
#[derive(Debug)]
pub(crate) struct Area {
    backing: u64,
    access: Access,
    state: AtomicState,
    part: Part,
    /// The version of the tree from which on sources may be filled with the area. Pieces of a cut
    /// have that of the whole.
    born: AtomicU64,
    pairs: Mutex<Pairs>,
}

/// What part of its marks an area is. Never changes.
#[derive(Debug)]
enum Part {
    /// All of them.
    Whole(Marks),
    /// Those of `range`, in the marks of `whole`, which was cut and is a [`Part::Whole`].
    Piece { range: IovaRange, whole: Arc<Area> },
}

impl Area {
    /// An area that is not filled into any source yet; its range is made of whole pages.
    pub(crate) fn new(mapping: Mapping, page: Granule, ordering: MarkOrdering) -> Self {
        Area {
            backing: mapping.backing,
            access: mapping.access,
            state: AtomicState::new(State::MAPPING),
            part: Part::Whole(Marks::new(mapping.range, page, ordering)),
            born: AtomicU64::new(0),
            pairs: Mutex::new(Some(Box::default())),
        }
    }

    /// The marks, which the pieces of an area that was cut share. The same ones for the life of the
    /// area.
    #[inline]
    pub(crate) fn marks(&self) -> &Marks {
        match &self.part {
            Part::Whole(marks) => marks,
            Part::Piece { whole, .. } => whole.marks(),
        }
    }

    /// The addresses at which it is mapped.
    #[inline]
    pub(crate) fn range(&self) -> IovaRange {
        match &self.part {
            Part::Whole(marks) => marks.range(),
            Part::Piece { range, .. } => *range,
        }
    }

    pub(crate) fn mapping(&self) -> Mapping {
        Mapping {
            range: self.range(),
            backing: self.backing,
            access: self.access,
        }
    }

    /// The mapping of the part `range` of this area.
    pub(super) fn part(&self, range: IovaRange) -> Mapping {
        let skipped = range.start().get() - self.range().start().get();
        Mapping {
            range,
            backing: self.backing + skipped,
            access: self.access,
        }
    }

    /// The part `range` of `area` as an area of its own, which is live, shares the marks of `area`,
    /// and gets `pairs`.
    pub(super) fn piece(area: &Arc<Area>, range: IovaRange, pairs: Pairs) -> Self {
        let whole = match &area.part {
            Part::Whole(_) => area,
            Part::Piece { whole, .. } => whole,
        };
        Area {
            backing: area.part(range).backing,
            access: area.access,
            state: AtomicState::new(State::LIVE),
            part: Part::Piece {
                range,
                whole: Arc::clone(whole),
            },
            born: AtomicU64::new(area.born.load(Ordering::Relaxed)), // Relaxed: as in `is_younger`
            pairs: Mutex::new(pairs),
        }
    }

    /// Records that the area comes with `version` of the tree. Called before that version is
    /// published.
    pub(super) fn born_with(&self, version: u64) {
        // Relaxed: a thread that finds the area has loaded a root that was published after this
        // store.
        self.born.store(version, Ordering::Relaxed);
    }

    /// Whether the area was filled into no source yet when the tree had `version`. Then nothing
    /// that a harvest took by that moment belongs to it.
    pub(super) fn is_younger(&self, version: u64) -> bool {
        // Relaxed: see `born_with`.
        self.born.load(Ordering::Relaxed) > version
    }

    /// Locks the pairs.
    pub(super) fn pairs(&self) -> MutexGuard<'_, Pairs> {
        lock(&self.pairs)
    }

    /// Drops the pairs: the area is not filled any more.
    pub(super) fn close(&self) {
        let filled = self.pairs().take();
        // After the lock is released.
        drop(filled);
    }

    /// The sources are filled, or the map has failed: from now on the area can be unmapped.
    pub(crate) fn go_live(&self) {
        // Release: pairs with the Acquire of `claim`, so the unmap sees the filled tables. Relaxed
        // on failure: the area has gone already, because a source refused it.
        let step = (State::MAPPING, State::LIVE);
        let _ = self
            .state
            .replace(step, Ordering::Release, Ordering::Relaxed);
    }

    /// Claims the area for unmapping or cutting; at most one thread succeeds.
    ///
    /// # Errors
    /// [`Error::Busy`] while another call maps, unmaps or cuts it.
    pub(crate) fn claim(&self) -> Result<(), Error> {
        // Acquire on success: pairs with the Release of `go_live` and `give_back`, so what was done
        // to the area before is visible. Relaxed on failure: nothing is read.
        let step = (State::LIVE, State::CLAIMED);
        let claimed = self
            .state
            .replace(step, Ordering::Acquire, Ordering::Relaxed);
        claimed
            .then_some(())
            .ok_or(Error::Busy { area: self.range() })
    }

    /// Undoes `claim`.
    pub(crate) fn give_back(&self) {
        // Release: pairs with the Acquire of the next `claim`, which sees what we did to the area.
        self.state.store(State::LIVE, Ordering::Release);
    }

    /// The area has left the tree.
    pub(crate) fn retire(&self) {
        self.say_gone(self.range());
        // Release: pairs with the Acquire of `is_mapped`. A thread that sees this state can rely on
        // the area being out of the tree; for one that does not, F3 and F4 of `unmap` decide.
        self.state.store(State::GONE, Ordering::Release);
    }

    /// Says that the area was cut, before its pieces replace it in the tree. From then on its
    /// pieces may go one by one. Undone by `give_back`.
    pub(super) fn give_way(&self) {
        self.marks().come_apart();
        // Release: pairs with the Acquire in `after_late_mark`. A thread that sees this state finds
        // the list of gone parts. It comes before the pieces are published, so before any of them
        // can be unmapped.
        self.state.store(State::CUT, Ordering::Release);
    }

    /// Records that `range`, a piece of the area, has left the tree.
    pub(super) fn say_gone(&self, range: IovaRange) {
        self.marks().say_gone(range);
    }

    /// Whether the area is on its way out of the tree, or has left it.
    pub(crate) fn is_going(&self) -> bool {
        // Acquire: as in `is_mapped`. The fences around this load and around `claim` order the two:
        // see `attachment`. An area that was cut always counts as going, so an unmap of a piece,
        // which comes after the cut, is seen here as well.
        !self.state.load(Ordering::Acquire).is_settled()
    }

    /// Marks `range`, as far as the area, or what is left of it, holds it. Returns the parts that
    /// it does not hold. If a part lies outside of the original range of the area, nothing is
    /// marked.
    #[inline]
    pub(crate) fn mark(&self, range: IovaRange) -> Outside {
        if !self.range().covers(range) {
            return self.outside(range);
        }
        self.marks().mark_inside(range);
        if self.is_mapped() {
            return Outside::default();
        }
        self.after_late_mark(range)
    }

    /// The second half of [`mark`](Self::mark): whether the area has neither gone nor been cut.
    #[inline]
    pub(super) fn is_mapped(&self) -> bool {
        // Acquire: pairs with the Release of `retire` and `give_way`. If it sees one of them,
        // `after_late_mark` finds what they published before; if not, F3 and F4 of the protocol in
        // `unmap` ensure that the unmap counts the mark.
        self.state.load(Ordering::Acquire).is_mapped()
    }

    /// Whether the area is in the tree, and no call is about to take it out.
    #[inline]
    pub(super) fn is_live(&self) -> bool {
        // Acquire: as in `is_mapped`. An area that leaves the tree was claimed before, or its map
        // has not ended, and the Release in `Edit::publish` publishes that.
        // - If a newer tree was visible to this thread before the look, so is the state, and this
        //   finds that the area is not live.
        // - If this finds the area live, F3 and F4 decide, as in `is_mapped`.
        let state = self.state.load(Ordering::Acquire);
        state == State::LIVE || state.is_mapped() && !performs(Step::LookForClaim)
    }

    #[cold]
    fn after_late_mark(&self, range: IovaRange) -> Outside {
        let mut outside = Outside::default();
        // Acquire: as in `is_mapped`.
        match self.state.load(Ordering::Acquire) {
            State::GONE => outside.add_range(range),
            // The marks belong to the pieces that are left.
            State::CUT => self.marks().gone_in(range, |part| outside.add_range(part)),
            // Given back since.
            _ => {}
        }
        outside
    }

    /// The result for a `range` that extends past the area: all of it is outside.
    #[cold]
    fn outside(&self, range: IovaRange) -> Outside {
        let own = self.range();
        let below = range.start() < own.start();
        let at = match own.last().checked_add(1) {
            Some(above) if !below => above.max(range.start()),
            _ => range.start(),
        };
        let mut outside = Outside::default();
        outside.add_range(range);
        outside.first = Some(at);
        outside
    }
}

impl Entry<'_, Area> {
    /// What is mapped at the range of the entry, which the tree has beside the pointer to the area.
    #[inline]
    pub(crate) fn mapping(&self) -> Mapping {
        Mapping {
            range: self.range,
            backing: self.area.backing,
            access: self.area.access,
        }
    }
}
