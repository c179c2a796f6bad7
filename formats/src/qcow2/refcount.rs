//! Which clusters of the file are used, and how often: a table of blocks of counts.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry::{Occupied, Vacant};

use super::error::QcowError;
use super::file::{ImageFile, be64, read};
use super::header::{Header, Part};

/// The bits of an entry of the table that are the offset of a block.
const OFFSET: u64 = !0x1ff;

/// The counts, a block of them in memory at its first use.
#[derive(Debug)]
pub(super) struct Refcounts {
    cluster: u64,
    order: u32,
    table: Part,
    /// The offset of each block; 0 if all its counts are zero.
    entries: Vec<u64>,
    blocks: BTreeMap<u64, Block>,
    /// No cluster below this one is free.
    next: u64,
    /// Bytes that were taken, and of which the file may not have any yet.
    taken: u64,
}

/// Free clusters begin no further past the end of the file than this.
const SLACK: u64 = 64 << 20;

#[derive(Debug)]
struct Block {
    bytes: Vec<u8>,
    changed: bool,
    /// Not in the table of the file yet.
    new: bool,
}

impl Refcounts {
    pub(super) fn read<F: ImageFile>(file: &mut F, header: &Header) -> Result<Self, QcowError> {
        let table = header.refcount_table;
        let bytes = read(file, table.at, table.len, "the refcount table")?;
        let mut entries = Vec::with_capacity(bytes.len() / 8);
        for at in (0..bytes.len()).step_by(8) {
            let entry = be64(&bytes, at);
            if entry & !OFFSET != 0 || !entry.is_multiple_of(header.cluster()) {
                return Err(QcowError::Damaged {
                    place: "an entry of the refcount table",
                    at: table.at + at as u64,
                    found: entry,
                    why: "it is no offset of a cluster",
                });
            }
            entries.push(entry);
        }
        Ok(Refcounts {
            cluster: header.cluster(),
            order: header.refcount_order,
            table,
            entries,
            blocks: BTreeMap::new(),
            next: 1,
            taken: 0,
        })
    }

    /// The offsets of all blocks.
    pub(super) fn blocks(&self) -> impl Iterator<Item = u64> {
        self.entries.iter().copied().filter(|&at| at != 0)
    }

    /// How many counts are in a block.
    fn per_block(&self) -> u64 {
        (self.cluster * 8) >> self.order
    }

    fn block<F: ImageFile>(&mut self, file: &mut F, nth: u64) -> Result<&mut Block, QcowError> {
        match self.blocks.entry(nth) {
            Occupied(block) => Ok(block.into_mut()),
            Vacant(place) => {
                let at = self.entries[nth as usize];
                let bytes = read(file, at, self.cluster, "a block of refcounts")?;
                Ok(place.insert(Block {
                    bytes,
                    changed: false,
                    new: false,
                }))
            }
        }
    }

    fn has_block(&self, nth: u64) -> bool {
        self.entries.get(nth as usize).is_some_and(|&at| at != 0)
    }

    /// How often the cluster is used.
    pub(super) fn get<F: ImageFile>(&mut self, file: &mut F, index: u64) -> Result<u64, QcowError> {
        let (nth, place) = (index / self.per_block(), index % self.per_block());
        if !self.has_block(nth) {
            return Ok(0);
        }
        let order = self.order;
        Ok(count(&self.block(file, nth)?.bytes, place, order))
    }

    /// Sets the count of a cluster that has a block to 0 or 1.
    fn set<F: ImageFile>(&mut self, file: &mut F, index: u64, used: bool) -> Result<(), QcowError> {
        let (nth, place) = (index / self.per_block(), index % self.per_block());
        let order = self.order;
        let block = self.block(file, nth)?;
        set_count(&mut block.bytes, place, order, used);
        block.changed = true;
        Ok(())
    }

    /// Takes `clusters` free ones side by side, and returns the offset of the first. None of them
    /// lies in `parts`, which are used whatever the counts say.
    pub(super) fn allocate<F: ImageFile>(
        &mut self,
        file: &mut F,
        clusters: u64,
        parts: &[(u64, u64, &'static str)],
    ) -> Result<u64, QcowError> {
        let first = loop {
            let first = self.find(file, clusters)?;
            match (first..first + clusters).find(|at| !self.has_block(at / self.per_block())) {
                None => break first,
                Some(index) => self.add_block(index / self.per_block(), parts)?,
            }
        };
        let (start, end) = (first * self.cluster, (first + clusters) * self.cluster);
        unused(start, end, parts)?;
        let len = file.length().map_err(QcowError::io("the image", 0))?;
        if start > len + self.taken + SLACK {
            return Err(QcowError::Damaged {
                place: "the first free cluster",
                at: start,
                found: len,
                why: "the file ends long before: qemu-img check -r all",
            });
        }
        self.taken += end - start;
        for index in first..first + clusters {
            self.set(file, index, true)?;
        }
        if clusters == 1 {
            self.next = first + 1;
        }
        Ok(start)
    }

    /// The first of so many free clusters side by side.
    fn find<F: ImageFile>(&mut self, file: &mut F, clusters: u64) -> Result<u64, QcowError> {
        let mut first = self.next;
        let mut at = first;
        while at - first < clusters {
            let used = self.get(file, at)? != 0;
            at += 1;
            if used {
                first = at;
            }
        }
        Ok(first)
    }

    /// Makes a block, in the first of the clusters that it counts. None of them is used.
    fn add_block(&mut self, nth: u64, parts: &[(u64, u64, &'static str)]) -> Result<(), QcowError> {
        let known = self.entries.len() as u64;
        let first = nth * self.per_block();
        unused(first * self.cluster, (first + 1) * self.cluster, parts)?;
        let entry = self.entries.get_mut(nth as usize);
        let entry = entry.ok_or(QcowError::Unsupported {
            place: "the size of the refcount table",
            found: known,
            why: "the table is full, and this library does not make it larger",
        })?;
        *entry = first * self.cluster;
        self.taken += self.cluster;
        let mut bytes = vec![0; self.cluster as usize];
        set_count(&mut bytes, 0, self.order, true);
        let block = Block {
            bytes,
            changed: true,
            new: true,
        };
        self.blocks.insert(nth, block);
        Ok(())
    }

    /// Says that a cluster, which is used once, is free again.
    pub(super) fn free<F: ImageFile>(&mut self, file: &mut F, at: u64) -> Result<(), QcowError> {
        let index = at / self.cluster;
        self.used_once(file, at)?;
        self.set(file, index, false)?;
        self.next = self.next.min(index);
        Ok(())
    }

    /// Refuses a cluster that is free, or used by another part of the image as well.
    pub(super) fn used_once<F: ImageFile>(
        &mut self,
        file: &mut F,
        at: u64,
    ) -> Result<(), QcowError> {
        match self.get(file, at / self.cluster)? {
            1 => Ok(()),
            found => Err(QcowError::Damaged {
                place: "the refcount of a bitmap's cluster",
                at,
                found,
                why: "it has to be 1: qemu-img check -r all",
            }),
        }
    }

    /// Writes what has changed, and returns when it is durable.
    pub(super) fn flush<F: ImageFile>(&mut self, file: &mut F) -> Result<(), QcowError> {
        let mut new = Vec::new();
        for (&nth, block) in &mut self.blocks {
            if block.changed {
                let at = self.entries[nth as usize];
                let wrote = file.write_at(at, &block.bytes);
                wrote.map_err(QcowError::io("a block of refcounts", at))?;
                block.changed = false;
            }
            if std::mem::take(&mut block.new) {
                new.push(nth);
            }
        }
        let place = "the refcount table";
        let flush = |file: &mut F| file.flush().map_err(QcowError::io(place, 0));
        flush(file)?;
        // A block is named in the table when it is there.
        if !new.is_empty() {
            for nth in new {
                let at = self.table.at + 8 * nth;
                let entry = self.entries[nth as usize].to_be_bytes();
                file.write_at(at, &entry)
                    .map_err(QcowError::io(place, at))?;
            }
            flush(file)?;
        }
        Ok(())
    }
}

/// Refuses clusters that belong to the image although they count as free.
fn unused(start: u64, end: u64, parts: &[(u64, u64, &'static str)]) -> Result<(), QcowError> {
    // They ascend and do not overlap, so the last one that begins below `end` reaches the furthest.
    let below = parts.partition_point(|part| part.0 < end);
    match parts[..below].last().filter(|part| start < part.1) {
        None => Ok(()),
        Some(&(at, _, _)) => Err(QcowError::Damaged {
            place: "a refcount",
            at,
            found: 0,
            why: "the cluster is used: qemu-img check -r all",
        }),
    }
}

/// The count at `place` of a block, of 2^`order` bits.
fn count(bytes: &[u8], place: u64, order: u32) -> u64 {
    let place = place as usize;
    if order < 3 {
        let per_byte = 8 >> order;
        let shift = (place % per_byte) << order;
        let mask = (1u64 << (1 << order)) - 1;
        return u64::from(bytes[place / per_byte]) >> shift & mask;
    }
    let width = 1 << (order - 3);
    let of = &bytes[place * width..][..width];
    of.iter().fold(0, |sum, &byte| sum << 8 | u64::from(byte))
}

fn set_count(bytes: &mut [u8], place: u64, order: u32, used: bool) {
    let place = place as usize;
    if order < 3 {
        let per_byte = 8 >> order;
        let shift = (place % per_byte) << order;
        let mask = ((1u32 << (1 << order)) - 1) as u8;
        let byte = &mut bytes[place / per_byte];
        *byte = *byte & !(mask << shift) | u8::from(used) << shift;
        return;
    }
    let width = 1 << (order - 3);
    let of = &mut bytes[place * width..][..width];
    of.fill(0);
    of[width - 1] = u8::from(used);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_of_all_widths_do_not_touch_each_other() {
        for order in 0..=6 {
            let mut bytes = vec![0xff; 16];
            let counts = 128 >> order;
            for place in 0..counts {
                set_count(&mut bytes, place, order, false);
                for other in 0..counts {
                    let expected = other > place;
                    assert_eq!(
                        count(&bytes, other, order) != 0,
                        expected,
                        "{order} {place}"
                    );
                }
            }
            set_count(&mut bytes, counts / 2, order, true);
            assert_eq!(count(&bytes, counts / 2, order), 1);
            assert_eq!(
                (0..counts).map(|at| count(&bytes, at, order)).sum::<u64>(),
                1
            );
        }
    }
}
