//! The errors of the simulated hardware, and the faults of a device's access.

use dirtymap::{Access, Granule, Iova, IovaRange};

/// The error of a call that the simulated hardware refused. The call has changed nothing.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An access outside the simulated physical memory.
    #[error("{len:#x} bytes at {phys:#x} lie outside the memory, which has {limit:#x} bytes")]
    OutsideMemory {
        /// The first physical address.
        phys: u64,
        /// How many bytes.
        len: u64,
        /// The size of the memory in bytes.
        limit: u64,
    },
    /// The system did not give the memory.
    #[error("no memory of {bytes:#x} bytes: {cause}")]
    NoMemory {
        /// The size asked for.
        bytes: u64,
        /// The error of the system.
        #[source]
        cause: std::io::Error,
    },
    /// A border of the range is not a multiple of the smallest page.
    #[error("the range {range} does not start and end at multiples of {page}, the smallest page")]
    Unaligned {
        /// The offending range.
        range: IovaRange,
        /// The smallest page of the format.
        page: Granule,
    },
    /// The physical address is not a multiple of the smallest page.
    #[error("the physical address {phys:#x} is not a multiple of {page}, the smallest page")]
    UnalignedPhys {
        /// The offending address.
        phys: u64,
        /// The smallest page of the format.
        page: Granule,
    },
    /// The table does not translate these addresses. Where they are sign-extended, a range must lie
    /// in the lower or in the upper half of them.
    #[error("{range} exceeds the {width} bits of address that {format} translates")]
    TooWide {
        /// The offending range.
        range: IovaRange,
        /// How many bits of address the format translates.
        width: u32,
        /// The name of the format.
        format: &'static str,
    },
    /// An entry cannot hold physical addresses that high.
    #[error(
        "{len:#x} bytes from the physical address {phys:#x} exceed the {width} bits \
         that {format} can point to"
    )]
    PhysTooWide {
        /// The first physical address.
        phys: u64,
        /// How many bytes.
        len: u128,
        /// How many bits of physical address an entry holds.
        width: u32,
        /// The name of the format.
        format: &'static str,
    },
    /// No leaf of the format grants this access and no other.
    #[error("{format} has no leaves for {access:?} access: name one that includes reading")]
    NoSuchAccess {
        /// The rights that were to be granted.
        access: Access,
        /// The name of the format.
        format: &'static str,
    },
    /// Something is mapped in the range.
    #[error("{range} overlaps {leaf}, which is mapped")]
    AlreadyMapped {
        /// The range to map.
        range: IovaRange,
        /// The first leaf in its way.
        leaf: IovaRange,
    },
    /// No device with this number is attached.
    #[error("no device {number} is attached")]
    NoSuchDevice {
        /// The number asked for.
        number: u32,
    },
    /// The range to unmap would cut through a leaf.
    #[error("{range} covers only a part of the leaf {leaf}: name whole leaves")]
    PartOfLeaf {
        /// The range to unmap.
        range: IovaRange,
        /// The leaf that sticks out.
        leaf: IovaRange,
    },
}

impl From<Error> for dirtymap::Error {
    fn from(error: Error) -> Self {
        dirtymap::Error::source_failed(error)
    }
}

/// A device's access that the IOMMU blocked. The bytes below `iova` stay read or written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("DMA fault at {iova}: {kind}")]
pub struct DmaError {
    /// The first address that was not accessed, or the highest address if the access goes on past
    /// it.
    pub iova: Iova,
    /// Why.
    pub kind: FaultKind,
}

/// The reason why the IOMMU blocked an access.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FaultKind {
    /// No translation.
    #[error("nothing is mapped there")]
    NotMapped,
    /// A write to a mapping that devices may only read.
    #[error("the mapping is read-only")]
    ReadOnly,
    /// A read of a mapping that devices may only write.
    #[error("the mapping is write-only")]
    WriteOnly,
    /// The address has more bits than the table translates.
    #[error("the address is too wide for the page table")]
    TooWide,
    /// A bit that must be 0 is set in an entry on the way.
    #[error("an entry on the way has a reserved bit set")]
    Reserved,
    /// The operand of an atomic operation is not aligned to its size. Nothing was translated.
    #[error("the operand of an atomic operation is not aligned to its size")]
    Unaligned,
}
