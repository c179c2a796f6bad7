//! The lease: the pages that a harvest took, until their copies are safe.
//!
//! ```text
//!            sync                commit
//!  Owed ------------> Synced ------------> done: the pages are the consumer's
//!    |                   |
//!    +---- abort, drop --+---------------> every page of the lease is dirty again
//! ```
//!
//! Only a synced lease hands out ranges to copy, because writes through stale translations may land
//! until then.

use std::fmt;
use std::marker::PhantomData;

use super::backing::Backing;
use super::holding::{Holding, Recorded};
use crate::bitmap::{Runs, Words};
use crate::error::Error;
use crate::events;
use crate::report::{Aborted, HarvestReport};
use crate::source::Stopped;
use crate::space::{AddressSpace, Audience, Lineage};
use crate::units::{Granule, Iova, IovaRange};

/// A lease that owes a flush. Nothing may be copied yet.
#[derive(Debug)]
pub struct Owed(());

/// A lease whose flush has finished. Its pages may be copied.
#[derive(Debug)]
pub struct Synced(());

/// The pages that one harvest took. A lease is owed, then synced, then committed or aborted. A drop
/// aborts it.
///
/// ```
/// # use dirtymap::{Access, AddressSpace, Granule};
/// # fn main() -> Result<(), dirtymap::Error> {
/// # let space = AddressSpace::tracked(Granule::K4);
/// # space.map(0..1 << 20, 0, Access::ReadWrite)?;
/// space.mark(0x3000..0x3001)?;
/// let lease = space.rounds().harvest()?; // owes a flush
/// let lease = lease.sync()?; // its pages can be copied
/// lease.abort(); // or dropped: dirty again
/// assert_eq!(space.rounds().next()?.commit().bits_set, 1);
/// assert_eq!(space.rounds().next()?.dirty(), 0);
/// # Ok(())
/// # }
/// ```
///
/// A `Lease<'static, _>`, for other threads, structs and trait objects, comes from
/// [`Rounds::shared`](super::Rounds::shared). A lease into a bitmap of the caller's lives as long
/// as that bitmap and the space.
///
/// # A lease that is forgotten
/// A lease must end: commit it, abort it, or drop it. A lease that goes to [`std::mem::forget`], or
/// is leaked in another way, loses writes to its own pages, and to no others:
/// * writes before the harvest are never reported, because the dirty bits are cleared, and nothing
///   puts them back;
/// * later writes are hidden as well, as long as the writer uses a cached "D is set": only the
///   lease knows the invalidation that it owes, until [`sync`](Self::sync) or the abort hands it
///   over. This lasts until a flush that names the page: by the sync of another lease that has a
///   page in the same range of its gather, by an unmap or a detach, or by a switch of tracking to
///   on. A sync that names other pages may not help.
///
/// A lease that was synced has paid its debt, so it hides no later writes. The debt stays with the
/// lease until the sync, because in this way harvests take no lock and do not allocate.
///
/// # A lease over an area that is unmapped
/// An unmap changes no lease: its runs still name pages of the area. A copy of them holds the bytes
/// of that area. If another area is mapped at these addresses meanwhile, its content is newer than
/// that copy. So a caller that copies new areas by itself, drops what leases have copied of the old
/// ones.
#[must_use = "a lease that is dropped puts everything back: sync it, copy its pages, commit it"]
pub struct Lease<'a, State> {
    holding: Holding<'a>,
    state: PhantomData<State>,
}

impl<'a, State> Lease<'a, State> {
    /// What the harvest found.
    pub fn report(&self) -> HarvestReport {
        self.holding.report
    }

    /// The addresses that the lease covers: those of the request, or the part of them below the
    /// address at which the harvest stopped or reached its bound.
    pub fn range(&self) -> IovaRange {
        self.holding.range()
    }

    /// The bytes that one bit stands for.
    pub fn granule(&self) -> Granule {
        self.holding.granule()
    }

    /// The address and the error of the stop, if the harvest stopped: a source or the bitmap failed
    /// there, or a hole begins there and the request stops at holes. Everything below that address
    /// is in the lease; from it on nothing was taken. Pages above it that another source had
    /// already reported are dirty again, as after an abort. Their bits may stay set in the user's
    /// bitmap, and belong to no lease.
    ///
    /// The address is that of a hole, or the start of a granule of the request and of a page of
    /// every source.
    pub fn stopped(&self) -> Option<&Stopped> {
        self.holding.stopped.as_ref()
    }

    /// The address at which a next harvest goes on, by
    /// [`resume_at`](crate::HarvestRequest::resume_at): this harvest stopped there, or reached its
    /// bound. `None` if it reached the end of its request.
    pub fn next(&self) -> Option<Iova> {
        let stopped = self.stopped().map(|stopped| stopped.at);
        stopped.or(self.holding.next)
    }

    /// The name of the lease's consumer; `None` for one of the unnamed consumer.
    pub fn consumer(&self) -> Option<&str> {
        let own = self.holding.covered.audience.own();
        own.map(|own| own.name()).filter(|name| !name.is_empty())
    }

    /// The epoch that a commit of the lease makes, and its parent. A copy of the parent becomes a
    /// copy of the epoch, if the pages of the lease are copied over it. `None` in a space that has
    /// never had a [consumer](crate::Consumer).
    ///
    /// The result holds for a commit now. It changes only if another lease of the same consumer is
    /// committed, or a part of one. So a program with several leases at a time uses the result of
    /// [`commit_epoch`](Self::commit_epoch). Waits for a short lock that commits take as well.
    ///
    /// ```
    /// use dirtymap::harvest::Parent;
    /// # use dirtymap::{Access, AddressSpace, Granule, Start};
    ///
    /// # fn main() -> Result<(), dirtymap::Error> {
    /// # let space = AddressSpace::tracked(Granule::K4);
    /// # space.map(0..1 << 20, 0, Access::ReadWrite)?;
    /// let backup = space.consumer("backup", Start::Dirty)?;
    /// let full = backup.rounds().next()?;
    /// let first = full.lineage().map(|lineage| lineage.epoch);
    /// let parent = full.lineage().map(|lineage| lineage.parent);
    /// assert!(matches!(parent, Some(Parent::Everything(_))));
    /// full.commit();
    /// backup.rounds().next()?.abort(); // makes no epoch
    /// let lineage = backup.rounds().next()?.lineage();
    /// assert_eq!(lineage.map(|next| next.parent), first.map(Parent::Epoch));
    /// # Ok(())
    /// # }
    /// ```
    pub fn lineage(&self) -> Option<Lineage> {
        let own = self.holding.covered.audience.own()?;
        Some(own.epochs.lineage(self.holding.entry()?))
    }

    /// Makes every page of the lease dirty again. A superset is possible: bits that were set in the
    /// user's bitmap before the harvest count as well. Does not wait for devices. The debt stays
    /// owed, and the next sync of any lease pays it.
    ///
    /// Allocates where pages were never put back before: 4 KiB for each stretch of 32768 smallest
    /// pages (128 MiB of 4 KiB pages) that has a page of the lease, in each domain that the lease
    /// covers, and some hundred bytes for each 64 of these stretches. So an abort of a TiB of 4 KiB
    /// pages takes at most 33 MiB a domain. The memory is used again by later aborts, and goes when
    /// the domain is detached. The same holds for a lease that is dropped, and for a harvest that
    /// stops where it has to put back what an earlier source gave it.
    ///
    /// ```
    /// # use dirtymap::{Access, AddressSpace, Granule};
    /// # fn main() -> Result<(), dirtymap::Error> {
    /// # let space = AddressSpace::tracked(Granule::K4);
    /// # space.map(0..1 << 20, 0, Access::ReadWrite)?;
    /// space.mark(0x3000..0x4000)?;
    /// let aborted = space.rounds().next()?.abort(); // a copy has failed
    /// assert_eq!(aborted.bytes, 0x1000);
    /// assert_eq!(space.rounds().next()?.dirty(), 1); // the page is dirty again
    /// # Ok(())
    /// # }
    /// ```
    #[doc(alias = "bdrv_reclaim_dirty_bitmap")]
    pub fn abort(mut self) -> Aborted {
        self.holding.put_back()
    }
}

impl<'a> Lease<'a, Owed> {
    /// Flushes, and so makes the pages of this lease copyable: on return every device has dropped
    /// its cached translations of them, writes in flight have landed, and the data of markers that
    /// found their page marked is visible. Waits for devices. Threads that wait at the same time
    /// share a flush (group commit).
    ///
    /// # Errors
    /// The error of the [stop](Self::stopped), unless [`partial`](Self::partial) was called; then
    /// that of a source that could not flush. The lease is put back then. To keep it after a flush
    /// that fails, and to try again, call [`flush`](Self::flush) first.
    pub fn sync(mut self) -> Result<Lease<'a, Synced>, Error> {
        if !self.holding.is_partial
            && let Some(stopped) = self.holding.stopped.take()
        {
            return Err(stopped.error);
        }
        self.flush()?;
        Ok(Lease {
            holding: self.holding,
            state: PhantomData,
        })
    }

    /// Accepts a partial scan, whose lease has the pages below the [stop](Self::stopped). Without
    /// this call, such a lease does not [`sync`](Self::sync), so that no consumer takes it for one
    /// of the whole request. Changes nothing if the harvest did not stop.
    ///
    /// ```
    /// use dirtymap::{
    ///     Access, AddressSpace, Granule, HarvestRequest, Holes, ToIovaRange, UserBitmap,
    /// };
    ///
    /// # fn main() -> Result<(), dirtymap::Error> {
    /// let space = AddressSpace::tracked(Granule::K4);
    /// space.map(0..8 << 12, 0, Access::ReadWrite)?;
    /// space.mark(0x3000..0x3001)?;
    /// let request = HarvestRequest::new((0..64 << 12).to_iova_range()?, Granule::K4);
    /// let request = request.holes(Holes::Stop);
    ///
    /// let mut words = [0; 1];
    /// let lease = space.harvest(&request, UserBitmap::new(&mut words))?;
    /// assert!(lease.sync().is_err()); // the hole; page 3 is dirty again
    ///
    /// let mut words = [0; 1];
    /// let lease = space.harvest(&request, UserBitmap::new(&mut words))?;
    /// let at = lease.next();
    /// let lease = lease.partial().sync()?;
    /// assert_eq!((lease.dirty(), at), (1, Some(0x8000.into())));
    /// lease.commit();
    /// # Ok(())
    /// # }
    /// ```
    pub fn partial(mut self) -> Self {
        self.holding.is_partial = true;
        self
    }

    /// The flush of [`sync`](Self::sync), which then returns at once: for a consumer that keeps the
    /// lease and tries again if a source could not flush. Waits for devices.
    ///
    /// ```
    /// # use dirtymap::{Access, AddressSpace, Granule};
    /// # fn main() -> Result<(), dirtymap::Error> {
    /// # let space = AddressSpace::tracked(Granule::K4);
    /// # space.map(0..1 << 20, 0, Access::ReadWrite)?;
    /// let mut lease = space.rounds().harvest()?;
    /// for _ in 0..3 {
    ///     if lease.flush().is_ok() {
    ///         break; // else try again, with the same lease
    ///     }
    /// }
    /// lease.sync()?.commit();
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// The error of the source. The lease stays as it was, and its debt stays owed.
    pub fn flush(&mut self) -> Result<(), Error> {
        let flushed = self.holding.flush();
        let gather = &self.holding.gather;
        let owed = (gather.ranges().len(), gather.entries());
        events::sync(self.range(), owed, flushed.is_ok());
        flushed
    }
}

impl<'a> Lease<'a, Synced> {
    /// The ranges to copy: maximal runs of dirty granules, in order. A run may go on into the next
    /// area, whose backing need not follow. To copy by backing address, cut it:
    /// `run.intersection(area.range)` for each `area` of [`AddressSpace::mappings`]. Where areas
    /// come and go meanwhile, ask for [`backing`](Self::backing) instead.
    ///
    /// Bits that were set in the user's bitmap before the harvest count as well, and so does each
    /// window of a file that cannot be read: see [`Runs::error`].
    pub fn runs(&self) -> Runs<'_> {
        self.holding.runs()
    }

    /// The space that knows which pages of the lease read as zero, unless the lease covers only
    /// one domain, and the version of the tree at the beginning of the harvest.
    pub(super) fn for_contents(&self) -> (Option<&AddressSpace>, u64) {
        let holding = &self.holding;
        let all = holding.covered.marks.then_some(&*holding.space);
        (all, holding.begun)
    }

    /// The words of the user's bitmap that are not zero, as far as the lease covers them: for a
    /// consumer that passes words on instead of [`runs`](Self::runs). Bit 0 of word 0 is the first
    /// granule of [`range`](Self::range).
    ///
    /// ```
    /// # use dirtymap::{Access, AddressSpace, Granule};
    /// # fn main() -> Result<(), dirtymap::Error> {
    /// # let space = AddressSpace::tracked(Granule::K4);
    /// # space.map(0..1 << 20, 0, Access::ReadWrite)?;
    /// space.mark(0x3000..0x5000)?;
    /// let lease = space.rounds().next()?;
    /// assert!(lease.words().eq([(0, 0b11 << 3)]));
    /// lease.commit();
    /// # Ok(())
    /// # }
    /// ```
    pub fn words(&self) -> Words<'_> {
        let view = self.holding.held.view();
        match self.holding.is_empty {
            true => Words::none(&view),
            false => view.words(),
        }
    }

    /// The backing addresses of the pages at the time when they were written; `None` unless the
    /// harvest [recorded](super::HarvestRequest::with_backing) them. See [`Backing`] for an
    /// example.
    pub fn backing(&self) -> Option<&Backing> {
        self.holding.backing.as_ref()
    }

    /// Dirty granules in the user's bitmap, within the lease.
    pub fn dirty(&self) -> u64 {
        match self.holding.is_empty {
            true => 0,
            false => self.holding.held.view().count(),
        }
    }

    /// The copies of the pages in `range` are safe: they are not put back, however the rest of the
    /// lease ends. Only whole granules inside `range` count. Returns how many dirty ones were not
    /// committed before.
    ///
    /// Costs a look at the bitmap's words of `range`, and O(log n) for n parts that do not touch
    /// each other, in any order. Allocates a little for each of these. Parts that touch are joined,
    /// so parts that are committed in order cost no memory each.
    ///
    /// Several threads may commit parts of one lease at the same time. They wait for each other.
    ///
    /// ```
    /// # use dirtymap::{Access, AddressSpace, Granule, ToIovaRange};
    /// # fn main() -> Result<(), dirtymap::Error> {
    /// # let space = AddressSpace::tracked(Granule::K4);
    /// # space.map(0..1 << 20, 0, Access::ReadWrite)?;
    /// space.mark(0x3000..0x5000)?;
    /// let lease = space.rounds().next()?;
    /// assert_eq!(lease.commit_range((0x3000..0x4000).to_iova_range()?), 1); // is on disk
    /// assert_eq!(lease.abort().bytes, 4096); // the other page
    /// # Ok(())
    /// # }
    /// ```
    pub fn commit_range(&self, range: IovaRange) -> u64 {
        self.holding.commit_part(range)
    }

    /// The copies are safe: nothing is put back.
    pub fn commit(self) -> HarvestReport {
        self.commit_epoch().0
    }

    /// As [`commit`](Self::commit), and returns the [`lineage`](Self::lineage) at the moment of the
    /// commit: the epoch that the commit makes, and its parent. If a lease whose harvest ended
    /// later was committed before this one, the epoch gets a new number.
    ///
    /// ```
    /// use dirtymap::harvest::Parent;
    /// # use dirtymap::{Access, AddressSpace, Granule, Start};
    ///
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let space = AddressSpace::tracked(Granule::K4);
    /// # space.map(0..1 << 20, 0, Access::ReadWrite)?;
    /// let backup = space.consumer("backup", Start::Clean)?;
    /// let joined = backup.epoch();
    /// space.mark(0x3000..0x3001)?;
    /// let (report, lineage) = backup.rounds().next()?.commit_epoch();
    /// let lineage = lineage.ok_or("a space without consumers")?;
    /// assert_eq!(report.bits_set, 1);
    /// assert_eq!(lineage.parent, Parent::Epoch(joined));
    /// assert_eq!(lineage.epoch, backup.epoch());
    /// # Ok(())
    /// # }
    /// ```
    pub fn commit_epoch(mut self) -> (HarvestReport, Option<Lineage>) {
        self.holding.commit()
    }
}

impl Lease<'_, Owed> {
    /// The consumer for which the pages were taken, and those to which they were left.
    pub(super) fn audience(&self) -> &Audience {
        &self.holding.covered.audience
    }
}

impl<State> fmt::Debug for Lease<'_, State> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lease")
            .field("range", &self.range())
            .field("stopped", &self.stopped())
            .field("report", &self.holding.report)
            .finish_non_exhaustive()
    }
}

impl<'a> Holding<'a> {
    /// The walk has ended: see [`finish`](Self::finish).
    pub(super) fn into_lease(
        mut self,
        walked: Result<Option<Iova>, Stopped>,
        recorded: Recorded,
    ) -> Lease<'a, Owed> {
        self.finish(walked, &recorded);
        Lease {
            holding: self,
            state: PhantomData,
        }
    }
}
