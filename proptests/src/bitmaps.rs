//! Bitmaps that are read, merged, converted and subtracted, against lists of intervals: any base,
//! granule, form and byte offset, up to both ends of the address space.

use std::collections::BTreeSet;

use dirtymap::{BitmapView, Granule, Iova, IovaRange};

use crate::forms::{FORMS, GUARD, Memory, bits_of};

/// The most bits of one bitmap.
const MOST: u128 = 600;

/// One bitmap: its range and its bits.
struct Side {
    range: IovaRange,
    granule: Granule,
    image: Vec<u8>,
    memory: Memory,
}

impl Side {
    /// A bitmap for `range`, whose content is decoded from the rest of `bytes`.
    fn decode(
        range: IovaRange,
        granule: Granule,
        bytes: &mut impl Iterator<Item = u8>,
    ) -> Result<Self, String> {
        let (form, skip) = (bytes.next().unwrap_or(0), bytes.next().unwrap_or(0));
        // In whole words, with room after the bitmap.
        let len =
            (range.granules(granule) as usize).div_ceil(64) * 8 + usize::from(skip / 8 % 2) * 8;
        let mut image = vec![0xA5; len + 2 * GUARD];
        let dense = bytes.next().unwrap_or(0);
        for byte in &mut image[GUARD..GUARD + len] {
            // Sparse, mixed or full.
            *byte = match dense % 4 {
                0 => 0,
                1 => 0xff,
                _ => bytes.next().unwrap_or(0),
            };
        }
        let form = FORMS[usize::from(form) % FORMS.len()];
        let memory = Memory::new(form, &image, usize::from(skip % 8)).map_err(|v| v.to_string())?;
        Ok(Side {
            range,
            granule,
            image,
            memory,
        })
    }

    fn bits(&self) -> u64 {
        self.range.granules(self.granule) as u64
    }

    /// The bits of the request that are set.
    fn set(&self) -> Vec<u64> {
        let content = &self.image[GUARD..self.image.len() - GUARD];
        bits_of(content).filter(|bit| *bit < self.bits()).collect()
    }

    /// The bytes that `bit` stands for: the first one, and one past the last.
    fn interval(&self, bit: u64) -> (u128, u128) {
        let start = u128::from(self.range.start().get()) + (u128::from(bit) << self.granule.lg2());
        (start, start + (1 << self.granule.lg2()))
    }

    /// The dirty bytes, as intervals.
    fn dirty(&self) -> Vec<(u128, u128)> {
        self.set()
            .into_iter()
            .map(|bit| self.interval(bit))
            .collect()
    }

    fn flip(&mut self, bit: u64) {
        self.image[GUARD + bit as usize / 8] ^= 1 << (bit % 8);
    }
}

/// A range of whole granules, at most [`MOST`], that lies somewhere near `near`, as far as that is
/// possible.
fn range_of(granule: Granule, near: u128, bytes: &mut impl Iterator<Item = u8>) -> IovaRange {
    let (shift, count) = (bytes.next().unwrap_or(0), bytes.next().unwrap_or(0));
    let room = (1u128 << 64) >> granule.lg2();
    let count = (u128::from(count) * 3 + 1).min(MOST).min(room);
    // Up to three granules below, and as many above.
    let at = (near >> granule.lg2()) + u128::from(shift % 7);
    let first = at.saturating_sub(3).min(room - count);
    let start = first << granule.lg2();
    let last = start + (count << granule.lg2()) - 1;
    IovaRange::new(Iova::new(start as u64), Iova::new(last as u64)).unwrap_or(IovaRange::ALL)
}

fn overlap(one: (u128, u128), other: (u128, u128)) -> u128 {
    one.1.min(other.1).saturating_sub(one.0.max(other.0))
}

/// Checks two bitmaps that are decoded from `bytes`.
///
/// # Errors
/// The first difference.
pub fn check_bitmaps(bytes: &[u8]) -> Result<(), String> {
    let mut bytes = bytes.iter().copied();
    let (lg2, other, place) = (bytes.next(), bytes.next(), bytes.next());
    let lg2 = lg2.unwrap_or(0) % 64;
    // Mostly of about the same size.
    let other = match other.unwrap_or(0) {
        other @ 0..192 => (i16::from(lg2) + i16::from(other % 13) - 6).clamp(0, 63) as u8,
        other => other % 64,
    };
    let granule = |lg2| Granule::from_lg2(lg2).unwrap_or(Granule::BYTE);
    let near = match place.unwrap_or(0) % 4 {
        0 => 0,
        1 => 1 << 63,
        2 => (1 << 64) - 1,
        _ => 0x1234_5678_9abc,
    };
    let one = range_of(granule(lg2), near, &mut bytes);
    let near = u128::from(one.start().get());
    let two = range_of(granule(other), near, &mut bytes);
    let cut = (bytes.next().unwrap_or(0), bytes.next().unwrap_or(0));
    let mut from = Side::decode(one, granule(lg2), &mut bytes)?;
    let mut into = Side::decode(two, granule(other), &mut bytes)?;
    read(&mut from, cut)?;
    read(&mut into, cut)?;
    merge(&mut from, &mut into)?;
    take_away(&mut from, &mut into)
}

/// Compares the bits of a view, whole and in part.
fn read(side: &mut Side, cut: (u8, u8)) -> Result<(), String> {
    let (set, range, granule) = (side.set(), side.range, side.granule);
    let at = |n: u8| {
        let offset = (range.len() - 1) * u128::from(n) / 255;
        Iova::new((u128::from(range.start().get()) + offset) as u64)
    };
    let part = IovaRange::new(at(cut.0.min(cut.1)), at(cut.0.max(cut.1)));
    let part = part.map_err(|error| error.to_string())?;
    let whole = |bit: &u64| {
        let (start, end) = side.interval(*bit);
        u128::from(part.start().get()) <= start && end <= u128::from(part.last().get()) + 1
    };
    let inside: Vec<u64> = set.iter().copied().filter(whole).collect();
    let first = (0..side.bits()).find(whole);
    let view = view(&mut side.memory, range, granule)?;
    same_bits("a view", &view, &set)?;
    match (view.part(part), first) {
        (None, None) => Ok(()),
        (Some(view), Some(first)) => {
            let inside: Vec<u64> = inside.iter().map(|bit| bit - first).collect();
            same_bits("a part", &view, &inside)
        }
        (view, first) => Err(format!(
            "the part {part} of {range}: {view:?}, from {first:?}"
        )),
    }
}

fn view(memory: &mut Memory, range: IovaRange, granule: Granule) -> Result<BitmapView<'_>, String> {
    let bound = memory.bitmap().view(range, granule);
    bound.map_err(|error| format!("{range} at {granule}: {error}"))
}

fn same_bits(what: &str, view: &BitmapView<'_>, set: &[u64]) -> Result<(), String> {
    let bits: Vec<u64> = view.bits().collect();
    if bits != set || view.count() != set.len() as u64 {
        return Err(format!(
            "{what}: {bits:?}, counted {}, not {set:?}",
            view.count()
        ));
    }
    let (base, lg2) = (u128::from(view.range().start().get()), view.granule().lg2());
    let mut runs: Vec<(u128, u128)> = Vec::new();
    for bit in set {
        let start = base + (u128::from(*bit) << lg2);
        let end = start + (1 << lg2);
        match runs.last_mut() {
            Some(run) if run.1 == start => run.1 = end,
            _ => runs.push((start, end)),
        }
    }
    let ends = |run: IovaRange| (run.start().get().into(), u128::from(run.last().get()) + 1);
    let got: Vec<(u128, u128)> = view.runs().map(ends).collect();
    if got == runs {
        Ok(())
    } else {
        Err(format!("{what}: the runs {got:?}, not {runs:?}"))
    }
}

fn unchanged(what: &str, side: &Side, before: &[u8]) -> Result<(), String> {
    let now = side.memory.image(before).map_err(|v| v.to_string())?;
    if now == side.image {
        Ok(())
    } else {
        Err(format!("{what}: {now:x?}, not {:x?}", side.image))
    }
}

/// A merge sets each bit in which the other bitmap has a dirty byte.
fn merge(from: &mut Side, into: &mut Side) -> Result<(), String> {
    let dirty = from.dirty();
    let own: BTreeSet<u64> = into.set().into_iter().collect();
    let clear = |bit: &u64| !own.contains(bit);
    let fresh: Vec<u64> = (0..into.bits())
        .filter(clear)
        .filter(|bit| dirty.iter().any(|d| overlap(into.interval(*bit), *d) > 0))
        .collect();
    let before = into.image.clone();
    let target = view(&mut into.memory, into.range, into.granule)?;
    let set = view(&mut from.memory, from.range, from.granule)?
        .or_into(&target)
        .map_err(|error| error.to_string())?;
    fresh.iter().for_each(|bit| into.flip(*bit));
    unchanged("a merge", into, &before)?;
    unchanged("what was merged", from, &from.image)?;
    match set == fresh.len() as u64 {
        true => Ok(()),
        false => Err(format!("{set} bits set by a merge, not {fresh:?}")),
    }
}

/// A subtraction clears each bit of which every byte is dirty in the other bitmap.
fn take_away(from: &mut Side, into: &mut Side) -> Result<(), String> {
    let dirty = from.dirty();
    let gone: Vec<u64> = (into.set().into_iter())
        .filter(|bit| {
            let own = into.interval(*bit);
            dirty.iter().map(|d| overlap(own, *d)).sum::<u128>() == own.1 - own.0
        })
        .collect();
    let before = into.image.clone();
    let other = view(&mut from.memory, from.range, from.granule)?;
    let cleared = view(&mut into.memory, into.range, into.granule)?
        .and_not(&other)
        .map_err(|error| error.to_string())?;
    gone.iter().for_each(|bit| into.flip(*bit));
    unchanged("taking away", into, &before)?;
    match cleared == gone.len() as u64 {
        true => Ok(()),
        false => Err(format!("{cleared} bits taken away, not {gone:?}")),
    }
}

#[cfg(test)]
mod tests {
    use super::check_bitmaps;
    use proptest::collection::vec;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn bitmaps_agree_with_lists_of_intervals(bytes in vec(any::<u8>(), 0..220)) {
            check_bitmaps(&bytes).map_err(TestCaseError::fail)?;
        }
    }
}
