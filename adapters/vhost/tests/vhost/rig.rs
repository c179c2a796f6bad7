//! A vhost-user device that writes guest memory, and a front end that talks to it.

use super::PAGE;
use dirtymap_vhost::{LogBitmap, LogFollower, LogMemory};
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use vhost::vhost_user::message::{VhostUserHeaderFlag, VhostUserProtocolFeatures};
use vhost::vhost_user::{Frontend, Listener, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserDirtyLogRegion, VhostUserMemoryRegionInfo};
use vhost_user_backend::{VhostUserBackendMut, VhostUserDaemon, VringRwLock};
use vm_memory::{
    Bytes, FileOffset, GuestAddress, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryBackend,
    GuestMemoryMmap,
};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{
    EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier,
};

/// `VHOST_USER_F_PROTOCOL_FEATURES` and `VHOST_F_LOG_ALL`.
const FEATURES: u64 = 1 << 30 | 1 << 26;

pub(crate) type Guest = GuestMemoryMmap<LogBitmap>;

/// The messages of the daemon: its memory, whenever that changes.
pub(crate) struct Device {
    pub(crate) memory: GuestMemoryAtomic<Guest>,
    follower: Option<LogFollower>,
}

impl VhostUserBackendMut for Device {
    type Bitmap = LogBitmap;
    type Vring = VringRwLock<GuestMemoryAtomic<Guest>>;

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

    fn update_memory(&mut self, memory: GuestMemoryAtomic<Guest>) -> io::Result<()> {
        if let Some(follower) = &self.follower {
            follower.update(&memory.memory())?;
        }
        Ok(())
    }

    fn exit_event(&self, _: usize) -> Option<(EventConsumer, EventNotifier)> {
        new_event_consumer_and_notifier(EventFlag::empty()).ok()
    }

    fn handle_event(&mut self, _: u16, _: EventSet, _: &[Self::Vring], _: usize) -> io::Result<()> {
        Ok(())
    }
}

pub(crate) type Daemon = VhostUserDaemon<Arc<Mutex<Device>>>;

/// A daemon that waits for one front end at `socket`. `follows` says whether its regions follow the
/// log.
pub(crate) fn serve(socket: &Path, follows: bool) -> (Daemon, GuestMemoryAtomic<Guest>) {
    let memory = GuestMemoryAtomic::new(Guest::new());
    let device = Arc::new(Mutex::new(Device {
        memory: memory.clone(),
        follower: follows.then(LogFollower::default),
    }));
    let memory = device.lock().unwrap().memory.clone();
    let mut daemon = VhostUserDaemon::new("device".to_owned(), device, memory.clone()).unwrap();
    let mut listener = Listener::new(socket, true).unwrap();
    daemon.start(&mut listener).unwrap();
    (daemon, memory)
}

/// A path for a socket that no other test uses.
pub(crate) fn socket() -> PathBuf {
    use std::sync::atomic::{AtomicU64, Ordering};
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let n = NEXT.fetch_add(1, Ordering::Relaxed);
    std::env::temp_dir().join(format!("dirtymap-vhost-{}-{n}", std::process::id()))
}

/// Shared memory of `len` bytes with `seals`.
pub(crate) fn memfd(len: u64, seals: i32) -> File {
    let flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
    // SAFETY: the name is a string that ends with 0 and outlives the call.
    let fd = unsafe { libc::memfd_create(c"ram".as_ptr(), flags) };
    assert!(fd >= 0);
    // SAFETY: a new descriptor that has no other owner.
    let file = unsafe { File::from_raw_fd(fd) };
    file.set_len(len).unwrap();
    // SAFETY: takes numbers.
    assert_eq!(unsafe { libc::fcntl(fd, libc::F_ADD_SEALS, seals) }, 0);
    file
}

/// A region of guest memory in a file that the device maps as well.
pub(crate) struct Ram {
    pub(crate) start: u64,
    pub(crate) len: u64,
    file: File,
}

impl Ram {
    pub(crate) fn new(start: u64, len: u64) -> Self {
        let file = memfd(len.next_multiple_of(PAGE), 0);
        Ram { start, len, file }
    }

    fn info(&self) -> VhostUserMemoryRegionInfo {
        let address = 0x7000_0000_0000 + self.start; // of the front end's own, for rings
        VhostUserMemoryRegionInfo {
            guest_phys_addr: self.start,
            memory_size: self.len,
            userspace_addr: address,
            mmap_offset: 0,
            mmap_handle: self.file.as_raw_fd(),
        }
    }
}

/// The front end's side of a connection.
pub(crate) struct FrontEnd {
    pub(crate) connection: Frontend,
    /// The front end's own view of guest memory, which marks nothing.
    pub(crate) memory: GuestMemoryMmap<()>,
}

impl FrontEnd {
    /// Connects as soon as the device listens, and sends it the table of `ram`.
    pub(crate) fn connect(socket: &Path, ram: &[Ram]) -> Self {
        let deadline = Instant::now() + Duration::from_secs(30);
        let mut connection = loop {
            match Frontend::connect(socket, 1) {
                Ok(connection) => break connection,
                Err(error) => assert!(Instant::now() < deadline, "{error:?}"),
            }
            std::thread::sleep(Duration::from_millis(5));
        };
        connection.set_owner().unwrap();
        assert_eq!(connection.get_features().unwrap() & FEATURES, FEATURES);
        let protocol = connection.get_protocol_features().unwrap();
        connection.set_protocol_features(protocol).unwrap();
        connection.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        connection.set_features(FEATURES).unwrap();
        let mut front_end = FrontEnd {
            connection,
            memory: GuestMemoryMmap::new(),
        };
        front_end.set_table(ram);
        front_end
    }

    /// Sends a new table of memory.
    pub(crate) fn set_table(&mut self, ram: &[Ram]) {
        let infos: Vec<_> = ram.iter().map(Ram::info).collect();
        self.connection.set_mem_table(&infos).unwrap();
        let ranges: Vec<_> = ram
            .iter()
            .map(|ram| {
                let file = FileOffset::new(ram.file.try_clone().unwrap(), 0);
                (GuestAddress(ram.start), ram.len as usize, Some(file))
            })
            .collect();
        self.memory = GuestMemoryMmap::from_ranges_with_files(&ranges).unwrap();
    }

    pub(crate) fn remove(&mut self, ram: &Ram) -> vhost::Result<()> {
        self.connection.remove_mem_region(&ram.info())
    }

    pub(crate) fn add(&mut self, ram: &Ram) -> vhost::Result<()> {
        self.connection.add_mem_region(&ram.info()).map(|_| ())
    }

    pub(crate) fn set_log(&self, log: &LogMemory) -> vhost::Result<()> {
        self.send_log(log.file(), log.offset(), log.size())
    }

    /// Announces a log of so many bytes of `file`, whether or not that is true.
    pub(crate) fn send_log(&self, file: &File, offset: u64, size: u64) -> vhost::Result<()> {
        let region = VhostUserDirtyLogRegion {
            mmap_size: size,
            mmap_offset: offset,
            mmap_handle: file.as_raw_fd(),
        };
        self.connection.set_log_base(0, Some(region))
    }
}

/// A daemon in this process and its front end.
pub(crate) struct Rig {
    pub(crate) front_end: FrontEnd,
    pub(crate) guest: GuestMemoryAtomic<Guest>,
    // The last field, so that the connection is closed before it is dropped.
    _daemon: Daemon,
}

pub(crate) fn rig(ram: &[Ram], follows: bool) -> Rig {
    let socket = socket();
    std::thread::scope(|scope| {
        let daemon = scope.spawn(|| serve(&socket, follows));
        let front_end = FrontEnd::connect(&socket, ram);
        let (daemon, guest) = daemon.join().unwrap();
        Rig {
            front_end,
            guest,
            _daemon: daemon,
        }
    })
}

impl Rig {
    /// The bitmap of the region that holds `address`.
    pub(crate) fn bitmap(&self, address: u64) -> LogBitmap {
        let memory = self.guest.memory();
        let region = memory.find_region(GuestAddress(address)).unwrap();
        (**region).bitmap().clone()
    }

    /// The device writes one byte.
    pub(crate) fn write(&self, address: u64) {
        let memory = self.guest.memory();
        memory.write_obj(1u8, GuestAddress(address)).unwrap();
    }
}
