//! Unmap: claim, empty the sources, flush, and only then give the addresses free.
//!
//! ```text
//!  claim all ----> for each area and domain: end its translations, owe, keep D ----> flush ----> what is kept to the marks
//!    |                                                                                |              |  and what is in flight
//!    +-- one is busy: give back                    it fails: owe again, give back <---+              v
//!                                                          collect the marks <---- out of the tree, record the marks
//! ```
//!
//! What was dirty in a source is kept for its domain, behind the debt, as in an abort. So if the flush fails, the area is
//! still there and its pages are still dirty. If it succeeds, all of it comes to the marks: they are all that there is to
//! record or to discard. The steps are in [`change`](super::change).
//!
//! # No write is lost
//! A source ends a translation by one exchange, whose result is the last word on D. Take a write to a page that is
//! unmapped:
//! * If it set D, it did so before the exchange, which finds D set, or before a harvest that cleared D and whose lease has
//!   the page.
//! * If it went by a cached "D is set", D was set when that was cached. Then the exchange found D set, or a harvest had
//!   cleared it, and its lease has the page: that lease owes the invalidation of the cached translation, so if the write
//!   came before it was paid, the lease copies after it.
//! * After the flush, which drains writes in flight, there are no writes any more. So what the exchanges found, with what
//!   was kept and marked, is everything, and the memory behind it is final.
//!
//! * A harvest that takes a part of a leaf may have cleared D and still be moving the rest. It published the rest as in flight
//!   before it cleared D, so an unmap that finds D clear finds the rest in flight, or kept: it reads the tables, what is in
//!   flight, what is kept, and the marks, in this order. When the harvest arrives with the rest, and the area is gone, that is
//!   counted as put back outside.
//! * Pages of a live [`WriteGuard`](crate::WriteGuard) are in flight, and so in the result. When the guard is dropped, the
//!   write is counted as outside.
//!
//! A lease that has such a page and is aborted later finds no area, or a younger one, and counts it
//! as outside; one that is aborted meanwhile puts the page where the unmap finds it, or counts it
//! (see [`attachment`](super::attachment)).
//!
//! # The last mark
//! A mark may come while the area goes. Both sides have a fence between their two steps:
//!
//! ```text
//!  marker                                     unmap
//!  M1  set the mark (it was clear)            U1  state := gone
//!  F3  fence(SeqCst)                          F4  fence(SeqCst)
//!  M2  look at the state                      U2  take the marks and count them
//! ```
//!
//! Either F3 or F4 comes first in the one order of all SeqCst fences:
//! - if F3 does, U2 sees the mark of M1: it is counted as discarded;
//! - if F4 does, M2 sees that the area is gone: the mark is an error, and counted as outside.
//!
//! A marker that finds the page marked already (no M1) leaves it to the one who marked it.
//!
//! # The last mark by the handle of what was cut
//! The pieces of a cut share the marks, so M1, by a handle or a snapshot that led to the whole, lands
//! in those of the piece. But the state of the whole says only that it was cut. What has gone of it
//! since stands with the marks:
//!
//! ```text
//!  cut (has claimed the whole)     unmap of a piece, or a batch       marker by the whole
//!  G1  room for what will go       U0  the piece leaves the tree      M1  set the mark
//!  G2  state of the whole := cut   U1  add the piece to what has gone F3  fence(SeqCst)
//!  G3  publish the pieces          F4  fence(SeqCst)                  M2  look at the state: cut?
//!                                  U2  take the marks, count them     M3  look at what has gone
//! ```
//!
//! * Whoever unmaps a piece has found it in the tree, after G3, or is the batch that has done G1
//!   and G2 itself. So if F4 comes before F3, M2 sees the cut, by G2, and M3 the piece, by U1; if
//!   F3 does, U2 sees M1. One of the two counts the mark at least, as for an area that goes whole.
//! * What has gone stays so for these marks. If the same addresses are mapped anew, the area has
//!   marks of its own, which M1 does not touch; a mark by the old handle is outside. By the space,
//!   a mark looks the area up, and finds the new one.
//! * A cut that fails after G2 gives the area back as it was: a marker in between has looked in
//!   vain.
//! * What M1 sets in a piece that has gone stays set, for as long as the marks live, and nobody
//!   reads it: no piece lies there. A later mark of that page finds it set, does M2 and M3 all the
//!   same, and is outside.

use super::plan::Plan;
use super::{AddressSpace, Area};
use crate::bitmap::{BitmapView, UserBitmap};
use crate::error::Error;
use crate::events;
use crate::failure::Failure;
use crate::sync::{Arc, Ordering, fence};
use crate::units::{Granule, ToIovaRange};

/// What an unmap did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
pub struct Unmapped {
    /// Areas that were removed.
    pub areas: u64,
    /// Their bytes.
    pub bytes: u128,
    /// Bytes of dirty pages that went with them and were recorded in the user's bitmap.
    pub dirty_bytes: u128,
    /// Bytes of dirty pages that went with them and were not. With a bitmap: none, unless a window of a file failed for a
    /// mark that came while the areas went.
    pub discarded_bytes: u128,
}

impl AddressSpace {
    /// Unmaps every area inside `range` and **discards** what was dirty in them. All or nothing; holes in `range` are
    /// fine.
    ///
    /// Waits for the flush, so that on return no device reaches the memory and its addresses can be mapped again.
    ///
    /// # Errors
    /// [`Error::PartOfArea`] if an area sticks out of `range`; [`Error::NothingMapped`];
    /// [`Error::Busy`] if another call maps, unmaps or cuts one of them. Nothing is unmapped then.
    /// If a source cannot flush: its error; the areas keep their addresses and what is dirty in
    /// them, although devices can no longer reach their memory by new translations, and the call
    /// can be repeated. So do they after a [panic](crate::DirtySource#panics): all of what the
    /// source was asked to unmap counts as dirty then.
    pub fn unmap_discarding(&self, range: impl ToIovaRange) -> Result<Unmapped, Error> {
        let range = range.to_iova_range()?;
        self.retired.drop_all();
        let mut plan = Plan::default();
        plan.unmap(range, &self.areas.snapshot())?;
        let unmapped = self.execute(&plan, None)?;
        events::unmap(range, &unmapped);
        Ok(unmapped)
    }

    /// Unmaps every area inside `range`, and records what was dirty in them, in all domains and marks, in `bitmap`: bit 0
    /// is the first granule of `range`. All or nothing; holes are fine, and for a range that is large a
    /// [`SparseBitmap`](crate::SparseBitmap) is, too.
    ///
    /// Waits for the flush, so that on return no device reaches the memory: the pages of the view can be copied at once,
    /// and are not reported again. No write is lost in between; a page that another lease has is reported by that one. Marks
    /// that come later are errors.
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
    /// In this order: [`Error::Unaligned`] (to `granule`), [`Error::BitmapTooShort`], then as
    /// [`unmap_discarding`](Self::unmap_discarding), then [`Error::BitmapShrank`],
    /// [`Error::BitmapWindow`] or [`Error::BitmapNoSpace`] if a file cannot take what is dirty;
    /// everything is as it was then, but for translations, as after a flush that failed.
    pub fn unmap<'a>(
        &self,
        range: impl ToIovaRange,
        granule: Granule,
        bitmap: UserBitmap<'a>,
    ) -> Result<(Unmapped, BitmapView<'a>), Error> {
        let range = range.to_iova_range()?;
        self.retired.drop_all();
        let bound = bitmap.bind(range, granule)?;
        let view = bound.view();
        let mut plan = Plan::default();
        plan.unmap(range, &self.areas.snapshot())?;
        let unmapped = self.execute(&plan, Some(&mut bound.into_sink()))?;
        events::unmap(range, &unmapped);
        Ok((unmapped, view))
    }

    /// Undoes the map of an area that is not live, which some domains have been filled with. What was dirty in it meanwhile
    /// is discarded.
    pub(super) fn take_out(&self, area: &Arc<Area>) -> Result<(), Failure> {
        let range = area.mapping.range;
        let mut pairs = area.pairs();
        let emptied = self.empty_part(range, false, &mut pairs);
        self.settle(emptied)?;
        self.mark_kept(area, range);
        let _: Result<(), Error> = self.areas.update(|edit| {
            edit.remove(range.start());
            Ok(())
        });
        area.retire();
        *pairs = None;
        // SeqCst: F4 of the module's protocol; pairs with F3 in `Marks::mark_inside`.
        fence(Ordering::SeqCst);
        self.discard(area.marks.clear(range));
        Ok(())
    }
}
