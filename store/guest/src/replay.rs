//! Replays what the kernel recorded, up to each mark.
//!
//! The log of `dm-log-writes` (Documentation/admin-guide/device-mapper/log-writes.rst): a sector of
//! magic number, version, count of entries and bytes of a sector; then entries, each a sector with
//! first sector, count of sectors, flags and length of a mark's text, which follows in the same
//! sector; then the sectors that were written. Numbers are little endian.

use std::collections::BTreeSet;
use std::fs::File;
use std::os::unix::fs::FileExt;

use dirtymap::Iova;
use dirtymap_store::{DirFolder, Opened, Store};

use crate::{CONSUMERS, DEVICE, Known, Outcome, PAGE, PAGES, State, call, options};

const MAGIC: u64 = 0x006a_7366_7773_6872;
const DISCARD: u64 = 4;
const MARK: u64 = 8;
/// The mark that the kernel sets when the device is removed.
const END: &str = "dm-log-writes-end";
/// Pages of four extents that stay open, and of two with writes in flight.
const MOST_EXCESS: usize = 6 * 16;
/// Where images are mounted.
const FOLDER: &str = "/replayed";

struct Entry {
    sector: u64,
    sectors: u64,
    flags: u64,
    text: String,
}

struct Log {
    file: File,
    sector: u64,
    entries: u64,
    /// The next entry.
    at: u64,
}

fn number(bytes: &[u8], nth: usize) -> Outcome<u64> {
    let bytes = bytes.get(nth * 8..).ok_or("a short sector")?;
    Ok(u64::from_le_bytes(
        *bytes.first_chunk().ok_or("a short sector")?,
    ))
}

impl Log {
    fn open(path: &str) -> Outcome<Log> {
        let file = File::open(path)?;
        let mut head = [0; 32];
        file.read_exact_at(&mut head, 0)?;
        let (magic, version) = (number(&head, 0)?, number(&head, 1)?);
        let sector = number(&head, 3)? & u64::from(u32::MAX);
        if magic != MAGIC || version != 1 || !(512..=4096).contains(&sector) {
            return Err(format!("{path}: magic number {magic:#x}, version {version}").into());
        }
        let (entries, at) = (number(&head, 2)?, sector);
        Ok(Log {
            file,
            sector,
            entries,
            at,
        })
    }

    fn next(&mut self) -> Outcome<Option<Entry>> {
        let Some(left) = self.entries.checked_sub(1) else {
            return Ok(None);
        };
        self.entries = left;
        let mut head = vec![0; self.sector as usize];
        self.file.read_exact_at(&mut head, self.at)?;
        self.at += self.sector;
        let len = number(&head, 3)? as usize;
        let text = head.get(32..32 + len).ok_or("a mark is too long")?;
        let text = String::from_utf8_lossy(text)
            .trim_end_matches('\0')
            .to_owned();
        Ok(Some(Entry {
            sector: number(&head, 0)?,
            sectors: number(&head, 1)?,
            flags: number(&head, 2)?,
            text,
        }))
    }

    /// Performs a write on the image.
    fn apply(&mut self, entry: &Entry, image: &mut [u8]) -> Outcome {
        let first = (entry.sector * self.sector) as usize;
        let len = (entry.sectors * self.sector) as usize;
        let place = image.get_mut(first..first + len);
        let place = place.ok_or("a write lies past the end of the image")?;
        if entry.flags & DISCARD == 0 {
            self.file.read_exact_at(place, self.at)?;
            self.at += len as u64;
        }
        Ok(())
    }
}

/// Recovers at each mark, and compares with what was acknowledged there.
pub(crate) fn run(path: &str, mut image: Vec<u8>, states: &[State]) -> Outcome {
    let mut log = Log::open(path)?;
    let (mut marks, mut writes, mut excess, mut early) = (0, 0u64, 0, 0);
    while let Some(entry) = log.next()? {
        if entry.flags & MARK == 0 {
            log.apply(&entry, &mut image)?;
            writes += u64::from(entry.sectors > 0);
            continue;
        }
        if entry.text == END {
            break;
        }
        if entry.text != marks.to_string() {
            return Err(format!("mark {:?} comes at place {marks}", entry.text).into());
        }
        let found = recover(&image).map_err(|error| format!("at mark {marks}: {error}"))?;
        let found = found(&states[marks]).map_err(|error| format!("at mark {marks}: {error}"))?;
        // Without a commit, the first increment is everything.
        if states[marks][0].committed.is_some() {
            excess = excess.max(found.len() - states[marks][0].dirty.len());
        }
        // A write after the mark is not there, unless its extent is open already.
        if let Some(next) = states.get(marks + 1) {
            early += usize::from(!next[0].dirty.is_subset(&found));
        }
        marks += 1;
    }
    println!(
        "guest: {writes} writes replayed, {marks} marks recovered; at most {excess} pages more \
         than were written; {early} times the next write was not there yet"
    );
    if marks != states.len() || early == 0 {
        return Err(format!("{marks} of {} marks, {early} early", states.len()).into());
    }
    if excess > MOST_EXCESS {
        return Err(format!("{excess} pages too many, and {MOST_EXCESS} may be open").into());
    }
    Ok(())
}

/// Mounts the image, and compares what its store says.
fn recover(image: &[u8]) -> Outcome<impl FnOnce(&State) -> Outcome<BTreeSet<u64>>> {
    let disk = File::options().write(true).open("/dev/ram2")?;
    disk.write_all_at(image, 0)?;
    disk.sync_all()?;
    drop(disk);
    call("mount", &["-t", "ext4", "/dev/ram2", FOLDER])?;
    Ok(|state: &State| {
        let found = compare(state);
        call("umount", &[FOLDER])?;
        found
    })
}

/// The pages that the first consumer has to copy.
fn compare(state: &State) -> Outcome<BTreeSet<u64>> {
    let folder = DirFolder::new(format!("{FOLDER}/store"))?;
    let store = match Store::open(folder, &DEVICE, &options())? {
        Opened::Known(store) => store,
        Opened::Everything(lost) => return Err(format!("nothing is known: {}", lost.why()).into()),
    };
    let mut first = BTreeSet::new();
    for (name, known) in CONSUMERS.iter().zip(state) {
        let Known { committed, dirty } = known;
        let increment = store.harvest(name, *committed)?;
        if committed.is_some() && increment.everything().is_some() {
            return Err(format!("{name}: {committed:?} is no parent any more").into());
        }
        let runs = increment.runs().runs();
        let there = |page: &u64| {
            let at = Iova::new(page * PAGE);
            runs.iter().any(|run| run.contains(at))
        };
        if let Some(lost) = dirty.iter().find(|page| !there(page)) {
            return Err(format!("{name}: page {lost} is LOST").into());
        }
        if name == &CONSUMERS[0] {
            first = (0..PAGES).filter(there).collect();
        }
        increment.abort()?;
    }
    Ok(first)
}
