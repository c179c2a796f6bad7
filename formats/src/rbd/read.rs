//! A reader of increments: records as they come.

use std::io::Read;

use dirtymap::exchange::RunTable;
use dirtymap::{Iova, IovaRange};

use super::error::RbdError;
use super::meta::{MAGIC, MAX_NAME, Meta};

/// A record of an increment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Record {
    /// So many bytes of data from this offset of the disk on. [`Reader::data`] reads them.
    Data {
        /// In the disk.
        offset: u64,
        /// At least 1.
        len: u64,
    },
    /// So many zeroes.
    Zeroes {
        /// In the disk.
        offset: u64,
        /// At least 1.
        len: u64,
    },
}

impl Record {
    /// The first byte of the disk, and how many.
    pub fn extent(self) -> (u64, u64) {
        match self {
            Record::Data { offset, len } | Record::Zeroes { offset, len } => (offset, len),
        }
    }
}

/// Reads an increment.
///
/// An increment counts when [`next_record`](Self::next_record) has returned `None`: before, the
/// stream may be cut off.
///
/// ```
/// use dirtymap_formats::rbd::{Meta, Reader, Record, Writer};
///
/// # fn main() -> Result<(), dirtymap_formats::rbd::RbdError> {
/// let meta = Meta { from: Some("mon".into()), to: Some("tue".into()), size: 1 << 20 };
/// let mut writer = Writer::new(Vec::new(), &meta)?;
/// writer.data(4096, b"new")?;
/// writer.zeroes(8192, 4096)?;
/// let stream = writer.finish()?;
///
/// let mut reader = Reader::new(&stream[..])?;
/// assert_eq!(reader.meta(), &meta);
/// assert_eq!(reader.next_record()?, Some(Record::Data { offset: 4096, len: 3 }));
/// let mut data = [0; 3];
/// reader.data(&mut data)?;
/// assert_eq!(&data, b"new");
/// assert_eq!(reader.next_record()?, Some(Record::Zeroes { offset: 8192, len: 4096 }));
/// assert_eq!(reader.next_record()?, None);
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Reader<R> {
    stream: R,
    /// Bytes that were read.
    at: u64,
    meta: Meta,
    /// The type of a record that was read ahead, to find the end of what comes before records.
    ahead: Option<u8>,
    /// Bytes of data that are not read yet.
    left: u64,
    /// Where the record before this one ends in the disk.
    end: u64,
    ended: bool,
}

impl<R: Read> Reader<R> {
    /// Reads what comes before the records. Reads in small pieces, so give it a buffered stream.
    ///
    /// # Errors
    /// [`RbdError::Damaged`], [`RbdError::Io`].
    pub fn new(stream: R) -> Result<Self, RbdError> {
        let mut reader = Reader {
            stream,
            at: 0,
            meta: Meta::default(),
            ahead: None,
            left: 0,
            end: 0,
            ended: false,
        };
        let mut magic = [0; 12];
        reader.fill(&mut magic, "the first line")?;
        if &magic != MAGIC {
            return Err(RbdError::Damaged {
                place: "the first line",
                at: 0,
                found: u64::from(magic[10]),
                why: "it is not \"rbd diff v1\"",
            });
        }
        let mut sized = false;
        loop {
            let at = reader.at;
            let kind = reader.byte("the type of a record")?;
            let twice = match kind {
                b'f' => reader.meta.from.is_some(),
                b't' => reader.meta.to.is_some(),
                b's' => sized,
                _ if sized => {
                    reader.ahead = Some(kind);
                    return Ok(reader);
                }
                _ => {
                    return Err(RbdError::Damaged {
                        place: "the type of a record",
                        at,
                        found: u64::from(kind),
                        why: "the size of the disk has to come first",
                    });
                }
            };
            if twice {
                return Err(RbdError::Damaged {
                    place: "the type of a record",
                    at,
                    found: u64::from(kind),
                    why: "it comes twice",
                });
            }
            match kind {
                b'f' => reader.meta.from = Some(reader.name()?),
                b't' => reader.meta.to = Some(reader.name()?),
                _ => {
                    reader.meta.size = reader.long("the size of the disk")?;
                    sized = true;
                }
            }
        }
    }

    /// What the increment says of itself.
    pub fn meta(&self) -> &Meta {
        &self.meta
    }

    /// The next record, after what is left of the data of this one. `None` is the end of the
    /// increment, which is whole then.
    ///
    /// # Errors
    /// [`RbdError::Damaged`] for a record out of order, past the end of the disk, or of a type that
    /// is not known; [`RbdError::Io`], also where the stream is cut off.
    pub fn next_record(&mut self) -> Result<Option<Record>, RbdError> {
        while self.left > 0 {
            let mut buf = [0; 4096];
            let part = self.left.min(buf.len() as u64) as usize;
            self.data(&mut buf[..part])?;
        }
        if self.ended {
            return Ok(None);
        }
        let at = self.at - u64::from(self.ahead.is_some());
        let kind = match self.ahead.take() {
            Some(kind) => kind,
            None => self.byte("the type of a record")?,
        };
        let damaged = |place, at, found, why| RbdError::Damaged {
            place,
            at,
            found,
            why,
        };
        match kind {
            b'w' | b'z' => {}
            b'e' => {
                self.ended = true;
                return Ok(None);
            }
            _ => {
                let why = "it is none of 'w', 'z' and 'e'";
                return Err(damaged("the type of a record", at, u64::from(kind), why));
            }
        }
        let offset = self.long("the offset of a record")?;
        let len = self.long("the length of a record")?;
        let why = "it lies below the end of the record before it";
        if offset < self.end {
            return Err(damaged("the offset of a record", at + 1, offset, why));
        }
        let end = offset.checked_add(len).filter(|&end| end <= self.meta.size);
        let why = "it is zero, or reaches past the end of the disk";
        let Some(end) = end.filter(|_| len > 0) else {
            return Err(damaged("the length of a record", at + 9, len, why));
        };
        self.end = end;
        Ok(Some(match kind {
            b'w' => {
                self.left = len;
                Record::Data { offset, len }
            }
            _ => Record::Zeroes { offset, len },
        }))
    }

    /// Reads the next `buf.len()` bytes of the record's data.
    ///
    /// # Errors
    /// [`RbdError::Record`] if the record has fewer bytes left, [`RbdError::Io`].
    pub fn data(&mut self, buf: &mut [u8]) -> Result<(), RbdError> {
        let len = buf.len() as u64;
        let Some(left) = self.left.checked_sub(len) else {
            return Err(RbdError::Record {
                offset: self.end - self.left,
                len,
                why: "the record has fewer bytes",
            });
        };
        self.fill(buf, "the data of a record")?;
        self.left = left;
        Ok(())
    }

    /// The bytes of the disk that the increment sets, to data or zero, without the data itself.
    /// At most `max_runs` of them, which bounds what the stream can make this call allocate.
    ///
    /// # Errors
    /// As [`next_record`](Self::next_record); [`RbdError::Damaged`] for more runs.
    pub fn runs(&mut self, max_runs: usize) -> Result<RunTable, RbdError> {
        let mut runs: Vec<IovaRange> = Vec::new();
        while let Some(record) = self.next_record()? {
            let (offset, len) = record.extent();
            let damaged = |found, why| RbdError::Damaged {
                place: "the number of runs",
                at: self.at,
                found,
                why,
            };
            let last = Iova::new(offset + (len - 1));
            let touched = runs
                .last()
                .is_some_and(|run| run.last().checked_add(1) == Some(Iova::new(offset)));
            let start = match runs.pop_if(|_| touched) {
                Some(run) => run.start(),
                None => Iova::new(offset),
            };
            if runs.len() == max_runs {
                return Err(damaged(runs.len() as u64 + 1, "it exceeds the limit"));
            }
            let run = IovaRange::new(start, last);
            runs.push(run.map_err(|_| damaged(offset, "it is no range of addresses"))?);
        }
        Ok(runs.into_iter().collect())
    }

    /// Writes the remaining records of the increment over the bytes of a disk, as `rbd import-diff`
    /// does. `disk` has the size that the increment names.
    ///
    /// ```
    /// use dirtymap::{Access, AddressSpace, Granule};
    /// use dirtymap_formats::rbd::{Meta, Reader, write_lease};
    ///
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let (disk, mut copy) = (vec![7; 1 << 20], vec![0; 1 << 20]);
    /// let space = AddressSpace::tracked(Granule::K4);
    /// space.map(0..1 << 20, 0, Access::ReadWrite)?;
    /// space.mark(0x3000..0x4000)?;
    /// let lease = space.rounds().next()?;
    /// let meta = Meta { from: None, to: Some("tue".into()), size: 1 << 20 };
    /// let stream = write_lease(Vec::new(), &meta, &lease, &disk)?;
    ///
    /// Reader::new(&stream[..])?.restore(&mut copy)?;
    /// assert_eq!(copy[0x3000..0x4000], disk[0x3000..0x4000]);
    /// assert_eq!(copy[..0x3000], [0; 0x3000]);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`RbdError::Size`], before anything is changed. Then those of
    /// [`next_record`](Self::next_record): the disk may have a part of the increment by then.
    pub fn restore(&mut self, disk: &mut [u8]) -> Result<(), RbdError> {
        let (size, found) = (self.meta.size, disk.len() as u64);
        if size != found {
            return Err(RbdError::Size { size, found });
        }
        while let Some(record) = self.next_record()? {
            let (offset, len) = record.extent();
            // The reader took no record that reaches past the end of the disk.
            let part = &mut disk[offset as usize..][..len as usize];
            match record {
                Record::Data { .. } => self.data(part)?,
                Record::Zeroes { .. } => part.fill(0),
            }
        }
        Ok(())
    }

    /// The stream, after the last record.
    pub fn into_inner(self) -> R {
        self.stream
    }

    fn fill(&mut self, buf: &mut [u8], place: &'static str) -> Result<(), RbdError> {
        let read = self.stream.read_exact(buf);
        read.map_err(RbdError::io(place, self.at))?;
        self.at += buf.len() as u64;
        Ok(())
    }

    fn byte(&mut self, place: &'static str) -> Result<u8, RbdError> {
        let mut byte = [0];
        self.fill(&mut byte, place)?;
        Ok(byte[0])
    }

    fn long(&mut self, place: &'static str) -> Result<u64, RbdError> {
        let mut bytes = [0; 8];
        self.fill(&mut bytes, place)?;
        Ok(u64::from_le_bytes(bytes))
    }

    fn name(&mut self) -> Result<String, RbdError> {
        let place = "the length of a snapshot's name";
        let at = self.at;
        let damaged = |found, why| RbdError::Damaged {
            place,
            at,
            found,
            why,
        };
        let mut len = [0; 4];
        self.fill(&mut len, place)?;
        let len = u32::from_le_bytes(len);
        if u64::from(len) > MAX_NAME {
            return Err(damaged(u64::from(len), "4096 bytes are the limit"));
        }
        let mut name = vec![0; len as usize];
        self.fill(&mut name, "the name of a snapshot")?;
        String::from_utf8(name).map_err(|_| damaged(u64::from(len), "it is not UTF-8"))
    }
}
