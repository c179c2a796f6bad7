//! From bytes to programs.

use dirtymap::{Access, Holes};

use super::{
    Ask, Begin, Callback, Config, Cut, Fate, Format, JoinFault, Limits, MapFault, Mask, Master,
    Meanwhile, Mode, Moment, Named, Op, Place, Reach, Sabotage, Share, Step, Storage, Stretch,
};
use crate::forms::FORMS;

const LENGTHS: [u16; 16] = [
    8, 1, 2, 7, 64, 64, 100, 512, 2048, 4096, 4097, 5000, 6000, 8192, 9000, 0,
];
const BYTES: [u16; 8] = [0, 1, 8, 2047, 2048, 4000, 4090, 4095];
const PAGES: [u16; 16] = [
    1, 2, 3, 4, 8, 16, 40, 63, 64, 65, 100, 511, 512, 513, 600, 1024,
];
const SKIPS: [u16; 8] = [0, 0, 0, 0, 1, 7, 500, 511];
const GRANULES: [u8; 8] = [12, 12, 12, 12, 11, 13, 13, 21];
const BOUNDS: [u16; 8] = [1, 0, 2, 40, 64, 65, 500, 2000];
const DISCARDS: [u16; 16] = [1, 2, 3, 4, 1, 8, 16, 40, 64, 100, 512, 513, 5, 1, 2, 1024];
const CUTS: [Cut; 4] = [Cut::Whole, Cut::Whole, Cut::Rest, Cut::Part];
/// Most operations concern the first domain.
const DOMAIN: [u8; 8] = [0, 0, 0, 0, 1, 1, 1, 2];
const CALLBACKS: [Callback; 16] = [
    Callback::Unmap,
    Callback::Map,
    Callback::ReadAndClear,
    Callback::Invalidate,
    Callback::SplitAt,
    Callback::SetTracking,
    Callback::Peek,
    Callback::FlushCost,
    Callback::Unmap,
    Callback::Map,
    Callback::ReadAndClear,
    Callback::Invalidate,
    Callback::SplitAt,
    Callback::Unmap,
    Callback::Page,
    Callback::Identity,
];
const MOMENTS: [Moment; 4] = [
    Moment::Middle,
    Moment::Before,
    Moment::After,
    Moment::Middle,
];
/// Formats with larger pages, and logs.
const LARGER: [Format; 8] = [
    Format::Arm64K,
    Format::Log64K,
    Format::Log8K,
    Format::Arm16K,
    Format::Log4K,
    Format::Arm64K,
    Format::Log64K,
    Format::Log8K,
];
const FORMATS: [Format; 8] = [
    Format::Amd,
    Format::Vtd,
    Format::Arm,
    Format::Riscv,
    Format::X86,
    Format::Amd,
    Format::Vtd,
    Format::Arm,
];

impl Op {
    /// Decodes the next step of a program from `bytes`. `None` at their end.
    pub fn decode(bytes: &mut impl Iterator<Item = u8>) -> Option<Op> {
        let code = bytes.next()?;
        // Each operation has a number of the 64 codes in proportion to its frequency. The two bits
        // above are operands.
        let more = code / 64;
        Some(match code % 64 {
            8..11 | 12 | 54 if more == 3 => Op::decode_join(bytes)?,
            10 | 12 if more == 2 => Op::Leave(1 + bytes.next()? % 3),
            0..11 => Op::DmaWrite {
                device: Master::decode(bytes)?,
                at: Place::decode(bytes)?,
                len: pick(&LENGTHS, bytes.next()?),
            },
            15 | 26 | 37 | 59 if more == 3 => Op::decode_discard(bytes)?,
            26 | 37 | 61 if more == 2 => Op::decode_epoch(bytes)?,
            11 | 23 => Op::decode_pass(more, bytes)?,
            12 => Op::DmaRead {
                device: Master::decode(bytes)?,
                at: Place::decode(bytes)?,
                len: pick(&LENGTHS, bytes.next()?),
            },
            13..16 => Op::Mark {
                at: Place::decode(bytes)?,
                len: pick(&LENGTHS, bytes.next()?),
                by_handle: more & 1 != 0,
            },
            16..23 => Op::Harvest(Ask::decode(bytes)?.by(more)),
            24 => Op::Peek(Ask::decode(bytes)?.by(more)),
            25 | 26 => Op::Sync(more & 1),
            27 => Op::Copy(more & 1),
            28..32 => Op::Commit(more & 1),
            32 if more == 3 => Op::Forget(bytes.next()? & 1),
            32 => Op::Abort(more & 1),
            33 if more < 2 => Op::DropLease(more & 1),
            33 => Op::Crash(more & 1),
            34 if more == 3 => Op::Stops {
                domain: pick(&DOMAIN, bytes.next()?),
                at: Place::decode(bytes)?,
            },
            34 => Op::FlushFails(pick(&DOMAIN, bytes.next()?)),
            35 if more != 0 => {
                let (domain, when) = (bytes.next()?, bytes.next()?);
                Op::Panics {
                    domain: pick(&DOMAIN, domain),
                    callback: pick(&CALLBACKS, domain / 8 % 2 * 8 + when % 8),
                    calls: pick(&[0, 0, 0, 1, 1, 2, 3, 5], when / 8),
                    moment: pick(&MOMENTS, when / 64),
                }
            }
            35 => Op::HarvestDies(pick(&DOMAIN, bytes.next()?)),
            36 | 37 => Op::BusySync {
                lease: more & 1,
                device: Master::decode(bytes)?,
                at: Place::decode(bytes)?,
                len: pick(&LENGTHS, bytes.next()?),
            },
            38..41 => Op::decode_map(bytes)?,
            41 => Op::decode_map_anywhere(bytes)?,
            42 => Op::UnmapDiscarding {
                area: bytes.next()?,
                cut: pick(&CUTS, more),
            },
            43 => {
                let (area, flags) = (bytes.next()?, bytes.next()?);
                Op::Unmap {
                    area,
                    cut: pick(&CUTS, more),
                    granule_lg2: pick(&GRANULES, flags),
                    short: flags >> 4 == 15,
                }
            }
            44 | 45 => Op::CutAt {
                at: Place::decode(bytes)?,
                unaligned: more == 3,
            },
            46 | 47 => Op::Batch([
                Step::decode(bytes)?,
                Step::decode(bytes)?,
                Step::decode(bytes)?,
            ]),
            48 => match more {
                0 => Op::Reserve(Stretch::decode(bytes)?),
                1 => Op::Release(bytes.next()?),
                _ => Op::Allow(bytes.next()? % 8),
            },
            49 | 50 => Op::Attach(pick(&[1, 2, 1, 0], more)),
            51 => Op::Detach(pick(&[1, 2, 0, 1], more)),
            52 => Op::Track(more != 0),
            53 => Op::TrackDomain(pick(&DOMAIN, bytes.next()?), more != 0),
            54 => Op::Land(Master::decode(bytes)?),
            55 if more == 3 => {
                let domain = bytes.next()?;
                Op::Reshape {
                    domain: pick(&DOMAIN, domain),
                    at: Place::decode(bytes)?,
                    merge: domain / 8 % 4 != 0,
                }
            }
            55 => Op::Quiesce(Master::decode(bytes)?),
            56 | 57 => Op::BeginWrite {
                guard: more & 1,
                at: Place::decode(bytes)?,
                len: pick(&LENGTHS, bytes.next()?),
            },
            58 | 59 => Op::FillWrite {
                guard: more & 1,
                skip: pick(&BYTES, bytes.next()?),
                len: pick(&LENGTHS, bytes.next()?),
            },
            60 => Op::EndWrite(more & 1),
            61 => Op::KeepHandle {
                handle: more & 1,
                area: bytes.next()?,
            },
            62 => Op::CommitRange {
                lease: more & 1,
                part: Share(bytes.next()?, bytes.next()?),
            },
            _ => Op::MarkByKept {
                handle: more & 1,
                page: bytes.next()?,
                len: pick(&LENGTHS, bytes.next()?),
            },
        })
    }

    fn decode_join(bytes: &mut impl Iterator<Item = u8>) -> Option<Op> {
        let (kind, reach, fault) = (bytes.next()?, bytes.next()?, bytes.next()?);
        Some(Op::Join {
            consumer: 1 + kind % 3,
            start: match kind / 4 % 8 {
                0..4 => Begin::Clean,
                4 | 5 => Begin::Dirty,
                _ => Begin::LikeOf(1 + reach / 32 % 3),
            },
            reach: match reach % 16 {
                0..10 => Reach::Everything,
                slots => Reach::Slots((slots - 10) % 3, 1 + (slots - 10) / 3),
            },
            fault: match fault {
                0..0xf0 => JoinFault::None,
                0xf0..0xf4 => JoinFault::NoName,
                0xf4..0xf8 => JoinFault::LongName,
                _ => JoinFault::Unaligned,
            },
        })
    }

    fn decode_pass(whose: u8, bytes: &mut impl Iterator<Item = u8>) -> Option<Op> {
        let (kind, part) = (bytes.next()?, bytes.next()?);
        Some(Op::Pass {
            form: pick(&FORMS, kind),
            fate: match kind / 8 % 4 {
                0 => Fate::Abort,
                1 => Fate::CommitRange(Share(part, kind)),
                _ => Fate::Commit,
            },
            ask: Ask::decode(bytes)?.by(whose),
        })
    }

    fn decode_discard(bytes: &mut impl Iterator<Item = u8>) -> Option<Op> {
        let (area, page, size) = (bytes.next()?, bytes.next()?, bytes.next()?);
        let (kind, inner) = (bytes.next()?, bytes.next()?);
        Some(Op::Discard {
            at: Place {
                area,
                page: page % 32,
                byte: pick(&[0, 0, 0, 0, 0, 0, 2048, 1], page / 32),
            },
            pages: pick(&DISCARDS, size),
            ragged: size / 16 == 15,
            storage: match kind % 8 {
                6 => Storage::Fails,
                7 => Storage::Panics,
                _ => Storage::Drops,
            },
            meanwhile: match kind / 8 % 8 {
                0..3 => Meanwhile::Nothing,
                3 | 4 => Meanwhile::Mark {
                    page: inner % 4,
                    early: inner / 4 % 2 == 0,
                },
                5 => Meanwhile::Write {
                    device: Master::decode(&mut [inner].into_iter())?,
                    page: kind / 64,
                },
                _ => Meanwhile::Pass {
                    whose: inner % 4,
                    fate: match inner / 4 % 4 {
                        0 => Fate::Abort,
                        1 => Fate::CommitRange(Share(inner, kind)),
                        _ => Fate::Commit,
                    },
                    early: inner / 16 % 2 == 0,
                },
            },
        })
    }

    fn decode_epoch(bytes: &mut impl Iterator<Item = u8>) -> Option<Op> {
        let (kind, which) = (bytes.next()?, bytes.next()?);
        let (cursor, whose) = (kind / 8 % 4, 1 + which % 3);
        Some(match kind % 8 {
            0..3 => Op::KeepCursor { cursor, whose },
            3 => Op::DropCursor(cursor),
            4..7 => Op::Since {
                whose,
                epoch: match which / 4 % 8 {
                    0..3 => Named::Cursor(cursor),
                    3 => Named::Newest,
                    4 | 5 => Named::Past(1 + kind / 64),
                    6 => Named::Future,
                    _ => Named::Foreign,
                },
            },
            _ => Op::Bound {
                whose: which % 4,
                limits: Limits {
                    bytes: pick(
                        &[1 << 30, 0, 1, 4096, 1 << 30, 1 << 30, 8192, 1 << 30],
                        which / 4,
                    ),
                    deltas: pick(&[64, 64, 0, 1, 2, 64, 64, 3], which / 32),
                    age: pick(
                        &[u64::MAX, u64::MAX, u64::MAX, 0, 1, u64::MAX, 2, 3],
                        kind / 8,
                    ),
                },
            },
        })
    }

    fn decode_map(bytes: &mut impl Iterator<Item = u8>) -> Option<Op> {
        let (slot, size, kind) = (bytes.next()?, bytes.next()?, bytes.next()?);
        Some(Op::Map {
            slot: slot % 4,
            skip: pick(&SKIPS, slot / 4),
            pages: pick(&PAGES, size),
            shifted: kind & 3 == 3,
            access: access(kind >> 2),
            fault: match kind >> 5 {
                1 if size & 0x10 != 0 => MapFault::Unaligned,
                2 if size & 0x10 != 0 => MapFault::UnalignedBacking,
                3 if size & 0x10 != 0 => MapFault::Wraps,
                4 => MapFault::OutsideMemory,
                _ => MapFault::None,
            },
        })
    }

    fn decode_map_anywhere(bytes: &mut impl Iterator<Item = u8>) -> Option<Op> {
        let (place, size) = (bytes.next()?, bytes.next()?);
        let skip = pick(&[0, 0, 0, 4], place >> 2);
        Some(Op::MapAnywhere {
            piece: place % 4,
            pages: pick(&PAGES, size).min(1024 - skip),
            skip,
            access: access(place >> 4),
            ragged: size >= 0xf0,
        })
    }
}

impl Master {
    fn decode(bytes: &mut impl Iterator<Item = u8>) -> Option<Master> {
        let byte = bytes.next()?;
        Some(Master {
            domain: pick(&DOMAIN, byte / 2),
            device: byte % 2,
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

impl Stretch {
    fn decode(bytes: &mut impl Iterator<Item = u8>) -> Option<Stretch> {
        let (place, size) = (bytes.next()?, bytes.next()?);
        Some(Stretch {
            slot: place % 4,
            skip: pick(&SKIPS, place / 4),
            pages: pick(&PAGES, size),
        })
    }
}

impl Step {
    /// Two bytes.
    fn decode(bytes: &mut impl Iterator<Item = u8>) -> Option<Step> {
        let (kind, operand) = (bytes.next()?, bytes.next()?);
        let area = kind / 8;
        Some(match kind % 8 {
            0..3 => Step::Cut(Place {
                area,
                page: operand % 32,
                byte: if operand >= 0xf8 { 8 } else { 0 },
            }),
            3 | 4 => Step::Unmap(area),
            5 | 6 => {
                let stretch = Stretch {
                    slot: area % 4,
                    skip: pick(&SKIPS, area / 4),
                    pages: pick(&PAGES, operand),
                };
                Step::Map(stretch, access(operand >> 5))
            }
            _ if operand & 1 == 0 => Step::Nothing,
            _ => Step::UnmapNew,
        })
    }
}

impl Ask {
    fn decode(bytes: &mut impl Iterator<Item = u8>) -> Option<Ask> {
        let (area, part, flags) = (bytes.next()?, bytes.next()?, bytes.next()?);
        let scope = bytes.next()?;
        Some(Ask {
            whose: 0,
            area: area % 8,
            span: area / 8,
            page: part % 32,
            granule_lg2: pick(&GRANULES, part / 32),
            ragged: flags & 0b111 == 7,
            short: flags & 0b1_1100 == 0x1c,
            holes: match flags & 0b10_0010 {
                0 => Holes::Stop,
                0b10 => Holes::Skip,
                _ => Holes::Refuse,
            },
            preset: if flags >> 6 == 3 { bytes.next()? } else { 0 },
            domain: (scope & 1 != 0).then(|| pick(&DOMAIN, scope / 2)),
            mode: Mode::decode(scope / 16, bytes)?,
        })
    }
}

impl Mode {
    /// Half of all harvests are plain ones.
    fn decode(code: u8, bytes: &mut impl Iterator<Item = u8>) -> Option<Mode> {
        Some(match code {
            0..8 => Mode::Whole,
            8..11 => {
                let (stretches, size) = (bytes.next()?, bytes.next()?);
                let granule_lg2 = pick(&[12u8, 11, 12, 13], size / 16);
                Mode::Masked(Mask {
                    stretches,
                    pages_lg2: (size % 10).max(granule_lg2.saturating_sub(12)),
                    granule_lg2,
                })
            }
            11..14 => Mode::Bounded {
                from: bytes.next()?,
                bits: pick(&BOUNDS, bytes.next()?),
            },
            _ => Mode::Parallel,
        })
    }
}

impl Config {
    /// A small world without faults.
    pub const PLAIN: Config = Config {
        formats: [Format::Amd, Format::Vtd, Format::Arm],
        space_lg2: 12,
        large_leaves: [false; 3],
        iotlb_sets: 16,
        iotlb_ways: 4,
        tlb_entries: 0,
        posted_writes: 4,
        warm: true,
        sabotage: Sabotage::None,
    };

    /// The world that is decoded from four bytes.
    pub fn decode(bytes: &mut impl Iterator<Item = u8>) -> Option<Config> {
        let (shape, more) = (bytes.next()?, bytes.next()?);
        let (first, others) = (bytes.next()?, bytes.next()?);
        let (iotlb_sets, iotlb_ways) = pick(&[(16, 4), (1, 1), (2, 2), (64, 8)], shape / 8);
        Some(Config {
            formats: [
                format(first, matches!(first / 16, 12 | 15), first),
                format(others, matches!(first / 16, 12 | 14), others / 4),
                format(others / 8, first / 16 == 13, others),
            ],
            space_lg2: if more / 32 == 7 { 13 } else { 12 },
            large_leaves: [0, 1, 2].map(|domain| shape >> domain & 1 != 0),
            iotlb_sets,
            iotlb_ways,
            tlb_entries: pick(&[0, 0, 4, 64], more / 8),
            posted_writes: pick(&[4, 0, 1, 64], shape / 32),
            warm: more % 8 != 7,
            sabotage: Sabotage::None,
        })
    }
}

/// Decodes a world and a program of at most `limit` steps from `bytes`.
pub fn decode(bytes: &[u8], limit: usize) -> Option<(Config, Vec<Op>)> {
    let mut bytes = bytes.iter().copied();
    let config = Config::decode(&mut bytes)?;
    let ops = std::iter::from_fn(|| Op::decode(&mut bytes));
    Some((config, ops.take(limit).collect()))
}

/// A format with small pages, or its counterpart with larger ones.
fn format(small: u8, is_larger: bool, larger: u8) -> Format {
    match is_larger {
        true => pick(&LARGER, larger),
        false => pick(&FORMATS, small),
    }
}

/// Mostly reads and writes.
fn access(byte: u8) -> Access {
    match byte & 7 {
        6 => Access::Read,
        7 => Access::Write,
        _ => Access::ReadWrite,
    }
}

fn pick<T: Copy, const N: usize>(table: &[T; N], byte: u8) -> T {
    table[usize::from(byte) % N]
}
