//! Map, unmap, and their effect on the copy.

use dirtymap::bitmap::BitmapError;
use dirtymap::space::Unmapped;
use dirtymap::{Error, Granule, Iova, IovaRange, UserBitmap};

use super::{Checked, Runner, same_answer};
use crate::bits::{Buffer, check_bits, words_for};
use crate::op::{Cut, MapFault};
use crate::oracle::Area;
use crate::pages::{MEMORY, PAGE, pages};
use crate::violation::{Rule, check, same};

impl Runner<'_> {
    pub(super) fn map(&mut self, area: Area, fault: MapFault) -> Checked {
        let mut range = area.range();
        let mut backing = area.frame * PAGE;
        match fault {
            MapFault::None => (),
            MapFault::Unaligned => {
                let start = Iova::new(range.start().get() + 512);
                range = IovaRange::new(start, range.last()).unwrap_or(range);
            }
            MapFault::UnalignedBacking => backing += 512,
            MapFault::Wraps => {
                let unit = self.oracle.largest_unit();
                range = pages(area.first, area.last().max(area.first + 2 * unit - 1));
                backing = u64::MAX - (unit * PAGE - 1);
            }
            MapFault::OutsideMemory => backing = MEMORY,
        }
        let before = self.space.mappings();
        if fault == MapFault::OutsideMemory && self.oracle.attached.is_empty() {
            // No domain would refuse it.
            return Ok(());
        }
        let space = self.space;
        let answer = self.stubbornly(|| space.map(range, backing, area.access))?;
        let granule = self.oracle.alignment();
        let existing = self
            .oracle
            .areas
            .values()
            .find(|other| other.range().intersects(range));
        let reserved = self.oracle.free.reserved_in(range);
        let right = match (fault, existing) {
            (MapFault::Unaligned, _) => Err(Error::Unaligned { range, granule }),
            (MapFault::UnalignedBacking, _) => Err(Error::UnalignedBacking { backing, granule }),
            (MapFault::Wraps, _) => Err(Error::BackingWraps { backing, range }),
            (_, _) if reserved.is_some() => {
                let reserved = reserved.unwrap_or(range);
                Err(Error::Reserved { range, reserved })
            }
            (_, Some(existing)) => Err(Error::Overlap {
                range,
                existing: existing.range(),
            }),
            (MapFault::OutsideMemory, None) => {
                same(
                    Rule::Answer,
                    "areas after a map that failed",
                    self.space.mappings(),
                    before,
                )?;
                return check(
                    matches!(answer, Err(Error::Source(_))),
                    Rule::Answer,
                    || format!("a map of missing memory: {answer:?}"),
                );
            }
            (MapFault::None, None) => match self.oracle.refuses(&area, &self.oracle.attached) {
                Some(error) => Err(error),
                None => {
                    self.oracle.map(area);
                    self.copy_mapped(&[range])?;
                    Ok(())
                }
            },
        };
        same_answer("a map", answer, right)?;
        self.check_areas()
    }

    /// Maps at the lowest free addresses. The place of `area` is ignored.
    pub(super) fn map_anywhere(&mut self, mut area: Area, ragged: bool) -> Checked {
        let len = area.pages * PAGE + if ragged { 100 } else { 0 };
        let backing = area.frame * PAGE;
        let (first, alignment) = self.oracle.first_fit(&area);
        area.first = first.unwrap_or(0);
        let space = self.space;
        let answer = self.stubbornly(|| space.map_anywhere(len, backing, area.access))?;
        let refused = self.oracle.refuses(&area, &self.oracle.attached);
        let right = if ragged {
            let granule = self.oracle.alignment();
            Err(Error::UnalignedLength { len, granule })
        } else if first.is_none() {
            Err(Error::NoSpace { len, alignment })
        } else {
            refused.map_or(Ok(()), Err)
        };
        match answer {
            Err(error) => same_answer("a map anywhere", Err(error), right)?,
            Ok(range) => {
                same_answer("a map anywhere", Ok(()), right)?;
                same(Rule::Answer, "the place of a map", range, area.range())?;
                self.oracle.map(area);
                self.copy_mapped(&[range])?;
            }
        }
        self.check_areas()
    }

    /// Unmaps. With a granule, takes the dirty pages. The flag beside it says whether the bitmap is
    /// too short.
    pub(super) fn unmap(&mut self, nth: u8, cut: Cut, take: Option<(u8, bool)>) -> Checked {
        let Some(area) = self.oracle.nth_area(nth) else {
            let range = IovaRange::ALL;
            let right = Err(Error::NothingMapped { range });
            let answer = self.space.unmap_discarding(range).map(|_| ());
            return same_answer("an unmap of nothing", answer, right);
        };
        let last = match cut {
            Cut::Part if area.pages > 1 => area.last() - 1,
            Cut::Rest => self
                .oracle
                .areas
                .values()
                .next_back()
                .map_or(area.last(), Area::last),
            Cut::Whole | Cut::Part => area.last(),
        };
        let range = pages(area.first, last);
        // No area begins inside another one, so only the first can stick out.
        let right = match cut {
            Cut::Part if area.pages > 1 => {
                let area = area.range();
                Err(Error::PartOfArea { range, area })
            }
            _ => Ok(()),
        };
        let inside = |area: &&Area| range.covers(area.range());
        let gone: Vec<Area> = self.oracle.areas.values().filter(inside).copied().collect();
        match take.filter(|_| range.len() <= 3584 * u128::from(PAGE)) {
            Some((lg2, short)) => self.unmap_taking(range, right, &gone, (lg2, short)),
            None => {
                let space = self.space;
                let answer = self.stubbornly(|| space.unmap_discarding(range))?;
                match answer {
                    Err(error) => same_answer("an unmap", Err(error), right)?,
                    Ok(done) => {
                        same_answer("an unmap", Ok(()), right)?;
                        self.check_discarded(&gone, done)?;
                        self.forget(&gone)?;
                    }
                }
                self.check_areas()
            }
        }
    }

    /// An unmap that returns dirty pages: afterwards the copy of its areas must be complete.
    fn unmap_taking(
        &mut self,
        range: IovaRange,
        right: Result<(), Error>,
        gone: &[Area],
        (lg2, short): (u8, bool),
    ) -> Checked {
        let granule = Granule::from_lg2(lg2).unwrap_or(Granule::K4);
        let buffer = Buffer::new();
        let words = buffer.bitmap(words_for(range, granule) - usize::from(short));
        let (space, before) = (self.space, buffer.read());
        let answer = self.stubbornly(|| {
            let bitmap = UserBitmap::shared(words);
            space.unmap(range, granule, bitmap).map(|(done, _)| done)
        })?;
        let right = match right {
            _ if !range.is_aligned(granule) => Err(Error::Unaligned { range, granule }),
            _ if short => Err(Error::Bitmap(BitmapError::TooShort {
                bits: words.len() as u64 * 64,
                needed: range.granules(granule),
                range,
                granule,
            })),
            right => right,
        };
        let done = match answer {
            Err(error) => {
                same(Rule::Bitmap, "a bitmap", buffer.read(), before)?;
                same_answer("an unmap", Err(error), right)?;
                return self.check_areas();
            }
            Ok(done) => done,
        };
        same_answer("an unmap", Ok(()), right)?;
        let (must, may) = self.oracle.dirt_of(gone);
        let request = dirtymap::HarvestRequest::new(range, granule);
        let found = check_bits(&request, &before, &buffer.read(), &must, &may)?;
        let dirty = (done.dirty_bytes / u128::from(PAGE)) as u64;
        let bounds = must.len() as u64..=may.len() as u64;
        check(bounds.contains(&dirty), Rule::Accounting, || {
            format!("{dirty} pages returned, not {bounds:?}")
        })?;
        if granule <= Granule::K4 {
            let bytes = u128::from(found.set) << granule.lg2();
            same(Rule::Accounting, "bytes returned", done.dirty_bytes, bytes)?;
        }
        same(Rule::Accounting, "bytes discarded", done.discarded_bytes, 0)?;
        self.counts.unmapped_dirty_bytes += done.dirty_bytes as u64;
        self.check_size(gone, done)?;
        // The memory is final, and the oracle still has its places.
        self.copy_mapped(&found.runs)?;
        self.compare_areas(gone)?;
        self.forget(gone)?;
        self.check_areas()
    }

    /// The areas are gone, and no device reaches them.
    pub(super) fn forget(&mut self, gone: &[Area]) -> Checked {
        for area in gone {
            self.oracle.unmap(area);
        }
        self.forget_copies(gone)
    }

    pub(super) fn forget_copies(&mut self, gone: &[Area]) -> Checked {
        self.check_paid(gone)?;
        for area in gone {
            // What a live lease has copied is older than a later area at the same addresses, which
            // the images get when it is mapped.
            for held in self.leases.iter_mut().flatten() {
                held.fresh.retain(|(at, _)| !area.holds(at / PAGE));
            }
            let images = self.images.iter_mut().flatten();
            for copy in self
                .copies
                .iter_mut()
                .chain(images.map(|image| &mut image.pages))
            {
                copy.retain(|page, _| !area.holds(*page));
            }
            for node in &self.world.nodes {
                check(!node.translates(area.range().start()), Rule::Answer, || {
                    format!("{} is still translated", area.range())
                })?;
            }
        }
        Ok(())
    }

    pub(super) fn check_size(&self, gone: &[Area], done: Unmapped) -> Checked {
        same(
            Rule::Answer,
            "areas unmapped",
            done.areas,
            gone.len() as u64,
        )?;
        let bytes: u128 = gone.iter().map(|area| area.range().len()).sum();
        same(Rule::Answer, "bytes unmapped", done.bytes, bytes)
    }

    /// An unmap has counted each dirty page of the areas `gone` as discarded, once.
    pub(super) fn check_discarded(&mut self, gone: &[Area], done: Unmapped) -> Checked {
        self.check_size(gone, done)?;
        let (must, may) = self.oracle.dirt_of(gone);
        let counted = self.space.stats().discarded_bytes;
        let discarded = counted - self.counts.discarded_bytes;
        self.counts.discarded_bytes = counted;
        same(
            Rule::Accounting,
            "bytes discarded",
            done.discarded_bytes,
            discarded.into(),
        )?;
        let bounds = must.len() as u64..=may.len() as u64;
        check(
            bounds.contains(&(discarded / PAGE)),
            Rule::Accounting,
            || format!("{} pages discarded, not {bounds:?}", discarded / PAGE),
        )
    }
}
