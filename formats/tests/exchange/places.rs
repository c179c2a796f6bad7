//! Where bitmap files are written to and read from: links, modes, long names, files that append,
//! longer old contents, files that another program rewrites.

use std::fs::{self, File};
use std::io::{self, Cursor, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};

use dirtymap::{BitmapView, Granule, UserBitmap};
use dirtymap_formats::{BitmapFile, BitmapFileError, Truncate};

use crate::{Folder, range};

/// Calls `each` with a view of 64 pages, the bits of `word`.
fn with_view<R>(mut word: u64, each: impl FnOnce(&BitmapView<'_>) -> R) -> R {
    let words = std::slice::from_mut(&mut word);
    let view = UserBitmap::new(words).view(range(0, 64 << 12), Granule::K4);
    each(&view.unwrap())
}

/// A whole file of one word, generation 1.
fn bytes(word: u64) -> Vec<u8> {
    let mut file = Cursor::new(Vec::new());
    with_view(word, |view| BitmapFile::write_to(&mut file, view, 1)).unwrap();
    file.into_inner()
}

/// The bits of a file of one word.
fn word<R: Read + Seek>(file: &mut BitmapFile<R>) -> Result<u64, BitmapFileError> {
    let mut words = [0u64];
    let view = UserBitmap::new(&mut words).view(file.range(), file.granule());
    file.or_into(&view.unwrap())?;
    Ok(words[0])
}

/// A file that is rewritten in place by another program: each seek to its payload finds the next
/// of its versions.
struct Rewritten {
    versions: Vec<Vec<u8>>,
    at: u64,
}

impl Read for Rewritten {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let now = &self.versions[0][self.at as usize..];
        let len = now.len().min(buffer.len());
        buffer[..len].copy_from_slice(&now[..len]);
        self.at += len as u64;
        Ok(len)
    }
}

impl Seek for Rewritten {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        self.at = match to {
            SeekFrom::Start(at) => at,
            SeekFrom::End(more) => self.versions[0].len() as u64 + more.cast_unsigned(),
            SeekFrom::Current(more) => self.at.wrapping_add_signed(more),
        };
        if self.at == 64 && self.versions.len() > 1 {
            self.versions.remove(0);
        }
        Ok(self.at)
    }
}

/// graphene#53: the bytes that were checked came from one read, the bytes that were used from
/// another one. The result was `Ok`, and that of no version of the file.
#[test]
fn a_file_that_is_rewritten_between_two_reads_never_gives_what_was_not_checked() {
    let (old, new) = (bytes(0b0110), bytes(0b1001));
    // The file is opened and checked. Each later read finds the changes of another program.
    let versions = vec![old.clone(), old.clone(), new.clone()];
    let mut file = BitmapFile::from_reader(Rewritten { versions, at: 0 }).unwrap();
    assert_eq!(word(&mut file).unwrap(), 0b0110);
    // Between the opening and the check: the header is that of another file.
    let versions = vec![old, new];
    let mut file = BitmapFile::from_reader(Rewritten { versions, at: 0 }).unwrap();
    assert!(matches!(word(&mut file), Err(BitmapFileError::Damaged(_))));
}

/// A file that only its owner could read was readable for all after it was saved again.
#[test]
fn a_file_that_is_replaced_keeps_its_mode_and_its_owner() {
    let folder = Folder::new("mode");
    for mode in [0o600, 0o640, 0o444] {
        fs::write(folder.file(), b"old").unwrap();
        fs::set_permissions(folder.file(), fs::Permissions::from_mode(mode)).unwrap();
        with_view(1, |view| BitmapFile::save(folder.file(), view, 7)).unwrap();
        let metadata = fs::metadata(folder.file()).unwrap();
        assert_eq!(metadata.mode() & 0o7777, mode, "{mode:o}");
        fs::remove_file(folder.file()).unwrap();
    }
    fs::write(folder.file(), b"old").unwrap();
    if let Err(error) = std::os::unix::fs::chown(folder.file(), Some(1234), Some(2345)) {
        eprintln!("SKIP: this process may not give files away: {error}");
        return;
    }
    with_view(1, |view| BitmapFile::save(folder.file(), view, 7)).unwrap();
    let metadata = fs::metadata(folder.file()).unwrap();
    assert_eq!((metadata.uid(), metadata.gid()), (1234, 2345));
}

/// atomicwrites#11: the link was replaced by a file, and the file that it led to stayed as it was.
#[test]
fn a_save_goes_through_links_to_the_file_that_they_lead_to() {
    let folder = Folder::new("links");
    let deep = folder.0.join("deep");
    fs::create_dir(&deep).unwrap();
    fs::write(deep.join("bits"), b"old").unwrap();
    symlink("deep/bits", folder.0.join("one")).unwrap();
    symlink(folder.0.join("one"), folder.0.join("two")).unwrap();
    symlink("../new", deep.join("dangling")).unwrap();
    for (link, target) in [("two", "deep/bits"), ("deep/dangling", "new")] {
        let link = folder.0.join(link);
        with_view(0b101, |view| BitmapFile::save(&link, view, 7)).unwrap();
        assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
        let target = fs::symlink_metadata(folder.0.join(target)).unwrap();
        assert!(target.is_file());
        assert_eq!(word(&mut BitmapFile::open(&link).unwrap()).unwrap(), 0b101);
    }
    // A circle of links is an error, and no file is left.
    symlink("circle", folder.0.join("circle")).unwrap();
    let circle = folder.0.join("circle");
    let saved = with_view(1, |view| BitmapFile::save(&circle, view, 7));
    assert!(matches!(saved, Err(BitmapFileError::Io(_))));
    let mut names = folder.names();
    names.sort();
    assert_eq!(names, ["circle", "deep", "new", "one", "two"]);
}

/// The name of the draft was that of the file and some more: longer than a name can be.
#[test]
fn a_name_may_be_as_long_as_the_system_lets_it() {
    let folder = Folder::new("names");
    for len in [1, 200, 250, 255] {
        let path = folder.0.join("n".repeat(len));
        with_view(0b11, |view| BitmapFile::save(&path, view, 7)).unwrap();
        assert_eq!(word(&mut BitmapFile::open(&path).unwrap()).unwrap(), 0b11);
    }
    assert_eq!(folder.names().len(), 4, "no draft is left behind");
}

/// The header is written last. In a file that appends, it went to the end, and the file could not
/// be read.
#[test]
fn a_place_that_appends_is_refused_and_stays_as_it_was() {
    let folder = Folder::new("append");
    for content in ["", "something else"] {
        fs::write(folder.file(), content).unwrap();
        let mut append = File::options().append(true).open(folder.file()).unwrap();
        let written = with_view(1, |view| BitmapFile::write_to(&mut append, view, 7));
        assert!(
            matches!(written, Err(BitmapFileError::Appends { at }) if at >= content.len() as u64),
            "{written:?}"
        );
        assert_eq!(fs::read_to_string(folder.file()).unwrap(), content);
    }
}

/// The tail of longer old contents stayed after the payload, and the file was refused as damaged.
#[test]
fn what_was_there_before_leaves_no_tail() {
    let folder = Folder::new("tail");
    fs::write(folder.file(), [0xAA; 1000]).unwrap();
    let mut file = File::options().read(true).write(true).open(folder.file());
    let file = file.as_mut().unwrap();
    file.seek(SeekFrom::Start(500)).unwrap();
    with_view(0b1, |view| BitmapFile::write_to(file, view, 7)).unwrap();
    assert_eq!(
        word(&mut BitmapFile::open(folder.file()).unwrap()).unwrap(),
        0b1
    );
    let mut vector = vec![0xAA; 1000];
    let mut cursor = Cursor::new(&mut vector);
    with_view(0b10, |view| BitmapFile::write_to(&mut cursor, view, 7)).unwrap();
    assert_eq!(vector.len(), 64 + 8);
    let mut buffered = io::BufWriter::new(file);
    buffered.write_all(&[0xBB; 2000]).unwrap();
    with_view(0b11, |view| BitmapFile::write_to(&mut buffered, view, 7)).unwrap();
    buffered.flush().unwrap();
    drop(buffered);
    assert_eq!(
        word(&mut BitmapFile::open(folder.file()).unwrap()).unwrap(),
        0b11
    );
}

/// A place that the user defines may be unable to truncate.
#[test]
fn a_place_that_cannot_be_cut_says_so() {
    struct Fixed(Cursor<Vec<u8>>);
    impl Write for Fixed {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.write(bytes)
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    impl Seek for Fixed {
        fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
            self.0.seek(to)
        }
    }
    impl Truncate for Fixed {
        fn truncate(&mut self, len: u64) -> io::Result<()> {
            match self.0.get_ref().len() as u64 > len {
                true => Err(io::ErrorKind::Unsupported.into()),
                false => Ok(()),
            }
        }
    }
    let mut place = Fixed(Cursor::new(Vec::new()));
    with_view(1, |view| BitmapFile::write_to(&mut place, view, 7)).unwrap();
    place.0.get_mut().push(0);
    let written = with_view(1, |view| BitmapFile::write_to(&mut place, view, 7));
    assert!(matches!(written, Err(BitmapFileError::Io(_))));
}
