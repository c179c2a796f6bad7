//! The writers of a program: devices and CPUs.

use dirtymap::{Error, Iova, IovaRange};
use pagetable_sim::{DmaError, FaultKind};

use super::{Checked, Runner, broken, same_answer};
use crate::op::{Master, Place, Sabotage};
use crate::pages::{PAGE, pieces};
use crate::violation::{Rule, check, same};

impl Runner<'_> {
    pub(super) fn dma_write(&mut self, device: Master, at: Place, len: u16) -> Checked {
        self.dma_write_at(device, self.oracle.address_of(at), len)
    }

    pub(super) fn dma_write_at(&mut self, device: Master, at: u64, len: u16) -> Checked {
        let bytes = self.fresh_bytes(len);
        let mut right = Ok(());
        for (at, piece) in pieces(at, bytes.len()) {
            right = self.dma_at(device, at, true);
            if right.is_err() {
                break;
            }
            self.oracle
                .device_wrote(device.domain.into(), at, &bytes[piece]);
        }
        same(
            Rule::Answer,
            "a DMA write",
            self.world.write(device, Iova::new(at), &bytes),
            right,
        )
    }

    pub(super) fn dma_read(&mut self, device: Master, at: Place, len: u16) -> Checked {
        let at = self.oracle.address_of(at);
        let mut right = vec![0; len.into()];
        let mut answer = Ok(());
        for (at, piece) in pieces(at, len.into()) {
            answer = self.dma_at(device, at, false);
            if answer.is_err() {
                break;
            }
            let frame = self
                .oracle
                .area_at(at / PAGE)
                .map(|area| area.frame_of(at / PAGE));
            if let Some(memory) = frame.and_then(|frame| self.oracle.memory.get(&frame)) {
                let from = (at % PAGE) as usize;
                right[piece.clone()].copy_from_slice(&memory[from..from + piece.len()]);
            }
        }
        let mut got = vec![0; len.into()];
        same(
            Rule::Answer,
            "a DMA read",
            self.world.read(device, Iova::new(at), &mut got),
            answer,
        )?;
        check(got == right, Rule::Answer, || {
            format!("a DMA read of {len} bytes at {at:#x} saw other bytes")
        })
    }

    /// The result of a device's access at `at`.
    pub(super) fn dma_at(&self, device: Master, at: u64, write: bool) -> Result<(), DmaError> {
        let attached = self.oracle.attached.contains(&device.domain.into());
        let area = self.oracle.area_at(at / PAGE).filter(|_| attached);
        let kind = match area.map(|area| area.access) {
            None => FaultKind::NotMapped,
            Some(access) if write && !access.writes() => FaultKind::ReadOnly,
            Some(access) if !write && !access.reads() => FaultKind::WriteOnly,
            Some(_) => return Ok(()),
        };
        let iova = Iova::new(at);
        Err(DmaError { iova, kind })
    }

    pub(super) fn cpu_write(&mut self, at: Place, len: u16, by_handle: bool) -> Checked {
        let at = self.oracle.address_of(at);
        let bytes = self.fresh_bytes(len);
        let Ok(range) = IovaRange::from_len(Iova::new(at), len.into()) else {
            return Ok(());
        };
        let mut outside = self
            .oracle
            .hole_in(range)
            .map(|hole| hole.max(range.start()));
        if by_handle && let Some(handle) = self.space.area(range.start()) {
            let own = handle.mapping().range;
            outside = own.last().checked_add(1).filter(|_| !own.covers(range));
            if let Some(at) = outside {
                // Nothing is written, so nothing must be marked.
                let right = Err(Error::Outside { at });
                self.counts.outside_marks += 1;
                return same_answer(
                    "a mark that sticks out of the area",
                    handle.mark(range),
                    right,
                );
            }
            self.store(range, &bytes, self.marks())?;
            if self.config.sabotage != Sabotage::ForgetMarks {
                same_answer("a mark by handle", handle.mark(range), Ok(()))?;
            }
            return Ok(());
        }
        self.store(range, &bytes, self.marks())?;
        if self.config.sabotage == Sabotage::ForgetMarks {
            return Ok(());
        }
        self.counts.outside_marks += u64::from(outside.is_some());
        let right = outside.map_or(Ok(()), |at| Err(Error::Outside { at }));
        same_answer("a mark", self.space.mark(range), right)
    }

    /// A CPU stores the mapped parts of `bytes`.
    pub(super) fn store(&mut self, range: IovaRange, bytes: &[u8], marked: bool) -> Checked {
        self.world.settle(None, range.start(), bytes.len());
        for (at, piece) in pieces(range.start().get(), bytes.len()) {
            if let Some(phys) = self.phys(at) {
                self.memory()
                    .write(phys, &bytes[piece.clone()])
                    .map_err(broken)?;
                let page = self.oracle.store(at, &bytes[piece]);
                if marked {
                    self.oracle.marked(page);
                }
            }
        }
        Ok(())
    }

    pub(super) fn marks(&self) -> bool {
        self.config.sabotage != Sabotage::ForgetMarks
    }

    pub(super) fn fresh_bytes(&self, len: u16) -> Vec<u8> {
        (0..len)
            .map(|i| self.time.wrapping_mul(37).wrapping_add(i as u8) | 1)
            .collect()
    }
}
