//! The first cluster of an image: its header, and the extensions of the header.

use super::error::{QcowError, at_most};
use super::file::{ImageFile, MAX_DIRECTORY, be32, be64, read};

const MAGIC: u32 = u32::from_be_bytes(*b"QFI\xfb");
/// Bits of features without which an image is not understood.
pub(super) const DIRTY: u64 = 1;
pub(super) const CORRUPT: u64 = 1 << 1;
pub(super) const DATA_FILE: u64 = 1 << 2;
const KNOWN_INCOMPATIBLE: u64 = 0b1_1111;
/// Bits that a program that does not know them clears.
pub(super) const HAS_BITMAPS: u64 = 1;
pub(super) const RAW_DATA_FILE: u64 = 1 << 1;
pub(super) const KNOWN_AUTOCLEAR: u64 = HAS_BITMAPS | RAW_DATA_FILE;
/// Types of extensions.
pub(super) const BITMAPS: u32 = 0x2385_2875;
pub(super) const DATA_FILE_NAME: u32 = 0x4441_5441;
/// Bytes of the extension of bitmaps, with its header of 8.
pub(super) const BITMAPS_LEN: u64 = 8 + 24;

pub(super) const MAX_BITMAPS: u64 = 65535;
/// QEMU's limit for the refcount table, in bytes.
pub(super) const MAX_REFCOUNT_TABLE: u64 = 8 << 20;
/// The file offset of a field of the header.
pub(super) const AT_BACKING: u64 = 8;
pub(super) const AT_AUTOCLEAR: u64 = 88;

/// What the first cluster says, held against the length of the file.
#[derive(Clone, Debug)]
pub(super) struct Header {
    pub(super) cluster_bits: u32,
    pub(super) size: u64,
    pub(super) incompatible: u64,
    pub(super) autoclear: u64,
    pub(super) l1: Part,
    pub(super) snapshots: Option<u64>,
    pub(super) refcount_table: Part,
    pub(super) refcount_order: u32,
    /// The name of the file that this one is an overlay of.
    pub(super) backing: Option<Part>,
    pub(super) bitmaps: Option<Bitmaps>,
    pub(super) data_file: Option<String>,
    /// Where the extensions end: the place of the mark that says so.
    pub(super) end_at: u64,
    /// Whether the extension of bitmaps is the last one.
    pub(super) bitmaps_last: bool,
}

/// A part of the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Part {
    pub(super) at: u64,
    pub(super) len: u64,
}

/// The extension of bitmaps.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bitmaps {
    /// Where the extension is, with its own header.
    pub(super) at: u64,
    pub(super) count: u64,
    pub(super) directory: Part,
}

impl Header {
    pub(super) fn cluster(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// How many clusters `bytes` take.
    pub(super) fn clusters(&self, bytes: u64) -> u64 {
        bytes.div_ceil(self.cluster())
    }

    /// Reads the first cluster, and refuses what this library does not understand.
    pub(super) fn read<F: ImageFile>(file: &mut F) -> Result<Header, QcowError> {
        let fixed = read(file, 0, 104, "the header")?;
        let number = |place, at: usize, found: u64, good: bool, why| match good {
            true => Ok(found),
            false => Err(QcowError::Damaged {
                place,
                at: at as u64,
                found,
                why,
            }),
        };
        let word = |at| u64::from(be32(&fixed, at));
        let magic = be32(&fixed, 0);
        number(
            "the magic number",
            0,
            u64::from(magic),
            magic == MAGIC,
            "this is no qcow2 image",
        )?;
        let version = word(4);
        if version != 3 {
            return Err(QcowError::Unsupported {
                place: "the version of the image",
                found: version,
                why: "bitmaps need version 3 (qemu-img amend -o compat=1.1)",
            });
        }
        let bits = word(20);
        number(
            "the size of a cluster",
            20,
            bits,
            (9..=21).contains(&bits),
            "9 to 21 are possible",
        )?;
        let cluster = 1u64 << bits;
        let size = be64(&fixed, 24);
        number(
            "the size of the disk",
            24,
            size,
            size <= i64::MAX as u64,
            "it exceeds 2^63 - 1",
        )?;
        let incompatible = be64(&fixed, 72);
        if incompatible & !KNOWN_INCOMPATIBLE != 0 {
            return Err(QcowError::Unsupported {
                place: "the incompatible features",
                found: incompatible,
                why: "some of them are not known here",
            });
        }
        let order = word(96);
        number(
            "the width of a refcount",
            96,
            order,
            order <= 6,
            "at most 6 is possible",
        )?;
        let header_len = word(100);
        number(
            "the length of the header",
            100,
            header_len,
            (104..=cluster).contains(&header_len) && header_len % 8 == 0,
            "it is too short, too long, or no multiple of 8",
        )?;
        let aligned = |place, at: usize| {
            let found = be64(&fixed, at);
            let why = "it is no multiple of the size of a cluster";
            number(place, at, found, found.is_multiple_of(cluster), why)
        };
        let l1 = Part {
            at: aligned("the offset of the L1 table", 40)?,
            len: 8 * word(36),
        };
        let place = "the size of the refcount table in bytes";
        let refcount_table = Part {
            at: aligned("the offset of the refcount table", 48)?,
            len: at_most(place, word(56) * cluster, MAX_REFCOUNT_TABLE)?,
        };
        let snapshots = aligned("the offset of the snapshots", 64)?;
        let backing = Part {
            at: be64(&fixed, 8),
            len: word(16),
        };
        let backing = (backing.at != 0).then_some(backing);
        let extensions_end = match backing {
            None => cluster,
            Some(name) => {
                let end = name.at.checked_add(name.len);
                let good = name.at >= header_len && end.is_some_and(|end| end <= cluster);
                let why = "the name is not in the first cluster";
                number(
                    "the offset of the backing file's name",
                    8,
                    name.at,
                    good,
                    why,
                )?
            }
        };
        let mut header = Header {
            cluster_bits: bits as u32,
            size,
            incompatible,
            autoclear: be64(&fixed, 88),
            l1,
            snapshots: (word(60) != 0).then_some(snapshots),
            refcount_table,
            refcount_order: order as u32,
            backing,
            bitmaps: None,
            data_file: None,
            end_at: extensions_end,
            bitmaps_last: false,
        };
        header.extensions(file, header_len, extensions_end)?;
        Ok(header)
    }

    fn extensions<F: ImageFile>(
        &mut self,
        file: &mut F,
        from: u64,
        end: u64,
    ) -> Result<(), QcowError> {
        // The first cluster may be shorter in the file than in the format.
        let place = "the extensions of the header";
        let len = file.length().map_err(QcowError::io(place, 0))?;
        let area = read(file, from, end.min(len.max(from)) - from, place)?;
        let mut at = 0;
        while area.len() - at >= 8 {
            let (kind, len) = (be32(&area, at), u64::from(be32(&area, at + 4)));
            let file_at = from + at as u64;
            if kind == 0 {
                self.end_at = file_at;
                return Ok(());
            }
            let room = (area.len() - at - 8) as u64;
            if len > room {
                return Err(QcowError::Damaged {
                    place: "the length of an extension",
                    at: file_at + 4,
                    found: len,
                    why: "it reaches past the extensions",
                });
            }
            let data = &area[at + 8..][..len as usize];
            self.bitmaps_last = false;
            match kind {
                BITMAPS => {
                    let seen = self.bitmaps.is_some();
                    self.bitmaps = Some(self.bitmaps_extension(data, file_at, seen)?);
                    self.bitmaps_last = true;
                }
                DATA_FILE_NAME => {
                    self.data_file = Some(String::from_utf8_lossy(data).into_owned());
                }
                _ => {}
            }
            // The padding of the last one may be cut off by the end of the area.
            at = (at + 8 + (len as usize).next_multiple_of(8)).min(area.len());
        }
        self.end_at = from + at as u64;
        Ok(())
    }

    fn bitmaps_extension(&self, data: &[u8], at: u64, seen: bool) -> Result<Bitmaps, QcowError> {
        let damaged = |place, field: u64, found, why| QcowError::Damaged {
            place,
            at: at + 8 + field,
            found,
            why,
        };
        let len = data.len() as u64;
        if len != 24 || seen {
            let why = "it has to be 24, and there is one such extension";
            return Err(damaged("the length of the bitmaps' extension", 0, len, why));
        }
        let count = u64::from(be32(data, 0));
        if count == 0 || count > MAX_BITMAPS {
            let why = "1 to 65535 are possible";
            return Err(damaged("the number of bitmaps", 0, count, why));
        }
        let directory = Part {
            at: be64(data, 16),
            len: be64(data, 8),
        };
        if directory.len > MAX_DIRECTORY || directory.len < 24 * count {
            let why = "it does not fit the number of bitmaps, or exceeds 64 MiB";
            let place = "the size of the bitmaps' directory";
            return Err(damaged(place, 8, directory.len, why));
        }
        if directory.at == 0 || !directory.at.is_multiple_of(self.cluster()) {
            let why = "it is no multiple of the size of a cluster";
            let place = "the offset of the bitmaps' directory";
            return Err(damaged(place, 16, directory.at, why));
        }
        Ok(Bitmaps {
            at,
            count,
            directory,
        })
    }
}
