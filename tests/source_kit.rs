//! The test kit for sources: the sources of this crate pass, and for each kind of bad source the
//! kit reports the rule that it breaks.
#![cfg(not(any(dirtymap_loom, dirtymap_shuttle)))]
#![allow(clippy::unwrap_used)] // helpers of tests

use dirtymap::source::{FlushGather, LeafSink, Sink, Stopped};
use dirtymap::source_kit::{Rig, check};
use dirtymap::{
    DirtySource, Error, Granule, Iova, IovaRange, PulledLog, SharedLog, ToIovaRange, Tracking,
};
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

const BASE: u64 = 0x10_0000;
const PAGES: u64 = 256;

/// 256 pages of 4 KiB.
fn all() -> IovaRange {
    (BASE..BASE + PAGES * 4096).to_iova_range().unwrap()
}

fn number(at: Iova) -> u64 {
    (at.get() - BASE) / 4096
}

fn page(number: u64) -> IovaRange {
    IovaRange::from_len(Iova::new(BASE + number * 4096), 4096).unwrap()
}

/// One bit for each page.
type Log = Arc<[AtomicU64]>;

fn log() -> Log {
    (0..PAGES / 64).map(|_| AtomicU64::new(0)).collect()
}

fn set(log: &Log, at: Iova) {
    let bit = number(at);
    log[(bit / 64) as usize].fetch_or(1 << (bit % 64), Ordering::Release);
}

/// Clears the bit of a page. Returns whether it was set.
fn clear(log: &Log, bit: u64) -> bool {
    let mask = 1 << (bit % 64);
    log[(bit / 64) as usize].fetch_and(!mask, Ordering::AcqRel) & mask != 0
}

fn is_set(log: &Log, bit: u64) -> bool {
    log[(bit / 64) as usize].load(Ordering::Acquire) >> (bit % 64) & 1 != 0
}

/// A log, and a function that makes a source of it.
struct Made<F>(Log, F);

impl<F: Fn(Log) -> Arc<dyn DirtySource> + Sync> Rig for Made<F> {
    fn range(&self) -> IovaRange {
        all()
    }

    fn source(&self) -> Arc<dyn DirtySource> {
        (self.1)(Arc::clone(&self.0))
    }

    fn write(&self, iova: Iova) {
        set(&self.0, iova);
    }
}

#[test]
fn a_log_in_shared_memory_keeps_the_rules() {
    check(|| {
        Made(log(), |log| {
            Arc::new(SharedLog::new(all(), Granule::K4, log).unwrap()) as Arc<dyn DirtySource>
        })
    });
}

#[test]
fn a_log_that_is_asked_by_a_call_keeps_the_rules() {
    check(|| {
        Made(log(), |log| {
            let pull = move |range: IovaRange, words: &mut [u64]| -> io::Result<()> {
                let first = number(range.start());
                for nth in 0..range.granules(Granule::K4) as u64 {
                    words[(nth / 64) as usize] |= u64::from(clear(&log, first + nth)) << (nth % 64);
                }
                Ok(())
            };
            Arc::new(PulledLog::new(all(), Granule::K4, pull).unwrap()) as Arc<dyn DirtySource>
        })
    });
}

/// The fault of a bad source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    /// No fault: the source below keeps all rules.
    None,
    ClearsBeforeItRecords,
    ForgetsWhatWasDirtyInUnmap,
    IgnoresErrorsOfRecording,
    ReportsCleanPages,
    StartKeepsTheOldState,
    StartTwiceForgets,
    StopForgets,
    PoisonsItsLock,
    PeekTakes,
    NeverClears,
    ClearsAWordAtATime,
    ReportsHalves,
}

/// A log with a lock and a fault.
struct Sick {
    log: Log,
    fault: Fault,
    tracks: Mutex<bool>,
}

impl Sick {
    fn told(&self, bit: u64) -> bool {
        // The page above a dirty one.
        let above = self.fault == Fault::ReportsCleanPages && bit > 0 && is_set(&self.log, bit - 1);
        is_set(&self.log, bit) || above
    }

    fn numbers(range: IovaRange) -> std::ops::RangeInclusive<u64> {
        let range = range.intersection(all()).unwrap();
        number(range.start())..=number(range.last())
    }
}

impl DirtySource for Sick {
    fn page(&self) -> Granule {
        Granule::K4
    }

    fn unmap(&self, range: IovaRange, _: &mut FlushGather, dirty: &mut dyn FnMut(IovaRange)) {
        let lock = (self.fault == Fault::PoisonsItsLock).then(|| self.tracks.lock().unwrap());
        for bit in Self::numbers(range).filter(|bit| clear(&self.log, *bit)) {
            if self.fault != Fault::ForgetsWhatWasDirtyInUnmap {
                dirty(page(bit));
            }
        }
        drop(lock);
    }

    fn set_tracking(&self, to: Tracking) -> Result<(), Error> {
        let mut tracks = self.tracks.lock().unwrap();
        let starts = to.is_on() && !*tracks && self.fault != Fault::StartKeepsTheOldState;
        let twice = to.is_on() && *tracks && self.fault == Fault::StartTwiceForgets;
        let stops = !to.is_on() && self.fault == Fault::StopForgets;
        if starts || twice || stops {
            for bit in 0..PAGES {
                clear(&self.log, bit);
            }
        }
        *tracks = to.is_on();
        Ok(())
    }

    fn read_and_clear(&self, range: IovaRange, out: &mut LeafSink<'_, '_>) -> Result<(), Stopped> {
        if self.fault == Fault::PoisonsItsLock {
            drop(self.tracks.lock().unwrap());
        }
        let told = Self::numbers(range).filter(|bit| self.told(*bit));
        for bit in told.collect::<Vec<u64>>() {
            let at = page(bit).start();
            let leaf = match self.fault {
                Fault::ReportsHalves => IovaRange::from_len(at, 2048).unwrap(),
                _ => page(bit),
            };
            let early = self.fault == Fault::ClearsBeforeItRecords && clear(&self.log, bit);
            let taken = out.take(leaf, Granule::K4, || match self.fault {
                Fault::NeverClears => true,
                Fault::ClearsAWordAtATime => {
                    let word = &self.log[(bit / 64) as usize];
                    word.swap(0, Ordering::AcqRel) >> (bit % 64) & 1 != 0
                }
                _ => clear(&self.log, bit) || early,
            });
            match taken {
                Err(error) if self.fault != Fault::IgnoresErrorsOfRecording => {
                    return Err(Stopped { at, error });
                }
                _ => {}
            }
        }
        Ok(())
    }

    fn peek(&self, range: IovaRange, sink: &mut Sink<'_>) -> Result<(), Stopped> {
        for bit in Self::numbers(range).filter(|bit| self.told(*bit)) {
            let at = page(bit).start();
            sink.record(page(bit))
                .map_err(|error| Stopped { at, error })?;
            if self.fault == Fault::PeekTakes {
                clear(&self.log, bit);
            }
        }
        Ok(())
    }
}

/// The report of the kit on a source with `fault`.
fn verdict(fault: Fault) -> Option<String> {
    let make = move || {
        Made(log(), move |log| {
            let tracks = Mutex::new(false);
            Arc::new(Sick { log, fault, tracks }) as Arc<dyn DirtySource>
        })
    };
    let panic = catch_unwind(AssertUnwindSafe(|| check(make))).err()?;
    let text = panic.downcast_ref::<String>().cloned();
    text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_string()))
}

/// Without a fault the source below passes, so the next test sees the faults alone.
#[test]
fn the_source_that_the_faults_are_put_into_is_sound() {
    assert_eq!(verdict(Fault::None), None);
}

#[test]
fn each_bad_source_is_told_the_rule_that_it_breaks() {
    for (fault, rule) in [
        (
            Fault::ClearsBeforeItRecords,
            "from a stop on nothing was taken",
        ),
        (
            Fault::ForgetsWhatWasDirtyInUnmap,
            "an unmap reports the dirty pages",
        ),
        (
            Fault::IgnoresErrorsOfRecording,
            "a source that cannot record stops",
        ),
        (
            Fault::ReportsCleanPages,
            "tight: only written pages are reported",
        ),
        (Fault::StartKeepsTheOldState, "tracking begins clean"),
        (
            Fault::StartTwiceForgets,
            "tracking twice keeps dirty pages dirty",
        ),
        (
            Fault::StopForgets,
            "an end of tracking keeps dirty pages dirty",
        ),
        (
            Fault::PoisonsItsLock,
            "a source answers after a panic in the middle of a call",
        ),
        (Fault::PeekTakes, "a peek shows the dirty pages"),
        (Fault::NeverClears, "cleared pages stay clean"),
        (
            Fault::ClearsAWordAtATime,
            "pages outside of the request stay dirty",
        ),
        (Fault::ReportsHalves, "both halves of the page, once"),
    ] {
        let said = verdict(fault);
        let said = said.unwrap_or_else(|| panic!("{fault:?} passes"));
        assert!(said.contains(rule), "{fault:?}: {said}");
    }
}
