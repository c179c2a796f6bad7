//! One range, scanned by as many calls as it takes.
//!
//! # What the kernel leaves to its callers
//! * A call stops when its output is full, and a page that found no room is left as it was.
//! * When a call found more regions than the 512 that the kernel keeps at a time, the place where it says that it stopped is where
//!   it last handed some out, not where it came to: what follows was scanned, and is in the output.
//! * So a scan that goes on from there sees pages again; without protection they are reported twice. The receiver is a set.
//! * Where a huge page is larger than what was asked for and cannot be split, the kernel returns without a word.
//! * When a call fails, what it had protected before is not told. So each call is for a piece of bounded size, and all of a piece
//!   whose call failed counts as written.

use std::io;

use super::ioctl::{Kernel, Region};

/// Bytes of one piece, which also begins at a multiple of it: no huge page of x86 but the largest is cut by its borders.
const PIECE: u64 = 64 << 20;

/// A sweep that ended before the end.
#[derive(Debug)]
pub(super) struct Broken {
    /// Where the piece begins that could not be done; all below it was.
    pub(super) at: u64,
    /// Behind the last byte of that piece.
    pub(super) end: u64,
    /// Why.
    pub(super) why: Why,
}

/// Why a piece could not be done.
#[derive(Debug)]
pub(super) enum Why {
    /// The kernel refused a piece. All of it may be written.
    Refused(io::Error),
    /// The kernel stands still here.
    Stuck(u64),
}

/// Hands the pages from `start` up to `end` that were written to `found`, as first address and the one behind the last, in order but
/// for repetitions; and protects them again, if `protect`. What was protected was found, whatever fails.
pub(super) fn sweep(
    kernel: &dyn Kernel,
    (start, end): (u64, u64),
    protect: bool,
    regions: &mut [Region],
    mut found: impl FnMut(u64, u64),
) -> Result<(), Broken> {
    let mut begin = start;
    while begin < end {
        let piece = (begin / PIECE + 1).saturating_mul(PIECE).min(end);
        let (mut at, mut broken) = (begin, None);
        while at < piece {
            let scanned = match kernel.scan(at, piece, protect, regions) {
                Ok(scanned) => scanned,
                Err(error) => {
                    broken = Some((at, Why::Refused(error)));
                    break;
                }
            };
            let filled = regions.get(..scanned.regions).unwrap_or_default();
            for region in filled {
                // Inside, whatever the kernel says.
                let (from, to) = (region.start.max(at), region.end.min(piece));
                if from < to {
                    found(from, to);
                }
            }
            // With the output full, what is behind the last region was not reached, whatever the call says.
            let reached = match filled.last() {
                Some(last) if filled.len() == regions.len() => last.end,
                Some(last) => scanned.walk_end.max(last.end),
                None => scanned.walk_end,
            };
            if reached <= at {
                broken = Some((at, Why::Stuck(at)));
                break;
            }
            at = reached;
        }
        if let Some((at, why)) = broken {
            if protect {
                found(at, piece);
            }
            let (at, end) = (begin, piece);
            return Err(Broken { at, end, why });
        }
        begin = piece;
    }
    Ok(())
}

/// The first page of `start..end` that is not mapped, where the range has one. Pages have `page` bytes.
pub(super) fn first_unmapped(
    kernel: &dyn Kernel,
    (start, end): (u64, u64),
    page: u64,
) -> Option<u64> {
    if kernel.is_mapped(start, end - start) {
        return None;
    }
    // Everything below `mapped` is mapped; not everything below `hole` is.
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
