//! One memory slot: what KVM and this process know of its dirty pages.

use std::io;

use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, kvm_userspace_memory_region};

use super::error::KvmError;
use super::ioctl::Kernel;
use super::{KvmMode, MAX_PAGES};
use dirtymap::adapter::words::{clear, next_run, set};
use dirtymap::adapter::{Pending, Placed};
use dirtymap::bitmap::Sink;
use dirtymap::source::{LeafSink, Stopped};
use dirtymap::sync::{AtomicBool, Mutex, MutexGuard, Ordering, lock};
use dirtymap::{Error, Granule, Iova, IovaRange};

/// Words of one KVM_CLEAR_DIRTY_LOG, for which KVM holds the lock of its page tables: 65536 pages,
/// 256 MiB of 4 KiB.
const CLEAR_WORDS: usize = 1024;

/// A slot that was added.
pub(super) struct Slot {
    pub(super) id: u32,
    guest: IovaRange,
    host: u64,
    page: Granule,
    state: Mutex<State>,
    /// Whether the slot was removed from KVM.
    gone: AtomicBool,
}

struct State {
    /// Pages that are dirty, and that KVM may have cleared in its log.
    pending: Pending,
    /// Where KVM writes its log.
    log: Vec<u64>,
    /// Whether KVM keeps a log.
    logging: bool,
}

impl Placed for Slot {
    fn range(&self) -> IovaRange {
        #[cfg(test)]
        dirtymap_host::counted::one();
        self.guest
    }
}

impl Slot {
    /// Checks a slot; KVM does not know it yet.
    pub(super) fn new(
        id: u32,
        guest: IovaRange,
        host: u64,
        page: Granule,
    ) -> Result<Self, KvmError> {
        if !guest.is_aligned(page) || host & page.mask() != 0 {
            return Err(KvmError::Unaligned {
                slot: id,
                guest,
                host,
                page,
            });
        }
        let pages = guest.granules(page);
        if pages > u128::from(MAX_PAGES) {
            return Err(KvmError::TooLarge {
                slot: id,
                pages,
                limit: MAX_PAGES,
            });
        }
        let bytes = guest.last().get() - guest.start().get();
        if host.checked_add(bytes).is_none() {
            return Err(KvmError::HostWraps { slot: id, host });
        }
        // `MAX_PAGES` bits at most.
        let words = pages.div_ceil(64) as usize;
        let no_memory = |_| KvmError::NoMemory { slot: id, words };
        let mut log = Vec::new();
        log.try_reserve_exact(words).map_err(no_memory)?;
        log.resize(words, 0);
        let state = State {
            pending: Pending::new(guest, page).map_err(no_memory)?,
            log,
            logging: false,
        };
        Ok(Slot {
            id,
            guest,
            host,
            page,
            state: Mutex::new(state),
            gone: AtomicBool::new(false),
        })
    }

    /// Which of KVM's address spaces it is a slot of: 1 is that of system management mode.
    pub(super) fn space(&self) -> u32 {
        self.id >> 16
    }

    /// Tells KVM of the slot, or that its log is switched.
    ///
    /// # Safety
    /// As [`KvmLog::add_slot`](super::KvmLog::add_slot) says.
    pub(super) unsafe fn set(&self, kernel: &dyn Kernel, logging: bool) -> Result<(), KvmError> {
        let mut state = self.state();
        // SAFETY: by the caller.
        unsafe { self.set_region(kernel, logging) }?;
        state.logging = logging;
        Ok(())
    }

    /// Ends the log of KVM. The pages that it has now stay pending.
    ///
    /// # Safety
    /// As for [`set`](Self::set).
    pub(super) unsafe fn stop(&self, kernel: &dyn Kernel, mode: KvmMode) -> Result<(), KvmError> {
        let mut state = self.state();
        self.collect_last(&mut state, kernel, mode)?;
        // SAFETY: by the caller.
        unsafe { self.set_region(kernel, false) }?;
        state.logging = false;
        Ok(())
    }

    /// Takes the slot from the guest. What its log says stays pending.
    pub(super) fn delete(&self, kernel: &dyn Kernel, mode: KvmMode) -> Result<(), KvmError> {
        let mut state = self.state();
        self.collect_last(&mut state, kernel, mode)?;
        let mut region = self.region(state.logging);
        region.memory_size = 0;
        // SAFETY: a region without size gives the guest nothing.
        unsafe { kernel.set_region(&region) }
            .map_err(|error| self.failed("KVM_SET_USER_MEMORY_REGION", error))?;
        state.logging = false;
        Ok(())
    }

    /// The slot was removed from KVM, and the rings get no more entries of it.
    pub(super) fn bury(&self) {
        // Relaxed: calls by the number of a slot hold the lock of the list's changes; to a ring it
        // is a hint.
        self.gone.store(true, Ordering::Relaxed);
    }

    /// Hands what is dirty in `part`, which lies in the slot, to `out`.
    pub(super) fn take(
        &self,
        kernel: &dyn Kernel,
        mode: KvmMode,
        part: IovaRange,
        out: &mut LeafSink<'_, '_>,
    ) -> Result<(), Stopped> {
        let mut state = self.state();
        if mode.is_manual() && state.logging {
            return self.take_seen(&mut state, kernel, part, out);
        }
        self.collect(&mut state, kernel, mode)
            .map_err(|error| self.stopped("KVM_GET_DIRTY_LOG", part.start(), error))?;
        state.pending.take(part, out)
    }

    /// GET clears nothing, so: look, record, and then clear exactly what was recorded. What the
    /// guest writes between the look and the clear is cleared with it, and recorded, and copied
    /// after the clear.
    fn take_seen(
        &self,
        state: &mut State,
        kernel: &dyn Kernel,
        part: IovaRange,
        out: &mut LeafSink<'_, '_>,
    ) -> Result<(), Stopped> {
        let Some((first, last)) = state.pending.numbers(part) else {
            return Ok(());
        };
        self.look(state, kernel)
            .map_err(|error| self.stopped("KVM_GET_DIRTY_LOG", part.start(), error))?;
        let State { pending, log, .. } = state;
        keep_only(log, first, last);
        let asked = (last / 64 + 1) as usize;
        for begin in ((first / 64) as usize..asked).step_by(CLEAR_WORDS) {
            let end = asked.min(begin + CLEAR_WORDS);
            let Some((from, to)) = hull(log, begin, end) else {
                continue;
            };
            let pages = (from as u64 * 64, to as u64 * 64 - 1);
            let mut next = pages.0;
            while let Some(run) = next_run(log, next, pages.1) {
                let addresses = pending.addresses(run.0, run.1);
                let mut refused = None;
                let to_clear = out.take_run(addresses, self.page, |page| {
                    if let Err(stopped) = self.clear_page(kernel, pending, page) {
                        refused.get_or_insert(stopped);
                    }
                    // Of a page that stays dirty, the rest is kept as well: a superset.
                    true
                })?;
                // KVM clears what was recorded with the other runs of its piece, below.
                let recorded = to_clear.range().and_then(|range| pending.numbers(range));
                if recorded != Some(run) {
                    clear(log, run.0, run.1);
                    if let Some((first, last)) = recorded {
                        set(log, first, last);
                    }
                }
                if let Some(stopped) = refused {
                    return Err(stopped);
                }
                next = run.1 + 1;
            }
            let Some((from, to)) = hull(log, from, to) else {
                continue;
            };
            self.clear_words(kernel, pending, from as u64 * 64, &log[from..to])
                .map_err(|error| {
                    let at = pending
                        .addresses(from as u64 * 64, from as u64 * 64)
                        .start();
                    self.stopped("KVM_CLEAR_DIRTY_LOG", at.max(part.start()), error)
                })?;
        }
        Ok(())
    }

    /// Has KVM clear the pages of `mask`, whose bit 0 is page `first`, a multiple of 64.
    fn clear_words(
        &self,
        kernel: &dyn Kernel,
        pending: &mut Pending,
        first: u64,
        mask: &[u64],
    ) -> io::Result<()> {
        // A number of pages that is no multiple of 64 is fine at the end of the slot, and only
        // there.
        let pages = (mask.len() as u64 * 64).min(self.pages() - first);
        kernel.clear_log(self.id, first, pages as u32, mask)?;
        // A slot has fewer words than memory has bytes.
        pending.remove_words((first / 64) as usize, mask);
        Ok(())
    }

    /// Has KVM clear one page now.
    fn clear_page(
        &self,
        kernel: &dyn Kernel,
        pending: &mut Pending,
        page: IovaRange,
    ) -> Result<(), Stopped> {
        let Some((number, _)) = pending.numbers(page) else {
            return Ok(());
        };
        self.clear_words(kernel, pending, number & !63, &[1 << (number % 64)])
            .map_err(|error| self.stopped("KVM_CLEAR_DIRTY_LOG", page.start(), error))
    }

    /// Records what is dirty in `part`. What KVM forgets meanwhile stays pending.
    pub(super) fn peek(
        &self,
        kernel: &dyn Kernel,
        mode: KvmMode,
        part: IovaRange,
        sink: &mut Sink<'_>,
    ) -> Result<(), Stopped> {
        let mut state = self.state();
        let failed = |error| self.stopped("KVM_GET_DIRTY_LOG", part.start(), error);
        if !mode.is_manual() || !state.logging {
            self.collect(&mut state, kernel, mode).map_err(failed)?;
            return state.pending.peek(part, sink);
        }
        let Some((first, last)) = state.pending.numbers(part) else {
            return Ok(());
        };
        self.look(&mut state, kernel).map_err(failed)?;
        let mut next = first;
        while let Some(run) = next_run(&state.log, next, last) {
            let addresses = state.pending.addresses(run.0, run.1);
            sink.record(addresses).map_err(|error| Stopped {
                at: addresses.start(),
                error,
            })?;
            next = run.1 + 1;
        }
        Ok(())
    }

    /// Tells `dirty` what is dirty in `part`, and forgets it. If KVM cannot tell, all of it is.
    pub(super) fn drain(
        &self,
        kernel: &dyn Kernel,
        mode: KvmMode,
        part: IovaRange,
        dirty: &mut dyn FnMut(IovaRange),
    ) {
        let mut state = self.state();
        let state = &mut *state;
        if !mode.is_manual() || !state.logging {
            if self.collect(state, kernel, mode).is_err() {
                state.pending.add_range(part);
            }
        } else if let Some((first, last)) = state.pending.numbers(part) {
            match self.look(state, kernel) {
                Ok(()) => {
                    keep_only(&mut state.log, first, last);
                    state.pending.add_words(0, &state.log);
                    if let Some((from, to)) = hull(&state.log, 0, state.log.len()) {
                        let pages = self.pages().min(to as u64 * 64) - from as u64 * 64;
                        let mask = &state.log[from..to];
                        // What this does not clear is reported once more.
                        let _ = kernel.clear_log(self.id, from as u64 * 64, pages as u32, mask);
                    }
                }
                Err(_) => state.pending.add_range(part),
            }
        }
        state.pending.drain(part, dirty);
    }

    /// Keeps page `number`, which a ring names. Of a number past the end, the page that was meant
    /// is unknown: all pages are dirty then.
    pub(super) fn keep(&self, number: u64) -> bool {
        let mut state = self.state();
        let known = state.pending.add_page(number);
        if !known {
            state.pending.add_all();
        }
        known
    }

    /// All pages are dirty.
    pub(super) fn dirty_all(&self) {
        self.state().pending.add_all();
    }

    /// The pages of `range` that are in the slot are dirty.
    pub(super) fn dirty(&self, range: IovaRange) {
        if self.range().intersects(range) {
            self.state().pending.add_range(range);
        }
    }

    /// Forgets what is pending.
    pub(super) fn forget(&self) {
        self.state().pending.clear();
    }

    /// Whether the slot was removed from KVM.
    pub(super) fn is_gone(&self) -> bool {
        // Relaxed: as in `bury`.
        self.gone.load(Ordering::Relaxed)
    }

    /// Whether the slot was removed and no page of it is pending.
    pub(super) fn is_done(&self) -> bool {
        self.is_gone() && self.state().pending.is_empty()
    }

    /// Reads the log of KVM, with what is pending, into `log`.
    fn look(&self, state: &mut State, kernel: &dyn Kernel) -> io::Result<()> {
        self.read_log(state, kernel)?;
        for (log, pending) in state.log.iter_mut().zip(state.pending.words()) {
            *log |= pending;
        }
        keep_only(&mut state.log, 0, self.pages() - 1);
        Ok(())
    }

    /// Moves the log of KVM to what is pending.
    fn collect(&self, state: &mut State, kernel: &dyn Kernel, mode: KvmMode) -> io::Result<()> {
        if state.logging && !mode.is_ring() {
            self.read_log(state, kernel)?;
            state.pending.add_words(0, &state.log);
        }
        Ok(())
    }

    /// As `collect`, before the log ends. If the log has ended already, all of the slot is pending.
    fn collect_last(
        &self,
        state: &mut State,
        kernel: &dyn Kernel,
        mode: KvmMode,
    ) -> Result<(), KvmError> {
        match self.collect(state, kernel, mode) {
            Err(error) if !is_off(&error) => Err(self.failed("KVM_GET_DIRTY_LOG", error)),
            _ => Ok(()),
        }
    }

    /// Reads the log of KVM into `state.log`. When KVM says that the slot has none, other code has
    /// switched it off: what was written meanwhile is not known, also after it is on again.
    fn read_log(&self, state: &mut State, kernel: &dyn Kernel) -> io::Result<()> {
        let State { pending, log, .. } = state;
        kernel.get_log(self.id, log).inspect_err(|error| {
            if is_off(error) {
                pending.add_all();
            }
        })
    }

    /// # Safety
    /// As for [`set`](Self::set).
    unsafe fn set_region(&self, kernel: &dyn Kernel, logging: bool) -> Result<(), KvmError> {
        // SAFETY: by the caller.
        unsafe { kernel.set_region(&self.region(logging)) }
            .map_err(|error| self.failed("KVM_SET_USER_MEMORY_REGION", error))
    }

    fn region(&self, logging: bool) -> kvm_userspace_memory_region {
        kvm_userspace_memory_region {
            slot: self.id,
            flags: if logging { KVM_MEM_LOG_DIRTY_PAGES } else { 0 },
            guest_phys_addr: self.guest.start().get(),
            memory_size: self.pages() << self.page.lg2(),
            userspace_addr: self.host,
        }
    }

    /// At most `MAX_PAGES`.
    fn pages(&self) -> u64 {
        ((self.guest.last().get() - self.guest.start().get()) >> self.page.lg2()) + 1
    }

    fn failed(&self, call: &'static str, error: io::Error) -> KvmError {
        KvmError::SlotCall {
            call,
            slot: self.id,
            error,
        }
    }

    #[cold]
    fn stopped(&self, call: &'static str, at: Iova, error: io::Error) -> Stopped {
        let error = Error::source_failed(self.failed(call, error));
        Stopped { at, error }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }
}

/// Whether KVM says that it keeps no log of the slot.
fn is_off(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::ENOENT)
}

/// Clears all bits but `first` to `last`.
fn keep_only(words: &mut [u64], first: u64, last: u64) {
    let end = words.len() as u64 * 64;
    if first > 0 {
        clear(words, 0, first - 1);
    }
    if last + 1 < end {
        clear(words, last + 1, end - 1);
    }
}

/// The smallest part of the words `begin..end` that holds all that are not zero.
fn hull(words: &[u64], begin: usize, end: usize) -> Option<(usize, usize)> {
    let words = words.get(begin..end)?;
    let from = words.iter().position(|word| *word != 0)?;
    let to = words.iter().rposition(|word| *word != 0)?;
    Some((begin + from, begin + to + 1))
}
