//! A guest of twelve bytes, which writes to the pages it is told to.

use std::io;
use std::sync::Arc;

use dirtymap::IovaRange;
use dirtymap_kvm::{KvmError, KvmLog, KvmMode};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};

use super::memory::Shared;

/// Increments a byte in each of CX pages, from segment BX on, DX paragraphs apart; then stops.
const CODE: [u8; 12] = [
    0x8e, 0xc3, // mov es, bx
    0x26, 0xfe, 0x06, 0x00, 0x00, // inc byte [es:0]
    0x01, 0xd3, // add bx, dx
    0xe2, 0xf5, // loop
    0xf4, // hlt
];
/// The page that holds the program. No other writer may use it.
pub(crate) const CODE_PAGE: u64 = 1;
/// Pages that a processor in real mode reaches.
pub(crate) const REACH: u64 = 256;
/// KVM's exit for a ring that is full.
const RING_FULL: u32 = 31;

/// The guest could not be made, or stopped for another reason than its end.
#[derive(Debug, thiserror::Error)]
pub(crate) enum GuestError {
    #[error("KVM: {0}")]
    Kvm(#[from] kvm_ioctls::Error),
    #[error("KVM: {0}")]
    Log(#[from] KvmError),
    #[error("the guest stopped: {0}")]
    Exit(String),
    #[error("the memory of the guest: {0}")]
    Memory(#[from] io::Error),
}

/// A processor and its virtual machine. The fields go in this order.
pub(crate) struct Guest {
    vcpu: VcpuFd,
    pub(crate) log: Arc<KvmLog>,
    _vm: VmFd,
    page: u64,
    /// Outlives the machine.
    _memory: Arc<Shared>,
}

impl Guest {
    /// A guest over `memory`, whose start is guest physical address 0, in the given slots. `None`,
    /// and why, where there is no KVM or not this mode of it.
    pub(crate) fn new(
        memory: &Arc<Shared>,
        slots: &[(u32, IovaRange)],
        mode: KvmMode,
    ) -> Result<Result<Guest, String>, GuestError> {
        if !cfg!(target_arch = "x86_64") {
            return Ok(Err("the guest is a program for x86".into()));
        }
        let kvm = match Kvm::new() {
            Ok(kvm) => kvm,
            Err(error) => return Ok(Err(format!("/dev/kvm cannot be used: {error}"))),
        };
        let vm = kvm.create_vm()?;
        let log = match KvmLog::new(&vm, mode) {
            Ok(log) => Arc::new(log),
            Err(error) => return Ok(Err(format!("{mode:?}: {error}"))),
        };
        let vcpu = vm.create_vcpu(0)?;
        if matches!(mode, KvmMode::Ring { .. }) {
            log.add_vcpu(&vcpu)?;
        }
        let page = log.page().bytes();
        for &(slot, range) in slots {
            let host = memory.address() + range.start().get();
            // SAFETY: the memory is mapped until the machine is gone, for `Guest` holds it; it is
            // accessed by atomics only. No other code has the machine, so no other code changes its
            // slots.
            unsafe { log.add_slot(slot, range, host) }?;
        }
        let words = memory.words();
        for (nth, word) in CODE.chunks(8).enumerate() {
            let byte = |nth| word.get(nth).copied().unwrap_or(0);
            let value = u64::from_le_bytes(std::array::from_fn(byte));
            words[(CODE_PAGE * page / 8) as usize + nth]
                .store(value, std::sync::atomic::Ordering::Relaxed);
        }
        let mut sregs = vcpu.get_sregs()?;
        sregs.cs.base = 0;
        sregs.cs.selector = 0;
        vcpu.set_sregs(&sregs)?;
        Ok(Ok(Guest {
            vcpu,
            log,
            _vm: vm,
            page,
            _memory: memory.clone(),
        }))
    }

    /// The guest writes to `n` pages from page `first` on, `step` apart. All of them lie below page
    /// 256.
    pub(crate) fn write(&mut self, first: u64, n: u64, step: u64) -> Result<(), GuestError> {
        let mut regs = self.vcpu.get_regs()?;
        regs.rip = CODE_PAGE * self.page;
        regs.rflags = 2;
        regs.rbx = first * self.page / 16;
        regs.rcx = n;
        regs.rdx = step * self.page / 16;
        self.vcpu.set_regs(&regs)?;
        loop {
            match self.vcpu.run()? {
                VcpuExit::Hlt => return Ok(()),
                // No harvest runs at this moment.
                VcpuExit::Unsupported(RING_FULL) => {
                    self.log.drain_rings()?;
                }
                exit => return Err(GuestError::Exit(format!("{exit:?}"))),
            }
        }
    }
}
