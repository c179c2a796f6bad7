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

/// The model of a 4 KiB page.
#[derive(Clone, Copy, PartialEq, Debug)]
struct Page {
    phys: u64,
    writable: bool,
    dirty: bool,
    /// The first page and the size of the leaf that maps it.
    leaf: (u64, u64),
}

pub(super) fn agrees_with_a_map_of_pages<F: Format>() {
    // Around the border of the span of an entry two levels up.
    let (low, high) = (g::<F>() - 4 * m::<F>(), g::<F>() + 4 * m::<F>());
    let mut random = Random(0x5DEE_CE66_D1CE_4E5B);
    for _ in 0..(3072 >> F::INDEX_LG2).max(1) {
        let table = Table::<F>::new();
        let mut model: BTreeMap<u64, Page> = BTreeMap::new();
        for _ in 0..400 {
            let grain = [k::<F>(), k::<F>(), m::<F>() / 4, m::<F>()][random.below(4) as usize];
            let start = low + random.below((high - low) / grain) * grain;
            let len = ((1 + random.below(6)) * grain).min(high - start);
            let (end, request) = (start + len, range(start, len));
            match random.below(6) {
                0 | 1 => {
                    let phys =
                        [start, start + m::<F>(), start + 16 * k::<F>()][random.below(3) as usize];
                    let limit = [F::PAGE, granule(F::PAGE_LG2 + 4), F::size(1), F::size(2)]
                        [random.below(4) as usize];
                    let writable = random.below(4) != 0;
                    let access = if writable {
                        Access::ReadWrite
                    } else {
                        Access::Read
                    };
                    let free = model.range(start..end).next().is_none();
                    assert_eq!(table.map(request, phys, access, limit).is_ok(), free);
                    if free {
                        for at in pages::<F>(start, len) {
                            let leaf = leaf_for::<F>(at, start, end, phys, limit.bytes());
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
                        assert!(
                            gone == expect,
                            "the unmapped leaves are those that were mapped"
                        );
                        model.retain(|at, _| !(start..end).contains(at));
                    }
                }
                3 | 4 => {
                    let at = start + random.below(len);
                    let known = model.get(&(at & !(k::<F>() - 1))).copied();
                    let found = table.set_dirty(iova(at));
                    assert_eq!(
                        found.map(|l| l.range),
                        known.map(|p| range(p.leaf.0, p.leaf.1))
                    );
                    assert!(!found.is_some_and(|l| l.dirty) || known.is_some_and(|p| p.dirty));
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
                            owed += k::<F>();
                            let first = iova(page.leaf.0);
                            assert!(gather.ranges().iter().any(|r| r.contains(first)));
                        }
                    }
                    assert!(gather.bytes() >= u128::from(owed));
                    assert_eq!(gather.is_empty(), !clear || found.is_empty());
                }
            }
        }
        for at in pages::<F>(low, high - low) {
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
                // Both halves lie under one table of level 1; each turns from 4 KiB leaves to one 2
                // MiB leaf and back.
                let mine = range(half * m::<F>(), m::<F>());
                for round in 0..200 {
                    let limit = if round % 2 == 0 { F::PAGE } else { F::size(1) };
                    table.map(mine, 0, Access::ReadWrite, limit).unwrap();
                    table
                        .set_dirty(iova(half * m::<F>() + round * k::<F>()))
                        .unwrap();
                    let mut dirty = 0;
                    table.unmap(mine, |_, _, d| dirty += u64::from(d)).unwrap();
                    assert!(dirty <= 2, "ours, and that of the thread below");
                }
            });
        }
        s.spawn(|| {
            for _ in 0..400 {
                let (found, gather) = dirty(&table, range(0, 2 * m::<F>()), true);
                assert_eq!(found.is_empty(), gather.is_empty());
                table.set_dirty(iova(m::<F>() - 1));
            }
        });
    });
    assert_eq!(dirty(&table, range(0, 2 * m::<F>()), true).0, [0u64; 0]);
}

/// Writers keep setting D while a harvester takes it: a page that was written is dirty, or was
/// taken since the write before it.
pub(super) fn writers_and_a_harvester_lose_nothing<F: Format>() {
    use std::sync::atomic::{AtomicBool, AtomicU64};
    const WRITES: u64 = 4000;
    let per_table = m::<F>() / k::<F>();
    let table = Table::<F>::new();
    // Two tables of the smallest pages, and two leaves of one entry after them.
    table
        .map(range(0, 2 * m::<F>()), 0, Access::ReadWrite, F::PAGE)
        .unwrap();
    table
        .map(
            range(2 * m::<F>(), 2 * m::<F>()),
            0,
            Access::ReadWrite,
            F::size(1),
        )
        .unwrap();
    let leaf_of = |at: u64| {
        if at < 2 * m::<F>() {
            at / k::<F>()
        } else {
            2 * per_table + (at - 2 * m::<F>()) / m::<F>()
        }
    };
    let set: Vec<AtomicU64> = (0..2 * per_table + 2).map(|_| AtomicU64::new(0)).collect();
    let mut taken = vec![0u64; 2 * per_table as usize + 2];
    let running = AtomicBool::new(true);
    let mut take = || {
        for page in dirty(&table, range(0, 4 * m::<F>()), true).0 {
            if page < 2 * m::<F>() || page % m::<F>() == 0 {
                taken[leaf_of(page) as usize] += 1;
            }
        }
    };
    std::thread::scope(|s| {
        let writers: Vec<_> = (1..3u64)
            .map(|seed| {
                let (table, set, leaf_of) = (&table, &set, &leaf_of);
                s.spawn(move || {
                    let mut random = Random(seed);
                    for _ in 0..WRITES {
                        let at = random.below(4 * m::<F>());
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
