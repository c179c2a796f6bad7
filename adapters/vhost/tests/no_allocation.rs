//! Harvests do not allocate.
#![cfg(all(target_os = "linux", not(dirtymap_loom)))]
#![allow(clippy::unwrap_used)] // helpers of tests

#[path = "../../../tests/common_allocations/mod.rs"]
mod common_allocations;

use common_allocations::allocations;
use std::os::unix::fs::FileExt;

use dirtymap::{Access, AddressSpace, Granule, HarvestRequest, Iova, IovaRange, UserBitmap};
use dirtymap_vhost::VhostLog;

#[test]
fn harvests_of_a_vhost_log_allocate_nothing() {
    let all = IovaRange::from_len(Iova::MIN, 1 << 30).unwrap();
    let log = std::sync::Arc::new(VhostLog::new(all.last()).unwrap());
    let space = AddressSpace::with_source(Granule::K4, log.clone()).unwrap();
    space.map(all, 0, Access::ReadWrite).unwrap();
    space.start_tracking().unwrap();
    let memory = log.memory();
    let mut words = vec![0u64; 1 << 12];
    let mut round = || {
        words.fill(0);
        memory.file().write_all_at(&[0b1011], 9).unwrap();
        let request = HarvestRequest::new(all, Granule::K4);
        let lease = space
            .harvest(&request, UserBitmap::new(&mut words))
            .unwrap();
        let lease = lease.sync().unwrap();
        assert_eq!(lease.dirty(), 3);
        lease.commit();
    };
    round();
    assert_eq!(allocations(&mut round), 0);
}
