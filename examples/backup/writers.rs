//! The trace, folded into the disk image, and the threads that replay it.
//!
//! Each thread owns stripes of the image, and performs its part of each operation in the order of
//! the trace. It records how far it is in a file, after the write. So what the image holds at any
//! moment follows from one number for each thread.

use std::error::Error;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{PoisonError, RwLock};
use std::thread;
use std::time::{Duration, Instant};

use dirtymap_examples::iolog::{Kind, Trace};
use dirtymap_store::Store;

use crate::cli::{Cli, Sabotage};

pub(crate) const PAGE: u64 = 4096;
/// Bytes of a stripe.
const STRIPE: u64 = 1 << 20;
pub(crate) const WRITERS: usize = 2;
/// The most writes that a thread announces together.
const QUEUE: usize = 64;

/// What is written, and when.
pub(crate) struct Plan {
    /// Bytes of the image.
    pub(crate) len: u64,
    pub(crate) name: String,
    seed: u64,
    sabotage: Option<Sabotage>,
    /// For each thread its writes: number of the operation, microseconds, page.
    writes: [Vec<(u32, u64, u64)>; WRITERS],
}

impl Plan {
    pub(crate) fn read(cli: &Cli) -> Result<Plan, Box<dyn Error>> {
        let mut trace = Trace::open(&cli.trace)?;
        if trace.duration_us == 0 {
            trace.space_evenly(100);
        }
        let len = cli.size << 20;
        let mut starts = Vec::new();
        let mut start = 0u64;
        for file in &trace.files {
            starts.push(start);
            start = start.wrapping_add(file.bytes.next_multiple_of(STRIPE));
        }
        let ops = (0u32..)
            .zip(&trace.ops)
            .filter(|(_, op)| op.kind == Kind::Write);
        let ops: Vec<_> = ops.take(usize::try_from(cli.writes)?).collect();
        let last = ops.last().map_or(1, |(_, op)| op.at_us.max(1));
        let scale = cli.seconds as f64 * 1e6 / last as f64;
        let mut writes = [const { Vec::new() }; WRITERS];
        for (number, op) in ops {
            let first = starts[op.file as usize].wrapping_add(op.offset) / PAGE;
            // A write that is longer than the image covers it.
            let pages = op.length.div_ceil(PAGE).min(len / PAGE);
            for page in (first..first + pages).map(|page| page % (len / PAGE)) {
                let thread = (page * PAGE / STRIPE) as usize % WRITERS;
                writes[thread].push((number, (op.at_us as f64 * scale) as u64, page));
            }
        }
        let name = cli.trace.file_name().unwrap_or_default();
        Ok(Plan {
            len,
            name: name.to_string_lossy().into_owned(),
            seed: cli.seed,
            sabotage: cli.sabotage,
            writes,
        })
    }

    /// How many pages thread `thread` writes.
    pub(crate) fn writes(&self, thread: usize) -> u64 {
        self.writes[thread].len() as u64
    }

    /// The page of write `number` of a thread, and what is written to it.
    pub(crate) fn contents(&self, thread: usize, number: u64) -> (u64, [u8; PAGE as usize]) {
        let (op, _, page) = self.writes[thread][number as usize];
        let mut state = self.seed ^ u64::from(op) << 32 ^ page;
        let mut bytes = [0; PAGE as usize];
        for word in bytes.chunks_exact_mut(8) {
            // splitmix64
            state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
            let mixed = (state ^ (state >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
            let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
            word.copy_from_slice(&(mixed ^ (mixed >> 31)).to_le_bytes());
        }
        (page, bytes)
    }
}

/// The threads of a worker.
pub(crate) struct Writers<'w> {
    pub(crate) plan: &'w Plan,
    pub(crate) store: &'w Store,
    pub(crate) image: &'w File,
    /// How many writes each thread has done, also of earlier workers.
    pub(crate) progress: &'w File,
    /// Held for writing while an increment is read: a point in time for all threads.
    pub(crate) freeze: RwLock<()>,
    pub(crate) failed: AtomicBool,
    pub(crate) done: AtomicU64,
}

impl Writers<'_> {
    /// How far thread `thread` is.
    pub(crate) fn at(&self, thread: usize) -> io::Result<u64> {
        let mut bytes = [0; 8];
        self.progress.read_exact_at(&mut bytes, thread as u64 * 8)?;
        Ok(u64::from_le_bytes(bytes))
    }

    /// Replays the part of a thread, from where it was.
    pub(crate) fn run(&self, thread: usize) {
        if let Err(error) = self.replay(thread) {
            eprintln!("backup: a writer: {error}");
            self.failed.store(true, Ordering::Relaxed);
        }
        self.done.fetch_add(1, Ordering::Relaxed);
    }

    fn replay(&self, thread: usize) -> Result<(), Box<dyn Error>> {
        let start = Instant::now();
        let first = self.at(thread)?;
        let writes = &self.plan.writes[thread];
        let resumed = writes.get(first as usize).map_or(0, |write| write.1);
        let mut next = first;
        while let Some((_, due, _)) = writes.get(next as usize) {
            let due = Duration::from_micros(due - resumed);
            thread::sleep(due.saturating_sub(start.elapsed()));
            let _running = self.freeze.read().unwrap_or_else(PoisonError::into_inner);
            // As the queue of a disk does: what waits is announced together, and costs one flush.
            let now = resumed + start.elapsed().as_micros() as u64;
            let waits = writes[next as usize..].iter().take(QUEUE);
            let count = waits.take_while(|write| write.1 <= now).count().max(1) as u64;
            let announce = |number: u64| {
                let skipped = self.plan.sabotage == Some(Sabotage::Unannounced) && number % 8 == 7;
                let at = writes[number as usize].2 * PAGE;
                (!skipped).then(|| self.store.begin_write(at..at + PAGE))
            };
            let intents: Vec<_> = (next..next + count).map(announce).collect();
            for (number, intent) in (next..).zip(intents) {
                let write = intent
                    .transpose()?
                    .map(|intent| intent.wait())
                    .transpose()?;
                let (page, bytes) = self.plan.contents(thread, number);
                self.image.write_all_at(&bytes, page * PAGE)?;
                drop(write); // it has landed
                let done = (number + 1).to_le_bytes();
                self.progress.write_all_at(&done, thread as u64 * 8)?;
            }
            next += count;
        }
        Ok(())
    }
}
