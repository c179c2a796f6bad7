//! Other processes and other trackers.

use super::*;

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
