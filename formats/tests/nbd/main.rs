//! The server and the client of NBD against each other, and each against a peer that does not keep
//! to the protocol.
#![cfg(all(unix, feature = "nbd"))]
#![allow(clippy::unwrap_used)]

mod hostile;

use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::thread;

use dirtymap::exchange::RunTable;
use dirtymap::{Access, AddressSpace, Granule, Iova, IovaRange, Start};
use dirtymap_formats::nbd::{Client, Connect, Export, NbdError, Session, serve};
use dirtymap_store::{Device, DirFolder, Options, Store};
use proptest::collection::vec;
use proptest::prelude::*;

fn table(runs: &[(u64, u64)]) -> RunTable {
    let run = |&(start, len): &(u64, u64)| IovaRange::from_len(Iova::new(start), len).unwrap();
    runs.iter().map(run).collect()
}

/// Serves one connection to `exports` while `client` runs.
fn session<T>(exports: &[Export<'_>], client: impl FnOnce(UnixStream) -> T) -> (T, Session) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    thread::scope(|scope| {
        let server = scope.spawn(move || serve(ours, exports));
        let got = client(theirs);
        (got, server.join().unwrap().unwrap())
    })
}

#[test]
fn a_client_reads_what_a_server_has() {
    let dirty = table(&[(4096, 8192), (1 << 30, 4096), ((1 << 40) - 65536, 65536)]);
    let allocated = table(&[(0, 1 << 20)]);
    let export = Export::new("disk", 1 << 40).unwrap();
    let export = export.with_dirty("epoch7", dirty.clone()).unwrap();
    let export = [export.with_allocation(allocated.clone()).unwrap()];
    for compact in [false, true] {
        let mut connect = Connect::new("disk")
            .dirty("epoch7")
            .context("base:allocation");
        if compact {
            connect = connect.compact();
        }
        let (replies, session) = session(&export, |stream| {
            let mut client = connect.over(stream).unwrap();
            assert_eq!(client.size(), 1 << 40);
            assert_eq!(client.is_extended(), !compact);
            assert_eq!(client.read_dirty("epoch7").unwrap(), dirty);
            let data = client.read_context("base:allocation", |flags| flags == 0);
            assert_eq!(data.unwrap(), allocated);
            let replies = client.status_replies();
            client.disconnect().unwrap();
            replies
        });
        assert!(session.said_goodbye);
        assert_eq!(session.export.as_deref(), Some("disk"));
        if !compact {
            assert_eq!(replies.0, 2, "the whole disk in one reply for each context");
        }
    }
}

#[test]
fn the_loopback_interface_does_as_well() {
    let dirty = table(&[(4096, 8192)]);
    let export = Export::new("", 1 << 20).unwrap();
    let export = [export.with_dirty("x", dirty.clone()).unwrap()];
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    thread::scope(|scope| {
        let server = scope.spawn(|| serve(listener.accept().unwrap().0, &export));
        let mut client = Connect::new("").dirty("x").over(stream).unwrap();
        assert_eq!(client.read_dirty("x").unwrap(), dirty);
        client.disconnect().unwrap();
        assert!(server.join().unwrap().unwrap().said_goodbye);
    });
}

/// The lease stays with the program that serves it: a client that went away half-way leaves
/// everything dirty, and only the commit makes it clean.
#[test]
fn a_lease_is_served_and_outlives_the_connection() {
    let space = AddressSpace::tracked(Granule::K4);
    space.map(0..1 << 24, 0, Access::ReadWrite).unwrap();
    space.rounds().next().unwrap().commit(); // all of it is new
    space.mark(0x5000..0x7001).unwrap();
    let lease = space.rounds().next().unwrap();
    let export = Export::new("", 1 << 24).unwrap();
    let export = [export.with_lease("now", &lease).unwrap()];
    let (dirty, ended) = session(&export, |stream| {
        let mut client = Connect::new("").dirty("now").over(stream).unwrap();
        client.read_dirty("now").unwrap()
    });
    assert_eq!(dirty, table(&[(0x5000, 0x3000)]));
    assert!(!ended.said_goodbye);
    drop(lease);
    let again = space.rounds().next().unwrap();
    assert_eq!(again.runs().collect::<RunTable>(), dirty);
    again.commit();
    assert_eq!(space.rounds().next().unwrap().dirty(), 0);
}

/// Each consumer of a space and each of a store is a context of its own, by its name, and clients
/// that ask for another name get nothing.
#[test]
fn consumers_are_contexts_by_name() {
    let space = AddressSpace::tracked(Granule::K4);
    space.map(0..1 << 20, 0, Access::ReadWrite).unwrap();
    let backup = space.consumer("backup", Start::Clean).unwrap();
    let replica = space.consumer("replica", Start::Clean).unwrap();
    space.mark(0x5000..0x6000).unwrap();
    backup.rounds().next().unwrap().commit();
    space.mark(0x8000..0xa000).unwrap();
    let one = backup.rounds().next().unwrap();
    let two = replica.rounds().next().unwrap();

    let folder = tempfile::tempdir().unwrap();
    let log = DirFolder::new(folder.path().join("store")).unwrap();
    let device = Device {
        id: 1,
        len: 1 << 20,
    };
    let store = Store::create(log, &device, &Options::new()).unwrap();
    store.join("nightly").unwrap();
    let first = store.harvest("nightly", None).unwrap();
    let first = first.commit(|| Ok(())).unwrap();
    drop(store.begin_write(0x2_0000..0x2_1000).unwrap().wait());
    let three = store.harvest("nightly", Some(first)).unwrap();

    let export = Export::new("", 1 << 20).unwrap();
    let export = export.with_consumer(&backup, &one).unwrap();
    let export = export.with_consumer(&replica, &two).unwrap();
    let export = export.with_dirty(three.consumer(), three.runs().clone());
    let names = ["backup", "replica", "nightly"];
    let ((), _) = session(&[export.unwrap()], |stream| {
        let connect = names
            .iter()
            .fold(Connect::new(""), |it, name| it.dirty(name));
        let mut client = connect.over(stream).unwrap();
        let found = names.map(|name| client.read_dirty(name).unwrap());
        let expected = [
            table(&[(0x8000, 0x2000)]),
            table(&[(0x5000, 0x1000), (0x8000, 0x2000)]),
            table(&[(0x2_0000, 0x1000)]),
        ];
        assert_eq!(found, expected);
        assert!(client.read_dirty("other").is_err());
        client.disconnect().unwrap();
    });
    one.commit();
    two.commit();
    three.commit(|| Ok(())).unwrap();
}

#[test]
fn data_comes_with_and_without_structure() {
    let bytes: Vec<u8> = (0..3 << 20).map(|at| ((at * 7) >> 3) as u8).collect();
    let export = [Export::new("", 3 << 20).unwrap().with_data(&bytes)];
    let (_, ended) = session(&export, |stream| {
        let mut client = Connect::new("").over(stream).unwrap();
        let mut buf = vec![0; (2 << 20) + 3]; // more than one piece
        client.read_at(&mut buf, 4095).unwrap();
        assert!(buf == bytes[4095..][..buf.len()]);
        let past = client.read_at(&mut buf, 2 << 20).unwrap_err();
        assert!(matches!(past, NbdError::Refused { code: 22, .. }), "{past}");
        client.read_at(&mut buf[..1], (3 << 20) - 1).unwrap(); // the connection goes on
    });
    assert_eq!((ended.requests, ended.refused), (3, 1));

    // An old client: EXPORT_NAME, and simple replies.
    let (got, _) = session(&export, |mut stream| {
        let mut greeting = [0; 18];
        stream.read_exact(&mut greeting).unwrap();
        stream.write_all(&3u32.to_be_bytes()).unwrap();
        stream.write_all(b"IHAVEOPT\0\0\0\x01\0\0\0\0").unwrap();
        let mut chosen = [0; 10];
        stream.read_exact(&mut chosen).unwrap();
        assert_eq!(chosen[..8], (3u64 << 20).to_be_bytes());
        stream.write_all(&request(0, 0, 5, 7, 100)).unwrap();
        let mut reply = vec![0; 16 + 100];
        stream.read_exact(&mut reply).unwrap();
        reply
    });
    assert_eq!(got[..16], *b"\x67\x44\x66\x98\0\0\0\0\0\0\0\0\0\0\0\x05");
    assert_eq!(got[16..], bytes[7..107]);
}

/// A file that is shorter than its export is an error at the client, never zeroes.
#[test]
fn data_that_is_missing_is_an_error_at_the_client() {
    let bytes = vec![7u8; 100];
    let exports = [
        Export::new("short", 200).unwrap().with_data(&bytes),
        Export::new("none", 200).unwrap(),
    ];
    for name in ["short", "none"] {
        session(&exports, |stream| {
            let mut client = Connect::new(name).over(stream).unwrap();
            let error = client.read_at(&mut [0; 50], 75).unwrap_err();
            assert!(
                matches!(error, NbdError::Refused { code: 5, .. }),
                "{error}"
            );
        });
    }
}

#[test]
fn what_is_not_there_is_named() {
    let export = [Export::new("a", 100).unwrap()];
    let connect = |connect: Connect| session(&export, |stream| connect.over(stream).unwrap_err());
    let (error, _) = connect(Connect::new("a").dirty("x"));
    assert_eq!(
        error.to_string(),
        "the export has no metadata context \"qemu:dirty-bitmap:x\""
    );
    let (error, _) = connect(Connect::new("b"));
    assert!(
        error.to_string().contains("no export of this name"),
        "{error}"
    );
}

/// One extent, no longer than the request: what QEMU's client asks for.
#[test]
fn one_extent_ends_with_the_request() {
    let export = Export::new("", 1 << 20).unwrap();
    let export = [export.with_dirty("x", table(&[(100, 1000)])).unwrap()];
    session(&export, |mut stream| {
        to_transmission(&mut stream, &["qemu:dirty-bitmap:x"]);
        for (offset, len, flags, expected) in [
            (0, 1 << 20, 8, vec![(100u32, 0u32)]),
            (100, 50, 8, vec![(50, 1)]),
            (100, 50, 0, vec![(1000, 1)]), // goes on to the end of its own
            (50, 60, 0, vec![(50, 0), (1000, 1)]),
        ] {
            stream
                .write_all(&request(flags, 7, 1, offset, len))
                .unwrap();
            let mut header = [0; 20];
            stream.read_exact(&mut header).unwrap();
            assert_eq!(header[4..8], [0, 1, 0, 5], "done, block status");
            let mut body = vec![0; 4 + 8 * expected.len()];
            assert_eq!(header[16..], (body.len() as u32).to_be_bytes());
            stream.read_exact(&mut body).unwrap();
            let wanted: Vec<u8> = expected
                .iter()
                .flat_map(|(len, flags)| [len.to_be_bytes(), flags.to_be_bytes()].concat())
                .collect();
            assert_eq!(body[4..], wanted);
        }
    });
}

fn request(flags: u16, kind: u16, cookie: u64, offset: u64, len: u32) -> Vec<u8> {
    let mut bytes = 0x2560_9513u32.to_be_bytes().to_vec();
    bytes.extend(flags.to_be_bytes());
    bytes.extend(kind.to_be_bytes());
    bytes.extend(cookie.to_be_bytes());
    bytes.extend(offset.to_be_bytes());
    bytes.extend(len.to_be_bytes());
    bytes
}

fn option(number: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = b"IHAVEOPT".to_vec();
    bytes.extend(number.to_be_bytes());
    bytes.extend((data.len() as u32).to_be_bytes());
    bytes.extend(data);
    bytes
}

/// Structured replies, these contexts of the default export, and GO.
fn to_transmission(stream: &mut UnixStream, contexts: &[&str]) {
    stream.read_exact(&mut [0; 18]).unwrap();
    stream.write_all(&3u32.to_be_bytes()).unwrap();
    let mut asked = vec![0; 4];
    asked.extend((contexts.len() as u32).to_be_bytes());
    for name in contexts {
        asked.extend((name.len() as u32).to_be_bytes());
        asked.extend(name.bytes());
    }
    for (number, data) in [(8, &[][..]), (10, &asked), (7, &[0; 6])] {
        stream.write_all(&option(number, data)).unwrap();
        loop {
            let mut header = [0; 20];
            stream.read_exact(&mut header).unwrap();
            let len = u32::from_be_bytes(header[16..].try_into().unwrap());
            stream.read_exact(&mut vec![0; len as usize]).unwrap();
            match u32::from_be_bytes(header[12..16].try_into().unwrap()) {
                1 => break,
                3 | 4 => {}
                kind => panic!("reply {kind:#x} to option {number}"),
            }
        }
    }
}

/// A peer whose bytes are known in advance.
#[derive(Debug)]
struct Script {
    input: io::Cursor<Vec<u8>>,
    output: Vec<u8>,
}

impl Script {
    fn of(input: Vec<u8>) -> Self {
        let input = io::Cursor::new(input);
        let output = Vec::new();
        Script { input, output }
    }
}

impl Read for Script {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.input.read(buf)
    }
}

impl Write for Script {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.output.write(buf)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn served(parts: &[&[u8]]) -> Result<Session, NbdError> {
    let exports = [Export::new("disk", 1 << 20).unwrap()];
    let mut input = 3u32.to_be_bytes().to_vec();
    input.extend(parts.concat());
    serve(Script::of(input), &exports)
}

#[test]
fn a_client_that_breaks_the_protocol_is_refused_with_the_place() {
    let said = |parts: &[&[u8]]| served(parts).unwrap_err().to_string();
    assert_eq!(
        said(&[b"IHAVEOPS\0\0\0\x01"]),
        "the magic number of an option is 0x49484156454f5053, \
         but 0x49484156454f5054 is expected there"
    );
    // A length of 4 GiB allocates nothing, and ends the connection.
    assert_eq!(
        said(&[b"IHAVEOPT\0\0\0\x07\xff\xff\xff\xff"]),
        "the length of an option is 4294967295, but 33554432 is the limit"
    );
    let cut = said(&[b"IHAVEOPT\0\0\0\x07\0\0\0\x64", b"disk"]);
    assert!(cut.contains("at the data of an option"), "{cut}");
    let go = option(7, b"\0\0\0\x04disk\0\0");
    assert!(said(&[&go, &[0; 28]]).contains("the magic number of a request is 0x0"));
    let cut = said(&[&go, &request(0, 0, 1, 0, 1)[..9]]);
    assert!(cut.contains("at the header of a request"), "{cut}");
    assert_eq!(
        said(&[&go, &request(0, 1, 1, 0, u32::MAX)]),
        "the payload of a request is 4294967295, but 33554432 is the limit"
    );
    let endless = option(99, b"").repeat(2000);
    assert_eq!(
        said(&[&endless]),
        "the number of options is 1025, but 1024 is the limit"
    );
    assert!(said(&[&option(1, b"nobody")]).contains("no export has a name"));
    let flags = serve(Script::of(vec![0xff; 4]), &[]).unwrap_err();
    assert!(
        flags.to_string().contains("the flags of the client"),
        "{flags}"
    );
}

/// A client that looks at what there is chooses no export, and says goodbye or does not.
#[test]
fn a_client_that_only_looks_chooses_nothing() {
    for (options, goodbye) in [(option(2, b""), true), (option(3, b""), false)] {
        let ended = served(&[&options]).unwrap();
        assert_eq!((ended.export, ended.said_goodbye), (None, goodbye));
    }
}

/// What can be answered is answered with an error, and the connection goes on.
#[test]
fn a_request_that_cannot_be_served_is_an_error_and_not_the_end() {
    let go = option(7, b"\0\0\0\x04disk\0\0");
    let long = option(10, &[0; 70_000]);
    let odd = option(10, b"\0\0\0\x04disk\xff\xff\xff\xff"); // so many queries
    let write = [&request(0, 1, 1, 0, 3)[..], b"abc"].concat();
    let ended = served(&[
        &option(8, b""),
        &long,
        &odd,
        &option(7, b"\xff\xff\xff\xff"),
        &go,
        &write,
        &request(0, 0, 2, u64::MAX, 2),
        &request(0, 7, 3, 0, 0),
        &request(0xff, 7, 3, 0, 1),
        &request(0, 7, 4, 0, 512), // no context was selected
        &request(0, 99, 5, 0, 512),
        &request(0, 2, 6, 0, 0),
    ]);
    let ended = ended.unwrap();
    assert_eq!((ended.requests, ended.refused), (7, 6));
    assert!(ended.said_goodbye);
}

fn connected(parts: &[&[u8]]) -> Result<Client<Script>, NbdError> {
    let greeting = b"NBDMAGICIHAVEOPT\0\x03";
    let input = [greeting, parts.concat().as_slice()].concat();
    Connect::new("")
        .dirty("x")
        .max_runs(2)
        .over(Script::of(input))
}

fn reply(option: u32, kind: u32, body: &[u8]) -> Vec<u8> {
    let mut bytes = 0x0003_e889_0455_65a9u64.to_be_bytes().to_vec();
    bytes.extend(option.to_be_bytes());
    bytes.extend(kind.to_be_bytes());
    bytes.extend((body.len() as u32).to_be_bytes());
    bytes.extend(body);
    bytes
}

/// The handshake of a server with a disk of 1000 bytes.
fn handshake() -> Vec<u8> {
    handshake_of(1000)
}

fn handshake_of(size: u64) -> Vec<u8> {
    let export = [&[0u8, 0][..], &size.to_be_bytes(), &[1, 3]].concat();
    [
        reply(11, 1, b""),
        reply(10, 4, b"\0\0\0\x09qemu:dirty-bitmap:x"),
        reply(10, 1, b""),
        reply(7, 3, &export),
        reply(7, 1, b""),
    ]
    .concat()
}

fn extents(cookie: u64, said: u32, extents: &[(u64, u64)]) -> Vec<u8> {
    let mut bytes = b"\x6e\x8a\x27\x8c\0\x01\0\x06".to_vec();
    bytes.extend(cookie.to_be_bytes());
    bytes.extend(0u64.to_be_bytes());
    bytes.extend((8 + 16 * extents.len() as u64).to_be_bytes());
    bytes.extend(9u32.to_be_bytes());
    bytes.extend(said.to_be_bytes());
    for (len, flags) in extents {
        bytes.extend(len.to_be_bytes());
        bytes.extend(flags.to_be_bytes());
    }
    bytes
}

#[test]
fn a_server_that_breaks_the_protocol_is_refused_with_the_place() {
    let handshake = handshake();
    let read = |parts: &[&[u8]]| {
        let mut all = vec![&handshake[..]];
        all.extend(parts);
        connected(&all).unwrap().read_dirty("x")
    };
    let said = |parts: &[&[u8]]| read(parts).unwrap_err().to_string();
    let good = [
        extents(1, 2, &[(10, 0), (90, 1)]),
        extents(2, 2, &[(50, 1), (850, 0)]),
    ];
    assert_eq!(read(&[&good[0], &good[1]]).unwrap(), table(&[(10, 140)]));
    assert!(said(&[&extents(1, 1, &[(0, 1)])]).contains("the length of an extent is 0x0"));
    assert!(said(&[&extents(1, 1, &[(1001, 1)])]).contains("the length of an extent is 0x3e9"));
    assert!(said(&[&extents(1, 2, &[(u64::MAX, 1), (5, 1)])]).contains("past the end"));
    assert!(said(&[&extents(1, 5, &[(10, 1)])]).contains("the number of extents is 0x5"));
    assert!(said(&[&extents(1, 0, &[])]).contains("nothing about the context"));
    assert!(said(&[&extents(7, 1, &[(10, 1)])]).contains("the cookie of a reply is 0x7"));
    let many = extents(1, 6, &[(1, 1), (1, 0), (1, 1), (1, 0), (1, 1), (1, 0)]);
    assert_eq!(
        said(&[&many]),
        "the number of runs is 3, but 2 is the limit"
    );
    let mut huge = extents(1, 1, &[(10, 1)]);
    huge[24..32].copy_from_slice(&u64::MAX.to_be_bytes());
    assert!(said(&[&huge]).contains("the length of a chunk of extents is 18446744073709551615"));
    assert!(said(&[&good[0][..40]]).contains("the connection failed at"));

    let said = |parts: &[&[u8]]| connected(parts).unwrap_err().to_string();
    assert!(said(&[]).contains("the reply to an option"));
    assert!(said(&[&reply(8, 1, b"")]).contains("the option that a reply is for is 0x8"));
    let mut long = reply(11, 1, b"");
    long[16..].copy_from_slice(&[0xff; 4]);
    assert!(said(&[&long]).contains("the length of a reply to an option is 4294967295"));
    let none = [reply(11, 1, b""), reply(10, 1, b"")].concat();
    assert!(said(&[&none]).contains("no metadata context"));
    let endless = reply(11, 3, b"ab").repeat(5000);
    assert!(said(&[&endless]).contains("4096 is the limit"));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Any table comes back as it was, cut at the end of the disk, in both forms of the protocol.
    #[test]
    fn tables_survive_the_protocol(
        runs in vec((0u64..1 << 34, 1u64..1 << 33), 0..60),
        size in 1u64 << 34..1 << 36,
        compact: bool,
    ) {
        let table = table(&runs);
        let disk = IovaRange::from_len(Iova::MIN, size).unwrap();
        let cut: RunTable = table.runs().iter().filter_map(|run| run.intersection(disk)).collect();
        let export = [Export::new("", size).unwrap().with_dirty("x", table).unwrap()];
        let connect = Connect::new("").dirty("x");
        let connect = if compact { connect.compact() } else { connect };
        let (read, _) = session(&export, |stream| {
            connect.over(stream).unwrap().read_dirty("x").unwrap()
        });
        prop_assert_eq!(read, cut);
    }
}
