//! Clients of others at our server, and our client at QEMU's server.

use std::fs;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use dirtymap::exchange::RunTable;
use dirtymap::{Access, AddressSpace, Granule, Start};
use dirtymap_formats::nbd::{Connect, Export};
use dirtymap_formats::qcow2::BitmapOptions;
use dirtymap_store::{Device, DirFolder, Options, Store};

use super::*;

const SIZE: u64 = 16 << 20;

fn dirty() -> RunTable {
    table(&[(1 << 20, 65536), (5 << 20, 4096), (SIZE - 200_704, 200_704)])
}

/// The runs that `nbdinfo --map` prints with this type.
fn listed(text: &str, kind: &str) -> RunTable {
    let run = |line: &str| {
        let mut words = line.split_whitespace();
        let (start, len) = (words.next()?.parse().ok()?, words.next()?.parse().ok()?);
        (words.next()? == kind).then_some((start, len))
    };
    table(&text.lines().filter_map(run).collect::<Vec<_>>())
}

/// The options of QEMU for a server at a socket.
fn driver(socket: &Path) -> String {
    let path = socket.display();
    format!("driver=nbd,server.type=unix,server.path={path}")
}

/// What `qemu-img map` shows of a context.
fn qemu_map(socket: &Path, context: &str) -> RunTable {
    let driver = format!("{},x-dirty-bitmap={context}", driver(socket));
    let map = ["map", "--output=json", "--image-opts", &driver];
    let map = json(&run("qemu-img", map));
    // QEMU shows bit 0 as a hole: what is dirty is "no data".
    let extents = map.as_array().unwrap().iter();
    let extents = extents.filter(|it| it["data"] == false).map(|it| {
        let number = |name: &str| it[name].as_u64().unwrap();
        (number("start"), number("length"))
    });
    table(&extents.collect::<Vec<_>>())
}

#[test]
#[ignore = "the stage peers runs it"]
fn nbdinfo_and_nbdcopy_read_our_server() {
    if !tools(&["nbdinfo", "nbdcopy"]) {
        return;
    }
    let folder = Folder::new("libnbd");
    let bytes: Vec<u8> = (0..SIZE).map(|at| ((at * at) >> 13) as u8).collect();
    let allocated = table(&[(0, 8 << 20)]);
    let export = Export::new("disk", SIZE).unwrap().with_data(&bytes);
    let export = export.with_description("of a test").unwrap();
    let export = export.with_dirty("epoch7", dirty()).unwrap();
    let export = [export.with_allocation(allocated.clone()).unwrap()];
    let socket = folder.path("s");
    let uri = format!("nbd+unix:///disk?socket={}", socket.display());
    serving(&socket, &export, || {
        let map = run("nbdinfo", ["--map=qemu:dirty-bitmap:epoch7", &uri]);
        assert_eq!(listed(&map, "1"), dirty(), "{map}");
        let map = run("nbdinfo", ["--map", &uri]);
        assert_eq!(listed(&map, "0"), allocated, "{map}");
        let list = run("nbdinfo", ["--list", &uri]);
        for text in [
            "disk",
            "of a test",
            "qemu:dirty-bitmap:epoch7",
            "base:allocation",
        ] {
            assert!(list.contains(text), "{list}");
        }
        let copy = folder.text("copy");
        run("nbdcopy", [&uri, &copy]);
        let copy = fs::read(copy).unwrap();
        // What is called a hole is not read.
        assert!(copy[..8 << 20] == bytes[..8 << 20]);
        assert!(copy[8 << 20..].iter().all(|&byte| byte == 0));
    });
}

#[test]
#[ignore = "the stage peers runs it"]
fn qemu_img_reads_our_server() {
    if !tools(&["qemu-img"]) {
        return;
    }
    let folder = Folder::new("map");
    let bytes: Vec<u8> = (0..SIZE).map(|at| (at >> 9) as u8).collect();
    let export = Export::new("", SIZE).unwrap().with_data(&bytes);
    let export = [export.with_dirty("epoch7", dirty()).unwrap()];
    let socket = folder.path("s");
    let driver = driver(&socket);
    serving(&socket, &export, || {
        assert_eq!(qemu_map(&socket, "qemu:dirty-bitmap:epoch7"), dirty());
        let copy = folder.text("copy");
        run(
            "qemu-img",
            ["convert", "--image-opts", &driver, "-O", "raw", &copy],
        );
        assert!(fs::read(copy).unwrap() == bytes);
    });
}

/// A space with two consumers and a store with one, as contexts by their names: real clients see
/// for each what it has to copy, and copy the disk.
#[test]
#[ignore = "the stage peers runs it"]
fn clients_of_others_read_each_consumer_by_its_name() {
    if !tools(&["nbdinfo", "nbdcopy", "qemu-img"]) {
        return;
    }
    let folder = Folder::new("consumers");
    let space = AddressSpace::tracked(Granule::K4);
    space.map(0..SIZE, 0, Access::ReadWrite).unwrap();
    let backup = space.consumer("backup", Start::Clean).unwrap();
    let replica = space.consumer("replica", Start::Clean).unwrap();
    space.mark(0x5000..0x6000).unwrap();
    backup.rounds().next().unwrap().commit();
    space.mark(0x8000..0xa000).unwrap();
    let leases = [&backup, &replica].map(|it| it.rounds().next().unwrap());
    let log = DirFolder::new(folder.path("store")).unwrap();
    let device = Device { id: 1, len: SIZE };
    let store = Store::create(log, &device, &Options::new()).unwrap();
    store.join("nightly").unwrap();
    let first = store.harvest("nightly", None).unwrap();
    let first = first.commit(|| Ok(())).unwrap();
    drop(store.begin_write(0x2_0000..0x2_1000).unwrap().wait());
    let increment = store.harvest("nightly", Some(first)).unwrap();

    let bytes: Vec<u8> = (0..SIZE).map(|at| (at >> 12) as u8).collect();
    let export = Export::new("", SIZE).unwrap().with_data(&bytes);
    let export = export.with_consumer(&backup, &leases[0]).unwrap();
    let export = export.with_consumer(&replica, &leases[1]).unwrap();
    let export = export.with_dirty(increment.consumer(), increment.runs().clone());
    let socket = folder.path("s");
    let uri = format!("nbd+unix:///?socket={}", socket.display());
    serving(&socket, &[export.unwrap()], || {
        for (name, runs) in [
            ("backup", &[(0x8000, 0x2000)][..]),
            ("replica", &[(0x5000, 0x1000), (0x8000, 0x2000)]),
            ("nightly", &[(0x2_0000, 0x1000)]),
        ] {
            let context = format!("qemu:dirty-bitmap:{name}");
            let map = run("nbdinfo", [&format!("--map={context}"), &uri]);
            assert_eq!(listed(&map, "1"), table(runs), "{map}");
            assert_eq!(qemu_map(&socket, &context), table(runs));
        }
        let copy = folder.text("copy");
        run("nbdcopy", [&uri, &copy]);
        assert!(fs::read(copy).unwrap() == bytes);
    });
    for lease in leases {
        lease.commit();
    }
    increment.commit(|| Ok(())).unwrap();
}

#[test]
#[ignore = "the stage peers runs it"]
fn our_client_reads_qemu_nbd() {
    if !tools(&["qemu-nbd"]) {
        return;
    }
    let folder = Folder::new("qemu-nbd");
    let (path, mut image) = folder.image(SIZE, 65536);
    let options = BitmapOptions::new().granule(Granule::K4);
    image.write("b", &dirty(), options).unwrap();
    drop(image);
    let socket = folder.text("s");
    let args = ["-r", "-t", "-f", "qcow2", "-B", "b", "-k", &socket, &path];
    let mut server = Program::start("qemu-nbd", &args, &socket);
    for compact in [true, false] {
        let stream = server.connect();
        let connect = Connect::new("").dirty("b").context("base:allocation");
        let connect = if compact { connect.compact() } else { connect };
        let mut client = connect.over(stream).unwrap();
        assert_eq!(client.size(), SIZE);
        assert_eq!(client.read_dirty("b").unwrap(), dirty());
        client.read_at(&mut [0; 100], 1 << 20).unwrap();
        client.disconnect().unwrap();
    }
    drop(server);
}

/// A disk of 1 TiB, 1 % of which is dirty in blocks of 64 KiB all over it: how many replies each
/// server takes to say so, and how long.
#[test]
#[ignore = "the stage peers runs it"]
fn the_status_of_a_large_disk_takes_no_more_replies_than_from_qemu() {
    if !tools(&["qemu-nbd"]) {
        return;
    }
    let folder = Folder::new("replies");
    let size = 1 << 40;
    // The numbers of splitmix64, in place of ones that differ from run to run.
    let block = |nth: u64| {
        let mut word = nth.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        word = (word ^ word >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        word = (word ^ word >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((word ^ word >> 31) % (size >> 16)) << 16
    };
    let blocks: Vec<_> = (0..(size >> 16) / 100)
        .map(|nth| (block(nth), 1 << 16))
        .collect();
    let dirty = table(&blocks);
    let (path, mut image) = folder.image(size, 2 << 20);
    image.write("b", &dirty, BitmapOptions::new()).unwrap();
    drop(image);

    let ask = |stream: UnixStream, compact: bool| {
        let connect = Connect::new("").dirty("b");
        let connect = if compact { connect.compact() } else { connect };
        let mut client = connect.over(stream).unwrap();
        let began = Instant::now();
        assert_eq!(client.read_dirty("b").unwrap(), dirty);
        let (took, replies) = (began.elapsed(), client.status_replies().0);
        client.disconnect().unwrap();
        (replies, took)
    };
    let socket = folder.text("qemu");
    let args = [
        "-r", "-t", "-e", "2", "-f", "qcow2", "-B", "b", "-k", &socket, &path,
    ];
    let mut server = Program::start("qemu-nbd", &args, &socket);
    let theirs = [true, false].map(|compact| ask(server.connect(), compact));
    drop(server);
    let export = [Export::new("", size)
        .unwrap()
        .with_dirty("b", dirty.clone())
        .unwrap()];
    let socket = folder.text("ours");
    let ours = serving(socket.as_ref(), &export, || {
        [true, false].map(|compact| ask(UnixStream::connect(&socket).unwrap(), compact))
    });
    let ms = |took: Duration| took.as_secs_f64() * 1e3;
    for (form, (ours, theirs)) in ["32 bits", "64 bits"].iter().zip(ours.iter().zip(&theirs)) {
        println!(
            "{form}: {} replies in {:.1} ms; QEMU: {} in {:.1} ms; {} runs",
            ours.0,
            ms(ours.1),
            theirs.0,
            ms(theirs.1),
            dirty.runs().len()
        );
        assert!(ours.0 <= theirs.0);
    }
    assert_eq!(ours[1].0, 1);
}
