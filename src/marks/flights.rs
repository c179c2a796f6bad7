//! Pages that a harvest has taken from all consumers of a space, and not yet left to the others.
//!
//! A *flight* has the pages of one running harvest: it records there before it clears, and wipes it
//! after the pages are pending for the other consumers. Pages of tables are in a bitmap, and marks
//! in a [`crossing`](super::crossing). Every harvest looks at the flights of the
//! others. The protocol and its proof are in `harvest::shared`.
//!
//! ```text
//!  taking harvest                               another harvest
//!  T1  record in the flight                     L1  look at tables and marks
//!      fence(Release)                               fence(Acquire)
//!  T2  clear the page where it was found        L2  look at the flights
//!  T3  hand the debt to the queue                   fence(Acquire)
//!  T4  leave the page pending for the others    L3  take what is pending
//!  T5  wipe the flight (Release)
//! ```
//!
//! * If L1 finds the page clear because of T2, L2 sees T1, or the wipe of T5.
//! * If L2 finds the page wiped, L3 sees T4, or another harvest of the same consumer has taken it.
//!
//! Pages have the same place in each flight, whatever its owner looks at, so a bit stands for one
//! page for ever. Flights form a list, and are used again; there are as many as there were harvests
//! at once. The memory of a flight is 9 KiB, and grows with the chunks in which its owners found
//! something in tables: 4 KiB for each 32768 pages.

use std::convert::Infallible;
use std::ptr;

use super::Zeros;
use super::crossing::Crossing;
use crate::bitmap::{Sink, UserBitmap};
use crate::chunkmap::{ChunkMap, Handed};
use crate::error::{Error, Stopped};
use crate::sync::{AtomicBool, AtomicPtr, Ordering, Step, performs};
use crate::units::{Granule, Iova, IovaRange};
use crate::words::word_mask;

/// The flights of a space.
#[derive(Debug)]
pub(crate) struct Flights {
    first: Next,
    /// All addresses that pages may have.
    range: IovaRange,
    page: Granule,
}

/// Pages of a space.
#[derive(Debug)]
pub(crate) struct Flight {
    /// What was taken from tables.
    bits: ChunkMap,
    /// What was taken from marks.
    pub(super) marks: Crossing,
    page: Granule,
    claimed: AtomicBool,
    next: Next,
}

/// The flight that follows in the list, if there is one. It lives as long as the list.
#[derive(Debug)]
struct Next(AtomicPtr<Flight>);

impl Next {
    fn none() -> Self {
        Next(AtomicPtr::new(ptr::null_mut()))
    }

    fn get(&self) -> Option<&Flight> {
        // Acquire: pairs with the Release in `get_or`; publishes the contents.
        let next = self.0.load(Ordering::Acquire);
        // SAFETY: a linked flight lives as long as the list, which `self` belongs to.
        unsafe { next.as_ref() }
    }

    fn get_or(&self, new: impl FnOnce() -> Flight) -> &Flight {
        if let Some(next) = self.get() {
            return next;
        }
        let fresh = Box::into_raw(Box::new(new()));
        // Release on success: publishes the fresh flight. Acquire on failure: another thread has
        // linked one first, and we use that one.
        let (success, failure) = (Ordering::Release, Ordering::Acquire);
        let linked = self
            .0
            .compare_exchange(ptr::null_mut(), fresh, success, failure);
        let next = match linked {
            Ok(_) => fresh,
            Err(winner) => {
                // SAFETY: `fresh` came from `Box::into_raw` above and was not linked.
                drop(unsafe { Box::from_raw(fresh) });
                winner
            }
        };
        // SAFETY: as in `get`.
        unsafe { &*next }
    }
}

impl Drop for Flights {
    fn drop(&mut self) {
        // Relaxed: exclusive access, here and below.
        let mut next = self.first.0.load(Ordering::Relaxed);
        while !next.is_null() {
            // SAFETY: made by `Box::into_raw` in `get_or` and linked once; `drop` has the only
            // reference left.
            let flight = unsafe { Box::from_raw(next) };
            next = flight.next.0.load(Ordering::Relaxed);
        }
    }
}

impl Flights {
    /// No flights. Allocates nothing.
    pub(crate) fn new(range: IovaRange, page: Granule) -> Self {
        Flights {
            first: Next::none(),
            range,
            page,
        }
    }

    /// A flight for one harvest, until it is [freed](Flight::free). Allocates if more harvests run
    /// at once than ever before.
    pub(crate) fn claim(&self) -> &Flight {
        let mut place = &self.first;
        loop {
            let flight = place.get_or(|| Flight::new(self.range, self.page));
            // Acquire: pairs with the Release in `free`; the new owner sees the words wiped.
            if !flight.claimed.swap(true, Ordering::Acquire) {
                return flight;
            }
            place = &flight.next;
        }
    }

    fn list(&self) -> Option<&Flight> {
        performs(Step::LookAtFlights)
            .then(|| self.first.get())
            .flatten()
    }

    /// Records in `sink` what others than the owner of `own` have in flight in `range`.
    ///
    /// # Errors
    /// [`Stopped`] at the first page that could not be recorded.
    pub(crate) fn look(
        &self,
        range: IovaRange,
        own: Option<&Flight>,
        sink: &mut Sink<'_>,
    ) -> Result<(), Stopped> {
        let mut next = self.list();
        while let Some(flight) = next {
            if !own.is_some_and(|own| ptr::eq(own, flight)) {
                flight.record(range, sink)?;
            }
            next = flight.next.get();
        }
        Ok(())
    }

    /// Visits the words of pages that are in flight in `range`.
    pub(crate) fn visit(&self, range: IovaRange, visit: &mut impl FnMut(Iova, u64)) {
        let mut next = self.list();
        while let Some(flight) = next {
            let Ok(()) = flight.visit(range, |at, mask| -> Result<(), Infallible> {
                visit(at, mask);
                Ok(())
            });
            next = flight.next.get();
        }
    }
}

impl Flight {
    fn new(range: IovaRange, page: Granule) -> Self {
        Flight {
            bits: ChunkMap::new(range.last().get() >> page.lg2()),
            marks: Crossing::new(),
            page,
            claimed: AtomicBool::new(false),
            next: Next::none(),
        }
    }

    /// The sink by which the owner records the pages of `part`.
    pub(crate) fn sink(&self, part: IovaRange) -> Sink<'_> {
        UserBitmap::chunks(&self.bits).into_sink_of(self.page, part)
    }

    /// Calls `visit` with the address and the mask of each word of pages in `range`.
    ///
    /// # Errors
    /// Those of `visit`.
    pub(crate) fn visit<E>(
        &self,
        range: IovaRange,
        mut visit: impl FnMut(Iova, u64) -> Result<(), E>,
    ) -> Result<(), E> {
        let (first, last) = self.numbers(range);
        let mut visit = |bit: u64, mask| visit(Iova::new(bit << self.page.lg2()), mask);
        self.bits.peek(first, last, &mut visit)?;
        self.marks.visit(|bit, mask| {
            // The last page of a word may be the last one of the address space.
            let inside = mask_in(bit, first, last);
            match mask & inside {
                0 => Ok(()),
                mask => visit(bit, mask),
            }
        })
    }

    /// Clears the zero bits of the pages of `range`.
    pub(crate) fn clear_zeros(&self, range: IovaRange, zeros: &Zeros) {
        let Ok(()) = self.visit(range, |at, mask| -> Result<(), Infallible> {
            zeros.clear_mask_at(at, mask);
            Ok(())
        });
    }

    /// Records the pages of `range` in `sink`.
    fn record(&self, range: IovaRange, sink: &mut Sink<'_>) -> Result<(), Stopped> {
        self.visit(range, |at, mask| {
            let recorded: Result<(), Error> = sink.record_mask(at, self.page, mask);
            recorded.map_err(|error| Stopped {
                at: at.max(range.start()),
                error,
            })
        })
    }

    /// Calls `each` with the pages of `range`, by chunks: see [`ChunkMap::wipe`]. Forgets them
    /// after the call: they are pending then. So it does with the marks that a panic has left in
    /// flight.
    pub(crate) fn hand_over(&self, range: IovaRange, mut each: impl FnMut(u64, Handed<'_>)) {
        let (first, last) = self.numbers(range);
        self.bits.wipe(first, last, |chunk, handed| {
            handed.listed(|handed| each(chunk, handed));
        });
        self.marks.end(each);
    }

    /// Ends the claim. All pages were wiped.
    pub(crate) fn free(&self) {
        // Release: pairs with the Acquire in `claim`.
        self.claimed.store(false, Ordering::Release);
    }

    fn numbers(&self, range: IovaRange) -> (u64, u64) {
        let number = |iova: Iova| iova.get() >> self.page.lg2();
        (number(range.start()), number(range.last()))
    }
}

/// The bits of the word that begins with `bit` that lie in `first..=last`.
fn mask_in(bit: u64, first: u64, last: u64) -> u64 {
    if bit + 63 < first || last < bit {
        return 0;
    }
    word_mask(
        first.saturating_sub(bit) as u32,
        (last - bit).min(63) as u32,
    )
}

#[cfg(all(test, not(dirtymap_loom)))]
#[allow(clippy::unwrap_used)] // helpers of tests
mod tests {
    use super::*;

    fn pages(first: u64, n: u64) -> IovaRange {
        IovaRange::from_len(Iova::new(first << 12), n << 12).unwrap()
    }

    fn seen(flights: &Flights, range: IovaRange, own: Option<&Flight>) -> Vec<u64> {
        let mut words = [0; 4];
        let view = UserBitmap::new(&mut words)
            .view(range, flights.page)
            .unwrap();
        flights.look(range, own, &mut view.sink()).unwrap();
        view.bits().collect()
    }

    #[test]
    fn a_flight_shows_what_its_owner_recorded_until_it_is_wiped() {
        let flights = Flights::new(IovaRange::ALL, Granule::K4);
        let all = pages(1 << 20, 256);
        assert_eq!(seen(&flights, all, None), []);
        let (one, two) = (flights.claim(), flights.claim());
        assert!(!std::ptr::eq(one, two));
        one.sink(all).record(pages((1 << 20) + 3, 2)).unwrap();
        two.sink(all).record(pages((1 << 20) + 100, 1)).unwrap();
        assert_eq!(seen(&flights, all, None), [3, 4, 100]);
        assert_eq!(seen(&flights, all, Some(one)), [100]);
        let mut told = 0;
        flights.visit(all, &mut |_, mask| told += mask.count_ones());
        assert_eq!(told, 3, "of both");
        assert_eq!(seen(&flights, pages((1 << 20) + 4, 60), None), [0]);
        one.hand_over(all, |_, _| {});
        assert_eq!(seen(&flights, all, None), [100]);
        one.free();
        assert!(std::ptr::eq(flights.claim(), one), "it is used again");
    }

    #[test]
    fn the_last_pages_of_the_address_space_have_a_place() {
        for page in [Granule::BYTE, Granule::K4] {
            let flights = Flights::new(IovaRange::ALL, page);
            let last = IovaRange::granule_at(Iova::MAX, page);
            let flight = flights.claim();
            flight.sink(last).record(last).unwrap();
            let mut told = Vec::new();
            let Ok(()) = flight.visit(last, |at, mask| -> Result<(), std::convert::Infallible> {
                told.push((
                    at.get() + ((63 - u64::from(mask.leading_zeros())) << page.lg2()),
                    mask,
                ));
                Ok(())
            });
            assert_eq!(told, [(last.start().get(), 1 << 63)]);
            flight.hand_over(last, |_, _| {});
            assert_eq!(seen(&flights, last, None), []);
        }
    }
}
