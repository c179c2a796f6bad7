//! A test kit: tests of the contract of a [`DirtySource`], from outside.
//!
//! The author of a source writes a [`Rig`], and calls [`check`] in a test:
//!
//! ```
//! use dirtymap::source_kit::{Rig, check};
//! use dirtymap::{DirtySource, Granule, Iova, IovaRange, SharedLog, ToIovaRange};
//! use std::sync::Arc;
//! use std::sync::atomic::{AtomicU64, Ordering};
//!
//! struct Words(Arc<[AtomicU64]>);
//!
//! impl Rig for Words {
//!     fn range(&self) -> IovaRange {
//!         (0..512 << 12).to_iova_range().expect("not empty")
//!     }
//!     fn source(&self) -> Arc<dyn DirtySource> {
//!         let log = SharedLog::new(self.range(), Granule::K4, Arc::clone(&self.0));
//!         Arc::new(log.expect("a bit for each page"))
//!     }
//!     fn write(&self, iova: Iova) {
//!         let page = iova.get() >> 12;
//!         self.0[(page / 64) as usize].fetch_or(1 << (page % 64), Ordering::Release);
//!     }
//! }
//!
//! check(|| Words((0..8).map(|_| AtomicU64::new(0)).collect()));
//! ```

use std::collections::BTreeSet;
use std::fmt::Display;
use std::panic::{AssertUnwindSafe, catch_unwind};

use crate::bitmap::{BitmapView, UserBitmap};
use crate::flush::{FlushGather, FlushQueue};
use crate::harvest::{HarvestRequest, Lease, Owed};
use crate::marks::InFlight;
use crate::source::{DirtySource, LeafSink, Rests, Stopped, Tracking};
use crate::space::AddressSpace;
use crate::sync::{Arc, AtomicBool, AtomicU64, Ordering, thread};
use crate::units::{Access, Granule, Iova, IovaRange};

/// The least number of pages for the kit: some words of a bitmap.
const PAGES: u64 = 256;

/// A source under test, and a function that writes to its memory.
pub trait Rig: Sync {
    /// The addresses at which an area may be mapped: at least 256 whole pages of the source.
    fn range(&self) -> IovaRange;

    /// The source, not attached yet. Called once for each rig.
    fn source(&self) -> Arc<dyn DirtySource>;

    /// Writes the byte at `iova` as a device does. Returns when the write has landed.
    fn write(&self, iova: Iova);
}

/// Runs all tests of the kit, each on a rig of its own.
///
/// # Panics
/// With the rule that the source breaks.
pub fn check<R: Rig>(make: impl Fn() -> R) {
    for part in [
        each_write_is_reported_once,
        a_peek_takes_nothing,
        a_part_leaves_the_rest,
        an_abort_puts_back,
        a_bitmap_that_fails_loses_nothing,
        an_unmap_tells_what_was_dirty,
        a_panic_in_the_middle_leaves_the_source_usable,
        tracking_begins_clean,
        a_space_of_smaller_pages_gets_whole_ones,
        harvests_at_once_lose_nothing,
    ] {
        let rig = make();
        part(&Bench::new(&rig, |page| page));
    }
}

/// A rig with its source in a space.
struct Bench<'r> {
    rig: &'r dyn Rig,
    source: Arc<dyn DirtySource>,
    space: AddressSpace,
    page: Granule,
    /// The mapped range: 256 pages of the source.
    range: IovaRange,
}

impl<'r> Bench<'r> {
    /// In a space whose page is computed from the source's by `smaller`.
    fn new(rig: &'r dyn Rig, smaller: impl Fn(Granule) -> Granule) -> Self {
        let source = rig.source();
        let page = source.page();
        let range = rig.range();
        let asked = page.bytes().checked_mul(PAGES);
        let range = asked.and_then(|len| IovaRange::from_len(range.start(), len).ok());
        let fits = |range: &IovaRange| rig.range().covers(*range) && range.is_aligned(page);
        let Some(range) = range.filter(fits) else {
            panic!(
                "a rig needs {PAGES} whole pages of {page}, not {}",
                rig.range()
            );
        };
        let space = AddressSpace::new(smaller(page));
        allowed(space.map(range, 0, Access::ReadWrite), "an area");
        let attached = space.attach(Arc::clone(&source));
        allowed(attached.map(drop), "a source");
        allowed(space.start_tracking(), "tracking");
        Bench {
            rig,
            source,
            space,
            page,
            range,
        }
    }

    fn page_at(&self, number: u64) -> Iova {
        Iova::new(self.range.start().get() + (number << self.page.lg2()))
    }

    fn write(&self, number: u64) {
        self.rig.write(self.page_at(number));
    }

    fn request(&self) -> HarvestRequest<'static> {
        HarvestRequest::new(self.range, self.page)
    }

    /// The numbers of the set bits.
    fn bits(words: &[AtomicU64]) -> BTreeSet<u64> {
        let bit = |n: &u64| {
            // Relaxed: the lease handed the bits over.
            let word = words[(n / 64) as usize].load(Ordering::Relaxed);
            u64::from_le(word) >> (n % 64) & 1 != 0
        };
        (0..PAGES).filter(bit).collect()
    }

    /// The pages that a harvest reports. `then` gets the lease.
    fn harvest(&self, then: impl FnOnce(Lease<'_, Owed>)) -> BTreeSet<u64> {
        let words: Vec<AtomicU64> = (0..PAGES / 64).map(|_| AtomicU64::new(0)).collect();
        let lease = self
            .space
            .harvest(&self.request(), UserBitmap::shared(&words));
        then(allowed(lease, "a harvest"));
        Self::bits(&words)
    }

    fn committed(&self) -> BTreeSet<u64> {
        self.harvest(|lease| {
            allowed(lease.sync(), "a flush").commit();
        })
    }
}

/// Reads `source` into `view` as a harvest of a space does. Of a page that the range of `view`
/// cuts, the rest goes to `keep`, after the source has cleared the page: for tests of that order,
/// and of what is left in the source. Returns what was owed.
///
/// ```
/// use dirtymap::source_kit::read_keeping;
/// use dirtymap::{Granule, SharedLog, ToIovaRange, UserBitmap};
/// use std::sync::Mutex;
/// use std::sync::atomic::AtomicU64;
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let log = SharedLog::new(0..64 << 12, Granule::K4, vec![AtomicU64::new(1 << 3)])?;
/// let half = Granule::from_bytes(2048)?;
/// let mut words = [0];
/// let view = UserBitmap::new(&mut words).view((0x3800..0x5000).to_iova_range()?, half)?;
/// let rests = Mutex::new(Vec::new());
/// read_keeping(&log, &view, &|rest| rests.lock().expect("no panic").push(rest))
///     .map_err(|stopped| stopped.error)?;
/// assert_eq!(rests.into_inner()?, [(0x3000..0x3800).to_iova_range()?]);
/// assert_eq!(words, [1]);
/// # Ok(())
/// # }
/// ```
///
/// # Errors
/// That of the source.
pub fn read_keeping(
    source: &(impl DirtySource + ?Sized),
    view: &BitmapView<'_>,
    keep: &dyn Fn(IovaRange),
) -> Result<FlushGather, Stopped> {
    let (mut sink, mut gather) = (view.sink(), FlushGather::new());
    let (in_flight, flush) = (InFlight::new(), FlushQueue::new());
    let rests = Rests {
        in_flight: &in_flight,
        keep,
        flush: &flush,
        shared: false,
    };
    let mut out = LeafSink::keeping(&mut sink, &mut gather, rests);
    source.read_and_clear(view.range(), &mut out)?;
    Ok(gather)
}

fn allowed<T, E: Display>(result: Result<T, E>, what: &str) -> T {
    result.unwrap_or_else(|error| panic!("the source refuses {what}: {error}"))
}

fn set(pages: &[u64]) -> BTreeSet<u64> {
    pages.iter().copied().collect()
}

fn each_write_is_reported_once(bench: &Bench<'_>) {
    let pages = [0, 1, 63, 64, 100, 255];
    pages.iter().for_each(|page| bench.write(*page));
    let seen = bench.committed();
    assert!(
        seen.is_superset(&set(&pages)),
        "no lost write: {pages:?} were written, {seen:?} reported"
    );
    assert_eq!(seen, set(&pages), "tight: only written pages are reported");
    assert_eq!(bench.committed(), set(&[]), "cleared pages stay clean");
    bench.write(100);
    assert_eq!(
        bench.committed(),
        set(&[100]),
        "a write after the flush is seen again"
    );
}

fn a_peek_takes_nothing(bench: &Bench<'_>) {
    bench.write(70);
    for _ in 0..2 {
        let words: Vec<AtomicU64> = (0..PAGES / 64).map(|_| AtomicU64::new(0)).collect();
        let seen = bench
            .space
            .peek(&bench.request(), UserBitmap::shared(&words));
        allowed(seen.map(drop), "a peek");
        assert_eq!(
            Bench::bits(&words),
            set(&[70]),
            "a peek shows the dirty pages"
        );
    }
    assert_eq!(bench.committed(), set(&[70]), "a peek takes nothing");
}

fn a_part_leaves_the_rest(bench: &Bench<'_>) {
    [10, 20, 63, 64].iter().for_each(|page| bench.write(*page));
    for (from, to, seen) in [(5, 15, vec![10]), (60, 63, vec![63]), (100, 200, vec![])] {
        let part = IovaRange::new(bench.page_at(from), bench.page_at(to));
        let part = part.map(|part| part.hull(IovaRange::granule_at(part.last(), bench.page)));
        let request = HarvestRequest::new(allowed(part, "a part"), bench.page);
        let words: Vec<AtomicU64> = (0..PAGES / 64).map(|_| AtomicU64::new(0)).collect();
        let bitmap = UserBitmap::shared(&words);
        let lease = allowed(bench.space.harvest(&request, bitmap), "a harvest");
        allowed(lease.sync(), "a flush").commit();
        let told: BTreeSet<u64> = Bench::bits(&words).iter().map(|n| n + from).collect();
        assert_eq!(
            told,
            set(&seen),
            "a part is reported, and pages outside of the request stay dirty"
        );
    }
    let rest = bench.committed();
    assert_eq!(
        rest,
        set(&[20, 64]),
        "pages outside of the request stay dirty"
    );
}

fn an_abort_puts_back(bench: &Bench<'_>) {
    bench.write(5);
    let aborted = bench.harvest(|lease| {
        lease.abort();
    });
    assert_eq!(aborted, set(&[5]));
    bench.write(6);
    assert_eq!(bench.committed(), set(&[5, 6]), "an abort puts back");
}

fn a_bitmap_that_fails_loses_nothing(bench: &Bench<'_>) {
    let pages = [3, 64, 65, 200];
    for good in 0..PAGES / 64 {
        pages.iter().for_each(|page| bench.write(*page));
        let words: Vec<AtomicU64> = (0..PAGES / 64).map(|_| AtomicU64::new(0)).collect();
        let bitmap = UserBitmap::failing(&words, good);
        let lease = allowed(bench.space.harvest(&bench.request(), bitmap), "a harvest");
        let at = lease.stopped().map(|stopped| stopped.at);
        let Some(at) = at else {
            panic!("a source that cannot record stops: {good} words can be written");
        };
        let border = (at.get() - bench.range.start().get()) >> bench.page.lg2();
        assert!(
            border <= 200,
            "a stop at the first page that was not recorded, not at {at}"
        );
        let below: BTreeSet<u64> = pages
            .iter()
            .copied()
            .filter(|page| *page < border)
            .collect();
        let told: BTreeSet<u64> = Bench::bits(&words)
            .into_iter()
            .filter(|p| *p < border)
            .collect();
        assert_eq!(told, below, "below a stop everything is in the lease");
        allowed(lease.partial().sync(), "a flush").commit();
        let rest: BTreeSet<u64> = pages
            .iter()
            .copied()
            .filter(|page| *page >= border)
            .collect();
        assert_eq!(bench.committed(), rest, "from a stop on nothing was taken");
    }
}

fn an_unmap_tells_what_was_dirty(bench: &Bench<'_>) {
    bench.write(9);
    bench.write(130);
    let words: Vec<AtomicU64> = (0..PAGES / 64).map(|_| AtomicU64::new(0)).collect();
    let bitmap = UserBitmap::shared(&words);
    let unmapped = bench.space.unmap(bench.range, bench.page, bitmap);
    allowed(unmapped.map(drop), "an unmap");
    let seen = Bench::bits(&words);
    assert!(
        seen.is_superset(&set(&[9, 130])),
        "an unmap reports the dirty pages, not {seen:?}"
    );
}

fn a_panic_in_the_middle_leaves_the_source_usable(bench: &Bench<'_>) {
    bench.write(9);
    let unwound = catch_unwind(AssertUnwindSafe(|| {
        let mut told = |_| panic!("the test kit");
        bench
            .source
            .unmap(bench.range, &mut FlushGather::new(), &mut told);
    }));
    assert!(unwound.is_err(), "an unmap reports the dirty pages");
    // Page 9, which the unmap had reported, may be dirty or not. No lock is held, and the source
    // answers.
    let answers = catch_unwind(AssertUnwindSafe(|| {
        bench.committed();
        let unmapped = bench.space.unmap_discarding(bench.range);
        allowed(unmapped.map(drop), "an unmap");
    }));
    assert!(
        answers.is_ok(),
        "a source answers after a panic in the middle of a call"
    );
}

fn tracking_begins_clean(bench: &Bench<'_>) {
    bench.write(1);
    allowed(bench.space.start_tracking(), "tracking, twice");
    // A space in doubt switches again, and so does a second space.
    let twice = bench.source.set_tracking(Tracking::On);
    allowed(twice, "tracking, twice");
    assert_eq!(
        bench.committed(),
        set(&[1]),
        "tracking twice keeps dirty pages dirty"
    );
    bench.write(2);
    allowed(bench.space.stop_tracking(), "an end of tracking");
    assert_eq!(
        bench.committed(),
        set(&[2]),
        "an end of tracking keeps dirty pages dirty"
    );
    allowed(bench.space.start_tracking(), "tracking again");
    assert_eq!(bench.committed(), set(&[]), "tracking begins clean");
    bench.write(3);
    assert_eq!(bench.committed(), set(&[3]), "tracking again reports");
    // Written before the end and after it, and harvested by no call.
    bench.write(4);
    allowed(bench.space.stop_tracking(), "an end of tracking");
    bench.write(5);
    allowed(bench.space.start_tracking(), "tracking again");
    assert_eq!(bench.committed(), set(&[]), "tracking begins clean");
}

fn a_space_of_smaller_pages_gets_whole_ones(bench: &Bench<'_>) {
    let Some(lg2) = bench.page.lg2().checked_sub(1) else {
        return;
    };
    allowed(
        bench.space.unmap_discarding(bench.range).map(drop),
        "an unmap",
    );
    let space = AddressSpace::new(Granule::from_lg2(lg2).unwrap_or(bench.page));
    allowed(
        space.attach(Arc::clone(&bench.source)).map(drop),
        "a second space",
    );
    allowed(space.map(bench.range, 0, Access::ReadWrite), "an area");
    allowed(space.start_tracking(), "tracking");
    bench.write(70);
    let (mut reported, mut from) = (0, Some(bench.range.start()));
    while let Some(at) = from {
        let words: Vec<AtomicU64> = (0..PAGES / 32).map(|_| AtomicU64::new(0)).collect();
        let request = HarvestRequest::new(bench.range, space.page());
        let request = request.max_bits(1).resume_at(at);
        let lease = space.harvest(&request, UserBitmap::shared(&words));
        let lease = allowed(lease, "a bounded harvest");
        from = lease.next();
        reported += allowed(lease.sync(), "a flush").commit().bits_set;
    }
    assert_eq!(reported, 2, "both halves of the page, once");
}

/// Two harvesters and a writer: after the last harvest the copy of each page is its last write.
fn harvests_at_once_lose_nothing(bench: &Bench<'_>) {
    let memory: Vec<AtomicU64> = (0..PAGES).map(|_| AtomicU64::new(0)).collect();
    let copy: Vec<AtomicU64> = (0..PAGES).map(|_| AtomicU64::new(0)).collect();
    let done = AtomicBool::new(false);
    let round = || {
        let words: Vec<AtomicU64> = (0..PAGES / 64).map(|_| AtomicU64::new(0)).collect();
        let lease = bench
            .space
            .harvest(&bench.request(), UserBitmap::shared(&words));
        let lease = allowed(lease, "a harvest");
        let lease = allowed(lease.sync(), "a flush");
        for page in Bench::bits(&words) {
            // Relaxed: the sync orders the look after the write. The newest copy of a page wins.
            let seen = memory[page as usize].load(Ordering::Relaxed);
            copy[page as usize].fetch_max(seen, Ordering::Relaxed);
        }
        lease.commit();
    };
    thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                // Acquire: pairs with the Release below; the last round sees the last write.
                while !done.load(Ordering::Acquire) {
                    round();
                }
            });
        }
        for number in 1..=4_000u64 {
            let page = number * 13 % PAGES;
            // Relaxed: the device's write publishes it.
            memory[page as usize].store(number, Ordering::Relaxed);
            bench.write(page);
        }
        // Release: pairs with the Acquire above.
        done.store(true, Ordering::Release);
    });
    round();
    for (page, (last, copied)) in memory.iter().zip(&copy).enumerate() {
        // Relaxed: all threads have ended.
        let (last, copied) = (last.load(Ordering::Relaxed), copied.load(Ordering::Relaxed));
        assert_eq!(
            copied, last,
            "no lost write: page {page} with harvests at once"
        );
    }
}
