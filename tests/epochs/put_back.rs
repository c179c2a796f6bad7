//! What is pending as a whole, and goes back while another harvest of the consumer walks or has
//! stopped.

use std::sync::Arc;

use dirtymap::harvest::{Bounds, Parent, Why};
use dirtymap::{Access, AddressSpace, Consumer, Granule, HarvestRequest, Start, UserBitmap};

use super::common::Fake;
use super::{next, numbers, pages};

/// A space with the areas of pages 0 to 31 and 32 to 63, and a consumer for which all of that is
/// pending as a whole.
fn full() -> (Arc<Fake>, Consumer<'static>) {
    let source = Arc::new(Fake::default());
    let space = AddressSpace::with_source(Granule::K4, source.clone()).unwrap();
    space.start_tracking().unwrap();
    for first in [0, 32] {
        space.map(pages(first, 32), 0, Access::ReadWrite).unwrap();
    }
    let space = Arc::new(space);
    let one = Consumer::shared(Arc::clone(&space), "one", Start::Clean).unwrap();
    one.set_bounds(Bounds {
        bytes: 1,
        ..Bounds::default()
    });
    space.mark(pages(3, 1)).unwrap();
    space.rounds().next().unwrap().commit();
    assert!(one.stats().everything);
    one.set_bounds(Bounds::default());
    (source, one)
}

/// A lease of everything in the lower area is aborted while another harvest of the same consumer
/// walks the upper one. That harvest takes the rest of everything at its end, because no area is
/// left in it; so it took what the abort had put back, and no lease had those pages.
#[test]
fn everything_that_goes_back_during_a_harvest_stays_pending() {
    let (source, one) = full();
    let lower = one.rounds().within(pages(0, 32)).unwrap().next().unwrap();
    assert_eq!(lower.dirty(), 32);
    let at_second = Arc::clone(&source);
    source.with(|state| {
        state.on_read = Some(Box::new(move || {
            at_second.with(|state| state.on_read = Some(Box::new(move || drop(lower))));
        }));
    });
    assert_eq!(next(&one).0, (32..64).collect::<Vec<u64>>());
    assert_eq!(next(&one).0, (0..32).collect::<Vec<u64>>());
    assert_eq!(next(&one).0.len(), 0);
    assert!(!one.stats().everything);
}

/// A harvest stops at the first page of the upper area, in the middle of a granule. So its lease
/// ends below the granule, and the lower area goes back. It went back page by page, and the
/// next lease did not say that it is everything. Nor did its sync wait for harvests that leave
/// their pages in the store that was dropped.
#[test]
fn everything_above_the_granule_of_a_stop_goes_back_as_a_whole() {
    let (source, one) = full();
    source.with(|state| state.stop_at = Some(32));
    let granule = Granule::from_bytes(64 * super::PAGE).unwrap();
    let request = HarvestRequest::new(pages(0, 64), granule);
    let mut words = [0; 1];
    let stopped = one.harvest(&request, UserBitmap::new(&mut words)).unwrap();
    assert_eq!(stopped.stopped().unwrap().at, 0.into());
    assert_eq!(one.stats().pending_bytes, 0, "page by page");
    let mut lower = one.rounds().within(pages(0, 32)).unwrap();
    let lower = lower.next().unwrap();
    assert_eq!(numbers(lower.runs()), (0..32).collect::<Vec<u64>>());
    let parent = lower.lineage().unwrap().parent;
    assert_eq!(parent, Parent::Everything(Why::Bounds));
    lower.commit();
    assert!(stopped.sync().is_err());
    source.with(|state| state.stop_at = None);
    assert_eq!(next(&one).0, (32..64).collect::<Vec<u64>>());
}
