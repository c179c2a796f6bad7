//! Addresses, ranges, granules and the checks of requests at the edges of 64 bits, against
//! arithmetic in 128.

use dirtymap::bitmap::BitmapError;
use dirtymap::{Granule, Iova, IovaRange, RangeError, SparseBitmap, UserBitmap};

/// A number that is often near a power of two, or near an end.
fn number(bytes: &mut impl Iterator<Item = u8>) -> u64 {
    let (place, offset) = (bytes.next().unwrap_or(0), bytes.next().unwrap_or(0));
    let offset = u64::from(offset);
    match place {
        0..64 => (1u64 << place).wrapping_add(offset),
        64..128 => (1u64 << (place - 64)).wrapping_sub(offset),
        128..192 => u64::MAX - (offset << (place % 57)),
        192..224 => offset << (place % 57),
        _ => (0..8).fold(offset, |n, _| n << 8 | u64::from(bytes.next().unwrap_or(0))),
    }
}

/// A range in 128 bits: the first byte, and one past the last.
fn ends(range: IovaRange) -> (u128, u128) {
    let last = u128::from(range.last().get());
    (range.start().get().into(), last + 1)
}

fn same<T: PartialEq + std::fmt::Debug>(what: &str, got: T, right: T) -> Result<(), String> {
    match got == right {
        true => Ok(()),
        false => Err(format!("{what}: {got:?}, not {right:?}")),
    }
}

/// Checks ranges and requests that are decoded from `bytes`.
///
/// # Errors
/// The first difference.
pub fn check_ranges(bytes: &[u8]) -> Result<(), String> {
    let mut bytes = bytes.iter().copied();
    let [a, b, c, d] = [(); 4].map(|()| number(&mut bytes));
    let lg2 = bytes.next().unwrap_or(0) % 80;
    let bits = number(&mut bytes);
    let (iova, other) = (Iova::new(a), Iova::new(b));
    let (wide_a, wide_b) = (u128::from(a), u128::from(b));
    let end = 1u128 << 64;

    let sum = (wide_a + wide_b < end).then(|| Iova::new((wide_a + wide_b) as u64));
    same("an address and a length", iova.checked_add(b), sum)?;
    same("the offset", iova.offset_from(other), a.checked_sub(b))?;
    let len = IovaRange::from_len(iova, b).map(ends);
    match len {
        Ok(got) => same("the range", got, (wide_a, wide_a + wide_b))?,
        Err(RangeError::ZeroLength { .. }) => same("a length", b, 0)?,
        Err(RangeError::Wraps { .. }) => same("a wrap", b > 0 && wide_a + wide_b > end, true)?,
        Err(error) => return Err(error.to_string()),
    }
    same(
        "a range that fits",
        len.is_ok(),
        b > 0 && wide_a + wide_b <= end,
    )?;
    same(
        "a range upwards",
        IovaRange::new(iova, other).is_ok(),
        a <= b,
    )?;

    let granule = Granule::from_lg2(lg2);
    same("a granule", granule.is_some(), lg2 < 64)?;
    let power = Granule::from_bytes(c).map(Granule::bytes);
    same(
        "a power of two",
        power.ok(),
        c.is_power_of_two().then_some(c),
    )?;
    let Some(granule) = granule else {
        return Ok(());
    };
    let size = 1u128 << lg2;
    same("the size", u128::from(granule.bytes()), size)?;
    let down = |at: u128| at / size * size;
    let up = |at: u128| at.div_ceil(size) * size;
    same("alignment", iova.is_aligned(granule), wide_a % size == 0)?;
    same(
        "a start",
        u128::from(iova.granule_start(granule).get()),
        down(wide_a),
    )?;
    let last = down(wide_a) + size - 1;
    same(
        "a last byte",
        u128::from(iova.granule_last(granule).get()),
        last,
    )?;
    same(
        "one granule",
        ends(IovaRange::granule_at(iova, granule)),
        (last + 1 - size, last + 1),
    )?;

    let upwards = |x: u64, y: u64| IovaRange::new(Iova::new(x.min(y)), Iova::new(x.max(y)));
    let (Ok(one), Ok(two)) = (upwards(a, b), upwards(c, d)) else {
        return Err("a range that goes upwards was refused".to_owned());
    };
    let ((s, e), (t, f)) = (ends(one), ends(two));
    same("the length", one.len(), e - s)?;
    let common = (s.max(t) < e.min(f)).then(|| (s.max(t), e.min(f)));
    same("what is common", one.intersection(two).map(ends), common)?;
    same("whether anything is", one.intersects(two), common.is_some())?;
    same("whether all is", one.covers(two), common == Some((t, f)))?;
    let inside = s <= u128::from(c) && u128::from(c) < e;
    same(
        "whether an address is inside",
        one.contains(Iova::new(c)),
        inside,
    )?;
    let aligned = s.is_multiple_of(size) && e.is_multiple_of(size);
    same(
        "whether a range is aligned",
        one.is_aligned(granule),
        aligned,
    )?;
    same(
        "rounded out",
        ends(one.round_out(granule)),
        (down(s), up(e)),
    )?;
    let whole = (up(s) < down(e)).then(|| (up(s), down(e)));
    same("rounded in", one.round_in(granule).map(ends), whole)?;
    let touched = (up(e) - down(s)) / size;
    same("the granules", one.granules(granule), touched)?;
    request(one, granule, bits)?;
    request(one.round_out(granule), granule, bits)
}

/// A request is refused for its alignment, then for a bitmap that is too short, and for nothing
/// else.
fn request(range: IovaRange, granule: Granule, bits: u64) -> Result<(), String> {
    let sparse = SparseBitmap::new(bits);
    let bits = u128::from(bits.min(1 << 63));
    let (start, end) = ends(range);
    let size = 1u128 << granule.lg2();
    let aligned = start.is_multiple_of(size) && end.is_multiple_of(size);
    let needed = (end - start) / size;
    match UserBitmap::sparse(&sparse).view(range, granule) {
        Ok(view) => {
            same("a request that is granted", aligned && needed <= bits, true)?;
            // The bits at the borders are at their places.
            for (byte, bit) in [(range.start(), 0), (range.last(), needed as u64 - 1)] {
                let one = IovaRange::granule_at(byte, Granule::BYTE);
                view.sink().record(one).map_err(|error| error.to_string())?;
                same(
                    "a bit at a border",
                    view.bits().any(|other| other == bit),
                    true,
                )?;
            }
            same("the bits", view.count(), needed.min(2) as u64)
        }
        Err(BitmapError::Unaligned { .. }) => same("a request that is unaligned", aligned, false),
        Err(BitmapError::TooShort { needed: said, .. }) => {
            same("the bits that are needed", said, needed)?;
            same("a bitmap that is too short", aligned && needed > bits, true)
        }
        Err(error) => Err(error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::check_ranges;
    use proptest::collection::vec;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn arithmetic_agrees_with_twice_as_many_bits(bytes in vec(any::<u8>(), 0..60)) {
            check_ranges(&bytes).map_err(TestCaseError::fail)?;
        }
    }
}
