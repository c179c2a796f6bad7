//! Files for tests of bitmaps in files.
#![allow(dead_code, unreachable_pub, clippy::unwrap_used)] // each test uses a part

use std::fs::File;
use std::sync::atomic::{AtomicU64, Ordering};

/// A file of `len` zero bytes without a name, which is removed when it is closed.
pub fn scratch(len: u64) -> File {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let n = NEXT.fetch_add(1, Ordering::Relaxed);
    let name = format!("dirtymap-{}-{n}", std::process::id());
    let path = std::env::temp_dir().join(name);
    let mut open = File::options();
    let file = open.read(true).write(true).create_new(true).open(&path);
    let file = file.unwrap();
    std::fs::remove_file(&path).unwrap();
    file.set_len(len).unwrap();
    file
}
