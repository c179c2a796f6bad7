//! Logs of a store from anywhere: opening one ends, takes no more memory than a log of that device
//! may need, and either says why nothing is known or gives a store that works and that a second
//! recovery finds as it was.
//!
//! ```text
//!  input:  flags   header, 96 bytes   parts, each a length of 2 bytes and so many bytes
//!  log:            one block          each padded to whole blocks: the checkpoint, then batches
//! ```

use dirtymap::exchange::RunTable;
use dirtymap_store::{Device, Opened, Options, SimFolder, Store, forge_checksums};

const DEVICE: Device = Device {
    id: 0x2a,
    len: 4 << 20,
};
/// What is written at a time.
const BLOCK: usize = 4096;
/// Bytes of a header.
const HEADER: usize = 96;
/// The longest log that is made of an input.
const MAX_LOG: usize = 1 << 20;
/// In the flags: the checksums are left as they come.
const ROTTEN: u8 = 1;

fn options() -> Options {
    Options::new().hot(4).log_bytes(4 * BLOCK as u64)
}

/// The log that an input stands for.
fn unpack(input: &[u8]) -> Vec<u8> {
    let (flags, rest) = input.split_first().unwrap_or((&0, &[]));
    let (header, mut rest) = rest.split_at(rest.len().min(HEADER));
    let mut log = header.to_vec();
    log.resize(BLOCK, 0);
    while let Some((len, more)) = rest.split_first_chunk::<2>() {
        let len = usize::from(u16::from_le_bytes(*len)).min(more.len());
        log.extend_from_slice(&more[..len]);
        log.resize(log.len().next_multiple_of(BLOCK), 0);
        rest = &more[len..];
        if log.len() > MAX_LOG {
            break;
        }
    }
    // The room for batches that the header names.
    let named = header.get(64..80).and_then(|both| {
        let (checkpoint, room) = both.split_first_chunk::<8>()?;
        let checkpoint = u64::from_le_bytes(*checkpoint).checked_next_multiple_of(BLOCK as u64)?;
        let room = u64::from_le_bytes(room.try_into().ok()?);
        checkpoint.checked_add(room)?.checked_add(BLOCK as u64)
    });
    if let Some(len) = named.filter(|&len| len <= MAX_LOG as u64) {
        log.resize(log.len().max(len as usize), 0);
    }
    if flags & ROTTEN == 0 {
        forge_checksums(&mut log);
    }
    log
}

/// The input that stands for a log, whose checkpoint has these many bytes.
#[cfg(test)]
fn pack(log: &[u8]) -> Vec<u8> {
    let part = |bytes: &[u8]| {
        let len = bytes
            .iter()
            .rposition(|&byte| byte != 0)
            .map_or(0, |at| at + 1);
        let mut part = (len as u16).to_le_bytes().to_vec();
        part.extend_from_slice(&bytes[..len]);
        part
    };
    let mut input = vec![0];
    input.extend_from_slice(&log[..HEADER]);
    let blocks = log[BLOCK..].chunks(BLOCK).map(part);
    let blocks: Vec<Vec<u8>> = blocks.collect();
    let used = blocks.iter().rposition(|part| part.len() > 2);
    let used = &blocks[..used.map_or(0, |at| at + 1)];
    input.extend(used.concat());
    input
}

/// What each consumer has to copy.
fn dirty(store: &Store) -> Result<Vec<(String, RunTable)>, String> {
    let consumers = store.consumers().map_err(text)?.into_iter();
    let dirty = consumers.map(|consumer| {
        let increment = store.harvest(&consumer.name, consumer.committed);
        let increment = increment.map_err(text)?;
        let runs = increment.runs().clone();
        let last = runs.runs().last().map_or(0, |run| run.last().get());
        if last >= DEVICE.len {
            return Err(format!("{}: dirty past the end: {last:#x}", consumer.name));
        }
        increment.abort().map_err(text)?;
        Ok((consumer.name, runs))
    });
    dirty.collect()
}

fn text(error: impl ToString) -> String {
    error.to_string()
}

fn open(folder: &SimFolder) -> Result<Option<Store>, String> {
    match Store::open(folder.clone(), &DEVICE, &options()).map_err(text)? {
        Opened::Known(store) => Ok(Some(store)),
        Opened::Everything(_) => Ok(None),
    }
}

/// Opens the log that an input stands for. Says whether it was taken.
///
/// # Errors
/// What does not add up, if it was.
pub fn check_store_log(input: &[u8]) -> Result<bool, String> {
    let folder = SimFolder::with("log", unpack(input));
    let Some(store) = open(&folder)? else {
        return Ok(false);
    };
    let first = dirty(&store)?;
    drop(
        store
            .begin_write(0..1)
            .map_err(text)?
            .wait()
            .map_err(text)?,
    );
    store.close_extents().map_err(text)?;
    drop(store);
    let folder = SimFolder::with("log", folder.bytes("log").unwrap_or_default());
    let Some(store) = open(&folder)? else {
        return Err("a log that a store wrote is not known".to_owned());
    };
    let second = dirty(&store)?;
    for ((name, first), (_, second)) in first.iter().zip(&second) {
        let both: RunTable = first.into_iter().chain(second).collect();
        if both != *second || second.total_bytes() == 0 {
            return Err(format!("{name}: something is not dirty any more"));
        }
    }
    match first.len() == second.len() {
        true => Ok(true),
        false => Err("a consumer is gone".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)] // helpers of tests

    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    /// A store with two consumers, one of which has an increment, and open extents.
    fn log() -> Vec<u8> {
        let folder = SimFolder::new();
        let store = Store::create(folder.clone(), &DEVICE, &options()).unwrap();
        for (name, at) in [("one", 0), ("two", 0x8_0000)] {
            store.join(name).unwrap();
            store
                .harvest(name, None)
                .unwrap()
                .commit(|| Ok(()))
                .unwrap();
            for extent in 0..6 {
                let at = at + extent * 0x1_0000 + 0x3000;
                drop(store.begin_write(at..at + 0x2000).unwrap().wait().unwrap());
            }
        }
        let parent = store.consumers().unwrap()[0].committed;
        std::mem::forget(store.harvest("one", parent).unwrap());
        folder.bytes("log").unwrap()
    }

    #[test]
    fn a_log_of_a_store_is_taken() {
        let log = log();
        let input = pack(&log);
        assert_eq!(unpack(&input), log);
        assert_eq!(check_store_log(&input), Ok(true));
        let mut rotten = input;
        rotten[0] = ROTTEN;
        rotten[1 + 50] ^= 1;
        assert_eq!(check_store_log(&rotten), Ok(false));
    }

    #[test]
    fn the_first_inputs_of_the_fuzzer_are_taken() {
        let seed = include_bytes!("../../fuzz/corpus/store_log/seed-two-consumers");
        assert_eq!(check_store_log(seed), Ok(true));
    }

    proptest! {
        #[test]
        fn a_changed_log_is_refused_or_works(
            changes in vec((any::<prop::sample::Index>(), any::<u8>()), 0..12),
        ) {
            let mut input = pack(&log());
            for (at, byte) in changes {
                let at = at.index(input.len());
                input[at] = byte;
            }
            check_store_log(&input).map_err(TestCaseError::fail)?;
        }

        #[test]
        fn any_bytes_are_refused_or_work(input in vec(any::<u8>(), 0..400)) {
            check_store_log(&input).map_err(TestCaseError::fail)?;
        }
    }
}
