//! A folder of the file system.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};

use super::{Disk, Folder};

/// A folder of the file system, which belongs to one store.
///
/// The file `lock` in it is locked by `flock`, so a second process is refused, and the kernel
/// unlocks it when the process dies.
#[derive(Debug)]
pub struct DirFolder {
    path: PathBuf,
    folder: File,
    lock: Option<File>,
}

impl DirFolder {
    /// The folder `path`, which is made, durably, if it is not there. Its parent has to be there.
    ///
    /// # Errors
    /// What the system says.
    pub fn new(path: impl AsRef<Path>) -> io::Result<Self> {
        let path = path.as_ref().to_path_buf();
        match fs::create_dir(&path) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
            // Also if it was there: the process that made it may have died before this.
            _ => {
                let parent = path
                    .parent()
                    .filter(|parent| !parent.as_os_str().is_empty());
                File::open(parent.unwrap_or(Path::new(".")))?.sync_all()?;
            }
        }
        let folder = File::open(&path)?;
        Ok(DirFolder {
            path,
            folder,
            lock: None,
        })
    }
}

impl Folder for DirFolder {
    fn open(&mut self, name: &str) -> io::Result<Option<Box<dyn Disk>>> {
        let options = File::options()
            .read(true)
            .write(true)
            .open(self.path.join(name));
        match options {
            Ok(file) => Ok(Some(Box::new(FileDisk(file)))),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn create(&mut self, name: &str) -> io::Result<Box<dyn Disk>> {
        let mut options = File::options();
        options.read(true).write(true).create(true).truncate(true);
        Ok(Box::new(FileDisk(options.open(self.path.join(name))?)))
    }

    fn rename(&mut self, from: &str, to: &str) -> io::Result<()> {
        fs::rename(self.path.join(from), self.path.join(to))
    }

    fn sync(&mut self) -> io::Result<()> {
        self.folder.sync_all()
    }

    fn lock(&mut self) -> io::Result<bool> {
        let mut options = File::options();
        options.read(true).write(true).create(true).truncate(false);
        let file = options.open(self.path.join("lock"))?;
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
