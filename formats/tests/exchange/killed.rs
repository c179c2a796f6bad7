//! A process that is killed while it saves, at any moment: the file is whole, the old one or the
//! new one.
//!
//! The child is this test again, with a variable set. It saves one generation after the other, and
//! prints which of them are on the disk. The parent kills it and reads the file.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Command, Stdio};

use dirtymap::{Granule, UserBitmap};
use dirtymap_formats::BitmapFile;

use crate::{Folder, range};

const CHILD: &str = "DIRTYMAP_TEST_SAVE_TO";
/// Large enough for several blocks, so that there is a middle to be killed in.
const WORDS: usize = 1 << 15;

/// The bits of a generation: each word holds its number.
fn words(generation: u64) -> Vec<u64> {
    let bits = |nth: usize| {
        generation
            .wrapping_mul(0x9E37_79B9_7F4A_7C15)
            .rotate_left(nth as u32)
    };
    (0..WORDS).map(bits).collect()
}

fn save_for_ever(path: &Path) -> ! {
    let all = range(0, (WORDS as u64 * 64) << 12);
    for generation in 1.. {
        let mut words = words(generation);
        let view = UserBitmap::new(&mut words).view(all, Granule::K4).unwrap();
        BitmapFile::save(path, &view, generation).unwrap();
        let mut out = std::io::stdout();
        writeln!(out, "saved {generation}").unwrap();
        out.flush().unwrap();
    }
    unreachable!("2^64 files")
}

#[test]
fn a_saver_that_is_killed_leaves_a_whole_file() {
    if let Some(path) = std::env::var_os(CHILD) {
        save_for_ever(Path::new(&path));
    }
    let folder = Folder::new("killed");
    for round in 0..30u64 {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args([
                "--exact",
                "killed::a_saver_that_is_killed_leaves_a_whole_file",
                "--nocapture",
            ])
            .env(CHILD, folder.file())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        // The kill comes after the first save, at a different moment in each round.
        lines
            .by_ref()
            .find(|line| line.as_ref().unwrap().contains("saved 1"))
            .unwrap()
            .unwrap();
        std::thread::sleep(std::time::Duration::from_micros(round * 397));
        child.kill().unwrap();
        child.wait().unwrap();
        let said = lines.map_while(Result::ok).filter_map(|line| {
            let number = line.strip_prefix("saved ")?;
            number.parse::<u64>().ok()
        });
        let last = said.last().unwrap_or(1);
        let mut file = BitmapFile::open(folder.file()).unwrap();
        let generation = file.generation();
        // The child may be killed between a save and the line that it prints.
        assert!(
            [last, last + 1].contains(&generation),
            "{generation} after {last}"
        );
        let mut back = vec![0; WORDS];
        let view = UserBitmap::new(&mut back)
            .view(file.range(), Granule::K4)
            .unwrap();
        file.or_into(&view).unwrap();
        assert_eq!(back, words(generation));
    }
}
