//! Faults that the kernel injects into itself: the first, the second and so on of all places that
//! may fail during a call, until it succeeds untouched.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;

use dirtymap::{Access, AddressSpace, Error, Granule, Scope, UserBitmap};
use dirtymap_iommufd::IoasOptions;

use crate::check::{Setup, harvest, range};
use crate::mock::Flags;

/// More places than any call has.
const MOST: u32 = 2000;
const BYTES: u64 = 1 << 20;

/// Calls `call` with its place number `nth` failing; whether that place was reached.
fn failing<T>(nth: u32, call: impl FnOnce() -> T) -> io::Result<(T, bool)> {
    // Opened before: an open is a call that may fail.
    let file = "/proc/thread-self/fail-nth";
    let file = File::options().read(true).write(true).open(file)?;
    file.write_all_at(nth.to_string().as_bytes(), 0)?;
    let done = call();
    let mut left = [0; 16];
    let bytes = file.read_at(&mut left, 0)?;
    file.write_all_at(b"0", 0)?;
    Ok((done, left.get(..bytes) == Some(b"0\n")))
}

pub(crate) fn run() -> crate::Outcome {
    // Allocations that may wait fail too, and not only those of large pages.
    let set = |file: &str, value: &str| fs::write(format!("/sys/kernel/debug/{file}"), value);
    set("failslab/ignore-gfp-wait", "N")?;
    let mut reached = [0; 4];
    for (count, what) in reached.iter_mut().zip([map, read, unmap, switch]) {
        for nth in 1.. {
            assert!(nth < MOST, "a call never succeeds");
            if !what(nth)? {
                break;
            }
            *count += 1;
        }
    }
    let [maps, reads, unmaps, switches] = reached;
    println!("faults: map {maps}, read {reads}, unmap {unmaps}, switch {switches}");
    assert!(maps > 0 && reads > 0, "faults are injected");
    Ok(())
}

fn setup() -> Result<Setup, Box<dyn std::error::Error>> {
    let piece = Granule::from_lg2(18).ok_or("a granule")?;
    let options = IoasOptions::default().small_pages().piece(piece);
    Setup::new(options, Flags::default(), BYTES as usize)
}

/// A map of four pieces: all of it or nothing.
fn map(nth: u32) -> Result<bool, Box<dyn std::error::Error>> {
    let setup = setup()?;
    let space = AddressSpace::with_source(Granule::K4, setup.table.clone())?;
    let map = || {
        let backing = setup.memory.address();
        space.map(range(0, BYTES), backing, Access::ReadWrite)
    };
    let (done, reached) = failing(nth, map)?;
    if done.is_err() {
        map()?;
    }
    space.start_tracking()?;
    setup.write(&setup.table, 0x5000);
    assert_eq!(harvest(&space, range(0, BYTES), Scope::All)?, [5]);
    Ok(reached)
}

/// Whatever a harvest that fails tells, it and the next one tell all that was written.
fn read(nth: u32) -> Result<bool, Box<dyn std::error::Error>> {
    let setup = setup()?;
    let space = setup.space(BYTES)?;
    let written = [0, 5, 64, 100, 255];
    written
        .iter()
        .for_each(|page| setup.write(&setup.table, page << 12));
    let all = range(0, BYTES);
    let (done, reached) = failing(nth, || harvest_partial(&space))?;
    let mut told = done?;
    told.extend(harvest(&space, all, Scope::All)?);
    for page in written {
        assert!(told.contains(&page), "page {page} is lost: {told:?}");
    }
    assert_eq!(harvest(&space, all, Scope::All)?, []);
    Ok(reached)
}

/// What lies below a stop.
fn harvest_partial(space: &AddressSpace) -> Result<Vec<u64>, Error> {
    let mut words = [0; 4];
    let request = dirtymap::HarvestRequest::new(range(0, BYTES), Granule::K4);
    let lease = space.harvest(&request, UserBitmap::new(&mut words))?;
    lease.partial().sync()?.commit();
    let bit = |page: &u64| words[(page / 64) as usize] >> (page % 64) & 1 != 0;
    Ok((0..256).filter(bit).collect())
}

fn unmap(nth: u32) -> Result<bool, Box<dyn std::error::Error>> {
    let setup = setup()?;
    let space = setup.space(BYTES)?;
    setup.write(&setup.table, 0x5000);
    let mut words = [0; 4];
    let all = range(0, BYTES);
    let (done, reached) = failing(nth, || {
        space
            .unmap(all, Granule::K4, UserBitmap::new(&mut words))
            .map(drop)
    })?;
    if done.is_err() {
        space.unmap(all, Granule::K4, UserBitmap::new(&mut words))?;
    }
    assert!(words[0] >> 5 & 1 != 0, "page 5 is lost");
    space.map(all, setup.memory.address(), Access::ReadWrite)?;
    Ok(reached)
}

fn switch(nth: u32) -> Result<bool, Box<dyn std::error::Error>> {
    let setup = setup()?;
    let space = setup.space(BYTES)?;
    setup.write(&setup.table, 0x5000);
    let (stopped, first) = failing(nth, || space.stop_tracking())?;
    let told = harvest(&space, range(0, BYTES), Scope::All)?;
    assert!(told.contains(&5), "page 5 is lost: {told:?}");
    if stopped.is_err() {
        space.stop_tracking()?;
    }
    let (started, second) = failing(nth, || space.start_tracking())?;
    if started.is_err() {
        space.start_tracking()?;
    }
    setup.write(&setup.table, 0x7000);
    let told = harvest(&space, range(0, BYTES), Scope::All)?;
    assert!(told.contains(&7), "page 7 is lost: {told:?}");
    Ok(first || second)
}
