//! The file of an image, and numbers in it.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};

use super::error::{QcowError, at_most};

/// The most bytes that are read at once: those of the directory of bitmaps, which QEMU limits so.
pub(super) const MAX_DIRECTORY: u64 = 64 << 20;

/// The file of an image: bytes at offsets, and a flush that makes them durable.
///
/// An image is changed by writes with flushes between them, so that a crash at any moment leaves an
/// image that opens. That holds if [`flush`](Self::flush) keeps its promise.
pub trait ImageFile {
    /// How many bytes there are.
    ///
    /// # Errors
    /// Those of the system.
    fn length(&mut self) -> io::Result<u64>;

    /// Fills `buf` with the bytes from `at` on.
    ///
    /// # Errors
    /// [`io::ErrorKind::UnexpectedEof`] if there are fewer; otherwise those of the system.
    fn read_at(&mut self, at: u64, buf: &mut [u8]) -> io::Result<()>;

    /// Writes `bytes` at `at`. A file that is shorter becomes longer, and a gap reads as zero.
    ///
    /// # Errors
    /// Those of the system.
    fn write_at(&mut self, at: u64, bytes: &[u8]) -> io::Result<()>;

    /// Returns when everything that was written is durable.
    ///
    /// # Errors
    /// Those of the system.
    fn flush(&mut self) -> io::Result<()>;
}

impl ImageFile for File {
    fn length(&mut self) -> io::Result<u64> {
        Seek::seek(self, SeekFrom::End(0))
    }

    fn read_at(&mut self, at: u64, buf: &mut [u8]) -> io::Result<()> {
        Seek::seek(self, SeekFrom::Start(at))?;
        self.read_exact(buf)
    }

    fn write_at(&mut self, at: u64, bytes: &[u8]) -> io::Result<()> {
        Seek::seek(self, SeekFrom::Start(at))?;
        self.write_all(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.sync_data()
    }
}

impl ImageFile for Vec<u8> {
    fn length(&mut self) -> io::Result<u64> {
        Ok(self.len() as u64)
    }

    fn read_at(&mut self, at: u64, buf: &mut [u8]) -> io::Result<()> {
        crate::ReadAt::read_exact_at(self.as_slice(), buf, at)
    }

    fn write_at(&mut self, at: u64, bytes: &[u8]) -> io::Result<()> {
        let end = usize::try_from(at)
            .ok()
            .and_then(|at| at.checked_add(bytes.len()))
            .ok_or(io::ErrorKind::FileTooLarge)?;
        if self.len() < end {
            self.resize(end, 0);
        }
        self[end - bytes.len()..end].copy_from_slice(bytes);
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<F: ImageFile + ?Sized> ImageFile for &mut F {
    fn length(&mut self) -> io::Result<u64> {
        (**self).length()
    }

    fn read_at(&mut self, at: u64, buf: &mut [u8]) -> io::Result<()> {
        (**self).read_at(at, buf)
    }

    fn write_at(&mut self, at: u64, bytes: &[u8]) -> io::Result<()> {
        (**self).write_at(at, bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        (**self).flush()
    }
}

/// `len` bytes at `at`, if the file has them. Only then is memory taken for them.
///
/// A hole makes a file as long as it likes, so the length of the file alone bounds nothing. The
/// caller has held `len` against the limit of its part; no part is longer than a directory.
pub(super) fn read<F: ImageFile>(
    file: &mut F,
    at: u64,
    len: u64,
    place: &'static str,
) -> Result<Vec<u8>, QcowError> {
    at_most(place, len, MAX_DIRECTORY)?;
    let file_len = file.length().map_err(QcowError::io(place, at))?;
    let inside = at.checked_add(len).is_some_and(|end| end <= file_len);
    let size = usize::try_from(len).ok().filter(|_| inside);
    let Some(size) = size else {
        let ended = io::Error::new(
            io::ErrorKind::UnexpectedEof,
            format!("it has {len} bytes, but the file only {file_len}"),
        );
        return Err(QcowError::io(place, at)(ended));
    };
    let mut bytes = Vec::new();
    let room = bytes.try_reserve_exact(size);
    room.map_err(|_| QcowError::io(place, at)(io::ErrorKind::OutOfMemory.into()))?;
    bytes.resize(size, 0);
    file.read_at(at, &mut bytes)
        .map_err(QcowError::io(place, at))?;
    Ok(bytes)
}

/// The big-endian number at `at`, where the caller knows that there is one.
pub(super) fn be32(bytes: &[u8], at: usize) -> u32 {
    bytes[at..at + 4]
        .iter()
        .fold(0, |sum, &byte| sum << 8 | u32::from(byte))
}

/// As [`be32`].
pub(super) fn be64(bytes: &[u8], at: usize) -> u64 {
    bytes[at..at + 8]
        .iter()
        .fold(0, |sum, &byte| sum << 8 | u64::from(byte))
}
