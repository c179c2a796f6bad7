//! The places of nodes and areas: none is leaked, none is used twice, and no reader frees any.

use std::convert::Infallible;

use super::reclaim::{Reclaim, SPARE_NODES, Whereabouts};
use super::{AreaTree, Entry};
use crate::sync::{Arc, AtomicBool, AtomicUsize, Ordering, thread};
use crate::units::{Iova, IovaRange};

/// Changes of one kind in a loop; few under Miri, where each takes a thousand times longer.
const fn times(usual: u64) -> u64 {
    if cfg!(miri) { usual / 50 } else { usual }
}

fn range(start: u64, last: u64) -> IovaRange {
    IovaRange::new(Iova::new(start), Iova::new(last)).unwrap()
}

fn remove<T: Send + Sync + 'static, const F: usize>(tree: &AreaTree<T, F>, start: u64) {
    let Ok(removed) =
        tree.update(|edit| Ok::<_, Infallible>(edit.remove(Iova::new(start)).map(Entry::to_arc)));
    assert!(removed.is_some());
}

fn whereabouts<T: Send + Sync + 'static, const F: usize>(tree: &AreaTree<T, F>) -> Whereabouts {
    Reclaim::whereabouts(tree.reclaimer())
}

/// Reclaims until nothing waits. Snapshots of other tests may hold the epoch back for a while.
fn settle<T: Send + Sync + 'static, const F: usize>(tree: &AreaTree<T, F>) {
    for _ in 0..1_000_000 {
        let now = whereabouts(tree);
        if now.open == 0 && now.allocated == tree.snapshot().shape().1 + now.pooled {
            return;
        }
        tree.reclaim();
        thread::yield_now();
    }
    panic!("nodes are lost: {:?}", whereabouts(tree));
}

#[test]
fn every_node_is_in_the_tree_or_spare_and_none_is_left_behind() {
    let tree: AreaTree<u64, 4> = AreaTree::new();
    let allocated = tree.reclaimer().allocated();
    for round in 0..5 {
        for i in 0..times(300) {
            tree.insert(range(i * 10, i * 10 + 9), Arc::new(i)).unwrap();
        }
        // Attempts that fail put their nodes back.
        for i in 0..times(300) / 6 {
            assert!(tree.insert(range(i, 5000), Arc::new(i)).is_err());
            let refused = tree.update(|edit| {
                edit.remove(Iova::new(i * 10));
                Err::<(), _>("no")
            });
            assert!(refused.is_err());
        }
        settle(&tree);
        for i in 0..times(300) {
            remove(&tree, i * 10 % 3000);
        }
        assert_eq!(tree.snapshot().shape(), (0, 0), "round {round}");
        settle(&tree);
    }
    assert!(whereabouts(&tree).pooled > 0, "nodes are used again");
    tree.insert(range(0, 9), Arc::new(0)).unwrap();
    drop(tree);
    for _ in 0..1_000_000 {
        // Relaxed: a statistic.
        if allocated.load(Ordering::Relaxed) == 0 {
            return;
        }
        crossbeam_epoch::pin().flush();
        thread::yield_now();
    }
    panic!("{allocated:?} nodes are left");
}

#[test]
fn a_tree_that_changes_for_ever_stops_to_allocate() {
    let tree: AreaTree<u64, 4> = AreaTree::new();
    for i in 0..times(500) {
        tree.insert(range(i * 10, i * 10 + 9), Arc::new(i)).unwrap();
    }
    for i in 0..times(20_000) {
        let start = i * 7919 % times(500) * 10;
        remove(&tree, start);
        tree.insert(range(start, start + 9), Arc::new(i)).unwrap();
    }
    settle(&tree);
    // Takes the nodes that readers of other tests held back, and trims the pool to its bound.
    tree.reclaim();
    let (now, live) = (whereabouts(&tree), tree.snapshot().shape().1);
    assert!(
        now.allocated <= live + SPARE_NODES,
        "{now:?} for {live} live nodes"
    );
}

#[test]
fn a_snapshot_knows_its_age_and_all_comes_back_after_it() {
    let tree: AreaTree<u64, 4> = AreaTree::new();
    tree.insert(range(0, 9), Arc::new(1)).unwrap();
    let held = tree.snapshot();
    assert_eq!((held.version(), held.age()), (1, 0));
    for i in 1..=200 {
        tree.insert(range(i * 10, i * 10 + 9), Arc::new(i)).unwrap();
        assert_eq!(held.age(), i);
    }
    let Ok(()) = tree.update(|_| Ok::<_, Infallible>(()));
    assert_eq!(
        held.age(),
        200,
        "an update without changes publishes nothing"
    );
    assert_eq!((held.len(), tree.snapshot().version()), (1, 201));
    let (now, live) = (whereabouts(&tree), tree.snapshot().shape().1);
    assert!(
        now.allocated > live + now.pooled + now.open,
        "nodes wait for the snapshot"
    );
    drop(held);
    settle(&tree);
}

#[test]
fn readers_never_drop_areas() {
    /// Remembers on which thread it is dropped.
    #[derive(Debug)]
    struct Owned(Arc<AtomicUsize>);
    thread_local! {
        static READS: std::cell::Cell<bool> = const { std::cell::Cell::new(false) };
    }
    impl Drop for Owned {
        fn drop(&mut self) {
            // Relaxed: a statistic.
            if READS.get() {
                self.0.fetch_add(1, Ordering::Relaxed);
            }
        }
    }
    let dropped_by_readers = Arc::new(AtomicUsize::new(0));
    let tree: AreaTree<Owned, 4> = AreaTree::new();
    let new = || Arc::new(Owned(Arc::clone(&dropped_by_readers)));
    for i in 0..100 {
        tree.insert(range(i * 10, i * 10 + 9), new()).unwrap();
    }
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                READS.set(true);
                // Acquire: pairs with the Release below. Nothing is read on the strength of it.
                while !done.load(Ordering::Acquire) {
                    assert!(tree.snapshot().lookup(Iova::new(995)).is_some());
                }
            });
        }
        for i in 0..times(5_000) {
            let start = i * 17 % 99 * 10;
            remove(&tree, start);
            tree.insert(range(start, start + 9), new()).unwrap();
        }
        done.store(true, Ordering::Release);
    });
    assert_eq!(dropped_by_readers.load(Ordering::Relaxed), 0);
}

/// An update inside of another one finds no pool, because the outer one has it: its own goes onto
/// the stack of further pools, from which the next update takes it.
#[test]
fn the_pools_of_updates_inside_of_updates_come_back() {
    let tree: AreaTree<u64, 4> = AreaTree::new();
    let rounds = times(1_000);
    for i in 0..rounds {
        let mut first = true;
        tree.update(|edit| {
            if std::mem::take(&mut first) {
                tree.insert(range(i * 20, i * 20 + 9), Arc::new(i)).unwrap();
            }
            // The first run is lost to the update inside of it.
            edit.insert(range(i * 20 + 10, i * 20 + 19), Arc::new(i))
        })
        .unwrap();
        assert!(!first);
    }
    assert_eq!(tree.snapshot().len() as u64, 2 * rounds);
    settle(&tree);
    tree.internal_validate();
    let (now, live) = (whereabouts(&tree), tree.snapshot().shape().1);
    assert!(
        now.pooled > 0 && now.allocated == live + now.pooled,
        "{now:?}"
    );
}

#[test]
fn writers_that_compete_lose_nothing() {
    const WRITERS: u64 = 4;
    const EACH: u64 = times(1_500);
    let tree: AreaTree<u64, 4> = AreaTree::new();
    thread::scope(|scope| {
        for writer in 0..WRITERS {
            let tree = &tree;
            scope.spawn(move || {
                for i in 0..EACH {
                    // Neighbours, so that they meet in every node of the path.
                    let start = (i * WRITERS + writer) * 10;
                    tree.insert(range(start, start + 9), Arc::new(writer))
                        .unwrap();
                    if i % 3 == 0 {
                        remove(tree, start);
                    }
                }
            });
        }
    });
    tree.internal_validate();
    let snapshot = tree.snapshot();
    assert_eq!(snapshot.len() as u64, WRITERS * (EACH - EACH / 3));
    assert_eq!(snapshot.version(), WRITERS * (EACH + EACH / 3));
    for entry in snapshot.iter(IovaRange::ALL) {
        assert_eq!(*entry.area, entry.range.start().get() / 10 % WRITERS);
    }
    drop(snapshot);
    settle(&tree);
}
