//! The logic of the adapter against a kernel of our own, which has the quirks of the real one, on
//! demand.

mod growth;
mod parts;

use std::io;

use super::ioctl::{Find, Region, Scanned, table_bytes};
use super::owners::Owners;
use super::sweep::{Ask, sweep_nothing};
use super::*;
use dirtymap::source::FlushGather;
use dirtymap::{Access, AddressSpace, DirtySource, Error, HarvestRequest, Iova, UserBitmap};

/// Where the memory lies in the fake process, not at the begin of a piece, and where it is
/// reported.
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
    /// The call that fails, counted from the next on, when it has protected half of what it was
    /// asked for.
    fail_in: Option<u32>,
    scans: u64,
    /// A page that is never written as a part.
    huge_at: Option<usize>,
    /// Pages without a page table.
    without_table: Vec<bool>,
    /// Whether pages can be probed without a scan.
    probes: bool,
    /// What the kernel says instead of where it stopped, of a scan from one address to another.
    walk_end: Option<fn(u64, u64) -> u64>,
    /// The process that made all this, when another one asks.
    maker: Option<u32>,
    /// The first address that is not private.
    shared: Option<u64>,
}

#[derive(Clone)]
struct Fake(Arc<Mutex<State>>, Arc<Owners>);

impl Fake {
    fn new() -> Self {
        let all = |value| vec![value; PAGES as usize];
        let state = Mutex::new(State {
            protected: all(false),
            registered: all(false),
            mapped: all(true),
            content: vec![0; PAGES as usize],
            buffer: 512,
            fail_in: None,
            scans: 0,
            huge_at: None,
            without_table: all(false),
            probes: true,
            walk_end: None,
            maker: None,
            shared: None,
        });
        Fake(Arc::new(state), Arc::new(Owners::new().unwrap()))
    }

    fn with<R>(&self, f: impl FnOnce(&mut State) -> R) -> R {
        f(&mut lock(&self.0))
    }

    fn write(&self, page: u64) {
        self.with(|state| {
            state.content[page as usize] += 1;
            state.protected[page as usize] = false;
            state.without_table[page as usize] = false;
        });
    }

    /// The pages are given back with the page tables that they had for themselves.
    fn give_back(&self, pages: std::ops::Range<usize>) {
        self.with(|state| {
            state.content[pages.clone()].fill(0);
            state.protected[pages.clone()].fill(false);
            state.without_table[pages].fill(true);
        });
    }
}

fn numbers(start: u64, end: u64) -> std::ops::Range<usize> {
    ((start - HOST) >> 12) as usize..((end - HOST) >> 12) as usize
}

impl Kernel for Fake {
    fn of_another_process(&self) -> Option<u32> {
        self.with(|state| state.maker)
    }

    fn owners(&self) -> &Owners {
        &self.1
    }

    fn not_private(&self, _: u64, _: u64) -> io::Result<Option<u64>> {
        Ok(self.with(|state| state.shared))
    }

    fn skips_tables(&self) -> bool {
        true
    }

    fn probe(&self, pages: &[u64], there: &mut [i32]) {
        self.with(|state| {
            for (page, there) in pages.iter().zip(there).filter(|_| state.probes) {
                let page = numbers(*page, page + 4096).start;
                *there = if state.without_table[page] { -2 } else { 0 };
            }
        });
    }

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

    fn scan(
        &self,
        (start, end): (u64, u64),
        find: Find,
        protect: bool,
        out: &mut [Region],
    ) -> io::Result<Scanned> {
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
                let nothing = state.without_table[page];
                if state.protected[page] || nothing != (find == Find::Nothing) {
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
                    state.without_table[page] = false;
                }
            }
            // As the real one: the end only if nothing was handed out before it.
            let walk_end = if walk_end == 0 { end } else { walk_end };
            let walk_end = state.walk_end.map_or(walk_end, |lie| lie(start, end));
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
    let space = AddressSpace::with_source(Granule::K4, Arc::clone(&memory)).unwrap();
    memory.add(pages(0, PAGES), HOST).unwrap();
    space.map(pages(0, PAGES), 0, Access::ReadWrite).unwrap();
    space.start_tracking().unwrap();
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

/// A harvest that must stop: where, with which error, and what of the range below is dirty.
fn stops(space: &AddressSpace, range: IovaRange) -> (Iova, String, Vec<u64>) {
    let mut words = vec![0u64; PAGES.div_ceil(64) as usize];
    let request = HarvestRequest::new(range, Granule::K4);
    let lease = space
        .harvest(&request, UserBitmap::new(&mut words))
        .unwrap();
    let stopped = lease
        .stopped()
        .unwrap_or_else(|| panic!("it does not stop"));
    let (at, error) = (stopped.at, stopped.error.to_string());
    let runs = match lease.partial().sync() {
        Ok(lease) => {
            let found = numbers_of(lease.runs());
            lease.commit();
            found
        }
        Err(_) => Vec::new(),
    };
    (at, error, runs)
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

/// Parts are harvested, committed, dropped; calls fail half-way, and do not say what they did; the
/// kernel keeps few or many regions. In the end the copy is the memory.
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
            let lease = space
                .harvest(&request, UserBitmap::new(&mut words))
                .unwrap()
                .partial();
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

/// With more than 512 regions the kernel says that it stopped where it last handed some out, though
/// it came further. A scan that goes on from there counts pages twice. One that goes on after the
/// last region, if the output is full, is right as well.
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

/// A call that fails has protected pages, and does not tell which: without care, their writes are
/// gone.
#[test]
fn a_call_that_fails_makes_its_piece_dirty() {
    let (space, _memory, fake) = process();
    fake.write(100);
    fake.write(20_000);
    fake.with(|state| state.fail_in = Some(1));
    let mut words = vec![0u64; PAGES.div_ceil(64) as usize];
    let request = HarvestRequest::new(pages(0, PAGES), Granule::K4);
    let lease = space
        .harvest(&request, UserBitmap::new(&mut words))
        .unwrap();
    let stopped = lease
        .stopped()
        .unwrap_or_else(|| panic!("the second piece fails"));
    // The second piece begins 16384 pages above the first address that is a multiple of 64 MiB.
    let second = 16_384 - 5;
    assert_eq!(stopped.at, pages(second, 1).start());
    assert_eq!(lease.report().bits_set, 1);
    assert_eq!(lease.partial().sync().unwrap().commit().bits_set, 1);
    let found = harvest(&space, pages(0, PAGES));
    assert_eq!(found, (second..second + 16_384).collect::<Vec<_>>());
}

/// The end of tracking goes on after a piece that the kernel refused, with the first page above it.
#[test]
fn the_page_above_a_refused_piece_is_found_when_tracking_ends() {
    let (space, _memory, fake) = process();
    let second = 16_384 - 5;
    fake.write(second);
    fake.with(|state| state.fail_in = Some(0));
    space.stop_tracking().unwrap();
    let found = harvest(&space, pages(0, PAGES));
    assert_eq!(found, (0..=second).collect::<Vec<_>>());
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

#[test]
fn a_kernel_that_stands_still_is_not_asked_for_ever() {
    let (space, _memory, fake) = process();
    fake.write(700);
    fake.with(|state| state.huge_at = Some(700));
    let request = HarvestRequest::new(pages(0, 1000), Granule::K4);
    let mut words = [0u64; 16];
    let lease = space
        .harvest(&request, UserBitmap::new(&mut words))
        .unwrap();
    let stopped = lease
        .stopped()
        .unwrap_or_else(|| panic!("it never comes to an end"));
    let at = HOST + (700 << 12);
    let Error::Source(error) = &stopped.error else {
        panic!("of the source");
    };
    assert!(error.to_string().contains(&format!("{at:#x}")), "{error}");
    drop(lease);
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

/// The place where a scan says that it stopped is a number from outside. Too far: what is above the
/// last region of a full output was not scanned. Too near: a caller that goes on from there stands
/// still, or sees pages again.
#[test]
fn a_kernel_that_lies_about_where_it_stopped_loses_no_write() {
    let too_far: [fn(u64, u64) -> u64; 2] = [|_, end| end, |_, _| u64::MAX];
    let too_near: [fn(u64, u64) -> u64; 2] = [|start, _| start, |_, _| 0];
    // More regions than one output holds, in each piece.
    let written: Vec<u64> = (0..PAGES).step_by(2).collect();
    for lie in too_far {
        let (space, _memory, fake) = process();
        fake.with(|state| state.walk_end = Some(lie));
        written.iter().for_each(|page| fake.write(*page));
        assert_eq!(harvest(&space, pages(0, PAGES)), written);
        assert_eq!(harvest(&space, pages(0, PAGES)), [0u64; 0]);
    }
    for lie in too_near {
        let (space, _memory, fake) = process();
        fake.with(|state| state.walk_end = Some(lie));
        [10, 11, 400].iter().for_each(|page| fake.write(*page));
        // It went as far as its last region, and says then that it stands still.
        let (at, error, below) = stops(&space, pages(0, 1000));
        assert_eq!((at, below), (pages(0, 1).start(), vec![]));
        let stands = HOST + (401 << 12);
        assert!(
            error.contains(&format!("stands still at {stands:#x}")),
            "{error}"
        );
        fake.with(|state| state.walk_end = None);
        let found = harvest(&space, pages(0, 1000));
        assert!([10, 11, 400].iter().all(|page| found.contains(page)));
    }
}

/// A scan goes by addresses, and does not ask whose memory is there: after an unmap and a map, the
/// tracker that had the old memory took the dirty pages of the one that has the new memory.
#[test]
fn memory_that_another_tracker_has_by_now_is_not_taken() {
    let (space, memory, fake) = process();
    fake.write(5);
    // Unmapped, mapped anew, added to another tracker.
    fake.with(|state| state.registered.fill(false));
    let other = ProcessMemory::with_kernel(Box::new(fake.clone()), Granule::K4);
    let other = Arc::new(other);
    let anew = AddressSpace::with_source(Granule::K4, Arc::clone(&other)).unwrap();
    // It is enough that they share a page.
    let last = pages(PAGES - 1, 1);
    other.add(last, HOST + ((PAGES - 1) << 12)).unwrap();
    anew.map(last, 0, Access::ReadWrite).unwrap();
    anew.start_tracking().unwrap();
    fake.write(PAGES - 1);

    let (at, error, below) = stops(&space, pages(0, PAGES));
    assert_eq!((at, below), (pages(0, 1).start(), vec![]));
    let text = format!("the memory from {HOST:#x} on was mapped anew");
    assert!(error.contains(&text), "{error}");
    let mut words = vec![0u64; PAGES.div_ceil(64) as usize];
    let request = HarvestRequest::new(pages(0, PAGES), Granule::K4);
    let error = space
        .peek(&request, UserBitmap::new(&mut words))
        .unwrap_err();
    assert!(error.to_string().contains(&text), "{error}");
    space.stop_tracking().unwrap();
    let error = space.start_tracking().unwrap_err();
    assert!(error.to_string().contains(&text), "{error}");

    // The stale one goes, and takes nothing from the other: not a page, and not the registration.
    memory.remove(pages(0, PAGES)).unwrap();
    assert_eq!(harvest(&anew, last), [PAGES - 1]);
    fake.write(PAGES - 1);
    assert_eq!(harvest(&anew, last), [PAGES - 1]);
    // What was dirty in memory that is not there any more: all of it, for the unmap.
    let unmapped = space.unmap_discarding(pages(0, PAGES)).unwrap();
    assert_eq!(unmapped.discarded_bytes, u128::from(PAGES << 12));
}

/// Another tracker on the same kernel, with a space of its own over `range`, tracking.
fn another(fake: &Fake, range: IovaRange) -> (AddressSpace, Arc<ProcessMemory>) {
    let memory = ProcessMemory::with_kernel(Box::new(fake.clone()), Granule::K4);
    let memory = Arc::new(memory);
    let space = AddressSpace::with_source(Granule::K4, Arc::clone(&memory)).unwrap();
    let first = range.start().get() - (GUEST << 12);
    memory.add(range, HOST + first).unwrap();
    space.map(range, 0, Access::ReadWrite).unwrap();
    space.start_tracking().unwrap();
    (space, memory)
}

/// The area of memory that another tracker has by now is unmapped, with no call before it: the
/// unmap scans nothing, so the page stays with the other tracker.
#[test]
fn an_unmap_of_memory_that_another_tracker_has_takes_nothing() {
    let (space, _memory, fake) = process();
    fake.with(|state| state.registered.fill(false));
    let (anew, _other) = another(&fake, pages(0, PAGES));
    fake.write(5);
    let unmapped = space.unmap_discarding(pages(0, PAGES)).unwrap();
    assert_eq!(unmapped.discarded_bytes, u128::from(PAGES << 12));
    assert_eq!(harvest(&anew, pages(0, PAGES)), [5]);
}

/// Memory that was removed is on no list: a tracker that is given it later takes nothing over, and
/// what was dirty by the removal is all that is dirty.
#[test]
fn memory_that_was_removed_is_not_lost_to_a_later_tracker() {
    let (space, memory, fake) = process();
    fake.write(5);
    memory.remove(pages(0, PAGES)).unwrap();
    let (_anew, _other) = another(&fake, pages(0, PAGES));
    let unmapped = space.unmap_discarding(pages(0, PAGES)).unwrap();
    assert_eq!(unmapped.discarded_bytes, 1 << 12);
}

/// Memory right below and right above that of a tracker belongs to other ones.
#[test]
fn neighbours_are_not_taken_over() {
    let fake = Fake::new();
    let (space, _memory) = another(&fake, pages(10, 10));
    let (_below, _other) = another(&fake, pages(0, 10));
    let (_above, _third) = another(&fake, pages(20, 10));
    [10, 19].iter().for_each(|page| fake.write(*page));
    assert_eq!(harvest(&space, pages(10, 10)), [10, 19]);
}

/// Botan's generator had its state twice after a `fork`; here the child has the descriptors, which
/// act on the memory of its parent: a scan of the child took what the parent was to report.
#[test]
fn a_child_of_fork_is_refused_by_every_call() {
    let (space, memory, fake) = process();
    fake.write(5);
    let scans = fake.with(|state| {
        state.maker = Some(4711);
        state.scans
    });
    let text = "this tracker is of process 4711";
    let refused = |error: &dyn std::fmt::Display| {
        let error = error.to_string();
        assert!(error.contains(text), "{error}");
    };
    // The lock may be held by a thread that the child has not got: no call takes it.
    let held = (lock(&memory.tracking), lock(&memory.memory));
    refused(&memory.add(pages(PAGES, 1), 1 << 50).unwrap_err());
    refused(&memory.remove(pages(0, PAGES)).unwrap_err());
    refused(&space.stop_tracking().unwrap_err());
    let mut words = vec![0u64; PAGES.div_ceil(64) as usize];
    let request = HarvestRequest::new(pages(0, PAGES), Granule::K4);
    refused(
        &space
            .peek(&request, UserBitmap::new(&mut words))
            .unwrap_err(),
    );
    let refusal = space.harvest(&request, UserBitmap::new(&mut words));
    let lease = refusal.unwrap();
    let stopped = lease
        .stopped()
        .unwrap_or_else(|| panic!("the child harvests"));
    assert_eq!(stopped.at, pages(0, 1).start());
    refused(&stopped.error);
    refused(&memory.invalidate(&FlushGather::new()).unwrap_err());
    let far = IovaRange::from_len(Iova::new(1 << 50), 4096).unwrap();
    refused(&space.map(far, 0, Access::ReadWrite).unwrap_err());
    space.unmap_discarding(pages(0, PAGES)).unwrap_err();
    drop(held);
    fake.with(|state| {
        assert_eq!(state.scans, scans, "the child looked");
        state.maker = None;
    });
    // The unmap told that all is dirty, here of the space that the child has a copy of.
    assert!(harvest(&space, pages(0, PAGES)).contains(&5));
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
