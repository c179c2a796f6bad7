//! The language of the tests: the operations on an address space, its devices and its leases.
//!
//! Operands are small numbers that the oracle turns into addresses when the operation runs, such as
//! "the second area" or "its last page". So most inputs are legal, use few places again and again,
//! and still reach the borders. Every byte string is a program.

/// Makes the enumeration and its list from one source, so that the list lacks no variant.
macro_rules! listed {
    ($(#[$of_all:meta])* pub enum $name:ident { $($(#[$of_one:meta])* $one:ident,)+ }) => {
        $(#[$of_all])*
        pub enum $name { $($(#[$of_one])* $one,)+ }

        impl $name {
            /// All variants.
            pub const ALL: &'static [$name] = &[$($name::$one,)+];
        }
    };
}

mod config;
mod decode;

pub use config::{Config, Format, Sabotage};
pub use decode::decode;

use dirtymap::{Access, Holes};

use crate::forms::Form;

/// How many domains a world has.
pub const DOMAINS: usize = 3;
/// How many consumers a world has at most, the unnamed one included, which has the number 0.
pub const CONSUMERS: usize = 4;

/// One step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// A device writes.
    DmaWrite {
        /// Which device.
        device: Master,
        /// Where.
        at: Place,
        /// How many bytes.
        len: u16,
    },
    /// A device reads. Its own posted writes land first.
    DmaRead {
        /// Which device.
        device: Master,
        /// Where.
        at: Place,
        /// How many bytes.
        len: u16,
    },
    /// A CPU writes, and marks the bytes that it wrote.
    Mark {
        /// Where.
        at: Place,
        /// How many bytes.
        len: u16,
        /// Marks by the handle of the area and not by the space.
        by_handle: bool,
    },
    /// Harvests into the first free one of two leases. Nothing happens if both are live.
    Harvest(Ask),
    /// Harvests into a bitmap of any form, and ends the lease in the same step.
    Pass {
        /// The request.
        ask: Ask,
        /// The form of the bitmap.
        form: Form,
        /// The end of the lease after the copy. If it cannot be flushed, it is dropped.
        fate: Fate,
    },
    /// Peeks, in any mode.
    Peek(Ask),
    /// Flushes a lease.
    Sync(u8),
    /// A device writes, and repeats the write while a lease is flushed.
    BusySync {
        /// Which lease.
        lease: u8,
        /// Which device.
        device: Master,
        /// Where.
        at: Place,
        /// How many bytes.
        len: u16,
    },
    /// Copies the pages of a synced lease.
    Copy(u8),
    /// Commits a lease, after its sync and copy if these are missing.
    Commit(u8),
    /// Commits a part of a lease, after its sync and copy if these are missing.
    CommitRange {
        /// Which lease.
        lease: u8,
        /// Which part.
        part: Share,
    },
    /// Aborts a lease: its pages are put back, except for those that were committed.
    Abort(u8),
    /// Drops a lease, which puts it back.
    DropLease(u8),
    /// The consumer panics with a lease.
    Crash(u8),
    /// The next harvest that reads this domain panics half-way through an area.
    HarvestDies(u8),
    /// The next flush of this domain fails.
    FlushFails(u8),
    /// A callback of this domain panics.
    Panics {
        /// Which domain.
        domain: u8,
        /// Which callback.
        callback: Callback,
        /// How many calls succeed before.
        calls: u8,
        /// The moment in the call.
        moment: Moment,
    },
    /// The next harvest of this domain that reaches this place stops there.
    Stops {
        /// Which domain.
        domain: u8,
        /// Where.
        at: Place,
    },
    /// The consumer forgets a lease: nothing is put back, and pages that it has not copied are
    /// lost.
    Forget(u8),
    /// The leaves of an area are merged as far as its domain can, or one of them is split.
    Reshape {
        /// Which domain.
        domain: u8,
        /// Where.
        at: Place,
        /// Merges if true, else splits.
        merge: bool,
    },
    /// Maps a new area.
    Map {
        /// The 2 MiB slot of the window in which it begins.
        slot: u8,
        /// How many pages after the start of the slot it begins.
        skip: u16,
        /// How many pages it has.
        pages: u16,
        /// Its memory is not aligned like its addresses, so only small leaves fit.
        shifted: bool,
        /// The access of devices.
        access: Access,
        /// The fault of the request.
        fault: MapFault,
    },
    /// Maps at the lowest free addresses.
    MapAnywhere {
        /// Which of four pieces of memory is mapped. Nothing happens if it is in use.
        piece: u8,
        /// How many pages.
        pages: u16,
        /// How many pages at the start of the piece are left out.
        skip: u16,
        /// The access of devices.
        access: Access,
        /// Whether the length is not a whole number of pages.
        ragged: bool,
    },
    /// Unmaps an area, dirty or not.
    UnmapDiscarding {
        /// Which area.
        area: u8,
        /// The part of it.
        cut: Cut,
    },
    /// Unmaps an area, and takes its dirty pages.
    Unmap {
        /// Which area.
        area: u8,
        /// The part of it.
        cut: Cut,
        /// Bytes of one bit, as a logarithm.
        granule_lg2: u8,
        /// Whether the bitmap is too short by a word.
        short: bool,
    },
    /// Cuts an area in two.
    CutAt {
        /// Which page begins the right part.
        at: Place,
        /// Whether the cut is at a byte inside the page.
        unaligned: bool,
    },
    /// Several changes as one.
    Batch([Step; 3]),
    /// Keeps a range from being mapped.
    Reserve(Stretch),
    /// Releases the reservation with this number, or one that was never made.
    Release(u8),
    /// Sets the ranges that `MapAnywhere` may use, from one of some lists.
    Allow(u8),
    /// A named consumer joins.
    Join {
        /// Its number. A consumer that is there already is refused.
        consumer: u8,
        /// What it is told first.
        start: Begin,
        /// What it is told about.
        reach: Reach,
        /// The fault of the request.
        fault: JoinFault,
    },
    /// A named consumer is dropped. Nothing happens if it is not there.
    Leave(u8),
    /// Attaches a domain.
    Attach(u8),
    /// Detaches a domain.
    Detach(u8),
    /// Switches tracking.
    Track(bool),
    /// Switches tracking in one domain.
    TrackDomain(u8, bool),
    /// A device lets its posted writes land, and stays awake.
    Land(Master),
    /// A device lets its posted writes land, and goes to sleep.
    Quiesce(Master),
    /// Begins a write in flight. Nothing happens if this one has begun already.
    BeginWrite {
        /// Which of two.
        guard: u8,
        /// Where.
        at: Place,
        /// How many bytes.
        len: u16,
    },
    /// Writes some bytes of a write in flight.
    FillWrite {
        /// Which of two.
        guard: u8,
        /// How far from its first byte.
        skip: u16,
        /// How many bytes, at most to its end.
        len: u16,
    },
    /// Ends a write in flight.
    EndWrite(u8),
    /// Takes a handle of an area and keeps it, also when the area is unmapped.
    KeepHandle {
        /// Which of two.
        handle: u8,
        /// Which area.
        area: u8,
    },
    /// Discards a range: its storage reads as zero until it is written.
    Discard {
        /// Where it begins.
        at: Place,
        /// How many pages it has.
        pages: u16,
        /// Whether it ends some bytes before the end of a page.
        ragged: bool,
        /// The result of the drop of the storage.
        storage: Storage,
        /// What happens while the discard is at work.
        meanwhile: Meanwhile,
    },
    /// A named consumer takes a cursor on its newest epoch. Nothing happens if it is not there, or
    /// if this cursor exists.
    KeepCursor {
        /// Which of some cursors.
        cursor: u8,
        /// Whose epoch.
        whose: u8,
    },
    /// Drops a cursor.
    DropCursor(u8),
    /// Asks a named consumer for the pages that it committed after an epoch.
    Since {
        /// Whose pages.
        whose: u8,
        /// After which epoch.
        epoch: Named,
    },
    /// Sets the bounds of a consumer.
    Bound {
        /// Which one.
        whose: u8,
        /// The bounds.
        limits: Limits,
    },
    /// A CPU writes, and marks by a kept handle.
    MarkByKept {
        /// Which of two.
        handle: u8,
        /// The place in the area of the handle, as it was when the handle was taken.
        page: u8,
        /// How many bytes.
        len: u16,
    },
}

/// A device of a domain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Master {
    /// Which domain.
    pub domain: u8,
    /// Which of its two devices.
    pub device: u8,
}

/// Addresses in the window, by page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stretch {
    /// The 2 MiB slot of the window in which it begins.
    pub slot: u8,
    /// How many pages after the start of the slot it begins.
    pub skip: u16,
    /// How many pages it has.
    pub pages: u16,
}

/// One change of a batch. Its areas are those after the changes before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Nothing.
    Nothing,
    /// Cuts.
    Cut(Place),
    /// Unmaps an area.
    Unmap(u8),
    /// Unmaps the area that the batch mapped last.
    UnmapNew,
    /// Maps.
    Map(Stretch, Access),
}

/// An address, as a place in an area.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Which area, modulo their number.
    pub area: u8,
    /// One of its first, middle or last pages, or the page after it.
    pub page: u8,
    /// The byte in the page.
    pub byte: u16,
}

/// What a consumer that joins is told first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Begin {
    /// What is written from then on.
    Clean,
    /// All that is mapped.
    Dirty,
    /// What that consumer has not been told. As `Clean` if it is not there.
    LikeOf(u8),
}

/// The addresses of a consumer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reach {
    /// All.
    Everything,
    /// So many 2 MiB slots of the window from the first one on, from which a harvest for it takes
    /// its range.
    Slots(u8, u8),
}

/// The fault of a request to join.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum JoinFault {
    /// Nothing.
    None,
    /// The name is empty.
    NoName,
    /// The name has 256 bytes.
    LongName,
    /// The range does not start at a page.
    Unaligned,
}

/// The request of a harvest or peek.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ask {
    /// The consumer. The unnamed one if that is not there.
    pub whose: u8,
    /// Which area, modulo their number.
    pub area: u8,
    /// The whole area, a part of it, or more.
    pub span: u8,
    /// The first page of a part, as in [`Place::page`].
    pub page: u8,
    /// Bytes of one bit, as a logarithm: 11, 12, 13 or 21.
    pub granule_lg2: u8,
    /// Whether the range is not rounded out to the granule.
    pub ragged: bool,
    /// Whether the bitmap is too short by a word.
    pub short: bool,
    /// The treatment of holes.
    pub holes: Holes,
    /// Bits that the user has set before.
    pub preset: u8,
    /// A single domain. All domains and the marks if this is `None`, or a domain that was never
    /// attached.
    pub domain: Option<u8>,
    /// The call.
    pub mode: Mode,
}

/// The calls that harvest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// `harvest`.
    Whole,
    /// With a mask.
    Masked(Mask),
    /// With a bound.
    Bounded {
        /// Where it begins: in 1/256 of the range, rounded down to a granule. From 240 on it is in
        /// the middle of a page.
        from: u8,
        /// The number of bits after which it ends.
        bits: u16,
    },
    /// By many threads.
    Parallel,
}

/// A mask over the range of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mask {
    /// Which of eight neighbouring stretches have their bits set. This pattern repeats.
    pub stretches: u8,
    /// Pages of a stretch, as a logarithm: at least that of the granule.
    pub pages_lg2: u8,
    /// Bytes of one bit of the mask, as a logarithm: 11, 12 or 13.
    pub granule_lg2: u8,
}

/// A part of a range: its two ends in 1/255 of the range, rounded to bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Share(pub u8, pub u8);

/// The end of a lease that has been copied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// It is committed.
    Commit,
    /// It is put back.
    Abort,
    /// A part of it is committed, and the rest is put back.
    CommitRange(Share),
}

impl Ask {
    /// The whole first area, page by page, in all domains and the marks.
    pub const EVERYTHING: Ask = Ask {
        whose: 0,
        area: 0,
        span: 0,
        page: 0,
        granule_lg2: 12,
        ragged: false,
        short: false,
        holes: Holes::Stop,
        preset: 0,
        domain: None,
        mode: Mode::Whole,
    };

    /// The same for another consumer.
    #[must_use]
    pub const fn by(self, whose: u8) -> Ask {
        Ask { whose, ..self }
    }
}

/// The fault of a request to map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MapFault {
    /// Nothing.
    None,
    /// The range does not start at a page.
    Unaligned,
    /// The memory does not start at a page.
    UnalignedBacking,
    /// The memory reaches past 2^64.
    Wraps,
    /// The memory does not exist, so the source refuses.
    OutsideMemory,
}

/// The range of an unmap, relative to an area.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cut {
    /// All of it.
    Whole,
    /// All but its last page. The whole area if it has one page.
    Part,
    /// It and all areas after it.
    Rest,
}

listed! {
/// The callbacks of a source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Callback {
    /// `DirtySource::page`.
    Page,
    /// `DirtySource::identity`.
    Identity,
    /// `DirtySource::map`.
    Map,
    /// `DirtySource::unmap`.
    Unmap,
    /// `DirtySource::split_at`.
    SplitAt,
    /// `DirtySource::set_tracking`.
    SetTracking,
    /// `DirtySource::read_and_clear`.
    ReadAndClear,
    /// `DirtySource::peek`.
    Peek,
    /// `DirtySource::invalidate`.
    Invalidate,
    /// `DirtySource::flush_cost`.
    FlushCost,
}
}

/// The moment of a panic in a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Moment {
    /// Before any work.
    Before,
    /// After half of the work.
    Middle,
    /// After all of the work.
    After,
}

/// The result of the drop of the storage in a discard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Storage {
    /// It is dropped.
    Drops,
    /// The first half is dropped, and then an error is returned.
    Fails,
    /// The first half is dropped, and then the closure panics.
    Panics,
}

/// What happens in the closure of a discard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Meanwhile {
    /// Nothing.
    Nothing,
    /// A CPU writes a page, and marks it.
    Mark {
        /// How many pages above the start of the discard.
        page: u8,
        /// Before the storage is dropped instead of after it.
        early: bool,
    },
    /// A device writes a page, after the drop.
    Write {
        /// Which device.
        device: Master,
        /// How many pages above the start of the discard.
        page: u8,
    },
    /// A consumer harvests the range, copies, and ends its lease.
    Pass {
        /// The consumer.
        whose: u8,
        /// The end of the lease.
        fate: Fate,
        /// Before the storage is dropped instead of after it.
        early: bool,
    },
}

/// How many cursors a program has at most.
pub const CURSORS: usize = 4;

/// An epoch, as an operand of [`Op::Since`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Named {
    /// That of a cursor, whose consumer may be another one. As `Newest` if there is no such cursor.
    Cursor(u8),
    /// The newest one.
    Newest,
    /// One of the last epochs, counted from the newest one.
    Past(u8),
    /// One that is not committed yet.
    Future,
    /// One of a consumer of another space.
    Foreign,
}

/// The bounds of a consumer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// [`Bounds::bytes`](dirtymap::harvest::Bounds::bytes).
    pub bytes: u64,
    /// [`Bounds::deltas`](dirtymap::harvest::Bounds::deltas).
    pub deltas: u64,
    /// [`Bounds::age`](dirtymap::harvest::Bounds::age).
    pub age: u64,
}
