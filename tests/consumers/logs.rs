//! A dirty log as kernels and devices keep it, as a source.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};

use dirtymap::exchange::{DirtyLog, RunsExt};
use dirtymap::source::{FlushGather, Invalidated, LeafSink, Sink, Stopped};
use dirtymap::{DirtySource, Error, Granule, Iova, IovaRange, Mapping, Tracking};

/// The error of a log that fails on demand.
#[derive(Debug, thiserror::Error)]
#[error("the log cannot be read")]
pub(crate) struct Broken;

/// One bit for each page of a range, in words. The range is a memory slot, or all addresses from 0
/// on.
pub(crate) struct Log {
    range: IovaRange,
    /// The page that one bit stands for.
    bit: Granule,
    /// The smallest page that the source could have.
    page: Granule,
    words: Vec<AtomicU64>,
    /// Whether reads fail from now on, and from which address.
    pub(crate) broken: AtomicBool,
    pub(crate) broken_at: AtomicU64,
}

impl Log {
    pub(crate) fn new(range: IovaRange, page: Granule) -> Self {
        let words = range.granules(page).div_ceil(64);
        Log {
            range,
            bit: page,
            page,
            words: (0..words).map(|_| AtomicU64::new(0)).collect(),
            broken: AtomicBool::new(false),
            broken_at: AtomicU64::new(0),
        }
    }

    /// The source reports 4 KiB as its smallest page, although each bit stands for a larger one.
    pub(crate) fn large(range: IovaRange, page: Granule) -> Self {
        Log {
            page: Granule::K4,
            ..Log::new(range, page)
        }
    }

    /// A write to `range` that this log sees.
    pub(crate) fn write(&self, range: IovaRange) {
        for bit in self.bits(range) {
            self.words[bit / 64].fetch_or(1 << (bit % 64), SeqCst);
        }
    }

    fn bits(&self, range: IovaRange) -> std::ops::Range<usize> {
        let Some(inside) = range.intersection(self.range) else {
            return 0..0;
        };
        let bit = |at: Iova| ((at.get() - self.range.start().get()) >> self.bit.lg2()) as usize;
        bit(inside.start())..bit(inside.last()) + 1
    }

    fn page_of(&self, bit: usize) -> IovaRange {
        let start = self.range.start().get() + ((bit as u64) << self.bit.lg2());
        IovaRange::from_len(Iova::new(start), self.bit.bytes()).unwrap()
    }

    fn check(&self, at: Iova) -> Result<(), Stopped> {
        match self.broken.load(SeqCst) && at.get() >= self.broken_at.load(SeqCst) {
            true => Err(Stopped {
                at,
                error: Error::source_failed(Broken),
            }),
            false => Ok(()),
        }
    }
}

impl DirtySource for Log {
    fn page(&self) -> Granule {
        self.page
    }

    fn map(&self, _: &Mapping) -> Result<(), Error> {
        Ok(())
    }

    fn unmap(&self, range: IovaRange, _: &mut FlushGather, dirty: &mut dyn FnMut(IovaRange)) {
        for bit in self.bits(range) {
            let mask = 1 << (bit % 64);
            if self.words[bit / 64].fetch_and(!mask, SeqCst) & mask != 0 {
                dirty(self.page_of(bit));
            }
        }
    }

    fn set_tracking(&self, _: Tracking) -> Result<(), Error> {
        Ok(())
    }

    fn read_and_clear(&self, range: IovaRange, out: &mut LeafSink<'_, '_>) -> Result<(), Stopped> {
        for bit in self.bits(range) {
            let (page, mask) = (self.page_of(bit), 1u64 << (bit % 64));
            self.check(page.start())?;
            let word = &self.words[bit / 64];
            if word.load(SeqCst) & mask != 0 {
                let clear = || word.fetch_and(!mask, SeqCst) & mask != 0;
                out.take(page, self.bit, clear).map_err(|error| Stopped {
                    at: page.start(),
                    error,
                })?;
            }
        }
        Ok(())
    }

    fn peek(&self, range: IovaRange, sink: &mut Sink<'_>) -> Result<(), Stopped> {
        let words: Vec<u64> = self.words.iter().map(|word| word.load(SeqCst)).collect();
        let log = DirtyLog::words(&words, self.range, self.bit);
        for run in log.into_iter().flat_map(|log| log.runs()) {
            if let Some(run) = run.intersection(range) {
                sink.record(run).map_err(|error| Stopped {
                    at: run.start(),
                    error,
                })?;
            }
        }
        Ok(())
    }

    fn invalidate(&self, gather: &FlushGather) -> Result<Invalidated, Error> {
        Ok(Invalidated {
            bytes: gather.bytes(),
            ..Invalidated::default()
        })
    }
}

/// Bytes that are dirty in the log.
pub(crate) fn dirty_bytes(log: &Log) -> u128 {
    let words: Vec<u64> = log.words.iter().map(|word| word.load(SeqCst)).collect();
    let log = DirtyLog::words(&words, log.range, log.bit).unwrap();
    log.runs().total_bytes()
}
