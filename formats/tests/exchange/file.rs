//! Bitmap files: what is written is read back, and a changed file is refused with a reason.

use std::io::Cursor;

use dirtymap::{Error, Granule, Iova, IovaRange, RangeError, SparseBitmap, UserBitmap};
use dirtymap_formats::{BitmapFile, BitmapFileError};

use crate::{Folder, range};

/// A file of 77 pages from page 5 on, with every third page dirty, generation 9.
fn bytes() -> Vec<u8> {
    let mut words = [0x9249_2492_4924_9249u64, 0x4924];
    let view = UserBitmap::new(&mut words).view(range(5 << 12, 77 << 12), Granule::K4);
    let mut file = Cursor::new(Vec::new());
    BitmapFile::write_to(&mut file, &view.unwrap(), 9).unwrap();
    file.into_inner()
}

fn open(bytes: &[u8]) -> Result<BitmapFile<Cursor<&[u8]>>, BitmapFileError> {
    BitmapFile::from_reader(Cursor::new(bytes))
}

/// Writes the checksum of the header anew, so that another fault of the header is the one that is
/// reported.
fn sealed(mut bytes: Vec<u8>) -> Vec<u8> {
    let checksum = crc32(&bytes[..60]);
    bytes[60..64].copy_from_slice(&checksum.to_le_bytes());
    bytes
}

/// The checksum of the format, bit by bit: the polynomial of Ethernet, reflected.
fn crc32(bytes: &[u8]) -> u32 {
    let step = |crc: u32| (crc >> 1) ^ (0xEDB8_8320 & (crc & 1).wrapping_neg());
    !bytes.iter().fold(u32::MAX, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| step(crc))
    })
}

#[test]
fn the_layout_is_what_the_documentation_says() {
    let bytes = bytes();
    assert_eq!(bytes.len(), 64 + 10);
    assert_eq!(&bytes[..8], b"dirtymap");
    let u32_at = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
    let u64_at = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
    assert_eq!((u32_at(8), u32_at(12)), (1, 12));
    assert_eq!((u64_at(16), u64_at(24), u64_at(32)), (5 << 12, 77, 9));
    assert_eq!(u32_at(40), crc32(&bytes[64..]));
    assert_eq!(bytes[44..60], [0; 16]);
    assert_eq!(u32_at(60), crc32(&bytes[..60]));
    assert_eq!(bytes[64..66], [0b0100_1001, 0b1001_0010]);
}

#[test]
fn a_file_of_several_blocks_comes_back_whole_and_converted() {
    let folder = Folder::new("blocks");
    // A block is 2^19 bits. The bitmap has one bit more than two blocks, with runs across their
    // borders.
    let bits = (1 << 20) + 1;
    let all = range(1 << 30, bits << 12);
    let dirty = [
        range(1 << 30, 4096),
        range((1 << 30) + ((1 << 31) - 4096), 3 * 4096),
        range((1 << 30) + ((bits - 1) << 12), 4096),
    ];
    let sparse = SparseBitmap::new(bits);
    let view = UserBitmap::sparse(&sparse).view(all, Granule::K4).unwrap();
    for run in dirty {
        view.sink().record(run).unwrap();
    }
    BitmapFile::save(folder.file(), &view, 1).unwrap();
    let mut file = BitmapFile::open(folder.file()).unwrap();
    let back = SparseBitmap::new(bits);
    let view = UserBitmap::sparse(&back).view(all, Granule::K4).unwrap();
    assert_eq!(file.or_into(&view).unwrap(), 5);
    assert_eq!(view.runs().collect::<Vec<_>>(), dirty);
    // Into a coarser bitmap with another base. The file can be read any number of times.
    let mut words = [0u64; 41];
    let target = IovaRange::new(Iova::MIN, Iova::new(((41 * 64) << 21) - 1)).unwrap();
    let view = UserBitmap::new(&mut words)
        .view(target, Granule::M2)
        .unwrap();
    file.or_into(&view).unwrap();
    let expect: Vec<IovaRange> = dirty.iter().map(|run| run.round_out(Granule::M2)).collect();
    assert_eq!(view.runs().collect::<Vec<_>>(), expect);
}

#[test]
fn every_cut_and_every_flipped_bit_is_found() {
    let bytes = bytes();
    for len in 0..bytes.len() {
        let needed = if len < 64 { 64 } else { 74 };
        let error = open(&bytes[..len]).unwrap_err();
        let expect = BitmapFileError::Truncated {
            len: len as u64,
            needed,
        };
        assert_eq!(error.to_string(), expect.to_string());
    }
    for bit in 0..bytes.len() * 8 {
        let mut bytes = bytes.clone();
        bytes[bit / 8] ^= 1 << (bit % 8);
        let mut words = [0u64; 2];
        let view = UserBitmap::new(&mut words);
        let view = view.view(range(5 << 12, 77 << 12), Granule::K4).unwrap();
        let error = open(&bytes)
            .and_then(|mut file| file.or_into(&view))
            .unwrap_err();
        let right = match bit / 8 {
            0..8 => matches!(error, BitmapFileError::Foreign),
            8..12 => matches!(error, BitmapFileError::Version { known: 1, .. }),
            _ => matches!(error, BitmapFileError::Damaged(_)),
        };
        assert!(right, "bit {bit}: {error}");
        assert_eq!(words, [0; 2], "nothing is read from a damaged file");
    }
}

#[test]
fn what_a_header_may_not_say_is_refused_though_it_is_sealed() {
    let with = |at: usize, value: u64| {
        let mut bytes = bytes();
        bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
        sealed(bytes)
    };
    let damaged = |bytes: Vec<u8>| matches!(open(&bytes), Err(BitmapFileError::Damaged(_)));
    assert!(damaged(with(16, 5 << 12 | 1)), "a base inside a granule");
    assert!(damaged(with(16, u64::MAX - 4095)), "past the end");
    assert!(damaged(with(24, 0)), "no bits");
    assert!(damaged(with(44, 1)), "something in the gap");
    let mut granule = bytes();
    granule[12] = 64;
    assert!(damaged(sealed(granule)));
    // Lengths are checked by arithmetic alone: no length of a header is allocated.
    assert!(matches!(
        open(&with(24, u64::MAX)),
        Err(BitmapFileError::TooLarge { bits: u64::MAX, limit }) if limit == BitmapFile::MAX_BITS
    ));
    assert!(matches!(
        open(&with(24, 1 << 40)),
        Err(BitmapFileError::Truncated { len: 74, needed }) if needed == 64 + (1 << 37)
    ));
    let mut long = bytes();
    long.push(0);
    assert!(damaged(long));
    // A payload with a bit past its end, and checksums that fit.
    let mut behind = bytes();
    behind[73] |= 1 << 5;
    let checksum = crc32(&behind[64..]);
    behind[40..44].copy_from_slice(&checksum.to_le_bytes());
    let mut words = [0u64; 2];
    let view = UserBitmap::new(&mut words);
    let view = view.view(range(5 << 12, 77 << 12), Granule::K4).unwrap();
    let mut file = BitmapFile::from_reader(Cursor::new(sealed(behind))).unwrap();
    assert!(matches!(
        file.or_into(&view),
        Err(BitmapFileError::Damaged(_))
    ));
    assert_eq!(words, [0; 2]);
}

#[test]
fn what_cannot_be_saved_leaves_the_old_file_and_nothing_else() {
    let folder = Folder::new("refused");
    std::fs::write(folder.file(), bytes()).unwrap();
    let sparse = SparseBitmap::new(1 << 42);
    let view = UserBitmap::sparse(&sparse);
    let view = view.view(range(0, 1 << 54), Granule::K4).unwrap();
    let error = BitmapFile::save(folder.file(), &view, 0).unwrap_err();
    assert!(matches!(error, BitmapFileError::TooLarge { bits, .. } if bits == 1 << 42));
    // A folder is in the way of the name: the last step fails.
    let taken = folder.0.join("taken");
    std::fs::create_dir(&taken).unwrap();
    let mut words = [1u64];
    let view = UserBitmap::new(&mut words)
        .view(range(0, 4096), Granule::K4)
        .unwrap();
    let error = BitmapFile::save(&taken, &view, 0).unwrap_err();
    assert!(matches!(error, BitmapFileError::Io(_)));
    let error = BitmapFile::save(folder.0.join("none/bits"), &view, 0).unwrap_err();
    assert!(
        matches!(error, BitmapFileError::Io(error) if error.kind() == std::io::ErrorKind::NotFound)
    );
    assert!(matches!(
        BitmapFile::save("/", &view, 0),
        Err(BitmapFileError::Io(_))
    ));
    let mut names = folder.names();
    names.sort();
    assert_eq!(names, ["bits", "taken"], "no draft is left behind");
    assert_eq!(std::fs::read(folder.file()).unwrap(), bytes());
}

#[test]
fn the_top_of_the_address_space_fits() {
    let top = range(u64::MAX - 8191, 8192);
    let mut words = [0b10u64];
    let view = UserBitmap::new(&mut words).view(top, Granule::K4).unwrap();
    let mut file = Cursor::new(Vec::new());
    BitmapFile::write_to(&mut file, &view, u64::MAX).unwrap();
    let mut file = BitmapFile::from_reader(file).unwrap();
    assert_eq!((file.range(), file.generation()), (top, u64::MAX));
    let mut back = [0u64];
    file.or_into(&UserBitmap::new(&mut back).view(top, Granule::K4).unwrap())
        .unwrap();
    assert_eq!(back, words);
    // At the coarsest granule the whole address space is two bits.
    let mut words = [0b11u64];
    let view = UserBitmap::new(&mut words)
        .view(IovaRange::ALL, Granule::MAX)
        .unwrap();
    let mut file = Cursor::new(Vec::new());
    BitmapFile::write_to(&mut file, &view, 0).unwrap();
    assert_eq!(
        BitmapFile::from_reader(file).unwrap().range(),
        IovaRange::ALL
    );
}

#[test]
fn a_path_without_a_folder_is_one_in_the_current_folder() {
    // The folder is synced too, and "" is no folder.
    let name = format!("dirtymap-here-{}", std::process::id());
    let mut words = [1u64];
    let view = UserBitmap::new(&mut words)
        .view(range(0, 4096), Granule::K4)
        .unwrap();
    let saved = BitmapFile::save(&name, &view, 0);
    let read = BitmapFile::open(&name).map(|file| file.generation());
    let _ = std::fs::remove_file(&name);
    saved.unwrap();
    assert_eq!(read.unwrap(), 0);
}

#[test]
fn errors_of_the_bitmap_keep_their_name() {
    let error = BitmapFileError::from(Error::Range(RangeError::BadGranule { bytes: 3 }));
    assert!(error.to_string().contains("3 bytes"), "{error}");
}
