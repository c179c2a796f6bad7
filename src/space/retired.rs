//! Sources of detached domains, which wait to be dropped at a moment when no lock is held.
//!
//! A source is a user's value: its destructor may call its space, wait, or panic. But the last
//! count of a domain may be dropped in many places: with rules that an update of the tree replaced,
//! with a lease, with the list that a flush used, under any lock of the space, or in the middle of
//! an update. So a domain whose last count is dropped only hands its source over. The next call
//! that changes the space begins by dropping the sources that were handed over, before it takes a
//! lock or does anything that a panic would have to undo. [`reclaim`](super::AddressSpace::reclaim)
//! and a refused attach drop them before they return.

use std::mem::ManuallyDrop;
use std::ops::Deref;

use crate::failure::{call, forget, go_on, keep_first};
use crate::source::DirtySource;
use crate::sync::{Arc, InnerLock, lock_inner};

/// Where the domains of one space hand their sources over.
#[derive(Clone)]
pub(super) struct Retired(Arc<InnerLock<Left>>);

#[derive(Default)]
struct Left {
    sources: Vec<Box<dyn DirtySource>>,
    /// A thread is dropping sources, and will look here again before it stops.
    dropping: bool,
    /// The space has been dropped, and so have all of its locks.
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
        // This may run in any code that drops a last count, such as the cleanup of the tree's
        // garbage by any thread: its panic would end the work of other calls.
        if let Err(panic) = call(|| drop(source)) {
            forget(panic);
        }
    }

    /// Drops all sources that were taken over, even if some panic. The caller holds no lock of the
    /// space. If another thread is doing so already, leaves them to it; that thread may be this
    /// one, in the destructor of a source.
    ///
    /// # Panics
    /// With the first panic of a source, unless this thread is panicking already.
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

/// The space's own handle. It is dropped with the space, after every other field.
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

/// The source of a domain. It is handed over when the domain is dropped.
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
        // SAFETY: taken only here, and `source` is not used again.
        let source = unsafe { ManuallyDrop::take(&mut self.source) };
        self.retired.take_over(source);
    }
}
