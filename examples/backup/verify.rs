//! Restores every generation, and compares it with what the trace wrote up to it.

use std::io;

use crate::copies::Copies;
use crate::generation::{self, Head};
use crate::rbd;
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
    /// Performs the writes up to those of `head`, and returns how many pages differ in either of
    /// the restored images.
    fn differ(&mut self, head: &Head, restored: [&[u8]; 2]) -> u64 {
        for thread in 0..WRITERS {
            for number in self.writes[thread]..head.writes[thread] {
                let (page, bytes) = self.plan.contents(thread, number);
                let at = (page * PAGE) as usize;
                self.bytes[at..at + PAGE as usize].copy_from_slice(&bytes);
            }
        }
        self.writes = head.writes;
        let pages = self.bytes.chunks(PAGE as usize).enumerate();
        let differs = |(number, truth): &(usize, &[u8])| {
            let at = number * PAGE as usize;
            restored
                .iter()
                .any(|one| one[at..at + truth.len()] != **truth)
        };
        pages.filter(differs).count() as u64
    }
}

/// Restores all generations of both consumers, from each of their forms.
pub(crate) fn run(plan: &Plan, copies: &Copies<'_>) -> io::Result<Vec<Restored>> {
    let mut all = Vec::new();
    for consumer in [INCREMENTS, FULL] {
        let mut truth = Truth {
            plan,
            bytes: vec![0; plan.len as usize],
            writes: [0; WRITERS],
        };
        let mut restored = vec![0; plan.len as usize];
        let mut as_rbd = restored.clone();
        let mut last: Option<Head> = None;
        let mut count = 0;
        for (head, path) in generation::all(copies.folder, consumer)? {
            let last_epoch = last.map(|last| last.epoch);
            let known = head.parent.is_none() || head.parent == last_epoch;
            if !known {
                let what = format!("{}: its parent is not the one before", path.display());
                return Err(io::Error::other(what));
            }
            generation::restore(&path, &mut restored)?;
            let other = generation::path(copies.folder, consumer, head.number, "rbd");
            rbd::restore(&other, last_epoch.as_deref(), &mut as_rbd)?;
            copies.check_object(&head, &path)?;
            let differ = truth.differ(&head, [&restored, &as_rbd]);
            count += 1;
            last = Some(head.clone());
            all.push(Restored { head, differ });
        }
        copies.check_count(consumer, count)?;
    }
    Ok(all)
}
