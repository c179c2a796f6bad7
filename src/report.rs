//! The reports of calls: numbers for the caller, and for events.

/// The report of a harvest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
pub struct HarvestReport {
    /// Areas that were walked.
    pub areas: u64,
    /// Bits of the lease that went from 0 to 1 in the user's bitmap. A harvest that
    /// [stopped](crate::Lease::stopped) and put back pages above the stop may count fewer bits, if
    /// bits above the stop were set before.
    pub bits_set: u64,
    /// Dirty leaves of IO page tables; each owes an invalidation.
    pub leaves: u64,
    /// Windows of the user's bitmap that were opened.
    pub windows: u64,
}

/// The report of an abort.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
pub struct Aborted {
    /// Bytes that are dirty again.
    pub bytes: u64,
    /// Bytes that could not be put back, because no area holds them any more.
    pub outside_bytes: u64,
}

/// The result of a discard.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
pub struct Discarded {
    /// Bytes of whole pages, which read as zero until they are written.
    pub zero_bytes: u128,
    /// Bytes of the range that are dirty and not zero: parts of pages at its ends, or all of it if
    /// the space or one of its domains does not track.
    pub dirty_bytes: u128,
}

/// The result of an unmap.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
pub struct Unmapped {
    /// Areas that were removed.
    pub areas: u64,
    /// The bytes of those areas.
    pub bytes: u128,
    /// Bytes of their dirty pages that were recorded in the user's bitmap.
    pub dirty_bytes: u128,
    /// Bytes of their dirty pages that were not recorded. With a bitmap this is 0, unless a window
    /// of a file failed for a mark that came during the unmap.
    pub discarded_bytes: u128,
}
