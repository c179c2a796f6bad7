//! fio's iolog, the text format in which `fio --write_iolog` records what a job read and wrote.
//!
//! ```text
//! fio version 3 iolog                      fio version 2 iolog
//! TIME FILE add|open|close                 FILE add|open|close
//! TIME FILE ACTION OFFSET LENGTH           FILE ACTION OFFSET LENGTH
//! ```
//!
//! `TIME` is in microseconds from the start of the recording. `ACTION` is `read`, `write`, `trim`,
//! `sync` or `datasync`; version 2, which has no times, has `wait` as well: a pause of `OFFSET`
//! microseconds. Fields are separated by white space and are never quoted, so a file name has no
//! white space. Empty lines are ignored.
//!
//! ```text
//! bytes --> gunzip if they start with 1f 8b --> lines (bounded) --> fields --> Trace
//! ```
//!
//! Input is not trusted: a line longer than [`MAX_LINE`], more entries than [`Limits`] allow, or a
//! number that does not fit is an error with the number of its line. Memory grows with the bytes
//! that were read, independent of the values of fields.
//!
//! ```
//! use dirtymap_examples::iolog::{Kind, Trace};
//!
//! let log = "fio version 3 iolog\n0 disk add\n0 disk open\n40 disk write 4096 512\n";
//! let trace = Trace::read(log.as_bytes())?;
//! assert_eq!(trace.files[0].bytes, 4608);
//! assert_eq!((trace.ops[0].kind, trace.ops[0].offset), (Kind::Write, 4096));
//! # Ok::<(), dirtymap_examples::iolog::IologError>(())
//! ```

mod error;
mod lines;
mod parse;
#[cfg(test)]
mod tests;

use std::fs::File;
use std::io::{BufReader, Read};
use std::path::Path;

pub use error::IologError;

/// The longest line in bytes, its line feed not counted. fio itself reads lines of up to 4095
/// bytes.
pub const MAX_LINE: usize = 4096;

/// A recorded trace, ready for replay.
///
/// It holds at least one write. Files and operations refer to each other by index, and no operation
/// reaches past the size of its file in [`Trace::files`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trace {
    /// The version of the format: 2 or 3.
    pub version: u8,
    /// Every file that was read or written, in the order of first use.
    pub files: Vec<FileInfo>,
    /// Reads and writes in the order of the log; [`Op::at_us`] never decreases.
    pub ops: Vec<Op>,
    /// How many of the operations are writes, 1 or more.
    pub writes: u64,
    /// The bytes of all writes together. Several writes to the same place count several times.
    pub bytes_written: u128,
    /// Microseconds from the first to the last operation.
    pub duration_us: u64,
    /// The entries of the log that a replay leaves out.
    pub skipped: Skipped,
}

/// A file of the trace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileInfo {
    /// Its name in the log.
    pub name: String,
    /// Its size according to the log: the highest offset plus length, 1 or more.
    pub bytes: u64,
}

/// One read or write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Op {
    /// The time of its issue, in microseconds after the first operation.
    pub at_us: u64,
    /// Index into [`Trace::files`].
    pub file: u32,
    /// Read or write.
    pub kind: Kind,
    /// The first byte in the file.
    pub offset: u64,
    /// The number of bytes, 1 or more. `offset + length` fits in 64 bits.
    pub length: u64,
}

/// The kind of an [`Op`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// It reads the file.
    Read,
    /// It writes the file.
    Write,
}

/// Entries that do not become an [`Op`], and times that were corrected.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Skipped {
    /// `trim` entries.
    pub trims: u64,
    /// `sync` and `datasync` entries.
    pub syncs: u64,
    /// Files that were added or opened, but neither read nor written.
    pub unused_files: u64,
    /// Times that were before that of an earlier line, and were raised to it. Logs of several
    /// threads have such lines.
    pub clamped_times: u64,
}

/// The limits of a log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Reads and writes. Each takes 32 bytes of memory.
    pub ops: usize,
    /// Different files. Each takes its name twice, so up to 8 KiB of memory.
    pub files: usize,
}

impl Default for Limits {
    /// 50 million operations and 65,536 files.
    fn default() -> Self {
        Limits {
            ops: 50_000_000,
            files: 1 << 16,
        }
    }
}

impl Trace {
    /// Reads the log in the file at `path`, plain or gzip, within the default [`Limits`].
    ///
    /// # Errors
    /// [`IologError::Open`] if the file cannot be opened, and those of [`Trace::read_within`].
    pub fn open(path: &Path) -> Result<Trace, IologError> {
        let file = File::open(path).map_err(|source| IologError::Open { source })?;
        Trace::read(BufReader::new(file))
    }

    /// Reads a log, plain or gzip, within the default [`Limits`].
    ///
    /// # Errors
    /// Those of [`Trace::read_within`].
    pub fn read(input: impl Read) -> Result<Trace, IologError> {
        Trace::read_within(input, Limits::default())
    }

    /// Reads a log, plain or gzip. The first two bytes tell which, and the file name is ignored.
    ///
    /// # Errors
    /// The first fault, in the order of lines, and within a line from left to right. Then
    /// [`IologError::NoWrites`].
    pub fn read_within(input: impl Read, limits: Limits) -> Result<Trace, IologError> {
        parse::parse(lines::Lines::new(input)?, limits)
    }

    /// Gives the operations new times, `interval_us` microseconds apart. This is for a log without
    /// times, all of whose operations would otherwise be due at once.
    pub fn space_evenly(&mut self, interval_us: u64) {
        for (index, op) in self.ops.iter_mut().enumerate() {
            op.at_us = (index as u64).saturating_mul(interval_us);
        }
        self.duration_us = self.ops.last().map_or(0, |op| op.at_us);
    }
}
