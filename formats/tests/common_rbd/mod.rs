//! What the tests of increments share.

use dirtymap_formats::rbd::{Meta, Reader};

pub(crate) fn meta(from: Option<&str>, to: &str, size: u64) -> Meta {
    Meta {
        from: from.map(Into::into),
        to: Some(to.into()),
        size,
    }
}

/// What `rbd import-diff` does: the size first, then each record.
pub(crate) fn apply(stream: &[u8], disk: &mut Vec<u8>) {
    let mut reader = Reader::new(stream).unwrap();
    disk.resize(reader.meta().size as usize, 0);
    reader.restore(disk).unwrap();
}
