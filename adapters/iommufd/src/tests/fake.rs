//! A kernel that is played: with leaves, dirty bits, and the faults of the real one.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use dirtymap::{Granule, Iova, IovaRange, Mapping};

use crate::device::Device;
use crate::kernel::Kernel;
use crate::uapi::Span;
use crate::{Ioas, IoasOptions, Iommufd};

/// What goes wrong: the error of a call by its name.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Fault {
    pub(crate) call: &'static str,
    pub(crate) errno: i32,
    /// How many such calls succeed before.
    pub(crate) after: u32,
    /// How many fail then.
    pub(crate) times: u32,
}

impl Fault {
    /// Each call of that name fails.
    pub(crate) fn always(call: &'static str, errno: i32) -> Self {
        Fault {
            call,
            errno,
            after: 0,
            times: u32::MAX,
        }
    }

    /// The next call of that name fails.
    pub(crate) fn once(call: &'static str, errno: i32) -> Self {
        Fault {
            times: 1,
            ..Self::always(call, errno)
        }
    }
}

/// The kernel. Clones are the same.
#[derive(Clone)]
pub(crate) struct Fake(Arc<Mutex<State>>);

pub(crate) struct State {
    /// The largest leaf. A leaf is the largest aligned power of two inside its area up to this.
    pub(crate) leaf: Granule,
    pub(crate) alignment: u64,
    pub(crate) usable: Vec<Span>,
    /// Last addresses and backing by first addresses; one IOAS is enough.
    pub(crate) areas: BTreeMap<u64, (u64, u64)>,
    pub(crate) hwpts: BTreeMap<u32, Table>,
    pub(crate) fault: Option<Fault>,
    pub(crate) calls: Vec<&'static str>,
    next: u32,
}

#[derive(Default)]
pub(crate) struct Table {
    pub(crate) tracked: bool,
    /// First addresses of leaves.
    dirty: BTreeSet<u64>,
}

impl State {
    /// The leaf that maps `iova`.
    fn leaf(&self, iova: u64) -> Option<IovaRange> {
        let (start, (last, _)) = self.areas.range(..=iova).next_back()?;
        let area = IovaRange::new(Iova::new(*start), Iova::new(*last)).ok()?;
        let sizes = (0..=self.leaf.lg2()).rev().filter_map(Granule::from_lg2);
        let leaves = sizes.map(|size| IovaRange::granule_at(Iova::new(iova), size));
        leaves.into_iter().find(|leaf| area.covers(*leaf))
    }

    /// Counts the call, and fails if it is its turn.
    fn called(&mut self, call: &'static str) -> io::Result<()> {
        self.calls.push(call);
        let Some(fault) = self.fault.as_mut().filter(|fault| fault.call == call) else {
            return Ok(());
        };
        if fault.after > 0 {
            fault.after -= 1;
            return Ok(());
        }
        if fault.times == 0 {
            return Ok(());
        }
        fault.times -= 1;
        Err(io::Error::from_raw_os_error(fault.errno))
    }

    fn table(&mut self, hwpt: u32) -> io::Result<&mut Table> {
        let missing = || io::Error::from_raw_os_error(libc::ENOENT);
        self.hwpts.get_mut(&hwpt).ok_or_else(missing)
    }
}

impl Fake {
    pub(crate) fn new(leaf: Granule) -> Self {
        Fake(Arc::new(Mutex::new(State {
            leaf,
            alignment: 4096,
            usable: vec![Span {
                start: 0,
                last: u64::MAX,
            }],
            areas: BTreeMap::new(),
            hwpts: BTreeMap::new(),
            fault: None,
            calls: Vec::new(),
            next: 1,
        })))
    }

    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn iommufd(&self) -> Iommufd {
        Iommufd::over(self.clone())
    }

    pub(crate) fn ioas(&self, options: IoasOptions) -> Ioas {
        // SAFETY: no device exists, so nothing reaches the memory.
        unsafe { Ioas::new(&self.iommufd(), options) }.unwrap()
    }

    pub(crate) fn fail(&self, fault: Fault) {
        self.state().fault = Some(fault);
    }

    pub(crate) fn mend(&self) {
        self.state().fault = None;
    }

    /// How often a call was made.
    pub(crate) fn count(&self, call: &str) -> usize {
        self.state()
            .calls
            .iter()
            .filter(|made| **made == call)
            .count()
    }

    /// A device that uses `hwpt` writes; whether it reaches memory there.
    pub(crate) fn write(&self, hwpt: u32, iova: u64) -> bool {
        let mut state = self.state();
        let Some(leaf) = state.leaf(iova) else {
            return false;
        };
        let table = state.table(hwpt).unwrap();
        if table.tracked {
            table.dirty.insert(leaf.start().get());
        }
        true
    }
}

impl Kernel for Fake {
    fn fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    fn ioas_alloc(&self) -> io::Result<u32> {
        let mut state = self.state();
        state.called("ioas_alloc")?;
        state.next += 1;
        Ok(state.next)
    }

    fn destroy(&self, id: u32) -> io::Result<()> {
        let mut state = self.state();
        state.called("destroy")?;
        state.hwpts.remove(&id);
        Ok(())
    }

    fn iova_ranges(&self, _: u32, spans: &mut [Span]) -> io::Result<(usize, u64)> {
        let mut state = self.state();
        state.called("iova_ranges")?;
        for (to, from) in spans.iter_mut().zip(&state.usable) {
            *to = *from;
        }
        Ok((state.usable.len(), state.alignment))
    }

    fn small_pages(&self, _: u32) -> io::Result<()> {
        let mut state = self.state();
        state.called("small_pages")?;
        state.leaf = Granule::K4;
        Ok(())
    }

    fn map(&self, _: u32, mapping: &Mapping) -> io::Result<()> {
        let mut state = self.state();
        state.called("map")?;
        let (start, last) = (mapping.range.start().get(), mapping.range.last().get());
        let below = state.areas.range(..=last).next_back();
        if below.is_some_and(|(_, (below, _))| *below >= start) {
            return Err(io::Error::from_raw_os_error(libc::EEXIST));
        }
        state.areas.insert(start, (last, mapping.backing));
        Ok(())
    }

    /// Whole areas; what was dirty is forgotten.
    fn unmap(&self, _: u32, range: IovaRange) -> io::Result<()> {
        let mut state = self.state();
        state.called("unmap")?;
        let start = range.start().get();
        match state.areas.get(&start) {
            Some((last, _)) if *last == range.last().get() => state.areas.remove(&start),
            _ => return Err(io::Error::from_raw_os_error(libc::ENOENT)),
        };
        for table in state.hwpts.values_mut() {
            table.dirty.retain(|leaf| !range.contains(Iova::new(*leaf)));
        }
        Ok(())
    }

    fn hwpt_alloc(&self, _: u32, _: u32) -> io::Result<u32> {
        let mut state = self.state();
        state.called("hwpt_alloc")?;
        state.next += 1;
        let id = state.next;
        state.hwpts.insert(id, Table::default());
        Ok(id)
    }

    /// "On" cleans, even if it was on.
    fn track(&self, hwpt: u32, on: bool) -> io::Result<()> {
        let mut state = self.state();
        let table = state.table(hwpt)?;
        if on {
            table.dirty.clear();
        }
        state.called("track")?;
        state.table(hwpt)?.tracked = on;
        Ok(())
    }

    /// As Linux 7.3: whole leaves. One that begins below the range becomes clean and is not told;
    /// of one that ends above it, bits are written past those of the range, as far as there is
    /// memory. While tracking is off there is no answer, and no error. With an injected error, the
    /// lower half of what was dirty is clean all the same.
    fn dirty(
        &self,
        hwpt: u32,
        range: IovaRange,
        page: Granule,
        clear: bool,
        bits: &mut [u64],
    ) -> io::Result<()> {
        let mut state = self.state();
        let failed = state.called(if clear { "dirty" } else { "peek" });
        if !state.table(hwpt)?.tracked {
            return failed;
        }
        let dirty: Vec<_> = state.table(hwpt)?.dirty.iter().copied().collect();
        let touched = dirty.iter().filter_map(|leaf| state.leaf(*leaf));
        let touched: Vec<_> = touched.filter(|leaf| leaf.intersects(range)).collect();
        let half = touched.len().div_ceil(2);
        for leaf in touched
            .iter()
            .take(if failed.is_err() { half } else { touched.len() })
        {
            if let (Ok(()), Some(offset)) = (&failed, leaf.start().offset_from(range.start())) {
                let first = offset >> page.lg2();
                let count = (leaf.len() >> page.lg2()) as u64;
                for bit in first..first + count.max(1) {
                    if let Some(word) = bits.get_mut((bit / 64) as usize) {
                        *word |= 1 << (bit % 64);
                    }
                }
            }
            if clear {
                state.table(hwpt)?.dirty.remove(&leaf.start().get());
            }
        }
        failed
    }
}

/// A device of a number.
pub(crate) struct Dev {
    pub(crate) id: u32,
    pub(crate) answer: io::Result<()>,
    attached: Mutex<Option<u32>>,
}

impl Dev {
    pub(crate) fn new(id: u32) -> Self {
        Dev {
            id,
            answer: Ok(()),
            attached: Mutex::new(None),
        }
    }

    /// The page table that the kernel lets it use.
    pub(crate) fn attached(&self) -> Option<u32> {
        *self.attached.lock().unwrap()
    }

    fn answer(&self) -> io::Result<()> {
        match &self.answer {
            Ok(()) => Ok(()),
            Err(error) => Err(io::Error::from_raw_os_error(error.raw_os_error().unwrap())),
        }
    }
}

impl Device for Dev {
    fn id(&self) -> u32 {
        self.id
    }

    fn attach(&self, hwpt: u32) -> io::Result<()> {
        self.answer()?;
        *self.attached.lock().unwrap() = Some(hwpt);
        Ok(())
    }

    fn detach(&self) -> io::Result<()> {
        self.answer()?;
        *self.attached.lock().unwrap() = None;
        Ok(())
    }
}

/// `count` pages of 4 KiB from page `first` on.
pub(crate) fn pages(first: u64, count: u64) -> IovaRange {
    IovaRange::from_len(Iova::new(first << 12), count << 12).unwrap()
}
