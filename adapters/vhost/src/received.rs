//! What can be known of a log that a front end sent, before it is touched.
//!
//! A front end says how long the log is, and sends a file. The daemon maps what it is told, without
//! a look at the file, and gives bitmaps the mapping alone: neither its length nor the file. An
//! access past the end of the file is a `SIGBUS`, which ends the back end. So three things are
//! looked at:
//!
//! | what | how |
//! |---|---|
//! | the length of the mapping | its `Debug` text: its index panics past the end |
//! | memory behind the region's bits | a system call that reads a byte of each page, and fails |
//! | the seal against a shorter file later | the file is still open: found by its number |

use std::fs;
use std::io::{self, Read};
use std::mem::MaybeUninit;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::ptr;

use vhost_user_backend::bitmap::MmapLogReg;

use super::memory::{LOG_PAGE, LogError};
use dirtymap::sync::{AtomicBool, Ordering};
use dirtymap::{Granule, Iova, IovaRange};

/// Whether logs are taken whose front end can make them shorter.
static ACCEPT_UNSEALED: AtomicBool = AtomicBool::new(false);

/// From now on, back ends of this process take logs whose file has no `F_SEAL_SHRINK`, or of which
/// nothing under `/proc` tells whether it has. Until then they refuse them by
/// [`LogError::Unsealed`].
///
/// The front end can make such a file shorter at any time, and the next mark ends this process by
/// `SIGBUS`: for front ends that are trusted with that. QEMU, cloud-hypervisor and
/// [`VhostLog`](super::VhostLog) seal their logs; QEMU does not where the system has no memfd.
///
/// The switch is one for the process because the daemon makes every [`LogBitmap`](super::LogBitmap)
/// and every [`RegionLog`](super::RegionLog) itself, by functions of traits that take no option:
/// `NewBitmap::with_len` and `MemRegionBitmap::new`. No value of the back end takes part there. The
/// one place for an option is a type parameter, which the types of the bitmap, of its slices, of
/// its logs and of the follower would all need.
pub fn accept_unsealed_logs() {
    // Relaxed: a switch; it orders nothing.
    ACCEPT_UNSEALED.store(true, Ordering::Relaxed);
}

pub(super) fn unsealed_are_accepted() -> bool {
    // Relaxed: as above.
    ACCEPT_UNSEALED.load(Ordering::Relaxed)
}

/// Refuses a log that has no bit for the last page of a region.
pub(super) fn check_length(memory: &MmapLogReg, region: (u64, u64)) -> Result<(), LogError> {
    let (start, last) = region;
    let bytes = told_length(&format!("{memory:?}")).ok_or(LogError::UnknownLength)?;
    // The last address that has a bit; in a log of 512 TiB all have one.
    let end =
        u64::try_from(u128::from(bytes) << (3 + LOG_PAGE.lg2())).map_or(u64::MAX, |end| end - 1);
    match IovaRange::new(Iova::new(start), Iova::new(last)) {
        Ok(range) if last > end => Err(LogError::TooShort {
            end: Iova::new(end),
            range,
        }),
        _ => Ok(()),
    }
}

/// The length in a text of the form `MmapLogReg { addr: 0x7f.., len: 4096 }`.
fn told_length(text: &str) -> Option<u64> {
    let (_, rest) = text.rsplit_once("len: ")?;
    let digits = rest.split(|c: char| !c.is_ascii_digit()).next()?;
    digits.parse().ok().filter(|len| *len > 0)
}

/// Refuses a mapping at `base` that has no memory behind one of its `bytes`.
pub(super) fn check_memory(base: usize, bytes: Range<usize>) -> io::Result<()> {
    let (mut reader, writer) = io::pipe()?;
    let page = Granule::K4.bytes() as usize; // no system has smaller ones
    let pages = (bytes.start / page * page..bytes.end).step_by(page);
    for at in pages.map(|page| page.max(bytes.start)) {
        let byte = ptr::with_exposed_provenance(base + at);
        // SAFETY: the address lies in a mapping, of which the system reads one byte, or reports
        // that it cannot. The program sees that byte as one that came from outside.
        match unsafe { libc::write(writer.as_raw_fd(), byte, 1) } {
            1 => reader.read_exact(&mut [0])?,
            _ if io::Error::last_os_error().raw_os_error() == Some(libc::EFAULT) => {
                return Err(LogError::NoMemory { at: at as u64 }.into());
            }
            _ => return Err(io::Error::last_os_error()),
        }
    }
    Ok(())
}

/// Whether the file that is mapped as `memory` is open in this process, and cannot get shorter;
/// false if the system does not tell.
pub(super) fn is_sealed(memory: &MmapLogReg) -> bool {
    let base = ptr::from_ref(&memory[0]).addr();
    let maps = fs::read("/proc/self/maps").unwrap_or_default();
    let Some(file) = file_of(&String::from_utf8_lossy(&maps), base) else {
        return false;
    };
    let Ok(open) = fs::read_dir("/proc/self/fd") else {
        return false;
    };
    let fds = open.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    // Numbers of files may come twice in a long time: all files of this number have to be sealed.
    let mut same = fds.filter(|fd| is_file(*fd, file)).peekable();
    same.peek().is_some() && same.all(keeps_its_length)
}

/// The device and the number of the file that is mapped at `address`, by a list of mappings.
fn file_of(maps: &str, address: usize) -> Option<(u32, u32, u64)> {
    let hex = |text: &str| u64::from_str_radix(text, 16).ok();
    maps.lines().find_map(|line| {
        // "7f0000000000-7f0000001000 rw-s 00000000 00:01 1234 /memfd:log (deleted)"
        let mut fields = line.split_ascii_whitespace();
        let (start, end) = fields.next()?.split_once('-')?;
        if !(hex(start)?..hex(end)?).contains(&(address as u64)) {
            return None;
        }
        let (major, minor) = fields.nth(2)?.split_once(':')?;
        let number = |text| u32::from_str_radix(text, 16).ok();
        Some((number(major)?, number(minor)?, fields.next()?.parse().ok()?))
    })
}

fn is_file(fd: i32, (major, minor, number): (u32, u32, u64)) -> bool {
    let mut stat = MaybeUninit::<libc::stat>::uninit();
    // SAFETY: `stat` is as large as the call expects and outlives it. A number that is no file any
    // more is an error of the call.
    if unsafe { libc::fstat(fd, stat.as_mut_ptr()) } != 0 {
        return false;
    }
    // SAFETY: the call has filled it.
    let stat = unsafe { stat.assume_init() };
    let device = (libc::major(stat.st_dev), libc::minor(stat.st_dev));
    device == (major, minor) && stat.st_ino == number
}

/// Whether the file is sealed, and is no file of huge pages: of these a hole can take the last one
/// away.
fn keeps_its_length(fd: i32) -> bool {
    // SAFETY: this call takes numbers and touches no memory of ours.
    let seals = unsafe { libc::fcntl(fd, libc::F_GET_SEALS) };
    if seals < 0 || seals & libc::F_SEAL_SHRINK == 0 {
        return false;
    }
    let mut system = MaybeUninit::<libc::statfs>::uninit();
    // SAFETY: `system` is as large as the call expects and outlives it.
    if unsafe { libc::fstatfs(fd, system.as_mut_ptr()) } != 0 {
        return false;
    }
    // SAFETY: the call has filled it.
    let system = unsafe { system.assume_init() };
    system.f_type == libc::TMPFS_MAGIC
}

#[cfg(test)]
#[allow(clippy::unwrap_used)] // helpers of tests
mod tests {
    use super::*;
    use std::os::fd::FromRawFd;

    #[test]
    fn a_length_is_what_the_text_says_or_none() {
        assert_eq!(
            told_length("MmapLogReg { addr: 0x7f0000000000, len: 32768 }"),
            Some(32768)
        );
        for text in [
            "MmapLogReg",
            "MmapLogReg { len: }",
            "len: 0",
            "len: 99999999999999999999",
        ] {
            assert_eq!(told_length(text), None, "{text}");
        }
    }

    #[test]
    fn a_mapping_is_found_in_the_list() {
        let maps = "55d0000-55d1000 r--p 00000000 fe:00 77  /bin/x y\n\
                    7f00-8f00 rw-s 00001000 00:01 4242 /memfd:log (deleted)\n\
                    8f00-9f00 rw-p 00000000 00:00 0\n";
        assert_eq!(file_of(maps, 0x7f00), Some((0, 1, 4242)));
        assert_eq!(file_of(maps, 0x8eff), Some((0, 1, 4242)));
        assert_eq!(file_of(maps, 0x8f00), Some((0, 0, 0)));
        assert_eq!(file_of(maps, 0x55d_0fff), Some((0xfe, 0, 77)));
        assert_eq!(file_of(maps, 0x9f00), None);
    }

    /// The seal keeps a file of huge pages as long as it is, and a hole can still take its last
    /// page away: the next mark there ends the process by SIGBUS.
    #[test]
    fn a_sealed_file_of_huge_pages_does_not_keep_its_memory() {
        for (flag, keeps) in [(0, true), (libc::MFD_HUGETLB, false)] {
            let flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING | flag;
            // SAFETY: the name is a string that ends with 0 and outlives the call.
            let fd = unsafe { libc::memfd_create(c"log".as_ptr(), flags) };
            if fd < 0 {
                assert!(!keeps, "{}", io::Error::last_os_error());
                eprintln!(
                    "SKIP: no files of huge pages: {}",
                    io::Error::last_os_error()
                );
                continue;
            }
            // SAFETY: a descriptor that was just made; no other value owns it.
            let file = unsafe { fs::File::from_raw_fd(fd) };
            assert!(!keeps_its_length(file.as_raw_fd()), "there is no seal yet");
            // SAFETY: takes numbers.
            let sealed = unsafe { libc::fcntl(fd, libc::F_ADD_SEALS, libc::F_SEAL_SHRINK) };
            assert_eq!(sealed, 0);
            assert_eq!(keeps_its_length(file.as_raw_fd()), keeps, "{flag:#x}");
        }
    }
}
