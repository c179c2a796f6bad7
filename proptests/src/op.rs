//! The language of the tests: what can be done to an address space, its devices and its leases.
//!
//! Operands are small numbers that the oracle turns into addresses when the operation runs: "the second area", "its
//! last page", so that most inputs are legal, hit few places again and again, and still reach the borders. Every byte
//! string is a program.

use dirtymap::Access;

/// One step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// A device writes.
    DmaWrite {
        /// Which device.
        device: u8,
        /// Where.
        at: Place,
        /// How many bytes.
        len: u16,
    },
    /// A device reads; its own posted writes land first.
    DmaRead {
        /// Which device.
        device: u8,
        /// Where.
        at: Place,
        /// How many bytes.
        len: u16,
    },
    /// A CPU writes, and marks what it wrote.
    Mark {
        /// Where.
        at: Place,
        /// How many bytes.
        len: u16,
        /// Marks by the handle of the area and not by the space.
        by_handle: bool,
    },
    /// Harvests into the first free of two leases; nothing happens if both are taken.
    Harvest(Ask),
    /// Looks and changes nothing.
    Peek(Ask),
    /// Flushes a lease.
    Sync(u8),
    /// Copies what a synced lease names.
    Copy(u8),
    /// Ends a lease well: what is missing of sync and copy is made up for.
    Commit(u8),
    /// Puts a lease back.
    Abort(u8),
    /// Drops a lease, which puts it back.
    DropLease(u8),
    /// The next flush fails.
    FlushFails,
    /// Maps a new area.
    Map {
        /// Which 2 MiB of the window it begins in.
        slot: u8,
        /// How many pages it begins behind the slot.
        skip: u16,
        /// How many pages it has.
        pages: u16,
        /// Its memory is not aligned as its addresses are: only small leaves fit.
        shifted: bool,
        /// What devices may do.
        access: Access,
        /// How the request is wrong.
        fault: MapFault,
    },
    /// Unmaps an area, dirty or not.
    UnmapDiscarding {
        /// Which area.
        area: u8,
        /// What of it.
        cut: Cut,
    },
    /// Switches tracking.
    Track(bool),
    /// A device lets its posted writes land, and stays awake.
    Land(u8),
    /// A device lets its posted writes land, and goes to sleep.
    Quiesce(u8),
}

/// An address, as a place in an area.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Which area, modulo their number.
    pub area: u8,
    /// One of its first, middle or last pages, or the page behind it.
    pub page: u8,
    /// The byte in the page.
    pub byte: u16,
}

/// What a harvest or peek asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ask {
    /// Which area, modulo their number.
    pub area: u8,
    /// All of the area, a part of it, or more.
    pub span: u8,
    /// The first page of a part, as in [`Place::page`].
    pub page: u8,
    /// Bytes of one bit, as a logarithm: 11, 12, 13 or 21.
    pub granule_lg2: u8,
    /// Does not round the range out to the granule.
    pub ragged: bool,
    /// The bitmap is too short by a word.
    pub short: bool,
    /// A hole refuses the request.
    pub all_or_nothing: bool,
    /// Bits that the user has set before.
    pub preset: u8,
}

/// What is wrong with a request to map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MapFault {
    /// Nothing.
    None,
    /// The range does not start at a page.
    Unaligned,
    /// The memory does not start at a page.
    UnalignedBacking,
    /// The memory would go past 2^64.
    Wraps,
    /// There is no such memory: the source refuses.
    OutsideMemory,
}

/// What of an area a request to unmap names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cut {
    /// All of it.
    Whole,
    /// All but its last page; everything if it has one.
    Part,
    /// It and all areas behind it.
    Rest,
}

/// The world that a program runs in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Config {
    /// Leaves may have 2 MiB, otherwise all have 4 KiB.
    pub large_leaves: bool,
    /// Sets of each IOTLB.
    pub iotlb_sets: usize,
    /// Ways of each IOTLB.
    pub iotlb_ways: usize,
    /// Writes that a device keeps in flight.
    pub posted_writes: usize,
    /// Areas are mapped and tracking is on when the program begins.
    pub warm: bool,
    /// What is broken.
    pub sabotage: Sabotage,
}

/// What can be broken, to show that it is noticed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Sabotage {
    /// All is well.
    #[default]
    None,
    /// Invalidations reach no device.
    IgnoreInvalidations,
    /// Devices acknowledge while their writes are in flight.
    AcknowledgeWithoutDraining,
    /// The consumer copies before the flush, and not after it.
    CopyBeforeSync,
    /// CPUs write and do not mark.
    ForgetMarks,
}

const LENGTHS: [u16; 16] = [
    8, 1, 2, 7, 64, 64, 100, 512, 2048, 4096, 4097, 5000, 6000, 8192, 9000, 0,
];
const BYTES: [u16; 8] = [0, 1, 8, 2047, 2048, 4000, 4090, 4095];
const PAGES: [u16; 16] = [
    1, 2, 3, 4, 8, 16, 40, 63, 64, 65, 100, 511, 512, 513, 600, 1024,
];
const SKIPS: [u16; 8] = [0, 0, 0, 0, 1, 7, 500, 511];
const GRANULES: [u8; 8] = [12, 12, 12, 12, 11, 13, 13, 21];
const CUTS: [Cut; 4] = [Cut::Whole, Cut::Whole, Cut::Rest, Cut::Part];

impl Op {
    /// The next step of the program that `bytes` spell; `None` when they are used up.
    pub fn decode(bytes: &mut impl Iterator<Item = u8>) -> Option<Op> {
        let code = bytes.next()?;
        Some(match code % 32 {
            0..8 => Op::DmaWrite {
                device: bytes.next()? % 2,
                at: Place::decode(bytes)?,
                len: pick(&LENGTHS, bytes.next()?),
            },
            8 => Op::DmaRead {
                device: bytes.next()? % 2,
                at: Place::decode(bytes)?,
                len: pick(&LENGTHS, bytes.next()?),
            },
            9..12 => Op::Mark {
                at: Place::decode(bytes)?,
                len: pick(&LENGTHS, bytes.next()?),
                by_handle: code & 32 != 0,
            },
            12..17 => Op::Harvest(Ask::decode(bytes)?),
            17 => Op::Peek(Ask::decode(bytes)?),
            18 | 19 => Op::Sync(bytes.next()? % 2),
            20 => Op::Copy(bytes.next()? % 2),
            21..24 => Op::Commit(bytes.next()? % 2),
            24 => Op::Abort(bytes.next()? % 2),
            25 => Op::DropLease(bytes.next()? % 2),
            26 => Op::FlushFails,
            27 | 28 => Op::decode_map(bytes)?,
            29 => Op::UnmapDiscarding {
                area: bytes.next()?,
                cut: pick(&CUTS, code / 32),
            },
            30 => Op::Track(code / 32 != 0),
            _ if code & 32 == 0 => Op::Land(bytes.next()? % 2),
            _ => Op::Quiesce(bytes.next()? % 2),
        })
    }

    fn decode_map(bytes: &mut impl Iterator<Item = u8>) -> Option<Op> {
        let (slot, size, kind) = (bytes.next()?, bytes.next()?, bytes.next()?);
        Some(Op::Map {
            slot: slot % 4,
            skip: pick(&SKIPS, slot / 4),
            pages: pick(&PAGES, size),
            shifted: kind & 3 == 3,
            access: match kind >> 2 & 7 {
                6 => Access::Read,
                7 => Access::Write,
                _ => Access::ReadWrite,
            },
            fault: match kind >> 5 {
                1 if size & 0x10 != 0 => MapFault::Unaligned,
                2 if size & 0x10 != 0 => MapFault::UnalignedBacking,
                3 if size & 0x10 != 0 => MapFault::Wraps,
                4 => MapFault::OutsideMemory,
                _ => MapFault::None,
            },
        })
    }
}

impl Place {
    fn decode(bytes: &mut impl Iterator<Item = u8>) -> Option<Place> {
        let (area, page) = (bytes.next()?, bytes.next()?);
        Some(Place {
            area,
            page: page % 32,
            byte: pick(&BYTES, page / 32),
        })
    }
}

impl Ask {
    fn decode(bytes: &mut impl Iterator<Item = u8>) -> Option<Ask> {
        let (area, part, flags) = (bytes.next()?, bytes.next()?, bytes.next()?);
        Some(Ask {
            area: area % 8,
            span: area / 8,
            page: part % 32,
            granule_lg2: pick(&GRANULES, part / 32),
            ragged: flags & 0b111 == 7,
            short: flags & 0b1_1100 == 0x1c,
            all_or_nothing: flags & 0b10_0000 != 0,
            preset: if flags >> 6 == 3 { bytes.next()? } else { 0 },
        })
    }
}

impl Config {
    /// A small world in which all is well.
    pub const PLAIN: Config = Config {
        large_leaves: false,
        iotlb_sets: 16,
        iotlb_ways: 4,
        posted_writes: 4,
        warm: true,
        sabotage: Sabotage::None,
    };

    /// The world that two bytes describe.
    pub fn decode(bytes: &mut impl Iterator<Item = u8>) -> Option<Config> {
        let (shape, more) = (bytes.next()?, bytes.next()?);
        let (iotlb_sets, iotlb_ways) = pick(&[(16, 4), (1, 1), (2, 2), (64, 8)], shape / 2);
        Some(Config {
            large_leaves: shape & 1 != 0,
            iotlb_sets,
            iotlb_ways,
            posted_writes: pick(&[4, 0, 1, 64], shape / 8),
            warm: more % 8 != 7,
            sabotage: Sabotage::None,
        })
    }
}

/// The world and the program that `bytes` spell: at most `limit` steps.
pub fn decode(bytes: &[u8], limit: usize) -> Option<(Config, Vec<Op>)> {
    let mut bytes = bytes.iter().copied();
    let config = Config::decode(&mut bytes)?;
    let ops = std::iter::from_fn(|| Op::decode(&mut bytes));
    Some((config, ops.take(limit).collect()))
}

fn pick<T: Copy, const N: usize>(table: &[T; N], byte: u8) -> T {
    table[usize::from(byte) % N]
}
