//! Bitmaps in files through the public interface: one window at a time, and files that are or
//! become too short.
#![cfg(all(feature = "mmap", not(dirtymap_loom)))]
#![allow(clippy::unwrap_used)] // helpers of tests

mod common;
mod common_file;

use common::{Fake, PAGE, pages};
use common_file::scratch;
use dirtymap::bitmap::{BitmapError, FileBitmap};
use dirtymap::source::{FlushGather, Invalidated, LeafSink, Sink, Stopped};
use dirtymap::{
    Access, AddressSpace, DirtySource, Error, Granule, HarvestRequest, Holes, Iova, IovaRange,
    Mapping, Scope, Tracking, UserBitmap,
};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

/// Pages whose bits fill one window of 64 KiB.
const WINDOW: u64 = 8 << 16;

#[test]
fn a_quarter_gigabyte_of_bitmap_never_has_more_than_one_window_mapped() {
    // 8 TiB at 4 KiB a bit, marked here and there; the file is sparse too.
    let all = IovaRange::from_len(Iova::MIN, 8 << 40).unwrap();
    let space = AddressSpace::new(Granule::K4);
    space.map(all, 0, Access::ReadWrite).unwrap();
    space.start_tracking().unwrap();
    let marked: Vec<_> = (0..128).map(|n| pages((n << 24) + 5 * n, 2)).collect();
    for pages in &marked {
        space.mark(*pages).unwrap();
    }
    let bitmap = FileBitmap::new(scratch(256 << 20), 0, 256 << 20);
    let request = HarvestRequest::new(all, Granule::K4);
    let lease = space.harvest(&request, UserBitmap::file(&bitmap)).unwrap();
    assert_eq!(lease.report().windows, 128);
    let lease = lease.sync().unwrap();
    let mut runs = lease.runs();
    assert_eq!(runs.by_ref().collect::<Vec<_>>(), marked);
    assert!(runs.error().is_none());
    drop(runs);
    lease.commit();
    assert_eq!(bitmap.most_mapped(), 2 << 20);
}

#[test]
fn a_file_that_is_too_short_is_refused_up_front() {
    let space = AddressSpace::new(Granule::K4);
    space.map(pages(0, 64), 0, Access::ReadWrite).unwrap();
    space.start_tracking().unwrap();
    space.mark(pages(63, 1)).unwrap();
    let request = HarvestRequest::new(pages(0, 64), Granule::K4);
    for (offset, bytes) in [(93, 8), (0, 7), (u64::MAX, 8), (101, u64::MAX)] {
        let bitmap = FileBitmap::new(scratch(100), offset, bytes);
        assert!(matches!(
            space.harvest(&request, UserBitmap::file(&bitmap)),
            Err(Error::Bitmap(BitmapError::TooShort { needed: 64, bits, .. })) if bits <= 56
        ));
        assert_eq!(bitmap.most_mapped(), 0);
    }
    let bitmap = FileBitmap::new(scratch(100), 92, u64::MAX);
    let lease = space.harvest(&request, UserBitmap::file(&bitmap)).unwrap();
    assert_eq!(
        lease.sync().unwrap().runs().collect::<Vec<_>>(),
        [pages(63, 1)]
    );
}

#[test]
fn windows_are_powers_of_two_of_at_least_a_page() {
    for bad in [0, 4096, 3 << 16, 2 << 30, u64::MAX] {
        let bitmap = FileBitmap::new(scratch(0), 0, 0).with_window(bad);
        assert!(matches!(bitmap, Err(BitmapError::BadWindow { bytes }) if bytes == bad));
    }
}

#[test]
fn a_file_that_shrinks_stops_the_harvest_and_loses_nothing() {
    let fake = Arc::new(Fake::default());
    let space = AddressSpace::with_source(Granule::K4, fake.clone()).unwrap();
    let all = pages(0, 2 * WINDOW);
    space.map(all, 0, Access::ReadWrite).unwrap();
    space.start_tracking().unwrap();
    let bitmap = FileBitmap::new(scratch(2 << 16), 0, 2 << 16);
    let bitmap = bitmap.with_window(1 << 16).unwrap();
    for n in [7, WINDOW + 3] {
        fake.dirty(n);
    }
    // The file loses its second window after the first page was recorded.
    let cut = bitmap.file().try_clone().unwrap();
    fake.with(|s| s.on_page = Some((8, Box::new(move || cut.set_len(1 << 16).unwrap()))));
    let request = HarvestRequest::new(all, Granule::K4);
    let lease = space.harvest(&request, UserBitmap::file(&bitmap)).unwrap();
    let stopped = lease
        .stopped()
        .unwrap_or_else(|| panic!("the harvest went on"));
    assert!(matches!(
        stopped.error,
        Error::Bitmap(BitmapError::Shrank { len, needed }) if len == 1 << 16 && needed == 2 << 16
    ));
    assert_eq!(stopped.at, Iova::new((WINDOW + 3) * PAGE));
    let dirty = || fake.with(|s| s.dirty.iter().copied().collect::<Vec<_>>());
    assert_eq!(dirty(), [WINDOW + 3], "what cannot be recorded stays");
    // The lease has the pages below the stop. A window of it that can no longer be read counts as
    // dirty.
    let lease = lease.partial().sync().unwrap();
    assert_eq!(lease.report().bits_set, 1);
    let mut runs = lease.runs();
    let rest = pages(WINDOW, 3);
    assert_eq!(runs.by_ref().collect::<Vec<_>>(), [pages(7, 1), rest]);
    assert!(matches!(runs.error(), Some(BitmapError::Shrank { .. })));
    drop(runs);
    lease.abort();
    let mut words = vec![0; 2 * WINDOW as usize / 64];
    let view = space.peek(&request, UserBitmap::new(&mut words)).unwrap();
    let rest = pages(WINDOW, 4); // with the page that could not be recorded
    assert_eq!(view.runs().collect::<Vec<_>>(), [pages(7, 1), rest]);
    // A new view of the file is refused. A superset would lose pages here, in a subtraction.
    let unreadable = UserBitmap::file(&bitmap).view(all, Granule::K4);
    assert!(matches!(unreadable, Err(BitmapError::TooShort { .. })));
}

#[test]
fn what_cannot_be_read_is_neither_merged_nor_taken_away() {
    let bitmap = FileBitmap::new(scratch(2 << 16), 0, 2 << 16)
        .with_window(1 << 16)
        .unwrap();
    let view = UserBitmap::file(&bitmap)
        .view(pages(0, 2 * WINDOW), Granule::K4)
        .unwrap();
    view.sink().record(pages(7, 1)).unwrap();
    bitmap.file().set_len(1 << 16).unwrap();
    let mut words = vec![u64::MAX; 2 * WINDOW as usize / 64];
    let other = UserBitmap::new(&mut words)
        .view(view.range(), Granule::K4)
        .unwrap();
    assert!(matches!(
        other.and_not(&view),
        Err(BitmapError::Shrank { .. })
    ));
    assert_eq!(other.count(), 2 * WINDOW - 1);
    assert!(matches!(
        view.and_not(&other),
        Err(BitmapError::Shrank { .. })
    ));
    assert!(matches!(
        view.or_into(&other),
        Err(BitmapError::Shrank { .. })
    ));
    assert!(matches!(
        other.or_into(&view),
        Err(BitmapError::Shrank { .. })
    ));
}

/// A window that cannot be opened stops a harvest in the middle of marks whose summary bit it has
/// cleared. The next harvest must still find these marks.
#[test]
fn marks_that_a_lost_window_could_not_take_are_found_again() {
    let fake = Arc::new(Fake::default());
    let space = AddressSpace::with_source(Granule::K4, fake.clone()).unwrap();
    let all = pages(0, 2 * WINDOW);
    space.map(all, 0, Access::ReadWrite).unwrap();
    space.start_tracking().unwrap();
    let bitmap = FileBitmap::new(scratch(2 << 16), 0, 2 << 16);
    let bitmap = bitmap.with_window(1 << 16).unwrap();
    let marked = [7, WINDOW + 3, WINDOW + 700];
    for n in marked {
        space.mark(pages(n, 1)).unwrap();
    }
    let cut = bitmap.file().try_clone().unwrap();
    fake.with(|s| s.on_page = Some((8, Box::new(move || cut.set_len(1 << 16).unwrap()))));
    let request = HarvestRequest::new(all, Granule::K4);
    let lease = space.harvest(&request, UserBitmap::file(&bitmap)).unwrap();
    assert!(lease.stopped().is_some(), "the harvest went on");
    lease.partial().sync().unwrap().commit();
    let mut words = vec![0; 2 * WINDOW as usize / 64];
    let lease = space
        .harvest(&request, UserBitmap::new(&mut words))
        .unwrap();
    let runs: Vec<_> = lease.sync().unwrap().runs().collect();
    assert_eq!(runs, [pages(WINDOW + 3, 1), pages(WINDOW + 700, 1)]);
}

/// One source has reported a page, another source stops below that page, and the file has lost the
/// window with the page's bit. The recorded pages cannot be read back, so the whole window is put
/// back.
#[test]
fn what_a_lost_window_had_above_a_stop_is_put_back() {
    let (space, first, second) = common::two_sources();
    let all = pages(0, 2 * WINDOW);
    space.map(all, 0, Access::ReadWrite).unwrap();
    space.start_tracking().unwrap();
    let bitmap = FileBitmap::new(scratch(2 << 16), 0, 2 << 16);
    let bitmap = bitmap.with_window(1 << 16).unwrap();
    for n in [7, WINDOW + 3] {
        first.dirty(n);
    }
    let cut = bitmap.file().try_clone().unwrap();
    second.with(|s| {
        s.on_read = Some(Box::new(move || cut.set_len(1 << 16).unwrap()));
        s.stop_at = Some(10);
    });
    let request = HarvestRequest::new(all, Granule::K4);
    let lease = space.harvest(&request, UserBitmap::file(&bitmap)).unwrap();
    let stopped = lease
        .stopped()
        .unwrap_or_else(|| panic!("the harvest went on"));
    assert_eq!(stopped.at, Iova::new(10 * PAGE));
    let lease = lease.partial().sync().unwrap();
    assert_eq!(lease.runs().collect::<Vec<_>>(), [pages(7, 1)]);
    lease.commit();
    second.with(|s| s.stop_at = None);
    let mut words = vec![0; 2 * WINDOW as usize / 64];
    let view = space.peek(&request, UserBitmap::new(&mut words)).unwrap();
    let lost = pages(WINDOW, WINDOW);
    assert_eq!(view.runs().collect::<Vec<_>>(), [lost]);
}

/// A source that truncates the file of one thread after its first window.
struct Cuts {
    file: std::fs::File,
    thread: std::sync::Mutex<Option<std::thread::ThreadId>>,
}

impl DirtySource for Cuts {
    fn map(&self, _: &Mapping) -> Result<(), Error> {
        Ok(())
    }

    fn unmap(&self, _: IovaRange, _: &mut FlushGather, _: &mut dyn FnMut(IovaRange)) {}

    fn set_tracking(&self, _: Tracking) -> Result<(), Error> {
        Ok(())
    }

    fn read_and_clear(&self, _: IovaRange, _: &mut LeafSink<'_, '_>) -> Result<(), Stopped> {
        if *self.thread.lock().unwrap() == Some(std::thread::current().id()) {
            self.file.set_len(1 << 16).unwrap();
        }
        Ok(())
    }

    fn peek(&self, _: IovaRange, _: &mut Sink<'_>) -> Result<(), Stopped> {
        Ok(())
    }

    fn invalidate(&self, _: &FlushGather) -> Result<Invalidated, Error> {
        Ok(Invalidated::default())
    }
}

/// A cache line of marks lies in two windows, of which the second cannot be mapped. A harvest had
/// checked the first window only, cleared the summary bit of the line, and then failed. Another
/// harvest, which came in between, missed a mark.
#[test]
fn a_line_across_two_windows_is_not_hidden() {
    // Of the 64 bytes of the line, 32 lie in each window.
    let (offset, bytes) = ((1 << 16) - 32, 64);
    let file = scratch(offset + bytes);
    let cuts = Arc::new(Cuts {
        file: file.try_clone().unwrap(),
        thread: std::sync::Mutex::new(None),
    });
    let space = AddressSpace::with_source(Granule::K4, cuts.clone()).unwrap();
    space.map(pages(0, 512), 0, Access::ReadWrite).unwrap();
    space.start_tracking().unwrap();
    let bitmap = FileBitmap::new(file, offset, bytes);
    let bitmap = bitmap.with_window(1 << 16).unwrap();
    let request = HarvestRequest::new(pages(0, 512), Granule::K4);
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let failures = scope.spawn(|| {
            *cuts.thread.lock().unwrap() = Some(std::thread::current().id());
            let mut failures = 0u64;
            while !stop.load(Relaxed) {
                bitmap.file().set_len(offset + bytes).unwrap();
                let harvest = space.harvest(&request, UserBitmap::file(&bitmap));
                if let Some(stopped) = harvest.unwrap().stopped() {
                    failures += u64::from(matches!(
                        stopped.error,
                        Error::Bitmap(BitmapError::Shrank { .. })
                    ));
                }
            }
            failures
        });
        let missed = (0..20_000)
            .filter(|_| {
                space.mark(pages(300, 1)).unwrap();
                let mut words = [0u64; 8];
                let bitmap = UserBitmap::new(&mut words);
                let lease = space.harvest(&request, bitmap).unwrap();
                lease.sync().unwrap().commit();
                words[300 / 64] >> (300 % 64) & 1 == 0
            })
            .count();
        stop.store(true, Relaxed);
        let failures = failures.join().unwrap();
        assert!(failures > 0, "nothing failed, so nothing was tested");
        assert_eq!(missed, 0, "among {failures} harvests that failed");
    });
}

/// A file that cannot be mapped for writing.
fn read_only(writable: &std::fs::File) -> FileBitmap {
    use std::os::fd::AsRawFd;
    let path = format!("/proc/self/fd/{}", writable.as_raw_fd());
    FileBitmap::new(std::fs::File::open(path).unwrap(), 0, 64)
}

/// An unmap records dirty pages while the areas are still mapped. If it cannot record them, the
/// areas stay mapped and their pages stay dirty.
#[test]
fn an_unmap_that_cannot_record_leaves_its_areas() {
    let space = AddressSpace::new(Granule::K4);
    space.map(pages(0, 512), 0, Access::ReadWrite).unwrap();
    space.start_tracking().unwrap();
    space.mark(pages(7, 2)).unwrap();
    let writable = scratch(64);
    let read_only = read_only(&writable);
    let unmapped = space.unmap(pages(0, 512), Granule::K4, UserBitmap::file(&read_only));
    assert!(matches!(
        unmapped,
        Err(Error::Bitmap(BitmapError::Window { .. }))
    ));
    assert_eq!(space.mappings().len(), 1);
    assert_eq!(space.stats().discarded_bytes, 0);
    let mut words = [0u64; 8];
    let bitmap = UserBitmap::new(&mut words);
    let (unmapped, view) = space.unmap(pages(0, 512), Granule::K4, bitmap).unwrap();
    assert_eq!(unmapped.dirty_bytes, 2 * 4096);
    assert_eq!(view.runs().collect::<Vec<_>>(), [pages(7, 2)]);
}

/// One thread harvests again and again into a file that cannot be mapped for writing, and each
/// harvest fails. The other thread marks page 0 and looks for it by `find`, which must see it every
/// time.
fn never_hidden_by_harvests_that_fail(mut find: impl FnMut(&AddressSpace) -> bool) {
    let space = AddressSpace::new(Granule::K4);
    space.map(pages(0, 512), 0, Access::ReadWrite).unwrap();
    space.start_tracking().unwrap();
    let writable = scratch(64);
    let read_only = read_only(&writable);
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let failures = scope.spawn(|| {
            let request = HarvestRequest::new(pages(0, 512), Granule::K4);
            let mut failures = 0u64;
            while !stop.load(Relaxed) {
                let bitmap = UserBitmap::file(&read_only);
                // Between two rounds there is no area, or no dirty page.
                let request = request.holes(Holes::Stop);
                if let Some(stopped) = space.harvest(&request, bitmap).unwrap().stopped() {
                    failures += u64::from(matches!(
                        stopped.error,
                        Error::Bitmap(BitmapError::Window { .. })
                    ));
                }
            }
            failures
        });
        let missed = (0..20_000)
            .filter(|_| {
                space.mark(pages(0, 1)).unwrap();
                !find(&space)
            })
            .count();
        stop.store(true, Relaxed);
        let failures = failures.join().unwrap();
        assert!(failures > 0, "nothing failed, so nothing was tested");
        assert_eq!(missed, 0, "among {failures} harvests that failed");
    });
}

/// A harvest cleared the summary over a line of marks, then found that it could not map the window
/// of the file, and put the summary back. A harvest that came in between saw a clean summary and
/// passed over a mark that had returned before the harvest began, although no lease had that page.
#[test]
fn a_harvest_that_cannot_record_hides_nothing_from_another() {
    never_hidden_by_harvests_that_fail(|space| {
        let mut words = [0u64; 8];
        let request = HarvestRequest::new(pages(0, 512), Granule::K4);
        let lease = space
            .harvest(&request, UserBitmap::new(&mut words))
            .unwrap();
        lease.sync().unwrap().commit();
        words[0] & 1 == 1
    });
}

/// The same with an unmap: it returned without the page, which stayed as a mark in an area that was
/// gone, and was not counted.
#[test]
fn a_harvest_that_cannot_record_hides_nothing_from_an_unmap() {
    never_hidden_by_harvests_that_fail(|space| {
        let mut words = [0u64; 8];
        let bitmap = UserBitmap::new(&mut words);
        let (gone, _) = space.unmap(pages(0, 512), Granule::K4, bitmap).unwrap();
        space.map(pages(0, 512), 0, Access::ReadWrite).unwrap();
        // An abort that cannot read its file puts back everything, so more pages than this one may
        // be dirty.
        gone.dirty_bytes >= u128::from(PAGE) && words[0] & 1 == 1
    });
}

/// An unmap has moved what was dirty in a domain to the marks when the file turns out to be too
/// short. The area stays, and a harvest of that domain alone, which looks at no marks, found
/// nothing: its consumer lost the page.
#[test]
fn an_unmap_that_cannot_record_leaves_each_domain_what_it_had() {
    let (ours, other) = (Arc::new(Fake::default()), Arc::new(Fake::default()));
    let space = AddressSpace::new(Granule::K4);
    let [id, other_id] = [&ours, &other].map(|source| space.attach(source.clone()).unwrap());
    let all = pages(0, 2 * WINDOW);
    space.map(all, 0, Access::ReadWrite).unwrap();
    space.start_tracking().unwrap();
    let taken = |scope| {
        let mut words = vec![0; 2 * WINDOW as usize / 64];
        let request = HarvestRequest::new(all, Granule::K4).in_scope(scope);
        let lease = space.harvest(&request, UserBitmap::new(&mut words));
        let lease = lease.unwrap().sync().unwrap();
        let runs: Vec<IovaRange> = lease.runs().collect();
        lease.commit();
        runs
    };
    // One page in its table, and one that a lease put back.
    let [kept, dirty] = [WINDOW + 3, WINDOW + 9];
    ours.dirty(kept);
    let mut words = vec![0; 2 * WINDOW as usize / 64];
    let request = HarvestRequest::new(all, Granule::K4).in_scope(Scope::Domain(id));
    let lease = space.harvest(&request, UserBitmap::new(&mut words));
    lease.unwrap().abort();
    ours.dirty(dirty);
    let bitmap = FileBitmap::new(scratch(2 << 16), 0, 2 << 16);
    let bitmap = bitmap.with_window(1 << 16).unwrap();
    let cut = bitmap.file().try_clone().unwrap();
    ours.with(|s| s.on_unmap = Some(Box::new(move || cut.set_len(1 << 16).unwrap())));
    let refused = space.unmap(all, Granule::K4, UserBitmap::file(&bitmap));
    assert!(
        matches!(refused, Err(Error::Bitmap(BitmapError::Shrank { .. }))),
        "{refused:?}"
    );
    assert_eq!(taken(Scope::Domain(other_id)), []);
    let both = [pages(kept, 1), pages(dirty, 1)];
    assert_eq!(taken(Scope::Domain(id)), both);
    // A superset, because the marks have these pages as well.
    assert_eq!(taken(Scope::All), both);
    let unmapped = space.unmap_discarding(all).unwrap();
    assert_eq!((unmapped.areas, unmapped.discarded_bytes), (1, 0));
}
