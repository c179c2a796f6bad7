//! The memory around a bitmap, and what a call changed in it.

use std::io;

use super::model::Run;
use crate::memory::{Memory, PAGE, Rights};

/// Pages of the memory below page 0, and above the last page that a bitmap needs.
const AROUND: usize = 3;

/// A bitmap in pages with rights of their own.
pub(crate) struct Bitmap {
    memory: Memory,
    pages: Vec<Rights>,
    /// The byte of the bitmap in page 0.
    pub(crate) off: usize,
    pub(crate) fill: u8,
}

impl Bitmap {
    /// A bitmap for `bits` bits from byte `off` of page 0 on. All bytes are `fill`. The pages with
    /// its bits can be read and written, and so can those next to them.
    pub(crate) fn new(bits: u64, off: usize, fill: u8) -> io::Result<Self> {
        let needed = (off + usize::try_from(bits.div_ceil(8)).unwrap_or(0))
            .div_ceil(PAGE)
            .max(1);
        let pages = vec![Rights::Rw; AROUND + needed + AROUND];
        let memory = Memory::new(pages.len() * PAGE, false)?;
        memory.fill(fill);
        let mut bitmap = Bitmap {
            memory,
            pages,
            off,
            fill,
        };
        // Only one page on each side: a write past that is seen as one that was dropped.
        for page in [0, 1, AROUND + needed + 1, AROUND + needed + 2] {
            bitmap.set(page, Rights::None)?;
        }
        Ok(bitmap)
    }

    fn set(&mut self, page: usize, rights: Rights) -> io::Result<()> {
        self.memory.protect(page, 1, rights)?;
        if let Some(page) = self.pages.get_mut(page) {
            *page = rights;
        }
        Ok(())
    }

    /// Takes rights from page `page`, counted from page 0.
    pub(crate) fn protect(&mut self, page: usize, rights: Rights) -> io::Result<()> {
        self.set(AROUND + page, rights)
    }

    /// Where the bitmap begins.
    pub(crate) fn address(&self) -> u64 {
        self.memory.address() + (AROUND * PAGE + self.off) as u64
    }

    /// Whether all of `bits` bits can be written.
    pub(crate) fn can_hold(&self, bits: u64) -> bool {
        let bytes = usize::try_from(bits.div_ceil(8)).unwrap_or(usize::MAX);
        let last = (self.off + bytes).div_ceil(PAGE);
        let pages = self.pages.get(AROUND..AROUND + last);
        pages.is_some_and(|pages| pages.iter().all(|rights| *rights == Rights::Rw))
    }

    /// The runs of bits that went from 0 to 1 (`one`), or from 1 to 0: the first, counted from the
    /// pointer on, and how many.
    pub(crate) fn changed(&self, one: bool) -> Vec<(i64, u64)> {
        let mut runs: Vec<(i64, u64)> = Vec::new();
        for (page, rights) in self.pages.iter().enumerate() {
            if *rights == Rights::None {
                continue;
            }
            let base = (page as i64 - AROUND as i64) * PAGE as i64 - self.off as i64;
            for (at, now) in self.memory.page(page).into_iter().enumerate() {
                let before = self.fill;
                let changed = if one { now & !before } else { before & !now };
                if changed != 0 {
                    add(&mut runs, (base + at as i64) * 8, changed);
                }
            }
        }
        runs
    }

    /// The field `buf` of a read.
    pub(crate) fn json(&self) -> String {
        let mut runs: Vec<(i64, u64, Rights)> = Vec::new();
        for (page, rights) in self.pages.iter().enumerate() {
            let page = page as i64 - AROUND as i64;
            match runs.last_mut() {
                Some((first, count, same)) if same == rights && *first + *count as i64 == page => {
                    *count += 1;
                }
                _ if *rights == Rights::None => (),
                _ => runs.push((page, 1, *rights)),
            }
        }
        let runs: Vec<String> = runs
            .iter()
            .filter(|(_, _, rights)| *rights != Rights::None)
            .map(|(first, count, rights)| {
                let rights = match rights {
                    Rights::Rw => "rw",
                    Rights::Ro => "ro",
                    Rights::None => "none",
                };
                format!("[{first},{count},\"{rights}\"]")
            })
            .collect();
        let (off, fill) = (self.off, self.fill);
        format!(
            "{{\"off\":{off},\"fill\":{fill},\"pages\":[{}]}}",
            runs.join(",")
        )
    }
}

/// Adds the bits of `byte`, the lowest of which is bit number `first`.
fn add(runs: &mut Vec<(i64, u64)>, first: i64, byte: u8) {
    for bit in (0..8).filter(|bit| byte >> bit & 1 != 0) {
        match runs.last_mut() {
            Some((start, count)) if *start + *count as i64 == first + bit => *count += 1,
            _ => runs.push((first + bit, 1)),
        }
    }
}

/// The bits of `words` as ranges of addresses: bit 0 is `iova`, and a bit is `unit` bytes.
pub(crate) fn ranges(words: &[u64], iova: u64, unit: u64) -> Vec<Run> {
    let mut runs = Vec::new();
    for (nth, byte) in words.iter().flat_map(|word| word.to_ne_bytes()).enumerate() {
        if byte != 0 {
            add(&mut runs, nth as i64 * 8, byte);
        }
    }
    let range = |(first, count): (i64, u64)| (iova + first as u64 * unit, count * unit);
    runs.into_iter().map(range).collect()
}

/// Pairs as JSON.
pub(crate) fn pairs<A: std::fmt::Display, B: std::fmt::Display>(pairs: &[(A, B)]) -> String {
    let pairs: Vec<String> = pairs.iter().map(|(a, b)| format!("[{a},{b}]")).collect();
    format!("[{}]", pairs.join(","))
}
