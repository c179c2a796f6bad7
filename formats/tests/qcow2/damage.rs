//! Images that are damaged.

use super::*;

#[test]
fn damage_is_refused_with_the_place() {
    let (good, extension, directory) = sample();
    let said = |at: usize, bytes: &[u8]| {
        let mut file = good.clone();
        file[at..at + bytes.len()].copy_from_slice(bytes);
        let said = Image::open(file).and_then(|mut image| image.read("a"));
        said.unwrap_err().to_string()
    };
    assert!(said(0, b"qcow").contains("the magic number at byte 0x0 is 0x71636f77"));
    assert!(said(7, &[2]).contains("bitmaps need version 3"));
    assert!(said(23, &[30]).contains("the size of a cluster at byte 0x14 is 0x1e"));
    assert!(said(72, &[1]).contains("some of them are not known here"));
    assert!(said(extension + 7, &[25]).contains("the length of the bitmaps' extension"));
    assert!(said(extension + 4, &[0xff]).contains("the length of an extension"));
    let count = said(extension + 8, &[0xff]);
    assert!(count.contains("the number of bitmaps"), "{count}");
    let count = said(extension + 11, &[3]);
    assert!(
        count.contains("the size of the bitmaps' directory"),
        "{count}"
    );
    let count = said(extension + 11, &[1]);
    assert!(count.contains("more or fewer entries"), "{count}");
    // A directory of 2^60 bytes takes no memory.
    assert!(said(extension + 16, &[0x10]).contains("the size of the bitmaps' directory"));
    let outside = said(extension + 24, &[0x10]);
    assert!(
        outside.contains("the bitmaps' directory at byte 0x10000"),
        "{outside}"
    );
    assert!(said(extension + 31, &[1]).contains("no multiple of the size of a cluster"));
    let overlap = said(extension + 24, &[0, 0, 0, 0, 0, 0, 2, 0]);
    assert!(!overlap.is_empty());

    // Of the first entry: a table outside, one of another length, one that is the directory.
    let table_at = u64::from_be_bytes(good[directory..][..8].try_into().unwrap()) as usize;
    let outside = said(directory, &[0x10]);
    assert!(
        outside.contains("cannot be accessed") || outside.contains("overlap"),
        "{outside}"
    );
    let long = said(directory + 8, &[0xff]);
    assert!(!long.is_empty(), "{long}");
    assert!(said(directory + 17, &[8]).contains("the granule of a bitmap"));
    assert!(said(directory + 17, &[12]).contains("the disk has another size"));
    assert!(said(directory + 18, &[0xff]).contains("the length of an entry"));
    assert!(said(directory + 20, &[0xff]).contains("the length of an entry"));
    assert!(said(directory + 15, &[1]).contains("is in use"));
    assert!(said(directory + 16, &[2]).contains("not known here"));
    let same = said(directory, &(directory as u64).to_be_bytes());
    assert!(same.contains("overlap"), "{same}");

    // Of the table: a bit that has no meaning, a cluster outside, the header as a cluster.
    assert!(said(table_at, &[0x80]).contains("an entry of a bitmap's table"));
    let outside = said(table_at, &[0, 0xf0]);
    assert!(
        outside.contains("the bits of a bitmap at byte 0xf0"),
        "{outside}"
    );
    let second = good[table_at..][..8].to_vec();
    let same = said(table_at + 8, &second);
    assert!(same.contains("overlap"), "one cluster twice: {same}");
    let table = said(table_at, &(table_at as u64).to_be_bytes());
    assert!(table.contains("overlap"), "{table}");
}

/// The disk ends inside of a byte of bits, and bits past it are no part of it.
#[test]
fn bits_past_the_end_of_the_disk_are_refused() {
    let mut file = image(3 * 512, 512);
    let mut image = Image::open(&mut file).unwrap();
    image
        .write("a", &table(&[(0, 1), (1024, 1)]), options(9))
        .unwrap();
    assert_eq!(image.read("a").unwrap(), table(&[(0, 512), (1024, 512)]));
    drop(image);
    let bits = file.iter().rposition(|&byte| byte == 0b101).unwrap();
    file[bits] = 0b1101;
    let error = Image::open(&mut file).unwrap().read("a").unwrap_err();
    assert!(
        error
            .to_string()
            .contains("a bit past the end of the disk is set"),
        "{error}"
    );
}

/// A cluster that something else uses too is not written to, and not freed.
#[test]
fn clusters_with_other_counts_are_not_freed() {
    let (mut file, _, directory) = sample();
    let refcount_block = u64::from_be_bytes(file[512..520].try_into().unwrap()) as usize;
    let of = refcount_block + directory / 512 * 2 + 1;
    assert_eq!(file[of], 1);
    file[of] = 2;
    let before = file.clone();
    let mut image = Image::open(&mut file).unwrap();
    let error = image.remove("a").unwrap_err();
    assert!(
        error
            .to_string()
            .contains("the refcount of a bitmap's cluster"),
        "{error}"
    );
    assert!(image.write("a", &table(&[]), K64).is_err());
    drop(image);
    assert!(file == before);
    // Counts that call the header free are not believed.
    file[of] = 1;
    file[refcount_block..][..80].fill(0);
    let mut image = Image::open(&mut file).unwrap();
    let error = image.write("c", &table(&[]), K64).unwrap_err();
    assert!(error.to_string().contains("qemu-img check"), "{error}");
}

#[test]
fn an_image_that_needs_repair_is_read_and_not_written() {
    let (mut file, ..) = sample();
    for bit in [1, 2] {
        file[79] = 4 | bit;
        let mut image = Image::open(&mut file).unwrap();
        assert!(image.read("a").is_ok());
        let error = image.write("a", &table(&[]), K64).unwrap_err();
        assert!(error.to_string().contains("it needs repair"), "{error}");
    }
}
