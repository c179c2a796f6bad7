//! The files: a header, runs of pages with their bytes, and an end that says how much there was.
//!
//! ```text
//! "DMSNAP1\n"  number u64
//! start u64  len u64  len bytes         for each run, in ascending order
//! 0     u64  0   u64  bytes so far u64
//! ```
//! All numbers are little endian. A file gets its name when everything in it is on the disk.

use std::fs::File;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use dirtymap::IovaRange;
use vm_memory::bitmap::Bitmap;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

const MAGIC: &[u8; 8] = b"DMSNAP1\n";

/// A snapshot that is being written; without [`Writer::finish`] it leaves nothing behind.
pub(crate) struct Writer {
    file: File,
    path: PathBuf,
    unfinished: PathBuf,
    written: u64,
}

impl Writer {
    pub(crate) fn create(dir: &Path, number: u32) -> io::Result<Self> {
        let path = path(dir, number);
        let unfinished = path.with_extension("unfinished");
        let mut file = File::create(&unfinished)?;
        file.write_all(MAGIC)?;
        file.write_all(&u64::from(number).to_le_bytes())?;
        Ok(Writer {
            file,
            path,
            unfinished,
            written: 0,
        })
    }

    /// Writes what `memory` has in `run` now.
    pub(crate) fn run<B: Bitmap>(
        &mut self,
        memory: &GuestMemoryMmap<B>,
        run: IovaRange,
    ) -> io::Result<()>
    where
        GuestMemoryMmap<B>: Bytes<GuestAddress, E = vm_memory::GuestMemoryError>,
    {
        let (start, len) = (run.start().get(), run.len() as u64);
        self.file.write_all(&start.to_le_bytes())?;
        self.file.write_all(&len.to_le_bytes())?;
        memory
            .write_all_volatile_to(GuestAddress(start), &mut self.file, len as usize)
            .map_err(io::Error::other)?;
        self.written += len;
        Ok(())
    }

    /// Syncs the file and gives it its name. After an error there is no snapshot of this number.
    /// `full` simulates a disk without room, which often returns an error only when a file is
    /// synced.
    pub(crate) fn finish(mut self, full: bool) -> io::Result<u64> {
        self.file.write_all(&[0; 16])?;
        self.file.write_all(&self.written.to_le_bytes())?;
        if full {
            return Err(io::Error::from(io::ErrorKind::StorageFull));
        }
        self.file.sync_all()?;
        std::fs::rename(&self.unfinished, &self.path)?;
        if let Some(dir) = self.path.parent() {
            File::open(dir)?.sync_all()?;
        }
        Ok(self.written)
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        // Gone already if it was finished.
        let _ = std::fs::remove_file(&self.unfinished);
    }
}

pub(crate) fn path(dir: &Path, number: u32) -> PathBuf {
    dir.join(format!("{number:05}.snap"))
}

/// Why a snapshot cannot be read.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ReadError {
    #[error("{0}")]
    Io(#[from] io::Error),
    #[error("not a snapshot: it begins with {0:02x?}")]
    Magic([u8; 8]),
    #[error("it is snapshot {found}, not {expected}: increments belong in their order")]
    Number { found: u64, expected: u32 },
    #[error("it ends after {found} bytes of pages and says that it has {said}")]
    Cut { found: u64, said: u64 },
    #[error("{len:#x} bytes at {start:#x} are not in this memory: {error}")]
    Outside {
        start: u64,
        len: u64,
        error: vm_memory::GuestMemoryError,
    },
}

/// Writes the pages of the file of snapshot `number` to `memory`. Returns how many bytes they have.
pub(crate) fn restore(
    dir: &Path,
    number: u32,
    memory: &GuestMemoryMmap<()>,
) -> Result<u64, ReadError> {
    let mut file = File::open(path(dir, number))?;
    let mut magic = [0; 8];
    file.read_exact(&mut magic)?;
    if &magic != MAGIC {
        return Err(ReadError::Magic(magic));
    }
    let found = word(&mut file)?;
    if found != u64::from(number) {
        let expected = number;
        return Err(ReadError::Number { found, expected });
    }
    let mut restored = 0;
    loop {
        let (start, len) = (word(&mut file)?, word(&mut file)?);
        if len == 0 {
            break;
        }
        memory
            .read_exact_volatile_from(GuestAddress(start), &mut file, len as usize)
            .map_err(|error| ReadError::Outside { start, len, error })?;
        restored += len;
    }
    let said = word(&mut file)?;
    match said == restored {
        true => Ok(restored),
        false => Err(ReadError::Cut {
            found: restored,
            said,
        }),
    }
}

fn word(file: &mut File) -> io::Result<u64> {
    let mut bytes = [0; 8];
    file.read_exact(&mut bytes)?;
    Ok(u64::from_le_bytes(bytes))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)] // helpers of tests
mod tests {
    use super::*;
    use dirtymap::Iova;

    fn memory() -> GuestMemoryMmap<()> {
        GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 4 * 4096)]).unwrap()
    }

    /// A snapshot of the second page, which is all ones.
    fn snapshot(dir: &Path, number: u32) {
        let memory = memory();
        memory.write_slice(&[1; 4096], GuestAddress(4096)).unwrap();
        let mut writer = Writer::create(dir, number).unwrap();
        let run = IovaRange::from_len(Iova::new(4096), 4096).unwrap();
        writer.run(&memory, run).unwrap();
        assert_eq!(writer.finish(false).unwrap(), 4096);
    }

    #[test]
    fn what_was_written_is_restored() {
        let dir = tempfile::tempdir().unwrap();
        snapshot(dir.path(), 3);
        let fresh = memory();
        assert_eq!(restore(dir.path(), 3, &fresh).unwrap(), 4096);
        let mut bytes = [7; 3 * 4096];
        fresh.read_slice(&mut bytes, GuestAddress(0)).unwrap();
        let expected = [[0; 4096], [1; 4096], [0; 4096]].concat();
        assert_eq!(bytes.as_slice(), expected);
    }

    #[test]
    fn a_snapshot_that_fails_leaves_no_file() {
        let dir = tempfile::tempdir().unwrap();
        let failed = Writer::create(dir.path(), 1).unwrap().finish(true);
        assert_eq!(failed.unwrap_err().kind(), io::ErrorKind::StorageFull);
        drop(Writer::create(dir.path(), 2).unwrap());
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_file_that_is_cut_or_is_another_one_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        snapshot(dir.path(), 1);
        let whole = std::fs::read(path(dir.path(), 1)).unwrap();
        // In the header, the run's place, its bytes, and the end.
        for len in (0..40).chain(4000..4040).chain(4100..whole.len()) {
            std::fs::write(path(dir.path(), 1), &whole[..len]).unwrap();
            assert!(restore(dir.path(), 1, &memory()).is_err(), "cut at {len}");
        }
        std::fs::write(path(dir.path(), 2), &whole).unwrap();
        let other = restore(dir.path(), 2, &memory()).unwrap_err();
        assert!(other.to_string().contains("snapshot 1, not 2"), "{other}");
        let mut far = whole.clone();
        far[16 + 7] = 1;
        std::fs::write(path(dir.path(), 1), &far).unwrap();
        let outside = restore(dir.path(), 1, &memory()).unwrap_err();
        assert!(matches!(outside, ReadError::Outside { .. }));
        std::fs::write(path(dir.path(), 1), b"something else entirely").unwrap();
        let magic = restore(dir.path(), 1, &memory()).unwrap_err();
        assert!(matches!(magic, ReadError::Magic(_)));
    }
}
