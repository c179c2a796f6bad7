//! Logs of other programs: one that is read by a call, one in shared memory.
#![cfg(not(any(dirtymap_loom, dirtymap_shuttle)))]
#![allow(clippy::unwrap_used)] // tests

use std::collections::BTreeSet;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use dirtymap::bitmap::BitmapError;
use dirtymap::{
    Access, AddressSpace, Error, Granule, HarvestRequest, IovaRange, PulledLog, RangeError,
    SharedLog, ToIovaRange, UserBitmap,
};

const PAGES: u64 = 200;
const BASE: u64 = 0x10_0000;

fn pages(first: u64, count: u64) -> IovaRange {
    let start = BASE + first * 4096;
    (start..start + count * 4096).to_iova_range().unwrap()
}

/// Harvests `range` and commits. Returns the dirty pages.
fn harvested(space: &AddressSpace, range: IovaRange) -> Result<BTreeSet<u64>, Error> {
    let mut words = [0; 8];
    let request = HarvestRequest::new(range, Granule::K4);
    let lease = space.harvest(&request, UserBitmap::new(&mut words))?;
    let lease = lease.sync()?;
    let runs = lease.runs().flat_map(|run| {
        let first = (run.start().get() - BASE) / 4096;
        first..first + run.granules(Granule::K4) as u64
    });
    let pages = runs.collect();
    lease.commit();
    Ok(pages)
}

/// The log of another program: the numbers of the pages that were written.
#[derive(Default)]
struct Log {
    written: Mutex<BTreeSet<u64>>,
    fails: AtomicBool,
    panics: AtomicBool,
}

impl Log {
    fn write(&self, page: u64) {
        self.written.lock().unwrap().insert(page);
    }

    fn pull(&self, range: IovaRange, words: &mut [u64]) -> io::Result<()> {
        let first = (range.start().get() - BASE) / 4096;
        assert_eq!(first % 64, 0, "parts begin at words of the log");
        let count = range.granules(Granule::K4) as u64;
        assert!(first + count <= PAGES && words.len() as u64 == count.div_ceil(64));
        self.written.lock().unwrap().retain(|page| {
            let nth = page.wrapping_sub(first);
            if nth < count {
                words[(nth / 64) as usize] |= 1 << (nth % 64);
            }
            nth >= count
        });
        if !count.is_multiple_of(64) {
            // Bits past the last page are ignored.
            *words.last_mut().unwrap() |= u64::MAX << (count % 64);
        }
        assert!(!self.panics.load(Ordering::Relaxed), "the log panics");
        match self.fails.load(Ordering::Relaxed) {
            true => Err(io::Error::other("unplugged")),
            false => Ok(()),
        }
    }
}

fn pulled() -> (AddressSpace, Arc<Log>) {
    let log = Arc::new(Log::default());
    let theirs = Arc::clone(&log);
    let pull = move |range, words: &mut [u64]| theirs.pull(range, words);
    let space = AddressSpace::new(Granule::K4);
    space.map(pages(0, PAGES), 0, Access::ReadWrite).unwrap();
    log.write(9); // before tracking
    space
        .attach(PulledLog::new(pages(0, PAGES), Granule::K4, pull).unwrap())
        .unwrap();
    space.start_tracking().unwrap();
    (space, log)
}

#[test]
fn a_pulled_log_gives_what_was_written_once() {
    let (space, log) = pulled();
    assert!(harvested(&space, pages(0, PAGES)).unwrap().is_empty());
    for page in [0, 63, 64, 70, 199] {
        log.write(page);
    }
    space.mark(pages(5, 1)).unwrap();
    // A harvest of a part leaves the rest pending, although the call cleared more than the part.
    assert_eq!(harvested(&space, pages(64, 2)).unwrap(), [64].into());
    assert_eq!(
        harvested(&space, pages(0, PAGES)).unwrap(),
        [0, 5, 63, 70, 199].into()
    );
    assert!(harvested(&space, pages(0, PAGES)).unwrap().is_empty());
    // Pages that a peek has pulled are reported by the next harvest.
    log.write(3);
    let mut words = [0; 4];
    let request = HarvestRequest::new(pages(0, PAGES), Granule::K4);
    for _ in 0..2 {
        let view = space.peek(&request, UserBitmap::new(&mut words)).unwrap();
        assert_eq!(view.count(), 1);
    }
    assert_eq!(harvested(&space, pages(0, PAGES)).unwrap(), [3].into());
}

#[test]
fn a_pull_that_fails_or_panics_makes_all_that_it_was_asked_for_dirty() {
    let (space, log) = pulled();
    log.write(70);
    log.fails.store(true, Ordering::Relaxed);
    let failed = harvested(&space, pages(64, 2)).unwrap_err();
    assert!(failed.to_string().contains("unplugged"), "{failed}");
    log.fails.store(false, Ordering::Relaxed);
    let all: BTreeSet<u64> = (64..128).collect();
    assert_eq!(harvested(&space, pages(0, PAGES)).unwrap(), all);

    log.write(199);
    log.panics.store(true, Ordering::Relaxed);
    let panicked = catch_unwind(AssertUnwindSafe(|| harvested(&space, pages(190, 10))));
    assert!(panicked.is_err());
    log.panics.store(false, Ordering::Relaxed);
    let all: BTreeSet<u64> = (128..PAGES).collect();
    assert_eq!(harvested(&space, pages(0, PAGES)).unwrap(), all);
}

#[test]
fn an_unmap_returns_what_a_pulled_log_has() {
    let (space, log) = pulled();
    log.write(130);
    let mut words = [0; 4];
    let (unmapped, view) = space
        .unmap(pages(0, PAGES), Granule::K4, UserBitmap::new(&mut words))
        .unwrap();
    assert_eq!(unmapped.dirty_bytes, 4096);
    assert_eq!(view.runs().collect::<Vec<_>>(), [pages(130, 1)]);
}

#[test]
fn a_shared_log_is_taken_word_by_word_while_its_writers_run() {
    let words: Arc<[AtomicU64]> = (0..4).map(|_| AtomicU64::new(0)).collect();
    let space = AddressSpace::new(Granule::K4);
    space.map(pages(0, PAGES), 0, Access::ReadWrite).unwrap();
    words[3].store(u64::MAX, Ordering::Relaxed); // before tracking; some bits are no pages
    space
        .attach(SharedLog::new(pages(0, PAGES), Granule::K4, Arc::clone(&words)).unwrap())
        .unwrap();
    space.start_tracking().unwrap();
    assert!(harvested(&space, pages(0, PAGES)).unwrap().is_empty());

    // Each page carries a number; the copy must have the last one of each when the writers are
    // done.
    let memory: Vec<AtomicU64> = (0..PAGES).map(|_| AtomicU64::new(0)).collect();
    let mut copy = vec![0; PAGES as usize];
    let done = AtomicBool::new(false);
    let round = |copy: &mut Vec<u64>| {
        for page in harvested(&space, pages(0, PAGES)).unwrap() {
            copy[page as usize] = memory[page as usize].load(Ordering::Relaxed);
        }
    };
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| {
            for number in 1..=20_000u64 {
                let page = number * 7 % PAGES;
                memory[page as usize].store(number, Ordering::Relaxed);
                words[(page / 64) as usize].fetch_or(1 << (page % 64), Ordering::Release);
            }
            done.store(true, Ordering::Release);
        });
        while !done.load(Ordering::Acquire) {
            round(&mut copy);
        }
        writer.join().unwrap();
    });
    round(&mut copy);
    let last: Vec<u64> = memory
        .iter()
        .map(|page| page.load(Ordering::Relaxed))
        .collect();
    assert_eq!(copy, last);

    words[2].fetch_or(0b110, Ordering::Release);
    let mut bits = [0; 4];
    let (unmapped, view) = space
        .unmap(pages(0, PAGES), Granule::K4, UserBitmap::new(&mut bits))
        .unwrap();
    assert_eq!(unmapped.dirty_bytes, 2 * 4096);
    assert_eq!(view.runs().collect::<Vec<_>>(), [pages(129, 2)]);
}

#[test]
fn logs_that_do_not_fit_are_refused() {
    let pull = |_: IovaRange, _: &mut [u64]| Ok::<(), io::Error>(());
    let odd = PulledLog::new(0..4097, Granule::K4, pull).err();
    assert!(matches!(odd, Some(Error::Unaligned { .. })));
    let none = PulledLog::new(5..5, Granule::K4, pull).err();
    assert!(matches!(
        none,
        Some(Error::Range(RangeError::ZeroLength { .. }))
    ));
    let huge = PulledLog::new(0..=u64::MAX, Granule::BYTE, pull).err();
    assert!(matches!(huge, Some(Error::Source(_))));
    let short = SharedLog::new(0..65 * 4096, Granule::K4, vec![AtomicU64::new(0)]).err();
    assert!(matches!(
        short,
        Some(Error::Bitmap(BitmapError::TooShort {
            bits: 64,
            needed: 65,
            ..
        }))
    ));
}
