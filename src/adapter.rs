//! Parts for adapters: what a source over a log of another component needs besides the trait
//! [`DirtySource`](crate::DirtySource).
//!
//! The adapters of this repository (`dirtymap-kvm`, `dirtymap-vhost`, `dirtymap-pagemap`,
//! `dirtymap-vm-memory`) are written with these parts and with the rest of the public interface,
//! and with nothing else. An adapter of yours can do what they do. Two short ways need no part at
//! all: a log in shared words is a [`SharedLog`](crate::SharedLog), and one behind a call is a
//! [`PulledLog`](crate::PulledLog).
//!
//! * [`Pending`]: pages that a log has reported and no lease has recorded yet.
//! * [`PlacedList`]: slots or regions by address, also where they overlap.
//! * [`words`]: runs and masks of bits in words.
//! * [`LeafSink::take_run`](crate::source::LeafSink::take_run): many pages of one size in one call.
//! * [`source_kit`](crate::source_kit): tests that every source has to pass.
//!
//! # Example
//! Each read of the log in this example clears the pages that it reports, so the report is the only
//! trace of a write. It goes into memory that was reserved before, and from there into the lease,
//! page by page, so that a failure after the look loses nothing.
//!
//! ```
//! use std::sync::{Mutex, PoisonError};
//!
//! use dirtymap::adapter::Pending;
//! use dirtymap::source::{FlushGather, LeafSink, Sink, Stopped};
//! use dirtymap::{DirtySource, Error, Granule, IovaRange, Tracking};
//!
//! struct Log<R> {
//!     /// Reads the log of all pages, as words, and clears it.
//!     read: R,
//!     pending: Mutex<Pending>,
//! }
//!
//! impl<R: Fn() -> Vec<u64> + Send + Sync> Log<R> {
//!     fn new(range: IovaRange, read: R) -> Result<Self, Error> {
//!         let pending = Pending::new(range, Granule::K4).map_err(Error::source_failed)?;
//!         Ok(Log { read, pending: Mutex::new(pending) })
//!     }
//!
//!     /// Moves what the log says to what is pending.
//!     fn look<T>(&self, then: impl FnOnce(&mut Pending) -> T) -> T {
//!         let mut pending = self.pending.lock().unwrap_or_else(PoisonError::into_inner);
//!         pending.add_words(0, &(self.read)());
//!         then(&mut pending)
//!     }
//! }
//!
//! impl<R: Fn() -> Vec<u64> + Send + Sync> DirtySource for Log<R> {
//!     fn page(&self) -> Granule {
//!         Granule::K4
//!     }
//!     fn unmap(&self, range: IovaRange, _: &mut FlushGather, dirty: &mut dyn FnMut(IovaRange)) {
//!         self.look(|pending| pending.drain(range, dirty));
//!     }
//!     fn set_tracking(&self, to: Tracking) -> Result<(), Error> {
//!         if to.is_on() {
//!             self.look(Pending::clear);
//!         }
//!         Ok(())
//!     }
//!     fn read_and_clear(
//!         &self,
//!         range: IovaRange,
//!         out: &mut LeafSink<'_, '_>,
//!     ) -> Result<(), Stopped> {
//!         self.look(|pending| pending.take(range, out))
//!     }
//!     fn peek(&self, range: IovaRange, sink: &mut Sink<'_>) -> Result<(), Stopped> {
//!         self.look(|pending| pending.peek(range, sink))
//!     }
//! }
//!
//! # use dirtymap::{Access, AddressSpace, ToIovaRange};
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let written = std::sync::Arc::new(Mutex::new(Vec::new()));
//! # let log = std::sync::Arc::clone(&written);
//! # let read = move || log.lock().map_or(Vec::new(), |mut log| std::mem::take(&mut *log));
//! let ram = (0..128 << 12).to_iova_range()?;
//! let space = AddressSpace::new(Granule::K4);
//! space.map(ram, 0, Access::ReadWrite)?;
//! space.attach(Log::new(ram, read)?)?;
//! space.start_tracking()?;
//! # *written.lock().map_err(|_| "poisoned")? = vec![0b110, 1];
//! let lease = space.rounds().next()?; // the log said: pages 1, 2 and 64
//! # assert_eq!(lease.dirty(), 3);
//! lease.commit();
//! # Ok(())
//! # }
//! ```

pub use crate::source::pending::Pending;
pub use crate::source::placed::{Placed, PlacedList};

/// Runs and masks of bits in words: bit `n` is bit `n % 64` of word `n / 64`.
///
/// ```
/// use dirtymap::adapter::words;
///
/// let mut log = [0u64; 2];
/// words::set(&mut log, 60, 70);
/// words::clear(&mut log, 64, 64);
/// assert_eq!(words::next_run(&log, 0, 127), Some((60, 63)));
/// assert_eq!(words::next_run(&log, 64, 127), Some((65, 70)));
/// let masks: Vec<(u64, u64)> = words::masks(62, 65).collect();
/// assert_eq!(masks, [(0, 0b11 << 62), (1, 0b11)]);
/// assert_eq!(words::runs(0b1110_0110).collect::<Vec<_>>(), [(1, 2), (5, 7)]);
/// ```
pub mod words {
    pub use crate::words::{clear, next_run, set, word_masks as masks, word_runs as runs};
}
