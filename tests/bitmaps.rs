//! User bitmaps in every form, each against a naive twin: a `Vec<bool>`.
#![cfg(not(dirtymap_loom))]
#![allow(clippy::unwrap_used)] // helpers of tests

use dirtymap::bitmap::BitmapError;
use dirtymap::sync::{AtomicU64, Ordering};
use dirtymap::{BitmapView, Granule, Iova, IovaRange, SparseBitmap, UserBitmap};

#[cfg(feature = "mmap")]
mod common_file;

/// Bytes of guard on either side of a bitmap.
const GUARD: usize = 24;

/// A form of bitmap, and where it begins.
#[derive(Clone, Copy, Debug)]
enum Form {
    Words,
    Shared,
    /// Bytes at this address modulo 8.
    Bytes(usize),
    Sparse,
    #[cfg(feature = "mmap")]
    /// A file, at this byte of it.
    File(u64),
}

fn forms() -> Vec<Form> {
    let mut forms = vec![Form::Words, Form::Shared, Form::Sparse];
    forms.extend((0..8).map(Form::Bytes));
    #[cfg(feature = "mmap")]
    forms.extend([24, 29, 4095, 65536 - 3, 65536].map(Form::File));
    forms
}

fn xorshift(x: &mut u64) -> u64 {
    *x ^= *x << 13;
    *x ^= *x >> 7;
    *x ^= *x << 17;
    *x
}

fn to_bits(bytes: &[u8]) -> Vec<bool> {
    let bit = |n: usize| bytes[n / 8] >> (n % 8) & 1 == 1;
    (0..bytes.len() * 8).map(bit).collect()
}

fn to_bytes(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
}

fn to_words(bytes: &[u8]) -> Vec<u64> {
    let words = bytes.chunks(8);
    words
        .map(|word| u64::from_ne_bytes(word.try_into().unwrap()))
        .collect()
}

/// Passes a bitmap of this form with the contents `bytes` to `f`, and returns the contents
/// afterwards. The bytes around the bitmap must be as they were. Forms of whole words get zero
/// bytes after `bytes`, which must stay zero.
fn with_form(form: Form, bytes: &[u8], f: impl FnOnce(UserBitmap<'_>)) -> Vec<u8> {
    let mut padded = vec![0xA5; GUARD];
    padded.extend(bytes);
    let word_end = padded.len().next_multiple_of(8);
    padded.resize(word_end, 0);
    padded.extend([0xA5; GUARD]);
    let at = GUARD..GUARD + bytes.len();
    let after = match form {
        Form::Words => {
            let mut words = to_words(&padded);
            f(UserBitmap::new(&mut words[GUARD / 8..word_end / 8]));
            to_bytes(&words)
        }
        Form::Shared => {
            let words: Vec<AtomicU64> = to_words(&padded).into_iter().map(AtomicU64::new).collect();
            f(UserBitmap::shared(&words[GUARD / 8..word_end / 8]));
            let load = |word: &AtomicU64| word.load(Ordering::Relaxed);
            to_bytes(&words.iter().map(load).collect::<Vec<_>>())
        }
        Form::Bytes(skip) => {
            // One page-aligned block. The bitmap begins `skip` bytes after the guard.
            let mut block = vec![0xA5u8; padded.len() + 16];
            let base = block.as_ptr().align_offset(8) + skip;
            block[base..base + padded.len()].copy_from_slice(&padded);
            f(UserBitmap::bytes(
                &mut block[base + at.start..base + at.end],
            ));
            assert!(block[..base].iter().all(|b| *b == 0xA5));
            assert!(block[base + padded.len()..].iter().all(|b| *b == 0xA5));
            block[base..base + padded.len()].to_vec()
        }
        Form::Sparse => {
            let bits = bytes.len() as u64 * 8;
            let sparse = SparseBitmap::new(bits);
            let all = IovaRange::from_len(Iova::MIN, bits).unwrap();
            let byte = Granule::from_bytes(1).unwrap();
            let view = UserBitmap::sparse(&sparse).view(all, byte).unwrap();
            for (n, _) in to_bits(bytes).iter().enumerate().filter(|(_, set)| **set) {
                let one = IovaRange::from_len(Iova::new(n as u64), 1).unwrap();
                view.sink().record(one).unwrap();
            }
            f(UserBitmap::sparse(&sparse));
            let mut after = vec![0; bytes.len()];
            view.bits()
                .for_each(|n| after[n as usize / 8] |= 1 << (n % 8));
            return after;
        }
        #[cfg(feature = "mmap")]
        Form::File(offset) => {
            use std::os::unix::fs::FileExt;
            let file = common_file::scratch(0);
            let from = offset - GUARD as u64;
            file.write_all_at(&padded, from).unwrap();
            let bitmap = dirtymap::bitmap::FileBitmap::new(file, offset, bytes.len() as u64);
            let bitmap = bitmap.with_window(1 << 16).unwrap();
            f(UserBitmap::file(&bitmap));
            assert!(bitmap.most_mapped() <= 1 << 16);
            let mut after = vec![0; padded.len()];
            bitmap.file().read_exact_at(&mut after, from).unwrap();
            let len = bitmap.file().metadata().unwrap().len();
            assert_eq!(len, from + padded.len() as u64);
            after
        }
    };
    assert_eq!(after[..GUARD], padded[..GUARD], "before the bitmap");
    assert_eq!(after[at.end..], padded[at.end..], "behind the bitmap");
    after[at].to_vec()
}

/// Compares everything that can be read from `view` with the twin.
fn compare(view: &BitmapView<'_>, twin: &[bool]) {
    let set: Vec<u64> = (0..twin.len() as u64)
        .filter(|n| twin[*n as usize])
        .collect();
    assert_eq!(view.bits().collect::<Vec<_>>(), set);
    assert_eq!(view.count(), set.len() as u64);
    let mut from_words = vec![];
    for (index, word) in view.words() {
        assert_ne!(word, 0);
        let bits = (0..64).filter(|b| word >> b & 1 == 1);
        from_words.extend(bits.map(|b| index * 64 + b));
    }
    assert_eq!(from_words, set);
    let (mut from_runs, mut end) = (vec![], None);
    for run in view.runs() {
        let bit = |at: Iova| (at.get() - view.range().start().get()) >> view.granule().lg2();
        let (first, last) = (bit(run.start()), bit(run.last()));
        assert_ne!(end, Some(first), "runs are maximal");
        end = Some(last + 1);
        from_runs.extend(first..=last);
    }
    assert_eq!(from_runs, set);
}

fn touches(a: IovaRange, b: IovaRange) -> bool {
    a.intersects(b)
}

#[test]
fn every_form_records_what_its_twin_records() {
    let mut x = 0x9E37_79B9_7F4A_7C15;
    for form in forms() {
        for granule in [0u8, 11, 12, 21].map(|lg2| Granule::from_lg2(lg2).unwrap()) {
            for bits in [1u64, 3, 7, 8, 9, 63, 64, 65, 127, 130, 200] {
                let len = bits * granule.bytes();
                for base in [0, 7 * granule.bytes(), 0u64.wrapping_sub(len)] {
                    one_request(form, granule, base, bits, &mut x);
                }
            }
        }
    }
}

fn one_request(form: Form, granule: Granule, base: u64, bits: u64, x: &mut u64) {
    let request = IovaRange::from_len(Iova::new(base), bits * granule.bytes()).unwrap();
    // Set before: some bits of the request, of the rest of its last byte, and of the byte after it.
    let before: Vec<u8> = (0..bits / 8 + 2)
        .map(|_| (xorshift(x) & xorshift(x) & xorshift(x)) as u8)
        .collect();
    let mut twin = to_bits(&before);
    let at = |n: u64| Iova::new(base + n * granule.bytes());
    let granules: Vec<IovaRange> = (0..bits)
        .map(|n| IovaRange::granule_at(at(n), granule))
        .collect();
    let after = with_form(form, &before, |bitmap| {
        let view = bitmap.view(request, granule).unwrap();
        // In a block, so that the sink's window is closed before the readers open theirs.
        {
            let mut sink = view.sink();
            let mut newly = 0;
            let mut expect = |range: IovaRange, twin: &mut Vec<bool>| {
                for (n, bytes) in granules.iter().enumerate() {
                    if touches(*bytes, range) && !twin[n] {
                        twin[n] = true;
                        newly += 1;
                    }
                }
                newly
            };
            for _ in 0..3 {
                // A range of any length from one byte on, which may reach past either end of the
                // request.
                let span = request.len() as u64 + 3 * granule.bytes();
                let start = base
                    .saturating_sub(granule.bytes())
                    .saturating_add(xorshift(x) % span);
                let last = start.saturating_add(xorshift(x) % (1 + span / 4));
                let range = IovaRange::new(Iova::new(start), Iova::new(last)).unwrap();
                sink.record(range).unwrap();
                assert_eq!(sink.bits_set(), expect(range, &mut twin), "{form:?}");
                // A mask of pages that may stick out at the end.
                let start = base + xorshift(x) % bits * granule.bytes();
                let mask = xorshift(x) & xorshift(x) & (u64::MAX >> (xorshift(x) % 64));
                let fits = (u64::MAX - start) >> granule.lg2();
                let mask = if fits < 64 {
                    mask & ((1 << fits) - 1)
                } else {
                    mask
                };
                sink.record_mask(Iova::new(start), granule, mask).unwrap();
                for page in (0..64).filter(|page| mask >> page & 1 == 1) {
                    let page =
                        IovaRange::granule_at(Iova::new(start + page * granule.bytes()), granule);
                    expect(page, &mut twin);
                }
                assert_eq!(
                    sink.bits_set(),
                    expect(granules[0], &mut vec![true; bits as usize])
                );
            }
        }
        compare(&view, &twin[..bits as usize]);
    });
    assert_eq!(to_bits(&after), twin, "{form:?} {granule} {request}");
}

#[test]
fn every_form_merges_converts_and_rebases_into_every_other() {
    let mut x = 0xD1B5_4A32_D192_ED03;
    let request =
        |first: u64, n: u64| IovaRange::from_len(Iova::new(first * 8192), n * 8192).unwrap();
    let granules = [2048, 4096, 8192].map(|bytes| Granule::from_bytes(bytes).unwrap());
    let random = |bits: u128, x: &mut u64| -> Vec<u8> {
        let word = |x: &mut u64| (xorshift(x) & xorshift(x)) as u8;
        (0..bits / 8 + 2).map(|_| word(x)).collect()
    };
    // Forms of one kind differ in their first byte. Each form with a border inside a word is there
    // twice.
    let some = |form: &Form| !matches!(form, Form::Shared | Form::Bytes(0 | 2 | 4..=7));
    let forms: Vec<Form> = forms().into_iter().filter(some).collect();
    let pairs = forms
        .iter()
        .flat_map(|a| forms.iter().map(move |b| (*a, *b)));
    for (a_form, b_form) in pairs {
        for (a_granule, b_granule) in granules.iter().flat_map(|a| granules.map(|b| (*a, b))) {
            for (a_range, b_range) in [
                (request(3, 30), request(3, 30)),
                (request(3, 30), request(11, 40)),
                (request(8, 5), request(0, 33)),
                (request(0, 4), request(9, 4)),
            ] {
                let bits = |range: IovaRange, granule| range.granules(granule);
                let a_bytes = random(bits(a_range, a_granule), &mut x);
                let b_bytes = random(bits(b_range, b_granule), &mut x);
                let (a_bits, b_bits) = (to_bits(&a_bytes), to_bits(&b_bytes));
                // Counted in units of 2048 bytes, the smaller of the two granules.
                let dirty = |bits: &[bool], range: IovaRange, granule: Granule, at: u64| {
                    range.contains(Iova::new(at))
                        && bits[((at - range.start().get()) >> granule.lg2()) as usize]
                };
                let units = |n: usize, range: IovaRange, granule: Granule| {
                    let start = range.start().get() + n as u64 * granule.bytes();
                    (start..start + granule.bytes()).step_by(2048)
                };
                let inside = |n: usize| (n as u128) < bits(b_range, b_granule);
                let mut merged = b_bits.clone();
                let mut without = b_bits.clone();
                for n in (0..b_bits.len()).filter(|n| inside(*n)) {
                    let in_a = |at| dirty(&a_bits, a_range, a_granule, at);
                    merged[n] |= units(n, b_range, b_granule).any(in_a);
                    without[n] &= !units(n, b_range, b_granule).all(in_a);
                }
                let changed = |x: &[bool]| x.iter().zip(&b_bits).filter(|(x, y)| x != y).count();
                with_form(a_form, &a_bytes, |a| {
                    let a = a.view(a_range, a_granule).unwrap();
                    let after = with_form(b_form, &b_bytes, |b| {
                        let set = a.or_into(&b.view(b_range, b_granule).unwrap()).unwrap();
                        assert_eq!(set, changed(&merged) as u64);
                    });
                    assert_eq!(to_bits(&after), merged, "{a_form:?} into {b_form:?}");
                    let after = with_form(b_form, &b_bytes, |b| {
                        let b = b.view(b_range, b_granule).unwrap();
                        assert_eq!(b.and_not(&a).unwrap(), changed(&without) as u64);
                    });
                    assert_eq!(to_bits(&after), without, "{b_form:?} without {a_form:?}");
                });
            }
        }
    }
}

#[test]
fn requests_from_one_bit_to_half_of_all_addresses() {
    for lg2 in 12..=63 {
        let request = IovaRange::from_len(Iova::MIN, 1 << lg2).unwrap();
        let mut sparse = SparseBitmap::new(1 << (lg2 - 12));
        let view = UserBitmap::sparse(&sparse)
            .view(request, Granule::K4)
            .unwrap();
        let last = IovaRange::from_len(Iova::new((1 << lg2) - 1), 1).unwrap();
        let half = IovaRange::from_len(Iova::new(1 << (lg2 - 1)), 1).unwrap();
        let mut sink = view.sink();
        sink.record(half).unwrap();
        sink.record(last).unwrap();
        assert!(sink.windows() <= 2 && sparse.chunks() == sink.windows());
        let mut bits = vec![(1u64 << (lg2 - 1)) >> 12, (1 << (lg2 - 12)) - 1];
        bits.dedup();
        assert_eq!(view.bits().collect::<Vec<_>>(), bits);
        assert_eq!(view.count(), bits.len() as u64);
        // To subtract a coarser bitmap allocates nothing, and finds the bits.
        let chunks = sparse.chunks();
        let mut word = [u64::MAX];
        let coarse = Granule::from_lg2(lg2 as u8 - 1).unwrap();
        let all = UserBitmap::new(&mut word).view(request, coarse).unwrap();
        assert_eq!(view.and_not(&all).unwrap(), bits.len() as u64);
        assert_eq!((view.count(), sparse.chunks()), (0, chunks));
        sparse.clear();
        assert_eq!(sparse.chunks(), 0);
    }
    let most = SparseBitmap::new(u64::MAX);
    let everything =
        UserBitmap::sparse(&most).view(IovaRange::ALL, Granule::from_bytes(1).unwrap());
    assert!(matches!(
        everything,
        Err(BitmapError::TooShort { bits, needed, .. }) if bits == 1 << 63 && needed == 1 << 64
    ));
}

#[test]
fn harvests_that_share_bytes_lose_nothing() {
    // Two threads record into one byte bitmap whose borders are not whole words, and into one
    // sparse bitmap.
    let mut bytes = [0u8; 101];
    let sparse = SparseBitmap::new(800);
    let request = IovaRange::from_len(Iova::MIN, 800 * 4096).unwrap();
    for bitmap in [
        UserBitmap::bytes(&mut bytes[1..]),
        UserBitmap::sparse(&sparse),
    ] {
        let view = bitmap.view(request, Granule::K4).unwrap();
        std::thread::scope(|scope| {
            for parity in 0..2 {
                scope.spawn(move || {
                    let mut sink = view.sink();
                    for page in (parity..800).step_by(2) {
                        let page = IovaRange::from_len(Iova::new(page * 4096), 4096).unwrap();
                        sink.record(page).unwrap();
                    }
                    assert_eq!(sink.bits_set(), 400);
                });
            }
        });
        assert_eq!(view.runs().collect::<Vec<_>>(), [request]);
    }
}

#[test]
fn a_part_of_a_view_is_the_same_bits() {
    let mut x = 0x9E37_79B9_7F4A_7C15u64;
    for form in forms() {
        let bytes: Vec<u8> = (0..72).map(|_| xorshift(&mut x) as u8).collect();
        let base = 5 << 20;
        let request = IovaRange::from_len(Iova::new(base), 570 * 4096).unwrap();
        let before = to_bits(&bytes);
        let after = with_form(form, &bytes, |bitmap| {
            let view = bitmap.view(request, Granule::K4).unwrap();
            let mut x = x;
            for _ in 0..60 {
                // From any byte to any byte. A page that the border cuts does not belong to the
                // part.
                let (a, b) = (
                    xorshift(&mut x) % (570 * 4096),
                    xorshift(&mut x) % (570 * 4096),
                );
                let range = IovaRange::new(Iova::new(base + a.min(b)), Iova::new(base + a.max(b)));
                let (first, end) = (a.min(b).div_ceil(4096), (a.max(b) + 1) / 4096);
                let Some(part) = view.part(range.unwrap()) else {
                    assert!(first >= end);
                    continue;
                };
                assert_eq!(part.range().start().get(), base + first * 4096);
                assert_eq!(part.range().len(), u128::from(end - first) * 4096);
                let expect: Vec<u64> = (first..end)
                    .filter(|bit| before[*bit as usize])
                    .map(|bit| bit - first)
                    .collect();
                assert_eq!(
                    part.bits().collect::<Vec<_>>(),
                    expect,
                    "{form:?} {first} to {end}"
                );
                // A part of a part.
                let inner = part.part(part.range()).unwrap();
                assert_eq!(inner.count(), expect.len() as u64);
            }
            assert!(
                view.part(IovaRange::from_len(Iova::MIN, 4096).unwrap())
                    .is_none()
            );
        });
        assert_eq!(&to_bits(&after)[..before.len()], &before[..]);
    }
}
