//! What a space tells a subscriber of `tracing`: one function for each event, all with the target `dirtymap`.
//!
//! Without the feature `tracing` they do nothing. With it and without a subscriber each is one look at a static; none is on the
//! path of a mark or inside a walk. Events come when the step is done, so a subscriber that panics loses nothing. Some come
//! under locks of the space: a subscriber must not call what waits.

use crate::error::Error;
use crate::flush::FlushGather;
use crate::harvest::{Aborted, HarvestReport};
use crate::space::Unmapped;
use crate::units::{DomainId, Granule, Iova, IovaRange};

/// An event with fields that are displayed, and then fields that are numbers or booleans.
#[cfg(all(feature = "tracing", not(dirtymap_loom)))]
macro_rules! event {
    ($level:ident $name:literal, {$($shown:ident = $show:expr),*}, {$($field:ident = $value:expr),*}) => {
        tell(|| tracing::event!(
            target: "dirtymap",
            tracing::Level::$level,
            { $($shown = %$show,)* $($field = $value,)* },
            $name
        ))
    };
}

/// Tells a subscriber, whose panic goes on; but not out of a destructor while another one goes by,
/// where it would end the process.
#[cfg(all(feature = "tracing", not(dirtymap_loom)))]
#[inline]
fn tell(event: impl FnOnce()) {
    if !std::thread::panicking() {
        event();
    } else if let Err(panic) = crate::failure::call(event) {
        crate::failure::forget(panic);
    }
}

/// Nothing: the arguments count as used.
#[cfg(not(all(feature = "tracing", not(dirtymap_loom))))]
macro_rules! event {
    ($level:ident $name:literal, {$($shown:ident = $show:expr),*}, {$($field:ident = $value:expr),*}) => {{
        $(let _ = &$show;)*
        $(let _ = &$value;)*
    }};
}

/// A walk is over: its lease has what was dirty in `range`, which ends below `stopped_at` if it
/// stopped; all of the request if that is where it began.
#[inline]
pub(crate) fn harvest(
    range: IovaRange,
    granule: Granule,
    report: &HarvestReport,
    stopped_at: Option<Iova>,
) {
    event!(DEBUG "harvest", {range = range, granule = granule}, {
        areas = report.areas,
        bits = report.bits_set,
        windows = report.windows,
        leaves = report.leaves,
        stopped_at = stopped_at.map(Iova::get)
    });
}

/// The flush of a lease over `range`, which owed `gather`, was waited for.
#[inline]
pub(crate) fn sync(range: IovaRange, gather: &FlushGather, ok: bool) {
    event!(DEBUG "sync", {range = range}, {
        ranges = gather.ranges().len(),
        entries = gather.entries(),
        ok = ok
    });
}

/// A lease over `range` was committed, `bytes` of it by this call.
#[inline]
pub(crate) fn commit(range: IovaRange, bytes: u64) {
    event!(DEBUG "commit", {range = range}, {bytes = bytes});
}

/// The part `range` of a lease was committed.
#[inline]
pub(crate) fn commit_part(range: IovaRange, bytes: u64) {
    event!(DEBUG "commit part", {range = range}, {bytes = bytes});
}

/// A lease over `range` was aborted or dropped.
#[inline]
pub(crate) fn abort(range: IovaRange, aborted: &Aborted) {
    event!(DEBUG "abort", {range = range}, {
        bytes = aborted.bytes,
        outside = aborted.outside_bytes
    });
}

/// `range` is mapped.
#[inline]
pub(crate) fn map(range: IovaRange, backing: u64) {
    event!(DEBUG "map", {range = range}, {backing = backing});
}

/// All areas in `range` are unmapped.
#[inline]
pub(crate) fn unmap(range: IovaRange, unmapped: &Unmapped) {
    event!(DEBUG "unmap", {range = range}, {
        areas = unmapped.areas,
        bytes = unmapped.bytes,
        dirty = unmapped.dirty_bytes,
        discarded = unmapped.discarded_bytes
    });
}

/// A batch of `changes` took effect.
#[inline]
pub(crate) fn batch(changes: usize, unmapped: &Unmapped) {
    event!(DEBUG "batch", {}, {
        changes = changes,
        areas = unmapped.areas,
        bytes = unmapped.bytes,
        discarded = unmapped.discarded_bytes
    });
}

/// An area was cut in two.
#[inline]
pub(crate) fn cut(at: Iova) {
    event!(DEBUG "cut", {at = at}, {});
}

/// `domain` is attached and filled.
#[inline]
pub(crate) fn attach(domain: DomainId, page: Granule) {
    event!(INFO "attach", {domain = domain, page = page}, {});
}

/// `domain` is detached.
#[inline]
pub(crate) fn detach(domain: DomainId) {
    event!(INFO "detach", {domain = domain}, {});
}

/// The space is switched.
#[inline]
pub(crate) fn tracking(on: bool) {
    event!(INFO "tracking", {}, {on = on});
}

/// One domain is switched.
#[inline]
pub(crate) fn domain_tracking(domain: DomainId, on: bool) {
    event!(INFO "tracking", {domain = domain}, {on = on});
}

/// A source could not flush; what was owed stays owed.
#[inline]
pub(crate) fn flush_failed(error: &Error) {
    event!(WARN "flush failed", {error = error}, {});
}
