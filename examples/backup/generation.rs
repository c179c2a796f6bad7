//! An increment as a file: a line of JSON that says what it is, then the runs, then a checksum.
//!
//! It is written under another name, flushed, renamed, and the folder is flushed. A file that a
//! kill cut short never gets its name, so it is no increment.

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crc32fast::Hasher;
use dirtymap_store::Increment;
use serde::{Deserialize, Serialize};

use crate::writers::WRITERS;

/// The longest first line.
const MAX_LINE: u64 = 16 << 20;

/// What a generation is.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Head {
    /// 1 for the first one.
    pub(crate) number: u64,
    /// The name of the consumer.
    pub(crate) consumer: String,
    pub(crate) epoch: String,
    /// `None` if it is everything.
    pub(crate) parent: Option<String>,
    /// Why it is everything.
    pub(crate) why: Option<String>,
    /// How many writes each thread had done.
    pub(crate) writes: [u64; WRITERS],
    /// Extents that were open when the worker before was killed.
    pub(crate) recovered_extents: u64,
    /// Milliseconds since the first worker began.
    pub(crate) at_ms: u64,
    /// First byte and length of each run.
    pub(crate) runs: Vec<(u64, u64)>,
}

impl Head {
    pub(crate) fn bytes(&self) -> u64 {
        self.runs.iter().map(|run| run.1).sum()
    }
}

/// Where a generation is, in a form: "inc" or "rbd".
pub(crate) fn path(folder: &Path, consumer: &str, number: u64, form: &str) -> PathBuf {
    folder.join(format!("{consumer}-{number:04}.{form}"))
}

/// What has to be copied.
pub(crate) fn runs(increment: &Increment<'_>) -> Vec<(u64, u64)> {
    let runs = increment.runs().runs().iter();
    runs.map(|run| (run.start().get(), run.len() as u64))
        .collect()
}

/// Copies a generation from the image.
pub(crate) fn write(folder: &Path, head: &Head, image: &File) -> io::Result<PathBuf> {
    let draft = folder.join(format!("{}.tmp", head.consumer));
    let mut file = io::BufWriter::with_capacity(1 << 20, File::create(&draft)?);
    let mut hasher = Hasher::new();
    let mut line = serde_json::to_vec(head)?;
    line.push(b'\n');
    let mut put = |bytes: &[u8]| {
        hasher.update(bytes);
        file.write_all(bytes)
    };
    put(&line)?;
    let mut piece = vec![0; 1 << 20];
    for (first, len) in &head.runs {
        let mut at = *first;
        while at < first + len {
            let part = piece.len().min((first + len - at) as usize);
            image.read_exact_at(&mut piece[..part], at)?;
            put(&piece[..part])?;
            at += part as u64;
        }
    }
    file.write_all(&hasher.finalize().to_le_bytes())?;
    file.into_inner()?.sync_all()?;
    Ok(draft)
}

/// The draft of a generation gets its name, durably.
pub(crate) fn publish(folder: &Path, head: &Head, draft: &Path, form: &str) -> io::Result<()> {
    fs::rename(draft, path(folder, &head.consumer, head.number, form))?;
    File::open(folder)?.sync_all()
}

/// All generations of a consumer, in order.
pub(crate) fn all(folder: &Path, consumer: &str) -> io::Result<Vec<(Head, PathBuf)>> {
    let mut found = Vec::new();
    for number in 1.. {
        let path = path(folder, consumer, number, "inc");
        if !path.exists() {
            break;
        }
        found.push((head(&mut BufReader::new(File::open(&path)?))?, path));
    }
    Ok(found)
}

fn head(file: &mut impl BufRead) -> io::Result<Head> {
    let mut line = Vec::new();
    file.take(MAX_LINE).read_until(b'\n', &mut line)?;
    Ok(serde_json::from_slice(&line)?)
}

/// Puts a generation over the one before it.
pub(crate) fn restore(path: &Path, onto: &mut [u8]) -> io::Result<()> {
    let damaged = |what: &str| io::Error::other(format!("{}: {what}", path.display()));
    let mut file = File::open(path)?;
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes)?;
    let Some((contents, crc)) = bytes.split_last_chunk::<4>() else {
        return Err(damaged("it is too short"));
    };
    if crc32fast::hash(contents) != u32::from_le_bytes(*crc) {
        return Err(damaged("its checksum does not match"));
    }
    file.seek(SeekFrom::Start(0))?;
    let head = head(&mut BufReader::new(file))?;
    let mut rest = contents
        .splitn(2, |byte| *byte == b'\n')
        .nth(1)
        .unwrap_or(&[]);
    for (first, len) in head.runs {
        let end = first
            .checked_add(len)
            .ok_or_else(|| damaged("a run wraps"))?;
        let place = onto.get_mut(first as usize..end as usize);
        let (Some(place), Some((run, more))) = (place, rest.split_at_checked(len as usize)) else {
            return Err(damaged("a run is too long"));
        };
        place.copy_from_slice(run);
        rest = more;
    }
    Ok(())
}
