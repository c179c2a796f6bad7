//! The front end: starts the device, migrates its memory, compares.

use std::error::Error;
use std::fs::File;
use std::io::{self, IsTerminal, Write};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::Parser;
use dirtymap::{Access, AddressSpace, Granule, HarvestRequest, Iova, IovaRange, UserBitmap};
use dirtymap_vhost::{LogMemory, VhostLog};
use indicatif::{HumanBytes, HumanCount, ProgressBar, ProgressStyle};
use vhost::vhost_user::message::VhostUserHeaderFlag;
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserDirtyLogRegion, VhostUserMemoryRegionInfo};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};

use crate::device;

const PAGE: Granule = Granule::K4;
/// Where the upper half of memory begins.
const HIGH: u64 = 4 << 30;
/// How long the device may take to listen.
const PATIENCE: Duration = Duration::from_secs(30);

/// Migrates the memory of a vhost-user device that runs in a process of its own, by the dirty log
/// that both share.
///
/// The device writes guest memory and marks it in the log. The front end copies everything, then
/// harvests and copies, round after round, and swaps the log under the device now and then. At the
/// end the device is stopped, and both sides are compared, byte for byte.
///
/// Exit status: 0 if all bytes are identical, 1 if a page differs, 2 if something cannot be done.
#[derive(Parser, Clone, Debug)]
#[command(name = "vhost_log", max_term_width = 100)]
struct Cli {
    /// Guest memory in MiB, 2 to 65536; half of it lies at 4 GiB
    #[arg(
        long, value_name = "MiB", default_value_t = 128,
        value_parser = clap::value_parser!(u64).range(2..=65536),
    )]
    memory: u64,

    /// Rounds while the device writes, 1 to 10000
    #[arg(
        long, value_name = "N", default_value_t = 12,
        value_parser = clap::value_parser!(u32).range(1..=10_000),
    )]
    rounds: u32,

    /// Swap the log in every N-th round
    #[arg(
        long, value_name = "N", default_value_t = 3,
        value_parser = clap::value_parser!(u32).range(1..),
    )]
    swap: u32,

    /// Threads of the device that write, 1 to 64
    #[arg(
        long, value_name = "N", default_value_t = 3,
        value_parser = clap::value_parser!(u64).range(1..=64),
    )]
    writers: u64,

    /// Milliseconds between two rounds, 0 to 60000
    #[arg(
        long, value_name = "MS", default_value_t = 50,
        value_parser = clap::value_parser!(u64).range(0..=60_000),
    )]
    pause: u64,

    /// Be the device, at this socket
    #[arg(long, hide = true)]
    device: Option<PathBuf>,
}

pub(crate) fn main() -> ExitCode {
    let cli = Cli::parse();
    let done = match &cli.device {
        Some(socket) => device::run(socket, cli.writers).map(|()| 0),
        None => migrate(&cli),
    };
    match done {
        Ok(status) => ExitCode::from(status),
        Err(error) => {
            let _ = writeln!(io::stderr(), "error: {error}");
            ExitCode::from(2)
        }
    }
}

/// The device's process; it is ended at the latest when this is dropped.
struct Device(Child);

impl Device {
    fn start(socket: &Path, writers: u64) -> io::Result<Self> {
        let child = Command::new(std::env::current_exe()?)
            .arg("--device")
            .arg(socket)
            .args(["--writers", &writers.to_string()])
            .stdin(Stdio::piped())
            .spawn()?;
        Ok(Device(child))
    }

    /// Waits until the device has finished the writes that it has begun.
    fn stop(&mut self) -> Result<(), Box<dyn Error>> {
        drop(self.0.stdin.take());
        match self.0.wait()? {
            status if status.success() => Ok(()),
            status => {
                Err(format!("the device ended with {status}: its marks may be missing").into())
            }
        }
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        // This does nothing to a process that has ended.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A region of guest memory, in a file that the device gets too.
struct Region {
    range: IovaRange,
    file: File,
    copy: Vec<u8>,
}

impl Region {
    fn new(start: u64, len: u64) -> Result<Self, Box<dyn Error>> {
        let file = tempfile::tempfile()?;
        file.set_len(len)?;
        Ok(Region {
            range: IovaRange::from_len(Iova::new(start), len)?,
            file,
            copy: vec![0; usize::try_from(len)?],
        })
    }

    fn info(&self) -> VhostUserMemoryRegionInfo {
        VhostUserMemoryRegionInfo {
            guest_phys_addr: self.range.start().get(),
            memory_size: self.copy.len() as u64,
            // The front end's own address, by which rings are named; there are none.
            userspace_addr: 0x7000_0000_0000 + self.range.start().get(),
            mmap_offset: 0,
            mmap_handle: self.file.as_raw_fd(),
        }
    }
}

fn connect(socket: &Path, regions: &[Region]) -> Result<Frontend, Box<dyn Error>> {
    let deadline = Instant::now() + PATIENCE;
    let mut device = loop {
        match Frontend::connect(socket, 1) {
            Ok(device) => break device,
            Err(error) if Instant::now() > deadline => {
                return Err(format!("the device does not listen: {error}").into());
            }
            Err(_) => std::thread::sleep(Duration::from_millis(5)),
        }
    };
    device.set_owner()?;
    device.get_features()?;
    let protocol = device.get_protocol_features()?;
    device.set_protocol_features(protocol)?;
    device.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
    device.set_features(device::FEATURES)?;
    let infos: Vec<_> = regions.iter().map(Region::info).collect();
    device.set_mem_table(&infos)?;
    Ok(device)
}

fn send(device: &Frontend, log: &LogMemory) -> Result<(), Box<dyn Error>> {
    let region = VhostUserDirtyLogRegion {
        mmap_size: log.size(),
        mmap_offset: log.offset(),
        mmap_handle: log.file().as_raw_fd(),
    };
    device.set_log_base(0, Some(region))?;
    Ok(())
}

fn migrate(cli: &Cli) -> Result<u8, Box<dyn Error>> {
    let bytes = cli.memory << 20;
    let low = (bytes / 2).min(HIGH);
    let mut regions = [Region::new(0, low)?, Region::new(HIGH, bytes - low)?];
    let ranges: Result<Vec<_>, io::Error> = regions
        .iter()
        .map(|region| {
            let file = FileOffset::new(region.file.try_clone()?, 0);
            let start = GuestAddress(region.range.start().get());
            Ok((start, region.copy.len(), Some(file)))
        })
        .collect();
    let memory = GuestMemoryMmap::<()>::from_ranges_with_files(&ranges?)?;

    let log = Arc::new(VhostLog::new(regions[1].range.last())?);
    let space = AddressSpace::with_source(PAGE, Arc::clone(&log))?;
    for region in &regions {
        let backing = region.range.start().get();
        space.map(region.range, backing, Access::ReadWrite)?;
    }

    let place = tempfile::tempdir()?;
    let socket = place.path().join("socket");
    let mut process = Device::start(&socket, cli.writers)?;
    let device = connect(&socket, &regions)?;
    writeln!(
        io::stdout(),
        "machine: {} of memory, a device in process {} with {} writers, a log of {}",
        HumanBytes(bytes),
        process.0.id(),
        cli.writers,
        HumanBytes(log.memory().size())
    )?;
    send(&device, &log.memory())?;
    // The device has the log: from here on every write is reported, and everything is copied once.
    space.start_tracking()?;
    for region in &mut regions {
        memory.read_slice(&mut region.copy, GuestAddress(region.range.start().get()))?;
    }

    let bar = match io::stderr().is_terminal() {
        true => ProgressBar::new(u64::from(cli.rounds) + 1),
        false => ProgressBar::hidden(),
    };
    bar.set_style(ProgressStyle::with_template(
        "{wide_bar} {pos}/{len} rounds  {elapsed}",
    )?);
    let report = |line: String| bar.suspend(|| writeln!(io::stdout(), "{line}"));
    for round in 1..=cli.rounds {
        std::thread::sleep(Duration::from_millis(cli.pause));
        let mut carried = String::new();
        if round % cli.swap == 0 {
            let swap = log.swap(Iova::MIN)?;
            send(&device, swap.memory())?;
            let left = swap.acknowledged();
            carried = format!("; log swapped, {} pages carried over", HumanCount(left));
        }
        let dirty = copy_dirty(&space, &memory, &mut regions)?;
        report(format!(
            "round {round:3}: {} pages{carried}",
            HumanCount(dirty)
        ))?;
        bar.inc(1);
    }
    process.stop()?;
    // The device has ended. Its last marks are still in the log.
    let dirty = copy_dirty(&space, &memory, &mut regions)?;
    report(format!("last     : {} pages", HumanCount(dirty)))?;
    bar.finish_and_clear();
    compare(&memory, &regions)
}

/// Harvests, and copies the dirty pages. Returns how many there were.
fn copy_dirty(
    space: &AddressSpace,
    memory: &GuestMemoryMmap<()>,
    regions: &mut [Region],
) -> Result<u64, Box<dyn Error>> {
    let mut pages = 0;
    for region in regions {
        let mut words = vec![0; (region.range.granules(PAGE) as usize).div_ceil(64)];
        let request = HarvestRequest::new(region.range, PAGE);
        let lease = space.harvest(&request, UserBitmap::new(&mut words))?;
        let lease = lease.sync()?;
        for run in lease.runs() {
            let start = run.start().get();
            let from = (start - region.range.start().get()) as usize;
            let into = &mut region.copy[from..from + run.len() as usize];
            // An error drops the lease: its pages are dirty again.
            memory.read_slice(into, GuestAddress(start))?;
        }
        pages += lease.dirty();
        lease.commit();
    }
    Ok(pages)
}

fn compare(memory: &GuestMemoryMmap<()>, regions: &[Region]) -> Result<u8, Box<dyn Error>> {
    let (mut identical, mut differ) = (0u64, 0u64);
    let mut page = [0u8; 4096];
    for region in regions {
        for (n, copy) in region.copy.chunks(page.len()).enumerate() {
            let at = region.range.start().get() + n as u64 * page.len() as u64;
            memory.read_slice(&mut page, GuestAddress(at))?;
            match copy == page {
                true => identical += 1,
                false => differ += 1,
            }
        }
    }
    if differ > 0 {
        let all = identical + differ;
        writeln!(io::stdout(), "NOT VERIFIED: {differ} of {all} pages differ")?;
        return Ok(1);
    }
    writeln!(io::stdout(), "verified: {identical} pages identical")?;
    Ok(0)
}
