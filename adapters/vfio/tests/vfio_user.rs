//! A device emulator that serves vfio-user by the crate `vfio_user`, and its client.
//!
//! The crate carries maps, unmaps and accesses of regions. It has no message for the log, so the
//! messages of the log go over a second socket, each with the header of the protocol.
#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used)] // helpers of tests

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use dirtymap::exchange::DirtyLog;
use dirtymap::{Access, AddressSpace, Granule, Iova, IovaRange};
use dirtymap_vfio::DmaLogger;
use memmap2::{MmapOptions, MmapRaw};
use vfio_bindings::bindings::vfio::vfio_region_info;
use vfio_user::{Client, DmaMapFlags, DmaUnmapFlags, Server, ServerBackend, ServerRegion};

const PAGE: u64 = 4096;
/// The page of the emulator's space: 16 pages of the client.
const SPACE_PAGE: u64 = 16 * PAGE;
/// The pages of the client's memory, and of the addresses that it maps parts of it to.
const PAGES: u64 = 256;
const SLOTS: u64 = 4;
const SLOT: u64 = 64 * PAGE;

/// The emulated device: a write to its region makes it write a byte to memory.
struct Device {
    log: Arc<DmaLogger>,
    maps: BTreeMap<u64, MmapRaw>,
}

impl Device {
    /// The byte at `iova`.
    fn byte(&self, iova: u64) -> Option<&AtomicU8> {
        let (start, map) = self.maps.range(..=iova).next_back()?;
        let at = usize::try_from(iova - start).unwrap();
        // SAFETY: inside of the mapping, which lives as long as `self`; all accesses in this
        // process are atomic.
        (at < map.len()).then(|| unsafe { AtomicU8::from_ptr(map.as_mut_ptr().wrapping_add(at)) })
    }
}

impl ServerBackend for Device {
    fn region_read(&mut self, _: u32, _: u64, data: &mut [u8]) -> io::Result<()> {
        data.fill(0);
        Ok(())
    }

    fn region_write(&mut self, _: u32, _: u64, data: &[u8]) -> io::Result<()> {
        let (iova, byte) = data.split_first_chunk().unwrap();
        let iova = u64::from_le_bytes(*iova);
        let place = self.byte(iova).ok_or(io::ErrorKind::NotFound)?;
        place.store(byte[0], Ordering::Relaxed);
        // After the write.
        self.log
            .space()
            .mark(iova..iova + 1)
            .map_err(io::Error::other)
    }

    fn dma_map(
        &mut self,
        _: DmaMapFlags,
        offset: u64,
        address: u64,
        size: u64,
        fd: Option<File>,
    ) -> io::Result<()> {
        let file = fd.ok_or(io::ErrorKind::InvalidInput)?;
        let options = MmapOptions::new().offset(offset).len(size as usize).clone();
        self.maps.insert(address, options.map_raw(&file)?);
        let range = address..address + size;
        let mapped = self.log.space().map(range, offset, Access::ReadWrite);
        mapped.map_err(io::Error::other)
    }

    fn dma_unmap(&mut self, _: DmaUnmapFlags, address: u64, size: u64) -> io::Result<()> {
        self.log
            .unmap(address..address + size, |_| ())
            .map_err(io::Error::other)?;
        self.maps.remove(&address);
        Ok(())
    }

    fn reset(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn set_irqs(&mut self, _: u32, _: u32, _: u32, _: u32, _: Vec<File>) -> io::Result<()> {
        Ok(())
    }
}

/// A path for a socket or a file of this test.
fn path(name: &str) -> PathBuf {
    let name = format!("dirtymap-vfio-{name}-{}", std::process::id());
    let path = std::env::temp_dir().join(name);
    let _ = std::fs::remove_file(&path);
    path
}

fn server(path: &std::path::Path) -> Server {
    let region = ServerRegion {
        region_info: vfio_region_info {
            argsz: size_of::<vfio_region_info>() as u32,
            size: 4096,
            ..Default::default()
        },
        sparse_areas: Vec::new(),
        mmap_fd: None,
    };
    Server::new(path, true, Vec::new(), vec![region]).unwrap()
}

/// Sends one message with the header of vfio-user, and returns the reply's error and payload.
fn ask(socket: &mut UnixStream, command: u16, payload: &[u8]) -> (u32, Vec<u8>) {
    let size = 16 + payload.len() as u32;
    let mut message = [1u16.to_le_bytes(), command.to_le_bytes()].concat();
    for word in [size, 0, 0] {
        message.extend(word.to_le_bytes());
    }
    message.extend(payload);
    socket.write_all(&message).unwrap();
    let (flags, error, payload) = receive(socket).unwrap();
    assert_eq!(flags & 0xf, 1, "a reply");
    let is_error = flags & (1 << 5) != 0;
    (if is_error { error.max(1) } else { 0 }, payload)
}

/// One message: flags, error, payload. `None` at the end.
fn receive(socket: &mut UnixStream) -> Option<(u32, u32, Vec<u8>)> {
    let mut header = [0; 16];
    socket.read_exact(&mut header).ok()?;
    let word = |at: usize| u32::from_le_bytes(*header[at..].first_chunk().unwrap());
    let mut payload = vec![0; word(4) as usize - 16];
    socket.read_exact(&mut payload).ok()?;
    Some((word(8), word(12), payload))
}

/// Answers the messages of the log.
fn serve_log(log: &DmaLogger, mut socket: UnixStream) {
    while let Some((_, _, payload)) = receive(&mut socket) {
        let (error, reply) = match log.device_feature(&payload, 1 << 20) {
            Ok(reply) => (0, reply.unwrap()),
            Err(error) => (error.errno() as u32, Vec::new()),
        };
        let flags = if error == 0 { 1 } else { 1 | 1 << 5 };
        let mut message = [1u16.to_le_bytes(), 16u16.to_le_bytes()].concat();
        for word in [16 + reply.len() as u32, flags, error] {
            message.extend(word.to_le_bytes());
        }
        message.extend(reply);
        socket.write_all(&message).unwrap();
    }
}

fn feature(argsz: u64, flags: u32, words: &[u64]) -> Vec<u8> {
    let mut payload = [(argsz as u32).to_le_bytes(), flags.to_le_bytes()].concat();
    words
        .iter()
        .for_each(|word| payload.extend(word.to_le_bytes()));
    payload
}

const SET: u32 = 1 << 17;
const GET: u32 = 1 << 16;

/// What the client copied of its memory, after the reports.
struct Copy {
    file: MmapRaw,
    bytes: Vec<u8>,
    /// The offsets in the file that each slot of addresses is mapped to.
    slots: [Option<u64>; SLOTS as usize],
    /// The same before the last unmap: reports tell of areas that have gone, too.
    before: [Vec<u64>; SLOTS as usize],
}

impl Copy {
    /// The client's memory from `at` on.
    fn memory(&self, at: usize, len: usize) -> impl Iterator<Item = u8> {
        assert!(at + len <= self.file.len());
        (at..at + len).map(|at| {
            // SAFETY: inside of the mapping; all accesses in this process are atomic.
            unsafe { AtomicU8::from_ptr(self.file.as_mut_ptr().wrapping_add(at)) }
                .load(Ordering::Relaxed)
        })
    }

    /// Asks for the log of a slot, and copies what it says.
    fn round(&mut self, socket: &mut UnixStream, slot: u64) -> u64 {
        let bits = SLOT / PAGE / 8;
        let report = feature(32 + bits, GET | 8, &[slot * SLOT, SLOT, PAGE]);
        let (error, reply) = ask(socket, 16, &report);
        assert_eq!((error, reply.len() as u64), (0, 32 + bits));
        let range = IovaRange::from_len(Iova::new(slot * SLOT), SLOT).unwrap();
        let log = DirtyLog::bytes(&reply[32..], range, Granule::K4).unwrap();
        for run in log.runs() {
            let at = (run.start().get() - slot * SLOT) as usize;
            let len = run.len() as usize;
            let slot = slot as usize;
            for place in self.before[slot].iter().chain(&self.slots[slot]) {
                let place = *place as usize + at;
                let bytes: Vec<u8> = self.memory(place, len).collect();
                self.bytes[place..place + len].copy_from_slice(&bytes);
            }
        }
        self.before[slot as usize].clear();
        log.count()
    }
}

/// The client maps parts of its memory, lets the device write, asks for the log, and unmaps. At the
/// end its copy is its memory, byte for byte.
#[test]
fn a_client_copies_what_the_device_wrote() {
    let (socket_path, memory_path) = (path("socket"), path("memory"));
    let space = Arc::new(AddressSpace::new(Granule::from_bytes(SPACE_PAGE).unwrap()));
    let log = Arc::new(DmaLogger::new(space, "device"));
    let server = server(&socket_path);
    let mut device = Device {
        log: Arc::clone(&log),
        maps: BTreeMap::new(),
    };
    let serving = std::thread::spawn(move || server.run(&mut device));
    let (mut socket, other) = UnixStream::pair().unwrap();
    let logging = std::thread::spawn(move || serve_log(&log, other));

    let mut client = Client::new(&socket_path).unwrap();
    let file = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(&memory_path)
        .unwrap();
    std::fs::remove_file(&memory_path).unwrap();
    file.set_len(PAGES * PAGE).unwrap();
    let mut copy = Copy {
        bytes: vec![0; (PAGES * PAGE) as usize],
        file: MmapOptions::new().map_raw(&file).unwrap(),
        slots: [None; SLOTS as usize],
        before: Default::default(),
    };

    let start = feature(40, SET | 6, &[PAGE, 1, 0, SLOTS * SLOT]);
    let (error, reply) = ask(&mut socket, 16, &start);
    assert_eq!((error, &reply[8..16]), (0, &SPACE_PAGE.to_le_bytes()[..]));
    assert_eq!(ask(&mut socket, 16, &start).0, 22, "a second start");

    let mut state = 11u64;
    let mut below = |bound: u64| {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        (state >> 33) % bound
    };
    let mut dirty = 0;
    for step in 0..1000u64 {
        let slot = below(SLOTS);
        let at = slot as usize;
        match (below(8), copy.slots[at]) {
            (0, None) => {
                let offset = below(PAGES * PAGE / SLOT) * SLOT;
                let fd = file.as_raw_fd();
                client.dma_map(offset, slot * SLOT, SLOT, fd).unwrap();
                copy.slots[at] = Some(offset);
            }
            (0, Some(offset)) => {
                client.dma_unmap(slot * SLOT, SLOT).unwrap();
                copy.slots[at] = None;
                copy.before[at].push(offset);
            }
            (1, _) => dirty += copy.round(&mut socket, slot),
            (_, Some(_)) => {
                let iova = slot * SLOT + below(SLOT);
                let mut data = iova.to_le_bytes().to_vec();
                data.push(step as u8 | 1);
                client.region_write(0, 0, &data).unwrap();
            }
            _ => {}
        }
    }
    (0..SLOTS).for_each(|slot| dirty += copy.round(&mut socket, slot));
    assert_eq!(
        (0..SLOTS)
            .map(|slot| copy.round(&mut socket, slot))
            .sum::<u64>(),
        0
    );
    let memory = copy.memory(0, copy.bytes.len());
    assert!(memory.eq(copy.bytes.iter().copied()), "the copy differs");
    assert!(dirty > 500 && copy.bytes.iter().any(|byte| *byte != 0));

    let stop = feature(8, SET | 7, &[]);
    assert_eq!(ask(&mut socket, 16, &stop).0, 0);
    assert_eq!(ask(&mut socket, 16, &stop).0, 22);
    drop(socket);
    logging.join().unwrap();
    client.shutdown().unwrap();
    serving.join().unwrap().unwrap();
}

/// The crate's server has no message of the log. When it has, this test says so, and the messages
/// can go by it: see `DmaLogger::start`, `report` and `stop`.
#[test]
fn the_crate_has_no_message_for_the_log() {
    let socket_path = path("refused");
    let server = server(&socket_path);
    let mut device = Device {
        log: Arc::new(DmaLogger::new(
            Arc::new(AddressSpace::new(Granule::K4)),
            "device",
        )),
        maps: BTreeMap::new(),
    };
    let serving = std::thread::spawn(move || server.run(&mut device));
    let mut socket = UnixStream::connect(&socket_path).unwrap();
    // Without a payload, which the server would take for the next message.
    assert_ne!(ask(&mut socket, 16, &[]).0, 0);
    drop(socket);
    serving.join().unwrap().unwrap();
}
