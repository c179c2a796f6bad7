//! Bounds of the memory of a consumer. A store of pending pages is dropped if it has grown too
//! large, or if its consumer has not harvested for too long. Then all that is mapped is pending for
//! the consumer, as a whole.
//!
//! # The protocol
//! ```text
//!  dropping thread                          harvest of the consumer
//!  B1  publish a consumer with an empty     C1  take what is pending as a whole
//!      store, for which its range is        C2  report all of it that is mapped
//!      pending as a whole                   sync:
//!                                           C3  wait for harvests that began before
//!                                           C4  flush all sources; fence F2
//!                                               copy
//! ```
//!
//! The list of consumers is under the root of the area tree. So B1 is an update of the root, as a
//! join is, and the old store lives for as long as a thread may use it.
//!
//! # Why no write is lost
//! Take a harvest X of another consumer that takes a page p, and leaves it in the old store,
//! because X has loaded a root from before B1. No later harvest looks at that store.
//! * If p is still pending as a whole, a later harvest of the consumer reports it.
//! * If a harvest Y of the consumer has taken it as a whole (C1), then B1 came before C3. X has
//!   announced itself before it loaded its root, so it is among those for which C3 waits: see
//!   [`walks`](super::walks). So X has cleared p before the flush C4. A write before that is in the
//!   copy of Y, and one after it sets the dirty bit, or the mark, anew.
//! * If Y is aborted, the pages that it took as a whole are pending as a whole again, in the store
//!   from which they came. If that store was dropped meanwhile, another B1 has made everything
//!   pending.
//! * After C3, each harvest that began before C3 has ended. So no page comes into the old store
//!   after that.
//!
//! C3 and C4 belong to the first sync over the new store, also if its lease has nothing as a whole.
//! Such a lease may have seen p in the flight of X. X does not leave p in the new store afterwards,
//! so no later look at the queue pays the debt of X. And a copy of p that came before C4 could be
//! older than that of Y, although the number of its lease is higher. The same holds for a lease
//! that has loaded its root before B1, and has a higher number than Y.
//!
//! A harvest that loads the root after B1 leaves its pages in the new store, with their debt.
//!
//! A lease of the consumer itself over the old store puts its pages back into the new one. If the
//! lease does not see that its store is old, it puts them back before B1, and they are pending as a
//! whole.
//!
//! # The store of a harvest
//! A harvest Y of the consumer that has loaded the root before B1 looks at the old store, while a
//! harvest X of another consumer leaves a page in the new store. If Y is the last harvest, it must
//! not miss that page. So after each piece Y checks whether its store is old, and then goes on with
//! the new store, in which everything is pending. The flag of the old store is set before B1. X has
//! loaded a root from after B1, so it sees the flag. If Y finds the page neither in the table nor
//! in flight, it sees all that X saw, and so the flag.
//!
//! # Holes
//! A harvest that has walked all areas of its request takes what is left there as a whole, for it
//! is of holes: else everything would be pending for ever. An abort of another lease of the
//! consumer may have put back an area after the walk has passed it. So put-backs are counted under
//! the lock of the set, and a harvest whose count is not that of its beginning takes nothing.
//!
//! An area that is mapped after the root of that harvest begins clean. But a harvest X that uses
//! the old store may know an area that was at the same addresses before. X asks sources by address,
//! so it takes pages of the younger area as well, and leaves them in the old store. So holes are
//! taken after C3. The areas of that moment, and the promised ones, are no holes. If X took a page
//! of an area, then that area was in the tree, or promised, before X ended, and so before that
//! look. An area that comes later is walked by harvests that leave its pages in the new store.

use std::collections::BTreeMap;

use super::AddressSpace;
use super::member::{Audience, Member, MemberCounts, Party};
use crate::failure::{Failure, attempt};
use crate::flush::FlushGather;
use crate::ranges::without;
use crate::sync::{Arc, Ordering, Step, performs};
use crate::units::IovaRange;

/// Whether what is pending for a consumer takes more memory than it may.
fn has_too_much(member: &Member) -> bool {
    member.pending.held_bytes() > member.bounds().bytes
}

impl AddressSpace {
    /// Drops the stores of the consumers of `audience` that are out of bounds, after a harvest.
    pub(crate) fn keep_in_bounds(&self, audience: &Audience) {
        if !audience.is_shared() {
            return;
        }
        let is_late = |other: &Member| {
            let age = other.bounds().age;
            // Relaxed: a count, which orders nothing.
            age != u64::MAX && other.missed.fetch_add(1, Ordering::Relaxed) >= age
        };
        let others = audience.others();
        let others = others.filter(|other| is_late(other) || has_too_much(other));
        let own = audience.own().filter(|own| has_too_much(own));
        self.drop_stores(others.chain(own));
    }

    /// Drops the store of a consumer that puts something back, if that is too much.
    pub(crate) fn keep_own_in_bounds(&self, own: &Arc<Member>) {
        let younger = self.younger_store(own);
        let own = younger.as_ref().unwrap_or(own);
        self.drop_stores(Some(own).filter(|own| has_too_much(own)));
    }

    /// B1: gives consumers an empty store, unless they have another one already. One update for all
    /// of them, because each copies the list of consumers.
    fn drop_stores<'m>(&self, old: impl IntoIterator<Item = &'m Arc<Member>>) {
        let mut stores = BTreeMap::new();
        for old in old.into_iter().filter(|old| old.pending.held_bytes() > 0) {
            let fresh = Member::with_store(Arc::clone(&old.party), old.stores + 1);
            if performs(Step::TellWhole) {
                fresh.whole.begin(old.range);
            }
            // Relaxed: the update publishes it. A harvest that misses a page, because another one
            // has left it in the new store, sees this by way of that harvest: see "The store of a
            // harvest".
            old.is_old.store(true, Ordering::Relaxed);
            stores.insert(old.id, (old, Arc::new(fresh)));
        }
        if stores.is_empty() {
            return;
        }
        let fresh = |now: &Arc<Member>| {
            let (old, fresh) = stores.get(&now.id)?;
            // Another thread may have been faster.
            Arc::ptr_eq(now, old).then_some(fresh)
        };
        let dropped = self.areas.update(|edit| {
            let rules = edit.rules();
            let old = rules.members().iter().filter(|now| fresh(now).is_some());
            let old: Vec<Arc<Member>> = old.cloned().collect();
            if old.is_empty() {
                return Err(()); // they have left, or another thread was faster
            }
            edit.set_rules(rules.with_members(|all| {
                for place in all {
                    if let Some(fresh) = fresh(place) {
                        *place = Arc::clone(fresh);
                    }
                }
            }));
            Ok(old)
        });
        for old in dropped.into_iter().flatten() {
            MemberCounts::add(&old.counts.dropped, 1);
        }
    }

    /// The store that the consumer of a harvest or a lease got after the harvest has loaded the
    /// root.
    pub(crate) fn younger_store(&self, own: &Arc<Member>) -> Option<Arc<Member>> {
        // Relaxed: see `drop_stores`.
        if !own.is_old.load(Ordering::Relaxed) || !performs(Step::FollowStore) {
            return None;
        }
        self.member(own).filter(|now| !Arc::ptr_eq(now, own))
    }

    /// The consumer with the store that it has now; `None` if it has left.
    pub(crate) fn member(&self, party: &Party) -> Option<Arc<Member>> {
        let members = self.members();
        members.iter().find(|member| member.id == party.id).cloned()
    }

    /// Removes from `own` the holes in `range`, which is pending as a whole there. A harvest of the
    /// consumer has walked all areas of `range`, and the store has caught up; see "Holes".
    pub(crate) fn forget_holes(&self, own: &Member, range: IovaRange, put_backs: u64) {
        if !own.whole.is_due() {
            return;
        }
        // After the caller's look at `has_caught_up`: an area of which a harvest has left pages in
        // an older store is in the tree, or promised, or has gone again.
        let snapshot = self.snapshot();
        let mut holes = Vec::new();
        for hole in without(range, snapshot.areas_in(range).map(|entry| entry.range)) {
            holes.extend(without(hole, snapshot.rules().promised_parts(hole)));
        }
        own.whole.forget(holes, (put_backs, &self.walks));
    }

    /// C3, and C4 without its fence: waits for the harvests that are running, and flushes all
    /// sources. Devices may still cache "D is set" for leaves that those harvests have cleared, and
    /// only the leases of those harvests know that debt.
    pub(crate) fn catch_up(&self) -> Result<(), Failure> {
        self.walks.wait();
        if performs(Step::FlushAtJoin) {
            let mut gather = FlushGather::new();
            for domain in self.attachments().iter() {
                self.owe_all_of(&mut gather, IovaRange::ALL, domain);
            }
            let ticket = self.flush.owe(&gather);
            attempt(|| self.flush_until(ticket))?;
        }
        Ok(())
    }
}

#[cfg(all(test, not(dirtymap_loom)))]
#[allow(clippy::unwrap_used)] // helpers of tests
mod tests {
    use super::super::epochs::Bounds;
    use super::*;
    use crate::bitmap::UserBitmap;
    use crate::harvest::{Consumer, HarvestRequest, Start};
    use crate::units::{Access, Granule, Iova};

    /// A harvest that takes many consumers out of bounds. Each had an update of its own, which
    /// copied the list of consumers: 10,000 consumers were 100 million copies.
    #[test]
    fn a_harvest_drops_the_stores_of_all_consumers_by_one_update() {
        let space = AddressSpace::tracked(Granule::K4);
        space.map(0..1 << 20, 0, Access::ReadWrite).unwrap();
        let join = |nth: u32| space.consumer(&nth.to_string(), Start::Clean).unwrap();
        let all: Vec<Consumer<'_>> = (0..50).map(join).collect();
        for one in &all {
            one.set_bounds(Bounds {
                bytes: 1,
                ..Bounds::default()
            });
        }
        space.mark(0..1).unwrap();
        let before = space.snapshot().newest();
        let lease = space.rounds().next().unwrap();
        assert_eq!(space.snapshot().newest() - before, 1);
        lease.commit();
        for one in &all {
            assert!(one.stats().everything);
            assert_eq!(one.stats().dropped, 1);
        }
    }

    /// A consumer that begins dirty. Its pending pages took a chunk for each 128 MiB that is
    /// mapped, without a look at its bounds: 512 MiB here, and more than any machine has for an
    /// area of 2^62 bytes.
    #[test]
    fn a_consumer_that_begins_dirty_keeps_its_bounds() {
        for bytes in [1u64 << 44, 1 << 62] {
            let space = AddressSpace::tracked(Granule::K4);
            space.map(0..bytes, 0, Access::ReadWrite).unwrap();
            let late = space.consumer("late", Start::Dirty).unwrap();
            assert_eq!(late.stats().held_bytes, 0);
            assert!(late.stats().everything);
            let mut words = [0];
            let asked = IovaRange::from_len(Iova::MIN, 64 << 12).unwrap();
            let request = HarvestRequest::new(asked, Granule::K4);
            let lease = late.harvest(&request, UserBitmap::new(&mut words));
            assert_eq!(lease.unwrap().sync().unwrap().dirty(), 64);
        }
        let space = AddressSpace::tracked(Granule::K4);
        space.map(0..1 << 30, 0, Access::ReadWrite).unwrap();
        let late = space.consumer("late", Start::Dirty).unwrap();
        assert!(!late.stats().everything);
        assert_eq!(late.stats().pending_bytes, 1 << 30);
    }
}
