//! One piece of memory that was added: what the kernel and this process know of its dirty pages.

use super::GivenBack;
use super::error::PagemapError;
use super::ioctl::{Kernel, Region};
use super::sweep::{Ask, Broken, Why, first_unmapped, sweep};
use dirtymap::adapter::{Pending, Placed};
use dirtymap::bitmap::Sink;
use dirtymap::source::{LeafSink, Stopped};
use dirtymap::sync::{Arc, AtomicBool, Mutex, MutexGuard, Ordering, lock};
use dirtymap::{Error, Granule, Iova, IovaRange};

/// Regions that one call may report.
const REGIONS: usize = 512;

/// Memory of this process, and where it is reported.
pub(super) struct Memory {
    range: IovaRange,
    /// The address of its first byte in this process.
    host: u64,
    page: Granule,
    given_back: GivenBack,
    state: Mutex<State>,
    /// Whether it was removed.
    gone: AtomicBool,
}

struct State {
    /// Pages that are dirty, and that the kernel does not report any more.
    pending: Pending,
    /// What one call reports.
    regions: Vec<Region>,
    /// Whether the kernel protects it.
    tracked: bool,
    /// Whether another tracker has what is mapped at its addresses by now.
    lost: bool,
}

impl Placed for Memory {
    fn range(&self) -> IovaRange {
        #[cfg(test)]
        dirtymap_host::counted::one();
        self.range
    }
}

impl Memory {
    /// Checks the memory, and registers it.
    pub(super) fn new(
        kernel: &dyn Kernel,
        range: IovaRange,
        host: u64,
        page: Granule,
        given_back: GivenBack,
    ) -> Result<Arc<Self>, PagemapError> {
        let address = host;
        if !range.is_aligned(page) || host & page.mask() != 0 {
            return Err(PagemapError::Unaligned {
                range,
                address,
                page,
            });
        }
        let bytes = range.last().get() - range.start().get();
        let Some(end) = host.checked_add(bytes).and_then(|last| last.checked_add(1)) else {
            return Err(PagemapError::Wraps { range, address });
        };
        if let Some(address) = first_unmapped(kernel, (host, end), page.bytes()) {
            return Err(PagemapError::Unmapped { address });
        }
        if given_back == GivenBack::Reported
            && let Some(address) = kernel
                .not_private(host, end)
                .map_err(|error| called("a read of /proc/self/maps", host, error))?
        {
            return Err(PagemapError::GivenBackUnseen { address });
        }
        // Bits for memory that is there.
        let words = usize::try_from(range.granules(page).div_ceil(64)).unwrap_or(usize::MAX);
        let no_memory = |_| PagemapError::NoMemory { range, words };
        let pending = Pending::new(range, page).map_err(no_memory)?;
        let mut regions = Vec::new();
        regions.try_reserve_exact(REGIONS).map_err(no_memory)?;
        regions.resize(REGIONS, Region::default());
        let new = Arc::new(Memory {
            range,
            host,
            page,
            given_back,
            state: Mutex::new(State {
                pending,
                regions,
                tracked: false,
                lost: false,
            }),
            gone: AtomicBool::new(false),
        });
        kernel.owners().give(&new, || {
            kernel
                .register(host, end - host)
                .map_err(|error| called("UFFDIO_REGISTER", host, error))
        })?;
        Ok(new)
    }

    /// Protects the memory, or ends that; what is dirty then stays pending.
    pub(super) fn track(&self, kernel: &dyn Kernel, on: bool) -> Result<(), PagemapError> {
        let mut state = self.state();
        let (start, end) = self.addresses(self.range);
        if state.lost {
            let error = PagemapError::TakenOver { address: start };
            return if on { Err(error) } else { Ok(()) };
        }
        if !on && state.tracked {
            self.sweep_all(&mut state, kernel, self.range);
        }
        let protected = kernel.protect(start, end - start, on);
        // Pages that stay protected cost a fault, and nothing else.
        if let (true, Err(error)) = (on, protected) {
            return Err(called("UFFDIO_WRITEPROTECT", start, error));
        }
        state.tracked = on;
        Ok(())
    }

    /// Ends the tracking. What is dirty stays pending. Memory that another tracker has by now is
    /// left to it.
    pub(super) fn remove(&self, kernel: &dyn Kernel) {
        kernel.owners().take_back(self, || {
            let mut state = self.state();
            if state.tracked {
                self.sweep_all(&mut state, kernel, self.range);
            }
            state.tracked = false;
            let (start, end) = self.addresses(self.range);
            // Of memory that was unmapped, the kernel knows nothing any more.
            let _ = kernel.unregister(start, end - start);
        });
        // Relaxed: the calls that read it hold the lock of the list's changes.
        self.gone.store(true, Ordering::Relaxed);
    }

    /// Another tracker has the memory. What was written to the old one by then is not known: all of
    /// it is dirty.
    pub(super) fn lose(&self) {
        let mut state = self.state();
        state.tracked = false;
        state.lost = true;
        state.pending.add_all();
    }

    /// Hands what is dirty in `part`, which lies inside, to `out`.
    pub(super) fn take(
        &self,
        kernel: &dyn Kernel,
        part: IovaRange,
        out: &mut LeafSink<'_, '_>,
    ) -> Result<(), Stopped> {
        let mut state = self.state();
        let swept = self.sweep(&mut state, kernel, part);
        // Pages that were swept are handed out, also after an error in the rest.
        let below = match &swept {
            Ok(()) => Some(part),
            Err(stopped) => part.below(stopped.at),
        };
        if let Some(below) = below {
            state.pending.take(below, out)?;
        }
        swept
    }

    /// Records what is dirty in `part`.
    pub(super) fn peek(
        &self,
        kernel: &dyn Kernel,
        part: IovaRange,
        sink: &mut Sink<'_>,
    ) -> Result<(), Stopped> {
        let mut state = self.state();
        self.check_owner(&state, part)?;
        state.pending.peek(part, sink)?;
        if !state.tracked {
            return Ok(());
        }
        let (span, hole) = self.mapped(kernel, part);
        let mut recorded = Ok(());
        let ask = self.ask(kernel, false);
        let swept = sweep(ask, span, &mut state.regions, |from, to| {
            if recorded.is_ok()
                && let Some(run) = self.run(from, to)
            {
                let at = run.start();
                recorded = sink.record(run).map_err(|error| Stopped { at, error });
            }
        });
        recorded?;
        swept.map_err(|broken| self.stopped(broken))?;
        hole.map_or(Ok(()), Err)
    }

    /// Tells `dirty` what is dirty in `part`, and forgets it. What the kernel cannot tell is.
    pub(super) fn drain(
        &self,
        kernel: &dyn Kernel,
        part: IovaRange,
        dirty: &mut dyn FnMut(IovaRange),
    ) {
        let mut state = self.state();
        if state.tracked {
            self.sweep_all(&mut state, kernel, part);
        }
        state.pending.drain(part, dirty);
    }

    /// All pages are dirty.
    pub(super) fn dirty_all(&self) {
        self.state().pending.add_all();
    }

    /// Forgets what is pending.
    pub(super) fn forget(&self) {
        self.state().pending.clear();
    }

    /// Whether it was removed.
    pub(super) fn is_gone(&self) -> bool {
        // Relaxed: as in `remove`.
        self.gone.load(Ordering::Relaxed)
    }

    /// Whether it was removed and no page of it is pending.
    pub(super) fn is_done(&self) -> bool {
        self.is_gone() && self.state().pending.is_empty()
    }

    /// Its first and its last address in this process.
    pub(super) fn place(&self) -> (Iova, Iova) {
        let (start, end) = self.addresses(self.range());
        (Iova::new(start), Iova::new(end - 1))
    }

    /// Whether it is, in part, the memory that begins at `host` and is as long as `range`.
    pub(super) fn overlaps(&self, range: IovaRange, host: u64) -> bool {
        let last = |range: IovaRange, host: u64| {
            host.saturating_add(range.last().get() - range.start().get())
        };
        let same = self.host <= last(range, host) && host <= last(self.range, self.host);
        same || self.range().intersects(range)
    }

    /// Moves what was written in `part` to what is pending.
    fn sweep(
        &self,
        state: &mut State,
        kernel: &dyn Kernel,
        part: IovaRange,
    ) -> Result<(), Stopped> {
        self.check_owner(state, part)?;
        if !state.tracked {
            return Ok(());
        }
        let (span, hole) = self.mapped(kernel, part);
        self.sweep_span(state, kernel, span)
            .map_err(|broken| self.stopped(broken))?;
        hole.map_or(Ok(()), Err)
    }

    /// As `sweep`, without an error: pieces that the kernel refuses are dirty as a whole, and what
    /// is not mapped any more is skipped.
    fn sweep_all(&self, state: &mut State, kernel: &dyn Kernel, part: IovaRange) {
        let mut span = self.addresses(part);
        while let Err(broken) = self.sweep_span(state, kernel, span) {
            span.0 = broken.end;
        }
    }

    fn sweep_span(
        &self,
        state: &mut State,
        kernel: &dyn Kernel,
        span: (u64, u64),
    ) -> Result<(), Broken> {
        let State {
            pending, regions, ..
        } = state;
        sweep(self.ask(kernel, true), span, regions, |from, to| {
            if let Some(run) = self.run(from, to) {
                pending.add_range(run);
            }
        })
    }

    fn ask<'k>(&self, kernel: &'k dyn Kernel, protect: bool) -> Ask<'k> {
        Ask {
            kernel,
            protect,
            page: self.page.bytes(),
            given_back: self.given_back == GivenBack::Reported && kernel.skips_tables(),
        }
    }

    /// Refuses memory that another tracker has, for a harvest of `part`.
    fn check_owner(&self, state: &State, part: IovaRange) -> Result<(), Stopped> {
        if !state.lost {
            return Ok(());
        }
        let address = self.host;
        Err(Stopped {
            at: part.start(),
            error: Error::source_failed(PagemapError::TakenOver { address }),
        })
    }

    /// The addresses of `part` in this process, up to the first that is not mapped any more; and
    /// what that means.
    fn mapped(&self, kernel: &dyn Kernel, part: IovaRange) -> ((u64, u64), Option<Stopped>) {
        let (start, end) = self.addresses(part);
        match first_unmapped(kernel, (start, end), self.page.bytes()) {
            None => ((start, end), None),
            Some(address) => {
                let error = Error::source_failed(PagemapError::Unmapped { address });
                let at = self.iova(address);
                ((start, address), Some(Stopped { at, error }))
            }
        }
    }

    #[cold]
    fn stopped(&self, broken: Broken) -> Stopped {
        let error = match broken.why {
            Why::Refused(error) => called("PAGEMAP_SCAN", broken.at, error),
            Why::Stuck(address) => PagemapError::NoProgress { address },
        };
        Stopped {
            at: self.iova(broken.at),
            error: Error::source_failed(error),
        }
    }

    /// First address, and the one after the last, in this process, of the pages that a range inside
    /// touches: the kernel knows whole pages only.
    fn addresses(&self, part: IovaRange) -> (u64, u64) {
        let part = part.round_out(self.page);
        let host = |iova: Iova| iova.get() - self.range.start().get() + self.host;
        (host(part.start()), host(part.last()) + 1)
    }

    fn iova(&self, address: u64) -> Iova {
        Iova::new(address - self.host + self.range.start().get())
    }

    /// Where the bytes from `from` up to `to` of this process are reported.
    fn run(&self, from: u64, to: u64) -> Option<IovaRange> {
        IovaRange::new(self.iova(from), self.iova(to - 1)).ok()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }
}

fn called(call: &'static str, address: u64, error: std::io::Error) -> PagemapError {
    PagemapError::Call {
        call,
        address,
        error,
    }
}
