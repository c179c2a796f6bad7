//! Lengths that a file or a peer makes up: no reader takes memory by them.
//!
//! `ftruncate` sets the length of a file for nothing, so a length that fits the file is no reason
//! to believe it. An image of some kilobytes said that its refcount table has 36 GiB, and another
//! one that a bitmap's table has 16 GiB. Both ended the process that opened them, because the
//! allocator had no such block.
#![cfg(all(feature = "nbd", feature = "qcow2", feature = "rbd"))]
#![allow(clippy::unwrap_used)] // helpers of tests

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::io;

use dirtymap::exchange::RunTable;
use dirtymap::{Granule, Iova, IovaRange};
use dirtymap_formats::nbd::{Connect, Export, serve};
use dirtymap_formats::qcow2::{BitmapOptions, Image, ImageFile, QcowError, create_for_raw};
use dirtymap_formats::rbd::{Reader, merge};
use proptest::collection::vec;
use proptest::prelude::*;

/// What [`Image`] says that it takes, at most.
const QCOW2: u64 = 512 << 20;
/// Connections and increments hold buffers alone.
const STREAMS: u64 = 1 << 20;

/// Counts the bytes that this thread holds, and the most of them at a time.
struct Counting;

thread_local! {
    static HELD: Cell<i64> = const { Cell::new(0) };
    static MOST: Cell<i64> = const { Cell::new(0) };
}

fn count(bytes: i64) {
    let held = HELD.get() + bytes;
    HELD.set(held);
    MOST.set(MOST.get().max(held));
}

// SAFETY: hands everything on to the system's allocator, as it came.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as i64);
        // SAFETY: by the caller.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as i64);
        // SAFETY: by the caller.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        count(-(layout.size() as i64));
        // SAFETY: by the caller; every block came from `System`.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// What `work` returns, and the most bytes that it held at a time.
fn most<T>(work: impl FnOnce() -> T) -> (T, u64) {
    let before = HELD.get();
    MOST.set(before);
    let done = work();
    (done, (MOST.get() - before) as u64)
}

/// A sparse file: some bytes, and then a hole of any length, which reads as zero.
#[derive(Clone, Debug)]
struct Sparse {
    bytes: Vec<u8>,
    len: u64,
}

impl ImageFile for Sparse {
    fn length(&mut self) -> io::Result<u64> {
        Ok(self.len)
    }

    fn read_at(&mut self, at: u64, buf: &mut [u8]) -> io::Result<()> {
        if at
            .checked_add(buf.len() as u64)
            .is_none_or(|end| end > self.len)
        {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        assert!(buf.len() as u64 <= QCOW2, "a read of {} bytes", buf.len());
        buf.fill(0);
        let known = self.bytes.get(at as usize..).unwrap_or_default();
        let len = known.len().min(buf.len());
        buf[..len].copy_from_slice(&known[..len]);
        Ok(())
    }

    /// Keeps what falls on bytes that are there. The hole stays one.
    fn write_at(&mut self, at: u64, bytes: &[u8]) -> io::Result<()> {
        let known = self.bytes.get_mut(at as usize..).unwrap_or_default();
        let len = known.len().min(bytes.len());
        known[..len].copy_from_slice(&bytes[..len]);
        self.len = self.len.max(at.saturating_add(bytes.len() as u64));
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// An image with two bitmaps, in a file with a hole up to `len`; its extension and its directory.
fn image(len: u64, cluster: u64) -> (Sparse, usize, usize) {
    let mut bytes = Vec::new();
    let cluster = Granule::from_bytes(cluster).unwrap();
    create_for_raw(&mut bytes, "disk.raw", 1 << 20, cluster).unwrap();
    let mut image = Image::open(&mut bytes).unwrap();
    for name in ["a", "b"] {
        image.write(name, &dirty(), BitmapOptions::new()).unwrap();
    }
    let mark = 0x2385_2875u32.to_be_bytes();
    let extension = bytes.windows(4).position(|it| it == mark).unwrap();
    let directory = u64::from_be_bytes(bytes[extension + 24..][..8].try_into().unwrap());
    (Sparse { bytes, len }, extension, directory as usize)
}

fn dirty() -> RunTable {
    [IovaRange::from_len(Iova::MIN, 4096).unwrap()]
        .into_iter()
        .collect()
}

fn put(file: &mut Sparse, at: usize, bytes: &[u8]) {
    file.bytes[at..][..bytes.len()].copy_from_slice(bytes);
}

/// The header names a refcount table of 36 GiB, in the hole of a file of 40 GiB.
#[test]
fn a_refcount_table_of_36_gib_is_refused_before_it_is_read() {
    let (mut file, ..) = image(40 << 30, 65536);
    put(&mut file, 48, &(1u64 << 30).to_be_bytes());
    put(&mut file, 56, &(36u32 << 14).to_be_bytes());
    let (error, held) = most(|| Image::open(file).unwrap_err());
    assert_eq!(
        error.to_string(),
        "the size of the refcount table in bytes is 38654705664, but 8388608 is the limit"
    );
    assert!(held < STREAMS, "{held}");
}

/// An entry of the directory names a table of 16 GiB. Such a bitmap is not read, and the other one
/// is. Neither a new content nor a removal looks into the table.
#[test]
fn a_table_that_is_not_that_of_the_disk_is_not_read() {
    let (mut file, _, directory) = image(40 << 30, 65536);
    put(&mut file, directory, &(1u64 << 30).to_be_bytes());
    put(&mut file, directory + 8, &0x7fff_ffffu32.to_be_bytes());
    file.bytes.resize(2 << 20, 0); // room for what is written
    let open = || Image::open(file.clone());
    let ((), held) = most(|| {
        let mut image = open().unwrap();
        let said = format!(
            "the size of a bitmap's table at byte {:#x} is 2147483647, but the disk and the \
             granule give 1: the disk has another size, so all of it counts as dirty",
            directory + 8
        );
        assert_eq!(image.read("a").unwrap_err().to_string(), said);
        assert_eq!(image.bitmaps().unwrap().len(), 2);
        assert!(!image.read("b").unwrap().is_empty());
        assert!(matches!(
            image.merge("a", &["b"]),
            Err(QcowError::TableSize { .. })
        ));
        open().unwrap().remove("a").unwrap();
        let mut image = open().unwrap();
        image.write("a", &dirty(), BitmapOptions::new()).unwrap();
        assert_eq!(image.read("a").unwrap(), image.read("b").unwrap());
    });
    assert!(held < 16 << 20, "{held}");
}

/// A disk of 2^63 - 1 bytes gives a bitmap of 2^54 bits, so its table has the size that it has to
/// have. QEMU has a limit for such a bitmap, which counts here too.
#[test]
fn a_bitmap_of_more_bits_than_qemu_takes_is_not_read() {
    let (mut file, _, directory) = image(1 << 50, 2 << 20);
    put(&mut file, 24, &(i64::MAX as u64).to_be_bytes());
    put(&mut file, directory, &(1u64 << 40).to_be_bytes());
    put(&mut file, directory + 8, &(1u32 << 30).to_be_bytes());
    put(&mut file, directory + 17, &[9]);
    let (error, held) = most(|| {
        Image::open(file)
            .and_then(|mut it| it.read("a"))
            .unwrap_err()
    });
    assert_eq!(
        error.to_string(),
        "the size of a bitmap in bytes is 2251799813685248, but 536870912 is the limit"
    );
    assert!(held < 16 << 20, "{held}");
}

/// Sixteen tables that are each as long as they may be are all that is taken. One more is refused,
/// by the reader in an image, and by the writer before it touches the image.
#[test]
fn the_tables_of_all_bitmaps_together_have_a_limit() {
    for (bitmaps, fits) in [(16, true), (17, false)] {
        let (mut file, extension, directory) = image(1 << 50, 2048);
        put(&mut file, 24, &(1u64 << 41).to_be_bytes()); // 2^18 entries in each table
        let mut entries = Vec::new();
        for nth in 0..bitmaps {
            entries.extend(((1u64 << 40) + (nth << 30)).to_be_bytes());
            entries.extend((1u32 << 18).to_be_bytes());
            entries.extend(b"\0\0\0\0\x01\x09\0\x01\0\0\0\0");
            entries.extend([b'a' + nth as u8, 0, 0, 0, 0, 0, 0, 0]);
        }
        put(&mut file, directory, &entries);
        put(&mut file, extension + 8, &(bitmaps as u32).to_be_bytes());
        put(
            &mut file,
            extension + 16,
            &(entries.len() as u64).to_be_bytes(),
        );
        let (opened, held) = most(|| Image::open(file.clone()));
        assert!(held < 64 << 20, "{held}");
        let said =
            "the number of entries of all bitmaps' tables is 4456448, but 4194304 is the limit";
        match opened {
            Ok(mut image) if fits => {
                assert!(image.read("a").unwrap().is_empty());
                let options = BitmapOptions::new().granule(Granule::from_bytes(512).unwrap());
                let refused = image.write("one more", &RunTable::default(), options);
                assert_eq!(refused.unwrap_err().to_string(), said);
                assert!(image.into_file().bytes == file.bytes);
            }
            opened => assert_eq!(opened.unwrap_err().to_string(), said, "{fits}"),
        }
    }
}

/// A client: it selects no context, chooses the export, and reads 512 bytes.
const HELLO: &[u8] = b"\0\0\0\x03IHAVEOPT\0\0\0\x0a\0\0\0\x08\0\0\0\0\0\0\0\0\
    IHAVEOPT\0\0\0\x08\0\0\0\0IHAVEOPT\0\0\0\x07\0\0\0\x06\0\0\0\0\0\0\
    \x25\x60\x95\x13\0\0\0\0\0\0\0\0\0\0\0\x01\0\0\0\0\0\0\0\0\0\0\x02\0";

/// A server: its side of a handshake, and one extent, which is dirty.
const OFFER: &[u8] = b"NBDMAGICIHAVEOPT\0\x03\
    \0\x03\xe8\x89\x04\x55\x65\xa9\0\0\0\x0b\0\0\0\x01\0\0\0\0\
    \0\x03\xe8\x89\x04\x55\x65\xa9\0\0\0\x0a\0\0\0\x04\0\0\0\x17\
    \0\0\0\x09qemu:dirty-bitmap:x\
    \0\x03\xe8\x89\x04\x55\x65\xa9\0\0\0\x0a\0\0\0\x01\0\0\0\0\
    \0\x03\xe8\x89\x04\x55\x65\xa9\0\0\0\x07\0\0\0\x03\0\0\0\x0c\
    \0\0\0\0\0\0\0\0\x03\xe8\0\x03\
    \0\x03\xe8\x89\x04\x55\x65\xa9\0\0\0\x07\0\0\0\x01\0\0\0\0\
    \x6e\x8a\x27\x8c\0\x01\0\x06\0\0\0\0\0\0\0\x01\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\x18\
    \0\0\0\x09\0\0\0\x01\0\0\0\0\0\0\x03\xe8\0\0\0\0\0\0\0\x01";

/// An increment of eight bytes.
const INCREMENT: &[u8] = b"rbd diff v1\nf\x03\0\0\0mont\x03\0\0\0mons\0\0\x10\0\0\0\0\0\
    w\0\0\0\0\0\0\0\0\x08\0\0\0\0\0\0\0datadatae";

/// What is forged below was good before.
#[test]
fn the_streams_that_are_forged_are_good_ones() {
    let disk = vec![7; 1000];
    let export = [Export::new("", 1000).unwrap().with_data(&disk)];
    assert_eq!(serve(Peer(HELLO), &export).unwrap().bytes_read, 512);
    let mut client = Connect::new("").dirty("x").over(Peer(OFFER)).unwrap();
    let all = IovaRange::from_len(Iova::MIN, 1000).unwrap();
    assert_eq!(client.read_dirty("x").unwrap().runs(), [all]);
    let runs = Reader::new(INCREMENT).unwrap().runs(1).unwrap();
    assert_eq!(runs.runs().len(), 1);
}

/// A number of any size: as many of small ones as of large ones.
fn number() -> impl Strategy<Value = u64> {
    (any::<u64>(), 0u32..64).prop_map(|(bits, shift)| bits >> shift)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Whatever lengths an image has, and however long the file is that they lie in, what is taken
    /// for them has a bound.
    #[test]
    fn an_image_of_any_lengths_takes_no_more_memory_than_it_says(
        len in number(),
        cluster in 9u32..22,
        changes in vec((0usize..16, number()), 1..6),
        whole: bool,
    ) {
        let (mut file, extension, directory) = image(len, 1 << cluster);
        file.len = file.len.max(file.bytes.len() as u64);
        // The parts lie apart from each other in the hole, if the file has so many bytes.
        let far = |nth: u64| ((1u64 << 40) + (nth << 36)).to_be_bytes();
        for (nth, (field, number)) in changes.into_iter().enumerate() {
            let (word, long) = ((number as u32).to_be_bytes(), number.to_be_bytes());
            match field {
                0 => put(&mut file, 24, &long), // the disk
                1 => put(&mut file, 36, &word), // the L1 table
                2 | 3 => {
                    put(&mut file, 48, &far(nth as u64));
                    put(&mut file, 56, &word);
                }
                4 => {
                    put(&mut file, 8, &104u64.to_be_bytes());
                    put(&mut file, 16, &word);
                }
                5 => put(&mut file, 100, &word),
                6 => put(&mut file, extension + 4, &word),
                7 => put(&mut file, extension + 8, &word),
                8 => put(&mut file, extension + 16, &long),
                9 => {
                    put(&mut file, extension + 16, &long);
                    put(&mut file, extension + 24, &far(nth as u64));
                }
                10..=12 => {
                    put(&mut file, directory, &far(nth as u64));
                    put(&mut file, directory + 8, &word);
                    if whole {
                        // As long as the disk has it, for a granule of 512 bytes.
                        let size = u64::from_be_bytes(file.bytes[24..32].try_into().unwrap());
                        let entries = size.div_ceil(512 * 8).div_ceil(1 << cluster) as u32;
                        put(&mut file, directory + 8, &entries.to_be_bytes());
                        put(&mut file, directory + 17, &[9]);
                    }
                }
                13 => put(&mut file, directory + 17, &[9 + number as u8 % 23]),
                14 => put(&mut file, directory + 18, &word[2..]),
                _ => put(&mut file, directory + 20, &word),
            }
        }
        let ((), held) = most(|| {
            if let Ok(mut image) = Image::open(&mut file) {
                image.set_max_runs(1 << 10);
                let _ = image.read("a");
                let _ = image.write("c", &dirty(), BitmapOptions::new());
            }
            for name in ["a", "b"] {
                if let Ok(mut image) = Image::open(&mut file) {
                    let _ = image.remove(name);
                }
            }
        });
        prop_assert!(held < QCOW2, "{held}");
    }

    /// Numbers of any size at any place of a connection or of an increment take no memory either.
    #[test]
    fn streams_of_any_lengths_take_no_more_memory_than_their_buffers(
        at in 0usize..320,
        number in number(),
        word: bool,
    ) {
        let forge = |bytes: &[u8]| {
            let mut bytes = [bytes, &[0; 8]].concat();
            let at = at % (bytes.len() - 8);
            match word {
                true => bytes[at..][..4].copy_from_slice(&(number as u32).to_be_bytes()),
                false => bytes[at..][..8].copy_from_slice(&number.to_be_bytes()),
            }
            bytes
        };
        let disk = vec![7; 1000];
        let export = [Export::new("", 1000).unwrap().with_data(&disk)];
        let hello = forge(HELLO);
        let (_, held) = most(|| serve(Peer(&hello), &export));
        prop_assert!(held < STREAMS, "a server: {held}");

        let offer = forge(OFFER);
        let (_, held) = most(|| {
            let mut client = Connect::new("").dirty("x").over(Peer(&offer))?;
            client.read_dirty("x")
        });
        prop_assert!(held < STREAMS, "a client: {held}");

        let increment = forge(INCREMENT);
        let (_, held) = most(|| Reader::new(&increment[..]).and_then(|mut it| it.runs(100)));
        prop_assert!(held < STREAMS, "an increment: {held}");
        let (_, held) = most(|| merge(&increment[..], &increment[..], io::sink()));
        prop_assert!(held < STREAMS, "a merge: {held}");
    }
}

/// A peer that has said all of it, and takes anything.
struct Peer<'a>(&'a [u8]);

impl io::Read for Peer<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.0.read(buf)
    }
}

impl io::Write for Peer<'_> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        Ok(buf.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
