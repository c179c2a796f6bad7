//! Every small program, with a crash at each step, and every folder that may be found then.

use super::{Op, explore};

/// What a consumer has at first: a copy of everything.
pub(super) const COPIED: [Op; 4] = [Op::Join(0), Op::Harvest(0), Op::Copy(0), Op::Commit(0)];

const ALPHABET: [Op; 13] = [
    Op::Write { page: 0 },
    Op::Write { page: 2 },
    Op::Begin { page: 1, pages: 1 },
    Op::BeginBy { handle: 0, page: 1 },
    Op::Land,
    Op::Harvest(0),
    Op::Copy(0),
    Op::Commit(0),
    Op::Abort(0),
    Op::FlushDevice,
    Op::CloseExtents,
    Op::Grow,
    Op::Join(1),
];

/// All programs of `len` operations of `alphabet`, after a first copy.
pub(super) fn all_programs(alphabet: &[Op], len: usize) -> impl Iterator<Item = Vec<Op>> {
    let count = alphabet.len().pow(len as u32);
    (0..count).map(move |number| {
        let mut rest = number;
        let mut next = || {
            let op = alphabet[rest % alphabet.len()];
            rest /= alphabet.len();
            op
        };
        (0..len).map(|_| next()).collect()
    })
}

/// How many operations a program has: three without optimisation, four with it, five at night.
fn length() -> usize {
    match std::env::var_os("DIRTYMAP_DEEP") {
        Some(_) => 5,
        None if cfg!(debug_assertions) => 3,
        None => 4,
    }
}

/// Whether each operation of a program has what it needs: one that has not does nothing.
fn does_something(program: &[Op]) -> bool {
    let (mut flight, mut lease, mut copied) = (0, false, false);
    program.iter().all(|op| match op {
        Op::Begin { .. } | Op::BeginBy { .. } => {
            flight += 1;
            true
        }
        Op::Land => {
            flight -= 1;
            flight >= 0
        }
        Op::Harvest(_) => !std::mem::replace(&mut lease, true),
        Op::Copy(_) => {
            copied = true;
            lease
        }
        Op::Commit(_) => std::mem::take(&mut lease) && std::mem::take(&mut copied),
        Op::Abort(_) => {
            copied = false;
            std::mem::take(&mut lease)
        }
        _ => true,
    })
}

#[test]
fn every_small_program_loses_nothing_in_any_crash() {
    let (mut found, mut programs) = (0, 0);
    let all = all_programs(&ALPHABET, length());
    for program in all.filter(|program| does_something(program)) {
        programs += 1;
        found += explore(&COPIED, &program).unwrap();
    }
    println!(
        "{found} folders after {programs} programs of {} operations",
        length()
    );
    assert!(found > 10_000, "{found} folders are next to nothing");
}
