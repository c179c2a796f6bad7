//! What a page table has mapped, and what it knows to be dirty.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use dirtymap::sync::{Mutex, MutexGuard, lock};
use dirtymap::{Granule, IovaRange};
use dirtymap_host::BitPool;

use crate::error::{IommufdError, TRIES};
use crate::iommufd::Iommufd;
use crate::kernel::uninterrupted;
use crate::log::{self, Log};
use crate::options::OnUnmap;

/// A page table, as the others of its IOAS see it.
#[derive(Debug)]
pub(crate) struct Table {
    iommufd: Iommufd,
    pub(crate) id: u32,
    /// The bytes that one bit of the kernel's answers stands for.
    pub(crate) page: Granule,
    on_unmap: OnUnmap,
    pool: BitPool,
    logs: Mutex<Logs>,
}

/// The pieces that the domain has mapped. Its lock is taken after every other one, and not held
/// during calls of the kernel.
#[derive(Debug, Default)]
pub(crate) struct Logs {
    /// By their first addresses; they do not overlap.
    pub(crate) by_start: BTreeMap<u64, Arc<Log>>,
    /// Those that an unmap could not end.
    pub(crate) kept: BTreeMap<u64, Kept>,
    /// Those of them whose map failed. No gather owes them, so every flush tries again.
    pub(crate) undone: BTreeSet<u64>,
    /// Whether the kernel tracks.
    pub(crate) tracked: bool,
}

impl Logs {
    /// An unmap has ended the piece at `start`, or a map has it again.
    pub(crate) fn settle(&mut self, start: u64) {
        self.kept.remove(&start);
        self.undone.remove(&start);
    }
}

/// Why devices of the page table still reach a piece after an unmap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kept {
    /// Another domain keeps it mapped.
    ByOther,
    /// The kernel refused.
    ByKernel,
}

impl Table {
    pub(crate) fn new(
        iommufd: Iommufd,
        id: u32,
        page: Granule,
        on_unmap: OnUnmap,
        pool: BitPool,
    ) -> Self {
        Table {
            iommufd,
            id,
            page,
            on_unmap,
            pool,
            logs: Mutex::new(Logs::default()),
        }
    }

    /// The devices that use this page table, ascending.
    pub(crate) fn devices(&self) -> Vec<u32> {
        let devices = self.iommufd.devices();
        let mine = devices.iter().filter(|(_, table)| **table == self.id);
        mine.map(|(device, _)| *device).collect()
    }

    pub(crate) fn has_devices(&self) -> bool {
        !self.devices().is_empty()
    }

    pub(crate) fn logs(&self) -> MutexGuard<'_, Logs> {
        lock(&self.logs)
    }

    /// The first piece at or above `from` that touches `range`, and whether the kernel tracks.
    pub(crate) fn log_from(&self, from: u64, range: IovaRange) -> Option<(Arc<Log>, bool)> {
        let logs = self.logs();
        let below = logs.by_start.range(..=from).next_back();
        let below = below.filter(|(_, log)| log.range.last().get() >= from);
        let found = below.or_else(|| logs.by_start.range(from..).next());
        let (_, log) = found.filter(|(_, log)| log.range.intersects(range))?;
        Some((Arc::clone(log), logs.tracked))
    }

    /// Calls `each` with the pieces that touch `range`, ascending, until it fails.
    pub(crate) fn for_each_log<E>(
        &self,
        range: IovaRange,
        mut each: impl FnMut(&Arc<Log>, bool) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut from = Some(range.start().get());
        while let Some((log, tracked)) = from.and_then(|from| self.log_from(from, range)) {
            each(&log, tracked)?;
            from = log.range.last().get().checked_add(1);
        }
        Ok(())
    }

    /// Moves what the kernel knows to be dirty in a piece to what is pending. Without `clear` the
    /// kernel knows it still.
    ///
    /// # Errors
    /// After [`IommufdError::BitmapNotPresent`] the kernel was not asked. After all others it may
    /// have cleared something that it did not tell, if it was to clear: then all is pending.
    pub(crate) fn pull(
        &self,
        range: IovaRange,
        state: &mut log::State,
        clear: bool,
    ) -> Result<(), IommufdError> {
        let words = state.pending.words().len();
        let mut tries = 0;
        let pulled = self.pool.with(words, |bits| {
            let kernel = self.iommufd.kernel();
            let done = uninterrupted(|| {
                tries += 1;
                kernel.dirty(self.id, range, self.page, clear, bits)
            });
            // What an interrupted call told is in the bits, too: the kernel only adds.
            state.pending.add_words(0, bits);
            done
        });
        let done = match pulled {
            Ok(done) => done,
            Err(error) => return Err(IommufdError::BitmapNotPresent { range, error }),
        };
        if clear && (done.is_err() || tries > 1) {
            state.pending.add_all();
        }
        let hwpt = self.id;
        done.map_err(|error| match error.raw_os_error() {
            Some(libc::EINTR) => IommufdError::Interrupted {
                call: "IOMMU_HWPT_GET_DIRTY_BITMAP",
                times: TRIES,
            },
            Some(libc::ENODEV | libc::ENXIO | libc::ENOENT) => {
                IommufdError::Gone { hwpt, range, error }
            }
            _ => IommufdError::Unknown { hwpt, range, error },
        })
    }

    /// What is known of the piece at `start`.
    pub(crate) fn log_at(&self, start: u64) -> Option<Arc<Log>> {
        self.logs().by_start.get(&start).cloned()
    }

    /// Forgets the piece at `start`.
    pub(crate) fn forget(&self, start: u64) {
        let mut logs = self.logs();
        logs.settle(start);
        logs.by_start.remove(&start);
    }

    /// What is dirty in a piece becomes pending, before it is unmapped.
    pub(crate) fn last_look(&self, range: IovaRange, state: &mut log::State) {
        if state.gone || !self.logs().tracked {
            return;
        }
        let known = match self.on_unmap {
            OnUnmap::Asked => self.pull(range, state, false).is_ok(),
            OnUnmap::Everything => false,
        };
        if !known {
            state.pending.add_all();
        }
    }
}
