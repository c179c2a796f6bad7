//! A bitmap in a file of which one window is mapped at a time.

use std::fs::File;

use memmap2::{MmapOptions, MmapRaw};

use super::span::Span;
use crate::error::Error;
use crate::sync::{Arc, AtomicU64, Ordering};

/// What the row of words is aligned to in the file: the largest page of common systems, so that every window starts
/// on a page.
const ALIGN: u64 = 64 << 10;

/// A bitmap in a file: bit 0 of a request is the lowest bit of the byte at an offset of the caller's choice.
///
/// A harvest, or whoever reads the result, maps one window of it at a time (2 MiB unless told otherwise), so that a
/// bitmap of any size takes little address space. Bytes outside the request stay as they were.
///
/// # Files that shrink
/// A file that is too short is refused up front, by [`Error::BitmapTooShort`]. Its length is looked at again before
/// each window: if it has shrunk, recording fails by [`Error::BitmapShrank`], the dirty state stays where it is, and
/// the harvest stops there. For readers, a window that cannot be mapped counts as **dirty throughout**: a superset,
/// so that nothing is lost by an abort or by a copy that does not look at [`Runs::error`](crate::Runs::error).
///
/// One race is left: a file that is cut while its window is mapped raises `SIGBUS` at the next access, as with every
/// mapped file. Where the other side is not trusted, seal the file against shrinking first (`F_SEAL_SHRINK`).
///
/// # Several at a time
/// Harvests may share one `FileBitmap`; their bits are OR-ed in atomically. Two of them over overlapping parts of one
/// file must begin and end at the same bytes modulo 8, or else be used one after the other.
#[derive(Debug)]
pub struct FileBitmap {
    file: File,
    /// The byte of the file that holds bit 0.
    offset: u64,
    /// How many bytes the bitmap has, if the file is long enough.
    bytes: u64,
    window: u64,
    mapped: Arc<Mapped>,
}

/// How many bytes are mapped.
#[derive(Debug, Default)]
struct Mapped {
    now: AtomicU64,
    most: AtomicU64,
}

impl FileBitmap {
    /// The `bytes` bytes of `file` from `offset` on; as far as the file reaches when a request is made. The file must
    /// be open for reading and writing.
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
    /// [`Error::BadWindow`] unless `bytes` is a power of two from 64 KiB to 1 GiB.
    pub fn with_window(mut self, bytes: u64) -> Result<Self, Error> {
        if !bytes.is_power_of_two() || !(ALIGN..=1 << 30).contains(&bytes) {
            return Err(Error::BadWindow { bytes });
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

    /// How many bits the file has room for, as of now; none if its length cannot be told.
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

    /// Maps the window that begins with word `first`, as far as it belongs to a request whose last position is
    /// `last`.
    pub(super) fn map(&self, first: u64, last: u64) -> Result<Mapping, Error> {
        let origin = self.offset - self.offset % ALIGN;
        let window = origin + first * 8;
        let start = window.max(self.offset);
        let end = (window + self.window).min(origin + last / 8 + 1);
        let failed = |error| Error::BitmapWindow { at: start, error };
        let len = self.file.metadata().map_err(failed)?.len();
        if len < end {
            return Err(Error::BitmapShrank { len, needed: end });
        }
        let map = MmapOptions::new()
            .offset(start)
            .len((end - start) as usize)
            .map_raw(&self.file)
            .map_err(failed)?;
        let bytes = end - window;
        // Relaxed, both: statistics.
        let now = self.mapped.now.fetch_add(bytes, Ordering::Relaxed) + bytes;
        self.mapped.most.fetch_max(now, Ordering::Relaxed);
        Ok(Mapping {
            map,
            origin: first + (start - window) / 8,
            bytes,
            mapped: self.mapped.clone(),
        })
    }
}

/// A window that is mapped. Unmapped when it is dropped. Borrows nothing, so that sinks and iterators may outlive what
/// they were made from as they may without the feature.
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
        // - valid for reads and writes for as long as `self` is borrowed: the mapping is `len` bytes long, shared and
        //   writable, and `self` owns it. The file was that long when it was mapped; if it is cut afterwards, an
        //   access raises a signal, which is no access to memory of anybody else.
        // - cut the same way by every span: mappings start on pages, so each byte of a file lies at the same place in
        //   a word in all of them, and windows meet at words; the request's borders are documented on `FileBitmap`.
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
