//! Why an adapter of KVM refuses or fails.

use std::io;

use crate::units::{Granule, IovaRange};

/// What a [`KvmLog`](super::KvmLog) refuses, or what KVM says.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum KvmError {
    /// This KVM cannot do what the mode needs.
    #[error("this KVM has no {capability}: choose another mode")]
    Unsupported {
        /// The capability by its name in the API documentation.
        capability: &'static str,
    },
    /// A ring must have a power of two of entries, and KVM bounds it.
    #[error("a ring of {entries} entries: it must be a power of two, and at most {limit}")]
    BadRing {
        /// The offending size.
        entries: u32,
        /// The largest ring.
        limit: u32,
    },
    /// Processors are of no interest to a log that is not a ring.
    #[error("this log has no rings: make it in the mode Ring to add processors")]
    NoRings,
    /// A slot must be made of whole pages of the host, in guest addresses and in the memory behind it.
    #[error("the slot {slot} at {guest}, backed from {host:#x}, is not made of pages of {page}")]
    Unaligned {
        /// The slot.
        slot: u32,
        /// Its guest addresses.
        guest: IovaRange,
        /// Where its memory begins.
        host: u64,
        /// The page of the host.
        page: Granule,
    },
    /// The memory of the slot would go past the last address.
    #[error("the memory of slot {slot} begins at {host:#x} and goes past the last address")]
    HostWraps {
        /// The slot.
        slot: u32,
        /// Where its memory would begin.
        host: u64,
    },
    /// KVM bounds the pages of a slot.
    #[error("the slot {slot} has {pages} pages, but KVM takes at most {limit}")]
    TooLarge {
        /// The slot.
        slot: u32,
        /// Its pages.
        pages: u128,
        /// The largest slot.
        limit: u64,
    },
    /// The number is in use.
    #[error("the slot {slot} is there already: remove it first")]
    SlotTaken {
        /// The slot.
        slot: u32,
    },
    /// Slots do not overlap.
    #[error("the slot {slot} at {guest} overlaps the slot {other}")]
    Overlap {
        /// The slot.
        slot: u32,
        /// Its guest addresses.
        guest: IovaRange,
        /// The slot in its way.
        other: u32,
    },
    /// No such slot.
    #[error("no slot {slot} was added, or it was removed")]
    NoSlot {
        /// The slot asked for.
        slot: u32,
    },
    /// No memory for the bits of a slot.
    #[error("no memory for {words} words of bits of slot {slot}")]
    NoMemory {
        /// The slot.
        slot: u32,
        /// Words of 64 bits.
        words: usize,
    },
    /// A call of KVM failed for a slot.
    #[error("{call} failed for slot {slot}: {error}")]
    SlotCall {
        /// The call by its name in the API documentation.
        call: &'static str,
        /// The slot.
        slot: u32,
        /// What KVM says.
        #[source]
        error: io::Error,
    },
    /// A call of KVM failed.
    #[error("{call} failed: {error}")]
    Call {
        /// The call by its name in the API documentation.
        call: &'static str,
        /// What KVM says.
        #[source]
        error: io::Error,
    },
}
