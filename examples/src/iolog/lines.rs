//! Bytes to lines: gunzip where needed, bounded lines, and the number of the line that an error
//! belongs to.

use std::io::{self, BufRead, BufReader, Cursor, Read};

use flate2::read::MultiGzDecoder;

use super::{IologError, MAX_LINE};

/// The first bytes of every gzip member.
const GZIP_MAGIC: [u8; 2] = [0x1f, 0x8b];

/// The first two bytes, which were read already, then the rest.
type Whole<R> = io::Chain<Cursor<Vec<u8>>, R>;

/// The source of the text.
enum Source<R: Read> {
    Plain(BufReader<Whole<R>>),
    Gzip(Box<BufReader<MultiGzDecoder<Whole<R>>>>),
}

/// The lines of a log, one at a time in one buffer.
pub(super) struct Lines<R: Read> {
    source: Source<R>,
    buffer: Vec<u8>,
    /// The number of the line in the buffer; 0 before the first.
    line: u64,
}

impl<R: Read> Lines<R> {
    /// Looks at the first two bytes of `input` to see whether it is compressed.
    pub(super) fn new(mut input: R) -> Result<Self, IologError> {
        let mut head = Vec::with_capacity(GZIP_MAGIC.len());
        (&mut input)
            .take(GZIP_MAGIC.len() as u64)
            .read_to_end(&mut head)
            .map_err(|source| IologError::Io { line: 1, source })?;
        let gzip = head == GZIP_MAGIC;
        let whole = Cursor::new(head).chain(input);
        let source = if gzip {
            Source::Gzip(Box::new(BufReader::new(MultiGzDecoder::new(whole))))
        } else {
            Source::Plain(BufReader::new(whole))
        };
        Ok(Lines {
            source,
            buffer: Vec::new(),
            line: 0,
        })
    }

    /// The next line without its line feed, and its number; `None` at the end.
    pub(super) fn next(&mut self) -> Result<Option<(u64, &str)>, IologError> {
        let line = self.line + 1;
        self.buffer.clear();
        let read = match &mut self.source {
            Source::Plain(text) => read_bounded(text, &mut self.buffer),
            Source::Gzip(text) => read_bounded(text, &mut self.buffer),
        };
        read.map_err(|source| self.explain(line, source))?;
        if self.buffer.is_empty() {
            return Ok(None);
        }
        self.line = line;
        if self.buffer.last() == Some(&b'\n') {
            self.buffer.pop();
        } else if self.buffer.len() > MAX_LINE {
            return Err(IologError::LineTooLong { line });
        }
        match str::from_utf8(&self.buffer) {
            Ok(text) => Ok(Some((line, text))),
            Err(_) => Err(IologError::NotUtf8 { line }),
        }
    }

    /// The number of the last line that was read, 0 before the first.
    pub(super) fn line(&self) -> u64 {
        self.line
    }

    fn explain(&self, line: u64, source: io::Error) -> IologError {
        match (&self.source, source.kind()) {
            (Source::Gzip(_), io::ErrorKind::UnexpectedEof) => IologError::Truncated { line },
            (Source::Gzip(_), io::ErrorKind::InvalidInput | io::ErrorKind::InvalidData) => {
                IologError::Corrupt { line, source }
            }
            _ => IologError::Io { line, source },
        }
    }
}

/// Reads to the next line feed, but no more than one byte past the longest line.
fn read_bounded(text: &mut impl BufRead, line: &mut Vec<u8>) -> io::Result<usize> {
    text.take(MAX_LINE as u64 + 1).read_until(b'\n', line)
}
