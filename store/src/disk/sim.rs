//! A folder that crashes: what was not flushed is there afterwards or not, in any part.

use std::collections::BTreeMap;
use std::io;

use dirtymap::sync::{Arc, InnerLock, lock_inner};

use super::{Disk, Folder};

/// What a disk writes in one piece, unless it tears it.
const SECTOR: usize = 512;
/// Up to so many sectors that differ are chosen one by one; of more, a pattern is.
const FEW: usize = 3;

/// A simulated folder that loses, reorders and tears what was not flushed. With the feature
/// `test-kit`.
///
/// Each write, flush, creation, rename and [`step`](SimFolder::step) is a step. At the step that
/// [`crash_at`](SimFolder::crash_at) names, and from then on, everything fails. [`crash`] makes the
/// folder that a system finds when it comes back.
///
/// ```
/// use dirtymap_store::{Device, Landed, Opened, Options, SimFolder, Store};
///
/// /// Nothing that was not flushed has landed.
/// struct Nothing;
/// impl Landed for Nothing {
///     fn pick(&mut self, _: u32) -> u32 {
///         0
///     }
/// }
///
/// # fn main() -> Result<(), dirtymap_store::Error> {
/// let device = Device { id: 1, len: 1 << 20 };
/// let folder = SimFolder::new();
/// let store = Store::create(folder.clone(), &device, &Options::new())?;
/// store.join("backup")?;
/// folder.crash_at(folder.steps() + 1); // in the middle of the next batch
/// assert!(store.join("other").is_err());
///
/// let found = folder.crash(&mut Nothing);
/// let Opened::Known(store) = Store::open(found, &device, &Options::new())? else { panic!() };
/// assert_eq!(store.consumers()?.len(), 1);
/// # Ok(())
/// # }
/// ```
///
/// [`crash`]: SimFolder::crash
#[derive(Clone, Debug, Default)]
pub struct SimFolder(Arc<InnerLock<State>>);

/// Decides what a crash leaves.
pub trait Landed {
    /// One of `ways` ways, below `ways`. Way 0 loses what can be lost.
    fn pick(&mut self, ways: u32) -> u32;
}

#[derive(Debug, Default)]
struct State {
    files: Vec<File>,
    names: BTreeMap<String, usize>,
    durable_names: BTreeMap<String, usize>,
    /// What has changed in names since the last sync: the names after each change.
    changes: Vec<BTreeMap<String, usize>>,
    steps: u64,
    crash_at: Option<u64>,
    locked: bool,
}

#[derive(Debug, Default)]
struct File {
    now: Vec<u8>,
    durable: Vec<u8>,
}

impl State {
    /// A step. Fails from the crash on; the step of the crash itself may have had any part of its
    /// effect, which `effect` puts where unflushed things are.
    fn step(&mut self, effect: impl FnOnce(&mut State)) -> io::Result<()> {
        self.check()?;
        self.steps += 1;
        effect(self);
        self.check()
    }

    fn check(&self) -> io::Result<()> {
        match self.crash_at {
            Some(at) if self.steps >= at => Err(io::Error::other("the system has crashed")),
            _ => Ok(()),
        }
    }

    fn rename(&mut self, change: impl FnOnce(&mut BTreeMap<String, usize>)) {
        change(&mut self.names);
        self.changes.push(self.names.clone());
    }
}

impl SimFolder {
    /// An empty folder.
    pub fn new() -> Self {
        SimFolder::default()
    }

    /// How many steps there were.
    pub fn steps(&self) -> u64 {
        lock_inner(&self.0).steps
    }

    /// Crashes in the middle of the step with this number; the first has the number 1.
    pub fn crash_at(&self, step: u64) {
        lock_inner(&self.0).crash_at = Some(step);
    }

    /// A step of the program under test that is none of the folder: a crash point.
    ///
    /// # Errors
    /// After the crash.
    pub fn step(&self) -> io::Result<()> {
        lock_inner(&self.0).step(|_| ())
    }

    /// Whether the crash has happened.
    pub fn has_crashed(&self) -> bool {
        lock_inner(&self.0).check().is_err()
    }

    /// The folder that is found after a crash now: with all that was flushed, and of the rest what
    /// `landed` picks. A sector may be torn.
    pub fn crash(&self, landed: &mut impl Landed) -> SimFolder {
        let state = lock_inner(&self.0);
        let changes = landed.pick(state.changes.len() as u32 + 1) as usize;
        let names = match changes.checked_sub(1) {
            None => &state.durable_names,
            Some(last) => &state.changes[last],
        };
        let mut files = Vec::new();
        let mut found = BTreeMap::new();
        for (name, file) in names {
            found.insert(name.clone(), files.len());
            let durable = state.files[*file].crash(landed);
            files.push(File {
                now: durable.clone(),
                durable,
            });
        }
        SimFolder(Arc::new(InnerLock::new(State {
            files,
            durable_names: found.clone(),
            names: found,
            ..State::default()
        })))
    }

    /// Changes a byte of a file: what a disk does that rots.
    pub fn rot(&self, name: &str, offset: u64) {
        let mut state = lock_inner(&self.0);
        let state = &mut *state;
        let Some(file) = state.names.get(name) else {
            return;
        };
        let file = &mut state.files[*file];
        for bytes in [&mut file.now, &mut file.durable] {
            if let Some(byte) = bytes.get_mut(offset as usize) {
                *byte = !*byte;
            }
        }
    }

    /// The bytes of a file, if there is one.
    pub fn bytes(&self, name: &str) -> Option<Vec<u8>> {
        let state = lock_inner(&self.0);
        let file = state.names.get(name)?;
        Some(state.files[*file].now.clone())
    }

    /// A folder with one file, all of it durable.
    pub fn with(name: &str, bytes: Vec<u8>) -> Self {
        let names = BTreeMap::from([(name.to_owned(), 0)]);
        SimFolder(Arc::new(InnerLock::new(State {
            files: vec![File {
                now: bytes.clone(),
                durable: bytes,
            }],
            names: names.clone(),
            durable_names: names,
            ..State::default()
        })))
    }
}

impl File {
    /// The bytes that are there after a crash.
    fn crash(&self, landed: &mut impl Landed) -> Vec<u8> {
        let mut found = self.durable.clone();
        let sector = |bytes: &[u8], at: usize| -> [u8; SECTOR] {
            let mut sector = [0; SECTOR];
            let some = bytes.get(at * SECTOR..).unwrap_or(&[]);
            let len = some.len().min(SECTOR);
            sector[..len].copy_from_slice(&some[..len]);
            sector
        };
        let count = self.now.len().div_ceil(SECTOR);
        let differ = |at: &usize| sector(&self.now, *at) != sector(&self.durable, *at);
        let differing: Vec<usize> = (0..count).filter(differ).collect();
        let pattern = if differing.len() > FEW {
            Some(landed.pick(7))
        } else {
            None
        };
        let last = differing.len().saturating_sub(1);
        // The length changes with the first sector that lands, or at all.
        if self.now.len() != self.durable.len() && (differing.is_empty() || pattern == Some(1)) {
            found.resize(self.now.len(), 0);
        }
        for (number, at) in differing.into_iter().enumerate() {
            let way = match pattern {
                None | Some(6) => landed.pick(3),
                Some(0) => 0,
                Some(1) => 1,
                Some(2) => u32::from(number != 0),
                Some(3) => u32::from(number != last),
                Some(4) => u32::from(number == 0),
                Some(_) => u32::from(number == last),
            };
            let torn = match way {
                0 => continue,
                1 => SECTOR,
                // All but the last byte that has changed.
                _ => {
                    let (new, old) = (sector(&self.now, at), sector(&self.durable, at));
                    (0..SECTOR)
                        .rev()
                        .find(|byte| new[*byte] != old[*byte])
                        .unwrap_or(0)
                }
            };
            let end = self.now.len().min(at * SECTOR + torn);
            if found.len() < end {
                found.resize(end, 0);
            }
            found[at * SECTOR..end].copy_from_slice(&self.now[at * SECTOR..end]);
        }
        found
    }
}

impl Folder for SimFolder {
    fn open(&mut self, name: &str) -> io::Result<Option<Box<dyn Disk>>> {
        let state = lock_inner(&self.0);
        state.check()?;
        let file = state.names.get(name).copied();
        Ok(file.map(|file| {
            let folder = self.clone();
            Box::new(SimDisk { folder, file }) as Box<dyn Disk>
        }))
    }

    fn create(&mut self, name: &str) -> io::Result<Box<dyn Disk>> {
        let mut state = lock_inner(&self.0);
        state.step(|state| {
            let file = state.files.len();
            state.files.push(File::default());
            state.rename(|names| {
                names.insert(name.to_owned(), file);
            });
        })?;
        let file = state.files.len() - 1;
        let folder = self.clone();
        Ok(Box::new(SimDisk { folder, file }))
    }

    fn rename(&mut self, from: &str, to: &str) -> io::Result<()> {
        let mut state = lock_inner(&self.0);
        if !state.names.contains_key(from) {
            return Err(io::ErrorKind::NotFound.into());
        }
        state.step(|state| {
            state.rename(|names| {
                let file = names.remove(from);
                names.extend(file.map(|file| (to.to_owned(), file)));
            });
        })
    }

    fn sync(&mut self) -> io::Result<()> {
        let mut state = lock_inner(&self.0);
        state.step(|_| ())?;
        state.changes.clear();
        state.durable_names = state.names.clone();
        Ok(())
    }

    fn lock(&mut self) -> io::Result<bool> {
        let mut state = lock_inner(&self.0);
        Ok(!std::mem::replace(&mut state.locked, true))
    }
}

#[derive(Debug)]
struct SimDisk {
    folder: SimFolder,
    file: usize,
}

impl Disk for SimDisk {
    fn read_at(&self, offset: u64, bytes: &mut [u8]) -> io::Result<usize> {
        let state = lock_inner(&self.folder.0);
        state.check()?;
        let there = state.files[self.file].now.get(offset as usize..);
        let there = there.unwrap_or(&[]);
        let len = there.len().min(bytes.len());
        bytes[..len].copy_from_slice(&there[..len]);
        Ok(len)
    }

    fn write_at(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let mut state = lock_inner(&self.folder.0);
        state.step(|state| {
            let now = &mut state.files[self.file].now;
            let end = offset as usize + bytes.len();
            if now.len() < end {
                now.resize(end, 0);
            }
            now[offset as usize..end].copy_from_slice(bytes);
        })
    }

    fn flush(&mut self) -> io::Result<()> {
        let mut state = lock_inner(&self.folder.0);
        state.step(|_| ())?;
        let file = &mut state.files[self.file];
        file.durable = file.now.clone();
        Ok(())
    }

    fn len(&self) -> io::Result<u64> {
        let state = lock_inner(&self.folder.0);
        state.check()?;
        Ok(state.files[self.file].now.len() as u64)
    }
}
