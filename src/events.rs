//! The events of a space for a subscriber of `tracing`: one function for each event, all with the
//! target `dirtymap`.
//!
//! Without the feature `tracing` they do nothing. With it and without a subscriber, each costs one
//! load of a static. None is on the path of a mark or inside a walk. An event follows the step that
//! it reports, so a subscriber that panics loses nothing. Some events are sent under locks of the
//! space: a subscriber must not call any method that waits.

use crate::error::Error;
use crate::report::{Aborted, HarvestReport, Unmapped};
use crate::units::{DomainId, Granule, Iova, IovaRange};

/// An event, first with the fields that are displayed, and then with those that are numbers or
/// booleans.
#[cfg(all(feature = "tracing", not(dirtymap_loom)))]
macro_rules! event {
    (
        $level:ident $name:literal,
        {$($shown:ident = $show:expr),*},
        {$($field:ident = $value:expr),*}
    ) => {
        tell(|| tracing::event!(
            target: "dirtymap",
            tracing::Level::$level,
            { $($shown = %$show,)* $($field = $value,)* },
            $name
        ))
    };
}

/// Calls a subscriber. Its panic goes on, except in a destructor that runs during unwinding, where
/// it would abort the process.
#[cfg(all(feature = "tracing", not(dirtymap_loom)))]
#[inline]
fn tell(event: impl FnOnce()) {
    if !std::thread::panicking() {
        event();
    } else if let Err(panic) = crate::failure::call(event) {
        crate::failure::forget(panic);
    }
}

/// Does nothing; the arguments count as used.
#[cfg(not(all(feature = "tracing", not(dirtymap_loom))))]
macro_rules! event {
    (
        $level:ident $name:literal,
        {$($shown:ident = $show:expr),*},
        {$($field:ident = $value:expr),*}
    ) => {{
        $(let _ = &$show;)*
        $(let _ = &$value;)*
    }};
}

/// A walk has ended. Its lease holds the dirty pages of `range`. A partial scan ends below
/// `stopped_at`; if it stopped at the very beginning, `range` is that of the whole request.
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

/// The flush of a lease over `range`, which owed `entries` invalidations in `ranges` ranges, has
/// ended; `ok` says whether it succeeded.
#[inline]
pub(crate) fn sync(range: IovaRange, (ranges, entries): (usize, u64), ok: bool) {
    event!(DEBUG "sync", {range = range}, {
        ranges = ranges,
        entries = entries,
        ok = ok
    });
}

/// A lease over `range` was committed; this call committed `bytes` of it.
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

/// Tracking was switched in the whole space.
#[inline]
pub(crate) fn tracking(on: bool) {
    event!(INFO "tracking", {}, {on = on});
}

/// Tracking was switched in one domain.
#[inline]
pub(crate) fn domain_tracking(domain: DomainId, on: bool) {
    event!(INFO "tracking", {domain = domain}, {on = on});
}

/// A source could not flush; its debt stays owed.
#[inline]
pub(crate) fn flush_failed(error: &Error) {
    event!(WARN "flush failed", {error = error}, {});
}
