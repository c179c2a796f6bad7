//! A device that logs its own writes, as VFIO devices with DMA logging do. It is a thread of this
//! program.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use dirtymap::{Granule, IovaRange};
use dirtymap_vfio::LoggingDevice;

use super::machine::{PAGE, PAGES};

/// The log: a bit for each page.
pub(crate) struct Played {
    logs: AtomicBool,
    words: [AtomicU64; (PAGES / 64) as usize],
}

impl Played {
    pub(crate) fn new() -> Self {
        Played {
            logs: AtomicBool::new(false),
            words: std::array::from_fn(|_| AtomicU64::new(0)),
        }
    }

    /// The device has written to a page.
    pub(crate) fn log(&self, page: u64) {
        // Relaxed: the log is started before the device writes.
        if self.logs.load(Ordering::Relaxed) {
            // Release: pairs with the Acquire of a report, which then sees the data.
            self.words[(page / 64) as usize].fetch_or(1 << (page % 64), Ordering::Release);
        }
    }
}

impl LoggingDevice for Played {
    fn start(&self, _: Granule, _: &[IovaRange]) -> io::Result<u64> {
        // Relaxed, both: no device writes yet.
        for word in &self.words {
            word.store(0, Ordering::Relaxed);
        }
        self.logs.store(true, Ordering::Relaxed);
        Ok(PAGE)
    }

    fn report(&self, range: IovaRange, page: Granule, bits: &mut [u64]) -> io::Result<()> {
        let first = range.start().get() >> page.lg2();
        let last = range.last().get() >> page.lg2();
        for number in first..=last {
            let bit = 1 << (number % 64);
            // Acquire: pairs with the Release of `log`.
            let old = self.words[(number / 64) as usize].fetch_and(!bit, Ordering::Acquire);
            let at = number - first;
            bits[(at / 64) as usize] |= u64::from(old & bit != 0) << (at % 64);
        }
        Ok(())
    }

    fn stop(&self) -> io::Result<()> {
        self.logs.store(false, Ordering::Relaxed); // Relaxed: as in `start`
        Ok(())
    }
}
