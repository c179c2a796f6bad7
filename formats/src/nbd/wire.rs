//! Numbers of the protocol, and a stream that names the field at which it fails.

use std::io::{self, Read, Write};

use super::error::NbdError;

pub(super) const NBD_MAGIC: u64 = 0x4e42_444d_4147_4943;
pub(super) const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
pub(super) const REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
pub(super) const REQUEST: u32 = 0x2560_9513;
pub(super) const REQUEST_EXTENDED: u32 = 0x21e4_1c71;
pub(super) const SIMPLE: u32 = 0x6744_6698;
pub(super) const CHUNK: u32 = 0x668e_33ef;
pub(super) const CHUNK_EXTENDED: u32 = 0x6e8a_278c;

/// Flags of the handshake, of both sides.
pub(super) const FIXED_NEWSTYLE: u16 = 1;
pub(super) const NO_ZEROES: u16 = 2;

pub(super) mod option {
    pub(in super::super) const EXPORT_NAME: u32 = 1;
    pub(in super::super) const ABORT: u32 = 2;
    pub(in super::super) const LIST: u32 = 3;
    pub(in super::super) const INFO: u32 = 6;
    pub(in super::super) const GO: u32 = 7;
    pub(in super::super) const STRUCTURED_REPLY: u32 = 8;
    pub(in super::super) const LIST_META_CONTEXT: u32 = 9;
    pub(in super::super) const SET_META_CONTEXT: u32 = 10;
    pub(in super::super) const EXTENDED_HEADERS: u32 = 11;
}

pub(super) mod reply {
    pub(in super::super) const ACK: u32 = 1;
    pub(in super::super) const SERVER: u32 = 2;
    pub(in super::super) const INFO: u32 = 3;
    pub(in super::super) const META_CONTEXT: u32 = 4;
    pub(in super::super) const ERROR: u32 = 1 << 31;
    pub(in super::super) const UNSUPPORTED: u32 = ERROR | 1;
    pub(in super::super) const INVALID: u32 = ERROR | 3;
    pub(in super::super) const UNKNOWN: u32 = ERROR | 6;
    pub(in super::super) const TOO_BIG: u32 = ERROR | 9;
    pub(in super::super) const EXTENDED_REQUIRED: u32 = ERROR | 10;
}

pub(super) mod info {
    pub(in super::super) const EXPORT: u16 = 0;
    pub(in super::super) const NAME: u16 = 1;
    pub(in super::super) const DESCRIPTION: u16 = 2;
    pub(in super::super) const BLOCK_SIZE: u16 = 3;
}

pub(super) mod command {
    pub(in super::super) const READ: u16 = 0;
    pub(in super::super) const WRITE: u16 = 1;
    pub(in super::super) const DISCONNECT: u16 = 2;
    pub(in super::super) const TRIM: u16 = 4;
    pub(in super::super) const WRITE_ZEROES: u16 = 6;
    pub(in super::super) const BLOCK_STATUS: u16 = 7;
    /// Flags of commands.
    pub(in super::super) const DONT_FRAGMENT: u16 = 1 << 2;
    pub(in super::super) const ONE_EXTENT: u16 = 1 << 3;
    pub(in super::super) const HAS_PAYLOAD: u16 = 1 << 5;
}

pub(super) mod chunk {
    pub(in super::super) const DONE: u16 = 1;
    pub(in super::super) const NONE: u16 = 0;
    pub(in super::super) const DATA: u16 = 1;
    pub(in super::super) const HOLE: u16 = 2;
    pub(in super::super) const STATUS: u16 = 5;
    pub(in super::super) const STATUS_EXTENDED: u16 = 6;
    pub(in super::super) const IS_ERROR: u16 = 1 << 15;
    pub(in super::super) const ERROR: u16 = IS_ERROR | 1;
    pub(in super::super) const ERROR_AT: u16 = IS_ERROR | 2;
}

/// Errors of commands, with the numbers of Linux.
pub(super) mod errno {
    pub(in super::super) const EPERM: u32 = 1;
    pub(in super::super) const EIO: u32 = 5;
    pub(in super::super) const EINVAL: u32 = 22;
    pub(in super::super) const EOVERFLOW: u32 = 75;
}

/// Flags of an export that is only read: it has flags, is read-only, and shows the same to several
/// connections.
pub(super) const EXPORT_FLAGS: u16 = 1 | 1 << 1 | 1 << 8;
/// It keeps a read in one piece if the client asks for that. Only structured replies have pieces.
pub(super) const SEND_DF: u16 = 1 << 7;

/// The longest name in the protocol, in bytes.
pub(super) const MAX_NAME: u64 = 4096;
/// The longest read, write or reply, in bytes: what every client has to expect.
pub(super) const MAX_PAYLOAD: u64 = 32 << 20;

/// A connection. What is sent collects in a buffer that [`flush`](Wire::flush) empties.
#[derive(Debug)]
pub(super) struct Wire<S> {
    stream: S,
    out: Vec<u8>,
}

/// Bytes that collect before they are sent.
const BUFFER: usize = 64 << 10;

impl<S: Read + Write> Wire<S> {
    pub(super) fn new(stream: S) -> Self {
        let out = Vec::with_capacity(BUFFER);
        Wire { stream, out }
    }

    pub(super) fn into_stream(self) -> S {
        self.stream
    }

    pub(super) fn read(&mut self, buf: &mut [u8], place: &'static str) -> Result<(), NbdError> {
        self.stream.read_exact(buf).map_err(NbdError::io(place))
    }

    /// As [`read`](Self::read), or false if the peer closed the connection before the first byte.
    pub(super) fn read_or_end(
        &mut self,
        buf: &mut [u8],
        place: &'static str,
    ) -> Result<bool, NbdError> {
        let mut done = 0;
        while done < buf.len() {
            match self.stream.read(&mut buf[done..]) {
                Ok(0) if done == 0 => return Ok(false),
                Ok(0) => return Err(NbdError::io(place)(io::ErrorKind::UnexpectedEof.into())),
                Ok(read) => done += read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(NbdError::io(place)(error)),
            }
        }
        Ok(true)
    }

    pub(super) fn u16(&mut self, place: &'static str) -> Result<u16, NbdError> {
        let mut bytes = [0; 2];
        self.read(&mut bytes, place)?;
        Ok(u16::from_be_bytes(bytes))
    }

    pub(super) fn u32(&mut self, place: &'static str) -> Result<u32, NbdError> {
        let mut bytes = [0; 4];
        self.read(&mut bytes, place)?;
        Ok(u32::from_be_bytes(bytes))
    }

    pub(super) fn u64(&mut self, place: &'static str) -> Result<u64, NbdError> {
        let mut bytes = [0; 8];
        self.read(&mut bytes, place)?;
        Ok(u64::from_be_bytes(bytes))
    }

    pub(super) fn magic(&mut self, expected: u64, place: &'static str) -> Result<(), NbdError> {
        match self.u64(place)? {
            found if found == expected => Ok(()),
            found => Err(NbdError::Magic {
                place,
                found,
                expected,
            }),
        }
    }

    /// `len` bytes, which the caller has bounded.
    pub(super) fn take(&mut self, len: u64, place: &'static str) -> Result<Vec<u8>, NbdError> {
        let mut bytes = vec![0; len as usize];
        self.read(&mut bytes, place)?;
        Ok(bytes)
    }

    /// Reads `len` bytes, and forgets them.
    pub(super) fn skip(&mut self, mut len: u64, place: &'static str) -> Result<(), NbdError> {
        let mut bytes = [0; 4096];
        while len > 0 {
            let part = len.min(bytes.len() as u64);
            self.read(&mut bytes[..part as usize], place)?;
            len -= part;
        }
        Ok(())
    }

    pub(super) fn put(&mut self, bytes: &[u8], place: &'static str) -> Result<(), NbdError> {
        if self.out.len() + bytes.len() > BUFFER {
            self.send(place)?;
        }
        if bytes.len() > BUFFER {
            return self.stream.write_all(bytes).map_err(NbdError::io(place));
        }
        self.out.extend_from_slice(bytes);
        Ok(())
    }

    fn send(&mut self, place: &'static str) -> Result<(), NbdError> {
        let sent = self.stream.write_all(&self.out);
        self.out.clear();
        sent.map_err(NbdError::io(place))
    }

    /// Sends what was collected.
    pub(super) fn flush(&mut self, place: &'static str) -> Result<(), NbdError> {
        self.send(place)?;
        self.stream.flush().map_err(NbdError::io(place))
    }
}

/// Numbers out of bytes that were received as a whole.
#[derive(Debug)]
pub(super) struct Fields<'a> {
    bytes: &'a [u8],
}

impl<'a> Fields<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Fields { bytes }
    }

    pub(super) fn bytes(&mut self, len: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.bytes.split_at_checked(len)?;
        self.bytes = rest;
        Some(taken)
    }

    pub(super) fn u16(&mut self) -> Option<u16> {
        Some(u16::from_be_bytes(self.bytes(2)?.try_into().ok()?))
    }

    pub(super) fn u32(&mut self) -> Option<u32> {
        Some(u32::from_be_bytes(self.bytes(4)?.try_into().ok()?))
    }

    pub(super) fn u64(&mut self) -> Option<u64> {
        Some(u64::from_be_bytes(self.bytes(8)?.try_into().ok()?))
    }

    /// A length of 32 bits and so much text, no longer than a name may be.
    pub(super) fn name(&mut self) -> Option<&'a str> {
        let len = self.u32()?;
        if u64::from(len) > MAX_NAME {
            return None;
        }
        std::str::from_utf8(self.bytes(len as usize)?).ok()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }
}
