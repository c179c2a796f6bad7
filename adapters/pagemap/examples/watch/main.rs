//! Watches which parts of a running program's memory are written, at what rate: `watch --help`.
//!
//! ```text
//!  the program writes --> page tables --> ProcessMemory --> a harvest in every interval
//!                                                              |
//!                                                              +--> live picture, or lines
//!                                                              +--> at the end: heat map, as SVG
//! ```

#[cfg(target_os = "linux")]
mod cli;
#[cfg(target_os = "linux")]
mod live;
#[cfg(target_os = "linux")]
mod plain;
#[cfg(target_os = "linux")]
mod plot;
#[cfg(target_os = "linux")]
mod program;
#[cfg(target_os = "linux")]
mod watch;
#[cfg(target_os = "linux")]
mod workload;

#[cfg(target_os = "linux")]
fn main() -> std::process::ExitCode {
    program::main()
}

#[cfg(not(target_os = "linux"))]
fn main() {
    println!("SKIP watch: only Linux, from 6.7 on, tells which pages of a process were written");
}
