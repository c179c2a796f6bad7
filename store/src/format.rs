//! The bytes of the log: header, checkpoint, batches. docs/store-format.md has them one by one.
//!
//! ```text
//!  block 0     header            4096 bytes, the first 96 of them used
//!  block 1..   checkpoint        an image, padded with zeros
//!  block n..   batches           each begins a block: 32 bytes of header, records, zeros
//! ```

use crc32fast::Hasher;
use dirtymap::Granule;

use crate::codec::{Bad, Reader};
use crate::error::Why;
use crate::geometry::{Device, Geometry};
use crate::image::Image;
use crate::record::Record;
use crate::step::{Step, performs};

/// What is written at a time is a multiple of this, so that no write touches what is durable.
pub(crate) const BLOCK: usize = 4096;
/// The version of the format.
pub(crate) const VERSION: u32 = 1;
/// The most bytes that batches have, until a new log begins.
pub(crate) const MAX_LOG: u64 = 1 << 30;

const MAGIC: [u8; 8] = *b"dmstore\0";
const BATCH_MAGIC: [u8; 4] = *b"dmba";
const HEADER: usize = 96;
const BATCH_HEADER: usize = 32;

/// The first block of a log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) geometry: Geometry,
    pub(crate) store: u128,
    pub(crate) device: u128,
    /// The number of this log, from 1. Each log of a store has the next.
    pub(crate) generation: u64,
    /// Bytes of the checkpoint.
    pub(crate) checkpoint: u64,
    pub(crate) checkpoint_crc: u32,
    /// Bytes for batches.
    pub(crate) log: u64,
    /// The number of the first batch.
    pub(crate) sequence: u64,
}

/// Rounded up to blocks.
pub(crate) fn blocks(bytes: u64) -> u64 {
    bytes.next_multiple_of(BLOCK as u64)
}

impl Header {
    /// Where batches begin.
    pub(crate) fn batches(&self) -> u64 {
        BLOCK as u64 + blocks(self.checkpoint)
    }

    /// The length of the file.
    pub(crate) fn len(&self) -> u64 {
        self.batches() + self.log
    }

    pub(crate) fn put(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(BLOCK);
        out.extend_from_slice(&MAGIC);
        out.extend_from_slice(&VERSION.to_le_bytes());
        out.push(self.geometry.extent.lg2());
        out.push(self.geometry.page.lg2());
        out.extend_from_slice(&[0; 2]);
        out.extend_from_slice(&self.store.to_le_bytes());
        out.extend_from_slice(&self.device.to_le_bytes());
        for number in [
            self.geometry.len,
            self.generation,
            self.checkpoint,
            self.log,
            self.sequence,
        ] {
            out.extend_from_slice(&number.to_le_bytes());
        }
        out.extend_from_slice(&self.checkpoint_crc.to_le_bytes());
        out.extend_from_slice(&crc32fast::hash(&out).to_le_bytes());
        out.resize(BLOCK, 0);
        out
    }

    /// Reads the header of a file that has `len` bytes. `device` is the one that it should be of.
    pub(crate) fn read(block: &[u8], len: u64, device: &Device) -> Result<Header, Why> {
        if !block.starts_with(&MAGIC) {
            return Err(Why::Foreign);
        }
        if block.len() < BLOCK {
            return Err(Why::Truncated {
                len,
                needed: BLOCK as u64,
            });
        }
        let version = u32_at(block, 8);
        if version != VERSION {
            return Err(Why::Version {
                found: version,
                known: VERSION,
            });
        }
        let crc = u32_at(block, HEADER - 4);
        if crc32fast::hash(&block[..HEADER - 4]) != crc && performs(Step::RefuseTorn) {
            return Err(Why::Checksum { part: "header" });
        }
        let damaged = |what| Why::Damaged {
            part: "header",
            what,
        };
        let granule = |at: usize| Granule::from_lg2(block[at]);
        let granules = (granule(12), granule(13));
        let (Some(extent), Some(page)) = granules else {
            return Err(damaged("a granule is too large"));
        };
        let recorded = u128_at(block, 32);
        if recorded != device.id {
            return Err(Why::WrongDevice {
                recorded,
                asked: device.id,
            });
        }
        let geometry = Geometry::new(u64_at(block, 48), extent, page)
            .map_err(|_| damaged("the device cannot be divided so"))?;
        let header = Header {
            geometry,
            store: u128_at(block, 16),
            device: recorded,
            generation: u64_at(block, 56),
            checkpoint: u64_at(block, 64),
            log: u64_at(block, 72),
            sequence: u64_at(block, 80),
            checkpoint_crc: u32_at(block, 88),
        };
        // Numbers that count from 1 do not get here.
        if header.generation.max(header.sequence) > u64::MAX / 2 {
            return Err(damaged("a number is too high"));
        }
        if header.log > MAX_LOG || !header.log.is_multiple_of(BLOCK as u64) {
            return Err(damaged("the room for batches is not possible"));
        }
        // Checked before anything of that length is read: a sparse file has any length.
        if header.checkpoint > Image::most_bytes(geometry.extents()) {
            return Err(damaged("the checkpoint is longer than the device needs"));
        }
        if header.checkpoint > len || header.len() > len {
            return Err(Why::Truncated {
                len,
                needed: header.checkpoint.saturating_add(header.log),
            });
        }
        Ok(header)
    }
}

/// Corrects the checksums of a log with any contents: for tests of hostile files.
#[cfg(any(test, feature = "test-kit"))]
pub fn forge_checksums(log: &mut [u8]) {
    let put = |log: &mut [u8], at: usize, from: usize, end: usize| {
        if let Some(crc) = log.get(from..end.min(log.len())).map(crc32fast::hash)
            && let Some(place) = log.get_mut(at..at + 4)
        {
            place.copy_from_slice(&crc.to_le_bytes());
        }
    };
    let checkpoint = u64_at(log, 64).min(log.len() as u64) as usize;
    put(log, HEADER - 8, BLOCK, BLOCK + checkpoint);
    put(log, HEADER - 4, 0, HEADER - 4);
    for at in (BLOCK..log.len()).step_by(BLOCK) {
        if log[at..].starts_with(&BATCH_MAGIC) {
            let len = u32_at(log, at + 24) as usize;
            put(log, at + 4, at + 8, at + BATCH_HEADER + len);
        }
    }
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u64_at(bytes, at) as u32
}

/// Eight bytes, or as many as there are; little endian.
fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let some = bytes.iter().skip(at).take(8);
    some.rev()
        .fold(0, |value, byte| value << 8 | u64::from(*byte))
}

fn u128_at(bytes: &[u8], at: usize) -> u128 {
    u128::from(u64_at(bytes, at + 8)) << 64 | u128::from(u64_at(bytes, at))
}

/// Records that become durable together.
#[derive(Debug)]
pub(crate) struct Batch {
    bytes: Vec<u8>,
    count: u32,
}

impl Batch {
    pub(crate) fn new() -> Self {
        Batch {
            bytes: vec![0; BATCH_HEADER],
            count: 0,
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.count == 0
    }

    pub(crate) fn push(&mut self, record: &Record) {
        record.put(&mut self.bytes);
        self.count += 1;
    }

    /// The bytes of the batch: whole blocks.
    pub(crate) fn seal(mut self, generation: u64, sequence: u64) -> Vec<u8> {
        let payload = (self.bytes.len() - BATCH_HEADER) as u32;
        self.bytes[..4].copy_from_slice(&BATCH_MAGIC);
        self.bytes[8..16].copy_from_slice(&generation.to_le_bytes());
        self.bytes[16..24].copy_from_slice(&sequence.to_le_bytes());
        self.bytes[24..28].copy_from_slice(&payload.to_le_bytes());
        self.bytes[28..32].copy_from_slice(&self.count.to_le_bytes());
        let crc = crc32fast::hash(&self.bytes[8..]);
        self.bytes[4..8].copy_from_slice(&crc.to_le_bytes());
        let len = self.bytes.len().next_multiple_of(BLOCK);
        self.bytes.resize(len, 0);
        self.bytes
    }

    /// How many bytes [`seal`](Self::seal) makes.
    pub(crate) fn len(&self) -> u64 {
        blocks(self.bytes.len() as u64)
    }
}

/// A batch that was read: its number, its records, and the bytes that it takes.
pub(crate) struct Found {
    pub(crate) sequence: u64,
    pub(crate) records: Vec<Record>,
    pub(crate) len: u64,
}

/// How many bytes have to be looked at to see whether a batch begins here.
pub(crate) fn batch_claims(bytes: &[u8]) -> usize {
    if bytes.starts_with(&BATCH_MAGIC) {
        bytes.len().min(u32_at(bytes, 24) as usize)
    } else {
        0
    }
}

/// The batch of `generation` at the beginning of `bytes`, if there is one, and all of it is there.
/// `Err` if its checksum is right and its records are none.
pub(crate) fn batch(bytes: &[u8], generation: u64) -> Result<Option<Found>, Bad> {
    let Some((head, rest)) = bytes.split_at_checked(BATCH_HEADER) else {
        return Ok(None);
    };
    if head[..4] != BATCH_MAGIC || u64_at(head, 8) != generation {
        return Ok(None);
    }
    let len = u32_at(head, 24) as usize;
    let Some(payload) = rest.get(..len) else {
        return Ok(None);
    };
    let mut hasher = Hasher::new();
    hasher.update(&head[8..]);
    hasher.update(payload);
    if hasher.finalize() != u32_at(head, 4) && performs(Step::RefuseTorn) {
        return Ok(None);
    }
    let mut from = Reader::new(payload);
    let mut records = Vec::new();
    for _ in 0..u32_at(head, 28) {
        match Record::read(&mut from) {
            Ok(record) => records.push(record),
            // A reader that accepts torn batches takes the records that it understands.
            Err(_) if !performs(Step::RefuseTorn) => break,
            Err(bad) => return Err(bad),
        }
    }
    Ok(Some(Found {
        sequence: u64_at(head, 16),
        records,
        len: blocks((BATCH_HEADER + len) as u64),
    }))
}
