//! Folders and disks that fail, or that change underneath a store that is open.
#![cfg(unix)]
#![allow(clippy::unwrap_used)]

use std::io;
use std::path::Path;
use std::thread;

use dirtymap_store::{Device, DirFolder, Disk, Error, Folder, Opened, Options, Store};

const DEVICE: Device = Device {
    id: 1,
    len: 1 << 30,
};
const EXTENT: u64 = 64 << 10;

fn create(path: &Path, options: &Options) -> Store {
    let folder = DirFolder::new(path.join("store")).unwrap();
    Store::create(folder, &DEVICE, options).unwrap()
}

fn known(folder: impl Folder + 'static) -> Store {
    match Store::open(folder, &DEVICE, &Options::new()).unwrap() {
        Opened::Known(store) => store,
        Opened::Everything(lost) => panic!("{}", lost.why()),
    }
}

fn write(store: &Store, range: std::ops::Range<u64>) {
    drop(store.begin_write(range).unwrap().wait().unwrap());
}

/// The folder of a store that is open gets another name, and a new folder takes its place, as a
/// rotation of folders makes it. The next log was written to the new folder, by its path, and the
/// log in the old one stayed as it was: opened there, it forgot what was written since.
#[test]
fn a_folder_that_is_moved_keeps_its_store() {
    let dir = tempfile::tempdir().unwrap();
    let (path, moved) = (dir.path().join("store"), dir.path().join("moved"));
    let options = Options::new().hot(2).log_bytes(8192);
    let store = create(dir.path(), &options);
    store.join("a").unwrap();
    let first = store.harvest("a", None).unwrap();
    let first = first.commit(|| Ok(())).unwrap();
    std::fs::rename(&path, &moved).unwrap();
    std::fs::create_dir(&path).unwrap();
    for extent in 0..20 {
        write(&store, extent * EXTENT..extent * EXTENT + 1);
    }
    drop(store);
    assert_eq!(std::fs::read_dir(&path).unwrap().count(), 0);
    let folder = DirFolder::new(&moved).unwrap();
    let store = known(folder);
    let next = store.harvest("a", Some(first)).unwrap();
    for extent in 0..20 {
        let at = dirtymap::Iova::new(extent * EXTENT);
        assert!(
            next.runs().runs().iter().any(|run| run.contains(at)),
            "{extent}"
        );
    }
}

/// A disk whose reads are interrupted, and give one byte at a time. A read that was interrupted
/// failed the recovery.
#[test]
fn reads_that_are_short_or_interrupted_are_repeated() {
    struct Slow(DirFolder);
    struct SlowDisk(Box<dyn Disk>, std::sync::atomic::AtomicU64);
    impl Folder for Slow {
        fn open(&mut self, name: &str) -> io::Result<Option<Box<dyn Disk>>> {
            let disk = self.0.open(name)?;
            Ok(disk.map(|disk| Box::new(SlowDisk(disk, Default::default())) as Box<dyn Disk>))
        }
        fn create(&mut self, name: &str) -> io::Result<Box<dyn Disk>> {
            self.0.create(name)
        }
        fn rename(&mut self, from: &str, to: &str) -> io::Result<()> {
            self.0.rename(from, to)
        }
        fn sync(&mut self) -> io::Result<()> {
            self.0.sync()
        }
        fn lock(&mut self) -> io::Result<bool> {
            self.0.lock()
        }
    }
    impl Disk for SlowDisk {
        fn read_at(&self, offset: u64, bytes: &mut [u8]) -> io::Result<usize> {
            let reads = self.1.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            match reads % 2 {
                0 => Err(io::ErrorKind::Interrupted.into()),
                _ => self.0.read_at(offset, &mut bytes[..1]),
            }
        }
        fn write_at(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
            self.0.write_at(offset, bytes)
        }
        fn flush(&mut self) -> io::Result<()> {
            self.0.flush()
        }
        fn len(&self) -> io::Result<u64> {
            self.0.len()
        }
    }
    let dir = tempfile::tempdir().unwrap();
    let options = Options::new().log_bytes(4096);
    create(dir.path(), &options).join("a").unwrap();
    let folder = Slow(DirFolder::new(dir.path().join("store")).unwrap());
    assert_eq!(known(folder).consumers().unwrap().len(), 1);
}

/// A folder whose disk fails, or panics, from some write on.
struct Failing {
    inner: DirFolder,
    panics: bool,
}

struct FailingDisk {
    inner: Box<dyn Disk>,
    writes: u32,
    panics: bool,
}

impl Folder for Failing {
    fn open(&mut self, name: &str) -> io::Result<Option<Box<dyn Disk>>> {
        self.inner.open(name)
    }
    fn create(&mut self, name: &str) -> io::Result<Box<dyn Disk>> {
        Ok(Box::new(FailingDisk {
            inner: self.inner.create(name)?,
            writes: 0,
            panics: self.panics,
        }))
    }
    fn rename(&mut self, from: &str, to: &str) -> io::Result<()> {
        self.inner.rename(from, to)
    }
    fn sync(&mut self) -> io::Result<()> {
        self.inner.sync()
    }
    fn lock(&mut self) -> io::Result<bool> {
        self.inner.lock()
    }
}

impl Disk for FailingDisk {
    fn read_at(&self, offset: u64, bytes: &mut [u8]) -> io::Result<usize> {
        self.inner.read_at(offset, bytes)
    }
    fn write_at(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.writes += 1;
        // Three writes make the log, and one more opens an extent.
        if self.writes > 4 {
            assert!(!self.panics, "the disk panics");
            return Err(io::ErrorKind::StorageFull.into());
        }
        self.inner.write_at(offset, bytes)
    }
    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
    fn len(&self) -> io::Result<u64> {
        self.inner.len()
    }
}

/// A log that cannot be written: no cold write is let through any more, hot ones are, nobody waits
/// for ever, and the folder stays locked while they may be in flight.
#[test]
fn a_disk_that_fails_or_panics_lets_no_cold_write_through() {
    for panics in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let folder = || DirFolder::new(dir.path().join("store")).unwrap();
        let failing = Failing {
            inner: folder(),
            panics,
        };
        let store = Store::create(failing, &DEVICE, &Options::new()).unwrap();
        write(&store, 0..1);
        let cold = || store.begin_write(EXTENT..EXTENT + 1)?.wait().map(drop);
        let results: Vec<_> = thread::scope(|scope| {
            let threads: Vec<_> = (0..4).map(|_| scope.spawn(cold)).collect();
            threads.into_iter().map(|thread| thread.join()).collect()
        });
        for result in results {
            assert!(!matches!(result, Ok(Ok(()))), "a cold write is let through");
        }
        assert!(matches!(cold(), Err(Error::Failed { .. })));
        assert!(matches!(store.join("late"), Err(Error::Failed { .. })));
        write(&store, 1..2);
        let again = Store::open(folder(), &DEVICE, &Options::new());
        assert!(matches!(again, Err(Error::Locked)));
        drop(store);
        drop(known(folder()));
    }
}
