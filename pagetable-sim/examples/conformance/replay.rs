//! Replays sequences and compares answers. This file has the rules: which answers must be equal,
//! and where our contract is stricter.

use std::sync::Arc;

use dirtymap::{Iova, IovaRange};
use pagetable_sim::PhysMemory;

use super::hwpt::Hwpt;
use super::image::Image;
use super::ioas::{Ioas, Refusal};
use super::parse::{Get, Item, Kind, Op, Sequence};
use super::ranges::Ranges;
use super::report::Report;

/// The memory that every domain maps. A page takes host memory from its first write on.
const MEMORY: u64 = 16 << 30;
const PEEK: u64 = 1;

/// Where our contract is stricter than the kernel, by name.
const HOLE: &str = "a hole in the range is an error, after the part below it";
const NEVER_TRACKED: &str = "tracking was never enabled: refused";
const NOT_A_POWER: &str = "page_size is not a power of two: refused";
const SHORT_BITMAP: &str = "the bitmap is short, missing or not writable: refused";
const SECOND_ENABLE: &str = "enabling twice keeps dirty pages";
const ALL_OR_NOTHING: &str = "an unmap that is refused unmaps nothing";

/// Plays the items of a file.
pub(crate) struct Replay {
    memory: Arc<PhysMemory>,
    sequence: String,
    /// The object of the sequence; `None` if it could not be made.
    ioas: Option<Ioas>,
    /// The results so far.
    pub(crate) report: Report,
}

/// The result of an operation: on success, the name of the exception that it needed, if any.
type Verdict = Result<Option<&'static str>, String>;

impl Replay {
    /// A replay at its start.
    ///
    /// # Errors
    /// If the host has no memory.
    pub(crate) fn new() -> Result<Self, pagetable_sim::Error> {
        Ok(Replay {
            memory: Arc::new(PhysMemory::new(MEMORY)?),
            sequence: String::new(),
            ioas: None,
            report: Report::default(),
        })
    }

    /// Plays one item of line `line`.
    pub(crate) fn play(&mut self, line: u64, item: &Item) {
        match item {
            Item::Sequence(sequence) => self.begin(line, sequence),
            Item::Op(Op {
                kind: Kind::Size {},
                ..
            }) => self.report.skipped += 1,
            Item::Op(op) => {
                let (class, verdict) = match &self.ioas {
                    Some(ioas) => Player { ioas, op }.play(),
                    None => ("domain", Err("the sequence did not begin".into())),
                };
                let text = verdict.map_err(|why| {
                    format!("line {line}, {} op {}: {class}: {why}", self.sequence, op.i)
                });
                self.report.add(class, text);
            }
        }
    }

    fn begin(&mut self, line: u64, sequence: &Sequence) {
        self.report.sequences += 1;
        self.sequence = format!("sequence {} ({})", sequence.seq, sequence.name);
        // The old object is dropped first, with its tables.
        self.ioas = None;
        match Ioas::new(sequence, &self.memory) {
            Ok(ioas) => self.ioas = Some(ioas),
            Err(refusal) => {
                let text = format!("line {line}, {}: {refusal}", self.sequence);
                self.report.add("domain", Err(text));
            }
        }
    }
}

/// One operation, and its object.
struct Player<'a> {
    ioas: &'a Ioas,
    op: &'a Op,
}

impl Player<'_> {
    fn play(&self) -> (&'static str, Verdict) {
        match &self.op.kind {
            Kind::Map(map) => ("map", self.same_errno(self.ioas.map(map)).map(|()| None)),
            Kind::Unmap {
                iova,
                length,
                unmapped,
            } => ("unmap", self.unmap(*iova, *length, *unmapped)),
            Kind::Track { hwpt, flags } => ("track", self.track(*hwpt, *flags)),
            Kind::Dirty { hwpt, granules } => ("dirty", self.dirty(*hwpt, granules)),
            Kind::Get(get) => (class(get), self.get(get)),
            Kind::Size {} => ("size", Ok(None)),
        }
    }

    fn unmap(&self, iova: u64, length: u64, unmapped: Option<u64>) -> Verdict {
        let done = self.ioas.unmap(iova, length);
        let exception = match &done {
            Ok(ours) if self.op.errno == 0 => match unmapped {
                Some(theirs) if *ours != u128::from(theirs) => {
                    return Err(format!(
                        "{ours} bytes were unmapped, by the kernel {theirs}"
                    ));
                }
                _ => None,
            },
            Err(Refusal::Space(dirtymap::Error::PartOfArea { area, .. })) => {
                self.follow_partial_unmap(iova, area.start())?
            }
            _ => None,
        };
        self.same_errno(done)?;
        if let Ok(first) = self.ioas.hwpt(0) {
            self.settle(first)?;
        }
        Ok(exception)
    }

    /// The kernel unmaps area by area: when it refuses an area that sticks out of the range, the
    /// areas below it are already gone. It has not unmapped them if it reports dirty pages there.
    fn follow_partial_unmap(&self, iova: u64, sticks_out: Iova) -> Verdict {
        let below = sticks_out.get().checked_sub(1).map(Iova::new);
        let Some(range) = below.and_then(|last| IovaRange::new(Iova::new(iova), last).ok()) else {
            return Ok(None);
        };
        let gone = Ranges::new([range]).and(&self.ioas.mapped());
        let still = self.recorded().unwrap_or_default().and(&gone);
        if gone.is_empty() || !still.is_empty() {
            return Ok(None);
        }
        let done = self.ioas.unmap(iova, sticks_out.get() - iova);
        done.map_err(|refusal| format!("the areas below cannot be unmapped: {refusal}"))?;
        Ok(Some(ALL_OR_NOTHING))
    }

    fn track(&self, hwpt: i64, flags: u64) -> Verdict {
        let hwpt = match self.ioas.hwpt(hwpt) {
            _ if flags > 1 => return self.refused(Refusal::Flags),
            Ok(hwpt) => hwpt,
            Err(refusal) => return self.refused(refusal),
        };
        let again = hwpt.is_tracking() && flags == 1;
        let before = state(self.ioas, hwpt)?;
        self.same_errno(self.ioas.track(hwpt, flags == 1))?;
        if !again {
            return self.settle(hwpt);
        }
        if state(self.ioas, hwpt)? != before {
            return Err("enabling twice changed the dirty pages".into());
        }
        let same = self.same_state(hwpt).is_ok();
        self.adopt(hwpt)?;
        Ok((!same).then_some(SECOND_ENABLE))
    }

    fn dirty(&self, hwpt: i64, granules: &[(u64, u64)]) -> Verdict {
        let hwpt = match self.ioas.hwpt(hwpt) {
            Ok(hwpt) => hwpt,
            Err(refusal) => return self.refused(refusal),
        };
        self.same_errno(self.ioas.write(hwpt, granules))?;
        self.settle(hwpt)
    }

    fn get(&self, get: &Get) -> Verdict {
        let hwpt = match self.ioas.hwpt(get.hwpt) {
            _ if get.flags & !PEEK != 0 || get.reserved != 0 => {
                return self.refused(Refusal::Flags);
            }
            Ok(hwpt) => hwpt,
            Err(refusal) => return self.refused(refusal),
        };
        let others = || {
            let others = self.ioas.hwpts().iter().filter(|h| h.id != hwpt.id);
            let states = others.map(|other| state(self.ioas, other));
            states.collect::<Result<Vec<_>, _>>()
        };
        let others_before = others()?;
        let verdict = self.read(hwpt, get);
        if !is(get, "plain") || verdict.is_err() {
            self.adopt(hwpt)?;
        }
        if others()? != others_before {
            return Err("the dirty pages of another domain changed".into());
        }
        verdict
    }

    fn read(&self, hwpt: &Hwpt, get: &Get) -> Verdict {
        let before = state(self.ioas, hwpt)?;
        let untouched = Image::new(get.buf.as_ref());
        let mut image = untouched.clone();
        let clear = get.flags & PEEK == 0;
        let answer = self.ioas.read(hwpt, get, clear, image.bitmap());
        let after = state(self.ioas, hwpt)?;
        let exception = match answer {
            Err(refusal) => {
                if image != untouched || after != before {
                    return Err(format!(
                        "refused ({refusal}), and the bitmap or the dirty pages changed"
                    ));
                }
                self.stricter(hwpt, get, &untouched, refusal)?
            }
            Ok(_) if self.op.errno != 0 => {
                return Err(format!(
                    "accepted here, errno {} in the kernel",
                    self.op.errno
                ));
            }
            Ok(hole) => {
                let walked = self.walked(get, hole)?;
                let expected = report(&before.and(&walked), get, untouched)?;
                if image != expected {
                    return Err("the bits are not those of the dirty pages in the range".into());
                }
                let rest = if clear {
                    before.without(&walked)
                } else {
                    before
                };
                if after != rest {
                    return Err("the wrong pages are dirty afterwards".into());
                }
                hole.map(|_| HOLE)
            }
        };
        if is(get, "plain") {
            if let Some(exception) = exception {
                return Err(format!("a plain read needs an exception: {exception}"));
            }
            same_bits(get, &image)?;
            self.same_state(hwpt)?;
        }
        Ok(exception)
    }

    /// The range that an accepted read had to walk: the request, or its part below the first
    /// unmapped address, which must be the reported `hole`.
    fn walked(&self, get: &Get, hole: Option<Iova>) -> Result<Ranges, String> {
        let range = IovaRange::from_len(Iova::new(get.iova), get.length)
            .map_err(|error| format!("accepted, though {error}"))?;
        let unmapped = Ranges::new([range]).without(&self.ioas.mapped());
        let first = unmapped.iter().next().map(|hole| hole.start());
        if first != hole {
            return Err(format!(
                "the hole is at {first:?}, but {hole:?} was reported"
            ));
        }
        let Some(hole) = first else {
            return Ok(Ranges::new([range]));
        };
        let below = hole.get().checked_sub(1).map(Iova::new);
        Ok(Ranges::new(
            below.and_then(|last| IovaRange::new(range.start(), last).ok()),
        ))
    }

    /// A read that is refused here must be refused by the kernel as well, or be one of the
    /// exceptions.
    fn stricter(&self, hwpt: &Hwpt, get: &Get, buffer: &Image, refusal: Refusal) -> Verdict {
        use dirtymap::Error::{Bitmap, NeverTracked};
        use dirtymap::RangeError::BadGranule;
        use dirtymap::bitmap::BitmapError::TooShort;
        if self.op.errno != 0 && refusal.errno() == self.op.errno {
            return Ok(None);
        }
        let accepted = self.op.errno == 0;
        let needed = get.length.checked_div(get.page_size).unwrap_or(0);
        match refusal {
            Refusal::Range(BadGranule { bytes }) if bytes != 0 && !bytes.is_power_of_two() => {
                Ok(Some(NOT_A_POWER))
            }
            Refusal::Space(NeverTracked { .. }) if accepted && !hwpt.ever_tracked.get() => {
                Ok(Some(NEVER_TRACKED))
            }
            Refusal::Space(Bitmap(TooShort { .. }))
                if accepted && u128::from(needed) > buffer.bits() =>
            {
                Ok(Some(SHORT_BITMAP))
            }
            refusal => self.refused(refusal),
        }
    }

    /// The call is refused here. The kernel must refuse it with the same errno.
    fn refused(&self, refusal: Refusal) -> Verdict {
        self.same_errno(Err::<(), _>(refusal)).map(|()| None)
    }

    fn same_errno<T>(&self, done: Result<T, Refusal>) -> Result<(), String> {
        let (errno, text) = match done {
            Ok(_) => (0, "accepted".into()),
            Err(refusal) => (refusal.errno(), format!("refused: {refusal}")),
        };
        let theirs = self.op.errno;
        if errno == theirs {
            return Ok(());
        }
        Err(format!("{text}, errno {errno}, in the kernel {theirs}"))
    }

    /// The kernel's dirty state after the operation, if it has one.
    fn recorded(&self) -> Option<Ranges> {
        let runs = self.op.after.as_ref()?;
        Some(Ranges::new(runs.iter().filter_map(|(start, len)| {
            IovaRange::from_len(Iova::new(*start), *len).ok()
        })))
    }

    fn same_state(&self, hwpt: &Hwpt) -> Result<(), String> {
        match self.recorded() {
            Some(recorded) if state(self.ioas, hwpt)? != recorded => {
                Err("other pages are dirty afterwards".into())
            }
            _ => Ok(()),
        }
    }

    /// Checks that both states are equal. If they differ, the sequence continues with the kernel's.
    fn settle(&self, hwpt: &Hwpt) -> Verdict {
        let same = self.same_state(hwpt);
        if same.is_err() {
            self.adopt(hwpt)?;
        }
        same.map(|()| None)
    }

    /// Continues with the kernel's dirty state.
    fn adopt(&self, hwpt: &Hwpt) -> Result<(), String> {
        let Some(recorded) = self.recorded() else {
            return Ok(());
        };
        self.ioas
            .set(hwpt, &recorded)
            .map_err(|refusal| format!("the dirty state cannot be set: {refusal}"))?;
        self.same_state(hwpt)
    }
}

/// The class under which a read is counted.
fn class(get: &Get) -> &'static str {
    const CLASSES: [(&str, &str); 14] = [
        ("plain", "get, plain"),
        ("error", "get, error"),
        ("tracking-off", "get, tracking-off"),
        ("np2-page-size", "get, np2-page-size"),
        ("bad-buffer", "get, bad-buffer"),
        ("gap", "get, gap"),
        ("overrun", "get, overrun"),
        ("data-loss", "get, data-loss"),
        ("straddle-start-lost", "get, straddle-start-lost"),
        ("straddle-end", "get, straddle-end"),
        ("unmapped-start", "get, unmapped-start"),
        ("straddle-end-clipped", "get, straddle-end-clipped"),
        ("buf-fault-lost", "get, buf-fault-lost"),
        ("multi-area", "get, multi-area"),
    ];
    CLASSES
        .iter()
        .find(|(tag, _)| is(get, tag))
        .map_or("get, other", |(_, class)| class)
}

fn is(get: &Get, tag: &str) -> bool {
    get.tags.iter().any(|t| t == tag)
}

/// The memory `before`, with the bits of `dirty`, which lies in the range of `get`.
fn report(dirty: &Ranges, get: &Get, before: Image) -> Result<Image, String> {
    let mut image = before;
    for range in dirty.iter() {
        let bit = |at: Iova| i64::try_from((at.get() - get.iova) / get.page_size);
        let (Ok(first), Ok(last)) = (bit(range.start()), bit(range.last())) else {
            return Err("dirty pages do not fit any bitmap".into());
        };
        if !image.put(first, last.abs_diff(first) + 1, true) {
            return Err("dirty pages do not fit the bitmap".into());
        }
    }
    Ok(image)
}

fn same_bits(get: &Get, image: &Image) -> Result<(), String> {
    let mut kernel = Image::new(get.buf.as_ref());
    for (runs, one) in [(&get.new, true), (&get.lost, false)] {
        for (first, count) in runs {
            if !kernel.put(*first, *count, one) {
                return Err(format!("[{first},{count}] lies outside the buffer"));
            }
        }
    }
    if *image == kernel {
        return Ok(());
    }
    Err("the bits are not the kernel's".into())
}

fn state(ioas: &Ioas, hwpt: &Hwpt) -> Result<Ranges, String> {
    ioas.dirty(hwpt)
        .map_err(|refusal| format!("the dirty state cannot be read: {refusal}"))
}
