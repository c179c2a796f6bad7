//! One consumer, and the list of all of them: what is pending for each, and its counts.

use std::ops::Deref;

use crate::error::Error;
use crate::marks::Marks;
use crate::sync::{Arc, AtomicBool, AtomicU64, Ordering};
use crate::units::{Granule, Iova, IovaRange};

/// One consumer.
#[derive(Debug)]
pub(crate) struct Member {
    /// No two consumers of a process have the same.
    pub(crate) id: u64,
    name: Box<str>,
    /// What the consumer is told about.
    pub(crate) range: IovaRange,
    /// What others have taken, and what its own leases have put back.
    pub(crate) pending: Marks,
    page: Granule,
    pub(super) left: AtomicBool,
    pub(crate) counts: MemberCounts,
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

impl Member {
    pub(super) fn new(name: &str, range: IovaRange, page: Granule) -> Self {
        // Ids of all spaces: a consumer of another space is told apart.
        static NEXT: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(0);
        Member {
            // Relaxed: a unique number, which orders nothing.
            id: NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed),
            name: name.into(),
            range,
            pending: Marks::everywhere(page),
            page,
            left: AtomicBool::new(false),
            counts: MemberCounts::default(),
        }
    }

    /// Its name; empty for the unnamed one.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// Leaves the pages of `mask`, of 64 pages from `start` on, pending. The caller has performed a
    /// full fence since it took them.
    pub(crate) fn leave(&self, start: Iova, mask: u64) {
        if self.range == IovaRange::ALL {
            return self.pending.mark_mask(start, mask);
        }
        // Never an error: an address of a page ascends.
        let word = self.page.bytes().saturating_mul(63) + self.page.mask();
        let last = Iova::new(start.get().saturating_add(word));
        let Some(inside) = IovaRange::new(start, last)
            .ok()
            .and_then(|word| word.intersection(self.range))
        else {
            return;
        };
        let number = |iova: Iova| ((iova.get() - start.get()) >> self.page.lg2()) as u32;
        let mine = crate::words::word_mask(number(inside.start()), number(inside.last()));
        if mask & mine != 0 {
            self.pending.mark_mask(start, mask & mine);
        }
    }

    /// Whether the consumer has left: nobody harvests what is pending for it.
    pub(crate) fn has_left(&self) -> bool {
        // Relaxed: a hint; a store of a consumer that has left is read by nobody.
        self.left.load(Ordering::Relaxed)
    }

    /// The bytes that are pending.
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
}

impl Deref for Members {
    type Target = [Arc<Member>];

    fn deref(&self) -> &Self::Target {
        self.0.as_ref().map_or(&[], |members| members)
    }
}

/// For whom a harvest takes, and to whom it leaves what it takes.
#[derive(Clone, Debug, Default)]
pub(crate) struct Audience {
    all: Members,
    /// The place of the harvest's own consumer.
    own: usize,
}

impl Audience {
    /// The unnamed consumer, and the others.
    pub(crate) fn unnamed(members: &Members) -> Self {
        Audience {
            all: members.clone(),
            own: 0,
        }
    }

    /// `member`, and the others.
    ///
    /// # Errors
    /// [`Error::ConsumerLeft`].
    pub(crate) fn of(members: &Members, member: &Arc<Member>) -> Result<Self, Error> {
        let all = members.clone();
        let own = all.iter().position(|other| other.id == member.id);
        let own = own.ok_or_else(|| Error::ConsumerLeft {
            name: member.name().into(),
        })?;
        Ok(Audience { all, own })
    }

    /// The consumer of the harvest; `None` in a space that never had a named one.
    pub(crate) fn own(&self) -> Option<&Arc<Member>> {
        self.all.get(self.own)
    }

    /// The others.
    pub(crate) fn others(&self) -> impl DoubleEndedIterator<Item = &Arc<Member>> {
        let (below, above) = self.all.split_at(self.own.min(self.all.len()));
        below.iter().chain(above.iter().skip(1))
    }

    /// Whether there are others.
    pub(crate) fn is_shared(&self) -> bool {
        self.all.len() > 1
    }
}
