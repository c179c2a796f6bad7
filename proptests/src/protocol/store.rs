//! The store: a write-intent log, two consumers with deltas on disk, and a crash at every moment.
//!
//! One extent of one page. The device and the copies have a cache each: what was written and not
//! flushed may be there after a crash or not. The log is a file that is replaced when it is full: a
//! new one is written and flushed, then renamed over the old one, then the directory is flushed.
//! One leader at a time appends a batch and flushes it, and only then acknowledges.
//!
//! A state is bad if a crash now loses a write: one of the logs that may be found afterwards
//! reports nothing to a consumer, and a value that the device may then have differs from one that
//! the consumer's copy may have. It is also bad if nothing is dirty any more without a crash, and
//! the copy differs. Crashes are steps as well, so that what a recovery leaves is checked too.

use super::explore::{Outcome, Steps, explore};

pub(super) const WEAKNESSES: &[&str] = &[
    "writes before the open extent is flushed",
    "closes an extent while a write is in flight",
    "a write leaves its extent before it marks",
    "closes an extent without its dirty pages",
    "records a close for one consumer only",
    "clears at the harvest what no commit has covered",
    "commits before the copy is durable",
    "commits before the device is flushed",
    "a commit drops what was dirtied since its harvest",
    "a commit drops what another consumer waits for",
    "an abort forgets what it took",
    "a consumer that joins begins clean",
    "no flush of the directory after a rename",
    "accepts a torn batch",
    "a recovery forgets the open extents",
    "a recovery forgets what was harvested",
];

/// What a log says after its replay.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
struct Image {
    open: bool,
    pending: [bool; 2],
    leased: [bool; 2],
    joined: [bool; 2],
}

/// What the leader appends, and what happens once it is durable.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum Op {
    Open,
    Close,
    Harvest(usize),
    Commit(usize),
    Abort(usize),
    Join(usize),
    /// The new file is durable; then it is renamed, and then the directory is flushed.
    Switch,
    Renamed,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum Writer {
    Idle,
    /// It pinned the extent, and the write is issued.
    InFlight,
    Landed,
    Marked,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum Step {
    Idle,
    Leased,
    Copied,
    CopyDurable,
    DeviceFlushed,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
struct Consumer {
    step: Step,
    reported: bool,
    rounds: u8,
    copy: u8,
    copy_disk: u8,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
struct State {
    data: u8,
    data_disk: u8,
    writer: Writer,
    writes: u8,
    /// The word of the extent: open, pinned by the writer, dirty.
    open: bool,
    pinned: bool,
    dirty: bool,
    /// What the leader has appended, flushed or not.
    memory: Image,
    /// What is durable in each file, the file that is appended to, and the one that the directory
    /// on disk names.
    files: [Image; 2],
    on: usize,
    named: usize,
    unflushed: bool,
    busy: Option<Op>,
    consumers: [Consumer; 2],
    switches: u8,
    crashes: u8,
    recovering: bool,
}

/// What is weak.
#[derive(Clone, Copy)]
struct Weak {
    no_flush: bool,
    close_pinned: bool,
    leave_early: bool,
    close_clean: bool,
    close_for_one: bool,
    clear_at_harvest: bool,
    commit_early: bool,
    no_device_flush: bool,
    commit_all: bool,
    commit_other: bool,
    abort_forgets: bool,
    join_clean: bool,
    no_dir_flush: bool,
    torn: bool,
    forget_open: bool,
    forget_leased: bool,
}

/// Explores the model, weakened as `weakness` says.
pub(super) fn explore_with(weakness: Option<&'static str>) -> Outcome {
    let weak = super::chosen(weakness, WEAKNESSES);
    let weak = Weak {
        no_flush: weak("writes before the open extent is flushed"),
        close_pinned: weak("closes an extent while a write is in flight"),
        leave_early: weak("a write leaves its extent before it marks"),
        close_clean: weak("closes an extent without its dirty pages"),
        close_for_one: weak("records a close for one consumer only"),
        clear_at_harvest: weak("clears at the harvest what no commit has covered"),
        commit_early: weak("commits before the copy is durable"),
        no_device_flush: weak("commits before the device is flushed"),
        commit_all: weak("a commit drops what was dirtied since its harvest"),
        commit_other: weak("a commit drops what another consumer waits for"),
        abort_forgets: weak("an abort forgets what it took"),
        join_clean: weak("a consumer that joins begins clean"),
        no_dir_flush: weak("no flush of the directory after a rename"),
        torn: weak("accepts a torn batch"),
        forget_open: weak("a recovery forgets the open extents"),
        forget_leased: weak("a recovery forgets what was harvested"),
    };
    let image = Image {
        open: false,
        pending: [false; 2],
        leased: [false; 2],
        joined: [true, false],
    };
    let consumer = |rounds| Consumer {
        step: Step::Idle,
        reported: false,
        rounds,
        copy: 0,
        copy_disk: 0,
    };
    let first = State {
        data: 0,
        data_disk: 0,
        writer: Writer::Idle,
        writes: 2,
        open: false,
        pinned: false,
        dirty: false,
        memory: image,
        files: [image; 2],
        on: 0,
        named: 0,
        unflushed: false,
        busy: None,
        consumers: [consumer(2), consumer(1)],
        switches: 1,
        crashes: 1,
        recovering: false,
    };
    explore(
        first,
        |s, out| {
            write(*s, weak, out);
            lead(*s, weak, out);
            (0..2).for_each(|number| consume(*s, number, weak, out));
            crash(*s, weak, out);
        },
        |s| loses_in_a_crash(s, weak) || has_lost(s),
    )
}

/// The writer: it finds the extent open and pins it, writes, marks, leaves.
fn write(s: State, weak: Weak, out: &mut Steps<State>) {
    match s.writer {
        Writer::Idle if s.writes > 0 && s.open => {
            let s = State {
                writer: Writer::InFlight,
                pinned: true,
                writes: s.writes - 1,
                ..s
            };
            out.push("write: finds the extent open, is issued", s);
        }
        Writer::InFlight => {
            let s = State {
                writer: Writer::Landed,
                data: s.data + 1,
                pinned: !weak.leave_early,
                ..s
            };
            out.push("write: lands", s);
        }
        Writer::Landed => {
            let s = State {
                writer: Writer::Marked,
                dirty: true,
                ..s
            };
            out.push("write: marks its page", s);
        }
        Writer::Marked => {
            let s = State {
                writer: Writer::Idle,
                pinned: false,
                ..s
            };
            out.push("write: leaves its extent", s);
        }
        Writer::Idle => {}
    }
}

/// The leader: it begins an operation, flushes what it appended, acknowledges.
fn lead(s: State, weak: Weak, out: &mut Steps<State>) {
    let Some(op) = s.busy else {
        if s.recovering {
            return switch(s, out);
        }
        if !s.open && s.writes > 0 && s.writer == Writer::Idle {
            let mut s = s;
            s.memory.open = true;
            out.push("open: is appended", appended(s, Op::Open));
        }
        if s.open && (!s.pinned || weak.close_pinned) {
            let mut s = if weak.close_clean {
                s
            } else {
                collected(s, weak.close_for_one)
            };
            (s.open, s.memory.open) = (false, false);
            out.push("close: is appended", appended(s, Op::Close));
        }
        if s.switches > 0 {
            switch(s, out);
        }
        return;
    };
    match op {
        Op::Switch => {
            let s = State {
                on: 1 - s.on,
                busy: Some(Op::Renamed),
                ..s
            };
            out.push("switch: the new file is renamed", s);
        }
        Op::Renamed => {
            let s = State {
                named: if weak.no_dir_flush { s.named } else { s.on },
                busy: None,
                recovering: false,
                ..s
            };
            out.push("switch: the directory is flushed", s);
        }
        _ if s.unflushed => {
            let mut flushed = s;
            flushed.files[s.on] = s.memory;
            flushed.unflushed = false;
            out.push("leader: flushes", flushed);
            if weak.no_flush && op == Op::Open {
                out.push("leader: acknowledges", acknowledged(s, op));
            }
        }
        _ => out.push("leader: acknowledges", acknowledged(s, op)),
    }
}

/// A new file with all that the log says is written and flushed.
fn switch(s: State, out: &mut Steps<State>) {
    let mut s = s;
    s.files[1 - s.on] = s.memory;
    s.switches = s.switches.saturating_sub(1);
    s.busy = Some(Op::Switch);
    s.unflushed = false;
    out.push("switch: a new file is durable", s);
}

fn appended(s: State, op: Op) -> State {
    State {
        busy: Some(op),
        unflushed: true,
        ..s
    }
}

/// The dirty page moves from the word into the deltas of all consumers.
fn collected(s: State, for_one: bool) -> State {
    let mut s = s;
    for number in 0..2 {
        s.memory.pending[number] |= s.dirty && s.memory.joined[number] && (number == 0 || !for_one);
    }
    s.dirty = false;
    s
}

fn acknowledged(s: State, op: Op) -> State {
    let mut s = State { busy: None, ..s };
    match op {
        Op::Open => s.open = true,
        Op::Harvest(number) => {
            s.consumers[number].reported |= s.memory.leased[number];
            s.consumers[number].step = Step::Leased;
        }
        Op::Commit(number) | Op::Abort(number) => s.consumers[number].step = Step::Idle,
        Op::Close | Op::Join(_) | Op::Switch | Op::Renamed => {}
    }
    s
}

/// What consumer `number` may do next.
fn consume(s: State, number: usize, weak: Weak, out: &mut Steps<State>) {
    let c = s.consumers[number];
    let with = |c: Consumer| {
        let mut s = s;
        s.consumers[number] = c;
        s
    };
    let lead = s.busy.is_none() && !s.recovering;
    match c.step {
        Step::Idle if lead && !s.memory.joined[number] => {
            let mut s = s;
            s.memory.joined[number] = true;
            s.memory.pending[number] = !weak.join_clean;
            out.push("join: is appended", appended(s, Op::Join(number)));
        }
        Step::Idle if lead && c.rounds > 0 => {
            let mut s = collected(s, false);
            let taken = std::mem::take(&mut s.memory.pending[number]);
            s.memory.leased[number] = taken && !weak.clear_at_harvest;
            s.consumers[number].rounds -= 1;
            s.consumers[number].reported = taken;
            out.push("harvest: is appended", appended(s, Op::Harvest(number)));
        }
        Step::Leased => {
            let copy = if c.reported { s.data } else { c.copy };
            let step = Step::Copied;
            let copied = with(Consumer { copy, step, ..c });
            out.push("consumer: copies", copied);
            if lead {
                let mut s = s;
                s.memory.pending[number] |= s.memory.leased[number] && !weak.abort_forgets;
                s.memory.leased[number] = false;
                out.push("abort: is appended", appended(s, Op::Abort(number)));
            }
        }
        Step::Copied => {
            let copy_disk = if weak.commit_early {
                c.copy_disk
            } else {
                c.copy
            };
            let step = Step::CopyDurable;
            let durable = with(Consumer {
                copy_disk,
                step,
                ..c
            });
            out.push("consumer: its copy is durable", durable);
        }
        Step::CopyDurable => {
            let step = Step::DeviceFlushed;
            let mut s = with(Consumer { step, ..c });
            if !weak.no_device_flush {
                s.data_disk = s.data;
            }
            out.push("consumer: flushes the device", s);
        }
        Step::DeviceFlushed if lead => {
            let mut s = s;
            s.memory.leased[number] = false;
            if weak.commit_all {
                s.memory.pending[number] = false;
            }
            if weak.commit_other {
                (s.memory.pending[1 - number], s.memory.leased[1 - number]) = (false, false);
            }
            out.push("commit: is appended", appended(s, Op::Commit(number)));
        }
        Step::Idle | Step::DeviceFlushed => {}
    }
}

/// Every log that may be found after a crash now.
fn found(s: &State, weak: Weak) -> Vec<Image> {
    let mut found = vec![s.files[s.on], s.files[s.named]];
    if s.unflushed {
        found.push(s.memory);
        if weak.torn {
            // The records of the first sector are there, and what they dirtied is not.
            let old = s.files[s.on];
            found.push(Image {
                pending: old.pending,
                ..s.memory
            });
        }
    }
    found
}

/// Every value that the device may have after a crash now.
fn values(s: &State) -> Vec<u8> {
    let mut values: Vec<u8> = (s.data_disk..=s.data).collect();
    if s.writer == Writer::InFlight {
        values.push(s.data + 1);
    }
    values
}

fn loses_in_a_crash(s: &State, weak: Weak) -> bool {
    found(s, weak).iter().any(|image| {
        (0..2).any(|number| {
            let c = s.consumers[number];
            let reported = image.open || image.pending[number] || image.leased[number];
            let copies = [c.copy_disk, c.copy];
            let differ = |value: &u8| copies.iter().any(|copy| copy != value);
            image.joined[number] && !reported && values(s).iter().any(differ)
        })
    })
}

/// Whether nothing is left to report to a consumer that has another value, without a crash.
fn has_lost(s: &State) -> bool {
    (0..2).any(|number| {
        let c = s.consumers[number];
        let waits = s.dirty || s.memory.pending[number] || s.memory.leased[number];
        let quiet = c.step == Step::Idle && s.busy.is_none() && s.writer == Writer::Idle;
        let after_a_crash = s.recovering && s.memory.open;
        s.memory.joined[number] && quiet && !waits && !after_a_crash && c.copy != s.data
    })
}

/// The system dies, and a log that may be there is replayed.
fn crash(s: State, weak: Weak, out: &mut Steps<State>) {
    if s.crashes == 0 {
        return;
    }
    for on in [s.on, s.named] {
        for image in found(&s, weak) {
            for value in values(&s) {
                let mut s = State {
                    data: value,
                    data_disk: value,
                    writer: Writer::Idle,
                    open: false,
                    pinned: false,
                    dirty: false,
                    memory: image,
                    on,
                    named: on,
                    unflushed: false,
                    busy: None,
                    crashes: s.crashes - 1,
                    recovering: true,
                    ..s
                };
                s.files[on] = image;
                recover(&mut s, weak);
                out.push("crash, and the log is replayed", s);
            }
        }
    }
}

/// Open extents and what was harvested become dirty again, for each consumer.
fn recover(s: &mut State, weak: Weak) {
    for number in 0..2 {
        let image = &mut s.memory;
        let open = image.open && image.joined[number] && !weak.forget_open;
        let leased = image.leased[number] && !weak.forget_leased;
        image.pending[number] |= open || leased;
        image.leased[number] = false;
        s.consumers[number].step = Step::Idle;
        s.consumers[number].reported = false;
        s.consumers[number].copy_disk = s.consumers[number].copy;
    }
    s.memory.open = false;
}
