//! The first process of a system that exists for these checks.

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use crate::{check, compare, record};

/// Mounts what is needed, runs everything, says the outcome, and ends the system.
pub(crate) fn run() -> ! {
    match std::panic::catch_unwind(all) {
        Ok(Ok(())) => println!("guest: passed"),
        Ok(Err(error)) => println!("guest: FAILED: {error}"),
        Err(_) => println!("guest: FAILED: a panic, above"),
    }
    // SAFETY: the calls take numbers; nothing is left to be done after them.
    unsafe { libc::sync() };
    // SAFETY: as above. With `-no-reboot` the emulator ends.
    unsafe { libc::reboot(libc::RB_AUTOBOOT) };
    std::process::exit(1)
}

fn all() -> crate::Outcome {
    for (kind, at) in [
        (c"devtmpfs", c"/dev"),
        (c"proc", c"/proc"),
        (c"sysfs", c"/sys"),
        (c"debugfs", c"/sys/kernel/debug"),
    ] {
        mount(kind, at)?;
    }
    check::run()?;
    compare::run()?;
    let line = File::options().write(true).open("/dev/ttyS1")?;
    raw(&line)?;
    record::run(line)
}

fn mount(kind: &CStr, at: &CStr) -> io::Result<()> {
    // SAFETY: three strings that end, no data.
    let done = unsafe {
        libc::mount(
            kind.as_ptr(),
            at.as_ptr(),
            kind.as_ptr(),
            0,
            std::ptr::null(),
        )
    };
    match done {
        0 => Ok(()),
        // The kernel has mounted /dev itself.
        _ if io::Error::last_os_error().raw_os_error() == Some(libc::EBUSY) => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// A serial line passes bytes as they are.
fn raw(line: &File) -> io::Result<()> {
    // SAFETY: a struct of numbers, for which zeros are values.
    let mut settings: libc::termios = unsafe { std::mem::zeroed() };
    // SAFETY: the call fills the struct.
    if unsafe { libc::tcgetattr(line.as_raw_fd(), &mut settings) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call changes the struct.
    unsafe { libc::cfmakeraw(&mut settings) };
    // SAFETY: the call reads the struct.
    match unsafe { libc::tcsetattr(line.as_raw_fd(), libc::TCSADRAIN, &settings) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
