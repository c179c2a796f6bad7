//! Servers that send what adds up, and still is not what was asked for, or never ends.

use super::*;

/// A chunk of a reply with extended headers.
fn chunk(done: bool, kind: u16, cookie: u64, body: &[u8]) -> Vec<u8> {
    let mut bytes = 0x6e8a_278cu32.to_be_bytes().to_vec();
    bytes.extend(u16::from(done).to_be_bytes());
    bytes.extend(kind.to_be_bytes());
    bytes.extend(cookie.to_be_bytes());
    bytes.extend(0u64.to_be_bytes());
    bytes.extend((body.len() as u64).to_be_bytes());
    bytes.extend(body);
    bytes
}

fn data(done: bool, at: u64, bytes: &[u8]) -> Vec<u8> {
    chunk(done, 1, 1, &[&at.to_be_bytes(), bytes].concat())
}

fn hole(done: bool, at: u64, len: u32) -> Vec<u8> {
    chunk(
        done,
        2,
        1,
        &[&at.to_be_bytes()[..], &len.to_be_bytes()].concat(),
    )
}

/// Extents of the context `id`, with no mark that the reply ends.
fn of_context(id: u32) -> Vec<u8> {
    let numbers = [&id.to_be_bytes()[..], &1u32.to_be_bytes()].concat();
    let extent = [1000u64.to_be_bytes(), 0u64.to_be_bytes()].concat();
    chunk(false, 6, 1, &[numbers, extent].concat())
}

/// Two chunks for the first half of a read are as long as the read. The second half of the buffer
/// was never received, and the read returned Ok: a copy of the disk with the bytes of another read.
#[test]
fn data_that_comes_twice_is_not_the_whole_of_a_read() {
    let half = |done, at: u64| data(done, at, &[7; 512]);
    for second in [half(true, 0), half(true, 511), hole(true, 1, 512)] {
        let mut client = connected(&[&handshake(), &half(false, 0), &second]).unwrap();
        let error = client.read_at(&mut [0xaa; 1024], 0).unwrap_err();
        assert!(
            error.to_string().contains("it comes twice in one reply"),
            "{error}"
        );
    }
    // In any order, it is whole.
    let mut client = connected(&[&handshake(), &half(false, 512), &half(true, 0)]).unwrap();
    let mut buf = [0xaa; 1024];
    client.read_at(&mut buf, 0).unwrap();
    assert_eq!(buf, [7; 1024]);
    let mut client = connected(&[&handshake(), &half(true, 512)]).unwrap();
    let error = client.read_at(&mut [0; 1024], 0).unwrap_err();
    assert!(
        error.to_string().contains("the data of a read is 0x200"),
        "{error}"
    );
}

/// Every second byte, each in a chunk of its own: what is remembered of them has a bound.
#[test]
fn pieces_that_lie_apart_have_a_limit() {
    let mut script = handshake();
    for nth in 0..=65536 {
        script.extend(data(false, 2 * nth, &[7]));
    }
    let mut client = connected(&[&script]).unwrap();
    let error = client.read_at(&mut vec![0; 1 << 18], 0).unwrap_err();
    assert_eq!(
        error.to_string(),
        "the number of pieces of a read is 65537, but 65536 is the limit"
    );
}

/// A server says the same again and again. Such a client has no timeout that would end it, because
/// bytes keep coming.
#[test]
fn a_server_that_never_ends_a_reply_is_refused() {
    let none = "the flags of a reply";
    let empty = "the length of data";
    let known = "the number of a metadata context is 0x9: it comes twice";
    let unknown = "the number of a metadata context is 0x8: it was not selected";
    for (chunk, reads, says) in [
        (chunk(false, 0, 1, b""), true, none),
        (chunk(false, 0, 1, b""), false, none),
        (data(false, 3, b""), true, empty),
        (hole(false, 3, 0), true, empty),
        (of_context(9), false, known),
        (of_context(8), false, unknown),
    ] {
        let script = [handshake(), chunk.repeat(1000)].concat();
        let mut client = connected(&[&script]).unwrap();
        let error = match reads {
            true => client.read_at(&mut [0; 8], 0).unwrap_err(),
            false => client.read_dirty("x").unwrap_err(),
        };
        assert!(error.to_string().contains(says), "{error}");
    }
}

/// Another context that was selected comes once in a reply, too.
#[test]
fn another_context_comes_once_in_a_reply() {
    let select = [
        reply(11, 1, b""),
        reply(10, 4, b"\0\0\0\x09qemu:dirty-bitmap:x"),
        reply(10, 4, b"\0\0\0\x0aqemu:dirty-bitmap:y"),
        reply(10, 1, b""),
    ]
    .concat();
    let go = handshake()[handshake().len() - 20 - 32..].to_vec();
    let two = |chunks: &[Vec<u8>]| {
        let greeting = b"NBDMAGICIHAVEOPT\0\x03".to_vec();
        let script = [greeting, select.clone(), go.clone(), chunks.concat()].concat();
        let connect = Connect::new("").dirty("x").dirty("y");
        connect.over(Script::of(script)).unwrap().read_dirty("x")
    };
    let end = extents(1, 1, &[(1000, 1)]);
    assert_eq!(
        two(&[of_context(10), end.clone()]).unwrap(),
        table(&[(0, 1000)])
    );
    let error = two(&[of_context(10), of_context(10), end]).unwrap_err();
    let says = "the number of a metadata context is 0xa: it comes twice in one reply";
    assert!(error.to_string().contains(says), "{error}");
}

/// Two contexts under one number: the extents of one would count for the other.
#[test]
fn contexts_with_one_number_are_refused() {
    let twice = |id: u8, name: &[u8]| {
        let greeting = b"NBDMAGICIHAVEOPT\0\x03".to_vec();
        let other = [&[0, 0, 0, id], name].concat();
        let script = [
            greeting,
            reply(11, 1, b""),
            reply(10, 4, b"\0\0\0\x09qemu:dirty-bitmap:x"),
            reply(10, 4, &other),
            reply(10, 1, b""),
        ];
        let connect = Connect::new("").dirty("x").dirty("y");
        connect
            .over(Script::of(script.concat()))
            .unwrap_err()
            .to_string()
    };
    let says = "the number of a metadata context is 0x9: another context has it";
    assert!(twice(9, b"qemu:dirty-bitmap:y").contains(says));
    let says = "the number of a metadata context is 0xa: the context has another number";
    assert!(twice(10, b"qemu:dirty-bitmap:x").contains(says));
}

/// One byte in each reply: each of them is a step forward, and there are 2^62 of them.
#[test]
fn replies_of_one_byte_have_a_limit() {
    struct Slow {
        script: Script,
        cookie: u64,
    }
    impl Read for Slow {
        fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
            if self.script.input.position() == self.script.input.get_ref().len() as u64 {
                self.cookie += 1;
                assert!(self.cookie < 1 << 31, "no end");
                self.script.input = io::Cursor::new(extents(self.cookie, 1, &[(1, 1)]));
            }
            self.script.read(buf)
        }
    }
    impl Write for Slow {
        fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
            Ok(buf.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let script = [&b"NBDMAGICIHAVEOPT\0\x03"[..], &handshake_of(1 << 31)].concat();
    let slow = Slow {
        script: Script::of(script),
        cookie: 0,
    };
    let mut client = Connect::new("").dirty("x").max_runs(2).over(slow).unwrap();
    assert_eq!(
        client.read_dirty("x").unwrap_err().to_string(),
        "the number of extents is 65545, but 65544 is the limit"
    );
}

/// A read in one piece is a promise of structured replies, so a server without them does not make
/// it. Both ways to choose an export say so.
#[test]
fn a_read_in_one_piece_is_offered_with_structured_replies_alone() {
    let export = [Export::new("", 1000).unwrap()];
    let flags = |structured: bool, by_name: bool| {
        let (flags, _) = session(&export, |mut stream| {
            stream.read_exact(&mut [0; 18]).unwrap();
            stream.write_all(&3u32.to_be_bytes()).unwrap();
            if structured {
                stream.write_all(&option(8, b"")).unwrap();
                stream.read_exact(&mut [0; 20]).unwrap();
            }
            let mut said = vec![0; if by_name { 10 } else { 32 }];
            let (number, data) = if by_name {
                (1, &[][..])
            } else {
                (7, &[0; 6][..])
            };
            stream.write_all(&option(number, data)).unwrap();
            stream.read_exact(&mut said).unwrap();
            if !by_name {
                stream.read_exact(&mut [0; 20]).unwrap();
            }
            u16::from_be_bytes(said[said.len() - 2..].try_into().unwrap())
        });
        flags
    };
    for by_name in [false, true] {
        assert_eq!(flags(true, by_name), 0b1_1000_0011);
        assert_eq!(flags(false, by_name), 0b1_0000_0011);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    /// A read that returns Ok has received each byte, once, whatever chunks there were.
    #[test]
    fn a_read_that_ends_well_has_every_byte(
        cuts in vec(1u64..40, 0..6),
        order in vec(0usize..6, 0..4),
        again in proptest::option::weighted(0.5, (0u64..40, 0u64..20, any::<bool>())),
    ) {
        // The pieces of the read, some of them exchanged, and perhaps one more.
        let mut starts: Vec<u64> = cuts.into_iter().chain([0, 40]).collect();
        starts.sort_unstable();
        starts.dedup();
        let mut pieces: Vec<(u64, u64, bool)> = starts
            .windows(2)
            .map(|pair| (pair[0], pair[1] - pair[0], pair[0] % 3 == 0))
            .collect();
        for place in order {
            let len = pieces.len();
            pieces.swap(0, place % len);
        }
        if let Some((at, len, drop)) = again {
            if drop {
                pieces.pop();
            }
            pieces.push((at, len, false));
        }
        let mut script = handshake();
        let mut times = [0; 40];
        let mut outside = false;
        for (nth, &(at, len, empty)) in pieces.iter().enumerate() {
            let done = nth + 1 == pieces.len();
            script.extend(match empty {
                true => hole(done, 100 + at, len as u32),
                false => data(done, 100 + at, &vec![at as u8; len as usize]),
            });
            outside |= len == 0 || at + len > 40;
            for byte in at..(at + len).min(40) {
                times[byte as usize] += 1;
            }
        }
        let mut buf = [0xaa; 40];
        let read = connected(&[&script]).unwrap().read_at(&mut buf, 100);
        prop_assert_eq!(read.is_ok(), !outside && times == [1; 40], "{:?}", pieces);
        if read.is_ok() {
            for (at, len, empty) in pieces {
                let expected = if empty { 0 } else { at as u8 };
                let got = &buf[at as usize..(at + len) as usize];
                prop_assert!(got.iter().all(|&byte| byte == expected));
            }
        }
    }
}
