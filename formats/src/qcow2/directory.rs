//! The directory of bitmaps: an entry for each, one after the other.

use std::collections::HashSet;

use super::error::{QcowError, at_most};
use super::file::{be32, be64};
use super::header::{Header, Part};

pub(super) const IN_USE: u32 = 1;
pub(super) const AUTO: u32 = 2;
/// A program that does not know the extra data may read the bitmap all the same.
const EXTRA_COMPATIBLE: u32 = 4;
/// The type of a bitmap of dirty granules.
const DIRTY_TRACKING: u8 = 1;
/// The byte of an entry at which its flags begin.
pub(super) const AT_FLAGS: u64 = 12;
pub(super) const MAX_NAME: usize = 1023;
/// QEMU's limits for granules.
pub(super) const LEAST_LG2: u8 = 9;
pub(super) const MOST_LG2: u8 = 31;
/// QEMU's limit for the bits of one bitmap, in bytes.
pub(super) const MAX_BITS_BYTES: u64 = 512 << 20;
/// The most entries of the tables of all bitmaps, which [`Image`](super::Image) keeps, in 8 bytes
/// each. With clusters of 64 KiB that is 512 bitmaps of the longest kind.
pub(super) const MAX_TABLES: u64 = 1 << 22;

/// An entry of the directory.
#[derive(Clone, Debug)]
pub(super) struct Entry {
    /// Where it is in the file; 0 if it is new.
    pub(super) at: u64,
    pub(super) table: Part,
    pub(super) flags: u32,
    pub(super) lg2: u8,
    kind: u8,
    extra: Vec<u8>,
    pub(super) name: String,
}

impl Entry {
    pub(super) fn new(name: &str, lg2: u8, flags: u32, table: Part) -> Self {
        Entry {
            at: 0,
            table,
            flags,
            lg2,
            kind: DIRTY_TRACKING,
            extra: Vec::new(),
            name: name.into(),
        }
    }

    pub(super) fn is_in_use(&self) -> bool {
        self.flags & IN_USE != 0
    }

    /// Whether its content is known to this library.
    pub(super) fn is_known(&self) -> bool {
        self.kind == DIRTY_TRACKING
            && (self.extra.is_empty() || self.flags & EXTRA_COMPATIBLE != 0)
            && self.flags & !(IN_USE | AUTO | EXTRA_COMPATIBLE) == 0
    }

    /// Refuses a bitmap that is none of this disk, or too long. The table of no other one is read.
    pub(super) fn sized(&self, header: &Header) -> Result<(), QcowError> {
        sized(header, self.lg2)?;
        let (found, expected) = (self.table.len / 8, table_entries(header, self.lg2));
        match found == expected {
            true => Ok(()),
            false => Err(QcowError::TableSize {
                at: self.at + 8,
                found,
                expected,
            }),
        }
    }

    /// Whether its table is read, and kept.
    pub(super) fn has_table(&self, header: &Header) -> bool {
        self.is_known() && self.sized(header).is_ok()
    }

    /// How many bytes it takes in a directory.
    pub(super) fn len(&self) -> usize {
        (24 + self.extra.len() + self.name.len()).next_multiple_of(8)
    }

    pub(super) fn encode(&self, out: &mut Vec<u8>) {
        let end = out.len() + self.len();
        out.extend_from_slice(&self.table.at.to_be_bytes());
        out.extend_from_slice(&((self.table.len / 8) as u32).to_be_bytes());
        out.extend_from_slice(&self.flags.to_be_bytes());
        out.extend_from_slice(&[self.kind, self.lg2]);
        out.extend_from_slice(&(self.name.len() as u16).to_be_bytes());
        out.extend_from_slice(&(self.extra.len() as u32).to_be_bytes());
        out.extend_from_slice(&self.extra);
        out.extend_from_slice(self.name.as_bytes());
        out.resize(end, 0);
    }
}

/// Refuses a bitmap of the disk that has more bits than QEMU takes.
pub(super) fn sized(header: &Header, lg2: u8) -> Result<(), QcowError> {
    let bytes = granules(header.size, lg2).div_ceil(8);
    at_most("the size of a bitmap in bytes", bytes, MAX_BITS_BYTES)?;
    Ok(())
}

/// Refuses tables that have too many entries together.
pub(super) fn tables_fit(entries: u64) -> Result<(), QcowError> {
    let place = "the number of entries of all bitmaps' tables";
    at_most(place, entries, MAX_TABLES)?;
    Ok(())
}

/// How many clusters of bits a bitmap of the disk has.
pub(super) fn table_entries(header: &Header, lg2: u8) -> u64 {
    let bytes = granules(header.size, lg2).div_ceil(8);
    header.clusters(bytes)
}

pub(super) fn granules(size: u64, lg2: u8) -> u64 {
    size.div_ceil(1 << lg2)
}

/// The entries of a directory. `bytes` begin at `at` of the file.
pub(super) fn entries(
    header: &Header,
    count: u64,
    bytes: &[u8],
    directory_at: u64,
) -> Result<Vec<Entry>, QcowError> {
    let mut entries: Vec<Entry> = Vec::new();
    let mut names = HashSet::new();
    let mut rest = bytes;
    while !rest.is_empty() {
        let at = directory_at + (bytes.len() - rest.len()) as u64;
        let damaged = |place, field, found, why| QcowError::Damaged {
            place,
            at: at + field,
            found,
            why,
        };
        let left = rest.len() as u64;
        if left < 24 || entries.len() as u64 == count {
            let why = "the directory has more or fewer entries than its header says";
            return Err(damaged("what is left of the directory", 0, left, why));
        }
        let name_len = usize::from(u16::from_be_bytes([rest[18], rest[19]]));
        let extra_len = be32(rest, 20) as usize;
        let len = (24 + extra_len + name_len).next_multiple_of(8);
        let Some((entry, after)) = rest.split_at_checked(len) else {
            let why = "the entry reaches past the directory";
            return Err(damaged("the length of an entry", 0, len as u64, why));
        };
        rest = after;
        let name = &entry[24 + extra_len..][..name_len];
        let name = std::str::from_utf8(name)
            .ok()
            .filter(|it| !it.is_empty() && it.len() <= MAX_NAME);
        let name = name.ok_or(damaged(
            "the name of a bitmap",
            24 + extra_len as u64,
            name_len as u64,
            "so many bytes are no name of 1 to 1023 bytes in UTF-8",
        ))?;
        if !names.insert(name) {
            let why = "another bitmap has this name";
            return Err(damaged("the name of a bitmap", 24, name_len as u64, why));
        }
        let entry = Entry {
            at,
            table: Part {
                at: be64(entry, 0),
                len: 8 * u64::from(be32(entry, 8)),
            },
            flags: be32(entry, 12),
            lg2: entry[17],
            kind: entry[16],
            extra: entry[24..][..extra_len].to_vec(),
            name: name.into(),
        };
        if !(LEAST_LG2..=MOST_LG2).contains(&entry.lg2) {
            let why = "9 to 31 are possible";
            let found = u64::from(entry.lg2);
            return Err(damaged("the granule of a bitmap", 17, found, why));
        }
        if !entry.table.at.is_multiple_of(header.cluster()) || entry.table.at == 0 {
            let why = "it is no multiple of the size of a cluster";
            return Err(damaged(
                "the offset of a bitmap's table",
                0,
                entry.table.at,
                why,
            ));
        }
        entries.push(entry);
    }
    if entries.len() as u64 != count {
        return Err(QcowError::Damaged {
            place: "the bitmaps' directory",
            at: directory_at,
            found: entries.len() as u64,
            why: "the directory has more or fewer entries than its header says",
        });
    }
    Ok(entries)
}
