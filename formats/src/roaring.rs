//! Conversion to and from the compressed sets of the crate `roaring`, for storage, comparison and
//! transfer.
//!
//! A set holds the numbers of the bits of a view: 0 is the first granule of its range. Sets of
//! views with the same range and granule can be united, intersected and subtracted as they are.

use std::io::{self, Read};

pub use ::roaring::{RoaringBitmap, RoaringTreemap};

use dirtymap::bitmap::BitmapError;
use dirtymap::{BitmapView, Error, Iova, IovaRange};

/// Bytes of the largest container of a portable set with 2^16 values, with its header: every second
/// value is a run of its own.
const CONTAINER: u64 = 2 + 4 * (1 << 15) + 9;

/// A view of a bitmap to and from a set of the numbers of its bits.
///
/// ```
/// use dirtymap::{Granule, ToIovaRange, UserBitmap};
/// use dirtymap_formats::roaring::RoaringExt;
///
/// # fn main() -> Result<(), dirtymap::Error> {
/// let mut words = [0b110u64];
/// let disk = (0..64 << 12).to_iova_range()?;
/// let view = UserBitmap::new(&mut words).view(disk, Granule::K4)?;
/// let set = view.to_roaring()?;
/// assert_eq!(set.iter().collect::<Vec<u32>>(), [1, 2]);
/// assert_eq!(view.or_roaring(&(2..5).collect())?, 2); // 2 was set
/// # Ok(())
/// # }
/// ```
pub trait RoaringExt {
    /// The numbers of the set bits.
    ///
    /// # Errors
    /// [`BitmapError::NoSuchBit`] if the view has more than 2^32 bits, the capacity of such a set:
    /// see [`to_treemap`](Self::to_treemap). [`BitmapError::Shrank`] or [`BitmapError::Window`] if
    /// a window of a file cannot be mapped.
    fn to_roaring(&self) -> Result<RoaringBitmap, Error>;

    /// The numbers of the set bits of a view of any size.
    ///
    /// # Errors
    /// [`BitmapError::Shrank`] or [`BitmapError::Window`] if a window of a file cannot be mapped.
    fn to_treemap(&self) -> Result<RoaringTreemap, Error>;

    /// Sets the bits whose numbers are in `set`, and returns how many were clear.
    ///
    /// # Errors
    /// [`BitmapError::NoSuchBit`] if the view does not have all of them; then nothing is touched.
    /// [`BitmapError::Shrank`] or [`BitmapError::Window`] if a window of a file cannot be mapped.
    /// Bits that were set before stay set.
    fn or_roaring(&self, set: &RoaringBitmap) -> Result<u64, Error>;

    /// As [`or_roaring`](Self::or_roaring), for a set of numbers up to 2^64.
    ///
    /// # Errors
    /// As [`or_roaring`](Self::or_roaring).
    fn or_treemap(&self, set: &RoaringTreemap) -> Result<u64, Error>;
}

impl RoaringExt for BitmapView<'_> {
    fn to_roaring(&self) -> Result<RoaringBitmap, Error> {
        let bit = self.last_bit();
        let last = u64::from(u32::MAX);
        if bit > last {
            return Err(BitmapError::NoSuchBit { bit, last }.into());
        }
        let mut set = RoaringBitmap::new();
        each_run(self, |first, last| {
            // Both lie below 2^32, as was checked.
            set.insert_range(first as u32..=last as u32);
        })?;
        Ok(set)
    }

    fn to_treemap(&self) -> Result<RoaringTreemap, Error> {
        let mut set = RoaringTreemap::new();
        each_run(self, |first, last| {
            set.insert_range(first..=last);
        })?;
        Ok(set)
    }

    fn or_roaring(&self, set: &RoaringBitmap) -> Result<u64, Error> {
        has(self, set.max().map(u64::from))?;
        let mut sink = self.sink();
        let mut values = set.iter();
        while let Some(run) = values.next_range() {
            let (first, last) = (u64::from(*run.start()), u64::from(*run.end()));
            sink.record(addresses(self, first, last)?)?;
        }
        Ok(sink.bits_set())
    }

    fn or_treemap(&self, set: &RoaringTreemap) -> Result<u64, Error> {
        has(self, set.max())?;
        let mut sink = self.sink();
        for (high, low) in set.bitmaps() {
            let base = u64::from(high) << 32;
            let mut values = low.iter();
            while let Some(run) = values.next_range() {
                let (first, last) = (u64::from(*run.start()), u64::from(*run.end()));
                sink.record(addresses(self, base + first, base + last)?)?;
            }
        }
        Ok(sink.bits_set())
    }
}

fn has(view: &BitmapView<'_>, highest: Option<u64>) -> Result<(), Error> {
    let last = view.last_bit();
    match highest {
        Some(bit) if bit > last => Err(BitmapError::NoSuchBit { bit, last }.into()),
        _ => Ok(()),
    }
}

/// The addresses of the bits `first..=last`, which the view has.
fn addresses(view: &BitmapView<'_>, first: u64, last: u64) -> Result<IovaRange, Error> {
    let (base, granule) = (view.range().start().get(), view.granule());
    let start = Iova::new(base + (first << granule.lg2()));
    let last = Iova::new(base + (last << granule.lg2()) + granule.mask());
    Ok(IovaRange::new(start, last)?)
}

fn each_run(view: &BitmapView<'_>, mut each: impl FnMut(u64, u64)) -> Result<(), Error> {
    let base = view.range().start().get();
    let mut runs = view.runs();
    while let Some(run) = runs.next_readable()? {
        let number = |address: u64| (address - base) >> view.granule().lg2();
        each(number(run.start().get()), number(run.last().get()));
    }
    Ok(())
}

/// Reads a set of numbers below `bits` in the portable format of Roaring bitmaps. Reads at most the
/// longest encoding of such a set, and allocates memory only for bytes that it has read.
///
/// # Errors
/// [`io::ErrorKind::InvalidData`] if a number is not below `bits`, or the bytes are not such a set;
/// otherwise the errors of `reader`. A set that is too long is [`io::ErrorKind::UnexpectedEof`],
/// too.
pub fn read_roaring(reader: impl Read, bits: u64) -> io::Result<RoaringBitmap> {
    let set = RoaringBitmap::deserialize_from(reader.take(longest(bits)))?;
    below(set.max().map(u64::from), bits)?;
    Ok(set)
}

/// As [`read_roaring`], for the format with 64 bits.
///
/// # Errors
/// As [`read_roaring`].
pub fn read_treemap(reader: impl Read, bits: u64) -> io::Result<RoaringTreemap> {
    let mut reader = reader.take(longest(bits));
    let mut number = [0; 8];
    reader.read_exact(&mut number)?;
    let mut parts: Vec<(u32, RoaringBitmap)> = Vec::new();
    // The length is not trusted: each turn reads at least a key.
    for _ in 0..u64::from_le_bytes(number) {
        let mut key = [0; 4];
        reader.read_exact(&mut key)?;
        let key = u32::from_le_bytes(key);
        if parts.last().is_some_and(|(before, _)| *before >= key) {
            return Err(invalid("the parts of the set do not ascend".into()));
        }
        let part = RoaringBitmap::deserialize_from(&mut reader)?;
        below(
            part.max().map(|low| u64::from(key) << 32 | u64::from(low)),
            bits,
        )?;
        parts.push((key, part));
    }
    Ok(RoaringTreemap::from_bitmaps(parts))
}

/// The most bytes that a set of numbers below `bits` can have: its containers, the header of a part
/// for each 2^32 numbers, and that of the whole.
fn longest(bits: u64) -> u64 {
    let containers = bits.div_ceil(1 << 16).saturating_mul(CONTAINER);
    let parts = bits.div_ceil(1 << 32).saturating_mul(12);
    containers.saturating_add(parts).saturating_add(8)
}

fn below(highest: Option<u64>, bits: u64) -> io::Result<()> {
    match highest {
        Some(bit) if bit >= bits => Err(invalid(format!(
            "the set has {bit}, but only numbers below {bits} are expected"
        ))),
        _ => Ok(()),
    }
}

fn invalid(text: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, text)
}
