//! The layout of addresses. An address and its memory differ by a constant, so a page has one
//! number for both.
//!
//! ```text
//!  page 0          1024     1400  1536              2560                          4608
//!  | static, large | static | 9,  | 48 slots of     | 4 slots of 512 pages: one   | scratch
//!  | leaves        |        | 112 | 16 pages        | 2 MiB leaf, or two areas    |
//! ```

use dirtymap::{Iova, IovaRange};

use crate::Random;

/// Bytes of a page.
pub(super) const PAGE: u64 = 4096;
/// The address of page 0.
const BASE: u64 = 1 << 30;
/// Bytes of a page that belong to one writer.
pub(super) const LANE: u64 = 64;
/// Pages that are written.
pub(super) const PAGES: u64 = 4608;
/// Pages of memory after them that are never written.
pub(super) const SCRATCH: u64 = 64;

/// First page and number of pages of each area that is always mapped.
pub(super) const STATIC: [(u64, u64); 3] = [(0, 1024), (1024, 300), (1400, 9)];

/// First page and number of pages of the area of discarders, if there are any.
pub(super) const TRIMMED: (u64, u64) = (1416, 112);

/// First page and number of pages of discarder `nth` of `all`, in units of 4 pages.
pub(super) const fn trimmed(nth: u64, all: u64) -> (u64, u64) {
    let each = TRIMMED.1 / 4 / all * 4;
    (TRIMMED.0 + nth * each, each)
}

/// Whether discarders write to pages of `range`.
pub(super) fn is_trimmed(range: IovaRange) -> bool {
    let pages = pages_of(range);
    *pages.start() < TRIMMED.0 + TRIMMED.1 && *pages.end() >= TRIMMED.0
}

/// Number of small and of large slots.
pub(super) const SMALL: usize = 48;
pub(super) const LARGE: usize = 4;
const SMALL_PAGES: u64 = 16;
const LARGE_PAGES: u64 = 512;
const FIRST_SMALL: u64 = 1536;
const FIRST_LARGE: u64 = 2560;

/// The first page of slot `nth`, and its number of pages. Small slots come first.
pub(super) const fn slot(nth: usize) -> (u64, u64) {
    if nth < SMALL {
        (FIRST_SMALL + nth as u64 * SMALL_PAGES, SMALL_PAGES)
    } else {
        let nth = (nth - SMALL) as u64;
        (FIRST_LARGE + nth * LARGE_PAGES, LARGE_PAGES)
    }
}

/// The slot that `page` is in.
pub(super) fn slot_of(page: u64) -> Option<usize> {
    if page >= FIRST_LARGE {
        Some(SMALL + ((page - FIRST_LARGE) / LARGE_PAGES) as usize).filter(|_| page < PAGES)
    } else {
        let nth = page.checked_sub(FIRST_SMALL)? / SMALL_PAGES;
        Some(nth as usize).filter(|nth| *nth < SMALL)
    }
}

/// The address at which `page` begins.
pub(super) fn iova(page: u64) -> Iova {
    Iova::new(BASE + page * PAGE)
}

/// The addresses of `pages` pages.
pub(super) fn range(first: u64, pages: u64) -> IovaRange {
    IovaRange::from_len(iova(first), pages * PAGE).unwrap()
}

/// The pages that `range` touches.
pub(super) fn pages_of(range: IovaRange) -> std::ops::RangeInclusive<u64> {
    (range.start().get() - BASE) / PAGE..=(range.last().get() - BASE) / PAGE
}

/// The addresses for maps anywhere.
pub(super) fn scratch() -> IovaRange {
    IovaRange::from_len(Iova::new(BASE + (64 << 20)), 1 << 20).unwrap()
}

/// A random page to write. Half of the time it is one of a few in an area that is always mapped.
pub(super) fn any_page(random: &mut Random) -> u64 {
    match random.below(8) {
        0..4 => {
            let (first, pages) = STATIC[random.below(3) as usize];
            first + random.below(pages.min(24))
        }
        4..6 => any_static(random),
        6 => FIRST_SMALL + random.below(SMALL as u64 * SMALL_PAGES),
        _ if random.below(4) == 0 => FIRST_LARGE + random.below(LARGE as u64 * LARGE_PAGES),
        _ => FIRST_SMALL + random.below(SMALL as u64 * SMALL_PAGES),
    }
}

/// A page that is always mapped.
pub(super) fn any_static(random: &mut Random) -> u64 {
    let (first, pages) = STATIC[random.below(3) as usize];
    first + random.below(pages)
}
