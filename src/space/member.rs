//! One consumer, and the list of all of them: what is pending for each, and its counts.

use std::ops::Deref;

use super::epochs::{Bounds, Epochs};
use super::walks::Walks;
use super::whole::Whole;
use crate::chunkmap::{CHUNK_WORDS, Handed};
use crate::error::Error;
use crate::marks::Pending;
use crate::sync::{Arc, AtomicBool, AtomicU64, Ordering};
use crate::units::{Granule, Iova, IovaRange};

/// The part of a consumer that stays the same when its store is replaced.
#[derive(Debug)]
pub(crate) struct Party {
    /// No two consumers of a process have the same.
    pub(crate) id: u64,
    name: Box<str>,
    /// The range that its harvests cover.
    pub(crate) range: IovaRange,
    page: Granule,
    pub(super) left: AtomicBool,
    pub(crate) counts: MemberCounts,
    pub(crate) epochs: Epochs,
    bounds: AtomicBounds,
}

/// A consumer with a store of its pending pages: see [`bounds`](super::bounds).
#[derive(Debug)]
pub(crate) struct Member {
    pub(crate) party: Arc<Party>,
    /// The pages that others have taken, and those that its own leases have put back.
    pub(crate) pending: Pending,
    /// What is pending as a whole, because a store that the consumer had before was dropped.
    pub(crate) whole: Whole,
    /// The number of stores that it had before.
    pub(crate) stores: u64,
    /// Harvests of others since its own last one, if their number is bounded.
    pub(super) missed: AtomicU64,
    /// Whether the consumer gets another store, or has it already.
    pub(super) is_old: AtomicBool,
    /// Whether all harvests that leave pages in an older store have ended, and are flushed.
    has_caught_up: AtomicBool,
}

impl Deref for Member {
    type Target = Party;

    fn deref(&self) -> &Party {
        &self.party
    }
}

/// The [`Bounds`] of a consumer, which may change at any time.
#[derive(Debug)]
struct AtomicBounds {
    bytes: AtomicU64,
    deltas: AtomicU64,
    age: AtomicU64,
}

/// Counts of one consumer. All accesses but those of `begun` and `ended` are Relaxed: they publish
/// nothing.
#[derive(Debug, Default)]
pub(crate) struct MemberCounts {
    /// Leases.
    begun: AtomicU64,
    ended: AtomicU64,
    pub(crate) leased: AtomicU64,
    pub(crate) committed: AtomicU64,
    pub(crate) aborted: AtomicU64,
    pub(crate) unmapped: AtomicU64,
    /// Stores of pending pages that were dropped.
    pub(crate) dropped: AtomicU64,
}

impl MemberCounts {
    /// A harvest begins.
    pub(crate) fn begin(&self) {
        // Release: pairs with the Acquire fence in `copy_of`, through the clear of a page.
        self.begun.fetch_add(1, Ordering::Release);
    }

    /// Its lease has ended.
    pub(crate) fn end(&self) {
        // Release: pairs with the Acquire in `live`; what the lease put back is visible.
        self.ended.fetch_add(1, Ordering::Release);
    }

    /// How many harvests have begun, if all of their leases have ended.
    pub(super) fn settled(&self) -> Option<u64> {
        // Acquire: pairs with the Release in `end`. This load comes first, so an equal count of
        // `begun` means that none lived at the moment of it.
        let ended = self.ended.load(Ordering::Acquire);
        (self.begun.load(Ordering::Acquire) == ended).then_some(ended)
    }

    /// How many leases live.
    pub(crate) fn live(&self) -> u64 {
        // Acquire: as in `settled`.
        let ended = self.ended.load(Ordering::Acquire);
        self.begun.load(Ordering::Acquire).saturating_sub(ended)
    }

    /// Adds `n` to `count`.
    pub(crate) fn add(count: &AtomicU64, n: u64) {
        // Relaxed: a statistic.
        count.fetch_add(n, Ordering::Relaxed);
    }
}

impl Party {
    fn new(name: &str, range: IovaRange, page: Granule) -> Self {
        // Ids of all spaces: a consumer of another space is told apart.
        static NEXT: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(0);
        let bounds = Bounds::default();
        Party {
            // Relaxed: a unique number, which orders nothing.
            id: NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed),
            name: name.into(),
            range,
            page,
            left: AtomicBool::new(false),
            counts: MemberCounts::default(),
            epochs: Epochs::new(page),
            bounds: AtomicBounds {
                bytes: AtomicU64::new(bounds.bytes),
                deltas: AtomicU64::new(bounds.deltas),
                age: AtomicU64::new(bounds.age),
            },
        }
    }

    /// Its name; empty for the unnamed one.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// Whether the consumer has left, so that no harvest takes its pending pages.
    pub(crate) fn has_left(&self) -> bool {
        // Relaxed: a hint; no thread reads the store of a consumer that has left.
        self.left.load(Ordering::Relaxed)
    }

    /// The bounds of its memory.
    pub(crate) fn bounds(&self) -> Bounds {
        // Relaxed, all: settings, each by itself.
        Bounds {
            bytes: self.bounds.bytes.load(Ordering::Relaxed),
            deltas: self.bounds.deltas.load(Ordering::Relaxed),
            age: self.bounds.age.load(Ordering::Relaxed),
        }
    }

    /// Changes the bounds of its memory.
    pub(crate) fn set_bounds(&self, bounds: Bounds) {
        // Relaxed, all: as above.
        self.bounds.bytes.store(bounds.bytes, Ordering::Relaxed);
        self.bounds.deltas.store(bounds.deltas, Ordering::Relaxed);
        self.bounds.age.store(bounds.age, Ordering::Relaxed);
    }
}

impl Member {
    /// A new consumer.
    pub(super) fn new(name: &str, range: IovaRange, page: Granule) -> Self {
        Self::with_store(Arc::new(Party::new(name, range, page)), 0)
    }

    /// A consumer that had `stores` stores before.
    pub(super) fn with_store(party: Arc<Party>, stores: u64) -> Self {
        Member {
            pending: Pending::new(party.page),
            whole: Whole::new(),
            stores,
            missed: AtomicU64::new(0),
            is_old: AtomicBool::new(false),
            has_caught_up: AtomicBool::new(stores == 0),
            party,
        }
    }

    /// Leaves the pages of `handed` pending: see [`Pending::leave`]. The caller has performed a
    /// full fence since it took them.
    pub(crate) fn leave(&self, chunk: u64, handed: Handed<'_>) {
        let words = |from: u64, to: u64| {
            let start = Iova::new((from * 64) << self.page.lg2());
            // Never an error: an address of a page ascends.
            let end = u128::from(to * 64 + 63) << self.page.lg2() | u128::from(self.page.mask());
            IovaRange::new(start, u64::try_from(end).map_or(Iova::MAX, Iova::new)).ok()
        };
        let first = chunk * CHUNK_WORDS;
        let all = words(first, first + (CHUNK_WORDS - 1));
        if all.is_some_and(|all| self.range.covers(all)) {
            return self.pending.leave(chunk, handed);
        }
        if all.is_some_and(|all| !self.range.intersects(all)) {
            return;
        }
        let mine = |nth: u16, mask: u64| {
            let word = first + u64::from(nth);
            let Some(all) = words(word, word) else {
                return 0;
            };
            let Some(inside) = all.intersection(self.range) else {
                return 0;
            };
            let number = |iova: Iova| ((iova.get() - all.start().get()) >> self.page.lg2()) as u32;
            mask & crate::words::word_mask(number(inside.start()), number(inside.last()))
        };
        handed.with(mine, |mine| self.pending.leave(chunk, mine));
    }

    /// The bounds of the consumer's deltas: the bytes that its pending pages leave.
    pub(crate) fn room(&self) -> Bounds {
        let bounds = self.bounds();
        Bounds {
            bytes: bounds.bytes.saturating_sub(self.pending.held_bytes()),
            ..bounds
        }
    }

    /// Whether its bounds allow that all of `range` becomes pending page by page.
    pub(crate) fn has_room_for(&self, range: IovaRange) -> bool {
        let held = self.pending.held_bytes();
        held.saturating_add(self.pending.bytes_for(range)) <= self.bounds().bytes
    }

    /// Whether no harvest leaves pages in an older store of the consumer any more.
    pub(crate) fn has_caught_up(&self) -> bool {
        // Acquire: pairs with the Release in `caught_up`. If it is seen, those harvests have ended,
        // and what they took is flushed; if not, the caller waits for them itself.
        self.has_caught_up.load(Ordering::Acquire)
    }

    /// The harvests that leave pages in an older store have ended, and are flushed.
    pub(crate) fn caught_up(&self) {
        // Release: pairs with the Acquire in `has_caught_up`.
        self.has_caught_up.store(true, Ordering::Release);
    }

    /// A harvest of the consumer begins.
    pub(crate) fn begin(&self) {
        self.counts.begin();
        // Relaxed: a count, which orders nothing.
        self.missed.store(0, Ordering::Relaxed);
    }

    /// Puts back `part`, whose debt is in the queue: as a whole, if it is of several chunks for
    /// which there is no room.
    pub(super) fn put_back(&self, part: IovaRange, walks: &Walks) {
        if self.whole.covers(part) {
            return;
        }
        let is_large = self.pending.bytes_for(part) > 8 * CHUNK_WORDS;
        if is_large && !self.has_room_for(part) {
            self.whole.put_back(part, walks);
        } else {
            self.pending.mark(part);
        }
    }

    /// The bytes that are pending page by page.
    pub(crate) fn pending_bytes(&self) -> u64 {
        let mut bytes = 0u64;
        for run in self.pending.runs(self.range) {
            bytes = bytes.saturating_add(u64::try_from(run.len()).unwrap_or(u64::MAX));
        }
        bytes
    }
}

/// The consumers of one moment. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub(crate) struct Members(Option<Arc<Vec<Arc<Member>>>>);

impl Members {
    pub(super) fn new(members: Vec<Arc<Member>>) -> Self {
        Members(Some(Arc::new(members)))
    }

    /// Writes were not tracked for a while: no epoch from before leads to a later one. The caller
    /// has held the lock of the domains since before it got these consumers, so none joins
    /// meanwhile. The store of one may be replaced meanwhile: then the consumer is told of that
    /// store as a whole once more.
    pub(super) fn restart_epochs(&self) {
        for member in self.iter() {
            member.epochs.restart(member.stores);
        }
    }
}

impl Deref for Members {
    type Target = [Arc<Member>];

    fn deref(&self) -> &Self::Target {
        self.0.as_ref().map_or(&[], |members| members)
    }
}

/// The consumer of a harvest, and the consumers to which the harvest leaves its pages.
#[derive(Clone, Debug, Default)]
pub(crate) struct Audience {
    all: Members,
    /// The place of the harvest's own consumer.
    own: usize,
    /// The same consumer with a younger store, if it got one meanwhile.
    moved: Option<Arc<Member>>,
}

impl Audience {
    /// The unnamed consumer, and the others.
    pub(crate) fn unnamed(members: &Members) -> Self {
        Audience {
            all: members.clone(),
            own: 0,
            moved: None,
        }
    }

    /// The consumer `member`, and the others.
    ///
    /// # Errors
    /// [`Error::ConsumerLeft`].
    pub(crate) fn of(members: &Members, member: &Party) -> Result<Self, Error> {
        let all = members.clone();
        let own = all.iter().position(|other| other.id == member.id);
        let own = own.ok_or_else(|| Error::ConsumerLeft {
            name: member.name().into(),
        })?;
        let moved = None;
        Ok(Audience { all, own, moved })
    }

    /// The consumer of the harvest; `None` in a space that never had a named one.
    pub(crate) fn own(&self) -> Option<&Arc<Member>> {
        self.moved.as_ref().or_else(|| self.all.get(self.own))
    }

    /// Whether the consumer got another store after the harvest has loaded the root.
    pub(crate) fn has_moved(&self) -> bool {
        self.moved.is_some()
    }

    /// The consumer of the harvest has this store from now on.
    pub(crate) fn move_to(&mut self, store: Arc<Member>) {
        self.moved = Some(store);
    }

    /// The others.
    pub(crate) fn others(&self) -> impl DoubleEndedIterator<Item = &Arc<Member>> + Clone {
        let (below, above) = self.all.split_at(self.own.min(self.all.len()));
        below.iter().chain(above.iter().skip(1))
    }

    /// Whether there are others.
    pub(crate) fn is_shared(&self) -> bool {
        self.all.len() > 1
    }
}
