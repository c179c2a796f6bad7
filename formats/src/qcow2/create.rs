//! An image of metadata alone, which carries the bitmaps of a raw disk.

use dirtymap::Granule;

use super::error::{QcowError, at_most};
use super::file::ImageFile;
use super::header::{DATA_FILE, DATA_FILE_NAME, MAX_REFCOUNT_TABLE, RAW_DATA_FILE};

/// An entry says that its cluster is used once.
const COPIED: u64 = 1 << 63;
/// QEMU's limit for the L1 table, in bytes.
const MAX_L1: u64 = 32 << 20;

/// Where things are, in clusters.
#[derive(Clone, Copy, Debug)]
struct Layout {
    cluster: u64,
    size: u64,
    table: u64,
    blocks: u64,
    l1: u64,
    l2: u64,
}

/// Writes the image of metadata for a raw disk of `size` bytes, which is the file `data_file`.
/// Bitmaps are added by [`Image::write`](super::Image::write).
///
/// QEMU looks for a relative `data_file` in the folder in which it runs, so give the whole path.
///
/// Programs that open the image, such as QEMU, read and write the raw disk; others go on to use the
/// disk itself. The image maps each of its clusters, in 8 bytes: with clusters of 64 KiB that is
/// 128 MiB for a disk of 1 TiB, with clusters of 2 MiB it is 4 MiB.
///
/// # Errors
/// [`QcowError::Limit`] for a disk that is empty, no multiple of 512 bytes, or too large for its
/// clusters, a name of more than 1023 bytes, and a file that is not empty;
/// [`QcowError::Granule`] for clusters outside of 512 bytes to 2 MiB; [`QcowError::Io`].
pub fn create_for_raw<F: ImageFile>(
    file: &mut F,
    data_file: &str,
    size: u64,
    cluster: Granule,
) -> Result<(), QcowError> {
    let of = |lg2| Granule::from_lg2(lg2).unwrap_or(Granule::MAX);
    if !(9..=21).contains(&cluster.lg2()) {
        return Err(QcowError::Granule {
            place: "the clusters of an image",
            found: cluster,
            least: of(9),
            most: of(21),
        });
    }
    if size == 0 || !size.is_multiple_of(512) {
        return Err(QcowError::Limit {
            place: "the size of the disk modulo its sectors",
            found: size % 512,
            limit: 512,
        });
    }
    let name_len = data_file.len() as u64;
    // The header has 104 bytes, and its extensions are those of the name and of bitmaps.
    let room = (cluster.bytes() - 104 - 8 - 40 - 8).min(1023);
    at_most("the length of the data file's name", name_len, room)?;
    let len = file.length().map_err(QcowError::io("the image", 0))?;
    at_most("the length of a file that is to become an image", len, 0)?;

    let layout = layout(size, cluster.bytes())?;
    // The header comes last, so that there is no image before all of it is there.
    layout.write_refcounts(file)?;
    layout.write_tables(file)?;
    file.flush().map_err(QcowError::io("the image", 0))?;
    let mut header = layout.header(cluster.lg2(), data_file);
    header.resize(cluster.bytes() as usize, 0);
    put(file, 0, &header, "the header")?;
    file.flush().map_err(QcowError::io("the header", 0))
}

fn layout(size: u64, cluster: u64) -> Result<Layout, QcowError> {
    let per_table = cluster / 8;
    let guest = size.div_ceil(cluster);
    let l2 = guest.div_ceil(per_table);
    let l1 = (8 * l2).div_ceil(cluster);
    at_most("the bytes of the L1 table", 8 * l2, MAX_L1)?;
    // Counts are of two bytes. Blocks count themselves and the table, so both grow until they fit.
    let (mut table, mut blocks) = (1, 1);
    loop {
        let clusters = 1 + table + blocks + l1 + l2;
        let needed = clusters.div_ceil(cluster / 2);
        let needed_table = needed.div_ceil(per_table);
        if needed <= blocks && needed_table <= table {
            break;
        }
        (table, blocks) = (needed_table, needed);
    }
    let bytes = table * cluster;
    at_most("the bytes of the refcount table", bytes, MAX_REFCOUNT_TABLE)?;
    Ok(Layout {
        cluster,
        size,
        table,
        blocks,
        l1,
        l2,
    })
}

impl Layout {
    /// The first cluster of the blocks, of the L1 table, and of the L2 tables.
    fn blocks_at(&self) -> u64 {
        1 + self.table
    }

    fn l1_at(&self) -> u64 {
        self.blocks_at() + self.blocks
    }

    fn l2_at(&self) -> u64 {
        self.l1_at() + self.l1
    }

    fn header(&self, cluster_bits: u8, data_file: &str) -> Vec<u8> {
        let mut header = Vec::new();
        let word = |header: &mut Vec<u8>, word: u64| {
            header.extend_from_slice(&(word as u32).to_be_bytes());
        };
        let long = |header: &mut Vec<u8>, long: u64| {
            header.extend_from_slice(&long.to_be_bytes());
        };
        header.extend_from_slice(b"QFI\xfb");
        word(&mut header, 3);
        long(&mut header, 0); // no backing file
        word(&mut header, 0);
        word(&mut header, u64::from(cluster_bits));
        long(&mut header, self.size);
        word(&mut header, 0); // not encrypted
        word(&mut header, self.l2); // entries of the L1 table
        long(&mut header, self.l1_at() * self.cluster);
        long(&mut header, self.cluster); // the refcount table
        word(&mut header, self.table);
        word(&mut header, 0); // no snapshots
        long(&mut header, 0);
        long(&mut header, DATA_FILE);
        long(&mut header, 0);
        long(&mut header, RAW_DATA_FILE);
        word(&mut header, 4); // refcounts of 2^4 bits
        word(&mut header, 104);
        word(&mut header, u64::from(DATA_FILE_NAME));
        word(&mut header, data_file.len() as u64);
        header.extend_from_slice(data_file.as_bytes());
        header.resize(header.len().next_multiple_of(8), 0);
        header
    }

    fn write_refcounts<F: ImageFile>(&self, file: &mut F) -> Result<(), QcowError> {
        let used = self.l2_at() + self.l2;
        let per_block = self.cluster / 2;
        let mut table = Vec::new();
        for nth in 0..self.blocks {
            let at = (self.blocks_at() + nth) * self.cluster;
            table.extend_from_slice(&at.to_be_bytes());
            let counted = (used - (nth * per_block).min(used)).min(per_block);
            let mut block = [0u8, 1].repeat(counted as usize);
            block.resize(self.cluster as usize, 0);
            put(file, at, &block, "a block of refcounts")?;
        }
        table.resize((self.table * self.cluster) as usize, 0);
        put(file, self.cluster, &table, "the refcount table")
    }

    /// Every cluster of the disk is at the same offset in the raw file.
    fn write_tables<F: ImageFile>(&self, file: &mut F) -> Result<(), QcowError> {
        let guest = self.size.div_ceil(self.cluster);
        let per_table = self.cluster / 8;
        let mut l1 = Vec::new();
        for nth in 0..self.l2 {
            let at = (self.l2_at() + nth) * self.cluster;
            l1.extend_from_slice(&(at | COPIED).to_be_bytes());
            let first = nth * per_table;
            let mut l2 = Vec::with_capacity(self.cluster as usize);
            for entry in first..guest.min(first + per_table) {
                l2.extend_from_slice(&((entry * self.cluster) | COPIED).to_be_bytes());
            }
            l2.resize(self.cluster as usize, 0);
            put(file, at, &l2, "an L2 table")?;
        }
        l1.resize((self.l1 * self.cluster) as usize, 0);
        put(file, self.l1_at() * self.cluster, &l1, "the L1 table")
    }
}

fn put<F: ImageFile>(
    file: &mut F,
    at: u64,
    bytes: &[u8],
    place: &'static str,
) -> Result<(), QcowError> {
    file.write_at(at, bytes).map_err(QcowError::io(place, at))
}
