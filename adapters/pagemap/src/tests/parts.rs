//! Requests that cut pages of the process.

use super::*;
use dirtymap::DirtySource;
use dirtymap::source::{FlushGather, LeafSink};

const K1: u64 = 1024;

/// From 1 KiB inside page `first` up to 1 KiB inside page `last`.
fn cut(first: u64, last: u64) -> IovaRange {
    let start = ((GUEST + first) << 12) + K1;
    IovaRange::from_len(Iova::new(start), (last - first) << 12).unwrap()
}

/// The kernel was asked for a part of a page, which it refuses: that was taken for memory that is
/// not mapped any more, and a bounded harvest of a space of finer pages stopped.
#[test]
fn a_part_of_a_page_is_mapped_if_the_page_is() {
    let (_space, memory, fake) = process();
    harvest(&_space, pages(0, 100));
    [3, 5, 9].iter().for_each(|page| fake.write(*page));
    let range = cut(3, 9);
    let mut words = [0u64; 1];
    let granule = Granule::from_lg2(10).unwrap();
    let view = UserBitmap::new(&mut words).view(range, granule).unwrap();
    memory.peek(range, &mut view.sink()).unwrap();
    assert_eq!(view.count(), 3 + 4 + 1);
    let mut words = [0u64; 1];
    let view = UserBitmap::new(&mut words).view(range, granule).unwrap();
    let (mut sink, mut gather) = (view.sink(), FlushGather::new());
    let mut out = LeafSink::new(&mut sink, &mut gather);
    memory.read_and_clear(range, &mut out).unwrap();
    assert_eq!(view.count(), 3 + 4 + 1);
    // The pages that are cut stay, in whatever the kernel's answer is kept.
    assert_eq!(harvest(&_space, pages(0, 100)), [3, 9]);
}

/// The instalments of a space of 1 KiB pages see all of the memory.
#[test]
fn instalments_of_a_finer_space_do_not_stop() {
    let fake = Fake::new();
    let memory = ProcessMemory::with_kernel(Box::new(fake.clone()), Granule::K4);
    let memory = Arc::new(memory);
    let granule = Granule::from_lg2(10).unwrap();
    let space = AddressSpace::with_source(granule, Arc::clone(&memory)).unwrap();
    memory.add(pages(0, PAGES), HOST).unwrap();
    space.map(pages(0, PAGES), 0, Access::ReadWrite).unwrap();
    space.start_tracking().unwrap();
    let request = HarvestRequest::new(pages(0, 256), granule);
    let mut words = [0u64; 16];
    (0..256).for_each(|page| fake.write(page));
    let (mut next, mut bits) = (Some(pages(0, 1).start()), 0);
    while let Some(from) = next {
        let bitmap = UserBitmap::new(&mut words);
        let part = space.harvest(&request.resume_at(from).max_bits(65), bitmap);
        let part = part.unwrap();
        bits += part.report().bits_set;
        next = part.next();
        part.sync().unwrap().commit();
    }
    assert_eq!(bits, 1024);
}
