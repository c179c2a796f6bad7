//! Why process memory cannot be tracked.

use std::io;

use dirtymap::{Granule, IovaRange};

/// What a [`ProcessMemory`](super::ProcessMemory) refuses, or what the kernel says. Addresses named
/// `address` are of this process.
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
    /// A child of `fork` used what its parent made.
    #[error(
        "this tracker is of process {maker}, and this process is a child of it: use it there, or \
         make one for the memory of this process"
    )]
    OfAnotherProcess {
        /// The process that made it.
        maker: u32,
    },
    /// Pages of this memory can be given back to the kernel in ways that leave no trace.
    #[error(
        "the memory at {address:#x} is shared, of a file, or of hugetlbfs: pages of it that are \
         given back do not come out of the kernel as dirty. Add it with GivenBack::Marked, and \
         mark what is given back"
    )]
    GivenBackUnseen {
        /// The first such address.
        address: u64,
    },
    /// The memory was unmapped, and what was mapped in its place belongs to another tracker.
    #[error(
        "the memory from {address:#x} on was mapped anew, and added to another ProcessMemory: \
         remove it from this one"
    )]
    TakenOver {
        /// Where the memory begins.
        address: u64,
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
    /// The kernel failed, or does not track this memory: that of another mapping, at addresses that
    /// were added. All that it was asked for counts as dirty.
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
