//! The dirty state over a restart: a saved file is used once, and without a usable file everything
//! is dirty.

use dirtymap::harvest::Bounds;
use dirtymap::{Access, AddressSpace, Error, Granule, IovaRange, Start, ToIovaRange};
use dirtymap_formats::{BitmapFile, BitmapFileError, Restored};

use crate::Folder;

const GIB: u64 = 1 << 30;

/// A machine with a hole, all of it clean.
fn space() -> AddressSpace {
    let space = AddressSpace::tracked(Granule::K4);
    space.map(0..GIB, 0, Access::ReadWrite).unwrap();
    space.map(4 * GIB..5 * GIB, GIB, Access::ReadWrite).unwrap();
    space
}

fn dirty(space: &AddressSpace) -> Vec<IovaRange> {
    let lease = space.rounds().next().unwrap();
    let runs = lease.runs().collect();
    lease.abort();
    runs
}

fn range(start: u64, end: u64) -> IovaRange {
    (start..end).to_iova_range().unwrap()
}

/// `start_tracking` makes everything clean, so a restore before it would be lost, with the file.
#[test]
fn a_space_that_does_not_track_yet_restores_nothing_and_keeps_the_file() {
    let folder = Folder::new("never-tracked");
    let path = folder.file();
    let before = space();
    before.mark(0x5000..0x6000).unwrap();
    BitmapFile::save_space(&path, &before, 7).unwrap();

    let after = AddressSpace::new(Granule::K4);
    after.map(0..GIB, 0, Access::ReadWrite).unwrap();
    let refused = BitmapFile::restore_space(&path, &after).unwrap_err();
    assert!(
        matches!(refused, BitmapFileError::Bitmap(Error::NeverTracked { .. })),
        "{refused:?}"
    );
    assert!(path.exists());

    after.start_tracking().unwrap();
    let restored = BitmapFile::restore_space(&path, &after).unwrap();
    assert!(matches!(
        restored,
        Restored::Saved {
            generation: 7,
            bytes: 0x1000
        }
    ));
    assert_eq!(dirty(&after), [range(0x5000, 0x6000)]);
}

/// A migration, which is the unnamed consumer, has taken a page and committed it before the end of
/// the process, and a backup has not been told of the page. The file had the pages of the unnamed
/// consumer alone: after the restart, no increment of the backup had the page.
#[test]
fn what_is_dirty_for_any_consumer_is_saved() {
    let folder = Folder::new("consumers");
    let path = folder.file();
    let before = space();
    let backup = before.consumer("backup", Start::Clean).unwrap();
    let low = before.consumer_of("low", 0..0x8000, Start::Clean).unwrap();
    for page in [0x5000, 0x9000] {
        before.mark(page..page + 1).unwrap();
    }
    before.rounds().next().unwrap().commit();
    backup.rounds().next().unwrap().commit();
    before.mark(0xb000..0xb001).unwrap(); // for all of them
    low.rounds().next().unwrap().abort(); // page 5 is pending for this one
    before.rounds().next().unwrap().commit();
    let saved = BitmapFile::save_space(&path, &before, 1).unwrap();
    assert_eq!(saved, 0x2000);

    let after = space();
    let backup = after.consumer("backup", Start::Clean).unwrap();
    let restored = BitmapFile::restore_space(&path, &after).unwrap();
    assert!(matches!(restored, Restored::Saved { bytes: 0x2000, .. }));
    let lease = backup.rounds().next().unwrap();
    let told: Vec<IovaRange> = lease.runs().collect();
    assert_eq!(told, [range(0x5000, 0x6000), range(0xb000, 0xc000)]);

    // Everything is pending for a consumer that is out of bounds.
    let bounds = Bounds {
        bytes: 1,
        ..Bounds::default()
    };
    low.set_bounds(bounds);
    before.mark(0..1).unwrap();
    before.rounds().next().unwrap().commit();
    assert!(low.stats().everything);
    let saved = BitmapFile::save_space(&path, &before, 2).unwrap();
    assert_eq!(saved, 0x8000 + 0x1000);
}

fn everything(space: &AddressSpace) -> bool {
    dirty(space) == [range(0, GIB), range(4 * GIB, 5 * GIB)]
}

#[test]
fn what_was_saved_is_dirty_once() {
    let folder = Folder::new("saved-once");
    let path = folder.file();
    let before = space();
    before.mark(0x5000..0x7000).unwrap();
    before.mark(4 * GIB..4 * GIB + 1).unwrap();
    assert_eq!(BitmapFile::save_space(&path, &before, 7).unwrap(), 3 << 12);
    assert_eq!(dirty(&before).len(), 2, "nothing is taken");

    let after = space();
    let restored = BitmapFile::restore_space(&path, &after).unwrap();
    let saved = Restored::Saved {
        generation: 7,
        bytes: 3 << 12,
    };
    assert_eq!(format!("{restored:?}"), format!("{saved:?}"));
    assert_eq!(dirty(&after), dirty(&before));
    assert!(!path.exists(), "used up");

    // A crash before the next save: the writes since then are unknown.
    let after = space();
    let restored = BitmapFile::restore_space(&path, &after).unwrap();
    let Restored::Everything { reason } = restored else {
        panic!("{restored:?}");
    };
    assert!(matches!(reason, BitmapFileError::Io(_)));
    assert!(everything(&after));
}

#[test]
fn a_file_that_cannot_be_trusted_means_everything() {
    let folder = Folder::new("untrusted");
    let path = folder.file();
    let before = space();
    before.mark(0x5000..0x7000).unwrap();
    BitmapFile::save_space(&path, &before, 7).unwrap();
    let good = std::fs::read(&path).unwrap();
    for at in [0, 9, 17, 41, 64 + 3, good.len() - 1] {
        let mut bad = good.clone();
        bad[at] ^= 0x10;
        std::fs::write(&path, bad).unwrap();
        let after = space();
        let restored = BitmapFile::restore_space(&path, &after).unwrap();
        assert!(
            matches!(restored, Restored::Everything { .. }),
            "{at}: {restored:?}"
        );
        assert!(everything(&after));
    }
    std::fs::write(&path, &good[..100]).unwrap();
    let after = space();
    let restored = BitmapFile::restore_space(&path, &after).unwrap();
    assert!(matches!(
        restored,
        Restored::Everything {
            reason: BitmapFileError::Truncated { .. }
        }
    ));
    assert!(everything(&after));
}

#[test]
fn pages_of_areas_that_are_gone_are_counted() {
    let folder = Folder::new("fewer");
    let path = folder.file();
    let before = space();
    before.mark(0x5000..0x7000).unwrap();
    before.mark(4 * GIB..4 * GIB + 1).unwrap();
    BitmapFile::save_space(&path, &before, 7).unwrap();
    let smaller = AddressSpace::tracked(Granule::K4);
    smaller.map(0..GIB, 0, Access::ReadWrite).unwrap();
    let restored = BitmapFile::restore_space(&path, &smaller).unwrap();
    assert!(matches!(restored, Restored::Saved { .. }));
    assert_eq!(dirty(&smaller), [range(0x5000, 0x7000)]);
    assert_eq!(smaller.stats().outside_marks, 1);
}

#[test]
fn a_file_that_stays_is_an_error_and_its_pages_are_dirty() {
    let folder = Folder::new("stays");
    let path = folder.file();
    std::fs::create_dir(&path).unwrap(); // a folder is no file, and is not removed as one
    let after = space();
    let refused = BitmapFile::restore_space(&path, &after);
    assert!(
        matches!(refused, Err(BitmapFileError::Io(_))),
        "{refused:?}"
    );
    assert!(everything(&after));
    let empty = AddressSpace::tracked(Granule::K4);
    let refused = BitmapFile::save_space(folder.0.join("none"), &empty, 1);
    assert!(matches!(
        refused,
        Err(BitmapFileError::Bitmap(Error::NothingMapped { .. }))
    ));
}
