//! An actor that writes to pages of its own, by a device and by marks, and discards them.
//!
//! No other actor writes to these pages, so their contents after a discard are known, while
//! harvests of every consumer copy them by the contents of their leases.
//!
//! A discard flushes, and waits for all devices. A second thread runs the device of the actor
//! meanwhile, so that its writes are still in flight when the discard begins. With one thread for
//! both, the flush would wait for a device that nobody runs.

use std::time::Duration;

use dirtymap::sync::{AtomicBool, Mutex, Ordering, leave_out, lock, thread};
use dirtymap::{Error, IovaRange};

use super::failure::Failure;
use super::layout::{self, PAGE};
use super::machine::{self, Dma};
use super::panics::caught;
use super::tally::Count;
use super::world::{DOMAINS, World};
use super::writer::Pen;

/// See the [module](self).
pub(super) struct Discarder<'w> {
    world: &'w World,
    actor: usize,
    pen: Pen<'w>,
    /// Locked for one step of the device at a time.
    dma: Mutex<Box<dyn Dma>>,
    first: u64,
    pages: u64,
}

impl<'w> Discarder<'w> {
    pub(super) fn new(world: &'w World, nth: u32) -> Self {
        let options = &world.options;
        let others = options.devices + options.attachers + options.cpus;
        let actors = options.mappers + options.attachers + options.harvesters + options.consumers;
        let (first, pages) = layout::trimmed(nth.into(), options.discarders.into());
        Discarder {
            world,
            actor: (actors + 1 + nth) as usize,
            pen: Pen::new(world, (others + nth) as usize),
            dma: Mutex::new(
                world.machines[nth as usize % DOMAINS].device(machine::device_config(nth.into())),
            ),
            first,
            pages,
        }
    }

    pub(super) fn run(mut self) -> Result<(), Failure> {
        leave_out(self.world.options.left_out());
        while self.world.control.goes_on(|| lock(&self.dma).quiesce()) {
            for _ in 0..self.pen.random.below(32) {
                let page = self.first + self.pen.random.below(self.pages);
                self.write(page)?;
            }
            self.discard()?;
            if self.pen.random.below(2) == 0 {
                // Harvests of pages that are zero, and no discard is at work there.
                lock(&self.dma).quiesce();
                thread::sleep(Duration::from_micros(self.pen.random.below(4000)));
            }
            lock(&self.dma).service();
            thread::yield_now();
        }
        lock(&self.dma).quiesce();
        Ok(())
    }

    /// By the device, whose writes stay in flight for a while, or by a CPU.
    fn write(&mut self, page: u64) -> Result<(), Failure> {
        if self.pen.random.below(3) == 0 {
            // The device's own writes to the page land first.
            lock(&self.dma).quiesce();
            let range = self.pen.write(page);
            let marked = self.world.space.mark(range);
            return marked.map_err(|error| Failure::call("mark", range, error));
        }
        self.pen.written_by(&mut **lock(&self.dma), page)
    }

    fn discard(&mut self) -> Result<(), Failure> {
        let world = self.world;
        let unit = world.options.unit();
        let from = self.pen.random.below(self.pages / unit) * unit;
        let most = (self.pages - from) / unit;
        let pages = unit * (1 + self.pen.random.below(most));
        let first = self.first + from;
        let range = layout::range(first, pages);
        world.events.note(self.actor, "discards", range);
        world.tally.add(Count::Trims, 1);
        let fails = self.pen.random.below(16) == 0;
        if world.options.panics {
            // If a source panics, nothing is drained.
            lock(&self.dma).quiesce();
        }
        let again = self.pen.random.below(3) == 0;
        let page = first + self.pen.random.below(pages);
        let mut written = Ok(());
        let finished = AtomicBool::new(false);
        let dma = &self.dma;
        let done = thread::scope(|scope| {
            let _finishes = Finishes(&finished);
            scope.spawn(|| attend(dma, &finished));
            caught(|| {
                world.space.discard(range, || {
                    drop_storage(world, &self.pen, first, pages);
                    if fails {
                        return Err(std::io::ErrorKind::Other.into());
                    }
                    if again {
                        written = self.pen.written_by(&mut **lock(dma), page);
                    }
                    Ok(())
                })
            })
        });
        written?;
        match done {
            Some(Ok(done)) if done.zero_bytes == range.len() => return Ok(()),
            // A domain that is being attached does not track yet, so the range is only marked, and
            // nothing was drained.
            Some(Ok(_)) => {}
            Some(Err(Error::NotDropped { .. })) if fails => {}
            Some(Err(error)) => return Err(Failure::call("discard", range, error)),
            None => world.tally.add(Count::Panicked, 1),
        }
        self.clean(first, pages, range)
    }

    /// The whole range reads as zero, and is dirty.
    fn clean(&mut self, first: u64, pages: u64, range: IovaRange) -> Result<(), Failure> {
        self.world.tally.add(Count::TrimsFailed, 1);
        lock(&self.dma).quiesce();
        drop_storage(self.world, &self.pen, first, pages);
        let marked = self.world.space.mark(range);
        marked.map_err(|error| Failure::call("mark", range, error))
    }
}

fn drop_storage(world: &World, pen: &Pen<'_>, first: u64, pages: u64) {
    for page in first..first + pages {
        let zeros = [0; PAGE as usize];
        world.memory.write(page * PAGE, &zeros).unwrap();
        pen.remember(page, 0);
    }
}

/// Lets the device answer invalidations until `finished`.
fn attend(dma: &Mutex<Box<dyn Dma>>, finished: &AtomicBool) {
    // Acquire: pairs with the Release of `Finishes`; nothing depends on it.
    while !finished.load(Ordering::Acquire) {
        lock(dma).service();
        thread::yield_now();
    }
}

/// Ends [`attend`], also if a panic goes on.
struct Finishes<'a>(&'a AtomicBool);

impl Drop for Finishes<'_> {
    fn drop(&mut self) {
        // Release: pairs with the Acquire in `attend`.
        self.0.store(true, Ordering::Release);
    }
}
