//! Harvests of an IO page table that maps 64 GiB by leaves of 4 KiB, where a device writes clusters of pages: with every
//! leaf looked at, and with tables skipped that no device walked through (`DomainConfig::skip_quiet`).
//!
//! Timed are the harvest and its flush; the writes, and zeroing the caller's bitmap, are not.

#![allow(missing_docs)]

use std::sync::Arc;
use std::time::{Duration, Instant};

use criterion::{Bencher, Criterion, criterion_group, criterion_main};
use dirtymap::{
    Access, DirtySource, FlushGather, Granule, Iova, IovaRange, LeafSink, Mapping, UserBitmap,
};
use pagetable_sim::{Device, DeviceConfig, Domain, DomainConfig, PhysMemory};

const K4: u64 = 4096;
const G1: u64 = 1 << 30;
const PAGES: u64 = 64 * G1 / K4;
/// 0.01 % of the pages.
const DIRTY: u64 = PAGES / 10_000;

/// Where a device writes in each round.
#[derive(Clone, Copy)]
enum Clusters {
    /// Nowhere.
    None,
    /// So many pages in a row, at the same places in every round.
    Fixed(u64),
    /// At other places in every round.
    Moving(u64),
}

#[allow(clippy::unwrap_used)] // helpers of benches
fn domain(skip_quiet: bool) -> Arc<Domain> {
    // All of it is backed by the same GiB.
    let memory = Arc::new(PhysMemory::new(G1).unwrap());
    let config = DomainConfig {
        max_leaf: Granule::K4,
        skip_quiet,
        ..DomainConfig::default()
    };
    let domain = Domain::new(memory, config);
    for nth in 0..64 {
        domain
            .map(&Mapping {
                range: IovaRange::from_len(Iova::new(nth * G1), G1).unwrap(),
                backing: 0,
                access: Access::ReadWrite,
            })
            .unwrap();
    }
    domain.set_tracking(true).unwrap();
    domain
}

#[allow(clippy::unwrap_used)] // helpers of benches
fn write(device: &mut Device, clusters: Clusters, round: u64) {
    let (len, round) = match clusters {
        Clusters::None => return,
        Clusters::Fixed(len) => (len, 0),
        Clusters::Moving(len) => (len, round),
    };
    for nth in 0..DIRTY / len {
        let places = PAGES / len;
        let place = (round * DIRTY / len + nth + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15) % places;
        for page in place * len..(place + 1) * len {
            device.write(Iova::new(page * K4), &[1]).unwrap();
        }
    }
    device.quiesce();
}

#[allow(clippy::unwrap_used)] // helpers of benches
fn time(b: &mut Bencher<'_>, domain: &Domain, clusters: Clusters) {
    let all = IovaRange::from_len(Iova::MIN, PAGES * K4).unwrap();
    let mut words = vec![0; (PAGES / 64) as usize];
    let mut device = domain.attach(DeviceConfig::default());
    let mut round = 0;
    let mut pass = || {
        round += 1;
        write(&mut device, clusters, round);
        words.fill(0);
        let view = UserBitmap::new(&mut words).view(all, Granule::K4).unwrap();
        let start = Instant::now();
        let mut gather = FlushGather::new();
        domain
            .read_and_clear(all, &mut LeafSink::new(&mut view.sink(), &mut gather))
            .unwrap();
        domain.invalidate(&gather).unwrap();
        start.elapsed()
    };
    // What is quiet from the start becomes so.
    for _ in 0..4 {
        pass();
    }
    b.iter_custom(|iterations| (0..iterations).map(|_| pass()).sum::<Duration>());
}

fn quiet(c: &mut Criterion) {
    for (name, skip) in [("every-leaf", false), ("skipping", true)] {
        let domain = domain(skip);
        for (label, clusters) in [
            ("0%", Clusters::None),
            ("0.01%-fixed-256", Clusters::Fixed(256)),
            ("0.01%-moving-256", Clusters::Moving(256)),
            ("0.01%-moving-16", Clusters::Moving(16)),
            ("0.01%-moving-1", Clusters::Moving(1)),
        ] {
            c.benchmark_group(format!("quiet/{label}"))
                .bench_function(name, |b| time(b, &domain, clusters));
        }
    }
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(3))
        .sample_size(20);
    targets = quiet
}
criterion_main!(benches);
