//! The language of the tests: what can be done to an address space, its devices and its leases.
//!
//! Operands are small numbers that the oracle turns into addresses when the operation runs: "the
//! second area", "its last page", so that most inputs are legal, hit few places again and again,
//! and still reach the borders. Every byte string is a program.

mod decode;

pub use decode::decode;

use dirtymap::{Access, Holes};

use crate::forms::Form;

/// How many domains a world has.
pub const DOMAINS: usize = 3;

/// Makes the enumeration and its list from one source: a sabotage that is not run is one that is
/// not there.
macro_rules! listed {
    ($(#[$of_all:meta])* pub enum $name:ident { $($(#[$of_one:meta])* $one:ident,)+ }) => {
        $(#[$of_all])*
        pub enum $name { $($(#[$of_one])* $one,)+ }

        impl $name {
            /// All of them.
            pub const ALL: &'static [$name] = &[$($name::$one,)+];
        }
    };
}

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
    /// A device reads; its own posted writes land first.
    DmaRead {
        /// Which device.
        device: Master,
        /// Where.
        at: Place,
        /// How many bytes.
        len: u16,
    },
    /// A CPU writes, and marks what it wrote.
    Mark {
        /// Where.
        at: Place,
        /// How many bytes.
        len: u16,
        /// Marks by the handle of the area and not by the space.
        by_handle: bool,
    },
    /// Harvests into the first free of two leases; nothing happens if both are taken.
    Harvest(Ask),
    /// Harvests into a bitmap of any form, and ends the lease in the same step.
    Pass {
        /// What is asked for.
        ask: Ask,
        /// Where the bits go.
        form: Form,
        /// What becomes of the lease once it is copied; if it cannot be flushed, it is dropped.
        fate: Fate,
    },
    /// Looks and changes nothing, whatever the mode.
    Peek(Ask),
    /// Flushes a lease.
    Sync(u8),
    /// A device writes, and writes the same again and again while a lease is flushed.
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
    /// Copies what a synced lease names.
    Copy(u8),
    /// Ends a lease well: what is missing of sync and copy is made up for.
    Commit(u8),
    /// Commits a part of a lease: what is missing of sync and copy is made up for.
    CommitRange {
        /// Which lease.
        lease: u8,
        /// Which part.
        part: Share,
    },
    /// Puts a lease back, but for what was committed of it.
    Abort(u8),
    /// Drops a lease, which puts it back.
    DropLease(u8),
    /// The consumer panics while it holds a lease.
    Crash(u8),
    /// The next harvest that asks this domain panics half-way through an area.
    HarvestDies(u8),
    /// The next flush of this domain fails.
    FlushFails(u8),
    /// A callback of this domain panics.
    Panics {
        /// Which domain.
        domain: u8,
        /// Which callback.
        callback: Callback,
        /// How many calls go well before.
        calls: u8,
        /// When in the call.
        moment: Moment,
    },
    /// The next harvest of this domain that comes to this place stops there.
    Stops {
        /// Which domain.
        domain: u8,
        /// Where.
        at: Place,
    },
    /// The consumer forgets a lease: nothing is put back, and what it has not copied is lost.
    Forget(u8),
    /// The leaves of an area are merged as far as its domain can, or one of them is split.
    Reshape {
        /// Which domain.
        domain: u8,
        /// Where.
        at: Place,
        /// Merges; else splits.
        merge: bool,
    },
    /// Maps a new area.
    Map {
        /// Which 2 MiB of the window it begins in.
        slot: u8,
        /// How many pages it begins behind the slot.
        skip: u16,
        /// How many pages it has.
        pages: u16,
        /// Its memory is not aligned as its addresses are: only small leaves fit.
        shifted: bool,
        /// What devices may do.
        access: Access,
        /// How the request is wrong.
        fault: MapFault,
    },
    /// Maps wherever there is room.
    MapAnywhere {
        /// Which of four pieces of memory is mapped; nothing happens if it is in use.
        piece: u8,
        /// How many pages.
        pages: u16,
        /// How many pages of the piece are left out in front.
        skip: u16,
        /// What devices may do.
        access: Access,
        /// Not a whole number of pages.
        ragged: bool,
    },
    /// Unmaps an area, dirty or not.
    UnmapDiscarding {
        /// Which area.
        area: u8,
        /// What of it.
        cut: Cut,
    },
    /// Unmaps an area, and takes what is dirty in it.
    Unmap {
        /// Which area.
        area: u8,
        /// What of it.
        cut: Cut,
        /// Bytes of one bit, as a logarithm.
        granule_lg2: u8,
        /// The bitmap is too short by a word.
        short: bool,
    },
    /// Cuts an area in two.
    CutAt {
        /// Which page begins the right part.
        at: Place,
        /// At a byte inside the page.
        unaligned: bool,
    },
    /// Several changes as one.
    Batch([Step; 3]),
    /// Keeps a range from being mapped.
    Reserve(Stretch),
    /// Undoes the reservation with this number, or one that was never made.
    Release(u8),
    /// Says where `MapAnywhere` may look: one of some lists of ranges.
    Allow(u8),
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
    /// Begins a write in flight; nothing happens if this one is under way.
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
    /// Takes a handle of an area and keeps it, whatever becomes of the area.
    KeepHandle {
        /// Which of two.
        handle: u8,
        /// Which area.
        area: u8,
    },
    /// A CPU writes, and marks by a handle that was kept.
    MarkByKept {
        /// Which of two.
        handle: u8,
        /// Where in the area of the handle, as it was then.
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
    /// Which 2 MiB of the window it begins in.
    pub slot: u8,
    /// How many pages it begins behind the slot.
    pub skip: u16,
    /// How many pages it has.
    pub pages: u16,
}

/// One change of a batch. Areas are those that the changes before it have left.
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
    /// One of its first, middle or last pages, or the page behind it.
    pub page: u8,
    /// The byte in the page.
    pub byte: u16,
}

/// What a harvest or peek asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ask {
    /// Which area, modulo their number.
    pub area: u8,
    /// All of the area, a part of it, or more.
    pub span: u8,
    /// The first page of a part, as in [`Place::page`].
    pub page: u8,
    /// Bytes of one bit, as a logarithm: 11, 12, 13 or 21.
    pub granule_lg2: u8,
    /// Does not round the range out to the granule.
    pub ragged: bool,
    /// The bitmap is too short by a word.
    pub short: bool,
    /// What becomes of holes.
    pub holes: Holes,
    /// Bits that the user has set before.
    pub preset: u8,
    /// One domain alone; all of them and the marks if there is none, or it was never attached.
    pub domain: Option<u8>,
    /// By which call.
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
        /// Where it begins: a share of the range in 1/256, rounded down to a granule; from 240 on
        /// in the middle of a page.
        from: u8,
        /// Bits after which it stops.
        bits: u16,
    },
    /// By many threads.
    Parallel,
}

/// A mask over the range of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mask {
    /// Which of eight neighbouring stretches have their bits set; the next eight are the same
    /// again.
    pub stretches: u8,
    /// Pages of a stretch, as a logarithm: at least that of the granule.
    pub pages_lg2: u8,
    /// Bytes of one bit of the mask, as a logarithm: 11, 12 or 13.
    pub granule_lg2: u8,
}

/// A part of a range: from one place in it to another, both in 1/255 of it, to the byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Share(pub u8, pub u8);

/// What becomes of a lease that has been copied.
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
    /// All of the first area, page by page, from everywhere.
    pub const EVERYTHING: Ask = Ask {
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
}

/// What is wrong with a request to map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MapFault {
    /// Nothing.
    None,
    /// The range does not start at a page.
    Unaligned,
    /// The memory does not start at a page.
    UnalignedBacking,
    /// The memory would go past 2^64.
    Wraps,
    /// There is no such memory: the source refuses.
    OutsideMemory,
}

/// What of an area a request to unmap names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cut {
    /// All of it.
    Whole,
    /// All but its last page; everything if it has one.
    Part,
    /// It and all areas behind it.
    Rest,
}

listed! {
/// What a space asks of a source.
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

/// When in a call something happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Moment {
    /// Before anything is done.
    Before,
    /// When a half is done.
    Middle,
    /// When all is done.
    After,
}

/// The world that a program runs in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Config {
    /// The page tables of the domains. The first one is attached when the program begins.
    pub formats: [Format; DOMAINS],
    /// The smallest page of the space, as a logarithm: 12 or 13.
    pub space_lg2: u8,
    /// Leaves may have 2 MiB, otherwise all have 4 KiB; for each domain.
    pub large_leaves: [bool; DOMAINS],
    /// Sets of each IOTLB.
    pub iotlb_sets: usize,
    /// Ways of each IOTLB.
    pub iotlb_ways: usize,
    /// Translations that devices cache themselves, in front of the IOTLB.
    pub tlb_entries: usize,
    /// Writes that a device keeps in flight.
    pub posted_writes: usize,
    /// Areas are mapped and tracking is on when the program begins.
    pub warm: bool,
    /// What is broken.
    pub sabotage: Sabotage,
}

/// Page tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// AMD v1.
    Amd,
    /// VT-d, second stage, four levels.
    Vtd,
    /// Arm, stage 1.
    Arm,
    /// Arm, stage 1, with pages of 16 KiB.
    Arm16K,
    /// Arm, stage 1, with pages of 64 KiB.
    Arm64K,
    /// x86-64, four levels.
    X86,
    /// RISC-V, Sv48.
    Riscv,
    /// A log that is cleared by batches.
    Log4K,
    /// The same with pages of 8 KiB.
    Log8K,
    /// The same with pages of 64 KiB.
    Log64K,
}

listed! {
/// What can be broken, to show that it is noticed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Sabotage {
    /// All is well.
    #[default]
    None,
    /// Invalidations reach no device.
    IgnoreInvalidations,
    /// Devices acknowledge while their writes are in flight.
    AcknowledgeWithoutDraining,
    /// Each invalidation leaves out the last page.
    FlushShortByOnePage,
    /// Devices keep pointers to tables that are gone.
    SkipNonLeaf,
    /// TLBs of devices are emptied before the IOTLBs that refill them.
    DeviceTlbFirst,
    /// A flush that was told to fail does nothing and says that all is well.
    HideFailedFlush,
    /// Switching tracking on does not flush.
    TrackWithoutFlush,
    /// A source that unmaps does not say what was dirty.
    UnmapForgetsDirty,
    /// A source that unmaps does not owe the flush.
    UnmapOwesNothing,
    /// A source says that it has split a leaf, and has not.
    SplitNothing,
    /// Harvests do not ask the domains but the first.
    HarvestFirstDomainOnly,
    /// The consumer copies before the flush, and not after it.
    CopyBeforeSync,
    /// CPUs write and do not mark.
    ForgetMarks,
    /// CPUs take their time to write, and do not say so.
    ForgetGuards,
    /// A consumer that crashes takes its lease with it.
    LeakLease,
    /// A source that stops has left out the page below the place that it names.
    StopShort,
    /// An invalidation that was told to panic does nothing and says that all is well.
    HidePanickedFlush,
    /// A log that clears by batches clears all of a word, asked for or not.
    ClearWholeWords,
}
}
