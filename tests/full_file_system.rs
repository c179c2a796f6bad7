//! Bitmaps in files on a full file system: an error before anything is cleared, never a signal.
//!
//! The test runs itself as a child, in a mount namespace of its own with a small file system. A
//! child that is killed by SIGBUS is a failure of the test, and does not end it.
#![cfg(all(feature = "mmap", target_os = "linux", not(dirtymap_loom)))]
#![allow(clippy::unwrap_used)] // helpers of tests

mod common;

use common::{Fake, pages};
use dirtymap::bitmap::{BitmapError, FileBitmap};
use dirtymap::{Access, AddressSpace, Error, Granule, HarvestRequest, Lease, Owed, UserBitmap};
use std::ffi::{CStr, CString};
use std::fs::File;
use std::io::{self, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};
use std::sync::Arc;

const FOLDER: &str = "DIRTYMAP_TEST_SMALL_FOLDER";
/// Pages whose bits fill one window of 64 KiB.
const WINDOW: u64 = 8 << 16;
/// The dirty pages of each space in these tests: two pages of a source and two marks, in two
/// windows.
const DIRTY: [u64; 4] = [3, 7, WINDOW + 3, WINDOW + 9];

/// Runs `test` in a child process that has a file system of `kind` at the folder in `FOLDER`, and
/// returns its status. Returns `None`, after a message, if the process may not mount a file system.
fn on_its_own(test: &str, kind: &CStr, options: &CStr) -> Option<ExitStatus> {
    let folder = std::env::temp_dir().join(format!("dirtymap-{test}-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let mut child = Command::new(std::env::current_exe().unwrap());
    child
        .args(["--exact", test, "--nocapture"])
        .env(FOLDER, &folder);
    let place = CString::new(folder.as_os_str().as_bytes()).unwrap();
    let (kind, options) = (kind.to_owned(), options.to_owned());
    // SAFETY: between fork and exec it makes system calls alone, on strings that were made before.
    unsafe { child.pre_exec(move || mount_alone(&place, &kind, &options)) };
    let ended = child.spawn().map(|mut child| child.wait().unwrap());
    std::fs::remove_dir(&folder).unwrap();
    match ended {
        Ok(status) => Some(status),
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            eprintln!("SKIP: this process may not mount a file system: {error}");
            None
        }
        Err(error) => panic!("{error}"),
    }
}

fn mount_alone(place: &CStr, kind: &CStr, options: &CStr) -> io::Result<()> {
    let done = |code: i32| match code {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    };
    let none = c"none".as_ptr();
    // SAFETY: takes a number.
    done(unsafe { libc::unshare(libc::CLONE_NEWNS) })?;
    let private = libc::MS_REC | libc::MS_PRIVATE;
    let nothing = std::ptr::null();
    // SAFETY: strings that end with 0 and outlive the call; no data.
    done(unsafe { libc::mount(none, c"/".as_ptr(), nothing, private, nothing.cast()) })?;
    let (place, kind, options) = (place.as_ptr(), kind.as_ptr(), options.as_ptr().cast());
    // SAFETY: strings that end with 0 and outlive the call.
    done(unsafe { libc::mount(none, place, kind, 0, options) })
}

/// The folder of the small file system, in the child.
fn folder() -> Option<PathBuf> {
    std::env::var_os(FOLDER).map(PathBuf::from)
}

/// A file of `len` bytes, which is one hole.
fn sparse(folder: &Path, name: &str, len: u64) -> File {
    let mut open = File::options();
    open.read(true).write(true).create(true).truncate(true);
    let file = open.open(folder.join(name)).unwrap();
    file.set_len(len).unwrap();
    file
}

/// Writes until the file system is full.
fn fill(folder: &Path) {
    let mut ballast = File::create(folder.join("ballast")).unwrap();
    let error = loop {
        if let Err(error) = ballast.write_all(&[7; 4096]) {
            break error;
        }
    };
    assert_eq!(error.kind(), io::ErrorKind::StorageFull);
}

/// A bitmap of two windows of 64 KiB in a new file without blocks.
fn bitmap(folder: &Path, name: &str) -> FileBitmap {
    let bitmap = FileBitmap::new(sparse(folder, name, 2 << 16), 0, 2 << 16);
    bitmap.with_window(1 << 16).unwrap()
}

fn request() -> HarvestRequest<'static> {
    HarvestRequest::new(pages(0, 2 * WINDOW), Granule::K4)
}

/// A tracked space in which [`DIRTY`] is dirty.
fn space() -> (AddressSpace, Arc<Fake>) {
    let fake = Arc::new(Fake::default());
    let space = AddressSpace::with_source(Granule::K4, fake.clone()).unwrap();
    let all = request().range();
    space.map(all, 0, Access::ReadWrite).unwrap();
    space.start_tracking().unwrap();
    fake.dirty(DIRTY[0]);
    fake.dirty(DIRTY[2]);
    space.mark(pages(DIRTY[1], 1)).unwrap();
    space.mark(pages(DIRTY[3], 1)).unwrap();
    (space, fake)
}

/// The pages that a harvest into memory finds.
fn found(space: &AddressSpace) -> Vec<u64> {
    let mut words = vec![0; 2 * WINDOW as usize / 64];
    let bitmap = UserBitmap::new(&mut words);
    let lease = space.harvest(&request(), bitmap).unwrap().sync().unwrap();
    let found = lease.runs().map(|run| run.start().get() >> 12).collect();
    lease.commit();
    found
}

/// The stop of a harvest into a full file: its error names the bytes, and the same pages are dirty
/// as before.
fn refused(way: &str, space: &AddressSpace, lease: Result<Lease<'_, Owed>, Error>) {
    let lease = lease.unwrap();
    let stopped = lease.stopped();
    let stopped = stopped.unwrap_or_else(|| panic!("{way}: {lease:?}"));
    no_room(way, &stopped.error);
    lease.partial().sync().unwrap().commit();
    assert_eq!(found(space), DIRTY, "{way}: what was not recorded stays");
}

fn no_room(way: &str, error: &Error) {
    assert!(
        matches!(
            error,
            Error::Bitmap(BitmapError::NoSpace { at: 0 | 0x1_0000, len, .. }) if *len == 1 << 16
        ),
        "{way}: {error}"
    );
    assert_eq!(error.errno(), libc::ENOSPC);
}

fn each_way_of_harvesting(folder: &Path) {
    let file = bitmap(folder, "bits");
    fill(folder);
    let whole = UserBitmap::file;

    let (space, _) = space();
    let lease = space.harvest(&request(), whole(&file));
    refused("harvest", &space, lease);

    let (space, _) = self::space();
    let from = request().range().start();
    let lease = space.harvest(&request().resume_at(from).max_bits(100), whole(&file));
    refused("bounded", &space, lease);

    let (space, _) = self::space();
    let mut words = vec![u64::MAX; 2 * WINDOW as usize / 64];
    let mask = UserBitmap::new(&mut words);
    let mask = mask.view(request().range(), Granule::K4).unwrap();
    let lease = space.harvest(&request().masked(mask), whole(&file));
    refused("masked", &space, lease);

    #[cfg(feature = "rayon")]
    {
        let (space, _) = self::space();
        let lease = space.harvest(&request().parallel(), whole(&file));
        refused("parallel", &space, lease);
    }

    let (space, _) = self::space();
    let error = space.peek(&request(), whole(&file)).unwrap_err();
    no_room("peek", &error);
    assert_eq!(found(&space), DIRTY, "peek");

    let (space, fake) = self::space();
    let all = request().range();
    let error = space.unmap(all, Granule::K4, whole(&file)).unwrap_err();
    no_room("unmap", &error);
    assert_eq!(fake.with(|s| s.dirty.len()), 0, "its translations are gone");
    assert_eq!(space.mappings().len(), 1, "the area is not");
    assert_eq!(found(&space), DIRTY, "unmap");
}

/// The file system has room for the first window only, so the harvest stops at the second.
fn a_part(folder: &Path) {
    let file = bitmap(folder, "part");
    // Of 30 pages 28 are free: room for one window of 16, not for two.
    std::fs::write(folder.join("ballast"), [7; 2 << 12]).unwrap();
    let (space, fake) = space();
    let lease = space.harvest(&request(), UserBitmap::file(&file));
    let lease = lease.unwrap();
    let stopped = lease.stopped().unwrap_or_else(|| panic!("{lease:?}"));
    no_room("part", &stopped.error);
    let at = stopped.at.get() >> 12;
    assert!((WINDOW..=WINDOW + 3).contains(&at), "stopped at page {at}");
    assert_eq!(fake.with(|s| s.dirty.first().copied()), Some(WINDOW + 3));
    lease.abort();
    assert_eq!(found(&space), DIRTY);
    std::fs::remove_file(folder.join("part")).unwrap();
}

/// A bitmap that is one hole is read, merged and emptied without a new block. A read of a hole
/// through a mapping allocates a block in a tmpfs, and can raise the signal too.
fn reading(folder: &Path) {
    let file = bitmap(folder, "holes");
    let mut words = vec![u64::MAX; 2 * WINDOW as usize / 64];
    let other = UserBitmap::new(&mut words);
    let other = other.view(request().range(), Granule::K4).unwrap();
    let view = UserBitmap::file(&file).view(request().range(), Granule::K4);
    let view = view.unwrap();
    assert_eq!(view.count(), 0);
    assert!(view.runs().next().is_none());
    assert_eq!(view.or_into(&other).unwrap(), 0);
    assert_eq!(view.and_not(&other).unwrap(), 0);
    assert_eq!(other.and_not(&view).unwrap(), 0);
    no_room("or_into", &other.or_into(&view).unwrap_err().into());
}

/// A sparse file of a bitmap on a tmpfs of a few pages: the harvest cleared a page's dirty bit
/// although its record found no room, and SIGBUS killed the process.
#[test]
fn a_full_file_system_is_an_error_that_names_the_bytes_and_clears_nothing() {
    if let Some(folder) = folder() {
        a_part(&folder);
        each_way_of_harvesting(&folder);
        reading(&folder);
        return;
    }
    let test = "a_full_file_system_is_an_error_that_names_the_bytes_and_clears_nothing";
    if let Some(status) = on_its_own(test, c"tmpfs", c"size=120k") {
        assert!(status.success(), "the child ended by {status}");
    }
}

/// A file system that cannot reserve blocks (here a ramfs) is tested by a write to each page of the
/// window.
#[test]
fn a_file_system_that_cannot_reserve_works_as_well() {
    if let Some(folder) = folder() {
        let file = bitmap(&folder, "bits");
        let (space, _) = space();
        let lease = space
            .harvest(&request(), UserBitmap::file(&file))
            .unwrap()
            .sync()
            .unwrap();
        let runs: Vec<u64> = lease.runs().map(|run| run.start().get() >> 12).collect();
        assert_eq!(runs, DIRTY);
        lease.commit();
        return;
    }
    let test = "a_file_system_that_cannot_reserve_works_as_well";
    if let Some(status) = on_its_own(test, c"ramfs", c"") {
        assert!(status.success(), "the child ended by {status}");
    }
}
