//! Properties of `dirtymap` as a whole: programs of [`Op`]s run on the library, over a simulated
//! IOMMU, and on an oracle.
//!
//! ```text
//!  bytes --decode--> ops --run--> AddressSpace, three domains, six devices, two leases, a copy
//!                            |             |
//!                            +--> oracle --+-- compare after each step; at the end all bytes
//! ```
//!
//! The same programs are run by `cargo test` (`PROPTEST_CASES` is their number), by the fuzzer, and
//! with one step broken on purpose: a run that does not notice a missing flush checks nothing.
//!
//! [`soak`] has no oracle: real threads run at full speed, and their bytes are compared while they
//! rest.

mod bitmaps;
mod bits;
mod exchange;
mod faults;
mod flush;
mod forms;
mod gather;
mod log_node;
mod op;
mod oracle;
mod pages;
pub mod protocol;
mod random;
mod ranges;
mod rig;
mod run;
pub mod soak;
mod storage;
mod store_log;
mod violation;
mod world;

pub use bitmaps::check_bitmaps;
pub use exchange::check_bitmap_file;
pub use flush::check_flush;
pub use forms::Form;
pub use gather::check_gather;
pub use op::{
    Ask, Begin, CONSUMERS, CURSORS, Callback, Config, Cut, DOMAINS, Fate, Format, JoinFault,
    Limits, MapFault, Mask, Master, Meanwhile, Mode, Moment, Named, Op, Place, Reach, Sabotage,
    Share, Step, Storage, Stretch, decode,
};
pub use random::Random;
pub use ranges::check_ranges;
pub use run::run;
pub use storage::{check_nbd_client, check_nbd_server, check_qcow2, check_rbd};
pub use store_log::check_store_log;
pub use violation::{Rule, Violation};

#[cfg(test)]
mod backing;
#[cfg(test)]
mod batches;
#[cfg(test)]
mod concurrent;
#[cfg(test)]
mod history;
#[cfg(test)]
mod matrix;
#[cfg(test)]
mod panics;
#[cfg(test)]
mod properties;
#[cfg(test)]
mod regressions;
#[cfg(test)]
mod sabotage;
#[cfg(test)]
mod traffic;
#[cfg(test)]
mod watch;
