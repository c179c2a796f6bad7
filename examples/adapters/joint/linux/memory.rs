//! Memory that is written from outside: mapped, and accessed word by word, or bit by bit.

use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};

use memmap2::{Advice, MmapMut, MmapOptions, MmapRaw};

/// A mapping that others write to at the same time: a guest, or another process.
pub(crate) struct Shared(MmapRaw);

impl Shared {
    /// Zeroed memory of this process, in small pages: those that are written are told apart.
    pub(crate) fn zeroed(bytes: u64) -> io::Result<Self> {
        let memory = MmapMut::map_anon(bytes as usize)?;
        // A kernel without huge pages does not know the advice, and needs none.
        let _ = memory.advise(Advice::NoHugePage);
        Ok(Shared(memory.into()))
    }

    /// The first `bytes` bytes of a file, as a back end maps the log that it was sent.
    pub(crate) fn of(file: &File, bytes: u64) -> io::Result<Self> {
        MmapOptions::new()
            .len(bytes as usize)
            .map_raw(file)
            .map(Shared)
    }

    pub(crate) fn address(&self) -> u64 {
        self.0.as_mut_ptr().addr() as u64
    }

    /// The memory as words.
    pub(crate) fn words(&self) -> &[AtomicU64] {
        let first = self.0.as_mut_ptr().cast::<AtomicU64>();
        // SAFETY:
        // - valid and initialized for `len` bytes, aligned to a page: it is a mapping, which lives
        //   as long as `self`.
        // - shared: this process accesses it through atomics of this size only, as far as it is
        //   memory of the guest; what guests do is outside of the program.
        unsafe { std::slice::from_raw_parts(first, self.0.len() / 8) }
    }

    /// Sets bit `bit` of byte `byte`, as the protocol of vhost says: atomically, after the write.
    pub(crate) fn set_bit(&self, byte: u64, bit: u64) {
        assert!((byte as usize) < self.0.len());
        let at = self.0.as_mut_ptr().wrapping_add(byte as usize);
        // SAFETY:
        // - valid for the lifetime of `self`: inside the mapping, as was checked.
        // - shared: back ends access a log by bytes, atomically; the front end's own mapping is
        //   another one.
        let at = unsafe { AtomicU8::from_ptr(at) };
        // Release: pairs with the exchange of the harvest; a thread that sees the bit sees the
        // data.
        at.fetch_or(1 << bit, Ordering::Release);
    }
}
