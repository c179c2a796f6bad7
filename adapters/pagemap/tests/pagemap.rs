//! The adapter of process memory on the kernel of this machine. If the kernel does not support it,
//! each test reports that it is skipped.
#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used)] // helpers of tests

#[path = "../../../tests/common_skip/mod.rs"]
mod common_skip;

use std::collections::BTreeSet;
use std::fs::File;
use std::io::Write;
use std::os::fd::{AsRawFd, FromRawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed, Ordering::SeqCst};

use common_skip::skip;
use dirtymap::{Access, AddressSpace, HarvestRequest, Iova, IovaRange, UserBitmap};
use dirtymap_pagemap::{GivenBack, PagemapError, ProcessMemory};

/// The features of the kernel, or `None` after a message with the reason.
fn tracker() -> Option<Arc<ProcessMemory>> {
    match ProcessMemory::new() {
        Ok(memory) => Some(Arc::new(memory)),
        Err(error @ PagemapError::Unsupported { .. }) => {
            skip(error);
            None
        }
        Err(error) => panic!("{error}"),
    }
}

/// Anonymous memory of `pages` pages, of 4 KiB on most machines. It is unmapped when it is dropped.
struct Map {
    address: *mut u8,
    pages: u64,
    page: u64,
}

// SAFETY: memory of the process, written through atomics and volatile writes.
unsafe impl Sync for Map {}

impl Map {
    fn flags(pages: u64, page: u64, flags: i32, fd: i32) -> std::io::Result<Self> {
        let bytes = (pages * page) as usize;
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping, where the kernel likes.
        let address = unsafe { libc::mmap(std::ptr::null_mut(), bytes, protection, flags, fd, 0) };
        if address == libc::MAP_FAILED {
            return Err(std::io::Error::last_os_error());
        }
        Ok(Map {
            address: address.cast(),
            pages,
            page,
        })
    }

    /// Without huge pages.
    fn new(pages: u64, page: u64) -> Self {
        let map = Map::flags(pages, page, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1).unwrap();
        map.advise(0, pages, libc::MADV_NOHUGEPAGE);
        map
    }

    fn at(&self, page: u64) -> *mut u8 {
        assert!(page <= self.pages);
        // SAFETY: inside the mapping, or one past its end.
        unsafe { self.address.add((page * self.page) as usize) }
    }

    fn host(&self) -> u64 {
        self.address.addr() as u64
    }

    fn word(&self, page: u64) -> &AtomicU64 {
        assert!(page < self.pages);
        // SAFETY: aligned, inside the mapping, which lives as long as the reference, and used as an
        // atomic alone.
        unsafe { &*self.at(page).cast() }
    }

    fn write(&self, page: u64) {
        self.word(page).fetch_add(1, SeqCst);
    }

    fn advise(&self, first: u64, n: u64, advice: i32) {
        // SAFETY: of memory of this mapping, whose contents no reference promises.
        let result =
            unsafe { libc::madvise(self.at(first).cast(), (n * self.page) as usize, advice) };
        assert!(result == 0 || advice == libc::MADV_NOHUGEPAGE || advice == libc::MADV_HUGEPAGE);
    }

    fn unmap(&self, first: u64, n: u64) {
        let bytes = (n * self.page) as usize;
        // SAFETY: of memory of this mapping, which the test does not use any more.
        let result = unsafe { libc::munmap(self.at(first).cast(), bytes) };
        assert_eq!(result, 0);
    }
}

impl Drop for Map {
    fn drop(&mut self) {
        // SAFETY: of memory of this mapping, to which no reference is left; parts that are gone do
        // no harm.
        unsafe { libc::munmap(self.address.cast(), (self.pages * self.page) as usize) };
    }
}

/// A file in memory, with these flags of `memfd_create`.
fn memfd(flags: libc::c_uint) -> std::io::Result<File> {
    // SAFETY: a name that ends with a zero.
    let fd = unsafe { libc::memfd_create(c"dirtymap".as_ptr(), libc::MFD_CLOEXEC | flags) };
    if fd < 0 {
        return Err(std::io::Error::last_os_error());
    }
    // SAFETY: the descriptor was just opened, and nothing else has it.
    Ok(unsafe { File::from_raw_fd(fd) })
}

/// Runs `call` in a child of `fork`, and returns its result.
///
/// The child has one thread, and copies of all locks as they were. So `call` must take no lock that
/// another test may hold, and must not print.
fn in_child(call: impl FnOnce() -> u8) -> i32 {
    // SAFETY: the child runs `call`, which keeps to what is said above, and ends.
    let pid = unsafe { libc::fork() };
    assert!(pid >= 0, "{}", std::io::Error::last_os_error());
    if pid == 0 {
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(call));
        // SAFETY: ends the child at once: no destructor and no handler of the parent runs.
        unsafe { libc::_exit(i32::from(result.unwrap_or(u8::MAX))) };
    }
    let mut status = 0;
    // SAFETY: of the child above; the call writes one number.
    let waited = unsafe { libc::waitpid(pid, &raw mut status, 0) };
    assert_eq!(waited, pid);
    assert!(libc::WIFEXITED(status), "the child was killed: {status:#x}");
    libc::WEXITSTATUS(status)
}

/// A tracked space over `map`, at addresses of its own.
struct Tracked {
    space: AddressSpace,
    memory: Arc<ProcessMemory>,
    pages: u64,
    page: u64,
}

/// The addresses at which it is reported.
const BASE: u64 = 1 << 46;

impl Tracked {
    fn new(memory: Arc<ProcessMemory>, map: &Map) -> Self {
        Tracked::with(memory, map, GivenBack::Reported)
    }

    fn with(memory: Arc<ProcessMemory>, map: &Map, given_back: GivenBack) -> Self {
        let page = memory.page();
        let space = AddressSpace::with_source(page, Arc::clone(&memory)).unwrap();
        let tracked = Tracked {
            space,
            memory,
            pages: map.pages,
            page: page.bytes(),
        };
        let all = tracked.range(0, map.pages);
        let added = tracked.memory.add_with(all, map.host(), given_back);
        added.unwrap();
        tracked.space.map(all, 0, Access::ReadWrite).unwrap();
        tracked.space.start_tracking().unwrap();
        tracked
    }

    fn range(&self, first: u64, n: u64) -> IovaRange {
        IovaRange::from_len(Iova::new(BASE + first * self.page), n * self.page).unwrap()
    }

    fn words(&self) -> Vec<u64> {
        vec![0; self.pages.div_ceil(64) as usize]
    }

    fn request(&self, first: u64, n: u64) -> HarvestRequest<'static> {
        HarvestRequest::new(self.range(first, n), self.memory.page())
    }

    fn numbers(&self, runs: impl Iterator<Item = IovaRange>) -> Vec<u64> {
        let page = |iova: Iova| (iova.get() - BASE) / self.page;
        runs.flat_map(|run| page(run.start())..=page(run.last()))
            .collect()
    }

    fn harvest(&self, first: u64, n: u64) -> Vec<u64> {
        let mut words = self.words();
        let request = self.request(first, n);
        let lease = self
            .space
            .harvest(&request, UserBitmap::new(&mut words))
            .unwrap();
        let lease = lease.sync().unwrap();
        let found = self.numbers(lease.runs());
        lease.commit();
        found
    }

    fn harvest_all(&self) -> Vec<u64> {
        self.harvest(0, self.pages)
    }
}

/// xorshift64*.
struct Random(u64);

impl Random {
    fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) % n
    }
}

/// Page for page: no page is missing, and without huge pages none is too much.
#[test]
fn random_writes_come_out_as_they_were_made() {
    let Some(memory) = tracker() else { return };
    let map = Map::new(5000, memory.page().bytes());
    (0..2500).for_each(|page| map.write(page)); // the rest is not even populated
    let tracked = Tracked::new(memory, &map);
    let mut random = Random(0x51ed_270b);
    let mut dirty = BTreeSet::new();
    for round in 0..60 {
        for _ in 0..random.below(400) {
            let page = random.below(5000);
            map.write(page);
            dirty.insert(page);
        }
        let first = random.below(5000);
        let n = 1 + random.below(5000 - first);
        let expected: Vec<u64> = dirty.range(first..first + n).copied().collect();
        let mut words = tracked.words();
        let request = tracked.request(first, n);
        let lease = tracked
            .space
            .harvest(&request, UserBitmap::new(&mut words))
            .unwrap();
        let lease = lease.sync().unwrap();
        assert_eq!(tracked.numbers(lease.runs()), expected, "round {round}");
        if random.below(3) > 0 {
            lease.commit();
            expected.iter().for_each(|page| assert!(dirty.remove(page)));
        }
    }
    assert_eq!(tracked.harvest_all(), dirty.into_iter().collect::<Vec<_>>());
    assert_eq!(tracked.harvest_all(), [0u64; 0]);
}

/// With more than 512 regions in one call, the kernel reports a stop far before the address that it
/// reached.
#[test]
fn more_than_512_regions_come_out_once_and_whole() {
    let Some(memory) = tracker() else { return };
    let map = Map::new(9000, memory.page().bytes());
    let tracked = Tracked::new(memory, &map);
    for every in [2, 3, 5, 8] {
        let written: Vec<u64> = (0..9000).step_by(every).collect();
        written.iter().for_each(|page| map.write(*page));
        let mut words = tracked.words();
        let request = tracked.request(0, 9000);
        let peeked = tracked
            .space
            .peek(&request, UserBitmap::new(&mut words))
            .unwrap();
        assert_eq!(tracked.numbers(peeked.runs()), written);
        assert_eq!(tracked.harvest_all(), written);
        assert_eq!(tracked.harvest_all(), [0u64; 0]);
    }
}

#[test]
fn a_read_is_no_write_and_the_kernel_writes_too() {
    let Some(memory) = tracker() else { return };
    let map = Map::new(64, memory.page().bytes());
    let tracked = Tracked::new(memory, &map);
    assert_eq!(map.word(5).load(SeqCst), 0);
    assert_eq!(
        tracked.harvest_all(),
        [0u64; 0],
        "a read of a page that was never there"
    );
    map.write(6);
    assert_eq!(tracked.harvest_all(), [6]);
    assert_eq!(map.word(6).load(SeqCst), 1);
    assert_eq!(tracked.harvest_all(), [0u64; 0]);
    // The kernel writes the memory, in read(2).
    let (from, mut to) = std::io::pipe().unwrap();
    to.write_all(b"by the kernel").unwrap();
    // SAFETY: 13 bytes of the mapping, which no other thread uses meanwhile.
    let read = unsafe { libc::read(from.as_raw_fd(), map.at(7).cast(), 13) };
    assert_eq!(read, 13);
    assert_eq!(tracked.harvest_all(), [7]);
}

/// Huge pages: a write makes pages of the same huge page dirty and no others. (This kernel splits
/// the huge page, and one small page is dirty.) A request may cut a huge page.
#[test]
fn huge_pages_are_dirty_as_a_whole_or_split() {
    let Some(memory) = tracker() else { return };
    let page = memory.page().bytes();
    let huge = (2 << 20) / page;
    let map = Map::flags(4 * huge, page, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1).unwrap();
    map.advise(0, 4 * huge, libc::MADV_HUGEPAGE);
    (0..4 * huge).for_each(|page| map.write(page));
    let first_huge = (map.host().next_multiple_of(2 << 20) - map.host()) / page;
    if !std::fs::read_to_string("/proc/self/smaps")
        .unwrap()
        .lines()
        .any(|line| line.starts_with("AnonHugePages:") && !line.ends_with(" 0 kB"))
    {
        skip("this system gives no huge pages");
        return;
    }
    let tracked = Tracked::new(memory, &map);
    assert_eq!(tracked.harvest_all(), [0u64; 0]);
    let written = first_huge + huge + 77;
    map.write(written);
    let found = tracked.harvest_all();
    assert!(found.contains(&written));
    let around = first_huge + huge..first_huge + 2 * huge;
    assert!(found.iter().all(|page| around.contains(page)), "{found:?}");
    assert_eq!(tracked.harvest_all(), [0u64; 0]);
    // A request that cuts the huge page, and one for the rest.
    map.write(written);
    let part = tracked.harvest(written, 3);
    assert!(part.contains(&written) && part.len() <= 3, "{part:?}");
    let rest = tracked.harvest_all();
    assert!(rest.iter().all(|page| around.contains(page)));
    assert_eq!(tracked.harvest_all(), [0u64; 0]);
    map.write(written + 1);
    assert!(tracked.harvest_all().contains(&(written + 1)));
}

#[test]
fn memory_that_is_unmapped_stops_the_harvest_and_loses_nothing_else() {
    let Some(memory) = tracker() else { return };
    let map = Map::new(3000, memory.page().bytes());
    let tracked = Tracked::new(memory, &map);
    [10, 900, 1100, 2000]
        .iter()
        .for_each(|page| map.write(*page));
    map.unmap(1000, 200);
    let mut words = tracked.words();
    let request = tracked.request(0, 3000);
    let refused = tracked.space.harvest(&request, UserBitmap::new(&mut words));
    let lease = refused.unwrap();
    let stopped = lease.stopped().unwrap_or_else(|| panic!("a hole"));
    assert_eq!(stopped.at, tracked.range(1000, 1).start());
    let text = stopped.error.to_string();
    let hole = map.host() + 1000 * map.page;
    assert!(text.contains(&format!("{hole:#x} was unmapped")), "{text}");
    let lease = lease.partial().sync().unwrap();
    assert_eq!(tracked.numbers(lease.runs()), [10, 900]);
    lease.commit();
    assert_eq!(tracked.harvest(1200, 1800), [2000]);
    map.write(2001);
    tracked.memory.remove(tracked.range(0, 3000)).unwrap();
    let mut words = tracked.words();
    let bitmap = UserBitmap::new(&mut words);
    let (_, view) = tracked
        .space
        .unmap(tracked.range(0, 3000), tracked.memory.page(), bitmap)
        .unwrap();
    assert_eq!(tracked.numbers(view.runs()), [2001]);
}

/// A program maps other memory in the place of tracked memory: the kernel does not track writes to
/// it.
#[test]
fn another_mapping_in_the_place_of_the_memory_does_not_pass_for_clean() {
    let Some(memory) = tracker() else { return };
    let map = Map::new(3000, memory.page().bytes());
    let tracked = Tracked::new(memory, &map);
    map.write(10);
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED;
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    let bytes = 200 * map.page as usize;
    // SAFETY: over memory of this mapping, whose contents no reference promises.
    let anew = unsafe { libc::mmap(map.at(1000).cast(), bytes, protection, flags, -1, 0) };
    assert_ne!(anew, libc::MAP_FAILED);
    map.write(1100);
    let mut words = tracked.words();
    let request = tracked.request(0, 3000);
    let refused = tracked.space.harvest(&request, UserBitmap::new(&mut words));
    let lease = refused.unwrap();
    let stopped = lease
        .stopped()
        .unwrap_or_else(|| panic!("page 1100 was written and is not tracked"));
    assert!(stopped.error.to_string().contains("PAGEMAP_SCAN failed"));
    drop(lease);
    // The memory is added again. Pages that were dirty before are still reported.
    tracked.memory.remove(tracked.range(0, 3000)).unwrap();
    tracked
        .memory
        .add(tracked.range(0, 3000), map.host())
        .unwrap();
    let found = tracked.harvest_all();
    assert!(found.contains(&10) && found.contains(&1100));
    map.write(1100);
    assert_eq!(tracked.harvest_all(), [1100]);
}

/// Pages that are returned to the kernel read as zero from then on, so they count as written.
#[test]
fn pages_that_are_given_back_are_reported() {
    let Some(memory) = tracker() else { return };
    let map = Map::new(600, memory.page().bytes());
    (0..600).for_each(|page| map.write(page));
    let tracked = Tracked::new(memory, &map);
    map.advise(100, 3, libc::MADV_DONTNEED);
    let found = tracked.harvest_all();
    assert!(
        [100, 101, 102].iter().all(|page| found.contains(page)),
        "{found:?}"
    );
    map.write(101);
    assert_eq!(tracked.harvest_all(), [101]);
}

#[test]
fn shared_memory_is_tracked_and_other_processes_are_not() {
    let Some(memory) = tracker() else { return };
    let page = memory.page().bytes();
    let file = memfd(0).unwrap();
    file.set_len(300 * page).unwrap();
    let map = Map::flags(300, page, libc::MAP_SHARED, file.as_raw_fd()).unwrap();
    let tracked = Tracked::with(memory, &map, GivenBack::Marked);
    [0, 131, 299].iter().for_each(|page| map.write(*page));
    assert_eq!(tracked.harvest_all(), [0, 131, 299]);
    assert_eq!(tracked.harvest_all(), [0u64; 0]);
    // Another mapping of the same file has page tables of its own, so its writes have to be marked.
    let other = Map::flags(300, page, libc::MAP_SHARED, file.as_raw_fd()).unwrap();
    other.write(7);
    tracked.space.mark(tracked.range(8, 1)).unwrap();
    let found = tracked.harvest_all();
    assert!(found.contains(&8) && !found.contains(&7), "{found:?}");
}

#[test]
fn what_is_dirty_when_tracking_ends_stays_and_what_was_before_it_begins_does_not() {
    let Some(memory) = tracker() else { return };
    let map = Map::new(100, memory.page().bytes());
    let tracked = Tracked::new(memory, &map);
    map.write(1);
    tracked.space.stop_tracking().unwrap();
    map.write(2);
    assert_eq!(tracked.harvest_all(), [1]);
    map.write(3);
    tracked.space.start_tracking().unwrap();
    map.write(4);
    assert_eq!(tracked.harvest_all(), [4]);
}

/// Two threads write, one harvests and copies. After the last harvest, the copy equals the memory.
#[test]
fn writers_that_run_on_lose_nothing() {
    let Some(memory) = tracker() else { return };
    let map = Map::new(2000, memory.page().bytes());
    let tracked = Tracked::new(memory, &map);
    let mut copy = vec![0u64; 2000];
    let stop = AtomicBool::new(false);
    let mut rounds = 0;
    let mut round = || {
        let mut words = tracked.words();
        let request = tracked.request(0, 2000);
        let lease = tracked
            .space
            .harvest(&request, UserBitmap::new(&mut words))
            .unwrap();
        let lease = lease.sync().unwrap();
        for page in tracked.numbers(lease.runs()) {
            copy[page as usize] = map.word(page).load(Relaxed);
        }
        // Every third lease is dropped, and all of its pages are reported again.
        rounds += 1;
        if rounds % 3 != 0 {
            lease.commit();
        }
    };
    std::thread::scope(|scope| {
        for seed in 1..3 {
            let (map, stop) = (&map, &stop);
            scope.spawn(move || {
                let mut random = Random(seed * 0x1234_5678_9abc);
                while !stop.load(Relaxed) {
                    map.write(random.below(2000));
                }
            });
        }
        let end = std::time::Instant::now() + std::time::Duration::from_millis(700);
        while std::time::Instant::now() < end {
            round();
        }
        stop.store(true, Relaxed);
    });
    (0..3).for_each(|_| round());
    assert!(rounds > 5);
    let memory: Vec<u64> = (0..2000).map(|page| map.word(page).load(Relaxed)).collect();
    assert!(memory.iter().any(|word| *word > 1));
    let lost: Vec<usize> = (0..2000).filter(|n| copy[*n] != memory[*n]).collect();
    assert_eq!(lost, [] as [usize; 0]);
}

#[test]
fn what_cannot_be_tracked_is_refused() {
    let Some(memory) = tracker() else { return };
    let page = memory.page().bytes();
    let map = Map::new(10, page);
    let range =
        |first: u64, n: u64| IovaRange::from_len(Iova::new(first * page), n * page).unwrap();
    map.unmap(4, 1);
    let hole = map.host() + 4 * page;
    let refused = memory.add(range(0, 10), map.host());
    assert!(matches!(refused, Err(PagemapError::Unmapped { address }) if address == hole));
    memory.add(range(0, 4), map.host()).unwrap();
    // Two trackers of the same memory would take each other's pages: the kernel has one tracker for
    // each mapping.
    let twin = ProcessMemory::new().unwrap();
    let refused = twin.add(range(0, 4), map.host());
    assert!(matches!(
        refused,
        Err(PagemapError::Call {
            call: "UFFDIO_REGISTER",
            ..
        })
    ));
    drop(memory);
    twin.add(range(0, 4), map.host()).unwrap();
}

/// QEMU discards memory of its guest, and a balloon returns page after page. When a whole huge page
/// is returned, or the last page of a page table on a kernel that then frees the table, the scan
/// for writes finds no entry to look at: two harvests reported nothing, although the memory was
/// zero.
#[test]
fn all_that_is_given_back_of_private_memory_is_reported() {
    let Some(memory) = tracker() else { return };
    let page = memory.page().bytes();
    let table = page / 8;
    let parts = [
        (0, table),
        (0, 2 * table),
        (table, table),
        (3, 5),
        (table - 1, 2),
    ];
    for huge in [false, true] {
        for ((from, n), read) in parts
            .into_iter()
            .flat_map(|part| [(part, false), (part, true)])
        {
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
            let map = Map::flags(4 * table, page, flags, -1).unwrap();
            let advice = [libc::MADV_NOHUGEPAGE, libc::MADV_HUGEPAGE][usize::from(huge)];
            map.advise(0, 4 * table, advice);
            (0..4 * table).for_each(|page| map.write(page));
            let tracked = Tracked::new(Arc::clone(&memory), &map);
            // The start of the first page table that lies inside as a whole.
            let bytes = table * page;
            let first = (map.host().next_multiple_of(bytes) - map.host()) / page;
            let from = first + from;
            let what = format!("{n} pages from {from} on, huge: {huge}, read: {read}");
            map.advise(from, n, libc::MADV_DONTNEED);
            if read {
                // A page that is read after that is a page of zeroes, so it has changed as well.
                assert_eq!(map.word(from).load(SeqCst), 0);
            }
            let given_back: Vec<u64> = (from..from + n).collect();
            let includes = |found: &[u64]| given_back.iter().all(|page| found.contains(page));
            let mut words = tracked.words();
            let request = tracked.request(0, 4 * table);
            let bitmap = UserBitmap::new(&mut words);
            let peeked = tracked.space.peek(&request, bitmap).unwrap();
            let peeked = tracked.numbers(peeked.runs());
            let found = tracked.harvest_all();
            assert!(includes(&peeked), "{what}");
            assert!(includes(&found), "{what}");
            if !huge {
                assert_eq!((&peeked, &found), (&given_back, &given_back), "{what}");
            }
            assert_eq!(tracked.harvest_all(), [0u64; 0], "{what}");
            map.write(from + 1);
            assert!(tracked.harvest_all().contains(&(from + 1)), "{what}");
            // The pages are returned once more, with and without writes in between.
            map.advise(from, n, libc::MADV_DONTNEED);
            assert!(includes(&tracked.harvest_all()), "{what}, again");
            assert_eq!(tracked.harvest_all(), [0u64; 0], "{what}, again");
            tracked.memory.remove(tracked.range(0, 4 * table)).unwrap();
        }
    }
}

/// Pages of MADV_FREE keep their contents until the kernel takes them, and read as zero from then
/// on.
#[test]
fn pages_that_the_kernel_may_take_are_reported_when_it_has() {
    let Some(memory) = tracker() else { return };
    let map = Map::new(64, memory.page().bytes());
    (0..64).for_each(|page| map.write(page));
    let tracked = Tracked::new(memory, &map);
    map.advise(10, 20, libc::MADV_FREE);
    map.advise(10, 20, libc::MADV_PAGEOUT);
    let taken: Vec<u64> = (0..64).filter(|n| map.word(*n).load(SeqCst) == 0).collect();
    if taken.is_empty() {
        eprintln!("SKIP: the kernel keeps the pages");
        return;
    }
    let found = tracked.harvest_all();
    assert!(taken.iter().all(|page| found.contains(page)), "{taken:?}");
    assert_eq!(tracked.harvest_all(), [0u64; 0]);
}

/// A way to return pages of a mapping. The result says whether the kernel did so.
type GiveBack = fn(&Map, Option<&File>, u64, u64) -> bool;

fn dontneed(map: &Map, _: Option<&File>, first: u64, n: u64) -> bool {
    // SAFETY: of memory of this mapping, whose contents no reference promises.
    let bytes = (n * map.page) as usize;
    // SAFETY: as above.
    unsafe { libc::madvise(map.at(first).cast(), bytes, libc::MADV_DONTNEED) == 0 }
}

fn remove(map: &Map, _: Option<&File>, first: u64, n: u64) -> bool {
    let bytes = (n * map.page) as usize;
    // SAFETY: of memory of this mapping, whose contents no reference promises.
    unsafe { libc::madvise(map.at(first).cast(), bytes, libc::MADV_REMOVE) == 0 }
}

fn punch(map: &Map, file: Option<&File>, first: u64, n: u64) -> bool {
    let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    let (from, bytes) = (
        (first * map.page).cast_signed(),
        (n * map.page).cast_signed(),
    );
    // SAFETY: this call takes numbers and touches no memory that a reference promises.
    file.is_some_and(|file| unsafe { libc::fallocate(file.as_raw_fd(), mode, from, bytes) == 0 })
}

fn truncate(map: &Map, file: Option<&File>, first: u64, _: u64) -> bool {
    file.is_some_and(|file| {
        file.set_len(first * map.page).unwrap();
        file.set_len(map.pages * map.page).unwrap();
        true
    })
}

/// In shared memory, files and hugetlbfs the kernel keeps the write-protection when a page is
/// returned, also for the page of zeroes that is read in its place. Such a page looks like a clean
/// one. So such memory needs the user's promise to mark these pages. A table of the guide lists the
/// behaviour of this kernel for each kind of memory and each way.
#[test]
fn memory_whose_pages_go_unseen_needs_the_promise_to_mark() {
    let Some(memory) = tracker() else { return };
    let page = memory.page().bytes();
    let (private, shared) = (libc::MAP_PRIVATE, libc::MAP_SHARED);
    let (anonymous, huge) = (libc::MAP_ANONYMOUS, libc::MAP_HUGETLB);
    // Name, flags of the mapping, those of its file.
    let kinds = [
        ("a private memfd", private, Some(0)),
        ("a shared memfd", shared, Some(0)),
        ("shared anonymous memory", shared | anonymous, None),
        (
            "a private memfd of hugetlbfs",
            private,
            Some(libc::MFD_HUGETLB),
        ),
        (
            "a shared memfd of hugetlbfs",
            shared,
            Some(libc::MFD_HUGETLB),
        ),
        (
            "private anonymous memory of hugetlbfs",
            private | anonymous | huge,
            None,
        ),
    ];
    let ways: [(&str, GiveBack); 4] = [
        ("MADV_DONTNEED", dontneed),
        ("MADV_REMOVE", remove),
        ("a hole", punch),
        ("the end of the file", truncate),
    ];
    let mut unseen = BTreeSet::new();
    for (kind, flags, file) in kinds {
        let is_huge = kind.contains("hugetlbfs");
        // Whole pages of hugetlbfs are returned.
        let step = if is_huge { (2 << 20) / page } else { 1 };
        let pages = 6 * step;
        let file = file.map(|flags| memfd(flags).unwrap());
        if let Some(file) = &file {
            file.set_len(pages * page).unwrap();
        }
        let fd = file.as_ref().map_or(-1, AsRawFd::as_raw_fd);
        let map = match Map::flags(pages, page, flags, fd) {
            Ok(map) => map,
            Err(error) if is_huge => {
                eprintln!("SKIP {kind}: {error} (see /proc/sys/vm/nr_hugepages)");
                continue;
            }
            Err(error) => panic!("{kind}: {error}"),
        };
        let range = IovaRange::from_len(Iova::new(BASE), pages * page).unwrap();
        let refused = memory.add(range, map.host());
        let at = map.host();
        assert!(
            matches!(refused, Err(PagemapError::GivenBackUnseen { address }) if address == at),
            "{kind}: {refused:?}"
        );
        let tracked = Tracked::with(Arc::clone(&memory), &map, GivenBack::Marked);
        for (way, give_back) in ways {
            (0..pages).for_each(|page| map.write(page));
            assert_eq!(tracked.harvest_all().len() as u64, pages, "{kind}");
            assert_eq!(tracked.harvest_all(), [0u64; 0], "{kind}");
            if !give_back(&map, file.as_ref(), step, 2 * step) {
                continue;
            }
            // The program marks the pages, as it has promised.
            let marked = tracked.range(step, 2 * step);
            let changed = map.word(step).load(SeqCst) == 0;
            let found = tracked.harvest_all();
            if changed && !found.contains(&step) {
                unseen.insert(format!("{kind}, {way}"));
            }
            tracked.space.mark(marked).unwrap();
            let found = tracked.harvest_all();
            assert!(
                (step..3 * step).all(|page| found.contains(&page)),
                "{kind}, {way}"
            );
            assert_eq!(tracked.harvest_all(), [0u64; 0], "{kind}, {way}");
        }
        let all = tracked.range(0, pages);
        tracked.memory.remove(all).unwrap();
        tracked.space.unmap_discarding(all).unwrap();
    }
    // If a later kernel reports one of these, the promise is no longer needed for it.
    let expected = [
        "a private memfd, MADV_DONTNEED",
        "a private memfd, the end of the file",
        "a shared memfd, MADV_REMOVE",
        "a shared memfd, a hole",
        "a shared memfd, the end of the file",
        "shared anonymous memory, MADV_REMOVE",
    ];
    eprintln!("unseen: {unseen:#?}");
    assert!(
        expected
            .iter()
            .all(|unseen_way| unseen.contains(*unseen_way))
    );
}

/// Two mappings side by side: one of them needs the promise, so both do.
#[test]
fn memory_of_two_kinds_is_refused_at_the_first_page_of_the_second() {
    let Some(memory) = tracker() else { return };
    let page = memory.page().bytes();
    let map = Map::new(10, page);
    let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS | libc::MAP_FIXED;
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    let bytes = 3 * page as usize;
    // SAFETY: over memory of this mapping, whose contents no reference promises.
    let anew = unsafe { libc::mmap(map.at(4).cast(), bytes, protection, flags, -1, 0) };
    assert_ne!(anew, libc::MAP_FAILED);
    let range = IovaRange::from_len(Iova::new(BASE), 10 * page).unwrap();
    let at = map.host() + 4 * page;
    let refused = memory.add(range, map.host());
    assert!(matches!(refused, Err(PagemapError::GivenBackUnseen { address }) if address == at));
    memory
        .add_with(range, map.host(), GivenBack::Marked)
        .unwrap();
}

/// A child has the descriptors of its parent, which still act on the parent's memory. A harvest in
/// the child took the parent's dirty pages and write-protected them again. botan#602 is the same
/// bug with the state of a generator of random numbers.
#[test]
fn a_child_of_fork_takes_nothing_from_its_parent() {
    let Some(memory) = tracker() else { return };
    let page = memory.page().bytes();
    let map = Map::new(100, page);
    let tracked = Tracked::new(memory, &map);
    let refused = |error: &dyn std::fmt::Display| {
        let text = format!("this tracker is of process {}", std::process::id());
        u8::from(!error.to_string().contains(&text))
    };
    let parent = std::process::id();
    let says = |error: &dyn std::fmt::Display| {
        let text = format!("this tracker is of process {parent}");
        u8::from(!error.to_string().contains(&text))
    };
    assert_eq!(refused(&"nothing"), 1);
    let all = tracked.range(0, 100);
    let calls: [(&str, &dyn Fn() -> u8); 6] = [
        ("peek", &|| {
            let mut words = tracked.words();
            let request = tracked.request(0, 100);
            match tracked.space.peek(&request, UserBitmap::new(&mut words)) {
                Err(error) => says(&error),
                Ok(_) => 2,
            }
        }),
        ("harvest", &|| {
            let mut words = tracked.words();
            let request = tracked.request(0, 100);
            let harvested = tracked.space.harvest(&request, UserBitmap::new(&mut words));
            match harvested {
                Err(_) => 3,
                Ok(lease) if lease.stopped().is_some() => {
                    says(&lease.sync().map(drop).unwrap_err())
                }
                Ok(lease) => {
                    lease.sync().unwrap().commit();
                    2
                }
            }
        }),
        ("set_tracking", &|| match tracked.space.stop_tracking() {
            Err(error) => says(&error),
            Ok(()) => 2,
        }),
        (
            "add",
            &|| match tracked.memory.add(tracked.range(200, 1), 1 << 40) {
                Err(error) => says(&error),
                Ok(()) => 2,
            },
        ),
        ("remove", &|| match tracked.memory.remove(all) {
            Err(error) => says(&error),
            Ok(()) => 2,
        }),
        ("a tracker of its own", &|| {
            // The memory of the child is a copy, which no tracker has.
            let own = ProcessMemory::new().unwrap();
            own.add(all, map.host()).unwrap();
            own.remove(all).unwrap();
            0
        }),
    ];
    for (n, (name, call)) in (0..).zip(calls) {
        map.write(n);
        assert_eq!(in_child(call), 0, "{name}");
        assert_eq!(tracked.harvest_all(), [n], "{name}");
        assert_eq!(tracked.harvest_all(), [0u64; 0], "{name}");
    }
    // The child of a child, whose process number may be any.
    map.write(50);
    assert_eq!(in_child(|| in_child(calls[0].1) as u8), 0);
    assert_eq!(tracked.harvest_all(), [50]);
}

/// A scan goes by addresses. A tracker whose memory was unmapped took the dirty pages of another
/// tracker, which had added the memory that was mapped there next, and write-protected them again.
#[test]
fn a_stale_tracker_takes_nothing_from_the_next_one() {
    let Some(memory) = tracker() else { return };
    let page = memory.page().bytes();
    let map = Map::new(100, page);
    let stale = Tracked::new(memory, &map);
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED;
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    let bytes = 100 * page as usize;
    // SAFETY: over this mapping, whose contents no reference promises.
    let anew = unsafe { libc::mmap(map.at(0).cast(), bytes, protection, flags, -1, 0) };
    assert_ne!(anew, libc::MAP_FAILED);
    let tracked = Tracked::new(Arc::new(ProcessMemory::new().unwrap()), &map);
    map.write(7);
    let mut words = stale.words();
    let request = stale.request(0, 100);
    let lease = stale
        .space
        .harvest(&request, UserBitmap::new(&mut words))
        .unwrap();
    let stopped = lease
        .stopped()
        .unwrap_or_else(|| panic!("it has other memory's pages"));
    let text = format!("the memory from {:#x} on was mapped anew", map.host());
    assert!(
        stopped.error.to_string().contains(&text),
        "{}",
        stopped.error
    );
    drop(lease);
    let mut words = stale.words();
    let bitmap = UserBitmap::new(&mut words);
    let error = stale.space.peek(&request, bitmap).unwrap_err();
    assert!(error.to_string().contains(&text), "{error}");
    assert_eq!(tracked.harvest_all(), [7]);
    // When it is dropped, the memory of the other tracker stays tracked.
    stale.memory.remove(stale.range(0, 100)).unwrap();
    map.write(8);
    assert_eq!(tracked.harvest_all(), [8]);
    drop(stale);
    map.write(9);
    assert_eq!(tracked.harvest_all(), [9]);
}
