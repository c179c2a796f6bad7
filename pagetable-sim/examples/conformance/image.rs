//! A caller's memory around a bitmap, byte by byte.

use super::parse::{Buffer, HOST_PAGE, Rights};

/// The readable pages of a buffer that are contiguous with page 0, and the place at which the
/// bitmap begins.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Image {
    bytes: Vec<u8>,
    /// The byte of the pointer.
    base: usize,
    /// The number of writable bytes from the pointer on.
    writable: usize,
}

impl Image {
    /// The memory before the call. Empty for a NULL pointer.
    pub(crate) fn new(buffer: Option<&Buffer>) -> Self {
        let nothing = Image {
            bytes: Vec::new(),
            base: 0,
            writable: 0,
        };
        let Some(buffer) = buffer else {
            return nothing;
        };
        let below = pages(buffer, -1, -1, |rights| rights != Rights::None);
        let above = pages(buffer, 0, 1, |rights| rights != Rights::None);
        let writable = pages(buffer, 0, 1, |rights| rights == Rights::Rw);
        if above == 0 {
            return nothing;
        }
        let (page, off) = (HOST_PAGE as usize, buffer.off as usize);
        Image {
            bytes: vec![buffer.fill; (below + above) * page],
            base: below * page + off,
            writable: (writable * page).saturating_sub(off),
        }
    }

    /// The bitmap, as long as it can be written.
    pub(crate) fn bitmap(&mut self) -> &mut [u8] {
        &mut self.bytes[self.base..][..self.writable]
    }

    /// The number of writable bits, from the pointer on.
    pub(crate) fn bits(&self) -> u128 {
        self.writable as u128 * 8
    }

    /// Sets or clears bits. False if some are outside the memory.
    pub(crate) fn put(&mut self, first: i64, count: u64, one: bool) -> bool {
        let from = i128::from(first) + self.base as i128 * 8;
        let end = from + i128::from(count);
        if from < 0 || end > self.bytes.len() as i128 * 8 {
            return false;
        }
        // Inside the memory, so these numbers are bits of it.
        let (mut bit, end) = (from as usize, end as usize);
        while bit < end {
            let (byte, bits) = (&mut self.bytes[bit / 8], (8 - bit % 8).min(end - bit));
            let mask = (0xff >> (8 - bits)) << (bit % 8);
            *byte = if one { *byte | mask } else { *byte & !mask };
            bit += bits;
        }
        true
    }
}

/// The number of consecutive pages, from `at` on in steps of `step`, whose rights are `fine`. Later
/// entries of a buffer override earlier ones.
fn pages(buffer: &Buffer, mut at: i64, step: i64, fine: impl Fn(Rights) -> bool) -> usize {
    let rights = |at: i64| {
        let mut runs = buffer.pages.iter().rev();
        let holds = |(first, count, _): &&(i64, u64, Rights)| {
            *first <= at && i128::from(at) < i128::from(*first) + i128::from(*count)
        };
        runs.find(holds).map_or(Rights::None, |run| run.2)
    };
    let mut count = 0;
    while fine(rights(at)) {
        (at, count) = (at + step, count + 1);
    }
    count
}
