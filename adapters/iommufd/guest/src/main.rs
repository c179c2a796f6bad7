//! What runs on a kernel with iommufd's mock IOMMU (`CONFIG_IOMMUFD_TEST`):
//!
//! ```text
//! iommufd-guest check          the adapter's rules, over the mock
//! iommufd-guest record FILE    conformance vectors, in the format of testdata/README.md
//! iommufd-guest compare        the kernel's walk beside ours
//! ```
//!
//! As the first process of a system (`init`) it does all three, writes the vectors to the second
//! serial line, and ends the system: `.ci/run kernel` starts it so. Anyone can record a kernel of
//! their own as root; `cargo run -p pagetable-sim --example conformance -- FILE` replays the file.
//!
//! Exit status: 0 if all went well, 1 if something failed, 2 if it could not run.

#[cfg(target_os = "linux")]
mod check;
#[cfg(target_os = "linux")]
mod compare;
#[cfg(target_os = "linux")]
mod faults;
#[cfg(target_os = "linux")]
mod init;
#[cfg(target_os = "linux")]
mod memory;
#[cfg(target_os = "linux")]
mod mock;
#[cfg(target_os = "linux")]
mod record;

/// What a command comes to.
#[cfg(target_os = "linux")]
type Outcome = Result<(), Box<dyn std::error::Error>>;

#[cfg(target_os = "linux")]
fn main() -> std::process::ExitCode {
    if std::process::id() == 1 {
        init::run();
    }
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let done = match args[..] {
        ["check"] => check::run(),
        ["record", file] => std::fs::File::create(file)
            .map_err(Into::into)
            .and_then(|file| record::run(file)),
        ["compare"] => compare::run(),
        _ => {
            eprintln!("usage: iommufd-guest check | record FILE | compare");
            return std::process::ExitCode::from(2);
        }
    };
    match done {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            std::process::ExitCode::from(1)
        }
    }
}

#[cfg(not(target_os = "linux"))]
fn main() {
    eprintln!("iommufd is an interface of Linux");
    std::process::exit(2);
}
