//! Unmap: claim, empty the sources, flush, and only then release the addresses.
//!
//! ```text
//!  claim all ---> for each area and domain: end its ---> flush ---> move the put-back pages
//!    |            translations, owe, put dirty pages       |        to the marks; mark what
//!    |            into the put-back store                  |        is in flight; record
//!    |                                                     |             |
//!    +- one is busy: give back                             |             v
//!                      it fails: owe again, give back <----+        out of the tree;
//!                                                                   collect the marks
//! ```
//!
//! The pages that were dirty in a source go to the put-back store of its domain, after the debt was
//! handed over, as in an abort. So if the flush fails, the area still exists and its pages are
//! still dirty. If it succeeds, all of them move to the marks, which then hold everything that is
//! to be recorded or discarded. If the recording or the publication fails, the area stays, and each
//! domain gets back what came from its store, because a harvest of one domain does not look at the
//! marks. The marks have it as well: a superset. The steps are in [`change`](super::change).
//!
//! # No write is lost
//! A source ends a translation by one atomic exchange, which also returns the final dirty bit (D).
//! Take a write to a page that is unmapped:
//! * If the write set D, it did so before the exchange, which finds D set; or before a harvest that
//!   cleared D, and the lease of that harvest has the page.
//! * If the write used a cached "D is set", D was set when that was cached. Then the exchange found
//!   D set, or a harvest had cleared it, and its lease has the page. That lease owes the
//!   invalidation of the cached translation. So if the write came before the invalidation, the
//!   lease copies the page after it.
//! * After the flush, which drains writes in flight, there are no more writes. So the results of
//!   the exchanges, together with the put-back pages and the marks, are complete, and the contents
//!   of the memory are final.
//! * A harvest that takes a part of a leaf may have cleared D and still be moving the rest. It
//!   published the rest as in flight before it cleared D. So an unmap that finds D clear finds the
//!   rest in flight, or in the put-back store: it reads the tables, the slots of writes in flight,
//!   the put-back stores, and the marks, in this order. If the area has gone when the harvest
//!   arrives with the rest, the rest is counted as put back outside.
//! * Pages of a live [`WriteGuard`](crate::WriteGuard) are in flight, and so in the result. When
//!   the guard is dropped, the write is counted as outside.
//!
//! A lease that has such a page and is aborted later finds no area, or a younger one, and counts
//! the page as outside. A lease that is aborted meanwhile puts the page where the unmap finds it,
//! or counts it (see [`attachment`](super::attachment)).
//!
//! # The last mark
//! A mark may come while the area goes. This is store buffering (Dekker), and both sides have a
//! fence between their two steps:
//!
//! ```text
//!  marker                                     unmap
//!  M1  set the mark (it was clear)            U1  state := gone
//!  F3  fence(SeqCst)                          F4  fence(SeqCst)
//!  M2  look at the state                      U2  take the marks and count them
//! ```
//!
//! Either F3 or F4 comes first in the one order of all SeqCst fences:
//! - if F3 comes first, U2 sees the mark of M1, and counts it as recorded or discarded;
//! - if F4 comes first, M2 sees that the area has gone: the mark is an error, and counted as
//!   outside.
//!
//! A marker that finds the page marked already (no M1) relies on the thread that marked it.
//!
//! # The last mark by a handle of an area that was cut
//! The pieces of a cut share the marks. So M1, by a handle or a snapshot that led to the whole,
//! sets a mark of the piece. But the state of the whole says only that it was cut. The marks
//! themselves record which parts have gone since:
//!
//! ```text
//!  cut (has claimed the whole)     unmap of a piece, or a batch       marker by the whole
//!  G1  make the list of gone parts U0  the piece leaves the tree      M1  set the mark
//!  G2  state of the whole := cut   U1  add the piece to the list      F3  fence(SeqCst)
//!  G3  publish the pieces          F4  fence(SeqCst)                  M2  look at the state: cut?
//!                                  U2  take the marks, count them     M3  look at the list
//! ```
//!
//! * The thread that unmaps a piece has found it in the tree, after G3; or it runs the batch that
//!   has done G1 and G2 itself. So:
//!   - if F4 comes before F3, M2 sees the cut, by G2, and M3 sees the piece in the list, by U1;
//!   - if F3 comes before F4, U2 sees the mark of M1.
//!
//!   At least one of the two counts the mark, as for an area that goes as a whole.
//! * A part that has gone never comes back to the same marks. If its addresses are mapped again,
//!   the new area has marks of its own, which M1 does not touch. A mark by the old handle is
//!   outside; a mark by the space looks the area up, and finds the new one.
//! * A cut that fails after G2 gives the area back as it was. A marker that saw G2 finds
//!   nothing of that area in the list.
//! * A mark that M1 sets in a piece that has gone stays set as long as the marks live, and no
//!   thread reads it, because no area lies there. A later mark of that page finds it set, performs
//!   M2 and M3 all the same, and is outside.

use super::plan::Plan;
use super::{AddressSpace, Area};
use crate::bitmap::{BitmapView, UserBitmap};
use crate::error::Error;
use crate::events;
use crate::failure::Failure;
use crate::report::Unmapped;
use crate::source::Mapping;
use crate::sync::{Arc, Ordering, Step, fence, performs};
use crate::units::{Granule, IovaRange, ToIovaRange};

impl AddressSpace {
    /// Unmaps every area inside `range` and **discards** their dirty pages. All or nothing; `range`
    /// may have holes.
    ///
    /// Waits for the flush. On return no device reaches the memory, and the addresses can be mapped
    /// again.
    ///
    /// ```
    /// # use dirtymap::{Access, AddressSpace, Granule};
    /// # fn main() -> Result<(), dirtymap::Error> {
    /// # let space = AddressSpace::tracked(Granule::K4);
    /// # space.map(0..1 << 20, 0, Access::ReadWrite)?;
    /// space.mark(0x3000..0x4000)?;
    /// let unmapped = space.unmap_discarding(0..1 << 20)?;
    /// assert_eq!((unmapped.areas, unmapped.discarded_bytes), (1, 0x1000));
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`Error::PartOfArea`] if an area extends past `range`; [`Error::NothingMapped`];
    /// [`Error::Busy`] if another call maps, unmaps or cuts one of them. Then nothing is unmapped.
    /// If a source cannot flush: its error. Then the areas keep their addresses and their dirty
    /// pages, although devices can no longer reach their memory by new translations, and the call
    /// can be repeated. The same holds after a [panic](crate::DirtySource#panics) of a source, and
    /// everything that the source was asked to unmap counts as dirty.
    #[doc(alias = "IOMMU_IOAS_UNMAP")]
    #[doc(alias = "iopt_unmap_iova")]
    #[doc(alias = "memory_region_del_subregion")]
    pub fn unmap_discarding(&self, range: impl ToIovaRange) -> Result<Unmapped, Error> {
        let range = range.to_iova_range()?;
        self.retired.drop_all();
        let mut plan = Plan::default();
        plan.unmap(range, &self.areas.snapshot())?;
        let unmapped = self.execute(&plan, None)?;
        events::unmap(range, &unmapped);
        Ok(unmapped)
    }

    /// Unmaps every area inside `range`, and records their dirty pages, of all domains and marks,
    /// in `bitmap`: bit 0 is the first granule of `range`. All or nothing; `range` may have holes.
    /// For a large range use a [`SparseBitmap`](crate::SparseBitmap).
    ///
    /// Waits for the flush. On return no device reaches the memory, so the pages of the view can be
    /// copied at once; they are not reported again. No write is lost in between. A page that
    /// another lease has is reported by that lease. Marks that come later are errors.
    ///
    /// ```
    /// # use dirtymap::{Access, AddressSpace, Granule, UserBitmap};
    /// # fn main() -> Result<(), dirtymap::Error> {
    /// # let space = AddressSpace::tracked(Granule::K4);
    /// # space.map(0..1 << 20, 0, Access::ReadWrite)?;
    /// space.mark(0x3000..0x3001)?;
    /// let mut words = [0; 4];
    /// let bitmap = UserBitmap::new(&mut words);
    /// let (unmapped, dirty) = space.unmap(0..1 << 20, Granule::K4, bitmap)?;
    /// assert_eq!((unmapped.areas, dirty.count()), (1, 1)); // the last copy of page 3
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// In this order: [`Error::Unaligned`] (to `granule`), [`BitmapError::TooShort`], then those of
    /// [`unmap_discarding`](Self::unmap_discarding), then [`BitmapError::Shrank`],
    /// [`BitmapError::Window`] or [`BitmapError::NoSpace`] if a file cannot take the dirty bits.
    /// Then everything is as before, except that translations have ended, as after a flush that
    /// failed.
    ///
    /// [`BitmapError::TooShort`]: crate::bitmap::BitmapError::TooShort
    /// [`BitmapError::Shrank`]: crate::bitmap::BitmapError::Shrank
    /// [`BitmapError::Window`]: crate::bitmap::BitmapError::Window
    /// [`BitmapError::NoSpace`]: crate::bitmap::BitmapError::NoSpace
    #[doc(alias = "IOMMU_IOAS_UNMAP")]
    #[doc(alias = "VFIO_DMA_UNMAP_FLAG_GET_DIRTY_BITMAP")]
    pub fn unmap<'a>(
        &self,
        range: impl ToIovaRange,
        granule: Granule,
        bitmap: UserBitmap<'a>,
    ) -> Result<(Unmapped, BitmapView<'a>), Error> {
        let range = range.to_iova_range()?;
        let (unmapped, view, _) = self.unmap_areas(range, granule, bitmap)?;
        Ok((unmapped, view))
    }

    /// The unmap, and the areas that went, ascending.
    pub(crate) fn unmap_areas<'a>(
        &self,
        range: IovaRange,
        granule: Granule,
        bitmap: UserBitmap<'a>,
    ) -> Result<(Unmapped, BitmapView<'a>, Vec<Mapping>), Error> {
        self.retired.drop_all();
        let bound = bitmap.bind(range, granule)?;
        let view = bound.view();
        let mut plan = Plan::default();
        plan.unmap(range, &self.areas.snapshot())?;
        let unmapped = self.execute(&plan, Some(&mut bound.into_sink()))?;
        events::unmap(range, &unmapped);
        let areas = plan.going().map(|(area, range)| area.part(range));
        Ok((unmapped, view, areas.collect()))
    }

    /// Undoes the map of an area that is not live, after some domains have been filled. Pages that
    /// became dirty meanwhile are discarded.
    pub(super) fn take_out(&self, area: &Arc<Area>) -> Result<(), Failure> {
        let range = area.range();
        let mut pairs = area.pairs();
        let emptied = self.empty_part(range, false, &mut pairs);
        self.settle(emptied)?;
        let _ = self.mark_put_back(area, range);
        let _: Result<(), Error> = self.areas.update(|edit| {
            edit.remove(range.start());
            Ok(())
        });
        area.retire();
        *pairs = None;
        if performs(Step::TakeOutFence) {
            // SeqCst: F4 of the module's protocol; pairs with F3 in `Marks::mark_inside`. If F3
            // comes first, the clear below sees the mark; if F4 comes first, the marker sees that
            // the area has gone.
            fence(Ordering::SeqCst);
        }
        self.count_discarded(area.marks().clear(range));
        Ok(())
    }
}
