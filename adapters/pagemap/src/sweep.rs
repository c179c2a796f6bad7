//! One range, scanned by as many calls as it takes.
//!
//! # What the kernel leaves to its callers
//! * A call stops when its output is full, and a page that found no room is left as it was.
//! * When a call found more regions than the 512 that the kernel keeps at a time, the end that it
//!   returns is where it last copied regions to the output. The pages that follow were scanned too,
//!   and are in the output.
//! * So a scan that goes on from there sees those pages again, and reports them twice if it does
//!   not protect. The receiver is a set.
//! * Where a huge page is larger than what was asked for and cannot be split, the kernel returns no
//!   region and no error.
//! * A call that fails does not report the pages that it had protected before. So each call is for
//!   a piece of bounded size, and all of a piece whose call failed counts as written.

use std::io;

use super::ioctl::{Find, Kernel, PROBES, Region, table_bytes};

/// Bytes of one piece, which also begins at a multiple of it: no huge page of x86 but the largest
/// is cut by its borders.
const PIECE: u64 = 64 << 20;

/// A sweep that ended before the end.
#[derive(Debug)]
pub(super) struct Broken {
    /// Where the piece that failed begins. All below it was done.
    pub(super) at: u64,
    /// The address after the last byte of that piece.
    pub(super) end: u64,
    /// Why.
    pub(super) why: Why,
}

/// Why a piece could not be done.
#[derive(Debug)]
pub(super) enum Why {
    /// The kernel refused a piece. All of it may be written.
    Refused(io::Error),
    /// The kernel makes no progress at this address.
    Stuck(u64),
}

/// What is asked of the kernel.
#[derive(Clone, Copy)]
pub(super) struct Ask<'k> {
    pub(super) kernel: &'k dyn Kernel,
    /// Whether pages that are found are protected again.
    pub(super) protect: bool,
    /// Bytes of a page.
    pub(super) page: u64,
    /// Whether page tables that are gone are looked for.
    pub(super) given_back: bool,
}

/// Hands the pages from `start` up to `end` that were written, or given back, to `found`, as first
/// address and the one after the last, in order but for repetitions; and protects them again, if
/// that is asked for. What was protected was found, whatever fails.
pub(super) fn sweep(
    ask: Ask<'_>,
    (start, end): (u64, u64),
    regions: &mut [Region],
    mut found: impl FnMut(u64, u64),
) -> Result<(), Broken> {
    let mut begin = start;
    while begin < end {
        let piece = (begin / PIECE + 1).saturating_mul(PIECE).min(end);
        let span = (begin, piece);
        let done = sweep_nothing(ask, span, regions, &mut found)
            .and_then(|()| scan(ask, span, Find::Written, regions, &mut found));
        if let Err((at, why)) = done {
            if ask.protect {
                found(at, piece);
            }
            let (at, end) = span;
            return Err(Broken { at, end, why });
        }
        begin = piece;
    }
    Ok(())
}

/// Finds the pages of `start..end` that lie in no page table, which the scan for writes skips on
/// some kernels: when all pages of a table, or a whole huge page, are given back, the table goes,
/// and the marks of protection go with it. One page of each table tells.
pub(super) fn sweep_nothing(
    ask: Ask<'_>,
    (start, end): (u64, u64),
    regions: &mut [Region],
    found: &mut impl FnMut(u64, u64),
) -> Result<(), (u64, Why)> {
    if !ask.given_back {
        return Ok(());
    }
    // Those of 4 KiB pages are the smallest, and a piece has no more than `PROBES` of them.
    let table = table_bytes(ask.page);
    let (mut pages, mut there) = ([0; PROBES], [-1; PROBES]);
    let mut count = 0;
    let mut at = start;
    while at < end && count < PROBES {
        pages[count] = at;
        count += 1;
        at = (at / table + 1).saturating_mul(table);
    }
    ask.kernel.probe(&pages[..count], &mut there[..count]);
    let unsure = pages.iter().zip(&there).take(count);
    for (page, _) in unsure.filter(|(_, there)| **there < 0) {
        let last = (page / table + 1).saturating_mul(table).min(end);
        // In swap, or never written, in most cases: a look at one page is a third of a scan.
        let look = Ask {
            protect: false,
            ..ask
        };
        let mut gone = false;
        let first = (*page, last.min(page.saturating_add(ask.page)));
        scan(look, first, Find::Nothing, regions, &mut |_, _| gone = true)?;
        if gone {
            scan(ask, (*page, last), Find::Nothing, regions, found)?;
        }
    }
    Ok(())
}

/// Calls the kernel until it has come from `start` to `end`. An error comes with the address up to
/// which all is done.
fn scan(
    ask: Ask<'_>,
    (start, end): (u64, u64),
    find: Find,
    regions: &mut [Region],
    found: &mut impl FnMut(u64, u64),
) -> Result<(), (u64, Why)> {
    let mut at = start;
    while at < end {
        let scanned = ask
            .kernel
            .scan((at, end), find, ask.protect, regions)
            .map_err(|error| (at, Why::Refused(error)))?;
        let filled = regions.get(..scanned.regions).unwrap_or_default();
        for region in filled {
            // Clamped to the range, for any answer of the kernel.
            let (from, to) = (region.start.max(at), region.end.min(end));
            if from < to {
                found(from, to);
            }
        }
        // With the output full, what is above the last region was not reached, whatever the call
        // says.
        let reached = match filled.last() {
            Some(last) if filled.len() == regions.len() => last.end,
            Some(last) => scanned.walk_end.max(last.end),
            None => scanned.walk_end,
        };
        if reached <= at {
            return Err((at, Why::Stuck(at)));
        }
        at = reached;
    }
    Ok(())
}

/// The first page of `start..end` that is not mapped, where the range has one. Pages have `page`
/// bytes.
pub(super) fn first_unmapped(
    kernel: &dyn Kernel,
    (start, end): (u64, u64),
    page: u64,
) -> Option<u64> {
    if kernel.is_mapped(start, end - start) {
        return None;
    }
    // All below `mapped` is mapped. Below `hole` lies a page that is not.
    let (mut mapped, mut hole) = (start, end);
    while hole - mapped > page {
        let middle = mapped + (hole - mapped) / page / 2 * page;
        if kernel.is_mapped(mapped, middle - mapped) {
            mapped = middle;
        } else {
            hole = middle;
        }
    }
    Some(mapped)
}
