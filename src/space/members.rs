//! The consumers of a space, as the space knows them.
//!
//! The root of the area tree names them, beside the areas and the domains. A space that never had a
//! named consumer names none, and its harvests leave nothing to others. From the first join on, the
//! *unnamed* consumer is the first of the list: the one whose harvests are
//! [`AddressSpace::harvest`], [`rounds`](AddressSpace::rounds) and the like.
//!
//! Each has a store of what is *pending* for it: pages that harvests of others have taken out of
//! the tables and marks, and that its own leases have put back. How pages get there is described in
//! `harvest::shared`.
//!
//! # Areas that go
//! An unmap takes what is pending in an area for any consumer, and what is in flight there, and
//! adds it to its result. So the result has each page that is dirty for at least one consumer. It
//! looks at the marks, the words that another harvest has hidden there or in the put-back store of
//! a domain, the flights, and the stores, in this order, as a harvest does. What arrives in a store
//! later, from a harvest with an old snapshot, the unmap has seen in flight. It stays in the store,
//! and is dirty in the next area at its address: a superset.
//!
//! A lease that is aborted races with an unmap as one without consumers does: the store of its
//! consumer takes the place of the put-back store of a domain in the protocol of
//! [`attachment`](super::attachment).

use std::convert::Infallible;

use super::domain::Attachments;
use super::epochs::{Parent, Why};
use super::member::{Member, MemberCounts, Members, Party};
use super::walks::Walks;
use super::{AddressSpace, Area};
use crate::bitmap::Sink;
use crate::error::{Error, Stopped};
use crate::failure::Failure;
use crate::marks::Marks;
use crate::ranges::RangeSet;
use crate::sync::{Arc, Ordering, Step, fence, lock, performs};
use crate::units::{Iova, IovaRange};

/// The longest name of a consumer, in bytes.
const MAX_NAME: usize = 255;
/// The most consumers of a space.
const MAX_CONSUMERS: usize = 1 << 14;

/// With which pending pages a consumer begins.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Beginning<'m> {
    Clean,
    Dirty,
    Like(&'m Party),
}

impl AddressSpace {
    /// Adds a consumer: see [`AddressSpace::consumer`].
    pub(crate) fn join(
        &self,
        name: &str,
        range: IovaRange,
        beginning: Beginning<'_>,
    ) -> Result<Arc<Party>, Error> {
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
            && !members.iter().any(|member| member.id == other.id)
        {
            return Err(Error::ConsumerLeft {
                name: other.name().into(),
            });
        }
        let member = Arc::new(Member::new(name, range, self.page()));
        let unnamed = Arc::new(Member::new("", IovaRange::ALL, self.page()));
        // Relaxed: the edit publishes it, see `members_of_gone`.
        self.is_shared.store(true, Ordering::Relaxed);
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
            self.leave(&member.party);
            return Err(failure.raise());
        }
        Ok(Arc::clone(&member.party))
    }

    /// The part of a join after the consumer was published.
    fn begin(&self, member: &Member, beginning: Beginning<'_>) -> Result<(), Failure> {
        // Harvests that do not know the consumer have ended after this: from now on it is left
        // whatever is taken.
        self.catch_up()?;
        // F2 of the marks' protocol, for the full copy that follows, as in a switch of tracking.
        self.ordering.before_copies(Step::JoinFence);
        match beginning {
            Beginning::Clean => Ok(()),
            Beginning::Dirty => {
                let parent = Parent::Everything(Why::Beginning);
                member.epochs.begin_with(parent);
                let snapshot = self.areas.snapshot();
                let parts = || {
                    let areas = snapshot.iter(member.range);
                    areas.filter_map(|entry| entry.range.intersection(member.range))
                };
                // Before anything is allocated.
                let bytes = parts().fold(0u64, |bytes, part| {
                    bytes.saturating_add(member.pending.bytes_for(part))
                });
                match bytes > member.bounds().bytes {
                    true => member.whole.put_back(member.range, &self.walks),
                    false => parts().for_each(|part| member.pending.mark(part)),
                }
                Ok(())
            }
            Beginning::Like(other) => {
                // All that it is left from now on, the new consumer is left as well.
                let store = self.member(other).ok_or_else(|| {
                    let name = other.name().into();
                    Failure::Refused(Error::ConsumerLeft { name })
                })?;
                copy_of(&store, member, &self.walks).map_err(Failure::Refused)
            }
        }
    }

    /// Removes a consumer. Lock-free.
    pub(crate) fn leave(&self, member: &Party) {
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
        let domains = self.attachments();
        let recorded = self.look_hidden(range, stores_of(&domains, area), sink);
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
        let recorded = recorded.and_then(|()| {
            let whole = members.iter().flat_map(|member| member.whole.parts(range));
            for part in whole {
                let at = part.start();
                sink.record(part).map_err(|error| Stopped { at, error })?;
            }
            Ok(())
        });
        recorded.map_err(|stopped| stopped.error)
    }

    /// The consumers that may have pages of an area that the caller has taken out of the tree. A
    /// space without consumers takes no snapshot for this.
    fn members_of_gone(&self) -> Members {
        // Relaxed: a join whose edit comes before that of the caller is visible by that edit. A
        // consumer that joins later is left nothing in an area that has gone.
        match self.is_shared.load(Ordering::Relaxed) {
            true => self.members(),
            false => Members::default(),
        }
    }

    /// Moves what is pending page by page for any consumer in `range` to the marks of `area`, which
    /// has gone. Returns what is pending as a whole: page by page, it would take a bit for each
    /// page of the area.
    pub(super) fn mark_pending(&self, area: &Area, range: IovaRange) -> RangeSet {
        let mut whole = RangeSet::new();
        for member in self.members_of_gone().iter() {
            let mut bytes = 0u64;
            for run in member.pending.take_runs(range) {
                area.marks().mark(run);
                bytes = bytes.saturating_add(u64::try_from(run.len()).unwrap_or(u64::MAX));
            }
            for part in member.whole.parts(range) {
                whole.add(part);
                bytes = bytes.saturating_add(u64::try_from(part.len()).unwrap_or(u64::MAX));
            }
            MemberCounts::add(&member.counts.unmapped, bytes);
        }
        whole
    }

    /// Visits the pages in `range` of `area` that are in flight in harvests with an old snapshot.
    /// The area has gone, and its marks were taken.
    pub(super) fn late_pages(
        &self,
        area: &Area,
        range: IovaRange,
        mut visit: impl FnMut(Iova, u64),
    ) {
        let members = self.members_of_gone();
        if members.is_empty() {
            return;
        }
        let domains = self.attachments();
        // Acquire: as in `harvest::shared`, here and below.
        fence(Ordering::Acquire);
        self.visit_hidden(range, stores_of(&domains, area), &mut visit);
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
    ) -> Result<(), Stopped> {
        // Acquire: pairs with the Release fence after a claim in `harvest::shared`. If a summary
        // was found clear because of that harvest, its claim, or the end of it, is seen.
        fence(Ordering::Acquire);
        self.hiding.visit(range, |part| {
            let mut stores = stores.clone();
            stores.try_for_each(|store| store.peek_all(part, sink))
        })
    }

    /// Visits the words that [`look_hidden`](Self::look_hidden) records. The caller has performed
    /// an Acquire fence since it looked at `stores`, as described there.
    pub(crate) fn visit_hidden<'m>(
        &self,
        range: IovaRange,
        stores: impl Iterator<Item = &'m Marks> + Clone,
        visit: &mut impl FnMut(Iova, u64),
    ) {
        let visited: Result<(), Infallible> = self.hiding.visit(range, |part| {
            let stores = stores.clone();
            stores.for_each(|store| store.visit_all(part, visit));
            Ok(())
        });
        debug_assert!(visited.is_ok());
    }
}

/// The stores in which another harvest may hide pages of `area`, which is going: those of the
/// domains, from which an unmap moves them, and the marks.
fn stores_of<'m>(
    domains: &'m Attachments,
    area: &'m Area,
) -> impl Iterator<Item = &'m Marks> + Clone {
    let looks = performs(Step::LookInHiddenStores);
    let stores = domains.iter().map(|domain| &domain.put_back);
    stores
        .take(if looks { usize::MAX } else { 0 })
        .chain([area.marks()])
}

/// Copies what is pending for `other`, which harvests nothing meanwhile.
///
/// # Errors
/// [`Error::ConsumerBusy`] if it does, or has a lease.
fn copy_of(other: &Member, member: &Member, walks: &Walks) -> Result<(), Error> {
    const TRIES: usize = 8;
    for _ in 0..TRIES {
        let Some(begun) = other.counts.settled() else {
            break;
        };
        for run in other.pending.runs(member.range) {
            member.pending.mark(run);
        }
        let whole = other.whole.parts(member.range);
        whole
            .into_iter()
            .for_each(|part| member.whole.put_back(part, walks));
        let top = match other.range.covers(member.range) {
            true => other.epochs.top(),
            // No copy of the other consumer has the rest of the range.
            false => Parent::Unknown(Why::Beginning),
        };
        // Acquire: pairs with the AcqRel clear of a page that is pending. If a harvest has taken a
        // page that is missed above, it is counted below.
        fence(Ordering::Acquire);
        if other.counts.settled() == Some(begun) || !performs(Step::SettledAgain) {
            member.epochs.begin_with(top);
            return Ok(());
        }
    }
    Err(Error::ConsumerBusy {
        name: other.name().into(),
        leases: other.counts.live(),
    })
}

#[cfg(all(test, not(dirtymap_loom)))]
#[allow(clippy::unwrap_used)] // helpers of tests
mod tests {
    use super::*;
    use crate::harvest::Start;
    use crate::units::Granule;

    /// As many consumers as there may be, and one more, which is refused before anything changes.
    #[test]
    fn one_consumer_too_many_is_refused() {
        let space = AddressSpace::tracked(Granule::K4);
        let first = space.consumer("first", Start::Clean).unwrap();
        let other = Arc::new(Member::new("other", IovaRange::ALL, Granule::K4));
        let joined: Result<(), Infallible> = space.areas.update(|edit| {
            edit.set_rules(edit.rules().with_members(|all| {
                all.resize(MAX_CONSUMERS, Arc::clone(&other)); // with the unnamed one
            }));
            Ok(())
        });
        joined.unwrap();
        let last = space.consumer("last", Start::Clean).unwrap();
        let refused = space.consumer("more", Start::Clean).unwrap_err();
        let most = MAX_CONSUMERS;
        assert!(matches!(refused, Error::TooManyConsumers { most: m } if m == most));
        assert_eq!(space.consumers().len(), MAX_CONSUMERS);
        drop(last);
        let _ = space.consumer("more", Start::Clean).unwrap();
        drop(first);
    }
}
