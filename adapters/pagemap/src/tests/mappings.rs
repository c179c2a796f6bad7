//! Memory that is unmapped, mapped anew, given back, or without its page tables.

use super::*;

#[test]
fn memory_that_was_unmapped_stops_the_harvest_there() {
    let (space, memory, fake) = process();
    [10, 900, 1100, 2000]
        .iter()
        .for_each(|page| fake.write(*page));
    fake.with(|state| state.mapped[1000..1200].fill(false));
    let mut words = vec![0u64; PAGES.div_ceil(64) as usize];
    let request = HarvestRequest::new(pages(0, PAGES), Granule::K4);
    let lease = space
        .harvest(&request, UserBitmap::new(&mut words))
        .unwrap();
    let stopped = lease.stopped().unwrap_or_else(|| panic!("a hole"));
    assert_eq!(stopped.at, pages(1000, 1).start());
    let hole = HOST + (1000 << 12);
    let text = format!("the memory at {hole:#x} was unmapped: remove it, or map and add it anew");
    assert!(
        stopped.error.to_string().ends_with(&text),
        "{}",
        stopped.error
    );
    assert_eq!(
        numbers_of(lease.partial().sync().unwrap().runs()),
        [10, 900]
    );
    // It was dropped. What is left of the memory is told to the unmap, over the hole.
    memory.remove(pages(0, PAGES)).unwrap();
    let refused = memory.remove(pages(0, PAGES));
    assert!(matches!(refused, Err(PagemapError::NotAdded { .. })));
    let mut words = vec![0u64; PAGES.div_ceil(64) as usize];
    let bitmap = UserBitmap::new(&mut words);
    let (_, view) = space.unmap(pages(0, PAGES), Granule::K4, bitmap).unwrap();
    assert_eq!(numbers_of(view.runs()), [10, 900, 2000]);
}

#[test]
fn another_mapping_in_the_place_of_the_memory_does_not_pass_for_clean() {
    let (space, _memory, fake) = process();
    fake.write(10);
    fake.with(|state| state.registered[1000..1200].fill(false));
    let mut words = vec![0u64; PAGES.div_ceil(64) as usize];
    let request = HarvestRequest::new(pages(0, PAGES), Granule::K4);
    let refused = space.harvest(&request, UserBitmap::new(&mut words));
    let lease = refused.unwrap();
    let stopped = lease.stopped().unwrap_or_else(|| panic!("not tracked"));
    assert_eq!(stopped.at, pages(0, 1).start());
    assert!(stopped.error.to_string().contains("PAGEMAP_SCAN failed"));
    drop(lease);
    // Page 10 came before the one that refused, and was protected by the call.
    fake.with(|state| state.registered.fill(true));
    assert!(harvest(&space, pages(0, PAGES)).contains(&10));
}

/// QEMU discards memory of its guest, and a balloon gives back page after page: when the last page
/// of a page table goes, the kernel frees the table (x86, since Linux 6.14), and a whole huge page
/// takes its entry along. The scan for writes skips what has no entry: two harvests said nothing,
/// though the memory was zero.
#[test]
fn pages_that_went_with_their_table_are_dirty_once() {
    for probes in [true, false] {
        let (space, _memory, fake) = process();
        fake.with(|state| state.probes = probes);
        // Tables begin at multiples of 512 pages of the process.
        let table = 512 - 5;
        fake.give_back(table..table + 1024);
        fake.write(20);
        let mut words = vec![0u64; PAGES.div_ceil(64) as usize];
        let request = HarvestRequest::new(pages(0, PAGES), Granule::K4);
        let peeked = space.peek(&request, UserBitmap::new(&mut words)).unwrap();
        let expected: Vec<u64> = std::iter::once(20)
            .chain(table as u64..table as u64 + 1024)
            .collect();
        assert_eq!(numbers_of(peeked.runs()), expected);
        assert_eq!(harvest(&space, pages(0, PAGES)), expected);
        assert_eq!(harvest(&space, pages(0, PAGES)), [0u64; 0]);
        // A part of a table: the rest stays for the next harvest.
        fake.give_back(table..table + 512);
        let from = table as u64 + 100;
        let part: Vec<u64> = (from..from + 10).collect();
        assert_eq!(harvest(&space, pages(from, 10)), part);
        assert_eq!(harvest(&space, pages(0, PAGES)).len(), 502);
        // Written again, in part: the rest has a table, and no protection.
        fake.give_back(table..table + 512);
        fake.write(from);
        fake.with(|state| state.without_table.fill(false));
        assert_eq!(harvest(&space, pages(0, PAGES)).len(), 512);
    }
}

/// The same on the kernel of this machine, which reports such pages itself by now: the look for
/// tables finds them too, and protects them.
#[test]
fn tables_that_are_gone_are_found_on_this_kernel() {
    let process = match Process::that_skips_tables() {
        Ok(process) => process,
        Err(error) => {
            eprintln!("SKIP: {error}");
            return;
        }
    };
    let page = host::page().bytes();
    let table = table_bytes(page);
    let mut block = vec![1u8; 4 * table as usize];
    let first = block.as_ptr().addr() as u64;
    let start = first.next_multiple_of(table);
    let (from, end) = (start + table, start + 2 * table);
    process.register(start, 3 * table).unwrap();
    process.protect(start, 3 * table, true).unwrap();
    let mut regions = vec![Region::default(); 512];
    let mut sweep = |protect| {
        let ask = Ask {
            kernel: &process,
            protect,
            page,
            given_back: true,
        };
        let mut found = Vec::new();
        let span = (start, start + 3 * table);
        sweep_nothing(ask, span, &mut regions, &mut |from, to| {
            found.push((from, to))
        })
        .unwrap();
        found
    };
    assert_eq!(sweep(true), []);
    let offset = (from - first) as usize;
    let given_back = block[offset..offset + table as usize].as_mut_ptr();
    // SAFETY: whole pages of the block, which are zero after it.
    let result = unsafe { libc::madvise(given_back.cast(), table as usize, libc::MADV_DONTNEED) };
    assert_eq!(result, 0);
    // Whether the kernel is one of those is found out right.
    let mut written = [Region::default()];
    let scanned = process.scan((from, end), Find::Written, false, &mut written);
    let skips = Process::new().unwrap().skips_tables();
    assert_eq!(scanned.unwrap().regions == 0, skips);
    assert_eq!(sweep(false), [(from, end)]);
    assert_eq!(sweep(true), [(from, end)]);
    assert_eq!(sweep(true), [], "protected, and there by its marks");
    let mut written = [Region::default()];
    let scanned = process.scan((from, end), Find::Written, false, &mut written);
    assert_eq!(scanned.unwrap().regions, 0);
    assert_eq!(block[offset], 0);
}

/// A call that fails while it looks for tables that are gone has protected pages as well.
#[test]
fn a_look_for_tables_that_fails_makes_its_piece_dirty() {
    for call in 0..3 {
        let (space, _memory, fake) = process();
        fake.give_back(507..1019);
        fake.write(3000);
        fake.with(|state| state.fail_in = Some(call));
        let (at, error, below) = stops(&space, pages(0, PAGES));
        assert_eq!((at, below), (pages(0, 1).start(), vec![]), "{call}");
        assert!(error.contains("PAGEMAP_SCAN failed"), "{error}");
        let found = harvest(&space, pages(0, PAGES));
        let given_back: Vec<u64> = (507..1019).chain([3000]).collect();
        assert!(given_back.iter().all(|page| found.contains(page)), "{call}");
    }
}

#[test]
fn memory_whose_pages_are_given_back_unseen_needs_the_promise_to_mark() {
    let (space, memory, fake) = process();
    memory.remove(pages(0, PAGES)).unwrap();
    fake.with(|state| state.shared = Some(HOST + 8192));
    let refused = memory.add(pages(0, PAGES), HOST);
    assert!(
        matches!(refused, Err(PagemapError::GivenBackUnseen { address }) if address == HOST + 8192)
    );
    fake.with(|state| assert!(!state.registered[0], "touched before it was checked"));
    let marked = GivenBack::Marked;
    memory.add_with(pages(0, PAGES), HOST, marked).unwrap();
    fake.write(9);
    assert_eq!(harvest(&space, pages(0, PAGES)), [9]);
}
