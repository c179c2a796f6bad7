//! The real thing: a child process writes to a real file under load, and is killed at a random
//! moment. The parent recovers, and compares the device with the copy of the consumer.
//!
//! `DIRTYMAP_KILLS` says how many times; `.ci/run store-kill` kills a thousand times.
#![cfg(unix)]
#![allow(clippy::unwrap_used)]

use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use dirtymap_store::{Device, DirFolder, Epoch, Opened, Options, Store};

const PAGE: u64 = 4096;
const LEN: u64 = 4 << 20;
const DEVICE: Device = Device { id: 9, len: LEN };
const WRITERS: u64 = 4;

/// Few open extents and a short log, so that extents close and logs are replaced all the time.
fn options() -> Options {
    Options::new().hot(8).log_bytes(32 << 10)
}

/// Numbers that look random (splitmix64).
struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        (mixed ^ (mixed >> 31)) % bound
    }
}

fn open(folder: &Path) -> Store {
    let folder = DirFolder::new(folder.join("store")).unwrap();
    match Store::open(folder, &DEVICE, &options()).unwrap() {
        Opened::Known(store) => store,
        Opened::Everything(lost) => panic!("nothing is known: {}", lost.why()),
    }
}

fn file(folder: &Path, name: &str) -> File {
    let mut options = File::options();
    options.read(true).write(true).create(true).truncate(false);
    options.open(folder.join(name)).unwrap()
}

/// The epoch of the copy, beside it. A kill leaves what was written to the system.
fn parent(folder: &Path) -> Option<Epoch> {
    let text = fs::read_to_string(folder.join("epoch")).ok()?;
    Some(text.parse().unwrap())
}

/// Copies one increment.
fn copy(store: &Store, folder: &Path) {
    let (device, backup) = (file(folder, "device"), file(folder, "backup"));
    let increment = store.harvest("backup", parent(folder)).unwrap();
    let mut page = [0; PAGE as usize];
    for run in increment.runs() {
        for at in (run.start().get()..=run.last().get()).step_by(PAGE as usize) {
            device.read_exact_at(&mut page, at).unwrap();
            backup.write_all_at(&page, at).unwrap();
        }
    }
    let epoch = increment.epoch().to_string();
    let durable = || {
        fs::write(folder.join("epoch.new"), epoch)?;
        fs::rename(folder.join("epoch.new"), folder.join("epoch"))
    };
    increment.commit(durable).unwrap();
}

/// The child: writers and a consumer, until it is killed.
#[test]
#[ignore = "the child of `a_process_that_is_killed_loses_nothing`"]
fn child() {
    let folder = std::env::var("DIRTYMAP_TEST_STORE").unwrap();
    let folder = Path::new(&folder);
    let store = Arc::new(open(folder));
    println!("ready");
    for writer in 0..WRITERS {
        let (store, device) = (Arc::clone(&store), file(folder, "device"));
        let mut random = Random(u64::from(std::process::id()) * WRITERS + writer);
        thread::spawn(move || {
            let handle = store.writer();
            loop {
                // Most writes are to few pages.
                let pages = LEN / PAGE;
                let bound = 1 + random.below(pages);
                let at = random.below(bound) * PAGE;
                let stamp = random.below(u64::MAX).to_le_bytes();
                // Half of the writers have handles.
                let write = match writer % 2 {
                    0 => handle.begin_write(at..at + PAGE).unwrap(),
                    _ => store.begin_write(at..at + PAGE).unwrap().wait().unwrap(),
                };
                device
                    .write_all_at(&stamp, at + random.below(PAGE - 8))
                    .unwrap();
                drop(write);
            }
        });
    }
    loop {
        copy(&store, folder);
    }
}

struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        // Nothing is left of a child, also when the test fails.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn run_and_kill(folder: &Path, random: &mut Random) {
    let this = std::env::current_exe().unwrap();
    let child = Command::new(this)
        .args(["child", "--exact", "--ignored", "--nocapture"])
        .env("DIRTYMAP_TEST_STORE", folder)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut child = Killed(child);
    let said = BufReader::new(child.0.stdout.take().unwrap());
    let ready = said.lines().any(|line| line.unwrap().contains("ready"));
    assert!(ready, "the child ended by itself");
    thread::sleep(Duration::from_micros(random.below(60_000)));
}

/// Each page that differs from the copy is reported.
fn check(folder: &Path, kill: u64) {
    let store = open(folder);
    let increment = store.harvest("backup", parent(folder)).unwrap();
    assert_eq!(increment.everything(), None, "after kill {kill}");
    let device = fs::read(folder.join("device")).unwrap();
    let backup = fs::read(folder.join("backup")).unwrap();
    let runs = increment.runs().runs();
    let both = device
        .chunks(PAGE as usize)
        .zip(backup.chunks(PAGE as usize));
    for (page, (device, backup)) in (0..).zip(both) {
        let at = dirtymap::Iova::new(page * PAGE);
        let reported = runs.iter().any(|run| run.contains(at));
        assert!(
            reported || device == backup,
            "page {page} is lost after kill {kill}"
        );
    }
}

#[test]
fn a_process_that_is_killed_loses_nothing() {
    let kills = std::env::var("DIRTYMAP_KILLS").map_or(12, |kills| kills.parse().unwrap());
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    for name in ["device", "backup"] {
        file(folder, name).set_len(LEN).unwrap();
    }
    let store_folder = DirFolder::new(folder.join("store")).unwrap();
    let store = Store::create(store_folder, &DEVICE, &options()).unwrap();
    store.join("backup").unwrap();
    copy(&store, folder);
    drop(store);
    let mut random = Random(u64::from(std::process::id()));
    for kill in 0..kills {
        run_and_kill(folder, &mut random);
        check(folder, kill);
    }
}
