//! The oracle: the contents of the memory, and the pages that each harvest must and may report. It
//! consists of sequential sets and maps, and its correctness can be read off.
//!
//! The oracle knows the leaves of the tables, and does not know the contents of the IOTLBs. So it
//! has a lower and an upper bound for each place that can be dirty (a domain, or the marks):
//!
//! * a harvest **must** report the pages that were written and not reported since, with one
//!   exception: a write to a page of a lease that is not flushed yet may leave no trace, because
//!   the copy after the flush of that lease has it;
//! * it **may** report pages that are marked, or in the put-back store of a domain, and pages of
//!   leaves that a device wrote since the leaf was last cleared.
//!
//! `dirt.rs` has the dirty state, `told.rs` the consumers, `zeros.rs` the discards, `ledger.rs`
//! epochs, `changes.rs` the effect of a batch on the areas, `free.rs` the free addresses.

mod changes;
mod dirt;
mod free;
mod ledger;
mod told;
mod zeros;

use std::collections::{BTreeMap, BTreeSet};

use dirtymap::bitmap::BitmapError;
use dirtymap::{Access, Error, Granule, Holes, Iova, IovaRange};

use crate::op::{Ask, CONSUMERS, Config, DOMAINS, Format, Mask, Place, Stretch};
use crate::pages::{Bytes, FIRST, LARGE, PAGE, PAGES, PIECE, PIECES, pages, pages_of};
use crate::world::World;

pub(crate) use changes::{Outcome, Plan};
pub(crate) use dirt::{Dirt, DomainState, Leased, Tracking};
pub(crate) use free::Free;
pub(crate) use ledger::{Ledger, Right};
pub(crate) use told::Told;
pub(crate) use zeros::Zeros;

/// A mapped area, in pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Area {
    pub(crate) first: u64,
    pub(crate) pages: u64,
    /// The page of memory to which `first` is mapped.
    pub(crate) frame: u64,
    pub(crate) access: Access,
    /// The number of the map that made it, or the area from which it was cut.
    pub(crate) origin: u64,
}

/// See the [module](self).
pub(crate) struct Oracle {
    /// The pages of the leaves that each domain has, ascending.
    leaf_pages: [Vec<u64>; DOMAINS],
    /// The same, where leaves were merged.
    largest: [Vec<u64>; DOMAINS],
    formats: [&'static str; DOMAINS],
    /// Pages of 4 KiB in a page of the space.
    space: u64,
    /// Pages of 4 KiB in a page of each domain.
    pages: [u64; DOMAINS],
    /// For each domain, whether it has leaves that devices can only write.
    write_only: [bool; DOMAINS],
    /// By first page.
    pub(crate) areas: BTreeMap<u64, Area>,
    maps: u64,
    /// Pages of memory that were ever written; all others are zero.
    pub(crate) memory: BTreeMap<u64, Box<Bytes>>,
    pub(crate) domains: [DomainState; DOMAINS],
    /// The numbers of the attached domains, in the order of their attaches.
    pub(crate) attached: Vec<usize>,
    /// The switch of the space.
    pub(crate) tracking: Tracking,
    pub(crate) marks: Dirt,
    /// Pages that devices of detached domains may have written without tracking.
    pub(crate) untracked: BTreeSet<u64>,
    /// The consumers; the first is the unnamed one.
    pub(crate) consumers: [Option<Told>; CONSUMERS],
    /// Whether there ever was a named consumer.
    pub(crate) named: bool,
    /// The number of joins so far.
    joins: u64,
    /// The live leases. The third place is that of the current pass.
    pub(crate) leases: [Option<Leased>; 3],
    pub(crate) zeros: Zeros,
    /// The ranges of writes in flight, whole pages.
    pub(crate) guards: [Option<IovaRange>; 2],
    pub(crate) free: Free,
}

impl Area {
    pub(crate) fn last(&self) -> u64 {
        self.first + self.pages - 1
    }

    pub(crate) fn range(&self) -> IovaRange {
        pages(self.first, self.last())
    }

    pub(crate) fn frame_of(&self, page: u64) -> u64 {
        self.frame + (page - self.first)
    }

    pub(crate) fn holds(&self, page: u64) -> bool {
        (self.first..=self.last()).contains(&page)
    }

    /// The pages `first..=last` of this area as an area.
    fn part(&self, first: u64, last: u64) -> Area {
        Area {
            first,
            pages: last - first + 1,
            frame: self.frame_of(first),
            ..*self
        }
    }
}

impl Oracle {
    pub(crate) fn new(config: &Config, world: &World) -> Self {
        Oracle {
            leaf_pages: [0, 1, 2].map(|nth| match config.formats[nth] {
                format if !config.large_leaves[nth] => vec![pages_of_format(format)],
                format => leaves_of(format),
            }),
            largest: config.formats.map(leaves_of),
            space: 1 << (config.space_lg2 - 12),
            pages: config.formats.map(pages_of_format),
            formats: [0, 1, 2].map(|nth| world.nodes[nth].format()),
            write_only: [0, 1, 2].map(|nth| world.nodes[nth].grants(Access::Write)),
            areas: BTreeMap::new(),
            maps: 0,
            memory: BTreeMap::new(),
            domains: Default::default(),
            attached: Vec::new(),
            tracking: Tracking::Never,
            marks: Dirt::default(),
            untracked: BTreeSet::new(),
            consumers: [Some(Told::default()), None, None, None],
            named: false,
            joins: 0,
            leases: [None, None, None],
            zeros: Zeros::default(),
            guards: [None, None],
            free: Free::default(),
        }
    }

    /// The unit of all areas now, in pages.
    pub(crate) fn unit(&self) -> u64 {
        let pages = self.attached.iter().map(|nth| self.pages[*nth]);
        pages.fold(self.space, u64::max)
    }

    /// The same in bytes.
    pub(crate) fn alignment(&self) -> Granule {
        granule_of(self.unit())
    }

    /// The smallest page of the space.
    pub(crate) fn space_page(&self) -> Granule {
        granule_of(self.space)
    }

    /// The unit that suits all domains, attached or not, in pages.
    pub(crate) fn largest_unit(&self) -> u64 {
        self.pages.iter().copied().fold(self.space, u64::max)
    }

    /// The pages that are marked together with `page`.
    pub(crate) fn marked_with(&self, page: u64) -> std::ops::Range<u64> {
        let first = page / self.space * self.space;
        first..first + self.space
    }

    /// All pages that are marked together with one of `pages`.
    pub(crate) fn rounded(&self, pages: impl IntoIterator<Item = u64>) -> BTreeSet<u64> {
        let all = pages.into_iter().flat_map(|page| self.marked_with(page));
        all.collect()
    }

    /// The first area that is not made of whole pages of a domain.
    pub(crate) fn cannot_attach(&self, nth: usize) -> Option<Error> {
        let unit = self.pages[nth];
        let odd = |area: &&Area| {
            [area.first, area.pages, area.frame]
                .iter()
                .any(|n| !n.is_multiple_of(unit))
        };
        let area = self.areas.values().find(odd)?.range();
        let page = granule_of(unit);
        Some(Error::CannotAttach { page, area })
    }

    // The meaning of operands.

    pub(crate) fn area_at(&self, page: u64) -> Option<&Area> {
        let (_, area) = self.areas.range(..=page).next_back()?;
        (page <= area.last()).then_some(area)
    }

    /// The area that an operand names; `None` while nothing is mapped.
    pub(crate) fn nth_area(&self, nth: u8) -> Option<Area> {
        let count = self.areas.len();
        self.areas
            .values()
            .nth(usize::from(nth).checked_rem(count)?)
            .copied()
    }

    /// The address that an operand names. While nothing is mapped, it is somewhere in the window.
    pub(crate) fn address_of(&self, place: Place) -> u64 {
        let page = match self.nth_area(place.area) {
            Some(area) => page_in(&area, place.page),
            None => FIRST,
        };
        page * PAGE + u64::from(place.byte)
    }

    /// The request that an operand names.
    pub(crate) fn range_of(&self, ask: &Ask) -> IovaRange {
        let nothing = Area {
            first: FIRST,
            pages: LARGE,
            frame: 0,
            access: Access::Read,
            origin: 0,
        };
        let area = self.nth_area(ask.area).unwrap_or(nothing);
        let (first, last) = match ask.span {
            0..12 => (area.first, area.last()),
            12..14 => (FIRST, FIRST + PAGES - 1),
            14..17 => {
                let last = self.areas.values().next_back().unwrap_or(&area).last();
                (area.first, last)
            }
            span => {
                let first = page_in(&area, ask.page).min(area.last());
                (first, (first + u64::from(span) - 17).min(area.last()))
            }
        };
        // The bits for which the bitmap has room.
        let last = last.min(first + PAGES - 1);
        let per_bit = 1 << (u32::from(ask.granule_lg2).saturating_sub(12));
        let per_bit = self.unit().max(per_bit);
        if ask.ragged {
            return pages(first, last);
        }
        let asked = pages(first / per_bit * per_bit, last | (per_bit - 1));
        let told = self.consumers[self.whose(ask)].as_ref();
        let within = told.and_then(|told| told.range);
        within
            .and_then(|range| range.intersection(asked))
            .unwrap_or(asked)
    }

    /// The area that an operand of `Map` describes.
    pub(crate) fn new_area(&mut self, at: Stretch, shifted: bool, access: Access) -> Area {
        let unit = self.largest_unit();
        let first = first_of(at) / unit * unit;
        let frame = first - FIRST + if shifted { PAGES + unit } else { 0 };
        self.maps += 1;
        Area {
            first,
            pages: u64::from(at.pages).next_multiple_of(unit),
            frame,
            access,
            origin: self.maps,
        }
    }

    /// The area that an operand of `MapAnywhere` describes, without its address. `None` if its
    /// memory is in use.
    pub(crate) fn new_piece(
        &mut self,
        piece: u8,
        skip: u16,
        count: u16,
        access: Access,
    ) -> Option<Area> {
        let piece = PIECES + u64::from(piece) * PIECE;
        let used = |area: &Area| (piece..piece + PIECE).contains(&area.frame);
        if self.areas.values().any(used) {
            return None;
        }
        self.maps += 1;
        let unit = self.largest_unit();
        let skip = u64::from(skip) / unit * unit;
        Some(Area {
            first: 0,
            pages: u64::from(count).next_multiple_of(unit).min(PIECE - skip),
            frame: piece + skip,
            access,
            origin: self.maps,
        })
    }

    /// The error with which a domain refuses `area`.
    pub(crate) fn refuses(&self, area: &Area, domains: &[usize]) -> Option<Error> {
        let denies = |nth: &&usize| area.access == Access::Write && !self.write_only[**nth];
        domains.iter().find(denies).map(|nth| {
            Error::source_failed(pagetable_sim::Error::NoSuchAccess {
                access: area.access,
                format: self.formats[*nth],
            })
        })
    }

    /// The pages of `range` that are in `mask` as a whole, as runs.
    pub(crate) fn masked(&self, range: IovaRange, mask: Mask) -> Vec<(u64, u64)> {
        let mut runs: Vec<(u64, u64)> = Vec::new();
        for page in pages_of(range).filter(|page| mask.has(*page)) {
            match runs.last_mut() {
                Some((_, last)) if *last + 1 == page => *last = page,
                _ => runs.push((page, page)),
            }
        }
        let unit = self.unit();
        let whole = |(first, last): (u64, u64)| {
            let (first, end) = (first.next_multiple_of(unit), (last + 1) / unit * unit);
            (first < end).then(|| (first, end - 1))
        };
        runs.into_iter().filter_map(whole).collect()
    }

    /// The mapped parts of `first..=last`.
    pub(crate) fn mapped_in(&self, first: u64, last: u64) -> Vec<(u64, u64)> {
        let mut runs: Vec<(u64, u64)> = Vec::new();
        for page in (first..=last).filter(|page| self.area_at(*page).is_some()) {
            match runs.last_mut() {
                Some((_, last)) if *last + 1 == page => *last = page,
                _ => runs.push((page, page)),
            }
        }
        runs
    }

    /// The first unmapped page of `first..=last`.
    pub(crate) fn first_hole(&self, first: u64, last: u64) -> Option<u64> {
        (first..=last).find(|page| self.area_at(*page).is_none())
    }

    /// The error with which a request is refused before anything is touched. It begins at `from`,
    /// which must be a multiple of `unit`.
    pub(crate) fn refusal(
        &self,
        range: IovaRange,
        granule: Granule,
        bits: u64,
        (from, unit): (Iova, Granule),
        ask: &Ask,
    ) -> Option<Error> {
        let needed = u128::from((range.last().get() - range.start().get()) >> granule.lg2()) + 1;
        let ragged = |granule: Granule| {
            let borders = [range.start().get(), range.last().get() + 1];
            borders.iter().any(|border| border & granule.mask() != 0)
        };
        let page = self.alignment();
        if ragged(page) {
            Some(Error::Unaligned {
                range,
                granule: page,
            })
        } else if let Some(consumer) = self.does_not_hear(ask, range, granule) {
            Some(Error::OutsideConsumer { range, consumer })
        } else if ragged(granule) {
            Some(Error::Unaligned { range, granule })
        } else if needed > u128::from(bits) {
            Some(Error::Bitmap(BitmapError::TooShort {
                bits,
                needed,
                range,
                granule,
            }))
        } else if let Some(domain) = self.asked_in_vain(ask) {
            Some(Error::NotAttached { domain })
        } else if !self.ever_tracked(ask) {
            Some(Error::NeverTracked { range })
        } else if !range.contains(from) || !from.is_aligned(unit) {
            Some(Error::BadCursor {
                at: from,
                range,
                granule: unit,
            })
        } else if ask.holes == Holes::Refuse {
            let asked = IovaRange::new(from, range.last()).ok()?;
            let at = self.hole_in(asked)?;
            Some(Error::Hole { at, range })
        } else {
            None
        }
    }

    /// The addresses of the consumer of a request that asks for more.
    fn does_not_hear(&self, ask: &Ask, range: IovaRange, granule: Granule) -> Option<IovaRange> {
        let told = self.consumers[self.whose(ask)].as_ref()?;
        let whole = granule.max(self.alignment());
        told.range
            .filter(|mine| !mine.round_out(whole).covers(range))
    }

    /// The first unmapped address of `range`.
    pub(crate) fn hole_in(&self, range: IovaRange) -> Option<Iova> {
        let (first, last) = (range.start().get() / PAGE, range.last().get() / PAGE);
        Some(Iova::new(self.first_hole(first, last)? * PAGE))
    }

    /// The leaf of a domain that maps `page`: the largest one that fits. After a cut, both sides
    /// have the largest leaves that fit.
    fn leaf_of(&self, domain: usize, page: u64) -> Option<(u64, u64)> {
        let area = self.area_at(page)?;
        let merged = &self.domains[domain].merged;
        let merged = merged
            .iter()
            .any(|(first, last)| (*first..=*last).contains(&page));
        let leaves = if merged {
            &self.largest[domain]
        } else {
            &self.leaf_pages[domain]
        };
        let leaves = leaves.iter().rev();
        leaves
            .map(|count| (page / count * count, *count))
            .find(|(first, count)| {
                area.first <= *first
                    && first + count - 1 <= area.last()
                    && area.frame_of(*first).is_multiple_of(*count)
            })
    }

    /// The storage of bytes of one mapped page was dropped. Memory that was never written is zero.
    pub(crate) fn drop_storage(&mut self, at: u64, len: usize) {
        let frame = self.area_at(at / PAGE).map(|area| area.frame_of(at / PAGE));
        if let Some(memory) = frame.and_then(|frame| self.memory.get_mut(&frame)) {
            let from = (at % PAGE) as usize;
            memory[from..from + len].fill(0);
        }
    }

    /// Stores bytes in one mapped page, and returns the page.
    pub(crate) fn store(&mut self, at: u64, bytes: &[u8]) -> u64 {
        let page = at / PAGE;
        if let Some(frame) = self.area_at(page).map(|area| area.frame_of(page)) {
            let memory = self
                .memory
                .entry(frame)
                .or_insert_with(|| Box::new([0; PAGE as usize]));
            let from = (at % PAGE) as usize;
            memory[from..from + bytes.len()].copy_from_slice(bytes);
            self.zeros.wrote(page);
        }
        page
    }
}

impl Mask {
    /// Whether the bits of `page` are set.
    pub(crate) fn has(self, page: u64) -> bool {
        self.stretches >> ((page >> self.pages_lg2) % 8) & 1 == 1
    }
}

/// A page of so many pages.
fn granule_of(pages: u64) -> Granule {
    Granule::from_bytes(pages * PAGE).unwrap_or(Granule::K4)
}

/// The pages of 4 KiB that the smallest page of a format has.
fn pages_of_format(format: Format) -> u64 {
    match format {
        Format::Arm16K => 4,
        Format::Arm64K | Format::Log64K => 16,
        Format::Log8K => 2,
        _ => 1,
    }
}

/// The pages of the leaves that a format has, up to 2 MiB.
fn leaves_of(format: Format) -> Vec<u64> {
    match format {
        Format::Arm16K | Format::Arm64K | Format::Log4K | Format::Log8K | Format::Log64K => {
            vec![pages_of_format(format)]
        }
        Format::Amd => (0..=LARGE.ilog2()).map(|lg2| 1 << lg2).collect(),
        Format::Riscv => vec![1, 16, LARGE],
        Format::Vtd | Format::Arm | Format::X86 => vec![1, LARGE],
    }
}

/// The first page of a stretch of the window.
fn first_of(at: Stretch) -> u64 {
    FIRST + u64::from(at.slot) * LARGE + u64::from(at.skip)
}

/// The addresses of a stretch of the window.
pub(crate) fn range_of(at: Stretch) -> IovaRange {
    pages(first_of(at), first_of(at) + u64::from(at.pages) - 1)
}

/// The page of `area` that an operand names: one of the first, middle or last ones, or the one
/// after the area.
pub(crate) fn page_in(area: &Area, code: u8) -> u64 {
    let code = u64::from(code);
    let within = match code {
        0..12 => code,
        12..20 => area.pages / 2 + code - 12,
        20..31 => (area.pages + code).saturating_sub(31),
        _ => return area.last() + 1,
    };
    area.first + within % area.pages
}
