//! The consumers of a space, as the space knows them.
//!
//! The root of the area tree names them, beside the areas and the domains. A space that never had a
//! named consumer names none, and its harvests do as they always did. From the first join on, the
//! *unnamed* consumer is the first of the list: the one whose harvests are
//! [`AddressSpace::harvest`], [`rounds`](AddressSpace::rounds) and the like.
//!
//! Each has a store of what is *pending* for it: pages that harvests of others have taken out of
//! the tables and marks, and that its own leases have put back. How pages get there is described in
//! `harvest::shared`.
//!
//! # Areas that go
//! An unmap takes what is pending in an area for any consumer, and what is in flight there, and
//! adds it to its result. So the result has each page that some consumer has not been told. It
//! looks at the marks, the words that another harvest has hidden, the flights, and the stores, in
//! this order, as a harvest does. What arrives in a store later, from a harvest with an old
//! snapshot, the unmap has seen in flight. It stays in the store, and is dirty in the next area at
//! its address: a superset.
//!
//! A lease that is aborted races with an unmap as one without consumers does: the store of its
//! consumer takes the place of the put-back store of a domain in the protocol of
//! [`attachment`](super::attachment).

use std::convert::Infallible;
use std::ops::Deref;

use super::attachment::put_back_range;
use super::domain::Covered;
use super::outside::Outside;
use super::{AddressSpace, Area, FaultSource};
use crate::bitmap::Sink;
use crate::error::Error;
use crate::failure::{Failure, attempt};
use crate::flush::FlushGather;
use crate::marks::Marks;
use crate::sync::{Arc, AtomicBool, AtomicU64, Ordering, Step, fence, lock, performs};
use crate::units::{Granule, Iova, IovaRange};

/// The longest name of a consumer, in bytes.
const MAX_NAME: usize = 255;
/// The most consumers of a space.
const MAX_CONSUMERS: usize = 1 << 14;

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
    left: AtomicBool,
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
    fn settled(&self) -> Option<u64> {
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
    fn new(name: &str, range: IovaRange, page: Granule) -> Self {
        // Ids of all spaces: a consumer of another space is told apart.
        static NEXT: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(0);
        Member {
            // Relaxed: a unique number, which orders nothing.
            id: NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed),
            name: name.into(),
            range,
            pending: Marks::few(put_back_range(), page),
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
    pub(crate) fn others(&self) -> impl Iterator<Item = &Arc<Member>> {
        let (below, above) = self.all.split_at(self.own.min(self.all.len()));
        below.iter().chain(above.iter().skip(1))
    }

    /// Whether there are others.
    pub(crate) fn is_shared(&self) -> bool {
        self.all.len() > 1
    }
}

/// With which pending pages a consumer begins.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Beginning<'m> {
    Clean,
    Dirty,
    Like(&'m Arc<Member>),
}

impl AddressSpace {
    /// Adds a consumer: see [`AddressSpace::consumer`].
    pub(crate) fn join(
        &self,
        name: &str,
        range: IovaRange,
        beginning: Beginning<'_>,
    ) -> Result<Arc<Member>, Error> {
        if name.is_empty() || name.len() > MAX_NAME {
            return Err(Error::BadName {
                len: name.len(),
                most: MAX_NAME,
            });
        }
        if !range.is_aligned(self.page()) {
            let granule = self.page();
            return Err(Error::Unaligned { range, granule });
        }
        self.retired.drop_all();
        let _membership = lock(&self.membership);
        let members = self.members();
        if members.iter().any(|other| other.name() == name) {
            return Err(Error::ConsumerTwice { name: name.into() });
        }
        if members.len() > MAX_CONSUMERS {
            return Err(Error::TooManyConsumers {
                most: MAX_CONSUMERS,
            });
        }
        if let Beginning::Like(other) = beginning
            && !members.iter().any(|member| Arc::ptr_eq(member, other))
        {
            return Err(Error::ConsumerLeft {
                name: other.name().into(),
            });
        }
        let member = Arc::new(Member::new(name, range, self.page()));
        let unnamed = Arc::new(Member::new("", IovaRange::ALL, self.page()));
        let _: Result<(), Error> = self.areas.update(|edit| {
            edit.set_rules(edit.rules().with_members(|all| {
                if all.is_empty() {
                    all.push(Arc::clone(&unnamed));
                }
                all.push(Arc::clone(&member));
            }));
            Ok(())
        });
        if let Err(failure) = self.begin(&member, beginning) {
            self.leave(&member);
            return Err(failure.raise());
        }
        Ok(member)
    }

    /// The part of a join after the consumer was published.
    fn begin(&self, member: &Member, beginning: Beginning<'_>) -> Result<(), Failure> {
        // Harvests that do not know the consumer have ended after this: from now on it is left
        // whatever is taken.
        self.walks.wait();
        if performs(Step::FlushAtJoin) {
            // What those harvests have cleared, devices may still cache as dirty, and only their
            // leases know that debt.
            let mut gather = FlushGather::new();
            for domain in self.attachments().iter() {
                self.owe_all_of(&mut gather, IovaRange::ALL, domain);
            }
            let ticket = self.flush.owe(&gather);
            attempt(|| self.flush_until(ticket))?;
        }
        // F2 of the marks' protocol, for the full copy that follows, as in a switch of tracking.
        self.ordering.before_copies();
        match beginning {
            Beginning::Clean => Ok(()),
            Beginning::Dirty => {
                for entry in self.areas.snapshot().iter(member.range) {
                    if let Some(part) = entry.range.intersection(member.range) {
                        member.pending.mark(part);
                    }
                }
                Ok(())
            }
            Beginning::Like(other) => copy_of(other, member).map_err(Failure::Refused),
        }
    }

    /// Removes a consumer. Lock-free.
    pub(crate) fn leave(&self, member: &Arc<Member>) {
        // Relaxed: a hint.
        member.left.store(true, Ordering::Relaxed);
        let _: Result<(), Error> = self.areas.update(|edit| {
            let without = edit
                .rules()
                .with_members(|all| all.retain(|other| other.id != member.id));
            edit.set_rules(without);
            Ok(())
        });
    }

    /// The consumers of this moment.
    pub(crate) fn members(&self) -> Members {
        self.areas.snapshot().rules().members().clone()
    }

    /// Makes `run`, of a lease of `member`, pending for it again: as
    /// [`put_back`](Self::put_back), with its store in the place of those of the domains.
    pub(super) fn put_back_for(
        &self,
        member: &Member,
        run: IovaRange,
        covered: &Covered,
        taken: u64,
    ) -> Outside {
        let mut outside = Outside::default();
        if member.has_left() {
            outside.add_range(run);
            return outside;
        }
        for promised in self.snapshot().rules().promised_parts(run) {
            member.pending.mark(promised);
        }
        let outside = self.in_areas(run, |area, part| {
            let mut outside = Outside::default();
            if area.is_younger(taken) {
                outside.add_range(part);
                return outside;
            }
            member.pending.mark(part);
            let domains = covered.domains();
            let going = area.is_going() || domains.iter().any(|domain| domain.is_leaving());
            if going && performs(Step::MarkIfGoing) {
                return area.mark(part);
            }
            outside
        });
        self.report(&outside, FaultSource::Abort);
        outside
    }

    /// Records what is in flight or pending for any consumer in `range` of `area`, which is going.
    pub(super) fn record_members(
        &self,
        area: &Area,
        range: IovaRange,
        sink: &mut Sink<'_>,
    ) -> Result<(), Error> {
        let members = self.members();
        if members.is_empty() {
            return Ok(());
        }
        let recorded = self.look_hidden(range, [&*area.marks].into_iter(), sink);
        let recorded = recorded.and_then(|()| {
            // Acquire: as in `harvest::shared`.
            fence(Ordering::Acquire);
            self.flights.look(range, None, sink)
        });
        let recorded = recorded.and_then(|()| {
            // Acquire: as in `harvest::shared`.
            fence(Ordering::Acquire);
            let mut stores = members.iter().map(|member| &member.pending);
            stores.try_for_each(|store| store.peek(range, sink))
        });
        recorded.map_err(|stopped| stopped.error)
    }

    /// Moves what is pending for any consumer in `range` to the marks of `area`, which has gone.
    pub(super) fn mark_pending(&self, area: &Area, range: IovaRange) {
        for member in self.members().iter() {
            let mut bytes = 0u64;
            for run in member.pending.take_runs(range) {
                area.marks.mark(run);
                bytes = bytes.saturating_add(u64::try_from(run.len()).unwrap_or(u64::MAX));
            }
            MemberCounts::add(&member.counts.unmapped, bytes);
        }
    }

    /// Visits what harvests with an old snapshot have in hand in `range` of `area`, which has gone
    /// and whose marks were taken.
    pub(super) fn late_pages(
        &self,
        area: &Area,
        range: IovaRange,
        mut visit: impl FnMut(Iova, u64),
    ) {
        let members = self.members();
        if members.is_empty() {
            return;
        }
        // Acquire: as in `harvest::shared`, here and below.
        fence(Ordering::Acquire);
        let seen: Result<(), Infallible> = self.hiding.visit(range, |part| {
            area.marks.visit_all(part, &mut visit);
            Ok(())
        });
        debug_assert!(seen.is_ok());
        fence(Ordering::Acquire);
        self.flights.visit(range, &mut visit);
        fence(Ordering::Acquire);
        for member in members.iter() {
            member.pending.take(range, &mut visit);
        }
    }

    /// Records the words of `stores` whose summaries another harvest may have cleared before it
    /// took the words: see `harvest::shared`.
    pub(crate) fn look_hidden<'m>(
        &self,
        range: IovaRange,
        stores: impl Iterator<Item = &'m Marks> + Clone,
        sink: &mut Sink<'_>,
    ) -> Result<(), crate::error::Stopped> {
        // Acquire: pairs with the Release fence after a claim in `harvest::shared`. If a summary
        // was found clear because of that harvest, its claim, or the end of it, is seen.
        fence(Ordering::Acquire);
        self.hiding.visit(range, |part| {
            let mut stores = stores.clone();
            stores.try_for_each(|store| store.peek_all(part, sink))
        })
    }
}

/// Copies what is pending for `other`, which harvests nothing meanwhile.
///
/// # Errors
/// [`Error::ConsumerBusy`] if it does, or has a lease.
fn copy_of(other: &Member, member: &Member) -> Result<(), Error> {
    const TRIES: usize = 8;
    for _ in 0..TRIES {
        let Some(begun) = other.counts.settled() else {
            break;
        };
        for run in other.pending.runs(member.range) {
            member.pending.mark(run);
        }
        // Acquire: pairs with the AcqRel clear of a page that is pending. If a harvest has taken a
        // page that is missed above, it is counted below.
        fence(Ordering::Acquire);
        if other.counts.settled() == Some(begun) {
            return Ok(());
        }
    }
    Err(Error::ConsumerBusy {
        name: other.name().into(),
        leases: other.counts.live(),
    })
}
