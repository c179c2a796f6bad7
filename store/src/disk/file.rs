//! A folder of the file system.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use rustix::fs::{FlockOperation, Mode, OFlags, flock, openat, renameat};
use rustix::io::retry_on_intr;

use super::{Disk, Folder};

/// A folder of the file system, which belongs to one store.
///
/// Files are named relative to the folder that was opened here, so they stay in it when it is
/// moved, or when the process changes its working directory.
///
/// The file `lock` in it is locked by `flock`, so a second process is refused, and the kernel
/// unlocks it when the process dies.
#[derive(Debug)]
pub struct DirFolder {
    folder: File,
    lock: Option<File>,
}

impl DirFolder {
    /// The folder `path`, which is made, durably, if it is not there. Its parent has to be there.
    ///
    /// # Errors
    /// What the system says.
    pub fn new(path: impl AsRef<Path>) -> io::Result<Self> {
        let path = path.as_ref();
        match fs::create_dir(path) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
            // Also if it was there: the process that made it may have died before this.
            _ => {
                let parent = path
                    .parent()
                    .filter(|parent| !parent.as_os_str().is_empty());
                File::open(parent.unwrap_or(Path::new(".")))?.sync_all()?;
            }
        }
        let folder = File::open(path)?;
        Ok(DirFolder { folder, lock: None })
    }

    /// Opens a file of the folder to read and write, with `flags`.
    fn file(&self, name: &str, flags: OFlags) -> io::Result<File> {
        let flags = flags | OFlags::RDWR | OFlags::CLOEXEC;
        // As the standard library makes files.
        let mode = Mode::from_raw_mode(0o666);
        let file = retry_on_intr(|| openat(&self.folder, name, flags, mode))?;
        Ok(File::from(file))
    }
}

impl Folder for DirFolder {
    fn open(&mut self, name: &str) -> io::Result<Option<Box<dyn Disk>>> {
        match self.file(name, OFlags::empty()) {
            Ok(file) => Ok(Some(Box::new(FileDisk(file)))),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn create(&mut self, name: &str) -> io::Result<Box<dyn Disk>> {
        let file = self.file(name, OFlags::CREATE | OFlags::TRUNC)?;
        Ok(Box::new(FileDisk(file)))
    }

    fn rename(&mut self, from: &str, to: &str) -> io::Result<()> {
        Ok(renameat(&self.folder, from, &self.folder, to)?)
    }

    fn sync(&mut self) -> io::Result<()> {
        self.folder.sync_all()
    }

    fn lock(&mut self) -> io::Result<bool> {
        let file = self.file("lock", OFlags::CREATE)?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {
                self.lock = Some(file);
                Ok(true)
            }
            Err(rustix::io::Errno::WOULDBLOCK) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }
}

struct FileDisk(File);

impl Disk for FileDisk {
    fn read_at(&self, offset: u64, bytes: &mut [u8]) -> io::Result<usize> {
        self.0.read_at(bytes, offset)
    }

    fn write_at(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.0.write_all_at(bytes, offset)
    }

    /// `fdatasync`: the contents, and the length if it has changed.
    fn flush(&mut self) -> io::Result<()> {
        self.0.sync_data()
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.0.metadata()?.len())
    }
}
