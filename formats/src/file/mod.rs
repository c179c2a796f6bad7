//! A bitmap in a file of its own, with its range and granule, a generation, and checksums.
//!
//! ```text
//!  byte   0   8  "dirtymap"
//!         8   4  version, 1                    12   4  granule, as its base-2 logarithm
//!        16   8  first address                 24   8  how many bits
//!        32   8  generation, of the caller     40   4  CRC-32 of the payload
//!        44  16  zero                          60   4  CRC-32 of bytes 0 to 59
//!        64      payload: bit n is bit n % 8 of byte n / 8; what is left of the last byte is zero
//! ```
//!
//! All numbers are little endian. A new file replaces an old one in one step, after all of it is on
//! the disk. So after a crash there is the old file or the new one, as a whole.

mod error;
mod payload;
mod place;
mod restart;

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::Path;

use crc32fast::Hasher;

pub use error::BitmapFileError;
pub use place::Truncate;
use place::{Draft, HEADER, begin};
pub use restart::Restored;

use dirtymap::{BitmapView, Granule, Iova, IovaRange};

const MAGIC: [u8; 8] = *b"dirtymap";
const VERSION: u32 = 1;
/// The number of bytes that are read or written at a time, a multiple of 8.
const BLOCK: usize = 64 << 10;

/// A file that holds a bitmap: its range, granule, a generation that the caller gave it, and
/// checksums.
///
/// [`save`](Self::save) writes one crash-safely, [`open`](Self::open) checks the header,
/// [`or_into`](Self::or_into) checks the payload and uses what it has checked. A program that
/// cannot read a file back has no record of the writes, so everything is dirty.
///
/// ```
/// use dirtymap::{Granule, Iova, IovaRange, UserBitmap};
/// use dirtymap_formats::BitmapFile;
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let path = std::env::temp_dir().join(format!("dirtymap-doc-{}", std::process::id()));
/// let ram = IovaRange::from_len(Iova::MIN, 64 << 12)?;
/// let mut words = [0b110u64];
/// BitmapFile::save(&path, &UserBitmap::new(&mut words).view(ram, Granule::K4)?, 7)?;
///
/// let mut file = BitmapFile::open(&path)?;
/// assert_eq!((file.range(), file.granule(), file.generation()), (ram, Granule::K4, 7));
/// let mut back = [0u64];
/// file.or_into(&UserBitmap::new(&mut back).view(ram, Granule::K4)?)?;
/// assert_eq!(back, words);
/// # std::fs::remove_file(path)?;
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct BitmapFile<R = File> {
    reader: R,
    header: Header,
}

/// The contents of a header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Header {
    range: IovaRange,
    granule: Granule,
    generation: u64,
    /// The checksum of the payload.
    checksum: u32,
}

impl BitmapFile {
    /// The most bits that a file may have: 2^41, which take 256 GiB.
    pub const MAX_BITS: u64 = 1 << 41;

    /// Writes `view` to the file `path`, which replaces an old file of that name. On return it is
    /// on the disk. If this fails, or the process or the system stops meanwhile, the old file or
    /// the new one is there, as a whole.
    ///
    /// Writes to `.dirtymap-PID-N.tmp` in the same folder first. A process that is killed leaves
    /// that file. If `path` is a symbolic link, the file that it leads to is replaced, in the
    /// folder of that one. On Unix the new file has the permissions of the old one, and its owner
    /// and group if the process may set them. If it may not set the group, the new group gets the
    /// rights of all other users. Access lists and extended attributes are not kept.
    ///
    /// # Errors
    /// [`BitmapFileError::TooLarge`] before anything is written; [`BitmapFileError::Bitmap`] if
    /// `view` is a file of which a window cannot be mapped; [`BitmapFileError::Io`].
    pub fn save(
        path: impl AsRef<Path>,
        view: &BitmapView<'_>,
        generation: u64,
    ) -> Result<(), BitmapFileError> {
        check_size(view)?;
        let mut draft = Draft::create(path.as_ref())?;
        Self::write_to(&mut draft.file, view, generation)?;
        draft.publish()?;
        Ok(())
    }

    /// Writes the same bytes as [`save`](Self::save) to a place from its beginning on, and replaces
    /// all of its contents, for places that are no files. After a crash the contents are undefined.
    ///
    /// # Errors
    /// As [`save`](Self::save), and [`BitmapFileError::Appends`] if the place appends. The contents
    /// are unchanged then.
    pub fn write_to(
        writer: &mut impl Truncate,
        view: &BitmapView<'_>,
        generation: u64,
    ) -> Result<(), BitmapFileError> {
        check_size(view)?;
        begin(writer)?;
        let header = Header {
            range: view.range(),
            granule: view.granule(),
            generation,
            checksum: write_payload(writer, view)?,
        };
        writer.seek(SeekFrom::Start(0))?;
        writer.write_all(&header.encode())?;
        Ok(())
    }

    /// Opens the file `path` and checks its header.
    ///
    /// # Errors
    /// As [`from_reader`](BitmapFile::from_reader).
    pub fn open(path: impl AsRef<Path>) -> Result<Self, BitmapFileError> {
        Self::from_reader(File::open(path)?)
    }
}

impl<R: Read + Seek> BitmapFile<R> {
    /// Checks the header of a file that begins where `reader` begins. Allocates no memory in
    /// proportion to a value of the file.
    ///
    /// # Errors
    /// In this order: [`Truncated`](BitmapFileError::Truncated) if there is no room for a header,
    /// [`Foreign`](BitmapFileError::Foreign), [`Version`](BitmapFileError::Version),
    /// [`Damaged`](BitmapFileError::Damaged) if its checksum or its range is wrong,
    /// [`TooLarge`](BitmapFileError::TooLarge), and `Truncated` or `Damaged` if the file has
    /// another length than that; [`Io`](BitmapFileError::Io) at any time.
    pub fn from_reader(mut reader: R) -> Result<Self, BitmapFileError> {
        let len = reader.seek(SeekFrom::End(0))?;
        let truncated = |needed| BitmapFileError::Truncated { len, needed };
        if len < HEADER as u64 {
            return Err(truncated(HEADER as u64));
        }
        let mut bytes = [0; HEADER];
        reader.seek(SeekFrom::Start(0))?;
        reader.read_exact(&mut bytes)?;
        let header = Header::decode(&bytes)?;
        let needed = HEADER as u64 + header.bits().div_ceil(8);
        if len < needed {
            return Err(truncated(needed));
        }
        if len > needed {
            return Err(BitmapFileError::Damaged("it has more bytes than bits"));
        }
        Ok(BitmapFile { reader, header })
    }

    /// The addresses of the bitmap.
    pub fn range(&self) -> IovaRange {
        self.header.range
    }

    /// The bytes that one bit stands for.
    pub fn granule(&self) -> Granule {
        self.header.granule
    }

    /// The generation that the caller gave to the file when it was written. It distinguishes a
    /// current file from an old one.
    pub fn generation(&self) -> u64 {
        self.header.generation
    }

    /// Checks the payload, then ORs the checked bits into `target`, and returns how many bits that
    /// set there. Granules and bases may differ, as in [`BitmapView::or_into`].
    ///
    /// Keeps up to 64 MiB of the payload in memory, without its zeros. For the rest it keeps a hash
    /// of 8 bytes for each 64 KiB, with which the second read is compared.
    ///
    /// # Errors
    /// [`Damaged`](BitmapFileError::Damaged) if the payload has changed since it was written,
    /// before anything is touched; or if a part that was not kept has changed since it was checked.
    /// Then the bits of the parts before it are in `target`, and the others are not.
    /// [`Bitmap`](BitmapFileError::Bitmap) if `target` is a file of which a window cannot be
    /// mapped; [`Io`](BitmapFileError::Io).
    pub fn or_into(&mut self, target: &BitmapView<'_>) -> Result<u64, BitmapFileError> {
        self.checked(payload::KEPT)?
            .or_into(&mut self.reader, target)
    }
}

impl Header {
    /// The number of bits of the payload.
    fn bits(&self) -> u64 {
        // No more than `MAX_BITS`.
        self.range.granules(self.granule) as u64
    }

    fn encode(&self) -> [u8; HEADER] {
        let mut bytes = [0; HEADER];
        bytes[0..8].copy_from_slice(&MAGIC);
        bytes[8..12].copy_from_slice(&VERSION.to_le_bytes());
        bytes[12..16].copy_from_slice(&u32::from(self.granule.lg2()).to_le_bytes());
        bytes[16..24].copy_from_slice(&self.range.start().get().to_le_bytes());
        bytes[24..32].copy_from_slice(&self.bits().to_le_bytes());
        bytes[32..40].copy_from_slice(&self.generation.to_le_bytes());
        bytes[40..44].copy_from_slice(&self.checksum.to_le_bytes());
        let checksum = crc32fast::hash(&bytes[..60]);
        bytes[60..64].copy_from_slice(&checksum.to_le_bytes());
        bytes
    }

    fn decode(bytes: &[u8; HEADER]) -> Result<Self, BitmapFileError> {
        use BitmapFileError::{Damaged, Foreign, TooLarge, Version};
        let u32_at = |at: usize| u32::from_le_bytes(std::array::from_fn(|nth| bytes[at + nth]));
        let u64_at = |at: usize| u64::from_le_bytes(std::array::from_fn(|nth| bytes[at + nth]));
        if bytes[..8] != MAGIC {
            return Err(Foreign);
        }
        // Before the checksum: another version may keep it elsewhere.
        if u32_at(8) != VERSION {
            return Err(Version {
                found: u32_at(8),
                known: VERSION,
            });
        }
        if u32_at(60) != crc32fast::hash(&bytes[..60]) {
            return Err(Damaged("the checksum of its header is wrong"));
        }
        if bytes[44..60] != [0; 16] {
            return Err(Damaged("its reserved bytes are not zero"));
        }
        let granule = u8::try_from(u32_at(12)).ok().and_then(Granule::from_lg2);
        let granule = granule.ok_or(Damaged("its granule is not a power of two"))?;
        let (start, bits) = (Iova::new(u64_at(16)), u64_at(24));
        if bits > BitmapFile::MAX_BITS {
            return Err(TooLarge {
                bits,
                limit: BitmapFile::MAX_BITS,
            });
        }
        let no_range = Damaged("its range is not made of whole granules");
        let span = u128::from(bits) << granule.lg2();
        let last = (u128::from(start.get()) + span).checked_sub(1);
        let last = last
            .and_then(|last| u64::try_from(last).ok())
            .map(Iova::new);
        let range = last.and_then(|last| IovaRange::new(start, last).ok());
        match range {
            Some(range) if range.is_aligned(granule) => Ok(Header {
                range,
                granule,
                generation: u64_at(32),
                checksum: u32_at(40),
            }),
            _ => Err(no_range),
        }
    }
}

fn check_size(view: &BitmapView<'_>) -> Result<(), BitmapFileError> {
    let bits = view.last_bit().saturating_add(1);
    let limit = BitmapFile::MAX_BITS;
    match bits > limit {
        true => Err(BitmapFileError::TooLarge { bits, limit }),
        false => Ok(()),
    }
}

/// Writes the bits of `view`; returns their checksum.
fn write_payload(writer: &mut impl Write, view: &BitmapView<'_>) -> Result<u32, BitmapFileError> {
    // No more than 2^41 bits.
    let bytes = view.range().granules(view.granule()).div_ceil(8) as u64;
    let mut checksum = Hasher::new();
    let mut words = view.words();
    let mut next = words.next();
    let mut at = 0;
    while at < bytes {
        let mut block = vec![0; (bytes - at).min(BLOCK as u64) as usize];
        while let Some((index, word)) = next
            && index * 8 < at + BLOCK as u64
        {
            let part = &mut block[(index * 8 - at) as usize..];
            // The last word may have fewer bytes. The missing ones are zero.
            for (byte, value) in part.iter_mut().zip(word.to_le_bytes()) {
                *byte = value;
            }
            next = words.next();
        }
        writer.write_all(&block)?;
        checksum.update(&block);
        at += block.len() as u64;
    }
    match words.take_error() {
        Some(error) => Err(error.into()),
        None => Ok(checksum.finalize()),
    }
}
