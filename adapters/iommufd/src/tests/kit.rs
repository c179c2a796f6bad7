//! The source kit of the core, over pieces of several sizes.

use std::sync::Arc;

use dirtymap::source_kit::{Rig, check};
use dirtymap::{DirtySource, Granule, Iova, IovaRange};

use super::fake::{Fake, pages};
use crate::{Hwpt, IoasOptions, OnUnmap};

struct Played(Fake, Arc<Hwpt>, IovaRange);

impl Rig for Played {
    fn range(&self) -> IovaRange {
        self.2
    }

    fn source(&self) -> Arc<dyn DirtySource> {
        Arc::clone(&self.1) as Arc<dyn DirtySource>
    }

    fn write(&self, iova: Iova) {
        assert!(
            self.0.write(self.1.id(), iova.get()),
            "nothing is mapped at {iova}"
        );
    }
}

fn played(options: IoasOptions, range: IovaRange) -> Played {
    let fake = Fake::new(Granule::K4);
    let hwpt = fake.ioas(options).hwpt(1).unwrap();
    Played(fake, hwpt, range)
}

#[test]
fn the_kit_of_the_core_passes() {
    check(|| played(IoasOptions::default(), pages(512, 256)));
}

#[test]
fn the_kit_passes_in_small_pieces_that_begin_inside_the_range() {
    for lg2 in [12, 15, 19] {
        let options = IoasOptions::default().piece(Granule::from_lg2(lg2).unwrap());
        check(|| played(options, pages(513, 256)));
    }
}

#[test]
fn the_kit_passes_if_an_unmap_calls_everything_dirty() {
    let options = IoasOptions::default().on_unmap(OnUnmap::Everything);
    check(|| played(options, pages(0, 300)));
}

#[test]
fn the_kit_passes_at_the_end_of_the_address_space() {
    let options = IoasOptions::default().piece(Granule::M2);
    check(|| played(options, pages((1 << 52) - 256, 256)));
}

#[test]
fn the_kit_passes_with_bits_of_2_mib() {
    let options = IoasOptions::default().page(Granule::M2);
    check(|| {
        let fake = Fake::new(Granule::M2);
        let hwpt = fake.ioas(options).hwpt(1).unwrap();
        Played(fake, hwpt, pages(512, 512 * 256))
    });
}
