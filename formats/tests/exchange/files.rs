//! Maps that outlive the program.

use dirtymap::{Granule, IovaRange, UserBitmap};
use dirtymap_formats::{BitmapFile, BitmapFileError};

use crate::range;

/// The `n` pages from page `first` on.
fn pages(first: u64, n: u64) -> IovaRange {
    range(first << 12, n << 12)
}

/// The blocks of a disk that may have changed, for a program that starts and expects a map of
/// generation `now`. Without such a map, these are all blocks.
fn changed(path: &std::path::Path, disk: IovaRange, now: u64) -> Vec<IovaRange> {
    let mut words = vec![0; disk.granules(Granule::K4).div_ceil(64) as usize];
    let mut read = || -> Result<Vec<IovaRange>, BitmapFileError> {
        let mut file = BitmapFile::open(path)?;
        if file.generation() != now || file.range() != disk {
            return Ok(vec![disk]);
        }
        let view = UserBitmap::new(&mut words).view(disk, Granule::K4)?;
        file.or_into(&view)?;
        Ok(view.runs().collect())
    };
    read().unwrap_or(vec![disk])
}

fn save(path: &std::path::Path, disk: IovaRange, dirty: u64, generation: u64) {
    let mut words = [dirty];
    let view = UserBitmap::new(&mut words).view(disk, Granule::K4).unwrap();
    BitmapFile::save(path, &view, generation).unwrap();
}

/// A map was written only when its program ended in good order. After a crash the file had the map
/// of an earlier run. A program that believed it missed all writes since then; a program that did
/// not believe it could not even remove it. Here a file has a generation, which its owner
/// increments before it writes to the disk again. A file of another generation means that
/// everything is dirty. The story is in docs/guide/bugs.md.
#[test]
fn a_map_of_an_earlier_run_a_torn_one_and_none_at_all_mean_that_all_is_dirty() {
    let name = format!("dirtymap-consumers-{}", std::process::id());
    let path = std::env::temp_dir().join(name);
    let disk = pages(0, 64);
    assert_eq!(changed(&path, disk, 1), [disk], "none at all");
    save(&path, disk, 0b100, 1);
    assert_eq!(changed(&path, disk, 1), [pages(2, 1)]);
    assert_eq!(changed(&path, disk, 2), [disk], "of an earlier run");
    // The disk has grown since.
    assert_eq!(changed(&path, pages(0, 100), 1), [pages(0, 100)]);
    // A newer one takes its place.
    save(&path, disk, 0b1000, 2);
    assert_eq!(changed(&path, disk, 2), [pages(3, 1)]);
    // A torn file: another program truncated it, or the disk lost a block.
    let whole = std::fs::read(&path).unwrap();
    std::fs::write(&path, &whole[..whole.len() - 1]).unwrap();
    assert_eq!(changed(&path, disk, 2), [disk]);
    let mut torn = whole.clone();
    torn[64..].fill(0);
    std::fs::write(&path, torn).unwrap();
    assert_eq!(changed(&path, disk, 2), [disk]);
    std::fs::write(&path, whole).unwrap();
    assert_eq!(changed(&path, disk, 2), [pages(3, 1)]);
    std::fs::remove_file(&path).unwrap();
}
