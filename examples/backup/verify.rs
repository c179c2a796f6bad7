//! Restores every generation, and compares it with what the trace wrote up to it.

use std::io;
use std::path::Path;

use crate::generation::{self, Head};
use crate::work::{FULL, INCREMENTS};
use crate::writers::{PAGE, Plan, WRITERS};

/// What came of a generation.
pub(crate) struct Restored {
    pub(crate) head: Head,
    /// Pages that differ.
    pub(crate) differ: u64,
}

/// The image as the trace says.
struct Truth<'p> {
    plan: &'p Plan,
    bytes: Vec<u8>,
    writes: [u64; WRITERS],
}

impl Truth<'_> {
    /// Performs the writes up to those of `head`, and returns how many pages of `restored` differ.
    fn differ(&mut self, head: &Head, restored: &[u8]) -> u64 {
        for thread in 0..WRITERS {
            for number in self.writes[thread]..head.writes[thread] {
                let (page, bytes) = self.plan.contents(thread, number);
                let at = (page * PAGE) as usize;
                self.bytes[at..at + PAGE as usize].copy_from_slice(&bytes);
            }
        }
        self.writes = head.writes;
        let both = self
            .bytes
            .chunks(PAGE as usize)
            .zip(restored.chunks(PAGE as usize));
        both.filter(|(truth, restored)| truth != restored).count() as u64
    }
}

/// Restores all generations of both consumers.
pub(crate) fn run(plan: &Plan, folder: &Path) -> io::Result<Vec<Restored>> {
    let mut all = Vec::new();
    for consumer in [INCREMENTS, FULL] {
        let mut truth = Truth {
            plan,
            bytes: vec![0; plan.len as usize],
            writes: [0; WRITERS],
        };
        let mut restored = vec![0; plan.len as usize];
        let mut last: Option<Head> = None;
        for (head, path) in generation::all(folder, consumer)? {
            let known = head.parent.is_none() || head.parent == last.map(|last| last.epoch);
            if !known {
                let what = format!("{}: its parent is not the one before", path.display());
                return Err(io::Error::other(what));
            }
            generation::restore(&path, &mut restored)?;
            let differ = truth.differ(&head, &restored);
            last = Some(head.clone());
            all.push(Restored { head, differ });
        }
    }
    Ok(all)
}
