//! The area that a thread has marked last, for marks without a lookup.
//!
//! A thread that marks by [`AddressSpace::mark`](super::AddressSpace::mark) mostly marks one area
//! many times. So each thread remembers an [`AreaHandle`]. A mark tries this handle first: it sets
//! the bits, and then looks at the state of the area, as a mark by any handle does. If the area is
//! not live, or if the handle is one of another area or of another space, the mark looks the area
//! up. So there is no generation to compare.
//!
//! * *A mark is one of the area that is mapped.* A mark by a handle is one of the area of the
//!   handle as long as the area does not say that it has gone. It says so after it has left the
//!   tree. In between, another thread can map other memory at its addresses, and a write there is
//!   no write to the old area. But an area leaves the tree only after it was claimed, or before its
//!   map has ended. So it is not live when other memory comes, and this mark finds that.
//! * A handle belongs to a space if both have the same counters. The handle keeps the counters
//!   alive, so no later space can have them at the same address.
//! * A thread makes a handle when it marks the same area by lookup for the second time in a row. A
//!   thread that marks one area here and one there makes none, and pays for no counts.
//! * The handle keeps the bits of one area alive, for each thread. Once the area has gone, the next
//!   mark of the thread by lookup drops it, and so does the end of the thread. It keeps no source
//!   alive, and no addresses.
//!
//! A model checker runs all threads of a model in one thread of the system, so models have no such
//! handles. A model calls [`mark_in`] with an area of its own.

use std::cell::RefCell;
use std::ptr;

use super::{AddressSpace, Area, AreaHandle};
use crate::area::Entry;
use crate::sync::{Arc, TINY};
use crate::units::IovaRange;

/// What a thread remembers.
struct Recent {
    handle: Option<AreaHandle>,
    /// The area that it looked up last: an address to compare.
    looked_up: *const Area,
}

thread_local! {
    static RECENT: RefCell<Recent> = const {
        RefCell::new(Recent { handle: None, looked_up: ptr::null() })
    };
}

/// Marks `range` by the handle of this thread, if that is one of `space`. Returns whether all of
/// `range` was marked in an area that is live; if not, the caller looks the area up.
#[inline]
pub(super) fn mark(space: &AddressSpace, range: IovaRange) -> bool {
    if TINY {
        return false;
    }
    // An error if the thread is at its end.
    let marked = RECENT.try_with(|recent| {
        let recent = recent.try_borrow().ok()?;
        let handle = recent.handle.as_ref()?;
        let is_of_space = Arc::ptr_eq(&handle.counters, &space.counters);
        Some(is_of_space && mark_in(&handle.area, || handle.set_near(range)))
    });
    marked.ok().flatten() == Some(true)
}

/// Marks in `area`, which this thread remembers, by `set`, which returns whether it has set all
/// bits. Returns whether the area is the one that is mapped there.
#[inline(always)]
pub(super) fn mark_in(area: &Area, set: impl FnOnce() -> bool) -> bool {
    set() && area.is_live()
}

/// This thread has looked up the area of `entry` for a mark.
#[inline]
pub(super) fn looked_up(space: &AddressSpace, entry: &Entry<'_, Area>) {
    if TINY {
        return;
    }
    let area = ptr::from_ref(entry.area);
    let seen = RECENT.try_with(|recent| {
        let mut recent = recent.try_borrow_mut().ok()?;
        let gone = recent.handle.take_if(|handle| !handle.area.is_mapped());
        let again = ptr::eq(std::mem::replace(&mut recent.looked_up, area), area);
        // The handle of an area that is too large for a short path would be made for each mark.
        let known = recent
            .handle
            .as_ref()
            .map(|handle| Arc::as_ptr(&handle.area));
        Some((again && known != Some(area), gone))
    });
    // The handle of an area that has gone is dropped here, after the borrow.
    if let Ok(Some((true, _gone))) = seen {
        remember(space.handle(*entry));
    }
}

#[cold]
fn remember(handle: AreaHandle) {
    // The handle that it replaces is dropped after the borrow.
    let _replaced = RECENT.try_with(|recent| {
        let mut recent = recent.try_borrow_mut().ok()?;
        recent.handle.replace(handle)
    });
}

#[cfg(all(test, not(any(dirtymap_loom, dirtymap_shuttle))))]
#[allow(clippy::unwrap_used)] // helpers of tests
mod tests {
    use std::convert::Infallible;

    use super::*;
    use crate::source::Mapping;
    use crate::units::{Access, Granule, Iova, ToIovaRange};

    /// A space with one area of 16 pages at 0.
    fn space() -> AddressSpace {
        let space = AddressSpace::tracked(Granule::K4);
        space.map(0..0x10000, 0, Access::ReadWrite).unwrap();
        space
    }

    /// Handles of `space` that threads remember.
    fn remembered(space: &AddressSpace) -> usize {
        let of_the_space = Arc::strong_count(&AddressSpace::new(Granule::K4).counters);
        Arc::strong_count(&space.counters) - of_the_space
    }

    fn dirty(space: &AddressSpace) -> u64 {
        let lease = space.rounds().next().unwrap();
        let dirty = lease.dirty();
        lease.commit();
        dirty
    }

    /// The first mark looks the area up, the second one too and remembers it, and the third one
    /// goes by the handle: each of them is harvested.
    #[test]
    fn each_mark_is_harvested_however_it_found_its_area() {
        let space = space();
        for nth in 0..5u64 {
            space.mark(nth << 12..(nth << 12) + 1).unwrap();
            assert!(nth == 0 || remembered(&space) == 1, "mark {nth}");
            assert_eq!(dirty(&space), 1, "mark {nth}");
            // A range over several pages, and the same page once more.
            space.mark(0x2000..0x5000).unwrap();
            space.mark(0x2000..0x2001).unwrap();
            assert_eq!(dirty(&space), 3);
        }
    }

    /// An area that a thread remembers is unmapped: the next mark of the thread is an error. Then
    /// another area is mapped at the same addresses, and the mark after that is one of the new
    /// area. A mark in the bits of the old area would be lost.
    #[test]
    fn an_area_that_has_gone_is_looked_up_anew() {
        let space = space();
        for _ in 0..3 {
            space.mark(0x1000..0x1001).unwrap();
        }
        assert_eq!(remembered(&space), 1);
        assert_eq!(dirty(&space), 1);
        space.unmap_discarding(0..0x10000).unwrap();
        assert!(space.mark(0x1000..0x1001).is_err());
        assert_eq!(space.stats().outside_marks, 1);
        space.map(0..0x10000, 0, Access::ReadWrite).unwrap();
        for _ in 0..4 {
            space.mark(0x1000..0x1001).unwrap();
            assert_eq!(dirty(&space), 1);
        }
    }

    /// Takes the area at 0 out of the tree, as an unmap or a map that failed does, without the last
    /// step: the area does not say yet that it has gone.
    fn leave_the_tree(space: &AddressSpace) -> Arc<Area> {
        let area = space.areas.snapshot().lookup(Iova::MIN).unwrap().to_arc();
        let Ok(()) = space.areas.update(|edit| {
            edit.remove(Iova::MIN);
            Ok::<_, Infallible>(())
        });
        area
    }

    /// Maps other memory at the addresses that [`leave_the_tree`] has freed, writes to it, and
    /// marks: the mark is one of the new area.
    fn mark_in_a_new_area(space: &AddressSpace, old: &Area) {
        space.map(0..0x10000, 1 << 20, Access::ReadWrite).unwrap();
        space.mark(0x1000..0x1001).unwrap();
        assert_eq!(dirty(space), 1);
        old.retire();
    }

    /// An unmap has published the tree without the area, and stops before it says so in the area.
    /// Another thread maps the addresses anew, and the marker writes there. Its mark went to the
    /// area that it remembered, so the write was lost.
    #[test]
    fn a_mark_between_the_last_two_steps_of_an_unmap_is_one_of_the_new_area() {
        let space = space();
        for _ in 0..3 {
            space.mark(0x1000..0x1001).unwrap();
        }
        assert_eq!(dirty(&space), 1);
        let claimed = space
            .areas
            .snapshot()
            .lookup(Iova::MIN)
            .unwrap()
            .area
            .claim();
        claimed.unwrap();
        let old = leave_the_tree(&space);
        mark_in_a_new_area(&space, &old);
    }

    /// The same of a map that a source refuses: its area was in the tree, where a thread marked it.
    #[test]
    fn a_mark_between_the_last_two_steps_of_a_failed_map_is_one_of_the_new_area() {
        let space = AddressSpace::tracked(Granule::K4);
        let mapping = Mapping {
            range: (0..0x10000).to_iova_range().unwrap(),
            backing: 0,
            access: Access::ReadWrite,
        };
        let area = Arc::new(Area::new(mapping, Granule::K4, space.ordering));
        let insert = || Arc::clone(&area);
        let inserted = space
            .areas
            .update(|edit| edit.insert(mapping.range, insert()));
        inserted.unwrap();
        for _ in 0..3 {
            space.mark(0x1000..0x1001).unwrap();
        }
        assert_eq!(dirty(&space), 1);
        let old = leave_the_tree(&space);
        mark_in_a_new_area(&space, &old);
    }

    /// The remembered area is cut, and a piece of it is unmapped.
    #[test]
    fn an_area_that_was_cut_is_looked_up_anew() {
        let space = space();
        for _ in 0..3 {
            space.mark(0x1000..0x1001).unwrap();
        }
        space.cut(0x4000.into()).unwrap();
        space.mark(0x5000..0x5001).unwrap();
        space.unmap_discarding(0x4000..0x10000).unwrap();
        assert!(space.mark(0x5000..0x5001).is_err());
        space.mark(0x2000..0x2001).unwrap();
        assert_eq!(dirty(&space), 2);
    }

    /// Two spaces with areas at the same addresses, marked in turn by one thread, and a third space
    /// after one of them was dropped.
    #[test]
    fn a_handle_marks_its_own_space_alone() {
        let (one, two) = (space(), space());
        for space in [&one, &one, &one, &two, &one, &two, &two, &two, &one] {
            space.mark(0x3000..0x3001).unwrap();
            assert_eq!(dirty(space), 1);
        }
        drop(two);
        let three = space();
        three.mark(0x3000..0x3001).unwrap();
        assert_eq!((dirty(&three), dirty(&one)), (1, 0));
    }

    /// A thread that marks areas in turn makes no handle: each would cost counts that all threads
    /// share.
    #[test]
    fn areas_in_turn_are_not_remembered() {
        let space = space();
        space.map(0x20000..0x30000, 0, Access::ReadWrite).unwrap();
        // In a thread of its own, which remembers nothing of other tests.
        std::thread::scope(|threads| {
            threads.spawn(|| {
                for _ in 0..4 {
                    space.mark(0x1000..0x1001).unwrap();
                    space.mark(0x21000..0x21001).unwrap();
                }
                assert_eq!(remembered(&space), 0);
            });
        });
        assert_eq!(dirty(&space), 2);
    }

    /// An area that a thread remembers is unmapped. Then the thread marks other areas in turn, none
    /// of them twice in a row. The thread kept the bits of the first area for ever, and each mark
    /// at the old addresses set a bit there first.
    #[test]
    fn a_thread_forgets_an_area_that_has_gone() {
        let space = space();
        space.map(0x20000..0x30000, 0, Access::ReadWrite).unwrap();
        std::thread::scope(|threads| {
            threads.spawn(|| {
                for _ in 0..3 {
                    space.mark(0x1000..0x1001).unwrap();
                }
                assert_eq!(remembered(&space), 1);
                space.unmap_discarding(0..0x10000).unwrap();
                space.map(0..0x10000, 0, Access::ReadWrite).unwrap();
                space.mark(0x21000..0x21001).unwrap();
                assert_eq!(remembered(&space), 0);
                space.mark(0x1000..0x1001).unwrap();
                space.mark(0x21000..0x21001).unwrap();
                assert_eq!(remembered(&space), 0);
            });
        });
        assert_eq!(dirty(&space), 2);
    }

    /// The end of a thread ends its handle.
    #[test]
    fn a_thread_takes_its_handle_with_it() {
        let space = space();
        std::thread::scope(|threads| {
            let marks = threads.spawn(|| {
                for _ in 0..3 {
                    space.mark(0x1000..0x1001).unwrap();
                }
                remembered(&space)
            });
            assert_eq!(marks.join().unwrap(), 1);
        });
        assert_eq!(remembered(&space), 0);
    }
}
