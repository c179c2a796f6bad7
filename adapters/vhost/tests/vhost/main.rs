//! The vhost log, both sides: its layout, swaps, and a real vhost-user daemon, in this process and
//! in another one.
#![cfg(all(target_os = "linux", not(dirtymap_loom)))]
#![allow(clippy::unwrap_used)] // helpers of tests

mod back;
mod front;
mod hostile;
mod processes;
mod rig;

use dirtymap::{AddressSpace, Granule, HarvestRequest, Iova, IovaRange, UserBitmap};
use dirtymap_vhost::LogMemory;
use std::os::unix::fs::FileExt;

const PAGE: u64 = 4096;
/// No page was dirty.
const NONE: [u64; 0] = [];

fn bytes(start: u64, len: u64) -> IovaRange {
    IovaRange::from_len(Iova::new(start), len).unwrap()
}

/// The log as another process sees it: its file.
fn content(log: &LogMemory) -> Vec<u8> {
    let mut bytes = vec![0; log.size() as usize];
    log.file().read_exact_at(&mut bytes, log.offset()).unwrap();
    bytes
}

/// The numbers of the set bits in the order of the format.
fn bits(log: &LogMemory) -> Vec<u64> {
    let content = content(log);
    let bytes = content.iter().enumerate().filter(|(_, byte)| **byte != 0);
    bytes
        .flat_map(|(at, byte)| {
            let set = (0..8).filter(move |n| byte >> n & 1 == 1);
            set.map(move |n| at as u64 * 8 + n)
        })
        .collect()
}

/// Sets a bit in its byte, as a back end in C does.
fn set_bit(log: &LogMemory, page: u64) {
    let mut byte = [0];
    let at = log.offset() + page / 8;
    log.file().read_exact_at(&mut byte, at).unwrap();
    byte[0] |= 1 << (page % 8);
    log.file().write_all_at(&byte, at).unwrap();
}

/// Runs `body` in a child of a fork of this process. Returns its result, 0 to 255.
fn in_child(body: impl FnOnce() -> i32) -> i32 {
    // SAFETY: the child takes no lock that another thread of its parent may hold, except for the
    // allocator's, which the system resets in a fork.
    match unsafe { libc::fork() } {
        0 => {
            // SAFETY: takes a number. The alarm ends a child that waits for a thread that it does
            // not have.
            unsafe { libc::alarm(30) };
            let body = std::panic::AssertUnwindSafe(body);
            let code = std::panic::catch_unwind(body).unwrap_or(255);
            // SAFETY: takes a number.
            unsafe { libc::_exit(code) }
        }
        child => {
            let mut status = 0;
            // SAFETY: `status` outlives the call.
            assert_eq!(unsafe { libc::waitpid(child, &mut status, 0) }, child);
            assert!(libc::WIFEXITED(status), "the child ended by {status:#x}");
            libc::WEXITSTATUS(status)
        }
    }
}

/// Harvests `range` and commits. Returns the numbers of the dirty pages of 4 KiB.
fn taken(space: &AddressSpace, range: IovaRange) -> Vec<u64> {
    let mut words = vec![0; (range.granules(Granule::K4) as usize).div_ceil(64)];
    let request = HarvestRequest::new(range, Granule::K4);
    let lease = space
        .harvest(&request, UserBitmap::new(&mut words))
        .unwrap();
    let lease = lease.sync().unwrap();
    let pages = |run: IovaRange| run.start().get() / PAGE..=run.last().get() / PAGE;
    let found = lease.runs().flat_map(pages).collect();
    lease.commit();
    found
}
