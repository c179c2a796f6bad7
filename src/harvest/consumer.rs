//! Consumers: each is told every write, whatever the others do.

use std::fmt;

use super::held::SpaceRef;
use super::{HarvestRequest, Lease, Owed, Rounds, harvest_for};
use crate::bitmap::{BitmapView, UserBitmap};
use crate::error::Error;
use crate::space::{AddressSpace, Beginning, Party};
use crate::sync::{Arc, Ordering};
use crate::units::{IovaRange, ToIovaRange};

/// One of several programs that harvest the same memory, such as a migration, a backup and a
/// replica. The harvests of a consumer report every write since its own last committed harvest,
/// whatever the other consumers take, abort or never ask for.
///
/// ```
/// use dirtymap::{Access, AddressSpace, Granule, Start};
///
/// # fn main() -> Result<(), dirtymap::Error> {
/// let space = AddressSpace::tracked(Granule::K4);
/// space.map(0..1 << 20, 0, Access::ReadWrite)?;
/// let backup = space.consumer("backup", Start::Dirty)?; // everything, at first
/// let replica = space.consumer("replica", Start::Clean)?;
/// assert_eq!(backup.rounds().next()?.commit().bits_set, 256);
///
/// space.mark(0x3000..0x3001)?;
/// assert_eq!(replica.rounds().next()?.commit().bits_set, 1);
/// assert_eq!(backup.rounds().next()?.commit().bits_set, 1); // reported to both
/// # Ok(())
/// # }
/// ```
///
/// A mark costs the same with any number of consumers. A harvest leaves the pages that it takes to
/// the others, which costs a store for each consumer and each word of dirty pages.
///
/// # The unnamed consumer
/// [`AddressSpace::harvest`], [`peek`](AddressSpace::peek), [`rounds`](AddressSpace::rounds) and
/// harvests of one [domain](crate::Scope) are those of the *unnamed* consumer, which covers all of
/// the space and always exists. So a program that knows no consumers needs no change. Pages that
/// are pending for the unnamed consumer take a bit each, up to its
/// [bounds](AddressSpace::set_unnamed_bounds).
///
/// # Areas that come and go
/// A new area is clean for every consumer. If its memory holds data,
/// [`mark`](AddressSpace::mark) all of it after the map; if it reads as zero and other memory had
/// its addresses before, [`discard`](AddressSpace::discard) all of it. Otherwise no increment
/// contains its first contents.
///
/// After an unmap, nothing is pending in its areas for any consumer. Its bitmap has each page that
/// was dirty for at least one consumer, and [`ConsumerStats::unmapped_bytes`] counts the bytes that
/// were pending for this one. A cut changes nothing, and a detach moves dirty pages to where every
/// consumer finds them.
///
/// # Drop
/// A consumer leaves when it is dropped. Its leases can still be synced, copied and committed. One
/// that is aborted after that puts back nothing, and counts its pages as outside.
#[must_use = "a consumer that is dropped leaves"]
pub struct Consumer<'a> {
    pub(super) space: SpaceRef<'a>,
    pub(super) member: Arc<Party>,
}

/// The pages that are dirty for a new consumer at first.
#[derive(Clone, Copy, Debug)]
pub enum Start<'c> {
    /// No page is dirty. Writes are reported from the return of the call on, so copy everything
    /// once, after the call.
    Clean,
    /// All that is mapped in its range at the join. Areas that are mapped later begin clean. If the
    /// pages that would be pending exceed the [`Bounds`](super::Bounds) of a new consumer, they are
    /// pending as a whole.
    Dirty,
    /// The pages that are dirty for that consumer, which has no lease meanwhile. Outside of the
    /// range of that consumer, pages that harvests have taken before are clean.
    LikeOf(&'c Consumer<'c>),
}

/// Counts of one consumer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
pub struct ConsumerStats {
    /// Bytes that are pending for it, page by page: pages that harvests of other consumers have
    /// taken, or that its own leases have put back. Pages that are dirty for all consumers are not
    /// counted.
    pub pending_bytes: u64,
    /// Whether all that is mapped is pending, in its range or in a part of it, because its pending
    /// pages were out of [`Bounds`](super::Bounds).
    pub everything: bool,
    /// Bytes of memory that its pending pages take: 4 KiB for each stretch of 32768 pages of which
    /// one was ever pending, and 1 KiB for each eight of these stretches.
    pub held_bytes: u64,
    /// Its deltas: the epochs that have cursors.
    pub deltas: u64,
    /// Bytes of memory that they take.
    pub delta_bytes: u64,
    /// How often its pending pages were dropped, and everything became pending instead. Each
    /// harvest of another consumer may add one, until the next harvest of this consumer.
    pub dropped: u64,
    /// Its live leases.
    pub leases: u64,
    /// Bytes that its harvests reported, and that were not set in its bitmaps before.
    pub leased_bytes: u64,
    /// Of `leased_bytes`: bytes that were committed.
    pub committed_bytes: u64,
    /// Of `leased_bytes`: bytes of leases that were aborted or dropped.
    pub aborted_bytes: u64,
    /// Bytes that were pending for it in areas that were unmapped.
    pub unmapped_bytes: u64,
}

impl AddressSpace {
    /// Adds a consumer of the whole space. `name` has 1 to 255 bytes.
    ///
    /// Other threads may mark, map and harvest meanwhile. The call waits for the harvests that are
    /// running, because they leave nothing to the new consumer, and for a flush of all sources, as
    /// [`start_tracking`](Self::start_tracking) does. See [`Consumer`] for an example.
    ///
    /// # Errors
    /// In this order: [`Error::BadName`], [`Error::ConsumerTwice`], [`Error::TooManyConsumers`],
    /// [`Error::ConsumerLeft`] for a consumer of another space; the error of a source that cannot
    /// flush; [`Error::ConsumerBusy`] if the consumer of [`Start::LikeOf`] harvests meanwhile or
    /// has a lease. After an error, there is no new consumer.
    pub fn consumer(&self, name: &str, start: Start<'_>) -> Result<Consumer<'_>, Error> {
        Consumer::join(SpaceRef::Lent(self), name, IovaRange::ALL, start)
    }

    /// Adds a consumer of `range`, which consists of whole [pages](Self::page) and may extend past
    /// the areas.
    ///
    /// A harvest consists of whole granules, and of whole pages of all sources
    /// ([`alignment`](Self::alignment)). If these are larger than the range, harvests of the
    /// consumer cover the range rounded out to them, and may report some pages beside the range.
    ///
    /// ```
    /// # use dirtymap::{Access, AddressSpace, Granule, Start};
    /// # fn main() -> Result<(), dirtymap::Error> {
    /// # let space = AddressSpace::tracked(Granule::K4);
    /// # space.map(0..1 << 20, 0, Access::ReadWrite)?;
    /// let low = space.consumer_of("low", 0..0x8000, Start::Clean)?;
    /// space.mark(0x7000..0x9000)?;
    /// assert_eq!(low.rounds().next()?.commit().bits_set, 1);
    /// assert_eq!(space.consumers(), ["low"]);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// Those of the range; then [`Error::Unaligned`] and the others of
    /// [`consumer`](Self::consumer).
    pub fn consumer_of(
        &self,
        name: &str,
        range: impl ToIovaRange,
        start: Start<'_>,
    ) -> Result<Consumer<'_>, Error> {
        Consumer::join(SpaceRef::Lent(self), name, range.to_iova_range()?, start)
    }

    /// The names of the consumers, in the order in which they joined; without the unnamed one.
    pub fn consumers(&self) -> Vec<String> {
        let members = self.members();
        let named = members.iter().skip(1);
        named.map(|member| member.name().to_owned()).collect()
    }
}

impl Consumer<'static> {
    /// As [`AddressSpace::consumer`], over a space that the consumer and its leases keep alive. So
    /// the consumer can be moved to another thread.
    ///
    /// ```
    /// # use dirtymap::{Access, AddressSpace, Consumer, Granule, Start};
    /// # use std::sync::Arc;
    /// # fn main() -> Result<(), dirtymap::Error> {
    /// let space = Arc::new(AddressSpace::tracked(Granule::K4));
    /// # space.map(0..1 << 20, 0, Access::ReadWrite)?;
    /// let backup = Consumer::shared(Arc::clone(&space), "backup", Start::Dirty)?;
    /// let thread = std::thread::spawn(move || {
    ///     let lease = backup.rounds().next()?;
    ///     Ok::<_, dirtymap::Error>(lease.commit())
    /// });
    /// # let Ok(report) = thread.join() else { panic!("the thread panicked") };
    /// # assert_eq!(report?.bits_set, 256);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// Those of `consumer`.
    pub fn shared(space: Arc<AddressSpace>, name: &str, start: Start<'_>) -> Result<Self, Error> {
        Consumer::join(SpaceRef::Shared(space), name, IovaRange::ALL, start)
    }
}

impl<'a> Consumer<'a> {
    fn join(
        space: SpaceRef<'a>,
        name: &str,
        range: IovaRange,
        start: Start<'_>,
    ) -> Result<Self, Error> {
        let beginning = match &start {
            Start::Clean => Beginning::Clean,
            Start::Dirty => Beginning::Dirty,
            Start::LikeOf(other) => Beginning::Like(&other.member),
        };
        let member = space.join(name, range, beginning)?;
        Ok(Consumer { space, member })
    }

    /// Its name.
    pub fn name(&self) -> &str {
        self.member.name()
    }

    /// The range of which it is told every write. Its harvests cover this range, rounded out to
    /// whole granules and to [`alignment`](AddressSpace::alignment).
    pub fn range(&self) -> IovaRange {
        self.member.range
    }

    /// As [`AddressSpace::harvest`], for this consumer. A parallel harvest is walked by the calling
    /// thread. The lease may live longer than the consumer.
    ///
    /// ```
    /// use dirtymap::{HarvestRequest, ToIovaRange, UserBitmap};
    /// # use dirtymap::{Access, AddressSpace, Granule, Start};
    /// # fn main() -> Result<(), dirtymap::Error> {
    /// # let space = AddressSpace::tracked(Granule::K4);
    /// # space.map(0..1 << 20, 0, Access::ReadWrite)?;
    /// let backup = space.consumer("backup", Start::Clean)?;
    /// space.mark(0x3000..0x3001)?;
    /// let request = HarvestRequest::new((0..64 << 12).to_iova_range()?, Granule::K4);
    /// let mut words = [0];
    /// let lease = backup.harvest(&request, UserBitmap::new(&mut words))?.sync()?;
    /// assert_eq!(lease.commit().bits_set, 1);
    /// assert_eq!(words, [1 << 3]);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// Those of `AddressSpace::harvest`, with [`Error::OutsideConsumer`] after the alignment.
    pub fn harvest<'b>(
        &self,
        request: &HarvestRequest<'_>,
        bitmap: UserBitmap<'b>,
    ) -> Result<Lease<'b, Owed>, Error>
    where
        'a: 'b,
    {
        harvest_for(self.space.clone(), Some(&self.member), request, bitmap)
    }

    /// As [`AddressSpace::peek`], for this consumer: clears nothing, and takes nothing from the
    /// other consumers.
    ///
    /// # Errors
    /// As [`harvest`](Self::harvest), and those of `AddressSpace::peek`.
    pub fn peek<'b>(
        &self,
        request: &HarvestRequest<'_>,
        bitmap: UserBitmap<'b>,
    ) -> Result<BitmapView<'b>, Error> {
        self.space
            .peek_for((Some(&self.member), false), request, bitmap)
    }

    /// Harvests of all that is mapped in its range, round after round, as
    /// [`AddressSpace::rounds`]. They end when the consumer is dropped.
    pub fn rounds(&self) -> Rounds<'a> {
        Rounds::of(self.space.clone(), Arc::clone(&self.member))
    }

    /// Its counts, read one by one, so that they may differ from each other by calls of other
    /// threads. Takes time in proportion to the memory of its pending pages.
    ///
    /// ```
    /// # use dirtymap::{Access, AddressSpace, Granule, Start};
    /// # fn main() -> Result<(), dirtymap::Error> {
    /// # let space = AddressSpace::tracked(Granule::K4);
    /// # space.map(0..1 << 20, 0, Access::ReadWrite)?;
    /// let backup = space.consumer("backup", Start::Clean)?;
    /// space.mark(0x3000..0x3001)?;
    /// assert_eq!(backup.stats().pending_bytes, 0); // dirty for all consumers
    /// space.rounds().next()?.commit(); // leaves the page pending for `backup`
    /// assert_eq!(backup.stats().pending_bytes, 4096);
    /// # Ok(())
    /// # }
    /// ```
    pub fn stats(&self) -> ConsumerStats {
        let counts = &self.member.counts;
        let store = self.space.member(&self.member);
        let store = store.as_ref();
        let (deltas, delta_bytes) = self.member.epochs.deltas();
        ConsumerStats {
            pending_bytes: store.map_or(0, |store| store.pending_bytes()),
            everything: store.is_some_and(|store| store.whole.is_due()),
            held_bytes: store.map_or(0, |store| store.pending.held_bytes()),
            deltas,
            delta_bytes,
            leases: counts.live(),
            // Relaxed, all: statistics.
            leased_bytes: counts.leased.load(Ordering::Relaxed),
            committed_bytes: counts.committed.load(Ordering::Relaxed),
            aborted_bytes: counts.aborted.load(Ordering::Relaxed),
            unmapped_bytes: counts.unmapped.load(Ordering::Relaxed),
            dropped: counts.dropped.load(Ordering::Relaxed),
        }
    }
}

impl Drop for Consumer<'_> {
    fn drop(&mut self) {
        self.space.leave(&self.member);
    }
}

impl fmt::Debug for Consumer<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Consumer")
            .field("name", &self.name())
            .field("range", &self.range())
            .finish_non_exhaustive()
    }
}
