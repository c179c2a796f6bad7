//! Devices write and mark while areas are unmapped and mapped, and two clients' threads report at
//! the same time, in pages of two sizes. At the end the copy is the memory.
#![allow(clippy::unwrap_used)] // helpers of tests

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, RwLock};

use dirtymap::exchange::DirtyLog;
use dirtymap::{Access, AddressSpace, Granule, Iova, IovaRange};
use dirtymap_vfio::{DmaLogger, DmaRange};

const PAGE: u64 = 4096;
const PAGES: u64 = 256;
/// Areas of pages that come and go as a whole.
const AREAS: u64 = 8;
const AREA: u64 = PAGES / AREAS;
/// The lowest page: the ranges end at the last address.
const FIRST: u64 = (1 << 52) - PAGES;

struct Storm {
    log: DmaLogger,
    /// One word stands for each page, whether it is mapped or not.
    memory: Vec<AtomicU64>,
    /// Copied under the lock, so that an older copy never replaces a newer one.
    copy: Mutex<Vec<u64>>,
    /// What is mapped: read while a device writes, written for an unmap.
    mapped: RwLock<[bool; AREAS as usize]>,
    ends: AtomicBool,
}

fn area(n: u64) -> IovaRange {
    IovaRange::from_len(Iova::new((FIRST + n * AREA) * PAGE), AREA * PAGE).unwrap()
}

fn random(state: &mut u64, bound: u64) -> u64 {
    *state = state
        .wrapping_mul(6_364_136_223_846_793_005)
        .wrapping_add(1);
    (*state >> 33) % bound
}

impl Storm {
    /// Writes until a number of writes has landed: areas may come late on a busy machine.
    fn device(&self, mut state: u64) {
        let mut landed = 0;
        while landed < 2000 {
            let page = random(&mut state, PAGES);
            let mapped = self.mapped.read().unwrap();
            if mapped[(page / AREA) as usize] {
                landed += 1;
                self.memory[page as usize].store(state | 1, Ordering::Relaxed);
                let at = (FIRST + page) * PAGE + 8;
                self.log.space().mark(at..at + 8).unwrap(); // after the write
            }
            drop(mapped);
            std::thread::yield_now();
        }
    }

    fn mapper(&self, mut state: u64) {
        while !self.ends.load(Ordering::Acquire) {
            let n = random(&mut state, AREAS);
            let mut mapped = self.mapped.write().unwrap();
            let is_mapped = &mut mapped[n as usize];
            match *is_mapped {
                // Its dirty pages stay in the log.
                true => drop(self.log.unmap(area(n), |_| ()).unwrap()),
                false => {
                    let space = self.log.space();
                    space.map(area(n), 0, Access::ReadWrite).unwrap();
                }
            }
            *is_mapped = !*is_mapped;
            drop(mapped);
            std::thread::yield_now();
        }
    }

    /// Reports pages `first` to `first + n` in pages of `page` bytes, and copies what is dirty.
    fn report(&self, first: u64, n: u64, page: u64) -> u64 {
        let range = DmaRange {
            iova: (FIRST + first) * PAGE,
            length: n * PAGE,
        };
        let mut bits = vec![0; (range.length / page).div_ceil(8) as usize];
        self.log.report(range, page, &mut bits).unwrap();
        let range = IovaRange::from_len(Iova::new(range.iova), range.length).unwrap();
        let dirty = DirtyLog::bytes(&bits, range, Granule::from_bytes(page).unwrap()).unwrap();
        let mut copy = self.copy.lock().unwrap();
        for run in dirty.runs() {
            let number = |at: Iova| (at.get() / PAGE - FIRST) as usize;
            for page in number(run.start())..=number(run.last()) {
                copy[page] = self.memory[page].load(Ordering::Relaxed);
            }
        }
        dirty.count()
    }

    fn reporter(&self, mut state: u64, page: u64) {
        let step = page / PAGE;
        while !self.ends.load(Ordering::Acquire) {
            let first = random(&mut state, PAGES / step) * step;
            let most = (PAGES - first) / step;
            self.report(first, (1 + random(&mut state, most)) * step, page);
        }
    }
}

#[test]
fn two_reports_at_once_beside_maps_and_unmaps_lose_no_write() {
    for (seed, space_page) in [(1, 512), (2, 4096), (3, 65536)] {
        let space = AddressSpace::new(Granule::from_bytes(space_page).unwrap());
        let storm = Storm {
            log: DmaLogger::new(Arc::new(space), "device"),
            memory: (0..PAGES).map(|_| AtomicU64::new(0)).collect(),
            copy: Mutex::new(vec![0; PAGES as usize]),
            mapped: RwLock::new([false; AREAS as usize]),
            ends: AtomicBool::new(false),
        };
        let all = DmaRange {
            iova: FIRST * PAGE,
            length: PAGES * PAGE,
        };
        storm.log.start(PAGE, &[all]).unwrap();
        std::thread::scope(|scope| {
            let storm = &storm;
            let devices = [1, 2].map(|n| scope.spawn(move || storm.device(seed * 8 + n)));
            scope.spawn(move || storm.mapper(seed * 8 + 3));
            scope.spawn(move || storm.reporter(seed * 8 + 4, PAGE));
            scope.spawn(move || storm.reporter(seed * 8 + 5, 4 * PAGE));
            let ended = devices.map(|device| device.join());
            storm.ends.store(true, Ordering::Release);
            assert!(ended.iter().all(Result::is_ok), "a device panicked");
        });
        storm.report(0, PAGES, PAGE);
        assert_eq!(storm.report(0, PAGES, PAGE), 0, "clean since");
        let memory = storm.memory.iter();
        let memory: Vec<u64> = memory.map(|word| word.load(Ordering::Relaxed)).collect();
        assert_eq!(*storm.copy.lock().unwrap(), memory, "pages of {space_page}");
        assert!(memory.iter().any(|word| *word != 0));
    }
}
