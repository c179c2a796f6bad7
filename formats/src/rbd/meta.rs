//! What an increment begins with.

pub(super) const MAGIC: &[u8; 12] = b"rbd diff v1\n";
/// The longest name of a snapshot, in bytes.
pub(super) const MAX_NAME: u64 = 4096;

/// What an increment says of itself before its records.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Meta {
    /// The snapshot that it starts from. `None`: it holds the whole disk.
    pub from: Option<String>,
    /// The snapshot that it leads to.
    pub to: Option<String>,
    /// Bytes of the disk at its end.
    pub size: u64,
}
