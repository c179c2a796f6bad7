//! The command line.

use std::path::PathBuf;

use clap::Parser;
use clap::error::ErrorKind;

/// Incremental snapshots of a small virtual machine's memory while its devices write.
///
/// Devices write guest memory through vm-memory, one of them by asynchronous reads through raw
/// pointers. A first file gets all of the memory, each further one the pages that became dirty
/// since. At the end the devices are stopped, memory is restored from the files, and compared with
/// the machine's, byte for byte.
///
/// Exit status: 0 if all bytes are identical, 1 if a page differs, 2 if something cannot be done.
#[derive(Parser, Clone, Debug)]
#[command(name = "snapshot", max_term_width = 100)]
pub(crate) struct Cli {
    /// Guest memory in MiB, 2 to 65536; half of it lies at 4 GiB
    #[arg(
        long, value_name = "MiB", default_value_t = 128,
        value_parser = clap::value_parser!(u64).range(2..=65536),
    )]
    pub(crate) memory: u64,

    /// Increments after the first snapshot, 1 to 10000
    #[arg(
        long, value_name = "N", default_value_t = 8,
        value_parser = clap::value_parser!(u32).range(1..=10_000),
    )]
    pub(crate) increments: u32,

    /// Devices that write through vm-memory, beside the disk, 1 to 64
    #[arg(
        long, value_name = "N", default_value_t = 2,
        value_parser = clap::value_parser!(u32).range(1..=64),
    )]
    pub(crate) devices: u32,

    /// Milliseconds between two increments, 0 to 60000
    #[arg(
        long, value_name = "MS", default_value_t = 100,
        value_parser = clap::value_parser!(u64).range(0..=60_000),
    )]
    pub(crate) pause: u64,

    /// Let increment N fail when its file is synced, as on a disk that is full
    #[arg(long, value_name = "N")]
    pub(crate) fail: Option<u32>,

    /// Commit each lease before its file is safe: with --fail, pages are lost and the comparison
    /// finds it
    #[arg(long)]
    pub(crate) commit_early: bool,

    /// Keep the files here: a directory that is new or empty [default: a temporary one, removed at
    /// the end]
    #[arg(long, value_name = "DIR")]
    pub(crate) dir: Option<PathBuf>,

    /// Seed of what the devices write
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub(crate) seed: u64,
}

impl Cli {
    /// Checks what depends on several options.
    pub(crate) fn checked(self) -> Result<Self, clap::Error> {
        if let Some(fail) = self.fail
            && !(1..self.increments).contains(&fail)
        {
            let text = format!(
                "--fail {fail}: name an increment from 1 to {}, so that another one follows it\n",
                self.increments.saturating_sub(1)
            );
            return Err(clap::Error::raw(ErrorKind::ValueValidation, text));
        }
        Ok(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_increment_that_fails_is_followed_by_another() {
        let parse = |args: &[&str]| {
            let args = std::iter::once("snapshot").chain(args.iter().copied());
            Cli::try_parse_from(args).and_then(Cli::checked)
        };
        assert!(parse(&["--increments", "3", "--fail", "2"]).is_ok());
        for fail in ["0", "3", "9"] {
            let error = parse(&["--increments", "3", "--fail", fail]).unwrap_err();
            assert!(error.to_string().contains("from 1 to 2"), "{error}");
        }
        assert!(parse(&["--memory", "1"]).is_err());
    }
}
