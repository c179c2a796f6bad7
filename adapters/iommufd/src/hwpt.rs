//! A page table with dirty tracking, as the source of a domain: its devices, its mappings, its
//! switch.

use std::io;
use std::sync::Arc;

use dirtymap::adapter::{Pending, words};
use dirtymap::flush::FlushGather;
use dirtymap::sync::{Mutex, lock};
use dirtymap::{IovaRange, Mapping};
use dirtymap_host::BitPool;

use crate::device::Device;
use crate::error::IommufdError;
use crate::ioas::{Ioas, Piece, State};
use crate::kernel::uninterrupted;
use crate::log::{self, Log};
use crate::table::{Kept, Table};

/// The most pages of a piece: the kernel pins the bits of this number of pages at a time.
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
    table: Arc<Table>,
    /// Held while tracking is switched.
    switch: Mutex<()>,
}

impl Ioas {
    /// A new page table with dirty tracking, for the IOMMU of a device. It is a source: attach it
    /// to an address space. What is mapped in this IOAS is mapped in it at once.
    ///
    /// # Errors
    /// In this order: [`IommufdError::CannotTrack`]; [`IommufdError::Call`] (`ENOENT`: there is no
    /// device of that number); [`IommufdError::PageTooSmall`]; [`IommufdError::BadPiece`];
    /// [`IommufdError::NoMemory`].
    pub fn hwpt(&self, device: u32) -> Result<Arc<Hwpt>, IommufdError> {
        let call = "IOMMU_HWPT_ALLOC";
        let id = uninterrupted(|| self.kernel().hwpt_alloc(device, self.id()));
        let id = id.map_err(|error| match error.raw_os_error() {
            Some(libc::EOPNOTSUPP) => IommufdError::CannotTrack { device, error },
            _ => IommufdError::call(call, error),
        })?;
        // The alignment is that of all page tables, so this one has to be there.
        let table = self.table(id).inspect_err(|_| {
            // An error of the clean-up says nothing new.
            let _ = self.kernel().destroy(id);
        })?;
        let table = Arc::new(table);
        self.lock().add(&table);
        Ok(Arc::new(Hwpt {
            ioas: self.clone(),
            table,
            switch: Mutex::new(()),
        }))
    }

    /// The page table `id`, if its pages and pieces fit.
    fn table(&self, id: u32) -> Result<Table, IommufdError> {
        let options = self.options();
        let smallest = self.alignment()?;
        let usual = smallest.max(dirtymap_host::page());
        let page = options.page.unwrap_or(usual);
        if page < smallest {
            return Err(IommufdError::PageTooSmall { page, smallest });
        }
        let piece = options.piece;
        let lg2 = piece.lg2().checked_sub(page.lg2());
        let Some(lg2) = lg2.filter(|lg2| *lg2 <= MAX_PAGES_LG2) else {
            return Err(IommufdError::BadPiece { piece, page });
        };
        let pool = BitPool::new((1usize << lg2).div_ceil(64)).map_err(|error| {
            let range = IovaRange::granule_at(dirtymap::Iova::MIN, piece);
            IommufdError::NoMemory { range, error }
        })?;
        let iommufd = self.iommufd().clone();
        Ok(Table::new(iommufd, id, page, options.on_unmap, pool))
    }
}

impl Hwpt {
    /// Its number in iommufd.
    pub fn id(&self) -> u32 {
        self.table.id
    }

    /// The IOAS that it belongs to.
    pub fn ioas(&self) -> &Ioas {
        &self.ioas
    }

    pub(crate) fn table(&self) -> &Table {
        &self.table
    }

    /// Lets `device` use this page table, by one step if it used another one until then. What the
    /// device wrote by the other one stays dirty there: keep that domain attached to the address
    /// space until it was harvested.
    ///
    /// Attach this page table to the address space first. What a device writes by a table that the
    /// space does not know is not reported.
    ///
    /// # Errors
    /// In this order: [`IommufdError::NotTracking`], [`IommufdError::NotMapped`], which may also
    /// come while another thread switches tracking or maps; [`IommufdError::DeviceRefused`];
    /// [`IommufdError::Call`]. Then the device uses the one that it used before.
    pub fn attach(&self, device: &impl Device) -> Result<(), IommufdError> {
        // The lock: no map, and no unmap that looks at the devices, comes meanwhile.
        let ioas = self.ioas.lock();
        self.check_known(&ioas)?;
        uninterrupted(|| device.attach(self.id())).map_err(|error| match error.raw_os_error() {
            Some(libc::EINVAL | libc::EOPNOTSUPP) => IommufdError::DeviceRefused {
                device: device.id(),
                hwpt: self.id(),
                error,
            },
            _ => IommufdError::call("the attach of a device", error),
        })?;
        self.ioas.iommufd().devices().insert(device.id(), self.id());
        Ok(())
    }

    /// Whether this table has all that others of the IOAS have, so that a harvest finds what its
    /// devices write.
    fn check_known(&self, ioas: &State) -> Result<(), IommufdError> {
        let hwpt = self.id();
        let tracking = ioas.tables().find(|other| other.logs().tracked);
        if let Some(other) = tracking.filter(|_| !self.table.logs().tracked) {
            let other = other.id;
            return Err(IommufdError::NotTracking { hwpt, other });
        }
        let missing = |piece: &&Piece| !piece.users.contains(&hwpt);
        match ioas.pieces.values().find(missing) {
            Some(piece) => {
                let range = piece.mapping.range;
                Err(IommufdError::NotMapped { hwpt, range })
            }
            None => Ok(()),
        }
    }

    /// Ends the use of this page table by `device`, which reaches no memory from then on. What it
    /// wrote stays dirty. A device whose file was closed (`EBADF`), or which has gone (`ENODEV`),
    /// is detached already, and the call succeeds.
    ///
    /// Call it before the last handle of the device is dropped. After that, see
    /// [`Iommufd::forget_device`](crate::Iommufd::forget_device).
    ///
    /// # Errors
    /// [`IommufdError::Call`].
    pub fn detach(&self, device: &impl Device) -> Result<(), IommufdError> {
        let _locked = self.ioas.lock();
        match uninterrupted(|| device.detach()) {
            // The file was closed, or the device has gone: with that the kernel detached it.
            Err(error) if !matches!(error.raw_os_error(), Some(libc::EBADF | libc::ENODEV)) => {
                Err(IommufdError::call("the detach of a device", error))
            }
            _ => {
                self.ioas.iommufd().forget_device(device.id());
                Ok(())
            }
        }
    }

    /// Switches tracking: see [`DirtySource::set_tracking`](dirtymap::DirtySource::set_tracking).
    pub(crate) fn switch(&self, on: bool) -> Result<(), IommufdError> {
        let _switch = lock(&self.switch);
        if self.table.logs().tracked == on {
            return Ok(());
        }
        let each_piece = |each: &dyn Fn(&Log, &mut log::State)| {
            let _ = self.table.for_each_log(IovaRange::ALL, |log, _| {
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
                if self.table.pull(log.range, state, true).is_err() {
                    state.pending.add_all();
                }
            });
        }
        uninterrupted(|| self.ioas.kernel().track(self.id(), on))
            .map_err(|error| IommufdError::call("IOMMU_HWPT_SET_DIRTY_TRACKING", error))?;
        if on {
            let ioas = self.ioas.lock(); // before the locks of logs
            each_piece(&|log, state| match std::mem::take(&mut state.copied) {
                true => self.keep_copied(&ioas, log, state),
                false => state.pending.clear(),
            });
        }
        self.table.logs().tracked = on;
        Ok(())
    }

    /// Maps one piece, or joins those that have it mapped.
    pub(crate) fn enter(&self, ioas: &mut State, piece: &Mapping) -> Result<(), IommufdError> {
        let range = piece.range;
        let start = range.start().get();
        let log = Log::new(range, self.table.page).map_err(|_| IommufdError::NoMemory {
            range,
            error: io::ErrorKind::OutOfMemory.into(),
        })?;
        let below = ioas.pieces.range_mut(..=range.last().get()).next_back();
        match below.map(|(_, there)| there) {
            Some(there) if there.mapping.range.intersects(range) => {
                if there.mapping != *piece || there.users.contains(&self.id()) {
                    return Err(IommufdError::Occupied { range });
                }
                there.users.push(self.id());
            }
            _ => {
                let kernel = self.ioas.kernel();
                uninterrupted(|| kernel.map(self.ioas.id(), piece))
                    .map_err(|error| map_error(piece, error))?;
                let (mapping, users) = (*piece, vec![self.id()]);
                ioas.pieces.insert(start, Piece { mapping, users });
            }
        }
        let mut logs = self.table.logs();
        logs.settle(start);
        // A piece that an unmap could not end is still there, with its pending pages.
        logs.by_start.entry(start).or_insert_with(|| Arc::new(log));
        Ok(())
    }

    /// Ends the mapping of one piece, and passes its dirty pages to `dirty`. Returns the reason if
    /// devices still reach it.
    pub(crate) fn leave(
        &self,
        ioas: &mut State,
        log: &Log,
        dirty: &mut dyn FnMut(IovaRange),
    ) -> Option<Kept> {
        let start = log.range.start().get();
        let mut state = log.state();
        if state.gone {
            return None;
        }
        self.table.last_look(log.range, &mut state);
        let is_last = match ioas.pieces.get_mut(&start) {
            Some(piece) => {
                piece.users.retain(|user| *user != self.id());
                piece.users.is_empty()
            }
            None => true,
        };
        let kept = match is_last {
            true => self.unmap(ioas, log, &mut state, dirty),
            false => self.table.has_devices().then_some(Kept::ByOther),
        };
        match kept {
            Some(kept) => {
                self.table.logs().kept.insert(start, kept);
            }
            None => {
                state.gone = true;
                self.table.forget(start);
            }
        }
        state.pending.drain(log.range, dirty);
        kept
    }

    /// Unmaps a piece that no other domain has.
    fn unmap(
        &self,
        ioas: &mut State,
        log: &Log,
        state: &mut log::State,
        dirty: &mut dyn FnMut(IovaRange),
    ) -> Option<Kept> {
        let start = log.range.start().get();
        // Other page tables whose devices reach it until now.
        let others = ioas.tables().filter(|other| other.id != self.id());
        let reached: Vec<_> = others
            .filter_map(|other| other.log_at(start).map(|log| (other, log)))
            .collect();
        for (other, log) in &reached {
            other.last_look(log.range, &mut log.state());
        }
        let unmap = || uninterrupted(|| self.ioas.kernel().unmap(self.ioas.id(), log.range));
        let unmapped = unmap().or_else(|error| match error.raw_os_error() {
            // Nothing is mapped there, if the kernel says so twice.
            Some(libc::ENOENT) => unmap(),
            _ => Err(error),
        });
        if let Err(error) = unmapped {
            // The unmap failed, so which pages were dirty is unknown: all of them are.
            state.pending.add_all();
            if error.raw_os_error() != Some(libc::ENOENT) {
                // It stays: with one user, which asks again.
                if let Some(piece) = ioas.pieces.get_mut(&start) {
                    piece.users.push(self.id());
                }
                return Some(Kept::ByKernel);
            }
        }
        ioas.pieces.remove(&start);
        for (other, log) in reached {
            let mut state = log.state();
            state.gone = true;
            state.pending.drain(log.range, dirty);
            other.forget(start);
        }
        None
    }

    /// Tries to end the mappings that an unmap could not end: those that are owed in `gather`, and
    /// those whose map failed. A map has no gather, and tries those of its own kind that the
    /// kernel refused to end.
    ///
    /// An unmap reports dirty pages once. What a device wrote after it is recorded elsewhere:
    /// * The kernel refused: the unmap reported all of the piece as dirty. No flush succeeds before
    ///   this call does, so no lease with these pages is synced.
    /// * Another domain keeps it mapped: its table records the page as well, see
    ///   [`copy_to_other`](Self::copy_to_other).
    ///
    /// # Errors
    /// [`IommufdError::StillMapped`], [`IommufdError::DevicesAttached`]: the first that cannot be
    /// ended.
    pub(crate) fn leave_kept(
        &self,
        ioas: &mut State,
        gather: Option<&FlushGather>,
    ) -> Result<(), IommufdError> {
        let kept: Vec<_> = {
            let logs = self.table.logs();
            let is_due = |start: &u64, log: &Log, kept: Kept| match gather {
                None => kept == Kept::ByKernel && logs.undone.contains(start),
                Some(gather) => {
                    let mut owed = gather.ranges().iter();
                    logs.undone.contains(start) || owed.any(|owed| owed.intersects(log.range))
                }
            };
            let due = logs.kept.iter().filter_map(|(start, kept)| {
                let log = logs.by_start.get(start);
                let log = log.filter(|log| is_due(start, log, *kept));
                Some((Arc::clone(log?), *kept))
            });
            due.collect()
        };
        for (log, kept) in kept {
            let range = log.range;
            let left = match kept {
                Kept::ByKernel => self.leave(ioas, &log, &mut |_| ()),
                Kept::ByOther if self.table.has_devices() => Some(kept),
                Kept::ByOther => {
                    self.copy_to_other(ioas, &log);
                    None
                }
            };
            match left {
                None => (),
                Some(Kept::ByKernel) => return Err(IommufdError::StillMapped { range }),
                Some(Kept::ByOther) => {
                    return Err(IommufdError::DevicesAttached {
                        hwpt: self.id(),
                        devices: self.table.devices(),
                        range,
                    });
                }
            }
        }
        Ok(())
    }

    /// Ends a piece that no device of this table reaches any more, and that another domain keeps
    /// mapped. Its dirty pages are recorded in the table of that domain, and **stay** in this one:
    /// a harvest that is under way may have read the other table, and reads this one next. So they
    /// may be reported twice. This table knows them until the piece is unmapped or mapped again.
    fn copy_to_other(&self, ioas: &State, log: &Log) {
        let start = log.range.start().get();
        let mut state = log.state();
        self.table.last_look(log.range, &mut state);
        if let Some(other) = ioas.other_user(self.id(), start) {
            // The pages of two tables may be of two sizes. The lock of the IOAS orders the locks
            // of two logs.
            let pages = state.pending.words().to_vec();
            let mut other = other.state();
            let mut add = |run| other.pending.add_range(run);
            state.pending.drain(log.range, &mut add);
            state.pending.add_words(0, &pages);
            state.copied = true;
        }
        self.table.logs().settle(start);
    }

    /// Keeps the pending pages of a piece that are pending in another table, too, and forgets the
    /// others. For a table that is attached again after [`copy_to_other`](Self::copy_to_other): a
    /// harvest that read the other table before the copy has yet to read this one. A page that is
    /// not pending there any more has been reported.
    fn keep_copied(&self, ioas: &State, log: &Log, state: &mut log::State) {
        let Ok(mut theirs) = Pending::new(log.range, self.table.page) else {
            return; // without memory all of them stay, and may be reported twice
        };
        for other in ioas.tables().filter(|other| other.id != self.id()) {
            let other = other.log_at(log.range.start().get());
            if let Some(other) = &other {
                let other = other.state();
                let runs = other.pending.words();
                let last = other.pending.pages() - 1;
                let mut next = words::next_run(runs, 0, last);
                while let Some((first, to)) = next {
                    theirs.add_range(other.pending.addresses(first, to));
                    next = words::next_run(runs, to + 1, last);
                }
            }
        }
        let gone: Vec<u64> = theirs.words().iter().map(|word| !word).collect();
        state.pending.remove_words(0, &gone);
    }
}

impl Drop for Hwpt {
    fn drop(&mut self) {
        let ioas = self.ioas.clone();
        let mut state = ioas.lock();
        let logs = std::mem::take(&mut self.table.logs().by_start);
        for log in logs.into_values() {
            // No call asks for dirty pages any more.
            let _ = self.leave(&mut state, &log, &mut |_| ());
        }
        // A page table that devices use stays until the file is closed.
        let _ = ioas.kernel().destroy(self.id());
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
        _ => IommufdError::call("IOMMU_IOAS_MAP", error),
    }
}
