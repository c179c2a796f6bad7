//! Sequences that are written by hand, for cases that the recorded file does not contain. The
//! kernel's answers follow from the rules in `testdata/README.md`.

use std::sync::Arc;

use pagetable_sim::PhysMemory;

use super::ioas::Ioas;
use super::parse::{Item, parse};
use super::ranges::Ranges;
use super::report::Report;
use super::{END, META, SEQ, replay};

/// Two domains that can track, and one that cannot. The numbers of `ops` and the sequence are
/// filled in.
fn three_hwpts(ops: &[&str]) -> Report {
    let hwpts = [true, true, false].map(|on| format!(r#"{{"alloc_dirty_tracking":{on}}}"#));
    let mut text = vec![
        META.to_string(),
        SEQ.replace(r#"{"alloc_dirty_tracking":true}"#, &hwpts.join(",")),
    ];
    text.extend((0..).zip(ops).map(|(i, op): (u64, _)| {
        let errno = if op.contains("errno") {
            ""
        } else {
            r#""errno":0,"#
        };
        format!(r#"{{"t":"op","seq":0,"i":{i},{errno}{op}}}"#)
    }));
    text.push(END.to_string());
    replay(&text.join("\n")).unwrap().report
}

/// A read of `hwpt` into one page.
fn get(hwpt: i64, iova: u64, length: u64, rest: &str) -> String {
    let buf = if rest.contains(r#""buf""#) {
        ""
    } else {
        r#","buf":{"off":0,"fill":0,"pages":[[0,1,"rw"]]}"#
    };
    let size = if rest.contains(r#""page_size""#) {
        ""
    } else {
        r#","page_size":2048"#
    };
    let flags = if rest.contains(r#""flags""#) {
        ""
    } else {
        r#","flags":0"#
    };
    let new = if rest.contains(r#""new""#) {
        ""
    } else {
        r#","new":[]"#
    };
    let request = format!(r#""op":"get","hwpt":{hwpt},"iova":{iova},"length":{length}"#);
    format!(r#"{request},"reserved":0{buf}{size}{flags}{new},{rest}"#)
}

#[track_caller]
fn all_pass(ops: &[&str], exceptions: &[&str]) {
    let report = three_hwpts(ops);
    assert_eq!(
        (report.passed(), report.failed()),
        (ops.len() as u64, 0),
        "{report}"
    );
    let text = report.to_string();
    let stricter = text.split_once("stricter than").unwrap().1;
    assert_eq!(stricter.lines().count(), exceptions.len() + 3, "{text}");
    for name in exceptions {
        assert!(stricter.contains(name), "{name}: {text}");
    }
}

/// 64 KiB: one leaf in domain 0, two in domain 1, any leaves in domain 2.
const MAP: &str = concat!(
    r#""op":"map","iova":65536,"length":65536,"writeable":true,"layout":["#,
    r#"{"hwpt":0,"ptes":[[65536,65536,1]]},"#,
    r#"{"hwpt":1,"ptes":[[65536,32768,2]]},"#,
    r#"{"hwpt":2}]"#
);
const TRACK_0: &str = r#""op":"track","hwpt":0,"flags":1,"after":[]"#;
const TRACK_1: &str = r#""op":"track","hwpt":1,"flags":1,"after":[]"#;
const DIRTY_0: &str = r#""op":"dirty","hwpt":0,"granules":[[67584,1]],"after":[[65536,65536]]"#;
const DIRTY_1: &str = r#""op":"dirty","hwpt":1,"granules":[[67584,1]],"after":[[65536,32768]]"#;

#[test]
fn each_domain_has_a_state_of_its_own() {
    let refused = r#""tags":["error"],"after":null,"errno"#;
    let ops = [
        MAP,
        &get(1, 65536, 65536, r#""tags":["tracking-off"],"after":[]"#),
        r#""op":"track","hwpt":2,"flags":1,"errno":95,"after":null"#,
        r#""op":"track","hwpt":-1,"flags":1,"errno":2,"after":null"#,
        r#""op":"track","hwpt":3,"flags":0,"errno":2,"after":null"#,
        r#""op":"track","hwpt":-1,"flags":2,"errno":95,"after":null"#,
        TRACK_0,
        r#""op":"dirty","hwpt":1,"granules":[[67584,1]],"errno":22,"after":[]"#,
        // Domain 0 tracks; domain 1 still never did.
        &get(1, 65536, 65536, r#""tags":["tracking-off"],"after":[]"#),
        TRACK_1,
        DIRTY_0,
        DIRTY_1,
        &get(2, 65536, 65536, &format!(r#"{refused}":95"#)),
        &get(9, 65536, 65536, &format!(r#"{refused}":2"#)),
        &get(-1, 0, 0, &format!(r#"{refused}":2"#)),
        &get(-1, 0, 0, &format!(r#""flags":2,{refused}":95"#)),
        &get(
            1,
            65536,
            65536,
            r#""flags":1,"new":[[0,16]],"tags":["plain"],"after":[[65536,32768]]"#,
        ),
        &get(
            1,
            65536,
            65536,
            r#""new":[[0,16]],"tags":["plain"],"after":[]"#,
        ),
        &get(
            0,
            65536,
            65536,
            r#""new":[[0,32]],"tags":["plain"],"after":[]"#,
        ),
        DIRTY_1,
        r#""op":"track","hwpt":0,"flags":0,"after":[]"#,
        r#""op":"track","hwpt":1,"flags":1,"after":[]"#,
        DIRTY_1,
        r#""op":"track","hwpt":1,"flags":0,"after":[[65536,32768]]"#,
        r#""op":"unmap","iova":65536,"length":65536,"unmapped":65536,"after":[]"#,
        MAP,
        TRACK_0,
        &get(1, 65536, 65536, r#""tags":["plain"],"after":[]"#),
        &get(0, 65536, 65536, r#""tags":["plain"],"after":[]"#),
    ];
    all_pass(&ops, &["tracking was never enabled", "enabling twice"]);
}

#[test]
fn the_state_of_another_domain_is_no_answer() {
    for (hwpt, failed) in [(0, 0), (1, 1)] {
        let get = get(
            hwpt,
            65536,
            65536,
            r#""new":[[0,32]],"tags":["plain"],"after":[]"#,
        );
        let ops = [MAP, TRACK_0, TRACK_1, DIRTY_0, &get];
        assert_eq!(three_hwpts(&ops).failed(), failed);
    }
}

#[test]
fn several_areas_are_read_as_one_up_to_a_hole() {
    let map = |iova: u64| {
        let layout = format!(r#"[{{"hwpt":0,"ptes":[[{iova},4096,2]]}}]"#);
        let map = format!(r#""op":"map","iova":{iova},"length":8192"#);
        format!(r#"{map},"writeable":false,"layout":{layout}"#)
    };
    let dirty = concat!(
        r#""op":"dirty","hwpt":0,"#,
        r#""granules":[[65536,1],[77824,2],[81920,1],[90112,1],[131072,400]],"#,
        r#""after":[[65536,4096],[77824,4096],[90112,4096]]"#
    );
    let ops = [
        &map(65536),
        &map(73728),
        // A hole of 8 KiB.
        &map(90112),
        TRACK_0,
        dirty,
        &get(
            0,
            65536,
            16384,
            concat!(
                r#""flags":1,"new":[[0,2],[6,2]],"tags":["plain","multi-area"],"#,
                r#""after":[[65536,4096],[77824,4096],[90112,4096]]"#
            ),
        ),
        // The kernel cleans a leaf in part of the range only, and stops at the hole.
        &get(
            0,
            67584,
            26624,
            r#""new":[[5,2]],"tags":["gap"],"after":[[90112,4096]]"#,
        ),
        &get(
            0,
            81920,
            16384,
            r#""tags":["unmapped-start","gap"],"after":[[90112,4096]]"#,
        ),
        &get(
            0,
            90112,
            8192,
            r#""page_size":8192,"new":[[0,1]],"tags":["plain"],"after":[]"#,
        ),
        // Areas below the one that sticks out are gone with the kernel, and stay here.
        r#""op":"unmap","iova":65536,"length":26624,"unmapped":0,"errno":2,"after":[]"#,
        &map(65536),
        r#""op":"unmap","iova":0,"length":18446744073709551615,"unmapped":16384,"after":[]"#,
        r#""op":"unmap","iova":0,"length":18446744073709551615,"unmapped":0,"after":[]"#,
        r#""op":"unmap","iova":65536,"length":8192,"unmapped":0,"errno":2,"after":[]"#,
    ];
    all_pass(&ops, &["a hole", "an unmap that is refused"]);
}

/// Both ends of the range lie inside the same leaf.
#[test]
fn what_is_left_of_a_leaf_is_read_later() {
    let text = [META, SEQ, END].join("\n");
    let mut ioas = None;
    let memory = Arc::new(PhysMemory::new(16 << 30).unwrap());
    parse(text.as_bytes(), |_, item| {
        if let Item::Sequence(sequence) = item {
            ioas = Ioas::new(&sequence, &memory).ok();
        }
    })
    .unwrap();
    let ioas = ioas.unwrap();
    let hwpt = ioas.hwpt(0).unwrap();
    let map = format!("{{{}}}", MAP.replace(r#""op":"map","#, ""));
    ioas.map(&serde_json::from_str(&map).unwrap()).unwrap();
    ioas.track(hwpt, true).unwrap();
    ioas.write(hwpt, &[(65536, 1)]).unwrap();
    let read = |iova: u64, length: u64| {
        let get = get(0, iova, length, r#""tags":[]"#);
        let get = serde_json::from_str(&format!("{{{get}}}")).unwrap();
        let mut bitmap = [0];
        assert_eq!(ioas.read(hwpt, &get, true, &mut bitmap).unwrap(), None);
        bitmap[0]
    };
    assert_eq!(read(69632, 4096), 0b11);
    assert_eq!(ioas.dirty(hwpt).unwrap().iter().count(), 2);
    assert_eq!(read(67584, 8192), 0b1001);
    assert_eq!(read(65536, 16384), 0b1110_0001);
    assert_eq!(read(65536, 16384), 0);
    // The rest is discarded when the state is set.
    assert!(!ioas.dirty(hwpt).unwrap().is_empty());
    ioas.set(hwpt, &Ranges::default()).unwrap();
    assert!(ioas.dirty(hwpt).unwrap().is_empty());

    // The kernel cleans the leaf and reports nothing; the replay continues from that state.
    let cut = get_cut(r#"["straddle-start-lost","data-loss"]"#);
    let ops = [MAP, TRACK_0, DIRTY_0, &cut, DIRTY_0];
    all_pass(&ops, &[]);
    let plain = get_cut(r#"["plain"]"#);
    assert_eq!(
        three_hwpts(&[MAP, TRACK_0, DIRTY_0, &plain, DIRTY_0]).failed(),
        1
    );
}

fn get_cut(tags: &str) -> String {
    get(0, 69632, 4096, &format!(r#""tags":{tags},"after":[]"#))
}

#[test]
fn odd_requests_and_buffers() {
    let whole = |rest: &str| get(0, 65536, 65536, rest);
    let all = r#""after":[[65536,65536]]"#;
    let lost = r#""flags":1,"tags":["bad-buffer"]"#;
    let max = u64::MAX;
    let odd = |iova, length, page_size: u64, errno: i32| {
        let rest = format!(r#""page_size":{page_size},"errno":{errno},"tags":["error"],{all}"#);
        get(0, iova, length, &rest)
    };
    let ops = [
        MAP,
        TRACK_0,
        DIRTY_0,
        &whole(&format!(r#""buf":null,{lost},{all}"#)),
        &whole(&format!(
            r#""buf":{{"off":4095,"fill":7,"pages":[[-3,4,"rw"],[1,1,"ro"]]}},{lost},{all}"#
        )),
        &whole(&format!(
            r#""buf":{{"off":0,"fill":7,"pages":[[1,1,"rw"]]}},{lost},{all}"#
        )),
        &whole(&format!(
            r#""buf":{{"off":0,"fill":7,"pages":[[0,9,"none"]]}},{lost},{all}"#
        )),
        &whole(&format!(
            r#""buf":{{"off":9,"fill":7,"pages":[]}},{lost},{all}"#
        )),
        // Four bytes across the border of two pages, one bit of each preset.
        &whole(&format!(
            r#"{},"flags":1,"new":{},"tags":["plain","unaligned-data"],{all}"#,
            r#""buf":{"off":4094,"fill":16,"pages":[[-1,3,"rw"],[9007199254740991,9,"none"]]}"#,
            "[[0,4],[5,7],[13,7],[21,7],[29,3]]"
        )),
        &whole(&format!(
            r#""buf":{{"off":0,"fill":255,"pages":[[0,1,"rw"]]}},"flags":1,"tags":["plain"],{all}"#
        )),
        // A bit for each byte.
        &whole(&format!(
            r#""page_size":1,{},"flags":1,"new":[[0,65536]],"tags":["plain"],{all}"#,
            r#""buf":{"off":1,"fill":0,"pages":[[0,3,"rw"]]}"#
        )),
        &whole(&format!(
            r#""page_size":12288,"flags":1,"tags":["np2-page-size"],{all}"#
        )),
        &odd(0, 0, 2048, 22),
        &odd(max, 2, 2048, 75),
        &odd(4096, max, 2048, 75),
        &odd(0, max, 2048, 22),
        &odd(65537, 2047, 2048, 22),
        &odd(65536, 65536, 0, 22),
        &odd(65536, 65536, 1 << 63, 22),
        &odd(65536, 65536, 131_072, 22),
        &get(
            0,
            0,
            1 << 63,
            &format!(
                r#""page_size":{},"flags":1,"tags":["unmapped-start"],{all}"#,
                1u64 << 63
            ),
        ),
        &get(
            0,
            max - 2047,
            2048,
            &format!(r#""page_size":1,"flags":1,"tags":["unmapped-start"],{all}"#),
        ),
        r#""op":"map","iova":18446744073709551615,"length":2048,"writeable":true,"errno":75"#,
        r#""op":"map","iova":0,"length":18446744073709551615,"writeable":true,"errno":75"#,
        r#""op":"map","iova":18446744073709549568,"length":4096,"writeable":true,"errno":75"#,
        r#""op":"map","iova":18446744073709549569,"length":4096,"writeable":true,"errno":22"#,
        r#""op":"map","iova":18446744073709549568,"length":2048,"writeable":true,"errno":22"#,
        r#""op":"map","iova":8192,"length":0,"writeable":true,"errno":22"#,
        r#""op":"map","iova":8192,"length":4096,"va_off":1024,"writeable":true,"errno":22"#,
        r#""op":"map","iova":65536,"length":4096,"writeable":true,"errno":17"#,
        r#""op":"unmap","iova":0,"length":0,"errno":22"#,
        r#""op":"unmap","iova":18446744073709551615,"length":0,"errno":75"#,
        r#""op":"unmap","iova":4096,"length":18446744073709551614,"errno":75"#,
        concat!(
            r#""op":"dirty","hwpt":0,"#,
            r#""granules":[[0,9007199254740991],[18446744073709549568,1]],"#,
            r#""after":[[65536,65536]]"#
        ),
    ];
    all_pass(
        &ops,
        &["the bitmap is short", "a hole", "page_size is not a power"],
    );
}
