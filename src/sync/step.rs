//! The steps of the protocols, one by one, and the switch that leaves one out.
//!
//! The list is closed: `Step::ALL` is made with the enumeration, each variant must be caught by a model, and the table in
//! docs/sabotage.md says by which. Both are checked, see `tests/sabotage.rs`.

#[cfg(any(dirtymap_loom, dirtymap_shuttle))]
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

use super::Ordering;

/// Makes the enumeration and its list from one source, so that neither can lack what the other has.
macro_rules! steps {
    ($($(#[doc = $doc:literal])+ $name:ident,)+) => {
        /// Steps of the protocols that a model can leave out, swap or weaken, to show that the checks notice. In builds for a
        /// model checker only; elsewhere all are performed.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
        pub enum Step {
            $($(#[doc = $doc])+ $name,)+
        }

        impl Step {
            /// All of them.
            pub const ALL: &'static [Step] = &[$(Step::$name,)+];

            /// What the step is, in words.
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
    /// The fence between clearing marks and copying pages.
    SyncFence,
    /// Owing the gather before the pages of an aborted lease become dirty again.
    OweBeforePutBack,
    /// Waiting for a flush that another thread has begun with our gather.
    WaitForLeader,
    /// The fences between a mark, or the end of an area or a domain, and the look at the other.
    GoneFence,
    /// Recording a page before its bit is cleared.
    RecordBeforeClear,
    /// Waiting for writes that were already translated.
    DrainInFlight,
    /// Dropping cached translations when a flush asks for it.
    DropCached,
    /// Keeping what is to be freed until its flush has finished.
    FreeAfterFlush,
    /// Running frees in one thread at a time.
    OneReleases,
    /// Giving gathers that come during a flush to the next one.
    NextGeneration,
    /// Owing again what a failed flush carried.
    OweAgain,
    /// Taking all of a range for dirty and owed whose unmap panicked.
    PanicIsDirty,
    /// Marking the pages of a write in flight before its slot is freed.
    MarkBeforeFree,
    /// Publishing the rest of a leaf that a request covers in part before the leaf is cleared.
    GuardRest,
    /// Handing over the debt of such a rest after the clear; left out, it is handed over before.
    OweAfterClear,
    /// Filling a pair of area and domain only if it is not filled.
    FillOnce,
    /// Leaving pairs unfilled whose domain is leaving.
    RefuseLeaving,
    /// Looking at the areas after a domain was published, not before.
    LookAfterPublish,
    /// Closing the pairs of an area that has gone.
    ClosePairs,
    /// Looking at the tree again where the pairs of an area are closed.
    LookAgain,
    /// Marking what is put back into an area or a domain that is going.
    MarkIfGoing,
    /// Flushing before the addresses of an unmap are free.
    FlushBeforeReuse,
    /// Waiting for the readers of a replaced node of the area tree before it is used again.
    WaitForReaders,
    /// Leading marks by the handle of an area that was cut to what has gone of it.
    GiveWay,
    /// Saying what has gone of an area that was cut.
    SayGone,
    /// Checking the alignment of a cut again in the update that publishes it.
    CheckCutAgain,
    /// Saying that what a detach moves to the marks is in flight.
    DetachInFlight,
    /// Looking at what is in flight when an area goes.
    LookInFlight,
    /// Dropping those that are larger than what the flush names.
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
    /// Making all of a group dirty before an entry with D leaves it in a split.
    SpreadDirty,
    /// Making a leaf that takes the place of a table dirty.
    DirtyWhole,
    /// Making it dirty again when no device caches a pointer to the table any more.
    DirtyBehindFlush,
    /// Clearing a summary before what it stands for is taken, not after.
    SummaryFirst,
    /// The fence between the clear of a summary and the look at what it stands for.
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
    /// Release of the bits that a mark sets.
    PublishMark,
    /// Release of the chunk that a mark makes whole.
    PublishWhole,
    /// Giving a chunk that becomes whole the next number.
    NextNumber,
    /// The fence between the announcement of a split and the look at the words.
    SplitFence,
    /// The fence that `membarrier` runs in a thread that marks.
    Membarrier,
    /// Looking at a subtree only after the flush that follows the clear of its accessed bit.
    LookAfterFlush,
    /// Saying above a change by hand that nothing is known of the subtree any more.
    HeatAbove,
    /// Release of a fresh chunk, group or directory of a bitmap.
    PublishChunk,
    /// Release of a fresh block of slots for writes in flight.
    PublishBlock,
    /// Release of a slot whose range is written.
    PublishSlot,
    /// Release of a slot's new range behind the claim of its new owner.
    ChangeBeforeRange,
    /// Release of the pool that an update leaves to the next one.
    PublishPool,
    /// Release of the root of an edit.
    PublishRoot,
    /// Release of the switch that says that the baseline is clean.
    PublishBaseline,
    /// Release of the number of the generation that has finished.
    PublishFinished,
    /// The fences of a detach, behind its slot and behind the marks of what is kept.
    DetachFence,
    /// The fence between the publication of a leaf's rest and the clear of the leaf.
    RestFence,
    /// The fence of a device that wakes, between saying so and the look into its inbox.
    WakeFence,
    /// The fence of an invalidator, between its request and the look at who is awake.
    AskFence,
    /// Release of what a device has landed, when it answers or goes to sleep.
    PublishLanded,
    /// Release of a request or a fault that is pushed onto a stack.
    PublishRequest,
    /// Release of the entry that leads to a fresh table.
    PublishTable,
    /// Waiting for the walkers of a table that was retired before it is freed.
    WaitForWalkers,
    /// Flushing at sync; left out, at the end of the harvest, which then waits for devices.
    FlushAtSync,
    /// Securing the place of a line before its summary is cleared.
    SecureBeforeHide,
    /// Waiting for the readers of a value that was replaced.
    WaitForInside,
    /// The fences between a reader's coming, or the swap of a value, and the look at the other.
    EnterFence,
    /// Putting a table into a place of a slab only if nobody holds the table that lies there.
    ClaimFree,
    /// Showing a fresh log to harvests before a back end can mark in it.
    ListFirst,
    /// Moving what is left of a log that was swapped into the next one.
    CarryOver,
    /// Publishing the words of a chunk that is whole before it is so no more.
    PublishRest,
    /// Saying that a chunk is being split before its words are set.
    AnnounceSplit,
    /// Looking whether a chunk is whole behind each clear of a summary.
    LookBehindHide,
}

/// The number of the step that is left out, counted from 1; 0 for none.
#[cfg(any(dirtymap_loom, dirtymap_shuttle))]
static LEFT_OUT: AtomicUsize = AtomicUsize::new(0);

/// Leaves `step` out of every run of the model from now on; `None` restores the protocol.
#[cfg(any(dirtymap_loom, dirtymap_shuttle))]
pub fn leave_out(step: Option<Step>) {
    LEFT_OUT.store(step.map_or(0, |s| s as usize + 1), SeqCst);
}

/// Whether the protocol performs `step`. Always true outside of builds for a model checker, and optimised away there.
#[inline(always)]
pub fn performs(step: Step) -> bool {
    #[cfg(any(dirtymap_loom, dirtymap_shuttle))]
    {
        LEFT_OUT.load(SeqCst) != step as usize + 1
    }
    #[cfg(not(any(dirtymap_loom, dirtymap_shuttle)))]
    {
        let _ = step;
        true
    }
}

/// `ordering`, or Relaxed if `step` is left out: for steps that are nothing but an ordering.
#[inline(always)]
pub fn weaken(step: Step, ordering: Ordering) -> Ordering {
    if performs(step) {
        ordering
    } else {
        Ordering::Relaxed
    }
}
