//! The recorded sequences: one JSON object a line, plain or gzip. The format is in
//! `testdata/README.md`.
//!
//! For any file, parsing returns lines that a replay can trust, or an error with the number of a
//! line: runs do not wrap, and no line needs more memory than a limit.

use std::io::{self, BufRead, BufReader, Cursor, Read};

use flate2::read::MultiGzDecoder;
use serde::Deserialize;

/// The longest line, in bytes.
const MAX_LINE: u64 = 64 << 20;
/// The most runs of pages around one bitmap.
const MAX_RUNS: usize = 4096;
/// The most pages around one bitmap that can be read: 256 MiB.
const MAX_PAGES: u64 = 65536;
/// The most domains of one sequence.
const MAX_HWPTS: usize = 64;
/// The pages of a caller's buffer.
pub(crate) const HOST_PAGE: u64 = 4096;
/// The smallest page of the recorded domains.
pub(crate) const GRANULE: u64 = 2048;
/// An address is mapped to itself modulo this number. So leaves up to this size stay aligned, and
/// the memory is small.
pub(crate) const BACKING: u64 = 4 << 30;
/// The longest area, in bytes.
const MAX_AREA: u64 = 8 << 30;
/// The most usable ranges of one sequence.
const MAX_USABLE: usize = 1024;

/// The error of a file that cannot be replayed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ParseError {
    /// The file cannot be read or is not whole.
    #[error("line {line}: {source}")]
    Io {
        /// The line that could not be read.
        line: u64,
        /// The error of the system or the decompressor.
        source: io::Error,
    },
    /// The line is longer than any recorder writes.
    #[error("line {line}: longer than {MAX_LINE} bytes")]
    TooLong {
        /// The offending line.
        line: u64,
    },
    /// The line is not one of the objects that the format has.
    #[error("line {line}: {source}")]
    Json {
        /// The offending line.
        line: u64,
        /// The error of the JSON parser.
        source: serde_json::Error,
    },
    /// A value is out of range.
    #[error("line {line}: {what} is {value}, {limit}")]
    Value {
        /// The offending line.
        line: u64,
        /// The name of the value.
        what: &'static str,
        /// The value.
        value: String,
        /// The values that are allowed.
        limit: &'static str,
    },
    /// A line of the wrong kind at its place.
    #[error("line {line}: {found} where {expected} is expected")]
    Order {
        /// The offending line.
        line: u64,
        /// The kind of the line.
        found: &'static str,
        /// The kind that belongs there.
        expected: &'static str,
    },
    /// The file ends early.
    #[error("line {line}: the file ends without an `end` line: it is truncated")]
    Truncated {
        /// The line that is missing.
        line: u64,
    },
}

#[derive(Deserialize)]
#[serde(tag = "t", rename_all = "lowercase")]
enum Line {
    Meta { format: u64 },
    Seq(Sequence),
    Op(Op),
    End {},
}

/// The address space at the start of a sequence.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct Sequence {
    /// Its number.
    pub(crate) seq: u64,
    /// Its name in the file.
    pub(crate) name: String,
    granule: u64,
    /// The alignment that ranges must have.
    pub(crate) iova_alignment: u64,
    /// The addresses that may be mapped, first and last.
    pub(crate) iova_ranges: Vec<(u64, u64)>,
    /// The domains.
    pub(crate) hwpts: Vec<HwptShape>,
}

/// One domain.
#[derive(Clone, Copy, Debug, Deserialize)]
pub(crate) struct HwptShape {
    /// Whether it can track.
    pub(crate) alloc_dirty_tracking: bool,
}

/// An operation and the kernel's answer.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct Op {
    /// Its place in the sequence.
    pub(crate) i: u64,
    /// The kernel's answer.
    pub(crate) errno: i32,
    /// The dirty ranges afterwards: first address and length.
    #[serde(default)]
    pub(crate) after: Option<Vec<(u64, u64)>>,
    /// The kind of the operation, and its arguments.
    #[serde(flatten)]
    pub(crate) kind: Kind,
}

/// The kinds of operations.
#[derive(Clone, Debug, Deserialize)]
#[serde(tag = "op", rename_all = "lowercase")]
pub(crate) enum Kind {
    /// Maps a range.
    Map(Map),
    /// Unmaps the areas of a range.
    Unmap {
        /// First address.
        iova: u64,
        /// Bytes.
        length: u64,
        /// The number of bytes that were unmapped.
        #[serde(default)]
        unmapped: Option<u64>,
    },
    /// Switches tracking.
    Track {
        /// The domain; -1 is one that does not exist.
        hwpt: i64,
        /// 1 on, 0 off.
        flags: u64,
    },
    /// A device writes.
    Dirty {
        /// Which domain.
        hwpt: i64,
        /// First addresses and counts of granules.
        granules: Vec<(u64, u64)>,
    },
    /// Reads the dirty state.
    Get(Get),
    /// Probes the size of a structure that does not exist here.
    Size {},
}

/// See [`Kind::Map`].
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct Map {
    /// First address.
    pub(crate) iova: u64,
    /// Bytes.
    pub(crate) length: u64,
    /// The offset of the memory in a page of the caller.
    #[serde(default)]
    pub(crate) va_off: u64,
    /// Whether devices may write.
    pub(crate) writeable: bool,
    /// The leaves that each domain got.
    #[serde(default)]
    pub(crate) layout: Vec<Layout>,
}

/// The leaves of one domain.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct Layout {
    /// Which domain.
    pub(crate) hwpt: i64,
    /// First address, leaf size and count.
    #[serde(default)]
    pub(crate) ptes: Vec<(u64, u64, u64)>,
}

/// See [`Kind::Get`].
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct Get {
    /// Which domain.
    pub(crate) hwpt: i64,
    /// First address.
    pub(crate) iova: u64,
    /// Bytes.
    pub(crate) length: u64,
    /// Bytes of one bit.
    pub(crate) page_size: u64,
    /// 1: change nothing.
    pub(crate) flags: u64,
    /// Must be 0.
    pub(crate) reserved: u64,
    /// The bitmap. `None` is a NULL pointer.
    pub(crate) buf: Option<Buffer>,
    /// Runs of bits that changed from 0 to 1: the first bit, relative to the pointer, and the
    /// number.
    pub(crate) new: Vec<(i64, u64)>,
    /// Runs of bits that changed from 1 to 0, in the same form.
    #[serde(default)]
    pub(crate) lost: Vec<(i64, u64)>,
    /// The classes of the answer.
    pub(crate) tags: Vec<String>,
}

/// The memory around a bitmap.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct Buffer {
    /// The offset of the bitmap in page 0.
    pub(crate) off: u64,
    /// The value of every byte before the call.
    pub(crate) fill: u8,
    /// Runs of pages: the first one, relative to page 0, the number, and their rights.
    pub(crate) pages: Vec<(i64, u64, Rights)>,
}

/// The caller's rights to its own pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Rights {
    /// Read and write.
    Rw,
    /// Read.
    Ro,
    /// Nothing.
    None,
}

/// The items of a file, line by line.
pub(crate) enum Item {
    /// A sequence begins.
    Sequence(Sequence),
    /// An operation of the sequence that began last.
    Op(Op),
}

/// Passes all items of a file to `each`, with their lines. Ends at the first error.
///
/// # Errors
/// [`ParseError`], at the first line that is wrong.
pub(crate) fn parse(input: impl Read, mut each: impl FnMut(u64, Item)) -> Result<(), ParseError> {
    let mut lines = Lines::new(input)?;
    match lines.next()? {
        Some((_, Line::Meta { format: 1 })) => (),
        Some((line, Line::Meta { format })) => {
            return Err(value(line, "format", format, "only 1 is known"));
        }
        Some((line, other)) => return Err(order(line, &other, "`meta`")),
        None => return Err(ParseError::Truncated { line: 1 }),
    }
    let mut hwpts = None;
    while let Some((line, item)) = lines.next()? {
        match item {
            Line::Seq(sequence) => {
                check_sequence(line, &sequence)?;
                hwpts = Some(sequence.hwpts.len());
                each(line, Item::Sequence(sequence));
            }
            Line::Op(op) => {
                let Some(hwpts) = hwpts else {
                    return Err(order(line, &Line::Op(op), "`seq`"));
                };
                check_op(line, &op, hwpts)?;
                each(line, Item::Op(op));
            }
            Line::End {} => {
                return match lines.next()? {
                    None => Ok(()),
                    Some((line, other)) => Err(order(line, &other, "the end of the file")),
                };
            }
            meta => return Err(order(line, &meta, "`seq`, `op` or `end`")),
        }
    }
    Err(ParseError::Truncated {
        line: lines.line + 1,
    })
}

fn value(line: u64, what: &'static str, value: impl ToString, limit: &'static str) -> ParseError {
    ParseError::Value {
        line,
        what,
        value: value.to_string(),
        limit,
    }
}

fn order(line: u64, found: &Line, expected: &'static str) -> ParseError {
    ParseError::Order {
        line,
        found: match found {
            Line::Meta { .. } => "`meta`",
            Line::Seq(_) => "`seq`",
            Line::Op(_) => "`op`",
            Line::End {} => "`end`",
        },
        expected,
    }
}

fn check_sequence(line: u64, sequence: &Sequence) -> Result<(), ParseError> {
    if sequence.granule != GRANULE {
        return Err(value(
            line,
            "granule",
            sequence.granule,
            "only 2048 is known",
        ));
    }
    let alignment = sequence.iova_alignment;
    if !alignment.is_power_of_two() || !(GRANULE..=1 << 30).contains(&alignment) {
        let limit = "a power of two from 2048 to 2^30 is known";
        return Err(value(line, "iova_alignment", alignment, limit));
    }
    if sequence.hwpts.is_empty() || sequence.hwpts.len() > MAX_HWPTS {
        let limit = "1 to 64 are known";
        return Err(value(
            line,
            "the number of hwpts",
            sequence.hwpts.len(),
            limit,
        ));
    }
    if sequence.iova_ranges.len() > MAX_USABLE {
        let (ranges, limit) = (sequence.iova_ranges.len(), "at most 1024 are known");
        return Err(value(line, "the number of iova_ranges", ranges, limit));
    }
    let mut from = Some(0);
    for (first, last) in &sequence.iova_ranges {
        if first > last || from.is_none_or(|from| *first < from) {
            let limit = "ranges must ascend and be disjoint";
            return Err(value(
                line,
                "iova_ranges",
                format!("[{first},{last}]"),
                limit,
            ));
        }
        from = last.checked_add(1);
    }
    Ok(())
}

fn check_op(line: u64, op: &Op, hwpts: usize) -> Result<(), ParseError> {
    for (start, len) in op.after.iter().flatten() {
        check_run(line, "after", *start, *len, 1)?;
    }
    match &op.kind {
        Kind::Map(map) => {
            if op.errno == 0 && map.length > MAX_AREA {
                let limit = "at most 8 GiB in one area are known";
                return Err(value(line, "length", map.length, limit));
            }
            check_map(line, map, hwpts)
        }
        Kind::Dirty { granules, .. } => granules
            .iter()
            .try_for_each(|(start, count)| check_run(line, "granules", *start, *count, GRANULE)),
        Kind::Get(get) => check_get(line, get),
        Kind::Unmap { .. } | Kind::Track { .. } | Kind::Size {} => Ok(()),
    }
}

/// `count` units from `start` on must not be empty and must not wrap.
fn check_run(
    line: u64,
    what: &'static str,
    start: u64,
    count: u64,
    unit: u64,
) -> Result<(), ParseError> {
    let len = count.checked_mul(unit).filter(|len| *len > 0);
    match len.and_then(|len| start.checked_add(len - 1)) {
        Some(_) if start.is_multiple_of(GRANULE) => Ok(()),
        _ => {
            let limit = "a run starts at a multiple of 2048, is not empty, and ends below 2^64";
            Err(value(line, what, format!("[{start},{count}]"), limit))
        }
    }
}

fn check_map(line: u64, map: &Map, hwpts: usize) -> Result<(), ParseError> {
    for layout in &map.layout {
        if usize::try_from(layout.hwpt).is_ok_and(|hwpt| hwpt < hwpts) {
            let mut next = map.iova;
            for (start, size, count) in &layout.ptes {
                check_run(line, "ptes", *start, *count, *size)?;
                let aligned = size.is_power_of_two() && start.is_multiple_of(*size);
                if !aligned || !(GRANULE..=BACKING).contains(size) || *start != next {
                    let limit = "leaves are aligned powers of two, 2 KiB to 4 GiB, without gaps";
                    return Err(value(
                        line,
                        "ptes",
                        format!("[{start},{size},{count}]"),
                        limit,
                    ));
                }
                next = start.wrapping_add(count * size);
            }
            if !layout.ptes.is_empty() && next.wrapping_sub(map.iova) != map.length {
                let limit = "they cover the length";
                return Err(value(
                    line,
                    "the length of ptes",
                    next.wrapping_sub(map.iova),
                    limit,
                ));
            }
        } else {
            return Err(value(
                line,
                "hwpt of a layout",
                layout.hwpt,
                "the sequence has fewer",
            ));
        }
    }
    Ok(())
}

fn check_get(line: u64, get: &Get) -> Result<(), ParseError> {
    let Some(buffer) = &get.buf else {
        return Ok(());
    };
    if buffer.off >= HOST_PAGE {
        return Err(value(line, "off", buffer.off, "below 4096 is known"));
    }
    if buffer.pages.len() > MAX_RUNS {
        let (runs, limit) = (buffer.pages.len(), "at most 4096 are known");
        return Err(value(line, "the number of pages", runs, limit));
    }
    let mut pages = 0u64;
    for (first, count, rights) in &buffer.pages {
        if *rights != Rights::None {
            pages = pages.saturating_add(*count);
        }
        if pages > MAX_PAGES || first.checked_add_unsigned(*count).is_none() {
            let limit = "at most 65536 pages are known";
            return Err(value(line, "pages", format!("[{first},{count}]"), limit));
        }
    }
    Ok(())
}

/// Bytes to lines.
struct Lines<'a> {
    text: Box<dyn BufRead + 'a>,
    buffer: Vec<u8>,
    /// The number of lines that were read.
    line: u64,
}

impl<'a> Lines<'a> {
    /// Looks at the first two bytes of `input` to see whether it is compressed.
    fn new(mut input: impl Read + 'a) -> Result<Self, ParseError> {
        let mut head = Vec::new();
        input
            .by_ref()
            .take(2)
            .read_to_end(&mut head)
            .map_err(|source| ParseError::Io { line: 1, source })?;
        let gzip = head == [0x1f, 0x8b];
        let whole = Cursor::new(head).chain(input);
        Ok(Lines {
            text: if gzip {
                Box::new(BufReader::new(MultiGzDecoder::new(whole)))
            } else {
                Box::new(BufReader::new(whole))
            },
            buffer: Vec::new(),
            line: 0,
        })
    }

    /// The next line and its number; `None` at the end.
    fn next(&mut self) -> Result<Option<(u64, Line)>, ParseError> {
        let line = self.line + 1;
        self.buffer.clear();
        (&mut self.text)
            .take(MAX_LINE + 1)
            .read_until(b'\n', &mut self.buffer)
            .map_err(|source| ParseError::Io { line, source })?;
        if self.buffer.is_empty() {
            return Ok(None);
        }
        if self.buffer.len() as u64 > MAX_LINE {
            return Err(ParseError::TooLong { line });
        }
        self.line = line;
        serde_json::from_slice(&self.buffer)
            .map(|parsed| Some((line, parsed)))
            .map_err(|source| ParseError::Json { line, source })
    }
}
