//! Areas that were cut often: the cost for marks, memory and the stack, and handles that outlive
//! their areas.
#![cfg(not(dirtymap_loom))]
#![allow(clippy::unwrap_used)] // helpers of tests

mod common;

use common::{Fake, PAGE, pages, two_sources};
use dirtymap::{
    Access, AddressSpace, Error, Granule, HarvestRequest, Iova, IovaRange, Scope, UserBitmap,
};
use std::sync::{Arc, mpsc};

const RW: Access = Access::ReadWrite;
const CUTS: u64 = 100_000;

fn at(page: u64) -> Iova {
    Iova::new(page * PAGE)
}

fn untracked() -> AddressSpace {
    AddressSpace::new(Granule::K4)
}

fn mapped(space: &AddressSpace) -> Vec<IovaRange> {
    space.mappings().iter().map(|m| m.range).collect()
}

fn take(space: &AddressSpace, range: IovaRange) -> u64 {
    let mut words = [0u64];
    let request = HarvestRequest::new(range, Granule::K4);
    let lease = space.harvest(&request, UserBitmap::new(&mut words));
    lease.unwrap().sync().unwrap().commit();
    words[0]
}

/// Runs `test` on a stack of 256 KiB, which a recursion as deep as the number of cuts overflows.
fn on_a_small_stack(test: impl FnOnce() + Send + 'static) {
    let small = std::thread::Builder::new().stack_size(256 << 10);
    small.spawn(test).unwrap().join().unwrap();
}

/// The slots of a guest's memory were split again and again, while a device kept the handle that it
/// got at boot. Each mark recursed through all cuts and overflowed the stack, and so did the drop
/// of the chain of areas.
#[test]
fn a_handle_survives_a_hundred_thousand_cuts() {
    on_a_small_stack(|| {
        let space = untracked();
        space.map(pages(0, CUTS + 1), 0, RW).unwrap();
        space.start_tracking().unwrap();
        let handle = space.area(at(0)).unwrap();
        for n in 1..=CUTS {
            assert!(space.cut(at(n)).unwrap());
        }
        for n in [0, CUTS / 2, CUTS] {
            handle.mark(pages(n, 1)).unwrap();
        }
        assert_eq!(take(&space, pages(CUTS - 1, 2)), 0b10);
        assert_eq!(take(&space, pages(CUTS / 2, 2)), 0b01);
        space.unmap_discarding(pages(CUTS / 2, 1)).unwrap();
        let across = handle.mark(pages(CUTS / 2 - 1, 3)).unwrap_err();
        assert!(matches!(across, Error::Outside { at: a } if a == at(CUTS / 2)));
        assert_eq!(take(&space, pages(CUTS / 2 - 1, 1)), 1);
        assert_eq!(take(&space, pages(CUTS / 2 + 1, 1)), 1);
        assert_eq!(space.stats().outside_marks, 1);
        drop(space);
        drop(handle);
    });
}

/// The same with one area that is cut and loses the part below, again and again: there is never
/// more than one area, and the chain of cut areas grows with each cut.
#[test]
fn a_handle_survives_what_is_cut_off_a_hundred_thousand_times() {
    on_a_small_stack(|| {
        let space = untracked();
        space.map(pages(0, CUTS + 1), 0, RW).unwrap();
        let handle = space.area(at(0)).unwrap();
        for n in 1..=CUTS {
            assert!(space.cut(at(n)).unwrap());
            space.unmap_discarding(pages(n - 1, 1)).unwrap();
        }
        handle.mark(pages(CUTS, 1)).unwrap();
        let outside = handle.mark(pages(CUTS - 1, 2)).unwrap_err();
        assert!(matches!(outside, Error::Outside { at: a } if a == at(CUTS - 1)));
        assert_eq!(mapped(&space), [pages(CUTS, 1)]);
        drop(handle);
        drop(space);
    });
}

/// A handle of an area that was cut, whose left piece was unmapped, and the same addresses mapped
/// anew: a mark there is outside, and never one of the new area.
#[test]
fn an_old_handle_does_not_mark_what_was_mapped_anew() {
    let space = untracked();
    space.map(pages(0, 16), 0, RW).unwrap();
    space.start_tracking().unwrap();
    let old = space.area(at(0)).unwrap();
    space.cut(at(8)).unwrap();
    space.unmap_discarding(pages(0, 8)).unwrap();
    space.map(pages(0, 8), 0, RW).unwrap();
    let outside = old.mark(pages(6, 4)).unwrap_err();
    assert!(matches!(outside, Error::Outside { at: a } if a == at(6)));
    assert_eq!(take(&space, pages(0, 8)), 0);
    assert_eq!(take(&space, pages(8, 8)), 0b11);
    assert_eq!(space.stats().outside_marks, 1);
    // The other way round: what lies above is gone.
    space.unmap_discarding(pages(8, 8)).unwrap();
    let outside = old.mark(pages(0, 16)).unwrap_err();
    assert!(matches!(outside, Error::Outside { at: a } if a == at(0)));
    assert_eq!(take(&space, pages(0, 8)), 0);
    assert_eq!(space.stats().outside_marks, 2);
}

/// The handle of the right piece does not reach the left one, whether that is mapped or not,
/// although both share the same marks.
#[test]
fn a_handle_of_a_piece_marks_no_other_piece() {
    let space = untracked();
    space.map(pages(0, 16), 0, RW).unwrap();
    space.start_tracking().unwrap();
    space.cut(at(8)).unwrap();
    let right = space.area(at(8)).unwrap();
    for marks in 1..=2 {
        let outside = right.mark(pages(7, 1)).unwrap_err();
        assert!(matches!(outside, Error::Outside { at: a } if a == at(7)));
        assert_eq!(space.stats().outside_marks, marks);
        if marks == 1 {
            assert_eq!(take(&space, pages(0, 8)), 0);
            space.unmap_discarding(pages(0, 8)).unwrap();
        }
    }
    // A mark that sticks out marks nothing, not even what lies inside.
    for (range, outside) in [(pages(7, 2), 7), (pages(15, 2), 16), (pages(0, 32), 0)] {
        let refused = right.mark(range).unwrap_err();
        assert!(matches!(refused, Error::Outside { at: a } if a == at(outside)));
    }
    assert_eq!(take(&space, pages(8, 8)), 0);
    right.mark(pages(8, 1)).unwrap();
    assert_eq!(take(&space, pages(8, 8)), 1);
    assert_eq!(space.stats().outside_marks, 5);
}

/// A batch cuts two pieces out of one area: the handle marks the pages that are left, and reports
/// those that are gone.
#[test]
fn an_old_handle_follows_a_batch() {
    use dirtymap::Change::{Cut, Unmap};
    let space = untracked();
    space.map(pages(0, 16), 0, RW).unwrap();
    space.start_tracking().unwrap();
    let old = space.area(at(0)).unwrap();
    let cut = |n| Cut { at: at(n) };
    let unmap = |n| Unmap { range: pages(n, 2) };
    let changes = [cut(10), cut(4), cut(6), unmap(4), cut(12), unmap(10)];
    space.apply(&changes).unwrap();
    for (n, gone) in [
        (0, None),
        (3, Some(4)),
        (5, Some(5)),
        (6, None),
        (8, Some(10)),
    ] {
        let marked = old.mark(pages(n, 3));
        match gone {
            None => marked.unwrap(),
            Some(page) => {
                let outside = marked.unwrap_err();
                assert!(matches!(outside, Error::Outside { at: a } if a == at(page)));
            }
        }
    }
    let left = [(0, 4, 0b1111), (6, 4, 0b1111), (12, 4, 0)];
    for (first, n, dirty) in left {
        assert_eq!(take(&space, pages(first, n)), dirty, "from page {first} on");
    }
    assert_eq!(space.stats().outside_marks, 3);
}

/// The file of a log, or the descriptor of a VM, stays open as long as its source lives. So a
/// handle that a thread keeps must not keep the source.
#[test]
fn a_handle_keeps_no_source() {
    let (space, first, second) = two_sources();
    space.map(pages(0, 16), 0, RW).unwrap();
    let whole = space.area(at(0)).unwrap();
    space.cut(at(8)).unwrap();
    let piece = space.area(at(8)).unwrap();
    drop(space);
    assert_eq!(
        (Arc::strong_count(&first), Arc::strong_count(&second)),
        (1, 1)
    );
    let _ = (whole.mark(pages(0, 1)), piece.mark(pages(8, 1)));
}

/// Cuts each area above page 100 of `space` at every page.
fn cut_all(space: &AddressSpace) {
    for range in mapped(space).into_iter().filter(|r| r.start() > at(100)) {
        let first = range.start().get() / PAGE;
        let last = range.last().get() / PAGE;
        for page in first + 1..=last {
            assert!(space.cut(at(page)).unwrap());
        }
    }
}

/// A domain is attached. While it is filled with one area, the next one is cut into thousands of
/// pieces: the domain is filled with each of them once.
#[test]
fn an_attach_finds_what_became_of_an_area() {
    on_a_small_stack(|| {
        let space = Arc::new(untracked());
        space.map(pages(0, 4), 0, RW).unwrap();
        space.map(pages(1000, 3000), 0, RW).unwrap();
        let late = Arc::new(Fake::default());
        let inner = Arc::downgrade(&space);
        late.with(|s| s.on_map = Some(Box::new(move || cut_all(&inner.upgrade().unwrap()))));
        space.attach(late.clone()).unwrap();
        let mut filled = late.with(|s| s.mapped.clone());
        filled.sort_by_key(|range| range.start());
        assert_eq!(filled.len(), 3001);
        assert_eq!(filled, mapped(&space));
    });
}

/// A domain is detached. While it is emptied of one area, the next one is cut: nothing stays in the
/// domain, and its dirty pages are marked.
#[test]
fn a_detach_finds_what_became_of_an_area() {
    on_a_small_stack(|| {
        let source = Arc::new(Fake::default());
        let space = Arc::new(untracked());
        let domain = space.attach(source.clone()).unwrap();
        space.map(pages(0, 4), 0, RW).unwrap();
        space.map(pages(1000, 3000), 0, RW).unwrap();
        space.start_tracking().unwrap();
        source.dirty(3999);
        let inner = Arc::downgrade(&space);
        source.with(|s| s.on_unmap = Some(Box::new(move || cut_all(&inner.upgrade().unwrap()))));
        space.detach(domain).unwrap();
        assert_eq!(source.with(|s| s.mapped.clone()), []);
        assert_eq!(mapped(&space).len(), 3001);
        assert_eq!(take(&space, pages(3999, 1)), 1);
    });
}

/// Attaches a domain with 8 KiB pages during the next flush of `small`. The domain is in the list
/// then, and waits for the areas that are being changed. The receiver gets the thread that attaches
/// it.
fn attach_at_flush(
    space: &Arc<AddressSpace>,
    small: &Fake,
) -> (Arc<Fake>, mpsc::Receiver<std::thread::JoinHandle<bool>>) {
    let large = Arc::new(Fake::default());
    large.with(|s| s.page = Granule::from_lg2(13));
    let (sender, attached) = mpsc::channel();
    let (inner, source) = (Arc::downgrade(space), large.clone());
    small.with(|s| {
        s.on_invalidate = Some(Box::new(move || {
            let space = inner.upgrade().unwrap();
            let thread = std::thread::spawn({
                let space = space.clone();
                move || space.attach(source).is_ok()
            });
            while space.domains().len() < 2 && !thread.is_finished() {
                std::thread::yield_now();
            }
            sender.send(thread).unwrap();
        }));
    });
    (large, attached)
}

fn is_cut_of_page_1(error: &Error) -> bool {
    let granule = Granule::from_lg2(13).unwrap();
    matches!(error, Error::UnalignedCut { at: a, granule: g } if *a == at(1) && *g == granule)
}

/// A cut has been planned in pages of 4 KiB. While it waits for the flush of the leaves that it
/// split, a domain with 8 KiB pages is attached, which has seen the whole area. Unless one of the
/// two is refused, the domain is asked to map half of one of its pages.
#[test]
fn a_cut_and_an_attach_of_larger_pages_refuse_each_other() {
    let small = Arc::new(Fake::default());
    let space = Arc::new(untracked());
    space.attach(small.clone()).unwrap();
    space.map(pages(0, 4), 0, RW).unwrap();
    let (large, attached) = attach_at_flush(&space, &small);
    let refused = space.cut(at(1)).unwrap_err();
    assert!(is_cut_of_page_1(&refused), "{refused}");
    assert!(attached.recv().unwrap().join().unwrap());
    assert_eq!(large.with(|s| s.mapped.clone()), [pages(0, 4)]);
    assert_eq!(mapped(&space), [pages(0, 4)]);
    // The area is not stuck.
    assert!(space.cut(at(2)).unwrap());
    assert_eq!(large.with(|s| s.mapped.clone()), [pages(0, 2), pages(2, 2)]);
}

/// The same with a batch, which has already emptied the areas that it unmaps. Its error has the
/// cut, all areas are as they were, and dirty pages stay dirty.
#[test]
fn a_batch_and_an_attach_of_larger_pages_refuse_each_other() {
    use dirtymap::Change::{Cut, Unmap};
    let small = Arc::new(Fake::default());
    let space = Arc::new(untracked());
    space.attach(small.clone()).unwrap();
    space.map(pages(0, 4), 0, RW).unwrap();
    space.map(pages(8, 4), 0, RW).unwrap();
    space.start_tracking().unwrap();
    let handle = space.area(at(0)).unwrap();
    small.dirty(0);
    small.dirty(9);
    let (large, attached) = attach_at_flush(&space, &small);
    let [whole, half] = [pages(8, 4), pages(0, 1)].map(|range| Unmap { range });
    let refused = space.apply(&[whole, Cut { at: at(1) }, half]).unwrap_err();
    let Error::Change { index: 1, error } = refused else {
        panic!("{refused}");
    };
    assert!(is_cut_of_page_1(&error), "{error}");
    assert!(attached.recv().unwrap().join().unwrap());
    let areas = [pages(0, 4), pages(8, 4)];
    assert_eq!(mapped(&space), areas);
    assert_eq!(large.with(|s| s.mapped.clone()), areas);
    // The same for each domain alone, because its consumer does not look at marks.
    let domain = Scope::Domain(space.domains()[0]);
    let peeked = areas.map(|area| {
        let mut words = [0];
        let request = HarvestRequest::new(area, Granule::K4).in_scope(domain);
        space.peek(&request, UserBitmap::new(&mut words)).unwrap();
        words[0]
    });
    assert_eq!(peeked, [0b0001, 0b0010]);
    handle.mark(pages(3, 1)).unwrap();
    assert_eq!(take(&space, areas[0]), 0b1001);
    assert_eq!(take(&space, areas[1]), 0b0010);
    // No area is claimed or held, and no part of it is recorded as gone.
    let unmapped = space.unmap_discarding(IovaRange::ALL).unwrap();
    assert_eq!((unmapped.areas, space.stats().outside_marks), (2, 0));
}

/// The same, where the first cut of the batch is fine and the second is not.
#[test]
fn all_cuts_of_a_batch_are_checked_again() {
    use dirtymap::Change::Cut;
    let small = Arc::new(Fake::default());
    let space = Arc::new(AddressSpace::with_source(Granule::K4, small.clone()).unwrap());
    space.map(pages(0, 8), 0, RW).unwrap();
    let (large, attached) = attach_at_flush(&space, &small);
    let cuts = [2, 1, 4].map(|page| Cut { at: at(page) });
    let refused = space.apply(&cuts).unwrap_err();
    let Error::Change { index: 1, error } = refused else {
        panic!("{refused}");
    };
    assert!(is_cut_of_page_1(&error), "{error}");
    assert!(attached.recv().unwrap().join().unwrap());
    assert_eq!(mapped(&space), [pages(0, 8)]);
    assert_eq!(large.with(|s| s.mapped.clone()), [pages(0, 8)]);
}

/// A cut inside an area that the same batch has unmapped finds nothing to cut: the whole area goes,
/// in one piece.
#[test]
fn a_batch_does_not_cut_what_it_has_unmapped() {
    use dirtymap::Change::{Cut, Unmap};
    let (space, first, second) = two_sources();
    space.map(pages(0, 8), 0, RW).unwrap();
    let unmap = |first, n| Unmap {
        range: pages(first, n),
    };
    let changes = [
        Cut { at: at(4) },
        unmap(4, 4),
        Cut { at: at(6) },
        unmap(0, 4),
        Cut { at: at(2) },
    ];
    let unmapped = space.apply(&changes).unwrap();
    assert_eq!((unmapped.areas, unmapped.bytes), (2, 8 * u128::from(PAGE)));
    assert_eq!(mapped(&space), []);
    for source in [first, second] {
        assert_eq!(source.with(|s| s.mapped.clone()), []);
    }
    space.map(pages(0, 8), 0, RW).unwrap();
}
