//! The pages in which everything happens, and the memory behind them.

use dirtymap::{Iova, IovaRange};

/// The smallest page.
pub(crate) const PAGE: u64 = 4096;
/// Pages of a large leaf.
pub(crate) const LARGE: u64 = 512;
/// The first page of the window in which everything happens: 4 MiB below 4 GiB, so that areas cross
/// from one table to the next.
pub(crate) const FIRST: u64 = 0x10_0000 - 2 * LARGE;
/// Pages of the window: four slots, and the most that an area in the last slot can reach beyond it.
pub(crate) const PAGES: u64 = 7 * LARGE;
/// The first page of the pieces of memory, aligned to large leaves. Below it is the memory of the
/// window, twice, the second time shifted by a page.
pub(crate) const PIECES: u64 = 15 * LARGE;
/// Pages of one of the four pieces of memory that are mapped anywhere.
pub(crate) const PIECE: u64 = 2 * LARGE;
/// Bytes of memory.
pub(crate) const MEMORY: u64 = (PIECES + 4 * PIECE) * PAGE;

/// The bytes of a page.
pub(crate) type Bytes = [u8; PAGE as usize];

/// The addresses of the pages `first..=last`.
pub(crate) fn pages(first: u64, last: u64) -> IovaRange {
    IovaRange::new(Iova::new(first * PAGE), Iova::new(last * PAGE + PAGE - 1))
        .unwrap_or(IovaRange::ALL)
}

/// The pages that `range` touches.
pub(crate) fn pages_of(range: IovaRange) -> impl Iterator<Item = u64> {
    range.start().get() / PAGE..=range.last().get() / PAGE
}

/// Cuts `len` bytes from `at` on at the borders of pages: address, and place in the whole.
pub(crate) fn pieces(at: u64, len: usize) -> impl Iterator<Item = (u64, std::ops::Range<usize>)> {
    let mut done = 0;
    std::iter::from_fn(move || {
        let here = at + done as u64;
        let piece = (len - done).min((PAGE - here % PAGE) as usize);
        let range = done..done + piece;
        done += piece;
        (piece > 0).then_some((here, range))
    })
}
