//! All peers do the same work: the same marks give the same bits, the same maps the same lookups
//! and free places.

use dirtymap::AddressSpace;

use crate::peers::{
    Asymmetric, Fenced, Flat, HiBitSet, LockedBTree, LockedRoaring, Tested, ThroughHandle,
    ThroughSpace, TwoLevels, VmMemory, VmMemoryModel,
};
use crate::workloads::{Dirty, PAGES, Random, WORDS, addresses, areas, distinct};
use crate::{Areas, PAGE, Peer, Tracker, compare};

/// The locked tree with the lock of std.
type Locked = LockedBTree;

fn peers(pages: u64) -> [Box<dyn Tracker>; 11] {
    [
        Box::new(ThroughHandle::new(pages)),
        Box::new(Asymmetric::new(pages)),
        Box::new(ThroughSpace::new(pages)),
        Box::new(VmMemory::new(pages)),
        Box::new(VmMemoryModel::new(pages)),
        Box::new(<Flat>::new(pages)),
        Box::new(Flat::<Tested>::new(pages)),
        Box::new(Flat::<Fenced>::new(pages)),
        Box::new(TwoLevels::new(pages)),
        Box::new(LockedRoaring::new(pages)),
        Box::new(HiBitSet::new(pages)),
    ]
}

#[test]
fn the_same_marks_give_the_same_bits() {
    let pages = 70_000;
    let mut peers = peers(pages);
    let mut random = Random::fixed();
    for round in 0..20 {
        let mut expected = vec![0u64; pages.div_ceil(64) as usize];
        // Bits that were set before a harvest stay.
        expected[round] = 1 << round;
        let before = expected.clone();
        for step in 0..200 {
            // Random bytes: pages, parts of pages, and now and then a run over many words.
            let start = random.below(pages * PAGE);
            let longest = if step % 20 == 0 { 300 * PAGE } else { 2 * PAGE };
            let len = 1 + random.below(longest.min(pages * PAGE - start));
            for page in start / PAGE..=(start + len - 1) / PAGE {
                expected[page as usize / 64] |= 1 << (page % 64);
            }
            peers.iter().for_each(|peer| peer.mark(start, len));
        }
        for peer in &mut peers {
            let mut bitmap = before.clone();
            peer.harvest_alone(&mut bitmap);
            assert!(bitmap == expected, "{} in round {round}", peer.name());
        }
    }
    for peer in &mut peers {
        let mut bitmap = vec![0; pages.div_ceil(64) as usize];
        peer.harvest_alone(&mut bitmap);
        assert!(
            bitmap.iter().all(|word| *word == 0),
            "{} clears what it reports",
            peer.name()
        );
    }
}

#[test]
fn the_workloads_of_the_benches_give_the_same_bits() {
    fn harvest<P: Peer>(dirty: &Dirty) -> Vec<u64> {
        let peer = P::new(PAGES);
        dirty.mark(&peer);
        let mut bitmap = vec![0; WORDS];
        peer.harvest(&mut bitmap);
        bitmap
    }
    for every in [10_000, 100, 1] {
        let dirty = Dirty::one_in(every);
        let flat = harvest::<Flat>(&dirty);
        let ones: u64 = flat.iter().map(|word| u64::from(word.count_ones())).sum();
        assert_eq!(ones, PAGES / every);
        assert!(
            harvest::<ThroughHandle>(&dirty) == flat,
            "handle, one in {every}"
        );
        assert!(
            harvest::<ThroughSpace>(&dirty) == flat,
            "space, one in {every}"
        );
        assert!(
            harvest::<VmMemory>(&dirty) == flat,
            "vm-memory, one in {every}"
        );
    }
}

#[test]
fn the_same_areas_leave_the_same_places() {
    let areas = areas(2_000);
    let (ours, theirs) = (<AddressSpace as Areas>::new(), Locked::new());
    for area in &areas {
        Areas::map(&ours, *area);
        theirs.map(*area);
    }
    let mut random = Random::fixed();
    let mut places = Vec::new();
    for _ in 0..500 {
        let len = PAGE << random.below(6);
        let place = Areas::map_anywhere(&ours, len).unwrap();
        assert_eq!(Some(place), theirs.map_anywhere(len));
        places.push(place);
        if random.below(3) == 0 {
            let place = places.swap_remove(random.below(places.len() as u64) as usize);
            Areas::unmap(&ours, place);
            theirs.unmap(place);
        }
    }
}

#[test]
fn the_same_maps_give_the_same_answers() {
    let areas = areas(2_000);
    let peers = compare::areas::peers();
    let (reference, others) = peers.split_first().unwrap();
    let mut random = Random::fixed();
    let highest = areas[areas.len() - 1].range.last().get() + 16 * PAGE;
    for peer in &peers {
        areas.iter().for_each(|area| peer.map(*area));
        // Areas are removed and inserted again, and some of them are removed for good.
        peer.remap_all(&areas[500..700]);
        peer.remap_batch(&areas[300..900]);
        areas[1_000..]
            .iter()
            .step_by(7)
            .for_each(|area| peer.unmap(area.range));
    }
    let somewhere: Vec<u64> = (0..10_000).map(|_| random.below(highest)).collect();
    let hits = addresses(&areas[..1_000], 10_000);
    assert_eq!(reference.look_up_all(&hits), hits.len());
    assert!(
        reference.look_up_all(&somewhere) < 9_000,
        "holes are asked for too"
    );
    for peer in others {
        for iova in hits.iter().chain(&somewhere) {
            assert_eq!(
                peer.lookup(*iova),
                reference.lookup(*iova),
                "{}",
                peer.name()
            );
        }
        assert_eq!(peer.scan(), reference.scan(), "{}", peer.name());
        let Some(place) = peer.first_fit(PAGE) else {
            assert_eq!(peer.name(), "dirtymap-space");
            continue;
        };
        assert_eq!(Some(place), reference.first_fit(PAGE), "{}", peer.name());
        for len_lg2 in 1..6 {
            let len = PAGE << len_lg2;
            assert_eq!(
                peer.first_fit(len),
                reference.first_fit(len),
                "{}",
                peer.name()
            );
        }
    }
}

#[test]
fn distinct_numbers_are_distinct() {
    let mut numbers = distinct(1 << 15, 1 << 15);
    numbers.sort_unstable();
    assert!(numbers.into_iter().eq(0..1 << 15));
}
