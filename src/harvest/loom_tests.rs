//! Models: a look of one consumer against a harvest of another one, and against a detach; an unmap
//! and a detach against a harvest that takes from the put-back store of a domain.
//!
//! The look runs in a thread of its own that neither pins the epoch nor performs any other full
//! fence. So nothing but the fences of the look orders its loads.

use super::look::{Look, look};
use super::{Consumer, HarvestRequest, Start, shared};
use crate::Tracking;
use crate::bitmap::{Sink, UserBitmap};
use crate::error::{Error, Stopped};
use crate::flush::{FlushGather, Invalidated};
use crate::source::{DirtySource, LeafSink};
use crate::space::{AddressSpace, Area, Audience, Covered};
use crate::sync::model::{Bound, holds_within};
use crate::sync::{Arc, AtomicU64, Ordering, Ordering::Relaxed, Step, fence, thread};
use crate::units::{Access, DomainId, Granule, Iova, IovaRange};

const PAGE: Granule = Granule::K4;
/// One preemption shows all that these models show.
const BOUND: Bound = Bound::between(1, 1);

fn page() -> IovaRange {
    IovaRange::from_len(Iova::MIN, 1 << 12).unwrap()
}

/// All that a look of the unnamed consumer at page 0 goes by.
struct Looker {
    space: Arc<AddressSpace>,
    area: Arc<Area>,
    covered: Covered,
}

impl Looker {
    fn new(space: &Arc<AddressSpace>) -> Self {
        let snapshot = space.areas.snapshot();
        let entry = snapshot.lookup(Iova::MIN).unwrap();
        let rules = snapshot.rules();
        let audience = Audience::unnamed(rules.members());
        Looker {
            space: Arc::clone(space),
            area: entry.to_arc(),
            covered: Covered::everything(rules.attachments()).heard_by(audience),
        }
    }

    /// Whether `peek` records page 0.
    fn finds(&self, peek: impl FnOnce(&Self, &mut Sink<'_>) -> Result<(), Stopped>) -> bool {
        let words = [AtomicU64::new(0)];
        let view = UserBitmap::shared(&words).view(page(), PAGE).unwrap();
        peek(self, &mut view.sink()).unwrap();
        words[0].load(Relaxed) == 1
    }
}

/// A page is marked, and another consumer harvests it. A peek finds the page: marked, below a
/// summary that is hidden, in flight, or pending.
#[test]
fn a_peek_finds_what_a_harvest_of_another_consumer_takes() {
    let steps = [Step::LeaveToOthers, Step::LookAtFlights, Step::ClaimPiece];
    holds_within(BOUND, &steps, || {
        let space = AddressSpace::tracked(PAGE);
        space.map(page(), 0, Access::ReadWrite).unwrap();
        let space = Arc::new(space);
        let one = Consumer::shared(space.clone(), "one", Start::Clean).unwrap();
        space.mark(page()).unwrap();
        let looker = Looker::new(&space);
        let other = thread::spawn(move || {
            looker.finds(|my, sink| {
                shared::peek(&my.space, &my.covered, &my.area, page(), false, sink)
            })
        });
        let words = [AtomicU64::new(0)];
        let request = HarvestRequest::new(page(), PAGE);
        let lease = one.harvest(&request, UserBitmap::shared(&words));
        let found = other.join().unwrap();
        lease.unwrap().abort();
        found
    });
}

/// A source without pages.
struct Empty;

impl DirtySource for Empty {
    fn unmap(&self, _: IovaRange, _: &mut FlushGather, _: &mut dyn FnMut(IovaRange)) {}

    fn set_tracking(&self, _: Tracking) -> Result<(), Error> {
        Ok(())
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

/// A page was put back into the store of a domain, and a detach moves it to the marks. A look that
/// finds the range no longer in flight, or not yet, and the store empty, finds the mark.
fn a_look_beside_a_move(take: bool) -> bool {
    let space = AddressSpace::new(PAGE);
    let domain = space.attach(Empty).unwrap();
    space.map(page(), 0, Access::ReadWrite).unwrap();
    space.start_tracking().unwrap();
    let space = Arc::new(space);
    let looker = Looker::new(&space);
    looker.covered.domains()[0].put_back.mark(page());
    let other = thread::spawn(move || {
        looker.finds(|my, sink| {
            let mut gather = FlushGather::new();
            let how = match take {
                true => Look::Take(&mut gather),
                false => Look::Peek,
            };
            let (all, sinks) = ((page(), page()), (sink, None));
            look(&my.space, &my.covered, &my.area, all, sinks, how)
        })
    });
    let detached = space.detach(domain).is_ok();
    other.join().unwrap() && detached
}

/// The look of a peek.
#[test]
fn a_peek_finds_what_a_detach_moves_out_of_the_store() {
    holds_within(BOUND, &[], || a_look_beside_a_move(false));
}

/// The look of a harvest.
#[test]
fn a_harvest_finds_what_a_detach_moves_out_of_the_store() {
    holds_within(BOUND, &[], || a_look_beside_a_move(true));
}

/// All pages of a model: a line, so that a harvest of all of them clears its summary first.
fn all_pages() -> IovaRange {
    IovaRange::from_len(Iova::MIN, 64 << 12).unwrap()
}

/// A space with a consumer, in which page 0 is in the put-back store of a domain.
fn with_a_store() -> (Arc<AddressSpace>, DomainId, Consumer<'static>) {
    let space = AddressSpace::new(PAGE);
    let domain = space.attach(Empty).unwrap();
    space.map(all_pages(), 0, Access::ReadWrite).unwrap();
    space.start_tracking().unwrap();
    let space = Arc::new(space);
    let one = Consumer::shared(space.clone(), "one", Start::Clean).unwrap();
    space.attachments()[0].put_back.mark(page());
    (space, domain, one)
}

/// The consumer takes the page for itself.
fn take_all(one: &Consumer<'_>) {
    let words = [AtomicU64::new(0)];
    let request = HarvestRequest::new(all_pages(), PAGE);
    let lease = one.harvest(&request, UserBitmap::shared(&words));
    lease.unwrap().sync().unwrap().commit();
}

/// The looks of a detach, by its own fences alone, and then those of a harvest that does not know
/// the domain: the page is in the store, hidden there, in flight or pending.
#[test]
fn a_detach_marks_what_is_hidden_or_it_is_in_flight() {
    let steps = [Step::LeaveToOthers, Step::LookAtFlights, Step::ClaimPiece];
    holds_within(BOUND, &steps, || {
        let (space, _, one) = with_a_store();
        let looker = Looker::new(&space);
        let other = thread::spawn(move || {
            let (space, marks) = (&looker.space, looker.area.marks());
            let store = &looker.covered.domains()[0].put_back;
            store
                .runs(page())
                .into_iter()
                .for_each(|run| marks.mark(run));
            space.mark_hidden(&looker.area, page(), store);
            looker.finds(|my, sink| {
                marks.peek(page(), sink)?;
                space.flights.look(page(), None, sink)?;
                fence(Ordering::Acquire);
                my.covered
                    .audience
                    .own()
                    .unwrap()
                    .pending
                    .peek(page(), sink)
            })
        });
        take_all(&one);
        other.join().unwrap()
    });
}

/// A consumer harvests the page for itself. Meanwhile `goes` ends the domain or the area; whether
/// it finds the page for the others.
fn beside_a_harvest_of_a_store(goes: fn(&AddressSpace, DomainId) -> bool) -> bool {
    let (space, domain, one) = with_a_store();
    let other = thread::spawn(move || take_all(&one));
    // The harvest begins first.
    thread::yield_now();
    let found = goes(&space, domain);
    other.join().unwrap();
    found
}

/// An unmap returns the page.
#[test]
fn an_unmap_finds_what_a_harvest_takes_from_the_store_of_a_domain() {
    holds_within(BOUND, &[Step::LookInHiddenStores], || {
        beside_a_harvest_of_a_store(|space, _| {
            let words = [AtomicU64::new(0)];
            let bitmap = UserBitmap::shared(&words);
            space.unmap(all_pages(), PAGE, bitmap).unwrap();
            words[0].load(Relaxed) == 1
        })
    });
}

/// After a detach, a harvest of the unnamed consumer finds the page.
#[test]
fn a_detach_moves_what_a_harvest_takes_from_the_store() {
    holds_within(BOUND, &[Step::MarkHidden], || {
        beside_a_harvest_of_a_store(|space, domain| {
            space.detach(domain).unwrap();
            let words = [AtomicU64::new(0)];
            let request = HarvestRequest::new(all_pages(), PAGE);
            let lease = space.harvest(&request, UserBitmap::shared(&words));
            lease.unwrap().sync().unwrap().commit();
            words[0].load(Relaxed) == 1
        })
    });
}
