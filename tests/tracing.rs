//! The events of `tracing` in a round, and in a round that fails.
#![cfg(all(feature = "tracing", not(dirtymap_loom)))]
#![allow(clippy::unwrap_used)] // helpers of tests

mod common;

use std::fmt::{Debug, Write};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use common::{Fake, pages};
use dirtymap::{Access, AddressSpace, Change, Granule, HarvestRequest, UserBitmap};
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Metadata, Subscriber};

/// Keeps a line for each event: its level, message, and fields.
#[derive(Clone, Default)]
struct Lines(Arc<Mutex<Vec<String>>>);

impl Lines {
    /// The lines since the last call.
    fn take(&self) -> Vec<String> {
        std::mem::take(&mut *self.0.lock().unwrap())
    }
}

impl Subscriber for Lines {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.target() == "dirtymap"
    }

    fn event(&self, event: &Event<'_>) {
        let mut line = Line::default();
        event.record(&mut line);
        let level = event.metadata().level();
        let line = format!("{level} {}{}", line.message, line.fields);
        self.0.lock().unwrap().push(line);
    }

    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}
    fn record_follows_from(&self, _: &Id, _: &Id) {}
    fn enter(&self, _: &Id) {}
    fn exit(&self, _: &Id) {}
}

#[derive(Default)]
struct Line {
    message: String,
    fields: String,
}

impl Visit for Line {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        if field.name() == "message" {
            write!(self.message, "{value:?}").unwrap();
        } else {
            write!(self.fields, " {}={value:?}", field.name()).unwrap();
        }
    }
}

/// One test at a time: `tracing` remembers for each place of the code whether a subscriber wants
/// its events. A place that is reached for the first time while another thread installs a
/// subscriber may be remembered as one that nobody wants.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Runs `work` with access to the lines of its events.
fn watched(work: impl FnOnce(&Lines)) {
    let _alone = alone();
    let lines = Lines::default();
    tracing::subscriber::with_default(lines.clone(), || work(&lines));
}

#[test]
fn events_of_a_round_come_in_order() {
    watched(|lines| {
        let fake = Arc::new(Fake::default());
        let space = AddressSpace::new(Granule::K4);
        let domain = space.attach(fake.clone()).unwrap();
        space.map(pages(16, 8), 0, Access::ReadWrite).unwrap();
        space.start_tracking().unwrap();
        assert_eq!(
            lines.take(),
            [
                format!("INFO attach domain={domain} page={}", Granule::BYTE),
                format!("DEBUG map range={} backing=0", pages(16, 8)),
                "INFO tracking on=true".into(),
            ]
        );

        fake.dirty(17);
        space.mark(pages(20, 2)).unwrap();
        assert_eq!(lines.take(), [""; 0], "marks and writes are silent");

        let mut words = [0];
        let request = HarvestRequest::new(pages(16, 8), Granule::K4);
        let lease = space.harvest(&request, UserBitmap::new(&mut words));
        let lease = lease.unwrap().sync().unwrap();
        lease.commit_range(pages(16, 2));
        lease.commit();
        let range = pages(16, 8);
        assert_eq!(
            lines.take(),
            [
                format!(
                    "DEBUG harvest range={range} granule=4 KiB areas=1 bits=3 windows=1 leaves=1"
                ),
                format!("DEBUG sync range={range} ranges=1 entries=1 ok=true"),
                format!("DEBUG commit part range={} bytes=4096", pages(16, 2)),
                format!("DEBUG commit range={range} bytes=8192"),
            ]
        );
        let stats = space.stats();
        assert_eq!((stats.harvests, stats.commits, stats.aborts), (1, 1, 0));

        space.cut(pages(20, 1).start()).unwrap();
        space.cut(pages(20, 1).start()).unwrap();
        space.mark(pages(16, 1)).unwrap();
        space.unmap_discarding(pages(16, 4)).unwrap();
        let again = Change::Unmap {
            range: pages(20, 4),
        };
        space.apply(&[again]).unwrap();
        space.stop_domain_tracking(domain).unwrap();
        space.detach(domain).unwrap();
        space.stop_tracking().unwrap();
        assert_eq!(
            lines.take(),
            [
                format!("DEBUG cut at={}", pages(20, 1).start()),
                format!(
                    "DEBUG unmap range={} areas=1 bytes=16384 dirty=0 discarded=4096",
                    pages(16, 4)
                ),
                "DEBUG batch changes=1 areas=1 bytes=16384 discarded=0".into(),
                format!("INFO tracking domain={domain} on=false"),
                format!("INFO detach domain={domain}"),
                "INFO tracking on=false".into(),
            ]
        );
    });
}

#[test]
fn what_goes_wrong_is_told() {
    watched(|lines| {
        let fake = Arc::new(Fake::default());
        let space = AddressSpace::with_source(Granule::K4, fake.clone()).unwrap();
        space.map(pages(0, 4), 0, Access::ReadWrite).unwrap();
        space.start_tracking().unwrap();
        fake.dirty(1);
        fake.0.lock().unwrap().fail_invalidations = 1;
        lines.take();

        // The request reaches past the end of the area.
        let mut words = [0];
        let request = HarvestRequest::new(pages(0, 8), Granule::K4);
        let request = request.holes(dirtymap::Holes::Stop);
        let lease = space.harvest(&request, UserBitmap::new(&mut words));
        let lease = lease.unwrap();
        assert!(lease.stopped().is_some());
        drop(lease.partial().sync().unwrap_err());
        // The range of the lease, which ends below the stop.
        let range = pages(0, 4);
        let seen = lines.take();
        assert_eq!(seen.len(), 4, "{seen:?}");
        assert_eq!(
            seen[0],
            format!(
                "DEBUG harvest range={range} granule=4 KiB areas=1 bits=1 windows=1 leaves=1 \
                 stopped_at=16384"
            )
        );
        assert!(seen[1].starts_with("WARN flush failed error="), "{seen:?}");
        assert_eq!(
            seen[2],
            format!("DEBUG sync range={range} ranges=1 entries=1 ok=false")
        );
        assert_eq!(
            seen[3],
            format!("DEBUG abort range={range} bytes=4096 outside=0")
        );
        let stats = space.stats();
        assert_eq!((stats.harvests, stats.commits, stats.aborts), (1, 0, 1));
    });
}

/// A subscriber that panics at each event, silently.
struct Panics;

impl Subscriber for Panics {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.target() == "dirtymap"
    }

    fn event(&self, _: &Event<'_>) {
        std::panic::resume_unwind(Box::new("the subscriber"));
    }

    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}
    fn record_follows_from(&self, _: &Id, _: &Id) {}
    fn enter(&self, _: &Id) {}
    fn exit(&self, _: &Id) {}
}

/// A lease that is dropped during unwinding reports its abort as an event. A subscriber that
/// panicked there aborted the process.
#[test]
fn a_subscriber_that_panics_in_an_abort_ends_no_process() {
    let _alone = alone();
    let space = AddressSpace::new(Granule::K4);
    space.map(pages(0, 4), 0, Access::ReadWrite).unwrap();
    space.start_tracking().unwrap();
    space.mark(pages(1, 1)).unwrap();
    let mut words = [0];
    let request = HarvestRequest::new(pages(0, 4), Granule::K4);
    let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        let lease = space.harvest(&request, UserBitmap::new(&mut words));
        tracing::subscriber::with_default(Panics, || {
            let _lease = lease.unwrap();
            std::panic::resume_unwind(Box::new("the consumer"));
        });
    }));
    assert_eq!(panicked.unwrap_err().downcast_ref(), Some(&"the consumer"));
    let stats = space.stats();
    assert_eq!((stats.harvests, stats.aborts), (1, 1));
    let unmapped = space.unmap_discarding(pages(0, 4)).unwrap();
    assert_eq!(unmapped.discarded_bytes, 4096);
}
