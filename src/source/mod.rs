//! The trait of a source of dirty state, its sink, and logs of other programs.
//!
//! The core contains no hardware. An IO page table with its IOTLBs is a source, and so is a kernel
//! interface. Marks by CPU threads belong to the address space itself, and take part in the same
//! harvest and the same flush.

mod leaf_sink;
pub(crate) mod pending;
pub(crate) mod placed;
#[cfg(not(dirtymap_loom))]
mod pulled;
mod shared;

#[cfg(all(test, dirtymap_loom))]
#[allow(clippy::unwrap_used)] // helpers of tests
mod loom_tests;

pub use crate::bitmap::Sink;
pub use crate::error::Stopped;
pub use crate::flush::{FlushCost, FlushGather, Invalidated, Leaves};
pub(crate) use leaf_sink::Rests;
pub use leaf_sink::{LeafSink, ToClear};
#[cfg(not(dirtymap_loom))]
pub use pulled::PulledLog;
pub use shared::SharedLog;

use crate::error::Error;
use crate::sync::Arc;
use crate::units::{Access, Granule, Iova, IovaRange};

/// A range that an address space asks a source to translate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mapping {
    /// The device-visible addresses.
    pub range: IovaRange,
    /// The backing address: where the range begins in the memory that it maps to, in bytes.
    pub backing: u64,
    /// What devices may do with the memory.
    pub access: Access,
}

impl Mapping {
    /// The backing addresses of all of the range.
    ///
    /// ```
    /// use dirtymap::{Access, AddressSpace, Granule, ToIovaRange};
    ///
    /// # fn main() -> Result<(), dirtymap::Error> {
    /// let space = AddressSpace::tracked(Granule::K4);
    /// space.map(0xf000_0000..0xf000_4000, 0x5000, Access::ReadWrite)?;
    /// let area = space.mappings()[0];
    /// assert_eq!(area.backing_range()?, (0x5000..0x9000).to_iova_range()?);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`Error::BackingWraps`] if they go past the last address. No area of a space has such
    /// addresses.
    pub fn backing_range(&self) -> Result<IovaRange, Error> {
        let first = Iova::new(self.backing);
        let len = self.range.last().get() - self.range.start().get();
        let last = first.checked_add(len).ok_or(Error::BackingWraps {
            backing: self.backing,
            range: self.range,
        })?;
        Ok(IovaRange::ascending(first, last))
    }
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
/// All methods take `&self`. Many threads may call them at once, on overlapping ranges too. The
/// operations are those of Linux's `iommu_dirty_ops` and `iommu_domain_ops`.
///
/// # What an implementation guarantees
/// * **A dirty bit is cleared only by the closure of [`LeafSink::take`]** or
///   [`take_many`](LeafSink::take_many), which record the leaf and owe its invalidation first. The
///   closure clears each leaf by one atomic operation, whose result says whether the leaf was
///   dirty.
/// * **Or by a batch, after [`LeafSink::take_run`]**: exactly the pages that its answer names,
///   before `read_and_clear` returns. A closure that returns before it has cleared loses writes,
///   because other harvests may take the rest of a partly covered page as soon as the closure
///   returns.
/// * **No waiting** in `read_and_clear` and `peek`: not for devices, not for `map` and `unmap`, not
///   for each other.
/// * **No call back**: no method calls into the address space of the source, except for lookups.
///
/// # Panics
/// A panic counts as a failure at the worst moment: the space assumes that the method did a part of
/// its work and reported none of it. First the space cleans up as after an error; then the panic
/// goes on to the caller of the space.
/// * `map`: the range may be mapped in part, and is [unmapped](Self::unmap) again.
/// * `unmap`: all of the range counts as dirty and is owed an invalidation. The space calls `unmap`
///   for it again before its addresses become free.
/// * `split_at`: all of the area counts as dirty and is owed an invalidation. The area stays whole.
/// * `set_tracking`: tracking is in doubt, so the next switch calls it again, for on and for off.
/// * `read_and_clear`: the harvest is aborted, and the pages that it had recorded are dirty again.
/// * `peek`: nothing was changed.
/// * `invalidate`: all of the gather stays owed.
///
/// While a panic is cleaned up, other methods are called, on this source too. If one of them panics
/// as well, it is handled in the same way, and the first panic goes on to the caller.
///
/// # Drop
/// A space drops a source while it holds no lock of its own. This happens some calls after the
/// detach: at the beginning of a call that changes areas, domains, tracking or reserved ranges,
/// before that call has done anything; in [`reclaim`](crate::AddressSpace::reclaim); in an attach
/// that failed; or together with the space. So `Drop` may call any method of the space. If it
/// panics, that call panics after the other sources have been dropped.
///
/// Garbage of the space, such as an old list of its domains, may outlive the space and hold the
/// last count of a source. Then the source is dropped with it, on any thread. In that case `Drop`
/// must not wait, and its panic is discarded.
#[doc(alias = "iommu_dirty_ops")]
#[doc(alias = "iommu_domain_ops")]
pub trait DirtySource: Send + Sync {
    /// The smallest page in bytes. Every range that is mapped starts and ends at multiples of it,
    /// both in device addresses and in backing addresses. While the source is attached, no area has
    /// finer borders. One byte, the default, sets no condition. Called once, by the attach.
    fn page(&self) -> Granule {
        Granule::BYTE
    }

    /// A number that tells this source from others, so that it is not attached twice; `None`, the
    /// default, if there is none. A source that is shared by [`Arc`] is told by its address. Called
    /// once, by the attach.
    fn identity(&self) -> Option<usize> {
        None
    }

    /// Lets devices reach `mapping`, which starts out clean. Nothing else is mapped in its range.
    /// The default is for a source that translates nothing, such as a log of another program.
    ///
    /// # Errors
    /// If the source cannot express the mapping; then nothing is changed.
    fn map(&self, mapping: &Mapping) -> Result<(), Error> {
        let _ = mapping;
        Ok(())
    }

    /// Ends the translations of `range`, and adds to `gather` the invalidations after which no
    /// device can reach the memory any more. Calls `dirty` with each leaf that was dirty when its
    /// translation ended.
    ///
    /// `range` is that of one earlier `map`, or a part of it that begins and ends where
    /// [`split_at`](Self::split_at) succeeded. That `map` may have been refused, or the range may
    /// have been unmapped already, in whole or in part; where nothing is mapped there is nothing to
    /// do.
    ///
    /// The operation that ends a translation also reads its dirty bit, so no write can come between
    /// the two.
    ///
    /// The default reports all of `range` as dirty, because a source that does not report may have
    /// seen a write to any page of it.
    fn unmap(&self, range: IovaRange, gather: &mut FlushGather, dirty: &mut dyn FnMut(IovaRange)) {
        let _ = gather;
        dirty(range);
    }

    /// Splits any leaf that spans `at`, so that the addresses below `at` and those from `at` on can
    /// be unmapped separately. Devices reach the same memory as before. Dirty pages stay dirty;
    /// after a split of a dirty leaf, all pages of the leaf may be dirty. Adds to `gather` the
    /// translations of the old size that devices may have cached.
    ///
    /// # Errors
    /// If the source cannot split; then nothing is changed. The default returns
    /// [`Error::CannotSplit`].
    fn split_at(&self, at: Iova, gather: &mut FlushGather) -> Result<(), Error> {
        let _ = gather;
        Err(Error::CannotSplit { at })
    }

    /// Switches tracking. [`Tracking::On`]: all leaves become clean, and every write that begins
    /// after the return is reported. A second "on" changes nothing and leaves dirty pages dirty.
    /// [`Tracking::Off`]: dirty pages stay dirty for a last harvest. May wait for devices.
    ///
    /// # Errors
    /// If the source cannot switch; then the old state stays.
    #[doc(alias = "set_dirty_tracking")]
    fn set_tracking(&self, to: Tracking) -> Result<(), Error>;

    /// Passes every dirty leaf that `range` touches to `out`, in ascending order, by
    /// [`LeafSink::take`], [`take_many`](LeafSink::take_many) or [`take_run`](LeafSink::take_run).
    /// Skips addresses without a translation. `range` may begin and end inside a page of this
    /// source. Must not wait.
    ///
    /// # Errors
    /// [`Stopped`] with the first address that was not processed.
    #[doc(alias = "read_and_clear_dirty")]
    #[doc(alias = "KVM_GET_DIRTY_LOG")]
    fn read_and_clear(&self, range: IovaRange, out: &mut LeafSink<'_, '_>) -> Result<(), Stopped>;

    /// Records the dirty state of `range` in `sink` and changes nothing. Must not wait.
    ///
    /// # Errors
    /// [`Stopped`] with the first address that was not processed.
    fn peek(&self, range: IovaRange, sink: &mut Sink<'_>) -> Result<(), Stopped>;

    /// Invalidates the ranges of `gather`, and returns after every device has dropped its cached
    /// translations of them **and** the writes that were already translated have landed in memory.
    /// Waits for devices.
    ///
    /// The default is for a source whose devices cache nothing: a bit that it clears is set again
    /// by the very next write.
    ///
    /// # Errors
    /// If the source cannot do that. The gather then stays owed.
    #[doc(alias = "iotlb_sync")]
    fn invalidate(&self, gather: &FlushGather) -> Result<Invalidated, Error> {
        let _ = gather;
        Ok(Invalidated::default())
    }

    /// The cost of invalidations. When the ranges of a gather would cost all sources of a space
    /// together more than a full invalidation, the space asks for a full one: a gather that [is
    /// full](FlushGather::is_full). Called once, by the attach. The default declares no cost, and
    /// is always asked for ranges.
    fn flush_cost(&self) -> FlushCost {
        FlushCost::default()
    }
}

/// A source that is shared by [`Arc`] is a source, too.
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
