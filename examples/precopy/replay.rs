//! The workload: devices and CPU markers that issue the writes of the trace, each on a thread of
//! its own. At its end the trace starts anew, with other bytes, because a machine keeps writing.
//! Each further pass issues only the writes of a few blocks, different ones each time. So a lost
//! write is rarely repaired by a later write to the same page.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{Scope, ScopedJoinHandle};
use std::time::{Duration, Instant};

use dirtymap::{Iova, IovaRange};
use dirtymap_examples::iolog::{Kind, Op, Trace};
use pagetable_sim::{Device, DeviceConfig, Format};

use crate::Failure;
use crate::cli::Sabotage;
use crate::machine::Machine;
use crate::rate::{Phase, Written};

/// All writes of one block go through one worker, so that each device has locality, like real ones.
const BLOCK: u64 = 256 << 10;
/// After the first pass, each pass replays one block in this number.
const PASS_SHARE: u64 = 16;
/// Larger operations are issued in pieces.
const PIECE: u64 = 1 << 20;
/// The time for which an idle device keeps its posted writes in flight.
const HOLD: Duration = Duration::from_millis(100);
/// Devices cache many translations and have many writes in flight, so that a missing or early flush
/// is detected.
const DEVICE: DeviceConfig = DeviceConfig {
    iotlb_sets: 512,
    iotlb_ways: 8,
    posted_writes: 4096,
    ..DeviceConfig::DEFAULT
};
/// The interval at which a waiting worker serves its device.
const NAP: Duration = Duration::from_micros(200);

/// The settings of the replay.
pub(crate) struct Settings {
    pub(crate) devices: usize,
    pub(crate) cpus: usize,
    pub(crate) seed: u64,
    /// Trace time for each unit of real time; `None`: as fast as possible.
    pub(crate) speed: Option<f64>,
    pub(crate) sabotage: Option<Sabotage>,
}

/// The counters of the workers while they run.
#[derive(Default)]
pub(crate) struct Progress {
    /// Operations that were issued.
    pub(crate) issued: AtomicU64,
    /// Writes among these.
    pub(crate) writes: AtomicU64,
    stop: AtomicBool,
    /// The phase of the meter.
    pub(crate) phase: Phase,
}

impl Progress {
    /// Whether the machine stops.
    pub(crate) fn is_stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    /// Asks the workers to stop after their current operation.
    pub(crate) fn stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

/// The running workers.
pub(crate) struct Replay<'scope> {
    workers: Vec<ScopedJoinHandle<'scope, Result<Vec<Written>, Failure>>>,
}

impl<'scope> Replay<'scope> {
    /// Starts all devices and CPU markers.
    pub(crate) fn start<'env: 'scope, F: Format>(
        scope: &'scope Scope<'scope, 'env>,
        machine: &'env Machine<F>,
        trace: &'env Trace,
        settings: &'env Settings,
        progress: &'env Progress,
    ) -> Self {
        let workers = settings.devices + settings.cpus;
        let mut queues = vec![Vec::new(); workers];
        for (index, op) in trace.ops.iter().enumerate() {
            let route = block_hash(op, settings.seed) % workers as u64;
            queues[route as usize].push(index);
        }
        let began = Instant::now();
        let workers = queues
            .into_iter()
            .enumerate()
            .map(|(index, queue)| {
                let worker = Worker {
                    machine,
                    trace,
                    settings,
                    progress,
                    began,
                    buffer: vec![0; PIECE as usize],
                    log: Vec::new(),
                };
                let port = if index < settings.devices {
                    Port::Device(Box::new(machine.domain.attach(DEVICE)))
                } else {
                    Port::Cpu { writes: 0 }
                };
                scope.spawn(move || worker.run(port, &queue))
            })
            .collect();
        Replay { workers }
    }

    /// Waits until every worker has stopped and the writes in flight have landed. Returns the log
    /// of all writes.
    pub(crate) fn join(self) -> Result<Vec<Written>, Failure> {
        let mut result = Ok(Vec::new());
        for worker in self.workers {
            let done = worker.join().unwrap_or(Err(Failure::WorkerPanicked));
            match (&mut result, done) {
                (Ok(log), Ok(more)) => log.extend(more),
                (Ok(_), Err(error)) => result = Err(error),
                (Err(_), _) => {}
            }
        }
        result
    }
}

/// The access of a worker to memory.
enum Port<F: Format> {
    Device(Box<Device<F>>),
    Cpu { writes: u64 },
}

struct Worker<'a, F: Format> {
    machine: &'a Machine<F>,
    trace: &'a Trace,
    settings: &'a Settings,
    progress: &'a Progress,
    began: Instant,
    buffer: Vec<u8>,
    log: Vec<Written>,
}

impl<F: Format> Worker<'_, F> {
    fn run(mut self, mut port: Port<F>, queue: &[usize]) -> Result<Vec<Written>, Failure> {
        // The time of one pass. It is never 0, because the last operation takes time too.
        let pass_us = self
            .trace
            .duration_us
            .saturating_add(self.trace.duration_us / self.trace.ops.len() as u64 + 1);
        let passes = if queue.is_empty() { 0..0 } else { 0..u64::MAX };
        for (pass, &index) in passes.flat_map(|pass| queue.iter().map(move |index| (pass, index))) {
            let op = &self.trace.ops[index];
            if pass > 0
                && !block_hash(op, mix(self.settings.seed) ^ pass).is_multiple_of(PASS_SHARE)
            {
                continue;
            }
            if !self.wait_until(
                pass.saturating_mul(pass_us).saturating_add(op.at_us),
                &mut port,
            ) {
                break;
            }
            let stream = mix(self.settings.seed ^ mix(pass)) ^ index as u64;
            self.issue(stream, op, &mut port)?;
            self.progress.issued.fetch_add(1, Ordering::Relaxed);
            if op.kind == Kind::Write {
                self.progress.writes.fetch_add(1, Ordering::Relaxed);
            }
        }
        // The device is dropped here: its writes in flight land, and it leaves the domain.
        Ok(self.log)
    }

    /// Waits until `at_us` of the trace, and serves the device meanwhile. False if the machine is
    /// to stop.
    fn wait_until(&self, at_us: u64, port: &mut Port<F>) -> bool {
        let due = self.settings.speed.map(|speed| {
            Duration::try_from_secs_f64(at_us as f64 / 1e6 / speed).unwrap_or(Duration::MAX)
        });
        let idle_since = Instant::now();
        loop {
            if self.progress.stop.load(Ordering::Relaxed) {
                return false;
            }
            let now = self.began.elapsed();
            let Some(left) = due
                .and_then(|due| due.checked_sub(now))
                .filter(|left| !left.is_zero())
            else {
                return true;
            };
            if let Port::Device(device) = port {
                device.service();
                if idle_since.elapsed() > HOLD {
                    device.quiesce();
                }
            }
            std::thread::sleep(left.min(NAP));
        }
    }

    fn issue(&mut self, stream: u64, op: &Op, port: &mut Port<F>) -> Result<(), Failure> {
        let start = self.machine.files[op.file as usize].range.start().get() + op.offset;
        let mut done = 0;
        while done < op.length {
            let length = (op.length - done).min(PIECE);
            let range = IovaRange::from_len(Iova::new(start + done), length)?;
            match op.kind {
                Kind::Read => self.read(range, port)?,
                Kind::Write => {
                    fill(&mut self.buffer[..length as usize], mix(stream ^ mix(done)));
                    let began = self.progress.phase.read();
                    self.write(range, port)?;
                    let phases = (began, self.progress.phase.read());
                    self.log.push(Written { range, phases });
                }
            }
            done += length;
        }
        Ok(())
    }

    fn read(&mut self, range: IovaRange, port: &mut Port<F>) -> Result<(), Failure> {
        let buffer = &mut self.buffer[..range.len() as usize];
        match port {
            Port::Device(device) => device.read(range.start(), buffer)?,
            Port::Cpu { .. } => self
                .machine
                .memory
                .read(self.machine.phys(range.start()), buffer)?,
        }
        Ok(())
    }

    fn write(&mut self, range: IovaRange, port: &mut Port<F>) -> Result<(), Failure> {
        let bytes = &self.buffer[..range.len() as usize];
        match port {
            Port::Device(device) => device.write(range.start(), bytes)?,
            Port::Cpu { writes } => {
                self.machine
                    .memory
                    .write(self.machine.phys(range.start()), bytes)?;
                *writes += 1;
                // The mark comes after the write, because a harvest may take an earlier mark before
                // the data is in memory.
                if self.settings.sabotage != Some(Sabotage::SkipMark) || !writes.is_multiple_of(8) {
                    self.machine.space.mark(range)?;
                }
            }
        }
        Ok(())
    }
}

/// A hash of the block in which `op` starts.
fn block_hash(op: &Op, seed: u64) -> u64 {
    let block = (u64::from(op.file) << 44) | (op.offset / BLOCK);
    mix(block ^ mix(seed))
}

/// Fills `buffer` with bytes that differ for each `stream`.
fn fill(buffer: &mut [u8], stream: u64) {
    let mut state = stream;
    for chunk in buffer.chunks_mut(8) {
        state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let word = (state ^ state >> 29)
            .wrapping_mul(0xBF58_476D_1CE4_E5B9)
            .to_le_bytes();
        chunk.copy_from_slice(&word[..chunk.len()]);
    }
}

/// A hash of one word.
pub(crate) fn mix(mut word: u64) -> u64 {
    word = (word ^ word >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    word = (word ^ word >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
    word ^ word >> 31
}
