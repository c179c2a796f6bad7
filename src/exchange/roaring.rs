//! Conversion to and from the compressed sets of the crate `roaring`, for storage, comparison and
//! transfer.
//!
//! A set holds the numbers of the bits of a view: 0 is the first granule of its range. Sets of
//! views with the same range and granule can be united, intersected and subtracted as they are.

use std::io::{self, Read};

use roaring::{RoaringBitmap, RoaringTreemap};

use crate::bitmap::BitmapView;
use crate::error::Error;

/// Bytes of the largest container of a portable set with 2^16 values, with its header: every second
/// value is a run of its own.
const CONTAINER: u64 = 2 + 4 * (1 << 15) + 9;

/// With the feature `roaring`.
impl BitmapView<'_> {
    /// The numbers of the set bits.
    ///
    /// # Errors
    /// [`Error::NoSuchBit`] if the view has more than 2^32 bits, the capacity of such a set: see
    /// [`to_treemap`](Self::to_treemap). [`Error::BitmapShrank`] or [`Error::BitmapWindow`] if a
    /// window of a file cannot be mapped.
    pub fn to_roaring(&self) -> Result<RoaringBitmap, Error> {
        let bit = self.last_bit();
        let last = u64::from(u32::MAX);
        if bit > last {
            return Err(Error::NoSuchBit { bit, last });
        }
        let mut set = RoaringBitmap::new();
        self.each_run(|first, last| {
            // Both lie below 2^32, as was checked.
            set.insert_range(first as u32..=last as u32);
        })?;
        Ok(set)
    }

    /// The numbers of the set bits of a view of any size.
    ///
    /// # Errors
    /// [`Error::BitmapShrank`] or [`Error::BitmapWindow`] if a window of a file cannot be mapped.
    pub fn to_treemap(&self) -> Result<RoaringTreemap, Error> {
        let mut set = RoaringTreemap::new();
        self.each_run(|first, last| {
            set.insert_range(first..=last);
        })?;
        Ok(set)
    }

    /// Sets the bits whose numbers are in `set`, and returns how many were clear.
    ///
    /// # Errors
    /// [`Error::NoSuchBit`] if the view does not have all of them; then nothing is touched.
    /// [`Error::BitmapShrank`] or [`Error::BitmapWindow`] if a window of a file cannot be mapped.
    /// Bits that were set before stay set.
    pub fn or_roaring(&self, set: &RoaringBitmap) -> Result<u64, Error> {
        self.has(set.max().map(u64::from))?;
        let mut sink = self.sink();
        let mut values = set.iter();
        while let Some(run) = values.next_range() {
            sink.record(self.addresses(u64::from(*run.start()), u64::from(*run.end())))?;
        }
        Ok(sink.bits_set())
    }

    /// As [`or_roaring`](Self::or_roaring), for a set of numbers up to 2^64.
    ///
    /// # Errors
    /// As [`or_roaring`](Self::or_roaring).
    pub fn or_treemap(&self, set: &RoaringTreemap) -> Result<u64, Error> {
        self.has(set.max())?;
        let mut sink = self.sink();
        for (high, low) in set.bitmaps() {
            let base = u64::from(high) << 32;
            let mut values = low.iter();
            while let Some(run) = values.next_range() {
                let (first, last) = (u64::from(*run.start()), u64::from(*run.end()));
                sink.record(self.addresses(base + first, base + last))?;
            }
        }
        Ok(sink.bits_set())
    }

    fn has(&self, highest: Option<u64>) -> Result<(), Error> {
        let last = self.last_bit();
        match highest {
            Some(bit) if bit > last => Err(Error::NoSuchBit { bit, last }),
            _ => Ok(()),
        }
    }

    fn each_run(&self, mut each: impl FnMut(u64, u64)) -> Result<(), Error> {
        let base = self.range().start().get();
        let mut runs = self.runs();
        while let Some(run) = runs.next_readable()? {
            let number = |address: u64| (address - base) >> self.granule().lg2();
            each(number(run.start().get()), number(run.last().get()));
        }
        Ok(())
    }
}

/// Reads a set of numbers below `bits` in the portable format of Roaring bitmaps. Reads at most the
/// longest encoding of such a set, and allocates memory only for bytes that it has read. With the
/// feature `roaring`.
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
