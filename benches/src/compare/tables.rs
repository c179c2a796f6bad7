//! Harvests of IO page tables: read and clear the dirty bits of all leaves, into the caller's
//! bitmap.
//!
//! Our library owes the leaves that it clears. The walk that looks at each entry does not; the same
//! walk with what a harvest needs is a limit, and so is the time to read the tables in the order of
//! the walk.

use std::cell::RefCell;
use std::hint::black_box;
use std::ops::Range;
use std::time::Instant;

use dirtymap::flush::FlushGather;
use dirtymap::source::LeafSink;
use dirtymap::sync::thread;
use dirtymap::{Access, Granule, Iova, IovaRange, UserBitmap};
use pagetable_sim::{AmdV1, LeafSizes, Table};

use super::{Contestant, Family, Report, Role, Scale, Settings, Target, Workload, contest};
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
}

const DIRTY: [Dirty; 6] = [
    Dirty::new("clean", 0, 1),
    Dirty::new("0.1 % dirty", 1, 1),
    Dirty::new("1 % dirty", 10, 1),
    Dirty::new("1 % dirty in clusters", 10, CLUSTER),
    Dirty::new("10 % dirty", 100, 1),
    Dirty::new("100 % dirty", 1000, 1),
];

impl Dirty {
    const fn new(name: &'static str, permille: u64, cluster: u64) -> Self {
        Dirty {
            name,
            permille,
            cluster,
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

/// Tables of each contestant, and the caller's bitmap.
struct Pair {
    shape: Shape,
    ours: Table<AmdV1>,
    naive: NaiveTable,
    /// That of the limits, which would leave the peer's in the caches.
    limit: NaiveTable,
    words: Vec<u64>,
}

impl Pair {
    fn new(settings: &Settings, shape: Shape) -> Self {
        settings.at(format!("mapping {}", shape.name("clean")));
        Pair {
            shape,
            ours: shape.table(),
            naive: NaiveTable::new(shape.leaves(), shape.scattered),
            limit: NaiveTable::new(shape.leaves(), shape.scattered),
            words: vec![0; (shape.leaves() / 64) as usize],
        }
    }

    /// The dirty leaves of a turn. Each turn has others, of the same number: a processor learns the
    /// branches of a walk that finds the same ones again and again, and no harvest does.
    fn runs<'r>(&self, runs: &'r [Range<u64>], turn: u64) -> impl Iterator<Item = Range<u64>> + 'r {
        let all = self.shape.leaves();
        let key = turn.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 16;
        // Numbers of leaves are powers of two, and a run lies at a multiple of its length.
        runs.iter().map(move |run| {
            let len = run.end - run.start;
            let start = run.start ^ (key & (all - 1) & !(len - 1));
            start..start + len
        })
    }

    #[allow(clippy::unwrap_used)] // ranges that are fit
    fn dirty_ours(&self, runs: &[Range<u64>], turn: u64) {
        let bytes = self.shape.leaf.bytes();
        for run in self.runs(runs, turn) {
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
    fn time_ours(&mut self, runs: &[Range<u64>], turn: u64, threads: usize) -> f64 {
        self.dirty_ours(runs, turn);
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

    fn time_naive(&mut self, runs: &[Range<u64>], turn: u64, owed: bool) -> f64 {
        let table = if owed { &self.limit } else { &self.naive };
        self.runs(runs, turn).for_each(|run| table.dirty(run));
        self.words.fill(0);
        let began = Instant::now();
        if owed {
            let mut gather = FlushGather::new();
            let leaf = self.shape.leaf;
            table.harvest_owed(leaf, &mut self.words, &mut gather);
            black_box(gather.entries());
        } else {
            table.harvest(&mut self.words);
        }
        began.elapsed().as_nanos() as f64 / self.shape.leaves() as f64
    }

    fn time_memory(&mut self) -> f64 {
        let began = Instant::now();
        black_box(self.limit.read());
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
        let mut turns = 1..;
        Contestant::ours(
            if threads == 1 {
                "dirtymap"
            } else {
                "dirtymap, 2 threads"
            },
            move || {
                let turn = turns.next().unwrap_or(0);
                vec![pair.borrow_mut().time_ours(runs, turn, threads)]
            },
        )
        .checked(move || {
            pair.borrow_mut().time_ours(runs, 0, threads);
            pair.borrow().found()
        })
    };
    let mut all = vec![ours(1)];
    if pair.borrow().shape.leaf == Granule::K4 {
        all.push(ours(2));
    }
    let naive = |name, role, owed| {
        let mut turns = 1..;
        let turn = move || {
            let turn = turns.next().unwrap_or(0);
            vec![pair.borrow_mut().time_naive(runs, turn, owed)]
        };
        Contestant::new(name, role, turn).checked(move || {
            pair.borrow_mut().time_naive(runs, 0, owed);
            pair.borrow().found()
        })
    };
    all.push(naive("entry by entry", Role::Peer, false));
    all.push(Contestant::limit("memory", move || {
        vec![pair.borrow_mut().time_memory()]
    }));
    all.push(naive("entry by entry, owed", Role::Limit, true));
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
                // A harvest of 2^28 leaves takes up to seconds: of a terabyte by the smallest
                // leaves, the shares that show something new.
                let large = leaf == Granule::K4 && bytes > 64 * GIB;
                let shown = |dirty: &Dirty| match (large, scattered) {
                    (false, _) => true,
                    (true, false) => [0, 10, 100].contains(&dirty.permille),
                    (true, true) => dirty.permille == 0,
                };
                let wanted: Vec<Dirty> = DIRTY
                    .into_iter()
                    .filter(|dirty| shape.name(dirty.name).contains(&settings.matching))
                    .filter(shown)
                    .collect();
                if wanted.is_empty() {
                    continue;
                }
                let pair = RefCell::new(Pair::new(settings, shape));
                for dirty in wanted {
                    let mut workload = Workload::time(shape.name(dirty.name));
                    workload = workload.target(Target::RatioTo("entry by entry", 1.0));
                    if leaf == Granule::M2 && dirty.permille > 0 {
                        workload = workload.bound("owed");
                    }
                    if leaf == Granule::K4 && dirty.permille == 0 && !scattered {
                        workload = workload.target(Target::TimesLimit(1.15));
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
                    let mut turns = Vec::new();
                    for turn in 0..3 {
                        pair.time_naive(&runs, turn, false);
                        let expected = pair.words.clone();
                        pair.time_naive(&runs, turn, true);
                        assert_eq!(pair.words, expected, "{}", shape.name(dirty.name));
                        let count: u64 = runs.iter().map(|run| run.end - run.start).sum();
                        let ones: u32 = expected.iter().map(|word| word.count_ones()).sum();
                        assert_eq!(u64::from(ones), count);
                        for threads in [1, 2] {
                            pair.time_ours(&runs, turn, threads);
                            assert_eq!(pair.words, expected, "{}", shape.name(dirty.name));
                        }
                        turns.push(expected);
                    }
                    // Each turn has its own dirty leaves, if some are clean.
                    let some = dirty.permille == 10 && dirty.cluster == 1 || dirty.permille == 100;
                    assert!(!some || turns[0] != turns[1] && turns[1] != turns[2]);
                    for owed in [false, true] {
                        pair.time_naive(&[], 0, owed);
                        assert_eq!(pair.found(), 0);
                    }
                    pair.time_ours(&[], 0, 1);
                    assert_eq!(pair.found(), 0);
                }
            }
        }
    }
}
