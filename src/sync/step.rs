//! The steps of the protocols, and the switch that leaves one out.
//!
//! The list is closed: the macro makes `Step::ALL` together with the enumeration, a model must fail
//! without each variant, and the table in docs/sabotage.md names those models. `tests/sabotage.rs`
//! checks both.

#[cfg(any(dirtymap_loom, dirtymap_shuttle))]
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

use super::Ordering;

/// Makes the enumeration and its list from one source, so that they always agree.
macro_rules! steps {
    ($($(#[doc = $doc:literal])+ $name:ident,)+) => {
        /// Steps of the protocols that a model can leave out, swap or weaken, to show that the
        /// checks notice. Only builds for a model checker, and those with the hidden feature
        /// `__sabotage`, can do so; all others perform every step.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
        pub enum Step {
            $($(#[doc = $doc])+ $name,)+
        }

        impl Step {
            /// All steps, in the order of the enumeration.
            pub const ALL: &'static [Step] = &[$(Step::$name,)+];

            /// The description of the step.
            pub fn what(self) -> &'static str {
                match self {
                    $(Step::$name => concat!($($doc),+).trim(),)+
                }
            }
        }
    };
}

steps! {
    /// The fence between the data write and the test of the mark.
    MarkFence,
    /// The fence between clearing marks and copying pages, in a sync.
    SyncFence,
    /// The fence between clearing marks and copying pages, in a switch of tracking to on.
    SwitchFence,
    /// The fence between clearing marks and copying pages, in an unmap.
    UnmapFence,
    /// The fence between clearing marks and copying pages, in a join of a consumer.
    JoinFence,
    /// Owing the gather before the pages of an aborted lease become dirty again.
    OweBeforePutBack,
    /// Owing the gather before the pages from a stop on become dirty again.
    OweBeforeStop,
    /// Owing the gather of an unmap before its pages become dirty again.
    OweBeforeMark,
    /// Waiting for a flush that another thread has begun with our gather.
    WaitForLeader,
    /// The fence between the end of an area and the look at its marks.
    GoneFence,
    /// The fence between the claim of an area and the look at the put-back stores.
    ClaimFence,
    /// The fence between saying that a domain leaves and the look at areas and stores.
    LeaveFence,
    /// The fence between the end of an area that is taken out and the look at its marks.
    TakeOutFence,
    /// Looking up the area of a mark if the area that the thread remembers is claimed.
    LookForClaim,
    /// Recording a leaf before it is cleared.
    RecordLeaf,
    /// Recording a run before it is cleared.
    RecordRun,
    /// Recording many leaves before they are cleared.
    RecordLeaves,
    /// Recording marks before they are cleared.
    RecordMarks,
    /// Waiting for writes that were already translated.
    DrainInFlight,
    /// Dropping cached translations when a flush asks for it.
    DropCached,
    /// Holding back what is to be freed until its flush has finished.
    FreeAfterFlush,
    /// Running frees in one thread at a time.
    OneReleases,
    /// Leaving gathers that come during a flush to the next flush.
    NextGeneration,
    /// Owing again what a failed flush carried.
    OweAgain,
    /// Treating all of a range as dirty and owed if its unmap panicked.
    PanicIsDirty,
    /// Marking the pages of a write in flight before its slot is freed.
    MarkBeforeFree,
    /// Publishing the rest of a partly covered leaf as in flight before the leaf is cleared.
    GuardRest,
    /// Handing over the debt of such a rest after the clear; left out, it is handed over before.
    OweAfterClear,
    /// Filling a pair of area and domain only if it is not filled yet.
    FillOnce,
    /// Not filling pairs whose domain is leaving.
    RefuseLeaving,
    /// Looking at the areas after a domain was published, not before.
    LookAfterPublish,
    /// Closing the pairs of an area that has left the tree or was cut.
    ClosePairs,
    /// Looking at the tree again when the pairs of an area are closed.
    LookAgain,
    /// Marking what is put back into an area or a domain that is on its way out.
    MarkIfGoing,
    /// Flushing before the addresses of an unmap are free.
    FlushBeforeReuse,
    /// Waiting for the readers of a replaced node of the area tree before the node is used again.
    WaitForReaders,
    /// Publishing that an area was cut, so that marks by its handle look for the parts that have
    /// gone.
    GiveWay,
    /// Recording which parts of a cut area have gone.
    SayGone,
    /// Checking the alignment of a cut again in the update that publishes it.
    CheckCutAgain,
    /// Publishing as in flight what a detach moves to the marks.
    DetachInFlight,
    /// Looking at the writes in flight when an area is unmapped.
    LookInFlight,
    /// Recording an area before it leaves the tree, for harvests that record backing addresses.
    RecordLeaving,
    /// Dropping cached translations that are larger than the ranges of a flush.
    DropLarger,
    /// Looking at every entry of a leaf for its dirty bit.
    ReadEveryEntry,
    /// Making every entry of a leaf clean.
    CleanEveryEntry,
    /// Leaving a leaf of several entries dirty where a harvest has recorded a leaf of one.
    SpareGroup,
    /// Leaving a leaf dirty that is larger than the one that a harvest has recorded.
    SpareLarger,
    /// Making the parts of a split leaf dirty if the leaf was.
    DirtyParts,
    /// Making all of a group dirty before an entry with a set dirty bit leaves it in a split.
    SpreadDirty,
    /// Making a leaf dirty that replaces a table.
    DirtyWhole,
    /// Making that leaf dirty again after no device caches a pointer to the table any more.
    DirtyBehindFlush,
    /// Clearing a summary before the marks below it are taken, not after.
    SummaryFirst,
    /// The fence between the clear of a summary and the look at the marks below it.
    SummaryFence,
    /// Looking at the summary when a mark is found set.
    SummaryOnSkip,
    /// The fence between the bit that a mark sets and the look at its summary.
    WordFence,
    /// The fence between the bit that a mark finds set and the look at its summary.
    SkipFence,
    /// The fence between the bits of several words that a mark sets and the look at their summary.
    WordsFence,
    /// The fence between the mark of a whole chunk and the look at its summary.
    WholeFence,
    /// The fence between a summary that a mark finds set and the look at its area.
    FoundFence,
    /// The fence between a summary that a mark sets and the look at its area.
    SummarizedFence,
    /// Release of the bit that a mark sets.
    PublishMark,
    /// Release of the bits of several words that a mark sets.
    PublishMarks,
    /// Release of the chunk that a mark makes whole.
    PublishWhole,
    /// Giving a chunk that becomes whole the next number.
    NextNumber,
    /// The fence between announcing a split and the look at the words.
    SplitFence,
    /// The fence that `membarrier` runs in a marking thread.
    Membarrier,
    /// Looking at a subtree only after the flush that follows the clear of its accessed bit.
    LookAfterFlush,
    /// Discarding the accessed state that is recorded above what software makes dirty.
    HeatByHand,
    /// Discarding the accessed state that is recorded above a write that software walks for.
    HeatWrite,
    /// Discarding the accessed state that is recorded above a split.
    HeatSplit,
    /// Discarding the accessed state that is recorded above a merge.
    HeatMerge,
    /// Discarding all recorded accessed state when tracking begins.
    HeatAll,
    /// Release of a fresh chunk, group or directory of a bitmap.
    PublishChunk,
    /// Release of a fresh block of slots for writes in flight.
    PublishBlock,
    /// Release of a slot whose range is written.
    PublishSlot,
    /// Release of a slot's new range after the claim of its new owner.
    ChangeBeforeRange,
    /// Release of the pool that an update leaves to the next one.
    PublishPool,
    /// Release of the pool of an update that found none.
    PublishFurther,
    /// Release of the root that an edit publishes.
    PublishRoot,
    /// Release of the switch that says that the baseline is clean.
    PublishBaseline,
    /// Release of the number of the generation that has finished.
    PublishFinished,
    /// The fence of a detach after its slot, before it changes the table.
    DetachFence,
    /// The fence of a detach after the marks of the put-back pages, before it takes them.
    MovedFence,
    /// The fence between the publication of a leaf's rest and the clear of the leaf.
    RestFence,
    /// The fence of a device that wakes, between saying so and the look at its inbox.
    WakeFence,
    /// The fence of an invalidator, between its request and the look at which devices are awake.
    AskFence,
    /// The same for the flag that stands for the requests of a full inbox.
    OverflowFence,
    /// Release of what a device has landed, when it answers.
    PublishLanded,
    /// Release of what a device has landed, when it goes to sleep.
    PublishAsleep,
    /// Release of a request or a fault that is pushed onto a stack.
    PublishRequest,
    /// Release of the entry that leads to a fresh table.
    PublishTable,
    /// Waiting for the walkers of a table that was retired before it is freed.
    WaitForWalkers,
    /// Flushing at sync; left out, at the end of the harvest, which then waits for devices.
    FlushAtSync,
    /// Making room to record a line before its summary is cleared.
    SecureBeforeHide,
    /// Waiting for the readers of a value that was replaced.
    WaitForInside,
    /// The fence between the arrival of a reader and its look at the value.
    EnterFence,
    /// The fence between the swap of a value and the look for readers.
    ReplaceFence,
    /// Putting a table into a place of a slab only if no thread holds the table in that place.
    ClaimFree,
    /// Showing a fresh log to harvests before a back end can mark in it.
    ListFirst,
    /// Moving what is left of a log that was swapped into the next one.
    CarryOver,
    /// Publishing the words of a whole chunk before its state says that it is split.
    PublishRest,
    /// Announcing that a chunk is being split before its words are set.
    AnnounceSplit,
    /// Looking whether a chunk is whole after each clear of a summary.
    LookBehindHide,
    /// Leaving what a harvest has taken pending for the other consumers; left out, one of them is
    /// forgotten.
    LeaveToOthers,
    /// Handing the debt of such pages to the queue before they are pending; left out, only the
    /// lease knows it.
    CarryDebt,
    /// Looking at what other harvests have taken and not left yet.
    LookAtFlights,
    /// The fence between the record of a leaf in a flight and the clear of the leaf.
    FlightFence,
    /// Claiming a piece before summaries in it are cleared.
    ClaimPiece,
    /// Looking, when an area goes, at what harvests hide in the stores of domains.
    LookInHiddenStores,
    /// Marking what harvests hide in the store of a domain that leaves.
    MarkHidden,
    /// Claiming a chunk of what is left to a consumer before it is changed.
    ClaimLeft,
    /// Release of the words of such a chunk, at the end of the claim.
    PublishLeft,
    /// Release of the words, the lines and the chunk of a crossing.
    ChangeBeforeWords,
    /// Release of the state of a crossing that names a chunk.
    PublishCrossing,
    /// Release of a line of a crossing, after its words.
    PublishLine,
    /// Waiting for the harvests that do not know a consumer that joins.
    WaitForWalks,
    /// Looking, after a copy of what is pending for another consumer, whether that one has a lease.
    SettledAgain,
    /// One thread at a time waiting for harvests; left out, two of them turn the counts at once.
    TurnAlone,
    /// Flushing what those harvests owe.
    FlushAtJoin,
    /// Making everything pending for a consumer whose store is dropped.
    TellWhole,
    /// Going on with the new store of a consumer in the middle of its harvest.
    FollowStore,
    /// Waiting, in the first sync over a new store of a consumer, for harvests with the old store.
    CatchUp,
    /// Counting what becomes pending as a whole again, so that a harvest does not take it for
    /// holes.
    SayPutBack,
    /// Merging the delta of a cursor that is dropped into that of the cursor before it.
    MergeDelta,
    /// Numbering a lease at the end of its walk; left out, it is numbered at the begin.
    NumberAtEnd,
    /// Waiting, before the first discard, for the harvests that do not know of discards.
    WaitForUnaware,
    /// Flushing the range of a discard in all sources before its storage is dropped.
    FlushAtDiscard,
    /// The fence of a discard, after it has taken what is dirty and before its storage is dropped.
    DiscardFence,
    /// Leaving the range of a discard pending for every consumer.
    TellDiscard,
    /// Clearing the zero bits of the pages that a harvest has taken.
    TakenIsData,
    /// Clearing the zero bits of the pages that a harvest has seen in other hands.
    SeenIsData,
    /// Taking a page for data while a discard of it is at work.
    DoubtDiscards,
    /// Looking at the zero bit once more, after no discard was found at work.
    LookAgainForZero,
    /// Taking all pages for data until a switch of tracking to on has forgotten which were zero.
    DoubtRestart,
}

/// The number of the step that is left out, counted from 1; 0 for none.
#[cfg(any(dirtymap_loom, dirtymap_shuttle))]
static LEFT_OUT: AtomicUsize = AtomicUsize::new(0);

/// Leaves `step` out of every execution from now on; `None` restores the protocol.
#[cfg(any(dirtymap_loom, dirtymap_shuttle))]
pub fn leave_out(step: Option<Step>) {
    LEFT_OUT.store(step.map_or(0, |s| s as usize + 1), SeqCst);
}

#[cfg(all(feature = "__sabotage", not(any(dirtymap_loom, dirtymap_shuttle))))]
std::thread_local! {
    /// The step that this thread leaves out.
    static LEFT_OUT: std::cell::Cell<Option<Step>> = const { std::cell::Cell::new(None) };
}

/// Makes this thread leave out `step` from now on; `None` restores the protocol. For tests in real
/// time, in which other threads perform every step.
#[cfg(all(feature = "__sabotage", not(any(dirtymap_loom, dirtymap_shuttle))))]
pub fn leave_out(step: Option<Step>) {
    LEFT_OUT.set(step);
}

/// Whether the protocol performs `step`. Always true outside of builds for a model checker and
/// those that break steps on purpose, and optimised away there.
#[inline(always)]
pub fn performs(step: Step) -> bool {
    #[cfg(any(dirtymap_loom, dirtymap_shuttle))]
    {
        LEFT_OUT.load(SeqCst) != step as usize + 1
    }
    #[cfg(all(feature = "__sabotage", not(any(dirtymap_loom, dirtymap_shuttle))))]
    {
        LEFT_OUT.get() != Some(step)
    }
    #[cfg(not(any(dirtymap_loom, dirtymap_shuttle, feature = "__sabotage")))]
    {
        let _ = step;
        true
    }
}

/// `ordering`, or Relaxed if `step` is left out: for steps that consist of an ordering alone.
#[inline(always)]
pub fn weaken(step: Step, ordering: Ordering) -> Ordering {
    if performs(step) {
        ordering
    } else {
        Ordering::Relaxed
    }
}
