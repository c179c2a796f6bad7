//! Bits of a bitmap out of runs: what each cluster of them holds.

use dirtymap::IovaRange;
use dirtymap::exchange::RunTable;

use super::directory::{granules, sized, table_entries};
use super::error::QcowError;
use super::header::Header;

/// What a cluster of a bitmap's bits will hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Content {
    Zeroes,
    Ones,
    Bits,
}

/// What each cluster of bits will hold.
pub(super) fn contents(
    header: &Header,
    dirty: &RunTable,
    lg2: u8,
) -> Result<Vec<Content>, QcowError> {
    let size = header.size;
    if size == 0 {
        return Err(QcowError::Limit {
            place: "the size of the disk",
            found: 0,
            limit: 1,
        });
    }
    if let Some(&run) = dirty.runs().last()
        && run.start().get() >= size
    {
        return Err(QcowError::Outside { run, size });
    }
    let bits = granules(size, lg2);
    sized(header, lg2)?;
    let per_cluster = header.cluster() * 8;
    // At most 2^32 bits, in clusters of at least 2^12.
    let mut content = vec![Content::Zeroes; table_entries(header, lg2) as usize];
    for (first, last) in granule_runs(dirty.runs(), size, lg2) {
        for cluster in first / per_cluster..=last / per_cluster {
            let from = cluster * per_cluster;
            let end = bits.min(from + per_cluster) - 1;
            let whole = first <= from && end <= last;
            // Two runs may touch in granules, so one of them alone may not fill a cluster.
            content[cluster as usize] = if whole { Content::Ones } else { Content::Bits };
        }
    }
    Ok(content)
}

/// The granules that runs touch: first and last, cut at the end of the disk.
fn granule_runs(runs: &[IovaRange], size: u64, lg2: u8) -> impl Iterator<Item = (u64, u64)> {
    runs.iter().map(move |run| {
        let last = run.last().get().min(size - 1);
        (run.start().get() >> lg2, last >> lg2)
    })
}

/// The bits of the cluster `nth` of a bitmap.
pub(super) fn fill(buf: &mut [u8], dirty: &RunTable, size: u64, lg2: u8, nth: u64) {
    buf.fill(0);
    let base = nth * buf.len() as u64 * 8;
    let end = base + buf.len() as u64 * 8 - 1;
    let runs = dirty.runs();
    let from = runs.partition_point(|run| run.last().get() >> lg2 < base);
    for (first, last) in granule_runs(&runs[from..], size, lg2) {
        if first > end {
            break;
        }
        set_bits(buf, first.max(base) - base, last.min(end) - base);
    }
}

fn set_bits(buf: &mut [u8], first: u64, last: u64) {
    let (low, high) = ((first / 8) as usize, (last / 8) as usize);
    let (from, to) = (0xff << (first % 8), 0xff >> (7 - last % 8));
    if low == high {
        buf[low] |= from & to;
    } else {
        buf[low] |= from;
        buf[low + 1..high].fill(0xff);
        buf[high] |= to;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_of_a_run_and_no_others_are_set() {
        for first in 0..40 {
            for last in first..40 {
                let mut buf = [0u8; 5];
                set_bits(&mut buf, first, last);
                let set = |bit: u64| buf[bit as usize / 8] >> (bit % 8) & 1 == 1;
                assert!((0..40).all(|bit| set(bit) == (first..=last).contains(&bit)));
            }
        }
    }
}
