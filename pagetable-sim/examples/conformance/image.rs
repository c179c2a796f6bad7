//! A caller's memory around a bitmap, byte by byte.

use super::parse::{Buffer, HOST_PAGE, Rights};

/// The pages of a buffer, and where the bitmap begins in them.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Image {
    bytes: Vec<u8>,
    /// The byte of the pointer.
    base: usize,
    /// How many bytes from the pointer on can be written.
    writable: usize,
}

impl Image {
    /// The memory before the call; nothing for a NULL pointer.
    pub(crate) fn new(buffer: Option<&Buffer>) -> Self {
        let Some(buffer) = buffer else {
            return Image {
                bytes: Vec::new(),
                base: 0,
                writable: 0,
            };
        };
        let runs = || {
            buffer.pages.iter().map(|(first, count, rights)| {
                (*first, first.saturating_add_unsigned(*count), *rights)
            })
        };
        let first = runs().map(|run| run.0).min().unwrap_or(0).min(0);
        let end = runs().map(|run| run.1).max().unwrap_or(0).max(1);
        let mut rights = vec![Rights::None; (end - first) as usize];
        for (from, to, what) in runs() {
            rights[(from - first) as usize..(to - first) as usize].fill(what);
        }
        let zero = first.unsigned_abs() as usize;
        let pages = rights[zero..]
            .iter()
            .take_while(|r| **r == Rights::Rw)
            .count();
        let page = HOST_PAGE as usize;
        Image {
            bytes: vec![buffer.fill; rights.len() * page],
            base: zero * page + buffer.off as usize,
            writable: (pages * page).saturating_sub(buffer.off as usize),
        }
    }

    /// The bitmap, as long as it can be written.
    pub(crate) fn bitmap(&mut self) -> &mut [u8] {
        &mut self.bytes[self.base..][..self.writable]
    }

    /// Sets bits; false if some lie outside the memory.
    pub(crate) fn set(&mut self, first: i64, count: u64) -> bool {
        let zero = self.base as i64 * 8;
        let from = zero + first;
        let Some(bits) = usize::try_from(from)
            .ok()
            .filter(|from| *from as u64 + count <= self.bytes.len() as u64 * 8)
        else {
            return false;
        };
        let mut bit = bits;
        let end = bits + count as usize;
        while bit < end {
            if bit % 8 == 0 && end - bit >= 8 {
                self.bytes[bit / 8] = 0xff;
                bit += 8;
            } else {
                self.bytes[bit / 8] |= 1 << (bit % 8);
                bit += 1;
            }
        }
        true
    }
}
