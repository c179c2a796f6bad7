//! The device: a vhost-user daemon whose threads write guest memory, and mark it in the log of the
//! front end.

use std::error::Error;
use std::io::{self, Read};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use dirtymap_vhost::{LogBitmap, LogFollower};
use vhost::vhost_user::Listener;
use vhost::vhost_user::message::VhostUserProtocolFeatures;
use vhost_user_backend::{VhostUserBackendMut, VhostUserDaemon, VringRwLock};
use vm_memory::{
    Bytes, GuestAddress, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryBackend, GuestMemoryMmap,
    GuestMemoryRegion,
};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{
    EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier,
};

/// `VHOST_USER_F_PROTOCOL_FEATURES` and `VHOST_F_LOG_ALL`.
pub(crate) const FEATURES: u64 = 1 << 30 | 1 << 26;

type Guest = GuestMemoryAtomic<GuestMemoryMmap<LogBitmap>>;

/// A device without rings: its threads write wherever they like.
#[derive(Default)]
struct Device {
    follower: LogFollower,
}

impl VhostUserBackendMut for Device {
    type Bitmap = LogBitmap;
    type Vring = VringRwLock<Guest>;

    fn num_queues(&self) -> usize {
        1
    }

    fn max_queue_size(&self) -> usize {
        16
    }

    fn features(&self) -> u64 {
        FEATURES
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::LOG_SHMFD | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
    }

    fn set_event_idx(&mut self, _: bool) {}

    /// Regions that come after the log are logged too.
    fn update_memory(&mut self, memory: Guest) -> io::Result<()> {
        self.follower.update(&memory.memory()).map(|_| ())
    }

    fn exit_event(&self, _: usize) -> Option<(EventConsumer, EventNotifier)> {
        new_event_consumer_and_notifier(EventFlag::empty()).ok()
    }

    fn handle_event(&mut self, _: u16, _: EventSet, _: &[Self::Vring], _: usize) -> io::Result<()> {
        Ok(())
    }
}

/// Serves one front end at `socket`, until standard input is closed. What its threads have begun
/// they finish.
pub(crate) fn run(socket: &Path, writers: u64) -> Result<(), Box<dyn Error>> {
    let guest = Guest::new(GuestMemoryMmap::new());
    let device = Arc::new(Mutex::new(Device::default()));
    let mut daemon = VhostUserDaemon::new("device".to_owned(), device, guest.clone())
        .map_err(|error| error.to_string())?;
    let mut listener = Listener::new(socket, true).map_err(|error| error.to_string())?;
    daemon
        .start(&mut listener)
        .map_err(|error| error.to_string())?;
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..writers)
            .map(|writer| {
                let (guest, stop) = (&guest, &stop);
                scope.spawn(move || write(guest, writer, stop))
            })
            .collect();
        let closed = io::stdin().read_to_end(&mut Vec::new());
        stop.store(true, Ordering::Relaxed);
        for thread in threads {
            thread
                .join()
                .map_err(|_| "a thread of the device panicked")??;
        }
        closed.map(|_| ()).map_err(Box::<dyn Error>::from)
    })
}

/// Writes words all over memory, most of them in a part of it.
fn write(guest: &Guest, writer: u64, stop: &AtomicBool) -> Result<(), vm_memory::GuestMemoryError> {
    let mut n = writer + 1;
    while !stop.load(Ordering::Relaxed) {
        let memory = guest.memory();
        for region in memory.iter() {
            for _ in 0..16 {
                n = n
                    .wrapping_mul(6364136223846793005)
                    .wrapping_add(1442695040888963407);
                let pages = region.len() / 4096;
                let busy = if n >> 61 > 0 {
                    (pages / 16).max(1)
                } else {
                    pages
                };
                let page = (n >> 24) % busy;
                let at = region.start_addr().0 + page * 4096 + writer * 8 % 4096;
                memory.write_obj(n, GuestAddress(at))?;
            }
        }
        std::thread::sleep(std::time::Duration::from_micros(200));
    }
    Ok(())
}
