//! The source kit of the core, over devices with pages of several sizes.

use std::sync::Arc;

use dirtymap::source_kit::{Rig, check};
use dirtymap::{DirtySource, Granule, Iova, IovaRange};

use super::fake::{Fake, pages};
use crate::DeviceLog;

struct Played(Fake, Arc<DeviceLog<Fake>>, IovaRange);

impl Rig for Played {
    fn range(&self) -> IovaRange {
        self.2
    }

    fn source(&self) -> Arc<dyn DirtySource> {
        Arc::clone(&self.1) as Arc<dyn DirtySource>
    }

    fn write(&self, iova: Iova) {
        self.0.write(iova);
    }
}

fn played(page: Granule, range: IovaRange, logged: &[IovaRange]) -> Played {
    let fake = Fake::new(Granule::K4);
    let log = DeviceLog::new(fake.clone(), page, logged).unwrap();
    Played(fake, Arc::new(log), range)
}

#[test]
fn the_kit_of_the_core_passes() {
    let range = pages(512, 256);
    check(|| played(Granule::K4, range, &[range]));
}

#[test]
fn the_kit_passes_at_the_border_of_chunks() {
    let range = pages(32768 - 100, 256);
    check(|| played(Granule::K4, range, &[pages(0, 1 << 20)]));
}

#[test]
fn the_kit_passes_at_the_end_of_the_address_space() {
    let range = pages((1 << 52) - 256, 256);
    check(|| played(Granule::K4, range, &[range]));
}

#[test]
fn the_kit_passes_with_pages_of_2_mib() {
    let range = pages(512, 512 * 256);
    check(|| played(Granule::M2, range, &[range]));
}
