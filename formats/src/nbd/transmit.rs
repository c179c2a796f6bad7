//! The second part of a connection of a server: requests and their replies.

use std::io::{Read, Write};

use super::error::{NbdError, at_most};
use super::export::Context;
use super::session::{Chosen, Mode, Session};
use super::wire::*;

/// The most bytes of a read in one piece of a structured reply.
const PIECE: u64 = 1 << 20;
/// The longest extent in a reply that has 32 bits for it: all lengths stay multiples of 64 KiB.
const LONGEST_COMPACT: u64 = (1 << 32) - (64 << 10);

#[derive(Clone, Copy, Debug)]
struct Request {
    flags: u16,
    kind: u16,
    cookie: u64,
    offset: u64,
    len: u64,
}

/// Why a request is refused, for the client.
struct Refusal(u32, &'static str);

pub(super) fn transmit<S: Read + Write>(
    wire: Wire<S>,
    chosen: &Chosen<'_, '_>,
    session: Session,
) -> Result<Session, NbdError> {
    let mut transmission = Transmission {
        wire,
        chosen,
        session,
        data: Vec::new(),
    };
    while let Some(request) = transmission.request()? {
        transmission.session.requests += 1;
        if request.kind == command::DISCONNECT {
            transmission.session.said_goodbye = true;
            break;
        }
        transmission.answer(request)?;
        transmission.wire.flush("a reply")?;
    }
    Ok(transmission.session)
}

struct Transmission<'c, 'e, 'a, S> {
    wire: Wire<S>,
    chosen: &'c Chosen<'e, 'a>,
    session: Session,
    /// What a read has read.
    data: Vec<u8>,
}

impl<S: Read + Write> Transmission<'_, '_, '_, S> {
    /// The next request, unless the client has gone.
    fn request(&mut self) -> Result<Option<Request>, NbdError> {
        let place = "the magic number of a request";
        let mut magic = [0; 4];
        if !self.wire.read_or_end(&mut magic, place)? {
            return Ok(None);
        }
        let extended = self.chosen.mode == Mode::Extended;
        let found = u64::from(u32::from_be_bytes(magic));
        let expected = u64::from(if extended { REQUEST_EXTENDED } else { REQUEST });
        if found != expected {
            return Err(NbdError::Magic {
                place,
                found,
                expected,
            });
        }
        let place = "the header of a request";
        Ok(Some(Request {
            flags: self.wire.u16(place)?,
            kind: self.wire.u16(place)?,
            cookie: self.wire.u64(place)?,
            offset: self.wire.u64(place)?,
            len: match extended {
                true => self.wire.u64(place)?,
                false => u64::from(self.wire.u32(place)?),
            },
        }))
    }

    fn answer(&mut self, request: Request) -> Result<(), NbdError> {
        self.payload(request)?;
        let refused = match request.kind {
            command::READ => self.read(request)?,
            command::BLOCK_STATUS => self.status(request)?,
            command::WRITE | command::TRIM | command::WRITE_ZEROES => {
                Some(Refusal(errno::EPERM, "the export is read-only"))
            }
            _ => Some(Refusal(errno::EINVAL, "the command is not known here")),
        };
        if let Some(refusal) = refused {
            self.session.refused += 1;
            self.refuse(request, refusal, None)?;
        }
        Ok(())
    }

    /// Reads over what a client sends along, although there is nothing that it could write.
    fn payload(&mut self, request: Request) -> Result<(), NbdError> {
        let has = match self.chosen.mode {
            Mode::Extended => request.flags & command::HAS_PAYLOAD != 0,
            _ => request.kind == command::WRITE,
        };
        if has {
            at_most("the payload of a request", request.len, MAX_PAYLOAD)?;
            self.wire.skip(request.len, "the payload of a request")?;
        }
        Ok(())
    }

    /// Whether the request is one for bytes of the disk, with no other flags than these.
    fn check(&self, request: Request, flags: u16) -> Option<Refusal> {
        let refusal = |text| Some(Refusal(errno::EINVAL, text));
        if request.flags & !flags != 0 {
            return refusal("a flag of the command is not known here");
        }
        if request.len == 0 {
            return refusal("the length is zero");
        }
        match request.offset.checked_add(request.len) {
            Some(end) if end <= self.chosen.export.size => None,
            _ => refusal("the request reaches past the end of the export"),
        }
    }

    fn read(&mut self, request: Request) -> Result<Option<Refusal>, NbdError> {
        let whole = request.flags & command::DONT_FRAGMENT != 0;
        let flags = match self.chosen.mode {
            Mode::Simple => 0,
            _ => command::DONT_FRAGMENT,
        };
        if let Some(refusal) = self.check(request, flags) {
            return Ok(Some(refusal));
        }
        if request.len > MAX_PAYLOAD || whole && request.len > PIECE {
            return Ok(Some(Refusal(errno::EOVERFLOW, "the read is too long")));
        }
        let Some(data) = self.chosen.export.data else {
            let text = "the export has dirty state, but no data";
            return Ok(Some(Refusal(errno::EIO, text)));
        };
        let piece = match self.chosen.mode {
            Mode::Simple => request.len, // an error has no place in the data
            _ => PIECE,
        };
        let mut done = 0;
        while done < request.len {
            let part = piece.min(request.len - done);
            let at = request.offset + done;
            self.data.resize(part as usize, 0);
            if data.read_exact_at(&mut self.data, at).is_err() {
                self.session.refused += 1;
                let refusal = Refusal(errno::EIO, "the data cannot be read");
                self.refuse(request, refusal, Some(at))?;
                return Ok(None);
            }
            done += part;
            let place = "the data of a read";
            if self.chosen.mode == Mode::Simple {
                self.simple(request, 0)?;
            } else {
                let flags = if done == request.len { chunk::DONE } else { 0 };
                self.chunk(request, flags, chunk::DATA, 8 + part)?;
                self.wire.put(&at.to_be_bytes(), place)?;
            }
            self.wire.put(&self.data, place)?;
            self.session.bytes_read += part;
        }
        Ok(None)
    }

    fn status(&mut self, request: Request) -> Result<Option<Refusal>, NbdError> {
        if let Some(refusal) = self.check(request, command::ONE_EXTENT) {
            return Ok(Some(refusal));
        }
        let chosen = self.chosen;
        let Some(((last, of_last), others)) = chosen.contexts.split_last() else {
            let text = "the client has selected no metadata context";
            return Ok(Some(Refusal(errno::EINVAL, text)));
        };
        for (id, context) in others {
            self.status_chunk(request, 0, *id, context)?;
        }
        self.status_chunk(request, chunk::DONE, *last, of_last)?;
        Ok(None)
    }

    /// All extents of a request in one chunk. They are counted first, so that none is stored.
    fn status_chunk(
        &mut self,
        request: Request,
        flags: u16,
        id: u32,
        context: &Context,
    ) -> Result<(), NbdError> {
        let extended = self.chosen.mode == Mode::Extended;
        let one = request.flags & command::ONE_EXTENT != 0;
        let end = request.offset + request.len;
        let beyond = if one { end } else { self.chosen.export.size };
        let longest = if extended { u64::MAX } else { LONGEST_COMPACT };
        let (header, each) = if extended { (8, 16) } else { (4, 8) };
        let most = if one {
            1
        } else {
            (MAX_PAYLOAD - header) / each
        };
        let extents = || {
            let extents = context.extents(request.offset, end, beyond, longest);
            extents.take(most as usize)
        };
        let count = extents().count() as u64;
        let place = "the extents of a reply";
        let kind = match extended {
            true => chunk::STATUS_EXTENDED,
            false => chunk::STATUS,
        };
        self.chunk(request, flags, kind, header + each * count)?;
        self.wire.put(&id.to_be_bytes(), place)?;
        if extended {
            self.wire.put(&(count as u32).to_be_bytes(), place)?;
        }
        for (len, flags) in extents() {
            if extended {
                self.wire.put(&len.to_be_bytes(), place)?;
                self.wire.put(&u64::from(flags).to_be_bytes(), place)?;
            } else {
                // No longer than LONGEST_COMPACT.
                self.wire.put(&(len as u32).to_be_bytes(), place)?;
                self.wire.put(&flags.to_be_bytes(), place)?;
            }
        }
        self.session.status_replies += 1;
        self.session.extents += count;
        Ok(())
    }

    /// The header of a chunk of `len` bytes, no more than a payload has.
    fn chunk(&mut self, request: Request, flags: u16, kind: u16, len: u64) -> Result<(), NbdError> {
        let place = "the header of a reply";
        let extended = self.chosen.mode == Mode::Extended;
        let magic = if extended { CHUNK_EXTENDED } else { CHUNK };
        self.wire.put(&magic.to_be_bytes(), place)?;
        self.wire.put(&flags.to_be_bytes(), place)?;
        self.wire.put(&kind.to_be_bytes(), place)?;
        self.wire.put(&request.cookie.to_be_bytes(), place)?;
        if extended {
            self.wire.put(&request.offset.to_be_bytes(), place)?;
            return self.wire.put(&len.to_be_bytes(), place);
        }
        self.wire.put(&(len as u32).to_be_bytes(), place)
    }

    fn simple(&mut self, request: Request, error: u32) -> Result<(), NbdError> {
        let place = "the header of a reply";
        self.wire.put(&SIMPLE.to_be_bytes(), place)?;
        self.wire.put(&error.to_be_bytes(), place)?;
        self.wire.put(&request.cookie.to_be_bytes(), place)
    }

    /// The last chunk of a reply: an error, with the offset at which it happened if that is known.
    fn refuse(
        &mut self,
        request: Request,
        Refusal(error, text): Refusal,
        at: Option<u64>,
    ) -> Result<(), NbdError> {
        if self.chosen.mode == Mode::Simple {
            return self.simple(request, error);
        }
        let mut body = error.to_be_bytes().to_vec();
        body.extend_from_slice(&(text.len() as u16).to_be_bytes());
        body.extend_from_slice(text.as_bytes());
        let kind = match at {
            Some(at) => {
                body.extend_from_slice(&at.to_be_bytes());
                chunk::ERROR_AT
            }
            None => chunk::ERROR,
        };
        self.chunk(request, chunk::DONE, kind, body.len() as u64)?;
        self.wire.put(&body, "an error")
    }
}
