//! Models: a look of one consumer against a harvest of another one, and against a detach.
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
use crate::sync::{Arc, AtomicU64, Ordering::Relaxed, Step, thread};
use crate::units::{Access, Granule, Iova, IovaRange};

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
            looker.finds(|my, sink| shared::peek(&my.space, &my.covered, &my.area, page(), sink))
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
