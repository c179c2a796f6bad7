//! Several page tables of one IOAS, as several domains of one space.

use std::io;
use std::sync::Arc;

use dirtymap::flush::FlushGather;
use dirtymap::source::LeafSink;
use dirtymap::{
    Access, AddressSpace, DirtySource, DomainId, Granule, HarvestRequest, Scope, UserBitmap,
};

use super::fake::{Dev, Fake, pages};
use super::unknown::inner;
use crate::{Hwpt, Ioas, IoasOptions, IommufdError};

struct Two {
    fake: Fake,
    ioas: Ioas,
    tables: [Arc<Hwpt>; 2],
    domains: [DomainId; 2],
    space: AddressSpace,
}

/// 64 pages, mapped by two domains that track.
fn two() -> Two {
    two_with([4096; 2])
}

/// The same, with the smallest page of each IOMMU in bytes.
fn two_with(smallest: [u64; 2]) -> Two {
    let fake = Fake::new(Granule::K4);
    let ioas = fake.ioas(IoasOptions::default());
    let tables = smallest.map(|bytes| {
        fake.state().alignment = bytes;
        ioas.hwpt(1).unwrap()
    });
    let space = AddressSpace::new(Granule::K4);
    let attach = |table: &Arc<Hwpt>| space.attach(Arc::clone(table)).unwrap();
    let domains = [attach(&tables[0]), attach(&tables[1])];
    space.map(pages(0, 64), 0, Access::ReadWrite).unwrap();
    space.start_tracking().unwrap();
    Two {
        fake,
        ioas,
        tables,
        domains,
        space,
    }
}

impl Two {
    fn write(&self, table: usize, page: u64) {
        assert!(self.fake.write(self.tables[table].id(), page << 12));
    }

    fn harvest(&self, scope: Scope) -> u64 {
        let mut words = [0];
        let request = HarvestRequest::new(pages(0, 64), Granule::K4).in_scope(scope);
        let lease = self
            .space
            .harvest(&request, UserBitmap::new(&mut words))
            .unwrap();
        lease.sync().unwrap().commit();
        words[0]
    }

    fn unmap(&self) -> u64 {
        let mut words = [0];
        self.space
            .unmap(pages(0, 64), Granule::K4, UserBitmap::new(&mut words))
            .unwrap();
        words[0]
    }
}

#[test]
fn one_mapping_of_the_kernel_serves_all_and_each_has_its_own_dirty_state() {
    let two = two();
    assert_eq!(two.fake.count("map"), 1);
    two.write(0, 3);
    two.write(1, 40);
    assert_eq!(two.harvest(Scope::Domain(two.domains[0])), 1 << 3);
    assert_eq!(two.harvest(Scope::Domain(two.domains[0])), 0);
    two.write(0, 4);
    assert_eq!(two.harvest(Scope::All), 1 << 4 | 1 << 40);
    assert_eq!(two.harvest(Scope::All), 0);
}

/// The first domain that unmaps cannot end its translations: they go with the second's. What its
/// devices write until then is told by the second.
#[test]
fn the_last_unmap_tells_what_the_others_wrote_until_then() {
    let two = two();
    two.tables[0].attach(&Dev::new(1)).unwrap();
    two.tables[1].attach(&Dev::new(2)).unwrap();
    two.write(0, 3);
    two.write(1, 40);
    let mut gather = FlushGather::new();
    let mut told = Vec::new();
    two.tables[0].unmap(pages(0, 64), &mut gather, &mut |run| told.push(run));
    assert_eq!(told, [pages(3, 1)]);
    assert!(
        !gather.is_empty(),
        "a flush asks whether devices still reach it"
    );
    two.write(0, 5); // by the mapping of the other domain
    let mut told = Vec::new();
    two.tables[1].unmap(pages(0, 64), &mut gather, &mut |run| told.push(run));
    told.sort_by_key(|run| run.start());
    assert!(
        told.contains(&pages(5, 1)) && told.contains(&pages(40, 1)),
        "{told:?}"
    );
    two.tables[0].invalidate(&gather).unwrap();
}

#[test]
fn an_unmap_ends_the_translations_of_all() {
    let two = two();
    two.tables[0].attach(&Dev::new(1)).unwrap();
    two.write(0, 3);
    two.write(1, 40);
    assert_eq!(two.unmap(), 1 << 3 | 1 << 40);
    assert_eq!(two.fake.count("unmap"), 1);
    assert!(!two.fake.write(two.tables[0].id(), 3 << 12));
    two.space.map(pages(0, 64), 0, Access::ReadWrite).unwrap();
    assert_eq!(two.harvest(Scope::All), 0);
}

/// A domain is detached while its devices are attached: they would go on to reach the memory, by
/// the mapping that the other domain keeps, and nobody would be told what they write.
#[test]
fn a_domain_with_devices_is_not_detached_from_memory_that_another_one_keeps_mapped() {
    let two = two();
    let device = Dev::new(1);
    two.tables[0].attach(&device).unwrap();
    two.write(0, 3);
    let error = inner(two.space.detach(two.domains[0]).unwrap_err());
    assert!(
        matches!(error, IommufdError::DevicesAttached { .. }),
        "{error}"
    );
    two.write(0, 5);
    two.tables[1].attach(&device).unwrap(); // it moves, and nothing is lost
    two.space.detach(two.domains[0]).unwrap();
    assert_eq!(two.harvest(Scope::All), 1 << 3 | 1 << 5);
    two.write(1, 6);
    assert_eq!(two.harvest(Scope::All), 1 << 6);
}

#[test]
fn a_device_that_moves_leaves_what_it_wrote_where_it_was() {
    let two = two();
    let device = Dev::new(1);
    two.tables[0].attach(&device).unwrap();
    two.write(0, 3);
    two.tables[1].attach(&device).unwrap();
    two.write(1, 4);
    assert_eq!(two.harvest(Scope::Domain(two.domains[0])), 1 << 3);
    assert_eq!(two.harvest(Scope::All), 1 << 4);
}

#[test]
fn a_table_that_is_dropped_ends_its_mappings_and_is_destroyed() {
    let Two {
        fake,
        ioas,
        tables,
        space,
        ..
    } = two();
    drop((space, tables));
    assert_eq!((fake.count("unmap"), fake.count("destroy")), (1, 2));
    assert!(fake.state().areas.is_empty() && fake.state().hwpts.is_empty());
    drop(ioas);
    assert_eq!(fake.count("destroy"), 3);
}

#[test]
fn a_table_of_other_mappings_is_refused() {
    let two = two();
    let other = AddressSpace::new(Granule::K4);
    other.map(pages(0, 64), 0x1000, Access::ReadWrite).unwrap();
    let third = two.ioas.hwpt(3).unwrap();
    let error = inner(other.attach(third).unwrap_err());
    assert!(
        matches!(error, IommufdError::Occupied { range } if range == pages(0, 64)),
        "{error}"
    );
}

/// The last count of a table is dropped while another one of its IOAS is at work. Its drop waits
/// for the same lock.
#[test]
fn a_table_that_goes_in_the_middle_of_an_unmap_of_another_one() {
    let Two {
        fake,
        ioas: _ioas,
        tables: [first, last],
        space,
        ..
    } = two();
    drop(space);
    fake.write(last.id(), 3 << 12);
    let unmap = |table: &Hwpt, told: &mut dyn FnMut()| {
        let mut gather = FlushGather::new();
        table.unmap(pages(0, 64), &mut gather, &mut |_| told());
    };
    unmap(&first, &mut || ());
    let mut first = Some(first);
    let mut dropping = None;
    unmap(&last, &mut || {
        let first = first.take();
        dropping = Some(std::thread::spawn(move || drop(first)));
    });
    dropping.unwrap().join().unwrap();
    assert!(fake.state().areas.is_empty());
    assert_eq!(fake.state().hwpts.len(), 1);
}

impl Two {
    /// A harvest in the order `order` of the tables, with a flush after `before` of them.
    fn harvest_with_a_flush(&self, order: [usize; 2], before: usize) -> u64 {
        let mut words = [0];
        let view = UserBitmap::new(&mut words).view(pages(0, 64), Granule::K4);
        let view = view.unwrap();
        let mut sink = view.sink();
        let mut gather = FlushGather::new();
        let mut owed = FlushGather::new();
        owed.add(pages(0, 64), Granule::K4);
        let flush = || {
            let invalidate = |table: &Arc<Hwpt>| table.invalidate(&owed).unwrap();
            self.tables.iter().map(invalidate).for_each(drop);
        };
        for (done, table) in order.into_iter().enumerate() {
            if done == before {
                flush();
            }
            let mut out = LeafSink::new(&mut sink, &mut gather);
            let table = &self.tables[table];
            table.read_and_clear(pages(0, 64), &mut out).unwrap();
        }
        if before == order.len() {
            flush();
        }
        words[0]
    }
}

/// A detach fails, because a device is attached. The device writes, moves, and the detach is tried
/// again, by a flush. The flush moved the written page to the other table and forgot it. A harvest
/// that had read the other table by then, and read this one next, found the page in neither.
#[test]
fn a_harvest_finds_the_page_of_a_detach_that_is_tried_again_wherever_the_flush_comes() {
    for order in [[0, 1], [1, 0]] {
        for before in 0..=2 {
            let two = two();
            let device = Dev::new(1);
            two.tables[1].attach(&device).unwrap();
            two.space.detach(two.domains[1]).unwrap_err();
            two.write(1, 5);
            two.tables[0].attach(&device).unwrap();
            let told = two.harvest_with_a_flush(order, before);
            let at = format!("a flush after {before} reads in the order {order:?}");
            assert_eq!(told, 1 << 5, "{at}");
            two.space.detach(two.domains[1]).unwrap();
            two.write(0, 6);
            let told = two.harvest(Scope::All);
            assert_eq!(told & !(1 << 5), 1 << 6, "{at}: page 5 may be told twice");
            assert_eq!(two.harvest(Scope::All), 0, "{at}");
        }
    }
}

/// The IOMMUs have pages of two sizes, so bit 5 of one table is not page 5 of the other.
#[test]
fn a_page_that_a_detach_leaves_to_a_table_of_other_pages_is_found_there() {
    for smallest in [[4096, 65536], [65536, 4096]] {
        let two = two_with(smallest);
        let device = Dev::new(1);
        two.tables[0].attach(&device).unwrap();
        two.space.detach(two.domains[0]).unwrap_err();
        two.write(0, 37);
        two.tables[1].attach(&device).unwrap();
        two.space.detach(two.domains[0]).unwrap();
        assert_eq!(two.harvest(Scope::All), 0xffff << 32, "{smallest:?}");
    }
}

/// The table of such a detach knows its pieces until the memory is unmapped, so that a harvest
/// which is under way finds their pages. It can come back meanwhile.
#[test]
fn a_table_that_was_detached_with_a_second_try_comes_back() {
    let two = two();
    let device = Dev::new(1);
    two.tables[0].attach(&device).unwrap();
    two.space.detach(two.domains[0]).unwrap_err();
    two.write(0, 5);
    two.tables[1].attach(&device).unwrap();
    two.space.detach(two.domains[0]).unwrap();
    assert_eq!(two.harvest(Scope::All), 1 << 5);
    two.space.attach(Arc::clone(&two.tables[0])).unwrap();
    two.tables[0].attach(&device).unwrap();
    two.write(0, 7);
    assert_eq!(two.harvest(Scope::All), 1 << 7);
    two.write(0, 8);
    assert_eq!(two.unmap(), 1 << 8);
    for table in &two.tables {
        assert!(table.table().logs().by_start.is_empty());
    }
    two.space.map(pages(0, 64), 0, Access::ReadWrite).unwrap();
    assert_eq!(two.harvest(Scope::All), 0);
}

/// A harvest had read the other table before the second try of the detach copied the page there.
/// Then the first table was attached again, and its switch to "on" forgot the page, which the
/// harvest had yet to read. The harvest ended without it.
#[test]
fn a_table_that_comes_back_during_a_harvest_still_has_its_page() {
    for smallest in [[4096; 2], [65536, 4096], [4096, 65536]] {
        let two = two_with(smallest);
        let device = Dev::new(1);
        two.tables[1].attach(&device).unwrap();
        two.space.detach(two.domains[1]).unwrap_err();
        two.write(1, 5);
        two.tables[0].attach(&device).unwrap();
        let mut words = [0];
        let view = UserBitmap::new(&mut words).view(pages(0, 64), Granule::K4);
        let view = view.unwrap();
        let mut sink = view.sink();
        let mut gather = FlushGather::new();
        let mut read = |table: usize| {
            let mut out = LeafSink::new(&mut sink, &mut gather);
            let table = &two.tables[table];
            table.read_and_clear(pages(0, 64), &mut out).unwrap();
        };
        read(0);
        two.space.detach(two.domains[1]).unwrap();
        two.space.attach(Arc::clone(&two.tables[1])).unwrap();
        read(1);
        assert_eq!(words[0] >> 5 & 1, 1, "page 5, pages of {smallest:?}");
        // The copy of the other table is reported once more.
        assert_eq!(two.harvest(Scope::All) >> 5 & 1, 1);
        assert_eq!(two.harvest(Scope::All), 0);
    }
}

/// A device moved in one step from a table that tracks to a new one, which was attached to the
/// space a moment later. What it wrote in between was in no table: a final harvest ended without
/// these pages.
#[test]
fn a_device_does_not_move_to_a_table_that_does_not_track() {
    let two = two();
    let new = two.ioas.hwpt(1).unwrap();
    let device = Dev::new(1);
    two.tables[0].attach(&device).unwrap();
    let error = new.attach(&device).unwrap_err();
    let tracking = two.tables[0].id();
    assert!(
        matches!(error, IommufdError::NotTracking { hwpt, other }
            if hwpt == new.id() && other == tracking),
        "{error}"
    );
    let uses = two.ioas.iommufd().devices().get(&1).copied();
    assert_eq!((uses, device.attached()), (Some(tracking), Some(tracking)));
    two.space.attach(Arc::clone(&new)).unwrap();
    new.attach(&device).unwrap();
    assert!(two.fake.write(new.id(), 9 << 12));
    assert_eq!(two.harvest(Scope::All), 1 << 9);
}

/// Before tracking begins, it is the same: the table reaches what another domain has mapped, and
/// the space never learns of it. After a detach, too.
#[test]
fn a_device_does_not_use_a_table_whose_domain_has_not_mapped_what_it_reaches() {
    let fake = Fake::new(Granule::K4);
    let ioas = fake.ioas(IoasOptions::default());
    let [old, new] = [1, 2].map(|device| ioas.hwpt(device).unwrap());
    let space = AddressSpace::new(Granule::K4);
    space.attach(Arc::clone(&old)).unwrap();
    space.map(pages(0, 64), 0, Access::ReadWrite).unwrap();
    let device = Dev::new(2);
    let refused = || {
        let error = new.attach(&device).unwrap_err();
        assert!(
            matches!(error, IommufdError::NotMapped { hwpt, range }
                if hwpt == new.id() && range == pages(0, 64)),
            "{error}"
        );
        assert_eq!(device.attached(), None);
    };
    refused();
    let domain = space.attach(Arc::clone(&new)).unwrap();
    new.attach(&device).unwrap();
    new.detach(&device).unwrap();
    space.detach(domain).unwrap();
    refused();
    space.start_tracking().unwrap();
    new.attach(&device).unwrap_err();
}

/// The file of a device was closed while it was attached. By that, the kernel detaches it, and
/// tells nobody. The books said that it was attached, so every flush failed, for ever.
#[test]
fn a_device_whose_file_was_closed_blocks_no_flush() {
    // A handle that is still there: its calls fail.
    for errno in [libc::EBADF, libc::ENODEV] {
        let two = two();
        let mut device = Dev::new(1);
        two.tables[0].attach(&device).unwrap();
        two.write(0, 3);
        device.answer = Err(io::Error::from_raw_os_error(errno));
        two.space.detach(two.domains[0]).unwrap_err();
        two.tables[0].detach(&device).unwrap();
        two.space.detach(two.domains[0]).unwrap();
        assert_eq!(two.harvest(Scope::All) & 1 << 3, 1 << 3);
    }
    // No handle.
    let two = two();
    two.tables[0].attach(&Dev::new(1)).unwrap();
    two.write(0, 3);
    let error = inner(two.space.detach(two.domains[0]).unwrap_err());
    let IommufdError::DevicesAttached { devices, .. } = &error else {
        panic!("{error}");
    };
    assert_eq!(*devices, [1], "the error names what to forget");
    let iommufd = two.ioas.iommufd();
    assert!(iommufd.forget_device(devices[0]));
    assert!(!iommufd.forget_device(1), "it is not known any more");
    two.space.detach(two.domains[0]).unwrap();
    assert_eq!(two.harvest(Scope::All), 1 << 3);
}

/// Any other error says that the device may be attached still.
#[test]
fn a_detach_that_is_refused_leaves_the_device_attached() {
    let two = two();
    let mut device = Dev::new(1);
    two.tables[0].attach(&device).unwrap();
    device.answer = Err(io::Error::from_raw_os_error(libc::EINVAL));
    let error = two.tables[0].detach(&device).unwrap_err();
    assert!(matches!(error, IommufdError::Call { .. }), "{error}");
    let error = inner(two.space.detach(two.domains[0]).unwrap_err());
    assert!(
        matches!(error, IommufdError::DevicesAttached { .. }),
        "{error}"
    );
}
