//! Changes of an image: each in an order that leaves an image that opens, whatever moment it is cut
//! off at.

use dirtymap::Granule;
use dirtymap::exchange::RunTable;

use super::bits::{Content, contents, fill};
use super::directory::*;
use super::error::{QcowError, at_most};
use super::file::{ImageFile, MAX_DIRECTORY};
use super::header::*;
use super::image::{ALL_ONES, Image};

/// How a bitmap is written. What is not said is as before; for a new bitmap, the granule is 64 KiB
/// and the flag *auto* is set, as in QEMU.
#[derive(Clone, Copy, Debug, Default)]
pub struct BitmapOptions {
    granule: Option<Granule>,
    auto: Option<bool>,
}

impl BitmapOptions {
    /// All as before.
    pub const fn new() -> Self {
        BitmapOptions {
            granule: None,
            auto: None,
        }
    }

    /// What one bit stands for: 512 bytes to 2 GiB.
    pub const fn granule(mut self, granule: Granule) -> Self {
        self.granule = Some(granule);
        self
    }

    /// Whether a program that opens the image and writes the disk has to mark what it writes.
    pub const fn auto(mut self, auto: bool) -> Self {
        self.auto = Some(auto);
        self
    }
}

impl<F: ImageFile> Image<F> {
    /// Writes a bitmap, new or in place of the one of this name, and returns when it is durable.
    /// Each granule with a dirty byte becomes dirty. The flag *in use* is off at the end, because
    /// the content is whole.
    ///
    /// # Errors
    /// Before anything is touched: [`QcowError::Outside`] if a run begins past the end of the disk
    /// (the part past the end of a run across it is cut off); [`QcowError::Granule`];
    /// [`QcowError::Limit`] for a name or a bitmap that is too long, or too many of them;
    /// [`QcowError::Stale`]; [`QcowError::Unsupported`] for an image that needs repair, or has no
    /// room.
    /// [`QcowError::Io`] leaves the bitmap as it was, in use, or as it is to be.
    pub fn write(
        &mut self,
        name: &str,
        dirty: &RunTable,
        options: BitmapOptions,
    ) -> Result<(), QcowError> {
        self.writable()?;
        let old = match self.find(name) {
            Ok(nth) => Some(nth),
            Err(QcowError::NoBitmap { .. }) => None,
            Err(error) => return Err(error),
        };
        let (lg2, flags) = self.form(name, old, options)?;
        let bits = contents(&self.header, dirty, lg2)?;
        let count = self.entries.len() as u64 + u64::from(old.is_none());
        at_most("the number of bitmaps", count, MAX_BITMAPS)?;
        tables_fit(self.table_entries(old) + bits.len() as u64)?;
        let backing = self.room_for_extension()?;
        let gone = self.named_only_here(old)?;
        self.change(|image| {
            if let Some(to) = backing {
                image.move_backing_name(to)?;
            }
            if let Some(old) = old {
                image.set_in_use(old)?;
            }
            // Clusters that were free: the table, side by side, and the bits.
            let cluster = image.header.cluster();
            let table_len = 8 * bits.len() as u64;
            let table_clusters = image.header.clusters(table_len);
            let table_at = image.allocate(table_clusters)?;
            let mut table = Vec::with_capacity((table_clusters * cluster) as usize);
            for content in &bits {
                let entry = match content {
                    Content::Zeroes => 0,
                    Content::Ones => ALL_ONES,
                    Content::Bits => image.allocate(1)?,
                };
                table.extend_from_slice(&entry.to_be_bytes());
            }
            table.resize((table_clusters * cluster) as usize, 0);
            let part = Part {
                at: table_at,
                len: table_len,
            };
            let entry = Entry::new(name, lg2, flags | IN_USE, part);
            let mut entries = image.entries.clone();
            let nth = old.unwrap_or(entries.len());
            match old {
                Some(old) => entries[old] = entry,
                None => entries.push(entry),
            }
            let (directory, bytes) = image.new_directory(&mut entries)?;
            image.refcounts.flush(&mut image.file)?;

            // Nothing names them yet.
            let mut buf = vec![0; cluster as usize];
            for (at, entry) in table.chunks(8).take(bits.len()).enumerate() {
                let to = super::file::be64(entry, 0);
                if to > ALL_ONES {
                    fill(&mut buf, dirty, image.header.size, lg2, at as u64);
                    image.put(to, &buf, "the bits of a bitmap")?;
                }
            }
            image.put(table_at, &table, "the table of a bitmap")?;
            image.put(directory.at, &bytes, "the bitmaps' directory")?;
            image.sync()?;
            image.switch(Some((entries.len() as u64, directory)))?;

            // All of it is there.
            let flags_at = entries[nth].at + AT_FLAGS;
            image.put(flags_at, &flags.to_be_bytes(), "the flags of a bitmap")?;
            image.sync()?;
            image.free(gone)
        })
    }

    /// Says durably that a program begins to write the disk and keeps the bitmap in its memory.
    /// After a crash of that program [`read`](Self::read) says so.
    ///
    /// # Errors
    /// [`QcowError::NoBitmap`], [`QcowError::Stale`], [`QcowError::Unsupported`],
    /// [`QcowError::Io`].
    pub fn begin_use(&mut self, name: &str) -> Result<(), QcowError> {
        self.writable()?;
        let nth = self.find(name)?;
        self.change(|image| image.set_in_use(nth))
    }

    /// Adds the content of other bitmaps to the bitmap `into`, all of it or nothing. Granules may
    /// differ.
    ///
    /// # Errors
    /// [`QcowError::InUse`] if one of them is; otherwise as [`read`](Self::read) and
    /// [`write`](Self::write).
    pub fn merge(&mut self, into: &str, from: &[&str]) -> Result<(), QcowError> {
        let mut sum = self.read(into)?;
        for name in from {
            sum.extend(&self.read(name)?);
        }
        self.write(into, &sum, BitmapOptions::default())
    }

    /// Removes a bitmap, also one in use.
    ///
    /// # Errors
    /// [`QcowError::NoBitmap`], [`QcowError::Stale`], [`QcowError::Io`];
    /// [`QcowError::Unsupported`] for an image that needs repair, or a bitmap of a type that is not
    /// known here.
    pub fn remove(&mut self, name: &str) -> Result<(), QcowError> {
        self.writable()?;
        let old = self.find(name)?;
        if !self.entries[old].is_known() {
            let flags = self.entries[old].flags;
            return Err(QcowError::Unsupported {
                place: "the flags of a bitmap",
                found: u64::from(flags),
                why: "it has a type, flags or extra data that are not known here",
            });
        }
        if self.entries.len() == 1 {
            self.extension_ends_the_header()?;
        }
        let gone = self.named_only_here(Some(old))?;
        self.change(|image| {
            let mut entries = image.entries.clone();
            entries.remove(old);
            if entries.is_empty() {
                image.switch(None)?;
            } else {
                let (directory, bytes) = image.new_directory(&mut entries)?;
                image.refcounts.flush(&mut image.file)?;
                image.put(directory.at, &bytes, "the bitmaps' directory")?;
                image.sync()?;
                image.switch(Some((entries.len() as u64, directory)))?;
            }
            image.free(gone)
        })
    }

    /// Takes all bitmaps of an image away in which they are [stale](QcowError::Stale). Their
    /// clusters stay used: `qemu-img check -r leaks` frees them. Does nothing to bitmaps that are
    /// true.
    ///
    /// # Errors
    /// [`QcowError::Unsupported`], [`QcowError::Io`].
    pub fn discard(&mut self) -> Result<(), QcowError> {
        if !self.is_stale() {
            return Ok(());
        }
        self.writable()?;
        self.extension_ends_the_header()?;
        self.change(|image| image.switch(None))
    }

    /// Whether the image may be written.
    fn writable(&self) -> Result<(), QcowError> {
        let refused = |found, why| {
            Err(QcowError::Unsupported {
                place: "the state of the image",
                found,
                why,
            })
        };
        let found = self.header.incompatible;
        if found & (DIRTY | CORRUPT) != 0 {
            return refused(found, "it needs repair: qemu-img check -r all");
        }
        if self.entries.iter().any(|entry| !entry.is_known()) {
            let why = "a bitmap is of a type that is not known here";
            return refused(found, why);
        }
        if self.broken {
            return refused(found, "a change of it has failed: open the image again");
        }
        Ok(())
    }

    /// The granule and the flags of a bitmap that is to be written.
    fn form(
        &self,
        name: &str,
        old: Option<usize>,
        options: BitmapOptions,
    ) -> Result<(u8, u32), QcowError> {
        let len = name.len() as u64;
        if len == 0 {
            return Err(QcowError::Limit {
                place: "the length of a bitmap's name",
                found: 0,
                limit: 1,
            });
        }
        at_most("the length of a bitmap's name", len, MAX_NAME as u64)?;
        let old = old.map(|nth| &self.entries[nth]);
        let lg2 = match (options.granule, old) {
            (Some(granule), _) => granule.lg2(),
            (None, Some(entry)) => entry.lg2,
            (None, None) => 16,
        };
        let of = |lg2| Granule::from_lg2(lg2).unwrap_or(Granule::MAX);
        if !(LEAST_LG2..=MOST_LG2).contains(&lg2) {
            return Err(QcowError::Granule {
                place: "the granules of a bitmap",
                found: of(lg2),
                least: of(LEAST_LG2),
                most: of(MOST_LG2),
            });
        }
        let auto = match (options.auto, old) {
            (Some(auto), _) => auto,
            (None, Some(entry)) => entry.flags & AUTO != 0,
            (None, None) => true,
        };
        Ok((lg2, if auto { AUTO } else { 0 }))
    }

    /// Makes a change, and reads the image anew. After an error nothing more is written.
    fn change(
        &mut self,
        change: impl FnOnce(&mut Self) -> Result<(), QcowError>,
    ) -> Result<(), QcowError> {
        self.broken = true;
        // Features that this library does not know are not true after it has written.
        let autoclear = self.header.autoclear & KNOWN_AUTOCLEAR;
        if autoclear != self.header.autoclear {
            self.put_autoclear(autoclear)?;
        }
        change(self)?;
        self.reload()?;
        self.broken = false;
        Ok(())
    }

    fn allocate(&mut self, clusters: u64) -> Result<u64, QcowError> {
        self.refcounts
            .allocate(&mut self.file, clusters, &self.parts)
    }

    fn set_in_use(&mut self, nth: usize) -> Result<(), QcowError> {
        let entry = &mut self.entries[nth];
        entry.flags |= IN_USE;
        let (at, flags) = (entry.at + AT_FLAGS, entry.flags);
        self.put(at, &flags.to_be_bytes(), "the flags of a bitmap")?;
        self.sync()
    }

    /// Takes clusters for a directory of `entries`, and says to each entry where it will be.
    fn new_directory(&mut self, entries: &mut [Entry]) -> Result<(Part, Vec<u8>), QcowError> {
        let mut bytes = Vec::new();
        for entry in entries.iter_mut() {
            entry.at = bytes.len() as u64;
            entry.encode(&mut bytes);
        }
        let len = bytes.len() as u64;
        at_most("the size of the bitmaps' directory", len, MAX_DIRECTORY)?;
        let clusters = self.header.clusters(len);
        let at = self.allocate(clusters)?;
        for entry in entries {
            entry.at += at;
        }
        // Whole clusters, so that the file does not end inside of one.
        bytes.resize((clusters * self.header.cluster()) as usize, 0);
        Ok((Part { at, len }, bytes))
    }

    /// The clusters of the directory, and of the table and the bits of an entry. None of them is
    /// used for anything else.
    fn named_only_here(&mut self, old: Option<usize>) -> Result<Vec<u64>, QcowError> {
        let cluster = self.header.cluster();
        let mut clusters = Vec::new();
        let mut whole = |part: Part| {
            let count = part.len.div_ceil(cluster);
            clusters.extend((0..count).map(|nth| part.at + nth * cluster));
        };
        if let Some(bitmaps) = self.header.bitmaps {
            whole(bitmaps.directory);
        }
        if let Some(old) = old {
            // What was not read stays used: `qemu-img check -r leaks` frees it.
            if self.entries[old].has_table(&self.header) {
                whole(self.entries[old].table);
            }
            clusters.extend(self.tables[old].iter().filter(|&&at| at > ALL_ONES));
        }
        for &at in &clusters {
            self.refcounts.used_once(&mut self.file, at)?;
        }
        Ok(clusters)
    }

    /// Frees clusters that nothing names any more.
    fn free(&mut self, clusters: Vec<u64>) -> Result<(), QcowError> {
        for at in clusters {
            self.refcounts.free(&mut self.file, at)?;
        }
        self.refcounts.flush(&mut self.file)
    }
}
