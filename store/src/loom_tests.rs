//! Models of the path without a lock: a writer against the leader, each with the steps that it must
//! not hold without.
#![allow(clippy::unwrap_used)] // helpers of tests

use dirtymap::sync::model::{Bound, explore, name_of};
use dirtymap::sync::{Arc, AtomicU64, Ordering, thread};

use crate::claims::{Slot, claimed};
use crate::disk::SimFolder;
use crate::geometry::Device;
use crate::options::Options;
use crate::step::{Step, leave_out, performs};
use crate::store::Store;
use crate::words::{Close, Words};

/// The model must hold, and fail without each of `steps`.
fn holds_only_with<M>(steps: &[Step], model: M)
where
    M: Fn() -> bool + Sync + Send + Copy + 'static,
{
    let name = name_of(&model);
    let whole = explore(Bound::USUAL, None, model);
    println!("{name} holds in {} executions", whole.executions);
    assert!(whole.executions > 1, "{name} explored nothing");
    assert_eq!(whole.failures, 0, "{name}: the contract is broken");
    for step in steps {
        leave_out(Some(*step));
        let broken = explore(Bound::USUAL, None, model);
        leave_out(None);
        let (failures, executions) = (broken.failures, broken.executions);
        println!("{name} without {step:?}: fails in {failures} of {executions} executions");
        assert!(failures > 0, "{name} still holds without {step:?}");
    }
}

/// An extent that is open, and the data in it.
struct Extent {
    words: Words,
    data: AtomicU64,
}

fn open_extent() -> Arc<Extent> {
    let extent = Extent {
        words: Words::new(),
        data: AtomicU64::new(0),
    };
    extent.words.pin(0);
    extent.words.request(0);
    extent.words.opened(0);
    extent.words.leave(0, 0);
    Arc::new(extent)
}

impl Extent {
    /// Writes, if the extent is open. Returns whether it did.
    fn write(&self) -> bool {
        let open = self.words.pin(0) == Some(true);
        if open {
            self.data.store(1, Ordering::Relaxed);
        }
        self.words.leave(0, u32::from(open));
        open
    }

    /// The same by a handle, whose slot is made at this moment.
    fn write_claimed(&self) -> bool {
        let slot = self.words.claims.add();
        let open = slot.claim(0, 1, || self.words.mark_open(0, 1));
        if open {
            self.data.store(1, Ordering::Relaxed);
            Slot::end(slot.word());
        }
        open
    }

    /// What the leader does to close it.
    fn close(&self) -> Close {
        if !self.words.begin_close(0, false) {
            return Close::InUse;
        }
        let claimed = claimed(&self.words.claims.look(), 0) != 0;
        self.words.close(0, claimed && performs(Step::HoldClaimed))
    }

    /// What the leader does to harvest it: the pages that it takes.
    fn harvest(&self) -> u32 {
        let taken = self.words.take(0);
        let again = taken & claimed(&self.words.claims.look(), 0);
        if again != 0 && performs(Step::PutBackClaimed) {
            self.words.put_back(0, again);
        }
        taken
    }
}

/// A harvest takes the mark and copies, while a write ends: the copy has it, or the mark is still
/// there.
#[test]
fn a_write_is_copied_or_stays_marked() {
    holds_only_with(&[Step::PublishWrite, Step::SeeWrite], || {
        let extent = open_extent();
        let writer = {
            let extent = Arc::clone(&extent);
            thread::spawn(move || extent.write())
        };
        let taken = extent.words.take(0);
        // Relaxed: the mark has to order it.
        let copy = extent.data.load(Ordering::Relaxed);
        let wrote = writer.join().unwrap();
        let left = extent.words.take(0);
        wrote && (taken == 0 || copy == 1) && (taken | left == 1)
    });
}

/// A close comes between the steps of a write: it fails, or it takes the mark, or the write finds
/// the extent closed and is not issued.
#[test]
fn a_close_takes_the_mark_or_waits() {
    holds_only_with(&[Step::HoldInFlight, Step::SeeWrite], || {
        let extent = open_extent();
        let writer = {
            let extent = Arc::clone(&extent);
            thread::spawn(move || extent.write())
        };
        let closed = extent.close();
        let copy = extent.data.load(Ordering::Relaxed);
        let wrote = writer.join().unwrap();
        match closed {
            Close::Closed(0) => !wrote,
            Close::Closed(_) => wrote && copy == 1,
            Close::InUse => extent.words.take(0) == u32::from(wrote),
        }
    });
}

/// A handle finds its page marked by an earlier write, and writes it while the extent is closed.
/// The leader leaves the extent open, or the copy has the data, or the handle finds the extent
/// closed.
#[test]
fn a_claim_keeps_its_extent_open() {
    let steps = [
        Step::HoldClaimed,
        Step::ClaimFence,
        Step::LookFence,
        Step::PublishEnd,
        Step::SeeEnd,
    ];
    holds_only_with(&steps, || {
        let extent = open_extent();
        extent.words.pin(0);
        extent.words.leave(0, 1);
        // So that there is a slot to look at from the beginning.
        let other = extent.words.claims.add();
        let writer = {
            let extent = Arc::clone(&extent);
            thread::spawn(move || extent.write_claimed())
        };
        let closed = extent.close();
        let copy = extent.data.load(Ordering::Relaxed);
        let wrote = writer.join().unwrap();
        drop(other);
        match closed {
            Close::Closed(mask) => mask == 1 && (!wrote || copy == 1),
            Close::InUse => extent.words.take(0) == 1,
        }
    });
}

/// The same of a page without a mark: the leader that closes takes the mark of the handle.
#[test]
fn a_close_takes_the_mark_of_a_claim() {
    holds_only_with(&[Step::HoldClaimed, Step::SeeEnd], || {
        let extent = open_extent();
        let writer = {
            let extent = Arc::clone(&extent);
            thread::spawn(move || extent.write_claimed())
        };
        let closed = extent.close();
        let copy = extent.data.load(Ordering::Relaxed);
        let wrote = writer.join().unwrap();
        match closed {
            Close::Closed(0) => !wrote,
            Close::Closed(_) => wrote && copy == 1,
            Close::InUse => extent.words.take(0) == u32::from(wrote),
        }
    });
}

/// Another thread ends the claim of a handle, which claims another extent at once. The leader,
/// which may see the new claim alone, sees the data of the write that ended.
#[test]
fn a_claim_that_another_thread_ended_shows_its_data() {
    holds_only_with(&[Step::HoldClaimed, Step::PublishEnd, Step::SeeEnd], || {
        let extent = open_extent();
        extent.words.pin(1);
        extent.words.request(1);
        extent.words.opened(1);
        extent.words.leave(1, 0);
        let slot = extent.words.claims.add();
        let claimed = slot.claim(0, 1, || extent.words.mark_open(0, 1));
        let other = {
            let (extent, slot) = (Arc::clone(&extent), Arc::clone(&slot));
            thread::spawn(move || {
                extent.data.store(1, Ordering::Relaxed);
                Slot::end(slot.word());
            })
        };
        let owner = {
            let extent = Arc::clone(&extent);
            thread::spawn(move || slot.claim(1, 1, || extent.words.mark_open(1, 1)))
        };
        let closed = extent.close();
        let copy = extent.data.load(Ordering::Relaxed);
        other.join().unwrap();
        owner.join().unwrap();
        match closed {
            Close::Closed(mask) => claimed && mask == 1 && copy == 1,
            Close::InUse => claimed && extent.words.take(0) == 1,
        }
    });
}

/// A handle writes a page that is marked, while a harvest takes the mark and copies: the copy has
/// the data, or the page has a mark.
#[test]
fn a_page_that_is_claimed_is_copied_or_stays_marked() {
    let steps = [
        Step::PutBackClaimed,
        Step::ClaimFence,
        Step::LookFence,
        Step::PublishEnd,
        Step::SeeEnd,
    ];
    holds_only_with(&steps, || {
        let extent = open_extent();
        extent.words.pin(0);
        extent.words.leave(0, 1);
        let other = extent.words.claims.add();
        let writer = {
            let extent = Arc::clone(&extent);
            thread::spawn(move || extent.write_claimed())
        };
        let taken = extent.harvest();
        let copy = extent.data.load(Ordering::Relaxed);
        let wrote = writer.join().unwrap();
        drop(other);
        let left = extent.words.take(0);
        taken == 1 && wrote && (copy == 1 || left == 1)
    });
}

/// The writer that finds its extent open comes after the flush, which stands here for itself.
#[test]
fn an_extent_is_open_after_its_flush() {
    holds_only_with(&[Step::PublishOpen, Step::SeeOpen], || {
        let words = Arc::new((Words::new(), AtomicU64::new(0)));
        words.0.pin(0);
        words.0.request(0);
        let leader = {
            let words = Arc::clone(&words);
            thread::spawn(move || {
                words.1.store(1, Ordering::Relaxed);
                words.0.opened(0);
            })
        };
        let open = words.0.is_open(0);
        let flushed = words.1.load(Ordering::Relaxed);
        leader.join().unwrap();
        !open || flushed == 1
    });
}

/// Two writers that wait and one of which leads: nobody waits for ever, each extent is opened once,
/// and a harvest afterwards has both.
#[test]
fn writers_that_wait_together_are_both_let_in() {
    holds_only_with(&[], || {
        let device = Device {
            id: 1,
            len: 1 << 18,
        };
        let store = Store::create(SimFolder::new(), &device, &Options::new());
        let store = Arc::new(store.unwrap());
        // The model checker does not see that a `OnceLock` publishes the words.
        (0..2).for_each(|extent| assert!(!store.words.is_open(extent)));
        let write = |store: &Store, at: u64| {
            let intent = store.begin_write(at..at + 1).unwrap();
            drop(intent.wait().unwrap());
        };
        let other = {
            let store = Arc::clone(&store);
            thread::spawn(move || write(&store, 0x1_0000))
        };
        write(&store, 0);
        other.join().unwrap();
        let stats = store.stats();
        let once = stats.opened == 2 && stats.batches <= 2;
        store.close_extents().unwrap();
        once && store.stats().closed == 2
    });
}

/// A writer gathers the writer that the last batch served, while a consumer joins and takes the
/// lead from it: nobody waits for ever, and all of them are let in. The thread that gathers holds
/// nothing, and each leader that ends wakes all that wait.
#[test]
fn a_consumer_that_joins_takes_the_lead_from_a_writer_that_gathers() {
    holds_only_with(&[], || {
        let device = Device {
            id: 1,
            len: 1 << 18,
        };
        let store = Store::create(SimFolder::new(), &device, &Options::new());
        let store = Arc::new(store.unwrap());
        // The model checker does not see that a `OnceLock` publishes the words.
        (0..2).for_each(|extent| assert!(!store.words.is_open(extent)));
        store.expect_companions(2);
        let writer = {
            let store = Arc::clone(&store);
            thread::spawn(move || drop(store.begin_write(0..1).unwrap().wait().unwrap()))
        };
        store.join("backup").unwrap();
        drop(
            store
                .begin_write(0x1_0000..0x1_0001)
                .unwrap()
                .wait()
                .unwrap(),
        );
        writer.join().unwrap();
        let stats = store.stats();
        stats.opened == 2 && stats.batches <= 3
    });
}
