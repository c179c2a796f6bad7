//! Two increments that follow each other, as one.

use std::io::{Read, Write};

use super::error::RbdError;
use super::meta::Meta;
use super::read::{Reader, Record};
use super::write::Writer;

/// Merges the increment `first` with `second`, which starts where the first one ends, and writes
/// one that leads from the beginning of the first to the end of the second. Data passes through a
/// buffer: nothing is stored.
///
/// Where both have a record, the second one counts. If the disk is larger after the second than
/// after the first, its new part is zero unless the second says otherwise, and the result says so
/// in records of zeroes: the disk may have been shrunk by the first, and what it held there before
/// must not come back.
///
/// # Errors
/// [`RbdError::Apart`] if the second does not start where the first one ends; otherwise those of
/// readers and writers.
pub fn merge<W: Write>(first: impl Read, second: impl Read, into: W) -> Result<W, RbdError> {
    let (first, second) = (Reader::new(first)?, Reader::new(second)?);
    let (before, after) = (first.meta(), second.meta());
    if before.to.is_none() || before.to != after.from {
        return Err(RbdError::Apart {
            to: before.to.clone(),
            from: after.from.clone(),
        });
    }
    let meta = Meta {
        from: before.from.clone(),
        to: after.to.clone(),
        size: after.size,
    };
    let grown = before.size;
    let mut writer = Writer::new(into, &meta)?;
    let mut old = Source::new(first)?;
    let mut new = Source::new(second)?;
    let mut at = 0;
    while at < meta.size {
        // From `at` on, one of the three counts up to `end`.
        let next_new = new.start().unwrap_or(meta.size);
        if next_new <= at {
            at = new.copy(new.end(), &mut writer)?;
            continue;
        }
        old.skip_to(at)?;
        let next_old = old.start().unwrap_or(meta.size).min(meta.size);
        let end = if next_old <= at {
            old.copy(old.end().min(next_new).min(meta.size), &mut writer)?
        } else if at >= grown {
            writer.zeroes(at, next_new - at)?;
            next_new
        } else {
            // Nothing is known of what lies between, up to where the disk ended.
            next_new.min(next_old).min(grown.max(at + 1))
        };
        at = end;
    }
    // The rest is read, so that an increment that is cut off is found.
    old.skip_to(u64::MAX)?;
    new.skip_to(u64::MAX)?;
    writer.finish()
}

/// An increment, at some offset of the disk.
struct Source<R> {
    reader: Reader<R>,
    /// What is left of the record that the reader is at.
    record: Option<Record>,
}

impl<R: Read> Source<R> {
    fn new(mut reader: Reader<R>) -> Result<Self, RbdError> {
        let record = reader.next_record()?;
        Ok(Source { reader, record })
    }

    fn start(&self) -> Option<u64> {
        self.record.map(|record| record.extent().0)
    }

    /// Where the record ends.
    fn end(&self) -> u64 {
        let (offset, len) = self.record.map_or((0, 0), Record::extent);
        offset + len
    }

    /// Drops what lies below `to`.
    fn skip_to(&mut self, to: u64) -> Result<(), RbdError> {
        while let Some(record) = self.record {
            let (offset, len) = record.extent();
            if offset >= to {
                break;
            }
            if offset + len > to {
                let mut skipped = to - offset;
                if let Record::Data { .. } = record {
                    let mut buf = [0; 4096];
                    while skipped > 0 {
                        let part = skipped.min(buf.len() as u64);
                        self.reader.data(&mut buf[..part as usize])?;
                        skipped -= part;
                    }
                }
                self.record = Some(from(record, to));
                break;
            }
            self.record = self.reader.next_record()?;
        }
        Ok(())
    }

    /// Writes the record up to `end`, and returns `end`.
    fn copy<W: Write>(&mut self, end: u64, writer: &mut Writer<W>) -> Result<u64, RbdError> {
        let Some(record) = self.record else {
            return Ok(end);
        };
        let (offset, len) = record.extent();
        match record {
            Record::Zeroes { .. } => writer.zeroes(offset, end - offset)?,
            Record::Data { .. } => {
                writer.begin(b'w', offset, end - offset)?;
                let mut left = end - offset;
                let mut buf = [0; 4096];
                while left > 0 {
                    let part = &mut buf[..left.min(4096) as usize];
                    self.reader.data(part)?;
                    writer.more(part)?;
                    left -= part.len() as u64;
                }
            }
        }
        self.record = match offset + len > end {
            true => Some(from(record, end)),
            false => self.reader.next_record()?,
        };
        Ok(end)
    }
}

/// What is left of a record from `to` on, which lies inside of it.
fn from(record: Record, to: u64) -> Record {
    let (offset, len) = record.extent();
    let (offset, len) = (to, len - (to - offset));
    match record {
        Record::Data { .. } => Record::Data { offset, len },
        Record::Zeroes { .. } => Record::Zeroes { offset, len },
    }
}
