//! The programs that are watched. Each works in one block of words, which it cuts into sections,
//! and knows nothing of being watched.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use crate::cli::Workload;

/// A part of the block, by its share of it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Section {
    pub(crate) name: &'static str,
    /// Where it begins and ends, of the whole block, in 1/16.
    pub(crate) sixteenths: (u64, u64),
}

impl Workload {
    /// What lies where.
    pub(crate) fn sections(self) -> &'static [Section] {
        const fn section(name: &'static str, from: u64, to: u64) -> Section {
            let sixteenths = (from, to);
            Section { name, sixteenths }
        }
        const SORT: &[Section] = &[section("array", 0, 16)];
        const JOIN: &[Section] = &[
            section("hash table", 0, 4),
            section("probed", 4, 10),
            section("result", 10, 16),
        ];
        const LRU: &[Section] = &[section("index", 0, 2), section("records", 2, 16)];
        match self {
            Workload::Sort => SORT,
            Workload::Join => JOIN,
            Workload::Lru => LRU,
        }
    }
}

/// Tells the program when to end, and the watcher how far it is.
#[derive(Debug, Default)]
pub(crate) struct Control {
    pub(crate) stop: AtomicBool,
    /// Numbers sorted, rows probed, lookups.
    pub(crate) operations: AtomicU64,
}

impl Control {
    fn goes_on(&self) -> bool {
        // Relaxed: a hint, looked at again and again.
        !self.stop.load(Relaxed)
    }

    fn did(&self, operations: u64) {
        // Relaxed: a count.
        self.operations.fetch_add(operations, Relaxed);
    }
}

/// Runs `workload` in `block` until it is told to stop.
pub(crate) fn run(workload: Workload, block: &mut [u64], seed: u64, control: &Control) {
    let random = Random(seed.wrapping_mul(2).wrapping_add(1));
    match workload {
        Workload::Sort => sort(block, random, control),
        Workload::Join => {
            let (table, rest) = block.split_at_mut(block.len() / 16 * 4);
            let (probed, result) = rest.split_at_mut(table.len() / 4 * 6);
            Join::new(table, probed, result).run(random, control);
        }
        Workload::Lru => {
            let (index, records) = block.split_at_mut(block.len() / 16 * 2);
            Lru::new(index, records).run(random, control);
        }
    }
}

/// xorshift64*: fast, and good enough for keys.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, n: u64) -> u64 {
        ((u128::from(self.next()) * u128::from(n)) >> 64) as u64
    }
}

fn sort(block: &mut [u64], mut random: Random, control: &Control) {
    while control.goes_on() {
        for part in block.chunks_mut(1 << 16) {
            if !control.goes_on() {
                return;
            }
            part.fill_with(|| random.next());
        }
        sort_once(block, control);
    }
}

/// Quicksort, the upper part waiting: so that it can be told to stop.
fn sort_once(block: &mut [u64], control: &Control) {
    let mut waiting: Vec<&mut [u64]> = vec![block];
    while let Some(part) = waiting.pop() {
        if !control.goes_on() {
            return;
        }
        if part.len() <= 1 << 14 {
            part.sort_unstable();
            control.did(part.len() as u64);
            continue;
        }
        let (low, _, high) = part.select_nth_unstable(part.len() / 2);
        waiting.push(high);
        waiting.push(low);
    }
}

/// A hash join: relation R in a table with linear probing, relation S in a row, what matches in a
/// ring.
struct Join<'a> {
    /// Key and value; a key of 0 is a free place.
    table: &'a mut [u64],
    probed: &'a mut [u64],
    result: &'a mut [u64],
    at: usize,
}

impl<'a> Join<'a> {
    fn new(table: &'a mut [u64], probed: &'a mut [u64], result: &'a mut [u64]) -> Self {
        Join {
            table,
            probed,
            result,
            at: 0,
        }
    }

    fn place(&self, key: u64) -> usize {
        let places = self.table.len() as u64 / 2;
        let mut place = ((u128::from(key.wrapping_mul(0x9e37_79b9_7f4a_7c15)) * u128::from(places))
            >> 64) as usize;
        while self.table[2 * place] != 0 && self.table[2 * place] != key {
            place = (place + 1) % places as usize;
        }
        2 * place
    }

    fn run(&mut self, mut random: Random, control: &Control) {
        // Half full.
        let rows = self.table.len() as u64 / 4;
        while control.goes_on() {
            self.table.fill(0);
            for row in 1..=rows {
                if row % 4096 == 0 && !control.goes_on() {
                    return;
                }
                let place = self.place(row);
                self.table[place] = row;
                self.table[place + 1] = random.next();
            }
            // Every second key finds a row.
            self.probed.fill_with(|| 1 + random.below(2 * rows));
            for row in 0..self.probed.len() {
                if row % 4096 == 0 {
                    control.did(4096);
                    if !control.goes_on() {
                        return;
                    }
                }
                let key = self.probed[row];
                let place = self.place(key);
                if self.table[place] == key {
                    self.result[self.at] = key;
                    self.result[self.at + 1] = self.table[place + 1];
                    self.at = (self.at + 2) % (self.result.len() & !1);
                }
            }
        }
    }
}

/// Words of a record.
const RECORD: usize = 32;
/// Where they are: neighbours in the list of use, the next record of the same place in the index,
/// the key; then the value.
const NEWER: usize = 0;
const OLDER: usize = 1;
const CHAIN: usize = 2;
const KEY: usize = 3;
const VALUE: usize = 4;
const NONE: u64 = u64::MAX;
/// Lookups that come together, and the time until the next do.
const BURST: u64 = 128;
const PAUSE: Duration = Duration::from_millis(1);

/// A cache: an index of chains into records, which hang in a list by their last use.
struct Lru<'a> {
    index: &'a mut [u64],
    records: &'a mut [u64],
    used: u64,
    newest: u64,
    oldest: u64,
}

impl<'a> Lru<'a> {
    fn new(index: &'a mut [u64], records: &'a mut [u64]) -> Self {
        index.fill(NONE);
        Lru {
            index,
            records,
            used: 0,
            newest: NONE,
            oldest: NONE,
        }
    }

    fn capacity(&self) -> u64 {
        (self.records.len() / RECORD) as u64
    }

    fn field(&mut self, record: u64, field: usize) -> &mut u64 {
        &mut self.records[record as usize * RECORD + field]
    }

    fn place(&self, key: u64) -> usize {
        let hash = key.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        ((u128::from(hash) * self.index.len() as u128) >> 64) as usize
    }

    /// The record of `key`, if it is in the cache.
    fn find(&mut self, key: u64) -> Option<u64> {
        let mut record = self.index[self.place(key)];
        while record != NONE && *self.field(record, KEY) != key {
            record = *self.field(record, CHAIN);
        }
        (record != NONE).then_some(record)
    }

    fn unlink(&mut self, record: u64) {
        let (newer, older) = (*self.field(record, NEWER), *self.field(record, OLDER));
        match newer {
            NONE => self.newest = older,
            newer => *self.field(newer, OLDER) = older,
        }
        match older {
            NONE => self.oldest = newer,
            older => *self.field(older, NEWER) = newer,
        }
    }

    fn make_newest(&mut self, record: u64) {
        let newest = self.newest;
        *self.field(record, NEWER) = NONE;
        *self.field(record, OLDER) = newest;
        match newest {
            NONE => self.oldest = record,
            newest => *self.field(newest, NEWER) = record,
        }
        self.newest = record;
    }

    /// Takes the oldest record out of its chain.
    fn evict(&mut self) -> u64 {
        let record = self.oldest;
        self.unlink(record);
        let key = *self.field(record, KEY);
        let next = *self.field(record, CHAIN);
        let place = self.place(key);
        let mut at = self.index[place];
        if at == record {
            self.index[place] = next;
        } else {
            while *self.field(at, CHAIN) != record {
                at = *self.field(at, CHAIN);
            }
            *self.field(at, CHAIN) = next;
        }
        record
    }

    fn get(&mut self, key: u64, random: &mut Random) {
        if let Some(record) = self.find(key) {
            if record != self.newest {
                self.unlink(record);
                self.make_newest(record);
            }
            *self.field(record, VALUE) += 1;
            return;
        }
        let record = if self.used < self.capacity() {
            self.used += 1;
            self.used - 1
        } else {
            self.evict()
        };
        let place = self.place(key);
        *self.field(record, KEY) = key;
        *self.field(record, CHAIN) = self.index[place];
        self.index[place] = record;
        let from = record as usize * RECORD + VALUE;
        self.records[from..from + RECORD - VALUE].fill_with(|| random.next() >> 1);
        self.make_newest(record);
    }

    fn run(&mut self, mut random: Random, control: &Control) {
        let keys = 4 * self.capacity();
        while control.goes_on() {
            for _ in 0..BURST {
                // Skewed: half of all lookups go to a sixteenth of the keys.
                let share = random.below(1 << 32) as f64 / (1u64 << 32) as f64;
                let key = (share.powi(4) * keys as f64) as u64;
                self.get(key, &mut random);
            }
            control.did(BURST);
            // A cache waits for its clients.
            std::thread::sleep(PAUSE);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cache_finds_what_it_holds_and_drops_the_oldest() {
        let mut block = vec![0u64; 16 * 64];
        let (index, records) = block.split_at_mut(16 * 8);
        let mut lru = Lru::new(index, records);
        let (capacity, mut random) = (lru.capacity(), Random(1));
        assert_eq!(capacity, 28);
        (0..capacity).for_each(|key| lru.get(key, &mut random));
        lru.get(0, &mut random);
        lru.get(1000, &mut random);
        assert!(lru.find(0).is_some(), "used again");
        assert!(lru.find(1).is_none(), "the oldest");
        assert!(
            (2..capacity)
                .chain([1000])
                .all(|key| lru.find(key).is_some())
        );
        // Long after, the list still holds each record once.
        for _ in 0..10_000 {
            let key = random.below(100);
            lru.get(key, &mut random);
        }
        let (mut seen, mut at) = (0, lru.newest);
        while at != NONE {
            seen += 1;
            at = *lru.field(at, OLDER);
        }
        assert_eq!(seen, capacity);
    }

    #[test]
    fn a_join_finds_the_rows_that_match() {
        let mut block = vec![0u64; 1 << 12];
        let (table, rest) = block.split_at_mut(1 << 10);
        let (probed, result) = rest.split_at_mut(1536);
        let join = Join::new(table, probed, result);
        for key in [3, 77, 500] {
            let place = join.place(key);
            (join.table[place], join.table[place + 1]) = (key, 10 * key);
        }
        for key in [3, 77, 500] {
            assert_eq!(join.table[join.place(key) + 1], 10 * key);
        }
        assert_eq!(join.table[join.place(4)], 0);
    }

    #[test]
    fn a_program_ends_when_it_is_told() {
        for workload in [Workload::Sort, Workload::Join, Workload::Lru] {
            let control = Control::default();
            std::thread::scope(|scope| {
                scope.spawn(|| run(workload, &mut vec![0; 1 << 17], 1, &control));
                while control.operations.load(Relaxed) == 0 {
                    std::thread::yield_now();
                }
                control.stop.store(true, Relaxed);
            });
        }
    }

    #[test]
    fn a_sort_sorts() {
        let mut random = Random(7);
        let mut block: Vec<u64> = (0..100_000).map(|_| random.next()).collect();
        sort_once(&mut block, &Control::default());
        assert!(block.is_sorted());
    }
}
