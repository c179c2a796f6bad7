//! The logic of the adapter against a kernel of our own, which has the quirks of the real one, on
//! demand.

mod growth;
mod losses;
mod mappings;
mod parts;
mod trackers;

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
