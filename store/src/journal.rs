//! The log, in the hands of the leader: appends batches, replaces the log when it is full, and
//! reads what a crash left.
//!
//! ```text
//!  batch: records --> image, bytes --> room? -- yes --> write, flush
//!                                        |
//!                                        no --> new log with the image: write, flush,
//!                                               rename, flush the folder
//! ```

use std::collections::VecDeque;
use std::io;

use crate::claims::claimed;
use crate::codec::Bad;
use crate::disk::{Disk, Folder, read_exact};
use crate::error::{Error, Why};
use crate::format::{BLOCK, Batch, Header, batch, batch_claims, blocks};
use crate::geometry::Device;
use crate::image::Image;
use crate::record::Record;
use crate::step::{Step, performs};
use crate::words::{Close, Words};

const LOG: &str = "log";
const NEW_LOG: &str = "log.new";

/// How much the log did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Counts {
    pub(crate) batches: u64,
    pub(crate) flushes: u64,
    pub(crate) switches: u64,
    pub(crate) opened: u64,
    pub(crate) closed: u64,
}

pub(crate) struct Journal {
    folder: Box<dyn Folder>,
    disk: Box<dyn Disk>,
    pub(crate) header: Header,
    /// What is appended, durable or not. After a failure it is not used any more.
    pub(crate) image: Image,
    /// Open extents in the order of the clock.
    clock: VecDeque<u64>,
    /// Bytes of batches.
    used: u64,
    sequence: u64,
    /// The most extents that stay open without writes in flight.
    hot: usize,
    batch: Batch,
    pub(crate) counts: Counts,
}

/// The header that a new log gets, but for what depends on its contents.
pub(crate) type Draft = Header;

impl Journal {
    /// Makes the log of `draft` with `image`, in place of the one that is there.
    pub(crate) fn begin(
        mut folder: Box<dyn Folder>,
        draft: Draft,
        image: Image,
        hot: usize,
    ) -> Result<Journal, Error> {
        let mut counts = Counts::default();
        let (disk, header) = write_log(&mut *folder, draft, &image, &mut counts)?;
        Ok(Journal {
            folder,
            disk,
            header,
            clock: image.open.iter().copied().collect(),
            image,
            used: 0,
            sequence: header.sequence,
            hot,
            batch: Batch::new(),
            counts,
        })
    }

    /// Adds a record to the batch. The image has it at once.
    pub(crate) fn add(&mut self, words: &Words, record: Record) -> Result<(), Bad> {
        if let Record::Harvest { .. } = record {
            // What became dirty before the harvest belongs to it.
            self.collect(words)?;
        }
        self.image.apply(&mut self.header.geometry, &record)?;
        match record {
            Record::Open { first, count } => {
                self.clock.extend(first..first + count);
                self.counts.opened += count;
            }
            Record::Close { .. } => self.counts.closed += 1,
            _ => {}
        }
        self.batch.push(&record);
        Ok(())
    }

    /// Takes the dirty pages out of all open extents. A page that a handle writes at this moment is
    /// taken, and stays: only a later harvest may find all of the write.
    fn collect(&mut self, words: &Words) -> Result<(), Bad> {
        let open = self.clock.iter();
        let taken = open.map(|extent| (*extent, words.take(*extent)));
        let taken: Vec<(u64, u32)> = taken.filter(|(_, mask)| *mask != 0).collect();
        if taken.is_empty() {
            return Ok(());
        }
        let claims = words.claims.look();
        for (extent, mask) in taken {
            let again = mask & claimed(&claims, extent);
            if again != 0 && performs(Step::PutBackClaimed) {
                words.put_back(extent, again);
            }
            self.add(words, Record::Dirty { extent, mask })?;
        }
        Ok(())
    }

    /// Closes extents until at most `hot` are open: those first that were not written since the
    /// clock passed them last (second chance, an approximation of least recently used). Extents
    /// with writes in flight stay open.
    fn close(&mut self, words: &Words, hot: usize) -> Result<(), Bad> {
        let mut turns = 2 * self.clock.len();
        loop {
            let mut closing = Vec::new();
            while self.clock.len() > hot && turns > 0 {
                turns -= 1;
                let Some(extent) = self.clock.pop_front() else {
                    break;
                };
                match words.begin_close(extent, hot > 0) {
                    true => closing.push(extent),
                    false => self.clock.push_back(extent),
                }
            }
            // Those that turn out to be in use make room for others.
            if closing.is_empty() {
                return Ok(());
            }
            self.close_each(words, &closing)?;
        }
    }

    /// Closes the extents that are about to be closed, and in which no write is in flight.
    fn close_each(&mut self, words: &Words, closing: &[u64]) -> Result<(), Bad> {
        let claims = words.claims.look();
        for &extent in closing {
            let claimed = claimed(&claims, extent) != 0 && performs(Step::HoldClaimed);
            match words.close(extent, claimed) {
                Close::InUse => self.clock.push_back(extent),
                Close::Closed(mask) => {
                    let mask = if performs(Step::RecordAtClose) {
                        mask
                    } else {
                        0
                    };
                    self.add(words, Record::Close { extent, mask })?;
                }
            }
        }
        Ok(())
    }

    /// Closes each extent that has no write in flight.
    pub(crate) fn close_all(&mut self, words: &Words) -> Result<(), Bad> {
        self.close(words, 0)
    }

    /// Ends the batch: on return it is durable.
    pub(crate) fn finish(&mut self, words: &Words) -> Result<(), Error> {
        self.close(words, self.hot).map_err(impossible)?;
        if self.batch.is_empty() {
            return Ok(());
        }
        self.counts.batches += 1;
        let batch = std::mem::replace(&mut self.batch, Batch::new());
        if batch.len() > self.header.log - self.used {
            return self.switch();
        }
        let bytes = batch.seal(self.header.generation, self.sequence);
        let at = self.header.batches() + self.used;
        self.disk
            .write_at(at, &bytes)
            .map_err(Error::io("the log cannot be written"))?;
        if performs(Step::FlushBatch) {
            self.counts.flushes += 1;
            self.disk
                .flush()
                .map_err(Error::io("the log cannot be flushed"))?;
        }
        self.used += bytes.len() as u64;
        self.sequence += 1;
        Ok(())
    }

    /// Begins a new log, with all that the image has.
    pub(crate) fn switch(&mut self) -> Result<(), Error> {
        let draft = Header {
            generation: self.header.generation + 1,
            sequence: self.sequence + 1,
            ..self.header
        };
        let folder = &mut *self.folder;
        (self.disk, self.header) = write_log(folder, draft, &self.image, &mut self.counts)?;
        self.sequence = self.header.sequence;
        self.used = 0;
        Ok(())
    }

    /// Bytes of the log, with those that are not used yet.
    pub(crate) fn len(&self) -> u64 {
        self.header.len()
    }
}

/// A record that the store itself made, and that is not possible.
pub(crate) fn impossible(bad: Bad) -> Error {
    let error = io::Error::other(bad.0);
    Error::io("a batch of the store's own is refused")(error)
}

/// Writes a new log beside the one that is there, and puts it in its place. The room for batches is
/// written, too, so that later batches change no length, and no block of the file system.
fn write_log(
    folder: &mut dyn Folder,
    draft: Draft,
    image: &Image,
    counts: &mut Counts,
) -> Result<(Box<dyn Disk>, Header), Error> {
    let mut checkpoint = Vec::new();
    image.put(&mut checkpoint);
    let header = Header {
        checkpoint: checkpoint.len() as u64,
        checkpoint_crc: crc32fast::hash(&checkpoint),
        ..draft
    };
    checkpoint.resize(blocks(header.checkpoint) as usize, 0);
    let written = |folder: &mut dyn Folder| {
        let mut disk = folder.create(NEW_LOG)?;
        disk.write_at(0, &header.put())?;
        disk.write_at(BLOCK as u64, &checkpoint)?;
        let zeros = vec![0; (1 << 20).min(header.log as usize)];
        let mut at = header.batches();
        while at < header.len() {
            let len = zeros.len().min((header.len() - at) as usize);
            disk.write_at(at, &zeros[..len])?;
            at += len as u64;
        }
        disk.flush()?;
        folder.rename(NEW_LOG, LOG)?;
        if performs(Step::FlushFolder) {
            folder.sync()?;
        }
        Ok(disk)
    };
    let disk = written(folder).map_err(Error::io("a new log cannot be written"))?;
    counts.flushes += 2;
    counts.switches += 1;
    Ok((disk, header))
}

/// What a log says, and its header.
pub(crate) struct Replayed {
    pub(crate) header: Header,
    pub(crate) image: Image,
    /// The number after that of the last batch.
    pub(crate) sequence: u64,
    /// How many extents were open.
    pub(crate) open: usize,
    pub(crate) batches: u64,
}

/// Reads the log of `device` in `folder`: what it says, or why it cannot be trusted.
pub(crate) fn replay(
    folder: &mut dyn Folder,
    device: &Device,
) -> Result<Result<Replayed, Why>, Error> {
    let opened = folder
        .open(LOG)
        .map_err(Error::io("the log cannot be opened"))?;
    let Some(disk) = opened else {
        return Ok(Err(Why::Missing));
    };
    let read = read_log(&*disk, device);
    read.map_err(Error::io("the log cannot be read"))
}

fn read_log(disk: &dyn Disk, device: &Device) -> io::Result<Result<Replayed, Why>> {
    let len = disk.len()?;
    let mut block = vec![0; BLOCK.min(len as usize)];
    if !read_exact(disk, 0, &mut block)? {
        return Ok(Err(Why::Truncated {
            len,
            needed: BLOCK as u64,
        }));
    }
    let header = match Header::read(&block, len, device) {
        Ok(header) => header,
        Err(why) => return Ok(Err(why)),
    };
    // Not longer than the file.
    let mut checkpoint = zeros(header.checkpoint)?;
    let mut batches = zeros(header.log)?;
    let both = read_exact(disk, BLOCK as u64, &mut checkpoint)?
        && read_exact(disk, header.batches(), &mut batches)?;
    if !both {
        return Ok(Err(Why::Truncated {
            len,
            needed: header.len(),
        }));
    }
    Ok(parse(header, &checkpoint, &batches, device))
}

/// So many bytes, if there is memory for them.
fn zeros(len: u64) -> io::Result<Vec<u8>> {
    let len = usize::try_from(len).unwrap_or(usize::MAX);
    let mut bytes = Vec::new();
    let reserved = bytes.try_reserve_exact(len);
    reserved.map_err(|_| io::Error::from(io::ErrorKind::OutOfMemory))?;
    bytes.resize(len, 0);
    Ok(bytes)
}

/// The image of the checkpoint, with the batches after it. The first batch that is not whole ends
/// the log: it was being written when the system died, so nothing in it was acknowledged. If a
/// later one is whole, it was not: batches are flushed one after the other.
fn parse(
    header: Header,
    checkpoint: &[u8],
    batches: &[u8],
    device: &Device,
) -> Result<Replayed, Why> {
    let resized = |recorded| Why::Resized {
        recorded,
        found: device.len,
    };
    // Before anything is read that is as large as the device: no store lets it shrink.
    if header.geometry.len > device.len {
        return Err(resized(header.geometry.len));
    }
    let part = "checkpoint";
    if crc32fast::hash(checkpoint) != header.checkpoint_crc {
        return Err(Why::Checksum { part });
    }
    let damaged = |part| move |Bad(what)| Why::Damaged { part, what };
    let mut geometry = header.geometry;
    let mut image = Image::read(checkpoint, &geometry).map_err(damaged(part))?;
    let (mut at, mut sequence) = (0, header.sequence);
    let found = |at: usize| {
        let found = batch(batches.get(at..).unwrap_or(&[]), header.generation);
        found.map_err(damaged("log"))
    };
    while let Some(whole) = found(at)?
        && whole.sequence == sequence
    {
        for record in &whole.records {
            if let Record::Grow { len } = record
                && *len > device.len
            {
                return Err(resized(*len));
            }
            match image.apply(&mut geometry, record) {
                Err(_) if !performs(Step::RefuseTorn) => break,
                applied => applied.map_err(damaged("log"))?,
            }
        }
        at += whole.len as usize;
        sequence += 1;
    }
    if let Some(later) = later_batch(&header, batches, at, sequence)? {
        return Err(Why::LostBatch {
            lost: sequence,
            later,
        });
    }
    if geometry.len != device.len {
        return Err(resized(geometry.len));
    }
    Ok(Replayed {
        batches: sequence - header.sequence,
        open: image.open.len(),
        header: Header { geometry, ..header },
        image,
        sequence,
    })
}

/// The number of a batch that is whole and comes after batch `sequence`, which should begin at
/// `at`.
fn later_batch(
    header: &Header,
    batches: &[u8],
    at: usize,
    sequence: u64,
) -> Result<Option<u64>, Why> {
    // What is left of one batch, and no more: in a hostile file each block may claim to begin a
    // batch of the whole log.
    let mut room = 4 * batches.len();
    for at in (at + BLOCK..batches.len()).step_by(BLOCK) {
        let claimed = batch_claims(&batches[at..]);
        room = room.checked_sub(claimed).ok_or(Why::Damaged {
            part: "log",
            what: "too many batches begin in it",
        })?;
        if let Ok(Some(whole)) = batch(&batches[at..], header.generation)
            && whole.sequence > sequence
        {
            return Ok(Some(whole.sequence));
        }
    }
    Ok(None)
}
