//! Harvests of 64 GiB in pages of 4 KiB: 2^24 pages, of which some are dirty.
//!
//! The new marks and the zeroing of the caller's bitmap are not timed. `zero-the-bitmap` measures
//! the zeroing.

#![allow(missing_docs)]

use std::time::{Duration, Instant};

use criterion::{Bencher, Criterion, criterion_group, criterion_main};
use dirtymap_benches::peers::{Flat, ThroughHandle, VmMemory};
use dirtymap_benches::workloads::{Dirty, PAGES, WORDS};
use dirtymap_benches::{PAGE, Peer, Tracker};

/// Times `harvest` alone. Before each harvest, the pages of `dirty` are marked and the bitmap is
/// zeroed.
fn time<P: Peer>(
    b: &mut Bencher<'_>,
    peer: &P,
    dirty: Option<&Dirty>,
    harvest: impl Fn(&P, &mut [u64]),
) {
    let mut bitmap = vec![0; WORDS];
    b.iter_custom(|iterations| {
        let mut spent = Duration::ZERO;
        for _ in 0..iterations {
            if let Some(dirty) = dirty {
                dirty.mark(peer);
            }
            bitmap.fill(0);
            let start = Instant::now();
            harvest(peer, &mut bitmap);
            spent += start.elapsed();
        }
        spent
    });
}

/// A memory of which every page was dirty and harvested once, as in the second round of a
/// migration, so that the peers have allocated their memory.
fn used<P: Peer>() -> P {
    let peer = P::new(PAGES);
    peer.mark(0, PAGES * PAGE);
    peer.harvest(&mut vec![0; WORDS]);
    peer
}

fn bench<P: Peer>(c: &mut Criterion, label: &str, peer: &P, dirty: Option<&Dirty>) {
    c.benchmark_group(format!("harvest/{label}"))
        .bench_function(peer.name(), |b| time(b, peer, dirty, P::harvest));
}

fn harvest(c: &mut Criterion) {
    bench(c, "never-marked", &ThroughHandle::new(PAGES), None);
    bench(c, "never-marked", &VmMemory::new(PAGES), None);
    bench(c, "never-marked", &<Flat>::new(PAGES), None);

    let (ours, vm_memory, flat) = (used::<ThroughHandle>(), used::<VmMemory>(), used::<Flat>());
    let workloads = [
        ("0%", None),
        ("0.01%", Some(Dirty::one_in(10_000))),
        ("1%", Some(Dirty::one_in(100))),
        ("100%", Some(Dirty::one_in(1))),
    ];
    for (label, dirty) in &workloads {
        bench(c, label, &ours, dirty.as_ref());
        bench(c, label, &vm_memory, dirty.as_ref());
        bench(c, label, &flat, dirty.as_ref());
        // The peer without the move from its own vector into the caller's bitmap.
        c.benchmark_group(format!("harvest/{label}"))
            .bench_function("vm-memory-own-vec", |b| {
                time(b, &vm_memory, dirty.as_ref(), |peer, _| {
                    drop(peer.get_and_reset())
                });
            });
    }

    let mut bitmap = vec![0u64; WORDS];
    c.benchmark_group("harvest/zero-the-bitmap")
        .bench_function("fill", |b| {
            b.iter(|| std::hint::black_box(&mut bitmap).fill(0))
        });
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(3))
        .sample_size(30);
    targets = harvest
}
criterion_main!(benches);
