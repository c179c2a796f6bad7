//! A device that is played. It does to its log what devices do: a report clears whole pages of the
//! device, and tells of what lies inside of the request.

use std::collections::BTreeSet;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use dirtymap::{Granule, Iova, IovaRange};

use crate::LoggingDevice;

/// The `n` pages from page `first` on.
pub(crate) fn pages(first: u64, n: u64) -> IovaRange {
    let last = (first + n - 1) * 4096 + 4095;
    IovaRange::new(Iova::new(first * 4096), Iova::new(last)).unwrap()
}

/// The next `times` calls of that name fail, after they have done their work if `late`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Fault {
    pub(crate) call: &'static str,
    pub(crate) errno: i32,
    pub(crate) times: u32,
    pub(crate) late: bool,
    pub(crate) panics: bool,
}

impl Fault {
    pub(crate) fn once(call: &'static str, errno: i32) -> Self {
        Fault {
            call,
            errno,
            times: 1,
            late: true,
            panics: false,
        }
    }

    pub(crate) fn always(call: &'static str, errno: i32) -> Self {
        Fault {
            times: u32::MAX,
            ..Self::once(call, errno)
        }
    }
}

/// Clones are the same device.
#[derive(Clone, Debug)]
pub(crate) struct Fake(Arc<Mutex<State>>);

#[derive(Debug)]
pub(crate) struct State {
    /// The page of the device.
    pub(crate) page: Granule,
    pub(crate) most: usize,
    pub(crate) ranges: Option<Vec<IovaRange>>,
    /// First addresses of pages of the device.
    dirty: BTreeSet<u64>,
    fault: Option<Fault>,
    pub(crate) calls: Vec<&'static str>,
    /// What the reports asked for.
    pub(crate) asked: Vec<IovaRange>,
}

impl State {
    fn fails(&mut self, call: &'static str, late: bool) -> io::Result<()> {
        let Some(fault) = self.fault.as_mut() else {
            return Ok(());
        };
        if fault.call != call || fault.late != late || fault.times == 0 {
            return Ok(());
        }
        fault.times -= 1;
        assert!(!fault.panics, "a panic of the device");
        Err(io::Error::from_raw_os_error(fault.errno))
    }
}

fn refused(errno: i32) -> io::Error {
    io::Error::from_raw_os_error(errno)
}

impl Fake {
    pub(crate) fn new(page: Granule) -> Self {
        Fake(Arc::new(Mutex::new(State {
            page,
            most: 256,
            ranges: None,
            dirty: BTreeSet::new(),
            fault: None,
            calls: Vec::new(),
            asked: Vec::new(),
        })))
    }

    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn fail(&self, fault: Fault) {
        self.state().fault = Some(fault);
    }

    pub(crate) fn mend(&self) {
        self.state().fault = None;
    }

    pub(crate) fn count(&self, call: &str) -> usize {
        let state = self.state();
        state.calls.iter().filter(|made| **made == call).count()
    }

    /// The device writes at `iova`.
    pub(crate) fn write(&self, iova: Iova) {
        let mut state = self.state();
        let page = iova.granule_start(state.page);
        let logged = state.ranges.iter().flatten().any(|l| l.contains(iova));
        if logged {
            state.dirty.insert(page.get());
        }
    }
}

impl LoggingDevice for Fake {
    fn start(&self, page: Granule, ranges: &[IovaRange]) -> io::Result<u64> {
        let mut state = self.state();
        state.calls.push("start");
        state.fails("start", false)?;
        if ranges.is_empty() || state.ranges.is_some() {
            return Err(refused(libc::EINVAL));
        }
        if ranges.len() > state.most {
            return Err(refused(libc::E2BIG));
        }
        let apart = ranges
            .windows(2)
            .all(|pair| pair[0].last() < pair[1].start());
        if !apart || ranges.iter().any(|range| !range.is_aligned(page)) {
            return Err(refused(libc::EINVAL));
        }
        state.fails("start", true)?;
        state.ranges = Some(ranges.to_vec());
        state.dirty.clear();
        Ok(state.page.bytes())
    }

    fn report(&self, range: IovaRange, page: Granule, bits: &mut [u64]) -> io::Result<()> {
        let mut state = self.state();
        state.calls.push("report");
        state.asked.push(range);
        state.fails("report", false)?;
        assert!(
            range.granules(page) <= bits.len() as u128 * 64,
            "{range}: too few bits"
        );
        if !state
            .ranges
            .iter()
            .flatten()
            .any(|logged| logged.covers(range))
        {
            return Err(refused(libc::EINVAL));
        }
        let whole = range.round_out(state.page);
        let dirty: Vec<u64> = state
            .dirty
            .range(whole.start().get()..=whole.last().get())
            .copied()
            .collect();
        for start in dirty {
            state.dirty.remove(&start);
            let written = IovaRange::granule_at(Iova::new(start), state.page);
            let Some(inside) = written.intersection(range) else {
                continue;
            };
            let number = |iova: Iova| (iova.get() - range.start().get()) >> page.lg2();
            for bit in number(inside.start())..=number(inside.last()) {
                bits[(bit / 64) as usize] |= 1 << (bit % 64);
            }
        }
        state.fails("report", true)
    }

    fn stop(&self) -> io::Result<()> {
        let mut state = self.state();
        state.calls.push("stop");
        state.fails("stop", true)?;
        if state.ranges.take().is_none() {
            return Err(refused(libc::EINVAL));
        }
        Ok(())
    }
}
