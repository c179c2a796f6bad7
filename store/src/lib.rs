//! Crash-safe dirty tracking: **what was written since each consumer's last durable commit**, after
//! any crash.
//!
//! The dirty state of a disk image, a volume or a store of pages, held on disk beside it. A backup
//! goes on with the next increment after a `kill -9` or a power failure, instead of reading
//! everything again.
//!
//! ```text
//!  begin_write --> extents open in the log? -- yes ----------------> write --> drop the guard
//!                    |                                                 ^
//!                    no --> one batch, one flush for all that wait ----+
//!
//!  harvest --> copy --> copy and device durable --> commit
//! ```
//!
//! # Example
//!
//! ```
//! use std::os::unix::fs::FileExt;
//!
//! use dirtymap_store::{Device, DirFolder, Opened, Options, Store};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let dir = tempfile::tempdir()?;
//! # let path = dir.path();
//! # let disk = std::fs::File::create(path.join("disk.img"))?;
//! # disk.set_len(1 << 30)?;
//! let device = Device { id: 0x2a, len: 1 << 30 };
//! let folder = DirFolder::new(path.join("disk.dirty"))?;
//! let store = match Store::open(folder, &device, &Options::new())? {
//!     Opened::Known(store) => store,
//!     Opened::Everything(lost) => {
//!         println!("everything has to be copied: {}", lost.why());
//!         lost.start_over(&Options::new())?
//!     }
//! };
//! store.join("nightly")?;
//!
//! // Any thread that writes to the disk:
//! let write = store.begin_write(0x5000..0x6000)?.wait()?;
//! disk.write_all_at(&[7; 4096], 0x5000)?;
//! drop(write); // it has landed
//!
//! // The consumer. `parent` is what its last copy says that it is, and `None` at first.
//! let parent = None;
//! let increment = store.harvest("nightly", parent)?;
//! for run in increment.runs() {
//!     // ... copies these bytes ...
//! }
//! let epoch = increment.commit(|| {
//!     // ... makes the copy durable, with `increment.epoch()`, then ...
//!     disk.sync_data()
//! })?;
//! # assert_eq!(epoch.number(), 1);
//! # drop(store);
//! # let folder = DirFolder::new(path.join("disk.dirty"))?;
//! # let Opened::Known(store) = Store::open(folder, &device, &Options::new())? else { panic!() };
//! # let next = store.harvest("nightly", Some(epoch))?;
//! # assert_eq!((next.parent(), next.runs().total_bytes()), (Some(epoch), 65536));
//! # Ok(())
//! # }
//! ```
//!
//! # Guarantees
//!
//! * **A write that was announced and waited for is reported after any crash**, to each consumer
//!   that had not committed it, however the disk reordered, tore or lost what was not flushed.
//! * **A superset, and tight**: pages that were written, and after a crash the extents that were
//!   open: at most [`Options::hot`], and those with writes in flight.
//! * **A commit takes nothing away before the copy is durable.** What was harvested and not
//!   committed is still in the log.
//! * **What cannot be trusted means everything**, and says [why](Why): by type, never by a shorter
//!   list.
//! * **A write to an open extent takes no lock**: one atomic operation when it begins, and one when
//!   it ends; by a handle ([`Store::writer`]) one in all, on a cache line of its own, if the page
//!   is dirty already.
//! * **Bounded**: the log holds what is dirty, and [`Options::log_bytes`] of batches. The replay
//!   after a crash reads that, once.
//!
//! The order of steps is two models that are explored whole (`store.rs` and `claims.rs` in
//! `proptests/src/protocol`). A
//! simulated disk loses, reorders and tears what was not flushed, at each crash point of every
//! program of four operations, and of long ones at random.
//!
//! # Features
//!
//! * `test-kit` (off by default): `SimFolder`, the simulated disk, for crash tests of your own.
//!
//! # When not to use it
//!
//! * The state may be lost with the process, as for live migration: the crate `dirtymap` alone.
//! * Writers that cannot announce a write before they issue it (a guest's memory, a device with
//!   direct access): no log can open an extent for them in time.
//! * Cold writes must not wait for a flush. The first write to an extent waits for one.
//! * You need what was written, or in which order: that is a log of the data.
//!
//! The bytes of the log are in
//! [store-format.md](https://github.com/dirtymap/dirtymap/blob/main/docs/store-format.md).
#![cfg_attr(docsrs, feature(doc_cfg))]
#![forbid(unsafe_code)]

mod claims;
mod codec;
mod delta;
mod disk;
mod epoch;
mod error;
mod format;
mod gather;
mod geometry;
mod image;
mod increment;
mod intent;
mod journal;
#[cfg(all(test, dirtymap_loom))]
mod loom_tests;
mod options;
mod record;
#[cfg(all(test, not(dirtymap_loom)))]
mod rig;
mod step;
mod store;
mod words;

#[cfg(unix)]
pub use disk::DirFolder;
pub use disk::{Disk, Folder};
#[cfg(any(test, feature = "test-kit"))]
pub use disk::{Landed, SimFolder};
pub use epoch::{BadEpoch, Epoch};
pub use error::{Error, Why};
#[cfg(any(test, feature = "test-kit"))]
#[doc(hidden)]
pub use format::forge_checksums;
pub use geometry::Device;
pub use increment::{ConsumerInfo, Increment};
pub use intent::{Intent, WriteGuard, Writer};
pub use options::Options;
pub use store::{Lost, Opened, Recovery, Store, StoreStats};

/// The examples of the README are tests.
#[cfg(all(doctest, unix))]
#[doc = include_str!("../README.md")]
struct Readme;
