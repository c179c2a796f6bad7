//! The steps of the store that a test can leave out, to show that the checks notice.
//!
//! The list is closed: the macro makes `Step::ALL` together with the enumeration, a test must lose
//! a write without each variant, and the section "Steps of the store" of docs/sabotage.md has
//! exactly these. Outside of tests every step is performed.

macro_rules! steps {
    ($($(#[doc = $doc:literal])+ $name:ident,)+) => {
        /// Steps of the store that a test can leave out.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub(crate) enum Step {
            $($(#[doc = $doc])+ $name,)+
        }

        #[cfg(test)]
        impl Step {
            /// All steps, in the order of the enumeration.
            pub(crate) const ALL: &'static [Step] = &[$(Step::$name,)+];

            /// The description of the step.
            pub(crate) fn what(self) -> &'static str {
                match self {
                    $(Step::$name => concat!($($doc),+).trim(),)+
                }
            }
        }
    };
}

steps! {
    /// Flushing a batch before its writes are acknowledged.
    FlushBatch,
    /// Committing after the consumer has said that its copy is durable.
    CopyBeforeCommit,
    /// Leaving what was harvested in the log until its commit is durable.
    HoldUntilCommit,
    /// Flushing the folder after a new log took the place of the old one.
    FlushFolder,
    /// Refusing headers and batches whose checksum does not match.
    RefuseTorn,
    /// Leaving an extent open while a write is in flight.
    HoldInFlight,
    /// Recording the dirty pages of an extent with its close.
    RecordAtClose,
    /// Recording what a close or a harvest collects for every consumer.
    RecordForAll,
    /// Dropping, at a commit, what was harvested and nothing that came later.
    DropHarvestedOnly,
    /// Reporting, after a crash, the extents that were open.
    ReportOpen,
    /// Release: the end of a write publishes its data with its mark, to the thread that harvests.
    PublishWrite,
    /// Acquire: a harvest or a close that finds a mark sees the data of its write.
    SeeWrite,
    /// Release: an extent becomes open after the flush of the batch that opens it.
    PublishOpen,
    /// Acquire: a write that finds its extent open comes after that flush.
    SeeOpen,
    /// Leaving an extent open while a handle claims it.
    HoldClaimed,
    /// Putting back, in a harvest, the pages that a handle claims.
    PutBackClaimed,
    /// The fence between a claim and the look at its extent.
    ClaimFence,
    /// The fence between a change of extents and the look at claims.
    LookFence,
    /// Release: the end of a claim publishes the data of its write, and its mark.
    PublishEnd,
    /// Acquire: a leader that finds a claim ended sees the data of its write, and its mark.
    SeeEnd,
}

#[cfg(test)]
thread_local! {
    /// The step that tests on this thread leave out. All threads of a model are one thread of the
    /// system.
    static LEFT_OUT: std::cell::Cell<Option<Step>> = const { std::cell::Cell::new(None) };
}

/// Leaves `step` out on this thread from now on; `None` restores the protocol.
#[cfg(test)]
pub(crate) fn leave_out(step: Option<Step>) {
    LEFT_OUT.set(step);
}

/// Whether the protocol performs `step`. Always true outside of tests, and optimised away there.
#[inline(always)]
pub(crate) fn performs(step: Step) -> bool {
    #[cfg(test)]
    {
        LEFT_OUT.get() != Some(step)
    }
    #[cfg(not(test))]
    {
        let _ = step;
        true
    }
}

/// `ordering`, or Relaxed if `step` is left out: for steps that consist of an ordering alone.
#[inline(always)]
pub(crate) fn weaken(step: Step, ordering: dirtymap::sync::Ordering) -> dirtymap::sync::Ordering {
    if performs(step) {
        ordering
    } else {
        dirtymap::sync::Ordering::Relaxed
    }
}
