//! A real-mode guest of a few bytes, under the KVM of this machine.
#![allow(dead_code, unreachable_pub, clippy::unwrap_used)] // each test uses a part

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::sync::Arc;

use dirtymap::{Access, AddressSpace, HarvestRequest, Iova, IovaRange, UserBitmap};
use dirtymap_kvm::{KvmLog, KvmMode};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};

use crate::common_skip::skip;

/// Increments a byte in each of CX pages, from segment BX on, DX paragraphs apart. Then it halts.
const CODE: [u8; 12] = [
    0x8e, 0xc3, // mov es, bx
    0x26, 0xfe, 0x06, 0x00, 0x00, // inc byte [es:0]
    0x01, 0xd3, // add bx, dx
    0xe2, 0xf5, // loop
    0xf4, // hlt
];
/// The page that holds the code.
const CODE_PAGE: u64 = 1;

/// KVM's exit for a ring that is full.
pub const RING_FULL: u32 = 31;

pub const MODES: [KvmMode; 4] = [
    KvmMode::Clearing,
    KvmMode::Manual {
        initially_set: false,
    },
    KvmMode::Manual {
        initially_set: true,
    },
    KvmMode::Ring { entries: 1024 },
];

/// Slots of the guest: number, first page, pages. Neither length is a multiple of 64 pages.
pub const SLOTS: [(u32, u64, u64); 2] = [(0, 0, 90), (5, 100, 130)];

/// The KVM of this machine, or `None` after a message with the reason.
pub fn kvm() -> Option<Kvm> {
    match Kvm::new() {
        Ok(kvm) if cfg!(target_arch = "x86_64") => Some(kvm),
        Ok(_) => {
            skip("the guest of this test is of x86");
            None
        }
        Err(error) => {
            skip(format_args!("/dev/kvm cannot be used: {error}"));
            None
        }
    }
}

/// Memory of a slot, page-aligned.
pub struct Memory(*mut u8, Layout);

impl Memory {
    fn new(bytes: u64, page: u64) -> Self {
        let layout = Layout::from_size_align(bytes as usize, page as usize).unwrap();
        // SAFETY: the layout has a size.
        let memory = unsafe { alloc_zeroed(layout) };
        assert!(!memory.is_null());
        Memory(memory, layout)
    }

    pub fn address(&self) -> u64 {
        self.0.addr() as u64
    }

    /// The byte at `offset`. The guest does not run meanwhile.
    pub fn byte(&self, offset: u64) -> u8 {
        assert!((offset as usize) < self.1.size());
        // SAFETY: inside the block.
        let byte = unsafe { self.0.add(offset as usize) };
        // SAFETY: inside the block, which is initialized.
        unsafe { byte.read_volatile() }
    }

    pub fn write(&self, offset: u64, bytes: &[u8]) {
        assert!(offset as usize + bytes.len() <= self.1.size());
        // SAFETY: inside the block.
        let to = unsafe { self.0.add(offset as usize) };
        // SAFETY: inside the block, which does not overlap.
        unsafe { to.copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) };
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: as it was allocated.
        unsafe { dealloc(self.0, self.1) };
    }
}

/// A guest, tracked. Fields are dropped in this order: the memory last.
pub struct Guest {
    pub space: AddressSpace,
    pub log: Arc<KvmLog>,
    pub vcpu: VcpuFd,
    pub vm: VmFd,
    pub memory: Vec<Memory>,
    pub page: u64,
}

impl Guest {
    /// `None` if this KVM does not have the mode.
    pub fn new(kvm: &Kvm, mode: KvmMode) -> Option<Guest> {
        let vm = kvm.create_vm().unwrap();
        let log = match KvmLog::new(&vm, mode) {
            Ok(log) => Arc::new(log),
            Err(error) => {
                skip(format_args!("{mode:?}: {error}"));
                return None;
            }
        };
        let vcpu = vm.create_vcpu(0).unwrap();
        if matches!(mode, KvmMode::Ring { .. }) {
            log.add_vcpu(&vcpu).unwrap();
        }
        let page = log.page().bytes();
        let space = AddressSpace::with_source(log.page(), Arc::clone(&log)).unwrap();
        let mut memory = Vec::new();
        for (slot, first, n) in SLOTS {
            let block = Memory::new(n * page, page);
            let range = IovaRange::from_len(Iova::new(first * page), n * page).unwrap();
            // SAFETY: the block belongs to the guest and is dropped after the virtual machine. No
            // other code touches slots, except for the test that deletes one.
            unsafe { log.add_slot(slot, range, block.address()) }.unwrap();
            space.map(range, 0, Access::ReadWrite).unwrap();
            memory.push(block);
        }
        memory[0].write(CODE_PAGE * page, &CODE);
        let mut sregs = vcpu.get_sregs().unwrap();
        sregs.cs.base = 0;
        sregs.cs.selector = 0;
        vcpu.set_sregs(&sregs).unwrap();
        space.start_tracking().unwrap();
        Some(Guest {
            space,
            log,
            vcpu,
            vm,
            memory,
            page,
        })
    }

    /// The guest writes `n` pages from `first` on, `step` apart. Returns how often a full ring
    /// stopped it.
    pub fn write(&mut self, first: u64, n: u64, step: u64) -> u32 {
        let mut regs = self.vcpu.get_regs().unwrap();
        regs.rip = CODE_PAGE * self.page;
        regs.rflags = 2;
        regs.rbx = first * self.page / 16;
        regs.rcx = n;
        regs.rdx = step * self.page / 16;
        self.vcpu.set_regs(&regs).unwrap();
        let mut full = 0;
        loop {
            match self.vcpu.run().unwrap() {
                VcpuExit::Hlt => return full,
                VcpuExit::Unsupported(RING_FULL) => {
                    full += 1;
                    assert!(self.log.drain_rings().unwrap() > 0);
                }
                exit => panic!("{exit:?}"),
            }
        }
    }

    pub fn pages(&self, first: u64, n: u64) -> IovaRange {
        IovaRange::from_len(Iova::new(first * self.page), n * self.page).unwrap()
    }

    pub fn request(&self, first: u64, n: u64) -> HarvestRequest<'static> {
        HarvestRequest::new(self.pages(first, n), self.log.page())
    }

    /// Harvests `n` pages from `first` on and commits. Returns the dirty ones.
    pub fn harvest(&self, first: u64, n: u64) -> Vec<u64> {
        let mut words = [0u64; 4];
        let lease = self
            .space
            .harvest(&self.request(first, n), UserBitmap::new(&mut words))
            .unwrap();
        let lease = lease.sync().unwrap();
        let runs: Vec<_> = lease.runs().collect();
        lease.commit();
        let page = |iova: Iova| iova.get() / self.page;
        runs.iter()
            .flat_map(|run| page(run.start())..=page(run.last()))
            .collect()
    }

    /// The same for both slots.
    pub fn harvest_all(&self) -> Vec<u64> {
        let mut all = self.harvest(0, 90);
        all.extend(self.harvest(100, 130));
        all
    }
}

/// Runs `test` in every mode that this KVM has.
pub fn in_every_mode(test: impl Fn(KvmMode, Guest)) {
    let Some(kvm) = kvm() else { return };
    for mode in MODES {
        if let Some(guest) = Guest::new(&kvm, mode) {
            if mode == MODES[2] {
                // In this mode the first harvest reports everything.
                assert_eq!(guest.harvest_all().len(), 220);
            }
            test(mode, guest);
        }
    }
}
