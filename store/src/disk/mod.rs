//! What a store needs of a file system. [`DirFolder`] is the real one.

#[cfg(unix)]
mod file;
#[cfg(any(test, feature = "test-kit"))]
mod sim;

use std::io;

#[cfg(unix)]
pub use file::DirFolder;
#[cfg(any(test, feature = "test-kit"))]
pub use sim::{Landed, SimFolder};

/// A file.
///
/// What was written may be lost in a crash until [`flush`](Disk::flush) has returned, in any part,
/// and in any order. After it, it is there after any crash.
pub trait Disk: Send {
    /// Reads the bytes from `offset` on, as many as there are, up to the length of `bytes`. Returns
    /// how many.
    ///
    /// # Errors
    /// What the system says.
    fn read_at(&self, offset: u64, bytes: &mut [u8]) -> io::Result<usize>;

    /// Writes all of `bytes` at `offset`. The file grows to its end.
    ///
    /// # Errors
    /// What the system says. Any part may be written then.
    fn write_at(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()>;

    /// Makes durable what was written, and the length.
    ///
    /// # Errors
    /// What the system says. What is durable is unknown then, for as long as the file exists.
    fn flush(&mut self) -> io::Result<()>;

    /// The length in bytes.
    ///
    /// # Errors
    /// What the system says.
    fn len(&self) -> io::Result<u64>;

    /// Whether the file has no bytes.
    ///
    /// # Errors
    /// Those of [`len`](Disk::len).
    fn is_empty(&self) -> io::Result<bool> {
        Ok(self.len()? == 0)
    }
}

/// A folder for a store, and for nothing else.
///
/// Which name leads to which file may be as it was before, after a crash, until
/// [`sync`](Folder::sync) has returned.
pub trait Folder: Send {
    /// Opens a file, if there is one with this name.
    ///
    /// # Errors
    /// What the system says.
    fn open(&mut self, name: &str) -> io::Result<Option<Box<dyn Disk>>>;

    /// Makes an empty file, in place of one that has the name.
    ///
    /// # Errors
    /// What the system says.
    fn create(&mut self, name: &str) -> io::Result<Box<dyn Disk>>;

    /// Gives the file `from` the name `to`, in place of one that has it, in one step.
    ///
    /// # Errors
    /// What the system says.
    fn rename(&mut self, from: &str, to: &str) -> io::Result<()>;

    /// Makes names durable.
    ///
    /// # Errors
    /// What the system says.
    fn sync(&mut self) -> io::Result<()>;

    /// Reserves the folder for one store, until the folder is dropped or the process ends. Returns
    /// false if it is reserved already.
    ///
    /// # Errors
    /// What the system says.
    fn lock(&mut self) -> io::Result<bool>;
}

/// Reads exactly `bytes`, or returns false if the file ends before.
pub(crate) fn read_exact(disk: &dyn Disk, offset: u64, bytes: &mut [u8]) -> io::Result<bool> {
    let mut done = 0;
    while done < bytes.len() {
        match disk.read_at(offset + done as u64, &mut bytes[done..]) {
            Ok(0) => return Ok(false),
            Ok(more) => done += more,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(true)
}
