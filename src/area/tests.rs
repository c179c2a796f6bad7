//! Single-threaded properties against a `BTreeMap`, drop counting, and stress with threads.

use std::collections::BTreeMap;
use std::convert::Infallible;

use super::edit::Edit;
use super::node::{Node, NodeSlot};
use super::reclaim::Pinned;
use super::{AreaTree, Entry};
use crate::error::Error;
use crate::sync::{Arc, AtomicBool, AtomicUsize, Ordering, thread};
use crate::units::{Granule, Iova, IovaRange};

/// Changes of one kind in a loop; few under Miri, which runs each a thousand times slower.
const fn times(usual: u64) -> u64 {
    if cfg!(miri) { usual / 100 } else { usual }
}

fn range(start: u64, last: u64) -> IovaRange {
    IovaRange::new(Iova::new(start), Iova::new(last)).unwrap()
}

/// xorshift64*, so that a failure repeats.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) % bound
    }

    /// An address in `SPAN`, the lower half of which lies at 0 and the upper half at `u64::MAX`.
    fn address(&mut self) -> u64 {
        spread(self.below(SPAN))
    }

    fn range(&mut self) -> IovaRange {
        let first = self.below(SPAN);
        let last = (first + self.below(24)).min(SPAN - 1);
        range(spread(first), spread(last))
    }

    /// The parameters of a search: bounds, a length and an alignment.
    fn fit(&mut self) -> (IovaRange, u64, Granule) {
        let (a, b) = (self.address(), self.address());
        let within = match self.below(3) {
            0 => IovaRange::ALL,
            _ => range(a.min(b), a.max(b)),
        };
        let len = match self.below(20) {
            0 => u64::MAX - self.below(SPAN),
            1 => self.below(SPAN) + 1,
            _ => self.below(40) + 1,
        };
        let alignment = Granule::from_lg2(self.below(6) as u8).unwrap();
        (within, len, alignment)
    }
}

const SPAN: u64 = 4096;

fn spread(x: u64) -> u64 {
    if x < SPAN / 2 {
        x
    } else {
        u64::MAX - (SPAN - 1 - x)
    }
}

/// Counts its drops.
#[derive(Debug)]
struct Counted {
    id: u64,
    drops: Arc<AtomicUsize>,
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.drops.fetch_add(1, Ordering::Relaxed);
    }
}

/// Makes areas and counts them.
#[derive(Default)]
struct Maker {
    made: u64,
    drops: Arc<AtomicUsize>,
}

impl Maker {
    fn area(&mut self) -> Arc<Counted> {
        self.made += 1;
        Arc::new(Counted {
            id: self.made,
            drops: Arc::clone(&self.drops),
        })
    }

    /// Advances the epoch until `expected` areas were dropped. Other tests may hold it back for a
    /// while.
    fn wait_for_drops<const F: usize>(&self, tree: Option<&AreaTree<Counted, F>>, expected: u64) {
        for _ in 0..1_000_000 {
            if self.drops.load(Ordering::Relaxed) as u64 >= expected {
                break;
            }
            match tree {
                Some(tree) => tree.reclaim(),
                None => Pinned::new().flush(),
            }
            thread::yield_now();
        }
        assert_eq!(self.drops.load(Ordering::Relaxed) as u64, expected);
    }
}

/// The simple version: a map from start to (last, id).
type Model = BTreeMap<u64, (u64, u64)>;

fn intersecting(model: &Model, asked: IovaRange) -> Vec<(u64, u64, u64)> {
    model
        .iter()
        .filter(|&(&start, &(last, _))| range(start, last).intersects(asked))
        .map(|(&start, &(last, id))| (start, last, id))
        .collect()
}

fn insert<const F: usize>(
    edit: &mut Edit<'_, Counted, F>,
    model: &mut Model,
    asked: IovaRange,
    area: &Arc<Counted>,
) {
    match (
        edit.insert(asked, Arc::clone(area)),
        intersecting(model, asked).first(),
    ) {
        (Ok(()), None) => {
            model.insert(asked.start().get(), (asked.last().get(), area.id));
        }
        (
            Err(Error::Overlap {
                range: refused,
                existing,
            }),
            Some(&(start, last, _)),
        ) => {
            assert_eq!((refused, existing), (asked, range(start, last)));
        }
        (got, want) => panic!("{asked}: {got:?}, but the model has {want:?}"),
    }
}

fn remove<const F: usize>(edit: &mut Edit<'_, Counted, F>, model: &mut Model, start: u64) {
    let got = edit.remove(Iova::new(start)).map(|entry| entry.area.id);
    assert_eq!(got, model.remove(&start).map(|(_, id)| id));
}

/// The start of a mapped area, most of the time.
fn some_start(random: &mut Random, model: &Model) -> u64 {
    let from = random.address();
    match model.range(from..).next() {
        Some((&start, _)) if random.below(8) != 0 => start,
        _ => from,
    }
}

fn assert_same<const F: usize>(tree: &AreaTree<Counted, F>, model: &Model, random: &mut Random) {
    tree.internal_validate();
    let snapshot = tree.snapshot();
    assert_eq!(snapshot.len(), model.len());
    let asked = random.range();
    for asked in [IovaRange::ALL, asked] {
        let got: Vec<_> = snapshot
            .iter(asked)
            .map(|e| (e.range.start().get(), e.range.last().get(), e.area.id))
            .collect();
        assert_eq!(got, intersecting(model, asked));
        let first = snapshot.first_intersecting(asked);
        assert_eq!(first.map(|e| e.area.id), got.first().map(|&(_, _, id)| id));
    }

    for at in [0, u64::MAX, random.address(), random.address()] {
        let want = intersecting(model, range(at, at))
            .first()
            .map(|&(_, _, id)| id);
        assert_eq!(snapshot.lookup(Iova::new(at)).map(|e| e.area.id), want);
    }

    let mut uncovered = Some(asked.start().get());
    for found in snapshot.contiguous(asked) {
        let at = uncovered.expect("nothing comes after the end");
        match found {
            Ok(entry) => {
                assert!(entry.range.contains(Iova::new(at)));
                assert_eq!(model[&entry.range.start().get()].1, entry.area.id);
                let more = entry.range.last() < asked.last();
                uncovered = more.then(|| entry.range.last().get() + 1);
            }
            Err(hole) => {
                assert_eq!(hole.get(), at);
                assert!(intersecting(model, range(at, at)).is_empty());
                return;
            }
        }
    }
    assert_eq!(uncovered, None, "ended without covering {asked}");
}

/// The simple first fit: every hole from the floor on, in 128 bits so that nothing can wrap.
fn model_first_fit(model: &Model, within: IovaRange, len: u64, alignment: Granule) -> Option<u64> {
    const TOP: u128 = 1 << 64;
    let mut floor = u128::from(within.start().get());
    let end = u128::from(within.last().get()) + 1;
    let areas = model
        .iter()
        .map(|(&start, &(last, _))| (u128::from(start), u128::from(last)));
    for (start, last) in areas.chain([(TOP, TOP)]) {
        let at = floor.next_multiple_of(u128::from(alignment.bytes()));
        if at + u128::from(len) <= start.min(end) {
            return Some(at as u64);
        }
        floor = floor.max(last + 1);
    }
    None
}

/// Random batches, some of which end in an error, that grow the tree and shrink it again.
fn agrees_with_a_btree_map<const F: usize>(seed: u64, rounds: u64) {
    let mut random = Random(seed);
    let mut maker = Maker::default();
    let mut model = Model::new();
    let tree: AreaTree<Counted, F> = AreaTree::new();
    for round in 0..rounds {
        let mut edited = model.clone();
        let fails = random.below(8) == 0;
        let size = if random.below(10) == 0 {
            random.below(100)
        } else {
            random.below(4)
        };
        let growing = round / 200 % 2 == 0;
        let result = tree.update(|edit| {
            for _ in 0..size {
                if (random.below(10) < 7) == growing {
                    insert(edit, &mut edited, random.range(), &maker.area());
                } else {
                    let start = some_start(&mut random, &edited);
                    remove(edit, &mut edited, start);
                }
                assert_eq!(edit.len(), edited.len());
                let (within, len, alignment) = random.fit();
                assert_eq!(
                    edit.first_fit(within, len, alignment)
                        .map(|found| found.start().get()),
                    model_first_fit(&edited, within, len, alignment),
                    "{len} bytes at {alignment} in {within}"
                );
            }
            let seen: Vec<_> = edit.iter(IovaRange::ALL).map(|e| e.area.id).collect();
            assert_eq!(seen, edited.values().map(|&(_, id)| id).collect::<Vec<_>>());
            if fails { Err("refused") } else { Ok(()) }
        });
        assert_eq!(result, if fails { Err("refused") } else { Ok(()) });
        if !fails {
            model = edited;
        }
        assert_same(&tree, &model, &mut random);
    }
    // Down to nothing, one at a time.
    while let Some((&start, _)) = model.range(some_start(&mut random, &model)..).next() {
        let removed = tree
            .update(|edit| Ok::<_, Infallible>(edit.remove(Iova::new(start)).map(Entry::to_arc)));
        let Ok(removed) = removed;
        assert_eq!(
            removed.map(|area| area.id),
            model.remove(&start).map(|(_, id)| id)
        );
        tree.internal_validate();
    }
    drop(tree);
    maker.wait_for_drops::<4>(None, maker.made);
}

/// A batch changes a node for the second time and leaves its longest hole uncounted until the batch
/// is published. Were it left so, the slot would promise a hole of 2^64 bytes for ever, and first
/// fit would search below it in vain each time. Inserts split such nodes, and removals merge them.
#[test]
fn holes_that_a_batch_leaves_uncounted_are_counted_at_its_end() {
    const AREAS: u64 = 64;
    let tree: AreaTree<u64, 4> = AreaTree::new();
    let at = |nth: u64| range(nth * 10, nth * 10 + 5);
    for nth in 0..AREAS {
        tree.insert(at(nth), Arc::new(nth)).unwrap();
    }
    // Each area of some neighbours goes and comes again, so that the hole at its place closes.
    let again = |edit: &mut Edit<'_, u64, 4>, nth: u64| {
        edit.remove(at(nth).start()).unwrap();
        edit.insert(at(nth), Arc::new(nth))
    };
    for first in 0..AREAS - 8 {
        tree.update(|edit| (first..first + 8).try_for_each(|nth| again(edit, nth)))
            .unwrap();
        tree.internal_validate();
    }
    // All go but a few, and come again as areas of one address each and a longer one.
    tree.update(|edit| {
        (0..AREAS).try_for_each(|nth| again(edit, nth))?;
        for nth in (0..AREAS).filter(|nth| nth % 16 != 0) {
            edit.remove(at(nth).start()).unwrap();
        }
        (0..AREAS).filter(|nth| nth % 16 != 0).try_for_each(|nth| {
            let start = nth * 10;
            (0..3).try_for_each(|n| edit.insert(range(start + n, start + n), Arc::new(n)))?;
            edit.insert(range(start + 3, start + 8), Arc::new(nth))
        })
    })
    .unwrap();
    tree.internal_validate();
    let room = |len| {
        let within = range(0, AREAS * 10);
        tree.snapshot()
            .first_fit(within, len, Granule::from_lg2(0).unwrap())
    };
    assert_eq!(room(4), Some(range(6, 9)));
    assert_eq!(room(5), None);
}

/// All searches of a node find the same slot, at every number of slots and for every address. If
/// the search of an edit counted a slot too few, an insert would put an area in the wrong order.
fn searches_agree<const F: usize>() {
    let mut node = Node::<(), F>::empty(0, 1);
    for len in 0..=F {
        for x in 0..3 * F as u64 + 2 {
            let found = node.find(x);
            assert_eq!(node.find_alone(x), found, "{x} among {len} of {F} slots");
            for at in 0..=F {
                let first = at == found && at < len;
                assert_eq!(node.is_first(at, x), first, "{x} in slot {at} of {len}");
            }
        }
        if len < F {
            let slot = NodeSlot {
                start: 3 * len as u64,
                last: 3 * len as u64 + 1,
                hole: 0,
                pointer: std::ptr::null(),
            };
            node.insert(len, slot);
        }
    }
}

#[test]
fn all_searches_of_a_node_find_the_same_slot() {
    searches_agree::<4>();
    searches_agree::<5>();
    searches_agree::<6>();
    searches_agree::<7>();
    searches_agree::<8>();
    searches_agree::<16>();
}

/// An insert asks first for the way of the change before, which may have led through other nodes:
/// those of a refused edit, of a tree that was higher, or of another place. It is only a guess.
#[test]
fn the_way_of_the_change_before_is_only_a_guess() {
    let tree = AreaTree::<u64, 4>::new();
    let insert = |at: u64| tree.insert(range(8 * at, 8 * at + 3), Arc::new(at));
    let remove = |at: u64| {
        tree.update(|edit| Ok::<_, Infallible>(edit.remove(Iova::new(8 * at)).map(|_| ())))
    };
    for at in 0..200 {
        insert(at).unwrap();
    }
    // A way in the highest tree, by an edit that is refused.
    let refused = tree.update(|edit| {
        edit.remove(Iova::new(8 * 150));
        edit.insert(range(8 * 150, 8 * 150), Arc::new(150)).unwrap();
        Err::<(), _>(())
    });
    assert_eq!(refused, Err(()));
    assert!(insert(150).is_err());
    // Lower and lower, and each insert next to the removal before or far from it.
    for at in (1..200).rev() {
        assert_eq!(remove(at), Ok(Some(())));
        insert(1000 - at).unwrap();
        tree.internal_validate();
        assert_eq!(remove(1000 - at), Ok(Some(())));
        insert(at).unwrap();
        assert!(insert(at).is_err());
        assert_eq!(remove(at), Ok(Some(())));
        tree.internal_validate();
    }
    assert_eq!(tree.snapshot().len(), 1);
}

#[test]
fn narrow_nodes_agree_with_a_btree_map() {
    for seed in 1..=if cfg!(miri) { 1 } else { 4 } {
        agrees_with_a_btree_map::<4>(seed, times(1000));
    }
}

#[test]
fn wide_nodes_agree_with_a_btree_map() {
    for seed in 5..=if cfg!(miri) { 5 } else { 8 } {
        agrees_with_a_btree_map::<16>(seed, times(1000));
    }
}

#[test]
fn the_whole_address_space_is_one_area() {
    let tree: AreaTree<u32, 4> = AreaTree::new();
    assert!(tree.snapshot().lookup(Iova::MIN).is_none());
    assert_eq!(
        tree.snapshot()
            .contiguous(IovaRange::ALL)
            .map(Result::err)
            .collect::<Vec<_>>(),
        [Some(Iova::MIN)]
    );
    tree.insert(IovaRange::ALL, Arc::new(7)).unwrap();
    let snapshot = tree.snapshot();
    assert_eq!(*snapshot.lookup(Iova::MAX).unwrap().area, 7);
    assert_eq!(
        snapshot
            .contiguous(IovaRange::ALL)
            .filter(Result::is_ok)
            .count(),
        1
    );
    let (error, area) = tree.insert(range(5, 5), Arc::new(8)).unwrap_err();
    assert!(matches!(
        error,
        Error::Overlap { existing, .. } if existing == IovaRange::ALL
    ));
    assert_eq!(*area, 8, "a refused argument is handed back");
}

#[test]
fn ascending_and_descending_inserts_fill_nodes() {
    // Each insert validates the whole tree: too much for Miri.
    const AREAS: u64 = if cfg!(miri) { 40 } else { 500 };
    for descending in [false, true] {
        let tree: AreaTree<u64, 4> = AreaTree::new();
        for i in 0..AREAS {
            let at = if descending { AREAS - 1 - i } else { i };
            tree.insert(range(at * 10, at * 10 + 9), Arc::new(at))
                .unwrap();
            tree.internal_validate();
        }
        let snapshot = tree.snapshot();
        let covered = snapshot.contiguous(range(5, AREAS * 10 - 5));
        let areas: Vec<u64> = covered.map(|found| *found.unwrap().area).collect();
        assert_eq!(areas, (0..AREAS).collect::<Vec<_>>());
    }
}

#[test]
fn ascending_inserts_leave_full_nodes() {
    let tree: AreaTree<u64, 4> = AreaTree::new();
    for i in 0..256 {
        tree.insert(range(i * 10, i * 10 + 9), Arc::new(i)).unwrap();
    }
    // 4^4 areas fill four levels, with exactly 64 leaves.
    assert_eq!(tree.snapshot().shape(), (4, 64 + 16 + 4 + 1));
    // One more area takes one node on each level, and a root above.
    tree.insert(range(5000, 5000), Arc::new(0)).unwrap();
    tree.internal_validate();
    assert_eq!(tree.snapshot().shape(), (5, 64 + 16 + 4 + 1 + 4 + 1));
    // Removing it restores the old shape.
    let Ok(removed) =
        tree.update(|edit| Ok::<_, Infallible>(edit.remove(Iova::new(5000)).map(Entry::to_arc)));
    assert!(removed.is_some());
    tree.internal_validate();
    assert_eq!(tree.snapshot().shape(), (4, 64 + 16 + 4 + 1));
}

#[test]
fn first_fit_at_both_ends_of_the_address_space() {
    let at = |tree: &AreaTree<u64, 4>, within, len, lg2| {
        let alignment = Granule::from_lg2(lg2).unwrap();
        let Ok(found) =
            tree.update(|edit| Ok::<_, Infallible>(edit.first_fit(within, len, alignment)));
        found
    };
    let tree: AreaTree<u64, 4> = AreaTree::new();
    assert_eq!(at(&tree, IovaRange::ALL, 1, 63), Some(range(0, 0)));
    assert_eq!(
        at(&tree, range(1, u64::MAX), 1 << 63, 63),
        Some(range(1 << 63, u64::MAX))
    );
    assert_eq!(
        at(&tree, range(1, u64::MAX), u64::MAX, 0),
        Some(range(1, u64::MAX))
    );
    assert_eq!(at(&tree, range(2, u64::MAX), u64::MAX, 0), None);
    // Rounding up must not wrap to 0.
    assert_eq!(at(&tree, range(u64::MAX - 2, u64::MAX), 1, 12), None);
    assert_eq!(at(&tree, range((1 << 63) + 1, u64::MAX), 1, 63), None);
    // Nor must the step to the address above an area that ends at the top.
    tree.insert(range(u64::MAX, u64::MAX), Arc::new(0)).unwrap();
    assert_eq!(at(&tree, range(u64::MAX, u64::MAX), 1, 0), None);
    assert_eq!(
        at(&tree, IovaRange::ALL, u64::MAX, 0),
        Some(range(0, u64::MAX - 1))
    );
    tree.insert(range(0, 0), Arc::new(0)).unwrap();
    assert_eq!(
        at(&tree, IovaRange::ALL, u64::MAX - 1, 0),
        Some(range(1, u64::MAX - 1))
    );
    assert_eq!(at(&tree, IovaRange::ALL, u64::MAX, 0), None);
    tree.insert(range(1, u64::MAX - 1), Arc::new(0)).unwrap();
    assert_eq!(at(&tree, IovaRange::ALL, 1, 0), None);
}

#[test]
fn racing_allocations_never_share_an_address() {
    const EACH: u64 = times(2000);
    let tree: AreaTree<u64, 4> = AreaTree::new();
    thread::scope(|scope| {
        for len in [3, 5] {
            let tree = &tree;
            scope.spawn(move || {
                for _ in 0..EACH {
                    let area = Arc::new(len);
                    tree.update(|edit| {
                        let within = range(7, u64::MAX);
                        let found = edit.first_fit(within, len, Granule::from_lg2(2).unwrap());
                        edit.insert(found.unwrap(), Arc::clone(&area))
                    })
                    .unwrap();
                }
            });
        }
    });
    tree.internal_validate();
    let snapshot = tree.snapshot();
    assert_eq!(snapshot.len() as u64, 2 * EACH);
    // First fit leaves no room of 4 bytes between them.
    let last = snapshot.iter(IovaRange::ALL).last().unwrap().range.last();
    assert!(last.get() < 8 + EACH * (4 + 8));
}

#[test]
fn rules_change_with_areas_or_not_at_all() {
    let tree: AreaTree<u64, 4, Vec<u64>> = AreaTree::new();
    let before = tree.snapshot();
    tree.update(|edit| {
        edit.set_rules(vec![1, 2]);
        assert_eq!(edit.rules(), &[1, 2]);
        edit.insert(range(0, 9), Arc::new(7))
    })
    .unwrap();
    let refused = tree.update(|edit| {
        edit.set_rules(vec![3]);
        edit.insert(range(9, 9), Arc::new(8))
    });
    assert!(refused.is_err());
    assert_eq!((before.rules().len(), before.len()), (0, 0));
    let after = tree.snapshot();
    assert_eq!((after.rules().as_slice(), after.len()), (&[1, 2][..], 1));
    // Without areas there are still rules.
    let Ok(()) = tree.update(|edit| {
        edit.remove(Iova::new(0));
        edit.set_rules(vec![4]);
        Ok::<_, Infallible>(())
    });
    assert_eq!(
        (tree.snapshot().rules().as_slice(), tree.snapshot().len()),
        (&[4][..], 0)
    );
}

#[test]
fn a_refused_batch_leaves_nothing() {
    let mut maker = Maker::default();
    let tree: AreaTree<Counted, 4> = AreaTree::new();
    tree.insert(range(50, 59), maker.area()).unwrap();
    let refused = tree.update(|edit| {
        for i in 0..5 {
            edit.insert(range(i * 10, i * 10 + 9), maker.area())?;
        }
        assert_eq!(
            edit.remove(Iova::new(50)).map(|entry| entry.area.id),
            Some(1)
        );
        assert_eq!(
            edit.remove(Iova::new(10)).map(|entry| entry.area.id),
            Some(3)
        );
        assert!(edit.remove(Iova::new(11)).is_none());
        edit.insert(range(25, 60), maker.area())
    });
    assert!(matches!(refused, Err(Error::Overlap { existing, .. }) if existing == range(20, 29)));
    // Nothing of the batch was ever shared, so it is dropped without a grace period.
    assert_eq!(maker.drops.load(Ordering::Relaxed), 6);
    assert_eq!(
        tree.snapshot()
            .iter(IovaRange::ALL)
            .map(|e| e.area.id)
            .collect::<Vec<_>>(),
        [1]
    );

    let panics = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        tree.update(|edit| -> Result<(), Error> {
            edit.remove(Iova::new(50));
            edit.insert(range(0, 0), maker.area())?;
            panic!("in the middle of a batch")
        })
    }));
    assert!(panics.is_err());
    assert_eq!(maker.drops.load(Ordering::Relaxed), 7);
    assert_eq!(
        tree.snapshot()
            .iter(IovaRange::ALL)
            .map(|e| e.area.id)
            .collect::<Vec<_>>(),
        [1]
    );
    drop(tree);
    assert_eq!(maker.drops.load(Ordering::Relaxed), 8);
}

#[test]
fn a_snapshot_keeps_what_is_removed() {
    let mut maker = Maker::default();
    let tree: AreaTree<Counted, 4> = AreaTree::new();
    for i in 0..20 {
        tree.insert(range(i * 10, i * 10 + 9), maker.area())
            .unwrap();
    }
    let snapshot = tree.snapshot();
    let kept = snapshot.lookup(Iova::new(35)).unwrap().to_arc();
    let Ok(()) = tree.update(|edit| {
        for i in 0..20 {
            edit.remove(Iova::new(i * 10)).unwrap();
        }
        Ok::<_, Infallible>(())
    });
    assert_eq!((snapshot.age(), tree.snapshot().age()), (1, 0));
    for _ in 0..10 {
        tree.reclaim();
    }
    assert_eq!(tree.snapshot().len(), 0);
    assert_eq!(
        maker.drops.load(Ordering::Relaxed),
        0,
        "the snapshot still reaches them"
    );
    assert_eq!(
        snapshot
            .iter(IovaRange::ALL)
            .map(|e| e.area.id)
            .sum::<u64>(),
        210
    );
    drop(snapshot);
    maker.wait_for_drops(Some(&tree), 19);
    drop(tree);
    assert_eq!((kept.id, maker.drops.load(Ordering::Relaxed)), (4, 19));
    drop(kept);
    assert_eq!(maker.drops.load(Ordering::Relaxed), 20);
}

#[test]
fn one_area_at_several_ranges_is_dropped_once() {
    let mut maker = Maker::default();
    let tree: AreaTree<Counted, 4> = AreaTree::new();
    let area = maker.area();
    for i in 0..9 {
        tree.insert(range(i, i), Arc::clone(&area)).unwrap();
    }
    drop(area);
    for i in 0..9 {
        assert_eq!(maker.drops.load(Ordering::Relaxed), 0);
        let Ok(removed) =
            tree.update(|edit| Ok::<_, Infallible>(edit.remove(Iova::new(i)).map(Entry::to_arc)));
        assert!(removed.is_some());
    }
    maker.wait_for_drops(Some(&tree), 1);
    // Inserted and removed again within one batch: an empty tree stays empty.
    let Ok(()) = tree.update(|edit| {
        edit.insert(range(1, 2), maker.area()).unwrap();
        assert!(edit.remove(Iova::new(1)).is_some());
        Ok::<_, Infallible>(())
    });
    maker.wait_for_drops(Some(&tree), 2);
}

#[test]
fn of_two_overlapping_inserts_one_wins() {
    const RANGES: u64 = 2000;
    let mut maker = Maker::default();
    let tree: AreaTree<Counted, 4> = AreaTree::new();
    // The second writer's ranges straddle the borders of the first one's.
    let areas: Vec<Vec<_>> = (0..2)
        .map(|_| (0..RANGES).map(|_| maker.area()).collect())
        .collect();
    let won: Vec<usize> = thread::scope(|scope| {
        let writers: Vec<_> = areas
            .into_iter()
            .zip([0, 5])
            .map(|(areas, offset)| {
                let tree = &tree;
                scope.spawn(move || {
                    let mut won = 0;
                    for (i, area) in (0..).zip(areas) {
                        let at = i * 10 + offset;
                        match tree.insert(range(at, at + 9), area) {
                            Ok(()) => won += 1,
                            Err((Error::Overlap { range, existing }, _)) => {
                                assert!(range.intersects(existing));
                            }
                            Err((other, _)) => panic!("{other}"),
                        }
                    }
                    won
                })
            })
            .collect();
        writers.into_iter().map(|w| w.join().unwrap()).collect()
    });
    tree.internal_validate();
    let snapshot = tree.snapshot();
    assert_eq!(snapshot.len(), won.iter().sum::<usize>());
    // Each refused range overlaps an inserted one, so no hole is as long as a range and a half.
    let mut end = 0;
    for entry in snapshot.iter(IovaRange::ALL) {
        assert!(entry.range.start().get() < end + 15);
        end = entry.range.last().get() + 1;
    }
    drop(snapshot);
    drop(tree);
    maker.wait_for_drops::<4>(None, 2 * RANGES);
}

#[test]
fn a_reader_sees_all_of_a_batch_or_nothing() {
    /// Areas that one batch moves between two places.
    const SET: u64 = 24;
    const MOVES: u64 = times(3000);
    let mut maker = Maker::default();
    let tree: AreaTree<Counted, 4> = AreaTree::new();
    for i in 0..SET {
        tree.insert(range(i * 16, i * 16 + 7), maker.area())
            .unwrap();
    }
    let noise: Vec<_> = (0..MOVES).map(|_| maker.area()).collect();
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let mover = scope.spawn(|| {
            for step in 0..MOVES {
                let (from, to) = (step % 2 * 0x1_0000, (step + 1) % 2 * 0x1_0000);
                tree.update(|edit| {
                    for i in 0..SET {
                        let area = edit.remove(Iova::new(from + i * 16)).unwrap().to_arc();
                        edit.insert(range(to + i * 16, to + i * 16 + 7), area)?;
                    }
                    Ok::<_, Error>(())
                })
                .unwrap();
            }
        });
        // Inserts and removes between the moved areas, so that the paths collide.
        let other = scope.spawn(|| {
            for (i, area) in (0..).zip(noise) {
                let at = (i % SET) * 16 + 8;
                tree.insert(range(at, at + 7), area).unwrap();
                let Ok(removed) = tree.update(|edit| {
                    Ok::<_, Infallible>(edit.remove(Iova::new(at)).map(Entry::to_arc))
                });
                assert!(removed.is_some());
            }
        });
        let reader = scope.spawn(|| {
            let mut places = [false; 2];
            while !done.load(Ordering::Acquire) {
                let snapshot = tree.snapshot();
                snapshot.internal_validate();
                let moved: Vec<_> = snapshot
                    .iter(IovaRange::ALL)
                    .filter(|e| e.area.id <= SET)
                    .map(|e| (e.area.id, e.range.start().get()))
                    .collect();
                let base = moved[0].1;
                let whole: Vec<_> = (0..SET).map(|i| (i + 1, base + i * 16)).collect();
                assert_eq!(moved, whole);
                places[usize::from(base != 0)] = true;
            }
            places
        });
        mover.join().unwrap();
        other.join().unwrap();
        done.store(true, Ordering::Release);
        assert!(reader.join().unwrap().contains(&true));
    });
    assert_eq!(tree.snapshot().len() as u64, SET);
    drop(tree);
    maker.wait_for_drops::<4>(None, maker.made);
}
