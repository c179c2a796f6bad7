//! Marks: the cost of one write of a CPU thread.
//!
//! * hot: the pages are dirty already, as the pages of a guest are most of the time;
//! * cold: every mark finds its page clean. A harvest, which is not timed, makes it clean again.

#![allow(missing_docs)]

use std::hint::black_box;
use std::time::Duration;

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use dirtymap_benches::peers::{Flat, ThroughHandle, ThroughSpace, VmMemory};
use dirtymap_benches::workloads::{PAGES, WORDS, beside, distinct};
use dirtymap_benches::{PAGE, Peer};

/// A range of 2 MiB, in bytes.
const RANGE: u64 = 2 << 20;
/// The page that hot marks hit.
const HOT: u64 = 12_345 * PAGE;

/// Marks of dirty pages, by this thread alone.
fn hot<P: Peer>(c: &mut Criterion, group: &str, len: u64) {
    let peer = P::new(PAGES);
    peer.mark(HOT, len);
    c.benchmark_group(group).bench_function(peer.name(), |b| {
        b.iter(|| peer.mark(black_box(HOT), black_box(len)));
    });
}

/// Marks of a dirty page that another thread marks all the time.
fn contended<P: Peer>(c: &mut Criterion, group: &str) {
    let peer = P::new(PAGES);
    let mark = || peer.mark(black_box(HOT), black_box(PAGE));
    beside(mark, || {
        c.benchmark_group(group)
            .bench_function(peer.name(), |b| b.iter(mark));
    });
}

/// Marks of clean ranges of `len` bytes at `starts`. One iteration marks all of them.
fn cold<P: Peer>(c: &mut Criterion, group: &str, starts: &[u64], len: u64) {
    let peer = P::new(PAGES);
    // The peers have already allocated the memory of a first mark.
    peer.mark(0, PAGES * PAGE);
    let mut bitmap = vec![0; WORDS];
    let mut clean = || peer.harvest(&mut bitmap);
    let mut group = c.benchmark_group(group);
    group.throughput(Throughput::Elements(starts.len() as u64));
    group.bench_function(peer.name(), |b| {
        b.iter_batched(
            &mut clean,
            |()| starts.iter().for_each(|start| peer.mark(*start, len)),
            BatchSize::PerIteration,
        );
    });
    group.finish();
}

fn mark(c: &mut Criterion) {
    let pages: Vec<u64> = distinct(1 << 16, PAGES)
        .iter()
        .map(|page| page * PAGE)
        .collect();
    let ranges: Vec<u64> = distinct(1 << 12, PAGES * PAGE / RANGE)
        .iter()
        .map(|range| range * RANGE)
        .collect();

    fn all<P: Peer>(c: &mut Criterion, pages: &[u64], ranges: &[u64]) {
        hot::<P>(c, "mark/hot-page", PAGE);
        contended::<P>(c, "mark/hot-page-two-threads");
        cold::<P>(c, "mark/cold-page", pages, PAGE);
        hot::<P>(c, "mark/hot-2MiB", RANGE);
        cold::<P>(c, "mark/cold-2MiB", ranges, RANGE);
    }
    all::<ThroughHandle>(c, &pages, &ranges);
    all::<ThroughSpace>(c, &pages, &ranges);
    all::<VmMemory>(c, &pages, &ranges);
    all::<Flat>(c, &pages, &ranges);
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(2))
        .sample_size(50);
    targets = mark
}
criterion_main!(benches);
