//! The handshake of a client.

use std::collections::HashMap;
use std::io::{Read, Write};

use super::client::{Client, MAX_REPLY, refused};
use super::error::{NbdError, at_most};
use super::export::DIRTY_BITMAP;
use super::wire::*;

/// The most replies to one option.
const MAX_REPLIES: usize = 4096;

/// What a client asks a server for.
///
/// ```no_run
/// use std::os::unix::net::UnixStream;
/// use dirtymap_formats::nbd::Connect;
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let stream = UnixStream::connect("/run/disk.sock")?;
/// let mut client = Connect::new("").dirty("epoch7").over(stream)?;
/// for run in client.read_dirty("epoch7")?.runs() {
///     println!("copy {run}");
/// }
/// client.disconnect()?;
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct Connect {
    export: String,
    contexts: Vec<String>,
    compact: bool,
    max_runs: usize,
}

impl Connect {
    /// For the export of this name; the empty name is that of the default.
    pub fn new(export: impl Into<String>) -> Self {
        Connect {
            export: export.into(),
            contexts: Vec::new(),
            compact: false,
            max_runs: 1 << 24,
        }
    }

    /// Selects a metadata context, such as `base:allocation`.
    pub fn context(mut self, name: impl Into<String>) -> Self {
        self.contexts.push(name.into());
        self
    }

    /// Selects the context of a dirty bitmap.
    pub fn dirty(self, bitmap: &str) -> Self {
        self.context(format!("{DIRTY_BITMAP}{bitmap}"))
    }

    /// Does not ask for extended headers, as an old client.
    pub fn compact(mut self) -> Self {
        self.compact = true;
        self
    }

    /// The most runs that a table may get, which bounds what a server can make this client
    /// allocate: 2^24 by default, of 16 bytes each. It also bounds how many extents a server may
    /// cut its answer into: 65536 more than four for each run and each 4 GiB of the disk.
    pub fn max_runs(mut self, runs: usize) -> Self {
        self.max_runs = runs;
        self
    }

    /// Connects. Set the timeouts of a socket before.
    ///
    /// # Errors
    /// [`NbdError::NoContext`] if the export lacks a context, [`NbdError::Refused`] if there is no
    /// such export or the server has no structured replies; otherwise [`NbdError`] names the field
    /// at which the server broke the protocol, or the connection failed.
    pub fn over<S: Read + Write>(self, stream: S) -> Result<Client<S>, NbdError> {
        for name in self.contexts.iter().chain([&self.export]) {
            if name.len() as u64 > MAX_NAME {
                return Err(NbdError::name(name, "has more than 4096 bytes"));
            }
        }
        let mut client = Client::new(stream, self.max_runs);
        client.greet()?;
        client.extended =
            !self.compact && client.agrees(option::EXTENDED_HEADERS, "extended headers")?;
        if !client.extended {
            client.ask(
                option::STRUCTURED_REPLY,
                &[],
                "structured replies",
                |_, _| Ok(()),
            )?;
        }
        client.select(&self)?;
        client.go(&self.export)?;
        Ok(client)
    }
}

impl<S: Read + Write> Client<S> {
    fn greet(&mut self) -> Result<(), NbdError> {
        self.wire.magic(NBD_MAGIC, "the greeting")?;
        self.wire
            .magic(OPTION_MAGIC, "the style of the handshake")?;
        let place = "the flags of the server";
        let flags = self.wire.u16(place)?;
        if flags & FIXED_NEWSTYLE == 0 {
            let found = u64::from(flags);
            let why = "the server does not know the fixed newstyle handshake";
            return Err(NbdError::Invalid { place, found, why });
        }
        let flags = u32::from(flags & (FIXED_NEWSTYLE | NO_ZEROES));
        self.wire.put(&flags.to_be_bytes(), "flags")
    }

    /// Whether the server takes an option that has no data.
    fn agrees(&mut self, option: u32, place: &'static str) -> Result<bool, NbdError> {
        match self.ask(option, &[], place, |_, _| Ok(())) {
            Ok(()) => Ok(true),
            Err(NbdError::Refused { .. }) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Sends an option, and hands on what the server replies before it acknowledges it.
    fn ask(
        &mut self,
        option: u32,
        data: &[u8],
        place: &'static str,
        mut each: impl FnMut(u32, &[u8]) -> Result<(), NbdError>,
    ) -> Result<(), NbdError> {
        self.wire.put(&OPTION_MAGIC.to_be_bytes(), place)?;
        self.wire.put(&option.to_be_bytes(), place)?;
        self.wire.put(&(data.len() as u32).to_be_bytes(), place)?;
        self.wire.put(data, place)?;
        self.wire.flush(place)?;
        for _ in 0..MAX_REPLIES {
            let place = "the reply to an option";
            self.wire.magic(REPLY_MAGIC, place)?;
            let found = self.wire.u32(place)?;
            if found != option {
                return Err(NbdError::Magic {
                    place: "the option that a reply is for",
                    found: u64::from(found),
                    expected: u64::from(option),
                });
            }
            let kind = self.wire.u32(place)?;
            let len = u64::from(self.wire.u32(place)?);
            at_most("the length of a reply to an option", len, MAX_REPLY)?;
            let body = self.wire.take(len, place)?;
            match kind {
                reply::ACK => return Ok(()),
                code if code & reply::ERROR != 0 => {
                    return Err(refused(asked(option), code, &body));
                }
                _ => each(kind, &body)?,
            }
        }
        Err(NbdError::Limit {
            place: "the number of replies to an option",
            found: MAX_REPLIES as u64 + 1,
            limit: MAX_REPLIES as u64,
        })
    }

    fn select(&mut self, connect: &Connect) -> Result<(), NbdError> {
        if connect.contexts.is_empty() {
            return Ok(());
        }
        let mut data = Vec::new();
        put_name(&mut data, &connect.export);
        data.extend_from_slice(&(connect.contexts.len() as u32).to_be_bytes());
        for name in &connect.contexts {
            put_name(&mut data, name);
        }
        let place = "the name of a metadata context";
        let mut contexts = HashMap::new();
        self.ask(option::SET_META_CONTEXT, &data, place, |kind, body| {
            let mut fields = Fields::new(body);
            let (reply::META_CONTEXT, Some(id)) = (kind, fields.u32()) else {
                return Err(unexpected_reply(kind));
            };
            let name = std::str::from_utf8(&body[4..]).unwrap_or_default();
            if connect.contexts.iter().all(|asked| asked != name) {
                return Ok(());
            }
            let invalid = |why| NbdError::Invalid {
                place: "the number of a metadata context",
                found: u64::from(id),
                why,
            };
            // The extents of a number are those of one context.
            let others = contexts.iter().filter(|&(other, _)| other != name);
            if others.into_iter().any(|(_, &other)| other == id) {
                return Err(invalid("another context has it"));
            }
            match contexts.insert(name.to_owned(), id) {
                Some(before) if before != id => Err(invalid("the context has another number")),
                _ => Ok(()),
            }
        })?;
        match connect
            .contexts
            .iter()
            .find(|it| !contexts.contains_key(*it))
        {
            Some(name) => Err(NbdError::NoContext { name: name.clone() }),
            None => {
                self.contexts = contexts;
                Ok(())
            }
        }
    }

    fn go(&mut self, export: &str) -> Result<(), NbdError> {
        let mut data = Vec::new();
        put_name(&mut data, export);
        data.extend_from_slice(&0u16.to_be_bytes());
        let mut size = None;
        self.ask(
            option::GO,
            &data,
            "the choice of an export",
            |kind, body| {
                let mut fields = Fields::new(body);
                match (kind, fields.u16()) {
                    (reply::INFO, Some(info::EXPORT)) => size = fields.u64(),
                    (reply::INFO, Some(_)) => {}
                    _ => return Err(unexpected_reply(kind)),
                }
                Ok(())
            },
        )?;
        let place = "the size of the export";
        let found = size.ok_or(NbdError::Invalid {
            place,
            found: 0,
            why: "the server does not say it",
        })?;
        self.size = at_most(place, found, i64::MAX as u64)?;
        Ok(())
    }
}

fn put_name(data: &mut Vec<u8>, name: &str) {
    data.extend_from_slice(&(name.len() as u32).to_be_bytes());
    data.extend_from_slice(name.as_bytes());
}

fn asked(option: u32) -> &'static str {
    match option {
        option::EXTENDED_HEADERS => "extended headers",
        option::STRUCTURED_REPLY => "structured replies",
        option::SET_META_CONTEXT => "metadata contexts",
        _ => "the export",
    }
}

fn unexpected_reply(kind: u32) -> NbdError {
    NbdError::Invalid {
        place: "the type of a reply to an option",
        found: u64::from(kind),
        why: "it does not belong to this option, or its length is wrong",
    }
}
