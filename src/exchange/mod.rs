//! Input and output: the forms in which other programs keep, store and send dirty state.
//!
//! ```text
//!  a log of somebody else's --runs--+
//!  a view of a user bitmap ---runs--+--merge--> runs --> pairs, pieces, a table
//!  a lease -------------------runs--+
//! ```
//!
//! Nothing here takes part in a harvest: input is recorded through a view, or marked, and output is
//! read from a view or a lease. Formats of files, of the wire and of other crates are in the crate
//! `dirtymap-formats`.

mod log;
mod runs;
#[cfg(feature = "serde")]
mod serde;
mod table;

pub use log::{DirtyLog, LogRuns};
pub use runs::{MergedRuns, Pieces, RunsExt, merge_runs};
pub use table::RunTable;
