//! A bitmap in a file of which one window is mapped at a time.

use std::fs::File;
use std::io;
use std::ops::Range;

use memmap2::{MmapOptions, MmapRaw};

use super::span::Span;
use crate::error::BitmapError;
use crate::sync::{Arc, AtomicU64, Ordering};

/// The alignment of the sequence of words in the file: the largest page of common systems, so that
/// every window starts on a page. Readers copy this number of bytes at a time.
const ALIGN: u64 = 64 << 10;

/// A bitmap in a file: bit 0 of a request is the lowest bit of the byte at an offset of the
/// caller's choice.
///
/// A harvest maps one window of it at a time (2 MiB by default), so that a bitmap of any size takes
/// little address space. Readers of the result copy 64 KiB of it at a time. Bytes outside the
/// request stay as they were.
///
/// # Files that shrink
/// A file that is too short is refused up front, by [`BitmapError::TooShort`]. Its length is looked
/// at again before each window: if it has shrunk, recording fails by [`BitmapError::Shrank`], the
/// dirty state stays where it is, and the harvest stops there. For readers, a window that cannot be
/// read counts as **dirty throughout**: a superset, so that nothing is lost by an abort or by a
/// copy that does not look at [`Runs::error`](crate::bitmap::Runs::error).
///
/// One race remains: if the file is truncated while a harvest has its window mapped, the next
/// access raises `SIGBUS`, as in every mapped file. If another program that can truncate the file
/// is not trusted, seal the file first (`F_SEAL_SHRINK`).
///
/// # File systems that are full
/// On Linux a whole window gets its blocks in the file system before a bit is recorded in it, and
/// so before a dirty bit is cleared. If there is no room, recording fails by
/// [`BitmapError::NoSpace`], as above. So a window in which a harvest records takes all of its
/// blocks, even if most of it stays empty. A read of a sparse file takes none. If the file system
/// cannot reserve blocks, a write fault on each page of the window takes their place. Two cases
/// still raise `SIGBUS`: such a file system on a kernel before Linux 5.14, and a hole that is
/// punched under a mapped window of a full file system.
///
/// # Several at a time
/// Harvests may share one `FileBitmap`; their bits are OR-ed in atomically. Two of them over
/// overlapping parts of one file must begin and end at the same bytes modulo 8, or else be used one
/// after the other.
#[derive(Debug)]
pub struct FileBitmap {
    file: File,
    /// The byte of the file that holds bit 0.
    offset: u64,
    /// The number of bytes of the bitmap, if the file is long enough.
    bytes: u64,
    window: u64,
    mapped: Arc<Mapped>,
}

/// The number of mapped bytes.
#[derive(Debug, Default)]
struct Mapped {
    now: AtomicU64,
    most: AtomicU64,
}

impl FileBitmap {
    /// The `bytes` bytes of `file` from `offset` on, up to the end of the file at the time of a
    /// request. The file must be open for reading and writing.
    pub fn new(file: File, offset: u64, bytes: u64) -> Self {
        FileBitmap {
            file,
            offset,
            bytes,
            window: 2 << 20,
            mapped: Arc::default(),
        }
    }

    /// Maps windows of `bytes` bytes.
    ///
    /// # Errors
    /// [`BitmapError::BadWindow`] unless `bytes` is a power of two from 64 KiB to 1 GiB.
    pub fn with_window(mut self, bytes: u64) -> Result<Self, BitmapError> {
        if !bytes.is_power_of_two() || !(ALIGN..=1 << 30).contains(&bytes) {
            return Err(BitmapError::BadWindow { bytes });
        }
        self.window = bytes;
        Ok(self)
    }

    /// The file.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// The most bytes of the file that were mapped at one moment.
    pub fn most_mapped(&self) -> u64 {
        // Relaxed: a statistic.
        self.mapped.most.load(Ordering::Relaxed)
    }

    /// The number of bits for which the file has room now; 0 if its length cannot be read.
    pub(super) fn bits(&self) -> u64 {
        let len = self.file.metadata().map_or(0, |metadata| metadata.len());
        let there = len.saturating_sub(self.offset).min(self.bytes);
        there.saturating_mul(8)
    }

    pub(super) fn shift(&self) -> u64 {
        self.offset % ALIGN * 8
    }

    pub(super) fn window_words(&self) -> u64 {
        self.window / 8
    }

    /// How many words readers copy at a time.
    pub(super) fn copied_words(&self) -> u64 {
        ALIGN / 8
    }

    /// Maps the window that begins with word `first`, as far as it belongs to a request whose last
    /// position is `last`, for recording: the file system has room for all of it.
    pub(super) fn map(&self, first: u64, last: u64) -> Result<Mapping, BitmapError> {
        let (window, bytes) = self.part(first, last, self.window)?;
        let failed = |error| BitmapError::Window {
            at: bytes.start,
            error,
        };
        let map = MmapOptions::new()
            .offset(bytes.start)
            .len((bytes.end - bytes.start) as usize)
            .map_raw(&self.file)
            .map_err(failed)?;
        self.reserve(&bytes, &map)?;
        let counted = bytes.end - window;
        // Relaxed, both: statistics.
        let now = self.mapped.now.fetch_add(counted, Ordering::Relaxed) + counted;
        self.mapped.most.fetch_max(now, Ordering::Relaxed);
        Ok(Mapping {
            map,
            origin: first + (bytes.start - window) / 8,
            bytes: counted,
            mapped: self.mapped.clone(),
        })
    }

    /// Copies the words from `first` on, as far as they belong to a request whose last position is
    /// `last`. A mapping would take blocks for the holes of a tmpfs that it reads.
    pub(super) fn copy(&self, first: u64, last: u64) -> Result<Vec<[u8; 8]>, BitmapError> {
        let (window, bytes) = self.part(first, last, ALIGN)?;
        let words = (bytes.end - window).div_ceil(8) as usize;
        let mut copy = vec![[0; 8]; words];
        let from = (bytes.start - window) as usize;
        let len = (bytes.end - bytes.start) as usize;
        let part = &mut copy.as_flattened_mut()[from..from + len];
        read_at(&self.file, part, bytes.start).map_err(|error| match error.kind() {
            // The file was truncated between the look at its length and the read.
            io::ErrorKind::UnexpectedEof => BitmapError::Shrank {
                len: self.file.metadata().map_or(0, |metadata| metadata.len()),
                needed: bytes.end,
            },
            _ => BitmapError::Window {
                at: bytes.start,
                error,
            },
        })?;
        Ok(copy)
    }

    /// Where word `first` lies in the file, and the bytes of the `size` bytes from there on that
    /// belong to a request whose last position is `last`. The file has all of them.
    fn part(&self, first: u64, last: u64, size: u64) -> Result<(u64, Range<u64>), BitmapError> {
        let origin = self.offset - self.offset % ALIGN;
        let window = origin + first * 8;
        let start = window.max(self.offset);
        let end = (window + size).min(origin + last / 8 + 1);
        let failed = |error| BitmapError::Window { at: start, error };
        let len = self.file.metadata().map_err(failed)?.len();
        match len < end {
            true => Err(BitmapError::Shrank { len, needed: end }),
            false => Ok((window, start..end)),
        }
    }

    /// Ensures that the file system has blocks for `bytes`, which are mapped as `map`, because a
    /// store to a page without a block would raise `SIGBUS`.
    #[cfg(target_os = "linux")]
    fn reserve(&self, bytes: &Range<u64>, map: &MmapRaw) -> Result<(), BitmapError> {
        use std::os::fd::AsRawFd;
        let (at, len) = (bytes.start, bytes.end - bytes.start);
        // Without growth: a file that was truncated in between stays short. No file is longer than
        // an `off_t` can hold, and this one had these bytes a moment ago.
        let keep = libc::FALLOC_FL_KEEP_SIZE;
        let (from, room) = (at as libc::off_t, len as libc::off_t);
        loop {
            // SAFETY: this call takes numbers and touches no memory of ours.
            if unsafe { libc::fallocate(self.file.as_raw_fd(), keep, from, room) } == 0 {
                return Ok(());
            }
            let error = io::Error::last_os_error();
            return match error.raw_os_error() {
                Some(libc::EINTR) => continue,
                Some(libc::EOPNOTSUPP | libc::ENOSYS) => fault_in(map).map_err(full(at, len)),
                Some(libc::ENOSPC | libc::EDQUOT) => Err(full(at, len)(error)),
                _ => Err(BitmapError::Window { at, error }),
            };
        }
    }

    /// Other systems have no call that reserves and touches nothing.
    #[cfg(not(target_os = "linux"))]
    fn reserve(&self, _: &Range<u64>, _: &MmapRaw) -> Result<(), BitmapError> {
        Ok(())
    }
}

#[cfg(target_os = "linux")]
fn full(at: u64, len: u64) -> impl Fn(io::Error) -> BitmapError {
    move |error| BitmapError::NoSpace { at, len, error }
}

/// Makes every page of `map` writable, with an error instead of the `SIGBUS` of a store.
#[cfg(target_os = "linux")]
fn fault_in(map: &MmapRaw) -> io::Result<()> {
    match map.advise(memmap2::Advice::PopulateWrite) {
        // Linux before 5.14 does not know it.
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Ok(()),
        done => done,
    }
}

/// Reads all of `bytes` from the byte `at` of `file` on, and leaves its cursor alone.
#[cfg(unix)]
fn read_at(file: &File, bytes: &mut [u8], at: u64) -> io::Result<()> {
    std::os::unix::fs::FileExt::read_exact_at(file, bytes, at)
}

/// Reads all of `bytes` from the byte `at` of `file` on. Its cursor moves; nothing here uses it.
#[cfg(not(unix))]
fn read_at(file: &File, mut bytes: &mut [u8], mut at: u64) -> io::Result<()> {
    while !bytes.is_empty() {
        let read = std::os::windows::fs::FileExt::seek_read(file, bytes, at)?;
        if read == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        bytes = &mut bytes[read..];
        at += read as u64;
    }
    Ok(())
}

/// A window that is mapped. Unmapped when it is dropped. Borrows nothing, so that sinks and
/// iterators may outlive what they were made from as they may without the feature.
#[derive(Debug)]
pub(super) struct Mapping {
    map: MmapRaw,
    /// The word that holds the first mapped byte.
    origin: u64,
    /// What the window counts for, from its start to the last mapped byte.
    bytes: u64,
    mapped: Arc<Mapped>,
}

impl Mapping {
    /// The mapped bytes, and the word that the first of them belongs to.
    #[inline]
    pub(super) fn span(&self) -> (Span<'_>, u64) {
        // SAFETY:
        // - valid for reads and writes for as long as `self` is borrowed: the mapping is `len`
        //   bytes long, shared and writable, and `self` owns it. The file was that long when it was
        //   mapped; if it is truncated afterwards, an access raises a signal, which is no access to
        //   other memory.
        // - cut the same way by every span: mappings start on pages, so each byte of a file lies at
        //   the same place in a word in all of them, and windows meet at words; the request's
        //   borders are documented on `FileBitmap`.
        let span = unsafe { Span::from_raw(self.map.as_mut_ptr(), self.map.len()) };
        (span, self.origin)
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // Relaxed: a statistic.
        self.mapped.now.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}
