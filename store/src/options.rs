//! How a store divides its device, and its bounds.

use dirtymap::Granule;

/// How a store divides its device, and its bounds.
///
/// ```
/// use dirtymap::Granule;
/// use dirtymap_store::Options;
///
/// // Coarse: extents of 1 MiB, pages of 64 KiB.
/// let (extent, page) = (Granule::from_bytes(1 << 20)?, Granule::from_bytes(1 << 16)?);
/// let options = Options::new().extent(extent).page(page).hot(256);
/// # Ok::<(), dirtymap::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Options {
    pub(crate) extent: Granule,
    pub(crate) page: Granule,
    pub(crate) hot: u32,
    pub(crate) log_bytes: u64,
}

impl Options {
    /// The largest value of [`hot`](Options::hot).
    pub const MAX_HOT: u32 = 1 << 19;

    /// Extents of 64 KiB, pages of 4 KiB, 1024 extents that stay open, 1 MiB for batches.
    pub fn new() -> Self {
        Options {
            extent: Granule::from_lg2(16).unwrap_or(Granule::M2),
            page: Granule::K4,
            hot: 1024,
            log_bytes: 1 << 20,
        }
    }

    /// The unit of the log. A crash reports each open extent as a whole. It has 1 to 32 pages.
    #[must_use]
    pub fn extent(self, extent: Granule) -> Self {
        Options { extent, ..self }
    }

    /// The unit of the answer.
    #[must_use]
    pub fn page(self, page: Granule) -> Self {
        Options { page, ..self }
    }

    /// How many extents stay open. More cost fewer flushes, and more excess after a crash: at most
    /// so many extents, and those with writes in flight.
    #[must_use]
    pub fn hot(self, hot: u32) -> Self {
        Options { hot, ..self }
    }

    /// Room for batches, in bytes, a multiple of 4096. When it is full, a new log is written, with
    /// all that is dirty. More room costs fewer of those, and a longer replay.
    #[must_use]
    pub fn log_bytes(self, log_bytes: u64) -> Self {
        Options { log_bytes, ..self }
    }
}

impl Default for Options {
    fn default() -> Self {
        Options::new()
    }
}
