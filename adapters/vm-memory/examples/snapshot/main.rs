//! Incremental snapshots of a small virtual machine's memory while its devices write.
//!
//! ```text
//! devices write --> vm-memory marks --> one space over all regions
//!                                         |
//!                                         v
//! first snapshot: everything --> harvest, sync --> write dirty pages --> fsync --> commit
//!                                  ^                     |                |           |
//!                                  |<-- an error: pages are dirty again --+           |
//!                                  +------------------------ next increment ----------+
//! ```
//!
//! Exit status: 0 if all bytes are identical, 1 if a page differs, 2 if something cannot be done.

#[cfg(unix)]
mod cli;
#[cfg(unix)]
mod file;
#[cfg(unix)]
mod machine;
#[cfg(unix)]
mod run;

#[cfg(unix)]
fn main() -> std::process::ExitCode {
    run::main()
}

#[cfg(not(unix))]
fn main() {
    println!("SKIP snapshot: it needs mmap and files as Unix has them");
}
