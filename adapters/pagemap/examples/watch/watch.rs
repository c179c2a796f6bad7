//! The watcher: harvests in intervals, and keeps what it saw.

use std::time::{Duration, Instant};

use dirtymap::{AddressSpace, HarvestRequest, IovaRange, UserBitmap};

/// Cells that the memory is shown in, at most.
pub(crate) const CELLS: usize = 256;

/// What one harvest found.
#[derive(Clone, Debug, Default)]
pub(crate) struct Sample {
    /// When, since the begin.
    pub(crate) at: Duration,
    /// Since the harvest before.
    pub(crate) interval: Duration,
    pub(crate) dirty_bytes: u64,
    /// What was written within the window.
    pub(crate) working_set: u64,
    /// How long harvest and sync took.
    pub(crate) took: Duration,
    /// The part of each cell that was written, 0 to 255.
    pub(crate) heat: Vec<u8>,
}

impl Sample {
    /// Bytes of pages that were written, in a second.
    pub(crate) fn rate(&self) -> f64 {
        self.dirty_bytes as f64 / self.interval.as_secs_f64().max(1e-9)
    }
}

/// What is watched, and what was seen.
pub(crate) struct Watch<'a> {
    space: &'a AddressSpace,
    range: IovaRange,
    page: u64,
    window: Duration,
    words: Vec<u64>,
    /// When each page was last found written, as a number of a sample and one; 0 for never.
    last: Vec<u32>,
    began: Instant,
    pub(crate) samples: Vec<Sample>,
}

impl<'a> Watch<'a> {
    /// Begins to watch `range`, which is tracked.
    pub(crate) fn new(space: &'a AddressSpace, range: IovaRange, window: Duration) -> Self {
        let pages = range.granules(space.page()) as usize;
        Watch {
            space,
            range,
            page: space.page().bytes(),
            window,
            words: vec![0; pages.div_ceil(64)],
            last: vec![0; pages],
            began: Instant::now(),
            samples: Vec::new(),
        }
    }

    /// Harvests, and adds a sample.
    pub(crate) fn sample(&mut self) -> Result<&Sample, dirtymap::Error> {
        self.words.fill(0);
        let request = HarvestRequest::new(self.range, self.space.page());
        let begin = Instant::now();
        let lease = self
            .space
            .harvest(&request, UserBitmap::new(&mut self.words))?
            .sync()?;
        let took = begin.elapsed();
        let at = self.began.elapsed();
        let number = self.samples.len() as u32 + 1;
        let pages = self.last.len();
        let cells = CELLS.min(pages);
        let mut written = vec![0u64; cells];
        let mut dirty_pages = 0;
        for run in lease.runs() {
            let page = |address: u64| ((address - self.range.start().get()) / self.page) as usize;
            for page in page(run.start().get())..=page(run.last().get()) {
                self.last[page] = number;
                written[page * cells / pages] += 1;
                dirty_pages += 1;
            }
        }
        // This program copies no page: it only counts them.
        lease.commit();
        let before = self.samples.last().map_or(Duration::ZERO, |last| last.at);
        let heat = written.iter().enumerate().map(|(cell, written)| {
            // A cell has as many pages as `page * cells / pages` puts there, with rounding.
            let first = (cell * pages).div_ceil(cells);
            let next = ((cell + 1) * pages).div_ceil(cells);
            (written * 255).div_ceil((next - first) as u64).min(255) as u8
        });
        let heat = heat.collect();
        let oldest = self
            .samples
            .partition_point(|sample| sample.at + self.window <= at) as u32;
        let recent = self.last.iter().filter(|last| **last > oldest).count() as u64;
        self.samples.push(Sample {
            at,
            interval: at - before,
            dirty_bytes: dirty_pages * self.page,
            working_set: recent * self.page,
            took,
            heat,
        });
        Ok(&self.samples[self.samples.len() - 1])
    }

    /// The bytes that are watched.
    pub(crate) fn bytes(&self) -> u64 {
        self.last.len() as u64 * self.page
    }

    /// Pages that were never written.
    pub(crate) fn untouched(&self) -> u64 {
        self.last.iter().filter(|last| **last == 0).count() as u64 * self.page
    }
}

/// `heat` in `cells` cells, fewer or as many: each has the hottest of its own.
pub(crate) fn squeeze(heat: &[u8], cells: usize) -> Vec<u8> {
    let cells = cells.min(heat.len());
    (0..cells)
        .map(|cell| {
            let (first, next) = (cell * heat.len() / cells, (cell + 1) * heat.len() / cells);
            heat[first..next].iter().copied().max().unwrap_or(0)
        })
        .collect()
}

/// Bytes, for people.
pub(crate) fn bytes(bytes: f64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut scaled = bytes;
    let mut unit = 0;
    while scaled >= 1000.0 && unit + 1 < UNITS.len() {
        scaled /= 1024.0;
        unit += 1;
    }
    match scaled {
        _ if unit == 0 => format!("{scaled:.0} B"),
        small if small < 9.95 => format!("{small:.1} {}", UNITS[unit]),
        large => format!("{large:.0} {}", UNITS[unit]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use dirtymap::{Access, Granule, Iova};

    #[test]
    fn samples_say_where_and_how_much_and_for_how_long() {
        let page = |first: u64, n: u64| {
            IovaRange::from_len(Iova::new(0x10_0000 + first * 4096), n * 4096).unwrap()
        };
        let space = AddressSpace::new(Granule::K4);
        space.map(page(0, 1000), 0, Access::ReadWrite).unwrap();
        space.start_tracking().unwrap();
        let mut watch = Watch::new(&space, page(0, 1000), Duration::from_millis(40));
        space.mark(page(0, 4)).unwrap();
        space.mark(page(999, 1)).unwrap();
        let sample = watch.sample().unwrap().clone();
        assert_eq!(sample.dirty_bytes, 5 * 4096);
        assert_eq!(sample.working_set, 5 * 4096);
        assert_eq!(sample.heat.len(), CELLS);
        assert_eq!(sample.heat[0], 255, "four pages of four");
        assert_eq!(sample.heat[255], 85, "one of three");
        assert_eq!(sample.heat.iter().filter(|heat| **heat > 0).count(), 2);
        std::thread::sleep(Duration::from_millis(60));
        space.mark(page(0, 1)).unwrap();
        let sample = watch.sample().unwrap();
        assert_eq!(sample.working_set, 4096, "the others are long ago");
        assert_eq!(watch.untouched(), 995 * 4096);
        assert_eq!(watch.bytes(), 1000 * 4096);
    }

    #[test]
    fn a_narrow_strip_shows_the_hottest() {
        assert_eq!(squeeze(&[0, 9, 0, 0, 255, 1], 3), [9, 0, 255]);
        assert_eq!(squeeze(&[1, 2], 80), [1, 2]);
    }

    #[test]
    fn sizes_read_well() {
        assert_eq!(bytes(0.0), "0 B");
        assert_eq!(bytes(4096.0), "4.0 KiB");
        assert_eq!(bytes(1023.0 * 1024.0), "1.0 MiB");
        assert_eq!(bytes(134_217_728.0), "128 MiB");
    }
}
