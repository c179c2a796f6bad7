//! Writes come out as they were made.

use super::*;

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
