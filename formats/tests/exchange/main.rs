//! Forms of dirty state for other programs: bitmap files and Roaring sets.
#![allow(clippy::unwrap_used)] // helpers of tests

mod file;
mod files;
#[cfg(unix)]
mod killed;
#[cfg(unix)]
mod places;
mod restart;
#[cfg(feature = "roaring")]
mod roaring;

/// A folder for one test, which is removed when the value is dropped.
struct Folder(std::path::PathBuf);

impl Folder {
    fn new(test: &str) -> Self {
        let name = format!("dirtymap-{test}-{}", std::process::id());
        let path = std::env::temp_dir().join(name);
        std::fs::create_dir_all(&path).unwrap();
        Folder(path)
    }

    fn file(&self) -> std::path::PathBuf {
        self.0.join("bits")
    }

    /// The names of the files in the folder.
    fn names(&self) -> Vec<String> {
        let entries = std::fs::read_dir(&self.0).unwrap();
        let names = entries.map(|entry| entry.unwrap().file_name());
        names.map(|name| name.into_string().unwrap()).collect()
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn range(start: u64, len: u64) -> dirtymap::IovaRange {
    dirtymap::IovaRange::from_len(dirtymap::Iova::new(start), len).unwrap()
}
