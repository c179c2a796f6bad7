//! Lookups of the area that holds an address, alone and beside another thread that looks up all the
//! time.

#![allow(missing_docs)]

use std::hint::black_box;
use std::time::Duration;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use dirtymap::{AddressSpace, Mapping};
use dirtymap_benches::Areas;
use dirtymap_benches::peers::LockedBTree;
use dirtymap_benches::workloads::{addresses, areas, beside};

/// Addresses that one iteration looks up.
const ADDRESSES: usize = 1 << 14;

fn ask<A: Areas>(peer: &A, addresses: &[u64]) {
    for address in addresses {
        black_box(peer.lookup(*address));
    }
}

fn bench<A: Areas>(c: &mut Criterion, label: &str, mappings: &[Mapping]) {
    let peer = A::new();
    mappings.iter().for_each(|mapping| peer.map(*mapping));
    let addresses = addresses(mappings, ADDRESSES);

    let mut group = c.benchmark_group(format!("lookup/{label}-areas"));
    group.throughput(Throughput::Elements(ADDRESSES as u64));
    group.bench_function(peer.name(), |b| b.iter(|| ask(&peer, &addresses)));
    group.finish();

    let mut group = c.benchmark_group(format!("lookup/{label}-areas-two-threads"));
    group.throughput(Throughput::Elements(ADDRESSES as u64));
    let ask = || ask(&peer, &addresses);
    beside(ask, || {
        group.bench_function(peer.name(), |b| b.iter(ask));
    });
    group.finish();
}

fn lookup(c: &mut Criterion) {
    for (label, count) in [("1K", 1_000), ("100K", 100_000)] {
        let mappings = areas(count);
        bench::<AddressSpace>(c, label, &mappings);
        bench::<LockedBTree>(c, label, &mappings);
    }
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(3))
        .sample_size(50);
    targets = lookup
}
criterion_main!(benches);
