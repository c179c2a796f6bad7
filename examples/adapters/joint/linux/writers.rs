//! The writers. Each has a word of its own in every page, so that none overwrites the words of
//! another.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use dirtymap::{Iova, IovaRange};
use pagetable_sim::{Device, DeviceConfig};

use super::guest::Guest;
use super::machine::{Failure, Machine, PAGE, PAGES, SILENT};

/// The words of a page that belong to the back end and to two threads of the program. The guest has
/// the first byte.
const BACK_END: u64 = 2;
const PROGRAM: u64 = 3;
const QUIETLY: u64 = 4;
const LOGGING: u64 = 5;

/// Numbers that look random and are the same in every run: splitmix64.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        (mixed ^ (mixed >> 31)) % bound
    }

    /// A page that each writer but the guest may write to. Page 1 holds the code of the guest.
    fn page(&mut self) -> u64 {
        2 + self.below(PAGES - 2)
    }
}

impl Machine {
    /// The back end writes to a page, and then sets its bit.
    pub(crate) fn back_end_writes(&self, page: u64, value: u64) {
        let word = &self.memory.words()[(page * PAGE / 8 + BACK_END) as usize];
        // Relaxed: the bit carries the Release.
        word.store(value, Ordering::Relaxed);
        self.back_end.set_bit(page / 8, page % 8);
    }

    /// A thread of the program writes to a page, and then marks it.
    pub(crate) fn program_writes(&self, page: u64, value: u64) -> Result<(), Failure> {
        let word = &self.memory.words()[(page * PAGE / 8 + PROGRAM) as usize];
        // Relaxed: the mark fences.
        word.store(value, Ordering::Relaxed);
        let written = IovaRange::from_len(Iova::new(page * PAGE + PROGRAM * 8), 8)?;
        Ok(self.space.mark(written)?)
    }

    /// A thread of the program writes to a page of the silent memory, without a mark.
    pub(crate) fn program_writes_quietly(&self, page: u64, value: u64) {
        assert!(page >= SILENT);
        let word = &self.memory.words()[(page * PAGE / 8 + QUIETLY) as usize];
        // Relaxed: the page tables of the processor have the rest.
        word.store(value, Ordering::Relaxed);
    }

    /// The device that logs writes to a page, and then logs that.
    pub(crate) fn logging_device_writes(&self, page: u64, value: u64) {
        let word = &self.memory.words()[(page * PAGE / 8 + LOGGING) as usize];
        // Relaxed: the log carries the Release.
        word.store(value, Ordering::Relaxed);
        self.logging.device().log(page);
    }

    /// A device of the simulated IOMMU.
    pub(crate) fn device(&self) -> Device {
        self.domain.attach(DeviceConfig::default())
    }
}

/// A device writes to a page, by DMA.
pub(crate) fn device_writes(device: &mut Device, page: u64, value: u64) -> Result<(), Failure> {
    Ok(device.write(Iova::new(page * PAGE + 64), &value.to_le_bytes())?)
}

/// How many writes there were, by writer.
#[derive(Default)]
pub(crate) struct Written {
    pub(crate) guest: AtomicU64,
    pub(crate) back_end: AtomicU64,
    pub(crate) device: AtomicU64,
    pub(crate) program: AtomicU64,
    pub(crate) quietly: AtomicU64,
    pub(crate) logging: AtomicU64,
}

/// Runs all writers, each in a thread, while `meanwhile` runs; when it returns, they stop, and what
/// is in flight lands.
pub(crate) fn while_all_write<T>(
    machine: &Machine,
    guest: Option<&mut Guest>,
    seed: u64,
    written: &Written,
    meanwhile: impl FnOnce() -> Result<T, Failure>,
) -> Result<T, Failure> {
    let stop = &AtomicBool::new(false);
    // Each turn is a burst, then a pause, so that a round finds some pages dirty and others clean.
    let turns = move |count: &AtomicU64,
                      mut turn: Box<dyn FnMut(u64) -> Result<u64, Failure> + '_>| {
        let mut value = 0;
        // Relaxed, both: a request to stop, and a count that is read after the join.
        while !stop.load(Ordering::Relaxed) {
            value += 1;
            count.fetch_add(turn(value)?, Ordering::Relaxed);
            thread::sleep(Duration::from_micros(200));
        }
        Ok::<(), Failure>(())
    };
    thread::scope(|scope| {
        let mut writers = Vec::new();
        if let Some(guest) = guest {
            let mut random = Random(seed);
            writers.push(scope.spawn(move || {
                turns(
                    &written.guest,
                    Box::new(|_| {
                        let n = 1 + random.below(8);
                        let first = 2 + random.below(Machine::guest_pages() - n);
                        guest.write(first, n, 1)?;
                        Ok(n)
                    }),
                )
            }));
        }
        let mut random = Random(seed + 1);
        writers.push(scope.spawn(move || {
            turns(
                &written.back_end,
                Box::new(|value| {
                    machine.back_end_writes(random.page(), value);
                    Ok(1)
                }),
            )
        }));
        let mut random = Random(seed + 2);
        writers.push(scope.spawn(move || {
            let mut device = machine.device();
            let done = turns(
                &written.device,
                Box::new(|value| {
                    device_writes(&mut device, random.page(), value)?;
                    // No other thread waits while it sleeps. Half of the time it has writes in
                    // flight meanwhile.
                    match value % 2 {
                        0 => device.quiesce(),
                        _ => device.service(),
                    }
                    Ok(1)
                }),
            );
            device.quiesce();
            done
        }));
        let mut random = Random(seed + 3);
        writers.push(scope.spawn(move || {
            turns(
                &written.program,
                Box::new(|value| machine.program_writes(random.page(), value).map(|()| 1)),
            )
        }));
        let mut random = Random(seed + 5);
        writers.push(scope.spawn(move || {
            turns(
                &written.logging,
                Box::new(|value| {
                    machine.logging_device_writes(random.page(), value);
                    Ok(1)
                }),
            )
        }));
        if machine.ids.pagemap.is_some() {
            let mut random = Random(seed + 4);
            writers.push(scope.spawn(move || {
                turns(
                    &written.quietly,
                    Box::new(|value| {
                        let page = SILENT + random.below(PAGES - SILENT);
                        machine.program_writes_quietly(page, value);
                        Ok(1)
                    }),
                )
            }));
        }
        let outcome = meanwhile();
        stop.store(true, Ordering::Relaxed);
        for writer in writers {
            writer.join().map_err(|_| Failure::Panicked)??;
        }
        outcome
    })
}
