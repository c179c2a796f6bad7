//! The table against a model that knows pages only, and against itself on several threads.

use std::collections::BTreeMap;

use super::*;

struct Random(u64);

impl Random {
    fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % n
    }
}

/// What the model knows of a 4 KiB page.
#[derive(Clone, Copy, PartialEq, Debug)]
struct Page {
    phys: u64,
    writable: bool,
    dirty: bool,
    /// The first page and the size of the leaf that maps it.
    leaf: (u64, u64),
}

/// The leaf that must map `at`, inside the mapping of `start..end`.
fn leaf_for(at: u64, start: u64, end: u64, phys: u64, limit: u64) -> (u64, u64) {
    for size in [G1, M2, K4] {
        let first = at & !(size - 1);
        let fits = first >= start && first + size <= end;
        let behind = phys.wrapping_add(first.wrapping_sub(start));
        if size <= limit && fits && behind.is_multiple_of(size) {
            return (first, size);
        }
    }
    unreachable!("4 KiB always fit");
}

pub(super) fn agrees_with_a_map_of_pages<F: Format>() {
    // Around the border of a 1 GiB leaf: 8 MiB on both sides, with 2 MiB leaves and 4 KiB leaves among them.
    let (low, high) = (G1 - 4 * M2, G1 + 4 * M2);
    let mut random = Random(0x5DEE_CE66_D1CE_4E5B);
    for _ in 0..6 {
        let table = Table::<F>::new();
        let mut model: BTreeMap<u64, Page> = BTreeMap::new();
        for _ in 0..400 {
            let grain = [K4, K4, M2 / 4, M2][random.below(4) as usize];
            let start = low + random.below((high - low) / grain) * grain;
            let len = ((1 + random.below(6)) * grain).min(high - start);
            let (end, request) = (start + len, range(start, len));
            match random.below(6) {
                0 | 1 => {
                    let phys = [start, start + M2, start + 16 * K4][random.below(3) as usize];
                    let limit = [Granule::K4, Granule::M2, Granule::G1][random.below(3) as usize];
                    let writable = random.below(4) != 0;
                    let access = if writable {
                        Access::ReadWrite
                    } else {
                        Access::Read
                    };
                    let free = model.range(start..end).next().is_none();
                    assert_eq!(table.map(request, phys, access, limit).is_ok(), free);
                    if free {
                        for at in pages(start, len) {
                            let leaf = leaf_for(at, start, end, phys, limit.bytes());
                            let phys = phys + (at - start);
                            model.insert(
                                at,
                                Page {
                                    phys,
                                    writable,
                                    dirty: false,
                                    leaf,
                                },
                            );
                        }
                    }
                }
                2 => {
                    let cut = model
                        .range(start..end)
                        .any(|(_, p)| p.leaf.0 < start || p.leaf.0 + p.leaf.1 > end);
                    let mut gone = vec![];
                    let done = table.unmap(request, |r, size, d| {
                        gone.push((r.start().get(), size.bytes(), d))
                    });
                    assert_eq!(done.is_err(), cut);
                    if !cut {
                        let mut expect: Vec<_> = model
                            .range(start..end)
                            .map(|(_, p)| (p.leaf.0, p.leaf.1, p.dirty))
                            .collect();
                        expect.dedup();
                        assert_eq!(gone, expect);
                        model.retain(|at, _| !(start..end).contains(at));
                    }
                }
                3 | 4 => {
                    let at = start + random.below(len);
                    let known = model.get(&(at & !(K4 - 1))).copied();
                    let found = table.set_dirty(iova(at));
                    assert_eq!(
                        found.map(|l| (l.range, l.dirty)),
                        known.map(|p| (range(p.leaf.0, p.leaf.1), p.dirty))
                    );
                    if let Some(page) = known
                        && page.writable
                    {
                        model
                            .range_mut(page.leaf.0..page.leaf.0 + page.leaf.1)
                            .for_each(|(_, p)| p.dirty = true);
                    }
                }
                _ => {
                    let clear = random.below(3) != 0;
                    let (found, gather) = dirty(&table, request, clear);
                    let expect: Vec<_> = model
                        .range(start..end)
                        .filter(|(_, p)| p.dirty)
                        .map(|(at, _)| *at)
                        .collect();
                    assert_eq!(found, expect);
                    let mut owed = 0;
                    for page in model.values_mut().filter(|p| p.dirty && clear) {
                        if page.leaf.0 >= start && page.leaf.0 + page.leaf.1 <= end {
                            page.dirty = false;
                            owed += K4;
                            let first = iova(page.leaf.0);
                            assert!(gather.ranges().iter().any(|r| r.contains(first)));
                        }
                    }
                    assert!(gather.bytes() >= u128::from(owed));
                    assert_eq!(gather.is_empty(), !clear || found.is_empty());
                }
            }
        }
        for at in pages(low, high - low) {
            let leaf = table.translate(iova(at));
            let known = model.get(&at);
            assert_eq!(
                leaf.map(|l| l.phys + (at - l.range.start().get())),
                known.map(|p| p.phys)
            );
            assert_eq!(
                leaf.map(|l| (l.access.writes(), l.dirty)),
                known.map(|p| (p.writable, p.dirty))
            );
            assert_eq!(
                leaf.map(|l| l.range),
                known.map(|p| range(p.leaf.0, p.leaf.1))
            );
        }
    }
}

pub(super) fn threads_map_walk_and_harvest_at_once<F: Format>() {
    let table = Table::<F>::new();
    std::thread::scope(|s| {
        for half in 0..2 {
            let table = &table;
            s.spawn(move || {
                // Both halves lie under one table of level 1; each turns from 4 KiB leaves to one 2 MiB leaf and back.
                let mine = range(half * M2, M2);
                for round in 0..200 {
                    let limit = if round % 2 == 0 {
                        Granule::K4
                    } else {
                        Granule::M2
                    };
                    table.map(mine, 0, Access::ReadWrite, limit).unwrap();
                    table.set_dirty(iova(half * M2 + round * K4)).unwrap();
                    let mut dirty = 0;
                    table.unmap(mine, |_, _, d| dirty += u64::from(d)).unwrap();
                    assert!(dirty <= 2, "ours, and that of the thread below");
                }
            });
        }
        s.spawn(|| {
            for _ in 0..400 {
                let (found, gather) = dirty(&table, range(0, 2 * M2), true);
                assert_eq!(found.is_empty(), gather.is_empty());
                table.set_dirty(iova(M2 - 1));
            }
        });
    });
    assert_eq!(dirty(&table, range(0, 2 * M2), true).0, []);
}

/// Writers keep setting D while a harvester takes it: a page that was written is dirty, or was taken since the write
/// before it.
pub(super) fn writers_and_a_harvester_lose_nothing<F: Format>() {
    use std::sync::atomic::{AtomicBool, AtomicU64};
    const WRITES: u64 = 4000;
    let table = Table::<F>::new();
    // 1024 pages of 4 KiB and two leaves of 2 MiB behind them.
    table
        .map(range(0, 2 * M2), 0, Access::ReadWrite, Granule::K4)
        .unwrap();
    table
        .map(range(2 * M2, 2 * M2), 0, Access::ReadWrite, Granule::M2)
        .unwrap();
    let leaf_of = |at: u64| {
        if at < 2 * M2 {
            at / K4
        } else {
            1024 + (at - 2 * M2) / M2
        }
    };
    let set: Vec<AtomicU64> = (0..1026).map(|_| AtomicU64::new(0)).collect();
    let mut taken = vec![0u64; 1026];
    let running = AtomicBool::new(true);
    let mut take = || {
        for page in dirty(&table, range(0, 4 * M2), true).0 {
            if page < 2 * M2 || page % M2 == 0 {
                taken[leaf_of(page) as usize] += 1;
            }
        }
    };
    std::thread::scope(|s| {
        let writers: Vec<_> = (1..3u64)
            .map(|seed| {
                let (table, set) = (&table, &set);
                s.spawn(move || {
                    let mut random = Random(seed);
                    for _ in 0..WRITES {
                        let at = random.below(4 * M2);
                        if !table.set_dirty(iova(at)).unwrap().dirty {
                            // Relaxed: read after the join.
                            set[leaf_of(at) as usize].fetch_add(1, Ordering::Relaxed);
                        }
                    }
                })
            })
            .collect();
        s.spawn(|| {
            writers
                .into_iter()
                .for_each(|writer| writer.join().unwrap());
            // Release: pairs with the Acquire below.
            running.store(false, Ordering::Release);
        });
        // Acquire: pairs with the Release above; the last harvest sees every write.
        while running.load(Ordering::Acquire) {
            take();
        }
    });
    take();
    // Each time D went from 0 to 1 it was taken exactly once.
    for (leaf, (set, taken)) in set.iter().zip(&taken).enumerate() {
        assert_eq!(set.load(Ordering::Relaxed), *taken, "leaf {leaf}");
    }
}
