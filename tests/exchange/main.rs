//! Forms of dirty state for other programs: bitmap files, roaring sets, serialized runs.
#![cfg(not(dirtymap_loom))]
#![allow(clippy::unwrap_used)] // helpers of tests

#[cfg(feature = "bitmap-file")]
mod file;
#[cfg(all(feature = "bitmap-file", unix))]
mod killed;
#[cfg(all(feature = "bitmap-file", unix))]
mod places;
#[cfg(feature = "bitmap-file")]
mod restart;
#[cfg(feature = "roaring")]
mod roaring;
#[cfg(feature = "serde")]
mod serde;

#[cfg(feature = "bitmap-file")]
/// A folder for one test, which is removed when the value is dropped.
struct Folder(std::path::PathBuf);

#[cfg(feature = "bitmap-file")]
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

#[cfg(feature = "bitmap-file")]
impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

#[cfg(any(feature = "bitmap-file", feature = "roaring", feature = "serde"))]
fn range(start: u64, len: u64) -> dirtymap::IovaRange {
    dirtymap::IovaRange::from_len(dirtymap::Iova::new(start), len).unwrap()
}
