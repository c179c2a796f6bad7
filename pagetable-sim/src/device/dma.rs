//! Reads, writes and atomic operations of a device.
//!
//! A write is posted: for the device it is complete once it is translated, and its bytes land
//! later. Reads and atomic operations push the device's own earlier writes ahead of them, as on a
//! real bus.

use dirtymap::{Access, Iova};

use super::{Device, Posted};
use crate::error::{DmaError, FaultKind};
use crate::fmt::Format;
use crate::memory::Word;

/// The operand of an atomic operation: `u32` or `u64`, as PCI Express has them (PCI Express Base
/// Specification, "Atomic Operations"). Little endian in memory.
pub trait AtomicOperand: Word {}

impl AtomicOperand for u32 {}
impl AtomicOperand for u64 {}

impl<F: Format> Device<F> {
    /// Writes `bytes` from `iova` on: any length, any alignment, across pages. The bytes are
    /// posted: they land when the FIFO is full, when an invalidation drains it, before a read or an
    /// atomic operation, or in [`land_all`](Self::land_all). Never waits.
    ///
    /// # Errors
    /// [`DmaError`] at the first page that could not be written; the pages before it are written.
    pub fn write(&mut self, iova: Iova, bytes: &[u8]) -> Result<(), DmaError> {
        self.begin();
        self.stats.writes += 1;
        let mut rest = bytes;
        let mut at = iova;
        while !rest.is_empty() {
            let phys = self.translate(at, Access::Write)?;
            let (piece, tail) = rest.split_at(piece_at::<F>(at, rest.len()));
            self.post(phys, piece);
            rest = tail;
            if !rest.is_empty() {
                at = self.next(at, piece.len())?;
            }
        }
        Ok(())
    }

    /// Reads the bytes from `iova` on into `bytes`, after this device's earlier writes. Never
    /// waits.
    ///
    /// # Errors
    /// [`DmaError`] at the first page that could not be read; the pages before it are read.
    pub fn read(&mut self, iova: Iova, bytes: &mut [u8]) -> Result<(), DmaError> {
        self.begin();
        self.stats.reads += 1;
        self.land_all();
        let mut rest = bytes;
        let mut at = iova;
        while !rest.is_empty() {
            let phys = self.translate(at, Access::Read)?;
            let (piece, tail) = rest.split_at_mut(piece_at::<F>(at, rest.len()));
            let done = self.hardware.memory.read(phys, piece);
            debug_assert!(done.is_ok(), "mapped addresses are in memory");
            self.stats.bytes += piece.len() as u64;
            let done = piece.len();
            rest = tail;
            if !rest.is_empty() {
                at = self.next(at, done)?;
            }
        }
        Ok(())
    }

    /// Adds `value`, wrapping, to the operand at `iova` in one step, after this device's earlier
    /// writes; returns the old value. Sets D as a write does. Never waits.
    ///
    /// # Errors
    /// [`DmaError`] if `iova` is not a multiple of the operand's size, or the device may not both
    /// read and write there; then memory is unchanged.
    pub fn fetch_add<T: AtomicOperand>(&mut self, iova: Iova, value: T) -> Result<T, DmaError> {
        self.update(iova, |old: T| old.plus(value))
    }

    /// Replaces the operand at `iova` by `new` in one step if it equals `expected`, after this
    /// device's earlier writes; returns the old value. Sets D as a write does, even if nothing is
    /// replaced. Never waits.
    ///
    /// # Errors
    /// As [`fetch_add`](Self::fetch_add).
    pub fn compare_and_swap<T: AtomicOperand>(
        &mut self,
        iova: Iova,
        expected: T,
        new: T,
    ) -> Result<T, DmaError> {
        self.update(iova, |old| if old == expected { new } else { old })
    }

    fn update<T: Word>(&mut self, iova: Iova, change: impl Fn(T) -> T) -> Result<T, DmaError> {
        self.begin();
        self.stats.atomics += 1;
        self.land_all();
        if !iova.get().is_multiple_of(size_of::<T>() as u64) {
            return Err(self.fault(iova, FaultKind::Unaligned));
        }
        let phys = self.translate(iova, Access::ReadWrite)?;
        self.stats.bytes += size_of::<T>() as u64;
        let done = self.hardware.memory.update(phys, change);
        debug_assert!(done.is_ok(), "mapped addresses are in memory");
        Ok(done.unwrap_or_default())
    }

    /// The address `len` bytes further, where an access continues. A fault past 2^64 - 1.
    #[inline]
    fn next(&mut self, iova: Iova, len: usize) -> Result<Iova, DmaError> {
        iova.checked_add(len as u64)
            .ok_or_else(|| self.fault(Iova::MAX, FaultKind::TooWide))
    }

    /// Sends a translated write on its way.
    #[inline]
    fn post(&mut self, phys: u64, bytes: &[u8]) {
        self.stats.bytes += bytes.len() as u64;
        if self.depth == 0 {
            return self.land(phys, bytes);
        }
        if self.posted.len() >= self.depth {
            self.land_oldest();
        }
        let mut buffer = self.spare.pop().unwrap_or_default();
        buffer.extend_from_slice(bytes);
        self.posted.push_back(Posted {
            phys,
            bytes: buffer,
        });
    }

    pub(super) fn land_oldest(&mut self) {
        if let Some(Posted { phys, mut bytes }) = self.posted.pop_front() {
            self.land(phys, &bytes);
            bytes.clear();
            self.spare.push(bytes);
        }
    }

    fn land(&self, phys: u64, bytes: &[u8]) {
        let done = self.hardware.memory.write(phys, bytes);
        debug_assert!(done.is_ok(), "mapped addresses are in memory");
    }
}

/// The number of the `len` bytes from `iova` on that are in one smallest page, the unit in which a
/// device translates and posts.
#[inline]
fn piece_at<F: Format>(iova: Iova, len: usize) -> usize {
    let left = F::PAGE.bytes() - (iova.get() & F::PAGE.mask());
    len.min(left as usize)
}
