//! A writer of increments, and the increment of a lease.

use std::io::Write;

use dirtymap::exchange::RunTable;
use dirtymap::harvest::Content;
use dirtymap::{IovaRange, Lease, Synced};

use super::error::RbdError;
use super::meta::{MAGIC, MAX_NAME, Meta};
use crate::ReadAt;

/// Bytes of the disk that are read at a time.
const PIECE: u64 = 1 << 20;
/// Zeroes are found in blocks of so many bytes.
const BLOCK: u64 = 4096;

/// Writes an increment. Without [`finish`](Self::finish) it is cut off, and no reader takes it.
#[derive(Debug)]
pub struct Writer<W> {
    stream: W,
    at: u64,
    size: u64,
    /// Where the record before this one ends in the disk.
    end: u64,
}

impl<W: Write> Writer<W> {
    /// Begins an increment. Writes in small pieces, so give it a buffered stream.
    ///
    /// # Errors
    /// [`RbdError::Name`], [`RbdError::Io`].
    pub fn new(stream: W, meta: &Meta) -> Result<Self, RbdError> {
        for name in [&meta.from, &meta.to].into_iter().flatten() {
            let len = name.len() as u64;
            if len > MAX_NAME {
                return Err(RbdError::Name { len });
            }
        }
        let mut writer = Writer {
            stream,
            at: 0,
            size: meta.size,
            end: 0,
        };
        let place = "the beginning";
        writer.put(MAGIC, place)?;
        for (kind, name) in [(b'f', &meta.from), (b't', &meta.to)] {
            if let Some(name) = name {
                writer.put(&[kind], place)?;
                writer.put(&(name.len() as u32).to_le_bytes(), place)?;
                writer.put(name.as_bytes(), place)?;
            }
        }
        writer.put(b"s", place)?;
        writer.put(&meta.size.to_le_bytes(), place)?;
        Ok(writer)
    }

    /// Writes a record of data. Nothing is written for no bytes.
    ///
    /// # Errors
    /// [`RbdError::Record`] if the record lies below one before it, or reaches past the end of the
    /// disk; [`RbdError::Io`].
    pub fn data(&mut self, offset: u64, bytes: &[u8]) -> Result<(), RbdError> {
        if self.begin(b'w', offset, bytes.len() as u64)? {
            self.more(bytes)?;
        }
        Ok(())
    }

    /// Writes a record of zeroes.
    ///
    /// # Errors
    /// As [`data`](Self::data).
    pub fn zeroes(&mut self, offset: u64, len: u64) -> Result<(), RbdError> {
        self.begin(b'z', offset, len)?;
        Ok(())
    }

    /// Ends the increment, and returns the stream. The caller makes it durable.
    ///
    /// # Errors
    /// [`RbdError::Io`].
    pub fn finish(mut self) -> Result<W, RbdError> {
        self.put(b"e", "the end")?;
        let flushed = self.stream.flush();
        flushed.map_err(RbdError::io("the end", self.at))?;
        Ok(self.stream)
    }

    /// The header of a record; for data, `more` writes the rest. False if there is none.
    pub(super) fn begin(&mut self, kind: u8, offset: u64, len: u64) -> Result<bool, RbdError> {
        if len == 0 {
            return Ok(false);
        }
        let refused = |why| RbdError::Record { offset, len, why };
        if offset < self.end {
            return Err(refused("they begin below the end of the record before"));
        }
        let end = offset.checked_add(len).filter(|&end| end <= self.size);
        let end = end.ok_or(refused("they reach past the end of the disk"))?;
        self.put(&[kind], "a record")?;
        self.put(&offset.to_le_bytes(), "a record")?;
        self.put(&len.to_le_bytes(), "a record")?;
        self.end = end;
        Ok(true)
    }

    /// Data of the record that was begun.
    pub(super) fn more(&mut self, bytes: &[u8]) -> Result<(), RbdError> {
        self.put(bytes, "the data of a record")
    }

    fn put(&mut self, bytes: &[u8], place: &'static str) -> Result<(), RbdError> {
        let wrote = self.stream.write_all(bytes);
        wrote.map_err(RbdError::io(place, self.at))?;
        self.at += bytes.len() as u64;
        Ok(())
    }
}

/// Writes the increment of what is dirty: the bytes of the disk, and records of zeroes for blocks
/// of 4 KiB that hold nothing else.
///
/// Commit the lease that the runs are from when the increment is durable.
///
/// # Errors
/// [`RbdError::Outside`] if a run begins past the end of the disk (the part past the end of a run
/// across it is cut off), before anything is written; [`RbdError::Data`] if the disk cannot be
/// read; [`RbdError::Name`], [`RbdError::Io`].
pub fn write_increment<W: Write>(
    stream: W,
    meta: &Meta,
    dirty: &RunTable,
    disk: &(impl ReadAt + ?Sized),
) -> Result<W, RbdError> {
    let runs = dirty.runs();
    let contents = runs.iter().map(|&run| (run, Content::Data));
    write_contents(stream, meta, runs.last().copied(), contents, disk)
}

/// As [`write_increment`], for the runs of a lease. Its zero runs ([`Lease::contents`]) become
/// records of zeroes, and are not read.
///
/// Commit the lease when the increment is durable.
///
/// ```
/// use dirtymap::{Access, AddressSpace, Granule};
/// use dirtymap_formats::rbd::{Meta, Reader, Record, write_lease};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let disk = vec![7; 1 << 20];
/// let space = AddressSpace::tracked(Granule::K4);
/// space.map(0..1 << 20, 0, Access::ReadWrite)?;
/// space.discard(0x3000..0x6000, || Ok(()))?; // the closure punches a hole
/// let lease = space.rounds().next()?;
/// let meta = Meta { from: None, to: Some("tue".into()), size: 1 << 20 };
/// let stream = write_lease(Vec::new(), &meta, &lease, &disk)?;
/// let record = Reader::new(&stream[..])?.next_record()?;
/// assert_eq!(record, Some(Record::Zeroes { offset: 0x3000, len: 0x3000 }));
/// lease.commit();
/// # Ok(())
/// # }
/// ```
///
/// # Errors
/// Those of [`write_increment`].
pub fn write_lease<W: Write>(
    stream: W,
    meta: &Meta,
    lease: &Lease<'_, Synced>,
    disk: &(impl ReadAt + ?Sized),
) -> Result<W, RbdError> {
    write_contents(stream, meta, lease.runs().last(), lease.contents(), disk)
}

/// Records for `contents`, the last run of which is `last` or a part of it.
fn write_contents<W: Write>(
    stream: W,
    meta: &Meta,
    last: Option<IovaRange>,
    contents: impl Iterator<Item = (IovaRange, Content)>,
    disk: &(impl ReadAt + ?Sized),
) -> Result<W, RbdError> {
    let size = meta.size;
    if let Some(run) = last.filter(|run| run.start().get() >= size) {
        return Err(RbdError::Outside { run, size });
    }
    let mut writer = Writer::new(stream, meta)?;
    let mut buf = Vec::new();
    for (run, content) in contents {
        let mut at = run.start().get();
        let end = run.last().get().min(size - 1) + 1;
        if content == Content::Zero {
            writer.zeroes(at, end.saturating_sub(at))?;
            continue;
        }
        while at < end {
            let part = PIECE.min(end - at);
            buf.resize(part as usize, 0);
            let read = disk.read_exact_at(&mut buf, at);
            read.map_err(|source| RbdError::Data { at, source })?;
            pieces(&mut writer, at, &buf)?;
            at += part;
        }
    }
    writer.finish()
}

/// Records for `bytes`: those of blocks that are zero, and of all others.
fn pieces<W: Write>(writer: &mut Writer<W>, at: u64, bytes: &[u8]) -> Result<(), RbdError> {
    let mut from = 0;
    while from < bytes.len() {
        let zero = is_zero(block(at, bytes, from));
        let mut to = from;
        while to < bytes.len() && is_zero(block(at, bytes, to)) == zero {
            to += block(at, bytes, to).len();
        }
        let offset = at + from as u64;
        if zero {
            writer.zeroes(offset, (to - from) as u64)?;
        } else {
            writer.data(offset, &bytes[from..to])?;
        }
        from = to;
    }
    Ok(())
}

/// The bytes from `from` on to the next border of a block of the disk.
fn block(at: u64, bytes: &[u8], from: usize) -> &[u8] {
    let room = BLOCK - (at + from as u64) % BLOCK;
    &bytes[from..][..(room as usize).min(bytes.len() - from)]
}

fn is_zero(bytes: &[u8]) -> bool {
    bytes.iter().all(|&byte| byte == 0)
}
