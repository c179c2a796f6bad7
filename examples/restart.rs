//! Dirty state that outlives the process: one run saves it, the next one restores it. Run it twice.

use dirtymap::{Access, AddressSpace, Granule};
use dirtymap_formats::BitmapFile;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let path = std::env::temp_dir().join("dirtymap-restart.bitmap");
    let space = AddressSpace::tracked(Granule::K4);
    space.map(0..1 << 30, 0, Access::ReadWrite)?;
    println!("{:?}", BitmapFile::restore_space(&path, &space)?); // without a file: all of it
    let lease = space.rounds().next()?;
    println!("copy {} pages", lease.dirty());
    lease.commit();
    space.mark(0x5000..0x5008)?; // writers run, and stop
    BitmapFile::save_space(&path, &space, 1)?;
    Ok(())
}
