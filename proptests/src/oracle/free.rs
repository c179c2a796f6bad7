//! Which addresses are free: lists of ranges, searched from the bottom.

use dirtymap::{Error, Granule, Iova, IovaRange};

use super::{Area, Oracle, range_of};
use crate::op::Stretch;
use crate::pages::PAGE;

/// The reserved and allowed ranges.
#[derive(Clone, Debug, Default)]
pub(crate) struct Free {
    /// Each range as many times as it was reserved, in the order of the calls.
    pub(crate) reserved: Vec<IovaRange>,
    /// The ranges of the last call.
    allowed: Vec<IovaRange>,
}

/// The first address, and one past the last, as numbers that cannot wrap.
fn bytes_of(range: IovaRange) -> (u128, u128) {
    (
        range.start().get().into(),
        u128::from(range.last().get()) + 1,
    )
}

/// The addresses of `ranges` as ranges that do not touch, in order.
fn merged(ranges: &[IovaRange]) -> Vec<IovaRange> {
    let mut sorted: Vec<(u128, u128)> = ranges.iter().copied().map(bytes_of).collect();
    sorted.sort_unstable();
    let mut merged: Vec<(u128, u128)> = Vec::new();
    for (start, end) in sorted {
        match merged.last_mut() {
            Some(before) if start <= before.1 => before.1 = before.1.max(end),
            _ => merged.push((start, end)),
        }
    }
    merged.into_iter().filter_map(range_from).collect()
}

fn range_from((start, end): (u128, u128)) -> Option<IovaRange> {
    IovaRange::new(Iova::new(start as u64), Iova::new((end - 1) as u64)).ok()
}

impl Free {
    pub(crate) fn blocked(&self) -> Vec<IovaRange> {
        merged(&self.reserved)
    }

    pub(crate) fn allowed(&self) -> Vec<IovaRange> {
        merged(&self.allowed)
    }

    /// The first stretch of reserved addresses in `range`.
    pub(crate) fn reserved_in(&self, range: IovaRange) -> Option<IovaRange> {
        self.blocked().into_iter().find(|r| r.intersects(range))
    }

    /// The list of ranges that an operand of `Allow` names.
    pub(crate) fn list(code: u8) -> Vec<IovaRange> {
        let stretch = |slot, skip, pages| range_of(Stretch { slot, skip, pages });
        match code {
            0 | 1 => vec![],
            2 => vec![stretch(0, 0, 3584)],
            3 => vec![stretch(1, 0, 600)],
            // They touch, in the wrong order.
            4 => vec![stretch(1, 0, 512), stretch(0, 0, 512)],
            5 => vec![stretch(0, 7, 3), stretch(2, 1, 1024)],
            // They overlap.
            6 => vec![stretch(0, 0, 600), stretch(1, 0, 4)],
            _ => vec![stretch(3, 500, 40)],
        }
    }

    /// # Errors
    /// The library's error, with the expected values.
    pub(crate) fn allow(&mut self, ranges: Vec<IovaRange>) -> Result<(), Error> {
        let mut sorted = ranges.clone();
        sorted.sort_unstable_by_key(|range| range.start());
        let mut pairs = sorted.windows(2);
        if let Some(pair) = pairs.find(|pair| pair[0].intersects(pair[1])) {
            let (range, other) = (pair[0], pair[1]);
            return Err(Error::AllowedTwice { range, other });
        }
        for range in sorted {
            if let Some(reserved) = self.reserved_in(range) {
                return Err(Error::CannotAllow { range, reserved });
            }
        }
        self.allowed = ranges;
        Ok(())
    }
}

impl Oracle {
    /// # Errors
    /// The library's error, with the expected values.
    pub(crate) fn reserve(&mut self, range: IovaRange) -> Result<(), Error> {
        let areas = self.areas.values().map(Area::range);
        let allowed = self.free.allowed();
        match areas.chain(allowed).find(|other| other.intersects(range)) {
            Some(existing) => Err(Error::CannotReserve { range, existing }),
            None => {
                self.free.reserved.push(range);
                Ok(())
            }
        }
    }

    /// The addresses that are neither mapped nor reserved.
    pub(crate) fn holes(&self) -> Vec<IovaRange> {
        let areas: Vec<IovaRange> = self.areas.values().map(Area::range).collect();
        let taken = merged(&[areas, self.free.reserved.clone()].concat());
        let mut from = 0;
        let mut holes = Vec::new();
        for (start, end) in taken.into_iter().map(bytes_of) {
            if from < start {
                holes.extend(range_from((from, start)));
            }
            from = end;
        }
        if from < 1 << 64 {
            holes.extend(range_from((from, 1 << 64)));
        }
        holes
    }

    /// The place of an area with this many pages and this memory, and the alignment that it needs.
    /// The lowest start that fits is the start of a free stretch, or the first aligned address
    /// after that.
    pub(crate) fn first_fit(&self, area: &Area) -> (Option<u64>, Granule) {
        let len = u128::from(area.pages * PAGE);
        // The alignment that suits large leaves: the length as a power of two, as far as the memory
        // and 2 MiB allow.
        let by_memory = 1 << (area.frame * PAGE).trailing_zeros();
        let page = u128::from(self.unit() * PAGE);
        let align = len
            .next_power_of_two()
            .min(by_memory)
            .min(2 << 20)
            .max(page);
        let all = [IovaRange::ALL].to_vec();
        let allowed = self.free.allowed();
        let windows = if allowed.is_empty() { all } else { allowed };
        // The first and the last page are never allocated.
        let edges = (page, (1 << 64) - page);
        let mut starts = Vec::new();
        for (w_start, w_end) in windows.into_iter().map(bytes_of) {
            for (h_start, h_end) in self.holes().into_iter().map(bytes_of) {
                let start = w_start.max(h_start).max(edges.0).next_multiple_of(align);
                if start + len <= w_end.min(h_end).min(edges.1) {
                    starts.push((start / u128::from(PAGE)) as u64);
                }
            }
        }
        let alignment = Granule::from_lg2(align.trailing_zeros() as u8).unwrap_or(Granule::K4);
        (starts.into_iter().min(), alignment)
    }
}
