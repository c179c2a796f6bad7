//! What goes in and out: the forms in which other programs keep, store and send dirty state.
//!
//! ```text
//!  a log of somebody else's --runs--+
//!  a view of a user bitmap ---runs--+--merge--> runs --> pairs, pieces, a table
//!  a lease -------------------runs--+
//! ```
//!
//! Nothing here takes part in a harvest: what goes in is recorded through a view, or marked; what
//! goes out is read from a view or a lease. Formats of files, of the wire and of other crates are
//! in the crate `dirtymap-formats`.

mod log;
mod runs;
#[cfg(feature = "serde")]
mod serde;
mod table;

pub use log::{DirtyLog, LogRuns};
pub use runs::{MergedRuns, Pieces, RunsExt, merge_runs};
pub use table::RunTable;
