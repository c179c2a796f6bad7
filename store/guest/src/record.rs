//! A store at work, with a mark after each call that acknowledged a write or a commit.

use std::path::Path;

use dirtymap_store::{DirFolder, Store};

use crate::{CONSUMERS, DEVICE, Outcome, PAGE, PAGES, State, call, options};

const STEPS: u64 = 240;

/// Numbers that look random (splitmix64).
struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        (mixed ^ (mixed >> 31)) % bound
    }
}

/// The states, and the number of the last one, which is its mark.
struct Marks(Vec<State>);

impl Marks {
    fn set(&mut self, state: &State) -> Outcome {
        let mark = self.0.len().to_string();
        self.0.push(state.clone());
        call("dmsetup", &["message", "recorded", "0", "mark", &mark])
    }
}

/// Works in `folder`, and returns the acknowledged state at each mark.
pub(crate) fn run(folder: &str) -> Outcome<Vec<State>> {
    let store = Store::create(
        DirFolder::new(Path::new(folder).join("store"))?,
        &DEVICE,
        &options(),
    )?;
    let mut state = State::default();
    for name in CONSUMERS {
        store.join(name)?;
    }
    let mut marks = Marks(Vec::new());
    marks.set(&state)?;
    let mut random = Random(1);
    for _ in 0..STEPS {
        let which = random.below(2) as usize;
        match random.below(16) {
            0 => commit(&store, &mut state, which, &mut marks)?,
            1 => store.harvest(CONSUMERS[which], None)?.abort()?,
            2 => store.close_extents()?,
            3 => {
                // Two writes that wait together.
                let pages = [random.below(PAGES), random.below(PAGES)];
                let intents = pages.map(|page| store.begin_write(page * PAGE..(page + 1) * PAGE));
                for (page, intent) in pages.into_iter().zip(intents) {
                    let write = intent?.wait()?;
                    wrote(&mut state, page);
                    marks.set(&state)?;
                    drop(write);
                }
            }
            _ => {
                // Most writes are to few extents.
                let bound = 1 + random.below(PAGES);
                let page = random.below(bound);
                let write = store.begin_write(page * PAGE..(page + 1) * PAGE)?.wait()?;
                wrote(&mut state, page);
                marks.set(&state)?;
                drop(write);
            }
        }
    }
    let stats = store.stats();
    println!(
        "guest: {} marks, {} batches, {} logs, {} extents opened, {} closed",
        marks.0.len(),
        stats.batches,
        stats.switches,
        stats.opened,
        stats.closed
    );
    Ok(marks.0)
}

fn wrote(state: &mut State, page: u64) {
    for known in state {
        known.dirty.insert(page);
    }
}

/// The next increment of a consumer, with a write between the harvest and the commit.
fn commit(store: &Store, state: &mut State, which: usize, marks: &mut Marks) -> Outcome {
    let parent = state[which].committed;
    let increment = store.harvest(CONSUMERS[which], parent)?;
    let taken = std::mem::take(&mut state[which].dirty);
    let page = taken.first().copied().unwrap_or(7);
    drop(store.begin_write(page * PAGE..(page + 1) * PAGE)?.wait()?);
    // Until the commit, the consumer has what it had, and the page.
    state[which].dirty.clone_from(&taken);
    wrote(state, page);
    marks.set(state)?;
    state[which].committed = Some(increment.commit(|| Ok(()))?);
    state[which].dirty.retain(|dirty| *dirty == page);
    marks.set(state)
}
