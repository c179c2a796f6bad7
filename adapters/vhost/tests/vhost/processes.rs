//! Two processes over a unix socket: a device writes guest memory and marks it, while the front end
//! harvests, copies and swaps its log.
//!
//! The device is this test binary, started again, with a real vhost-user daemon. At the end the
//! copy must have every byte that the device wrote, and no log may have changed after the device
//! acknowledged its replacement.

use super::rig::{FrontEnd, Guest, Ram, serve, socket};
use super::{PAGE, bytes, content};
use dirtymap::{Access, AddressSpace, Granule, HarvestRequest, Iova, IovaRange, UserBitmap};
use dirtymap_vhost::{LogMemory, VhostLog};
use std::io::Read;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use vm_memory::bitmap::Bitmap;
use vm_memory::{
    Bytes, GuestAddress, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryBackend, GuestMemoryMmap,
};

/// Names the socket. If it is set, this process is the device.
const DEVICE: &str = "DIRTYMAP_VHOST_DEVICE";
const WRITERS: u64 = 3;
/// Two regions. One of them begins and ends inside of bytes of the log.
const RAM: [(u64, u64); 2] = [(0, 256 * PAGE), ((1 << 32) + 3 * PAGE, 333 * PAGE)];
/// A large region that is marked as a whole and never written: most swaps happen during such a
/// mark.
const LARGE: (u64, u64) = (8 << 30, 16 << 30);

/// The second process of the next test. It tests nothing by itself.
#[test]
fn the_device_process() {
    let Ok(socket) = std::env::var(DEVICE) else {
        return;
    };
    let (_daemon, guest) = serve(Path::new(&socket), true);
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for writer in 0..WRITERS {
            let (guest, stop) = (&guest, &stop);
            scope.spawn(move || write(guest, writer, stop));
        }
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                let memory = guest.memory();
                if let Some(region) = memory.find_region(GuestAddress(LARGE.0)) {
                    (**region).bitmap().mark_dirty(0, LARGE.1 as usize);
                }
            }
        });
        // The front end closes this to stop the device, which finishes the writes that it has
        // begun.
        let mut nothing = Vec::new();
        let closed = std::io::stdin().read_to_end(&mut nothing);
        stop.store(true, Ordering::Relaxed);
        closed.unwrap();
    });
    // All writes are marked; the connection ends with the process.
    std::process::exit(0);
}

/// Writes words that only this writer uses, in any page, again and again. Some cross pages.
fn write(guest: &GuestMemoryAtomic<Guest>, writer: u64, stop: &AtomicBool) {
    let mut n = writer + 1;
    while !stop.load(Ordering::Relaxed) {
        let memory = guest.memory();
        if memory.num_regions() <= RAM.len() {
            std::thread::yield_now();
            continue;
        }
        for _ in 0..64 {
            n = n
                .wrapping_mul(6364136223846793005)
                .wrapping_add(1442695040888963407);
            let (start, len) = RAM[(n >> 60) as usize % 2];
            let page = (n >> 33) % (len / PAGE - 1);
            // A word of 8 bytes across the end of the page.
            let at = start + page * PAGE + 4096 - 8 + writer * 4;
            let data = (n as u32).to_le_bytes();
            memory.write_slice(&data, GuestAddress(at)).unwrap();
        }
    }
}

/// The device. The drop of this value stops it at the latest.
struct Device(Child);

impl Device {
    fn start(socket: &Path) -> Self {
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "processes::the_device_process", "--nocapture"])
            .env(DEVICE, socket)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        Device(child)
    }

    /// Lets the device finish the writes that it has begun, and waits until its process is gone.
    fn stop(&mut self) {
        drop(self.0.stdin.take());
        let deadline = Instant::now() + Duration::from_secs(60);
        while self.0.try_wait().unwrap().is_none() {
            assert!(Instant::now() < deadline, "the device does not end");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        // Has no effect on a process that has ended.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The front end's machine: the tracked memory, and the copy.
struct Migration {
    space: AddressSpace,
    log: Arc<VhostLog>,
    copies: Vec<(IovaRange, Vec<u8>)>,
    found: u64,
}

impl Migration {
    fn new() -> Self {
        let areas = RAM.map(|(start, len)| bytes(start, len));
        let log = Arc::new(VhostLog::new(bytes(LARGE.0, LARGE.1).last()).unwrap());
        let space = AddressSpace::with_source(Granule::K4, Arc::clone(&log)).unwrap();
        for area in areas {
            space
                .map(area, area.start().get(), Access::ReadWrite)
                .unwrap();
        }
        Migration {
            space,
            log,
            copies: areas
                .map(|area| (area, vec![0; area.len() as usize]))
                .into(),
            found: 0,
        }
    }

    /// Copies the dirty pages. If `fails`, it stops half-way, so that the lease is dropped.
    fn pass(&mut self, memory: &GuestMemoryMmap<()>, fails: bool) {
        for (area, copy) in &mut self.copies {
            let mut words = [0; 6];
            let request = HarvestRequest::new(*area, Granule::K4);
            let bitmap = UserBitmap::new(&mut words);
            let lease = self.space.harvest(&request, bitmap).unwrap();
            let lease = lease.sync().unwrap();
            let dirty = lease.dirty();
            let half = lease.runs().count() / 2;
            for (n, run) in lease.runs().enumerate() {
                if fails && n == half {
                    break;
                }
                let from = (run.start().get() - area.start().get()) as usize;
                let into = &mut copy[from..from + run.len() as usize];
                memory
                    .read_slice(into, GuestAddress(run.start().get()))
                    .unwrap();
            }
            if !fails {
                lease.commit();
                self.found += dirty;
            }
        }
    }

    /// The first page that differs.
    fn differs(&self, memory: &GuestMemoryMmap<()>) -> Option<u64> {
        self.copies.iter().find_map(|(area, copy)| {
            let mut source = vec![0; copy.len()];
            let start = area.start().get();
            memory.read_slice(&mut source, GuestAddress(start)).unwrap();
            let page = source
                .chunks(4096)
                .zip(copy.chunks(4096))
                .position(|(a, b)| a != b);
            page.map(|page| start / PAGE + page as u64)
        })
    }
}

#[test]
fn no_write_of_another_process_is_lost_while_its_log_is_swapped() {
    let socket = socket();
    let mut device = Device::start(&socket);
    let ram = [RAM[0], RAM[1], LARGE].map(|(start, len)| Ram::new(start, len));
    let front_end = FrontEnd::connect(&socket, &ram);
    let memory = &front_end.memory;
    let mut migration = Migration::new();

    front_end.set_log(&migration.log.memory()).unwrap();
    migration.space.start_tracking().unwrap();
    // The first copy: everything, as it is after the switch.
    for (area, copy) in &mut migration.copies {
        let start = GuestAddress(area.start().get());
        memory.read_slice(copy, start).unwrap();
    }

    let mut given_up: Vec<(Arc<LogMemory>, Vec<u8>)> = Vec::new();
    let mut carried = 0;
    for round in 0..90 {
        if round % 3 == 0 {
            let old = migration.log.memory();
            let log = Arc::clone(&migration.log);
            let swap = log.swap(Iova::MIN).unwrap();
            if round % 2 == 0 {
                migration.pass(memory, false); // between the two: both logs are looked at
            }
            front_end.set_log(swap.memory()).unwrap();
            let left = content(&old);
            carried += swap.acknowledged();
            given_up.push((old, left));
        }
        migration.pass(memory, round % 5 == 4);
    }
    // The device is stopped, and its process is gone: its last writes are still in the log.
    device.stop();
    migration.pass(memory, false);
    println!(
        "{} pages found; {carried} pages, large ones too, were left in {} logs",
        migration.found,
        given_up.len()
    );
    assert_eq!(migration.differs(memory), None, "a page that was lost");
    assert!(migration.found > 1000, "the device wrote next to nothing");
    for (n, (old, left)) in given_up.iter().enumerate() {
        assert!(
            &content(old) == left,
            "log {n} was written after its answer"
        );
    }
}
