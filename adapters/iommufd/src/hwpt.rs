//! A page table with dirty tracking: what it has mapped, and what it knows to be dirty.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;

use dirtymap::flush::FlushGather;
use dirtymap::sync::{Mutex, MutexGuard, lock};
use dirtymap::{Granule, IovaRange, Mapping};

use crate::device::Device;
use crate::error::IommufdError;
use crate::ioas::{Ioas, Locked, OnUnmap, Piece};
use crate::kernel::{TRIES, uninterrupted};
use crate::log::{self, Log};
use crate::scratch::Pool;

/// The most pages of a piece: the bits of as many are what the kernel pins at a time.
const MAX_PAGES_LG2: u8 = 24;

/// A page table of the kernel (HWPT) that tracks: the source of one domain. Made by
/// [`Ioas::hwpt`], attached to an [`AddressSpace`](dirtymap::AddressSpace).
///
/// Several page tables of one IOAS are several domains of one address space. Each of them is to be
/// attached to it. Devices of one of them reach what another one maps a moment earlier, and until
/// the last one unmaps. What they write until then is reported by the last one.
#[derive(Debug)]
pub struct Hwpt {
    ioas: Ioas,
    id: u32,
    page: Granule,
    pool: Pool,
    logs: Mutex<Logs>,
    /// Held while tracking is switched.
    switch: Mutex<()>,
}

/// The pieces that the domain has mapped. Its lock is taken after every other one, and not held
/// during calls of the kernel.
#[derive(Debug, Default)]
pub(crate) struct Logs {
    /// By their first addresses; they do not overlap.
    pub(crate) by_start: BTreeMap<u64, Arc<Log>>,
    /// Those that an unmap could not end.
    pub(crate) kept: BTreeMap<u64, Kept>,
    /// Whether the kernel tracks.
    pub(crate) tracked: bool,
}

/// Why devices of the page table still reach a piece after an unmap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kept {
    /// Another domain keeps it mapped.
    ByOther,
    /// The kernel refused.
    ByKernel,
}

impl Hwpt {
    pub(crate) fn new(ioas: Ioas, device: u32) -> Result<Arc<Self>, IommufdError> {
        let call = "IOMMU_HWPT_ALLOC";
        let id =
            uninterrupted(|| ioas.kernel().hwpt_alloc(device, ioas.id())).map_err(|error| {
                match error.raw_os_error() {
                    Some(libc::EOPNOTSUPP) => IommufdError::CannotTrack { device, error },
                    _ => IommufdError::call(call, error),
                }
            })?;
        // The alignment is that of all page tables, so this one has to be there.
        Self::checked(&ioas, id).inspect_err(|_| {
            // An error of the clean-up says nothing new.
            let _ = ioas.kernel().destroy(id);
        })
    }

    fn checked(ioas: &Ioas, id: u32) -> Result<Arc<Self>, IommufdError> {
        let smallest = ioas.alignment()?;
        let page = ioas
            .options()
            .page
            .unwrap_or(smallest.max(dirtymap_host::page()));
        if page < smallest {
            return Err(IommufdError::PageTooSmall { page, smallest });
        }
        let piece = ioas.options().piece;
        let lg2 = piece.lg2().checked_sub(page.lg2());
        let Some(lg2) = lg2.filter(|lg2| *lg2 <= MAX_PAGES_LG2) else {
            return Err(IommufdError::BadPiece { piece, page });
        };
        let pool = Pool::new((1usize << lg2).div_ceil(64)).map_err(|error| {
            let range = IovaRange::granule_at(dirtymap::Iova::MIN, piece);
            IommufdError::NoMemory { range, error }
        })?;
        Ok(Arc::new(Hwpt {
            ioas: ioas.clone(),
            id,
            page,
            pool,
            logs: Mutex::new(Logs::default()),
            switch: Mutex::new(()),
        }))
    }

    /// Its number in iommufd.
    pub fn id(&self) -> u32 {
        self.id
    }

    /// The IOAS that it belongs to.
    pub fn ioas(&self) -> &Ioas {
        &self.ioas
    }

    /// The bytes that one bit of the kernel's answers stands for.
    pub(crate) fn page_size(&self) -> Granule {
        self.page
    }

    /// Lets `device` use this page table, by one step if it used another one until then. What the
    /// device wrote by the other one stays dirty there: keep that domain attached to the address
    /// space until it was harvested.
    ///
    /// # Errors
    /// [`IommufdError::DeviceRefused`]; [`IommufdError::Call`]. Then the device uses the one that
    /// it used before.
    pub fn attach(&self, device: &impl Device) -> Result<(), IommufdError> {
        // The lock: no unmap looks at the devices meanwhile.
        let _locked = self.ioas.lock();
        uninterrupted(|| device.attach(self.id)).map_err(|error| match error.raw_os_error() {
            Some(libc::EINVAL | libc::EOPNOTSUPP) => IommufdError::DeviceRefused {
                device: device.id(),
                hwpt: self.id,
                error,
            },
            _ => IommufdError::call("the attach of a device", error),
        })?;
        self.ioas.iommufd().devices().insert(device.id(), self.id);
        Ok(())
    }

    /// Ends the use of this page table by `device`, which reaches no memory from then on. What it
    /// wrote stays dirty.
    ///
    /// # Errors
    /// [`IommufdError::Call`].
    pub fn detach(&self, device: &impl Device) -> Result<(), IommufdError> {
        let _locked = self.ioas.lock();
        uninterrupted(|| device.detach())
            .map_err(|error| IommufdError::call("the detach of a device", error))?;
        self.ioas.iommufd().devices().remove(&device.id());
        Ok(())
    }

    fn has_devices(&self) -> bool {
        let devices = self.ioas.iommufd().devices();
        devices.values().any(|hwpt| *hwpt == self.id)
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
            let kernel = self.ioas.kernel();
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

    /// Switches tracking: see [`DirtySource::set_tracking`](dirtymap::DirtySource::set_tracking).
    pub(crate) fn switch(&self, on: bool) -> Result<(), IommufdError> {
        let _switch = lock(&self.switch);
        if self.logs().tracked == on {
            return Ok(());
        }
        let each_piece = |each: &dyn Fn(&Log, &mut log::State)| {
            let _ = self.for_each_log(IovaRange::ALL, |log, _| {
                let mut state = log.state();
                if !state.gone {
                    each(log, &mut state);
                }
                Ok::<(), std::convert::Infallible>(())
            });
        };
        if !on {
            // Once it is off, some kernels do not answer.
            each_piece(&|log, state| {
                if self.pull(log.range, state, true).is_err() {
                    state.pending.add_all();
                }
            });
        }
        uninterrupted(|| self.ioas.kernel().track(self.id, on))
            .map_err(|error| IommufdError::call("IOMMU_HWPT_SET_DIRTY_TRACKING", error))?;
        if on {
            each_piece(&|_, state| state.pending.clear());
        }
        self.logs().tracked = on;
        Ok(())
    }

    /// Maps one piece, or joins those that have it mapped.
    pub(crate) fn enter(&self, ioas: &mut Locked<'_>, piece: &Mapping) -> Result<(), IommufdError> {
        let range = piece.range;
        let start = range.start().get();
        let log = Log::new(range, self.page).map_err(|_| IommufdError::NoMemory {
            range,
            error: io::ErrorKind::OutOfMemory.into(),
        })?;
        let below = ioas
            .state
            .pieces
            .range_mut(..=range.last().get())
            .next_back();
        match below.map(|(_, there)| there) {
            Some(there) if there.mapping.range.intersects(range) => {
                if there.mapping != *piece || there.users.contains(&self.id) {
                    return Err(IommufdError::Occupied { range });
                }
                there.users.push(self.id);
            }
            _ => {
                let kernel = self.ioas.kernel();
                uninterrupted(|| kernel.map(self.ioas.id(), piece))
                    .map_err(|error| map_error(piece, error))?;
                let (mapping, users) = (*piece, vec![self.id]);
                ioas.state.pieces.insert(start, Piece { mapping, users });
            }
        }
        let mut logs = self.logs();
        logs.kept.remove(&start);
        // One that an unmap could not end is still there, with what it knows.
        logs.by_start.entry(start).or_insert_with(|| Arc::new(log));
        Ok(())
    }

    /// Ends the mapping of one piece, and tells `dirty` what is dirty in it. Returns why devices
    /// reach it still.
    pub(crate) fn leave(
        &self,
        ioas: &mut Locked<'_>,
        log: &Log,
        dirty: &mut dyn FnMut(IovaRange),
    ) -> Option<Kept> {
        let start = log.range.start().get();
        let mut state = log.state();
        if state.gone {
            return None;
        }
        self.last_look(log.range, &mut state);
        let is_last = match ioas.state.pieces.get_mut(&start) {
            Some(piece) => {
                piece.users.retain(|user| *user != self.id);
                piece.users.is_empty()
            }
            None => true,
        };
        let kept = match is_last {
            true => self.unmap(ioas, log, &mut state, dirty),
            false => self.has_devices().then_some(Kept::ByOther),
        };
        let mut logs = self.logs();
        match kept {
            Some(kept) => {
                logs.kept.insert(start, kept);
            }
            None => {
                state.gone = true;
                logs.kept.remove(&start);
                logs.by_start.remove(&start);
            }
        }
        drop(logs);
        state.pending.drain(log.range, dirty);
        kept
    }

    /// Unmaps a piece that no other domain has.
    fn unmap(
        &self,
        ioas: &mut Locked<'_>,
        log: &Log,
        state: &mut log::State,
        dirty: &mut dyn FnMut(IovaRange),
    ) -> Option<Kept> {
        let start = log.range.start().get();
        // Other page tables whose devices reach it until now.
        let others = ioas.hwpts().iter().filter(|other| other.id != self.id);
        let reached: Vec<_> = others
            .filter_map(|other| {
                let log = other.logs().by_start.get(&start).cloned();
                log.map(|log| (Arc::clone(other), log))
            })
            .collect();
        for (other, log) in &reached {
            other.last_look(log.range, &mut log.state());
        }
        let unmap = || uninterrupted(|| self.ioas.kernel().unmap(self.ioas.id(), log.range));
        let unmapped = unmap().or_else(|error| match error.raw_os_error() {
            // Nothing is there: true if it is said twice.
            Some(libc::ENOENT) => unmap(),
            _ => Err(error),
        });
        if let Err(error) = unmapped {
            // Whatever is mapped there: what was dirty is not known.
            state.pending.add_all();
            if error.raw_os_error() != Some(libc::ENOENT) {
                // It stays: with one user, which asks again.
                if let Some(piece) = ioas.state.pieces.get_mut(&start) {
                    piece.users.push(self.id);
                }
                return Some(Kept::ByKernel);
            }
        }
        ioas.state.pieces.remove(&start);
        for (other, log) in reached {
            let mut state = log.state();
            state.gone = true;
            state.pending.drain(log.range, dirty);
            let mut logs = other.logs();
            logs.kept.remove(&start);
            logs.by_start.remove(&start);
        }
        None
    }

    /// Ends what an unmap could not end, as far as it is owed in `gather`.
    ///
    /// An unmap cannot tell what was dirty twice, so what a device wrote since is kept elsewhere:
    /// * The kernel refused: the unmap called all of the piece dirty. Until this succeeds, no flush
    ///   does, so no lease with these pages is synced.
    /// * Another domain keeps it mapped: that domain tells it.
    ///
    /// # Errors
    /// [`IommufdError::StillMapped`], [`IommufdError::DevicesAttached`]: the first that cannot be
    /// ended.
    pub(crate) fn leave_kept(&self, gather: &FlushGather) -> Result<(), IommufdError> {
        let mut ioas = self.ioas.lock();
        let owed = |log: &Arc<Log>| {
            gather
                .ranges()
                .iter()
                .any(|owed| owed.intersects(log.range))
        };
        let kept: Vec<_> = {
            let logs = self.logs();
            let log = |start| logs.by_start.get(start).filter(|log| owed(log)).cloned();
            let kept = logs.kept.iter();
            kept.filter_map(|(start, kept)| Some((log(start)?, *kept)))
                .collect()
        };
        for (log, kept) in kept {
            let heir = match kept {
                Kept::ByKernel => None,
                Kept::ByOther => ioas.other_user(self.id, log.range.start().get()),
            };
            let left = self.leave(&mut ioas, &log, &mut |run| {
                if let Some(heir) = &heir {
                    heir.state().pending.add_range(run);
                }
            });
            let range = log.range;
            match left {
                None => (),
                Some(Kept::ByKernel) => return Err(IommufdError::StillMapped { range }),
                Some(Kept::ByOther) => {
                    return Err(IommufdError::DevicesAttached {
                        hwpt: self.id,
                        range,
                    });
                }
            }
        }
        Ok(())
    }

    /// What is dirty in a piece becomes pending, before it is unmapped.
    fn last_look(&self, range: IovaRange, state: &mut log::State) {
        if state.gone || !self.logs().tracked {
            return;
        }
        let known = match self.ioas.options().on_unmap {
            OnUnmap::Asked => self.pull(range, state, false).is_ok(),
            OnUnmap::Everything => false,
        };
        if !known {
            state.pending.add_all();
        }
    }
}

impl Drop for Hwpt {
    fn drop(&mut self) {
        let ioas = self.ioas.clone();
        let mut state = ioas.lock();
        let logs = std::mem::take(&mut self.logs().by_start);
        for log in logs.into_values() {
            // Nobody asks for what is dirty any more.
            let _ = self.leave(&mut state, &log, &mut |_| ());
        }
        // A page table that devices use stays until the file is closed.
        let _ = ioas.kernel().destroy(self.id);
    }
}

/// Why a piece was not mapped.
fn map_error(piece: &Mapping, error: io::Error) -> IommufdError {
    let (range, backing) = (piece.range, piece.backing);
    match error.raw_os_error() {
        Some(libc::EEXIST) => IommufdError::Occupied { range },
        Some(libc::EINVAL | libc::EOVERFLOW | libc::EADDRINUSE) => {
            IommufdError::NotUsable { range, error }
        }
        Some(libc::EFAULT | libc::EPERM) => IommufdError::NotMemory {
            range,
            backing,
            error,
        },
        Some(libc::ENOMEM) => IommufdError::NoMemory { range, error },
        Some(libc::EINTR) => IommufdError::Interrupted {
            call: "IOMMU_IOAS_MAP",
            times: TRIES,
        },
        _ => IommufdError::call("IOMMU_IOAS_MAP", error),
    }
}
