//! QEMU's tools read our images and bitmaps, and we read theirs.

use std::io;

use dirtymap_formats::nbd::Connect;
use dirtymap_formats::qcow2::{BitmapOptions, ImageFile, QcowError};

use super::*;

const SIZE: u64 = 64 << 20;

fn open(path: &str) -> Image<File> {
    let file = File::options().read(true).write(true).open(path).unwrap();
    Image::open(file).unwrap()
}

fn granule(bytes: u64) -> BitmapOptions {
    BitmapOptions::new().granule(Granule::from_bytes(bytes).unwrap())
}

/// No error, and no leak.
fn check(path: &str) {
    let said = run("qemu-img", ["check", path]);
    assert!(said.contains("No errors were found"), "{said}");
}

/// What QEMU says a bitmap holds.
fn as_qemu_reads(folder: &Folder, path: &str, bitmap: &str) -> RunTable {
    let socket = folder.text("s");
    let args = ["-r", "-t", "-f", "qcow2", "-B", bitmap, "-k", &socket, path];
    let mut server = Program::start("qemu-nbd", &args, &socket);
    let mut client = Connect::new("")
        .dirty(bitmap)
        .over(server.connect())
        .unwrap();
    let runs = client.read_dirty(bitmap).unwrap();
    client.disconnect().unwrap();
    drop(server);
    std::fs::remove_file(&socket).unwrap();
    runs
}

/// Bitmaps with clusters of ones, of zeroes and of bits, in images of several kinds.
#[test]
#[ignore = "the stage peers runs it"]
fn qemu_reads_our_images_and_bitmaps() {
    if !tools(&["qemu-img", "qemu-nbd"]) {
        return;
    }
    for cluster in [512, 65536, 2 << 20] {
        let folder = Folder::new(&format!("ours-{cluster}"));
        let (path, mut image) = folder.image(SIZE, cluster);
        check(&path);
        // With 512 bytes in a cluster, a cluster of bits is 2 MiB of the disk.
        let runs = table(&[(512, 1024), (2 << 20, 6 << 20), (SIZE - 512, 512)]);
        image.write("fine", &runs, granule(512)).unwrap();
        image
            .write("all", &table(&[(0, SIZE)]), granule(65536))
            .unwrap();
        image
            .write("none", &table(&[]), granule(1 << 20).auto(false))
            .unwrap();
        drop(image);
        check(&path);
        let info = json(&run("qemu-img", ["info", "--output=json", &path]));
        let info = &info["format-specific"]["data"];
        assert_eq!(info["data-file"], folder.text("disk.raw"));
        assert_eq!(info["data-file-raw"], true);
        let bitmap = |nth: usize| &info["bitmaps"][nth];
        assert_eq!(bitmap(0)["name"], "fine");
        assert_eq!(bitmap(0)["granularity"], 512);
        assert_eq!(bitmap(1)["flags"], serde_json::json!(["auto"]));
        assert_eq!(bitmap(2)["flags"], serde_json::json!([]));
        assert_eq!(as_qemu_reads(&folder, &path, "fine"), runs);
        assert_eq!(as_qemu_reads(&folder, &path, "all"), table(&[(0, SIZE)]));
        assert_eq!(as_qemu_reads(&folder, &path, "none"), table(&[]));

        // The disk through the image is the raw disk.
        let raw = folder.text("disk.raw");
        run("qemu-io", ["-f", "raw", "-c", "write -P 7 1M 64K", &raw]);
        run(
            "qemu-img",
            ["compare", "-f", "qcow2", "-F", "raw", &path, &raw],
        );

        let mut image = open(&path);
        image.merge("none", &["fine"]).unwrap();
        image.remove("all").unwrap();
        drop(image);
        check(&path);
        let wide = table(&[
            (0, 1 << 20),
            (2 << 20, 6 << 20),
            (SIZE - (1 << 20), 1 << 20),
        ]);
        assert_eq!(as_qemu_reads(&folder, &path, "none"), wide);
        open(&path).remove("fine").unwrap();
        open(&path).remove("none").unwrap();
        check(&path);
    }
}

/// QEMU marks what is written through it in our bitmap, and merges, disables and removes ours.
#[test]
#[ignore = "the stage peers runs it"]
fn qemu_goes_on_with_our_bitmaps() {
    if !tools(&["qemu-img", "qemu-io"]) {
        return;
    }
    let folder = Folder::new("goes-on");
    let (path, mut image) = folder.image(SIZE, 65536);
    image
        .write("a", &table(&[(1 << 20, 65536)]), granule(65536))
        .unwrap();
    image
        .write("b", &table(&[(9 << 20, 65536)]), granule(65536).auto(false))
        .unwrap();
    drop(image);
    run("qemu-io", ["-f", "qcow2", "-c", "write 5M 128K", &path]);
    let mut image = open(&path);
    assert_eq!(
        image.read("a").unwrap(),
        table(&[(1 << 20, 65536), (5 << 20, 131_072)])
    );
    assert_eq!(image.read("b").unwrap(), table(&[(9 << 20, 65536)]));
    drop(image);
    run(
        "qemu-img",
        ["bitmap", "--merge", "b", "-f", "qcow2", &path, "a"],
    );
    let sum = table(&[(1 << 20, 65536), (5 << 20, 131_072), (9 << 20, 65536)]);
    assert_eq!(open(&path).read("a").unwrap(), sum);
    run(
        "qemu-img",
        ["bitmap", "--disable", "-f", "qcow2", &path, "a"],
    );
    assert!(!open(&path).bitmaps().unwrap()[0].auto);
    run(
        "qemu-img",
        ["bitmap", "--remove", "-f", "qcow2", &path, "b"],
    );
    assert_eq!(open(&path).bitmaps().unwrap().len(), 1);
    check(&path);
}

/// Images that QEMU made, with data in them, an overlay among them; its bitmaps, and ours beside.
#[test]
#[ignore = "the stage peers runs it"]
fn we_go_on_with_bitmaps_of_qemu() {
    if !tools(&["qemu-img", "qemu-io"]) {
        return;
    }
    let folder = Folder::new("theirs");
    let base = folder.text("base.qcow2");
    run("qemu-img", ["create", "-f", "qcow2", &base, "64M"]);
    run("qemu-io", ["-f", "qcow2", "-c", "write -P 1 0 8M", &base]);
    let small = "cluster_size=512,refcount_bits=1";
    for (name, options, backing) in [
        ("plain", "cluster_size=64K", false),
        ("small", small, false),
        ("wide", "cluster_size=4K,refcount_bits=64", false),
        ("extended", "cluster_size=64K,extended_l2=on", false),
        ("overlay", "cluster_size=64K", true),
    ] {
        let path = folder.text(&format!("{name}.qcow2"));
        let mut args = vec!["create", "-f", "qcow2", "-o", options];
        if backing {
            args.extend(["-b", &base, "-F", "qcow2"]);
        }
        args.extend([&path, "64M"]);
        run("qemu-img", &args);
        // Without a bitmap of QEMU's the extension is new.
        open(&path)
            .write("ours", &table(&[(7 << 20, 1)]), granule(65536))
            .unwrap();
        check(&path);
        run(
            "qemu-img",
            [
                "bitmap", "--add", "-g", "64K", "-f", "qcow2", &path, "theirs",
            ],
        );
        let write = "write -P 9 3M 1M";
        run("qemu-io", ["-f", "qcow2", "-c", write, &path]);
        let mut image = open(&path);
        assert_eq!(image.read("theirs").unwrap(), table(&[(3 << 20, 1 << 20)]));
        let both = table(&[(3 << 20, 1 << 20), (7 << 20, 65536)]);
        assert_eq!(image.read("ours").unwrap(), both);
        image
            .write("third", &table(&[(0, SIZE)]), granule(4096))
            .unwrap();
        image.merge("theirs", &["ours"]).unwrap();
        image
            .write("ours", &table(&[]), BitmapOptions::new())
            .unwrap();
        drop(image);
        check(&path);
        run("qemu-io", ["-f", "qcow2", "-c", "read -P 9 3M 1M", &path]);
        if backing {
            run("qemu-io", ["-f", "qcow2", "-c", "read -P 1 0 3M", &path]);
        }
        let mut image = open(&path);
        assert_eq!(image.read("theirs").unwrap(), both);
        assert_eq!(image.read("third").unwrap(), table(&[(0, SIZE)]));
        for name in ["theirs", "ours", "third"] {
            image.remove(name).unwrap();
        }
        drop(image);
        check(&path);
    }
}

/// A file whose writes and flushes fail after so many of them.
struct Cut {
    file: File,
    left: usize,
}

impl Cut {
    fn step(&mut self) -> io::Result<&mut File> {
        self.left = self.left.checked_sub(1).ok_or(io::ErrorKind::Other)?;
        Ok(&mut self.file)
    }
}

impl ImageFile for Cut {
    fn length(&mut self) -> io::Result<u64> {
        self.file.length()
    }

    fn read_at(&mut self, at: u64, buf: &mut [u8]) -> io::Result<()> {
        self.file.read_at(at, buf)
    }

    fn write_at(&mut self, at: u64, bytes: &[u8]) -> io::Result<()> {
        self.step()?.write_at(at, bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.step()?.flush()
    }
}

/// Cut off at any write, a change leaves an image in which QEMU finds nothing worse than clusters
/// that are lost, and those are found again.
#[test]
#[ignore = "the stage peers runs it"]
fn qemu_finds_no_damage_in_an_image_whose_change_was_cut_off() {
    if !tools(&["qemu-img"]) {
        return;
    }
    let folder = Folder::new("cut");
    let (path, mut image) = folder.image(SIZE, 4096);
    let old = table(&[(0, 1), (9 << 20, 1)]);
    image.write("it", &old, granule(512)).unwrap();
    drop(image);
    let good = std::fs::read(&path).unwrap();
    let rounded = table(&[(0, 512), (9 << 20, 512)]);
    for left in 0.. {
        std::fs::write(&path, &good).unwrap();
        let file = open(&path).into_file();
        let mut image = Image::open(Cut { file, left }).unwrap();
        let new = table(&[(5 << 20, 1), (40 << 20, 1)]);
        let done = image.write("it", &new, BitmapOptions::new()).is_ok();
        drop(image);
        mend(&path);
        // Counts of clusters past the end of the file are no leak to QEMU before the file grows.
        open(&path).write("it", &old, BitmapOptions::new()).unwrap();
        mend(&path);
        assert_eq!(open(&path).read("it").unwrap(), rounded);
        if done {
            return;
        }
    }
}

/// Clusters may be lost, and nothing else may be wrong.
fn mend(path: &str) {
    let checked = Command::new("qemu-img").args(["check", path]).output();
    let checked = checked.unwrap();
    if checked.status.code() == Some(3) {
        run("qemu-img", ["check", "-r", "leaks", path]);
    }
    check(path);
}

/// The daemon keeps its bitmaps in memory. Killed, it leaves them in use, and they are not believed
/// until one is written anew.
#[test]
#[ignore = "the stage peers runs it"]
fn a_daemon_that_was_killed_leaves_its_bitmaps_in_use() {
    if !tools(&["qemu-img", "qemu-storage-daemon"]) {
        return;
    }
    let folder = Folder::new("daemon");
    let (path, mut image) = folder.image(SIZE, 65536);
    image
        .write("a", &table(&[(1 << 20, 65536)]), granule(65536))
        .unwrap();
    drop(image);
    let socket = folder.text("s");
    let node = format!(
        "driver=qcow2,node-name=n,file.driver=file,file.filename={path},\
         data-file.driver=file,data-file.filename={}",
        folder.text("disk.raw")
    );
    let mut daemon = Program::start(
        "qemu-storage-daemon",
        &[
            "--blockdev",
            &node,
            "--nbd-server",
            &format!("addr.type=unix,addr.path={socket}"),
            "--export",
            "type=nbd,id=e,node-name=n,name=x,writable=on,bitmaps.0=a",
        ],
        &socket,
    );
    let mut client = Connect::new("x").dirty("a").over(daemon.connect()).unwrap();
    assert_eq!(client.read_dirty("a").unwrap(), table(&[(1 << 20, 65536)]));
    client.disconnect().unwrap();
    drop(daemon); // kills it
    let mut image = open(&path);
    assert!(matches!(image.read("a"), Err(QcowError::InUse { .. })));
    image
        .write("a", &table(&[(0, SIZE)]), BitmapOptions::new())
        .unwrap();
    drop(image);
    check(&path);
    let info = json(&run("qemu-img", ["info", "--output=json", &path]));
    let flags = &info["format-specific"]["data"]["bitmaps"][0]["flags"];
    assert_eq!(flags, &serde_json::json!(["auto"]));

    // In use by us is in use for QEMU.
    open(&path).begin_use("a").unwrap();
    let info = json(&run("qemu-img", ["info", "--output=json", &path]));
    let flags = &info["format-specific"]["data"]["bitmaps"][0]["flags"];
    assert_eq!(flags, &serde_json::json!(["in-use", "auto"]));
}
