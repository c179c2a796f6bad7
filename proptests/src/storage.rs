//! Peers and files from anywhere: what the readers of `dirtymap-formats` take adds up, and what
//! they refuse ends in a typed error.

use std::io::{self, Cursor, Read, Write};

use dirtymap::exchange::RunTable;
use dirtymap::{Granule, Iova, IovaRange};
use dirtymap_formats::nbd::{Connect, Export, serve};
use dirtymap_formats::qcow2::{BitmapOptions, Image, create_for_raw};
use dirtymap_formats::rbd::{Reader, Record, Writer, merge};

/// Bytes of the disk that is served.
const DISK: u64 = 1 << 16;

/// A peer of which all bytes are known in advance, and that forgets what it gets.
struct Script(Cursor<Vec<u8>>);

impl Read for Script {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.0.read(buf)
    }
}

impl Write for Script {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        Ok(buf.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn table(runs: &[(u64, u64)]) -> Result<RunTable, String> {
    let run = |&(start, len): &(u64, u64)| IovaRange::from_len(Iova::new(start), len);
    let runs: Result<RunTable, _> = runs.iter().map(run).collect();
    runs.map_err(text)
}

fn text(error: impl ToString) -> String {
    error.to_string()
}

/// The first byte says how far the peer keeps to the protocol before the rest of `bytes` follows.
fn script(bytes: &[u8], steps: &[&[u8]]) -> Script {
    let (first, rest) = bytes.split_first().unwrap_or((&0, &[]));
    let steps = &steps[..usize::from(*first) % (steps.len() + 1)];
    Script(Cursor::new([&steps.concat(), rest].concat()))
}

/// A client that sends these bytes is served, or refused with an error. Says how many requests were
/// served before it said that it is done.
///
/// # Errors
/// What does not add up, if it was served.
pub fn check_nbd_client(bytes: &[u8]) -> Result<u64, String> {
    let data = vec![7; DISK as usize];
    let dirty = table(&[(0, 1), (4096, 8192), (DISK - 1, 100)])?;
    let export = Export::new("x", DISK).map_err(text)?.with_data(&data);
    let exports = [export.with_dirty("b", dirty).map_err(text)?];
    let client = script(
        bytes,
        &[
            &[0, 0, 0, 3],
            b"IHAVEOPT\0\0\0\x0b\0\0\0\0",
            b"IHAVEOPT\0\0\0\x0a\0\0\0\x20\0\0\0\x01x\0\0\0\x01\0\0\0\x13qemu:dirty-bitmap:b",
            b"IHAVEOPT\0\0\0\x07\0\0\0\x07\0\0\0\x01x\0\0",
        ],
    );
    let len = client.0.get_ref().len() as u64;
    let Ok(session) = serve(client, &exports) else {
        return Ok(0);
    };
    // A request has at least 28 bytes, and one for status at most six extents in each context.
    let replies = session.status_replies;
    if session.requests > len / 28
        || session.extents > 6 * replies
        || session.bytes_read > session.requests * DISK
        || session.refused > session.requests
    {
        return Err(format!("{session:?} of {len} bytes"));
    }
    Ok(session.requests - session.refused)
}

/// A server that sends these bytes is read, or refused with an error. Says whether a bitmap and
/// data were read.
///
/// # Errors
/// What does not add up, if it was read.
pub fn check_nbd_server(bytes: &[u8]) -> Result<[bool; 2], String> {
    const REPLY: &[u8] = b"\x00\x03\xe8\x89\x04\x55\x65\xa9";
    let select = [
        REPLY,
        b"\0\0\0\x0a\0\0\0\x04\0\0\0\x17\0\0\0\x09qemu:dirty-bitmap:b",
        REPLY,
        b"\0\0\0\x0a\0\0\0\x01\0\0\0\0",
    ];
    let go = [
        REPLY,
        b"\0\0\0\x07\0\0\0\x03\0\0\0\x0c\0\0\0\0\0\0\0\x01\0\0\x01\x03",
        REPLY,
        b"\0\0\0\x07\0\0\0\x01\0\0\0\0",
    ];
    let server = script(
        bytes,
        &[
            b"NBDMAGICIHAVEOPT\0\x03",
            &[REPLY, b"\0\0\0\x0b\0\0\0\x01\0\0\0\0"].concat(),
            &select.concat(),
            &go.concat(),
        ],
    );
    let connect = Connect::new("x").dirty("b").max_runs(100);
    let Ok(mut client) = connect.over(server) else {
        return Ok([false; 2]);
    };
    let size = client.size();
    let runs = client.read_dirty("b");
    if let Ok(runs) = &runs {
        let last = runs.runs().last().map(|run| run.last().get());
        if runs.runs().len() > 100 || last.is_some_and(|last| last >= size) {
            return Err(format!("{runs:?} of a disk of {size} bytes"));
        }
    }
    let data = client.read_at(&mut [0; 100], 5);
    Ok([runs.is_ok(), data.is_ok()])
}

thread_local! {
    /// The image is made once.
    static SAMPLE: Result<Vec<u8>, String> = sample();
}

/// An image with two bitmaps, for readers that are to get further than its header.
fn sample() -> Result<Vec<u8>, String> {
    let mut file = Vec::new();
    let cluster = Granule::from_bytes(512).map_err(text)?;
    create_for_raw(&mut file, "raw", 4 << 20, cluster).map_err(text)?;
    let mut image = Image::open(&mut file).map_err(text)?;
    let options = BitmapOptions::new().granule(cluster);
    for (name, runs) in [
        ("a", &[(0, 4096)][..]),
        ("b", &[(0, 2 << 20), (3 << 20, 1)]),
    ] {
        image.write(name, &table(runs)?, options).map_err(text)?;
    }
    Ok(file)
}

/// An image of these bytes is read, and written, or refused with an error. With an odd first byte
/// the rest is changes of a good image: two bytes for the place, and one for what is there then.
/// Says how many bitmaps were read, if it could be written too.
///
/// # Errors
/// What does not add up, if it was read or written.
pub fn check_qcow2(bytes: &[u8]) -> Result<usize, String> {
    let mut file = match bytes.split_first() {
        Some((first, changes)) if first % 2 == 1 => {
            let mut file = SAMPLE.with(Clone::clone)?;
            for change in changes.chunks_exact(3) {
                let at = usize::from(u16::from_le_bytes([change[0], change[1]]));
                let len = file.len();
                file[at % len] = change[2];
            }
            file
        }
        Some((_, rest)) => rest.to_vec(),
        None => Vec::new(),
    };
    let Ok(mut image) = Image::open(&mut file) else {
        return Ok(0);
    };
    image.set_max_runs(1 << 16);
    let size = image.size();
    let bitmaps = image.bitmaps().unwrap_or_default();
    let mut before = Vec::new();
    for bitmap in bitmaps {
        let runs = image.read(&bitmap.name);
        if let Ok(runs) = &runs
            && runs.runs().iter().any(|run| run.last().get() >= size)
        {
            return Err(format!("{bitmap:?} has {runs:?} of a disk of {size} bytes"));
        }
        before.push((bitmap.name, runs.ok()));
    }
    // A bitmap that was written is there, and all others are as they were.
    let new = "a bitmap of no other";
    let runs = table(&[(0, 1)])?;
    let options = BitmapOptions::new().granule(Granule::M2);
    if image.write(new, &runs, options).is_err() {
        return Ok(0);
    }
    let mut image = Image::open(&mut file).map_err(text)?;
    image.set_max_runs(1 << 16);
    let known = before.iter().filter(|(_, runs)| runs.is_some()).count();
    for (name, runs) in before {
        let now = image.read(&name).ok();
        if now != runs {
            return Err(format!("{name:?} was {runs:?} and is {now:?}"));
        }
    }
    let read = image.read(new).map_err(text)?;
    let whole = table(&[(0, size.min(Granule::M2.bytes()))])?;
    match read == whole {
        true => Ok(known),
        false => Err(format!("{read:?} in place of {whole:?}")),
    }
}

/// An increment of these bytes is read, or refused with an error. What is read would be written in
/// the same way, and merges with itself. With an odd first byte the rest follows a good beginning.
/// Says whether it was read.
///
/// # Errors
/// What does not add up, if it was read.
pub fn check_rbd(bytes: &[u8]) -> Result<bool, String> {
    let begin = b"rbd diff v1\nf\x01\0\0\0at\x01\0\0\0as\0\x10\0\0\0\0\0\0";
    let stream = match bytes.split_first() {
        Some((first, rest)) if first % 2 == 1 => [begin, rest].concat(),
        Some((_, rest)) => rest.to_vec(),
        None => Vec::new(),
    };
    let Ok(mut reader) = Reader::new(&stream[..]) else {
        return Ok(false);
    };
    let meta = reader.meta().clone();
    let mut writer = Writer::new(Vec::new(), &meta).map_err(text)?;
    loop {
        let record = match reader.next_record() {
            Ok(Some(record)) => record,
            Ok(None) => break,
            Err(_) => return Ok(false),
        };
        match record {
            Record::Zeroes { offset, len } => writer.zeroes(offset, len).map_err(text)?,
            Record::Data { offset, len } => {
                // No more than there are in `stream`, or reading them fails.
                let mut data = vec![0; len.min(stream.len() as u64) as usize];
                if reader.data(&mut data).is_err() || data.len() as u64 != len {
                    return Ok(false);
                }
                writer.data(offset, &data).map_err(text)?;
            }
        }
    }
    let rest = reader.into_inner().len();
    let used = &stream[..stream.len() - rest];
    let again = writer.finish().map_err(text)?;
    // The fields before the records come in any order.
    if again.len() != used.len() {
        return Err(format!("{used:02x?} would be written as {again:02x?}"));
    }
    if meta.from.is_some() && meta.from == meta.to {
        let merged = merge(&again[..], &again[..], Vec::new()).map_err(text)?;
        if merged != again {
            return Err(format!("{again:02x?} merges with itself to {merged:02x?}"));
        }
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    /// Bytes of which many are those of numbers in the formats.
    fn bytes() -> impl Strategy<Value = Vec<u8>> {
        let small = prop_oneof![6 => Just(0), 3 => 0u8..12, 1 => any::<u8>()];
        vec(small, 0..200)
    }

    macro_rules! seed {
        ($file:literal) => {
            include_bytes!(concat!("../../fuzz/corpus/", $file))
        };
    }

    /// What the fuzzer begins with gets past the checks of readers, so that it finds what lies
    /// beyond them.
    #[test]
    fn the_seeds_of_the_fuzzer_are_taken() {
        assert_eq!(check_nbd_client(seed!("nbd_client/seed-extended")), Ok(4));
        assert_eq!(check_nbd_client(seed!("nbd_client/seed-compact")), Ok(3));
        assert_eq!(check_nbd_client(seed!("nbd_client/seed-simple")), Ok(2));
        assert_eq!(
            check_nbd_server(seed!("nbd_server/seed-extents")),
            Ok([true, true])
        );
        assert_eq!(
            check_nbd_server(seed!("nbd_server/seed-hole")),
            Ok([true, true])
        );
        assert_eq!(
            check_nbd_server(seed!("nbd_server/seed-compact")),
            Ok([true, false])
        );
        assert_eq!(
            check_nbd_server(seed!("nbd_server/seed-error")),
            Ok([false, false])
        );
        assert_eq!(check_qcow2(seed!("qcow2/seed-changes")), Ok(2));
        assert_eq!(check_qcow2(seed!("qcow2/seed-image")), Ok(1));
        assert_eq!(check_rbd(seed!("rbd/seed-records")), Ok(true));
        assert_eq!(check_rbd(seed!("rbd/seed-whole")), Ok(true));
    }

    proptest! {
        #[test]
        fn a_client_of_nbd_is_served_or_refused(bytes in bytes()) {
            check_nbd_client(&bytes).map_err(TestCaseError::fail)?;
        }

        #[test]
        fn a_server_of_nbd_is_read_or_refused(bytes in bytes()) {
            check_nbd_server(&bytes).map_err(TestCaseError::fail)?;
        }

        #[test]
        fn an_image_is_read_or_refused(first: u8, changes in vec(any::<[u8; 3]>(), 0..6)) {
            let bytes = [&[first][..], &changes.concat()].concat();
            check_qcow2(&bytes).map_err(TestCaseError::fail)?;
        }

        #[test]
        fn an_increment_is_read_or_refused(
            bytes in bytes(),
            records in vec((any::<bool>(), 0u64..4096, 0u64..100), 0..6),
        ) {
            check_rbd(&bytes).map_err(TestCaseError::fail)?;
            let mut stream = vec![1];
            for (data, offset, len) in records {
                stream.push(if data { b'w' } else { b'z' });
                stream.extend(offset.to_le_bytes());
                stream.extend(len.to_le_bytes());
                stream.resize(stream.len() + if data { len as usize } else { 0 }, 9);
            }
            stream.push(b'e');
            check_rbd(&stream).map_err(TestCaseError::fail)?;
        }
    }
}
