//! Serves a lease of a demo space over a unix socket: `nbdinfo`, `qemu-img map` and `nbdcopy` show
//! what is dirty, and what the disk holds.
//!
//! ```text
//! cargo run --release -p dirtymap-formats --example nbd_server -- --socket disk.sock
//! nbdinfo --map=qemu:dirty-bitmap:now 'nbd+unix:///?socket=disk.sock'
//! ```

use std::error::Error;
use std::fs::{self, File};
use std::io;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::thread;
use std::time::Duration;

use clap::Parser;
use dirtymap::{Access, AddressSpace, Granule};
use dirtymap_formats::nbd::{Export, serve};

/// Serves the dirty state of a demo disk over NBD.
#[derive(Parser)]
struct Args {
    /// Where to listen. The socket must not exist.
    #[arg(long)]
    socket: PathBuf,
    /// The disk: its size and its bytes. Without it, a disk of 64 MiB of zeroes.
    #[arg(long)]
    disk: Option<PathBuf>,
    /// Bytes that a demo writer has written: OFFSET+LENGTH, in bytes, or with K, M, G.
    #[arg(long, value_parser = extent, default_values = ["1M+64K", "10M+4K", "33M+200K"])]
    dirty: Vec<(u64, u64)>,
    /// Ends after so many connections; a name is served until then.
    #[arg(long)]
    connections: Option<usize>,
}

fn extent(text: &str) -> Result<(u64, u64), String> {
    let (offset, len) = text.split_once('+').ok_or("it is not OFFSET+LENGTH")?;
    match (bytes(offset)?, bytes(len)?) {
        (_, 0) => Err("its length is zero".into()),
        extent => Ok(extent),
    }
}

fn bytes(text: &str) -> Result<u64, String> {
    let (digits, shift) = match text.chars().last() {
        Some('K') => (&text[..text.len() - 1], 10),
        Some('M') => (&text[..text.len() - 1], 20),
        Some('G') => (&text[..text.len() - 1], 30),
        _ => (text, 0),
    };
    let number: u64 = digits
        .parse()
        .map_err(|error| format!("{text:?}: {error}"))?;
    number
        .checked_mul(1 << shift)
        .ok_or_else(|| format!("{text:?} is more than 2^64"))
}

/// The socket is gone when the program ends.
struct Socket<'p>(&'p Path);

impl Drop for Socket<'_> {
    fn drop(&mut self) {
        let _ = fs::remove_file(self.0);
    }
}

fn run(args: &Args) -> Result<(), Box<dyn Error>> {
    let zeroes;
    let (file, size) = match &args.disk {
        Some(path) => {
            let file = File::open(path).map_err(|error| format!("{}: {error}", path.display()))?;
            let size = file.metadata()?.len();
            (Some(file), size)
        }
        None => (None, 64 << 20),
    };
    let pages = size.next_multiple_of(4096);
    if pages == 0 {
        return Err("the disk is empty".into());
    }
    let space = AddressSpace::tracked(Granule::K4);
    space.map(0..pages, 0, Access::ReadWrite)?;
    space.rounds().next()?.commit(); // everything is new, and was copied once
    for &(offset, len) in &args.dirty {
        let end = offset.checked_add(len).ok_or("an extent ends past 2^64")?;
        space.mark(offset..end)?;
    }
    let lease = space.rounds().next()?;

    let export = Export::new("", size)?.with_lease("now", &lease)?;
    let export = export.with_description("a demo of dirtymap")?;
    let export = match &file {
        Some(file) => export.with_data(file),
        None => {
            zeroes = vec![0u8; size as usize];
            export.with_data(&zeroes)
        }
    };
    let listener = UnixListener::bind(&args.socket)
        .map_err(|error| format!("{}: {error}", args.socket.display()))?;
    let _socket = Socket(&args.socket);
    println!(
        "{} dirty pages of {size} bytes at {}",
        lease.dirty(),
        args.socket.display()
    );
    let exports = [export];
    thread::scope(|scope| -> io::Result<()> {
        let mut served = 0;
        while args.connections.is_none_or(|most| served < most) {
            let (stream, _) = listener.accept()?;
            served += 1;
            let exports = &exports;
            scope.spawn(move || connection(stream, exports));
        }
        Ok(())
    })?;
    // The demo has no copy that could be made safe, so the pages become dirty again.
    lease.abort();
    Ok(())
}

fn connection(stream: UnixStream, exports: &[Export<'_>]) {
    let timeout = Some(Duration::from_secs(60));
    let timed = stream
        .set_read_timeout(timeout)
        .and_then(|()| stream.set_write_timeout(timeout));
    if let Err(error) = timed {
        eprintln!("a connection without timeouts: {error}");
        return;
    }
    match serve(stream, exports) {
        Ok(session) => println!("{session:?}"),
        Err(error) => eprintln!("a client was refused: {error}"),
    }
}

fn main() -> ExitCode {
    match run(&Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("nbd_server: {error}");
            ExitCode::FAILURE
        }
    }
}
