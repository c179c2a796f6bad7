//! Harvests do not allocate.
#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used)] // helpers of tests

#[path = "../../../tests/common_allocations/mod.rs"]
mod common_allocations;

use std::io;

use common_allocations::allocations;
use dirtymap::{Access, AddressSpace, Granule, HarvestRequest, IovaRange, ToIovaRange, UserBitmap};
use dirtymap_vfio::{DeviceLog, LoggingDevice};

/// A device that writes to the same pages all the time.
struct Busy;

impl LoggingDevice for Busy {
    fn start(&self, page: Granule, _: &[IovaRange]) -> io::Result<u64> {
        Ok(page.bytes())
    }

    fn report(&self, _: IovaRange, _: Granule, bits: &mut [u64]) -> io::Result<()> {
        bits.iter_mut().for_each(|word| *word |= 0b1101);
        Ok(())
    }

    fn stop(&self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn harvests_of_a_log_allocate_nothing() {
    let range = (0..100 << 12).to_iova_range().unwrap();
    let log = DeviceLog::new(Busy, Granule::K4, &[range]).unwrap();
    let space = AddressSpace::with_source(Granule::K4, log).unwrap();
    space.map(range, 0, Access::ReadWrite).unwrap();
    space.start_tracking().unwrap();
    let mut words = [0u64; 2];
    let mut round = || {
        let request = HarvestRequest::new(range, Granule::K4);
        let lease = space
            .harvest(&request, UserBitmap::new(&mut words))
            .unwrap();
        lease.sync().unwrap().commit();
    };
    assert_eq!((allocations(&mut round), allocations(&mut round)), (0, 0));
    assert_eq!(words, [0b1101, 0b1101]);
}
