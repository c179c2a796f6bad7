//! Pages that a process gives back to the kernel, or that the kernel takes.

use super::*;

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
