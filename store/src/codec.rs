//! Numbers of any length, as bytes: seven bits a byte, the lowest first (LEB128), and a reader that
//! never takes more than is there.

/// Appends a number.
pub(crate) fn put(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

/// Appends a length and the bytes.
pub(crate) fn put_bytes(out: &mut Vec<u8>, bytes: &[u8]) {
    put(out, bytes.len() as u64);
    out.extend_from_slice(bytes);
}

/// Something that is no number, name or record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Bad(pub(crate) &'static str);

/// Reads what was put.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Reader<'b>(&'b [u8]);

impl<'b> Reader<'b> {
    pub(crate) fn new(bytes: &'b [u8]) -> Self {
        Reader(bytes)
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(crate) fn byte(&mut self) -> Result<u8, Bad> {
        let (first, rest) = self.0.split_first().ok_or(Bad("it ends early"))?;
        self.0 = rest;
        Ok(*first)
    }

    pub(crate) fn number(&mut self) -> Result<u64, Bad> {
        let mut value = 0;
        for shift in (0..64).step_by(7) {
            let byte = self.byte()?;
            let bits = u64::from(byte & 0x7f);
            if shift == 63 && bits > 1 {
                break;
            }
            value |= bits << shift;
            if byte & 0x80 == 0 {
                return Ok(value);
            }
        }
        Err(Bad("a number does not fit 64 bits"))
    }

    /// A number that is at most `limit`.
    pub(crate) fn at_most(&mut self, limit: u64, what: &'static str) -> Result<u64, Bad> {
        let value = self.number()?;
        if value > limit {
            return Err(Bad(what));
        }
        Ok(value)
    }

    pub(crate) fn bytes(&mut self, limit: usize, what: &'static str) -> Result<&'b [u8], Bad> {
        let len = self.at_most(limit as u64, what)? as usize;
        let (bytes, rest) = self.0.split_at_checked(len).ok_or(Bad("it ends early"))?;
        self.0 = rest;
        Ok(bytes)
    }

    pub(crate) fn flag(&mut self) -> Result<bool, Bad> {
        match self.byte()? {
            0 => Ok(false),
            1 => Ok(true),
            _ => Err(Bad("a flag is neither 0 nor 1")),
        }
    }
}

#[cfg(all(test, not(dirtymap_loom)))]
mod tests {
    use super::{Bad, Reader, put, put_bytes};

    #[test]
    fn numbers_survive_their_bytes() {
        let mut bytes = Vec::new();
        let numbers = [0, 1, 127, 128, 300, u64::from(u32::MAX), u64::MAX];
        numbers.iter().for_each(|number| put(&mut bytes, *number));
        put_bytes(&mut bytes, b"name");
        let mut reader = Reader::new(&bytes);
        for number in numbers {
            assert_eq!(reader.number(), Ok(number));
        }
        assert_eq!(reader.bytes(4, "long"), Ok(&b"name"[..]));
        assert!(reader.is_empty());
    }

    #[test]
    fn bytes_that_are_no_number_are_refused() {
        assert_eq!(Reader::new(&[]).number(), Err(Bad("it ends early")));
        assert_eq!(Reader::new(&[0x80]).number(), Err(Bad("it ends early")));
        let bad = Err(Bad("a number does not fit 64 bits"));
        assert_eq!(Reader::new(&[0xff; 11]).number(), bad);
        let mut two = [0xff; 10];
        two[9] = 2;
        assert_eq!(Reader::new(&two).number(), bad);
        let long = Reader::new(&[5, 1, 2]).bytes(4, "long");
        assert_eq!(long, Err(Bad("long")));
        assert_eq!(
            Reader::new(&[2, 1]).bytes(4, "long"),
            Err(Bad("it ends early"))
        );
        assert_eq!(
            Reader::new(&[2]).flag(),
            Err(Bad("a flag is neither 0 nor 1"))
        );
    }
}
