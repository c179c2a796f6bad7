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
