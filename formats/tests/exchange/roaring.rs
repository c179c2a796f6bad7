//! Roaring sets: conversion in both directions, bounds, and bytes that are no set.

use std::io::ErrorKind;

use dirtymap::bitmap::BitmapError;
use dirtymap::{Error, Granule, IovaRange, SparseBitmap, UserBitmap};
use dirtymap_formats::roaring::{RoaringExt, read_roaring, read_treemap};
use roaring::{RoaringBitmap, RoaringTreemap};

use crate::range;

/// Counts what is read from it.
struct Counted<'a>(&'a [u8], usize);

impl std::io::Read for Counted<'_> {
    fn read(&mut self, into: &mut [u8]) -> std::io::Result<usize> {
        let read = self.0.read(into)?;
        self.1 += read;
        Ok(read)
    }
}

#[test]
fn bits_of_a_view_go_there_and_back() {
    let pattern = [0x8000_0000_0000_0F01u64, u64::MAX, 0, 1];
    for bits in 1..=256u64 {
        let all = range(3 << 12, bits << 12);
        let mut words = pattern;
        let view = UserBitmap::new(&mut words).view(all, Granule::K4).unwrap();
        let expect: Vec<u64> = view.bits().collect();
        let (small, large) = (view.to_roaring().unwrap(), view.to_treemap().unwrap());
        assert!(small.iter().map(u64::from).eq(expect.iter().copied()));
        assert!(large.iter().eq(expect.iter().copied()));
        for back in [[0u64; 4]; 2] {
            let mut back = back;
            let view = UserBitmap::new(&mut back).view(all, Granule::K4).unwrap();
            assert_eq!(view.or_roaring(&small).unwrap(), expect.len() as u64);
            assert_eq!(view.or_treemap(&large).unwrap(), 0);
            assert!(view.bits().eq(expect.iter().copied()));
        }
    }
}

#[test]
fn a_view_of_more_than_32_bits_needs_a_treemap() {
    let bits = (1u64 << 33) + 5;
    let all = range(0, bits << 12);
    let sparse = SparseBitmap::new(bits);
    let view = UserBitmap::sparse(&sparse).view(all, Granule::K4).unwrap();
    // A run across the border of two parts, and the last bit.
    let border = range(((1u64 << 32) - 2) << 12, 4 << 12);
    view.sink().record(border).unwrap();
    view.sink().record(range((bits - 1) << 12, 4096)).unwrap();
    assert!(matches!(
        view.to_roaring(),
        Err(Error::Bitmap(BitmapError::NoSuchBit { bit, last: 0xFFFF_FFFF })) if bit == bits - 1
    ));
    let set = view.to_treemap().unwrap();
    assert_eq!((set.len(), set.max()), (5, Some(bits - 1)));
    let mut bytes = vec![];
    set.serialize_into(&mut bytes).unwrap();
    let read = read_treemap(&bytes[..], bits).unwrap();
    assert_eq!(read, set);
    let back = SparseBitmap::new(bits);
    let view = UserBitmap::sparse(&back).view(all, Granule::K4).unwrap();
    assert_eq!(view.or_treemap(&read).unwrap(), 5);
    assert!(view.runs().eq([border, range((bits - 1) << 12, 4096)]));
    let short = read_treemap(&bytes[..], bits - 1).unwrap_err();
    assert_eq!(short.kind(), ErrorKind::InvalidData);
}

#[test]
fn a_number_that_the_view_does_not_have_is_refused_before_anything_is_set() {
    let mut words = [0u64];
    let view = UserBitmap::new(&mut words)
        .view(range(0, 40 << 12), Granule::K4)
        .unwrap();
    let small: RoaringBitmap = [1, 40].into_iter().collect();
    let large: RoaringTreemap = [1, 40].into_iter().collect();
    for error in [view.or_roaring(&small), view.or_treemap(&large)] {
        assert!(matches!(
            error,
            Err(Error::Bitmap(BitmapError::NoSuchBit { bit: 40, last: 39 }))
        ));
    }
    assert_eq!(words, [0]);
}

#[test]
fn reading_is_bounded_by_what_is_expected_and_by_what_is_there() {
    // A set of every second number, written in runs, is the longest encoding for its size.
    let mut every_second: RoaringBitmap = (0..1 << 17).step_by(2).collect();
    every_second.optimize();
    let mut bytes = vec![];
    every_second.serialize_into(&mut bytes).unwrap();
    assert_eq!(read_roaring(&bytes[..], 1 << 17).unwrap(), every_second);
    // Of a set that is too long, at most the longest encoding for the expected size is read.
    let mut long = vec![];
    let set: RoaringBitmap = (0..1 << 22).step_by(2).collect();
    set.serialize_into(&mut long).unwrap();
    let mut counted = Counted(&long, 0);
    assert!(read_roaring(&mut counted, 1 << 16).is_err());
    assert!(
        counted.1 < 132_000 && counted.1 < long.len(),
        "{}",
        counted.1
    );
    // A header of 65536 containers or 2^64 parts, without any contents: an error, and no memory is
    // allocated for them.
    let mut many = 12346u32.to_le_bytes().to_vec();
    many.extend(65536u32.to_le_bytes());
    assert!(read_roaring(&many[..], 1 << 32).is_err());
    let parts = u64::MAX.to_le_bytes();
    let error = read_treemap(&parts[..], u64::MAX).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::UnexpectedEof);
    // Each prefix of a valid set.
    for len in 0..bytes.len().min(300) {
        assert!(read_roaring(&bytes[..len], 1 << 17).is_err());
    }
}

#[test]
fn parts_that_come_twice_do_not_replace_each_other() {
    // History: a reader of the 64-bit format that inserts each part under its key keeps the last of
    // two with the same key, and forgets what the first one said.
    let mut bytes = 2u64.to_le_bytes().to_vec();
    for value in [3u32, 8] {
        bytes.extend(0u32.to_le_bytes());
        RoaringBitmap::from_iter([value])
            .serialize_into(&mut bytes)
            .unwrap();
    }
    let error = read_treemap(&bytes[..], 64).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidData);
    assert_eq!(
        RoaringTreemap::deserialize_from(&bytes[..]).unwrap().len(),
        1
    );
}

#[test]
fn the_whole_of_a_large_range_is_a_short_set() {
    let bits = 1u64 << 20;
    let mut words = vec![u64::MAX; (bits / 64) as usize];
    let all = IovaRange::from_len(dirtymap::Iova::MIN, bits << 12).unwrap();
    let view = UserBitmap::new(&mut words).view(all, Granule::K4).unwrap();
    let set = view.to_roaring().unwrap();
    assert_eq!(set.len(), bits);
    assert!(set.serialized_size() < 1024, "{}", set.serialized_size());
}
