//! The persistent bitmaps of a qcow2 image: lists them, shows what one holds, writes, merges and
//! removes them, and makes an image that carries those of a raw disk.
//!
//! ```text
//! cargo run --release -p dirtymap-formats --example qcow2_bitmaps -- list disk.qcow2
//! ```
//!
//! No other program may have the image open, above all no virtual machine.

use std::error::Error;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use dirtymap::exchange::{RunTable, RunsExt};
use dirtymap::{Granule, Iova, IovaRange};
use dirtymap_formats::qcow2::{BitmapOptions, Image, QcowError, create_for_raw};

/// Lists, shows and changes the persistent bitmaps of a qcow2 image.
#[derive(Parser)]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Lists the bitmaps of an image.
    List { image: PathBuf },
    /// Shows the bytes that a bitmap holds: offset and length, in bytes.
    Show { image: PathBuf, bitmap: String },
    /// Writes a bitmap that holds these bytes, new or in place of the one of this name.
    Write {
        image: PathBuf,
        bitmap: String,
        /// OFFSET+LENGTH, in bytes.
        #[arg(value_parser = extent)]
        dirty: Vec<IovaRange>,
        /// What one bit stands for, in bytes.
        #[arg(long, value_parser = granule)]
        granule: Option<Granule>,
    },
    /// Adds what other bitmaps hold to a bitmap.
    Merge {
        image: PathBuf,
        into: String,
        #[arg(required = true)]
        from: Vec<String>,
    },
    /// Removes a bitmap, also one in use.
    Remove { image: PathBuf, bitmap: String },
    /// Makes an image of metadata alone, for the bitmaps of a raw disk.
    Create {
        image: PathBuf,
        /// The raw disk, which has to be there.
        disk: PathBuf,
    },
}

fn extent(text: &str) -> Result<IovaRange, String> {
    let (offset, len) = text.split_once('+').ok_or("it is not OFFSET+LENGTH")?;
    let number = |text: &str| {
        text.parse::<u64>()
            .map_err(|error| format!("{text:?}: {error}"))
    };
    let range = IovaRange::from_len(Iova::new(number(offset)?), number(len)?);
    range.map_err(|error| error.to_string())
}

fn granule(text: &str) -> Result<Granule, String> {
    let bytes = text.parse().map_err(|error| format!("{text:?}: {error}"))?;
    Granule::from_bytes(bytes).map_err(|error| error.to_string())
}

fn open(path: &Path, write: bool) -> Result<Image<File>, Box<dyn Error>> {
    let file = File::options().read(true).write(write).open(path)?;
    Ok(Image::open(file)?)
}

fn run(command: &Command, out: &mut impl Write) -> Result<(), Box<dyn Error>> {
    match command {
        Command::List { image } => list(&open(image, false)?, out)?,
        Command::Show { image, bitmap } => {
            let runs = open(image, false)?.read(bitmap)?;
            for (offset, len) in (&runs).into_iter().pairs() {
                writeln!(out, "{offset} {len}")?;
            }
        }
        Command::Write {
            image,
            bitmap,
            dirty,
            granule,
        } => {
            let runs: RunTable = dirty.iter().copied().collect();
            let options = granule.map(|granule| BitmapOptions::new().granule(granule));
            open(image, true)?.write(bitmap, &runs, options.unwrap_or_default())?;
        }
        Command::Merge { image, into, from } => {
            let from: Vec<&str> = from.iter().map(String::as_str).collect();
            open(image, true)?.merge(into, &from)?;
        }
        Command::Remove { image, bitmap } => open(image, true)?.remove(bitmap)?,
        Command::Create { image, disk } => create(image, disk)?,
    }
    Ok(())
}

fn list(image: &Image<File>, out: &mut impl Write) -> Result<(), Box<dyn Error>> {
    match image.bitmaps() {
        Ok(bitmaps) => {
            for bitmap in bitmaps {
                let flag = |set, name| if set { name } else { "" };
                writeln!(
                    out,
                    "{:?} {}{}{}{}",
                    bitmap.name,
                    bitmap.granule,
                    flag(bitmap.auto, ", auto"),
                    flag(bitmap.in_use, ", in use: all of the disk counts as dirty"),
                    flag(!bitmap.known, ", of a type that is not known here"),
                )?;
            }
            Ok(())
        }
        Err(error @ QcowError::Stale) => {
            writeln!(out, "{error}")?;
            Ok(())
        }
        Err(error) => Err(error.into()),
    }
}

fn create(image: &Path, disk: &Path) -> Result<(), Box<dyn Error>> {
    let disk = fs::canonicalize(disk).map_err(|error| format!("{}: {error}", disk.display()))?;
    let size = fs::metadata(&disk)?.len();
    let name = disk.to_str().ok_or("the name of the disk is not UTF-8")?;
    let mut file = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(image)?;
    let cluster = Granule::from_bytes(64 << 10)?;
    if let Err(error) = create_for_raw(&mut file, name, size, cluster) {
        let _ = fs::remove_file(image); // it was made here, and is no image
        return Err(error.into());
    }
    Ok(())
}

fn main() -> ExitCode {
    let mut out = io::stdout().lock();
    match run(&Args::parse().command, &mut out) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("qcow2_bitmaps: {error}");
            ExitCode::FAILURE
        }
    }
}
