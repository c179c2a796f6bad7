//! Models of single orderings in a table: two threads, with one or two calls each. They are small,
//! so that `.ci/orderings` can weaken each ordering by itself.

use std::ptr::NonNull;

use dirtymap::bitmap::UserBitmap;
use dirtymap::flush::FlushGather;
use dirtymap::source::LeafSink;
use dirtymap::sync::model::{Bound, holds_within};
use dirtymap::sync::{Arc, AtomicU64, Mutex, Ordering, Step, fence, lock, thread};
use dirtymap::{Access, Granule, Iova, IovaRange};

use super::page::TableRef;
use super::slab::{Beside, FEW, Place, Slab};
use super::tree::Table;
use super::walk::Walk;
use crate::fmt::{AmdHost, AmdV1, Format};
use crate::memory::PhysMemory;

/// As for the models of whole tables, in `tests/loom`.
const TABLES: Bound = Bound::between(2, 2);
/// Enough where one thread runs between two steps of the other.
const ONCE: Bound = Bound::between(1, 1);

/// Two levels, with four entries in a table, so that there are groups. Tables lie in slabs.
type Grouped = AmdHost<4, 11>;
/// Three levels, with two entries in a table.
type Deep = AmdHost<3>;
/// Three levels, with four entries in a table.
type DeepGrouped = AmdHost<3, 11>;

const PAGE: u64 = 8;

fn pages(first: u64, count: u64) -> IovaRange {
    IovaRange::from_len(Iova::new(first * PAGE), count * PAGE).unwrap()
}

fn page(nth: u64) -> IovaRange {
    pages(nth, 1)
}

/// Leaves of up to `pages` pages.
fn leaves_of(pages: u64) -> Granule {
    Granule::from_bytes(pages * PAGE).unwrap()
}

/// Maps pages to the memory at the same address.
fn map<F: Format>(table: &Table<F>, range: IovaRange, sizes: Granule) -> bool {
    let backing = range.start().get();
    table.map(range, backing, Access::ReadWrite, sizes).is_ok()
}

fn new<F: Format>(parts: &[(IovaRange, Granule)]) -> Arc<Table<F>> {
    let table = Arc::new(Table::new());
    for (range, sizes) in parts {
        assert!(map(&table, *range, *sizes));
    }
    table
}

fn walk(nth: u64, write: bool, tracked: bool) -> Walk {
    Walk {
        iova: page(nth).start(),
        tracked,
        write,
    }
}

/// Runs `call`, which is about page 0, beside a map of page 1 that installs the tables of both.
fn beside_a_map<F: Format>(call: fn(&Table<F>)) -> bool {
    let table = Arc::new(Table::<F>::skipping());
    let mapper = thread::spawn({
        let table = Arc::clone(&table);
        move || map(&table, page(1), leaves_of(1))
    });
    call(&table);
    mapper.join().unwrap() && table.translate(page(1).start()).is_some()
}

fn a_look_beside_a_map() -> bool {
    beside_a_map::<AmdV1>(|table| assert!(table.translate(page(0).start()).is_none()))
}

fn a_walk_beside_a_map() -> bool {
    beside_a_map::<AmdV1>(|table| {
        let found = table.walk_from(None, walk(0, false, false), None);
        assert!(found.is_err());
    })
}

fn an_unmap_beside_a_map() -> bool {
    beside_a_map::<AmdV1>(|table| table.remove_all(page(0)))
}

fn a_merge_beside_a_map() -> bool {
    beside_a_map::<AmdV1>(|table| table.merge(page(0), leaves_of(2), |_, _, _| ()).unwrap())
}

fn a_flush_beside_a_map() -> bool {
    beside_a_map::<Deep>(|table| table.flush_begins(&[page(0)]))
}

fn two_maps_in_a_new_table() -> bool {
    beside_a_map::<AmdV1>(|table| assert!(map(table, page(0), leaves_of(1))))
}

fn two_maps_in_a_new_slab() -> bool {
    beside_a_map::<Grouped>(|table| assert!(map(table, page(0), leaves_of(1))))
}

/// Each call goes into tables that another call has just installed.
#[test]
fn a_table_is_found_whole_by_every_call() {
    holds_within(ONCE, &[], a_look_beside_a_map);
    holds_within(ONCE, &[], a_walk_beside_a_map);
    holds_within(ONCE, &[], an_unmap_beside_a_map);
    holds_within(ONCE, &[], a_merge_beside_a_map);
    holds_within(ONCE, &[], a_flush_beside_a_map);
    holds_within(ONCE, &[], two_maps_in_a_new_table);
    holds_within(ONCE, &[], two_maps_in_a_new_slab);
}

/// A leaf at the top and a page below it, which two calls map at once: at most one is mapped.
fn a_map_of_a_whole_subtree_beside_a_map() -> bool {
    let table = new::<Deep>(&[]);
    let other = thread::spawn({
        let table = Arc::clone(&table);
        move || map(&table, page(1), leaves_of(1))
    });
    let whole = map(&table, pages(0, 4), leaves_of(4));
    let part = other.join().unwrap();
    let at = |nth| table.translate(page(nth).start()).map(|leaf| leaf.range);
    match (whole, part) {
        (true, false) => at(1) == Some(pages(0, 4)),
        (false, true) => at(0).is_none() && at(1) == Some(page(1)),
        (false, false) => at(0).is_none() && at(1).is_none(),
        (true, true) => false,
    }
}

#[test]
fn a_subtree_that_is_frozen_is_found_whole() {
    holds_within(ONCE, &[], a_map_of_a_whole_subtree_beside_a_map);
}

/// A mapper writes 7 to `written` and then calls `maps`. A device reads `written` if the leaf that
/// it finds at page 0 covers it.
fn bytes_of_a_mapper<F: Format>(
    table: &Arc<Table<F>>,
    written: u64,
    maps: fn(&Table<F>, u64),
) -> bool {
    let memory = Arc::new(PhysMemory::new(4 * PAGE).unwrap());
    let mapper = thread::spawn({
        let (table, memory) = (Arc::clone(table), Arc::clone(&memory));
        move || {
            // A thread that pins itself runs a full fence, but not if it is pinned already.
            let _pinned = crossbeam_epoch::pin();
            memory.write(written * PAGE, &[7]).unwrap();
            maps(&table, written);
        }
    });
    let found = table.walk_from(None, walk(0, false, false), None);
    let read = match found {
        Ok(leaf) if leaf.range.contains(page(written).start()) => {
            let mut byte = [0];
            memory.read(written * PAGE, &mut byte).unwrap();
            byte == [7]
        }
        _ => true,
    };
    mapper.join().unwrap();
    read
}

fn bytes_of_a_page() -> bool {
    let table = new::<AmdV1>(&[(page(1), leaves_of(1))]);
    bytes_of_a_mapper(&table, 0, |table, written| {
        assert!(map(table, page(written), leaves_of(1)));
    })
}

fn bytes_of_a_leaf_in_the_place_of_a_table() -> bool {
    let table = new::<AmdV1>(&[(page(0), leaves_of(1))]);
    table.remove_all(page(0));
    bytes_of_a_mapper(&table, 1, |table, _| {
        assert!(map(table, pages(0, 2), leaves_of(2)));
    })
}

fn maps_and_merges<F: Format>(table: &Table<F>, written: u64) {
    assert!(map(table, page(written), leaves_of(1)));
    let mut merged = 0;
    let count = |_, _, _| merged += 1;
    table.merge(pages(0, 2), leaves_of(2), count).unwrap();
    assert_eq!(merged, 1);
}

fn bytes_of_a_merged_table() -> bool {
    let table = new::<AmdV1>(&[(page(0), leaves_of(1))]);
    bytes_of_a_mapper(&table, 1, maps_and_merges)
}

fn bytes_of_a_merged_group() -> bool {
    let table = new::<Grouped>(&[(page(0), leaves_of(1))]);
    bytes_of_a_mapper(&table, 1, maps_and_merges)
}

/// A device that finds a leaf reads what the mapper wrote into its memory before.
#[test]
fn bytes_are_in_memory_before_their_leaf_is_in_the_table() {
    holds_within(TABLES, &[], bytes_of_a_page);
    holds_within(TABLES, &[], bytes_of_a_leaf_in_the_place_of_a_table);
    holds_within(TABLES, &[], bytes_of_a_merged_table);
    holds_within(TABLES, &[], bytes_of_a_merged_group);
}

/// A leaf becomes a table while a device writes, or while it is unmapped.
fn beside_a_split<R: Send + 'static>(call: fn(&Table<AmdV1>) -> R) -> (Arc<Table<AmdV1>>, R) {
    let table = new::<AmdV1>(&[(pages(0, 2), leaves_of(2))]);
    let other = thread::spawn({
        let table = Arc::clone(&table);
        move || call(&table)
    });
    table.split_at(page(1).start(), |_, _| ()).unwrap();
    let done = other.join().unwrap();
    (table, done)
}

fn a_write_beside_a_split() -> bool {
    let (table, written) =
        beside_a_split(|table| table.walk_from(None, walk(0, true, true), None).is_ok());
    written && table.translate(page(0).start()).unwrap().dirty
}

fn an_unmap_beside_a_split() -> bool {
    let (table, ()) = beside_a_split(|table| table.remove_all(pages(0, 2)));
    let gone = |nth| table.translate(page(nth).start()).is_none();
    gone(0) && gone(1)
}

#[test]
fn the_parts_of_a_split_are_found_whole() {
    holds_within(TABLES, &[], a_write_beside_a_split);
    holds_within(TABLES, &[], an_unmap_beside_a_split);
}

/// Merges a table into a leaf, and splits that into a new table. Does nothing if another call is
/// splitting a leaf there.
fn replace<F: Format>(table: &Table<F>, range: IovaRange, parts: Granule) {
    let count = range.len() as u64 / PAGE;
    table.merge(range, leaves_of(count), |_, _, _| ()).unwrap();
    table.split(range, parts, |_, _| ()).unwrap();
}

/// A device notes its access in an entry that leads to another table by then.
fn a_walk_beside_a_new_table() -> bool {
    let table = new::<AmdV1>(&[(pages(0, 2), leaves_of(1))]);
    let device = thread::spawn({
        let table = Arc::clone(&table);
        move || table.walk_from(None, walk(0, false, true), None).is_ok()
    });
    replace(&table, pages(0, 2), leaves_of(1));
    device.join().unwrap()
}

/// A group is split whose table another one replaces.
fn a_split_beside_a_new_table() -> bool {
    let table = new::<DeepGrouped>(&[(pages(0, 4), leaves_of(2)), (pages(4, 12), leaves_of(4))]);
    let other = thread::spawn({
        let table = Arc::clone(&table);
        move || table.split_at(page(1).start(), |_, _| ()).unwrap()
    });
    replace(&table, pages(0, 16), leaves_of(4));
    other.join().unwrap();
    table.translate(page(0).start()).is_some()
}

#[test]
fn a_table_in_the_place_of_another_is_found_whole() {
    holds_within(TABLES, &[], a_walk_beside_a_new_table);
    holds_within(TABLES, &[], a_split_beside_a_new_table);
}

/// Harvests `range` into `words`, one bit for each page. Returns the flush that is owed.
fn harvest<F: Format>(table: &Table<F>, range: IovaRange, words: &[AtomicU64; 1]) -> FlushGather {
    let view = UserBitmap::shared(words).view(range, F::PAGE).unwrap();
    let (mut sink, mut gather) = (view.sink(), FlushGather::new());
    let mut out = LeafSink::new(&mut sink, &mut gather);
    table.read_and_clear(range, &mut out).unwrap();
    gather
}

fn bits(words: &[AtomicU64; 1]) -> u64 {
    // Relaxed: what orders it is the matter of the models.
    words[0].load(Ordering::Relaxed)
}

/// A page that was written before becomes dirty, is harvested, and is unmapped meanwhile. If the
/// unmap finds it clean, its bit is set in the bitmap of the harvest, and the thread that unmaps
/// sees it.
fn an_unmap_beside_a_harvest() -> bool {
    let table = new::<AmdV1>(&[(page(0), leaves_of(1))]);
    table.set_dirty(page(0).start());
    table.clean();
    let words = Arc::new([AtomicU64::new(0)]);
    let harvester = thread::spawn({
        let (table, words) = (Arc::clone(&table), Arc::clone(&words));
        move || {
            let written = table.set_dirty(page(0).start()).is_some();
            harvest(&table, page(0), &words);
            written
        }
    });
    let mut found = false;
    table.unmap(page(0), |_, _, dirty| found = dirty).unwrap();
    let recorded = bits(&words) == 1;
    let written = harvester.join().unwrap();
    !written || found || recorded
}

#[test]
fn what_an_unmap_finds_clean_was_recorded() {
    holds_within(TABLES, &[], an_unmap_beside_a_harvest);
}

/// A table of two pages that a flush was over for, so that the next look counts.
fn flushed() -> Arc<Table<AmdV1>> {
    let table = Arc::new(Table::skipping());
    assert!(map(&table, pages(0, 2), leaves_of(1)));
    clear_and_flush(&table, pages(0, 2));
    table
}

/// The harvest finds nothing, and clears A. The flush is of devices that cache nothing.
fn clear_and_flush<F: Format>(table: &Table<F>, range: IovaRange) {
    harvest(table, range, &[AtomicU64::new(0)]);
    table.flush_begins(&[range]);
    table.flush_ends(&[range]);
}

/// A harvest looks, and decides whether later ones skip, while a device walks, A is cleared anew,
/// the device writes by the table that it has cached, and a flush makes it forget that.
fn a_look_beside_a_flush() -> bool {
    let table = flushed();
    let device = thread::spawn({
        let table = Arc::clone(&table);
        move || {
            // As in `bytes_of_a_mapper`.
            let _pinned = crossbeam_epoch::pin();
            let mut cached: Vec<TableRef<AmdV1>> = Vec::new();
            let read = table.walk_from(None, walk(0, false, true), Some(&mut cached));
            harvest(&table, pages(0, 2), &[AtomicU64::new(0)]);
            table.flush_begins(&[pages(0, 2)]);
            let written = table.walk_from(cached.first(), walk(1, true, true), None);
            table.flush_ends(&[pages(0, 2)]);
            read.is_ok() && written.is_ok()
        }
    });
    let words = [AtomicU64::new(0)];
    harvest(&table, pages(0, 2), &words);
    let written = device.join().unwrap();
    harvest(&table, pages(0, 2), &words);
    written && bits(&words) == 0b10
}

/// A page is made dirty by hand while two harvests, with a flush in between, decide whether later
/// ones skip.
fn two_looks_beside_a_change_by_hand() -> bool {
    let table = flushed();
    let hand = thread::spawn({
        let table = Arc::clone(&table);
        move || table.make_dirty(page(1)).unwrap()
    });
    let words = [AtomicU64::new(0)];
    harvest(&table, pages(0, 2), &words);
    table.flush_begins(&[pages(0, 2)]);
    table.flush_ends(&[pages(0, 2)]);
    harvest(&table, pages(0, 2), &words);
    hand.join().unwrap();
    harvest(&table, pages(0, 2), &words);
    bits(&words) == 0b10
}

/// Two pages of four are merged while a harvest decides whether later ones skip all of them. The
/// merge makes their leaf dirty without a walk.
fn a_look_beside_a_merge() -> bool {
    let table = Arc::new(Table::<Deep>::skipping());
    assert!(map(&table, pages(0, 4), leaves_of(1)));
    clear_and_flush(&table, pages(0, 4));
    let merger = thread::spawn({
        let table = Arc::clone(&table);
        move || {
            let mut merged = 0;
            let count = |_, _, _| merged += 1;
            table.merge(pages(0, 2), leaves_of(2), count).unwrap();
            merged
        }
    });
    let words = [AtomicU64::new(0)];
    harvest(&table, pages(0, 4), &words);
    let merged = merger.join().unwrap();
    harvest(&table, pages(0, 4), &words);
    merged == 1 && bits(&words) == 0b11
}

#[test]
fn a_merge_beside_a_look_is_reported() {
    holds_within(TABLES, &[Step::HeatMerge], a_look_beside_a_merge);
}

#[test]
fn a_look_that_counts_sees_what_came_before_the_flush() {
    holds_within(ONCE, &[], a_look_beside_a_flush);
    holds_within(TABLES, &[], two_looks_beside_a_change_by_hand);
}

/// Two threads harvest and flush, and a device caches a pointer to the table of two pages.
struct Skipping {
    table: Table<AmdV1>,
    /// One flush of tables at a time, as in a domain.
    flushes: Mutex<()>,
    /// The device has to forget its pointer before it walks again.
    asked: AtomicU64,
}

impl Skipping {
    /// Harvests, and flushes if that is owed. Returns the bits that were found.
    fn pass(&self) -> u64 {
        let words = [AtomicU64::new(0)];
        let gather = harvest(&self.table, pages(0, 2), &words);
        if gather.tables() {
            let _one = lock(&self.flushes);
            self.table.flush_begins(gather.ranges());
            // Relaxed: ordered by the fence, F2 of a port whose device sleeps.
            self.asked.store(1, Ordering::Relaxed);
            fence(Ordering::SeqCst);
            self.table.flush_ends(gather.ranges());
        }
        bits(&words)
    }

    /// A device that slept writes to page 1, by the pointer that it caches or by a new walk.
    fn write(&self, cached: &mut Vec<TableRef<AmdV1>>) {
        // SeqCst: F1 of the port.
        fence(Ordering::SeqCst);
        // Relaxed: ordered by the fence.
        if self.asked.swap(0, Ordering::Relaxed) == 1 {
            cached.clear();
        }
        let from = cached.first();
        self.table
            .walk_from(from, walk(1, true, true), None)
            .unwrap();
    }
}

/// A device caches a pointer to the table, and its write is harvested. Then another thread
/// harvests while this one runs `calls`, which write to page 1 and return the pages that they
/// found. Returns whether that page is found, at the latest in the end.
fn a_harvest_beside(calls: fn(&Skipping, &mut Vec<TableRef<AmdV1>>) -> u64) -> bool {
    let domain = Arc::new(Skipping {
        table: Table::skipping(),
        flushes: Mutex::new(()),
        asked: AtomicU64::new(0),
    });
    assert!(map(&domain.table, pages(0, 2), leaves_of(1)));
    let mut cached = Vec::new();
    let first = walk(0, true, true);
    domain
        .table
        .walk_from(None, first, Some(&mut cached))
        .unwrap();
    let first = domain.pass();
    let other = thread::spawn({
        let domain = Arc::clone(&domain);
        move || domain.pass()
    });
    let mut found = calls(&domain, &mut cached);
    found |= other.join().unwrap();
    found |= domain.pass();
    first == 0b01 && found == 0b10
}

/// Two harvesters look, clear A, flush and skip at once, and then a device writes by the pointer
/// that it has cached, or by a new walk.
fn two_harvesters_that_skip() -> bool {
    a_harvest_beside(|domain, cached| {
        let found = domain.pass();
        domain.write(cached);
        found
    })
}

/// The device writes first.
fn two_harvesters_after_a_write() -> bool {
    a_harvest_beside(|domain, cached| {
        domain.write(cached);
        domain.pass()
    })
}

#[test]
fn two_harvesters_that_skip_at_once_lose_nothing() {
    holds_within(TABLES, &[Step::LookAfterFlush], two_harvesters_that_skip);
    holds_within(TABLES, &[], two_harvesters_after_a_write);
}

/// Two threads hold a table; the one that ends the last hold frees it.
fn the_last_hold_on_a_table() -> bool {
    let table = Arc::new(Beside::single(false));
    table.hold();
    let uses = |table: &Beside| {
        table.look();
        table.let_go()
    };
    let other = thread::spawn({
        let table = Arc::clone(&table);
        move || uses(&table)
    });
    let last = uses(&table);
    other.join().unwrap() != last
}

/// Two threads put a table into the same place of a slab, one after the other.
fn a_place_that_two_threads_claim() -> bool {
    let above = Arc::new(Beside::single(false));
    assert!(above.slab(FEW, 2, 12).is_some());
    let uses = |above: &Beside| {
        let (slab, home) = (above.below().unwrap(), above.slab_below());
        let Some(Place::Free(_, table)) = slab.claim(home, 0, false) else {
            return false;
        };
        table.look();
        if table.let_go() {
            let home = NonNull::new(home).unwrap();
            // SAFETY: the table lay in the slab, and its one hold has ended.
            unsafe { Slab::vacate(home, table.into()) };
        }
        true
    };
    let other = thread::spawn({
        let above = Arc::clone(&above);
        move || uses(&above)
    });
    let first = uses(&above);
    let second = other.join().unwrap();
    // SAFETY: the table above has no other use, and its hold ends once.
    unsafe { above.let_go_below() };
    first || second
}

/// A table and the one above it end at once; the later of the two frees the slab.
fn the_last_hold_on_a_slab() -> bool {
    let above = Beside::single(false);
    let slab = above.slab(FEW, 2, 12).unwrap();
    let home = above.slab_below();
    let Some(Place::Free(_, table)) = slab.claim(home, 0, false) else {
        return false;
    };
    let places = Places(NonNull::new(home).unwrap(), table.into());
    let other = thread::spawn(move || {
        let Places(slab, table) = places;
        // SAFETY: the table holds the slab, which has the record, until `vacate`.
        if unsafe { table.as_ref() }.let_go() {
            // SAFETY: the one hold on the table has ended.
            unsafe { Slab::vacate(slab, table) };
        }
    });
    // SAFETY: the table above has no other use, and its hold ends once.
    unsafe { above.let_go_below() };
    other.join().is_ok()
}

/// A slab, and the record of a table there, on their way to the thread that ends it.
struct Places(NonNull<Slab>, NonNull<Beside>);

// SAFETY: they lead to atomics and to memory that is shared by design.
unsafe impl Send for Places {}

#[test]
fn memory_is_used_again_after_its_last_use() {
    holds_within(TABLES, &[], the_last_hold_on_a_table);
    holds_within(TABLES, &[], a_place_that_two_threads_claim);
    holds_within(TABLES, &[], the_last_hold_on_a_slab);
}

impl<F: Format> Table<F> {
    fn remove_all(&self, range: IovaRange) {
        self.unmap(range, |_, _, _| ()).unwrap();
    }
}
