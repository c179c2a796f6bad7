//! The plan of a change: which areas are cut, unmapped or new, from one snapshot, before anything
//! is changed.

use std::collections::BTreeMap;

use super::area::Area;
use super::check_mapping;
use super::rules::Rules;
use crate::area::{Entry, Snapshot};
use crate::error::Error;
use crate::marks::MarkOrdering;
use crate::source::Mapping;
use crate::sync::Arc;
use crate::units::{Access, Granule, Iova, IovaRange};

/// The snapshot that a plan is made from.
type TreeSnapshot<'a> = Snapshot<'a, Area, 16, Rules>;

/// Disjoint ranges by their first address.
type Ranges = BTreeMap<Iova, IovaRange>;

/// One change of a batch: see [`AddressSpace::apply`](crate::AddressSpace::apply).
///
/// ```
/// # use dirtymap::{Access, AddressSpace, Granule, Change};
/// # fn main() -> Result<(), dirtymap::Error> {
/// # let space = AddressSpace::tracked(Granule::K4);
/// # space.map(0..1 << 20, 0, Access::ReadWrite)?;
/// space.apply(&[Change::Cut { at: 0x8_0000.into() }])?;
/// assert_eq!(space.mappings().len(), 2);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// As [`AddressSpace::map`](crate::AddressSpace::map).
    Map {
        /// The device-visible addresses.
        range: IovaRange,
        /// The backing address, where the memory begins.
        backing: u64,
        /// What devices may do.
        access: Access,
    },
    /// As [`AddressSpace::unmap_discarding`](crate::AddressSpace::unmap_discarding).
    Unmap {
        /// The range to unmap: whole areas, or pieces that earlier cuts of the batch made of them.
        range: IovaRange,
    },
    /// As [`AddressSpace::cut`](crate::AddressSpace::cut).
    Cut {
        /// The first address of the upper part.
        at: Iova,
    },
}

/// The areas that a change cuts, unmaps or maps.
///
/// Adding a change costs a few searches, however many came before it in the batch.
#[derive(Default)]
pub(super) struct Plan {
    /// Areas that are cut or unmapped, by first address.
    pub(super) touched: BTreeMap<Iova, Touched>,
    /// New areas, each with the number of its change.
    pub(super) new: Vec<(usize, Arc<Area>)>,
    /// The ranges of the new areas.
    taken: Ranges,
    /// Ranges in which the unmaps so far leave nothing of the snapshot: they need not be searched
    /// again.
    emptied: Ranges,
    /// Addresses at which areas are cut, each with the number of its change.
    cuts: Vec<(usize, Iova)>,
}

/// An area that is cut, or goes, or both.
pub(super) struct Touched {
    pub(super) area: Arc<Area>,
    /// By first address. Together they make up the area.
    pub(super) pieces: BTreeMap<Iova, Piece>,
}

pub(super) struct Piece {
    pub(super) range: IovaRange,
    /// Whether the change unmaps it.
    pub(super) goes: bool,
}

impl Touched {
    pub(super) fn is_cut(&self) -> bool {
        self.pieces.len() > 1
    }

    /// The ranges of the pieces that go, or of those that stay.
    pub(super) fn pieces(&self, that_go: bool) -> impl Iterator<Item = IovaRange> {
        let pieces = self.pieces.values();
        pieces.filter_map(move |piece| (piece.goes == that_go).then_some(piece.range))
    }
}

impl Plan {
    pub(super) fn add(
        &mut self,
        index: usize,
        change: &Change,
        snapshot: &TreeSnapshot<'_>,
        (page, ordering): (Granule, MarkOrdering),
    ) -> Result<(), Error> {
        match *change {
            Change::Map {
                range,
                backing,
                access,
            } => {
                let mapping = Mapping {
                    range,
                    backing,
                    access,
                };
                let existing = snapshot.iter(range).next().map(|entry| entry.range);
                let existing = existing.or_else(|| first_in(&self.taken, range));
                check_new(&mapping, snapshot.rules(), existing, page)?;
                self.new
                    .push((index, Arc::new(Area::new(mapping, page, ordering))));
                self.taken.insert(range.start(), range);
                Ok(())
            }
            Change::Unmap { range } => self.unmap(range, snapshot),
            Change::Cut { at } => self.cut(index, at, snapshot, page),
        }
    }

    /// Plans to unmap all areas inside `range`, or the pieces that are left of them. There must be
    /// at least one, and none may extend past `range`.
    pub(super) fn unmap(
        &mut self,
        range: IovaRange,
        snapshot: &TreeSnapshot<'_>,
    ) -> Result<(), Error> {
        if let Some(area) = first_in(&self.taken, range) {
            return Err(Error::Busy { area });
        }
        let mut any = false;
        let mut next = Some(range.start());
        while let Some(from) = next.filter(|from| *from <= range.last()) {
            let rest = IovaRange::new(from, range.last())?;
            // Ranges that are planned to go are skipped, so each area is visited as often as it has
            // pieces that go.
            let stretch = match first_in(&self.emptied, rest) {
                Some(emptied) if emptied.contains(from) => {
                    next = emptied.last().checked_add(1);
                    continue;
                }
                // The last address below.
                Some(emptied) => IovaRange::new(from, Iova::new(emptied.start().get() - 1))?,
                None => rest,
            };
            for entry in snapshot.iter(stretch) {
                let pieces = &mut self.touch(entry).pieces;
                // The piece that holds the first address may begin below it.
                let first = pieces.range(..=from).next_back();
                let first = first.map_or(from, |(start, _)| *start);
                for (_, piece) in pieces.range_mut(first..=stretch.last()) {
                    if piece.goes || !piece.range.intersects(stretch) {
                        continue;
                    }
                    if !range.covers(piece.range) {
                        let area = piece.range;
                        return Err(Error::PartOfArea { range, area });
                    }
                    piece.goes = true;
                    any = true;
                }
            }
            next = stretch.last().checked_add(1);
        }
        if !any {
            return Err(Error::NothingMapped { range });
        }
        self.empty(range);
        Ok(())
    }

    /// Notes that nothing is left in `range`.
    fn empty(&mut self, range: IovaRange) {
        let mut all = range;
        while let Some(other) = first_in(&self.emptied, range) {
            self.emptied.remove(&other.start());
            all = all.hull(other);
        }
        self.emptied.insert(all.start(), all);
    }

    /// Plans a cut at `at`, if an area lies on both sides of it.
    pub(super) fn cut(
        &mut self,
        index: usize,
        at: Iova,
        snapshot: &TreeSnapshot<'_>,
        page: Granule,
    ) -> Result<(), Error> {
        check_cut(at, snapshot.rules().alignment(page))?;
        if let Some(area) = first_in(&self.taken, IovaRange::at(at))
            && area.start() < at
        {
            return Err(Error::Busy { area });
        }
        let Some(below) = at.get().checked_sub(1).map(Iova::new) else {
            return Ok(());
        };
        let Some(entry) = snapshot.lookup(at).filter(|e| e.range.contains(below)) else {
            return Ok(());
        };
        let pieces = &mut self.touch(entry).pieces;
        if let Some((_, left)) = pieces.range_mut(..=below).next_back()
            && left.range.contains(at)
            && !left.goes
        {
            let whole = left.range;
            left.range = IovaRange::new(whole.start(), below)?;
            let right = Piece {
                range: IovaRange::new(at, whole.last())?,
                goes: false,
            };
            pieces.insert(at, right);
            self.cuts.push((index, at));
        }
        Ok(())
    }

    fn touch(&mut self, entry: Entry<'_, Area>) -> &mut Touched {
        let range = entry.range;
        self.touched
            .entry(range.start())
            .or_insert_with(|| Touched {
                area: entry.to_arc(),
                pieces: BTreeMap::from([(range.start(), Piece { range, goes: false })]),
            })
    }

    /// The ranges that go, each with its area.
    pub(super) fn going(&self) -> impl Iterator<Item = (&Area, IovaRange)> {
        self.touched.values().flat_map(|touched| {
            let going = touched.pieces(true);
            going.map(|range| (&*touched.area, range))
        })
    }

    /// Checks again, in the update that publishes the plan, the one condition that may have changed
    /// since: the alignment of cuts, because a domain with larger pages may have been attached. The
    /// other conditions still hold:
    /// * A touched area is claimed, and so it is in the tree as it was.
    /// * New areas are checked again when their addresses are promised, and the promise holds until
    ///   the end. The domains stay the same.
    /// * An area that was mapped meanwhile, in a range that is unmapped, counts as mapped after the
    ///   unmap.
    ///
    /// # Errors
    /// The error of the first cut, with the number of its change.
    pub(super) fn check_again(&self, rules: &Rules, page: Granule) -> Result<(), (usize, Error)> {
        let granule = rules.alignment(page);
        let mut cuts = self.cuts.iter();
        cuts.try_for_each(|(index, at)| check_cut(*at, granule).map_err(|error| (*index, error)))
    }
}

fn check_cut(at: Iova, granule: Granule) -> Result<(), Error> {
    if at.is_aligned(granule) {
        Ok(())
    } else {
        Err(Error::UnalignedCut { at, granule })
    }
}

/// The lowest of `ranges` that intersects `range`.
fn first_in(ranges: &Ranges, range: IovaRange) -> Option<IovaRange> {
    let below = ranges.range(..=range.start()).next_back();
    let below = below.filter(|(_, found)| found.intersects(range));
    let found = below.or_else(|| ranges.range(range.start()..=range.last()).next());
    found.map(|(_, found)| *found)
}

/// Checks a mapping that is to be new; `existing` is the lowest area that overlaps it.
pub(super) fn check_new(
    mapping: &Mapping,
    rules: &Rules,
    existing: Option<IovaRange>,
    page: Granule,
) -> Result<(), Error> {
    check_mapping(mapping, rules.alignment(page))?;
    let range = mapping.range;
    if let Some(reserved) = rules.reserved_in(range) {
        return Err(Error::Reserved { range, reserved });
    }
    match existing.or_else(|| rules.promised_in(range)) {
        Some(existing) => Err(Error::Overlap { range, existing }),
        None => Ok(()),
    }
}
