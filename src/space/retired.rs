//! Sources that nothing reaches any more, until they are dropped where no lock is held.
//!
//! A source is a user's value: its destructor may call its space, wait, or panic. But the last
//! count of a domain may go anywhere: with rules that an update of the tree replaced, with a lease,
//! with the list that a flush went by, under any lock of the space or in the middle of an update.
//! So a domain whose last count goes only hands its source over. The next call that changes the
//! space begins by dropping what was handed over, before it takes a lock or has done anything that
//! a panic could undo; [`reclaim`](super::AddressSpace::reclaim) and a refused attach drop it
//! before they return.

use std::mem::ManuallyDrop;
use std::ops::Deref;

use crate::failure::{call, forget, go_on, keep_first};
use crate::source::DirtySource;
use crate::sync::{Arc, InnerLock, lock_inner};

/// Where domains of one space leave their sources.
#[derive(Clone)]
pub(super) struct Retired(Arc<InnerLock<Left>>);

#[derive(Default)]
struct Left {
    sources: Vec<Box<dyn DirtySource>>,
    /// A thread drops sources, and will look here before it stops.
    dropping: bool,
    /// The space is gone, and with it all of its locks.
    closed: bool,
}

impl Retired {
    /// Takes a source over. Runs no users' code while the space lives.
    fn take_over(&self, source: Box<dyn DirtySource>) {
        let mut left = lock_inner(&self.0);
        if !left.closed {
            left.sources.push(source);
            return;
        }
        drop(left);
        // In the middle of whatever has the last count, such as garbage of the tree, which any
        // thread may clean up: its panic would end the work of others.
        if let Err(panic) = call(|| drop(source)) {
            forget(panic);
        }
    }

    /// Drops what was taken over, all of it whichever panic. For callers without a lock of the
    /// space. Leaves it to the thread that is doing so already, which may be this one, in the
    /// destructor of a source.
    ///
    /// # Panics
    /// With the first panic of a source, unless another panic goes by already.
    pub(super) fn drop_all(&self) {
        let mut first = None;
        let mut ours = false;
        loop {
            let sources = {
                let mut left = lock_inner(&self.0);
                if left.dropping && !ours {
                    return;
                }
                ours = !left.sources.is_empty();
                left.dropping = ours;
                std::mem::take(&mut left.sources)
            };
            if !ours {
                break;
            }
            for source in sources {
                if let Err(panic) = call(|| drop(source)) {
                    keep_first(&mut first, panic);
                }
            }
        }
        go_on(first);
    }
}

/// What the space holds of it: dropped with the space, after everything else in it.
pub(super) struct LastRetired(Retired);

impl LastRetired {
    pub(super) fn new() -> Self {
        LastRetired(Retired(Arc::default()))
    }
}

impl Deref for LastRetired {
    type Target = Retired;

    fn deref(&self) -> &Retired {
        &self.0
    }
}

impl Drop for LastRetired {
    fn drop(&mut self) {
        lock_inner(&self.0.0).closed = true;
        self.drop_all();
    }
}

/// The source of a domain; handed over when the domain goes.
pub(crate) struct Source {
    source: ManuallyDrop<Box<dyn DirtySource>>,
    retired: Retired,
}

impl Source {
    pub(super) fn new(source: Box<dyn DirtySource>, retired: Retired) -> Self {
        Source {
            source: ManuallyDrop::new(source),
            retired,
        }
    }
}

impl Deref for Source {
    type Target = dyn DirtySource;

    fn deref(&self) -> &Self::Target {
        &**self.source
    }
}

impl Drop for Source {
    fn drop(&mut self) {
        // SAFETY: taken only here, and `source` is used no more.
        let source = unsafe { ManuallyDrop::take(&mut self.source) };
        self.retired.take_over(source);
    }
}
