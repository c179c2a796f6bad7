//! Every form of user bitmap, between guards that must not change.

use std::fs::File;
use std::os::unix::fs::FileExt;

use dirtymap::bitmap::FileBitmap;
use dirtymap::sync::{AtomicU64, Ordering};
use dirtymap::{Granule, Iova, IovaRange, SparseBitmap, UserBitmap};

use crate::violation::{Rule, Violation, check, violation};

/// Guard bytes before and after a bitmap, which no harvest may change.
pub(crate) const GUARD: usize = 16;

/// The form of a user's bitmap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// Exclusive words.
    Words,
    /// Shared words.
    Shared,
    /// Exclusive bytes, at any address.
    Bytes,
    /// Chunks that are allocated at their first bit.
    Sparse,
    /// A file of which one window is mapped at a time.
    File,
}

pub(crate) const FORMS: [Form; 5] = [
    Form::Words,
    Form::Shared,
    Form::Bytes,
    Form::Sparse,
    Form::File,
];

/// A bitmap between two guards, made from an image of the bitmap with its guards.
pub(crate) enum Memory {
    Words(Vec<u64>),
    Shared(Vec<AtomicU64>),
    /// The place of the image in the block.
    Bytes(Vec<u8>, std::ops::Range<usize>),
    Sparse(SparseBitmap),
    File(FileBitmap, u64),
}

/// The numbers of the bits that are set.
pub(crate) fn bits_of(image: &[u8]) -> impl Iterator<Item = u64> {
    let bits = 0..image.len() as u64 * 8;
    bits.filter(|bit| image[*bit as usize / 8] >> (bit % 8) & 1 == 1)
}

/// Sets a bit of the bitmap in an image.
pub(crate) fn set(image: &mut [u8], bit: u64) {
    image[GUARD + bit as usize / 8] |= 1 << (bit % 8);
}

impl Memory {
    /// The bitmap of `image`. In a form of bytes it begins `skip` bytes after the start of a word.
    pub(crate) fn new(form: Form, image: &[u8], skip: usize) -> Result<Memory, Violation> {
        let content = &image[GUARD..image.len() - GUARD];
        let words = || image.as_chunks().0.iter().map(|w| u64::from_le_bytes(*w));
        Ok(match form {
            Form::Words => Memory::Words(words().collect()),
            Form::Shared => Memory::Shared(words().map(AtomicU64::new).collect()),
            Form::Bytes => {
                let mut block = vec![0; image.len() + 16];
                let at = block.as_ptr().align_offset(8) + skip;
                block[at..at + image.len()].copy_from_slice(image);
                Memory::Bytes(block, at..at + image.len())
            }
            Form::Sparse => {
                let bits = content.len() as u64 * 8;
                let sparse = SparseBitmap::new(bits);
                if let Ok(all) = IovaRange::from_len(Iova::MIN, bits) {
                    let view = UserBitmap::sparse(&sparse)
                        .view(all, Granule::BYTE)
                        .map_err(broken)?;
                    for bit in bits_of(content) {
                        let one = IovaRange::from_len(Iova::new(bit), 1).map_err(broken)?;
                        view.sink().record(one).map_err(broken)?;
                    }
                }
                Memory::Sparse(sparse)
            }
            Form::File => {
                let from = (1 << 16) - GUARD as u64 - skip as u64;
                let file = scratch().map_err(broken)?;
                file.write_all_at(image, from).map_err(broken)?;
                let bitmap = FileBitmap::new(file, from + GUARD as u64, content.len() as u64);
                Memory::File(bitmap.with_window(1 << 16).map_err(broken)?, from)
            }
        })
    }

    pub(crate) fn bitmap(&mut self) -> UserBitmap<'_> {
        let guard = GUARD / 8;
        match self {
            Memory::Words(words) => {
                let end = words.len() - guard;
                UserBitmap::new(&mut words[guard..end])
            }
            Memory::Shared(words) => UserBitmap::shared(&words[guard..words.len() - guard]),
            Memory::Bytes(block, at) => {
                UserBitmap::bytes(&mut block[at.start + GUARD..at.end - GUARD])
            }
            Memory::Sparse(sparse) => UserBitmap::sparse(sparse),
            Memory::File(file, _) => UserBitmap::file(file),
        }
    }

    /// The image now. It was `before` at the start.
    pub(crate) fn image(&self, before: &[u8]) -> Result<Vec<u8>, Violation> {
        let bytes_of = |words: &[u64]| words.iter().flat_map(|w| w.to_le_bytes()).collect();
        Ok(match self {
            Memory::Words(words) => bytes_of(words),
            Memory::Shared(words) => {
                // Relaxed: one thread.
                let load = |word: &AtomicU64| word.load(Ordering::Relaxed);
                bytes_of(&words.iter().map(load).collect::<Vec<_>>())
            }
            Memory::Bytes(block, at) => {
                let mut outside = block[..at.start].iter().chain(&block[at.end..]);
                check(outside.all(|byte| *byte == 0), Rule::Bitmap, || {
                    "bytes around a bitmap were written".to_owned()
                })?;
                block[at.clone()].to_vec()
            }
            Memory::Sparse(sparse) => {
                // This form has no memory around it.
                let mut image = before.to_vec();
                let end = image.len() - GUARD;
                image[GUARD..end].fill(0);
                if let Ok(all) = IovaRange::from_len(Iova::MIN, sparse.bits()) {
                    let view = UserBitmap::sparse(sparse)
                        .view(all, Granule::BYTE)
                        .map_err(broken)?;
                    view.bits().for_each(|bit| set(&mut image, bit));
                }
                image
            }
            Memory::File(bitmap, from) => {
                let mut image = vec![0; before.len()];
                let file = bitmap.file();
                file.read_exact_at(&mut image, *from).map_err(broken)?;
                let len = file.metadata().map_err(broken)?.len();
                check(len == from + before.len() as u64, Rule::Bitmap, || {
                    format!("a file of bits has {len} bytes now")
                })?;
                image
            }
        })
    }
}

/// An empty file without a name.
fn scratch() -> std::io::Result<File> {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    // Relaxed: each number is used once.
    let n = NEXT.fetch_add(1, Ordering::Relaxed);
    let name = format!("dirtymap-forms-{}-{n}", std::process::id());
    let path = std::env::temp_dir().join(name);
    let mut open = File::options();
    let file = open.read(true).write(true).create_new(true).open(&path);
    std::fs::remove_file(&path)?;
    file
}

fn broken(error: impl std::fmt::Display) -> Violation {
    violation(Rule::Answer, format!("the test's own bitmap: {error}"))
}
