//! Writers: devices, and CPU threads that mark in three ways. Each owns a lane of every page and
//! remembers its last write there.

use dirtymap::sync::{Ordering, thread};
use dirtymap::{AreaHandle, IovaRange};

use super::failure::Failure;
use super::layout::{self, LANE, PAGE};
use super::machine::Dma;
use super::tally::Count;
use super::world::{MAPPED, UNMAPPED, World};
use crate::Random;

/// The number of writes between two calls of `goes_on`.
const BURST: u64 = 128;

/// The number of bursts for which a device stays at a page.
const STAY: u64 = 200;

/// The state of a device's domain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Reach {
    /// It is attached: all mapped pages can be written.
    Attached,
    /// It is being detached: any write may fault.
    Leaving,
    /// It has been detached: every write faults.
    Detached,
}

/// A lane, and its writer.
pub(super) struct Pen<'w> {
    world: &'w World,
    lane: usize,
    written: u64,
    pub(super) random: Random,
}

impl<'w> Pen<'w> {
    pub(super) fn new(world: &'w World, lane: usize) -> Self {
        Pen {
            world,
            lane,
            written: 0,
            random: world.random(1, lane as u64),
        }
    }

    /// The next bytes of the lane, and the number that they encode.
    fn next(&mut self) -> (u64, [u8; LANE as usize]) {
        self.written += 1;
        let value = self.written << 8 | self.lane as u64;
        (value, lane_bytes(value))
    }

    /// `page` holds `value` in this lane from now on.
    pub(super) fn remember(&self, page: u64, value: u64) {
        // Relaxed: read when this thread rests.
        self.world.shadows[self.lane][page as usize].store(value, Ordering::Relaxed);
    }

    fn offset(&self) -> u64 {
        self.lane as u64 * LANE
    }

    /// A burst of writes by a device, to the page `hot` or to any pages.
    pub(super) fn burst(
        &mut self,
        dma: &mut dyn Dma,
        reach: Reach,
        hot: Option<u64>,
    ) -> Result<(), Failure> {
        let (mut writes, mut faults) = (0, 0);
        for _ in 0..BURST {
            let page = hot.unwrap_or_else(|| layout::any_page(&mut self.random));
            let slot = layout::slot_of(page).map(|nth| &self.world.slots[nth]);
            let (value, bytes) = self.next();
            let at = layout::iova(page).checked_add(self.offset()).unwrap();
            let before = slot.map_or(MAPPED, |slot| slot.phase());
            let outcome = dma.write(at, &bytes);
            let after = slot.map_or(MAPPED, |slot| slot.phase());
            let stable = (before == after).then_some(after % 4);
            match outcome {
                Ok(()) => {
                    self.remember(page, value);
                    writes += 1;
                    let wrong = match (reach, stable) {
                        (Reach::Detached, _) => "reached memory after it was detached",
                        (_, Some(UNMAPPED)) => "wrote to a slot after it was unmapped",
                        _ => continue,
                    };
                    return Err(self.wrong(page, wrong));
                }
                Err(fault) => {
                    faults += 1;
                    if reach == Reach::Attached && stable == Some(MAPPED) {
                        let wrong = format!("was refused a page that is mapped ({fault})");
                        return Err(self.wrong(page, &wrong));
                    }
                }
            }
        }
        self.world.tally.add(Count::DeviceWrites, writes);
        self.world.tally.add(Count::Faults, faults);
        Ok(())
    }

    /// A write of a device to a page that is always mapped.
    pub(super) fn written_by(&mut self, dma: &mut dyn Dma, page: u64) -> Result<(), Failure> {
        let (value, bytes) = self.next();
        let at = layout::iova(page).checked_add(self.offset()).unwrap();
        match dma.write(at, &bytes) {
            Ok(()) => self.remember(page, value),
            Err(fault) => {
                let wrong = format!("was refused a page that is mapped ({fault})");
                return Err(self.wrong(page, &wrong));
            }
        }
        self.world.tally.add(Count::DeviceWrites, 1);
        Ok(())
    }

    fn wrong(&self, page: u64, what: &str) -> Failure {
        let writer = self.world.writer(self.lane);
        Failure::new(format!("{writer} {what}, write {}", self.written)).at(page)
    }

    /// A device that writes all the time. Now and then it stays at one page for a while, to which
    /// it writes by a cached translation.
    pub(super) fn device(mut self, mut dma: Box<dyn Dma>) -> Result<(), Failure> {
        let mut bytes = [0; 200];
        let mut stay = (None, 0);
        while self.world.control.goes_on(|| dma.quiesce()) {
            stay = match stay {
                (page, left @ 1..) => (page, left - 1),
                _ if self.random.below(16) < self.world.options.stay => {
                    (Some(layout::any_static(&mut self.random)), STAY)
                }
                _ => (None, 0),
            };
            self.burst(&mut *dma, Reach::Attached, stay.0)?;
            match self.random.below(64) {
                0 => dma.quiesce(),
                1 => {
                    let page = layout::any_static(&mut self.random);
                    let _ = dma.read(layout::iova(page), &mut bytes);
                }
                _ => dma.service(),
            }
            thread::yield_now();
        }
        dma.quiesce();
        Ok(())
    }

    /// A CPU thread that writes and marks.
    pub(super) fn cpu(mut self) -> Result<(), Failure> {
        let mut handle: Option<AreaHandle> = None;
        while self.world.control.goes_on(|| ()) {
            let mut late = 0;
            for _ in 0..BURST {
                late += match self.random.below(8) {
                    0 => self.guarded()?,
                    1..4 => self.marked(None),
                    _ => {
                        if self.random.below(16) == 0 || handle.is_none() {
                            let page = layout::any_page(&mut self.random);
                            handle = self.world.space.area(layout::iova(page));
                        }
                        self.marked(handle.as_ref())
                    }
                };
            }
            self.world.tally.add(Count::CpuWrites, BURST - late);
            self.world.tally.add(Count::LateMarks, late);
            thread::yield_now();
        }
        Ok(())
    }

    pub(super) fn write(&mut self, page: u64) -> IovaRange {
        let (value, bytes) = self.next();
        let at = page * PAGE + self.offset();
        self.world.memory.write(at, &bytes).unwrap();
        self.remember(page, value);
        let at = layout::iova(page).checked_add(self.offset()).unwrap();
        IovaRange::from_len(at, LANE).unwrap()
    }

    /// Writes, then marks. A mark after an unmap is refused, and this thread then copies the page
    /// itself. Returns the number of refused marks.
    fn marked(&mut self, handle: Option<&AreaHandle>) -> u64 {
        let page = match handle {
            Some(handle) => {
                let mut pages = layout::pages_of(handle.mapping().range);
                let n = pages.clone().count() as u64;
                pages.nth(self.random.below(n) as usize).unwrap()
            }
            None => layout::any_page(&mut self.random),
        };
        let range = self.write(page);
        if handle.is_some_and(|handle| handle.mark(range).is_ok())
            || self.world.space.mark(range).is_ok()
        {
            return 0;
        }
        self.world.copy_range(range);
        1
    }

    /// Writes under a guard, in a permanent area.
    fn guarded(&mut self) -> Result<u64, Failure> {
        let page = layout::any_static(&mut self.random);
        let range = layout::range(page, 1);
        let guard = self.world.space.begin_write(range);
        let guard = guard.map_err(|error| Failure::call("begin_write", range, error))?;
        self.write(page);
        drop(guard);
        Ok(0)
    }
}

/// The contents of a lane after the write of `value`. Before the first write, all zero.
pub(super) fn lane_bytes(value: u64) -> [u8; LANE as usize] {
    let mut bytes = [0; LANE as usize];
    if value != 0 {
        for (nth, word) in bytes.chunks_exact_mut(8).enumerate() {
            word.copy_from_slice(&value.rotate_left(8 * nth as u32).to_le_bytes());
        }
    }
    bytes
}

/// The number of the write that a lane holds, and the lane of its writer.
pub(super) fn number(lane: &[u8]) -> (u64, u64) {
    let value = lane.first_chunk().map_or(0, |b| u64::from_le_bytes(*b));
    (value >> 8, value & 0xff)
}
