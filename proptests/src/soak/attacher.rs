//! An actor that attaches a domain of its own, lets its device write for a while, and detaches the
//! domain, sometimes in the middle of a write.

use std::sync::Arc;
use std::time::Duration;

use dirtymap::sync::{AtomicU8, Ordering, thread};

use super::failure::Failure;
use super::layout::{self, PAGES};
use super::machine::{self, Dma};
use super::panics::caught;
use super::tally::Count;
use super::world::World;
use super::writer::{Pen, Reach};

const LEAVING: u8 = 0;
const DETACHED: u8 = 1;

/// See the [module](self).
pub(super) struct Attacher<'w> {
    world: &'w World,
    actor: usize,
    pen: Pen<'w>,
}

impl<'w> Attacher<'w> {
    pub(super) fn new(world: &'w World, nth: u32) -> Self {
        Attacher {
            world,
            actor: (world.options.mappers + nth) as usize,
            pen: Pen::new(world, (world.options.devices + nth) as usize),
        }
    }

    pub(super) fn run(mut self) -> Result<(), Failure> {
        while self.world.control.goes_on(|| ()) {
            self.round()?;
            if self.world.options.discarders != 0 {
                // No page becomes zero while a domain is being attached.
                thread::sleep(Duration::from_millis(self.pen.random.below(100)));
            }
        }
        Ok(())
    }

    fn round(&mut self) -> Result<(), Failure> {
        let all = layout::range(0, PAGES);
        let random = &mut self.pen.random;
        let (format, leaf) = (random.below(machine::FORMATS), machine::any_leaf(random));
        let (shape, bursts) = (random.below(4), 1 + random.below(200));
        let busy = random.below(2) == 0;
        let domain = machine::machine(format, leaf, &self.world.memory);
        domain.break_hardware(self.world.breakage());
        self.world.events.note(self.actor, "attaches", all);
        let joined = Arc::clone(&domain).join(&self.world.space, &self.world.panics);
        let Some(id) = joined else {
            // The domain is no longer attached, or waits for a detach, which follows at the end.
            self.world.tally.add(Count::Panicked, 1);
            return Ok(());
        };
        let id = id.map_err(|error| Failure::call("attach", all, error))?;
        self.world.tally.add(Count::Attaches, 1);
        let mut dma = domain.device(machine::device_config(shape));
        for _ in 0..bursts {
            if !self.world.control.goes_on(|| dma.quiesce()) {
                break;
            }
            self.pen.burst(&mut *dma, Reach::Attached, None)?;
            thread::yield_now();
        }
        self.world.events.note(self.actor, "detaches", all);
        let detach = || {
            loop {
                match caught(|| self.world.space.detach(id)) {
                    Some(detached) => {
                        return detached.map_err(|error| Failure::call("detach", all, error));
                    }
                    None => self.world.tally.add(Count::Panicked, 1),
                }
            }
        };
        if busy {
            self.world.tally.add(Count::DetachedBusy, 1);
            let reach = AtomicU8::new(LEAVING);
            let pen = &mut self.pen;
            thread::scope(|scope| {
                let writer = scope.spawn(|| write_until_gone(pen, &mut *dma, &reach));
                let detached = detach();
                // Release: pairs with the Acquire in `write_until_gone`.
                reach.store(DETACHED, Ordering::Release);
                let written = writer
                    .join()
                    .unwrap_or_else(|_| Err(Failure::new("a device panicked")));
                detached.and(written)
            })?;
        } else {
            dma.quiesce();
            detach()?;
            self.pen.burst(&mut *dma, Reach::Detached, None)?;
        }
        dma.quiesce();
        drop(dma);
        self.world
            .tally
            .add(Count::DomainFaults, domain.stats().faults);
        Ok(())
    }
}

/// Writes until the domain has been detached, and a little longer.
fn write_until_gone(pen: &mut Pen<'_>, dma: &mut dyn Dma, reach: &AtomicU8) -> Result<(), Failure> {
    // Acquire: pairs with the Release in `round`; the code after it runs after the detach.
    while reach.load(Ordering::Acquire) == LEAVING {
        if let Err(failure) = pen.burst(dma, Reach::Leaving, None) {
            dma.quiesce();
            return Err(failure);
        }
        thread::yield_now();
    }
    let outcome = pen.burst(dma, Reach::Detached, None);
    dma.quiesce();
    outcome
}
