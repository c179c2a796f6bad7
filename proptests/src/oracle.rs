//! The oracle: what the memory holds, and what each harvest must and may report. Sequential sets and maps, right by
//! reading.
//!
//! The oracle knows the leaves of the table but not what the IOTLBs hold, so it has a lower and an upper bound:
//!
//! * a harvest **must** report the pages that were written and not reported since, with one exception: a write to a page
//!   of a lease that is not flushed yet may leave no trace, and is in the copy that follows the flush of that lease;
//! * it **may** report marked pages, and pages of leaves that a device wrote since the leaf was last cleared.

use std::collections::{BTreeMap, BTreeSet};

use dirtymap::{Access, Error, Granule, Iova, IovaRange};

use crate::op::{Ask, Place};

/// The smallest page.
pub(crate) const PAGE: u64 = 4096;
/// Pages of the largest leaf.
const LARGE: u64 = 512;
/// The first page of the window in which everything happens: 4 MiB below 4 GiB, so that areas cross from one table to
/// the next.
const FIRST: u64 = 0x10_0000 - 2 * LARGE;
/// Pages of the window: four slots, and what an area in the last one can have.
const PAGES: u64 = 7 * LARGE;
/// Bytes of memory: the window twice, the second time shifted by a page.
pub(crate) const MEMORY: u64 = (2 * PAGES + 1) * PAGE;

/// The bytes of a page.
pub(crate) type Bytes = [u8; PAGE as usize];

/// A mapped area, in pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Area {
    pub(crate) first: u64,
    pub(crate) pages: u64,
    /// The page of memory behind `first`.
    pub(crate) frame: u64,
    pub(crate) access: Access,
}

/// Whether writes of devices are tracked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Tracking {
    Never,
    On,
    Off,
}

/// What a live lease holds.
#[derive(Clone, Debug)]
pub(crate) struct Leased {
    /// Pages that it reported, and that were not unmapped since.
    pub(crate) pages: BTreeSet<u64>,
    pub(crate) synced: bool,
}

/// See the [module](self).
pub(crate) struct Oracle {
    large_leaves: bool,
    /// By first page.
    pub(crate) areas: BTreeMap<u64, Area>,
    /// Pages of memory that were ever written; all others are zero.
    pub(crate) memory: BTreeMap<u64, Box<Bytes>>,
    pub(crate) tracking: Tracking,
    /// Pages that the next harvest that covers them must report.
    pub(crate) pending: BTreeSet<u64>,
    /// Pages that are marked: exact.
    pub(crate) marks: BTreeSet<u64>,
    /// First page and number of pages of leaves that may be dirty, and of what is left of them.
    pub(crate) leaves: BTreeSet<(u64, u64)>,
    /// Pages that may be marked since a harvest covered another part of their leaf.
    pub(crate) rests: BTreeSet<u64>,
    /// Pages that devices may have written while nobody looked.
    pub(crate) untracked: BTreeSet<u64>,
    pub(crate) leases: [Option<Leased>; 2],
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
}

impl Oracle {
    pub(crate) fn new(large_leaves: bool) -> Self {
        Oracle {
            large_leaves,
            areas: BTreeMap::new(),
            memory: BTreeMap::new(),
            tracking: Tracking::Never,
            pending: BTreeSet::new(),
            marks: BTreeSet::new(),
            leaves: BTreeSet::new(),
            rests: BTreeSet::new(),
            untracked: BTreeSet::new(),
            leases: [None, None],
        }
    }

    // Where things are.

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

    /// The address that an operand names; somewhere in the window while nothing is mapped.
    pub(crate) fn address_of(&self, place: Place) -> u64 {
        let page = match self.nth_area(place.area) {
            Some(area) => page_in(&area, place.page),
            None => FIRST,
        };
        page * PAGE + u64::from(place.byte)
    }

    /// What an operand asks for.
    pub(crate) fn range_of(&self, ask: &Ask) -> IovaRange {
        let nothing = Area {
            first: FIRST,
            pages: LARGE,
            frame: 0,
            access: Access::Read,
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
        let per_bit = 1 << (u32::from(ask.granule_lg2).saturating_sub(12));
        if ask.ragged {
            return pages(first, last);
        }
        pages(first / per_bit * per_bit, last | (per_bit - 1))
    }

    /// The area that an operand of `Map` describes.
    pub(crate) fn new_area(slot: u8, skip: u16, count: u16, shifted: bool, access: Access) -> Area {
        let first = FIRST + u64::from(slot) * LARGE + u64::from(skip);
        let frame = first - FIRST + if shifted { PAGES + 1 } else { 0 };
        Area {
            first,
            pages: u64::from(count),
            frame,
            access,
        }
    }

    /// The first page of `first..=last` that no area holds.
    pub(crate) fn first_hole(&self, first: u64, last: u64) -> Option<u64> {
        (first..=last).find(|page| self.area_at(*page).is_none())
    }

    // What happens.

    pub(crate) fn map(&mut self, area: Area) {
        self.areas.insert(area.first, area);
        if self.tracking != Tracking::On {
            self.untracked.extend(area.first..=area.last());
        }
    }

    /// The area goes, with all that was dirty in it.
    pub(crate) fn unmap(&mut self, area: &Area) {
        self.areas.remove(&area.first);
        let gone = |page: &u64| (area.first..=area.last()).contains(page);
        self.pending.retain(|page| !gone(page));
        self.marks.retain(|page| !gone(page));
        self.leaves.retain(|(page, _)| !gone(page));
        self.rests.retain(|page| !gone(page));
        self.untracked.retain(|page| !gone(page));
        for lease in self.leases.iter_mut().flatten() {
            lease.pages.retain(|page| !gone(page));
        }
    }

    /// Switching on makes everything clean; what was dirty is copied by the caller.
    pub(crate) fn track(&mut self, on: bool) {
        if on && self.tracking != Tracking::On {
            self.pending.clear();
            self.marks.clear();
            self.leaves.clear();
            self.rests.clear();
            self.untracked.clear();
        }
        self.tracking = match (on, self.tracking) {
            (true, _) => Tracking::On,
            (false, Tracking::Never) => Tracking::Never,
            (false, _) => Tracking::Off,
        };
    }

    /// A device wrote bytes of one mapped page.
    pub(crate) fn device_wrote(&mut self, at: u64, bytes: &[u8]) {
        let page = self.store(at, bytes);
        if self.tracking != Tracking::On {
            self.untracked.insert(page);
            return;
        }
        self.leaves.extend(self.leaf_of(page));
        // A cached "dirty" from before the harvest may hide this write from the table: the lease copies after its
        // flush.
        let hidden = |lease: &Leased| !lease.synced && lease.pages.contains(&page);
        if !self.leases.iter().flatten().any(hidden) {
            self.pending.insert(page);
        }
    }

    /// A CPU wrote bytes of one mapped page, and marked it.
    pub(crate) fn cpu_wrote(&mut self, at: u64, bytes: &[u8]) {
        let page = self.store(at, bytes);
        self.marks.insert(page);
        self.pending.insert(page);
    }

    /// A CPU wrote bytes of one mapped page, and told nobody: what it owes is left for the comparison at the end.
    pub(crate) fn cpu_wrote_unmarked(&mut self, at: u64, bytes: &[u8]) {
        self.store(at, bytes);
    }

    /// A harvest went over the pages `first..=last`, all of them mapped, and reported `reported` of them.
    pub(crate) fn harvested(
        &mut self,
        lease: usize,
        first: u64,
        last: u64,
        reported: BTreeSet<u64>,
    ) {
        let covered = |page: u64| (first..=last).contains(&page);
        self.pending.retain(|page| !covered(*page));
        self.marks.retain(|page| !covered(*page));
        self.rests.retain(|page| !covered(*page));
        // A leaf is cleared as a whole; what the harvest did not cover of it is kept as marks.
        let touched = |(page, count): &(u64, u64)| *page <= last && first < page + count;
        let taken: Vec<(u64, u64)> = self.leaves.iter().copied().filter(touched).collect();
        for leaf in taken {
            self.leaves.remove(&leaf);
            let pages = leaf.0..leaf.0 + leaf.1;
            self.rests.extend(pages.filter(|page| !covered(*page)));
        }
        self.leases[lease] = Some(Leased {
            pages: reported,
            synced: false,
        });
    }

    /// A lease was put back: the pages of `runs`, as far as they are mapped, are marked.
    pub(crate) fn aborted(&mut self, lease: usize, runs: &[IovaRange]) {
        for page in runs.iter().flat_map(|run| pages_of(*run)) {
            if self.area_at(page).is_some() {
                self.marks.insert(page);
            }
        }
        if let Some(lease) = self.leases[lease].take() {
            self.pending.extend(lease.pages);
        }
    }

    // What must hold.

    /// The bytes of the pages of `first..=last` that a harvest must report.
    pub(crate) fn must_report(&self, first: u64, last: u64) -> BTreeSet<u64> {
        self.pending.range(first..=last).copied().collect()
    }

    /// The pages of `first..=last` that a harvest may report.
    pub(crate) fn may_report(&self, first: u64, last: u64) -> BTreeSet<u64> {
        let leaves = self
            .leaves
            .iter()
            .flat_map(|(page, count)| *page..page + count);
        let marks = self.marks.union(&self.rests).copied();
        leaves
            .chain(marks)
            .filter(|page| (first..=last).contains(page))
            .collect()
    }

    /// Why a request is refused before anything is touched.
    pub(crate) fn refusal(
        &self,
        range: IovaRange,
        granule: Granule,
        bits: u64,
        all_or_nothing: bool,
    ) -> Option<Error> {
        let needed = u128::from((range.last().get() - range.start().get()) >> granule.lg2()) + 1;
        let ragged = |granule: Granule| {
            let borders = [range.start().get(), range.last().get() + 1];
            borders.iter().any(|border| border & granule.mask() != 0)
        };
        let page = Granule::K4;
        if ragged(page) {
            Some(Error::Unaligned {
                range,
                granule: page,
            })
        } else if ragged(granule) {
            Some(Error::Unaligned { range, granule })
        } else if needed > u128::from(bits) {
            Some(Error::BitmapTooShort {
                bits,
                needed,
                range,
                granule,
            })
        } else if self.tracking == Tracking::Never {
            Some(Error::NeverTracked { range })
        } else if all_or_nothing {
            let at = self.hole_in(range)?;
            Some(Error::Hole { at, range })
        } else {
            None
        }
    }

    /// The first address of `range` that no area holds.
    pub(crate) fn hole_in(&self, range: IovaRange) -> Option<Iova> {
        let (first, last) = (range.start().get() / PAGE, range.last().get() / PAGE);
        Some(Iova::new(self.first_hole(first, last)? * PAGE))
    }

    /// The leaf that maps `page`: the largest power of two that fits.
    fn leaf_of(&self, page: u64) -> Option<(u64, u64)> {
        let area = self.area_at(page)?;
        let largest = if self.large_leaves { LARGE } else { 1 };
        (0..=largest.ilog2())
            .rev()
            .map(|lg2| (page >> lg2 << lg2, 1 << lg2))
            .find(|(first, pages)| {
                area.first <= *first
                    && first + pages - 1 <= area.last()
                    && area.frame_of(*first) % pages == 0
            })
    }

    /// Stores bytes that lie in one mapped page; returns the page.
    fn store(&mut self, at: u64, bytes: &[u8]) -> u64 {
        let page = at / PAGE;
        if let Some(frame) = self.area_at(page).map(|area| area.frame_of(page)) {
            let memory = self
                .memory
                .entry(frame)
                .or_insert_with(|| Box::new([0; PAGE as usize]));
            let from = (at % PAGE) as usize;
            memory[from..from + bytes.len()].copy_from_slice(bytes);
        }
        page
    }
}

/// The page of `area` that an operand names: one of the first, middle or last ones, or the one behind it.
fn page_in(area: &Area, code: u8) -> u64 {
    let code = u64::from(code);
    let within = match code {
        0..12 => code,
        12..20 => area.pages / 2 + code - 12,
        20..31 => (area.pages + code).saturating_sub(31),
        _ => return area.last() + 1,
    };
    area.first + within % area.pages
}

/// The addresses of the pages `first..=last`.
pub(crate) fn pages(first: u64, last: u64) -> IovaRange {
    IovaRange::new(Iova::new(first * PAGE), Iova::new(last * PAGE + PAGE - 1))
        .unwrap_or(IovaRange::ALL)
}

/// The pages that `range` touches.
pub(crate) fn pages_of(range: IovaRange) -> impl Iterator<Item = u64> {
    range.start().get() / PAGE..=range.last().get() / PAGE
}

/// Cuts `len` bytes from `at` on at the borders of pages: address, and place in the whole.
pub(crate) fn pieces(at: u64, len: usize) -> impl Iterator<Item = (u64, std::ops::Range<usize>)> {
    let mut done = 0;
    std::iter::from_fn(move || {
        let here = at + done as u64;
        let piece = (len - done).min((PAGE - here % PAGE) as usize);
        let range = done..done + piece;
        done += piece;
        (piece > 0).then_some((here, range))
    })
}
