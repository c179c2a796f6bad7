//! Runs of a lease that were discarded: records of zeroes in an increment of Ceph, holes in an NBD
//! export.
#![cfg(all(unix, feature = "nbd", feature = "rbd"))]
#![allow(clippy::unwrap_used)]

use std::os::unix::net::UnixStream;
use std::thread;

use dirtymap::exchange::RunTable;
use dirtymap::{Access, AddressSpace, Granule, Iova, IovaRange};
use dirtymap_formats::nbd::{Connect, Export, serve};
use dirtymap_formats::rbd::{Meta, RbdError, Reader, Record, write_lease};

fn run(start: u64, len: u64) -> IovaRange {
    IovaRange::from_len(Iova::new(start), len).unwrap()
}

/// Pages 2 to 5 are dirty, 3 and 4 of them were discarded. The disk still has old bytes there: no
/// format reads them.
fn space() -> AddressSpace {
    let space = AddressSpace::tracked(Granule::K4);
    space.map(0..1 << 20, 0, Access::ReadWrite).unwrap();
    space.mark(0x2000..0x6000).unwrap();
    space.discard(0x3000..0x5000, || Ok(())).unwrap();
    space
}

fn meta(size: u64) -> Meta {
    Meta {
        from: Some("a".into()),
        to: Some("b".into()),
        size,
    }
}

#[test]
fn discarded_runs_are_records_of_zeroes() {
    let (space, disk) = (space(), vec![7; 1 << 20]);
    let lease = space.rounds().next().unwrap();
    let stream = write_lease(Vec::new(), &meta(1 << 20), &lease, &disk).unwrap();
    let mut reader = Reader::new(&stream[..]).unwrap();
    let records: Vec<_> = std::iter::from_fn(|| reader.next_record().unwrap()).collect();
    let data = |offset| Record::Data {
        offset,
        len: 0x1000,
    };
    let zeroes = Record::Zeroes {
        offset: 0x3000,
        len: 0x2000,
    };
    assert_eq!(records, [data(0x2000), zeroes, data(0x5000)]);
    // The disk ends inside of a run that was discarded: what lies past its end is cut off.
    space.mark(0x1000..0x2000).unwrap();
    let short = write_lease(Vec::new(), &meta(0x5800), &lease, &disk[..0x5800]);
    assert!(short.is_ok());
    let refused = write_lease(Vec::new(), &meta(0x1000), &lease, &disk);
    assert!(matches!(
        refused,
        Err(RbdError::Outside { size: 0x1000, .. })
    ));
    lease.commit();
    space.discard(0x3000..0x5000, || Ok(())).unwrap();
    let lease = space.rounds().next().unwrap();
    let stream = write_lease(Vec::new(), &meta(0x4800), &lease, &disk[..0x4800]).unwrap();
    let mut reader = Reader::new(&stream[..]).unwrap();
    assert_eq!(reader.next_record().unwrap(), Some(data(0x1000)));
    let cut = Record::Zeroes {
        offset: 0x3000,
        len: 0x1800,
    };
    assert_eq!(reader.next_record().unwrap(), Some(cut));
    assert_eq!(reader.next_record().unwrap(), None);
}

#[test]
fn discarded_runs_are_holes_of_an_export() {
    let space = space();
    let lease = space.rounds().next().unwrap();
    let export = Export::new("disk", 1 << 20).unwrap();
    let export = export.with_lease("now", &lease).unwrap();
    let export = [export.with_holes_of(&lease).unwrap()];
    let (ours, theirs) = UnixStream::pair().unwrap();
    thread::scope(|scope| {
        let server = scope.spawn(|| serve(ours, &export));
        let connect = Connect::new("disk").dirty("now").context("base:allocation");
        let mut client = connect.over(theirs).unwrap();
        let dirty: RunTable = [run(0x2000, 0x4000)].into_iter().collect();
        assert_eq!(client.read_dirty("now").unwrap(), dirty);
        // Bit 0 is a hole, bit 1 reads as zero.
        let holes = client.read_context("base:allocation", |flags| flags == 3);
        let zero: RunTable = [run(0x3000, 0x2000)].into_iter().collect();
        assert_eq!(holes.unwrap(), zero);
        client.disconnect().unwrap();
        server.join().unwrap().unwrap();
    });
    lease.commit();
}
