//! The error type. Every text names the value that was refused and the limit that it missed.

use crate::units::{DomainId, Granule, Iova, IovaRange, RangeError};

/// The error of a call that was refused or could not complete.
///
/// Input is checked before anything is changed, in the order that each call documents.
/// [`Error::errno`] gives the number that Linux's iommufd uses for the same refusal.
///
/// Calls that need no space have errors of their own, which `?` turns into this one. An error type
/// of yours implements `From<RangeError>` and `From<BitmapError>` too, or the caller writes
/// `.map_err(dirtymap::Error::from)`:
///
/// ```
/// use dirtymap::{Error, Iova, IovaRange, RangeError};
///
/// fn bytes(start: u64, len: u64) -> Result<IovaRange, Error> {
///     Ok(IovaRange::from_len(Iova::new(start), len)?)
/// }
/// let refused = bytes(0x1000, u64::MAX).unwrap_err();
/// assert!(matches!(refused, Error::Range(RangeError::Wraps { .. })));
/// assert_eq!(refused.errno(), 75);
/// ```
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A range or a granule cannot be made.
    #[error(transparent)]
    Range(#[from] RangeError),
    /// A bitmap cannot hold what a request asks for. A request that is not made of whole granules
    /// is [`Error::Unaligned`].
    #[error(transparent)]
    Bitmap(BitmapError),
    /// A border of the range is not a multiple of the granule that the call requires.
    #[error("the range {range} does not start and end at multiples of {granule}")]
    Unaligned {
        /// The offending range.
        range: IovaRange,
        /// Both of its borders must be multiples of this.
        granule: Granule,
    },
    /// A length is not a multiple of the granule that the call requires.
    #[error("a length of {len:#x} bytes is not a multiple of {granule}")]
    UnalignedLength {
        /// The offending length in bytes.
        len: u64,
        /// It must be a multiple of this.
        granule: Granule,
    },
    /// The backing address of a mapping is not aligned.
    #[error("the backing address {backing:#x} is not a multiple of {granule}")]
    UnalignedBacking {
        /// The offending address.
        backing: u64,
        /// It must be a multiple of this.
        granule: Granule,
    },
    /// The memory that backs the range would extend past 2^64 - 1.
    #[error(
        "the backing addresses of {range} begin at {backing:#x} and go past 0xffffffffffffffff"
    )]
    BackingWraps {
        /// The backing address of the start of the range.
        backing: u64,
        /// The range to map.
        range: IovaRange,
    },
    /// Runs that have to be in ascending order, with a gap between neighbours, are not.
    #[error(
        "the run {run} must begin above the end of {before}, with at least one byte in between"
    )]
    UnorderedRuns {
        /// The run before it.
        before: IovaRange,
        /// The offending run.
        run: IovaRange,
    },
    /// Tracking was never on here, so there is no answer.
    #[error("tracking was never on for {range}: call start_tracking before the first harvest")]
    NeverTracked {
        /// The range of the call.
        range: IovaRange,
    },
    /// The areas leave a hole in the range.
    #[error("nothing is mapped at {at}, inside the requested range {range}")]
    Hole {
        /// The first address that no area holds.
        at: Iova,
        /// The range of the call.
        range: IovaRange,
    },
    /// The address at which to continue lies outside of the request, or inside one of its granules.
    #[error(
        "a harvest of {range} cannot continue at {at}: that is not the start of one of its \
         granules of {granule}"
    )]
    BadCursor {
        /// The offending address.
        at: Iova,
        /// The range of the call.
        range: IovaRange,
        /// The address must be a multiple of this.
        granule: Granule,
    },
    /// The new area would overlap an existing one.
    #[error("{range} overlaps the area {existing}")]
    Overlap {
        /// The range to map.
        range: IovaRange,
        /// The area in its way.
        existing: IovaRange,
    },
    /// The new area would overlap reserved addresses.
    #[error("{range} cannot be mapped: {reserved} is reserved")]
    Reserved {
        /// The range to map.
        range: IovaRange,
        /// The reserved addresses in its way.
        reserved: IovaRange,
    },
    /// No free range is large enough, aligned and allowed.
    #[error(
        "no free range of {len:#x} bytes starts at a multiple of {alignment} inside the allowed \
         ranges"
    )]
    NoSpace {
        /// The requested length in bytes.
        len: u64,
        /// The alignment that the range needs.
        alignment: Granule,
    },
    /// The range to reserve is in use.
    #[error("{range} cannot be reserved: {existing} is mapped or allowed")]
    CannotReserve {
        /// The range to reserve.
        range: IovaRange,
        /// The area or allowed range in its way.
        existing: IovaRange,
    },
    /// No reservation of exactly this range exists.
    #[error("{range} is not reserved: name a range as it was reserved")]
    NotReserved {
        /// The range to release.
        range: IovaRange,
    },
    /// Two of the ranges to allow overlap.
    #[error("the ranges to allow overlap: {range} and {other}")]
    AllowedTwice {
        /// The lower one.
        range: IovaRange,
        /// The other one.
        other: IovaRange,
    },
    /// A range to allow overlaps a reserved one.
    #[error("{range} cannot be allowed: {reserved} is reserved")]
    CannotAllow {
        /// The range to allow.
        range: IovaRange,
        /// The reserved addresses in its way.
        reserved: IovaRange,
    },
    /// No area lies in the range to unmap, or in that of a round.
    #[error("no area lies in {range}: name a range of areas, or map memory there first")]
    NothingMapped {
        /// The range of the call.
        range: IovaRange,
    },
    /// The range to unmap would cut through an area.
    #[error("{range} covers only a part of the area {area}: name whole areas")]
    PartOfArea {
        /// The range of the call.
        range: IovaRange,
        /// The area that extends past the range.
        area: IovaRange,
    },
    /// Another call is mapping, unmapping or cutting the area.
    #[error(
        "the area {area} is being mapped, unmapped or cut by another call: try again after that \
         call returns"
    )]
    Busy {
        /// The area that the other call has claimed.
        area: IovaRange,
    },
    /// The address of a cut is not a multiple of the required granule.
    #[error("cannot cut at {at}: it is not a multiple of {granule}")]
    UnalignedCut {
        /// The offending address.
        at: Iova,
        /// It must be a multiple of this.
        granule: Granule,
    },
    /// A leaf of a source spans the cut, or the source cannot tell, and the source does not split
    /// leaves.
    #[error("the dirty source cannot split its leaves at {at}")]
    CannotSplit {
        /// The address to cut at.
        at: Iova,
    },
    /// No such domain is attached.
    #[error("{domain} is not attached")]
    NotAttached {
        /// The domain of the call.
        domain: DomainId,
    },
    /// The source is attached to the space already.
    #[error("the source is attached already, as {domain}")]
    AttachedTwice {
        /// The domain of the source.
        domain: DomainId,
    },
    /// The range or the backing address of an area is not aligned to the smallest page of the
    /// domain.
    #[error("cannot attach a domain with pages of {page}: the area {area} is not made of them")]
    CannotAttach {
        /// The smallest page of the domain.
        page: Granule,
        /// The first such area.
        area: IovaRange,
    },
    /// One change of a batch was refused or failed. None of the batch takes effect.
    #[error("change {index} of the batch: {error}")]
    Change {
        /// The number of the change, counted from 0.
        index: usize,
        /// Its error.
        #[source]
        error: Box<Error>,
    },
    /// The name of a consumer is empty or too long.
    #[error("the name of a consumer has {len} bytes: it needs 1 to {most}")]
    BadName {
        /// Its length in bytes.
        len: usize,
        /// The longest that is allowed.
        most: usize,
    },
    /// A consumer of that name exists.
    #[error("the space has a consumer {name:?} already: choose another name, or drop that one")]
    ConsumerTwice {
        /// The name.
        name: Box<str>,
    },
    /// The space has as many consumers as it can.
    #[error("the space has {most} consumers already: drop one first")]
    TooManyConsumers {
        /// The most that a space has.
        most: usize,
    },
    /// The consumer is one of another space, or has left.
    #[error(
        "the consumer {name:?} is one of another space, or was dropped: keep it for as long as \
         its rounds are used"
    )]
    ConsumerLeft {
        /// Its name.
        name: Box<str>,
    },
    /// The consumer cannot be copied while it harvests or has a lease.
    #[error(
        "the consumer {name:?} harvests, or has leases ({leases}): commit or abort them, then copy \
         it"
    )]
    ConsumerBusy {
        /// Its name.
        name: Box<str>,
        /// Its live leases.
        leases: u64,
    },
    /// The request goes past the range of the consumer.
    #[error("{range} goes past {consumer}, the range of the consumer: ask for a part of that")]
    OutsideConsumer {
        /// The range asked for.
        range: IovaRange,
        /// The range of the consumer.
        consumer: IovaRange,
    },
    /// A mark, a write in flight or a discard touches an address outside every area, or outside the
    /// area of its handle. [`AddressSpace::mark`](crate::AddressSpace::mark) marks the parts inside
    /// areas all the same.
    #[error(
        "{at} lies outside every area, or outside that of the handle, so no write there is \
         tracked: map it first"
    )]
    Outside {
        /// The first such address.
        at: Iova,
    },
    /// The storage of a range that was to be discarded could not be dropped.
    #[error("the storage of {range} was not dropped, so its pages are dirty: try again: {error}")]
    NotDropped {
        /// The range of the call.
        range: IovaRange,
        /// The error of the caller's closure.
        #[source]
        error: std::io::Error,
    },
    /// A source of dirty state (an IO page table, a kernel interface) refused or failed.
    #[error("the dirty source failed: {0}")]
    Source(#[source] Box<dyn std::error::Error + Send + Sync>),
}

impl Error {
    /// Wraps the error of a [`DirtySource`](crate::DirtySource).
    pub fn source_failed(error: impl std::error::Error + Send + Sync + 'static) -> Self {
        Error::Source(Box::new(error))
    }

    /// The errno with which Linux's iommufd refuses the same thing; `EINVAL` where iommufd accepts
    /// or ignores it.
    ///
    /// * `ENOENT` (2): the range to unmap holds no area, or only a part of one; no such
    ///   reservation; no such domain; no such consumer.
    /// * `EIO` (5): a source failed, or the storage of a discard was not dropped.
    /// * `EFAULT` (14): a window of the bitmap cannot be mapped, or its file shrank.
    /// * `EBUSY` (16): another call is changing the area.
    /// * `EEXIST` (17): overlap with an area; a source that is attached already.
    /// * `EINVAL` (22): zero length, alignment, granule, window size, short bitmap, runs out of
    ///   order, a bit past the end, never tracked, cursor, hole, outside, map of a reserved range,
    ///   allowed ranges that overlap, a cut that is unaligned or needs a split that the source
    ///   refuses.
    /// * `ENOSPC` (28): no free range to allocate; no room for a window of the bitmap.
    /// * `EOVERFLOW` (75): a range past 2^64 - 1.
    /// * `EADDRINUSE` (98): a range to reserve that is mapped or allowed, one to allow that is
    ///   reserved, a domain whose pages do not divide an area.
    ///
    /// [`Error::Change`] has the number of the error that it wraps.
    pub const fn errno(&self) -> i32 {
        match self {
            Error::Change { error, .. } => error.errno(),
            Error::NothingMapped { .. }
            | Error::PartOfArea { .. }
            | Error::NotReserved { .. }
            | Error::ConsumerLeft { .. }
            | Error::NotAttached { .. } => 2,
            Error::Source(_) | Error::NotDropped { .. } => 5,
            Error::Busy { .. } | Error::ConsumerBusy { .. } => 16,
            Error::Overlap { .. } | Error::AttachedTwice { .. } | Error::ConsumerTwice { .. } => 17,
            Error::NoSpace { .. } | Error::TooManyConsumers { .. } => 28,
            Error::CannotReserve { .. }
            | Error::CannotAllow { .. }
            | Error::CannotAttach { .. } => 98,
            Error::Range(error) => error.errno(),
            Error::Bitmap(error) => error.errno(),
            Error::BackingWraps { .. } => 75,
            Error::Unaligned { .. }
            | Error::UnalignedLength { .. }
            | Error::UnalignedBacking { .. }
            | Error::Reserved { .. }
            | Error::AllowedTwice { .. }
            | Error::UnalignedCut { .. }
            | Error::CannotSplit { .. }
            | Error::UnorderedRuns { .. }
            | Error::NeverTracked { .. }
            | Error::BadCursor { .. }
            | Error::Hole { .. }
            | Error::BadName { .. }
            | Error::OutsideConsumer { .. }
            | Error::Outside { .. } => 22,
        }
    }
}

/// Why a bitmap cannot be bound to a request, read or written. Becomes an [`Error`] by `?`.
///
/// ```
/// use dirtymap::bitmap::BitmapError;
/// use dirtymap::{Granule, ToIovaRange, UserBitmap};
///
/// # fn main() -> Result<(), dirtymap::Error> {
/// let mut word = [0]; // 64 bits, for 65 pages
/// let view = UserBitmap::new(&mut word).view((0..65 << 12).to_iova_range()?, Granule::K4);
/// assert!(matches!(view, Err(BitmapError::TooShort { bits: 64, needed: 65, .. })));
/// # Ok(())
/// # }
/// ```
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BitmapError {
    /// A border of the range is not a multiple of the granule.
    #[error("the range {range} does not start and end at multiples of {granule}")]
    Unaligned {
        /// The offending range.
        range: IovaRange,
        /// Both of its borders must be multiples of this.
        granule: Granule,
    },
    /// The user bitmap has fewer bits than the request has granules.
    #[error("the bitmap holds {bits} bits, but {range} needs {needed} at {granule} a bit")]
    TooShort {
        /// Bits that the bitmap holds.
        bits: u64,
        /// Bits that the request needs.
        needed: u128,
        /// The range of the call.
        range: IovaRange,
        /// Bytes that one bit stands for.
        granule: Granule,
    },
    /// The size of a window of a bitmap in a file is not allowed.
    #[error("a window of {bytes} bytes: it must be a power of two from 64 KiB to 1 GiB")]
    BadWindow {
        /// The offending size.
        bytes: u64,
    },
    /// The file of a user bitmap has become shorter than the request needs.
    #[error("the file of the bitmap shrank to {len} bytes, but {needed} are needed")]
    Shrank {
        /// Bytes that the file has now.
        len: u64,
        /// Bytes that the window needs, from the start of the file.
        needed: u64,
    },
    /// A window of a user bitmap in a file could not be mapped.
    #[error("the window of the bitmap at byte {at:#x} of its file cannot be mapped: {error}")]
    Window {
        /// The first byte of the window.
        at: u64,
        /// The error of the system.
        #[source]
        error: std::io::Error,
    },
    /// The file system of a user bitmap has no room for a window of it. Nothing was recorded in
    /// that window.
    #[error("no room in the file system for {len} bytes of the bitmap from byte {at:#x}: {error}")]
    NoSpace {
        /// The first byte of the window.
        at: u64,
        /// Bytes of the window.
        len: u64,
        /// The error of the system.
        #[source]
        error: std::io::Error,
    },
    /// A set names a bit that the bitmap does not have.
    #[error("bit {bit} is to be set, but the last bit of the bitmap is {last}")]
    NoSuchBit {
        /// The highest bit of the set.
        bit: u64,
        /// The last bit of the bitmap.
        last: u64,
    },
}

impl BitmapError {
    /// The errno with which Linux's iommufd refuses the same thing: see [`Error::errno`].
    pub const fn errno(&self) -> i32 {
        match self {
            BitmapError::Shrank { .. } | BitmapError::Window { .. } => 14,
            BitmapError::NoSpace { .. } => 28,
            BitmapError::Unaligned { .. }
            | BitmapError::TooShort { .. }
            | BitmapError::BadWindow { .. }
            | BitmapError::NoSuchBit { .. } => 22,
        }
    }
}

/// For code that returns [`std::io::Result`], because it writes to files and sockets as well.
/// `io::Error::downcast` gives the [`Error`] back.
///
/// ```
/// use dirtymap::{Access, AddressSpace, Error, Granule};
/// use std::io::{self, Write};
///
/// fn list(space: &AddressSpace, mut to: impl Write) -> io::Result<()> {
///     let lease = space.rounds().next()?;
///     for run in lease.runs() {
///         writeln!(to, "{run}")?;
///     }
///     lease.commit();
///     Ok(())
/// }
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let space = AddressSpace::tracked(Granule::K4);
/// let error = list(&space, io::sink()).unwrap_err();
/// assert!(matches!(error.downcast::<Error>()?, Error::NothingMapped { .. }));
/// # space.map(0..1 << 20, 0, Access::ReadWrite)?;
/// # list(&space, io::sink())?;
/// # Ok(())
/// # }
/// ```
impl From<Error> for std::io::Error {
    fn from(error: Error) -> Self {
        std::io::Error::other(error)
    }
}

/// As an [`Error`].
impl From<RangeError> for std::io::Error {
    fn from(error: RangeError) -> Self {
        Error::from(error).into()
    }
}

/// As an [`Error`].
impl From<BitmapError> for std::io::Error {
    fn from(error: BitmapError) -> Self {
        Error::from(error).into()
    }
}

impl From<BitmapError> for Error {
    fn from(error: BitmapError) -> Self {
        match error {
            BitmapError::Unaligned { range, granule } => Error::Unaligned { range, granule },
            error => Error::Bitmap(error),
        }
    }
}

/// A walk of a source stopped inside the range that it was given.
#[derive(Debug)]
pub struct Stopped {
    /// The first address that was not processed. Everything below it was processed, and nothing
    /// from it on was touched.
    pub at: Iova,
    /// The reason of the stop.
    pub error: Error,
}
