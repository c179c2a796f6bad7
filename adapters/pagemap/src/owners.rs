//! Which tracker a range of this process's memory belongs to.
//!
//! The kernel gives each mapping to one userfaultfd, but a scan does not ask to which: a tracker
//! whose memory was unmapped would scan, and protect, what another tracker has at the same
//! addresses by now. So each process has a list of what its trackers have. Memory that the kernel
//! lets a tracker register belongs to no other one: what the list has at its addresses is taken
//! over.

use std::collections::BTreeMap;
use std::io;

use super::memory::Memory;
use dirtymap::Iova;
use dirtymap::sync::{Arc, AtomicPtr, Mutex, Ordering, lock};
use dirtymap_host::Maker;

/// What all trackers of a process have. The lock is held over each call that gives memory to a
/// tracker or takes it away, and comes before that of a [`Memory`].
pub(super) struct Owners {
    maker: Maker,
    /// By first address in this process. No two have an address in common.
    list: Mutex<BTreeMap<Iova, Arc<Memory>>>,
}

impl Owners {
    /// # Errors
    /// Those of [`Maker::new`].
    pub(super) fn new() -> io::Result<Self> {
        Ok(Owners {
            maker: Maker::new()?,
            list: Mutex::default(),
        })
    }

    /// Lists `new`, when `register` has given it its memory, and ends what had it before.
    pub(super) fn give<E>(
        &self,
        new: &Arc<Memory>,
        register: impl FnOnce() -> Result<(), E>,
    ) -> Result<(), E> {
        let mut list = lock(&self.list);
        register()?;
        // The last one that begins below the end of the new one is the last one that can meet it.
        let (first, last) = new.place();
        while let Some((&place, old)) = list.range(..=last).next_back()
            && old.place().1 >= first
        {
            old.lose();
            list.remove(&place);
        }
        list.insert(first, Arc::clone(new));
        Ok(())
    }

    /// Takes `memory` off the list, and calls `release` if it was there.
    pub(super) fn take_back(&self, memory: &Memory, release: impl FnOnce()) {
        let mut list = lock(&self.list);
        let (place, _) = memory.place();
        let listed = list.get(&place);
        if listed.is_some_and(|other| std::ptr::eq(&**other, memory)) {
            list.remove(&place);
            release();
        }
    }
}

/// The list of this process.
static OWNERS: AtomicPtr<Owners> = AtomicPtr::new(std::ptr::null_mut());

/// The list of this process, which lives as long as it. A child of `fork` has one of its own: it
/// has none of the memory of its parent, and the lock may be held for ever by a thread of that.
///
/// # Errors
/// Those of [`Owners::new`].
pub(super) fn of_this_process() -> io::Result<&'static Owners> {
    // Acquire: pairs with the Release of the exchange below; what it published is initialized.
    let found = OWNERS.load(Ordering::Acquire);
    // SAFETY: null, or a list that is never freed.
    if let Some(owners) = unsafe { found.as_ref() }
        && owners.maker.of_another_process().is_none()
    {
        return Ok(owners);
    }
    let new = Box::into_raw(Box::new(Owners::new()?));
    // Release: pairs with the two Acquires; a thread that finds this list finds it initialized.
    // Acquire on failure: the other thread's list, which this one then uses.
    match OWNERS.compare_exchange(found, new, Ordering::Release, Ordering::Acquire) {
        // SAFETY: this thread published it, and it is never freed.
        Ok(_) => Ok(unsafe { &*new }),
        Err(first) => {
            // SAFETY: from the Box above, and no other thread has seen it.
            drop(unsafe { Box::from_raw(new) });
            // SAFETY: not null, as the exchange found it changed, and never freed.
            Ok(unsafe { &*first })
        }
    }
}
