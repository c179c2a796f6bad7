//! An image that is open: which bitmaps it has, and what they say.

use dirtymap::exchange::RunTable;
use dirtymap::{BitmapView, Granule, Iova, IovaRange};

use super::directory::{AUTO, Entry, entries, granules, tables_fit};
use super::error::{QcowError, at_most};
use super::file::{ImageFile, be64, read};
use super::header::{HAS_BITMAPS, Header};
use super::refcount::Refcounts;

/// The bits of an entry of a bitmap's table that are the offset of a cluster.
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
/// An entry without an offset: all bits of its cluster are one.
pub(super) const ALL_ONES: u64 = 1;

/// A qcow2 image, for its persistent bitmaps.
///
/// No other program may have the image open, because two programs that write it destroy it. QEMU
/// holds locks on the images that it has open; this library does not look for them.
///
/// ```no_run
/// use std::fs::File;
/// use dirtymap_formats::qcow2::Image;
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let file = File::options().read(true).write(true).open("disk.qcow2")?;
/// let mut image = Image::open(file)?;
/// for bitmap in image.bitmaps()? {
///     println!("{} at {} in use: {}", bitmap.name, bitmap.granule, bitmap.in_use);
/// }
/// let dirty = image.read("backup")?;
/// image.merge("sum", &["backup"])?;
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Image<F> {
    pub(super) file: F,
    pub(super) header: Header,
    pub(super) entries: Vec<Entry>,
    /// The tables of the entries that are known: offsets of clusters, 0 and [`ALL_ONES`].
    pub(super) tables: Vec<Vec<u64>>,
    pub(super) refcounts: Refcounts,
    /// Parts of the file that are used, ascending: start, end, and what they are.
    pub(super) parts: Vec<(u64, u64, &'static str)>,
    max_runs: usize,
    /// A change has begun and not ended.
    pub(super) broken: bool,
}

/// A bitmap of an image.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct BitmapInfo {
    /// Unique in the image.
    pub name: String,
    /// What one bit stands for.
    pub granule: Granule,
    /// The program that had the image open last did not finish with it: all of the disk counts as
    /// dirty.
    pub in_use: bool,
    /// A program that opens the image and writes the disk has to mark what it writes.
    pub auto: bool,
    /// It is of a type that this library reads.
    pub known: bool,
}

impl<F: ImageFile> Image<F> {
    /// Opens an image: checks its header, and that no two parts of its metadata share a byte of the
    /// file. It takes memory only for what the file has, and at most 512 MiB, however long the file
    /// is and whatever it says; a change takes up to twice that.
    ///
    /// A bitmap whose table is not that of this disk is listed, but not read.
    ///
    /// # Errors
    /// [`QcowError`] names what is wrong, and where.
    pub fn open(mut file: F) -> Result<Self, QcowError> {
        let header = Header::read(&mut file)?;
        let refcounts = Refcounts::read(&mut file, &header)?;
        let mut image = Image {
            file,
            header,
            entries: Vec::new(),
            tables: Vec::new(),
            refcounts,
            parts: Vec::new(),
            max_runs: 1 << 24,
            broken: false,
        };
        if let Some(bitmaps) = image.header.bitmaps
            && !image.is_stale()
        {
            let directory = bitmaps.directory;
            let place = "the bitmaps' directory";
            let bytes = read(&mut image.file, directory.at, directory.len, place)?;
            image.entries = entries(&image.header, bitmaps.count, &bytes, directory.at)?;
            drop(bytes);
            // Before any table is read, so that tables that overlap are not read again and again.
            image.parts = image.metadata()?;
            tables_fit(image.table_entries(None))?;
            for nth in 0..image.entries.len() {
                let table = image.table(nth)?;
                image.tables.push(table);
            }
        }
        image.parts = image.metadata()?;
        Ok(image)
    }

    /// Reads everything anew.
    pub(super) fn reload(&mut self) -> Result<(), QcowError> {
        let fresh = Image::open(&mut self.file)?;
        self.header = fresh.header;
        self.entries = fresh.entries;
        self.tables = fresh.tables;
        self.refcounts = fresh.refcounts;
        self.parts = fresh.parts;
        Ok(())
    }

    /// The most runs that [`read`](Self::read) puts into a table: 2^24 unless this is called, of 16
    /// bytes each.
    pub fn set_max_runs(&mut self, runs: usize) {
        self.max_runs = runs;
    }

    /// Bytes of the disk.
    pub fn size(&self) -> u64 {
        self.header.size
    }

    /// The name of the raw file that has the data, if the image has none itself.
    pub fn data_file(&self) -> Option<&str> {
        self.header.data_file.as_deref()
    }

    /// The file of the image.
    pub fn into_file(self) -> F {
        self.file
    }

    /// The bitmaps, in their order in the image.
    ///
    /// # Errors
    /// [`QcowError::Stale`] if there are bitmaps, and none of them is true any more.
    pub fn bitmaps(&self) -> Result<Vec<BitmapInfo>, QcowError> {
        if self.is_stale() {
            return Err(QcowError::Stale);
        }
        Ok(self.entries.iter().map(Entry::info).collect())
    }

    /// The bytes of the disk that a bitmap holds, in whole granules, cut at the end of the disk.
    ///
    /// # Errors
    /// After each of them all of the disk counts as dirty. [`QcowError::NoBitmap`],
    /// [`QcowError::Stale`], [`QcowError::InUse`]; [`QcowError::Limit`] for more runs than allowed;
    /// otherwise [`QcowError`] names what is wrong in the image, and where.
    pub fn read(&mut self, name: &str) -> Result<RunTable, QcowError> {
        let limit = self.max_runs as u64;
        let mut runs = Vec::new();
        self.each_run(name, |run| {
            at_most("the number of runs", runs.len() as u64 + 1, limit)?;
            runs.push(run);
            Ok(())
        })?;
        Ok(runs.into_iter().collect())
    }

    /// Records the same into a bitmap in memory, of any granule, and returns how many of its bits
    /// were clear.
    ///
    /// # Errors
    /// As [`read`](Self::read); [`QcowError::Bitmap`] if the view does not cover a run, or a window
    /// of a file cannot be mapped. What was recorded before stays.
    pub fn or_into(&mut self, name: &str, view: &BitmapView<'_>) -> Result<u64, QcowError> {
        let mut sink = view.sink();
        self.each_run(name, |run| Ok(sink.record(run)?))?;
        Ok(sink.bits_set())
    }

    /// Hands on the runs of a bitmap, ascending and apart from each other, without storing them.
    ///
    /// # Errors
    /// As [`read`](Self::read), and those of `each`.
    pub fn each_run(
        &mut self,
        name: &str,
        mut each: impl FnMut(IovaRange) -> Result<(), QcowError>,
    ) -> Result<(), QcowError> {
        let nth = self.find(name)?;
        let entry = &self.entries[nth];
        entry.readable()?;
        let lg2 = entry.lg2;
        entry.sized(&self.header)?;
        let size = self.header.size;
        let bits = granules(size, lg2);
        let per_cluster = self.header.cluster() * 8;
        let mut open = Open {
            first: None,
            emit: |first: u64, end: u64| {
                // Granules of the disk, so that neither product exceeds its size by a granule.
                let last = (end << lg2).min(size) - 1;
                let run = IovaRange::new(Iova::new(first << lg2), Iova::new(last));
                each(run.map_err(dirtymap::Error::from)?)
            },
        };
        for (cluster, &content) in self.tables[nth].iter().enumerate() {
            let first = cluster as u64 * per_cluster;
            let end = bits.min(first + per_cluster);
            match content {
                0 => open.clear(first)?,
                ALL_ONES => open.set(first),
                at => {
                    let place = "the bits of a bitmap";
                    let bytes = read(&mut self.file, at, self.header.cluster(), place)?;
                    scan(&bytes, first, end, &mut open).map_err(|error| match error {
                        Scan::Bit(bit) => QcowError::Damaged {
                            place,
                            at: at + (bit - first) / 8,
                            found: bit,
                            why: "a bit past the end of the disk is set",
                        },
                        Scan::Run(error) => error,
                    })?;
                }
            }
        }
        open.clear(bits)
    }

    pub(super) fn put(
        &mut self,
        at: u64,
        bytes: &[u8],
        place: &'static str,
    ) -> Result<(), QcowError> {
        let wrote = self.file.write_at(at, bytes);
        wrote.map_err(QcowError::io(place, at))
    }

    pub(super) fn sync(&mut self) -> Result<(), QcowError> {
        self.file.flush().map_err(QcowError::io("the image", 0))
    }

    /// Whether the bitmaps are not true any more.
    pub(super) fn is_stale(&self) -> bool {
        self.header.bitmaps.is_some() && self.header.autoclear & HAS_BITMAPS == 0
    }

    pub(super) fn find(&self, name: &str) -> Result<usize, QcowError> {
        if self.is_stale() {
            return Err(QcowError::Stale);
        }
        let found = self.entries.iter().position(|entry| entry.name == name);
        found.ok_or_else(|| QcowError::NoBitmap { name: name.into() })
    }

    /// How many entries the tables that are kept have, without that of the bitmap `but`.
    pub(super) fn table_entries(&self, but: Option<usize>) -> u64 {
        let others = self.entries.iter().enumerate();
        let others = others.filter(|&(nth, it)| Some(nth) != but && it.has_table(&self.header));
        // At most 2^16 of at most 2^20 each.
        others.map(|(_, entry)| entry.table.len / 8).sum()
    }

    /// The table of an entry; empty if the entry is of a type that is not known, or is not that of
    /// a bitmap of this disk.
    fn table(&mut self, nth: usize) -> Result<Vec<u64>, QcowError> {
        let entry = &self.entries[nth];
        if !entry.has_table(&self.header) {
            return Ok(Vec::new());
        }
        let part = entry.table;
        let bytes = read(&mut self.file, part.at, part.len, "the table of a bitmap")?;
        let mut table = Vec::with_capacity(bytes.len() / 8);
        for at in (0..bytes.len()).step_by(8) {
            let found = be64(&bytes, at);
            let offset = found & OFFSET;
            let good = match offset {
                0 => found <= ALL_ONES,
                _ => found == offset && offset.is_multiple_of(self.header.cluster()),
            };
            if !good {
                return Err(QcowError::Damaged {
                    place: "an entry of a bitmap's table",
                    at: part.at + at as u64,
                    found,
                    why: "it is no offset of a cluster, nor 0 or 1",
                });
            }
            table.push(found);
        }
        Ok(table)
    }

    /// All parts of the file that are known, ascending. No two share a cluster.
    fn metadata(&mut self) -> Result<Vec<(u64, u64, &'static str)>, QcowError> {
        let header = &self.header;
        let cluster = header.cluster();
        let bits = self.tables.iter().flatten();
        let bits = bits.filter(|&&at| at > ALL_ONES).count();
        let blocks = self.refcounts.blocks().count();
        let mut parts = Vec::with_capacity(blocks + self.entries.len() + bits + 5);
        let mut add = |at: u64, len: u64, what| {
            if len > 0 {
                let end = at.saturating_add(len).checked_next_multiple_of(cluster);
                parts.push((at, end.unwrap_or(u64::MAX), what));
            }
        };
        add(0, cluster, "the header");
        let table = header.refcount_table;
        add(table.at, table.len, "the refcount table");
        add(header.l1.at, header.l1.len, "the L1 table");
        if let Some(at) = header.snapshots {
            add(at, 1, "the snapshots");
        }
        for at in self.refcounts.blocks() {
            add(at, cluster, "a block of refcounts");
        }
        if let Some(bitmaps) = header.bitmaps
            && !self.is_stale()
        {
            let directory = bitmaps.directory;
            add(directory.at, directory.len, "the bitmaps' directory");
        }
        for entry in &self.entries {
            add(entry.table.at, entry.table.len, "the table of a bitmap");
        }
        for table in &self.tables {
            for &at in table.iter().filter(|&&at| at > ALL_ONES) {
                add(at, cluster, "the bits of a bitmap");
            }
        }
        parts.sort_unstable();
        match parts.windows(2).find(|pair| pair[1].0 < pair[0].1) {
            Some(pair) => Err(QcowError::Overlap {
                place: pair[0].2,
                other: pair[1].2,
                at: pair[1].0,
            }),
            None => Ok(parts),
        }
    }
}

impl Entry {
    fn info(&self) -> BitmapInfo {
        BitmapInfo {
            name: self.name.clone(),
            // 9 to 31, as was checked.
            granule: Granule::from_lg2(self.lg2).unwrap_or(Granule::K4),
            in_use: self.is_in_use(),
            auto: self.flags & AUTO != 0,
            known: self.is_known(),
        }
    }

    /// Whether the content is true, and understood.
    pub(super) fn readable(&self) -> Result<(), QcowError> {
        if !self.is_known() {
            return Err(QcowError::Unsupported {
                place: "the flags of a bitmap",
                found: u64::from(self.flags),
                why: "it has a type, flags or extra data that are not known here",
            });
        }
        if self.is_in_use() {
            let name = self.name.clone();
            return Err(QcowError::InUse { name });
        }
        Ok(())
    }
}

/// Bits that ascend, as runs.
struct Open<E> {
    /// The first bit of a run whose end is not known yet.
    first: Option<u64>,
    emit: E,
}

impl<E: FnMut(u64, u64) -> Result<(), QcowError>> Open<E> {
    fn set(&mut self, bit: u64) {
        self.first.get_or_insert(bit);
    }

    fn clear(&mut self, bit: u64) -> Result<(), QcowError> {
        match self.first.take() {
            Some(first) => (self.emit)(first, bit),
            None => Ok(()),
        }
    }
}

enum Scan {
    /// This bit is set, although there is nothing that it could stand for.
    Bit(u64),
    Run(QcowError),
}

/// The bits of a cluster, the first of which is `first`. From `end` on they have to be clear.
fn scan<E: FnMut(u64, u64) -> Result<(), QcowError>>(
    bytes: &[u8],
    first: u64,
    end: u64,
    open: &mut Open<E>,
) -> Result<(), Scan> {
    for (nth, word) in bytes.chunks(8).enumerate() {
        let base = first + nth as u64 * 64;
        let mut word = word
            .iter()
            .rev()
            .fold(0u64, |sum, &byte| sum << 8 | u64::from(byte));
        // Shifts out the run at the bottom of the word, of zeroes and ones in turn.
        let mut at = 0;
        while at < 64 {
            if word == 0 {
                open.clear(base + at).map_err(Scan::Run)?;
                break;
            }
            let zeroes = word.trailing_zeros();
            if zeroes > 0 {
                open.clear(base + at).map_err(Scan::Run)?;
                word >>= zeroes;
                at += u64::from(zeroes);
            }
            let ones = word.trailing_ones();
            if base + at + u64::from(ones) > end {
                return Err(Scan::Bit(end.max(base + at)));
            }
            open.set(base + at);
            word = word.checked_shr(ones).unwrap_or(0);
            at += u64::from(ones);
        }
    }
    Ok(())
}
