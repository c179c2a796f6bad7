//! Increments in the format `rbd diff v1` of Ceph: what `rbd export-diff` writes, `rbd import-diff`
//! applies and `rbd merge-diff` merges.
//!
//! ```text
//!  "rbd diff v1\n"
//!  'f' u32 name       the snapshot that the increment starts from; none for a whole disk
//!  't' u32 name       the snapshot that it leads to
//!  's' u64            bytes of the disk at its end
//!  'w' u64 u64 bytes  offset, length, and so many bytes
//!  'z' u64 u64        offset and length of zeroes
//!  'e'                the end; without it, the increment is cut off
//! ```
//!
//! Numbers are little endian. Records ascend and do not overlap. A reader gets data as it comes and
//! never holds more of it than a buffer.

mod error;
mod merge;
mod meta;
mod read;
mod write;

pub use error::RbdError;
pub use merge::merge;
pub use meta::Meta;
pub use read::{Reader, Record};
pub use write::{Writer, write_increment, write_lease};
