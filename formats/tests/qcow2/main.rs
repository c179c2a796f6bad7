//! Bitmaps in qcow2 images: written and read back, cut off at every write, and damaged.
#![cfg(feature = "qcow2")]
#![allow(clippy::unwrap_used)]

mod crash;
mod damage;

use dirtymap::exchange::RunTable;
use dirtymap::{Granule, Iova, IovaRange, UserBitmap};
use dirtymap_formats::qcow2::{BitmapOptions, Image, QcowError, create_for_raw};
use proptest::collection::vec;
use proptest::prelude::*;

fn granule(bytes: u64) -> Granule {
    Granule::from_bytes(bytes).unwrap()
}

fn table(runs: &[(u64, u64)]) -> RunTable {
    let run = |&(start, len): &(u64, u64)| IovaRange::from_len(Iova::new(start), len).unwrap();
    runs.iter().map(run).collect()
}

/// What a bitmap holds of `runs`: whole granules, cut at the end of the disk.
fn rounded(runs: &RunTable, lg2: u8, size: u64) -> RunTable {
    let disk = IovaRange::from_len(Iova::MIN, size).unwrap();
    let granule = Granule::from_lg2(lg2).unwrap();
    let runs = runs.runs().iter().map(|run| run.round_out(granule));
    runs.filter_map(|run| run.intersection(disk)).collect()
}

fn image(size: u64, cluster: u64) -> Vec<u8> {
    let mut file = Vec::new();
    create_for_raw(&mut file, "disk.raw", size, granule(cluster)).unwrap();
    file
}

const K64: BitmapOptions = options(16);

const fn options(lg2: u8) -> BitmapOptions {
    match Granule::from_lg2(lg2) {
        Some(granule) => BitmapOptions::new().granule(granule),
        None => panic!(),
    }
}

#[test]
fn bitmaps_are_listed_written_merged_and_removed() {
    let size = 10 << 20;
    let mut file = image(size, 64 << 10);
    let mut image = Image::open(&mut file).unwrap();
    assert_eq!(image.data_file(), Some("disk.raw"));
    assert_eq!(image.bitmaps().unwrap(), []);
    assert!(matches!(image.read("a"), Err(QcowError::NoBitmap { .. })));
    let a = table(&[(4096, 1), (1 << 20, 3 << 20)]);
    image.write("a", &a, K64).unwrap();
    image
        .write("b", &table(&[(512, 512)]), options(9).auto(false))
        .unwrap();
    let list = image.bitmaps().unwrap();
    assert_eq!(list.len(), 2);
    assert!(list[0].auto && !list[0].in_use && list[0].granule == granule(64 << 10));
    assert!(!list[1].auto && list[1].granule == granule(512));
    assert_eq!(image.read("a").unwrap(), rounded(&a, 16, size));

    image.merge("b", &["a"]).unwrap();
    let sum = table(&[(0, 64 << 10), (1 << 20, 3 << 20)]);
    assert_eq!(image.read("b").unwrap(), sum);
    assert!(
        !image.bitmaps().unwrap()[1].auto,
        "a merge changes the content alone"
    );
    image
        .write("a", &RunTable::default(), BitmapOptions::new())
        .unwrap();
    assert!(image.read("a").unwrap().is_empty());

    // Into memory, of another granule.
    let mut words = [0u64; 3];
    let disk = IovaRange::from_len(Iova::MIN, size).unwrap();
    let view = UserBitmap::new(&mut words)
        .view(disk, granule(64 << 10))
        .unwrap();
    assert_eq!(image.or_into("b", &view).unwrap(), 1 + 48);
    assert_eq!(view.runs().collect::<RunTable>(), sum);

    image.remove("a").unwrap();
    image.remove("b").unwrap();
    assert_eq!(image.bitmaps().unwrap(), []);
    let len = image.into_file().len();
    // All clusters are free again, and used again.
    let mut image = Image::open(&mut file).unwrap();
    image.write("a", &a, K64).unwrap();
    drop(image);
    assert_eq!(file.len(), len, "the file does not grow");
}

/// A program that dies while it writes the disk leaves its bitmap in use. The program that opens
/// the image next is told that everything is dirty. Nothing but a whole new content changes that.
#[test]
fn a_bitmap_in_use_is_read_and_merged_by_no_one() {
    let mut file = image(1 << 20, 64 << 10);
    let mut image = Image::open(&mut file).unwrap();
    image.write("a", &table(&[(0, 1)]), K64).unwrap();
    image.write("b", &table(&[(1 << 19, 1)]), K64).unwrap();
    image.begin_use("a").unwrap();
    let mut image = Image::open(&mut file).unwrap();
    assert!(image.bitmaps().unwrap()[0].in_use);
    assert!(matches!(image.read("a"), Err(QcowError::InUse { name }) if name == "a"));
    assert!(matches!(
        image.merge("a", &["b"]),
        Err(QcowError::InUse { .. })
    ));
    assert!(matches!(
        image.merge("b", &["a"]),
        Err(QcowError::InUse { .. })
    ));
    assert_eq!(image.read("b").unwrap(), table(&[(1 << 19, 1 << 16)]));
    // Another bitmap is written, and this one stays in use.
    image
        .write("b", &table(&[(5, 1)]), BitmapOptions::new())
        .unwrap();
    assert!(image.bitmaps().unwrap()[0].in_use);
    image
        .write("a", &table(&[(7, 1)]), BitmapOptions::new())
        .unwrap();
    assert_eq!(image.read("a").unwrap(), table(&[(0, 1 << 16)]));
    image.begin_use("b").unwrap();
    image.remove("b").unwrap();
    assert_eq!(image.bitmaps().unwrap().len(), 1);
}

/// Whole clusters of ones and zeroes take no room, also where the last one is not full.
#[test]
fn clusters_of_ones_and_zeroes_are_not_stored() {
    // 4096 granules of 512 bytes in each cluster of bits, and three and a half of them.
    let size = 512 * 4096 * 7 / 2;
    let mut file = image(size, 512);
    let mut image = Image::open(&mut file).unwrap();
    let cluster = 512 * 4096;
    let runs = table(&[
        (0, cluster),
        (2 * cluster, cluster),
        (3 * cluster, cluster / 2),
    ]);
    image.write("a", &runs, options(9)).unwrap();
    assert_eq!(image.read("a").unwrap(), runs);
    let stored = image.into_file().len();
    let mut image = Image::open(&mut file).unwrap();
    image.write("a", &table(&[(0, 512)]), options(9)).unwrap();
    assert_eq!(image.read("a").unwrap(), table(&[(0, 512)]));
    let more = image.into_file().len();
    assert!(
        more > stored,
        "the other content has a cluster of bits: {stored} {more}"
    );
}

/// A program that does not know bitmaps clears a bit of the header when it writes. Then no bitmap
/// is believed.
#[test]
fn bitmaps_of_an_image_that_others_wrote_are_not_believed() {
    let mut file = image(1 << 20, 4096);
    let mut image = Image::open(&mut file).unwrap();
    image.write("a", &table(&[(0, 1)]), K64).unwrap();
    drop(image);
    file[95] &= !1;
    let mut image = Image::open(&mut file).unwrap();
    assert!(matches!(image.bitmaps(), Err(QcowError::Stale)));
    assert!(matches!(image.read("a"), Err(QcowError::Stale)));
    assert!(matches!(
        image.write("a", &table(&[]), K64),
        Err(QcowError::Stale)
    ));
    assert!(matches!(image.remove("a"), Err(QcowError::Stale)));
    image.discard().unwrap();
    assert_eq!(image.bitmaps().unwrap(), []);
    image.write("b", &table(&[(9, 1)]), K64).unwrap();
    assert_eq!(image.read("b").unwrap(), table(&[(0, 1 << 16)]));
}

#[test]
fn what_cannot_be_written_is_refused_before_anything_is_touched() {
    let mut file = image(1 << 20, 4096);
    let before = file.clone();
    let mut image = Image::open(&mut file).unwrap();
    let empty = RunTable::default();
    let said = |image: &mut Image<&mut Vec<u8>>, name: &str, runs: &RunTable, options| {
        image.write(name, runs, options).unwrap_err().to_string()
    };
    let past = table(&[(0, 1), (1 << 20, 1)]);
    assert_eq!(
        said(&mut image, "a", &past, K64),
        "the run [0x100000, 0x100000] lies past the end of the disk, which has 1048576 bytes"
    );
    assert_eq!(
        said(&mut image, "a", &empty, options(8)),
        "the granules of a bitmap are 256 B each, but 512 B to 2 GiB are possible"
    );
    assert!(said(&mut image, "", &empty, K64).contains("is 0, but 1 is the limit"));
    let long = "n".repeat(1024);
    assert!(said(&mut image, &long, &empty, K64).contains("is 1024, but 1023 is the limit"));
    drop(image);
    assert!(file == before);
    for (size, cluster) in [(0, 4096), (100, 4096), (1 << 20, 256), (1 << 40, 512)] {
        let refused = create_for_raw(&mut Vec::new(), "x", size, granule(cluster));
        assert!(refused.is_err(), "{size} {cluster}");
    }
    assert!(create_for_raw(&mut vec![1], "x", 512, granule(4096)).is_err());
    // 2^42 bits are more than QEMU reads.
    let mut file = self::image(4 << 40, 2 << 20);
    let mut image = Image::open(&mut file).unwrap();
    let refused = said(&mut image, "a", &empty, options(9));
    assert_eq!(
        refused,
        "the size of a bitmap in bytes is 1073741824, but 536870912 is the limit"
    );
}

/// An image with two bitmaps, and where things in it are.
fn sample() -> (Vec<u8>, usize, usize) {
    let mut file = image(4 << 20, 512);
    let mut image = Image::open(&mut file).unwrap();
    image
        .write("a", &table(&[(0, 1 << 16)]), options(9))
        .unwrap();
    image
        .write("b", &table(&[(1 << 16, 1 << 16)]), options(9))
        .unwrap();
    drop(image);
    let extension = file[..512]
        .windows(4)
        .position(|it| it == 0x2385_2875u32.to_be_bytes());
    let extension = extension.unwrap();
    let directory = u64::from_be_bytes(file[extension + 24..][..8].try_into().unwrap());
    (file, extension, directory as usize)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Any table comes back in whole granules, whatever was in the image before.
    #[test]
    fn tables_survive_an_image(
        tables in vec((0usize..3, vec((0u64..1 << 22, 1u64..1 << 20), 0..20), 9u8..20), 1..6),
        size in (1u64 << 13..(5u64 << 9) << 10).prop_map(|size| size / 512 * 512),
        cluster in 9u8..13,
    ) {
        let mut file = image(size, 1 << cluster);
        let mut expected = [const { None }; 3];
        for (nth, runs, lg2) in tables {
            let disk = IovaRange::from_len(Iova::MIN, size).unwrap();
            let runs = table(&runs);
            let runs: RunTable =
                runs.runs().iter().filter_map(|run| run.intersection(disk)).collect();
            let name = ["a", "b", "c"][nth];
            let mut image = Image::open(&mut file).unwrap();
            image.write(name, &runs, options(lg2)).unwrap();
            expected[nth] = Some(rounded(&runs, lg2, size));
        }
        let mut image = Image::open(&mut file).unwrap();
        for (name, expected) in ["a", "b", "c"].iter().zip(expected) {
            prop_assert_eq!(image.read(name).ok(), expected);
        }
    }

    /// Bytes that are not those of an image end in an error, and never in a panic.
    #[test]
    fn damage_never_panics(changes in vec((0usize..8192, any::<u8>()), 1..8)) {
        let (mut file, ..) = sample();
        for (at, byte) in changes {
            let len = file.len();
            file[at % len] = byte;
        }
        if let Ok(mut image) = Image::open(&mut file) {
            let _ = image.bitmaps();
            let _ = image.read("a");
            let _ = image.write("c", &table(&[(0, 5)]), K64);
            let _ = image.remove("b");
        }
    }
}
