//! Increments of Ceph: written, read, merged and cut off.
#![cfg(feature = "rbd")]
#![allow(clippy::unwrap_used)]

mod common_rbd;

use common_rbd::{apply, meta};
use dirtymap::exchange::RunTable;
use dirtymap::{Iova, IovaRange};
use dirtymap_formats::rbd::{RbdError, Reader, Record, Writer, merge, write_increment};
use proptest::collection::vec;
use proptest::prelude::*;

fn table(runs: &[(u64, u64)]) -> RunTable {
    let run = |&(start, len): &(u64, u64)| IovaRange::from_len(Iova::new(start), len).unwrap();
    runs.iter().map(run).collect()
}

#[test]
fn an_increment_has_data_and_zeroes() {
    let mut disk = vec![0u8; 20_000];
    disk[5_000] = 1;
    disk[13_000..14_000].fill(7);
    let dirty = table(&[(4096, 8192), (12_900, 10_000)]); // past the end, where it is cut
    let stream = write_increment(Vec::new(), &meta(None, "a", 20_000), &dirty, &disk).unwrap();
    let mut reader = Reader::new(&stream[..]).unwrap();
    let records = std::iter::from_fn(|| reader.next_record().unwrap());
    assert_eq!(
        records.collect::<Vec<_>>(),
        [
            Record::Data {
                offset: 4096,
                len: 4096
            },
            Record::Zeroes {
                offset: 8192,
                len: 4096
            },
            Record::Data {
                offset: 12_900,
                len: 3484
            },
            Record::Zeroes {
                offset: 16_384,
                len: 3616
            },
        ]
    );
    let mut copy = Vec::new();
    apply(&stream, &mut copy);
    assert_eq!(copy, disk);
    let runs = Reader::new(&stream[..]).unwrap().runs(9).unwrap();
    assert_eq!(runs, table(&[(4096, 8192), (12_900, 7_100)]));
}

/// A disk of another size is refused before any byte of it changes: it would have the first part of
/// the increment, and no word would say that the rest is missing.
#[test]
fn a_disk_of_another_size_is_left_alone() {
    let mut writer = Writer::new(Vec::new(), &meta(None, "a", 100)).unwrap();
    writer.data(0, &[1; 50]).unwrap();
    let stream = writer.finish().unwrap();
    for len in [0, 99, 101] {
        let mut disk = vec![9; len];
        let refused = Reader::new(&stream[..]).unwrap().restore(&mut disk);
        let found = len as u64;
        assert!(matches!(refused, Err(RbdError::Size { size: 100, found: it }) if it == found));
        assert!(disk.iter().all(|&byte| byte == 9));
    }
}

/// `rbd merge-diff` of these two gives the same bytes: see the tests of peers.
#[test]
fn the_second_increment_counts_where_both_have_a_record() {
    let first = {
        let mut writer = Writer::new(Vec::new(), &meta(None, "a", 100)).unwrap();
        writer.data(0, &[1; 50]).unwrap();
        writer.zeroes(60, 20).unwrap();
        writer.finish().unwrap()
    };
    let second = {
        let mut writer = Writer::new(Vec::new(), &meta(Some("a"), "b", 100)).unwrap();
        writer.zeroes(10, 10).unwrap();
        writer.data(70, &[2; 5]).unwrap();
        writer.finish().unwrap()
    };
    let merged = merge(&first[..], &second[..], Vec::new()).unwrap();
    let mut reader = Reader::new(&merged[..]).unwrap();
    assert_eq!(reader.meta(), &meta(None, "b", 100));
    let records = std::iter::from_fn(|| reader.next_record().unwrap());
    assert_eq!(
        records.map(Record::extent).collect::<Vec<_>>(),
        [(0, 10), (10, 10), (20, 30), (60, 10), (70, 5), (75, 5)]
    );
}

/// The first increment shrinks the disk and the second lets it grow: what was there before the two
/// must not show in the result, although neither has a record of it.
#[test]
fn what_a_shrink_took_away_does_not_come_back() {
    let first = Writer::new(Vec::new(), &meta(Some("o"), "a", 50)).unwrap();
    let second = Writer::new(Vec::new(), &meta(Some("a"), "b", 100)).unwrap();
    let (first, second) = (first.finish().unwrap(), second.finish().unwrap());
    let merged = merge(&first[..], &second[..], Vec::new()).unwrap();
    let mut disk = vec![9; 100];
    apply(&merged, &mut disk);
    assert_eq!(disk, [[9; 50], [0; 50]].concat());
}

#[test]
fn increments_that_do_not_follow_each_other_are_not_merged() {
    let of = |from, to| {
        Writer::new(Vec::new(), &meta(from, to, 9))
            .unwrap()
            .finish()
            .unwrap()
    };
    for (first, second) in [
        (of(None, "a"), of(Some("b"), "c")),
        (of(None, "a"), of(None, "c")),
    ] {
        let error = merge(&first[..], &second[..], Vec::new()).unwrap_err();
        assert!(matches!(error, RbdError::Apart { .. }), "{error}");
    }
}

#[test]
fn damage_is_refused_with_the_place() {
    let mut good = b"rbd diff v1\nf\x01\0\0\0at\x01\0\0\0bs\0\x10\0\0\0\0\0\0".to_vec();
    let said = |parts: &[&[u8]]| {
        let stream = parts.concat();
        let read = Reader::new(&stream[..]).and_then(|mut reader| reader.runs(2));
        read.unwrap_err().to_string()
    };
    let record = |kind: u8, offset: u64, len: u64| {
        [&[kind][..], &offset.to_le_bytes(), &len.to_le_bytes()].concat()
    };
    assert!(said(&[b"rbd diff v2\n"]).contains("it is not \"rbd diff v1\""));
    assert!(said(&[b"rbd"]).contains("the first line at byte 0"));
    assert!(said(&[&good[..12], b"w"]).contains("the size of the disk has to come first"));
    assert!(said(&[&good[..18], b"f"]).contains("it comes twice"));
    // A name of 4 GiB takes no memory.
    let long = said(&[&good[..12], b"f\xff\xff\xff\xff"]);
    assert!(
        long.contains("the length of a snapshot's name at byte 13 of the stream"),
        "{long}"
    );
    let cut = said(&[&good]);
    assert!(
        cut.contains("the type of a record at byte 33 of the stream"),
        "{cut}"
    );
    assert!(said(&[&good, b"q"]).contains("the type of a record at byte 33"));
    let outside = said(&[&good, &record(b'w', 4000, 97)]);
    assert!(
        outside.contains("the length of a record at byte 42 of the stream"),
        "{outside}"
    );
    assert!(said(&[&good, &record(b'z', u64::MAX, u64::MAX)]).contains("past the end of the disk"));
    assert!(said(&[&good, &record(b'z', 1, 0)]).contains("it is zero"));
    let back = said(&[&good, &record(b'z', 10, 10), &record(b'z', 19, 1)]);
    assert!(
        back.contains("the offset of a record at byte 51 of the stream is 0x13"),
        "{back}"
    );
    let cut = said(&[&good, &record(b'w', 0, 10), b"12345"]);
    assert!(
        cut.contains("the data of a record at byte 50 of the stream"),
        "{cut}"
    );
    let records = [record(b'z', 0, 1), record(b'z', 2, 1), record(b'z', 4, 1)].concat();
    assert!(said(&[&good, &records]).contains("the number of runs"));
    good.extend(record(b'z', 0, 4096));
    good.push(b'e');
    let mut reader = Reader::new(&good[..]).unwrap();
    assert_eq!(reader.runs(1).unwrap(), table(&[(0, 4096)]));
    assert_eq!(reader.next_record().unwrap(), None, "the end stays");
}

#[test]
fn what_cannot_be_written_is_refused() {
    let mut writer = Writer::new(Vec::new(), &meta(None, "a", 100)).unwrap();
    writer.zeroes(10, 10).unwrap();
    assert!(matches!(
        writer.data(19, b"x"),
        Err(RbdError::Record { .. })
    ));
    assert!(matches!(
        writer.data(99, b"xx"),
        Err(RbdError::Record { .. })
    ));
    assert!(matches!(
        writer.zeroes(u64::MAX, 2),
        Err(RbdError::Record { .. })
    ));
    writer.zeroes(5, 0).unwrap(); // nothing
    writer.data(20, b"x").unwrap();
    let outside = table(&[(0, 1), (100, 1)]);
    let written = write_increment(Vec::new(), &meta(None, "a", 100), &outside, &vec![0; 100]);
    assert!(matches!(written, Err(RbdError::Outside { size: 100, .. })));
    let short = write_increment(
        Vec::new(),
        &meta(None, "a", 100),
        &table(&[(0, 1)]),
        &vec![],
    );
    assert!(matches!(short, Err(RbdError::Data { at: 0, .. })));
    let name = meta(None, &"n".repeat(4097), 100);
    assert!(matches!(
        Writer::new(Vec::new(), &name),
        Err(RbdError::Name { len: 4097 })
    ));
}

/// A change of a disk: its new size, and what is written where; 0 is a block of zeroes.
type Change = (u64, Vec<(u64, u64, u8)>);

fn change() -> impl Strategy<Value = Change> {
    (1u64..40_000, vec((0u64..40_000, 1u64..9_000, 0u8..3), 0..8))
}

/// Makes the change, and returns its increment.
fn step(disk: &mut Vec<u8>, (size, writes): &Change, from: Option<&str>, to: &str) -> Vec<u8> {
    disk.resize(*size as usize, 0);
    let mut dirty = Vec::new();
    for &(offset, len, byte) in writes {
        let end = (offset + len).min(*size);
        if offset < end {
            disk[offset as usize..end as usize].fill(byte);
            dirty.push((offset, end - offset));
        }
    }
    write_increment(Vec::new(), &meta(from, to, *size), &table(&dirty), disk).unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    /// Increments, one after the other or merged in any order of merging, restore every disk.
    #[test]
    fn increments_and_their_merges_restore_the_disk(
        base in change(),
        changes in vec(change(), 2..5),
        left: bool,
    ) {
        let mut disk = Vec::new();
        step(&mut disk, &base, None, "0");
        let start = disk.clone();
        let mut streams = Vec::new();
        for (nth, change) in changes.iter().enumerate() {
            let (from, to) = (nth.to_string(), (nth + 1).to_string());
            streams.push(step(&mut disk, change, Some(&from), &to));
        }
        let mut one_by_one = start.clone();
        for stream in &streams {
            apply(stream, &mut one_by_one);
        }
        prop_assert!(one_by_one == disk);
        let both = |a: &Vec<u8>, b: &Vec<u8>| merge(&a[..], &b[..], Vec::new()).unwrap();
        let merged = match left {
            true => streams.iter().skip(1).fold(streams[0].clone(), |sum, next| both(&sum, next)),
            false => {
                let last = streams.last().unwrap().clone();
                streams.iter().rev().skip(1).fold(last, |sum, before| both(before, &sum))
            }
        };
        let mut at_once = start;
        apply(&merged, &mut at_once);
        prop_assert!(at_once == disk);
        // A merge that was cut off anywhere is no increment.
        for len in [merged.len() - 1, merged.len() / 2] {
            let read = Reader::new(&merged[..len]).and_then(|mut reader| reader.runs(1000));
            prop_assert!(read.is_err());
        }
    }
}
