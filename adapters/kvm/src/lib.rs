//! The dirty logs of KVM: what a guest wrote joins the harvest of an address space of guest
//! physical addresses.
//!
//! ```text
//!  guest write ---> KVM's log of the slot, or ring of the processor ---+
//!                                                                      +--> one harvest,
//!  write by the VMM ---> mark --> marks of the area -------------------+    lease and abort
//! ```
//!
//! # Use
//! ```no_run
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! use dirtymap_kvm::{KvmLog, KvmMode};
//! use dirtymap::{Access, AddressSpace, Error, HarvestRequest, Iova, IovaRange, UserBitmap};
//! use std::sync::Arc;
//!
//! let vm = kvm_ioctls::Kvm::new()?.create_vm()?;
//! let ram = IovaRange::from_len(Iova::new(0), 64 << 20)?;
//! # let host_address = 0u64;
//! let log = Arc::new(KvmLog::new(&vm, KvmMode::Manual { initially_set: false })?);
//! // SAFETY: 64 MiB from here on are mapped for the guest alone, until the machine is gone.
//! unsafe { log.add_slot(0, ram, host_address) }?;
//!
//! let space = AddressSpace::with_source(log.page(), Arc::clone(&log))?;
//! space.map(ram, 0, Access::ReadWrite)?;
//! space.start_tracking()?; // from here on, every write of guest or VMM is reported
//!
//! let mut words = vec![0u64; 256];
//! let lease = space.harvest(&HarvestRequest::new(ram, log.page()), UserBitmap::new(&mut words));
//! let lease = lease?.sync()?;
//! for run in lease.runs() { /* send it */ }
//! lease.commit(); // dropped instead, all of it is dirty again, and KVM is not asked for it
//! # Ok(())
//! # }
//! ```
//! Without this module, a VMM reads each slot into a fresh `Vec`, reads its own bitmap, joins the
//! two, and masks the tail. When the third slot fails, it has already cleared the first two.
//!
//! # Modes
//! | [`KvmMode`] | what reads | what clears, and flushes | between the two |
//! |---|---|---|---|
//! | `Clearing` | KVM_GET_DIRTY_LOG | the same call | the page is kept in memory of the log |
//! | `Manual` | KVM_GET_DIRTY_LOG | KVM_CLEAR_DIRTY_LOG | the page is in the user bitmap |
//! | `Ring` | entries of the rings | KVM_RESET_DIRTY_RINGS | the page may be written unseen |
//!
//! * `Clearing`: the pages that the call reported, and that no request named or no lease recorded,
//!   stay pending in memory of the log.
//! * `Manual`: exactly the bits that were recorded are cleared, at most 65536 pages a call.
//! * `Ring`: the reset is the flush that the lease owes. A page may not be copied before it, which
//!   is why [`sync`](dirtymap::Lease::sync) waits for it.
//!
//! # The flush
//! The processors' TLBs may hold a translation that lets the guest write without a trace. By the
//! kernel's API documentation (`Documentation/virt/kvm/api.rst`: `KVM_GET_DIRTY_LOG`,
//! `KVM_CLEAR_DIRTY_LOG` and `KVM_CAP_DIRTY_LOG_RING`) a page is write-protected again by the call
//! that clears its bit, and for rings by the reset, which must come *before* the page is read. The
//! calls flush the TLBs before they return, so [`invalidate`](DirtySource::invalidate) has nothing
//! to do for logs, and resets the rings for rings.
//!
//! # Address spaces
//! Where KVM knows system management mode, it has two address spaces (bits 16 to 31 of the number
//! of a slot), and a slot of each may have the same guest physical addresses, backed by the same
//! memory or by other memory. An [`AddressSpace`](dirtymap::AddressSpace) has those addresses once.
//! A page of it is dirty when *any* slot at its address says so: the union. So a copy of a dirty
//! page takes the memory of every slot that is there.
//!
//! # Guarantees
//! * What KVM reports goes, before anything can fail, into memory that was reserved when the slot
//!   was added. An error in one slot loses no page of that slot or of another one.
//! * Bits above the end of a slot are never pages. A read that says "everything" (the first of
//!   `initially_set`) is within the slot.
//! * The page is that of the host, [`KvmLog::page`], not a literal 4096.
//! * Harvests do not allocate.
//! * An entry of a ring is checked before it is used, because the VMM can write there. An entry
//!   that names no page of its slot makes the whole slot dirty.
//!
//! # Limits
//! * A source is asked area by area, so each harvest looks at every ring once for each of its
//!   areas: areas times processors, at a load of one cache line each. It takes each entry once. Few
//!   large areas keep that small.
//! * Adding or removing a slot copies the list of slots, a pointer for each, because a harvest
//!   works on its list while slots are added and removed. KVM bounds the number of slots (32764 on
//!   x86).
//! * KVM's calls take locks of the kernel, and each slot has one here: unlike marks, harvests of a
//!   `KvmLog` wait for each other, for changes of slots, and for page faults of the guest.
//!   None waits for a processor to run.
//! * KVM_GET_DIRTY_LOG reads a whole slot, whatever the request. Bounded and parallel harvests ask
//!   for many parts: cut guest memory into slots of some GiB for them, or harvest it whole.
//! * A processor may log to a buffer of the hardware (PML) first. What it wrote is then reported by
//!   a later harvest. So the last harvest has to come after the stop of all processors.
//! * An area that is unmapped from the space is not taken from the guest. First
//!   [`remove_slot`](KvmLog::remove_slot), then [`unmap`](dirtymap::AddressSpace::unmap), which
//!   reports what was dirty at the end.
//! * Make one log for a virtual machine. Two logs would each clear pages that the other one has not
//!   reported.
//! * A child of `fork` has the rings of its parent, and KVM serves it no log: every call is refused
//!   there, with [`KvmError::OfAnotherProcess`].
//! * KVM does not report that other code has switched the flags of a slot: see
//!   [`renew_slot`](KvmLog::renew_slot).

#![cfg(target_os = "linux")]
#![cfg_attr(docsrs, feature(doc_cfg))]

mod error;
mod ioctl;
mod ring;
mod slot;
mod source;
#[cfg(test)]
mod tests;

pub use error::KvmError;
pub use kvm_ioctls;

#[cfg(any(doc, doctest))]
#[doc = include_str!("../docs/guide.md")]
pub mod guide {}

/// The examples of the README are tests.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

use kvm_bindings::{
    KVM_CAP_DIRTY_LOG_RING, KVM_CAP_DIRTY_LOG_RING_ACQ_REL, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
    KVM_DIRTY_LOG_INITIALLY_SET, KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE, kvm_enable_cap,
};
use kvm_ioctls::{VcpuFd, VmFd};

#[cfg(doc)]
use dirtymap::DirtySource;
use dirtymap::adapter::PlacedList;
use dirtymap::source::Stopped;
use dirtymap::sync::{Arc, AtomicU64, Mutex, MutexGuard, Ordering, lock};
use dirtymap::{Error, Granule, Iova, IovaRange};
use dirtymap_host as host;
use ioctl::{Kernel, Vm};
use ring::{Mapped, Ring};
use slot::Slot;

/// Pages of the largest slot of KVM.
const MAX_PAGES: u64 = (1 << 31) - 1;
/// Bytes of an entry of a ring.
const ENTRY: u32 = 16;

/// How KVM is asked what a guest wrote. See [the module](self) for what each means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum KvmMode {
    /// Reading the log clears it. Every KVM has this mode.
    Clearing,
    /// Reading does not clear the log. Exactly the pages that were recorded are cleared, piece by
    /// piece (KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2).
    Manual {
        /// Each slot begins as dirty as a whole, so that switching tracking on costs no time: pages
        /// are write-protected when they are first cleared. The first harvest reports everything,
        /// which a migration copies anyway.
        initially_set: bool,
    },
    /// Each processor writes the pages that it dirties to a ring (KVM_CAP_DIRTY_LOG_RING). The cost
    /// grows with the number of dirty pages, not with the size of memory.
    Ring {
        /// Entries of each ring: a power of two. KVM keeps 64 and a few of them for itself, and
        /// stops a processor whose ring is full: see [`KvmLog::drain_rings`].
        entries: u32,
    },
}

impl KvmMode {
    fn is_manual(self) -> bool {
        matches!(self, KvmMode::Manual { .. })
    }

    fn is_ring(self) -> bool {
        matches!(self, KvmMode::Ring { .. })
    }
}

/// The dirty state of the slots of one virtual machine, as a [`DirtySource`].
pub struct KvmLog {
    kernel: Box<dyn Kernel>,
    mode: KvmMode,
    page: Granule,
    /// Replaced as a whole (copy-on-write). The lock is held for a look at the list, never during a
    /// call of KVM.
    slots: Mutex<Arc<Slots>>,
    rings: Mutex<Vec<Ring>>,
    /// Whether writes are tracked. The lock is held while slots are added, removed or switched.
    tracking: Mutex<bool>,
    foreign: AtomicU64,
}

impl KvmLog {
    /// The log of `vm`, whose descriptor is duplicated. Sets the mode for the whole virtual
    /// machine; for rings, call it before the first processor of the machine is made.
    ///
    /// # Errors
    /// [`KvmError::Unsupported`], [`KvmError::BadRing`], or [`KvmError::Call`] with what KVM says
    /// to the mode.
    pub fn new(vm: &VmFd, mode: KvmMode) -> Result<Self, KvmError> {
        enable(vm, mode)?;
        let vm = Vm::new(vm).map_err(|error| KvmError::Call {
            call: "fcntl or madvise(MADV_WIPEONFORK)",
            error,
        })?;
        Ok(Self::with_kernel(Box::new(vm), mode, host::page()))
    }

    fn with_kernel(kernel: Box<dyn Kernel>, mode: KvmMode, page: Granule) -> Self {
        KvmLog {
            kernel,
            mode,
            page,
            slots: Mutex::default(),
            rings: Mutex::new(Vec::new()),
            tracking: Mutex::new(false),
            foreign: AtomicU64::new(0),
        }
    }

    /// The page of the host, in which KVM tracks.
    pub fn page(&self) -> Granule {
        self.page
    }

    /// The mode, as the log was made.
    pub fn mode(&self) -> KvmMode {
        self.mode
    }

    /// Gives the guest the memory from `host` on, an address of this process, at the guest physical
    /// addresses `guest`; or says that KVM has this very slot already, which is then left as it is,
    /// but for its log. Tracked at once if the log is.
    ///
    /// `slot` is KVM's number, with the address space in bits 16 to 31: 0 is what processors use,
    /// 1 is system management mode, where KVM has it (KVM_CAP_MULTI_ADDRESS_SPACE). Slots of
    /// different address spaces may overlap. A page is dirty when it is in the log of any slot
    /// that has it: see the [module](self#address-spaces). The slot must be writable, and not
    /// backed by a `guest_memfd`.
    ///
    /// # Errors
    /// In this order: [`KvmError::OfAnotherProcess`], [`KvmError::Unaligned`],
    /// [`KvmError::TooLarge`], [`KvmError::HostWraps`], [`KvmError::NoMemory`],
    /// [`KvmError::SlotTaken`], [`KvmError::Overlap`], then [`KvmError::SlotCall`]. Nothing has
    /// changed then.
    ///
    /// # Safety
    /// Until the slot is removed or the virtual machine is gone:
    /// * the memory stays mapped, and the process is prepared for a guest that reads and writes it;
    /// * no other code deletes the slot, or makes another one of its number: KVM writes as many
    ///   bits as its slot has pages.
    ///
    /// Other code that switches the flags of the slot does no harm to memory, and takes writes from
    /// the log: see [`renew_slot`](Self::renew_slot).
    pub unsafe fn add_slot(&self, slot: u32, guest: IovaRange, host: u64) -> Result<(), KvmError> {
        self.check_process()?;
        let new = Slot::new(slot, guest, host, self.page)?;
        let tracking = lock(&self.tracking);
        let slots = self.slots();
        if slots.find(slot).is_some() {
            return Err(KvmError::SlotTaken { slot });
        }
        let mut touched = slots.placed.touched(guest).map(|(other, _)| other);
        let in_the_way = |other: &&Arc<Slot>| !other.is_gone() && other.space() == new.space();
        if let Some(other) = touched.find(in_the_way) {
            let other = other.id;
            return Err(KvmError::Overlap { slot, guest, other });
        }
        drop(touched);
        // No thread takes entries until the slot is in the list: an entry of a slot that is not in
        // the list names no page.
        let _rings = self.rings();
        // SAFETY: by the caller.
        unsafe { new.set(&*self.kernel, *tracking) }?;
        self.change(&slots, Some(new));
        Ok(())
    }

    /// Takes the slot from the guest. What was dirty in it stays, for a harvest, or for the unmap
    /// of its area.
    ///
    /// Before the call, stop the processors, or agree with the guest that they do not write to the
    /// slot. What is written between the last read of the log and the end of the slot is lost with
    /// the log, because no call of KVM does both.
    ///
    /// # Errors
    /// [`KvmError::OfAnotherProcess`], [`KvmError::NoSlot`], or [`KvmError::SlotCall`] and the slot
    /// stays.
    pub fn remove_slot(&self, slot: u32) -> Result<(), KvmError> {
        self.check_process()?;
        let _tracking = lock(&self.tracking);
        let slots = self.slots();
        let Some(found) = slots.find(slot) else {
            return Err(KvmError::NoSlot { slot });
        };
        found.delete(&*self.kernel, self.mode)?;
        // From here on the rings get no more entries of the slot.
        self.reap();
        found.bury();
        self.change(&slots, None);
        Ok(())
    }

    /// Sets the flags of the slot again, and counts all of it as dirty: for a slot whose flags
    /// other code has switched off, or off and on again, by KVM_SET_USER_MEMORY_REGION.
    ///
    /// KVM drops its log of such a slot without an error. No call reads the flags of a slot, and a
    /// call that sets the flags which a slot already has does nothing. Without `renew_slot`,
    /// * a slot whose flags are *off* stops the harvest, unless the mode is [`KvmMode::Ring`], and
    ///   from that stop on counts as dirty as a whole;
    /// * a slot whose flags are *on again* is dirty as a whole with `initially_set`; else pages
    ///   that were written before, unless they are in a ring, and while the flags were off are
    ///   missing.
    ///
    /// # Errors
    /// [`KvmError::OfAnotherProcess`], [`KvmError::NoSlot`], [`KvmError::SlotCall`].
    pub fn renew_slot(&self, slot: u32) -> Result<(), KvmError> {
        self.check_process()?;
        let tracking = lock(&self.tracking);
        let slots = self.slots();
        let Some(found) = slots.find(slot) else {
            return Err(KvmError::NoSlot { slot });
        };
        // SAFETY: the slot was added, and not removed: its memory is the guest's.
        unsafe { found.set(&*self.kernel, *tracking) }?;
        // What is written from here on is in the log; what was written before is dirty now.
        found.dirty_all();
        Ok(())
    }

    /// Maps the ring of a processor of the same virtual machine.
    ///
    /// No call of KVM says to which virtual machine a processor belongs. A processor without rings,
    /// or with rings of another size, is refused here. A processor of another virtual machine whose
    /// rings have the same size is refused later: by each flush after entries were taken from it.
    ///
    /// # Errors
    /// [`KvmError::OfAnotherProcess`]; [`KvmError::NoRings`] unless the mode is
    /// [`KvmMode::Ring`]; [`KvmError::Call`]; [`KvmError::NoSuchRing`].
    pub fn add_vcpu(&self, vcpu: &VcpuFd) -> Result<(), KvmError> {
        self.check_process()?;
        let KvmMode::Ring { entries } = self.mode else {
            return Err(KvmError::NoRings);
        };
        let ring = Mapped::new(vcpu, entries, self.page)?;
        self.rings().push(Ring::new(Box::new(ring)));
        Ok(())
    }

    /// Empties the rings, and hands them back to KVM: for a processor that stopped with
    /// KVM_EXIT_DIRTY_RING_FULL, in the thread that runs it. The pages stay for the next harvest.
    /// Returns how many entries there were: 0 without rings.
    ///
    /// # Errors
    /// [`KvmError::OfAnotherProcess`]; [`KvmError::Call`], the pages are kept, and the call can be
    /// repeated; [`KvmError::ForeignRing`].
    pub fn drain_rings(&self) -> Result<usize, KvmError> {
        self.check_process()?;
        if !self.mode.is_ring() {
            return Ok(0);
        }
        let mut rings = self.rings();
        let taken = self.reap_all(&mut rings);
        self.reset(&rings)?;
        Ok(taken)
    }

    /// Entries of rings that named no page of a slot of this log. A slot that was not added here
    /// may have any number of them. If all slots were added, a count above 0 means that other code
    /// writes to the rings.
    pub fn foreign_entries(&self) -> u64 {
        // Relaxed: a count.
        self.foreign.load(Ordering::Relaxed)
    }

    /// Switches all slots, or none.
    fn switch(&self, on: bool) -> Result<(), KvmError> {
        self.check_process()?;
        let mut tracking = lock(&self.tracking);
        if *tracking == on {
            return Ok(());
        }
        let slots = self.slots();
        let live = || slots.placed.iter().filter(|slot| !slot.is_gone());
        for (done, slot) in live().enumerate() {
            if let Err(error) = self.switch_slot(slot, on) {
                for slot in live().take(done) {
                    // A slot that cannot be switched back stays as it is, which only costs time, or
                    // is dirty as a whole.
                    let _ = self.switch_slot(slot, !on);
                    if !on {
                        // What was written while it was off.
                        slot.dirty_all();
                    }
                }
                return Err(error);
            }
        }
        if on {
            self.discard(&slots)?;
        }
        *tracking = on;
        Ok(())
    }

    fn switch_slot(&self, slot: &Slot, on: bool) -> Result<(), KvmError> {
        if on || self.mode.is_ring() {
            // SAFETY: the slot was added, and not removed: its memory is the guest's.
            unsafe { slot.set(&*self.kernel, on) }
        } else {
            // SAFETY: the same.
            unsafe { slot.stop(&*self.kernel, self.mode) }
        }
    }

    /// Forgets what was dirty before tracking began. Writes from now on are not forgotten: pending
    /// pages are protected again, and the rings are not read meanwhile.
    fn discard(&self, slots: &Slots) -> Result<(), KvmError> {
        let mut rings = self.rings();
        if self.mode.is_ring() {
            self.reap_all(&mut rings);
            self.reset(&rings)?;
        }
        slots.placed.iter().for_each(|slot| slot.forget());
        Ok(())
    }

    /// Takes what is in the rings.
    ///
    /// Pages are pending before their entries are handed back, and both happen under the lock of
    /// the rings. A reset takes that lock too, so it covers every page that was pending when it
    /// began: a harvest that takes one owes a reset that begins later.
    fn reap(&self) {
        if self.mode.is_ring() {
            self.reap_all(&mut self.rings());
        }
    }

    fn reap_all(&self, rings: &mut [Ring]) -> usize {
        let slots = self.slots();
        let keep = |slot: u32, page: u64| {
            if !slots.find(slot).is_some_and(|slot| slot.keep(page)) {
                // Relaxed: a count.
                self.foreign.fetch_add(1, Ordering::Relaxed);
            }
        };
        rings.iter_mut().map(|ring| ring.reap(keep)).sum()
    }

    /// Hands entries that were taken back to KVM, which protects their pages. `rings` says that no
    /// other thread takes any meanwhile. KVM takes back those of its own processors: a ring with
    /// entries that are left is of another virtual machine.
    fn reset(&self, rings: &[Ring]) -> Result<(), KvmError> {
        let call = "KVM_RESET_DIRTY_RINGS";
        self.kernel
            .reset_rings()
            .map_err(|error| KvmError::Call { call, error })?;
        match rings.iter().position(|ring| !ring.is_taken_back()) {
            Some(ring) => Err(KvmError::ForeignRing { ring }),
            None => Ok(()),
        }
    }

    /// Refuses a child of `fork`, before any lock is taken: another thread of the parent may have
    /// held it, and no thread of the child gives it back.
    fn check_process(&self) -> Result<(), KvmError> {
        match self.kernel.of_another_process() {
            Some(maker) => Err(KvmError::OfAnotherProcess { maker }),
            None => Ok(()),
        }
    }

    /// As `check_process`, for a harvest that begins at `at`.
    fn check_process_at(&self, at: Iova) -> Result<(), Stopped> {
        self.check_process().map_err(|error| Stopped {
            at,
            error: Error::source_failed(error),
        })
    }

    fn rings(&self) -> MutexGuard<'_, Vec<Ring>> {
        lock(&self.rings)
    }

    fn slots(&self) -> Arc<Slots> {
        Arc::clone(&lock(&self.slots))
    }

    /// Replaces the list, by one with `new`, and without the slots that were removed and have no
    /// pending page.
    fn change(&self, slots: &Slots, new: Option<Slot>) {
        let left = slots.placed.iter().filter(|slot| !slot.is_done());
        let new = Slots::new(left.map(Arc::clone).chain(new.map(Arc::new)).collect());
        *lock(&self.slots) = Arc::new(new);
    }
}

impl std::fmt::Debug for KvmLog {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("KvmLog")
            .field("mode", &self.mode)
            .field("page", &self.page)
            .finish_non_exhaustive()
    }
}

/// The slots of a log at one time.
#[derive(Default)]
struct Slots {
    placed: PlacedList<Slot>,
    /// Those that KVM knew when the list was made, ascending by number: there is one of each.
    by_id: Vec<Arc<Slot>>,
}

impl Slots {
    fn new(slots: Vec<Arc<Slot>>) -> Self {
        let live = slots.iter().filter(|slot| !slot.is_gone());
        let mut by_id: Vec<_> = live.map(Arc::clone).collect();
        by_id.sort_unstable_by_key(|slot| slot.id);
        let placed = PlacedList::new(slots);
        Slots { placed, by_id }
    }

    /// The slot of this number that KVM knows.
    fn find(&self, id: u32) -> Option<&Arc<Slot>> {
        let place = self.by_id.binary_search_by(|slot| {
            #[cfg(test)]
            host::counted::one();
            slot.id.cmp(&id)
        });
        let found = self.by_id.get(place.ok()?)?;
        (!found.is_gone()).then_some(found)
    }
}

/// Sets the mode of the virtual machine.
fn enable(vm: &VmFd, mode: KvmMode) -> Result<(), KvmError> {
    let supported = |capability: u32| vm.check_extension_raw(capability.into()).cast_unsigned();
    let enable = |cap: u32, value: u64, call: &'static str| {
        let mut request = kvm_enable_cap {
            cap,
            ..Default::default()
        };
        request.args[0] = value;
        let error = |error: kvm_ioctls::Error| KvmError::Call {
            call,
            error: error.into(),
        };
        vm.enable_cap(&request).map_err(error)
    };
    let manual = KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2;
    const MANUAL: &str = "KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2";
    match mode {
        // Another part of the VMM may have set it.
        KvmMode::Clearing if supported(manual) != 0 => enable(manual, 0, MANUAL),
        KvmMode::Clearing => Ok(()),
        KvmMode::Manual { initially_set } => {
            let mut bits = KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE;
            if initially_set {
                bits |= KVM_DIRTY_LOG_INITIALLY_SET;
            }
            if supported(manual) & bits != bits {
                return Err(KvmError::Unsupported { capability: MANUAL });
            }
            enable(manual, bits.into(), MANUAL)
        }
        KvmMode::Ring { entries } => {
            const RING: &str = "KVM_CAP_DIRTY_LOG_RING";
            let capabilities = [KVM_CAP_DIRTY_LOG_RING_ACQ_REL, KVM_CAP_DIRTY_LOG_RING];
            let Some((cap, bytes)) = capabilities
                .into_iter()
                .map(|cap| (cap, supported(cap)))
                .find(|(_, bytes)| *bytes != 0)
            else {
                return Err(KvmError::Unsupported { capability: RING });
            };
            let limit = bytes / ENTRY;
            if !entries.is_power_of_two() || entries > limit {
                return Err(KvmError::BadRing { entries, limit });
            }
            enable(cap, u64::from(entries) * u64::from(ENTRY), RING)
        }
    }
}
