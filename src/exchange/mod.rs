//! Input and output: the forms in which other programs keep, store and send dirty state.
//!
//! ```text
//!  a log of somebody else's --runs--+
//!  a view of a user bitmap ---runs--+--merge--> runs --> pairs, pieces, a table, a set, a file
//!  a lease -------------------runs--+
//! ```
//!
//! Nothing here takes part in a harvest: input is recorded through a view, or marked, and output is
//! read from a view or a lease.

#[cfg(all(feature = "bitmap-file", not(dirtymap_loom)))]
mod file;
mod log;
#[cfg(all(feature = "roaring", not(dirtymap_loom)))]
mod roaring;
mod runs;
#[cfg(feature = "serde")]
mod serde;
mod table;

#[cfg(all(feature = "roaring", not(dirtymap_loom)))]
pub use self::roaring::{read_roaring, read_treemap};
#[cfg(all(feature = "bitmap-file", not(dirtymap_loom)))]
pub use file::{BitmapFile, BitmapFileError, Restored, Truncate};
pub use log::{DirtyLog, LogRuns};
pub use runs::{MergedRuns, Pieces, RunsExt, merge_runs};
pub use table::RunTable;
