//! The tools of others read what we write, and we read what they write. A tool that is not
//! installed is a skip: `.ci/run peers` installs them.
#![cfg(all(unix, feature = "nbd", feature = "qcow2", feature = "rbd"))]
#![allow(clippy::unwrap_used)]

#[path = "../common_rbd/mod.rs"]
mod common_rbd;
#[path = "../../../tests/common_skip/mod.rs"]
mod common_skip;
mod nbd;
mod qcow2;
mod rbd;

use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use dirtymap::exchange::RunTable;
use dirtymap::{Granule, Iova, IovaRange};
use dirtymap_formats::nbd::{Export, serve};
use dirtymap_formats::qcow2::{Image, create_for_raw};

/// Whether these tools are there. If not, the test says so.
fn tools(names: &[&str]) -> bool {
    names.iter().all(|name| {
        let version = Command::new(name)
            .arg("--version")
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status();
        let there = version.is_ok();
        if !there {
            common_skip::skip(format!("{name} is not installed"));
        }
        there
    })
}

/// Runs a tool, and returns what it prints. It has to succeed.
fn run<S: AsRef<OsStr>>(name: &str, args: impl IntoIterator<Item = S>) -> String {
    let mut command = Command::new(name);
    command.args(args);
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// A folder that is gone at the end.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let name = format!("dirtymap-peers-{}-{name}", std::process::id());
        let path = std::env::temp_dir().join(name);
        fs::create_dir(&path).unwrap();
        Folder(path)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    fn text(&self, name: &str) -> String {
        self.path(name).into_os_string().into_string().unwrap()
    }

    /// An image of metadata for a raw disk of this size.
    fn image(&self, size: u64, cluster: u64) -> (String, Image<File>) {
        let raw = File::create(self.path("disk.raw")).unwrap();
        raw.set_len(size).unwrap();
        let mut options = File::options();
        let options = options.read(true).write(true).create_new(true);
        let mut file = options.open(self.path("disk.qcow2")).unwrap();
        let cluster = Granule::from_bytes(cluster).unwrap();
        create_for_raw(&mut file, &self.text("disk.raw"), size, cluster).unwrap();
        (self.text("disk.qcow2"), Image::open(file).unwrap())
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// A server that ends with the test.
struct Program {
    child: Child,
    socket: PathBuf,
}

impl Program {
    fn start(name: &str, args: &[&str], socket: &str) -> Self {
        let child = Command::new(name).args(args).spawn().unwrap();
        let socket = socket.into();
        Program { child, socket }
    }

    /// Connects, as soon as the program listens.
    fn connect(&mut self) -> UnixStream {
        loop {
            if let Ok(stream) = UnixStream::connect(&self.socket) {
                return stream;
            }
            let ended = self.child.try_wait().unwrap();
            assert!(
                ended.is_none(),
                "the server at {:?}: {ended:?}",
                self.socket
            );
            thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Serves exports at a socket while `client` runs.
fn serving<T>(socket: &Path, exports: &[Export<'_>], client: impl FnOnce() -> T) -> T {
    let listener = UnixListener::bind(socket).unwrap();
    let ended = AtomicBool::new(false);
    let end = End(&ended, socket);
    thread::scope(|scope| {
        scope.spawn(|| {
            while let Ok((stream, _)) = listener.accept() {
                // Acquire: pairs with the Release of `End`, whose connection is the last one.
                if ended.load(Ordering::Acquire) {
                    break;
                }
                scope.spawn(move || serve(stream, exports).unwrap());
            }
        });
        let end = end;
        let got = client();
        drop(end);
        got
    })
}

/// Ends a server, also if its test panics: says so, and wakes it by a connection.
struct End<'e>(&'e AtomicBool, &'e Path);

impl Drop for End<'_> {
    fn drop(&mut self) {
        // Release: pairs with the Acquire of the server, which is woken after this.
        self.0.store(true, Ordering::Release);
        let _ = UnixStream::connect(self.1);
        let _ = fs::remove_file(self.1);
    }
}

fn table(runs: &[(u64, u64)]) -> RunTable {
    let run = |&(start, len): &(u64, u64)| IovaRange::from_len(Iova::new(start), len).unwrap();
    runs.iter().map(run).collect()
}

fn json(text: &str) -> serde_json::Value {
    serde_json::from_str(text).unwrap()
}
