//! A payload that is checked before use, and used exactly as it was checked.
//!
//! The format has one checksum over the whole payload, which may have any length. So a check and a
//! later use need two reads, or all of it in memory, and another program may write to the file in
//! between. Therefore the first read keeps the bytes that it has checked, up to a bound, and for
//! each further block a hash with a secret key. The second read accepts a block only if it has that
//! hash.

use std::hash::{BuildHasher, RandomState};
use std::io::{Read, Seek, SeekFrom};

use crc32fast::Hasher;

use super::{BLOCK, BitmapFile, BitmapFileError, HEADER, Header};
use dirtymap::exchange::DirtyLog;
use dirtymap::{BitmapView, Iova, IovaRange};

/// The most bytes of a payload that are kept in memory.
pub(super) const KEPT: usize = 64 << 20;

/// A block of a payload that was checked.
enum Block {
    /// No bit is set.
    Zero,
    /// Its bytes.
    Kept(Box<[u8]>),
    /// Their hash.
    Known(u64),
}

/// A payload that was checked.
pub(super) struct Checked {
    header: Header,
    blocks: Vec<Block>,
    keys: RandomState,
}

impl<R: Read + Seek> BitmapFile<R> {
    /// Checks the payload, and keeps up to `room` bytes of it.
    pub(super) fn checked(&mut self, mut room: usize) -> Result<Checked, BitmapFileError> {
        let header = self.header;
        let mut checked = Checked {
            header,
            // Grows as the file is read.
            blocks: Vec::new(),
            keys: RandomState::new(),
        };
        let mut checksum = Hasher::new();
        let mut last = 0;
        let mut block = vec![0; BLOCK];
        self.reader.seek(SeekFrom::Start(HEADER as u64))?;
        for range in header.blocks() {
            let bytes = &mut block[..header.len_of(range)];
            self.reader.read_exact(bytes)?;
            checksum.update(bytes);
            last = bytes.last().copied().unwrap_or(last);
            let kept = room.checked_sub(bytes.len());
            checked.blocks.push(match kept {
                _ if bytes.iter().all(|byte| *byte == 0) => Block::Zero,
                Some(left) => {
                    room = left;
                    Block::Kept((&*bytes).into())
                }
                None => Block::Known(checked.keys.hash_one(&*bytes)),
            });
        }
        if checksum.finalize() != header.checksum {
            return Err(BitmapFileError::Damaged(
                "the checksum of its bits is wrong",
            ));
        }
        let used = header.bits() % 8;
        if used != 0 && last >> used != 0 {
            return Err(BitmapFileError::Damaged("it has bits past its end"));
        }
        Ok(checked)
    }
}

impl Checked {
    /// ORs the checked bits into `target`, and reads the blocks that were not kept from `reader`.
    /// Returns how many bits that set.
    pub(super) fn or_into(
        &self,
        reader: &mut (impl Read + Seek),
        target: &BitmapView<'_>,
    ) -> Result<u64, BitmapFileError> {
        let mut set = 0;
        let mut again = Vec::new();
        let places = (HEADER as u64..).step_by(BLOCK);
        for ((block, range), place) in self.blocks.iter().zip(self.header.blocks()).zip(places) {
            let bytes = match block {
                Block::Zero => continue,
                Block::Kept(bytes) => bytes,
                Block::Known(hash) => {
                    again.resize(self.header.len_of(range), 0);
                    reader.seek(SeekFrom::Start(place))?;
                    reader.read_exact(&mut again)?;
                    if self.keys.hash_one(&*again) != *hash {
                        return Err(BitmapFileError::Damaged(
                            "it was written to while it was read",
                        ));
                    }
                    &*again
                }
            };
            set += DirtyLog::bytes(bytes, range, self.header.granule)?.or_into(target)?;
        }
        Ok(set)
    }
}

impl Header {
    /// The addresses of each block of the payload.
    fn blocks(&self) -> impl Iterator<Item = IovaRange> + use<> {
        let (all, granule) = (self.range, self.granule);
        let span = (BLOCK as u128 * 8) << granule.lg2();
        let mut next = Some(all.start());
        std::iter::from_fn(move || {
            let start = next?;
            let last = u128::from(start.get()) + span - 1;
            let last = Iova::new(u64::try_from(last).unwrap_or(u64::MAX)).min(all.last());
            next = last.checked_add(1).filter(|next| *next <= all.last());
            // Never an error: a block ends at or above its start.
            IovaRange::new(start, last).ok()
        })
    }

    /// The bytes of the block about `range`: no more than a block has.
    fn len_of(&self, range: IovaRange) -> usize {
        range.granules(self.granule).div_ceil(8) as usize
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)] // helpers of tests
mod tests {
    use super::*;
    use dirtymap::{Granule, SparseBitmap, UserBitmap};
    use std::io::Cursor;

    /// More bits than two blocks have.
    const BITS: u64 = 2 * (BLOCK as u64 * 8) + 70;

    fn all() -> IovaRange {
        IovaRange::from_len(Iova::new(3 << 12), BITS << 12).unwrap()
    }

    /// A file in which the first and the last block have bits, and the second has none.
    fn file() -> BitmapFile<Cursor<Vec<u8>>> {
        let sparse = SparseBitmap::new(BITS);
        let view = UserBitmap::sparse(&sparse)
            .view(all(), Granule::K4)
            .unwrap();
        for bit in [7, BITS - 1] {
            let page = Iova::new(all().start().get() + (bit << 12));
            view.sink()
                .record(IovaRange::from_len(page, 1).unwrap())
                .unwrap();
        }
        let mut file = Cursor::new(Vec::new());
        BitmapFile::write_to(&mut file, &view, 0).unwrap();
        BitmapFile::from_reader(file).unwrap()
    }

    /// The result of the OR after `room` bytes were kept and byte `at` of the file was flipped.
    fn after(room: usize, at: usize) -> (Result<u64, BitmapFileError>, Vec<u64>) {
        let mut file = file();
        let checked = file.checked(room).unwrap();
        file.reader.get_mut()[at] ^= 1;
        let sparse = SparseBitmap::new(BITS);
        let view = UserBitmap::sparse(&sparse)
            .view(all(), Granule::K4)
            .unwrap();
        let set = checked.or_into(&mut file.reader, &view);
        (set, view.bits().collect())
    }

    /// A part that was not kept is used as it was checked, or not at all.
    #[test]
    fn what_was_not_kept_is_known_again() {
        let whole = vec![7, BITS - 1];
        for room in [0, BLOCK, KEPT] {
            // The header, and a block without bits: neither is read again.
            for at in [40, HEADER + BLOCK + 5] {
                let (set, bits) = after(room, at);
                assert_eq!(
                    (set.unwrap(), bits),
                    (2, whole.clone()),
                    "{room} bytes kept"
                );
            }
        }
        let last = HEADER + 2 * BLOCK + 1;
        for (room, at, expect) in [
            (0, HEADER + 9, vec![]),
            (0, last, vec![7]),
            (BLOCK, last, vec![7]),
        ] {
            let (set, bits) = after(room, at);
            assert!(matches!(set, Err(BitmapFileError::Damaged(_))), "{set:?}");
            assert_eq!(bits, expect, "byte {at} after {room} bytes were kept");
        }
        // Kept: a later change does not matter.
        for at in [HEADER + 9, last] {
            let (set, bits) = after(KEPT, at);
            assert_eq!((set.unwrap(), bits), (2, whole.clone()));
        }
    }

    #[test]
    fn memory_follows_what_is_set() {
        let checked = file().checked(KEPT).unwrap();
        let kept = |block: &Block| matches!(block, Block::Kept(_));
        let kept: Vec<bool> = checked.blocks.iter().map(kept).collect();
        assert_eq!(kept, [true, false, true]);
    }
}
