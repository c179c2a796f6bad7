//! Bugs of dirty tracking in Linux and related programs, each as a plain test. The numbers are
//! those of docs/history.md.

use super::*;

/// A leaf of 16 entries where the format has one, or else of as many pages in one entry.
fn sixteen<F: Format>() -> Granule {
    let wanted = granule(F::PAGE_LG2 + 4);
    if F::LEAF_SIZES.contains(wanted) {
        wanted
    } else {
        F::size(1)
    }
}

fn mapped<F: Format>(size: Granule, count: u64) -> (Table<F>, IovaRange) {
    let table = Table::<F>::new();
    let area = range(0, count * size.bytes());
    table
        .map(area, 0, Access::ReadWrite, LeafSizes::only(size))
        .unwrap();
    (table, area)
}

/// Bug 11a: only the part of a contiguous leaf inside the request was recorded, and all of it
/// cleaned.
pub(super) fn bug_11a_one_half_of_a_leaf_is_read_then_the_other<F: Format>() {
    let size = sixteen::<F>();
    let half = size.bytes() / 2;
    for written in [0, half, size.bytes() - 1] {
        let (table, area) = mapped::<F>(size, 1);
        table.set_dirty(iova(written)).unwrap();
        for start in [0, half] {
            let found = dirty(&table, range(start, half), true).0;
            assert_eq!(found, pages::<F>(start, half));
        }
        dirty(&table, area, true);
        assert_eq!(dirty(&table, area, true).0, [0u64; 0]);
    }
}

/// Bug 11b: a contiguous leaf was reported one page short.
pub(super) fn bug_11b_the_last_page_of_a_leaf_is_reported<F: Format>() {
    let size = sixteen::<F>();
    let (table, area) = mapped::<F>(size, 2);
    for written in [0, size.bytes() - 1] {
        table.set_dirty(iova(written)).unwrap();
        assert_eq!(dirty(&table, area, true).0, pages::<F>(0, size.bytes()));
    }
}

/// Bug 12: a request that begins inside a leaf never reached the last leaf; one that begins inside
/// a hole skipped the start of the next leaf.
pub(super) fn bug_12_a_request_from_inside_a_leaf_or_a_hole_reaches_the_next<F: Format>() {
    let size = F::size(1);
    let (table, _) = mapped::<F>(size, 2);
    let half = size.bytes() / 2;
    table.set_dirty(iova(size.bytes())).unwrap();
    let found = dirty(&table, range(half, size.bytes()), true).0;
    assert_eq!(found, pages::<F>(size.bytes(), half));

    let (table, _) = mapped::<F>(size, 3);
    table.unmap(range(0, size.bytes()), |_, _, _| ()).unwrap();
    table.set_dirty(iova(size.bytes())).unwrap();
    let found = dirty(&table, range(half, 2 * size.bytes()), true).0;
    assert_eq!(found, pages::<F>(size.bytes(), size.bytes()));
}

/// Bug 16: an unmap of the start of a large leaf went past the requested end, and the flush covered
/// only the request.
pub(super) fn bug_16_an_unmap_of_the_start_of_a_leaf_is_refused_or_owes_all_of_it<F: Format>() {
    for size in [sixteen::<F>(), F::size(1)] {
        let (table, area) = mapped::<F>(size, 1);
        let part = range(0, k::<F>());
        let refused = table.unmap(part, |_, _, _| panic!("nothing goes"));
        assert!(matches!(refused, Err(Error::PartOfLeaf { leaf, .. }) if leaf == area));
        // Split first: then exactly the request is unmapped, and devices may still use the whole
        // leaf.
        let mut owed = FlushGather::new();
        table
            .split_at(iova(k::<F>()), |leaf, size| owed.add(leaf, size))
            .unwrap();
        let mut gone = vec![];
        table.unmap(part, |leaf, _, _| gone.push(leaf)).unwrap();
        assert_eq!((gone, owed.ranges()), (vec![part], &[area][..]));
    }
}

/// Bug 23: a D that hardware set between the read of an entry and its write-back was overwritten by
/// the stale copy.
pub(super) fn bug_23_no_change_of_a_leaf_writes_a_stale_copy_back<F: Format>() {
    let size = F::size(1);
    for _ in 0..50 {
        let (table, area) = mapped::<F>(size, 1);
        std::thread::scope(|s| {
            let writer = s.spawn(|| table.set_dirty(iova(size.bytes() - 1)).unwrap());
            table.protect(area, Access::Read, |_, _| ()).unwrap();
            table.split(area, F::PAGE, |_, _| ()).unwrap();
            let wrote = writer.join().unwrap();
            let found = dirty(&table, area, true).0;
            assert_eq!(!found.is_empty(), wrote.access.writes());
        });
    }
}

/// Bug 25: a write that is not aligned dirtied as many pages as it has bytes in pages, and the page
/// of its tail stayed clean.
pub(super) fn bug_25_the_page_of_a_writes_tail_is_dirty<F: Format>() {
    use crate::{DeviceConfig, Domain, DomainConfig, PhysMemory};
    use dirtymap::{DirtySource, Mapping, Tracking};
    let k = k::<F>();
    let config = DomainConfig {
        max_leaf: F::PAGE,
        ..DomainConfig::default()
    };
    let memory = std::sync::Arc::new(PhysMemory::new(8 * k).unwrap());
    let domain = Domain::<F>::with_format(memory, config);
    let area = range(0, 8 * k);
    domain
        .map(&Mapping {
            range: area,
            backing: 0,
            access: Access::ReadWrite,
        })
        .unwrap();
    domain.set_tracking(Tracking::On).unwrap();
    let mut device = domain.attach(DeviceConfig::default());
    for (start, len) in [(k - 1, 2), (k - 1, k + 2), (k / 2, k), (1, 2 * k), (0, k)] {
        device.write(iova(start), &vec![1; len as usize]).unwrap();
        let count = (start + len - 1) / k - start / k + 1;
        let (found, gather) = dirty(domain.table(), area, true);
        assert_eq!(found, pages::<F>(start / k * k, count * k));
        device.quiesce();
        domain.invalidate(&gather).unwrap();
    }
}
