//! Why process memory cannot be tracked.

use std::io;

use crate::units::{Granule, IovaRange};

/// What a [`ProcessMemory`](super::ProcessMemory) refuses, or what the kernel says. Addresses named `address` are of this
/// process.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PagemapError {
    /// This kernel cannot do it, or does not let this process.
    #[error("this kernel has no {feature} for this process (Linux 6.7 or newer has): {error}")]
    Unsupported {
        /// What is missing.
        feature: &'static str,
        /// What the kernel says.
        #[source]
        error: io::Error,
    },
    /// Memory is tracked in whole pages.
    #[error("the memory for {range}, from {address:#x} on, is not made of pages of {page}")]
    Unaligned {
        /// The addresses to report it at.
        range: IovaRange,
        /// Where it begins.
        address: u64,
        /// The page of this system.
        page: Granule,
    },
    /// The memory would go past the last address.
    #[error("the memory for {range} begins at {address:#x} and goes past the last address")]
    Wraps {
        /// The addresses to report it at.
        range: IovaRange,
        /// Where it would begin.
        address: u64,
    },
    /// Memory that is tracked already, or would be reported at the same addresses.
    #[error("{range} overlaps {other}, which was added before, at its addresses or in its memory")]
    Overlap {
        /// The addresses to report it at.
        range: IovaRange,
        /// Those of what is in its way.
        other: IovaRange,
    },
    /// Nothing was added under exactly this range.
    #[error("{range} was not added: name a range as it was added")]
    NotAdded {
        /// The range asked for.
        range: IovaRange,
    },
    /// No memory for the bits.
    #[error("no memory for {words} words of bits of {range}")]
    NoMemory {
        /// The addresses to report it at.
        range: IovaRange,
        /// Words of 64 bits.
        words: usize,
    },
    /// Memory that was added is not mapped any more. What was written to it cannot be told.
    #[error("the memory at {address:#x} was unmapped: remove it, or map and add it anew")]
    Unmapped {
        /// The first such address.
        address: u64,
    },
    /// The kernel stands still: the page is part of a larger one that it writes only as a whole.
    #[error("the scan stands still at {address:#x}, in a page that is larger than the request")]
    NoProgress {
        /// Where.
        address: u64,
    },
    /// The kernel failed, or does not track this memory: that of another mapping, at addresses that were added. All that it was asked
    /// for counts as dirty.
    #[error("{call} failed at {address:#x} (is this still the mapping that was added?): {error}")]
    Call {
        /// The call by its name in the documentation.
        call: &'static str,
        /// The first address that was asked for.
        address: u64,
        /// What the kernel says.
        #[source]
        error: io::Error,
    },
}
