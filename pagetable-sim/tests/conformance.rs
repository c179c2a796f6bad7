//! The recorded kernel sequences, and files that must not be replayed.
#![cfg(not(dirtymap_loom))]
#![allow(clippy::unwrap_used)]

#[path = "conformance/by_hand.rs"]
mod by_hand;
#[path = "../examples/conformance/hwpt.rs"]
mod hwpt;
#[path = "../examples/conformance/image.rs"]
mod image;
#[path = "../examples/conformance/ioas.rs"]
mod ioas;
#[path = "../examples/conformance/parse.rs"]
mod parse;
#[path = "../examples/conformance/ranges.rs"]
mod ranges;
#[path = "../examples/conformance/replay.rs"]
mod replay;
#[path = "../examples/conformance/report.rs"]
mod report;

use std::fs::File;
use std::io::Read;

use flate2::read::MultiGzDecoder;
use parse::{ParseError, parse};
use replay::Replay;

const RECORDED: &str = concat!(
    env!("CARGO_MANIFEST_DIR"),
    "/../testdata/linux-7.3.4.jsonl.gz"
);

const META: &str = r#"{"t":"meta","format":1}"#;
const SEQ: &str = concat!(
    r#"{"t":"seq","seq":0,"name":"s","granule":2048,"iova_alignment":2048,"#,
    r#""iova_ranges":[[4096,1048575]],"hwpts":[{"alloc_dirty_tracking":true}]}"#
);
const END: &str = r#"{"t":"end"}"#;

fn recorded() -> String {
    let mut text = String::new();
    MultiGzDecoder::new(File::open(RECORDED).unwrap())
        .read_to_string(&mut text)
        .unwrap();
    text
}

fn replay(text: &str) -> Result<Replay, ParseError> {
    let mut replay = Replay::new().unwrap();
    parse(text.as_bytes(), |line, item| replay.play(line, &item))?;
    Ok(replay)
}

#[test]
fn the_kernels_answers_are_ours() {
    let mut replay = Replay::new().unwrap();
    parse(File::open(RECORDED).unwrap(), |line, item| {
        replay.play(line, &item)
    })
    .unwrap();
    let report = &replay.report;
    assert_eq!(report.failed(), 0, "{report}");
    assert_eq!((report.sequences, report.skipped), (36, 34));
    assert!(report.passed() > 2000);
}

/// One answer is changed in each replay, and the comparison has to notice. The replays run at once.
#[test]
fn other_answers_are_not() {
    let text = recorded();
    let lines: Vec<_> = text.lines().collect();
    let plain = |line: &&str| line.contains(r#""plain"]"#) && line.contains(r#""new":[[0,"#);
    let at = lines.iter().position(plain).unwrap();
    let (lines, line) = (&lines, lines[at]);
    std::thread::scope(|scope| {
        for (from, to) in [
            (r#""new":[[0,"#, r#""new":[[1,"#),
            (r#""errno":0"#, r#""errno":22"#),
            (r#""after":["#, r#""after":[[1073741824,2048],"#),
            (r#""flags":1"#, r#""flags":0"#),
        ] {
            if !line.contains(from) {
                continue;
            }
            scope.spawn(move || {
                let changed = line.replacen(from, to, 1).replace(",]", "]");
                let mut all = lines.clone();
                all[at] = &changed;
                let report = replay(&all.join("\n")).unwrap().report;
                assert!(report.failed() > 0, "{from} -> {to}");
            });
        }
    });
}

/// A read that cleans a leaf of which it reported only a part.
#[test]
fn a_hand_written_sequence_is_replayed() {
    let ops = [
        concat!(
            r#"{"t":"op","seq":0,"i":0,"op":"map","iova":65536,"length":65536,"#,
            r#""writeable":true,"errno":0,"layout":[{"hwpt":0,"ptes":[[65536,65536,1]]}]}"#
        ),
        r#"{"t":"op","seq":0,"i":1,"op":"track","hwpt":0,"flags":1,"errno":0,"after":[]}"#,
        concat!(
            r#"{"t":"op","seq":0,"i":2,"op":"dirty","hwpt":0,"granules":[[67584,1]],"#,
            r#""errno":0,"after":[[65536,65536]]}"#
        ),
        concat!(
            r#"{"t":"op","seq":0,"i":3,"op":"get","hwpt":0,"iova":65536,"length":65536,"#,
            r#""page_size":2048,"flags":0,"reserved":0,"#,
            r#""buf":{"off":0,"fill":0,"pages":[[0,1,"rw"]]},"#,
            r#""errno":0,"new":[[0,32]],"after":[],"tags":["plain"]}"#
        ),
    ];
    let text = [&[META, SEQ], &ops[..], &[END]].concat().join("\n");
    let report = replay(&text).unwrap().report;
    assert_eq!((report.passed(), report.failed()), (4, 0), "{report}");
    let wrong = text.replace("[[0,32]]", "[[0,31]]");
    assert_eq!(replay(&wrong).unwrap().report.failed(), 1);
}

#[test]
fn malformed_files_are_refused_with_their_line() {
    let op = |fields: &str| format!(r#"{{"t":"op","seq":0,"i":0,"errno":0,{fields}}}"#);
    let get = |buf: &str| {
        let request = r#""op":"get","hwpt":0,"iova":0,"length":1,"page_size":1"#;
        let answer = r#""new":[],"tags":[]"#;
        op(&format!(
            r#"{request},"flags":0,"reserved":0,{answer},"buf":{buf}"#
        ))
    };
    let map = |layout: &str| {
        let request = r#""op":"map","iova":4096,"length":4096,"writeable":true"#;
        op(&format!(r#"{request},"layout":[{layout}]"#))
    };
    let cases = [
        (vec![], "line 1: the file ends without"),
        (vec![META.into()], "line 2: the file ends without"),
        (
            vec![META.into(), SEQ.into()],
            "line 3: the file ends without",
        ),
        (vec![SEQ.into()], "line 1: `seq` where `meta`"),
        (
            vec![r#"{"t":"meta","format":2}"#.into()],
            "line 1: format is 2",
        ),
        (
            vec![META.into(), op(r#""op":"size""#)],
            "line 2: `op` where `seq`",
        ),
        (
            vec![META.into(), END.into(), END.into()],
            "line 3: `end` where the end",
        ),
        (vec![META.into(), "{".into()], "line 2: EOF"),
        (
            vec![META.into(), r#"{"t":"what"}"#.into()],
            "line 2: unknown variant",
        ),
        (
            vec![META.into(), SEQ.replace("2048", "4096")],
            "line 2: granule is 4096",
        ),
        (
            vec![META.into(), SEQ.replace("[[4096,", "[[9999999,")],
            "line 2: iova_ranges is",
        ),
        (
            vec![
                META.into(),
                SEQ.replace(r#"{"alloc_dirty_tracking":true}"#, ""),
            ],
            "line 2: the number of hwpts",
        ),
        (
            vec![
                META.into(),
                SEQ.into(),
                op(r#""op":"dirty","hwpt":0,"granules":[[2048,18446744073709551615]]"#),
            ],
            "line 3: granules is",
        ),
        (
            vec![
                META.into(),
                SEQ.into(),
                op(r#""op":"dirty","hwpt":0,"granules":[[1,1]]"#),
            ],
            "line 3: granules is",
        ),
        (
            vec![
                META.into(),
                SEQ.into(),
                op(r#""op":"unmap","iova":-1,"length":1"#),
            ],
            "line 3: invalid",
        ),
        (
            vec![
                META.into(),
                SEQ.into(),
                map(r#"{"hwpt":0,"ptes":[[4096,4096,2]]}"#),
            ],
            "line 3: the length of ptes is 8192",
        ),
        (
            vec![
                META.into(),
                SEQ.into(),
                map(r#"{"hwpt":0,"ptes":[[4096,3000,1]]}"#),
            ],
            "line 3: ptes is",
        ),
        (
            vec![META.into(), SEQ.into(), map(r#"{"hwpt":1}"#)],
            "line 3: hwpt of a layout is 1",
        ),
        (
            vec![
                META.into(),
                SEQ.into(),
                get(r#"{"off":0,"fill":0,"pages":[[0,99999999999,"rw"]]}"#),
            ],
            "line 3: pages is",
        ),
        (
            vec![
                META.into(),
                SEQ.into(),
                op(r#""op":"map","iova":4096,"length":8589936640,"writeable":true"#),
            ],
            "line 3: length is 8589936640",
        ),
        (
            vec![
                META.into(),
                SEQ.into(),
                get(&format!(
                    r#"{{"off":0,"fill":0,"pages":[{}[0,1,"rw"]]}}"#,
                    r#"[1,1,"ro"],"#.repeat(4096)
                )),
            ],
            "line 3: the number of pages is 4097",
        ),
        (
            vec![
                META.into(),
                SEQ.into(),
                get(r#"{"off":4096,"fill":0,"pages":[]}"#),
            ],
            "line 3: off is 4096",
        ),
    ];
    for (lines, expect) in cases {
        let error = replay(&lines.join("\n")).err().map(|e| e.to_string());
        let error = error.unwrap_or_default();
        assert!(error.starts_with(expect), "{error:?} is not {expect:?}");
    }
}

#[test]
fn a_truncated_file_is_refused() {
    let mut bytes = Vec::new();
    File::open(RECORDED)
        .unwrap()
        .read_to_end(&mut bytes)
        .unwrap();
    for len in [1, 2, 20, bytes.len() / 2, bytes.len() - 1] {
        let done = parse(&bytes[..len], |_, _| ());
        assert!(
            matches!(done, Err(ParseError::Io { .. } | ParseError::Json { .. })),
            "{len} bytes: {done:?}"
        );
    }
}
