//! The calls of KVM, and nothing else: what is unsafe about this adapter is here and in
//! [`ring`](super::ring).

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use kvm_bindings::{
    KVMIO, kvm_clear_dirty_log, kvm_clear_dirty_log__bindgen_ty_1, kvm_dirty_log,
    kvm_dirty_log__bindgen_ty_1, kvm_userspace_memory_region,
};
use kvm_ioctls::VmFd;

use dirtymap_host::Maker;

const SET_USER_MEMORY_REGION: libc::Ioctl = libc::_IOW::<kvm_userspace_memory_region>(KVMIO, 0x46);
const GET_DIRTY_LOG: libc::Ioctl = libc::_IOW::<kvm_dirty_log>(KVMIO, 0x42);
const CLEAR_DIRTY_LOG: libc::Ioctl = libc::_IOWR::<kvm_clear_dirty_log>(KVMIO, 0xc0);
const RESET_DIRTY_RINGS: libc::Ioctl = libc::_IO(KVMIO, 0xc7);

/// The calls of KVM that the logic of the adapter needs. Tests have an implementation of their own.
pub(super) trait Kernel: Send + Sync {
    /// The process that made this, if it is not the one that asks: a child of `fork` has all
    /// descriptors and rings of its parent.
    fn of_another_process(&self) -> Option<u32>;

    /// KVM_SET_USER_MEMORY_REGION.
    ///
    /// # Safety
    /// Unless its size is 0, the memory that `region` names is the guest's to read and write from
    /// now on, until the slot is deleted.
    unsafe fn set_region(&self, region: &kvm_userspace_memory_region) -> io::Result<()>;

    /// KVM_GET_DIRTY_LOG of the slot, which has at most 64 pages for each of `words`.
    fn get_log(&self, slot: u32, words: &mut [u64]) -> io::Result<()>;

    /// KVM_CLEAR_DIRTY_LOG: `mask` has a bit for each of the `pages` from `first` on.
    fn clear_log(&self, slot: u32, first: u64, pages: u32, mask: &[u64]) -> io::Result<()>;

    /// KVM_RESET_DIRTY_RINGS.
    fn reset_rings(&self) -> io::Result<()>;
}

/// A reset of the rings that signals end again and again stops after this many calls. The flush is
/// then still owed.
const MOST_RESETS: u32 = 1 << 16;

/// A virtual machine, by a descriptor of our own.
pub(super) struct Vm {
    fd: OwnedFd,
    maker: Maker,
}

impl Vm {
    /// Duplicates the descriptor of `vm`, which may then be closed.
    pub(super) fn new(vm: &VmFd) -> io::Result<Self> {
        // SAFETY: the descriptor is open as long as `vm` is borrowed.
        let fd = unsafe { BorrowedFd::borrow_raw(vm.as_raw_fd()) };
        let fd = fd.try_clone_to_owned()?;
        let maker = Maker::new()?;
        Ok(Vm { fd, maker })
    }
}

impl Kernel for Vm {
    fn of_another_process(&self) -> Option<u32> {
        self.maker.of_another_process()
    }

    unsafe fn set_region(&self, region: &kvm_userspace_memory_region) -> io::Result<()> {
        // SAFETY:
        // - the call reads the one struct that it is given;
        // - that the guest may use the memory is promised by the caller.
        check(unsafe { libc::ioctl(self.fd.as_raw_fd(), SET_USER_MEMORY_REGION, region) })
    }

    fn get_log(&self, slot: u32, words: &mut [u64]) -> io::Result<()> {
        let log = kvm_dirty_log {
            slot,
            padding1: 0,
            __bindgen_anon_1: kvm_dirty_log__bindgen_ty_1 {
                dirty_bitmap: words.as_mut_ptr().cast(),
            },
        };
        // SAFETY:
        // - the call reads the one struct that it is given;
        // - it writes the bits of the slot, rounded up to a whole word, to the bitmap: the slot has
        //   no more pages than `words` has bits, as it was added with as many, and KVM does not
        //   resize slots.
        check(unsafe { libc::ioctl(self.fd.as_raw_fd(), GET_DIRTY_LOG, &log) })
    }

    fn clear_log(&self, slot: u32, first: u64, pages: u32, mask: &[u64]) -> io::Result<()> {
        if pages as usize > mask.len() * 64 {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let mut clear = kvm_clear_dirty_log {
            slot,
            num_pages: pages,
            first_page: first,
            __bindgen_anon_1: kvm_clear_dirty_log__bindgen_ty_1 {
                dirty_bitmap: mask.as_ptr().cast_mut().cast(),
            },
        };
        // SAFETY:
        // - the call reads the one struct that it is given, and owns it meanwhile;
        // - it reads the bits of `pages`, rounded up to a whole word, from the mask, which has
        //   them, and does not write to it.
        check(unsafe { libc::ioctl(self.fd.as_raw_fd(), CLEAR_DIRTY_LOG, &mut clear) })
    }

    /// A call that a signal ends early says how many entries it has reset, perhaps none, and no
    /// error; the signal is delivered when it returns. So it is repeated until twice in a row
    /// nothing was left.
    fn reset_rings(&self) -> io::Result<()> {
        let mut idle = 0;
        for _ in 0..MOST_RESETS {
            // SAFETY: this call takes no argument, and touches the rings alone, whose entries are
            // atomics to us.
            let reset = unsafe { libc::ioctl(self.fd.as_raw_fd(), RESET_DIRTY_RINGS, 0) };
            check(reset)?;
            idle = if reset == 0 { idle + 1 } else { 0 };
            if idle == 2 {
                return Ok(());
            }
        }
        Err(io::ErrorKind::Interrupted.into())
    }
}

/// Some calls return a count.
fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
