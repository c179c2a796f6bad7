//! The errors of a log. Each text starts with the line, counted from 1, and names the value.

use std::io;

use super::MAX_LINE;

/// The error with which a log is refused. `line` counts from 1, including the header.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum IologError {
    /// The file cannot be opened.
    #[error("cannot open it: {source}")]
    Open {
        /// The error of the system.
        source: io::Error,
    },
    /// The file is empty.
    #[error("line 1: the file is empty")]
    Empty,
    /// The first line is not the header of an iolog.
    #[error(
        "line 1: not a fio iolog: the first line must be \"fio version 2 iolog\" or \
         \"fio version 3 iolog\""
    )]
    NotIolog,
    /// A header of another version.
    #[error("line 1: fio iolog version {version:?} is unknown: 2 and 3 are known")]
    UnknownVersion {
        /// The text in the place of the version.
        version: String,
    },
    /// The line ends too early.
    #[error("line {line}: the {field} is missing")]
    MissingField {
        /// The line of the fault.
        line: u64,
        /// The first field that is missing.
        field: &'static str,
    },
    /// The line goes on after its last field.
    #[error("line {line}: {field:?} follows the last field: names must not contain white space")]
    ExtraField {
        /// The line of the fault.
        line: u64,
        /// The first superfluous field.
        field: String,
    },
    /// A field that is not a decimal number from 0 to 2^64 - 1.
    #[error(
        "line {line}: the {field} {text:?} is not a whole number from 0 to 18446744073709551615"
    )]
    BadNumber {
        /// The line of the fault.
        line: u64,
        /// Which field.
        field: &'static str,
        /// The text of the field.
        text: String,
    },
    /// An action that the format does not have.
    #[error(
        "line {line}: the action {action:?} is unknown: it must be \
         add, open, close, read, write, trim, sync, datasync or (version 2) wait"
    )]
    UnknownAction {
        /// The line of the fault.
        line: u64,
        /// The text of the field.
        action: String,
    },
    /// Version 3 has times instead of waits.
    #[error("line {line}: \"wait\" is not allowed in version 3, where each line carries its time")]
    WaitInVersion3 {
        /// The line of the fault.
        line: u64,
    },
    /// A file was used that no `add` or `open` named.
    #[error("line {line}: file {file:?} is {verb} before it is added")]
    NotAdded {
        /// The line of the fault.
        line: u64,
        /// The name of the file.
        file: String,
        /// The use of the file.
        verb: &'static str,
    },
    /// A read, write or trim of no bytes.
    #[error("line {line}: a length of 0 bytes: it must be 1 or more")]
    ZeroLength {
        /// The line of the fault.
        line: u64,
    },
    /// The end of the operation does not fit 64 bits.
    #[error("line {line}: offset {offset} plus length {length} exceeds 18446744073709551615")]
    OffsetOverflows {
        /// The line of the fault.
        line: u64,
        /// The offset in bytes.
        offset: u64,
        /// The length in bytes.
        length: u64,
    },
    /// The waits add up to more than 64 bits hold.
    #[error("line {line}: with this wait of {wait_us} us the times exceed 18446744073709551615 us")]
    TimeOverflows {
        /// The line of the fault.
        line: u64,
        /// The wait that exceeds it.
        wait_us: u64,
    },
    /// More reads and writes than allowed.
    #[error("line {line}: more than {limit} reads and writes")]
    TooManyOps {
        /// The line of the fault.
        line: u64,
        /// The greatest allowed number.
        limit: usize,
    },
    /// More files than allowed.
    #[error("line {line}: more than {limit} files")]
    TooManyFiles {
        /// The line of the fault.
        line: u64,
        /// The greatest allowed number.
        limit: usize,
    },
    /// A line that does not end.
    #[error("line {line}: longer than {MAX_LINE} bytes")]
    LineTooLong {
        /// The line of the fault.
        line: u64,
    },
    /// A line that is not text.
    #[error("line {line}: not valid UTF-8")]
    NotUtf8 {
        /// The line of the fault.
        line: u64,
    },
    /// The compressed file ends before its end mark.
    #[error("line {line}: the gzip file is cut off here")]
    Truncated {
        /// The line that could not be completed.
        line: u64,
    },
    /// The compressed file is damaged.
    #[error("line {line}: the gzip file is damaged at or after this line: {source}")]
    Corrupt {
        /// The line that could not be completed.
        line: u64,
        /// The error of the decompressor.
        source: io::Error,
    },
    /// The input could not be read.
    #[error("line {line}: cannot read on: {source}")]
    Io {
        /// The line that could not be completed.
        line: u64,
        /// The error of the system.
        source: io::Error,
    },
    /// Nothing to replay.
    #[error("line {line}: the log ends here without a single write")]
    NoWrites {
        /// The last line.
        line: u64,
    },
}

/// The start of `text`, short enough for a message.
pub(super) fn shown(text: &str) -> String {
    const CHARS: usize = 80;
    match text.char_indices().nth(CHARS) {
        Some((at, _)) => format!("{}...", &text[..at]),
        None => text.to_owned(),
    }
}
