//! The log of a device, as a source of dirty state.

mod error;
mod fd;
mod ranges;
mod source;
#[cfg(test)]
#[allow(clippy::unwrap_used)] // helpers of tests
mod tests;
#[cfg(feature = "vfio-ioctls")]
mod vfio_ioctls;

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;

use dirtymap::adapter::{Pending, words};
use dirtymap::sync::{AtomicU64, Mutex, Ordering, lock};
use dirtymap::{Granule, Iova, IovaRange};
use dirtymap_host::BitPool;

pub use error::DeviceLogError;
pub use fd::VfioDeviceFd;
use ranges::{Mapped, combined};

/// The most ranges that Linux logs for a device. Devices may log fewer.
pub const MAX_RANGES: usize = 256;

/// The pages of one report: Linux pins their bits at a time.
const WINDOW_PAGES: u64 = 1 << WINDOW_LG2;
const WINDOW_LG2: u8 = 24;
/// The pages of a chunk of pending bits.
const CHUNK_LG2: u8 = 15;
/// The number of tries of a call that signals interrupt.
const TRIES: u32 = 32;

/// A device that logs its writes. [`VfioDeviceFd`] is one, by the file of a VFIO device. With the
/// feature `vfio-ioctls`, the devices of that crate are others.
///
/// A device has one log: no other code may start, read or stop it.
pub trait LoggingDevice: Send + Sync {
    /// Starts the log of `ranges`, which begin and end at multiples of `page`. `page` is a hint:
    /// the device may log in pages of another size. Returns the size of its pages in bytes.
    ///
    /// # Errors
    /// If the device refuses. Then nothing is logged.
    #[doc(alias = "VFIO_DEVICE_FEATURE_DMA_LOGGING_START")]
    fn start(&self, page: Granule, ranges: &[IovaRange]) -> io::Result<u64>;

    /// Sets bit `n` of `bits` if page `n` of `range` was written, least significant bit first, and
    /// clears that page in the log. Other bits stay as they are. Pages are those of `page`. `range`
    /// is inside the ranges of the start, and consists of whole pages of the log, of the size that
    /// `start` returned.
    ///
    /// # Errors
    /// If the device cannot report. Then its log is corrupt, and all of its memory counts as dirty.
    #[doc(alias = "VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT")]
    fn report(&self, range: IovaRange, page: Granule, bits: &mut [u64]) -> io::Result<()>;

    /// Ends the log, and drops the pages that it has not reported.
    ///
    /// # Errors
    /// If the device refuses. Then the log goes on.
    #[doc(alias = "VFIO_DEVICE_FEATURE_DMA_LOGGING_STOP")]
    fn stop(&self) -> io::Result<()>;
}

impl<D: LoggingDevice + ?Sized> LoggingDevice for Arc<D> {
    fn start(&self, page: Granule, ranges: &[IovaRange]) -> io::Result<u64> {
        (**self).start(page, ranges)
    }

    fn report(&self, range: IovaRange, page: Granule, bits: &mut [u64]) -> io::Result<()> {
        (**self).report(range, page, bits)
    }

    fn stop(&self) -> io::Result<()> {
        (**self).stop()
    }
}

/// The log of a device (DMA logging of VFIO) as the source of a domain: for devices whose IOMMU has
/// no dirty bits. Attach it to an [`AddressSpace`](dirtymap::AddressSpace).
///
/// It logs, and translates nothing: the program maps and unmaps for the device in the container of
/// VFIO or in iommufd. **Unmap there first**, then in the address space. The log has the writes
/// until then, and the unmap of the space returns them.
///
/// The ranges of a log are fixed when it starts. So name all addresses that the device may ever
/// reach. Areas may be mapped and unmapped inside them at any time. An area outside is refused
/// ([`DeviceLogError::NotLogged`]), unless the device can only read it.
///
/// ```no_run
/// use dirtymap::{Access, AddressSpace, Granule, ToIovaRange};
/// use dirtymap_vfio::{DeviceLog, VfioDeviceFd};
/// use std::fs::File;
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let device = File::options().read(true).write(true).open("/dev/vfio/devices/vfio0")?;
/// let ram = (0..1 << 30).to_iova_range()?;
/// let log = DeviceLog::new(VfioDeviceFd::new(device.into())?, Granule::K4, &[ram])?;
/// let space = AddressSpace::with_source(Granule::K4, log)?;
/// space.map(ram, 0, Access::ReadWrite)?;
/// space.start_tracking()?; // now copy everything once
/// # Ok(())
/// # }
/// ```
///
/// # Limits of the kernel's log, and how this source handles them
/// * A report clears the pages that it reports, and no call reads without clearing. So all pages
///   of a report are pending until a lease has recorded them. Their memory is reserved when the
///   area is mapped.
/// * After an error the log is corrupt, by the kernel's documentation. All areas are dirty then,
///   and the next harvest stops the log and starts a new one. [`restarts`](Self::restarts) counts.
/// * The kernel drops a bit in silence if it cannot write it. So this source makes the memory of
///   the bits present before each call.
/// * A device may log in larger pages than it was asked for. Then ranges are rounded out to pages
///   of the device, and each report covers whole pages.
///
/// Harvests of one log wait for each other and for the device, under one lock, as do map, unmap and
/// the switch of tracking. Harvests do not allocate.
#[derive(Debug)]
pub struct DeviceLog<D: LoggingDevice> {
    device: D,
    page: Granule,
    /// In whole pages, ascending and disjoint.
    ranges: Vec<IovaRange>,
    max_ranges: usize,
    pool: BitPool,
    restarts: AtomicU64,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    mapped: Mapped,
    /// The pending pages of all areas, by the first address of each chunk.
    chunks: BTreeMap<Iova, Pending>,
    tracked: bool,
    /// The log. `None` after an error, until a new log is started, also while the space tracks.
    log: Option<Arc<Started>>,
    /// Whether the log is corrupt. Then all areas are dirty, whatever is pending.
    corrupt: bool,
    /// Whether the device may still have a log that no call reads, because a stop failed. The
    /// device refuses a start until that log is stopped.
    may_log: bool,
}

/// A log that is started.
#[derive(Debug)]
struct Started {
    /// Ascending and disjoint, in whole pages of the device.
    ranges: Vec<IovaRange>,
    /// The page of the device, or that of the source if it is larger.
    page: Granule,
}

impl<D: LoggingDevice> DeviceLog<D> {
    /// The log of `ranges`, in pages of `page`, at least 4096 bytes. The ranges are rounded out to
    /// pages. If there are more than [`MAX_RANGES`], those with the smallest gaps are joined. The
    /// device is not called: its log starts with the tracking of the space.
    ///
    /// # Errors
    /// In this order: [`DeviceLogError::NoRange`], [`DeviceLogError::PageTooSmall`],
    /// [`DeviceLogError::NoMemory`].
    pub fn new(device: D, page: Granule, ranges: &[IovaRange]) -> Result<Self, DeviceLogError> {
        let range = *ranges.first().ok_or(DeviceLogError::NoRange)?;
        if page < Granule::K4 {
            return Err(DeviceLogError::PageTooSmall { page });
        }
        let pool = BitPool::new(WINDOW_PAGES as usize / 64)
            .map_err(|error| DeviceLogError::NoMemory { range, error })?;
        Ok(DeviceLog {
            device,
            page,
            ranges: combined(ranges, page, MAX_RANGES),
            max_ranges: MAX_RANGES,
            pool,
            restarts: AtomicU64::new(0),
            state: Mutex::default(),
        })
    }

    /// Joins ranges until there are at most `most`, at least 1: for a device that logs few.
    #[must_use]
    pub fn max_ranges(mut self, most: usize) -> Self {
        self.max_ranges = most.clamp(1, MAX_RANGES);
        self.ranges = combined(&self.ranges, self.page, self.max_ranges);
        self
    }

    /// The device.
    pub fn device(&self) -> &D {
        &self.device
    }

    /// How often a corrupt log was replaced by a new one, each time with all areas dirty.
    pub fn restarts(&self) -> u64 {
        self.restarts.load(Ordering::Relaxed) // Relaxed: a statistic
    }

    /// Whether a range of the log covers all of `range`.
    fn covers(&self, range: IovaRange) -> bool {
        let after = self.ranges.partition_point(|l| l.last() < range.start());
        self.ranges
            .get(after)
            .is_some_and(|logged| logged.covers(range))
    }

    /// Starts the log. If the pages of the device are larger than those of the source, it is
    /// started again with ranges of whole pages, so that no report ends inside of one.
    fn start(&self, state: &mut State) -> Result<Started, DeviceLogError> {
        if state.may_log {
            // An error is ignored: if the old log goes on, the start fails, and the next one tries
            // again.
            let _ = uninterrupted(|| self.device.stop());
        }
        let mut page = self.page;
        for _ in 0..2 {
            let ranges = combined(&self.ranges, page, self.max_ranges);
            let started = uninterrupted(|| self.device.start(page, &ranges)).0;
            let bytes =
                started.map_err(|error| DeviceLogError::start(page, ranges.len(), error))?;
            let theirs = Granule::from_bytes(bytes).ok();
            let theirs = theirs.filter(|theirs| theirs.lg2() <= self.page.lg2() + WINDOW_LG2);
            if let Some(theirs) = theirs.filter(|theirs| *theirs <= page) {
                state.may_log = false;
                let page = theirs.max(page);
                return Ok(Started { ranges, page });
            }
            if let Err(error) = uninterrupted(|| self.device.stop()).0 {
                state.may_log = true;
                return Err(DeviceLogError::NotStopped { error });
            }
            let asked = page;
            page = theirs.ok_or(DeviceLogError::BadPage { page: asked, bytes })?;
        }
        let bytes = page.bytes();
        Err(DeviceLogError::BadPage {
            page: self.page,
            bytes,
        })
    }

    /// Moves what the device has logged in `range` to what is pending.
    fn pull(&self, state: &mut State, range: IovaRange) -> Result<(), DeviceLogError> {
        if state.corrupt {
            self.restart(state)?;
        }
        let Some(log) = state.log.clone() else {
            return Ok(());
        };
        let mut next = Some(range.start());
        let window = Granule::from_lg2(self.page.lg2().saturating_add(WINDOW_LG2));
        let next_ask = |state: &State, from| state.next_ask(&log, window, from, range);
        while let Some((ask, after)) = next.and_then(|next| next_ask(state, next)) {
            self.ask(state, ask)?;
            next = after;
        }
        Ok(())
    }

    fn ask(&self, state: &mut State, range: IovaRange) -> Result<(), DeviceLogError> {
        let pages = range.granules(self.page);
        let words = pages.div_ceil(64) as usize;
        // A panic of the device leaves it corrupt as well.
        let done = self.pool.with(words, |bits| {
            debug_assert_eq!(bits.len(), words);
            state.corrupt = true;
            let (done, tries) = uninterrupted(|| self.device.report(range, self.page, bits));
            if done.is_ok() {
                state.corrupt = false;
                if tries > 1 {
                    // An interrupted report may have cleared pages anywhere without a bit.
                    state.add_all();
                }
                state.add(range, self.page, bits);
            }
            done
        });
        match done {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => Err(DeviceLogError::report(range, error)),
            // The device was not asked.
            Err(error) => Err(DeviceLogError::NoMemory { range, error }),
        }
    }

    /// Replaces a corrupt log by a new one. All areas are dirty from then on.
    fn restart(&self, state: &mut State) -> Result<(), DeviceLogError> {
        state.log = None;
        state.may_log = true;
        let started = self.start(state)?;
        // After the start: what is written until then may be in neither log.
        state.add_all();
        state.log = Some(Arc::new(started));
        state.corrupt = false;
        self.restarts.fetch_add(1, Ordering::Relaxed); // Relaxed: a statistic
        Ok(())
    }
}

impl<D: LoggingDevice> Drop for DeviceLog<D> {
    fn drop(&mut self) {
        let state = lock(&self.state);
        if state.tracked || state.may_log {
            // An error leaves a log that no code reads; it ends with the device's file.
            let _ = uninterrupted(|| self.device.stop());
        }
    }
}

impl State {
    /// The range of the next report, and the address at which the report after it begins. The range
    /// begins at or below `from`, covers the first mapped addresses from there on, and has at most
    /// `window` bytes.
    fn next_ask(
        &self,
        log: &Started,
        window: Option<Granule>,
        from: Iova,
        range: IovaRange,
    ) -> Option<(IovaRange, Option<Iova>)> {
        let rest = IovaRange::new(from, range.last()).ok()?;
        let part = self.mapped.parts(rest).find_map(|part| {
            let after = log.ranges.partition_point(|l| l.last() < part.start());
            log.ranges.get(after)?.intersection(part)
        })?;
        let first = part.start().granule_start(log.page);
        let last = window.and_then(|window| first.checked_add(window.mask()));
        let last = last.map_or(part.last(), |last| last.min(part.last()));
        let ask = IovaRange::new(part.start(), last).ok()?.round_out(log.page);
        let next = ask
            .last()
            .checked_add(1)
            .filter(|next| *next <= range.last());
        Some((ask, next))
    }

    /// Adds the pages of `range` whose bits are set, as far as they are mapped.
    fn add(&mut self, range: IovaRange, page: Granule, bits: &[u64]) {
        let pages = u64::try_from(range.granules(page)).unwrap_or(u64::MAX);
        let mut first = 0;
        while let Some((from, to)) = words::next_run(bits, first, pages - 1) {
            let at = |page_number: u64| range.start().get() + (page_number << page.lg2());
            let run = IovaRange::new(Iova::new(at(from)), Iova::new(at(to) + page.mask()));
            if let Ok(run) = run {
                self.add_range(run);
            }
            first = to + 1;
            if first >= pages {
                break;
            }
        }
    }

    /// Adds all areas.
    fn add_all(&mut self) {
        self.add_range(IovaRange::ALL);
    }

    /// Adds the mapped part of `range`.
    fn add_range(&mut self, range: IovaRange) {
        for part in self.mapped.parts(range) {
            for chunk in touched(&mut self.chunks, part) {
                chunk.add_range(part);
            }
        }
    }
}

/// The chunks that `range` touches, ascending.
fn touched(
    chunks: &mut BTreeMap<Iova, Pending>,
    range: IovaRange,
) -> impl Iterator<Item = &mut Pending> {
    // Chunks are aligned, so the first one that `range` touches begins at or below it.
    let below = chunks.range(..=range.start()).next_back();
    let from = below.map_or(range.start(), |(start, _)| *start);
    chunks
        .range_mut(from..=range.last())
        .map(|(_, chunk)| chunk)
}

/// Makes a call again when a signal interrupted it. Returns how often it was made.
fn uninterrupted<T>(mut call: impl FnMut() -> io::Result<T>) -> (io::Result<T>, u32) {
    let mut tries = 1;
    loop {
        match call() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted && tries < TRIES => tries += 1,
            done => return (done, tries),
        }
    }
}
