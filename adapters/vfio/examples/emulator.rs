//! A device emulator with a log for its client. The devices are threads that write and mark. The
//! client copies the pages that the log reports, in rounds, and compares at the end.
//!
//! Exit status: 0 if the copy is the memory, 1 if it differs.

use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use dirtymap::exchange::DirtyLog;
use dirtymap::{Access, AddressSpace, Granule, Iova, IovaRange};
use dirtymap_vfio::{DmaLogger, DmaRange};

const PAGES: u64 = 4096;
const PAGE: u64 = 4096;
/// The page of the client's reports. It differs from that of the space.
const CLIENT_PAGE: u64 = 16 << 10;

fn main() -> Result<ExitCode, Box<dyn std::error::Error>> {
    // One word for each page stands for the memory.
    let memory: Vec<AtomicU64> = (0..PAGES).map(|_| AtomicU64::new(0)).collect();
    let mut copy = vec![0; PAGES as usize];
    let space = Arc::new(AddressSpace::new(Granule::K4));
    let log = DmaLogger::new(Arc::clone(&space), "device");
    space.map(0..PAGES * PAGE, 0, Access::ReadWrite)?;

    let all = DmaRange {
        iova: 0,
        length: PAGES * PAGE,
    };
    let page = log.start(CLIENT_PAGE, &[all])?;
    println!("the log has pages of {page}, the client asks for pages of {CLIENT_PAGE} bytes");
    let ends = AtomicBool::new(false);
    std::thread::scope(|scope| -> Result<(), Box<dyn std::error::Error>> {
        for seed in 1..=2 {
            let (memory, space, ends) = (&memory, &space, &ends);
            scope.spawn(move || {
                let mut random: u64 = seed;
                while !ends.load(Ordering::Relaxed) {
                    random = random
                        .wrapping_mul(6_364_136_223_846_793_005)
                        .wrapping_add(1);
                    let page = (random >> 40) % PAGES;
                    if let Some(word) = memory.get(page as usize) {
                        word.fetch_add(random | 1, Ordering::Relaxed);
                    }
                    // After the write.
                    let _ = space.mark(page * PAGE..page * PAGE + 8);
                }
            });
        }
        for round in 0..8 {
            println!(
                "round {round}: {} pages",
                copy_round(&log, all, &memory, &mut copy)?
            );
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        ends.store(true, Ordering::Relaxed);
        Ok(())
    })?;
    println!(
        "last round: {} pages",
        copy_round(&log, all, &memory, &mut copy)?
    );
    log.stop()?;
    let is_same = |(word, copy): (&AtomicU64, &u64)| word.load(Ordering::Relaxed) == *copy;
    let different = memory
        .iter()
        .zip(&copy)
        .filter(|pair| !is_same(*pair))
        .count();
    println!("{different} of {PAGES} pages differ");
    Ok(ExitCode::from(u8::from(different != 0)))
}

/// Copies what the log tells. Returns how many pages that is.
fn copy_round(
    log: &DmaLogger,
    range: DmaRange,
    memory: &[AtomicU64],
    copy: &mut [u64],
) -> Result<u64, Box<dyn std::error::Error>> {
    let mut bits = vec![0; (range.length / CLIENT_PAGE).div_ceil(8) as usize];
    log.report(range, CLIENT_PAGE, &mut bits)?;
    let range = IovaRange::from_len(Iova::new(range.iova), range.length)?;
    let told = DirtyLog::bytes(&bits, range, Granule::from_bytes(CLIENT_PAGE)?)?;
    let mut pages = 0;
    for run in told.runs() {
        let (first, last) = (run.start().get() / PAGE, run.last().get() / PAGE);
        for page in first as usize..=last as usize {
            if let (Some(word), Some(copy)) = (memory.get(page), copy.get_mut(page)) {
                *copy = word.load(Ordering::Relaxed);
                pages += 1;
            }
        }
    }
    Ok(pages)
}
