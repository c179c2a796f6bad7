//! What can be dirty: the trait of a dirty source, and software marks.
//!
//! The core knows no hardware. An IO page table with its IOTLBs is a source, a kernel interface would be another;
//! marks by CPU threads are kept by the address space itself and join the same harvest and the same flush.

mod gone;
mod in_flight;
#[cfg(not(any(dirtymap_loom, dirtymap_shuttle)))]
#[allow(clippy::panic)] // a test kit says by a panic what is wrong
pub mod kit;
mod leaf_sink;
mod marks;
mod ordering;
#[cfg_attr(dirtymap_loom, expect(dead_code))] // its users are unknown to the model checker
pub(crate) mod pending;
#[cfg(not(dirtymap_loom))]
mod pulled;
mod shared;

#[cfg(all(test, dirtymap_loom))]
#[allow(clippy::unwrap_used)] // helpers of tests
mod loom_tests;

pub(crate) use in_flight::{InFlight, Slot};
pub(crate) use leaf_sink::Rests;
pub use leaf_sink::{LeafSink, ToClear};
pub(crate) use marks::{Marks, NearMarks};
pub use ordering::MarkOrdering;
#[cfg(not(dirtymap_loom))]
pub use pulled::PulledLog;
pub use shared::SharedLog;

use crate::bitmap::Sink;
use crate::error::Error;
use crate::flush::{FlushCost, FlushGather, Invalidated};
use crate::sync::Arc;
use crate::units::{Access, Granule, Iova, IovaRange};

/// What an address space asks a source to translate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mapping {
    /// The device-visible addresses.
    pub range: IovaRange,
    /// Where the range begins in the memory behind it, in bytes.
    pub backing: u64,
    /// What devices may do.
    pub access: Access,
}

/// A source stopped inside the range it was given.
#[derive(Debug)]
pub struct Stopped {
    /// The first address that was not processed. Everything below it was; nothing from it on was touched.
    pub at: Iova,
    /// Why.
    pub error: Error,
}

/// Whether a source is to track writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tracking {
    /// Every write is reported.
    On,
    /// Nothing need be reported.
    Off,
}

impl Tracking {
    /// Whether it is [`Tracking::On`].
    pub const fn is_on(self) -> bool {
        matches!(self, Tracking::On)
    }
}

/// Something that knows which of its memory was written.
///
/// All methods take `&self` and may be called by many threads at once, on overlapping ranges too.
///
/// # What an implementation owes
/// * **A dirty bit is cleared only by the closure of [`LeafSink::take`]** or
///   [`take_many`](LeafSink::take_many), which record the leaf and owe its invalidation first, and
///   by one atomic operation for each leaf, from whose result follows whether it was dirty.
/// * **Or by a batch, behind [`LeafSink::take_run`]**: exactly what its answer names, before
///   `read_and_clear` returns. A closure that says "cleared" and clears later loses writes: the
///   rest of a page that sticks out of the request is given to others when it returns.
/// * **No waiting** in `read_and_clear` and `peek`: not for devices, not for `map` and `unmap`, not for each other.
/// * **No way back**: no method calls into the address space that the source is attached to, except to look.
///
/// # Panics
/// A method that panics is a method that failed, at the worst moment: the space takes for granted
/// that it has done a part of its work and told nobody. The panic goes on to the caller of the
/// space, when all has been cleaned up as after an error.
/// * `map`: the range may be mapped in part, and is [unmapped](Self::unmap) again.
/// * `unmap`: all of the range is dirty, all of it is owed an invalidation, and it is asked again
///   before its addresses are free.
/// * `split_at`: the same of all of the area, which stays whole.
/// * `set_tracking`: tracking is in doubt, so the next switch asks again, whichever way.
/// * `read_and_clear`: the harvest is aborted; what it had recorded is dirty. `peek`: nothing was
///   changed.
/// * `invalidate`: all of the gather stays owed.
///
/// While a panic is cleaned up, other methods are called, on this source too. One that panics then
/// is cleaned up after in the same way; the first panic goes on.
///
/// # Drop
/// A space drops a source without a lock of its own, some calls after its detach: at the beginning
/// of a call that changes areas, domains, tracking or reserved ranges, before that has done
/// anything; in [`reclaim`](crate::AddressSpace::reclaim); in an attach that failed; or with the
/// space. So `Drop` may call anything of the space. If it panics, that call panics, when the others
/// have been dropped. A source that something outlives the space with is dropped by that, on any
/// thread: garbage of the space, an [`AreaHandle`](crate::AreaHandle). It must not wait then, and
/// its panic goes to nobody.
pub trait DirtySource: Send + Sync {
    /// The smallest page: what it maps starts and ends at multiples of it, in device addresses and
    /// in memory. While the source is attached, no area is finer. One byte, the default, asks for
    /// nothing. Asked once, when it is attached.
    fn page(&self) -> Granule {
        Granule::BYTE
    }

    /// What tells this source from others, so that it is not attached twice; `None`, the default,
    /// if that cannot be told. A source that is shared by [`Arc`] is told by its address. Asked
    /// once, when it is attached.
    fn identity(&self) -> Option<usize> {
        None
    }

    /// Lets devices reach `mapping`. It starts out clean. Nothing else is mapped in its range.
    /// The default is for a source that translates nothing: a log that someone else keeps.
    ///
    /// # Errors
    /// If the source cannot express the mapping; then nothing is changed.
    fn map(&self, mapping: &Mapping) -> Result<(), Error> {
        let _ = mapping;
        Ok(())
    }

    /// Ends the translations of `range`, and adds to `gather` what must be invalidated before it is certain that no
    /// device reaches the memory any more. Calls `dirty` for each leaf that was dirty when it went.
    ///
    /// `range` is that of one earlier `map`, which may have been refused or unmapped before, at least in part: there
    /// is nothing to do then. Or it is a part of it that begins and ends where [`split_at`](Self::split_at) succeeded.
    ///
    /// The dirty bit is read by the operation that ends the translation, so that no write comes between the two.
    ///
    /// The default calls all of `range` dirty, because a source that does not say what was written
    /// may have seen a write to any page of it.
    fn unmap(&self, range: IovaRange, gather: &mut FlushGather, dirty: &mut dyn FnMut(IovaRange)) {
        let _ = gather;
        dirty(range);
    }

    /// Sees to it that no leaf maps both sides of `at`, so that what lies below and what begins there can be unmapped
    /// apart. What devices may reach does not change, and what is dirty stays dirty, a superset of it after a leaf
    /// was split. Adds to `gather` the translations of the old size that devices may have cached.
    ///
    /// # Errors
    /// If the source cannot; then nothing is changed. The default cannot.
    fn split_at(&self, at: Iova, gather: &mut FlushGather) -> Result<(), Error> {
        let _ = gather;
        Err(Error::CannotSplit { at })
    }

    /// Switches tracking. [`Tracking::On`]: leaves that are dirty become clean, and every write that
    /// begins after the return is reported; twice on changes nothing and keeps what is dirty.
    /// [`Tracking::Off`]: what is dirty stays for a last harvest. May wait for devices.
    ///
    /// # Errors
    /// If the source cannot; then the old state stays.
    fn set_tracking(&self, to: Tracking) -> Result<(), Error>;

    /// Hands every dirty leaf that `range` touches to `out`, in ascending order, by
    /// [`LeafSink::take`], [`take_many`](LeafSink::take_many) or [`take_run`](LeafSink::take_run).
    /// Addresses without a translation are skipped. `range` need not be made of whole pages of this
    /// source.
    ///
    /// # Errors
    /// [`Stopped`] with the first address that was not processed.
    fn read_and_clear(&self, range: IovaRange, out: &mut LeafSink<'_, '_>) -> Result<(), Stopped>;

    /// Records the dirty state of `range` and changes nothing.
    ///
    /// # Errors
    /// [`Stopped`] with the first address that was not processed.
    fn peek(&self, range: IovaRange, sink: &mut Sink<'_>) -> Result<(), Stopped>;

    /// Invalidates what `gather` names, and returns when every device has dropped its cached translations of it
    /// **and** the writes that were already translated have landed in memory. Waits for devices.
    ///
    /// The default is for a source whose devices cache nothing: a bit that it clears is set again by
    /// the very next write.
    ///
    /// # Errors
    /// If that cannot be promised; the gather then stays owed.
    fn invalidate(&self, gather: &FlushGather) -> Result<Invalidated, Error> {
        let _ = gather;
        Ok(Invalidated::default())
    }

    /// What invalidations cost here. When all sources of a space together would spend more on the ranges of a gather
    /// than on everything, they are asked for everything: a gather that [is full](FlushGather::is_full). Asked once,
    /// when the source is attached. By default nothing is declared, and ranges are asked for.
    fn flush_cost(&self) -> FlushCost {
        FlushCost::default()
    }
}

/// A shared source is a source.
impl<T: DirtySource + ?Sized> DirtySource for Arc<T> {
    fn page(&self) -> Granule {
        (**self).page()
    }

    fn identity(&self) -> Option<usize> {
        Some(Arc::as_ptr(self).cast::<()>().addr())
    }

    fn map(&self, mapping: &Mapping) -> Result<(), Error> {
        (**self).map(mapping)
    }

    fn unmap(&self, range: IovaRange, gather: &mut FlushGather, dirty: &mut dyn FnMut(IovaRange)) {
        (**self).unmap(range, gather, dirty)
    }

    fn split_at(&self, at: Iova, gather: &mut FlushGather) -> Result<(), Error> {
        (**self).split_at(at, gather)
    }

    fn set_tracking(&self, to: Tracking) -> Result<(), Error> {
        (**self).set_tracking(to)
    }

    fn read_and_clear(&self, range: IovaRange, out: &mut LeafSink<'_, '_>) -> Result<(), Stopped> {
        (**self).read_and_clear(range, out)
    }

    fn peek(&self, range: IovaRange, sink: &mut Sink<'_>) -> Result<(), Stopped> {
        (**self).peek(range, sink)
    }

    fn invalidate(&self, gather: &FlushGather) -> Result<Invalidated, Error> {
        (**self).invalidate(gather)
    }

    fn flush_cost(&self) -> FlushCost {
        (**self).flush_cost()
    }
}
