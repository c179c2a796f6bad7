//! Lines to a trace: header, fields, and the rules that hold between lines.

use std::collections::HashMap;
use std::io::Read;
use std::str::SplitWhitespace;

use super::error::shown;
use super::lines::Lines;
use super::{FileInfo, IologError, Kind, Limits, Op, Skipped, Trace};

/// Reads the header, then every entry.
pub(super) fn parse<R: Read>(mut lines: Lines<R>, limits: Limits) -> Result<Trace, IologError> {
    let mut log = Log::new(header(&mut lines)?, limits);
    while let Some((line, text)) = lines.next()? {
        log.entry(line, text)?;
    }
    log.finish(lines.line())
}

/// The version that the first line names.
fn header<R: Read>(lines: &mut Lines<R>) -> Result<u8, IologError> {
    let text = match lines.next() {
        Ok(Some((_, text))) => text,
        Ok(None) => return Err(IologError::Empty),
        // The line is not text, so this is another kind of file.
        Err(IologError::LineTooLong { .. } | IologError::NotUtf8 { .. }) => {
            return Err(IologError::NotIolog);
        }
        Err(other) => return Err(other),
    };
    let version = text
        .trim_end()
        .strip_prefix("fio version ")
        .and_then(|rest| rest.strip_suffix(" iolog"))
        .ok_or(IologError::NotIolog)?;
    match version {
        "2" => Ok(2),
        "3" => Ok(3),
        other => Err(IologError::UnknownVersion {
            version: shown(other),
        }),
    }
}

/// The action of one line.
#[derive(Clone, Copy)]
enum Action {
    Add,
    Open,
    Close,
    Transfer(Kind),
    Trim,
    Sync,
    Wait,
}

/// The fields of one line, taken from left to right.
struct Fields<'a> {
    line: u64,
    rest: SplitWhitespace<'a>,
}

impl<'a> Fields<'a> {
    fn text(&mut self, field: &'static str) -> Result<&'a str, IologError> {
        let line = self.line;
        self.rest
            .next()
            .ok_or(IologError::MissingField { line, field })
    }

    fn number(&mut self, field: &'static str) -> Result<u64, IologError> {
        let text = self.text(field)?;
        let bad = || IologError::BadNumber {
            line: self.line,
            field,
            text: shown(text),
        };
        // `u64::from_str` would accept a leading plus sign.
        if !text.starts_with(|c: char| c.is_ascii_digit()) {
            return Err(bad());
        }
        text.parse().map_err(|_| bad())
    }

    fn action(&mut self, version: u8) -> Result<Action, IologError> {
        let line = self.line;
        Ok(match self.text("action")? {
            "add" => Action::Add,
            "open" => Action::Open,
            "close" => Action::Close,
            "read" => Action::Transfer(Kind::Read),
            "write" => Action::Transfer(Kind::Write),
            "trim" => Action::Trim,
            "sync" | "datasync" => Action::Sync,
            "wait" if version == 2 => Action::Wait,
            "wait" => return Err(IologError::WaitInVersion3 { line }),
            other => {
                let action = shown(other);
                return Err(IologError::UnknownAction { line, action });
            }
        })
    }

    fn end(mut self) -> Result<(), IologError> {
        match self.rest.next() {
            None => Ok(()),
            Some(field) => Err(IologError::ExtraField {
                line: self.line,
                field: shown(field),
            }),
        }
    }
}

/// A trace that is being read.
struct Log {
    limits: Limits,
    /// Every name that was added or opened. It has an index after its first read or write.
    names: HashMap<String, Option<u32>>,
    /// The time of the line, in the log's own count.
    now_us: u64,
    /// The time of the first operation.
    first_us: Option<u64>,
    trace: Trace,
}

impl Log {
    fn new(version: u8, limits: Limits) -> Self {
        Log {
            limits,
            names: HashMap::new(),
            now_us: 0,
            first_us: None,
            trace: Trace {
                version,
                files: Vec::new(),
                ops: Vec::new(),
                writes: 0,
                bytes_written: 0,
                duration_us: 0,
                skipped: Skipped::default(),
            },
        }
    }

    fn entry(&mut self, line: u64, text: &str) -> Result<(), IologError> {
        if text.trim_ascii().is_empty() {
            return Ok(());
        }
        let mut fields = Fields {
            line,
            rest: text.split_whitespace(),
        };
        if self.trace.version == 3 {
            let time = fields.number("time")?;
            if time < self.now_us {
                self.trace.skipped.clamped_times += 1;
            }
            self.now_us = self.now_us.max(time);
        }
        let name = fields.text("file name")?;
        match fields.action(self.trace.version)? {
            Action::Add | Action::Open => {
                fields.end()?;
                self.add(line, name)
            }
            Action::Close => {
                fields.end()?;
                self.known(line, name, "closed").map(|_| ())
            }
            Action::Wait => {
                let (wait_us, _) = (fields.number("wait")?, fields.number("length")?);
                fields.end()?;
                let later = self.now_us.checked_add(wait_us);
                self.now_us = later.ok_or(IologError::TimeOverflows { line, wait_us })?;
                Ok(())
            }
            Action::Sync => {
                let (_, _) = (fields.number("offset")?, fields.number("length")?);
                fields.end()?;
                self.known(line, name, "synced")?;
                self.trace.skipped.syncs += 1;
                Ok(())
            }
            Action::Trim => {
                extent(fields)?;
                self.known(line, name, "trimmed")?;
                self.trace.skipped.trims += 1;
                Ok(())
            }
            Action::Transfer(kind) => {
                let (offset, length) = extent(fields)?;
                self.transfer(line, name, kind, offset, length)
            }
        }
    }

    /// Adds `name`, if it is new.
    fn add(&mut self, line: u64, name: &str) -> Result<(), IologError> {
        if self.names.contains_key(name) {
            return Ok(());
        }
        let limit = self.limits.files;
        if self.names.len() >= limit {
            return Err(IologError::TooManyFiles { line, limit });
        }
        self.names.insert(name.to_owned(), None);
        Ok(())
    }

    /// The place of a known name's index.
    fn known(
        &mut self,
        line: u64,
        name: &str,
        verb: &'static str,
    ) -> Result<&mut Option<u32>, IologError> {
        self.names
            .get_mut(name)
            .ok_or_else(|| IologError::NotAdded {
                line,
                file: shown(name),
                verb,
            })
    }

    fn transfer(
        &mut self,
        line: u64,
        name: &str,
        kind: Kind,
        offset: u64,
        length: u64,
    ) -> Result<(), IologError> {
        let limit = self.limits.ops;
        if self.trace.ops.len() >= limit {
            return Err(IologError::TooManyOps { line, limit });
        }
        let next = self.trace.files.len();
        let index = self.known(
            line,
            name,
            if kind == Kind::Read {
                "read"
            } else {
                "written"
            },
        )?;
        let file = match *index {
            Some(file) => file,
            None => {
                let file = u32::try_from(next).map_err(|_| IologError::TooManyFiles {
                    line,
                    limit: u32::MAX as usize,
                })?;
                *index = Some(file);
                self.trace.files.push(FileInfo {
                    name: name.to_owned(),
                    bytes: 0,
                });
                file
            }
        };
        let info = &mut self.trace.files[file as usize];
        info.bytes = info.bytes.max(offset + length);
        let at_us = self.now_us - *self.first_us.get_or_insert(self.now_us);
        self.trace.duration_us = at_us;
        if kind == Kind::Write {
            self.trace.writes += 1;
            self.trace.bytes_written += u128::from(length);
        }
        self.trace.ops.push(Op {
            at_us,
            file,
            kind,
            offset,
            length,
        });
        Ok(())
    }

    fn finish(mut self, line: u64) -> Result<Trace, IologError> {
        if self.trace.writes == 0 {
            return Err(IologError::NoWrites { line });
        }
        self.trace.skipped.unused_files =
            self.names.values().filter(|index| index.is_none()).count() as u64;
        Ok(self.trace)
    }
}

/// The last two fields: an offset and a length of at least one byte whose sum fits 64 bits.
fn extent(mut fields: Fields<'_>) -> Result<(u64, u64), IologError> {
    let line = fields.line;
    let offset = fields.number("offset")?;
    let length = fields.number("length")?;
    fields.end()?;
    if length == 0 {
        return Err(IologError::ZeroLength { line });
    }
    if offset.checked_add(length).is_none() {
        return Err(IologError::OffsetOverflows {
            line,
            offset,
            length,
        });
    }
    Ok((offset, length))
}
