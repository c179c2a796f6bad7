//! Harvests of a space whose pages are smaller than those of the log.

use super::VhostLog;
use super::memory::LOG_PAGE;
use crate::log_list::LogWords;
use dirtymap::source::{FlushGather, LeafSink};
use dirtymap::source_kit::{Rig, check, read_keeping};
use dirtymap::sync::{Arc, Mutex, Ordering, lock};
use dirtymap::{
    Access, AddressSpace, DirtySource, Error, Granule, HarvestRequest, Iova, IovaRange, UserBitmap,
};

/// 2 KiB.
fn half() -> Granule {
    Granule::from_lg2(11).unwrap()
}

/// Pages 0 to 63, one word of the log, from 2 KiB inside page `first` on.
fn cut(first: u64) -> IovaRange {
    let start = (first << 12) + 2048;
    IovaRange::from_len(Iova::new(start), (64 << 12) - start).unwrap()
}

fn set(log: &VhostLog, pages: &[u64]) {
    let word = pages.iter().fold(0, |word, page| word | 1 << page);
    log.memory().words()[0].fetch_or(u64::to_le(word), Ordering::SeqCst);
}

fn word(log: &VhostLog) -> u64 {
    u64::from_le(log.memory().words()[0].load(Ordering::SeqCst))
}

/// Two runs in one word of the log, of which the request cuts the first. The sink was told that it
/// was clean, and its rest was kept, before the word was cleared after the second run.
#[test]
fn the_first_of_two_runs_in_a_word_is_cleared_before_its_rest_is_kept() {
    let log = VhostLog::new(Iova::new(1 << 20)).unwrap();
    set(&log, &[32, 40, 41]);
    let mut words = [0u64; 1];
    let range = cut(32);
    let view = UserBitmap::new(&mut words).view(range, half()).unwrap();
    let kept = Mutex::new(Vec::new());
    let keep = |rest: IovaRange| {
        assert_eq!(word(&log) >> 32 & 1, 0, "kept, and not cleared");
        lock(&kept).push(rest);
    };
    read_keeping(&log, &view, &keep).unwrap();
    let rest = IovaRange::from_len(Iova::new(32 << 12), 2048).unwrap();
    assert_eq!((&*lock(&kept), word(&log)), (&vec![rest], 0));
    assert_eq!(view.count(), 1 + 4);
}

/// Without a place for rests, a page that a request cuts is reported and stays in the log. It was
/// cleared with the other run of its word.
#[test]
fn a_sink_of_its_own_leaves_a_page_that_sticks_out_in_the_log() {
    let log = VhostLog::new(Iova::new(1 << 20)).unwrap();
    set(&log, &[32, 40]);
    let mut words = [0u64; 1];
    let view = UserBitmap::new(&mut words).view(cut(32), half()).unwrap();
    let (mut sink, mut gather) = (view.sink(), FlushGather::new());
    let mut out = LeafSink::new(&mut sink, &mut gather);
    log.read_and_clear(cut(32), &mut out).unwrap();
    assert_eq!((view.count(), word(&log)), (1 + 2, 1 << 32));
}

/// A back end marks a page while the unmap reports the others of the same word. The unmap clears
/// that mark too, so the unmap reports it.
#[test]
fn a_mark_between_the_look_and_the_clear_of_an_unmap_is_reported() {
    let log = VhostLog::new(Iova::new(1 << 20)).unwrap();
    set(&log, &[3, 4]);
    let all = IovaRange::from_len(Iova::MIN, 64 << 12).unwrap();
    let mut told = Vec::new();
    log.unmap(all, &mut FlushGather::new(), &mut |run| {
        if told.is_empty() {
            set(&log, &[9]);
        }
        told.push((run.start().get() >> 12, run.last().get() >> 12));
    });
    assert_eq!((told, word(&log)), (vec![(3, 4), (9, 9)], 0));
}

/// Instalments begin and end at pages of the log.
#[test]
fn instalments_end_at_pages_of_the_log() {
    let log = Arc::new(VhostLog::new(Iova::new(1 << 20)).unwrap());
    let space = AddressSpace::with_source(half(), log.clone()).unwrap();
    let all = IovaRange::from_len(Iova::MIN, 64 << 12).unwrap();
    space.map(all, 0, Access::ReadWrite).unwrap();
    space.start_tracking().unwrap();
    set(&log, &(0..64).collect::<Vec<u64>>());
    let request = HarvestRequest::new(all, half());
    let mut words = [0u64; 2];
    let bitmap = UserBitmap::new(&mut words);
    let part = space.harvest(&request.resume_at(Iova::MIN).max_bits(65), bitmap);
    let part = part.unwrap();
    assert_eq!(part.next(), Some(Iova::new(33 << 12)));
    part.sync().unwrap().commit();
    assert_eq!(word(&log), u64::MAX << 33);
    let inside = Iova::new((33 << 12) + 2048);
    let mut words = vec![0u64; 16];
    let bitmap = UserBitmap::new(&mut words);
    let refused = space.harvest(&request.resume_at(inside).max_bits(65), bitmap);
    let Err(Error::BadCursor { granule, .. }) = refused else {
        panic!("{refused:?}");
    };
    assert_eq!(granule, LOG_PAGE);
}

/// A front end whose back end marks in the log.
struct FrontEnd(Arc<VhostLog>);

impl Rig for FrontEnd {
    fn range(&self) -> IovaRange {
        IovaRange::from_len(Iova::new(1 << 20), 256 << 12).unwrap()
    }

    fn source(&self) -> Arc<dyn DirtySource> {
        self.0.clone()
    }

    fn write(&self, iova: Iova) {
        let page = iova.get() >> 12;
        let mask = u64::to_le(1 << (page % 64));
        self.0.memory().words()[(page / 64) as usize].fetch_or(mask, Ordering::SeqCst);
    }
}

#[test]
fn the_log_keeps_the_rules_of_sources() {
    check(|| FrontEnd(Arc::new(VhostLog::new(Iova::new(2 << 20)).unwrap())));
}
