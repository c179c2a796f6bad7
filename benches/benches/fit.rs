//! First fit: find the lowest free place, map it, and unmap it again. The peer is a tree that is
//! scanned.
//!
//! The holes between the areas have up to 15 pages. *Above*: 16 pages, which fit only above all
//! areas, so that the search passes every hole. *Among*: one page, which fits into one of the first
//! holes.

#![allow(missing_docs)]

use std::hint::black_box;
use std::time::Duration;

use criterion::{Criterion, criterion_group, criterion_main};
use dirtymap::AddressSpace;
use dirtymap_benches::peers::LockedBTree;
use dirtymap_benches::workloads::areas;
use dirtymap_benches::{Allocator, PAGE};

fn bench<A: Allocator>(c: &mut Criterion, label: &str, count: usize) {
    let peer = A::new();
    areas(count).iter().for_each(|mapping| peer.map(*mapping));
    for (place, pages) in [("above", 16), ("among", 1)] {
        let mut group = c.benchmark_group(format!("fit/{place}-{label}-areas"));
        group.bench_function(peer.name(), |b| {
            b.iter(|| peer.unmap(black_box(peer.allocate(pages * PAGE))));
        });
        group.finish();
    }
}

fn fit(c: &mut Criterion) {
    for (label, count) in [("1K", 1_000), ("100K", 100_000)] {
        bench::<AddressSpace>(c, label, count);
        bench::<LockedBTree>(c, label, count);
    }
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(1))
        .sample_size(20);
    targets = fit
}
criterion_main!(benches);
