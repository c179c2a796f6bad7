//! The worker: the disk, its store, the threads that write, and the consumers that back it up.

use std::error::Error;
use std::fs::{self, File};
use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{PoisonError, RwLock};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use dirtymap_store::{Device, DirFolder, Opened, Options, Store};

use crate::cli::Cli;
use crate::copies::Copies;
use crate::generation::{self, Head};
use crate::writers::{Plan, WRITERS, Writers};

/// A consumer with an increment every few seconds.
pub(crate) const INCREMENTS: &str = "increments";
/// A consumer with a full backup at first, and what differs from it at the end.
pub(crate) const FULL: &str = "full";

struct Worker<'w> {
    writers: &'w Writers<'w>,
    copies: Copies<'w>,
}

/// Replays the trace from where the worker before was killed, to its end.
pub(crate) fn run(cli: &Cli, plan: &Plan, folder: &Path) -> Result<(), Box<dyn Error>> {
    let image = file(folder, "disk.img", plan.len)?;
    let progress = file(folder, "progress", 8 * WRITERS as u64)?;
    let store = open(folder, plan.len)?;
    let writers = Writers {
        plan,
        store: &store,
        image: &image,
        progress: &progress,
        freeze: RwLock::new(()),
        failed: AtomicBool::new(false),
        done: AtomicU64::new(0),
    };
    let worker = Worker {
        writers: &writers,
        copies: Copies::open(cli, folder)?,
    };
    // Both consumers have a copy before the first write; after a kill, they go on.
    for consumer in [FULL, INCREMENTS] {
        if generation::all(folder, consumer)?.is_empty() {
            worker.back_up(consumer)?;
        }
    }
    let interval = Duration::from_millis(cli.interval);
    thread::scope(|scope| {
        for thread in 0..WRITERS {
            let writers = &writers;
            scope.spawn(move || writers.run(thread));
        }
        let mut last = Instant::now();
        // After a kill, the first increment comes at once.
        let mut due = interval.min(Duration::from_millis(100));
        let all = WRITERS as u64;
        while writers.done.load(Ordering::Relaxed) < all {
            if last.elapsed() >= due {
                worker.back_up(INCREMENTS)?;
                (last, due) = (Instant::now(), interval);
            }
            thread::sleep(Duration::from_millis(10));
        }
        worker.back_up(INCREMENTS)?;
        worker.back_up(FULL)
    })?;
    if writers.failed.load(Ordering::Relaxed) {
        return Err("a writer failed".into());
    }
    store.close_extents()?;
    Ok(())
}

fn file(folder: &Path, name: &str, len: u64) -> io::Result<File> {
    let mut options = File::options();
    options.read(true).write(true).create(true).truncate(false);
    let file = options.open(folder.join(name))?;
    file.set_len(len)?;
    Ok(file)
}

fn open(folder: &Path, len: u64) -> Result<Store, Box<dyn Error>> {
    let device = Device { id: 0xd15c, len };
    let options = Options::new().hot(256);
    let store = match Store::open(DirFolder::new(folder.join("store"))?, &device, &options)? {
        Opened::Known(store) => store,
        Opened::Everything(lost) => lost.start_over(&options)?,
    };
    let there = store.consumers()?;
    for name in [FULL, INCREMENTS] {
        if !there.iter().any(|consumer| consumer.name == name) {
            store.join(name)?;
        }
    }
    Ok(store)
}

impl Worker<'_> {
    /// Makes the next generation of a consumer. The writers are frozen while it is read; a real
    /// disk would be read from a snapshot.
    fn back_up(&self, consumer: &str) -> Result<(), Box<dyn Error>> {
        let before = generation::all(self.copies.folder, consumer)?;
        // The last generation that has its name, committed or not.
        let parent = before
            .last()
            .map(|(head, _)| head.epoch.parse())
            .transpose()?;
        let writers = self.writers;
        let frozen = writers.freeze.write();
        let frozen = frozen.unwrap_or_else(PoisonError::into_inner);
        let increment = writers.store.harvest(consumer, parent)?;
        let mut writes = [0; WRITERS];
        for (thread, writes) in writes.iter_mut().enumerate() {
            *writes = writers.at(thread)?;
        }
        let now = SystemTime::now().duration_since(UNIX_EPOCH)?;
        let head = Head {
            number: before.len() as u64 + 1,
            consumer: consumer.to_owned(),
            epoch: increment.epoch().to_string(),
            parent: increment.parent().map(|epoch| epoch.to_string()),
            why: increment.everything().map(|why| why.to_string()),
            writes,
            recovered_extents: writers.store.recovery().open_extents,
            at_ms: now.as_millis() as u64,
            runs: generation::runs(&increment),
        };
        let draft = self.copies.draft(&head, &increment, writers.image)?;
        drop(frozen);
        increment.commit(|| {
            self.copies.publish(&head, &draft)?;
            writers.image.sync_data()
        })?;
        Ok(())
    }
}

/// Forgets what the store has on disk.
pub(crate) fn lose_log(folder: &Path) -> io::Result<()> {
    fs::remove_file(folder.join("store").join("log"))
}
