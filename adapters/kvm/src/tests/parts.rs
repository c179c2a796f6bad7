//! Pages that are larger than those of the space, and requests that cut them.

use super::*;
use dirtymap::source::{FlushGather, LeafSink};
use dirtymap::source_kit::read_keeping;
use dirtymap::{DirtySource, Error};

/// Bytes from one address up to another.
fn bytes(start: u64, end: u64) -> IovaRange {
    IovaRange::from_len(Iova::new(start), end - start).unwrap()
}

/// The pages that KVM, or the log beside it, says are dirty; nothing is cleared.
fn dirty(log: &KvmLog) -> Vec<u64> {
    let mut words = [0u64; 8];
    let all = pages(0, 200);
    let view = UserBitmap::new(&mut words).view(all, Granule::K4).unwrap();
    log.peek(all, &mut view.sink()).unwrap();
    view.bits().collect()
}

/// The rest of a page that a request cuts was kept when the sink was told that the page was clean.
/// KVM cleared its log after that: a write in between, after a harvest that took the rest, was in
/// no lease.
#[test]
fn a_page_that_sticks_out_is_cleared_before_its_rest_is_kept() {
    for mode in MODES {
        let (_space, log, fake) = machine(mode);
        harvest(&_space, pages(0, 200));
        let written = [5, 6, 7, 70, 90, 91, 199];
        fake.with(|state| written.iter().for_each(|page| state.write(*page)));
        let range = bytes((5 << 12) + 1024, (91 << 12) + 2048);
        let mut words = [0u64; 8];
        let granule = Granule::from_lg2(10).unwrap();
        let view = UserBitmap::new(&mut words).view(range, granule).unwrap();
        let kept = Mutex::new(Vec::new());
        let keep = |rest: IovaRange| {
            // The log says nothing of the page any more, in whatever it is kept.
            if mode.is_manual() {
                let page = (rest.start().get() >> 12) as usize;
                let set = fake.with(|state| state.slots[&3].log[page / 64] >> (page % 64) & 1);
                assert_eq!(set, 0, "{mode:?}: page {page} is kept and not cleared");
            }
            lock(&kept).push(rest);
        };
        read_keeping(&*log, &view, &keep).unwrap();
        let runs: Vec<_> = view.runs().collect();
        let expected = [
            bytes((5 << 12) + 1024, 8 << 12),
            pages(70, 1),
            bytes(90 << 12, (91 << 12) + 2048),
        ];
        assert_eq!(runs, expected, "{mode:?}");
        let rests = [
            bytes(5 << 12, (5 << 12) + 1024),
            bytes((91 << 12) + 2048, 92 << 12),
        ];
        assert_eq!(*lock(&kept), rests, "{mode:?}");
        assert_eq!(dirty(&log), [199], "{mode:?}");
    }
}

/// Without a place for rests, a page that a request cuts is reported and stays dirty.
#[test]
fn a_sink_of_its_own_leaves_a_page_that_sticks_out_in_the_log() {
    for mode in MODES {
        let (_space, log, fake) = machine(mode);
        harvest(&_space, pages(0, 200));
        fake.with(|state| [5, 6, 91].iter().for_each(|page| state.write(*page)));
        let range = bytes((5 << 12) + 1024, (91 << 12) + 2048);
        let mut words = [0u64; 8];
        let granule = Granule::from_lg2(10).unwrap();
        let view = UserBitmap::new(&mut words).view(range, granule).unwrap();
        let (mut sink, mut gather) = (view.sink(), FlushGather::new());
        let mut out = LeafSink::new(&mut sink, &mut gather);
        log.read_and_clear(range, &mut out).unwrap();
        assert_eq!(view.count(), 3 + 4 + 2, "{mode:?}");
        assert_eq!(dirty(&log), [5, 91], "{mode:?}");
    }
}

/// KVM refuses to clear the page that sticks out: the harvest stops there, and nothing is lost.
#[test]
fn a_page_whose_own_clear_fails_stops_the_harvest() {
    let (_space, log, fake) = machine(MODES[1]);
    fake.with(|state| [5, 90, 91].iter().for_each(|page| state.write(*page)));
    let range = bytes(5 << 12, (91 << 12) + 2048);
    let mut words = [0u64; 8];
    let granule = Granule::from_lg2(10).unwrap();
    let view = UserBitmap::new(&mut words).view(range, granule).unwrap();
    let kept = Mutex::new(Vec::new());
    let keep = |rest: IovaRange| lock(&kept).push(rest);
    // The look succeeds, the clear does not.
    fake.with(|state| state.fail_in = Some(1));
    let stopped = read_keeping(&*log, &view, &keep).unwrap_err();
    assert_eq!(stopped.at, Iova::new(91 << 12));
    assert_eq!(dirty(&log), [5, 90, 91]);
    assert_eq!(lock(&kept).len(), 1, "a superset");
}

/// The instalments of a space of 1 KiB pages end at pages of KVM.
#[test]
fn instalments_end_at_pages_of_kvm() {
    let fake = Fake::default();
    fake.with(|state| (state.memory, state.manual) = (vec![0; 400], true));
    let log = KvmLog::with_kernel(Box::new(fake.clone()), MODES[1], Granule::K4);
    let granule = Granule::from_lg2(10).unwrap();
    let log = Arc::new(log);
    let space = AddressSpace::with_source(granule, log.clone()).unwrap();
    // SAFETY: the fake has no guest.
    unsafe { log.add_slot(3, pages(0, 200), 0) }.unwrap();
    space.map(pages(0, 200), 0, Access::ReadWrite).unwrap();
    space.start_tracking().unwrap();
    fake.with(|state| (0..200).for_each(|page| state.write(page)));
    let request = HarvestRequest::new(pages(0, 200), granule);
    let mut words = [0u64; 16];
    let bitmap = UserBitmap::new(&mut words);
    let part = space.harvest(&request.resume_at(Iova::MIN).max_bits(65), bitmap);
    let part = part.unwrap();
    assert_eq!(part.next(), Some(Iova::new(17 << 12)));
    assert_eq!(part.report().bits_set, 68);
    part.sync().unwrap().commit();
    assert_eq!(dirty(&log).len(), 183);
    let mut words = vec![0u64; 16];
    let bitmap = UserBitmap::new(&mut words);
    let inside = Iova::new((17 << 12) + 1024);
    let refused = space.harvest(&request.resume_at(inside).max_bits(65), bitmap);
    let Err(Error::BadCursor { granule, .. }) = refused else {
        panic!("{refused:?}");
    };
    assert_eq!(granule, Granule::K4);
}
