//! Model checking of cuts against handles, and against domains that come and go. As in `loom.rs`,
//! each model is run again with single steps left out, and must fail then.
#![cfg(dirtymap_loom)]
#![allow(clippy::unwrap_used)] // helpers of tests

use dirtymap::source::{FlushGather, Invalidated, LeafSink, Sink, Stopped};
use dirtymap::sync::model::{Bound, holds_within};
use dirtymap::sync::{Arc, AtomicU64, Ordering::Relaxed, Step, thread};
use dirtymap::{
    Access, AddressSpace, Change, DirtySource, Error, Granule, HarvestRequest, Iova, IovaRange,
    Mapping, Tracking, UserBitmap,
};

const PAGE: Granule = Granule::K4;
/// Two preemptions find every fault that more preemptions find here, in a tenth of the time.
const BOUND: Bound = Bound::between(2, 2);
const RW: Access = Access::ReadWrite;

fn page(n: u64) -> IovaRange {
    IovaRange::from_len(Iova::new(n << 12), 1 << 12).unwrap()
}

fn both() -> IovaRange {
    IovaRange::new(page(0).start(), page(1).last()).unwrap()
}

fn peek(space: &AddressSpace, range: IovaRange) -> u64 {
    let words = [AtomicU64::new(0)];
    let request = HarvestRequest::new(range, PAGE);
    let peeked = space.peek(&request, UserBitmap::shared(&words));
    assert!(peeked.is_ok());
    words[0].load(Relaxed)
}

/// For each of the two pages, the fills minus the removals.
struct Pages {
    page: Granule,
    filled: [AtomicU64; 2],
    /// The source was called with a part of its page.
    odd: AtomicU64,
}

impl Pages {
    fn new(page: Granule) -> Arc<Self> {
        Arc::new(Pages {
            page,
            filled: [AtomicU64::new(0), AtomicU64::new(0)],
            odd: AtomicU64::new(0),
        })
    }

    fn inside(&self, range: IovaRange) -> impl Iterator<Item = &AtomicU64> {
        let pages = (0..).zip(&self.filled);
        pages.filter_map(move |(n, filled)| range.covers(page(n)).then_some(filled))
    }

    /// The counts, and whether all calls kept to the source's page.
    fn filled(&self) -> ([u64; 2], bool) {
        let [left, right] = &self.filled;
        let filled = [left.load(Relaxed), right.load(Relaxed)];
        (filled, self.odd.load(Relaxed) == 0)
    }
}

struct Source(Arc<Pages>);

impl DirtySource for Source {
    fn page(&self) -> Granule {
        self.0.page
    }

    fn map(&self, mapping: &Mapping) -> Result<(), Error> {
        if !mapping.range.is_aligned(self.0.page) {
            self.0.odd.store(1, Relaxed);
        }
        self.0.inside(mapping.range).for_each(|filled| {
            filled.fetch_add(1, Relaxed);
        });
        Ok(())
    }

    fn unmap(&self, range: IovaRange, gather: &mut FlushGather, _: &mut dyn FnMut(IovaRange)) {
        gather.add(range, PAGE);
        self.0.inside(range).for_each(|filled| {
            filled.fetch_sub(1, Relaxed);
        });
    }

    fn split_at(&self, _: Iova, _: &mut FlushGather) -> Result<(), Error> {
        Ok(())
    }

    fn set_tracking(&self, _: Tracking) -> Result<(), Error> {
        Ok(())
    }

    fn read_and_clear(&self, _: IovaRange, _: &mut LeafSink<'_, '_>) -> Result<(), Stopped> {
        Ok(())
    }

    fn peek(&self, _: IovaRange, _: &mut Sink<'_>) -> Result<(), Stopped> {
        Ok(())
    }

    fn invalidate(&self, _: &FlushGather) -> Result<Invalidated, Error> {
        Ok(Invalidated::default())
    }
}

/// A space with both pages in one area.
fn space() -> Arc<AddressSpace> {
    let space = AddressSpace::new(PAGE);
    space.map(both(), 0, RW).unwrap();
    Arc::new(space)
}

/// A thread marks by the handle of an area, while the area is cut and one piece is unmapped. The
/// mark of that piece is counted by one of the two. The rest is marked, and a new area in the place
/// of the piece is not. One preemption, and two in deep runs, as two take most of the time of all
/// models here. The steps are missed by the model of a batch.
#[test]
fn a_mark_by_a_handle_follows_a_cut() {
    holds_within(Bound::between(1, 1), &[], || {
        let space = space();
        space.start_tracking().unwrap();
        let handle = space.area(Iova::MIN).unwrap();
        let marker = thread::spawn(move || handle.mark(both()));
        let cut = space.cut(page(1).start()).unwrap();
        let discarded = space.unmap_discarding(page(0)).unwrap().discarded_bytes;
        space.map(page(0), 0, RW).unwrap();
        let counted = match marker.join().unwrap() {
            Ok(()) => discarded != 0,
            Err(Error::Outside { at }) => at == Iova::MIN,
            Err(_) => false,
        };
        let (anew, left) = (peek(&space, page(0)), peek(&space, page(1)));
        cut && counted && (anew, left) == (0, 1)
    });
}

/// The same with a batch, in which no reader ever sees the piece that is unmapped.
#[test]
fn a_mark_by_a_handle_follows_a_batch() {
    let steps = [Step::GiveWay, Step::SayGone, Step::SummarizedFence];
    holds_within(BOUND, &steps, || {
        let space = space();
        space.start_tracking().unwrap();
        let handle = space.area(Iova::MIN).unwrap();
        let marker = thread::spawn(move || handle.mark(both()));
        let (at, range) = (page(1).start(), page(1));
        let done = space.apply(&[Change::Cut { at }, Change::Unmap { range }]);
        let discarded = done.unwrap().discarded_bytes;
        let counted = match marker.join().unwrap() {
            Ok(()) => discarded != 0,
            Err(Error::Outside { at }) => at == page(1).start(),
            Err(_) => false,
        };
        counted && peek(&space, page(0)) == 1
    });
}

/// A domain is attached while a piece is cut out of an area. In the end it is filled with the rest
/// once, and not with that piece.
#[test]
fn a_batch_and_an_attach_leave_nothing_behind() {
    holds_within(BOUND, &[Step::LookAgain], || {
        let pages = Pages::new(PAGE);
        let space = space();
        let attach = {
            let (space, source) = (space.clone(), Source(pages.clone()));
            thread::spawn(move || space.attach(source).is_ok())
        };
        let (at, range) = (page(1).start(), page(1));
        let applied = space.apply(&[Change::Cut { at }, Change::Unmap { range }]);
        let attached = attach.join().unwrap();
        applied.is_ok() && attached && pages.filled() == ([1, 0], true)
    });
}

/// A domain is detached while an area is cut. In the end it has neither piece.
#[test]
fn a_cut_and_a_detach_leave_nothing_behind() {
    holds_within(BOUND, &[Step::LookAgain], || {
        let pages = Pages::new(PAGE);
        let space = space();
        let domain = space.attach(Source(pages.clone())).unwrap();
        let detach = {
            let space = space.clone();
            thread::spawn(move || space.detach(domain).is_ok())
        };
        let cut = space.cut(page(1).start());
        let detached = detach.join().unwrap();
        matches!(cut, Ok(true)) && detached && pages.filled() == ([0, 0], true)
    });
}

/// A cut races the attach of a domain with a larger page, which it would split. One of the two is
/// refused, and the domain is never called with a part of its page.
#[test]
fn a_cut_and_an_attach_of_larger_pages_refuse_each_other() {
    holds_within(BOUND, &[Step::CheckCutAgain], || {
        let pages = Pages::new(Granule::from_lg2(13).unwrap());
        let space = space();
        let attach = {
            let (space, source) = (space.clone(), Source(pages.clone()));
            thread::spawn(move || space.attach(source).is_ok())
        };
        let cut = space.cut(page(1).start()).is_ok();
        let attached = attach.join().unwrap();
        let filled = u64::from(attached);
        cut != attached && pages.filled() == ([filled, filled], true)
    });
}
