//! Servers that send what adds up, and still is not what was asked for, or never ends.

use super::*;

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
