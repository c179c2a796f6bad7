//! Leaves that change their size and their rights while a device writes, and leaves of several
//! entries.

use super::*;

/// The pages of a model of a leaf of two.
pub(super) fn both() -> IovaRange {
    IovaRange::from_len(Iova::MIN, 2 * PAGE).unwrap()
}

pub(super) fn page(nth: u64) -> IovaRange {
    IovaRange::from_len(Iova::new(nth * PAGE), PAGE).unwrap()
}

/// A domain of two pages, by leaves up to `max_leaf`, that tracks.
fn two_pages<F: Format>(max_leaf: Granule) -> Arc<Domain<F>> {
    let memory = Arc::new(PhysMemory::new(2 * PAGE).unwrap());
    let config = DomainConfig {
        max_leaf,
        ..DomainConfig::default()
    };
    let domain = Domain::with_format(memory, config);
    domain
        .map(&Mapping {
            range: both(),
            backing: 0,
            access: Access::ReadWrite,
        })
        .unwrap();
    domain.set_tracking(Tracking::On).unwrap();
    domain
}

pub(super) fn write_page<F: Format>(device: &mut Device<F>, nth: u64, value: u64) {
    let bytes = value.to_le_bytes();
    device.write(Iova::new(nth * PAGE), &bytes).unwrap();
}

/// Harvests `range`, flushes, and copies the pages that were reported.
pub(super) fn pass_over<F: Format>(domain: &Domain<F>, range: IovaRange, copy: &mut [u64; 2]) {
    let words = [AtomicU64::new(0)];
    let view = UserBitmap::shared(&words).view(range, F::PAGE).unwrap();
    let mut gather = FlushGather::new();
    domain
        .read_and_clear(range, &mut LeafSink::new(&mut view.sink(), &mut gather))
        .unwrap();
    domain.invalidate(&gather).unwrap();
    // Relaxed: this thread's own bitmap.
    let word = words[0].load(Ordering::Relaxed);
    let first = range.start().get() / PAGE;
    for nth in first..2 {
        if word >> (nth - first) & 1 != 0 {
            copy[nth as usize] = memory_of(domain, nth);
        }
    }
}

pub(super) fn memory_of<F: Format>(domain: &Domain<F>, nth: u64) -> u64 {
    let mut bytes = [0; 8];
    domain.memory().read(nth * PAGE, &mut bytes).unwrap();
    u64::from_le_bytes(bytes)
}

/// Whether the copies are equal to the memory after a last pass.
pub(super) fn copied<F: Format>(domain: &Domain<F>, copy: &mut [u64; 2]) -> bool {
    pass_over(domain, both(), copy);
    *copy == [memory_of(domain, 0), memory_of(domain, 1)]
}

/// A device writes to both pages of a leaf, and again, while the leaf is split and one of its parts
/// harvested.
fn writes_against_a_split<F: Format>() -> bool {
    let domain = two_pages::<F>(granule_of_both());
    let mut device = domain.attach(DEVICE);
    let writer = thread::spawn(move || {
        write_page(&mut device, 0, 1);
        idle();
        write_page(&mut device, 1, 2);
        idle();
    });
    let mut copy = [0; 2];
    let mut owed = 0;
    domain
        .table()
        .split_at(Iova::new(PAGE), |_, _| owed += 1)
        .unwrap();
    let parts = domain.translate(Iova::MIN).map(|leaf| leaf.range) == Some(page(0));
    pass_over(&domain, page(0), &mut copy);
    writer.join().unwrap();
    copied(&domain, &mut copy) && parts && owed == 1
}

/// A leaf that was dirtied and cached as a whole is split; a harvest of one part must make the
/// device forget the whole, or its next write to the other part, which was harvested before, goes
/// unseen.
fn a_split_with_a_cached_whole<F: Format>() -> bool {
    let domain = two_pages::<F>(granule_of_both());
    let mut device = domain.attach(DEVICE);
    write_page(&mut device, 0, 1);
    device.quiesce();
    domain.table().split_at(Iova::new(PAGE), |_, _| ()).unwrap();
    let writer = thread::spawn(move || {
        write_page(&mut device, 1, 2);
        idle();
        write_page(&mut device, 0, 3);
        idle();
    });
    let mut copy = [0; 2];
    pass_over(&domain, page(1), &mut copy);
    pass_over(&domain, page(0), &mut copy);
    writer.join().unwrap();
    copied(&domain, &mut copy)
}

/// A device writes to both parts of a future leaf, while they are merged and harvested.
fn writes_against_a_merge<F: Format>() -> bool {
    let domain = two_pages::<F>(F::PAGE);
    let mut device = domain.attach(DEVICE);
    let writer = thread::spawn(move || {
        write_page(&mut device, 0, 1);
        idle();
        write_page(&mut device, 0, 2);
        idle();
    });
    let mut copy = [0; 2];
    domain
        .table()
        .merge(both(), granule_of_both(), |_, _, _| ())
        .unwrap();
    let merged = domain.translate(Iova::MIN).map(|leaf| leaf.range) == Some(both());
    pass_over(&domain, both(), &mut copy);
    writer.join().unwrap();
    copied(&domain, &mut copy) && merged
}

/// A device that caches a pointer to a table writes by it while the table is merged away, and the
/// leaf that took its place is harvested before the device forgets the table.
fn a_merge_of_a_cached_table_against_a_harvest() -> bool {
    let domain = two_pages::<AmdV1>(AmdV1::PAGE);
    let mut device = domain.attach(DeviceConfig {
        walk_entries: 1,
        ..DEVICE
    });
    write_page(&mut device, 0, 1);
    device.quiesce();
    let merger = thread::spawn({
        let domain = Arc::clone(&domain);
        move || domain.merge(both(), granule_of_both()).unwrap()
    });
    let mut copy = [0; 2];
    pass_over(&domain, both(), &mut copy);
    write_page(&mut device, 0, 2);
    drop(device);
    let merged = merger.join().unwrap();
    copied(&domain, &mut copy) && merged == 1
}

/// A table is merged away and its leaf split again, while a device uses a pointer to the old table,
/// which no flush made it forget. That table lies in a slab, and the new one must not be put into
/// its place. Returns whether the device can write.
fn a_table_in_the_place_of_a_cached_one() -> bool {
    let whole = IovaRange::from_len(Iova::MIN, 4 * PAGE).unwrap();
    let memory = Arc::new(PhysMemory::new(4 * PAGE).unwrap());
    let config = DomainConfig {
        max_leaf: Grouped::PAGE,
        ..DomainConfig::default()
    };
    let domain = Domain::<Grouped>::with_format(memory, config);
    domain
        .map(&Mapping {
            range: whole,
            backing: 0,
            access: Access::ReadWrite,
        })
        .unwrap();
    let mut device = domain.attach(DeviceConfig {
        walk_entries: 1,
        ..DEVICE
    });
    write_page(&mut device, 0, 1);
    device.quiesce();
    let writer = thread::spawn(move || {
        let bytes = 2u64.to_le_bytes();
        device.write(Iova::new(PAGE), &bytes).is_ok()
    });
    let table = domain.table();
    table.merge(whole, Grouped::size(1), |_, _, _| ()).unwrap();
    // The hold of the entry above ends when all threads that are pinned have left.
    table.split(whole, Grouped::PAGE, |_, _| ()).unwrap();
    writer.join().unwrap()
}

/// A device writes through the second entry of a leaf of two entries, while the leaf is harvested.
fn a_write_to_a_later_entry_against_a_harvest() -> bool {
    let domain = two_pages::<Grouped>(granule_of_both());
    let mut device = domain.attach(DEVICE);
    let writer = thread::spawn(move || {
        write_page(&mut device, 1, 1);
        idle();
        write_page(&mut device, 0, 2);
        idle();
        write_page(&mut device, 1, 3);
        idle();
    });
    let mut copy = [0; 2];
    pass_over(&domain, both(), &mut copy);
    writer.join().unwrap();
    // The second harvest finds nothing if the first one made all entries clean.
    let lost = !copied(&domain, &mut copy);
    let still_dirty = domain.translate(Iova::MIN).is_some_and(|leaf| leaf.dirty);
    !lost && !still_dirty
}

/// A harvest has recorded one page, and that page becomes a share of a leaf of two before the
/// harvest makes it clean. Another device found D in that share, cached it for the whole leaf, and
/// writes to the other page without a trace. So the harvest must leave the D of the larger leaf,
/// which it has recorded in part only. `others` are mapped beside the two pages.
fn a_merge_against_a_harvest_of_a_part(others: Option<IovaRange>, range: IovaRange) -> bool {
    let memory = Arc::new(PhysMemory::new(4 * PAGE).unwrap());
    let domain = Domain::<Grouped>::with_format(memory, DomainConfig::default());
    let map = |range: IovaRange, sizes: Granule| {
        let mapping = Mapping {
            range,
            backing: range.start().get(),
            access: Access::ReadWrite,
        };
        domain.map_leaves(&mapping, sizes).unwrap();
    };
    map(both(), Grouped::PAGE);
    if let Some(others) = others {
        map(others, granule_of_both());
    }
    domain.set_tracking(Tracking::On).unwrap();
    let mut first = domain.attach(DEVICE);
    write_page(&mut first, 0, 1);
    drop(first);
    let mut device = domain.attach(DEVICE);
    let harvester = thread::spawn({
        let domain = Arc::clone(&domain);
        move || {
            let mut copy = [0; 2];
            pass_over(&domain, range, &mut copy);
            copy
        }
    });
    let mut merged = 0;
    domain
        .table()
        .merge(both(), granule_of_both(), |_, _, _| merged += 1)
        .unwrap();
    write_page(&mut device, 0, 2);
    write_page(&mut device, 1, 3);
    drop(device);
    let mut copy = harvester.join().unwrap();
    copied(&domain, &mut copy) && merged == 1
}

/// The page is one of a batch of leaves.
fn a_merge_against_a_harvest_of_a_page() -> bool {
    a_merge_against_a_harvest_of_a_part(None, page(0))
}

/// The page is looked at by itself, as there is a leaf of several entries in its table.
fn a_merge_against_a_harvest_beside_a_group() -> bool {
    let others = IovaRange::from_len(Iova::new(2 * PAGE), 2 * PAGE).unwrap();
    let all = IovaRange::from_len(Iova::MIN, 4 * PAGE).unwrap();
    a_merge_against_a_harvest_of_a_part(Some(others), all)
}

/// A leaf of two entries is unmapped while a device writes: the D that the unmap reports includes
/// every write before.
fn a_write_against_an_unmap_of_a_group() -> bool {
    let table = Arc::new(Table::<Grouped>::new());
    table
        .map(both(), 0, Access::ReadWrite, granule_of_both())
        .unwrap();
    let writer = thread::spawn({
        let table = Arc::clone(&table);
        move || table.set_dirty(Iova::new(PAGE)).map(|leaf| leaf.range)
    });
    let mut gone = Vec::new();
    table
        .unmap(both(), |leaf, _, dirty| gone.push((leaf, dirty)))
        .unwrap();
    // A walk finds the leaf, all of it, or nothing.
    match writer.join().unwrap() {
        Some(leaf) => leaf == both() && gone == [(both(), true)],
        None => gone == [(both(), false)],
    }
}

/// Two calls map overlapping ranges, one of them by a leaf of two entries: at most one is in the
/// table.
fn two_maps_of_a_range<F: Format>() -> bool {
    let table = Arc::new(Table::<F>::new());
    let map =
        |table: &Table<F>, range, max: Granule| table.map(range, 0, Access::ReadWrite, max).is_ok();
    let other = thread::spawn({
        let table = Arc::clone(&table);
        move || map(&table, page(1), F::PAGE)
    });
    let whole = map(&table, both(), granule_of_both());
    let part = other.join().unwrap();
    let at = |nth: u64| {
        table
            .translate(Iova::new(nth * PAGE))
            .map(|leaf| leaf.range)
    };
    match (whole, part) {
        (true, false) => at(0) == Some(both()) && at(1) == Some(both()),
        (false, true) => at(0).is_none() && at(1) == Some(page(1)),
        (false, false) => at(0).is_none() && at(1).is_none(),
        (true, true) => false,
    }
}

/// Rights are taken away while a device sets D: it is kept, or the device finds the leaf read-only.
fn a_write_against_protect<F: Format>() -> bool {
    let table = Arc::new(Table::<F>::new());
    table.map(all(), 0, Access::ReadWrite, F::PAGE).unwrap();
    let writer = thread::spawn({
        let table = Arc::clone(&table);
        move || table.set_dirty(Iova::MIN).unwrap().access.writes()
    });
    table.protect(all(), Access::Read, |_, _| ()).unwrap();
    let wrote = writer.join().unwrap();
    let leaf = table.translate(Iova::MIN).unwrap();
    leaf.dirty == wrote && leaf.access == Access::Read
}

/// AMD v1 with tables of four entries: two pages are a leaf of two entries.
type Grouped = AmdHost<4, 11>;

fn granule_of_both() -> Granule {
    Granule::from_bytes(2 * PAGE).unwrap()
}

#[test]
fn a_split_loses_no_write() {
    holds_within(TABLES, &[Step::DirtyParts], writes_against_a_split::<AmdV1>);
    holds_within(
        TABLES,
        &[Step::SpreadDirty],
        writes_against_a_split::<Grouped>,
    );
    holds_within(
        TABLES,
        &[Step::DropLarger],
        a_split_with_a_cached_whole::<AmdV1>,
    );
}

#[test]
fn a_merge_loses_no_write() {
    holds_within(TABLES, &[Step::DirtyWhole], writes_against_a_merge::<AmdV1>);
    holds_within(TABLES, &[], writes_against_a_merge::<Grouped>);
    let merge = a_merge_of_a_cached_table_against_a_harvest;
    holds_within(TABLES, &[Step::DirtyBehindFlush], merge);
}

#[test]
fn a_harvest_cleans_what_it_has_recorded_and_no_larger_leaf() {
    holds_within(
        TABLES,
        &[Step::SpareGroup],
        a_merge_against_a_harvest_of_a_page,
    );
    holds_within(
        TABLES,
        &[Step::SpareLarger],
        a_merge_against_a_harvest_beside_a_group,
    );
}

#[test]
fn a_group_is_read_cleaned_and_unmapped_as_a_whole() {
    let steps = [Step::ReadEveryEntry, Step::CleanEveryEntry];
    holds_within(TABLES, &steps, a_write_to_a_later_entry_against_a_harvest);
    holds_within(TABLES, &[], a_write_against_an_unmap_of_a_group);
}

/// Invariant 6 in a table.
#[test]
fn two_maps_never_overlap() {
    holds_within(TABLES, &[], two_maps_of_a_range::<Grouped>);
    holds_within(TABLES, &[], two_maps_of_a_range::<AmdV1>);
}

#[test]
fn rights_that_are_taken_away_leave_what_is_dirty() {
    holds_within(TABLES, &[], a_write_against_protect::<AmdV1>);
    holds_within(TABLES, &[], a_write_against_protect::<ArmS1>);
}

/// A device walks into a table that is installed beside it, and a large leaf takes the place of
/// another table: it finds each table whole, and no table is freed while it is inside.
fn walks_against_tables_that_come_and_go() -> bool {
    let table = Arc::new(Table::<AmdV1>::new());
    let map = |table: &Table<AmdV1>, range, max: Granule| {
        table.map(range, 0, Access::ReadWrite, max).is_ok()
    };
    let walker = thread::spawn({
        let table = Arc::clone(&table);
        move || {
            let early = table.set_dirty(Iova::MIN).map(|leaf| leaf.range);
            early.is_none_or(|leaf| leaf == page(0) || leaf == both())
        }
    });
    // A table with a leaf, which goes; then a leaf in the place of the table.
    let mapped = map(&table, page(0), AmdV1::PAGE);
    let unmapped = table.unmap(page(0), |_, _, _| ()).is_ok();
    let replaced = map(&table, both(), granule_of_both());
    let seen = walker.join().unwrap();
    mapped && unmapped && replaced && seen
}

/// Rule 10 of the contract for tables: installed whole, and freed only after the walkers inside
/// have left.
#[test]
fn a_table_is_whole_and_outlives_its_walkers() {
    let steps = [Step::WaitForWalkers];
    holds_within(TABLES, &steps, walks_against_tables_that_come_and_go);
    breaks_without(
        Step::PublishTable,
        "leaves::a_table_is_whole_and_outlives_its_walkers",
        walks_against_tables_that_come_and_go,
    );
}

/// A table is put into a place of a slab only when no device caches a pointer to the table that lay
/// there.
#[test]
fn a_place_of_a_slab_is_used_again_when_nobody_holds_it() {
    let steps = [Step::ClaimFree];
    holds_within(TABLES, &steps, a_table_in_the_place_of_a_cached_one);
}
