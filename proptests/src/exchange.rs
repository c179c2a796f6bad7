//! Bitmap files from arbitrary bytes: a file is accepted only if a save of its contents gives the
//! same bytes.

use std::io::Cursor;

use dirtymap::{SparseBitmap, UserBitmap};
use dirtymap_formats::{BitmapFile, BitmapFileError};

/// The length of a header, and the offsets of the checksums in it.
const HEADER: usize = 64;
const PAYLOAD_SUM: usize = 40;
const HEADER_SUM: usize = 60;

/// Reads `bytes` as a bitmap file, once as they are and once with correct checksums. Returns how
/// many of the two were accepted.
///
/// # Errors
/// A file was accepted although a save of its contents gives other bytes.
pub fn check_bitmap_file(bytes: &[u8]) -> Result<usize, String> {
    let mut sealed = bytes.to_vec();
    if let Some((header, payload)) = sealed.split_at_mut_checked(HEADER) {
        let sum = crc32(payload);
        header[PAYLOAD_SUM..][..4].copy_from_slice(&sum.to_le_bytes());
        let sum = crc32(&header[..HEADER_SUM]);
        header[HEADER_SUM..].copy_from_slice(&sum.to_le_bytes());
    }
    Ok(usize::from(check(bytes)?) + usize::from(check(&sealed)?))
}

/// Whether the file was accepted.
fn check(bytes: &[u8]) -> Result<bool, String> {
    let failed = |error: BitmapFileError| error.to_string();
    let Ok(mut file) = BitmapFile::from_reader(Cursor::new(bytes)) else {
        return Ok(false);
    };
    // As many bits as `bytes` holds, and no chunk for more, so a false header costs nothing.
    let (range, granule) = (file.range(), file.granule());
    let sparse = SparseBitmap::new(range.granules(granule) as u64);
    let view = UserBitmap::sparse(&sparse).view(range, granule);
    let view = view.map_err(|error| error.to_string())?;
    let set = match file.or_into(&view) {
        Ok(set) => set,
        Err(BitmapFileError::Damaged(_)) if view.count() == 0 => return Ok(false),
        Err(error) => return Err(error.to_string()),
    };
    let mut again = Cursor::new(Vec::new());
    BitmapFile::write_to(&mut again, &view, file.generation()).map_err(failed)?;
    if set != view.count() || again.get_ref() != bytes {
        return Err(format!(
            "{file:?} of {bytes:02x?} would be written as {:02x?}",
            again.get_ref()
        ));
    }
    Ok(true)
}

/// The checksum of the format, bit by bit: the polynomial of Ethernet, reflected.
fn crc32(bytes: &[u8]) -> u32 {
    let step = |crc: u32| (crc >> 1) ^ (0xEDB8_8320 & (crc & 1).wrapping_neg());
    !bytes.iter().fold(u32::MAX, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| step(crc))
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)] // helpers of tests
mod tests {
    use std::collections::BTreeSet;

    use dirtymap::exchange::{DirtyLog, RunTable, RunsExt, merge_runs};
    use dirtymap::{BitmapView, Granule, Iova, IovaRange};
    use dirtymap_formats::roaring::RoaringExt;
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    /// Addresses are single bytes here, so that a model can count them.
    const END: u64 = 4096;

    /// A log of any base, granule and form, with bits past its end.
    #[derive(Clone, Debug)]
    struct Given {
        range: IovaRange,
        granule: Granule,
        bytes: Vec<u8>,
        as_words: bool,
    }

    impl Given {
        /// The dirty bytes.
        fn model(&self) -> BTreeSet<u64> {
            let base = self.range.start().get();
            let dirty = |address: &u64| {
                let bit = (address - base) >> self.granule.lg2();
                self.bytes[(bit / 8) as usize] >> (bit % 8) & 1 == 1
            };
            (base..=self.range.last().get()).filter(dirty).collect()
        }

        fn words(&self) -> Vec<u64> {
            let word = |bytes: &[u8]| {
                let byte = |nth| bytes.get(nth).copied().unwrap_or(0xFF);
                u64::from_ne_bytes(std::array::from_fn(byte))
            };
            self.bytes.chunks(8).map(word).collect()
        }
    }

    fn given() -> impl Strategy<Value = Given> {
        (0u8..7, any::<bool>(), 0u64..1 << 20, 1u64..300, 0usize..5).prop_flat_map(
            |(lg2, as_words, base, bits, spare)| {
                let granules = END >> lg2;
                let base = base % granules;
                let bits = bits.min(granules - base);
                let len = bits.div_ceil(8) as usize + spare;
                // Runs as well as single bits.
                let byte = prop_oneof![Just(0), Just(0xFF), any::<u8>()];
                vec(byte, len).prop_map(move |bytes| Given {
                    range: IovaRange::from_len(Iova::new(base << lg2), bits << lg2).unwrap(),
                    granule: Granule::from_lg2(lg2).unwrap(),
                    bytes,
                    as_words,
                })
            },
        )
    }

    fn set(runs: impl Iterator<Item = IovaRange>) -> BTreeSet<u64> {
        runs.flat_map(|run| run.start().get()..=run.last().get())
            .collect()
    }

    /// Calls `with` with the bits of `given` in a view of their own.
    fn in_view<T>(given: &Given, with: impl FnOnce(&BitmapView<'_>) -> T) -> T {
        let mut bytes = given.bytes.clone();
        let view = UserBitmap::bytes(&mut bytes).view(given.range, given.granule);
        with(&view.unwrap())
    }

    proptest! {
        #[test]
        fn logs_of_any_form_merge_into_what_any_of_them_says(
            logs in vec(given(), 0..5), size in 0u8..8
        ) {
            let words: Vec<Vec<u64>> = logs.iter().map(Given::words).collect();
            let read: Vec<DirtyLog<'_>> = logs.iter().zip(&words).map(|(log, words)| {
                match log.as_words {
                    true => DirtyLog::words(words, log.range, log.granule).unwrap(),
                    false => DirtyLog::bytes(&log.bytes, log.range, log.granule).unwrap(),
                }
            }).collect();
            let expect: BTreeSet<u64> = logs.iter().flat_map(Given::model).collect();
            let merged: Vec<IovaRange> = merge_runs(read.iter().map(DirtyLog::runs)).collect();
            prop_assert_eq!(set(merged.iter().copied()), expect.clone());
            let total = merged.iter().copied().total_bytes();
            prop_assert_eq!(total, expect.len() as u128, "each byte once");
            let table = RunTable::from_ordered(merged.clone()).unwrap();
            // The same without an earlier merge.
            let whole: RunTable = read.iter().flat_map(DirtyLog::runs).collect();
            prop_assert_eq!(&whole, &table);
            let size = Granule::from_lg2(size).unwrap();
            let pieces: Vec<(u64, u64)> = merged.into_iter().pieces(size).collect();
            prop_assert!(pieces.iter().all(|(_, len)| *len <= size.bytes()));
            let ranges = pieces
                .iter()
                .map(|(start, len)| IovaRange::from_len(Iova::new(*start), *len).unwrap());
            prop_assert_eq!(ranges.collect::<RunTable>(), table.clone());
            let parts: Vec<RunTable> = table.partition(size).collect();
            let size_bytes = u128::from(size.bytes());
            let full = parts.iter().rev().skip(1).all(|part| part.total_bytes() == size_bytes);
            prop_assert!(full);
            prop_assert_eq!(parts.iter().flatten().collect::<RunTable>(), table);
        }

        #[test]
        fn a_log_goes_into_any_bitmap_as_a_view_does(log in given(), target in given()) {
            let read = DirtyLog::bytes(&log.bytes, log.range, log.granule).unwrap();
            in_view(&target, |by_log| in_view(&target, |by_view| in_view(&log, |view| {
                let counts = (read.or_into(by_log).unwrap(), view.or_into(by_view).unwrap());
                prop_assert_eq!(counts.0, counts.1);
                prop_assert_eq!(read.count(), view.count());
                prop_assert!(by_log.runs().eq(by_view.runs()));
                Ok(())
            })))?;
        }

        #[test]
        fn a_file_and_a_set_give_back_what_they_were_given(
            log in given(), target in given(), generation: u64
        ) {
            in_view(&log, |view| {
                let mut bytes = Cursor::new(Vec::new());
                BitmapFile::write_to(&mut bytes, view, generation).unwrap();
                assert_eq!(check_bitmap_file(bytes.get_ref()), Ok(2));
                let mut file = BitmapFile::from_reader(bytes).unwrap();
                prop_assert_eq!((file.range(), file.granule()), (log.range, log.granule));
                prop_assert_eq!(file.generation(), generation);
                in_view(&target, |by_file| in_view(&target, |by_view| {
                    prop_assert_eq!(file.or_into(by_file).unwrap(), view.or_into(by_view).unwrap());
                    prop_assert!(by_file.runs().eq(by_view.runs()));
                    Ok(())
                }))?;
                let sparse = SparseBitmap::new(log.range.granules(log.granule) as u64);
                let back = UserBitmap::sparse(&sparse).view(log.range, log.granule).unwrap();
                let set = view.to_roaring().unwrap();
                prop_assert_eq!(back.or_roaring(&set).unwrap(), view.count());
                prop_assert_eq!(back.or_treemap(&view.to_treemap().unwrap()).unwrap(), 0);
                prop_assert!(back.bits().eq(view.bits()));
                Ok(())
            })?;
        }

        #[test]
        fn bytes_that_are_no_file_are_never_taken_for_one(
            log in given(),
            flip in vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
            cut in 0usize..8
        ) {
            let mut bytes = Cursor::new(Vec::new());
            in_view(&log, |view| BitmapFile::write_to(&mut bytes, view, 1)).unwrap();
            let mut bytes = bytes.into_inner();
            bytes.truncate(bytes.len() - cut);
            for (at, value) in flip {
                let at = at.index(bytes.len());
                bytes[at] ^= value;
            }
            if let Err(text) = check_bitmap_file(&bytes) {
                return Err(TestCaseError::fail(text));
            }
        }
    }
}
