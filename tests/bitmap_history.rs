//! Bugs of dirty bitmaps in other programs, which lost or invented dirty pages. Each has a test
//! that this library does neither.
#![cfg(not(dirtymap_loom))]
#![allow(clippy::unwrap_used)] // helpers of tests

use dirtymap::bitmap::{BitmapError, CHUNK_BITS, WINDOW_BITS};
use dirtymap::{Granule, Iova, IovaRange, RangeError, SparseBitmap, UserBitmap};

fn range(start: u64, len: u64) -> IovaRange {
    IovaRange::from_len(Iova::new(start), len).unwrap()
}

fn byte() -> Granule {
    Granule::from_bytes(1).unwrap()
}

/// Records `dirty` in a bitmap that begins `skip` bytes into a block of 0xFF guards. Returns the
/// runs of the bitmap.
fn runs_at(skip: usize, request: IovaRange, granule: Granule, dirty: IovaRange) -> Vec<IovaRange> {
    let bytes = request.granules(granule).div_ceil(8) as usize;
    let mut block = vec![0u64; (skip + bytes + 4096) / 8 + 2];
    // SAFETY: the bytes of a vector of words; any byte is valid, and alignment only falls.
    let block =
        unsafe { std::slice::from_raw_parts_mut(block.as_mut_ptr().cast::<u8>(), block.len() * 8) };
    block.fill(0xFF);
    block[skip..skip + bytes].fill(0);
    let view = UserBitmap::bytes(&mut block[skip..skip + bytes])
        .view(request, granule)
        .unwrap();
    view.sink().record(dirty).unwrap();
    let runs = view.runs().collect();
    assert!(block[..skip].iter().all(|b| *b == 0xFF), "before");
    assert!(block[skip + bytes..].iter().all(|b| *b == 0xFF), "behind");
    runs
}

#[test]
fn bug_1_a_run_that_crosses_the_first_page_of_an_unaligned_bitmap() {
    // A bitmap that began inside a page: bits past that page's end were written into the wrong
    // page.
    let dirty = range(100, 4096 * 8);
    assert_eq!(runs_at(0xff1, range(0, 8 * 8192), byte(), dirty), [dirty]);
}

#[test]
fn bug_2_a_run_over_several_pages_of_bitmap() {
    // The position in the bitmap was not advanced from one page to the next.
    let dirty = range(7, 3 * CHUNK_BITS);
    assert_eq!(runs_at(3, range(0, 4 * CHUNK_BITS), byte(), dirty), [dirty]);
}

#[test]
fn bug_3_a_leaf_that_ends_behind_the_bitmap() {
    // The bits of a huge leaf near the end were written past the last page of the bitmap.
    let request = range(0, WINDOW_BITS);
    let leaf = range(WINDOW_BITS - 10, 1 << 30);
    assert_eq!(
        runs_at(5, request, byte(), leaf),
        [range(WINDOW_BITS - 10, 10)]
    );
}

#[test]
fn bug_4_a_leaf_that_straddles_two_windows() {
    // The bits of the second window were dropped.
    let leaf = range(WINDOW_BITS - 100, 200);
    assert_eq!(runs_at(1, range(0, 2 * WINDOW_BITS), byte(), leaf), [leaf]);
}

#[test]
fn bug_5_a_straddling_leaf_that_is_the_last_one() {
    // After the last leaf the walk requested the next window, past the end of the bitmap.
    let leaf = range(WINDOW_BITS - 100, 101);
    assert_eq!(runs_at(0, range(0, WINDOW_BITS + 1), byte(), leaf), [leaf]);
}

#[test]
fn bug_6_only_windows_with_dirty_pages_are_opened() {
    // Every window was pinned, also those for which the walk found no dirty leaf.
    let mut words = vec![0u64; (4 * WINDOW_BITS / 64) as usize];
    let view = UserBitmap::new(&mut words)
        .view(range(0, 4 * WINDOW_BITS), byte())
        .unwrap();
    let mut sink = view.sink();
    assert_eq!(sink.windows(), 0);
    sink.record(range(3 * WINDOW_BITS, 1)).unwrap();
    assert_eq!(sink.windows(), 1);
}

#[test]
fn bug_7_the_tail_of_a_small_bitmap_at_an_odd_address() {
    // The length was counted in words of 64 bits, so the last bits of an odd one were dropped.
    for bits in 1..200 {
        for skip in 0..8 {
            let last = range((bits - 1) * 4096, 4096);
            let request = range(0, bits * 4096);
            assert_eq!(runs_at(skip, request, Granule::K4, last), [last]);
        }
    }
}

#[test]
fn bug_8_three_gigabytes_into_a_bitmap_that_is_not_page_aligned() {
    // Such a bitmap touches one page more than its length suggests. That page was missing.
    let request = range(1 << 20, (3 << 30) - (1 << 20));
    for skip in [0x800, 0xff1] {
        assert_eq!(runs_at(skip, request, Granule::K4, request), [request]);
    }
}

#[test]
fn bug_9_granules_of_two_gigabytes_and_more() {
    // The size of a granule was computed in 32 bits.
    for lg2 in 31..64 {
        let granule = Granule::from_lg2(lg2).unwrap();
        let last = IovaRange::granule_at(Iova::MAX, granule);
        let dirty = IovaRange::new(Iova::MAX, Iova::MAX).unwrap();
        let sparse = SparseBitmap::new(1 << (64 - lg2));
        let bitmap = UserBitmap::sparse(&sparse);
        let view = bitmap.view(IovaRange::ALL, granule).unwrap();
        view.sink().record(dirty).unwrap();
        assert_eq!(view.runs().collect::<Vec<_>>(), [last]);
    }
}

#[test]
fn bug_10_no_granule_of_zero_bytes_and_no_range_of_zero_bytes() {
    // A length of zero passed every check and then meant the whole address space.
    assert!(matches!(
        Granule::from_bytes(0),
        Err(RangeError::BadGranule { bytes: 0 })
    ));
    let nothing = IovaRange::from_len(Iova::MIN, 0);
    assert!(matches!(nothing, Err(RangeError::ZeroLength { .. })));
}

#[test]
fn bug_22_a_bitmap_of_less_than_a_byte() {
    // A test rounded four bits down to zero bytes, and so tested nothing.
    let request = range(0, 4 * 4096);
    let none = UserBitmap::bytes(&mut []).view(request, Granule::K4);
    assert!(matches!(
        none,
        Err(BitmapError::TooShort {
            bits: 0,
            needed: 4,
            ..
        })
    ));
    assert_eq!(
        runs_at(1, request, Granule::K4, range(3 * 4096, 1)),
        [range(3 * 4096, 4096)]
    );
}
