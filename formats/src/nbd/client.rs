//! The client: reads metadata contexts of a server into tables.

use std::collections::{HashMap, HashSet};
use std::io::{Read, Write};

use dirtymap::exchange::RunTable;
use dirtymap::{Iova, IovaRange};

use super::error::{NbdError, at_most};
use super::export::{DIRTY, DIRTY_BITMAP};
use super::pieces::Pieces;
use super::wire::*;

/// The most bytes of a reply to an option, and of an error.
pub(super) const MAX_REPLY: u64 = 64 << 10;
/// The most bytes of a chunk of extents. They are read a part at a time.
const MAX_STATUS: u64 = 64 << 20;
/// The longest request for block status in 32 bits, a multiple of 64 KiB.
const LONGEST_COMPACT: u64 = (1 << 32) - (64 << 10);
/// The most extents of a context of no run. Otherwise a server could say one byte at a time.
const EXTENTS: u64 = 1 << 16;
/// Extents that are read at a time.
const AT_ONCE: u64 = 4096;

/// A connection to a server, and what was agreed on.
#[derive(Debug)]
pub struct Client<S> {
    pub(super) wire: Wire<S>,
    pub(super) size: u64,
    pub(super) extended: bool,
    /// The numbers of those that were selected.
    pub(super) contexts: HashMap<String, u32>,
    max_runs: usize,
    cookie: u64,
    replies: u64,
    extents: u64,
}

impl<S: Read + Write> Client<S> {
    /// Before the handshake.
    pub(super) fn new(stream: S, max_runs: usize) -> Self {
        Client {
            wire: Wire::new(stream),
            size: 0,
            extended: false,
            contexts: HashMap::new(),
            max_runs,
            cookie: 0,
            replies: 0,
            extents: 0,
        }
    }

    /// Bytes of the export.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Whether lengths have 64 bits on this connection.
    pub fn is_extended(&self) -> bool {
        self.extended
    }

    /// How many replies with extents there were, and how many extents in them.
    pub fn status_replies(&self) -> (u64, u64) {
        (self.replies, self.extents)
    }

    /// All bytes that a dirty bitmap holds.
    ///
    /// # Errors
    /// As [`read_context`](Self::read_context).
    pub fn read_dirty(&mut self, bitmap: &str) -> Result<RunTable, NbdError> {
        let name = format!("{DIRTY_BITMAP}{bitmap}");
        self.read_context(&name, |flags| flags & u64::from(DIRTY) != 0)
    }

    /// All bytes whose flags in a context are as asked for.
    ///
    /// # Errors
    /// [`NbdError::NoContext`] if the context was not selected; [`NbdError::Refused`] with the
    /// server's error; [`NbdError::Limit`] for more runs than
    /// [`max_runs`](super::Connect::max_runs), or far more extents; otherwise [`NbdError`] names
    /// the field at which the server broke the protocol, or the connection failed.
    pub fn read_context(
        &mut self,
        name: &str,
        wanted: impl Fn(u64) -> bool,
    ) -> Result<RunTable, NbdError> {
        let id = *self.contexts.get(name).ok_or(NbdError::NoContext {
            name: name.chars().take(64).collect(),
        })?;
        let mut runs = Runs {
            runs: Vec::new(),
            limit: self.max_runs,
        };
        let mut at = 0;
        // A run has two extents, itself and what follows it, and replies may cut both.
        let limit = (self.max_runs as u64).saturating_mul(4);
        let limit = limit.saturating_add(4 * (self.size >> 32) + EXTENTS);
        let before = self.extents;
        while at < self.size {
            at_most("the number of extents", self.extents - before, limit)?;
            let longest = if self.extended {
                u64::MAX
            } else {
                LONGEST_COMPACT
            };
            let len = (self.size - at).min(longest);
            self.request(command::BLOCK_STATUS, at, len)?;
            at = self.status(id, at, |start, len, flags| match wanted(flags) {
                true => runs.push(start, len),
                false => Ok(()),
            })?;
        }
        // They ascend and do not touch, because each was joined with what it touched.
        Ok(runs.runs.into_iter().collect())
    }

    /// Reads bytes of the disk.
    ///
    /// # Errors
    /// [`NbdError::Refused`] with the server's error; [`NbdError::Limit`] for more than 32 MiB at
    /// once; otherwise as [`read_context`](Self::read_context).
    pub fn read_at(&mut self, buf: &mut [u8], offset: u64) -> Result<(), NbdError> {
        let len = at_most("the length of a read", buf.len() as u64, MAX_PAYLOAD)?;
        if len == 0 {
            return Ok(());
        }
        self.request(command::READ, offset, len)?;
        let mut got = Pieces::default();
        loop {
            let chunk = self.chunk()?;
            match chunk.kind {
                chunk::NONE => self.none(chunk)?,
                chunk::DATA | chunk::HOLE => {
                    let place = "the offset of data";
                    let header = if chunk.kind == chunk::DATA { 8 } else { 12 };
                    let rest = self.less(chunk.len, header, "the length of data")?;
                    let at = self.wire.u64(place)?;
                    let size = match chunk.kind {
                        chunk::DATA => rest,
                        _ => u64::from(self.wire.u32("the size of a hole")?),
                    };
                    if size == 0 {
                        return Err(NbdError::Invalid {
                            place: "the length of data",
                            found: size,
                            why: "a chunk of data, or of a hole, has at least one byte",
                        });
                    }
                    let from = at
                        .checked_sub(offset)
                        .filter(|from| from.checked_add(size).is_some_and(|end| end <= len));
                    let from = from.ok_or(NbdError::Invalid {
                        place,
                        found: at,
                        why: "the data lies outside of what was asked for",
                    })?;
                    got.add(from, from + size)?;
                    let part = &mut buf[from as usize..(from + size) as usize];
                    if chunk.kind == chunk::DATA {
                        self.wire.read(part, "data")?;
                    } else if rest == 0 {
                        part.fill(0);
                    } else {
                        return Err(unexpected(chunk.kind));
                    }
                }
                kind => return Err(self.error(kind, chunk.len, "a read")?),
            }
            if chunk.done {
                break;
            }
        }
        if got.bytes() != len {
            return Err(NbdError::Invalid {
                place: "the data of a read",
                found: got.bytes(),
                why: "so many bytes are not what was asked for",
            });
        }
        Ok(())
    }

    /// Says goodbye, and returns the stream.
    ///
    /// # Errors
    /// [`NbdError::Io`] if the connection failed.
    pub fn disconnect(mut self) -> Result<S, NbdError> {
        self.request(command::DISCONNECT, 0, 0)?;
        Ok(self.wire.into_stream())
    }

    fn request(&mut self, kind: u16, offset: u64, len: u64) -> Result<(), NbdError> {
        let place = "a request";
        self.cookie += 1;
        let magic = if self.extended {
            REQUEST_EXTENDED
        } else {
            REQUEST
        };
        self.wire.put(&magic.to_be_bytes(), place)?;
        self.wire.put(&0u16.to_be_bytes(), place)?;
        self.wire.put(&kind.to_be_bytes(), place)?;
        self.wire.put(&self.cookie.to_be_bytes(), place)?;
        self.wire.put(&offset.to_be_bytes(), place)?;
        match self.extended {
            true => self.wire.put(&len.to_be_bytes(), place)?,
            false => self.wire.put(&(len as u32).to_be_bytes(), place)?,
        }
        self.wire.flush(place)
    }

    /// The header of the next chunk of the reply to the newest request.
    fn chunk(&mut self) -> Result<Chunk, NbdError> {
        let place = "the magic number of a reply";
        let found = u64::from(self.wire.u32(place)?);
        let expected = if self.extended { CHUNK_EXTENDED } else { CHUNK };
        let expected = u64::from(expected);
        if found != expected {
            return Err(NbdError::Magic {
                place,
                found,
                expected,
            });
        }
        let place = "the header of a reply";
        let flags = self.wire.u16(place)?;
        let kind = self.wire.u16(place)?;
        let (found, expected) = (self.wire.u64(place)?, self.cookie);
        if found != expected {
            return Err(NbdError::Magic {
                place: "the cookie of a reply",
                found,
                expected,
            });
        }
        let len = match self.extended {
            true => {
                self.wire.u64(place)?; // the offset once more
                self.wire.u64(place)?
            }
            false => u64::from(self.wire.u32(place)?),
        };
        Ok(Chunk {
            done: flags & chunk::DONE != 0,
            kind,
            len,
        })
    }

    /// Refuses a chunk that says nothing, unless it says that the reply ends.
    fn none(&self, chunk: Chunk) -> Result<(), NbdError> {
        match (chunk.len, chunk.done) {
            (0, true) => Ok(()),
            (0, false) => Err(NbdError::Invalid {
                place: "the flags of a reply",
                found: 0,
                why: "a chunk with nothing in it has to be the end of a reply",
            }),
            _ => Err(unexpected(chunk.kind)),
        }
    }

    /// `len` less the `header` that it has to have.
    fn less(&self, len: u64, header: u64, place: &'static str) -> Result<u64, NbdError> {
        len.checked_sub(header).ok_or(NbdError::Invalid {
            place,
            found: len,
            why: "it is too short for its header",
        })
    }

    /// Reads the reply to a request for block status from `start` on, and hands on the extents of
    /// the context `id`. Returns where they end.
    fn status(
        &mut self,
        id: u32,
        start: u64,
        mut each: impl FnMut(u64, u64, u64) -> Result<(), NbdError>,
    ) -> Result<u64, NbdError> {
        let mut end = start;
        // A chunk for each context that was selected, so that a reply ends.
        let mut seen = HashSet::new();
        loop {
            let chunk = self.chunk()?;
            let (kind, header, width) = match self.extended {
                true => (chunk::STATUS_EXTENDED, 8, 16),
                false => (chunk::STATUS, 4, 8),
            };
            if chunk.kind == kind {
                let place = "the length of a chunk of extents";
                let len = at_most(place, chunk.len, MAX_STATUS)?;
                let rest = self.less(len, header, place)?;
                let of = self.wire.u32("the number of a metadata context")?;
                let place = "the number of extents";
                let said = match self.extended {
                    true => u64::from(self.wire.u32(place)?),
                    false => rest / width,
                };
                if rest % width != 0 || said != rest / width {
                    return Err(NbdError::Invalid {
                        place,
                        found: said,
                        why: "the chunk has another length",
                    });
                }
                let invalid = |why| NbdError::Invalid {
                    place: "the number of a metadata context",
                    found: u64::from(of),
                    why,
                };
                if self.contexts.values().all(|&selected| selected != of) {
                    return Err(invalid("it was not selected"));
                }
                if !seen.insert(of) {
                    return Err(invalid("it comes twice in one reply"));
                }
                if of != id {
                    self.wire.skip(rest, "extents")?;
                } else {
                    end = self.extents(start, said, width, &mut each)?;
                    self.replies += 1;
                    self.extents += said;
                }
            } else if chunk.kind == chunk::NONE {
                self.none(chunk)?;
            } else {
                return Err(self.error(chunk.kind, chunk.len, "block status")?);
            }
            if chunk.done {
                break;
            }
        }
        if end == start {
            return Err(NbdError::Invalid {
                place: "a reply with extents",
                found: start,
                why: "it has nothing about the context from this offset on",
            });
        }
        Ok(end)
    }

    fn extents(
        &mut self,
        start: u64,
        count: u64,
        width: u64,
        each: &mut impl FnMut(u64, u64, u64) -> Result<(), NbdError>,
    ) -> Result<u64, NbdError> {
        let mut at = start;
        let mut left = count;
        while left > 0 {
            let part = left.min(AT_ONCE);
            let bytes = self.wire.take(part * width, "extents")?;
            left -= part;
            let mut fields = Fields::new(&bytes);
            for _ in 0..part {
                let extent = match self.extended {
                    true => fields.u64().zip(fields.u64()),
                    false => fields
                        .u32()
                        .zip(fields.u32())
                        .map(|(len, flags)| (u64::from(len), u64::from(flags))),
                };
                let (len, flags) = extent.unwrap_or_default();
                let room = self.size - at;
                if len == 0 || len > room {
                    return Err(NbdError::Invalid {
                        place: "the length of an extent",
                        found: len,
                        why: "it is zero, or reaches past the end of the export",
                    });
                }
                each(at, len, flags)?;
                at += len;
            }
        }
        Ok(at)
    }

    /// What a chunk says that is none of those expected.
    fn error(&mut self, kind: u16, len: u64, of: &'static str) -> Result<NbdError, NbdError> {
        if kind & chunk::IS_ERROR == 0 {
            return Ok(unexpected(kind));
        }
        let len = at_most("the length of an error", len, MAX_REPLY)?;
        let body = self.wire.take(len, "an error")?;
        let mut fields = Fields::new(&body);
        let code = fields.u32().unwrap_or(errno::EIO);
        let text = fields.u16().and_then(|len| fields.bytes(usize::from(len)));
        Ok(refused(of, code, text.unwrap_or_default()))
    }
}

#[derive(Clone, Copy, Debug)]
struct Chunk {
    done: bool,
    kind: u16,
    len: u64,
}

/// Runs that ascend; what touches the run before it is joined to it.
struct Runs {
    runs: Vec<IovaRange>,
    limit: usize,
}

impl Runs {
    fn push(&mut self, start: u64, len: u64) -> Result<(), NbdError> {
        let last = Iova::new(start + (len - 1));
        let invalid = |_| NbdError::Invalid {
            place: "the length of an extent",
            found: len,
            why: "it is no range of addresses",
        };
        if let Some(before) = self.runs.last_mut()
            && before.last().checked_add(1) == Some(Iova::new(start))
        {
            *before = IovaRange::new(before.start(), last).map_err(invalid)?;
            return Ok(());
        }
        let found = self.runs.len() as u64 + 1;
        at_most("the number of runs", found, self.limit as u64)?;
        let run = IovaRange::new(Iova::new(start), last).map_err(invalid)?;
        self.runs.push(run);
        Ok(())
    }
}

pub(super) fn refused(place: &'static str, code: u32, text: &[u8]) -> NbdError {
    let text = String::from_utf8_lossy(text).chars().take(256).collect();
    NbdError::Refused { place, code, text }
}

fn unexpected(kind: u16) -> NbdError {
    NbdError::Invalid {
        place: "the type of a reply",
        found: u64::from(kind),
        why: "it does not belong to this request, or its length is wrong",
    }
}
