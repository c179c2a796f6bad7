//! Memory that is unmapped or mapped anew.

use super::*;

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
