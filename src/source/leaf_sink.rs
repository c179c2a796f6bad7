//! Record, owe, clear: the one place where a dirty leaf passes from a source into a lease.
//!
//! # A leaf that extends past the request
//! A leaf has one dirty bit (D) for all of its pages, and a request may cover only some of them.
//! The covered part goes to the lease. The *rest* goes to the put-back store of the source. If
//! nothing else were done, two things could go wrong: between the clear of D and the mark of the
//! rest, nothing says that the rest is dirty; and a rest that is marked before the clear can be
//! taken, flushed and written again before that clear, which then destroys the new D. So:
//!
//! ```text
//!  P1  publish the rest as in flight       a harvester reports it, and it stays dirty
//!  P2  record the covered part, owe the whole leaf
//!  P3  clear D
//!  P4  hand the debt of the leaf to the flush queue
//!  P5  mark the rest                       now another harvest can take it; its sync pays the debt
//!  P6  free the slot
//! ```
//!
//! * A harvester that finds D clear because of P3 also sees P1. So it finds the rest in flight or,
//!   after P6, marked.
//! * P4 comes after P3. A debt that was handed over before P3 could be paid before P3, and between
//!   that flush and the clear a device could again cache "D is set".
//! * P4 comes before P5, as in an abort: the harvest that takes the rest finds the debt in the
//!   queue.
//! * A harvester that reports the rest because it is in flight owes nothing for it: the rest stays
//!   dirty until P4 has happened.
//!
//! # A source that clears by batches
//! P3 is the clear itself; a promise to clear later is not enough. If P5 came before P3, another
//! harvest could take the rest, flush and copy it; then the page could be written again while its D
//! is still set, and P3 would destroy the only trace of that write. So a source that clears many
//! pages by one call hands them to [`LeafSink::take_run`]. A page that lies whole inside the
//! request is recorded and owed, and may be cleared later: until then it is both dirty and in a
//! lease, which is a superset. A page that extends past the request goes through P1 to P6, with a
//! clear of its own.

use super::Stopped;
use crate::bitmap::Sink;
use crate::error::Error;
use crate::flush::{FlushGather, FlushQueue};
use crate::marks::{FlightSlot, InFlight};
use crate::sync::{Ordering, Step, fence, performs};
use crate::units::{Granule, Iova, IovaRange};

/// Receives the dirty leaves of a source during one harvest: see
/// [`DirtySource::read_and_clear`](super::DirtySource::read_and_clear).
///
/// It keeps the order by which no write is lost: a leaf is recorded in the user bitmap, and its
/// invalidation is owed, before its dirty bit is cleared. A harvest that stops between any two of
/// these steps loses nothing. Linux's `iommu_dirty_bitmap_record` has the same place in its walk.
///
/// ```
/// use dirtymap::source::{FlushGather, LeafSink};
/// use dirtymap::{Granule, ToIovaRange, UserBitmap};
/// use std::sync::atomic::{AtomicBool, Ordering};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let dirty = AtomicBool::new(true); // the D bit of a leaf
/// let leaf = (0x1000..0x2000).to_iova_range()?;
/// let mut words = [0];
/// let view = UserBitmap::new(&mut words).view((0..64 << 12).to_iova_range()?, Granule::K4)?;
/// let (mut sink, mut gather) = (view.sink(), FlushGather::new());
/// let mut out = LeafSink::new(&mut sink, &mut gather);
/// out.take(leaf, Granule::K4, || dirty.swap(false, Ordering::AcqRel))?;
/// assert_eq!((gather.entries(), view.count()), (1, 1)); // recorded and owed, then cleared
/// # Ok(())
/// # }
/// ```
#[doc(alias = "iommu_dirty_bitmap_record")]
#[doc(alias = "iommu_dirty_bitmap")]
#[derive(Debug)]
pub struct LeafSink<'s, 'b> {
    sink: &'s mut Sink<'b>,
    gather: &'s mut FlushGather,
    rests: Option<Rests<'s>>,
}

/// The place for the rest of a leaf if a request covers only a part of the leaf.
#[derive(Clone, Copy)]
pub(crate) struct Rests<'s> {
    /// Says that a rest is dirty while it moves.
    pub(crate) in_flight: &'s InFlight,
    /// Puts a rest into the store where later harvests of the source find it.
    pub(crate) keep: &'s dyn Fn(IovaRange),
    /// Receives the debt of a leaf whose rest is put into the store.
    pub(crate) flush: &'s FlushQueue,
    /// Whether the leaves are recorded in a flight: see `harvest::shared`.
    pub(crate) shared: bool,
}

/// The pages that [`LeafSink::take_run`] has recorded and owed, and that the source still has to
/// clear.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "clear exactly these pages before `read_and_clear` returns, and no others"]
pub struct ToClear(Option<IovaRange>);

impl ToClear {
    /// The pages; `None` if there is nothing left to clear.
    pub fn range(self) -> Option<IovaRange> {
        self.0
    }
}

impl std::fmt::Debug for Rests<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Rests").finish_non_exhaustive()
    }
}

impl<'s, 'b> LeafSink<'s, 'b> {
    /// Records in `sink` and owes in `gather`. A leaf that extends past the range of `sink` stays
    /// dirty.
    pub fn new(sink: &'s mut Sink<'b>, gather: &'s mut FlushGather) -> Self {
        LeafSink {
            sink,
            gather,
            rests: None,
        }
    }

    /// The same, but a leaf that extends past the range becomes clean, and its rest goes to
    /// `rests`.
    pub(crate) fn keeping(
        sink: &'s mut Sink<'b>,
        gather: &'s mut FlushGather,
        rests: Rests<'s>,
    ) -> Self {
        LeafSink {
            sink,
            gather,
            rests: Some(rests),
        }
    }

    /// The addresses of the request.
    pub fn range(&self) -> IovaRange {
        self.sink.range()
    }

    /// Takes a leaf that was seen dirty. `leaf` is the range of all its addresses; `size` is the
    /// size of the leaf, which an invalidation may need.
    ///
    /// `clear` makes the leaf clean by one atomic step and returns whether it was dirty until then.
    /// It is called last. **When it returns, the leaf is clean**: a source that clears later, by
    /// larger pieces, uses [`take_run`](Self::take_run).
    ///
    /// Of a leaf that extends past [`range`](Self::range), the part inside is reported, and later
    /// harvests find the rest. Outside of an [`AddressSpace`](crate::AddressSpace) there is no
    /// store for rests: then such a leaf is reported but not cleared. It still owes the
    /// invalidation of the reported part, because a device may have translated a write to it that
    /// has not landed yet.
    ///
    /// # Errors
    /// Those of [`Sink::record`]; the leaf stays dirty.
    #[inline]
    pub fn take(
        &mut self,
        leaf: IovaRange,
        size: Granule,
        clear: impl FnOnce() -> bool,
    ) -> Result<(), Error> {
        let Some(part) = leaf.intersection(self.range()) else {
            return Ok(());
        };
        if part != leaf {
            return self.take_part(leaf, part, size, clear);
        }
        if performs(Step::RecordLeaf) {
            self.sink.record(leaf)?;
        }
        self.gather.add(leaf, size);
        self.before_clear();
        clear();
        Ok(())
    }

    /// Orders what was recorded before the clear.
    #[inline]
    fn before_clear(&self) {
        if self.rests.is_some_and(|rests| rests.shared) && performs(Step::FlightFence) {
            // Release: T1 before T2 of `harvest::shared`, with any ordering of the source's own
            // clear. Pairs with the Acquire fence between tables and flights in
            // `shared::look_further`. If that harvest's read of the leaf comes after the clear, it
            // sees the page in flight or pending; if it comes before, it finds the leaf dirty.
            fence(Ordering::Release);
        }
    }

    /// Takes a run of pages of size `page` that were seen dirty, for a source that clears many runs
    /// by one call.
    ///
    /// The pages that lie whole inside [`range`](Self::range) are recorded and owed, and stay dirty
    /// for now. The return value names them, and the source clears **exactly these** before
    /// [`read_and_clear`](super::DirtySource::read_and_clear) returns, alone or together with those
    /// of other runs. If `read_and_clear` returns an error before that, it may leave them dirty.
    ///
    /// A page that extends past the range, the lowest or the highest of the run, has to be cleared
    /// at once: another harvest may take its rest as soon as the rest is put into the store.
    /// `clear` gets such a page alone, makes it clean before it returns, and returns whether it was
    /// dirty until then, as for [`take`](Self::take). Pages of the run outside the request stay as
    /// they are.
    ///
    /// # Errors
    /// [`Stopped`] at the first page that was not recorded.
    pub fn take_run(
        &mut self,
        run: IovaRange,
        page: Granule,
        mut clear: impl FnMut(IovaRange) -> bool,
    ) -> Result<ToClear, Stopped> {
        let Some(asked) = run.intersection(self.range()) else {
            return Ok(ToClear(None));
        };
        let stopped = |at: Iova| move |error| Stopped { at, error };
        // The lowest and the highest page of the request; they may be the same.
        let end = |at: Iova| IovaRange::granule_at(at, page);
        let sticks_out = |page: &IovaRange| !asked.covers(*page);
        let low = Some(end(asked.start())).filter(sticks_out);
        let high = Some(end(asked.last())).filter(sticks_out);
        if let Some(low) = low {
            self.take(low, page, || clear(low))
                .map_err(stopped(asked.start()))?;
        }
        let inside = asked.round_in(page);
        if let Some(inside) = inside {
            if performs(Step::RecordRun) {
                self.sink.record(inside).map_err(stopped(inside.start()))?;
            }
            self.gather.add(inside, page);
            self.before_clear();
        }
        if let Some(high) = high.filter(|high| low != Some(*high)) {
            self.take(high, page, || clear(high))
                .map_err(stopped(high.start()))?;
        }
        Ok(ToClear(inside))
    }

    /// Takes many leaves of one size that were seen dirty: bit `n` of `mask` stands for the leaf
    /// `n` after the one at `start`.
    ///
    /// Does the same as [`take`](Self::take) of each leaf in ascending order, but records all by
    /// one OR, and owes all at once, before the first is cleared. `clear` gets a mask, makes its
    /// leaves clean by one atomic step each, and returns the mask of those that were dirty until
    /// then. Bits past the end of the address space are ignored.
    ///
    /// # Errors
    /// [`Stopped`] at the first leaf that was not taken, with the error of [`take`](Self::take).
    #[inline]
    pub fn take_many(
        &mut self,
        start: Iova,
        size: Granule,
        mask: u64,
        mut clear: impl FnMut(u64) -> u64,
    ) -> Result<(), Stopped> {
        if mask == 0 {
            return Ok(());
        }
        let records = performs(Step::RecordLeaves);
        if !records || !self.record_word(start, size, mask) {
            if !self.covers(start, size, mask) {
                return self.take_each(start, size, mask, clear);
            }
            if records {
                self.record_many(start, size, mask)?;
            }
            self.gather.add_many(start, size, mask);
        }
        self.before_clear();
        clear(mask);
        Ok(())
    }

    /// Records and owes leaves that are a word of the bitmap, as most are in a walk. Returns false
    /// if it did nothing.
    #[inline(never)]
    fn record_word(&mut self, start: Iova, size: Granule, mask: u64) -> bool {
        let count = mask.count_ones();
        let recorded = self.sink.put_word(start, size, mask, count);
        if recorded {
            self.gather.add_counted(start, size, mask, count);
        }
        recorded
    }

    /// Records leaves that lie inside the request.
    #[inline(never)]
    fn record_many(&mut self, start: Iova, size: Granule, mask: u64) -> Result<(), Stopped> {
        let recorded = self.sink.record_mask(start, size, mask);
        recorded.map_err(|error| Stopped {
            at: Iova::new(start.get() + (u64::from(mask.trailing_zeros()) << size.lg2())),
            error,
        })
    }

    /// Whether all leaves of [`take_many`](Self::take_many) exist and lie inside the request.
    #[inline(never)]
    fn covers(&self, start: Iova, size: Granule, mask: u64) -> bool {
        let range = self.range();
        let at = |nth: u32| u128::from(start.get()) + (u128::from(nth) << size.lg2());
        let last = at(mask.ilog2()) + u128::from(size.mask());
        at(mask.trailing_zeros()) >= range.start().get().into() && last <= range.last().get().into()
    }

    /// Takes the leaves of [`take_many`](Self::take_many) one by one.
    #[cold]
    fn take_each(
        &mut self,
        start: Iova,
        size: Granule,
        mask: u64,
        mut clear: impl FnMut(u64) -> u64,
    ) -> Result<(), Stopped> {
        let mut rest = mask;
        while rest != 0 {
            let nth = rest.trailing_zeros();
            rest &= rest - 1;
            let at = u128::from(start.get()) + (u128::from(nth) << size.lg2());
            let Ok(at) = u64::try_from(at).map(Iova::new) else {
                break; // past the end of the address space
            };
            let Ok(leaf) = IovaRange::from_len(at, size.bytes()) else {
                break; // the same, in part
            };
            self.take(leaf, size, || clear(1 << nth) != 0)
                .map_err(|error| Stopped { at, error })?;
        }
        Ok(())
    }

    /// Owes that devices drop their cached pointers to the tables that translate `range`. For a
    /// source that skips subtrees through which no device walked, and so has to see each walk.
    pub fn owe_table(&mut self, range: IovaRange) {
        self.gather.add_table(range);
    }

    /// See "A leaf that extends past the request" in the module.
    #[cold]
    fn take_part(
        &mut self,
        leaf: IovaRange,
        part: IovaRange,
        size: Granule,
        clear: impl FnOnce() -> bool,
    ) -> Result<(), Error> {
        let Some(rests) = self.rests else {
            self.sink.record(part)?;
            self.gather.add(part, size);
            return Ok(());
        };
        let mut rest = Rest::publish(rests, leaf, part, size);
        self.sink.record(part)?;
        self.gather.add(leaf, size);
        // Release: P1 before P3. Pairs with the Acquire fence between the tables and the slots in
        // `Holding::take`, with any ordering of the source's own clear. If that harvester's
        // read of the table comes after the clear, it finds the rest in flight or marked; if it
        // comes before the clear, it finds D set and takes the leaf itself.
        if performs(Step::RestFence) {
            fence(Ordering::Release);
        }
        // If the clear panics, the rest counts as dirty.
        rest.left = true;
        if !performs(Step::OweAfterClear) {
            rest.owe();
        }
        rest.left = clear();
        Ok(())
    }
}

/// The rest of a leaf, on its way from the leaf to the put-back store. It arrives when this is
/// dropped.
struct Rest<'s> {
    rests: Rests<'s>,
    leaf: IovaRange,
    size: Granule,
    /// The parts below and above the requested part.
    sides: [Option<IovaRange>; 2],
    slots: [Option<&'s FlightSlot>; 2],
    /// Whether the leaf was dirty until the clear, or may have been.
    left: bool,
}

impl<'s> Rest<'s> {
    fn publish(rests: Rests<'s>, leaf: IovaRange, part: IovaRange, size: Granule) -> Self {
        let below = part.start().get().checked_sub(1).map(Iova::new);
        let above = part.last().checked_add(1);
        let sides = [
            below.and_then(|last| IovaRange::new(leaf.start(), last).ok()),
            above.and_then(|start| IovaRange::new(start, leaf.last()).ok()),
        ];
        let publish = |side: IovaRange| rests.in_flight.publish(side);
        let slots = if performs(Step::GuardRest) {
            sides.map(|side| side.map(publish))
        } else {
            [None; 2]
        };
        Rest {
            rests,
            leaf,
            size,
            sides,
            slots,
            left: false,
        }
    }

    fn owe(&self) {
        let mut gather = FlushGather::new();
        gather.add(self.leaf, self.size);
        // The ticket is not needed: a harvest that takes the rest waits for a later one.
        let _ = self.rests.flush.owe(&gather);
    }
}

impl Drop for Rest<'_> {
    fn drop(&mut self) {
        if self.left {
            if performs(Step::OweAfterClear) {
                self.owe();
            }
            for side in self.sides.into_iter().flatten() {
                (self.rests.keep)(side);
            }
        }
        for slot in self.slots.into_iter().flatten() {
            slot.free();
        }
    }
}

#[cfg(test)]
#[cfg(not(dirtymap_loom))]
mod tests {
    use super::*;
    use crate::bitmap::UserBitmap;

    const K4: Granule = Granule::K4;

    /// What `take_many` of these leaves records, owes and clears, for a request of pages 3 to 70.
    fn taken(start: u64, size: Granule, mask: u64) -> (Vec<u64>, Vec<IovaRange>, u64) {
        let asked = IovaRange::from_len(Iova::new(3 << 12), 68 << 12).unwrap_or(IovaRange::ALL);
        let mut words = [0; 2];
        let mut gather = FlushGather::new();
        let mut cleared = 0;
        if let Ok(view) = UserBitmap::new(&mut words).view(asked, K4) {
            let mut sink = view.sink();
            let mut out = LeafSink::new(&mut sink, &mut gather);
            let done = out.take_many(Iova::new(start), size, mask, |some| {
                cleared |= some;
                some
            });
            assert!(done.is_ok());
        }
        let bits = (0..128).filter(|bit| words[bit / 64] >> (bit % 64) & 1 != 0);
        let pages = bits.map(|bit| bit as u64 + 3).collect();
        (pages, gather.ranges().to_vec(), cleared)
    }

    #[test]
    fn many_leaves_are_taken_as_each_of_them() {
        let range = |first: u64, count: u64| {
            IovaRange::from_len(Iova::new(first << 12), count << 12).unwrap_or(IovaRange::ALL)
        };
        assert_eq!(taken(3 << 12, K4, 0), (vec![], vec![], 0));
        // All inside; the first leaf may begin anywhere.
        let (pages, owed, cleared) = taken(5 << 12, K4, 0b1011 | 1 << 63);
        assert_eq!(pages, [5, 6, 8, 68]);
        assert_eq!(owed, [range(5, 2), range(8, 1), range(68, 1)]);
        assert_eq!(cleared, 0b1011 | 1 << 63);
        // Some lie outside the request.
        let (pages, owed, cleared) = taken(0, K4, 0b1111);
        assert_eq!((pages, owed, cleared), (vec![3], vec![range(3, 1)], 0b1000));
        // The last one extends past the request: the part inside is reported, and the leaf stays
        // dirty.
        let four = Granule::from_lg2(14).unwrap_or(K4);
        let (pages, owed, cleared) = taken(8 << 12, four, 1 | 1 << 15);
        assert_eq!(pages, [8, 9, 10, 11, 68, 69, 70]);
        assert_eq!(owed, [range(8, 4), range(68, 3)]);
        assert_eq!(cleared, 1);
        // Past the end of the address space there is nothing.
        let (pages, owed, cleared) = taken(u64::MAX - 0xfff, K4, u64::MAX);
        assert_eq!((pages, owed, cleared), (vec![], vec![], 0));
    }

    /// What happened, in order.
    #[derive(Debug, PartialEq)]
    enum Event {
        Cleared(IovaRange),
        PutBack(IovaRange),
    }
    use Event::{Cleared, PutBack};

    /// What `take_run` of `run` returns, does and records, for a request from 1 KiB inside page 3
    /// to the end of page 70.
    fn run_taken(
        run: IovaRange,
        page: Granule,
        keeps: bool,
    ) -> (Option<IovaRange>, Vec<Event>, Vec<IovaRange>, FlushGather) {
        let asked = IovaRange::new(Iova::new((3 << 12) + 1024), Iova::new((71 << 12) - 1));
        let asked = asked.unwrap_or(IovaRange::ALL);
        let events = std::cell::RefCell::new(Vec::new());
        let keep = |rest| events.borrow_mut().push(PutBack(rest));
        let (in_flight, flush) = (InFlight::new(), FlushQueue::new());
        let rests = Rests {
            in_flight: &in_flight,
            keep: &keep,
            flush: &flush,
            shared: false,
        };
        let mut words = [0; 5];
        let mut gather = FlushGather::new();
        let k1 = Granule::from_lg2(10).unwrap_or(K4);
        let Ok(view) = UserBitmap::new(&mut words).view(asked, k1) else {
            panic!("a bitmap that is too short");
        };
        let mut sink = view.sink();
        let mut out = match keeps {
            true => LeafSink::keeping(&mut sink, &mut gather, rests),
            false => LeafSink::new(&mut sink, &mut gather),
        };
        let clear = |page| {
            events.borrow_mut().push(Cleared(page));
            true
        };
        let to_clear = out.take_run(run, page, clear).map_or(None, ToClear::range);
        let runs = view.runs().collect();
        // The debt of a rest was handed over before the rest was put into the store.
        let put_back = |event: &&Event| matches!(event, PutBack(_));
        let any = events.borrow().iter().any(|event| put_back(&event));
        assert_eq!(flush.stats().owed > 0, any);
        (to_clear, events.into_inner(), runs, gather)
    }

    #[test]
    fn of_a_run_that_sticks_out_the_ends_are_cleared_at_once_and_the_rest_later() {
        let bytes = |start: u64, end: u64| {
            IovaRange::new(Iova::new(start), Iova::new(end - 1)).unwrap_or(IovaRange::ALL)
        };
        let page = |first: u64, end: u64| bytes(first << 12, end << 12);
        // Whole inside: nothing happens now.
        let (later, events, runs, gather) = run_taken(page(4, 9), K4, true);
        assert_eq!(
            (later, events, runs),
            (Some(page(4, 9)), vec![], vec![page(4, 9)])
        );
        assert_eq!(gather.ranges(), [page(4, 9)]);
        // The lowest page extends past the request; pages outside the request stay as they are.
        let (later, events, runs, gather) = run_taken(page(1, 9), K4, true);
        assert_eq!(later, Some(page(4, 9)));
        let cut = bytes((3 << 12) + 1024, 9 << 12);
        assert_eq!(
            events,
            [
                Cleared(page(3, 4)),
                PutBack(bytes(3 << 12, (3 << 12) + 1024))
            ]
        );
        assert_eq!((runs, gather.ranges()), (vec![cut], &[page(3, 9)][..]));
        // The same without a store for rests: no page is cleared whose rest would be lost.
        let (later, events, runs, _) = run_taken(page(1, 9), K4, false);
        assert_eq!((later, events, runs), (Some(page(4, 9)), vec![], vec![cut]));
        // Pages of 16 KiB: the last one ends above page 70.
        let k16 = Granule::from_lg2(14).unwrap_or(K4);
        let (later, events, runs, _) = run_taken(page(64, 80), k16, true);
        assert_eq!(later, Some(page(64, 68)));
        assert_eq!(events, [Cleared(page(68, 72)), PutBack(page(71, 72))]);
        assert_eq!(runs, [page(64, 71)]);
        // One page extends past both ends: it is cleared once.
        let m1 = Granule::from_lg2(20).unwrap_or(K4);
        let (later, events, runs, gather) = run_taken(page(0, 256), m1, true);
        assert_eq!(later, None);
        let below = bytes(0, (3 << 12) + 1024);
        let whole = page(0, 256);
        assert_eq!(
            events,
            [Cleared(whole), PutBack(below), PutBack(page(71, 256))]
        );
        assert_eq!(runs, [bytes((3 << 12) + 1024, 71 << 12)]);
        assert_eq!(gather.ranges(), [whole]);
        // All of it lies outside the request.
        let (later, events, runs, gather) = run_taken(page(80, 90), K4, true);
        assert_eq!((later, events, runs), (None, vec![], vec![]));
        assert!(gather.is_empty());
    }
}
