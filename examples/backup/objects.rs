//! Increments in an object store, from which any machine can fetch them: a directory, or S3.
//!
//! An object gets its name when its upload is complete: by a rename in a directory, by the
//! completion of a multipart upload in S3. If an upload dies half-way, no list shows its parts.
//! Then there is no object, and the increment stays dirty. A bucket needs a rule that removes such
//! parts.

use std::error::Error;
use std::fs;
use std::io::{self, Read};

use object_store::local::LocalFileSystem;
use object_store::path::Path;
use object_store::{MultipartUpload, ObjectStore, ObjectStoreExt};
use tokio::runtime::{Builder, Runtime};

/// Bytes of a part: the least that S3 takes. The last part may be smaller.
const PART: u64 = 5 << 20;

/// Where the objects are.
pub(crate) struct Objects {
    runtime: Runtime,
    store: Box<dyn ObjectStore>,
    prefix: Path,
}

impl Objects {
    /// A directory, or `s3://BUCKET/PREFIX` with the variables `AWS_*` of the environment.
    pub(crate) fn open(place: &str) -> Result<Objects, Box<dyn Error>> {
        let (store, prefix) = match place.strip_prefix("s3://") {
            Some(rest) => bucket(rest)?,
            None => {
                fs::create_dir_all(place)?;
                // The objects are durable before the increment is committed.
                let store = LocalFileSystem::new_with_prefix(place)?.with_fsync(true);
                (Box::new(store) as Box<dyn ObjectStore>, Path::default())
            }
        };
        let runtime = Builder::new_current_thread().enable_all().build()?;
        Ok(Objects {
            runtime,
            store,
            prefix,
        })
    }

    fn path(&self, name: &str) -> Path {
        self.prefix
            .parts()
            .chain(Path::from(name).parts())
            .collect()
    }

    /// Uploads an object in parts. The object appears when this returns, whole and durable, and not
    /// before.
    pub(crate) fn upload(&self, name: &str, mut bytes: impl Read) -> io::Result<()> {
        self.runtime.block_on(async {
            let mut upload = self.store.put_multipart(&self.path(name)).await?;
            match parts(&mut *upload, &mut bytes).await {
                Ok(()) => Ok(upload.complete().await.map(drop)?),
                Err(error) => {
                    // Parts that stay take space, and have no other effect.
                    let _ = upload.abort().await;
                    Err(error)
                }
            }
        })
    }

    /// The bytes of an object.
    pub(crate) fn fetch(&self, name: &str) -> io::Result<Vec<u8>> {
        self.runtime.block_on(async {
            let object = self.store.get(&self.path(name)).await?;
            Ok(object.bytes().await?.to_vec())
        })
    }

    /// How many objects there are whose names begin with `folder`.
    pub(crate) fn count(&self, folder: &str) -> io::Result<usize> {
        let folder = self.path(folder);
        self.runtime.block_on(async {
            let list = self.store.list_with_delimiter(Some(&folder)).await?;
            Ok(list.objects.len())
        })
    }
}

async fn parts(upload: &mut dyn MultipartUpload, bytes: &mut impl Read) -> io::Result<()> {
    for number in 0.. {
        let mut part = Vec::new();
        bytes.take(PART).read_to_end(&mut part)?;
        if part.is_empty() && number > 0 {
            break;
        }
        upload.put_part(part.into()).await?;
    }
    Ok(())
}

#[cfg(feature = "s3")]
fn bucket(rest: &str) -> Result<(Box<dyn ObjectStore>, Path), Box<dyn Error>> {
    let (name, prefix) = rest.split_once('/').unwrap_or((rest, ""));
    let builder = object_store::aws::AmazonS3Builder::from_env().with_bucket_name(name);
    Ok((Box::new(builder.build()?), Path::from(prefix)))
}

#[cfg(not(feature = "s3"))]
fn bucket(rest: &str) -> Result<(Box<dyn ObjectStore>, Path), Box<dyn Error>> {
    Err(format!("s3://{rest}: built without S3: add `--features s3`").into())
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;
    use std::os::unix::process::ExitStatusExt;
    use std::process::Command;

    use dirtymap_store::{Device, DirFolder, Opened, Options, Store};

    use super::*;

    const DEVICE: Device = Device {
        id: 3,
        len: 16 << 20,
    };
    const NAME: &str = "increments/0001.inc";

    fn open(folder: &std::path::Path) -> Store {
        let folder = DirFolder::new(folder.join("store")).unwrap();
        match Store::open(folder, &DEVICE, &Options::new()).unwrap() {
            Opened::Known(store) => store,
            Opened::Everything(lost) => lost.start_over(&Options::new()).unwrap(),
        }
    }

    /// Two parts and a bit more; the process dies after the first part is up, and some of the
    /// second one is read.
    struct Dies(Cursor<Vec<u8>>);

    impl Read for Dies {
        fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
            if self.0.position() > PART + PART / 2 {
                std::process::abort();
            }
            self.0.read(bytes)
        }
    }

    fn contents() -> Vec<u8> {
        (0..2 * PART + 1000)
            .map(|at| ((at * at) >> 7) as u8)
            .collect()
    }

    #[test]
    #[ignore = "the child of the tests of uploads that die"]
    fn child() {
        let folder = std::env::var("DIRTYMAP_TEST_STORE").unwrap();
        let place = std::env::var("DIRTYMAP_TEST_OBJECTS").unwrap();
        let store = open(folder.as_ref());
        let objects = Objects::open(&place).unwrap();
        let increment = store.harvest("increments", None).unwrap();
        let upload = || objects.upload(NAME, Dies(Cursor::new(contents())));
        increment.commit(upload).unwrap();
    }

    /// A process dies in the middle of an upload: no list shows the increment, nothing can be
    /// fetched, and the next process has all of it to copy. Then the upload that ends is there.
    fn an_upload_that_dies_half_way_is_no_increment(place: &str) {
        let folder = tempfile::tempdir().unwrap();
        let store = open(folder.path());
        store.join("increments").unwrap();
        let first = store.harvest("increments", None).unwrap();
        let first = first.commit(|| Ok(())).unwrap();
        drop(store.begin_write(0x5000..0x6000).unwrap().wait().unwrap());
        drop(store);
        let this = std::env::current_exe().unwrap();
        let died = Command::new(this)
            .args([
                "objects::tests::child",
                "--exact",
                "--ignored",
                "--nocapture",
            ])
            .env("DIRTYMAP_TEST_STORE", folder.path())
            .env("DIRTYMAP_TEST_OBJECTS", place)
            .output()
            .unwrap();
        assert_eq!(died.status.signal(), Some(6), "{died:?}");

        let objects = Objects::open(place).unwrap();
        assert_eq!(objects.count("increments").unwrap(), 0);
        assert!(objects.fetch(NAME).is_err());
        let store = open(folder.path());
        let again = store.harvest("increments", Some(first)).unwrap();
        assert_eq!(again.everything(), None);
        assert!(
            again
                .runs()
                .runs()
                .iter()
                .any(|run| run.contains(dirtymap::Iova::new(0x5000)))
        );
        again
            .commit(|| objects.upload(NAME, &contents()[..]))
            .unwrap();
        assert_eq!(objects.count("increments").unwrap(), 1);
        assert!(objects.fetch(NAME).unwrap() == contents());
    }

    #[test]
    fn an_upload_to_a_directory_that_dies_half_way_is_no_increment() {
        let folder = tempfile::tempdir().unwrap();
        let place = folder.path().join("objects");
        an_upload_that_dies_half_way_is_no_increment(place.to_str().unwrap());
    }

    #[test]
    #[cfg(feature = "s3")]
    #[ignore = "the stage objects runs it, with a server"]
    fn an_upload_to_s3_that_dies_half_way_is_no_increment() {
        let bucket = std::env::var("DIRTYMAP_TEST_BUCKET").unwrap();
        an_upload_that_dies_half_way_is_no_increment(&format!("s3://{bucket}/dies"));
    }

    /// A reader that fails, as a disk may: the commit is refused, and the increment stays dirty.
    #[test]
    fn an_upload_that_fails_is_no_commit() {
        struct Fails;
        impl Read for Fails {
            fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
                Err(io::Error::other("the disk fails"))
            }
        }
        let folder = tempfile::tempdir().unwrap();
        let objects = folder.path().join("objects");
        let objects = Objects::open(objects.to_str().unwrap()).unwrap();
        let store = open(folder.path());
        store.join("increments").unwrap();
        let increment = store.harvest("increments", None).unwrap();
        assert!(increment.commit(|| objects.upload(NAME, Fails)).is_err());
        assert_eq!(objects.count("increments").unwrap(), 0);
        let again = store.harvest("increments", None).unwrap();
        assert_eq!(again.runs().total_bytes(), u128::from(DEVICE.len));
    }

    /// An object of no bytes, of one part and of parts exactly comes back as it was.
    #[test]
    fn objects_of_any_length_come_back() {
        let folder = tempfile::tempdir().unwrap();
        let objects = Objects::open(folder.path().to_str().unwrap()).unwrap();
        for len in [0, 1, PART - 1, PART, 2 * PART] {
            let bytes = vec![7; len as usize];
            objects.upload("a/b", &bytes[..]).unwrap();
            assert!(objects.fetch("a/b").unwrap() == bytes, "{len}");
        }
    }
}
