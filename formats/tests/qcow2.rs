//! Bitmaps in qcow2 images: written and read back, cut off at every write, and damaged.
#![cfg(feature = "qcow2")]
#![allow(clippy::unwrap_used)]

use std::io;

use dirtymap::exchange::RunTable;
use dirtymap::{Granule, Iova, IovaRange, UserBitmap};
use dirtymap_formats::qcow2::{BitmapOptions, Image, ImageFile, QcowError, create_for_raw};
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

/// A file whose writes are cut into sectors and counted, and that fails after so many of them.
#[derive(Clone, Debug)]
struct Cut {
    durable: Vec<u8>,
    /// Sectors that are written and not flushed: where, and what.
    waiting: Vec<(u64, Vec<u8>)>,
    left: usize,
}

impl Cut {
    fn after(durable: Vec<u8>, left: usize) -> Self {
        let waiting = Vec::new();
        Cut {
            durable,
            waiting,
            left,
        }
    }

    fn current(&self) -> Vec<u8> {
        let mut all = self.durable.clone();
        for (at, bytes) in &self.waiting {
            all.write_at(*at, bytes).unwrap();
        }
        all
    }

    /// What a crash leaves: all that was flushed, and of the rest the sectors that `keep` chooses.
    fn crash(&self, keep: impl Fn(usize) -> bool) -> Vec<u8> {
        let mut left = self.durable.clone();
        for (nth, (at, bytes)) in self.waiting.iter().enumerate() {
            if keep(nth) {
                left.write_at(*at, bytes).unwrap();
            }
        }
        left
    }
}

impl ImageFile for Cut {
    fn length(&mut self) -> io::Result<u64> {
        Ok(self.current().len() as u64)
    }

    fn read_at(&mut self, at: u64, buf: &mut [u8]) -> io::Result<()> {
        self.current().read_at(at, buf)
    }

    fn write_at(&mut self, mut at: u64, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            if self.left == 0 {
                return Err(io::Error::other("the power is gone"));
            }
            self.left -= 1;
            let sector = 512 - at as usize % 512;
            let (part, rest) = bytes.split_at(sector.min(bytes.len()));
            self.waiting.push((at, part.to_vec()));
            at += part.len() as u64;
            bytes = rest;
        }
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        if self.left == 0 {
            return Err(io::Error::other("the power is gone"));
        }
        self.left -= 1;
        self.durable = self.current();
        self.waiting.clear();
        Ok(())
    }
}

/// What a bitmap is after a crash.
#[derive(Debug, PartialEq)]
enum Found {
    Absent,
    /// In use, or the image says that nothing is true.
    Everything,
    Runs(RunTable),
}

fn found(file: Vec<u8>, name: &str) -> Found {
    let mut image = Image::open(file).unwrap_or_else(|error| panic!("{error}"));
    match image.read(name) {
        Ok(runs) => Found::Runs(runs),
        Err(QcowError::NoBitmap { .. }) => Found::Absent,
        Err(QcowError::InUse { .. } | QcowError::Stale) => Found::Everything,
        Err(error) => panic!("{error}"),
    }
}

/// Runs `change` with a crash after each write and each flush, with every sector that was not
/// flushed there, none of them, each of them missing and each of them alone. `check` gets what is
/// left.
fn crashes(
    before: &[u8],
    change: impl Fn(&mut Image<Cut>) -> Result<(), QcowError>,
    check: impl Fn(&[u8]),
) -> usize {
    for left in 0.. {
        let file = Cut::after(before.to_vec(), left);
        let mut image = Image::open(file).unwrap();
        let done = change(&mut image).is_ok();
        let file = image.into_file();
        let check = |left: &[u8]| {
            check(left);
            usable(left);
        };
        check(&file.crash(|_| true));
        check(&file.crash(|_| false));
        for only in 0..file.waiting.len() {
            check(&file.crash(|nth| nth == only));
            check(&file.crash(|nth| nth != only));
        }
        if done {
            return left;
        }
    }
    0
}

/// What is left can be used: no cluster that is named counts as free, so that the next bitmap harms
/// no other.
fn usable(left: &[u8]) {
    let mut file = left.to_vec();
    let mut image = Image::open(&mut file).unwrap();
    image.discard().unwrap();
    let before: Vec<_> = image
        .bitmaps()
        .unwrap()
        .into_iter()
        .map(|it| it.name)
        .collect();
    let before: Vec<_> = before
        .iter()
        .map(|it| (it, found(left.to_vec(), it)))
        .collect();
    let third = table(&[(1 << 18, 1 << 16), (5 << 18, 1 << 16)]);
    image.write("third", &third, options(9)).unwrap();
    assert_eq!(image.read("third").unwrap(), third);
    drop(image);
    for (name, then) in before {
        assert_eq!(found(file.clone(), name), then);
    }
}

/// Every cut leaves an image that opens, in which the bitmap is the old one, the new one or not to
/// be believed, and the other bitmap is what it was, or not to be believed either.
#[test]
fn a_write_that_is_cut_off_leaves_the_old_the_new_or_everything() {
    let size = 4 << 20;
    let other = table(&[(1 << 20, 1 << 16)]);
    let (old, new) = (
        table(&[(0, 1 << 16)]),
        table(&[(2 << 20, 1 << 16), (3 << 20, 1 << 16)]),
    );
    let mut file = image(size, 512);
    let empty = file.clone();
    let mut image = Image::open(&mut file).unwrap();
    image.write("other", &other, K64).unwrap();
    image.write("it", &old, K64).unwrap();
    drop(image);
    let known = |file: &[u8], expected: &[Found]| {
        let it = found(file.to_vec(), "it");
        assert!(it == Found::Everything || expected.contains(&it), "{it:?}");
        let it = found(file.to_vec(), "other");
        assert!(
            it == Found::Everything || it == Found::Runs(other.clone()),
            "{it:?}"
        );
    };
    let states = [Found::Runs(old.clone()), Found::Runs(new.clone())];
    let steps = crashes(
        &file,
        |image| image.write("it", &new, K64),
        |left| known(left, &states),
    );
    assert!(steps > 10, "{steps}");
    let states = [Found::Runs(old.clone()), Found::Absent];
    crashes(
        &file,
        |image| image.remove("it"),
        |left| known(left, &states),
    );
    let states = [
        Found::Runs(old.clone()),
        Found::Runs(table(&[(0, 1 << 16), (1 << 20, 1 << 16)])),
    ];
    crashes(
        &file,
        |image| image.merge("it", &["other"]),
        |left| known(left, &states),
    );
    crashes(
        &file,
        |image| image.begin_use("it"),
        |left| known(left, &[Found::Runs(old.clone())]),
    );
    // The first bitmap of an image, and the last.
    let states = [Found::Absent, Found::Everything, Found::Runs(new.clone())];
    crashes(
        &empty,
        |image| image.write("it", &new, K64),
        |left| {
            let it = found(left.to_vec(), "it");
            assert!(states.contains(&it), "{it:?}");
        },
    );
    let mut single = empty.clone();
    Image::open(&mut single)
        .unwrap()
        .write("it", &new, K64)
        .unwrap();
    crashes(
        &single,
        |image| image.remove("it"),
        |left| {
            let it = found(left.to_vec(), "it");
            assert!(states.contains(&it), "{it:?}");
        },
    );
}

/// The first bitmap of an overlay takes the place of its backing file's name, which moves. At every
/// moment the header leads to the name.
#[test]
fn the_name_of_the_backing_file_moves_and_is_never_lost() {
    let mut file = image(4 << 20, 512);
    // The extensions of this image end with a mark at 120.
    assert_eq!(file[112..128], *b"disk.raw\0\0\0\0\0\0\0\0");
    file[128..140].copy_from_slice(b"base.img and");
    file[8..16].copy_from_slice(&128u64.to_be_bytes());
    file[16..20].copy_from_slice(&8u32.to_be_bytes());
    let new = table(&[(1 << 20, 1 << 16)]);
    crashes(
        &file,
        |image| image.write("it", &new, K64),
        |left| {
            let at = u64::from_be_bytes(left[8..16].try_into().unwrap()) as usize;
            assert_eq!(left[at..at + 8], *b"base.img");
            let it = found(left.to_vec(), "it");
            assert!([Found::Absent, Found::Everything, Found::Runs(new.clone())].contains(&it));
        },
    );
    // A name that leaves no room is a refusal.
    file[8..16].copy_from_slice(&504u64.to_be_bytes());
    file[100..104].copy_from_slice(&480u32.to_be_bytes());
    file[480..504].fill(0);
    let before = file.clone();
    let mut image = Image::open(&mut file).unwrap();
    let error = image.write("it", &new, K64).unwrap_err();
    assert!(error.to_string().contains("40 bytes are needed"), "{error}");
    drop(image);
    assert!(file == before);
}

/// Bits of the header whose meaning is not known here are cleared by every change: they say that
/// the image was written by a program that knows them.
#[test]
fn unknown_features_that_a_writer_has_to_clear_are_cleared() {
    let (good, ..) = sample();
    type Change = fn(&mut Image<&mut Vec<u8>>) -> Result<(), QcowError>;
    let changes: [Change; 3] = [
        |image| image.begin_use("a"),
        |image| image.write("c", &RunTable::default(), K64),
        |image| image.remove("a"),
    ];
    for change in changes {
        let mut file = good.clone();
        file[88] = 0x80;
        let mut image = Image::open(&mut file).unwrap();
        change(&mut image).unwrap();
        drop(image);
        assert_eq!(file[88..96], 3u64.to_be_bytes(), "bitmaps, raw disk");
    }
}

/// The old content is not believed any more once the new one has begun: the flag is durable before
/// anything else is written.
#[test]
fn a_bitmap_is_in_use_before_anything_else_is_written() {
    let mut file = image(4 << 20, 512);
    let old = table(&[(0, 1 << 16)]);
    Image::open(&mut file)
        .unwrap()
        .write("it", &old, K64)
        .unwrap();
    // One sector and one flush.
    for left in 2.. {
        let mut image = Image::open(Cut::after(file.clone(), left)).unwrap();
        let done = image.write("it", &table(&[(1 << 20, 1)]), K64).is_ok();
        let durable = found(image.into_file().durable, "it");
        assert_ne!(durable, Found::Runs(old.clone()), "after {left}");
        if done {
            return;
        }
    }
}

/// After a write that failed, nothing more is written through the same image.
#[test]
fn an_image_whose_change_failed_is_opened_again() {
    let file = Cut::after(image(1 << 20, 512), 5);
    let mut image = Image::open(file).unwrap();
    assert!(matches!(
        image.write("a", &table(&[(0, 1)]), K64),
        Err(QcowError::Io { .. })
    ));
    let again = image.write("a", &table(&[(0, 1)]), K64).unwrap_err();
    assert!(
        again.to_string().contains("open the image again"),
        "{again}"
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

#[test]
fn damage_is_refused_with_the_place() {
    let (good, extension, directory) = sample();
    let said = |at: usize, bytes: &[u8]| {
        let mut file = good.clone();
        file[at..at + bytes.len()].copy_from_slice(bytes);
        let said = Image::open(file).and_then(|mut image| image.read("a"));
        said.unwrap_err().to_string()
    };
    assert!(said(0, b"qcow").contains("the magic number at byte 0x0 is 0x71636f77"));
    assert!(said(7, &[2]).contains("bitmaps need version 3"));
    assert!(said(23, &[30]).contains("the size of a cluster at byte 0x14 is 0x1e"));
    assert!(said(72, &[1]).contains("some of them are not known here"));
    assert!(said(extension + 7, &[25]).contains("the length of the bitmaps' extension"));
    assert!(said(extension + 4, &[0xff]).contains("the length of an extension"));
    let count = said(extension + 8, &[0xff]);
    assert!(count.contains("the number of bitmaps"), "{count}");
    let count = said(extension + 11, &[3]);
    assert!(
        count.contains("the size of the bitmaps' directory"),
        "{count}"
    );
    let count = said(extension + 11, &[1]);
    assert!(count.contains("more or fewer entries"), "{count}");
    // A directory of 2^60 bytes takes no memory.
    assert!(said(extension + 16, &[0x10]).contains("the size of the bitmaps' directory"));
    let outside = said(extension + 24, &[0x10]);
    assert!(
        outside.contains("the bitmaps' directory at byte 0x10000"),
        "{outside}"
    );
    assert!(said(extension + 31, &[1]).contains("no multiple of the size of a cluster"));
    let overlap = said(extension + 24, &[0, 0, 0, 0, 0, 0, 2, 0]);
    assert!(!overlap.is_empty());

    // Of the first entry: a table outside, one of another length, one that is the directory.
    let table_at = u64::from_be_bytes(good[directory..][..8].try_into().unwrap()) as usize;
    let outside = said(directory, &[0x10]);
    assert!(
        outside.contains("cannot be accessed") || outside.contains("overlap"),
        "{outside}"
    );
    let long = said(directory + 8, &[0xff]);
    assert!(!long.is_empty(), "{long}");
    assert!(said(directory + 17, &[8]).contains("the granule of a bitmap"));
    assert!(said(directory + 17, &[12]).contains("the disk has another size"));
    assert!(said(directory + 18, &[0xff]).contains("the length of an entry"));
    assert!(said(directory + 20, &[0xff]).contains("the length of an entry"));
    assert!(said(directory + 15, &[1]).contains("is in use"));
    assert!(said(directory + 16, &[2]).contains("not known here"));
    let same = said(directory, &(directory as u64).to_be_bytes());
    assert!(same.contains("overlap"), "{same}");

    // Of the table: a bit that has no meaning, a cluster outside, the header as a cluster.
    assert!(said(table_at, &[0x80]).contains("an entry of a bitmap's table"));
    let outside = said(table_at, &[0, 0xf0]);
    assert!(
        outside.contains("the bits of a bitmap at byte 0xf0"),
        "{outside}"
    );
    let second = good[table_at..][..8].to_vec();
    let same = said(table_at + 8, &second);
    assert!(same.contains("overlap"), "one cluster twice: {same}");
    let table = said(table_at, &(table_at as u64).to_be_bytes());
    assert!(table.contains("overlap"), "{table}");
}

/// The disk ends inside of a byte of bits, and bits past it are no part of it.
#[test]
fn bits_past_the_end_of_the_disk_are_refused() {
    let mut file = image(3 * 512, 512);
    let mut image = Image::open(&mut file).unwrap();
    image
        .write("a", &table(&[(0, 1), (1024, 1)]), options(9))
        .unwrap();
    assert_eq!(image.read("a").unwrap(), table(&[(0, 512), (1024, 512)]));
    drop(image);
    let bits = file.iter().rposition(|&byte| byte == 0b101).unwrap();
    file[bits] = 0b1101;
    let error = Image::open(&mut file).unwrap().read("a").unwrap_err();
    assert!(
        error
            .to_string()
            .contains("a bit past the end of the disk is set"),
        "{error}"
    );
}

/// A cluster that something else uses too is not written to, and not freed.
#[test]
fn clusters_with_other_counts_are_not_freed() {
    let (mut file, _, directory) = sample();
    let refcount_block = u64::from_be_bytes(file[512..520].try_into().unwrap()) as usize;
    let of = refcount_block + directory / 512 * 2 + 1;
    assert_eq!(file[of], 1);
    file[of] = 2;
    let before = file.clone();
    let mut image = Image::open(&mut file).unwrap();
    let error = image.remove("a").unwrap_err();
    assert!(
        error
            .to_string()
            .contains("the refcount of a bitmap's cluster"),
        "{error}"
    );
    assert!(image.write("a", &table(&[]), K64).is_err());
    drop(image);
    assert!(file == before);
    // Counts that call the header free are not believed.
    file[of] = 1;
    file[refcount_block..][..80].fill(0);
    let mut image = Image::open(&mut file).unwrap();
    let error = image.write("c", &table(&[]), K64).unwrap_err();
    assert!(error.to_string().contains("qemu-img check"), "{error}");
}

#[test]
fn an_image_that_needs_repair_is_read_and_not_written() {
    let (mut file, ..) = sample();
    for bit in [1, 2] {
        file[79] = 4 | bit;
        let mut image = Image::open(&mut file).unwrap();
        assert!(image.read("a").is_ok());
        let error = image.write("a", &table(&[]), K64).unwrap_err();
        assert!(error.to_string().contains("it needs repair"), "{error}");
    }
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
