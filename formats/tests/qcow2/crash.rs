//! Changes that are cut off: at each sector and each flush.

use std::io;

use dirtymap_formats::qcow2::ImageFile;

use super::*;

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

/// The bitmap takes more clusters than the blocks of refcounts count: a new block is there before
/// the table names it.
#[test]
fn a_new_block_of_refcounts_is_whole_before_it_is_named() {
    // With its metadata, 254 of 256 clusters.
    let file = image(247 * 64 * 512, 512);
    let entry = |file: &[u8]| u64::from_be_bytes(file[520..528].try_into().unwrap());
    assert_eq!((file.len(), entry(&file)), (254 * 512, 0));
    let new = table(&[(1 << 20, 1 << 16)]);
    crashes(
        &file,
        |image| image.write("it", &new, K64),
        |left| {
            let it = found(left.to_vec(), "it");
            assert!([Found::Absent, Found::Everything, Found::Runs(new.clone())].contains(&it));
        },
    );
    let mut file = file;
    Image::open(&mut file)
        .unwrap()
        .write("it", &new, K64)
        .unwrap();
    assert_eq!(entry(&file), 256 * 512);
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
