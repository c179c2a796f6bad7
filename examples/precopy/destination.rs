//! A copy of the machine's memory, to which ranges are copied, and which is compared at the end.

use dirtymap::IovaRange;
use pagetable_sim::{Format, PhysMemory};

use crate::Failure;
use crate::compare::{Comparison, PageAt};
use crate::machine::{Machine, PAGE};

/// Bytes that are copied at a time.
const BLOCK: usize = 1 << 20;

/// See the [module](self).
pub(crate) struct Destination<'a, F: Format> {
    machine: &'a Machine<F>,
    memory: PhysMemory,
    /// Everything was copied once.
    is_whole: bool,
    buffer: Vec<u8>,
}

impl<'a, F: Format> Destination<'a, F> {
    /// A copy that is zero.
    pub(crate) fn new(machine: &'a Machine<F>) -> Result<Self, Failure> {
        Ok(Destination {
            machine,
            memory: PhysMemory::new(machine.memory.len())?,
            is_whole: false,
            buffer: vec![0; BLOCK],
        })
    }

    /// Marks the first copy as complete. Until then, zeros are not copied.
    pub(crate) fn whole(&mut self) {
        self.is_whole = true;
    }

    /// Copies `range`, and calls `copied` after each block with its range. Returns the bytes.
    pub(crate) fn copy(
        &mut self,
        range: IovaRange,
        mut copied: impl FnMut(IovaRange),
    ) -> Result<u64, Failure> {
        let mut bytes = 0;
        for_blocks(range, |block| {
            let buffer = &mut self.buffer[..block.len() as usize];
            let phys = self.machine.phys(block.start());
            self.machine.memory.read(phys, buffer)?;
            // The destination is zero at first, so a first copy of zeros would only allocate
            // memory.
            if self.is_whole || buffer.iter().any(|byte| *byte != 0) {
                self.memory.write(phys, buffer)?;
            }
            bytes += buffer.len() as u64;
            copied(block);
            Ok(())
        })?;
        Ok(bytes)
    }

    /// Compares the memory of the machine with this one, byte for byte. The machine must have
    /// stopped.
    pub(crate) fn compare(&self) -> Result<Comparison, Failure> {
        let mut comparison = Comparison::default();
        let page = PAGE.bytes() as usize;
        let (mut source, mut destination) = (vec![0; BLOCK], vec![0; BLOCK]);
        for (index, file) in self.machine.files.iter().enumerate() {
            for_blocks(file.range, |block| {
                let phys = self.machine.phys(block.start());
                let length = block.len() as usize;
                self.machine.memory.read(phys, &mut source[..length])?;
                self.memory.read(phys, &mut destination[..length])?;
                let pages = source[..length]
                    .chunks(page)
                    .zip(destination[..length].chunks(page));
                for (offset, (ours, theirs)) in (0..).step_by(page).zip(pages) {
                    let at = PageAt {
                        iova: block.start().get() + offset,
                        file: index as u32,
                        name: &file.name,
                        offset: block.start().get() + offset - file.range.start().get(),
                    };
                    comparison.page(at, ours, theirs);
                }
                Ok(())
            })?;
        }
        Ok(comparison)
    }
}

/// Calls `visit` for `range` in pieces of at most [`BLOCK`].
fn for_blocks(
    range: IovaRange,
    mut visit: impl FnMut(IovaRange) -> Result<(), Failure>,
) -> Result<(), Failure> {
    let mut start = Some(range.start());
    while let Some(from) = start.filter(|from| *from <= range.last()) {
        let last = from
            .checked_add(BLOCK as u64 - 1)
            .map_or(range.last(), |last| last.min(range.last()));
        visit(IovaRange::new(from, last)?)?;
        start = last.checked_add(1);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_cover_the_range_and_end_at_the_top() {
        let range = IovaRange::from_len(
            dirtymap::Iova::new(u64::MAX - 5 * (BLOCK as u64) / 2 + 1),
            5 * BLOCK as u64 / 2,
        );
        let mut pieces = vec![];
        for_blocks(range.unwrap(), |block| {
            pieces.push(block.len());
            Ok(())
        })
        .unwrap();
        assert_eq!(pieces, [BLOCK as u128, BLOCK as u128, BLOCK as u128 / 2]);
    }
}
