//! What a batch of the log consists of. docs/store-format.md has the bytes.

use crate::codec::{Bad, Reader, put, put_bytes};
use crate::words::MAX_EXTENTS;

/// The longest name of a consumer in bytes.
pub(crate) const MAX_NAME: usize = 255;

/// A step of the store, in the order in which the steps happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Record {
    /// `count` extents from `first` on are open: they may be written from now on.
    Open {
        first: u64,
        count: u64,
    },
    /// The extent is closed, and these pages of it are dirty for each consumer.
    Close {
        extent: u64,
        mask: u32,
    },
    /// These pages of an open extent are dirty for each consumer.
    Dirty {
        extent: u64,
        mask: u32,
    },
    /// A consumer joins. It needs everything.
    Join {
        id: u32,
        name: String,
    },
    Leave {
        id: u32,
    },
    Rename {
        id: u32,
        name: String,
    },
    /// What is dirty for the consumer becomes its increment `epoch`. With `whole`, the increment is
    /// everything.
    Harvest {
        id: u32,
        epoch: u64,
        whole: bool,
    },
    /// The increment is copied.
    Commit {
        id: u32,
        epoch: u64,
    },
    /// The increment is dirty again.
    Abort {
        id: u32,
        epoch: u64,
    },
    /// The device has this length now. The new part is dirty for each consumer.
    Grow {
        len: u64,
    },
}

const OPEN: u8 = 1;
const CLOSE: u8 = 2;
const DIRTY: u8 = 3;
const JOIN: u8 = 4;
const LEAVE: u8 = 5;
const RENAME: u8 = 6;
const HARVEST: u8 = 7;
const COMMIT: u8 = 8;
const ABORT: u8 = 9;
const GROW: u8 = 10;

impl Record {
    pub(crate) fn put(&self, out: &mut Vec<u8>) {
        let mut numbers = |kind: u8, numbers: &[u64]| {
            out.push(kind);
            numbers.iter().for_each(|number| put(out, *number));
        };
        match self {
            Record::Open { first, count } => numbers(OPEN, &[*first, *count]),
            Record::Close { extent, mask } => numbers(CLOSE, &[*extent, u64::from(*mask)]),
            Record::Dirty { extent, mask } => numbers(DIRTY, &[*extent, u64::from(*mask)]),
            Record::Join { id, name } => {
                numbers(JOIN, &[u64::from(*id)]);
                put_bytes(out, name.as_bytes());
            }
            Record::Leave { id } => numbers(LEAVE, &[u64::from(*id)]),
            Record::Rename { id, name } => {
                numbers(RENAME, &[u64::from(*id)]);
                put_bytes(out, name.as_bytes());
            }
            Record::Harvest { id, epoch, whole } => {
                numbers(HARVEST, &[u64::from(*id), *epoch, u64::from(*whole)]);
            }
            Record::Commit { id, epoch } => numbers(COMMIT, &[u64::from(*id), *epoch]),
            Record::Abort { id, epoch } => numbers(ABORT, &[u64::from(*id), *epoch]),
            Record::Grow { len } => numbers(GROW, &[*len]),
        }
    }

    pub(crate) fn read(from: &mut Reader<'_>) -> Result<Record, Bad> {
        Ok(match from.byte()? {
            OPEN => Record::Open {
                first: extent(from)?,
                count: from.at_most(MAX_EXTENTS, "there are fewer extents")?,
            },
            CLOSE => Record::Close {
                extent: extent(from)?,
                mask: mask(from)?,
            },
            DIRTY => Record::Dirty {
                extent: extent(from)?,
                mask: mask(from)?,
            },
            JOIN => Record::Join {
                id: id(from)?,
                name: name(from)?,
            },
            LEAVE => Record::Leave { id: id(from)? },
            RENAME => Record::Rename {
                id: id(from)?,
                name: name(from)?,
            },
            HARVEST => Record::Harvest {
                id: id(from)?,
                epoch: from.number()?,
                whole: from.flag()?,
            },
            COMMIT => Record::Commit {
                id: id(from)?,
                epoch: from.number()?,
            },
            ABORT => Record::Abort {
                id: id(from)?,
                epoch: from.number()?,
            },
            GROW => Record::Grow {
                len: from.number()?,
            },
            _ => return Err(Bad("a record of an unknown kind")),
        })
    }
}

fn extent(from: &mut Reader<'_>) -> Result<u64, Bad> {
    from.at_most(MAX_EXTENTS - 1, "an extent has a number that is too high")
}

pub(crate) fn mask(from: &mut Reader<'_>) -> Result<u32, Bad> {
    let mask = from.at_most(u64::from(u32::MAX), "a mask has too many pages")?;
    Ok(mask as u32)
}

pub(crate) fn id(from: &mut Reader<'_>) -> Result<u32, Bad> {
    let id = from.at_most(u64::from(u32::MAX), "a consumer has too high a number")?;
    Ok(id as u32)
}

pub(crate) fn name(from: &mut Reader<'_>) -> Result<String, Bad> {
    let name = from.bytes(MAX_NAME, "a name is too long")?;
    match std::str::from_utf8(name) {
        Ok("") => Err(Bad("a name is empty")),
        Ok(name) => Ok(name.to_owned()),
        Err(_) => Err(Bad("a name is no text")),
    }
}
