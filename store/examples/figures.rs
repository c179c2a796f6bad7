//! What the store costs on this machine: a write to an open extent beside a volatile mark, cold
//! extents, and a recovery.
//!
//! ```text
//! cargo run --release -p dirtymap-store --example figures
//! ```

use std::error::Error;
use std::hint::black_box;
use std::time::{Duration, Instant};

use dirtymap::{Access, AddressSpace, Granule, ToIovaRange};
use dirtymap_store::{Device, DirFolder, Opened, Options, Store};

const EXTENT: u64 = 64 << 10;
const TIB: u64 = 1 << 40;

type Outcome = Result<(), Box<dyn Error>>;

fn main() -> Outcome {
    steady()?;
    cold()?;
    recovery()
}

fn create(path: &std::path::Path, len: u64, options: &Options) -> Result<Store, Box<dyn Error>> {
    let folder = DirFolder::new(path.join("store"))?;
    Ok(Store::create(folder, &Device { id: 1, len }, options)?)
}

/// The least time of several runs of `count` calls, for one call.
fn least(count: u32, mut call: impl FnMut(u64) -> Outcome) -> Result<f64, Box<dyn Error>> {
    let mut least = Duration::MAX;
    for _ in 0..2000 {
        let start = Instant::now();
        for number in 0..count {
            call(u64::from(number))?;
        }
        least = least.min(start.elapsed());
    }
    Ok(least.as_nanos() as f64 / f64::from(count))
}

/// Writes of 4 KiB to 256 open extents, one after the other, and marks of the same pages.
fn steady() -> Outcome {
    let dir = tempfile::tempdir()?;
    let len = 1 << 30;
    let store = create(dir.path(), len, &Options::new())?;
    let place = |number: u64| black_box(number % 256 * EXTENT + number % 16 * 4096);
    let write = least(1 << 12, |number| {
        let at = place(number);
        drop(store.begin_write(at..at + 4096)?.wait()?);
        Ok(())
    })?;
    let writer = store.writer();
    let by_handle = least(1 << 12, |number| {
        let at = place(number);
        drop(writer.begin_write(at..at + 4096)?);
        Ok(())
    })?;
    let space = AddressSpace::tracked(Granule::K4);
    space.map(0..len, 0, Access::ReadWrite)?;
    let mark = least(1 << 12, |number| {
        let at = place(number);
        Ok(space.mark(at..at + 4096)?)
    })?;
    let range = (0..len).to_iova_range()?;
    let area = space.area(range.start()).ok_or("no area")?;
    let handle = least(1 << 12, |number| {
        let at = place(number);
        Ok(area.mark((at..at + 4096).to_iova_range()?)?)
    })?;
    let guard = least(1 << 12, |number| {
        let at = place(number);
        drop(space.begin_write(at..at + 4096)?);
        Ok(())
    })?;
    println!("write to an open extent, begin to end      {write:8.1} ns");
    println!("the same by a handle                       {by_handle:8.1} ns");
    println!("volatile: mark by the space                {mark:8.1} ns");
    println!("volatile: mark by a handle                 {handle:8.1} ns");
    println!("volatile: begin_write, begin to end        {guard:8.1} ns");
    println!(
        "without handles, times the mark            {:8.2}",
        write / mark
    );
    println!(
        "by handles, times the mark                 {:8.2}",
        by_handle / handle
    );
    Ok(())
}

/// 10,000 extents that nobody wrote before.
fn cold() -> Outcome {
    const COUNT: u64 = 10_000;
    for (threads, depth) in [(1, 1), (16, 1), (128, 1), (1, 64), (8, 64)] {
        let dir = tempfile::tempdir()?;
        let store = create(dir.path(), 1 << 40, &Options::new())?;
        let before = store.stats().flushes;
        let start = Instant::now();
        let each = COUNT / threads;
        std::thread::scope(|scope| {
            for thread in 0..threads {
                let store = &store;
                scope.spawn(move || {
                    let mut at = 0;
                    while at < each {
                        let batch = (at..each.min(at + depth)).map(|number| {
                            let byte = (thread * each + number) * EXTENT;
                            store.begin_write(byte..byte + 4096)
                        });
                        let intents: Vec<_> = batch.collect();
                        for intent in intents {
                            drop(intent.and_then(|intent| intent.wait()));
                        }
                        at += depth;
                    }
                });
            }
        });
        let stats = store.stats();
        println!(
            "{:6} cold extents, {threads:3} threads, {depth:2} at a time: {:6} flushes, {:7.0} ms",
            stats.opened,
            stats.flushes - before,
            start.elapsed().as_secs_f64() * 1e3
        );
    }
    Ok(())
}

/// A device of 16 TiB, a million dirty extents at random, half of them harvested.
fn recovery() -> Outcome {
    const DIRTY: u64 = 1 << 20;
    let dir = tempfile::tempdir()?;
    let device = Device {
        id: 1,
        len: 16 * TIB,
    };
    let options = Options::new().hot(4096);
    let store = create(dir.path(), device.len, &options)?;
    store.join("backup")?;
    let epoch = store.harvest("backup", None)?.commit(|| Ok(()))?;
    let mut last = None;
    for half in 0..2 {
        let mut number = half;
        while number < DIRTY {
            let batch = (number..number + 8192).step_by(2).map(|number| {
                // Odd, so each number of 28 bits comes once.
                let extent = number.wrapping_mul(0x9E37_79B1) & ((1 << 28) - 1);
                let at = extent * EXTENT + number % 15 * 4096;
                store.begin_write(at..at + 8192)
            });
            let intents: Vec<_> = batch.collect();
            for intent in intents {
                drop(intent?.wait()?);
            }
            number += 8192;
        }
        if half == 0 {
            last = Some(store.harvest("backup", Some(epoch))?);
        }
    }
    std::mem::forget(last);
    let bytes = store.stats().log_bytes;
    let open = store.stats().open;
    drop(store);
    let folder = DirFolder::new(dir.path().join("store"))?;
    let start = Instant::now();
    let Opened::Known(store) = Store::open(folder, &device, &options)? else {
        return Err("nothing is known".into());
    };
    let opened = start.elapsed();
    let increment = store.harvest("backup", Some(epoch))?;
    println!(
        "recovery of 16 TiB, {DIRTY} dirty extents, {open} open, a log of {:.1} MiB: {:.0} ms; \
         first increment of {} runs after {:.0} ms",
        bytes as f64 / f64::from(1 << 20),
        opened.as_secs_f64() * 1e3,
        increment.runs().runs().len(),
        start.elapsed().as_secs_f64() * 1e3
    );
    Ok(())
}
