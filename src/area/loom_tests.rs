//! Models: two updates that exclude each other, by areas or by rules, and updates against a reader.
//!
//! The payload of an area is a cell that the model watches: it is written before the area is
//! inserted and when the area is dropped. The model fails at a read that is not ordered against
//! both writes: a missing Acquire or Release causes one, and so does an area that is freed while a
//! reader has it. It also fails if an area is leaked.

use std::convert::Infallible;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

use loom::cell::UnsafeCell;

use super::{AreaTree, Entry};
use crate::error::Error;
use crate::sync::model::{self, Bound, holds_within};
use crate::sync::{Arc, AtomicBool, Ordering, Step, thread};
use crate::units::{Granule, Iova, IovaRange};

#[derive(Debug)]
struct Watched {
    value: UnsafeCell<u64>,
    /// Counts the drops, over all executions of a model.
    drops: &'static AtomicUsize,
}

// SAFETY: `value` is not Sync. `get` only reads, and the one write is in `drop`, which has
// exclusive access. The model checks that the tree grants it.
unsafe impl Sync for Watched {}

impl Watched {
    fn new(value: u64) -> Arc<Self> {
        static DROPS: AtomicUsize = AtomicUsize::new(0);
        Watched::counted(value, &DROPS)
    }

    fn counted(value: u64, drops: &'static AtomicUsize) -> Arc<Self> {
        Arc::new(Watched {
            value: UnsafeCell::new(value),
            drops,
        })
    }

    fn get(&self) -> u64 {
        // SAFETY: see `Sync`.
        self.value.with(|value| unsafe { *value })
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        // SAFETY: see `Sync`.
        self.value.with_mut(|value| unsafe { *value = u64::MAX });
        self.drops.fetch_add(1, SeqCst);
    }
}

type Tree = AreaTree<Watched, 4>;

fn range(start: u64, last: u64) -> IovaRange {
    IovaRange::new(Iova::new(start), Iova::new(last)).unwrap()
}

fn areas(tree: &Tree) -> Vec<u64> {
    let snapshot = tree.snapshot();
    snapshot.internal_validate();
    snapshot
        .iter(IovaRange::ALL)
        .map(|entry| entry.area.get())
        .collect()
}

/// Below three preemptions, no reader is stopped between its pin and its load of the root, and a
/// model with a Relaxed publication of the root passes.
const BOUND: Bound = Bound::between(3, usize::MAX);

/// For two writers, which compete at the compare-exchange of the root.
const WRITERS: Bound = Bound::between(2, 2);

/// Runs the model, which asserts what must hold, and asserts that there was more than one
/// execution.
fn explore(bound: Bound, model: impl Fn() + Send + Sync + Copy + 'static) {
    let explored = model::explore(bound, None, move || {
        model();
        true
    });
    println!("{} executions", explored.executions);
    assert!(
        explored.executions > 1,
        "the model checker saw no concurrency"
    );
    assert_eq!(explored.failures, 0, "a race");
}

#[test]
fn of_two_overlapping_inserts_one_wins() {
    explore(WRITERS, || {
        let tree = Arc::new(Tree::new());
        let other = {
            let tree = Arc::clone(&tree);
            thread::spawn(move || tree.insert(range(0, 15), Watched::new(1)).is_ok())
        };
        let refused = tree.insert(range(10, 19), Watched::new(2)).err();
        let other_won = other.join().unwrap();
        assert_eq!(other_won, refused.is_some());
        if let Some((error, area)) = refused {
            assert!(matches!(error, Error::Overlap { existing, .. } if existing == range(0, 15)));
            assert_eq!(area.get(), 2);
        }
        assert_eq!(areas(&tree), [if other_won { 1 } else { 2 }]);
    });
}

#[test]
fn of_two_disjoint_inserts_none_is_lost() {
    /// Inserts after a look at the existing areas: an edit reads what other threads published.
    fn insert(tree: &Tree, range: IovaRange, value: u64) {
        let area = Watched::new(value);
        tree.update(|edit| {
            for entry in edit.iter(IovaRange::ALL) {
                assert_ne!(entry.area.get(), value);
            }
            edit.insert(range, Arc::clone(&area))
        })
        .unwrap();
    }

    explore(WRITERS, || {
        let tree = Arc::new(Tree::new());
        let other = {
            let tree = Arc::clone(&tree);
            thread::spawn(move || insert(&tree, range(0, 9), 1))
        };
        insert(&tree, range(10, 19), 2);
        other.join().unwrap();
        assert_eq!(areas(&tree), [1, 2]);
    });
}

#[test]
fn two_allocations_never_share_an_address() {
    fn allocate(tree: &Tree, value: u64) {
        let area = Watched::new(value);
        tree.update(|edit| {
            let found = edit.first_fit(range(5, 100), 10, Granule::from_lg2(2).unwrap());
            edit.insert(found.unwrap(), Arc::clone(&area))
        })
        .unwrap();
    }

    explore(WRITERS, || {
        let tree = Arc::new(Tree::new());
        let other = {
            let tree = Arc::clone(&tree);
            thread::spawn(move || allocate(&tree, 1))
        };
        allocate(&tree, 2);
        other.join().unwrap();
        let mut found = areas(&tree);
        found.sort_unstable();
        assert_eq!(found, [1, 2]);
        let snapshot = tree.snapshot();
        let ranges: Vec<_> = snapshot.iter(IovaRange::ALL).map(|e| e.range).collect();
        assert_eq!(ranges, [range(8, 17), range(20, 29)]);
    });
}

#[test]
fn of_a_map_and_a_reservation_one_wins() {
    /// The reserved range, watched like the payload of an area.
    #[derive(Default)]
    struct Reserved(Option<(IovaRange, Arc<Watched>)>);
    type Ruled = AreaTree<Watched, 4, Reserved>;

    /// Fails if the range is mapped.
    fn reserve(tree: &Ruled, reserved: IovaRange) -> Result<(), IovaRange> {
        let watched = Watched::new(1);
        tree.update(|edit| match edit.first_intersecting(reserved) {
            Some(area) => Err(area.range),
            None => {
                edit.set_rules(Reserved(Some((reserved, Arc::clone(&watched)))));
                Ok(())
            }
        })
    }

    /// Fails if the range is reserved.
    fn map(tree: &Ruled, mapped: IovaRange) -> Result<(), u64> {
        let area = Watched::new(2);
        tree.update(|edit| match &edit.rules().0 {
            Some((reserved, watched)) if reserved.intersects(mapped) => Err(watched.get()),
            _ => {
                assert!(edit.insert(mapped, Arc::clone(&area)).is_ok());
                Ok(())
            }
        })
    }

    explore(WRITERS, || {
        let tree = Arc::new(Ruled::new());
        let other = {
            let tree = Arc::clone(&tree);
            thread::spawn(move || reserve(&tree, range(0, 15)))
        };
        let mapped = map(&tree, range(10, 19));
        let reserved = other.join().unwrap();
        let snapshot = tree.snapshot();
        match (mapped, reserved) {
            (Ok(()), Err(area)) => {
                assert_eq!(area, range(10, 19));
                assert!(snapshot.rules().0.is_none());
                assert_eq!(snapshot.len(), 1);
            }
            (Err(1), Ok(())) => {
                assert!(snapshot.rules().0.is_some());
                assert_eq!(snapshot.len(), 0);
            }
            both => panic!("both or none: {both:?}"),
        }
    });
}

#[test]
fn of_two_removes_one_wins() {
    explore(WRITERS, || {
        let tree = Arc::new(Tree::new());
        tree.insert(range(0, 9), Watched::new(1)).unwrap();
        let remove = |tree: &Tree| {
            let Ok(removed) = tree
                .update(|edit| Ok::<_, Infallible>(edit.remove(Iova::new(0)).map(Entry::to_arc)));
            removed.map(|area| area.get())
        };
        let other = {
            let tree = Arc::clone(&tree);
            thread::spawn(move || remove(&tree))
        };
        let mine = remove(&tree);
        let others = other.join().unwrap();
        assert_eq!(mine.or(others), Some(1));
        assert_eq!(mine.xor(others), Some(1));
        assert!(areas(&tree).is_empty());
    });
}

#[test]
fn a_reader_sees_a_batch_whole_and_nothing_is_freed_under_it() {
    // Three counts: executions in which the reader saw the state before the batch; drops of the old
    // area; and executions in which that drop happened before the threads ended, because the reader
    // was not pinned.
    static SAW_OLD: AtomicUsize = AtomicUsize::new(0);
    static DROPS: AtomicUsize = AtomicUsize::new(0);
    static FREED_EARLY: AtomicUsize = AtomicUsize::new(0);
    explore(BOUND, || {
        let drops_before = DROPS.load(SeqCst);
        let tree = Arc::new(Tree::new());
        tree.insert(range(0, 9), Watched::counted(1, &DROPS))
            .unwrap();
        let writer = {
            let tree = Arc::clone(&tree);
            thread::spawn(move || {
                let Ok(()) = tree.update(|edit| {
                    edit.remove(Iova::new(0));
                    edit.insert(range(10, 19), Watched::new(2)).unwrap();
                    edit.insert(range(20, 29), Watched::new(3)).unwrap();
                    Ok::<_, Infallible>(())
                });
                // Each call advances the epoch by one, unless the reader holds it back, and the
                // next call drops what has returned.
                tree.reclaim();
                tree.reclaim();
                tree.reclaim();
                FREED_EARLY.fetch_add(DROPS.load(SeqCst) - drops_before, SeqCst);
            })
        };
        {
            let snapshot = tree.snapshot();
            let entries: Vec<_> = snapshot.iter(IovaRange::ALL).collect();
            let seen: Vec<u64> = entries.iter().map(|entry| entry.area.get()).collect();
            assert!(seen == [1] || seen == [2, 3], "torn: {seen:?}");
            if seen == [1] {
                SAW_OLD.fetch_add(1, SeqCst);
            }
        }
        writer.join().unwrap();
        assert_eq!(areas(&tree), [2, 3]);
    });
    let (saw_old, freed_early) = (SAW_OLD.load(SeqCst), FREED_EARLY.load(SeqCst));
    println!("the reader saw the old area {saw_old} times; it was freed early {freed_early} times");
    assert!(
        saw_old > 0 && freed_early > 0,
        "the model does not reach what it is about"
    );
}

/// Invariant 8, and that what was replaced is used again only after its readers have left: a
/// snapshot has as many areas as there were updates before it. Areas are plain numbers here, so
/// that a read that comes too early is counted instead of causing a panic.
#[test]
fn a_node_is_not_used_again_under_a_reader() {
    holds_within(BOUND, &[Step::WaitForReaders, Step::PublishRoot], || {
        let tree = Arc::new(AreaTree::<u64, 4>::new());
        tree.insert(range(0, 9), Arc::new(1)).unwrap();
        let between = Arc::new(AtomicBool::new(false));
        let writer = {
            let (tree, between) = (Arc::clone(&tree), Arc::clone(&between));
            thread::spawn(move || {
                // The second insert uses the node and the root that the first one replaced, if they
                // have returned.
                tree.insert(range(10, 19), Arc::new(2)).unwrap();
                tree.insert(range(20, 29), Arc::new(3)).unwrap();
                between.store(true, Ordering::Relaxed);
            })
        };
        let snapshot = tree.snapshot();
        // Each update has added one area. From here on the model looks only at nodes.
        let areas = snapshot.version() as usize;
        // The walk that is under way, and a new one from the root: both see the state of that
        // moment, even if updates were published in between.
        let mut walk = snapshot.iter(IovaRange::ALL);
        let first = walk.next().is_some();
        between.load(Ordering::Relaxed);
        let again = snapshot.iter(IovaRange::ALL).count();
        let whole = first && 1 + walk.count() == areas && again == areas;
        drop(snapshot);
        writer.join().unwrap();
        whole
    });
}

/// Two threads update, each with the pool that the other one has put back. A thread that finds none
/// pushes one of its own, which the second update of the other thread may merge.
#[test]
fn updates_hand_each_other_their_pool() {
    holds_within(WRITERS, &[Step::PublishPool, Step::PublishFurther], || {
        let tree = Arc::new(AreaTree::<u64, 4>::new());
        let other = {
            let tree = Arc::clone(&tree);
            thread::spawn(move || {
                tree.insert(range(10, 19), Arc::new(2)).unwrap();
                tree.insert(range(30, 39), Arc::new(4)).unwrap();
            })
        };
        tree.insert(range(20, 29), Arc::new(3)).unwrap();
        other.join().unwrap();
        tree.snapshot().iter(IovaRange::ALL).count() == 3
    });
}

/// Insert, removal, reclaim and a snapshot at once: the reader sees a state that existed, and in
/// the end all areas are there that were not removed.
#[test]
fn an_insert_and_a_removal_against_a_reader() {
    holds_within(BOUND, &[Step::PublishRoot], || {
        let tree = Arc::new(AreaTree::<u64, 4>::new());
        tree.insert(range(0, 9), Arc::new(1)).unwrap();
        let writer = {
            let tree = Arc::clone(&tree);
            thread::spawn(move || {
                tree.insert(range(10, 19), Arc::new(2)).unwrap();
                let Ok(gone) = tree.update(|edit| {
                    Ok::<_, Infallible>(edit.remove(Iova::new(0)).map(Entry::to_arc))
                });
                tree.reclaim();
                gone.is_some()
            })
        };
        let snapshot = tree.snapshot();
        let seen: Vec<u64> = snapshot.iter(IovaRange::ALL).map(|e| *e.area).collect();
        drop(snapshot);
        let removed = writer.join().unwrap();
        removed && [&[1][..], &[1, 2], &[2]].contains(&&seen[..])
    });
}

/// The age of a snapshot is read from the newest root, which another thread has just published.
#[test]
fn the_age_of_a_snapshot_is_that_of_a_whole_root() {
    holds_within(Bound::between(1, 1), &[Step::PublishRoot], || {
        let tree = Arc::new(AreaTree::<u64, 4>::new());
        let writer = {
            let tree = Arc::clone(&tree);
            thread::spawn(move || tree.insert(range(0, 9), Arc::new(1)).unwrap())
        };
        let snapshot = tree.snapshot();
        let (version, age) = (snapshot.version(), snapshot.age());
        drop(snapshot);
        writer.join().unwrap();
        version + age <= 1 && tree.snapshot().version() == 1
    });
}
