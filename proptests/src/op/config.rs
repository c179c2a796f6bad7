//! The world of a program: its page tables, and its fault.

use super::DOMAINS;

/// The world that a program runs in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Config {
    /// The page tables of the domains. The first one is attached when the program begins.
    pub formats: [Format; DOMAINS],
    /// The smallest page of the space, as a logarithm: 12 or 13.
    pub space_lg2: u8,
    /// For each domain, whether leaves may have 2 MiB. Otherwise all have 4 KiB.
    pub large_leaves: [bool; DOMAINS],
    /// Sets of each IOTLB.
    pub iotlb_sets: usize,
    /// Ways of each IOTLB.
    pub iotlb_ways: usize,
    /// Translations that devices cache in a TLB of their own.
    pub tlb_entries: usize,
    /// Writes that a device keeps in flight.
    pub posted_writes: usize,
    /// Whether areas are mapped and tracking is on when the program begins.
    pub warm: bool,
    /// The fault of the world.
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
/// The faults, each of which a run has to notice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Sabotage {
    /// No fault.
    #[default]
    None,
    /// Invalidations reach no device.
    IgnoreInvalidations,
    /// Devices acknowledge while their writes are in flight.
    AcknowledgeWithoutDraining,
    /// Each invalidation leaves out the last page.
    FlushShortByOnePage,
    /// Devices keep cached pointers to tables that are gone.
    SkipNonLeaf,
    /// The TLBs of devices are flushed before the IOTLBs that refill them.
    DeviceTlbFirst,
    /// A flush that was told to fail does nothing and reports success.
    HideFailedFlush,
    /// Switching tracking on does not flush.
    TrackWithoutFlush,
    /// An unmap of a source does not report dirty pages.
    UnmapForgetsDirty,
    /// An unmap of a source does not owe the flush.
    UnmapOwesNothing,
    /// A source reports that it has split a leaf, and has not.
    SplitNothing,
    /// Harvests read the first domain only.
    HarvestFirstDomainOnly,
    /// The consumer copies before the flush instead of after it.
    CopyBeforeSync,
    /// CPUs write and do not mark.
    ForgetMarks,
    /// CPUs write slowly, without a write guard.
    ForgetGuards,
    /// The lease of a consumer that crashes is forgotten.
    LeakLease,
    /// A source that stops has left out the page below its stop.
    StopShort,
    /// An invalidation that was told to panic does nothing and reports success.
    HidePanickedFlush,
    /// A log that clears by batches clears whole words, beyond the request.
    ClearWholeWords,
    /// A harvest does not leave what it takes to one of the other consumers.
    ForgetConsumer,
    /// A harvest leaves it without the debt, which only its lease knows.
    ForgetDebt,
    /// A discard does not flush its range, so the debt is dropped.
    DiscardWithoutFlush,
    /// A discard does not leave its range to the consumers.
    ForgetDiscard,
    /// A harvest that takes a page for data leaves it marked as zero.
    ZeroOverData,
    /// When a cursor is dropped, its delta is not merged into the one before it.
    ForgetMerge,
    /// A consumer whose pending pages are out of bounds is not told everything.
    ForgetWhole,
}
}
