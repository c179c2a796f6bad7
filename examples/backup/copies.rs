//! The forms in which an increment is stored: a file, `rbd diff`, and an object.
//!
//! The file gets its name last. A generation whose file has no name does not exist, and the next
//! worker makes it again in all forms.

use std::error::Error;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use dirtymap_store::Increment;

use crate::cli::Cli;
use crate::generation::{self, Head};
#[cfg(feature = "objects")]
use crate::objects::Objects;
use crate::rbd;

pub(crate) struct Copies<'f> {
    pub(crate) folder: &'f Path,
    #[cfg(feature = "objects")]
    objects: Objects,
}

/// Files that have no names yet.
pub(crate) struct Draft {
    file: PathBuf,
    rbd: PathBuf,
}

impl<'f> Copies<'f> {
    pub(crate) fn open(cli: &Cli, folder: &'f Path) -> Result<Self, Box<dyn Error>> {
        #[cfg(feature = "objects")]
        let objects = match &cli.objects {
            Some(place) => Objects::open(place)?,
            None => Objects::open(&folder.join("objects").to_string_lossy())?,
        };
        #[cfg(not(feature = "objects"))]
        let _ = cli;
        Ok(Copies {
            folder,
            #[cfg(feature = "objects")]
            objects,
        })
    }

    /// The forms of the increments, for the report.
    pub(crate) fn forms(&self) -> &'static str {
        match cfg!(feature = "objects") {
            true => "files, rbd diff and objects",
            false => "files and rbd diff",
        }
    }

    /// Whether an increment of a consumer exists: as an object, because objects outlive the folder
    /// of a run, or else as a file.
    pub(crate) fn any(&self, consumer: &str) -> io::Result<bool> {
        #[cfg(feature = "objects")]
        return Ok(self.objects.count(consumer)? > 0);
        #[cfg(not(feature = "objects"))]
        Ok(!generation::all(self.folder, consumer)?.is_empty())
    }

    /// Copies an increment from the image.
    pub(crate) fn draft(
        &self,
        head: &Head,
        increment: &Increment<'_>,
        image: &File,
    ) -> io::Result<Draft> {
        Ok(Draft {
            file: generation::write(self.folder, head, image)?,
            rbd: rbd::write(self.folder, head, increment.runs(), image)?,
        })
    }

    /// A draft gets its name in each form, durably.
    pub(crate) fn publish(&self, head: &Head, draft: &Draft) -> io::Result<()> {
        #[cfg(feature = "objects")]
        self.objects.upload(&name(head), File::open(&draft.file)?)?;
        generation::publish(self.folder, head, &draft.rbd, "rbd")?;
        generation::publish(self.folder, head, &draft.file, "inc")
    }

    /// Refuses a generation whose object is not its file, byte for byte.
    pub(crate) fn check_object(&self, head: &Head, path: &Path) -> io::Result<()> {
        #[cfg(feature = "objects")]
        if self.objects.fetch(&name(head))? != std::fs::read(path)? {
            let what = format!("the object {} differs from its file", name(head));
            return Err(io::Error::other(what));
        }
        let _ = (head, path);
        Ok(())
    }

    /// Refuses objects beside the `count` generations of a consumer.
    pub(crate) fn check_count(&self, consumer: &str, count: usize) -> io::Result<()> {
        #[cfg(feature = "objects")]
        if self.objects.count(consumer)? != count {
            let found = self.objects.count(consumer)?;
            let what = format!("{consumer}: {found} objects of {count} generations");
            return Err(io::Error::other(what));
        }
        let _ = (consumer, count);
        Ok(())
    }
}

#[cfg(feature = "objects")]
fn name(head: &Head) -> String {
    format!("{}/{:04}.inc", head.consumer, head.number)
}
