//! The log over a device that is played, with the faults of the real ones.

mod errors;
mod fake;
mod kit;
mod ranges;

use std::sync::Arc;

use dirtymap::{Access, AddressSpace, Error, Granule, IovaRange};

use super::{DeviceLog, DeviceLogError};
use fake::Fake;

/// What a space over one device has.
struct Bench {
    log: Arc<DeviceLog<Fake>>,
    space: AddressSpace,
}

impl Bench {
    /// A space that tracks, with areas of `mapped`, over a device that logs `ranges`.
    fn new(fake: &Fake, ranges: &[IovaRange], mapped: &[IovaRange]) -> Self {
        let bench = Self::quiet(fake, ranges, mapped);
        bench.space.start_tracking().unwrap();
        bench
    }

    /// The same before it tracks.
    fn quiet(fake: &Fake, ranges: &[IovaRange], mapped: &[IovaRange]) -> Self {
        let log = DeviceLog::new(fake.clone(), Granule::K4, ranges).unwrap();
        let log = Arc::new(log);
        let space = AddressSpace::with_source(Granule::K4, Arc::clone(&log)).unwrap();
        for range in mapped {
            space.map(*range, 0, Access::ReadWrite).unwrap();
        }
        Bench { log, space }
    }

    /// Harvests everything, and commits.
    fn take(&self) -> Vec<IovaRange> {
        self.try_take().unwrap()
    }

    fn try_take(&self) -> Result<Vec<IovaRange>, Error> {
        let lease = self.space.rounds().next()?;
        let runs = lease.runs().collect();
        lease.commit();
        Ok(runs)
    }
}

/// The adapter's own error.
fn inner(error: &Error) -> &DeviceLogError {
    match error {
        Error::Source(error) => error.downcast_ref().unwrap(),
        other => panic!("not an error of a source: {other}"),
    }
}

/// How many chunks of pending bits there are.
fn chunks(log: &DeviceLog<Fake>) -> usize {
    dirtymap::sync::lock(&log.state).chunks.len()
}
