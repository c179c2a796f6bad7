//! Harvests of IO page tables: read and clear the dirty bits of all leaves, into the caller's
//! bitmap.
//!
//! Our library records and owes the leaves that it clears. The walk that looks at each entry does
//! neither. The limit is the time to read the tables in the order of the walk.

use std::cell::RefCell;
use std::hint::black_box;
use std::ops::Range;
use std::time::Instant;

use dirtymap::flush::FlushGather;
use dirtymap::source::LeafSink;
use dirtymap::sync::thread;
use dirtymap::{Access, Granule, Iova, IovaRange, UserBitmap};
use pagetable_sim::{AmdV1, LeafSizes, Table};

use super::{Contestant, Family, Report, Scale, Settings, Target, Workload, contest};
use crate::peers::naive_table::{ENTRIES, NaiveTable};
use crate::workloads::{clusters, shuffled};

/// Harvests of tables.
pub const FAMILY: Family = Family {
    name: "tables",
    run,
    grow: Some(grow),
};

const GIB: u64 = 1 << 30;
/// The leaves of a cluster of dirty ones.
const CLUSTER: u64 = 512;

/// Tables, and the kind of their walk.
#[derive(Clone, Copy)]
struct Shape {
    leaf: Granule,
    bytes: u64,
    scattered: bool,
}

/// The dirty leaves at the time of a harvest.
#[derive(Clone, Copy)]
struct Dirty {
    name: &'static str,
    /// The number of dirty leaves of 1000.
    permille: u64,
    cluster: u64,
    /// The target for the walk of each entry, as a ratio to our time, for tables that are adjacent
    /// in memory.
    target: Option<f64>,
}

const DIRTY: [Dirty; 6] = [
    Dirty::new("clean", 0, 1, None),
    Dirty::new("0.1 % dirty", 1, 1, None),
    Dirty::new("1 % dirty", 10, 1, Some(0.38 / 0.35)),
    Dirty::new("1 % dirty in clusters", 10, CLUSTER, None),
    Dirty::new("10 % dirty", 100, 1, Some(1.06 / 0.70)),
    Dirty::new("100 % dirty", 1000, 1, Some(2.64 / 2.60)),
];

impl Dirty {
    const fn new(name: &'static str, permille: u64, cluster: u64, target: Option<f64>) -> Self {
        Dirty {
            name,
            permille,
            cluster,
            target,
        }
    }

    /// Runs of dirty leaves, ascending.
    fn runs(self, leaves: u64) -> Vec<Range<u64>> {
        match self.permille {
            0 => Vec::new(),
            1000 => std::iter::once(0..leaves).collect(),
            _ => clusters(leaves * self.permille / 1000, self.cluster, leaves),
        }
    }
}

impl Shape {
    fn leaves(self) -> u64 {
        self.bytes / self.leaf.bytes()
    }

    fn name(self, dirty: &str) -> String {
        let place = if self.scattered {
            "scattered"
        } else {
            "side by side"
        };
        let size = if self.bytes >= 1024 * GIB {
            format!("{} TiB", self.bytes / GIB / 1024)
        } else {
            format!("{} GiB", self.bytes / GIB)
        };
        format!("{size} by {}, {place}, {dirty}", self.leaf)
    }

    #[allow(clippy::unwrap_used)] // ranges that are fit
    fn table(self) -> Table<AmdV1> {
        let map = |table: &Table<AmdV1>, start: u64, bytes: u64| {
            let range = IovaRange::from_len(Iova::new(start), bytes).unwrap();
            let sizes = LeafSizes::only(self.leaf);
            table.map(range, start, Access::ReadWrite, sizes).unwrap();
        };
        if !self.scattered {
            let table = Table::new();
            map(&table, 0, self.bytes);
            return table;
        }
        // Each of the lowest tables is allocated when it is needed, so the order of maps decides
        // its place in memory.
        let table = Table::scattered();
        let span = ENTRIES * self.leaf.bytes();
        for nth in shuffled((self.bytes / span) as usize) {
            map(&table, nth as u64 * span, span);
        }
        table
    }
}

/// Both tables, and the caller's bitmap.
struct Pair {
    shape: Shape,
    ours: Table<AmdV1>,
    naive: NaiveTable,
    words: Vec<u64>,
}

impl Pair {
    fn new(settings: &Settings, shape: Shape) -> Self {
        settings.at(format!("mapping {}", shape.name("clean")));
        Pair {
            shape,
            ours: shape.table(),
            naive: NaiveTable::new(shape.leaves(), shape.scattered),
            words: vec![0; (shape.leaves() / 64) as usize],
        }
    }

    #[allow(clippy::unwrap_used)] // ranges that are fit
    fn dirty_ours(&self, runs: &[Range<u64>]) {
        let bytes = self.shape.leaf.bytes();
        for run in runs {
            let start = Iova::new(run.start * bytes);
            if run.end - run.start == 1 {
                self.ours.set_dirty(start);
            } else {
                let len = (run.end - run.start) * bytes;
                let range = IovaRange::from_len(start, len).unwrap();
                self.ours.make_dirty(range).unwrap();
            }
        }
    }

    /// Nanoseconds for each leaf of a harvest by our library, with this number of threads.
    fn time_ours(&mut self, runs: &[Range<u64>], threads: usize) -> f64 {
        self.dirty_ours(runs);
        self.words.fill(0);
        let part = (self.shape.bytes / threads as u64).max(1);
        let table = &self.ours;
        let leaf = self.shape.leaf;
        let began = Instant::now();
        let each = self.words.len() / threads;
        let words = self.words.chunks_mut(each);
        let mut parts: Vec<_> = words
            .enumerate()
            .map(|(nth, words)| (nth as u64 * part, words))
            .collect();
        if let [(start, words)] = &mut parts[..] {
            harvest(table, *start, part, leaf, words);
        } else {
            thread::scope(|scope| {
                for (start, words) in parts {
                    scope.spawn(move || harvest(table, start, part, leaf, words));
                }
            });
        }
        began.elapsed().as_nanos() as f64 / self.shape.leaves() as f64
    }

    fn time_naive(&mut self, runs: &[Range<u64>]) -> f64 {
        runs.iter().for_each(|run| self.naive.dirty(run.clone()));
        self.words.fill(0);
        let began = Instant::now();
        self.naive.harvest(&mut self.words);
        began.elapsed().as_nanos() as f64 / self.shape.leaves() as f64
    }

    fn time_memory(&mut self) -> f64 {
        let began = Instant::now();
        black_box(self.naive.read());
        began.elapsed().as_nanos() as f64 / self.shape.leaves() as f64
    }

    /// The result of the last harvest.
    fn found(&self) -> u64 {
        let add = |sum: u64, word: &u64| sum.wrapping_mul(31).wrapping_add(*word);
        self.words.iter().fold(0, add)
    }
}

/// Moves the dirty bits of the `bytes` from `start` on into `words`, a bit for each `leaf`.
#[allow(clippy::unwrap_used)] // ranges that are fit
pub fn harvest(table: &Table<AmdV1>, start: u64, bytes: u64, leaf: Granule, words: &mut [u64]) {
    let range = IovaRange::from_len(Iova::new(start), bytes).unwrap();
    let mut sink = UserBitmap::new(words).into_sink(range, leaf).unwrap();
    let mut gather = FlushGather::new();
    table
        .read_and_clear(range, &mut LeafSink::new(&mut sink, &mut gather))
        .unwrap();
    black_box(gather.entries());
}

fn put(
    settings: &Settings,
    report: &mut Report,
    family: &'static str,
    pair: &RefCell<Pair>,
    workload: Workload,
    dirty: Dirty,
) {
    let runs = dirty.runs(pair.borrow().shape.leaves());
    let (pair, runs) = (&pair, &runs);
    let ours = |threads| {
        Contestant::ours(
            if threads == 1 {
                "dirtymap"
            } else {
                "dirtymap, 2 threads"
            },
            move || vec![pair.borrow_mut().time_ours(runs, threads)],
        )
        .checked(move || {
            pair.borrow_mut().time_ours(runs, threads);
            pair.borrow().found()
        })
    };
    let mut all = vec![ours(1)];
    if pair.borrow().shape.leaf == Granule::K4 {
        all.push(ours(2));
    }
    all.push(
        Contestant::peer("entry by entry", move || {
            vec![pair.borrow_mut().time_naive(runs)]
        })
        .checked(move || {
            pair.borrow_mut().time_naive(runs);
            pair.borrow().found()
        }),
    );
    all.push(Contestant::limit("memory", move || {
        vec![pair.borrow_mut().time_memory()]
    }));
    contest(settings, report, family, vec![workload], all);
}

fn run(settings: &Settings, report: &mut Report) {
    for leaf in [Granule::K4, Granule::M2] {
        for bytes in [64 * GIB, 1024 * GIB] {
            if !settings.thorough && leaf == Granule::K4 && bytes > 64 * GIB {
                continue; // 4 GiB of tables
            }
            for scattered in [false, true] {
                if !settings.thorough && leaf == Granule::M2 && scattered {
                    continue;
                }
                let shape = Shape {
                    leaf,
                    bytes,
                    scattered,
                };
                let wanted: Vec<Dirty> = DIRTY
                    .into_iter()
                    .filter(|dirty| shape.name(dirty.name).contains(&settings.matching))
                    .collect();
                if wanted.is_empty() {
                    continue;
                }
                let pair = RefCell::new(Pair::new(settings, shape));
                for dirty in wanted {
                    let mut workload = Workload::time(shape.name(dirty.name));
                    if leaf == Granule::M2 && dirty.permille == 100 {
                        workload = workload.target(Target::RatioTo("entry by entry", 1.0));
                    }
                    if leaf == Granule::K4 {
                        workload = match (dirty.permille, scattered) {
                            (0, false) => workload.target(Target::TimesLimit(1.15)),
                            (0, true) => {
                                workload.target(Target::RatioTo("entry by entry", 1.43 / 1.1))
                            }
                            _ => match dirty.target {
                                Some(target) => {
                                    workload.target(Target::RatioTo("entry by entry", target))
                                }
                                None => workload,
                            },
                        };
                    }
                    put(settings, report, FAMILY.name, &pair, workload, dirty);
                }
            }
        }
    }
}

fn grow(settings: &Settings, report: &mut Report, family: &'static str) {
    for gib in [1, 4, 16, 64] {
        let shape = Shape {
            leaf: Granule::K4,
            bytes: gib * GIB,
            scattered: false,
        };
        let leaves = shape.leaves() as f64;
        let curve = "harvest of clean tables, for one leaf";
        let workload = Workload::grown(curve, leaves, Scale::Items);
        let pair = RefCell::new(Pair::new(settings, shape));
        put(settings, report, family, &pair, workload, DIRTY[0]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_walks_find_the_same_and_leave_nothing() {
        for leaf in [Granule::K4, Granule::M2] {
            for scattered in [false, true] {
                let shape = Shape {
                    leaf,
                    bytes: 2048 * leaf.bytes(),
                    scattered,
                };
                let mut pair = Pair::new(&Settings::quick(), shape);
                for dirty in DIRTY {
                    let runs = dirty.runs(shape.leaves());
                    pair.time_naive(&runs);
                    let expected = pair.words.clone();
                    let count: u64 = runs.iter().map(|run| run.end - run.start).sum();
                    let ones: u32 = expected.iter().map(|word| word.count_ones()).sum();
                    assert_eq!(u64::from(ones), count);
                    for threads in [1, 2] {
                        pair.time_ours(&runs, threads);
                        assert_eq!(pair.words, expected, "{}", shape.name(dirty.name));
                    }
                    pair.time_naive(&[]);
                    assert_eq!(pair.found(), 0);
                    pair.time_ours(&[], 1);
                    assert_eq!(pair.found(), 0);
                }
            }
        }
    }
}
