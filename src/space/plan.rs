//! The plan of a change: what is to become of which areas, from one snapshot, before anything is touched.

use std::collections::BTreeMap;

use super::area::Area;
use super::change::Change;
use super::check_mapping;
use super::rules::Rules;
use crate::area::{Entry, Snapshot};
use crate::error::Error;
use crate::source::{Mapping, MarkOrdering};
use crate::sync::Arc;
use crate::units::{Granule, Iova, IovaRange};

/// The areas that a plan is made from.
type Areas<'a> = Snapshot<'a, Area, 16, Rules>;

/// What is to become of which areas.
#[derive(Default)]
pub(super) struct Plan {
    /// By first address.
    pub(super) touched: BTreeMap<Iova, Touched>,
    /// New areas, each with the number of its change.
    pub(super) new: Vec<(usize, Arc<Area>)>,
}

/// An area that is cut, or goes, or both.
pub(super) struct Touched {
    pub(super) area: Arc<Area>,
    /// In order; together they are the area.
    pub(super) pieces: Vec<Piece>,
}

pub(super) struct Piece {
    pub(super) range: IovaRange,
    /// Whether it is unmapped.
    pub(super) goes: bool,
}

impl Touched {
    pub(super) fn is_cut(&self) -> bool {
        self.pieces.len() > 1
    }
}

impl Plan {
    pub(super) fn add(
        &mut self,
        index: usize,
        change: &Change,
        snapshot: &Areas<'_>,
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
                let existing = existing.or_else(|| self.new_in(range));
                check_new(&mapping, snapshot.rules(), existing, page)?;
                self.new
                    .push((index, Arc::new(Area::new(mapping, page, ordering))));
                Ok(())
            }
            Change::Unmap { range } => self.unmap(range, snapshot),
            Change::Cut { at } => self.cut(at, snapshot, page),
        }
    }

    /// Unmaps all areas inside `range`, or what is left of them: one at least, none of which sticks out.
    pub(super) fn unmap(&mut self, range: IovaRange, snapshot: &Areas<'_>) -> Result<(), Error> {
        if let Some(area) = self.new_in(range) {
            return Err(Error::Busy { area });
        }
        let mut any = false;
        for entry in snapshot.iter(range) {
            let pieces = &mut self.touch(entry).pieces;
            for piece in pieces.iter_mut().filter(|piece| !piece.goes) {
                if !piece.range.intersects(range) {
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
        match any {
            true => Ok(()),
            false => Err(Error::NothingMapped { range }),
        }
    }

    /// Cuts at `at`, if something lies on both sides of it.
    pub(super) fn cut(
        &mut self,
        at: Iova,
        snapshot: &Areas<'_>,
        page: Granule,
    ) -> Result<(), Error> {
        let granule = snapshot.rules().alignment(page);
        if !at.is_aligned(granule) {
            return Err(Error::UnalignedCut { at, granule });
        }
        if let Some(area) = self.new_in(IovaRange::granule_at(at, Granule::BYTE))
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
        let across = |piece: &Piece| piece.range.contains(below) && piece.range.contains(at);
        if let Some(nth) = pieces.iter().position(across)
            && !pieces[nth].goes
        {
            let whole = pieces[nth].range;
            pieces[nth].range = IovaRange::new(whole.start(), below)?;
            let right = Piece {
                range: IovaRange::new(at, whole.last())?,
                goes: false,
            };
            pieces.insert(nth + 1, right);
        }
        Ok(())
    }

    fn touch(&mut self, entry: Entry<'_, Area>) -> &mut Touched {
        let range = entry.range;
        self.touched
            .entry(range.start())
            .or_insert_with(|| Touched {
                area: entry.to_arc(),
                pieces: vec![Piece { range, goes: false }],
            })
    }

    /// The new area that intersects `range`.
    fn new_in(&self, range: IovaRange) -> Option<IovaRange> {
        let mut new = self.new.iter().map(|(_, area)| area.mapping.range);
        new.find(|new| new.intersects(range))
    }

    /// What goes, with the areas that it is in.
    pub(super) fn going(&self) -> impl Iterator<Item = (&Area, IovaRange)> {
        self.touched.values().flat_map(|touched| {
            let going = touched.pieces.iter().filter(|piece| piece.goes);
            going.map(|piece| (&*touched.area, piece.range))
        })
    }
}

/// Checks a mapping that is to be new, with the lowest area in its way.
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
