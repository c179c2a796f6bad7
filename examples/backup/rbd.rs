//! An increment as `rbd diff v1`: what `rbd import-diff` applies and `rbd merge-diff` merges. The
//! epochs are the names of its snapshots.

use std::fs::File;
use std::io::{self, BufReader, BufWriter};
use std::path::{Path, PathBuf};

use dirtymap::exchange::RunTable;
use dirtymap_formats::rbd::{Meta, Reader, write_increment};

use crate::generation::Head;

/// Copies a generation from the image.
pub(crate) fn write(
    folder: &Path,
    head: &Head,
    runs: &RunTable,
    image: &File,
) -> io::Result<PathBuf> {
    let draft = folder.join(format!("{}.rbd.tmp", head.consumer));
    let meta = Meta {
        from: head.parent.clone(),
        to: Some(head.epoch.clone()),
        size: image.metadata()?.len(),
    };
    let file = BufWriter::with_capacity(1 << 20, File::create(&draft)?);
    let file = write_increment(file, &meta, runs, image).map_err(io::Error::other)?;
    file.into_inner()?.sync_all()?;
    Ok(draft)
}

/// Puts a generation over the one before it, whose epoch is `last`.
pub(crate) fn restore(path: &Path, last: Option<&str>, onto: &mut [u8]) -> io::Result<()> {
    let wrong = |what: String| io::Error::other(format!("{}: {what}", path.display()));
    let mut reader =
        Reader::new(BufReader::new(File::open(path)?)).map_err(|error| wrong(error.to_string()))?;
    let from = reader.meta().from.as_deref();
    if from.is_some() && from != last {
        return Err(wrong(format!("it starts from {from:?}, not from {last:?}")));
    }
    reader
        .restore(onto)
        .map_err(|error| wrong(error.to_string()))
}
