//! Why an adapter of KVM refuses or fails.

use std::io;

use dirtymap::{Granule, IovaRange};

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
    /// A child of `fork` used a log of its parent.
    #[error(
        "this log is of process {maker}, and this process is a child of it: use it there, or make \
         a log for a virtual machine of this process"
    )]
    OfAnotherProcess {
        /// The process that made the log.
        maker: u32,
    },
    /// The processor has no ring, or one of another size.
    #[error(
        "the processor has no ring of exactly {entries} entries: it is not of the virtual machine \
         of this log"
    )]
    NoSuchRing {
        /// Entries of each ring of this log.
        entries: u32,
    },
    /// KVM did not take back what was read from a ring.
    #[error(
        "the ring that was added as number {ring} is not of the virtual machine of this log, which \
         did not take its entries back: both logs miss writes"
    )]
    ForeignRing {
        /// Which call of [`add_vcpu`](super::KvmLog::add_vcpu) it came with, from 0 on.
        ring: usize,
    },
    /// Processors are of no interest to a log that is not a ring.
    #[error("this log has no rings: make it in the mode Ring to add processors")]
    NoRings,
    /// A slot must be made of whole pages of the host, in guest addresses and in the memory behind
    /// it.
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
