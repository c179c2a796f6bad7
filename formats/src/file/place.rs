//! The target of a bitmap file: a place that is overwritten, or a name that gets a new file.

use std::fs::{File, Metadata, OpenOptions};
use std::io::{self, BufWriter, Cursor, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use super::error::BitmapFileError;

/// Bytes of the header, at the beginning of the file.
pub(super) const HEADER: usize = 64;

/// A place that [`BitmapFile::write_to`](super::BitmapFile::write_to) can overwrite, without a tail
/// of the old contents.
pub trait Truncate: Write + Seek {
    /// Truncates the contents to `len` bytes. Does nothing if they are not longer.
    ///
    /// # Errors
    /// If the contents are longer, and the place cannot be truncated.
    fn truncate(&mut self, len: u64) -> io::Result<()>;
}

impl Truncate for File {
    fn truncate(&mut self, len: u64) -> io::Result<()> {
        match self.metadata()?.len() > len {
            true => self.set_len(len),
            false => Ok(()),
        }
    }
}

impl<W: Truncate + ?Sized> Truncate for &mut W {
    fn truncate(&mut self, len: u64) -> io::Result<()> {
        (**self).truncate(len)
    }
}

impl<W: Truncate> Truncate for BufWriter<W> {
    fn truncate(&mut self, len: u64) -> io::Result<()> {
        self.flush()?;
        self.get_mut().truncate(len)
    }
}

/// No vector is longer than a `usize` can hold, so a length beyond that truncates nothing.
fn cut(bytes: &mut Vec<u8>, len: u64) -> io::Result<()> {
    bytes.truncate(usize::try_from(len).unwrap_or(usize::MAX));
    Ok(())
}

impl Truncate for Cursor<Vec<u8>> {
    fn truncate(&mut self, len: u64) -> io::Result<()> {
        cut(self.get_mut(), len)
    }
}

impl Truncate for Cursor<&mut Vec<u8>> {
    fn truncate(&mut self, len: u64) -> io::Result<()> {
        cut(self.get_mut(), len)
    }
}

/// Makes room for a header at the beginning of `writer`, and truncates the contents after it.
pub(super) fn begin(writer: &mut impl Truncate) -> Result<(), BitmapFileError> {
    let len = writer.seek(SeekFrom::End(0))?;
    // Twice, because the first header also gets to the beginning of an empty place that appends.
    for _ in 0..2 {
        writer.seek(SeekFrom::Start(0))?;
        writer.write_all(&[0; HEADER])?;
        let end = writer.stream_position()?;
        if end != HEADER as u64 {
            writer.truncate(len)?;
            let at = end.saturating_sub(HEADER as u64);
            return Err(BitmapFileError::Appends { at });
        }
    }
    writer.truncate(HEADER as u64)?;
    writer.seek(SeekFrom::Start(HEADER as u64))?;
    Ok(())
}

/// A file that does not have its final name yet. Removed if it is dropped before that.
pub(super) struct Draft {
    pub(super) file: File,
    temporary: PathBuf,
    path: PathBuf,
    published: bool,
}

impl Draft {
    pub(super) fn create(path: &Path) -> io::Result<Self> {
        let path = resolved(path)?;
        if path.file_name().is_none() {
            let text = "the path of a bitmap file must end in a name";
            return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        }
        let old = std::fs::metadata(&path).ok().filter(Metadata::is_file);
        // A name may be taken by another thread, or by a process of this number that was killed.
        // Its length does not depend on the final name.
        for attempt in 0u64.. {
            let name = format!(".dirtymap-{}-{attempt}.tmp", std::process::id());
            let temporary = path.with_file_name(name);
            let mut open = OpenOptions::new();
            open.write(true).create_new(true);
            // Until the file has the permissions of the old one, no other user can read it.
            #[cfg(unix)]
            if old.is_some() {
                std::os::unix::fs::OpenOptionsExt::mode(&mut open, 0o600);
            }
            match open.open(&temporary) {
                Ok(file) => {
                    let draft = Draft {
                        file,
                        temporary,
                        path,
                        published: false,
                    };
                    old.map_or(Ok(()), |old| draft.become_like(&old))?;
                    return Ok(draft);
                }
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(error),
            }
        }
        Err(io::ErrorKind::AlreadyExists.into())
    }

    /// Copies the permissions of `old`, and its owner and group if the process may set them.
    #[cfg(unix)]
    fn become_like(&self, old: &Metadata) -> io::Result<()> {
        use std::os::unix::fs::{MetadataExt, PermissionsExt, fchown};
        let (owner, group) = (old.uid(), old.gid());
        let mut mode = old.mode() & 0o777;
        let given = fchown(&self.file, Some(owner), Some(group))
            .or_else(|_| fchown(&self.file, None, Some(group)));
        if given.is_err() {
            // Another group gets the rights of all other users.
            mode = mode & !0o070 | (mode & 0o007) << 3;
        }
        self.file.set_permissions(PermissionsExt::from_mode(mode))
    }

    /// Elsewhere a file has the permissions of its folder.
    #[cfg(not(unix))]
    fn become_like(&self, _: &Metadata) -> io::Result<()> {
        Ok(())
    }

    /// The file first, then its name, then the folder that holds the name: each is on the disk
    /// before the next begins.
    pub(super) fn publish(mut self) -> io::Result<()> {
        self.file.sync_all()?;
        std::fs::rename(&self.temporary, &self.path)?;
        self.published = true;
        sync_folder_of(&self.path)
    }
}

/// Makes a change of the name `path` durable.
pub(super) fn sync_folder_of(path: &Path) -> io::Result<()> {
    // On other systems a folder cannot be opened, and needs no sync.
    if cfg!(unix) {
        let folder = path.parent().filter(|folder| *folder != Path::new(""));
        File::open(folder.unwrap_or(Path::new(".")))?.sync_all()?;
    }
    Ok(())
}

impl Drop for Draft {
    fn drop(&mut self) {
        if !self.published {
            // A file that cannot be removed does no harm.
            let _ = std::fs::remove_file(&self.temporary);
        }
    }
}

/// The file to which `path` leads, if it is a symbolic link. That file may not exist.
pub(super) fn resolved(path: &Path) -> io::Result<PathBuf> {
    let mut path = path.to_owned();
    // The limit of Linux.
    for _ in 0..=40 {
        let Ok(target) = std::fs::read_link(&path) else {
            return Ok(path);
        };
        path = path.parent().unwrap_or(Path::new("")).join(target);
    }
    let text = format!("more than 40 symbolic links, up to {}", path.display());
    Err(io::Error::new(io::ErrorKind::InvalidInput, text))
}
