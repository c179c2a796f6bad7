//! The serialized form of counts and reports.
#![cfg(all(feature = "serde", not(dirtymap_loom)))]
#![allow(clippy::unwrap_used)] // helpers of tests

use dirtymap::space::SpaceStats;
use dirtymap::{Access, AddressSpace, Granule, HarvestRequest, Iova, IovaRange, UserBitmap};
use serde_json::{json, to_value};

#[test]
fn addresses_are_numbers_and_reports_have_names() {
    let range = IovaRange::from_len(Iova::new(4096), 8192).unwrap();
    assert_eq!(
        to_value(range).unwrap(),
        json!({"start": 4096, "last": 12287})
    );
    assert_eq!(to_value(Granule::M2).unwrap(), json!(2 << 20));
    let space = AddressSpace::new(Granule::K4);
    space.map(range, 0, Access::ReadWrite).unwrap();
    space.start_tracking().unwrap();
    space.mark(range).unwrap();
    let mut words = [0u64];
    let request = HarvestRequest::new(range, Granule::K4);
    let lease = space
        .harvest(&request, UserBitmap::new(&mut words))
        .unwrap();
    let report = lease.sync().unwrap().commit();
    assert_eq!(to_value(report).unwrap()["bits_set"], json!(2));
    let stats: SpaceStats = space.stats();
    let stats = to_value(stats).unwrap();
    assert_eq!(stats["committed_bytes"], json!(8192));
    assert!(stats["flush"]["flushes"].is_number());
}
