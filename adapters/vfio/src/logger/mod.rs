//! The log that an emulator of devices keeps for the client of vfio-user.
//!
//! A session of the log, from start to stop, is a consumer of the address space. So it reports
//! every write since the start, whatever other consumers of the space harvest, and marks cost the
//! same with it and without it.

mod error;
#[cfg(test)]
#[allow(clippy::unwrap_used)] // helpers of tests
mod tests;
mod wire;

use std::sync::Arc;

use dirtymap::bitmap::Sink;
use dirtymap::space::Unmapped;
use dirtymap::sync::{Mutex, lock};
use dirtymap::{
    AddressSpace, BitmapView, Consumer, Error, Granule, IovaRange, Lease, SparseBitmap, Start,
    Synced, ToIovaRange, UserBitmap,
};

pub use error::LogError;

use crate::range::DmaRange;

/// The ranges of a start, at most: as many as in Linux.
const MAX_RANGES: usize = 256;

/// The dirty log that a device emulator keeps for its client (DMA logging of vfio-user), over the
/// address space in which the emulator marks the writes of its devices.
///
/// * [`start`](Self::start) begins a log of some ranges. From here on, every write to them is
///   logged, in areas that are mapped already and in those that are mapped later.
/// * [`report`](Self::report) moves the log of a range into the client's bitmap. The range may
///   cover several areas, parts of them, and holes, which are clean.
/// * [`unmap`](Self::unmap) unmaps areas, and leaves their dirty pages in the log.
/// * [`stop`](Self::stop) ends the log.
/// * [`device_feature`](Self::device_feature) answers the client's messages by these calls.
///
/// The page of the client and that of the space may differ by any factor, in either direction. A
/// page of the space that a report covers in part stays in the log, except for the part that the
/// report covers.
///
/// All calls take `&self`, from any thread. They wait for each other by a lock of the log, and
/// `report` holds it while it waits for devices. Marks never wait for it.
///
/// ```
/// use dirtymap::{Access, AddressSpace, Granule};
/// use dirtymap_vfio::{DmaLogger, DmaRange};
/// use std::sync::Arc;
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let space = Arc::new(AddressSpace::tracked(Granule::K4));
/// let log = DmaLogger::new(Arc::clone(&space), "nvme0");
/// space.map(0..1 << 20, 0, Access::ReadWrite)?; // DMA_MAP of the client
/// log.start(4096, &[DmaRange { iova: 0, length: 4 << 20 }])?;
///
/// space.mark(0x3ffe..0x4002)?; // after the device wrote there
///
/// let mut bitmap = [0u8; 32]; // a bit for each page of 1 MiB
/// log.report(DmaRange { iova: 0, length: 1 << 20 }, 4096, &mut bitmap)?;
/// assert_eq!(bitmap[0], 0b0001_1000);
/// log.stop()?;
/// # Ok(())
/// # }
/// ```
#[doc(alias = "VFIO_DEVICE_FEATURE_DMA_LOGGING_START")]
#[doc(alias = "VFIO_USER_DEVICE_FEATURE")]
#[derive(Debug)]
pub struct DmaLogger {
    space: Arc<AddressSpace>,
    name: String,
    session: Mutex<Option<Session>>,
}

/// The result of [`DmaLogger::report`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Reported {
    /// Bits that went from 0 to 1 in the client's bitmap.
    pub bits_set: u64,
}

/// A log that is started.
#[derive(Debug)]
struct Session {
    consumer: Consumer<'static>,
    /// Joined, ascending.
    ranges: Vec<IovaRange>,
    /// The pages that were taken from the space and not reported yet: the rests of pages that a
    /// report covered in part, and the dirty pages of areas that were unmapped. One bit for each
    /// 4096 bytes, the smallest page of a client.
    left: SparseBitmap,
}

impl DmaLogger {
    /// A log over `space`, not started. `name` is that of the space's consumer during a session:
    /// each device that shares the space has its own.
    pub fn new(space: Arc<AddressSpace>, name: &str) -> Self {
        DmaLogger {
            space,
            name: name.to_owned(),
            session: Mutex::new(None),
        }
    }

    /// The space in which the writes of the devices are marked.
    pub fn space(&self) -> &Arc<AddressSpace> {
        &self.space
    }

    /// Starts the log of `ranges`: every write after the return is logged. Returns the page in
    /// which it logs, at least 4096 bytes. `page_size` is the page in bytes that the client asks
    /// for; its reports may have any other page. The ranges may cover holes, and areas that are
    /// mapped later. Pages that were dirty before, for other consumers, may be reported as well.
    ///
    /// Switches the tracking of the space on, if it is off. No call of the log switches it off,
    /// because other consumers may need it. Waits for devices, as
    /// [`AddressSpace::start_tracking`] does.
    ///
    /// ```
    /// # use dirtymap_vfio::LogError;
    /// # use dirtymap::{Access, AddressSpace, Granule};
    /// # use dirtymap_vfio::{DmaLogger, DmaRange};
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let space = std::sync::Arc::new(AddressSpace::tracked(Granule::K4));
    /// # space.map(0..1 << 20, 0, Access::ReadWrite)?;
    /// # let log = DmaLogger::new(space.clone(), "nvme0");
    /// let all = DmaRange { iova: 0, length: 1 << 20 };
    /// assert_eq!(log.start(64 << 10, &[all])?, Granule::K4); // that of the space
    /// assert!(matches!(log.start(4096, &[all]), Err(LogError::Started)));
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// In this order: [`LogError::BadPageSize`], [`LogError::RangeCount`] (1 to 256 ranges); for
    /// each range [`LogError::Range`] and [`LogError::Unaligned`] to `page_size`;
    /// [`LogError::Overlap`] of two ranges; [`LogError::Started`]; [`LogError::Space`] with the
    /// error of a source, or of the consumer's name. After an error, no log is started.
    pub fn start(&self, page_size: u64, ranges: &[DmaRange]) -> Result<Granule, LogError> {
        let page = page(page_size)?;
        let ranges = checked(page, ranges)?;
        let mut session = lock(&self.session);
        if session.is_some() {
            return Err(LogError::Started);
        }
        self.space.start_tracking()?;
        let consumer = Consumer::shared(Arc::clone(&self.space), &self.name, Start::Clean)?;
        *session = Some(Session {
            consumer,
            ranges,
            left: SparseBitmap::new(1 << 52),
        });
        Ok(self.space.page().max(Granule::K4))
    }

    /// Sets a bit of `bitmap` for each page of `range` that was written, and clears it in the log.
    /// Bit `n` stands for the page at `range.iova + n * page_size`, least significant bit first.
    /// Other bits stay as they are. Waits until devices have drained: on return the pages can be
    /// copied, and every later write to them is logged again.
    ///
    /// ```
    /// # use dirtymap::{Access, AddressSpace, Granule};
    /// # use dirtymap_vfio::{DmaLogger, DmaRange};
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let space = std::sync::Arc::new(AddressSpace::tracked(Granule::K4));
    /// # space.map(0..1 << 20, 0, Access::ReadWrite)?;
    /// # let log = DmaLogger::new(space.clone(), "nvme0");
    /// let all = DmaRange { iova: 0, length: 1 << 20 };
    /// log.start(4096, &[all])?;
    /// space.mark(0x3000..0x5000)?;
    /// let mut bitmap = [0u8; 8]; // 64 pages of 16 KiB
    /// let reported = log.report(all, 16 << 10, &mut bitmap)?;
    /// assert_eq!((reported.bits_set, bitmap[0]), (2, 0b11));
    /// assert_eq!(log.report(all, 4096, &mut [0; 32])?.bits_set, 0); // clean since
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// In this order: [`LogError::BadPageSize`], [`LogError::Range`], [`LogError::Unaligned`] to
    /// `page_size`, [`LogError::ShortBitmap`], [`LogError::NotStarted`], [`LogError::NotLogged`],
    /// [`LogError::Space`] with the error of a source. After an error, the log is as before. So an
    /// error loses nothing, unlike that of the kernel's log, and the client may ask again.
    pub fn report(
        &self,
        range: DmaRange,
        page_size: u64,
        bitmap: &mut [u8],
    ) -> Result<Reported, LogError> {
        let page = page(page_size)?;
        let range = aligned(page, range)?;
        let (bytes, needed) = (bitmap.len(), range.granules(page));
        if needed > bytes as u128 * 8 {
            return Err(LogError::ShortBitmap {
                range,
                page,
                bytes,
                needed,
            });
        }
        let session = lock(&self.session);
        let session = session.as_ref().ok_or(LogError::NotStarted)?;
        session.check_logged(range)?;
        let bitmap = UserBitmap::bytes(bitmap).view(range, page);
        let mut sink = bitmap.map_err(Error::from)?.sink();
        session.report(range, &mut sink)?;
        Ok(Reported {
            bits_set: sink.bits_set(),
        })
    }

    /// Unmaps every area inside `range`, as [`AddressSpace::unmap`] does. The dirty pages of these
    /// areas stay in the log, by address, until they are reported. `dirty` is called with each run
    /// of them as well, for the reply to a DMA_UNMAP that asks for dirty pages, or for other
    /// consumers of the space. The runs include pages that this log has reported already, if they
    /// are pending for another consumer. An area that is unmapped by another call, such as
    /// `AddressSpace::unmap`, loses its dirty pages for the log.
    ///
    /// `dirty` runs after the log has the pages and without the lock of the log, so it may call the
    /// log.
    ///
    /// ```
    /// # use dirtymap::ToIovaRange;
    /// # use dirtymap::{Access, AddressSpace, Granule};
    /// # use dirtymap_vfio::{DmaLogger, DmaRange};
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let space = std::sync::Arc::new(AddressSpace::tracked(Granule::K4));
    /// # space.map(0..1 << 20, 0, Access::ReadWrite)?;
    /// # let log = DmaLogger::new(space.clone(), "nvme0");
    /// let all = DmaRange { iova: 0, length: 1 << 20 };
    /// log.start(4096, &[all])?;
    /// space.mark(0x3000..0x3001)?;
    /// let mut dirty = Vec::new();
    /// log.unmap(all, |run| dirty.push(run))?; // DMA_UNMAP
    /// assert_eq!(dirty, [(0x3000..0x4000).to_iova_range()?]);
    ///
    /// let mut bitmap = [0u8; 32];
    /// log.report(all, 4096, &mut bitmap)?; // it is still in the log
    /// assert_eq!(bitmap[0], 0b1000);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`LogError::Range`], and [`LogError::Space`] with the errors of `AddressSpace::unmap`. After
    /// an error, nothing is unmapped.
    pub fn unmap(
        &self,
        range: impl ToIovaRange,
        mut dirty: impl FnMut(IovaRange),
    ) -> Result<Unmapped, LogError> {
        let range = range.to_iova_range()?;
        let page = self.space.page();
        let bits = u64::try_from(range.granules(page)).unwrap_or(u64::MAX);
        let sparse = SparseBitmap::new(bits);
        // The lock: no report comes between the unmap and the log.
        let session = lock(&self.session);
        let (unmapped, view) = self.space.unmap(range, page, UserBitmap::sparse(&sparse))?;
        if let Some(session) = &*session {
            session.leave(view.runs())?;
        }
        drop(session);
        view.runs().for_each(&mut dirty);
        Ok(unmapped)
    }

    /// Ends the log, and drops the pages that it has not reported. The space goes on tracking.
    ///
    /// # Errors
    /// [`LogError::NotStarted`].
    pub fn stop(&self) -> Result<(), LogError> {
        // The lock, so that the name of the consumer is free before the next start.
        let mut session = lock(&self.session);
        session.take().map(drop).ok_or(LogError::NotStarted)
    }
}

impl Session {
    /// The bits of `left`, by address.
    fn left(&self) -> Result<BitmapView<'_>, LogError> {
        let view = UserBitmap::sparse(&self.left).view(IovaRange::ALL, Granule::K4);
        Ok(view.map_err(Error::from)?)
    }

    /// Adds runs to what is left, as far as they are logged, rounded out to 4096 bytes. No report
    /// cuts these.
    fn leave(&self, runs: impl Iterator<Item = IovaRange>) -> Result<(), LogError> {
        let mut sink = self.left()?.sink();
        for run in runs {
            let first = self.first_logged(run);
            let logged = self.ranges.get(first..).unwrap_or_default();
            for part in logged.iter().map_while(|logged| logged.intersection(run)) {
                sink.record(part)?;
            }
        }
        Ok(())
    }

    /// The position of the first logged range that does not end below `range`.
    fn first_logged(&self, range: IovaRange) -> usize {
        self.ranges
            .partition_point(|logged| logged.last() < range.start())
    }

    fn report(&self, range: IovaRange, sink: &mut Sink<'_>) -> Result<(), LogError> {
        let left = self.left()?.part(range);
        for run in left.iter().flat_map(BitmapView::runs) {
            sink.record(run)?;
        }
        let lease = self.harvest(range)?;
        let runs = || lease.iter().flat_map(Lease::runs);
        for run in runs().filter_map(|run| run.intersection(range)) {
            sink.record(run)?;
        }
        // The whole lease inside the range is in the bitmap. Its parts around the range stay in the
        // log.
        self.leave(runs().flat_map(|run| around(run, range)))?;
        if let Some(left) = left {
            left.and_not(&left).map_err(Error::from)?;
        }
        lease.map(Lease::commit);
        Ok(())
    }

    /// The pages of the space that `range` touches and that were written; `None` if there are no
    /// areas.
    fn harvest(&self, range: IovaRange) -> Result<Option<Lease<'static, Synced>>, Error> {
        match self.consumer.rounds().within(range)?.next() {
            Ok(lease) => Ok(Some(lease)),
            Err(Error::NothingMapped { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn check_logged(&self, range: IovaRange) -> Result<(), LogError> {
        let at = match self.ranges.get(self.first_logged(range)) {
            Some(logged) if logged.covers(range) => return Ok(()),
            Some(logged) if logged.contains(range.start()) => logged.last().checked_add(1),
            _ => None,
        };
        let at = at.unwrap_or(range.start());
        Err(LogError::NotLogged { at })
    }
}

/// The parts of `run` below and above `range`.
fn around(run: IovaRange, range: IovaRange) -> impl Iterator<Item = IovaRange> {
    let below = run.below(range.start());
    let above = range.last().checked_add(1);
    let above = above.and_then(|above| IovaRange::new(run.start().max(above), run.last()).ok());
    below.into_iter().chain(above)
}

fn page(page_size: u64) -> Result<Granule, LogError> {
    let page = Granule::from_bytes(page_size).ok();
    let page = page.filter(|page| *page >= Granule::K4);
    page.ok_or(LogError::BadPageSize { page_size })
}

fn aligned(page: Granule, range: DmaRange) -> Result<IovaRange, LogError> {
    let range = range.to_iova_range()?;
    match range.is_aligned(page) {
        true => Ok(range),
        false => Err(LogError::Unaligned { range, page }),
    }
}

/// The ranges of a start, joined where they touch.
fn checked(page: Granule, asked: &[DmaRange]) -> Result<Vec<IovaRange>, LogError> {
    let (count, most) = (asked.len(), MAX_RANGES);
    if !(1..=most).contains(&count) {
        return Err(LogError::RangeCount { count, most });
    }
    let mut ranges = Vec::with_capacity(count);
    for range in asked {
        ranges.push(aligned(page, *range)?);
    }
    ranges.sort_by_key(|range: &IovaRange| range.start());
    let mut joined: Vec<IovaRange> = Vec::with_capacity(count);
    let mut other: Option<IovaRange> = None;
    for range in ranges {
        if let Some(other) = other.filter(|other| other.intersects(range)) {
            return Err(LogError::Overlap { range, other });
        }
        other = Some(range);
        match joined.last_mut() {
            Some(below) if below.last().checked_add(1) == Some(range.start()) => {
                *below = below.hull(range);
            }
            _ => joined.push(range),
        }
    }
    Ok(joined)
}
