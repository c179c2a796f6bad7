//! A guest of a few bytes writes its memory under KVM, the VMM writes some of it too, and one
//! harvest finds both: `kvm_guest --help`.
//!
//! ```text
//!  guest: increments a byte in some pages --> KVM's dirty log --+
//!                                                               +--> harvest --> sync
//!  VMM: writes a page, as a device does ----> mark -------------+    --> copy --> commit
//! ```
//!
//! Exit status: 0 if everything was found and the copy is the memory, or if it is skipped; 1 if
//! not; 2 if the input is refused.

#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
mod guest;

#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
fn main() -> std::process::ExitCode {
    guest::main()
}

#[cfg(not(all(target_os = "linux", target_arch = "x86_64")))]
fn main() {
    println!("SKIP kvm_guest: its guest is for x86-64 and KVM");
}
