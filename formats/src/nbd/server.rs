//! The server: one connection from its first byte to its last.

use std::io::{Read, Write};

use super::error::{NbdError, at_most};
use super::export::{Context, DIRTY_BITMAP, Export};
use super::session::{Chosen, Mode, Session};
use super::transmit::transmit;
use super::wire::*;

/// The most options of one connection, so that no client keeps a server in its handshake for ever.
const MAX_OPTIONS: usize = 1024;
/// The most bytes of an option that is looked at. A longer one is read and refused.
const MAX_OPTION: u64 = 64 << 10;

/// Serves one connection, until the client is done with it. Clients of several connections are
/// served by as many threads: exports are only read.
///
/// A client that sends nothing keeps this call for as long as the stream waits, so set the timeouts
/// of a socket before. Whatever the client sends, at most 64 KiB of it are held at a time, and a
/// read without structured replies holds up to 32 MiB of data.
///
/// # Errors
/// [`NbdError`] names the field at which the client broke the protocol, or the connection failed.
/// The caller closes the connection then.
pub fn serve<S: Read + Write>(stream: S, exports: &[Export<'_>]) -> Result<Session, NbdError> {
    let mut handshake = Handshake {
        wire: Wire::new(stream),
        exports,
        mode: Mode::Simple,
        zeroes: true,
        aborted: false,
        selected: None,
    };
    let mut session = Session::default();
    handshake.greet()?;
    match handshake.options()? {
        Some(chosen) => {
            session.export = Some(chosen.export.name.clone());
            transmit(handshake.wire, &chosen, session)
        }
        None => {
            session.said_goodbye = handshake.aborted;
            Ok(session)
        }
    }
}

/// What follows an option.
enum Next<'e, 'a> {
    Option,
    Serve(Chosen<'e, 'a>),
    End,
}

struct Handshake<'e, 'a, S> {
    wire: Wire<S>,
    exports: &'e [Export<'a>],
    mode: Mode,
    /// Whether the old option gets its 124 bytes of zeroes.
    zeroes: bool,
    /// Whether the client said that it is done.
    aborted: bool,
    /// The export for which contexts were selected, and which of its contexts.
    selected: Option<(usize, Vec<usize>)>,
}

impl<'e, 'a, S: Read + Write> Handshake<'e, 'a, S> {
    fn greet(&mut self) -> Result<(), NbdError> {
        let place = "the greeting";
        self.wire.put(&NBD_MAGIC.to_be_bytes(), place)?;
        self.wire.put(&OPTION_MAGIC.to_be_bytes(), place)?;
        self.wire
            .put(&(FIXED_NEWSTYLE | NO_ZEROES).to_be_bytes(), place)?;
        self.wire.flush(place)?;
        let place = "the flags of the client";
        let flags = self.wire.u32(place)?;
        let found = u64::from(flags);
        if flags & !u32::from(FIXED_NEWSTYLE | NO_ZEROES) != 0 {
            let why = "flags that the server did not offer";
            return Err(NbdError::Invalid { place, found, why });
        }
        self.zeroes = flags & u32::from(NO_ZEROES) == 0;
        Ok(())
    }

    /// Answers options, until the client chooses an export or goes.
    fn options(&mut self) -> Result<Option<Chosen<'e, 'a>>, NbdError> {
        for _ in 0..MAX_OPTIONS {
            let mut magic = [0; 8];
            let place = "the magic number of an option";
            if !self.wire.read_or_end(&mut magic, place)? {
                return Ok(None);
            }
            let (found, expected) = (u64::from_be_bytes(magic), OPTION_MAGIC);
            if found != expected {
                return Err(NbdError::Magic {
                    place,
                    found,
                    expected,
                });
            }
            let option = self.wire.u32("the number of an option")?;
            let place = "the length of an option";
            let len = u64::from(self.wire.u32(place)?);
            at_most(place, len, MAX_PAYLOAD)?;
            if len > MAX_OPTION {
                self.wire.skip(len, "an option that is too long")?;
                self.reply(option, reply::TOO_BIG, b"the option is too long")?;
                continue;
            }
            let data = self.wire.take(len, "the data of an option")?;
            match self.option(option, &data)? {
                Next::Option => {}
                Next::Serve(chosen) => return Ok(Some(chosen)),
                Next::End => return Ok(None),
            }
        }
        Err(NbdError::Limit {
            place: "the number of options",
            found: MAX_OPTIONS as u64 + 1,
            limit: MAX_OPTIONS as u64,
        })
    }

    /// Answers one option.
    fn option(&mut self, option: u32, data: &[u8]) -> Result<Next<'e, 'a>, NbdError> {
        match option {
            option::EXPORT_NAME => return self.export_name(data).map(Next::Serve),
            option::ABORT => {
                self.aborted = true;
                // The client may have gone already.
                let _ = self.reply(option, reply::ACK, &[]);
                return Ok(Next::End);
            }
            option::INFO | option::GO => {
                if let Some(export) = self.go(option, data)? {
                    return Ok(Next::Serve(self.chosen(export)));
                }
            }
            option::LIST_META_CONTEXT | option::SET_META_CONTEXT => {
                self.meta_context(option, data)?;
            }
            option::LIST | option::STRUCTURED_REPLY | option::EXTENDED_HEADERS
                if !data.is_empty() =>
            {
                self.reply(option, reply::INVALID, b"the option takes no data")?;
            }
            option::LIST => {
                for export in self.exports {
                    let len = export.name.len() as u32;
                    let mut body = len.to_be_bytes().to_vec();
                    body.extend_from_slice(export.name.as_bytes());
                    body.extend_from_slice(export.description.as_bytes());
                    self.put_reply(option, reply::SERVER, &body)?;
                }
                self.reply(option, reply::ACK, &[])?;
            }
            option::STRUCTURED_REPLY if self.mode == Mode::Extended => {
                let text = b"extended headers include structured replies";
                self.reply(option, reply::EXTENDED_REQUIRED, text)?;
            }
            option::STRUCTURED_REPLY => {
                self.mode = Mode::Structured;
                self.reply(option, reply::ACK, &[])?;
            }
            option::EXTENDED_HEADERS => {
                self.mode = Mode::Extended;
                self.reply(option, reply::ACK, &[])?;
            }
            _ => self.reply(option, reply::UNSUPPORTED, b"the option is not known here")?,
        }
        Ok(Next::Option)
    }

    /// The old way to choose: no errors, so that a name that does not exist ends the connection.
    fn export_name(&mut self, data: &[u8]) -> Result<Chosen<'e, 'a>, NbdError> {
        let place = "the name of an export";
        let found = data.len() as u64;
        let export = std::str::from_utf8(data).ok().and_then(|it| self.find(it));
        let export = export.ok_or(NbdError::Invalid {
            place,
            found,
            why: "no export has a name of this length and content",
        })?;
        let place = "the size of the export";
        let size = self.exports[export].size;
        self.wire.put(&size.to_be_bytes(), place)?;
        self.wire.put(&self.export_flags().to_be_bytes(), place)?;
        if self.zeroes {
            self.wire.put(&[0; 124], place)?;
        }
        self.wire.flush(place)?;
        Ok(self.chosen(export))
    }

    fn export_flags(&self) -> u16 {
        match self.mode {
            Mode::Simple => EXPORT_FLAGS,
            Mode::Structured | Mode::Extended => EXPORT_FLAGS | SEND_DF,
        }
    }

    fn find(&self, name: &str) -> Option<usize> {
        let exact = self.exports.iter().position(|export| export.name == name);
        // An empty name asks for the default, which is the first.
        exact.or((name.is_empty() && !self.exports.is_empty()).then_some(0))
    }

    /// Contexts count only for the export for which they were selected.
    fn chosen(&mut self, nth: usize) -> Chosen<'e, 'a> {
        let export = &self.exports[nth];
        let selected = match self.selected.take() {
            Some((of, selected)) if of == nth => selected,
            _ => Vec::new(),
        };
        let contexts = selected
            .into_iter()
            .map(|context| (context_id(context), &export.contexts[context]))
            .collect();
        Chosen {
            export,
            contexts,
            mode: self.mode,
        }
    }

    fn go(&mut self, option: u32, data: &[u8]) -> Result<Option<usize>, NbdError> {
        let Some((name, asked)) = asked_infos(data) else {
            self.reply(option, reply::INVALID, b"the option does not add up")?;
            return Ok(None);
        };
        let Some(nth) = self.find(name) else {
            self.reply(option, reply::UNKNOWN, b"there is no export of this name")?;
            return Ok(None);
        };
        let export = &self.exports[nth];
        let mut body = info::EXPORT.to_be_bytes().to_vec();
        body.extend_from_slice(&export.size.to_be_bytes());
        body.extend_from_slice(&self.export_flags().to_be_bytes());
        self.put_reply(option, reply::INFO, &body)?;
        for (kind, text) in [
            (info::NAME, &export.name),
            (info::DESCRIPTION, &export.description),
        ] {
            if asked.contains(&kind) && !text.is_empty() {
                let mut body = kind.to_be_bytes().to_vec();
                body.extend_from_slice(text.as_bytes());
                self.put_reply(option, reply::INFO, &body)?;
            }
        }
        if asked.contains(&info::BLOCK_SIZE) {
            let mut body = info::BLOCK_SIZE.to_be_bytes().to_vec();
            for bytes in [1, 4096, MAX_PAYLOAD as u32] {
                body.extend_from_slice(&bytes.to_be_bytes());
            }
            self.put_reply(option, reply::INFO, &body)?;
        }
        self.reply(option, reply::ACK, &[])?;
        Ok((option == option::GO).then_some(nth))
    }

    fn meta_context(&mut self, option: u32, data: &[u8]) -> Result<(), NbdError> {
        let set = option == option::SET_META_CONTEXT;
        if set {
            self.selected = None;
        }
        if self.mode == Mode::Simple {
            let text = b"metadata contexts need structured replies";
            return self.reply(option, reply::INVALID, text);
        }
        let Some((name, queries)) = queries(data) else {
            return self.reply(option, reply::INVALID, b"the option does not add up");
        };
        let Some(nth) = self.find(name) else {
            return self.reply(option, reply::UNKNOWN, b"there is no export of this name");
        };
        let all = !set && queries.is_empty();
        let wanted = |context: &Context| {
            all || queries.iter().any(|query| {
                *query == context.name
                    || !set && is_prefix(query) && context.name.starts_with(query)
            })
        };
        let exports = self.exports;
        let found = exports[nth].contexts.iter().enumerate();
        let found: Vec<(usize, &Context)> = found.filter(|(_, context)| wanted(context)).collect();
        for (context, of) in &found {
            let mut body = context_id(*context).to_be_bytes().to_vec();
            body.extend_from_slice(of.name.as_bytes());
            self.put_reply(option, reply::META_CONTEXT, &body)?;
        }
        if set {
            let selected = found.into_iter().map(|(context, _)| context).collect();
            self.selected = Some((nth, selected));
        }
        self.reply(option, reply::ACK, &[])
    }

    fn put_reply(&mut self, option: u32, kind: u32, body: &[u8]) -> Result<(), NbdError> {
        let place = "the reply to an option";
        self.wire.put(&REPLY_MAGIC.to_be_bytes(), place)?;
        self.wire.put(&option.to_be_bytes(), place)?;
        self.wire.put(&kind.to_be_bytes(), place)?;
        self.wire.put(&(body.len() as u32).to_be_bytes(), place)?;
        self.wire.put(body, place)
    }

    fn reply(&mut self, option: u32, kind: u32, body: &[u8]) -> Result<(), NbdError> {
        self.put_reply(option, kind, body)?;
        self.wire.flush("the reply to an option")
    }
}

/// What clients know a context of an export by: its place, counted from 1.
fn context_id(nth: usize) -> u32 {
    nth as u32 + 1
}

/// A query that lists all contexts of a kind.
fn is_prefix(query: &str) -> bool {
    query == "base:" || query == "qemu:" || query == DIRTY_BITMAP
}

/// The data of INFO and GO: a name, and what to tell of that export.
fn asked_infos(data: &[u8]) -> Option<(&str, Vec<u16>)> {
    let mut fields = Fields::new(data);
    let name = fields.name()?;
    let count = fields.u16()?;
    // Each has two bytes in the option, which is short.
    let mut asked = Vec::new();
    for _ in 0..count {
        asked.push(fields.u16()?);
    }
    fields.is_empty().then_some((name, asked))
}

/// The data of LIST_META_CONTEXT and SET_META_CONTEXT: a name, and names of contexts.
fn queries(data: &[u8]) -> Option<(&str, Vec<&str>)> {
    let mut fields = Fields::new(data);
    let name = fields.name()?;
    let count = fields.u32()?;
    // Each has at least four bytes in the option, which is short.
    let mut queries = Vec::new();
    for _ in 0..count {
        queries.push(fields.name()?);
    }
    fields.is_empty().then_some((name, queries))
}
