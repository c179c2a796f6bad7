//! Replays sequences and compares answers. What must be equal, and where our contract is stricter, is decided here.

use std::sync::Arc;

use pagetable_sim::PhysMemory;

use super::hwpt::{Answer, Hwpt, Refusal};
use super::image::Image;
use super::parse::{Get, Item, Kind, Map, Op, Sequence};
use super::ranges::Ranges;
use super::report::Report;

/// Behind the mappings of every domain. Only what is written costs memory.
const MEMORY: u64 = 16 << 30;
const PEEK: u64 = 1;

/// Where our contract is stricter than the kernel, by name.
const HOLE: &str = "a hole in the range is an error, after what lies below it";
const NEVER_TRACKED: &str = "tracking was never enabled: refused";
const NOT_A_POWER: &str = "page_size is not a power of two: refused";
const SHORT_BITMAP: &str = "the bitmap is short, missing or not writable: refused";
const SECOND_ENABLE: &str = "enabling twice keeps what is dirty";

/// Plays the items of a file.
pub(crate) struct Replay {
    memory: Arc<PhysMemory>,
    sequence: String,
    hwpts: Vec<Hwpt>,
    /// What was seen.
    pub(crate) report: Report,
}

/// What an operation came to, when it was right: the name of an exception that it needed.
type Verdict = Result<Option<&'static str>, String>;

impl Replay {
    /// A replay of nothing so far.
    ///
    /// # Errors
    /// If the host has no memory.
    pub(crate) fn new() -> Result<Self, pagetable_sim::Error> {
        Ok(Replay {
            memory: Arc::new(PhysMemory::new(MEMORY)?),
            sequence: String::new(),
            hwpts: Vec::new(),
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
                let (class, verdict) = self.op(op);
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
        self.hwpts.clear();
        for nth in 0..sequence.hwpts.len() {
            match Hwpt::new(sequence, nth, &self.memory) {
                Ok(hwpt) => self.hwpts.push(hwpt),
                Err(refusal) => {
                    let text = format!("line {line}, {}: domain {nth}: {refusal}", self.sequence);
                    self.report.add("domain", Err(text));
                    return;
                }
            }
        }
    }

    fn op(&self, op: &Op) -> (&'static str, Verdict) {
        match &op.kind {
            Kind::Map(map) => ("map", self.map(op, map)),
            Kind::Unmap {
                iova,
                length,
                unmapped,
            } => ("unmap", self.unmap(op, *iova, *length, *unmapped)),
            Kind::Track { hwpt, flags } => ("track", self.track(op, *hwpt, *flags)),
            Kind::Dirty { hwpt, granules } => ("dirty", self.dirty(op, *hwpt, granules)),
            Kind::Get(get) => (class(get), self.get(op, get)),
            Kind::Size {} => ("size", Ok(None)),
        }
    }

    fn hwpt(&self, hwpt: i64) -> Result<&Hwpt, Refusal> {
        usize::try_from(hwpt)
            .ok()
            .and_then(|nth| self.hwpts.get(nth))
            .ok_or(Refusal::NoSuchHwpt)
    }

    fn map(&self, op: &Op, map: &Map) -> Verdict {
        for (nth, hwpt) in self.hwpts.iter().enumerate() {
            let layout = map.layout.iter().find(|l| l.hwpt == nth as i64);
            let leaves = layout.map_or(&[][..], |layout| &layout.ptes);
            same_errno(op, hwpt.map(map.iova, map.length, map.writeable, leaves))?;
        }
        Ok(None)
    }

    fn unmap(&self, op: &Op, iova: u64, length: u64, unmapped: Option<u64>) -> Verdict {
        for hwpt in &self.hwpts {
            let done = hwpt.unmap(iova, length);
            let bytes = done.as_ref().ok().copied();
            same_errno(op, done)?;
            if let (Some(ours), Some(theirs), 0) = (bytes, unmapped, op.errno)
                && ours != u128::from(theirs)
            {
                return Err(format!("{ours} bytes went, with the kernel {theirs}"));
            }
        }
        match self.hwpts.first() {
            Some(hwpt) => same_state(op, hwpt).map(|()| None),
            None => Ok(None),
        }
    }

    fn track(&self, op: &Op, hwpt: i64, flags: u64) -> Verdict {
        if flags > 1 {
            return same_errno(op, Err::<(), _>(Refusal::Flags)).map(|()| None);
        }
        let hwpt = match self.hwpt(hwpt) {
            Ok(hwpt) => hwpt,
            Err(refusal) => return same_errno(op, Err::<(), _>(refusal)).map(|()| None),
        };
        let again = hwpt.is_tracking() && flags == 1;
        same_errno(op, hwpt.track(flags == 1))?;
        let Err(difference) = same_state(op, hwpt) else {
            return Ok(None);
        };
        if !again {
            return Err(difference);
        }
        adopt(op, hwpt)?;
        Ok(Some(SECOND_ENABLE))
    }

    fn dirty(&self, op: &Op, hwpt: i64, granules: &[(u64, u64)]) -> Verdict {
        let hwpt = match self.hwpt(hwpt) {
            Ok(hwpt) => hwpt,
            Err(refusal) => return same_errno(op, Err::<(), _>(refusal)).map(|()| None),
        };
        same_errno(op, hwpt.write(granules))?;
        same_state(op, hwpt).map(|()| None)
    }

    fn get(&self, op: &Op, get: &Get) -> Verdict {
        let hwpt = match self.hwpt(get.hwpt) {
            _ if get.flags & !PEEK != 0 || get.reserved != 0 => Err(Refusal::Flags),
            found => found,
        };
        let hwpt = match hwpt {
            Ok(hwpt) => hwpt,
            Err(refusal) => return same_errno(op, Err::<(), _>(refusal)).map(|()| None),
        };
        let before = state(hwpt)?;
        let untouched = Image::new(get.buf.as_ref());
        let mut image = untouched.clone();
        let clear = get.flags & PEEK == 0;
        let answer = hwpt.read(get.iova, get.length, get.page_size, clear, image.bitmap());
        let after = state(hwpt)?;
        let verdict = match answer {
            Err(refusal) => {
                if image != untouched || after != before {
                    return Err(format!("refused ({refusal}), and something was touched"));
                }
                refused(op, &refusal)
            }
            Ok(_) if op.errno != 0 => Err(format!("accepted, errno {} with the kernel", op.errno)),
            Ok(answer) => {
                let read = Read {
                    get,
                    hwpt,
                    before,
                    untouched,
                };
                read.follows_the_contract(&answer, &image, &after)?;
                Ok(answer.hole.is_some().then_some(HOLE))
            }
        };
        if is(get, "plain") {
            return match verdict? {
                Some(exception) => Err(format!("a plain read needs an exception: {exception}")),
                None => same_bits(get, &image)
                    .and_then(|()| same_state(op, hwpt))
                    .map(|()| None),
            };
        }
        adopt(op, hwpt)?;
        verdict
    }
}

/// A read, and what it found.
struct Read<'a> {
    get: &'a Get,
    hwpt: &'a Hwpt,
    before: Ranges,
    untouched: Image,
}

impl Read<'_> {
    /// Each dirty leaf's part inside the request is reported and nothing else; nothing is written outside of the request;
    /// what was not reported stays dirty.
    fn follows_the_contract(
        &self,
        answer: &Answer,
        image: &Image,
        after: &Ranges,
    ) -> Result<(), String> {
        let get = self.get;
        let reported = self.before.and(&answer.walked);
        let mut expected = self.untouched.clone();
        for range in reported.iter() {
            let first = (range.start().get() - get.iova) / get.page_size;
            let last = (range.last().get() - get.iova) / get.page_size;
            if !expected.set(first as i64, last - first + 1) {
                return Err("dirty pages do not fit the bitmap".into());
            }
        }
        if *image != expected {
            return Err("the bits are not those of the dirty pages in the range".into());
        }
        let must_stay = if get.flags & PEEK == 0 {
            self.before.without(&answer.walked)
        } else {
            self.before.clone()
        };
        if !must_stay.inside(after) {
            return Err("something became clean and was not reported".into());
        }
        let may_stay = must_stay.or(&self.rest_of_cut_leaves(answer));
        if !after.inside(&may_stay) {
            return Err("something that was reported is still dirty".into());
        }
        Ok(())
    }

    /// The one superset that is allowed: a dirty leaf that sticks out of the request may stay dirty as a whole.
    fn rest_of_cut_leaves(&self, answer: &Answer) -> Ranges {
        let leaves = self.hwpt.leaves_at_borders(&answer.walked);
        let cut = leaves
            .iter()
            .filter(|leaf| !Ranges::new([*leaf]).inside(&answer.walked));
        self.before.and(&Ranges::new(cut))
    }
}

/// The class that a read is counted in.
fn class(get: &Get) -> &'static str {
    const CLASSES: [(&str, &str); 11] = [
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
    ];
    CLASSES
        .iter()
        .find(|(tag, _)| is(get, tag))
        .map_or("get, other", |(_, class)| class)
}

fn is(get: &Get, tag: &str) -> bool {
    get.tags.iter().any(|t| t == tag)
}

/// A read that we refuse is one that the kernel refuses as well, or one of the exceptions.
fn refused(op: &Op, refusal: &Refusal) -> Verdict {
    use dirtymap::Error::{BadGranule, BitmapTooShort, NeverTracked};
    if op.errno != 0 && refusal.errno() == op.errno {
        return Ok(None);
    }
    match refusal {
        Refusal::Space(BadGranule { bytes }) if *bytes != 0 => Ok(Some(NOT_A_POWER)),
        Refusal::Space(NeverTracked { .. }) if op.errno == 0 => Ok(Some(NEVER_TRACKED)),
        Refusal::Space(BitmapTooShort { .. }) if op.errno == 0 => Ok(Some(SHORT_BITMAP)),
        _ => Err(format!(
            "refused with errno {} ({refusal}), with the kernel {}",
            refusal.errno(),
            op.errno
        )),
    }
}

fn same_errno<T>(op: &Op, done: Result<T, Refusal>) -> Result<(), String> {
    let (errno, text) = match done {
        Ok(_) => (0, "accepted".into()),
        Err(refusal) => (refusal.errno(), format!("refused: {refusal}")),
    };
    if errno == op.errno {
        return Ok(());
    }
    Err(format!(
        "{text}, errno {errno}, with the kernel {}",
        op.errno
    ))
}

fn same_bits(get: &Get, image: &Image) -> Result<(), String> {
    let mut kernel = Image::new(get.buf.as_ref());
    for (first, count) in &get.new {
        if !kernel.set(*first, *count) {
            return Err(format!("[{first},{count}] lies outside the buffer"));
        }
    }
    if *image == kernel {
        return Ok(());
    }
    Err("the bits are not the kernel's".into())
}

fn state(hwpt: &Hwpt) -> Result<Ranges, String> {
    hwpt.dirty()
        .map_err(|refusal| format!("the dirty state cannot be read: {refusal}"))
}

/// The kernel's dirty state after the operation, if it has one.
fn recorded(op: &Op) -> Option<Ranges> {
    use dirtymap::{Iova, IovaRange};
    let runs = op.after.as_ref()?;
    Some(Ranges::new(runs.iter().filter_map(|(start, len)| {
        IovaRange::from_len(Iova::new(*start), *len).ok()
    })))
}

fn same_state(op: &Op, hwpt: &Hwpt) -> Result<(), String> {
    match recorded(op) {
        Some(recorded) if state(hwpt)? != recorded => {
            Err("other pages are dirty afterwards".into())
        }
        _ => Ok(()),
    }
}

/// Goes on with the kernel's dirty state.
fn adopt(op: &Op, hwpt: &Hwpt) -> Result<(), String> {
    let Some(recorded) = recorded(op) else {
        return Ok(());
    };
    if state(hwpt)? != recorded {
        hwpt.set(&recorded)
            .map_err(|refusal| format!("the dirty state cannot be set: {refusal}"))?;
    }
    same_state(op, hwpt)
}
