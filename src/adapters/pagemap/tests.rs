//! The logic of the adapter against a kernel of our own, which has the quirks of the real one, on demand.

mod parts;

use std::io;

use super::ioctl::{Region, Scanned};
use super::*;
use crate::bitmap::UserBitmap;
use crate::error::Error;
use crate::harvest::{HarvestError, HarvestRequest};
use crate::space::AddressSpace;
use crate::units::{Access, Iova};

/// Where the memory lies in the fake process, not at the begin of a piece, and where it is reported.
const HOST: u64 = (1 << 40) + (5 << 12);
const GUEST: u64 = 7;
/// Two pieces and a bit.
const PAGES: u64 = 33_000;

struct State {
    protected: Vec<bool>,
    registered: Vec<bool>,
    mapped: Vec<bool>,
    content: Vec<u64>,
    /// Regions that the kernel keeps before it hands them out.
    buffer: usize,
    /// The call that fails, counted from the next on, when it has protected half of what it was asked for.
    fail_in: Option<u32>,
    scans: u64,
    /// A page that is never written as a part.
    huge_at: Option<usize>,
}

#[derive(Clone)]
struct Fake(Arc<Mutex<State>>);

impl Fake {
    fn new() -> Self {
        let all = |value| vec![value; PAGES as usize];
        Fake(Arc::new(Mutex::new(State {
            protected: all(false),
            registered: all(false),
            mapped: all(true),
            content: vec![0; PAGES as usize],
            buffer: 512,
            fail_in: None,
            scans: 0,
            huge_at: None,
        })))
    }

    fn with<R>(&self, f: impl FnOnce(&mut State) -> R) -> R {
        f(&mut lock(&self.0))
    }

    fn write(&self, page: u64) {
        self.with(|state| {
            state.content[page as usize] += 1;
            state.protected[page as usize] = false;
        });
    }
}

fn numbers(start: u64, end: u64) -> std::ops::Range<usize> {
    ((start - HOST) >> 12) as usize..((end - HOST) >> 12) as usize
}

impl Kernel for Fake {
    fn register(&self, start: u64, len: u64) -> io::Result<()> {
        self.with(|state| state.registered[numbers(start, start + len)].fill(true));
        Ok(())
    }

    fn unregister(&self, start: u64, len: u64) -> io::Result<()> {
        self.with(|state| state.registered[numbers(start, start + len)].fill(false));
        Ok(())
    }

    fn protect(&self, start: u64, len: u64, on: bool) -> io::Result<()> {
        self.with(|state| state.protected[numbers(start, start + len)].fill(on));
        Ok(())
    }

    fn scan(&self, start: u64, end: u64, protect: bool, out: &mut [Region]) -> io::Result<Scanned> {
        self.with(|state| {
            state.scans += 1;
            if !(start - HOST).is_multiple_of(4096) {
                return Err(io::Error::from_raw_os_error(libc::EINVAL));
            }
            let address = |page: usize| HOST + ((page as u64) << 12);
            let pages = numbers(start, end);
            let half = pages.start + pages.len() / 2;
            let fails = state.fail_in == Some(0);
            state.fail_in = state.fail_in.and_then(|n| n.checked_sub(1));
            let (mut filled, mut kept, mut walk_end) = (0, 0, 0);
            for page in pages {
                if fails && page == half {
                    return Err(io::Error::from_raw_os_error(libc::EINTR));
                }
                if !state.mapped[page] {
                    continue;
                }
                if !state.registered[page] {
                    return Err(io::Error::from_raw_os_error(libc::EPERM));
                }
                if state.protected[page] {
                    continue;
                }
                if state.huge_at == Some(page) {
                    walk_end = address(page);
                    break;
                }
                let joins = kept > 0 && out[filled - 1].end == address(page);
                if joins {
                    out[filled - 1].end = address(page + 1);
                } else {
                    if kept == state.buffer || filled == out.len() {
                        walk_end = address(page);
                        kept = 0;
                    }
                    if filled == out.len() {
                        break;
                    }
                    out[filled] = Region::new(address(page), address(page + 1));
                    filled += 1;
                    kept += 1;
                }
                if protect {
                    state.protected[page] = true;
                }
            }
            // As the real one: the end only if nothing was handed out before it.
            let walk_end = if walk_end == 0 { end } else { walk_end };
            let regions = filled;
            Ok(Scanned { regions, walk_end })
        })
    }

    fn is_mapped(&self, start: u64, len: u64) -> bool {
        if !(start - HOST).is_multiple_of(4096) {
            return false; // EINVAL, as msync says
        }
        self.with(|state| state.mapped[numbers(start, start + len)].iter().all(|m| *m))
    }
}

fn pages(first: u64, n: u64) -> IovaRange {
    IovaRange::from_len(Iova::new((GUEST + first) << 12), n << 12).unwrap()
}

fn process() -> (AddressSpace, Arc<ProcessMemory>, Fake) {
    let fake = Fake::new();
    let memory = ProcessMemory::with_kernel(Box::new(fake.clone()), Granule::K4);
    let memory = Arc::new(memory);
    let space = AddressSpace::new(Granule::K4)
        .with_source(Arc::clone(&memory))
        .unwrap();
    memory.add(pages(0, PAGES), HOST).unwrap();
    space.map(pages(0, PAGES), 0, Access::ReadWrite).unwrap();
    space.set_tracking(true).unwrap();
    (space, memory, fake)
}

fn numbers_of(runs: impl Iterator<Item = IovaRange>) -> Vec<u64> {
    let page = |iova: Iova| (iova.get() >> 12) - GUEST;
    runs.flat_map(|run| page(run.start())..=page(run.last()))
        .collect()
}

fn harvest(space: &AddressSpace, range: IovaRange) -> Vec<u64> {
    let mut words = vec![0u64; PAGES.div_ceil(64) as usize];
    let request = HarvestRequest::new(range, Granule::K4);
    let lease = space
        .harvest(&request, UserBitmap::new(&mut words))
        .unwrap();
    let lease = lease.sync().unwrap();
    let found = numbers_of(lease.runs());
    lease.commit();
    found
}

/// xorshift64*, so that a failure can be repeated.
struct Random(u64);

impl Random {
    fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) % n
    }
}

/// Parts are harvested, committed, dropped; calls fail half-way, and do not say what they did; the kernel keeps few or many regions.
/// In the end the copy is the memory.
#[test]
fn no_write_is_lost() {
    for seed in 1..=10u64 {
        let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        let (space, _memory, fake) = process();
        let mut copy = vec![0; PAGES as usize];
        fake.with(|state| state.buffer = 1 + random.below(512) as usize);
        for _ in 0..12 {
            let step = 1 + random.below(40);
            let (mut page, many) = (random.below(PAGES), random.below(3000));
            for _ in 0..many {
                fake.write(page);
                page = (page + step) % PAGES;
            }
            if random.below(3) == 0 {
                let calls = random.below(5) as u32;
                fake.with(|state| state.fail_in = Some(calls));
            }
            let from = random.below(PAGES);
            let range = pages(from, 1 + random.below(PAGES - from));
            let mut words = vec![0u64; PAGES.div_ceil(64) as usize];
            let request = HarvestRequest::new(range, Granule::K4);
            let lease = match space.harvest(&request, UserBitmap::new(&mut words)) {
                Ok(lease) => lease,
                Err(HarvestError::Stopped(stopped)) => stopped.lease,
                Err(error) => panic!("{error}"),
            };
            fake.write(random.below(PAGES));
            let lease = lease.sync().unwrap();
            if random.below(4) > 0 {
                for page in numbers_of(lease.runs()) {
                    copy[page as usize] = fake.with(|state| state.content[page as usize]);
                }
                lease.commit();
            }
            fake.with(|state| state.fail_in = None);
        }
        for page in harvest(&space, pages(0, PAGES)) {
            copy[page as usize] = fake.with(|state| state.content[page as usize]);
        }
        let lost = fake.with(|state| {
            let differs = |n: &usize| copy[*n] != state.content[*n];
            (0..PAGES as usize).find(differs)
        });
        assert_eq!(lost, None, "seed {seed}");
        assert_eq!(harvest(&space, pages(0, PAGES)), [0u64; 0], "seed {seed}");
    }
}

/// With more than 512 regions the kernel says that it stopped where it last handed some out, though it came further: whoever goes on
/// from there counts pages twice, and whoever goes on behind the last region if the output is full is right as well.
#[test]
fn more_regions_than_the_kernel_keeps_come_out_once() {
    for (buffer, every) in [(512, 3), (100, 3), (1, 2), (512, 16), (7, 200)] {
        let (space, _memory, fake) = process();
        fake.with(|state| state.buffer = buffer);
        let written: Vec<u64> = (0..PAGES).step_by(every).collect();
        written.iter().for_each(|page| fake.write(*page));
        let mut words = vec![0u64; PAGES.div_ceil(64) as usize];
        let request = HarvestRequest::new(pages(0, PAGES), Granule::K4);
        let peeked = space.peek(&request, UserBitmap::new(&mut words)).unwrap();
        assert_eq!(numbers_of(peeked.runs()), written, "kept {buffer}");
        assert_eq!(harvest(&space, pages(0, PAGES)), written, "kept {buffer}");
        assert_eq!(harvest(&space, pages(0, PAGES)), [0u64; 0]);
    }
}

/// A call that fails has protected pages, and does not tell which: without care, their writes are gone.
#[test]
fn a_call_that_fails_makes_its_piece_dirty() {
    let (space, _memory, fake) = process();
    fake.write(100);
    fake.write(20_000);
    fake.with(|state| state.fail_in = Some(1));
    let mut words = vec![0u64; PAGES.div_ceil(64) as usize];
    let request = HarvestRequest::new(pages(0, PAGES), Granule::K4);
    let Err(HarvestError::Stopped(stopped)) = space.harvest(&request, UserBitmap::new(&mut words))
    else {
        panic!("the second piece fails");
    };
    // The second piece begins 16384 pages behind the first address that is a multiple of 64 MiB.
    let second = 16_384 - 5;
    assert_eq!(stopped.at, pages(second, 1).start());
    assert_eq!(stopped.lease.report().bits_set, 1);
    assert_eq!(stopped.lease.sync().unwrap().commit().bits_set, 1);
    let found = harvest(&space, pages(0, PAGES));
    assert_eq!(found, (second..second + 16_384).collect::<Vec<_>>());
}

#[test]
fn memory_that_was_unmapped_stops_the_harvest_there() {
    let (space, memory, fake) = process();
    [10, 900, 1100, 2000]
        .iter()
        .for_each(|page| fake.write(*page));
    fake.with(|state| state.mapped[1000..1200].fill(false));
    let mut words = vec![0u64; PAGES.div_ceil(64) as usize];
    let request = HarvestRequest::new(pages(0, PAGES), Granule::K4);
    let Err(HarvestError::Stopped(stopped)) = space.harvest(&request, UserBitmap::new(&mut words))
    else {
        panic!("a hole");
    };
    assert_eq!(stopped.at, pages(1000, 1).start());
    let hole = HOST + (1000 << 12);
    let text = format!("the memory at {hole:#x} was unmapped: remove it, or map and add it anew");
    assert!(
        stopped.error.to_string().ends_with(&text),
        "{}",
        stopped.error
    );
    assert_eq!(numbers_of(stopped.lease.sync().unwrap().runs()), [10, 900]);
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
    let Err(HarvestError::Stopped(stopped)) = refused else {
        panic!("not tracked");
    };
    assert_eq!(stopped.at, pages(0, 1).start());
    assert!(stopped.error.to_string().contains("PAGEMAP_SCAN failed"));
    drop(stopped);
    // Page 10 came before the one that refused, and was protected by the call.
    fake.with(|state| state.registered.fill(true));
    assert!(harvest(&space, pages(0, PAGES)).contains(&10));
}

#[test]
fn a_kernel_that_stands_still_is_not_asked_for_ever() {
    let (space, _memory, fake) = process();
    fake.write(700);
    fake.with(|state| state.huge_at = Some(700));
    let request = HarvestRequest::new(pages(0, 1000), Granule::K4);
    let mut words = [0u64; 16];
    let Err(HarvestError::Stopped(stopped)) = space.harvest(&request, UserBitmap::new(&mut words))
    else {
        panic!("it never comes to an end");
    };
    let at = HOST + (700 << 12);
    let Error::Source(error) = stopped.error else {
        panic!("of the source");
    };
    assert!(error.to_string().contains(&format!("{at:#x}")), "{error}");
    drop(stopped.lease);
    fake.with(|state| state.huge_at = None);
    assert!(harvest(&space, pages(0, 1000)).contains(&700));
}

#[test]
fn every_refusal_names_what_is_wrong() {
    let (_space, memory, fake) = process();
    let far = |n: u64| IovaRange::from_len(Iova::new(1 << 50), n).unwrap();
    let taken = memory.add(pages(3, 1), 1 << 50);
    assert!(matches!(taken, Err(PagemapError::Overlap { other, .. }) if other == pages(0, PAGES)));
    let twice = memory.add(far(4096), HOST + 4096);
    assert!(matches!(twice, Err(PagemapError::Overlap { .. })));
    assert!(matches!(
        memory.add(far(100), 0),
        Err(PagemapError::Unaligned { .. })
    ));
    assert!(matches!(
        memory.add(far(4096), 8),
        Err(PagemapError::Unaligned { .. })
    ));
    let wraps = memory.add(far(8192), !0 << 12);
    assert!(matches!(wraps, Err(PagemapError::Wraps { .. })));
    memory.remove(pages(0, PAGES)).unwrap();
    fake.with(|state| state.mapped[77] = false);
    let unmapped = memory.add(pages(0, PAGES), HOST);
    let hole = HOST + (77 << 12);
    assert!(matches!(unmapped, Err(PagemapError::Unmapped { address }) if address == hole));
    fake.with(|state| assert!(!state.registered[0], "touched before it was checked"));
}
