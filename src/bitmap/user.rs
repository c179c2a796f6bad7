//! The bitmap that a caller passes to a harvest, and its view through one request.

#[cfg(all(feature = "mmap", not(dirtymap_loom)))]
use super::FileBitmap;
use super::span::Span;
use super::window::Backing;
use super::{BitmapView, Sink, SparseBitmap};
use crate::chunkmap::ChunkMap;
use crate::error::BitmapError;
use crate::sync::AtomicU64;
use crate::units::{Granule, IovaRange};

/// Memory of the caller, or a file, that receives dirty bits. It carries its length; no bit outside
/// a request is ever written. At most 2^63 bits of it are used.
///
/// Several harvests may record into one shared bitmap at a time: bits are OR-ed in atomically.
///
/// ```
/// use dirtymap::{Granule, ToIovaRange, UserBitmap};
///
/// # fn main() -> Result<(), dirtymap::Error> {
/// let ram = (0x10_0000..0x20_0000).to_iova_range()?; // 256 pages
/// let mut words = [0; 4];
/// let view = UserBitmap::new(&mut words).view(ram, Granule::K4)?;
/// view.sink().record((0x10_1000..0x10_3000).to_iova_range()?)?;
/// assert_eq!(words, [0b110, 0, 0, 0]);
/// # Ok(())
/// # }
/// ```
#[doc(alias = "iova_bitmap")]
#[doc(alias = "iova_bitmap_alloc")]
#[derive(Debug)]
pub struct UserBitmap<'a> {
    backing: Backing<'a>,
    /// Whether no other code can write to the bits while this, or the one sink that it is made
    /// into, lives. So it is not `Copy`.
    exclusive: bool,
}

impl<'a> UserBitmap<'a> {
    /// A bitmap in words that no other code uses while the lease lives.
    #[cfg(not(any(dirtymap_loom, dirtymap_shuttle)))]
    pub fn new(words: &'a mut [u64]) -> Self {
        let (first, len) = (words.as_mut_ptr().cast::<AtomicU64>(), words.len());
        // SAFETY:
        // - valid for `len` elements of `AtomicU64`: it has the size and bit validity of `u64`, and
        //   an alignment of 8, which the `u64`s of every target with 64-bit atomics that we build
        //   for have (checked below at compile time).
        // - shared access only through atomics for `'a`: the caller's exclusive borrow ends with
        //   `'a`.
        let words = unsafe { std::slice::from_raw_parts(first, len) };
        const { assert!(align_of::<u64>() == align_of::<AtomicU64>()) };
        UserBitmap {
            exclusive: true,
            ..Self::shared(words)
        }
    }

    /// A bitmap in bytes that no other code uses while the lease lives. It may begin at any address
    /// and have any length: bit `n` is bit `n % 8` of byte `n / 8`.
    #[cfg(not(any(dirtymap_loom, dirtymap_shuttle)))]
    pub fn bytes(bytes: &'a mut [u8]) -> Self {
        // SAFETY:
        // - valid for reads and writes for `'a`: it is the caller's exclusive borrow.
        // - accessed only through this span and its copies for `'a`: the borrow ends with `'a`.
        let span = unsafe { Span::from_raw(bytes.as_mut_ptr(), bytes.len()) };
        UserBitmap {
            backing: Backing::Memory(span),
            exclusive: true,
        }
    }

    /// A bitmap in words into which other threads may OR at the same time.
    ///
    /// No code may clear bits of a request's range while the lease of that request lives.
    pub fn shared(words: &'a [AtomicU64]) -> Self {
        UserBitmap {
            backing: Backing::Memory(Span::of_words(words)),
            exclusive: false,
        }
    }

    /// A bitmap in chunks that are allocated at their first bit.
    ///
    /// No code may clear bits of a request's range while the lease of that request lives.
    pub fn sparse(sparse: &'a SparseBitmap) -> Self {
        UserBitmap {
            backing: Backing::Sparse(sparse),
            exclusive: false,
        }
    }

    /// A shared bitmap in which only the first `good` words can be recorded, for tests of sources.
    #[cfg(not(any(dirtymap_loom, dirtymap_shuttle)))]
    pub(crate) fn failing(words: &'a [AtomicU64], good: u64) -> Self {
        UserBitmap {
            backing: Backing::Failing(Span::of_words(words), good),
            exclusive: false,
        }
    }

    /// As [`sparse`](Self::sparse), if no other code writes to the bits while this, or the one sink
    /// that it is made into, lives.
    pub(crate) fn sparse_alone(sparse: &'a SparseBitmap) -> Self {
        UserBitmap {
            exclusive: true,
            ..Self::sparse(sparse)
        }
    }

    /// A bitmap that the one sink that it is made into alone writes to, while other threads look at
    /// it.
    pub(crate) fn chunks(map: &'a ChunkMap) -> Self {
        UserBitmap {
            backing: Backing::Chunks(map),
            exclusive: true,
        }
    }

    /// The one sink that this is made into. It records `part`, which consists of whole granules;
    /// bit 0 is the granule at address 0.
    pub(crate) fn into_sink_of(self, granule: Granule, part: IovaRange) -> Sink<'a> {
        let exclusive = self.exclusive;
        Sink::new(self.part_of(IovaRange::ALL, granule, part), exclusive)
    }

    /// The view of `part`, which consists of whole granules of `bound`, whose first granule is bit
    /// 0.
    pub(crate) fn part_of(
        self,
        bound: IovaRange,
        granule: Granule,
        part: IovaRange,
    ) -> BitmapView<'a> {
        let view = BitmapView {
            backing: self.backing,
            shift: self.backing.shift(),
            range: bound,
            granule,
        };
        view.narrowed(part)
    }

    /// A bitmap in a file, mapped one window at a time.
    ///
    /// No code may clear bits of a request's range, or truncate the file, while the lease of that
    /// request lives.
    #[cfg(all(feature = "mmap", not(dirtymap_loom)))]
    pub fn file(file: &'a FileBitmap) -> Self {
        UserBitmap {
            backing: Backing::File(file),
            exclusive: false,
        }
    }

    /// The number of bits of the bitmap. For a file, up to its end now (0 if its length cannot be
    /// read).
    pub fn bits(&self) -> u64 {
        self.backing.bits()
    }

    /// Binds the bitmap to a request: bit 0 is `range`'s first granule.
    ///
    /// # Errors
    /// In this order: [`BitmapError::Unaligned`] if `range` does not start and end at multiples of
    /// `granule`, [`BitmapError::TooShort`] if the bitmap has fewer bits than `range` has granules.
    pub fn view(self, range: IovaRange, granule: Granule) -> Result<BitmapView<'a>, BitmapError> {
        self.bind(range, granule).map(|bound| bound.view)
    }

    /// The one sink that records into this bitmap: that of a harvest, for code that calls a source
    /// by itself. Words that are lent exclusively are recorded without locked operations, which a
    /// sink of a [`view`](Self::view) needs, because views are copied.
    ///
    /// ```
    /// use dirtymap::{Granule, ToIovaRange, UserBitmap};
    ///
    /// # fn main() -> Result<(), dirtymap::Error> {
    /// let mut words = [0];
    /// let request = (0..64 << 12).to_iova_range()?;
    /// let mut sink = UserBitmap::new(&mut words).into_sink(request, Granule::K4)?;
    /// sink.record((0x3000..0x4000).to_iova_range()?)?;
    /// assert_eq!(words, [1 << 3]);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// As [`view`](Self::view).
    pub fn into_sink(self, range: IovaRange, granule: Granule) -> Result<Sink<'a>, BitmapError> {
        Ok(self.bind(range, granule)?.into_sink())
    }

    /// As [`view`](Self::view), and remembers whether no other code writes to the bits.
    pub(crate) fn bind(self, range: IovaRange, granule: Granule) -> Result<Bound<'a>, BitmapError> {
        if !range.is_aligned(granule) {
            return Err(BitmapError::Unaligned { range, granule });
        }
        let needed = range.granules(granule);
        let bits = self.bits();
        if needed > u128::from(bits) {
            return Err(BitmapError::TooShort {
                bits,
                needed,
                range,
                granule,
            });
        }
        Ok(Bound {
            view: BitmapView {
                backing: self.backing,
                shift: self.backing.shift(),
                range,
                granule,
            },
            exclusive: self.exclusive,
        })
    }
}

/// The view of one request before it is given away.
#[derive(Debug)]
pub(crate) struct Bound<'a> {
    view: BitmapView<'a>,
    exclusive: bool,
}

impl<'a> Bound<'a> {
    /// The view. Code that gets it while the sink lives must not record into it.
    pub(crate) fn view(&self) -> BitmapView<'a> {
        self.view
    }

    /// As [`BitmapView::narrowed`].
    pub(crate) fn narrowed(self, part: IovaRange) -> Self {
        let view = self.view.narrowed(part);
        Bound { view, ..self }
    }

    /// The one sink that records into the view.
    pub(crate) fn into_sink(self) -> Sink<'a> {
        Sink::new(self.view, self.exclusive)
    }
}

#[cfg(all(test, not(dirtymap_loom)))]
#[allow(clippy::unwrap_used)] // helpers of tests
mod tests {
    use super::*;
    use crate::bitmap::WINDOW_BITS;
    use crate::sync::Ordering;
    use crate::units::Iova;

    fn range(start: u64, len: u64) -> IovaRange {
        IovaRange::from_len(Iova::new(start), len).unwrap()
    }

    #[test]
    fn never_a_bit_outside_the_request() {
        let pages = 77;
        let request = range(0x10_0000, pages * 4096);
        for first in 0..pages + 4 {
            for len in 1..20 {
                let mut words = vec![0u64; 4];
                words[1] |= 1 << 63; // bit 127: set by somebody else, past the request
                let view = UserBitmap::new(&mut words)
                    .view(request, Granule::K4)
                    .unwrap();
                let mut sink = view.sink();
                sink.record(range(0x10_0000 - 2 * 4096 + first * 4096, len * 4096))
                    .unwrap();
                let set = sink.bits_set();
                let expect: Vec<u64> = (first..first + len)
                    .filter_map(|b| b.checked_sub(2))
                    .filter(|b| *b < pages)
                    .collect();
                assert_eq!(set, expect.len() as u64);
                assert_eq!(view.count(), set);
                let got: Vec<u64> = (0..256)
                    .filter(|b| words[b / 64] >> (b % 64) & 1 == 1)
                    .map(|b| b as u64)
                    .collect();
                let mut all = expect.clone();
                all.push(127);
                assert_eq!(got, all);
            }
        }
    }

    #[test]
    fn a_record_longer_than_a_window_is_recorded_whole() {
        // History: a leaf that straddled the pinned window lost its tail, or wrote past the window
        // (Linux 2780025e01e2, a4ab7dedaee0). One bit a byte makes three windows out of 48 MiB.
        let byte = Granule::from_bytes(1).unwrap();
        let len = 3 * WINDOW_BITS;
        let mut words = vec![0u64; (len / 64) as usize];
        let view = UserBitmap::new(&mut words)
            .view(range(0, len), byte)
            .unwrap();
        let mut sink = view.sink();
        sink.record(range(WINDOW_BITS - 5, WINDOW_BITS + 10))
            .unwrap();
        assert_eq!((sink.bits_set(), sink.windows()), (WINDOW_BITS + 10, 3));
        let runs: Vec<_> = view.runs().collect();
        assert_eq!(runs, [range(WINDOW_BITS - 5, WINDOW_BITS + 10)]);
    }

    #[test]
    fn coarse_bits_swallow_fine_pages_and_fine_bits_fill() {
        let mut words = [0u64; 1];
        let view = UserBitmap::new(&mut words)
            .view(range(0, 4 << 21), Granule::M2)
            .unwrap();
        view.sink().record(range((1 << 21) + 4096, 4096)).unwrap();
        assert_eq!(words[0], 0b10);
        let mut words = [0u64; 1];
        let half = Granule::from_bytes(2048).unwrap();
        let view = UserBitmap::new(&mut words)
            .view(range(0, 8192), half)
            .unwrap();
        view.sink()
            .record_mask(Iova::MIN, Granule::K4, 0b10)
            .unwrap();
        assert_eq!(words[0], 0b1100);
    }

    /// A driver of Linux compared bytes of a bitmap with pages of a request. Here lengths are
    /// counted in bits, and bytes are addresses.
    #[test]
    fn a_bitmap_that_is_short_by_one_bit_is_refused() {
        let words = [const { AtomicU64::new(0) }; 2];
        let bitmap = || UserBitmap::shared(&words);
        assert!(bitmap().view(range(0, 128 * 4096), Granule::K4).is_ok());
        assert!(matches!(
            bitmap().view(range(0, 129 * 4096), Granule::K4),
            Err(BitmapError::TooShort {
                bits: 128,
                needed: 129,
                ..
            })
        ));
        assert!(matches!(
            bitmap().view(range(2048, 4096), Granule::K4),
            Err(BitmapError::Unaligned { .. })
        ));
        assert!(matches!(
            bitmap().view(IovaRange::ALL, Granule::from_bytes(1).unwrap()),
            Err(BitmapError::TooShort { .. })
        ));
        // The whole address space at the coarsest granule is two bits.
        assert!(
            bitmap()
                .view(IovaRange::ALL, Granule::from_lg2(63).unwrap())
                .is_ok()
        );
    }

    #[test]
    fn masks_agree_with_ranges_at_every_shift() {
        let mask = 0x8000_F00F_0000_5AC3u64;
        for granule in [
            Granule::K4,
            Granule::from_bytes(2048).unwrap(),
            Granule::from_bytes(8192).unwrap(),
        ] {
            for first in 0..200u64 {
                let request = range(70 * 8192, 130 * 8192);
                let (mut whole, mut single) = ([0u64; 9], [0u64; 9]);
                let view = UserBitmap::new(&mut whole).view(request, granule).unwrap();
                let mut sink = view.sink();
                sink.record_mask(Iova::new(first * 4096), Granule::K4, mask)
                    .unwrap();
                let set = sink.bits_set();
                let view = UserBitmap::new(&mut single).view(request, granule).unwrap();
                for page in (0..64).filter(|page| mask >> page & 1 == 1) {
                    view.sink()
                        .record(range((first + page) * 4096, 4096))
                        .unwrap();
                }
                assert_eq!(set, view.count());
                assert_eq!(whole, single, "page {first} at {granule}");
            }
        }
    }

    #[test]
    fn the_last_byte_of_the_address_space_has_its_bit() {
        let mut words = [0u64; 1];
        let top = range(u64::MAX - 8191, 8192);
        let view = UserBitmap::new(&mut words).view(top, Granule::K4).unwrap();
        view.sink().record(range(u64::MAX, 1)).unwrap();
        assert_eq!(
            view.runs().collect::<Vec<_>>(),
            [range(u64::MAX - 4095, 4096)]
        );
    }

    /// The bitmap by which the kit of sources tests what a source does where recording fails: it
    /// fails from the word on that was asked for, and not before.
    #[cfg(not(any(dirtymap_loom, dirtymap_shuttle)))]
    #[test]
    fn a_bitmap_that_fails_records_what_comes_before() {
        let words = [AtomicU64::new(0), AtomicU64::new(0)];
        let view = UserBitmap::failing(&words, 1)
            .view(range(0, 128 * 4096), Granule::K4)
            .unwrap();
        let mut sink = view.sink();
        assert!(sink.record(range(3 * 4096, 4096)).is_ok());
        assert!(sink.record(range(64 * 4096, 4096)).is_err());
        assert_eq!(words[0].load(Ordering::Relaxed), 1 << 3);
    }
}
