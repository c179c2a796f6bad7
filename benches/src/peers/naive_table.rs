//! A minimal IO page table: its lowest tables, and a walk that looks at each entry.
//!
//! It maps nothing, and no other thread may change its leaves. Harvests are compared with it as the
//! minimum: a walk that records no debt, and one that does, as a harvest beside devices has to.
//! Entries have the layout of AMD's, version 1: bit 0 present, bit 6 dirty.

use std::ops::Range;

use dirtymap::flush::FlushGather;
use dirtymap::sync::{AtomicU64, Ordering};
use dirtymap::{Granule, Iova};

use crate::workloads::shuffled;

const PRESENT: u64 = 1 << 0;
const DIRTY: u64 = 1 << 6;
const ADDRESS_SHIFT: u64 = 12;
/// Entries of a table.
pub const ENTRIES: u64 = 512;

#[repr(C, align(4096))]
struct Page([AtomicU64; ENTRIES as usize]);

/// The lowest tables of an IO page table.
pub struct NaiveTable {
    memory: Vec<Page>,
    /// The place of each table in memory.
    places: Vec<usize>,
}

impl NaiveTable {
    /// Tables for `leaves` clean leaves, a multiple of [`ENTRIES`]. The tables are adjacent, or at
    /// random places.
    pub fn new(leaves: u64, scattered: bool) -> Self {
        let tables = (leaves / ENTRIES) as usize;
        let entry = |table: usize, nth: usize| {
            let frame = table as u64 * ENTRIES + nth as u64;
            AtomicU64::new(PRESENT | frame << ADDRESS_SHIFT)
        };
        let page = |table| Page(std::array::from_fn(|nth| entry(table, nth)));
        NaiveTable {
            memory: (0..tables).map(page).collect(),
            places: if scattered {
                shuffled(tables)
            } else {
                (0..tables).collect()
            },
        }
    }

    /// The number of tables.
    pub fn tables(&self) -> usize {
        self.places.len()
    }

    /// Makes leaves dirty.
    pub fn dirty(&self, leaves: Range<u64>) {
        for leaf in leaves {
            let table = &self.memory[self.places[(leaf / ENTRIES) as usize]];
            // Relaxed: a workload, prepared by the thread that measures.
            table.0[(leaf % ENTRIES) as usize].fetch_or(DIRTY, Ordering::Relaxed);
        }
    }

    /// Moves the dirty bits of `tables` into `words`, one entry after the other. Bit 0 is the first
    /// leaf of the first of all tables.
    pub fn harvest(&self, words: &mut [u64]) {
        for (place, words) in self.places.iter().zip(words.as_chunks_mut::<8>().0) {
            for (nth, slot) in self.memory[*place].0.iter().enumerate() {
                // Relaxed, both: as in the walk of a kernel, in which the bit orders nothing.
                let entry = slot.load(Ordering::Relaxed);
                if entry & PRESENT != 0 && entry & DIRTY != 0 {
                    slot.fetch_and(!DIRTY, Ordering::Relaxed);
                    words[nth / 64] |= 1 << (nth % 64);
                }
            }
        }
    }

    /// The same, with what a harvest beside devices and other threads needs: a leaf is owed before
    /// it is cleared, and cleared by compare-exchange, which fails if it has become part of a
    /// larger one.
    pub fn harvest_owed(&self, leaf: Granule, words: &mut [u64], gather: &mut FlushGather) {
        let tables = self.places.iter().zip(words.as_chunks_mut::<8>().0);
        for (table, (place, words)) in tables.enumerate() {
            for (nth, slot) in self.memory[*place].0.iter().enumerate() {
                // Relaxed, all: as above.
                let (entry, order) = (slot.load(Ordering::Relaxed), Ordering::Relaxed);
                if entry & PRESENT != 0 && entry & DIRTY != 0 {
                    words[nth / 64] |= 1 << (nth % 64);
                    let first = table as u64 * ENTRIES + nth as u64;
                    gather.add_many(Iova::new(first << leaf.lg2()), leaf, 1);
                    let _ = slot.compare_exchange(entry, entry & !DIRTY, order, order);
                }
            }
        }
    }

    /// The OR of all entries, table by table: no walk can be faster than the memory.
    pub fn read(&mut self) -> u64 {
        let mut lanes = [0; 8];
        for place in &self.places {
            let page =
                std::ptr::from_mut(&mut self.memory[*place]).cast::<[u64; ENTRIES as usize]>();
            // SAFETY: as long and as aligned as the atomics in this memory, which are borrowed
            // exclusively, so no other thread reaches them.
            let entries = unsafe { &*page };
            for line in entries.as_chunks::<8>().0 {
                for (lane, entry) in lanes.iter_mut().zip(line) {
                    *lane |= entry;
                }
            }
        }
        lanes.into_iter().fold(0, |all, lane| all | lane)
    }
}
