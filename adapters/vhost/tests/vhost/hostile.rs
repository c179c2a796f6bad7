//! Front ends that announce one log and send another. The back end has to survive.
//!
//! Each test runs itself as a child, and checks the child's status. A back end that is killed by
//! SIGBUS is a failure of the test, and does not end it.

use super::rig::{Ram, Rig, memfd, rig};
use super::{NONE, PAGE, bits};
use dirtymap::Iova;
use dirtymap_vhost::{VhostLog, accept_unsealed_logs};
use std::os::unix::fs::FileExt;
use std::process::Command;
use std::sync::Mutex;

const CHILD: &str = "DIRTYMAP_TEST_HOSTILE";
const SHRINK: i32 = libc::F_SEAL_SHRINK;
/// The start of memory whose bits are after the first page of the log.
const HIGH: u64 = 512 << 20;

/// Runs `body` in a process of its own, as the test `name`.
fn on_its_own(name: &str, body: impl FnOnce()) {
    if std::env::var_os(CHILD).is_some() {
        return body();
    }
    let mut child = Command::new(std::env::current_exe().unwrap());
    child.args(["--exact", name, "--nocapture"]).env(CHILD, "1");
    let status = child.status().unwrap();
    assert!(status.success(), "the child ended by {status}");
}

/// A back end with memory at `HIGH`, whose bits are at byte 16384 of the log and up.
fn high() -> Rig {
    rig(&[Ram::new(HIGH, 16 * PAGE)], true)
}

/// A mark has no log to go to. It is remembered, and ends no process.
fn has_no_log(rig: &Rig, what: &str) {
    let bitmap = rig.bitmap(HIGH);
    assert!(!bitmap.has_log(), "{what}");
    rig.write(HIGH + PAGE);
    assert_eq!(bitmap.early(), Some((PAGE, PAGE)), "{what}");
}

/// vhost#63, #206: the front end said 32 KiB and sent a file of 4 KiB. The back end mapped the
/// announced length, and its first mark past the end of the file killed it.
#[test]
fn a_log_that_is_shorter_than_the_front_end_says_is_refused() {
    let name = "hostile::a_log_that_is_shorter_than_the_front_end_says_is_refused";
    on_its_own(name, || {
        for (len, offset, size) in [
            (4096, 0, 32 << 10),
            (0, 0, 32 << 10),
            (16384, 0, 32 << 10),
            (32 << 10, 32 << 10, 32 << 10),
            (32 << 10, 16 << 10, 32 << 10), // ends where the bits begin
            (4096, 4096, u64::MAX - 4095),
        ] {
            let rig = high();
            let said = format!("{len} bytes, said to be {size} from {offset} on");
            let sent = rig.front_end.send_log(&memfd(len, SHRINK), offset, size);
            assert!(sent.is_err(), "{said}");
            has_no_log(&rig, &said);
        }
        // The file has the last byte that is needed. The announced length beyond it does not
        // matter.
        let rig = high();
        let file = memfd((16 << 10) + 1, SHRINK);
        rig.front_end.send_log(&file, 0, 1 << 20).unwrap();
        rig.write(HIGH + PAGE);
        let mut byte = [0];
        file.read_exact_at(&mut byte, 16 << 10).unwrap();
        assert_eq!(byte, [0b10]);
    });
}

/// All bits of the region lie in one byte of the log, and the file ends where that byte begins.
#[test]
fn a_region_whose_bits_are_one_byte_is_looked_at_too() {
    let name = "hostile::a_region_whose_bits_are_one_byte_is_looked_at_too";
    on_its_own(name, || {
        for len in [2 * PAGE, 8 * PAGE] {
            let rig = rig(&[Ram::new(HIGH, len)], true);
            let file = memfd(16 << 10, SHRINK);
            let said = format!("{len} bytes of memory");
            assert!(
                rig.front_end.send_log(&file, 0, 32 << 10).is_err(),
                "{said}"
            );
            has_no_log(&rig, &said);
        }
    });
}

/// The region has one byte of its last page, and the log has a bit for each page except for that
/// one. This bit would lie past the announced length, although inside a page of the file.
#[test]
fn a_log_that_lacks_the_bit_of_the_last_byte_is_refused() {
    let size = (16 << 10) + 8;
    let file = memfd(32 << 10, SHRINK);
    let fits = rig(&[Ram::new(HIGH, 64 * PAGE)], true);
    fits.front_end.send_log(&file, 0, size).unwrap();
    assert!(fits.bitmap(HIGH).has_log());
    let lacks = rig(&[Ram::new(HIGH, 64 * PAGE + 1)], true);
    assert!(lacks.front_end.send_log(&file, 0, size).is_err());
    has_no_log(&lacks, "one byte more");
}

/// Lengths and offsets that wrap, or that no mapping can have.
#[test]
fn places_that_cannot_be_are_refused() {
    for (offset, size) in [
        (0, 0),
        (0, u64::MAX),
        (1, 32 << 10),
        (u64::MAX, 32 << 10),
        (u64::MAX - 4095, 8192),
        (1 << 63, 1 << 63),
        ((1 << 63) - 4096, 8192),
        (0, 16 << 10), // a bit for the byte before the region, and no more
    ] {
        let rig = high();
        let sent = rig
            .front_end
            .send_log(&memfd(32 << 10, SHRINK), offset, size);
        assert!(sent.is_err(), "{size} from {offset} on");
        has_no_log(&rig, &format!("{size} from {offset} on"));
    }
}

/// A front end can shrink a file without the seal at any time, and the next mark then kills the
/// back end. Such a file is refused, unless the front end is trusted.
#[test]
fn a_log_that_can_be_made_shorter_is_refused_unless_that_is_accepted() {
    let name = "hostile::a_log_that_can_be_made_shorter_is_refused_unless_that_is_accepted";
    on_its_own(name, || {
        let sealed = memfd(32 << 10, SHRINK);
        let others = [
            memfd(32 << 10, 0),
            memfd(32 << 10, libc::F_SEAL_GROW),
            std::fs::File::options()
                .read(true)
                .write(true)
                .open("/dev/zero")
                .unwrap(),
        ];
        for (n, other) in others.iter().enumerate() {
            let rig = high();
            assert!(rig.front_end.send_log(other, 0, 32 << 10).is_err(), "{n}");
            has_no_log(&rig, &n.to_string());
        }
        let rig = high();
        rig.front_end.send_log(&sealed, 0, 32 << 10).unwrap();
        assert!(rig.bitmap(HIGH).has_log());

        accept_unsealed_logs();
        let rig = high();
        rig.front_end.send_log(&others[0], 0, 32 << 10).unwrap();
        rig.write(HIGH + 2 * PAGE);
        let mut byte = [0];
        others[0].read_exact_at(&mut byte, 16 << 10).unwrap();
        assert_eq!(byte, [0b100]);
        // A log that is too short is still refused.
        let rig = high();
        let short = rig.front_end.send_log(&memfd(4096, 0), 0, 32 << 10);
        assert!(short.is_err());
        has_no_log(&rig, "too short");
    });
}

/// The library reports a log that is too short by a panic. So any front end could end a back end
/// that was built to abort on panics.
#[test]
fn a_log_that_is_too_short_is_refused_without_a_panic() {
    static PANICS: Mutex<Vec<String>> = Mutex::new(Vec::new());
    let name = "hostile::a_log_that_is_too_short_is_refused_without_a_panic";
    on_its_own(name, || {
        std::panic::set_hook(Box::new(|panic| {
            PANICS.lock().unwrap().push(panic.to_string());
        }));
        let mut rig = high();
        let short = VhostLog::new(Iova::new(HIGH - 1)).unwrap();
        assert!(rig.front_end.set_log(&short.memory()).is_err());
        let log = VhostLog::new(Iova::new(HIGH + 16 * PAGE - 1)).unwrap();
        rig = high();
        rig.front_end.set_log(&log.memory()).unwrap();
        // Memory that is added later, beyond the log, is refused in the same way.
        assert!(rig.front_end.add(&Ram::new(4 << 30, 16 * PAGE)).is_err());
        let _ = std::panic::take_hook();
        assert_eq!(*PANICS.lock().unwrap(), [""; 0]);
        assert_eq!(bits(&short.memory()), NONE);
    });
}
