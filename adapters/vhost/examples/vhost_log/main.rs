//! A vhost-user device in a process of its own, and a front end that migrates its memory by the
//! dirty log that they share.
//!
//! ```text
//!  device process                     front end
//!  writes guest memory                copies everything
//!  marks it in the shared log         harvest: exchanges words of the log
//!                                     --> sync --> copy --> commit
//!  takes up a fresh log, answers  <-- swap, now and then
//!  ends                           <-- stop; a last harvest, then a comparison byte for byte
//! ```
//!
//! Exit status: 0 if all bytes are identical, 1 if a page differs, 2 if something cannot be done.

#[cfg(target_os = "linux")]
mod device;
#[cfg(target_os = "linux")]
mod front_end;

#[cfg(target_os = "linux")]
fn main() -> std::process::ExitCode {
    front_end::main()
}

#[cfg(not(target_os = "linux"))]
fn main() {
    println!("SKIP vhost_log: vhost-user needs memfds and unix sockets as Linux has them");
}
