//! Marks without a fence, ordered by `membarrier(2)`: the same answers, and no lost write by real
//! threads.
#![cfg(all(feature = "membarrier", not(dirtymap_loom)))]
#![allow(clippy::unwrap_used)] // helpers of tests

mod common_skip;

use dirtymap::space::MarkOrdering;
use dirtymap::{Access, AddressSpace, Granule, HarvestRequest, Iova, IovaRange, UserBitmap};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

fn space() -> (AddressSpace, IovaRange) {
    let page = IovaRange::from_len(Iova::MIN, 4096).unwrap();
    let space = AddressSpace::new(Granule::K4).with_asymmetric_marks();
    space.map(page, 0, Access::ReadWrite).unwrap();
    space.start_tracking().unwrap();
    (space, page)
}

/// Harvests; copies `data` if its page was dirty.
fn pass(space: &AddressSpace, page: IovaRange, data: &AtomicU64, copy: &mut u64) {
    let mut words = [0u64];
    let request = HarvestRequest::new(page, Granule::K4);
    let lease = space
        .harvest(&request, UserBitmap::new(&mut words))
        .unwrap();
    let lease = lease.sync().unwrap();
    if lease.dirty() == 1 {
        *copy = data.load(Relaxed);
    }
    lease.commit();
}

#[test]
fn a_space_says_what_it_uses() {
    assert_eq!(
        AddressSpace::new(Granule::K4).mark_ordering(),
        MarkOrdering::Fences
    );
    let (space, _) = space();
    let ordering = space.mark_ordering();
    match has_membarrier() {
        true => assert_eq!(ordering, MarkOrdering::Membarrier),
        false => {
            assert_eq!(ordering, MarkOrdering::Fences);
            common_skip::skip("no membarrier(2)");
        }
    }
}

/// Whether the system has expedited private barriers.
fn has_membarrier() -> bool {
    #[cfg(target_os = "linux")]
    {
        let query = libc::MEMBARRIER_CMD_QUERY;
        // SAFETY: this system call takes numbers and touches no memory of ours.
        let commands = unsafe { libc::syscall(libc::SYS_membarrier, query, 0, 0) };
        commands > 0 && commands & i64::from(libc::MEMBARRIER_CMD_PRIVATE_EXPEDITED) != 0
    }
    #[cfg(not(target_os = "linux"))]
    false
}

/// The writer pauses now and then, after it has marked its last write. One more pass must copy that
/// write.
#[test]
fn the_last_write_is_copied() {
    let (space, page) = space();
    let handle = space.area(Iova::MIN).unwrap();
    let data = AtomicU64::new(0);
    // The round in which the writer may write, and the round that it has finished.
    let (round, finished) = (AtomicU64::new(0), AtomicU64::new(0));
    let stop = AtomicBool::new(false);
    std::thread::scope(|threads| {
        threads.spawn(|| {
            let mut written = 0;
            while !stop.load(Relaxed) {
                let now = round.load(std::sync::atomic::Ordering::Acquire);
                if now == finished.load(Relaxed) {
                    std::hint::spin_loop();
                    continue;
                }
                for _ in 0..200 {
                    written += 1;
                    data.store(written, Relaxed);
                    handle.mark(page).unwrap();
                }
                finished.store(now, std::sync::atomic::Ordering::Release);
            }
        });
        let began = Instant::now();
        let mut copy = 0;
        let mut now = 0;
        while began.elapsed() < Duration::from_millis(300) {
            now += 1;
            round.store(now, std::sync::atomic::Ordering::Release);
            while finished.load(std::sync::atomic::Ordering::Acquire) != now {
                pass(&space, page, &data, &mut copy);
            }
            pass(&space, page, &data, &mut copy);
            assert_eq!(copy, data.load(Relaxed), "round {now}");
        }
        stop.store(true, Relaxed);
    });
}

/// Makes the system refuse every `membarrier(2)` of this thread. Returns whether it does.
#[cfg(target_os = "linux")]
fn refuse_membarrier() -> bool {
    // A program of classic BPF: load the number of the system call, compare it, return.
    let statement = |code: u32, jf: u8, k: u32| libc::sock_filter {
        code: code as u16,
        jt: 0,
        jf,
        k,
    };
    let number = std::mem::offset_of!(libc::seccomp_data, nr) as u32;
    let ret = libc::BPF_RET | libc::BPF_K;
    let mut filter = [
        statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, number),
        statement(
            libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K,
            1,
            libc::SYS_membarrier as u32,
        ),
        statement(ret, 0, libc::SECCOMP_RET_ERRNO | libc::EPERM as u32),
        statement(ret, 0, libc::SECCOMP_RET_ALLOW),
    ];
    let program = libc::sock_fprog {
        len: filter.len() as u16,
        filter: filter.as_mut_ptr(),
    };
    // SAFETY: sets a flag of this thread.
    let quiet = unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) } == 0;
    let mode = libc::SECCOMP_MODE_FILTER;
    // SAFETY: the kernel copies the program, which lives until then; it refuses a wrong one.
    quiet && unsafe { libc::prctl(libc::PR_SET_SECCOMP, mode, &raw const program) } == 0
}

/// Each sync, each unmap and each switch to on runs the fence in the other threads, by one system
/// call or more. Once, no test noticed that all but the one call that registers were gone: the
/// processor at hand rarely holds a store back for as long as a harvest takes. So the system
/// refuses the call here. Then each of the three must fail; to go on would lose writes.
#[cfg(target_os = "linux")]
#[test]
fn each_sync_unmap_and_switch_asks_the_system() {
    use std::panic::{AssertUnwindSafe, catch_unwind};

    if !has_membarrier() {
        return common_skip::skip("no membarrier(2)");
    }
    let (tracked, page) = space();
    let fresh = AddressSpace::new(Granule::K4).with_asymmetric_marks();
    fresh.map(page, 0, Access::ReadWrite).unwrap();
    let fails = |call: &mut dyn FnMut()| {
        let panic = catch_unwind(AssertUnwindSafe(call)).err();
        let says = panic.and_then(|panic| panic.downcast_ref::<&str>().copied());
        says.is_some_and(|says| says.contains("membarrier(2)"))
    };
    let refused = std::thread::scope(|threads| {
        let without = threads.spawn(|| {
            if !refuse_membarrier() {
                return false;
            }
            tracked.mark(page).unwrap();
            let mut words = [0u64];
            let request = HarvestRequest::new(page, Granule::K4);
            // What copies nothing asks for nothing.
            for commits in [false, true] {
                let bitmap = UserBitmap::new(&mut words);
                let lease = tracked.harvest(&request, bitmap).unwrap();
                assert_eq!(lease.report().bits_set, 1);
                match commits {
                    false => {
                        lease.abort();
                    }
                    true => {
                        let mut lease = Some(lease);
                        assert!(fails(&mut || drop(lease.take().unwrap().sync())), "sync");
                    }
                }
                words = [0];
            }
            assert!(fails(&mut || fresh.start_tracking().unwrap()), "switch");
            assert!(fails(&mut || drop(tracked.unmap_discarding(page))), "unmap");
            true
        });
        without.join().unwrap()
    });
    if !refused {
        common_skip::skip("this process may not filter its system calls");
    }
}
