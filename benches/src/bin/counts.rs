//! What the hot paths cost in instructions, for `.ci/counts`: it runs each workload under
//! callgrind, which counts what runs inside of [`counted`] alone. Counts do not depend on how busy
//! a machine is.
//!
//! ```text
//! counts              the names of all workloads, and how many operations each one counts
//! counts NAME         runs one of them
//! ```

use std::hint::black_box;
use std::ops::Range;
use std::process::ExitCode;

use dirtymap::area::AreaMap;
use dirtymap::{Access, AddressSpace, Granule, Iova, IovaRange, Mapping, ToIovaRange};
use dirtymap_benches::compare::tables;
use dirtymap_benches::peers::{Several, Shared, ThroughHandle, ThroughSpace};
use dirtymap_benches::workloads::{self, clusters, distinct};
use dirtymap_benches::{Areas, PAGE, Peer, Tracker};
use dirtymap_store::{Device, DirFolder, Options, Store};
use pagetable_sim::{AmdV1, LeafSizes, Table};

/// Pages of the memory: 64 GiB.
const PAGES: u64 = 1 << 24;
/// Words of a bitmap of them.
const WORDS: usize = (PAGES / 64) as usize;
/// Bits of a cache line.
const LINE: u64 = 512;
/// Bits of a chunk.
const CHUNK: u64 = 1 << 15;
/// Operations of the workloads that repeat one.
const TIMES: u64 = 1 << 12;
/// A page of the middle of the memory.
const HOT: u64 = 12_345 * PAGE;
/// A range of eight words.
const RANGE: u64 = 2 << 20;
/// A range of eight chunks.
const LONG: u64 = 1 << 30;

/// A workload: its name, how many operations it counts, and the function that runs it.
type Workload = (&'static str, u64, fn());

const WORKLOADS: &[Workload] = &[
    ("mark-hot-handle", TIMES, mark_hot::<ThroughHandle>),
    ("mark-hot-space", TIMES, mark_hot::<ThroughSpace>),
    ("mark-cold", TIMES, || mark_cold(PAGE)),
    ("mark-2m-clean", TIMES, || mark_cold(RANGE)),
    ("mark-2m-again", TIMES, || mark_again(RANGE)),
    ("mark-1g-clean", LONG_RANGES, || mark_cold(LONG)),
    ("mark-1g-again", TIMES, || mark_again(LONG)),
    ("harvest-clean-line", PAGES / LINE, || harvest(0)),
    ("harvest-dirty-line", PAGES / LINE, || harvest(LINE)),
    ("harvest-dirty-word", PAGES / 64, || harvest(64)),
    ("harvest-piece-line", PAGES / LINE, || harvest_whole(RANGE)),
    ("harvest-whole-chunk", PAGES / CHUNK, || {
        harvest_whole(PAGES * PAGE)
    }),
    ("harvest-dirty-line-2-consumers", PAGES / LINE, || {
        harvest_for(2, 0)
    }),
    ("harvest-dirty-line-4-consumers", PAGES / LINE, || {
        harvest_for(4, 0)
    }),
    ("harvest-dirty-line-left", PAGES / LINE, || {
        harvest_for(2, 1)
    }),
    ("lookup-100k-areas", TIMES, lookup),
    ("area-remove-insert", TIMES, remap::<AreaMap<Mapping>>),
    ("area-remove-insert-batch", TIMES, remap_batches),
    ("area-remove-insert-space", TIMES, remap::<AddressSpace>),
    ("area-scan", AREAS, scan),
    ("table-clean-leaf", LEAVES, || {
        table(LEAVES, Granule::K4, 0, 1)
    }),
    ("table-dirty-leaf", LEAVES, || {
        table(LEAVES, Granule::K4, 1000, 1)
    }),
    ("table-1-percent", LEAVES, || {
        table(LEAVES, Granule::K4, 10, 1)
    }),
    ("table-1-percent-clusters", LEAVES, || {
        table(LEAVES, Granule::K4, 10, 512)
    }),
    ("table-10-percent", LEAVES, || {
        table(LEAVES, Granule::K4, 100, 1)
    }),
    ("table-10-percent-2m", LEAVES, || {
        table(LEAVES, Granule::M2, 100, 1)
    }),
    ("table-10-percent-2m-64g", FEW_LEAVES, || {
        table(FEW_LEAVES, Granule::M2, 100, 1)
    }),
    ("store-write-open", TIMES, store_write_open),
    ("store-write-handle", TIMES, store_write_handle),
];

/// Ranges of 1 GiB that are marked.
const LONG_RANGES: u64 = 32;

/// Leaves of the table that is harvested: 1 GiB of small ones.
const LEAVES: u64 = 1 << 18;
/// Leaves of a small table, where the first gaps of what is owed count most: 64 GiB of large ones.
const FEW_LEAVES: u64 = 1 << 15;

fn main() -> ExitCode {
    let Some(name) = std::env::args().nth(1) else {
        WORKLOADS
            .iter()
            .for_each(|(name, operations, _)| println!("{name} {operations}"));
        return ExitCode::SUCCESS;
    };
    match WORKLOADS.iter().find(|workload| workload.0 == name) {
        Some((.., run)) => {
            run();
            ExitCode::SUCCESS
        }
        None => {
            eprintln!("no workload is called {name}; without an argument, counts lists them all");
            ExitCode::FAILURE
        }
    }
}

/// The tool counts from the call of this function to its return. The name is unmangled so that the
/// command line of the tool can give it.
#[inline(never)]
// SAFETY: no other symbol of this program has this name.
#[unsafe(no_mangle)]
fn counted(work: &mut dyn FnMut()) {
    work();
}

fn mark_hot<P: Peer>() {
    let peer = P::new(PAGES);
    peer.mark(HOT, PAGE);
    counted(&mut || (0..TIMES).for_each(|_| peer.mark(black_box(HOT), black_box(PAGE))));
}

/// Marks of clean ranges of `len` bytes at random places, in memory that is there already.
fn mark_cold(len: u64) {
    let peer = cleaned();
    let starts: Vec<u64> = distinct(TIMES.min(PAGES * PAGE / len / 2), PAGES * PAGE / len)
        .iter()
        .map(|at| at * len)
        .collect();
    counted(&mut || {
        starts
            .iter()
            .for_each(|start| peer.mark(black_box(*start), len))
    });
}

/// Marks of `len` bytes that are dirty already.
fn mark_again(len: u64) {
    let peer = ThroughHandle::new(PAGES);
    let start = HOT & !(len - 1);
    peer.mark(start, len);
    counted(&mut || (0..TIMES).for_each(|_| peer.mark(black_box(start), black_box(len))));
}

/// A memory of which each line was marked and harvested, so that all that marks allocate is there.
fn cleaned() -> ThroughHandle {
    let peer = ThroughHandle::new(PAGES);
    mark_one_in(&peer, LINE);
    peer.harvest(&mut vec![0; WORDS]);
    peer
}

/// Marks the pages whose number is a multiple of `every`, so that all lines cost alike.
fn mark_one_in(peer: &impl Tracker, every: u64) {
    (0..PAGES)
        .step_by(every as usize)
        .for_each(|page| peer.mark_page(page));
}

/// A harvest in which one page of `every` is dirty; of none if `every` is 0.
fn harvest(every: u64) {
    let peer = cleaned();
    if every > 0 {
        mark_one_in(&peer, every);
    }
    let mut bitmap = vec![0; WORDS];
    counted(&mut || peer.harvest(black_box(&mut bitmap)));
}

/// A harvest in which all pages are dirty, marked in pieces of `piece` bytes.
fn harvest_whole(piece: u64) {
    let peer = cleaned();
    (0..PAGES * PAGE)
        .step_by(piece as usize)
        .for_each(|start| peer.mark(start, piece));
    let mut bitmap = vec![0; WORDS];
    counted(&mut || peer.harvest(black_box(&mut bitmap)));
}

/// A harvest of the consumer `nth` of a space with `consumers`, in which one page of a line is
/// dirty: the first one takes it and leaves it to the others, each of which takes what was left.
fn harvest_for(consumers: u64, nth: u64) {
    let peer = Several::for_consumers(PAGES, consumers);
    let mut bitmap = vec![0; WORDS];
    // What marks and the first harvests allocate is there afterwards.
    for _ in 0..2 {
        mark_one_in(&peer, LINE);
        (0..consumers).for_each(|nth| peer.harvest_for(nth, &mut bitmap));
    }
    mark_one_in(&peer, LINE);
    (0..nth).for_each(|nth| peer.harvest_for(nth, &mut bitmap));
    bitmap.fill(0);
    counted(&mut || peer.harvest_for(nth, black_box(&mut bitmap)));
}

/// Areas of a map that is looked up, changed or scanned.
const AREAS: u64 = 100_000;

/// A map of the areas of the comparison, each mapped, then removed and inserted again at random, so
/// that nodes and allocator are in the state of a map that has lived for some time. Also the
/// areas in that order.
fn lived_in<A: Areas>() -> (A, Vec<Mapping>) {
    let areas = A::new();
    let mappings = workloads::areas(AREAS as usize);
    mappings.iter().for_each(|mapping| areas.map(*mapping));
    let order = distinct(AREAS, AREAS);
    let shuffled: Vec<_> = order.iter().map(|at| mappings[*at as usize]).collect();
    areas.remap_all(&shuffled);
    (areas, shuffled)
}

/// Removes an area and inserts it again.
fn remap<A: Areas>() {
    let (areas, shuffled) = lived_in::<A>();
    counted(&mut || areas.remap_all(black_box(&shuffled[..TIMES as usize])));
}

fn remap_batches() {
    let (areas, shuffled) = lived_in::<AreaMap<Mapping>>();
    counted(&mut || {
        for batch in shuffled[..TIMES as usize].chunks(1 << 10) {
            assert!(
                areas.remap_batch(black_box(batch)),
                "the tree changes in one step"
            );
        }
    });
}

fn scan() {
    let (areas, _) = lived_in::<AreaMap<Mapping>>();
    counted(&mut || {
        black_box(Areas::scan(&areas));
    });
}

fn lookup() {
    let space = <AddressSpace as Areas>::new();
    for at in 0..AREAS {
        sure(space.map(page_range(at * 2, 1), at * PAGE, Access::ReadWrite));
    }
    let places = distinct(TIMES, AREAS);
    counted(&mut || {
        for at in &places {
            black_box(Areas::lookup(&space, black_box(at * 2 * PAGE)));
        }
    });
}

/// A harvest of a table of `leaves` of size `leaf`, of which `permille` are dirty, in clusters of
/// `cluster`.
fn table(leaves: u64, leaf: Granule, permille: u64, cluster: u64) {
    let table = Table::<AmdV1>::new();
    let bytes = leaves * leaf.bytes();
    let range = |part: Range<u64>| {
        let (start, end) = (part.start * leaf.bytes(), part.end * leaf.bytes());
        sure((start..end).to_iova_range())
    };
    let all = range(0..leaves);
    sure(table.map(all, 0, Access::ReadWrite, LeafSizes::only(leaf)));
    let dirty = match permille {
        1000 => std::iter::once(0..leaves).collect(),
        _ => clusters(leaves * permille / 1000, cluster, leaves),
    };
    for run in dirty {
        sure(table.make_dirty(range(run)));
    }
    let mut words = vec![0u64; (leaves / 64) as usize];
    counted(&mut || tables::harvest(&table, 0, bytes, leaf, &mut words));
}

/// Writes to an extent that is durably open, from the announcement to the end of the write.
fn store_write_open() {
    let folder = sure(tempfile::tempdir());
    let device = Device {
        id: 1,
        len: PAGES * PAGE,
    };
    let log = sure(DirFolder::new(folder.path().join("store")));
    let store = sure(Store::create(log, &device, &Options::new()));
    let write = || {
        drop(sure(
            sure(store.begin_write(black_box(HOT..HOT + PAGE))).wait(),
        ))
    };
    write();
    counted(&mut || (0..TIMES).for_each(|_| write()));
}

/// The same by a handle.
fn store_write_handle() {
    let folder = sure(tempfile::tempdir());
    let device = Device {
        id: 1,
        len: PAGES * PAGE,
    };
    let log = sure(DirFolder::new(folder.path().join("store")));
    let store = sure(Store::create(log, &device, &Options::new()));
    let writer = store.writer();
    let write = || drop(sure(writer.begin_write(black_box(HOT..HOT + PAGE))));
    write();
    counted(&mut || (0..TIMES).for_each(|_| write()));
}

fn page_range(page: u64, pages: u64) -> IovaRange {
    sure(IovaRange::from_len(Iova::new(page * PAGE), pages * PAGE))
}

fn sure<T, E: std::fmt::Display>(result: Result<T, E>) -> T {
    result.unwrap_or_else(|error| unreachable!("the workload is valid: {error}"))
}
