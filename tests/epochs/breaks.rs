//! Where a chain of increments breaks: writes that nothing tracked, and a consumer that begins as
//! the copy of one that covers less. Each lineage, and each answer of `since`, says so.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};

use dirtymap::harvest::{Parent, Why};
use dirtymap::source::{FlushGather, Invalidated, LeafSink, Sink, Stopped};
use dirtymap::{AddressSpace, Consumer, DirtySource, Error, IovaRange, Start, Tracking};

use super::{next, of, pages, since, space};

/// A source that has no dirty pages, and may refuse a switch.
#[derive(Default)]
struct Quiet {
    refuses: AtomicBool,
}

struct Source(Arc<Quiet>);

impl DirtySource for Source {
    fn unmap(&self, _: IovaRange, _: &mut FlushGather, _: &mut dyn FnMut(IovaRange)) {}

    fn set_tracking(&self, _: Tracking) -> Result<(), Error> {
        match self.0.refuses.load(SeqCst) {
            true => Err(Error::source_failed(io::Error::from(io::ErrorKind::Other))),
            false => Ok(()),
        }
    }

    fn read_and_clear(&self, _: IovaRange, _: &mut LeafSink<'_, '_>) -> Result<(), Stopped> {
        Ok(())
    }

    fn peek(&self, _: IovaRange, _: &mut Sink<'_>) -> Result<(), Stopped> {
        Ok(())
    }

    fn invalidate(&self, _: &FlushGather) -> Result<Invalidated, Error> {
        Ok(Invalidated::default())
    }
}

/// A backup has an increment, and then writes go untracked in `gap`: the copy of the epoch before
/// it lacks them, whatever is copied over it.
fn breaks(space: &AddressSpace, one: &Consumer<'_>, gap: impl FnOnce()) {
    let cursor = one.cursor();
    space.mark(pages(3, 1)).unwrap();
    let (_, before) = next(one);
    gap();
    let restarted = one.epoch();
    assert_ne!(
        restarted, before.epoch,
        "the full copy after the gap has an epoch of its own"
    );
    space.mark(pages(5, 1)).unwrap();
    let (told, after) = next(one);
    assert_eq!((told, after.parent), (vec![5], Parent::Epoch(restarted)));
    assert_eq!(since(one, cursor.epoch()), Err(Why::Untracked));
    assert_eq!(since(one, before.epoch), Err(Why::Untracked));
    // From there on, the chain is whole again.
    let cursor = one.cursor();
    space.mark(pages(7, 1)).unwrap();
    let (_, last) = next(one);
    assert_eq!(last.parent, of(after));
    assert_eq!(since(one, cursor.epoch()), Ok(vec![7]));
}

/// Tracking stops, and starts again. Page 4 was written in between, and what was dirty is
/// discarded: no increment has it. The next lease named the epoch from before as its parent, and
/// `since` returned the pages without page 4.
#[test]
fn a_restart_of_tracking_begins_a_new_chain() {
    let space = space(64);
    let one = space.consumer("one", Start::Clean).unwrap();
    breaks(&space, &one, || {
        space.stop_tracking().unwrap();
        space.mark(pages(4, 1)).unwrap();
        space.start_tracking().unwrap();
    });
    // A start of what tracks already changes nothing.
    let newest = one.epoch();
    space.start_tracking().unwrap();
    assert_eq!(one.epoch(), newest);
}

/// The same for one domain, for one that leaves while nothing tracks its writes, and for a start
/// that fails after it has discarded the pages of another source.
#[test]
fn so_does_one_of_a_domain() {
    let space = space(64);
    let one = space.consumer("one", Start::Clean).unwrap();
    let quiet = Arc::new(Quiet::default());
    let domain = space.attach(Source(Arc::default())).unwrap();
    let refusing = space.attach(Source(Arc::clone(&quiet))).unwrap();
    breaks(&space, &one, || {
        space.stop_domain_tracking(domain).unwrap();
        space.start_domain_tracking(domain).unwrap();
    });
    breaks(&space, &one, || {
        space.stop_domain_tracking(domain).unwrap();
        space.stop_domain_tracking(refusing).unwrap();
        quiet.refuses.store(true, SeqCst);
        assert!(space.start_tracking().is_err());
    });
    quiet.refuses.store(false, SeqCst);
    breaks(&space, &one, || space.detach(domain).unwrap());
}

/// A lease that was harvested before a restart has the pages of before. It has no parent.
#[test]
fn a_lease_from_before_a_restart_has_no_parent() {
    let space = space(64);
    let one = space.consumer("one", Start::Clean).unwrap();
    space.mark(pages(3, 1)).unwrap();
    let lease = one.rounds().next().unwrap();
    space.stop_tracking().unwrap();
    space.start_tracking().unwrap();
    let (_, lineage) = lease.commit_epoch();
    assert_eq!(lineage.unwrap().parent, Parent::Unknown(Why::Late));
}

/// What is pending stays so over a restart. The full copy after the start has it.
#[test]
fn a_restart_leaves_what_is_pending() {
    let space = space(64);
    let one = space.consumer("one", Start::Dirty).unwrap();
    space.stop_tracking().unwrap();
    space.start_tracking().unwrap();
    let restarted = one.epoch();
    let (told, lineage) = next(&one);
    assert_eq!((told.len(), lineage.parent), (64, Parent::Epoch(restarted)));
}

/// The copy of a consumer of a part. The first lease of the wide one said "everything", and has
/// half of what is mapped; or it named an epoch of the narrow one, of which every copy lacks the
/// other half.
#[test]
fn the_copy_of_a_narrower_consumer_has_no_parent() {
    let space = space(64);
    for start in [Start::Dirty, Start::Clean] {
        let narrow = space.consumer_of("narrow", pages(0, 32), start).unwrap();
        let same = space
            .consumer_of("same", pages(0, 32), Start::LikeOf(&narrow))
            .unwrap();
        let wide = space.consumer("wide", Start::LikeOf(&narrow)).unwrap();
        let (theirs, lineage) = next(&same);
        assert_eq!(
            theirs.len(),
            if lineage.parent == Parent::Epoch(narrow.epoch()) {
                0
            } else {
                32
            }
        );
        let (told, lineage) = next(&wide);
        assert_eq!(told, theirs);
        assert_eq!(lineage.parent, Parent::Unknown(Why::Beginning));
        space.mark(pages(40, 1)).unwrap();
        let (told, after) = next(&wide);
        assert_eq!((told, after.parent), (vec![40], of(lineage)));
    }
}

/// A consumer that began with everything, before the first start of tracking. Then an area was
/// mapped and written, and the start discarded its page. The first lease said that it and the later
/// ones report all that is mapped.
#[test]
fn the_first_start_is_an_epoch_also_for_a_consumer_of_everything() {
    let space = AddressSpace::new(dirtymap::Granule::K4);
    space
        .map(0..0x4000, 0, dirtymap::Access::ReadWrite)
        .unwrap();
    let one = space.consumer("one", Start::Dirty).unwrap();
    space
        .map(0x4000..0x8000, 0, dirtymap::Access::ReadWrite)
        .unwrap();
    space.mark(pages(5, 1)).unwrap();
    space.start_tracking().unwrap();
    let started = one.epoch();
    let (told, lineage) = next(&one);
    assert_eq!(
        (told, lineage.parent),
        (vec![0, 1, 2, 3], Parent::Epoch(started))
    );
}
