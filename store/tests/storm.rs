//! Threads write by handles, beside threads without, while extents close and a consumer copies. At
//! the end the copy is the device.
#![cfg(unix)]
#![allow(clippy::unwrap_used)]

use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

use dirtymap_store::{Device, DirFolder, Epoch, Options, Store};

const PAGE: u64 = 4096;
const EXTENT: u64 = 16 * PAGE;
const PAGES: u64 = 8 * 16;

/// One word stands for each page of the device.
struct Storm {
    store: Store,
    device: Vec<AtomicU64>,
    writers: AtomicU64,
    /// Copies that the consumer has made.
    copies: AtomicU64,
}

fn random(state: &mut u64, bound: u64) -> u64 {
    *state = state
        .wrapping_mul(6_364_136_223_846_793_005)
        .wrapping_add(1);
    (*state >> 33) % bound
}

impl Storm {
    /// Handles come and go. Now and then two writes of a handle are in flight, and a guard goes to
    /// another thread.
    fn write(&self, mut state: u64, by_handle: bool) {
        for _ in 0..40 {
            let writer = self.store.writer();
            for _ in 0..20 {
                let page = random(&mut state, PAGES);
                let bytes = page * PAGE + 8..page * PAGE + 16;
                let second = random(&mut state, PAGES);
                let guards = match by_handle {
                    true => {
                        let one = writer.begin_write(bytes).unwrap();
                        let other = second * PAGE..(second + 1) * PAGE;
                        (one, Some(writer.begin_write(other).unwrap()))
                    }
                    false => (self.store.begin_write(bytes).unwrap().wait().unwrap(), None),
                };
                if random(&mut state, 16) == 0 {
                    // Extents close, and the consumer copies, while the writes are in flight.
                    let copies = self.copies.load(Ordering::Relaxed);
                    while self.copies.load(Ordering::Relaxed) < copies + 2 {
                        thread::yield_now();
                    }
                }
                self.device[page as usize].store(state, Ordering::Relaxed);
                if guards.1.is_some() {
                    self.device[second as usize].store(state ^ 1, Ordering::Relaxed);
                }
                match random(&mut state, 16) {
                    0 => thread::scope(|scope| {
                        scope.spawn(|| drop(guards));
                    }),
                    _ => drop(guards),
                }
                thread::yield_now();
            }
        }
        self.writers.fetch_sub(1, Ordering::Release);
    }

    fn copy(&self, copy: &mut [u64], parent: Option<Epoch>) -> Epoch {
        let increment = self.store.harvest("copy", parent).unwrap();
        for run in increment.runs().runs() {
            for page in run.start().get() / PAGE..=run.last().get() / PAGE {
                copy[page as usize] = self.device[page as usize].load(Ordering::Relaxed);
            }
        }
        increment.commit(|| Ok(())).unwrap()
    }
}

/// Few extents stay open, so they open and close all the time, and a small log is replaced.
#[test]
fn handles_beside_closes_and_harvests_lose_no_write() {
    let dir = tempfile::tempdir().unwrap();
    let device = Device {
        id: 1,
        len: PAGES * PAGE,
    };
    let options = Options::new().hot(2).log_bytes(64 << 10);
    let folder = DirFolder::new(dir.path().join("store")).unwrap();
    let storm = Storm {
        store: Store::create(folder, &device, &options).unwrap(),
        device: (0..PAGES).map(|_| AtomicU64::new(0)).collect(),
        writers: AtomicU64::new(4),
        copies: AtomicU64::new(0),
    };
    storm.store.join("copy").unwrap();
    let mut copy = vec![0; PAGES as usize];
    thread::scope(|scope| {
        for n in 0..4 {
            let storm = &storm;
            scope.spawn(move || storm.write(n + 7, n > 0));
        }
        let mut parent = None;
        while storm.writers.load(Ordering::Acquire) > 0 {
            parent = Some(storm.copy(&mut copy, parent));
            storm.store.close_extents().unwrap();
            storm.copies.fetch_add(1, Ordering::Relaxed);
        }
        storm.copy(&mut copy, parent);
    });
    let words = storm.device.iter().map(|word| word.load(Ordering::Relaxed));
    assert_eq!(copy, words.collect::<Vec<_>>());
    storm.store.close_extents().unwrap();
    let stats = storm.store.stats();
    assert_eq!(stats.open, 0);
    assert!(stats.switches > 1 && stats.closed > PAGES * PAGE / EXTENT);
}
