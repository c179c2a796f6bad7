//! The front end without a back end: layout, harvests together with other sources, swaps.

use super::{NONE, PAGE, bits, bytes, content, in_child, set_bit, taken};
use dirtymap::{
    Access, AddressSpace, DirtySource, Error, Granule, HarvestRequest, Iova, IovaRange, Tracking,
    UserBitmap,
};
use dirtymap_vhost::{LOG_PAGE, LogError, VhostLog};
use std::sync::Arc;

/// A tracked space with pages of `page`, an area, and a log up to its end.
fn tracked(page: Granule, area: IovaRange) -> (AddressSpace, Arc<VhostLog>) {
    let log = Arc::new(VhostLog::new(area.last()).unwrap());
    let space = AddressSpace::with_source(page, Arc::clone(&log)).unwrap();
    space.map(area, 0, Access::ReadWrite).unwrap();
    space.start_tracking().unwrap();
    (space, log)
}

/// A log of `last / 32768 + 1` bytes that is read in words of 8 bytes lacks its tail of up to 56
/// pages.
#[test]
fn the_size_is_that_of_the_highest_address_in_whole_words() {
    for (last, size) in [
        (0, 8),
        (64 * PAGE - 1, 8),
        (64 * PAGE, 16),
        (0xffff_ffff, 128 << 10),
        (0x1_0000_0000, (128 << 10) + 8),
    ] {
        let log = VhostLog::new(Iova::new(last)).unwrap().memory();
        assert_eq!((log.size(), log.offset()), (size, 0));
        assert_eq!(log.file().metadata().unwrap().len(), size);
        assert_eq!(log.last().get(), size * 8 * PAGE - 1);
    }
    // A log that is too large to be mapped: an error that names the length.
    let Err(LogError::Memory { bytes, .. }) = VhostLog::new(Iova::MAX) else {
        panic!("a log of 512 TiB");
    };
    assert_eq!(bytes, 1 << 49);
}

/// A side that shrinks the file would kill the other side at its next access. The file is sealed
/// against it.
#[test]
fn the_file_is_sealed() {
    let log = VhostLog::new(Iova::new(1 << 20)).unwrap().memory();
    let size = log.size();
    for len in [0, size - 8, size + 8] {
        assert!(log.file().set_len(len).is_err());
    }
    assert_eq!(log.file().metadata().unwrap().len(), size);
}

#[test]
fn bits_come_out_of_a_harvest_at_their_guest_physical_addresses() {
    // The area does not begin at a word, nor at a byte, of the log.
    let area = bytes((1 << 32) + 3 * PAGE, 150 * PAGE);
    let (space, log) = tracked(Granule::K4, area);
    let first = area.start().get() / PAGE;
    let marked = [0, 1, 4, 5, 61, 62, 124, 149].map(|n| first + n);
    marked.iter().for_each(|page| set_bit(&log.memory(), *page));
    // Bits outside of the area belong to another area, or to none.
    set_bit(&log.memory(), first - 1);
    set_bit(&log.memory(), 7);
    assert_eq!(
        taken(&space, bytes((1 << 32) + 8 * PAGE, 100 * PAGE)),
        marked[3..6]
    );
    assert_eq!(taken(&space, area), [0, 1, 4, 124, 149].map(|n| first + n));
    assert_eq!(taken(&space, area), NONE);
    assert_eq!(bits(&log.memory()), [7, first - 1]);
}

#[test]
fn marks_and_the_log_are_in_one_lease_and_an_abort_puts_back_both() {
    let area = bytes(0, 256 * PAGE);
    let (space, log) = tracked(Granule::K4, area);
    set_bit(&log.memory(), 200);
    space.mark(bytes(3 * PAGE, 1)).unwrap();
    let mut words = [0; 4];
    let request = HarvestRequest::new(area, Granule::K4);
    let view = space.peek(&request, UserBitmap::new(&mut words)).unwrap();
    assert_eq!(view.bits().collect::<Vec<_>>(), [3, 200]);
    assert_eq!(bits(&log.memory()), [200], "a peek takes nothing");

    words = [0; 4];
    let lease = space
        .harvest(&request, UserBitmap::new(&mut words))
        .unwrap();
    assert_eq!(bits(&log.memory()), NONE);
    lease.abort();
    assert_eq!(bits(&log.memory()), NONE, "the log is left to back ends");
    assert_eq!(taken(&space, area), [3, 200]);
    assert_eq!(taken(&space, area), NONE);
}

/// The base of the log is 0 and its granule 4096, whatever those of the space and the request are.
#[test]
fn pages_and_granules_of_other_sizes() {
    let k64 = Granule::from_bytes(65536).unwrap();
    let area = bytes(1 << 20, 1 << 20);
    let (space, log) = tracked(k64, area);
    set_bit(&log.memory(), 256 + 17);
    let mut words = [0; 4];
    let request = HarvestRequest::new(area, Granule::M2.min(k64));
    let lease = space
        .harvest(&request, UserBitmap::new(&mut words))
        .unwrap();
    let lease = lease.sync().unwrap();
    assert_eq!(
        lease.runs().collect::<Vec<_>>(),
        [bytes((1 << 20) + 65536, 65536)]
    );
    // Put back in pages of the space, which is a superset.
    drop(lease);
    assert_eq!(
        taken(&space, area),
        (256 + 16..256 + 32).collect::<Vec<_>>()
    );

    // A space with smaller pages needs areas of whole pages of the log.
    let space = AddressSpace::new(Granule::from_bytes(512).unwrap());
    space.attach(Arc::clone(&log)).unwrap();
    assert_eq!(space.alignment(), LOG_PAGE);
    assert!(matches!(
        space.map(bytes(512, 4096), 0, Access::ReadWrite),
        Err(Error::Unaligned { .. })
    ));
}

#[test]
fn switching_on_clears_the_log_once() {
    let area = bytes(0, 256 * PAGE);
    let log = Arc::new(VhostLog::new(area.last()).unwrap());
    let space = AddressSpace::with_source(Granule::K4, Arc::clone(&log)).unwrap();
    space.map(area, 0, Access::ReadWrite).unwrap();
    set_bit(&log.memory(), 1);
    space.start_tracking().unwrap();
    assert_eq!(bits(&log.memory()), NONE);
    set_bit(&log.memory(), 2);
    space.start_tracking().unwrap();
    assert_eq!(bits(&log.memory()), [2]);
    space.stop_tracking().unwrap();
    assert_eq!(taken(&space, area), [2], "a last harvest");
}

#[test]
fn memory_beyond_the_log_is_refused_until_a_longer_one_is_swapped_in() {
    let (space, log) = tracked(Granule::K4, bytes(0, 64 * PAGE));
    let more = bytes(64 * PAGE, 64 * PAGE);
    let refused = space.map(more, 0, Access::ReadWrite).unwrap_err();
    let text = refused.to_string();
    assert!(
        text.contains("0x3ffff") && text.contains("0x7ffff"),
        "{text}"
    );
    let swap = log.swap(more.last()).unwrap();
    set_bit(swap.memory(), 100);
    let early = space.map(more, 0, Access::ReadWrite);
    assert!(early.is_err(), "a back end may still have the old log");
    assert_eq!(swap.acknowledged(), 0);
    space.map(more, 0, Access::ReadWrite).unwrap();
    assert_eq!(taken(&space, more), [100]);
}

/// A back end refused the longer log, and the swap was dropped, but its log stayed the newest one.
/// Memory was mapped up to the length of that log, no back end had bits for it, and writes there
/// were lost.
#[test]
fn a_swap_that_was_dropped_gives_no_room() {
    let (space, log) = tracked(Granule::K4, bytes(0, 64 * PAGE));
    let more = bytes(64 * PAGE, 64 * PAGE);
    drop(log.swap(more.last()).unwrap());
    let refused = space.map(more, 0, Access::ReadWrite).unwrap_err();
    assert!(matches!(&refused, Error::Source(error)
        if matches!(error.downcast_ref(), Some(LogError::TooShort { end, range })
            if end.get() == 64 * PAGE - 1 && *range == more)));
    // The next log is as long, and all back ends accept it.
    let swap = log.swap(Iova::MIN).unwrap();
    drop(log.swap(Iova::new(1 << 30)).unwrap()); // and one after it by none
    swap.acknowledged();
    space.map(more, 0, Access::ReadWrite).unwrap();
    let beyond = bytes(256 * PAGE, 64 * PAGE);
    assert!(space.map(beyond, 0, Access::ReadWrite).is_err());
}

/// The old log ends inside a cache line of the new one. Its words there are still read.
#[test]
fn a_line_that_the_old_log_has_in_part_is_looked_at_during_a_swap() {
    for words in 1..8 {
        let area = bytes(0, words * 64 * PAGE);
        let (space, log) = tracked(Granule::K4, area);
        let old = log.memory();
        assert_eq!(old.size(), words * 8);
        let swap = log.swap(Iova::new(1024 * PAGE - 1)).unwrap();
        let marked = [0, words * 64 - 1];
        marked.iter().for_each(|page| set_bit(&old, *page));
        assert_eq!(taken(&space, area), marked, "of {words} words");
        set_bit(&old, words * 64 - 2);
        assert_eq!(swap.acknowledged(), 1);
        assert_eq!(taken(&space, area), [words * 64 - 2]);
    }
}

/// Bits for addresses outside of all areas were not counted. A back end that writes to unmapped
/// addresses went unnoticed.
#[test]
fn bits_outside_every_area_are_counted() {
    let (space, log) = tracked(Granule::K4, bytes(64 * PAGE, 64 * PAGE));
    let more = bytes(256 * PAGE, 64 * PAGE);
    let swap = log.swap(Iova::new(1024 * PAGE)).unwrap();
    let old = swap.memory();
    for page in [64, 100, 127, 300] {
        set_bit(old, page);
    }
    let outside = |pages, first: Option<u64>| {
        let found = log.outside(&space).unwrap();
        assert_eq!(
            (found.pages, found.first.map(|at| at.get() / PAGE)),
            (pages, first)
        );
    };
    outside(1, Some(300));
    swap.acknowledged();
    space.map(more, 0, Access::ReadWrite).unwrap();
    outside(0, None);
    for page in [63, 128, 255, 320, 1000, 1024] {
        set_bit(&log.memory(), page);
    }
    outside(6, Some(63));
    assert_eq!(taken(&space, bytes(64 * PAGE, 64 * PAGE)), [64, 100, 127]);
    outside(6, Some(63)); // nothing of it was taken
    space.unmap_discarding(more).unwrap();
    outside(6, Some(63)); // the bit of page 300 went with its area
}

/// botan#602 is this bug in another library. A child of a fork shares the log, and its harvest took
/// bits that its parent then never saw.
#[test]
fn a_child_of_a_fork_takes_nothing_from_its_parent() {
    let area = bytes(0, 64 * PAGE);
    let (space, log) = tracked(Granule::K4, area);
    set_bit(&log.memory(), 9);
    let swap = log.swap(Iova::MIN).unwrap();
    let tried = in_child(|| {
        let mut words = [0];
        let request = HarvestRequest::new(area, Granule::K4);
        let refused = |error: &Error| {
            matches!(error, Error::Source(error)
            if matches!(error.downcast_ref(), Some(LogError::Forked { .. })))
        };
        let harvest = space.harvest(&request, UserBitmap::new(&mut words));
        let harvest = harvest.and_then(|lease| lease.sync());
        let peek = space.peek(&request, UserBitmap::new(&mut [0])).map(drop);
        let switch = DirtySource::set_tracking(&*log, Tracking::Off);
        let map = space.map(bytes(1 << 20, 4096), 0, Access::ReadWrite);
        let results = [
            matches!(&harvest, Err(error) if refused(error)),
            matches!(&peek, Err(error) if refused(error)),
            matches!(&switch, Err(error) if refused(error)),
            matches!(&map, Err(error) if refused(error)),
            matches!(log.swap(Iova::MIN), Err(LogError::Forked { .. })),
            matches!(log.outside(&space), Err(LogError::Forked { .. })),
            swap.acknowledged() == 0,
        ];
        drop(harvest);
        let mut words = [0];
        // No dirty page is taken for clean: all of them are reported.
        let unmapped = space.unmap(area, Granule::K4, UserBitmap::new(&mut words));
        let all = unmapped.is_ok() && words == [u64::MAX];
        results
            .iter()
            .chain([&all])
            .fold(0, |bits, ok| bits << 1 | i32::from(!ok))
    });
    assert_eq!(tried, 0, "which of the calls were not refused");
    assert_eq!(taken(&space, area), [9]);
}

/// A log remembered its process by number. The first child in a new PID namespace is process 1, and
/// its parent may be process 1 as well. The child took bits from the log that its parent then never
/// saw.
#[test]
fn a_child_with_the_same_process_number_takes_nothing_from_its_parent() {
    const SKIPPED: i32 = 77;
    let as_process_one = |body: &dyn Fn() -> i32| {
        // SAFETY: takes a number. The caller is a child of `fork`, and has one thread.
        match unsafe { libc::unshare(libc::CLONE_NEWPID) } {
            0 => in_child(|| if std::process::id() == 1 { body() } else { 2 }),
            _ => SKIPPED,
        }
    };
    let tried = in_child(|| {
        as_process_one(&|| {
            let (_space, log) = tracked(Granule::K4, bytes(0, 64 * PAGE));
            let is_refused = || matches!(log.swap(Iova::MIN), Err(LogError::Forked { .. }));
            as_process_one(&|| i32::from(!is_refused()))
        })
    });
    if tried == SKIPPED {
        println!("SKIP: this process may not make a PID namespace");
        return;
    }
    assert_eq!(tried, 0, "1: the child was taken for its parent");
}

/// Harvests between the swap and its acknowledgement read both logs. The last bits of the old one
/// are found once.
#[test]
fn what_is_left_of_a_log_that_was_swapped_is_found() {
    let area = bytes(0, 256 * PAGE);
    let (space, log) = tracked(Granule::K4, area);
    let old = log.memory();
    set_bit(&old, 1);
    set_bit(&old, 2);
    let swap = log.swap(Iova::MIN).unwrap();
    assert_eq!(swap.memory().size(), old.size(), "a log never gets shorter");
    set_bit(swap.memory(), 2);
    set_bit(swap.memory(), 3);
    assert_eq!(
        taken(&space, bytes(0, 64 * PAGE)),
        [1, 2, 3],
        "both are looked at"
    );
    set_bit(&old, 4); // the last one, before the answer
    set_bit(&old, 5);
    set_bit(swap.memory(), 5);
    assert_eq!(swap.acknowledged(), 2);
    assert!(!Arc::ptr_eq(&old, &log.memory()));
    assert_eq!(bits(&log.memory()), [4, 5]);
    assert_eq!(taken(&space, area), [4, 5]);
    let given_up = content(&old);
    set_bit(&log.memory(), 6);
    assert_eq!(taken(&space, area), [6]);
    assert_eq!(content(&old), given_up);
}

/// A back end that refuses the new log goes on with the old one, while another back end may have
/// accepted the new one.
#[test]
fn a_swap_that_fails_loses_nothing() {
    let area = bytes(0, 256 * PAGE);
    let (space, log) = tracked(Granule::K4, area);
    let old = log.memory();
    drop(log.swap(area.last()).unwrap());
    let half = log.memory();
    set_bit(&old, 1);
    set_bit(&half, 2);
    assert_eq!(taken(&space, area), [1, 2]);
    let swap = log.swap(area.last()).unwrap();
    set_bit(&old, 3);
    set_bit(&half, 4);
    set_bit(swap.memory(), 5);
    assert_eq!(swap.acknowledged(), 2);
    assert_eq!(taken(&space, area), [3, 4, 5]);
}

#[test]
fn an_unmap_returns_what_the_log_has_of_the_area() {
    let (space, log) = tracked(Granule::K4, bytes(0, 64 * PAGE));
    let other = bytes(0, 64 * PAGE);
    set_bit(&log.memory(), 9);
    space.mark(bytes(10 * PAGE, 1)).unwrap();
    let mut words = [0];
    space
        .unmap(other, Granule::K4, UserBitmap::new(&mut words))
        .unwrap();
    assert_eq!(words, [0b11 << 9]);
    assert_eq!(bits(&log.memory()), NONE);
}

#[test]
fn an_area_can_be_cut_between_pages() {
    let (space, log) = tracked(Granule::K4, bytes(0, 64 * PAGE));
    space.cut(Iova::new(32 * PAGE)).unwrap();
    set_bit(&log.memory(), 31);
    set_bit(&log.memory(), 32);
    assert_eq!(taken(&space, bytes(32 * PAGE, 32 * PAGE)), [32]);
    assert_eq!(taken(&space, bytes(0, 32 * PAGE)), [31]);
}
