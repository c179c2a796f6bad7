//! The list of this process's mappings: which memory is private and anonymous.

use std::io;

/// One line of `/proc/self/maps`.
struct Line {
    start: u64,
    end: u64,
    /// Whether it is of this process alone, and of no file.
    private: bool,
}

impl Line {
    /// `start-end perms offset device inode name`
    fn parse(line: &[u8]) -> Option<Self> {
        let mut fields = line
            .split(|byte| *byte == b' ')
            .filter(|field| !field.is_empty());
        let text = |field| std::str::from_utf8(field).ok();
        let (start, end) = text(fields.next()?)?.split_once('-')?;
        let address = |hex| u64::from_str_radix(hex, 16).ok();
        let shared = fields.next()?.get(3) != Some(&b'p');
        let inode = fields.nth(2)?;
        let named = fields.next().is_some_and(|name| name.starts_with(b"/"));
        Some(Line {
            start: address(start)?,
            end: address(end)?,
            private: !shared && inode == b"0" && !named,
        })
    }
}

/// The first address from `start` up to `end` that is not private anonymous memory, by `maps`, the
/// contents of `/proc/self/maps`: ascending, one mapping a line.
///
/// # Errors
/// If a line cannot be read.
pub(super) fn not_private(maps: &[u8], start: u64, end: u64) -> io::Result<Option<u64>> {
    let mut at = start;
    for line in maps
        .split(|byte| *byte == b'\n')
        .filter(|line| !line.is_empty())
    {
        let line = Line::parse(line).ok_or(io::ErrorKind::InvalidData)?;
        if line.end <= at {
            continue;
        }
        if at >= end {
            break;
        }
        if line.start > at || !line.private {
            return Ok(Some(at));
        }
        at = line.end;
    }
    Ok((at < end).then_some(at))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAPS: &[u8] = b"\
10000-20000 rw-p 00000000 00:00 0                          [heap]
20000-30000 rw-p 00000000 00:00 0
40000-50000 rw-p 00000000 00:00 0                          [anon:a name with spaces]
50000-60000 rw-p 00003000 00:01 1024                       /memfd:x (deleted)
60000-70000 rw-s 00000000 00:01 7                          /dev/zero (deleted)
70000-80000 rw-p 00000000 00:11 9                          /anon_hugepage (deleted)
80000-90000 r--p 00000000 00:00 0 \n90000-a0000 rw-p 00000000 00:2e 0       /a \xff name
";

    #[test]
    fn memory_of_this_process_alone_is_told_from_other_memory() {
        let first = |start, end| not_private(MAPS, start, end).unwrap();
        assert_eq!(first(0x1_0000, 0x3_0000), None, "two mappings in a row");
        assert_eq!(first(0x1_8000, 0x2_1000), None);
        assert_eq!(first(0x4_0000, 0x5_0000), None);
        assert_eq!(first(0x8_0000, 0x9_0000), None);
        assert_eq!(first(0x1_0000, 0x3_0001), Some(0x3_0000), "nothing there");
        assert_eq!(first(0x3_8000, 0x4_1000), Some(0x3_8000), "nothing there");
        assert_eq!(
            first(0x4_0000, 0x5_1000),
            Some(0x5_0000),
            "private, of a file"
        );
        assert_eq!(
            first(0x6_1000, 0x6_2000),
            Some(0x6_1000),
            "shared, anonymous"
        );
        assert_eq!(first(0x7_0000, 0x7_1000), Some(0x7_0000), "of hugetlbfs");
        assert_eq!(
            first(0x9_0000, 0x9_1000),
            Some(0x9_0000),
            "a file without a number"
        );
        assert_eq!(first(0xa_0000, 0xa_1000), Some(0xa_0000), "past the last");
        assert_eq!(first(0x1_0000, 0x1_0000), None, "no address at all");
    }

    #[test]
    fn a_list_that_is_not_one_is_an_error() {
        for maps in [
            &b"nonsense"[..],
            b"1000-2000",
            b"1000-2000 rw-p 0 0:0",
            b"x-2000 rw-p 0 0:0 0",
        ] {
            not_private(maps, 0x1000, 0x2000).unwrap_err();
        }
    }
}
