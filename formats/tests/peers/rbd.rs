//! `rbd merge-diff` and ours.

use std::fs;

use dirtymap_formats::rbd::{Reader, Writer, merge, write_increment};

use super::common_rbd::{apply, meta};
use super::*;

/// What Ceph merges of ours is what we merge: to the byte of the disk, and read by our reader.
#[test]
#[ignore = "the stage peers runs it"]
fn ceph_merges_our_increments_as_we_do() {
    if !tools(&["rbd"]) {
        return;
    }
    let folder = Folder::new("rbd");
    let size = 1 << 20;
    let mut disk = vec![0u8; size as usize];
    let mut streams = Vec::new();
    for (nth, runs) in [
        &[(0, 4096, 1), (65_536, 8192, 2), (500_000, 300_000, 3)][..],
        &[
            (4096, 4096, 4),
            (65_536, 4096, 0),
            (600_000, 5_000, 0),
            (700_000, 1, 5),
        ],
        &[(0, 8192, 0), (799_999, 100_000, 6)],
    ]
    .into_iter()
    .enumerate()
    {
        for &(offset, len, byte) in runs {
            disk[offset as usize..][..len as usize].fill(byte);
        }
        let runs: Vec<_> = runs.iter().map(|&(offset, len, _)| (offset, len)).collect();
        let from = nth.checked_sub(1).map(|nth| format!("s{nth}"));
        let meta = meta(from.as_deref(), &format!("s{nth}"), size);
        streams.push(write_increment(Vec::new(), &meta, &table(&runs), &disk).unwrap());
    }
    let theirs = |first: &[u8], second: &[u8]| {
        let paths = ["first", "second", "merged"].map(|name| folder.text(name));
        fs::write(&paths[0], first).unwrap();
        fs::write(&paths[1], second).unwrap();
        let _ = fs::remove_file(&paths[2]);
        run("rbd", ["merge-diff", &paths[0], &paths[1], &paths[2]]);
        fs::read(&paths[2]).unwrap()
    };
    let ours = |first: &[u8], second: &[u8]| merge(first, second, Vec::new()).unwrap();
    // Each merges what the other has merged.
    let merged = [
        theirs(&theirs(&streams[0], &streams[1]), &streams[2]),
        theirs(&ours(&streams[0], &streams[1]), &streams[2]),
        ours(&theirs(&streams[0], &streams[1]), &streams[2]),
        ours(&streams[0], &theirs(&streams[1], &streams[2])),
    ];
    for merged in &merged {
        let mut restored = Vec::new();
        apply(merged, &mut restored);
        assert!(restored == disk);
        let reader = Reader::new(&merged[..]).unwrap();
        assert_eq!(reader.meta(), &meta(None, "s2", size));
    }
    let runs = |stream: &[u8]| Reader::new(stream).unwrap().runs(1000).unwrap();
    assert_eq!(
        runs(&merged[0]),
        runs(&ours(&ours(&streams[0], &streams[1]), &streams[2]))
    );
}

/// The disk shrinks and grows again: no byte that went comes back, in either merge.
#[test]
#[ignore = "the stage peers runs it"]
fn ceph_takes_our_increments_of_a_disk_that_changes_its_size() {
    if !tools(&["rbd"]) {
        return;
    }
    let folder = Folder::new("rbd-size");
    let of = |from, to, size, at: u64| {
        let mut writer = Writer::new(Vec::new(), &meta(from, to, size)).unwrap();
        writer.data(at, &[7; 4096]).unwrap();
        writer.finish().unwrap()
    };
    let first = of(Some("a"), "b", 1 << 19, 0);
    let second = of(Some("b"), "c", 1 << 20, 1 << 18);
    let paths = ["first", "second", "merged"].map(|name| folder.text(name));
    fs::write(&paths[0], &first).unwrap();
    fs::write(&paths[1], &second).unwrap();
    run("rbd", ["merge-diff", &paths[0], &paths[1], &paths[2]]);
    let theirs = fs::read(&paths[2]).unwrap();
    let ours = merge(&first[..], &second[..], Vec::new()).unwrap();
    let mut disks = [vec![9; 1 << 20], vec![9; 1 << 20]];
    for (stream, disk) in [&theirs, &ours].into_iter().zip(&mut disks) {
        apply(stream, disk);
    }
    assert!(disks[0] == disks[1]);
    assert!(disks[1][1 << 19..].iter().all(|&byte| byte == 0));
}
