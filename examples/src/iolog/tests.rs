//! Each rule and each refusal, then the recorded trace.

use std::io::{self, Read, Write};
use std::path::Path;

use flate2::Compression;
use flate2::write::GzEncoder;

use super::*;

/// A version 3 log of these lines.
fn v3(lines: &str) -> String {
    format!("fio version 3 iolog\n{lines}")
}

fn read(text: &str) -> Result<Trace, IologError> {
    Trace::read(text.as_bytes())
}

/// The text of the error that `text` must give.
fn refused(text: &str) -> String {
    read(text).unwrap_err().to_string()
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::default());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

#[test]
fn version_3_times_count_from_the_first_operation() {
    let trace = read(&v3(
        "90 a add\n95 a open\n100 a write 0 10\n100 a sync 0 0\n130 b open\n\
         150 b read 4096 8192\n160 a trim 0 5\n170 a datasync 0 0\n190 a write 8190 100\n\
         200 c add\n300 a close\n",
    ))
    .unwrap();
    assert_eq!(trace.version, 3);
    let op = |at_us, file, kind, offset, length| Op {
        at_us,
        file,
        kind,
        offset,
        length,
    };
    assert_eq!(
        trace.ops,
        [
            op(0, 0, Kind::Write, 0, 10),
            op(50, 1, Kind::Read, 4096, 8192),
            op(90, 0, Kind::Write, 8190, 100),
        ]
    );
    let files: Vec<_> = trace
        .files
        .iter()
        .map(|f| (f.name.as_str(), f.bytes))
        .collect();
    assert_eq!(files, [("a", 8290), ("b", 12288)]);
    assert_eq!(
        (trace.writes, trace.bytes_written, trace.duration_us),
        (2, 110, 90)
    );
    assert_eq!(
        trace.skipped,
        Skipped {
            trims: 1,
            syncs: 2,
            unused_files: 1,
            clamped_times: 0
        }
    );
}

#[test]
fn version_2_takes_its_times_from_waits() {
    let trace = read(
        "fio version 2 iolog\na add\na open\na wait 500 0\na write 0 512\na wait 30 0\n\
         a wait 12 0\na write 512 1\na close",
    )
    .unwrap();
    assert_eq!(trace.version, 2);
    let times: Vec<_> = trace.ops.iter().map(|op| op.at_us).collect();
    assert_eq!(times, [0, 42]);
    assert_eq!(trace.files[0].bytes, 513);
    assert_eq!(
        refused(&format!(
            "fio version 2 iolog\na wait {} 0\na wait 1 0\n",
            u64::MAX
        )),
        "line 3: with this wait of 1 us the times exceed 18446744073709551615 us"
    );
}

#[test]
fn white_space_line_ends_and_repeated_adds_do_not_matter() {
    let plain = read(&v3("0 a add\n5 a write 0 1\n")).unwrap();
    for same in [
        "0 a add\n\n5 a write 0 1",
        "0\ta  add\r\n  5 a write 0 1 \r\n \n",
        "0 a add\n0 a open\n1 a close\n2 a add\n5 a write 0 1\n",
        "0 a open\n5 a write 0 1\n",
    ] {
        assert_eq!(read(&v3(same)).unwrap(), plain);
    }
}

#[test]
fn a_time_that_goes_back_is_raised_and_counted() {
    let trace = read(&v3(
        "10 a add\n20 a write 0 1\n15 a write 1 1\n19 a write 2 1\n25 a write 3 1\n",
    ))
    .unwrap();
    let times: Vec<_> = trace.ops.iter().map(|op| op.at_us).collect();
    assert_eq!(times, [0, 0, 0, 5]);
    assert_eq!(trace.skipped.clamped_times, 2);
}

#[test]
fn the_header_must_name_a_known_version() {
    assert_eq!(refused(""), "line 1: the file is empty");
    let not_iolog = "line 1: not a fio iolog: the first line must be \
                     \"fio version 2 iolog\" or \"fio version 3 iolog\"";
    assert_eq!(refused("\n"), not_iolog);
    assert_eq!(refused("0 a write 0 1\n"), not_iolog);
    assert_eq!(refused(&"x".repeat(1 << 20)), not_iolog);
    let error = Trace::read(&b"\x7fELF\xff\xfe\n"[..]).unwrap_err();
    assert_eq!(error.to_string(), not_iolog);
    assert_eq!(
        refused("fio version 4 iolog\n"),
        "line 1: fio iolog version \"4\" is unknown: 2 and 3 are known"
    );
    assert!(matches!(
        read("fio version 1 iolog\n"),
        Err(IologError::UnknownVersion { .. })
    ));
    assert_eq!(
        Trace::read(&gzip(b"")[..]).unwrap_err().to_string(),
        "line 1: the file is empty"
    );
}

#[test]
fn each_bad_line_is_named_with_its_number() {
    let cases = [
        ("5", "line 3: the file name is missing"),
        ("5 a", "line 3: the action is missing"),
        ("5 a write", "line 3: the offset is missing"),
        ("5 a write 0", "line 3: the length is missing"),
        ("5 a sync", "line 3: the offset is missing"),
        (
            "5 a write 0 1 2",
            "line 3: \"2\" follows the last field: names must not contain white space",
        ),
        (
            "5 a open 0 1",
            "line 3: \"0\" follows the last field: names must not contain white space",
        ),
        (
            "5 my file add",
            "line 3: the action \"file\" is unknown: it must be \
             add, open, close, read, write, trim, sync, datasync or (version 2) wait",
        ),
        (
            "x a write 0 1",
            "line 3: the time \"x\" is not a whole number from 0 to 18446744073709551615",
        ),
        (
            "5 a write -1 1",
            "line 3: the offset \"-1\" is not a whole number from 0 to 18446744073709551615",
        ),
        (
            "5 a write +1 1",
            "line 3: the offset \"+1\" is not a whole number from 0 to 18446744073709551615",
        ),
        (
            "5 a write 0 18446744073709551616",
            "line 3: the length \"18446744073709551616\" is not a whole number from 0 to \
             18446744073709551615",
        ),
        (
            "5 a write 7 0",
            "line 3: a length of 0 bytes: it must be 1 or more",
        ),
        (
            "5 a write 18446744073709551615 1",
            "line 3: offset 18446744073709551615 plus length 1 exceeds 18446744073709551615",
        ),
        (
            "5 a trim 18446744073709551615 1",
            "line 3: offset 18446744073709551615 plus length 1 exceeds 18446744073709551615",
        ),
        (
            "5 b write 0 1",
            "line 3: file \"b\" is written before it is added",
        ),
        (
            "5 b read 0 1",
            "line 3: file \"b\" is read before it is added",
        ),
        (
            "5 b trim 0 1",
            "line 3: file \"b\" is trimmed before it is added",
        ),
        (
            "5 b sync 0 0",
            "line 3: file \"b\" is synced before it is added",
        ),
        (
            "5 b close",
            "line 3: file \"b\" is closed before it is added",
        ),
        (
            "5 a wait 10 0",
            "line 3: \"wait\" is not allowed in version 3, where each line carries its time",
        ),
    ];
    for (line, text) in cases {
        assert_eq!(
            refused(&v3(&format!("0 a add\n{line}\n9 a write 0 1\n"))),
            text,
            "{line}"
        );
    }
    assert_eq!(
        refused(&v3("0 a add\n1 a read 0 8\n")),
        "line 3: the log ends here without a single write"
    );
}

#[test]
fn the_highest_offset_is_allowed() {
    let trace = read(&v3(
        "0 a add\n0 a write 18446744073709551614 1\n0 a write 0 18446744073709551615\n",
    ))
    .unwrap();
    assert_eq!(trace.files[0].bytes, u64::MAX);
    assert_eq!(trace.bytes_written, 1 << 64);
}

#[test]
fn lines_are_bounded() {
    let fits = "n".repeat(MAX_LINE - "0  add".len());
    let trace = read(&v3(&format!("0 {fits} add\n0 a add\n0 a write 0 1\n"))).unwrap();
    assert_eq!(trace.skipped.unused_files, 1);
    assert_eq!(
        refused(&v3(&format!("0 {fits}n add\n"))),
        "line 2: longer than 4096 bytes"
    );
    // An endless line ends the reading, not the memory.
    let endless = b"fio version 3 iolog\n".chain(io::repeat(b'x'));
    assert!(matches!(
        Trace::read(endless),
        Err(IologError::LineTooLong { line: 2 })
    ));
    // A long field is quoted in part.
    let text = refused(&v3(&format!("{} a add\n", "9".repeat(4000))));
    assert!(text.len() < 200, "{text}");
}

#[test]
fn text_must_be_utf8() {
    let error = Trace::read(&b"fio version 3 iolog\n0 a\xff add\n"[..]).unwrap_err();
    assert_eq!(error.to_string(), "line 2: not valid UTF-8");
}

#[test]
fn entries_and_files_are_bounded() {
    let limits = Limits { ops: 2, files: 2 };
    let within = |lines: &str| Trace::read_within(v3(lines).as_bytes(), limits);
    assert!(within("0 a add\n0 b add\n0 a open\n0 a write 0 1\n0 b write 0 1\n").is_ok());
    let error = within("0 a add\n0 a write 0 1\n0 a read 0 1\n0 a write 0 1\n").unwrap_err();
    assert_eq!(error.to_string(), "line 5: more than 2 reads and writes");
    let error = within("0 a add\n0 b add\n0 c open\n").unwrap_err();
    assert_eq!(error.to_string(), "line 4: more than 2 files");
}

#[test]
fn gzip_is_seen_by_its_first_bytes() {
    let text = v3("0 a add\n5 a write 0 1\n");
    let plain = read(&text).unwrap();
    assert_eq!(Trace::read(&gzip(text.as_bytes())[..]).unwrap(), plain);
    // Two members, cut in the middle of a line, are one text.
    let (left, right) = text.as_bytes().split_at(25);
    let members = [gzip(left), gzip(right)].concat();
    assert_eq!(Trace::read(&members[..]).unwrap(), plain);
}

#[test]
fn a_cut_or_damaged_gzip_file_is_an_error_at_every_length() {
    let writes: String = (0..500)
        .map(|i| format!("{i} a write {} 512\n", i * 7919 % 4096))
        .collect();
    let whole = gzip(v3(&format!("0 a add\n{writes}")).as_bytes());
    for length in 2..whole.len() {
        let error = Trace::read(&whole[..length]).unwrap_err();
        assert!(
            matches!(error, IologError::Truncated { line } if (1..=503).contains(&line)),
            "{length}: {error}"
        );
    }
    let late = Trace::read(&whole[..whole.len() - 1]).unwrap_err();
    assert_eq!(late.to_string(), "line 503: the gzip file is cut off here");

    let mut damaged = whole.clone();
    let checksum = damaged.len() - 8;
    damaged[checksum] ^= 1;
    let error = Trace::read(&damaged[..]).unwrap_err();
    assert!(matches!(error, IologError::Corrupt { .. }), "{error}");
}

#[test]
fn a_failing_reader_is_an_error_with_its_line() {
    struct Broken;
    impl Read for Broken {
        fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
            Err(io::Error::other("the disk is gone"))
        }
    }
    let error = Trace::read(b"fio version 3 iolog\n0 a add\n".chain(Broken)).unwrap_err();
    assert_eq!(
        error.to_string(),
        "line 3: cannot read on: the disk is gone"
    );
    let error = Trace::open(Path::new("there/is/no/such.log")).unwrap_err();
    assert!(matches!(error, IologError::Open { .. }));
}

#[test]
fn every_prefix_and_every_changed_byte_gives_an_answer() {
    let text = v3("0 a add\n1 a write 0 1\n2 a sync 0 0\n3 a read 5 6\n");
    for length in 0..text.len() {
        let _ = read(&text[..length]);
    }
    for at in 0..text.len() {
        for byte in [0, b' ', b'\n', b'9', b'-', 0xff] {
            let mut changed = text.clone().into_bytes();
            changed[at] = byte;
            let _ = Trace::read(&changed[..]);
        }
    }
}

#[test]
fn the_recorded_trace_has_the_facts_that_its_description_gives() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../testdata/pgbench.iolog.gz");
    let trace = Trace::open(&path).unwrap();
    assert_eq!(trace.version, 3);
    assert_eq!(trace.files.len(), 67);
    assert_eq!((trace.writes, trace.ops.len()), (98_787, 98_787));
    assert_eq!(trace.bytes_written, 1_283_301_825);
    assert_eq!(trace.skipped, Skipped::default());
    assert_eq!(
        trace.files.iter().map(|file| file.bytes).sum::<u64>(),
        814_637_137
    );
    assert_eq!((trace.ops[0].at_us, trace.ops[0].length), (0, 62));
    assert!((50_000_000..51_000_000).contains(&trace.duration_us));
    assert!(trace.ops.is_sorted_by_key(|op| op.at_us));
    for op in &trace.ops {
        assert!(op.offset + op.length <= trace.files[op.file as usize].bytes);
    }
}
