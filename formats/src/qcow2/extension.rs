//! The extension of bitmaps in the header: how it comes, changes and goes.

use super::error::QcowError;
use super::file::{ImageFile, read};
use super::header::*;
use super::image::Image;

impl<F: ImageFile> Image<F> {
    /// Whether the header has room for the extension of bitmaps, if it is not there yet. Returns
    /// where the name of the backing file has to go first, if it is in the way.
    pub(super) fn room_for_extension(&self) -> Result<Option<Part>, QcowError> {
        let header = &self.header;
        let end = header.cluster();
        let room = header.backing.map_or(end, |name| name.at);
        // It ends with a mark of 8 bytes, where the mark is now.
        let needed = header.end_at + BITMAPS_LEN + 8;
        if header.bitmaps.is_some() || needed <= room {
            return Ok(None);
        }
        if let Some(name) = header.backing {
            let at = (end - name.len) & !7;
            // The old name stays until the header names the new one. A mark ends the extensions.
            if at >= needed.max(name.at + name.len) && header.end_at + 8 <= name.at {
                return Ok(Some(Part { at, len: name.len }));
            }
        }
        Err(QcowError::Unsupported {
            place: "the room for extensions of the header",
            found: room - header.end_at,
            why: "40 bytes are needed",
        })
    }

    /// Copies the name of the backing file, and then says in the header where it is.
    pub(super) fn move_backing_name(&mut self, to: Part) -> Result<(), QcowError> {
        let place = "the name of the backing file";
        let from = self.header.backing.unwrap_or(to);
        let name = read(&mut self.file, from.at, from.len, place)?;
        self.put(to.at, &name, place)?;
        self.sync()?;
        self.put(AT_BACKING, &to.at.to_be_bytes(), place)?;
        self.sync()
    }

    /// The extension is taken away by the mark that ends all of them, so it has to be the last.
    pub(super) fn extension_ends_the_header(&self) -> Result<(), QcowError> {
        match self.header.bitmaps {
            Some(bitmaps) if !self.header.bitmaps_last => Err(QcowError::Unsupported {
                place: "the offset of the bitmaps' extension",
                found: bitmaps.at,
                why: "another extension follows it: remove the bitmap with qemu-img",
            }),
            _ => Ok(()),
        }
    }

    /// Makes the header name another directory, or none. While the extension is not whole on the
    /// disk, the header does not say that bitmaps are true.
    pub(super) fn switch(&mut self, to: Option<(u64, Part)>) -> Result<(), QcowError> {
        let at = match self.header.bitmaps {
            Some(bitmaps) => bitmaps.at,
            None => self.header.end_at,
        };
        let autoclear = self.header.autoclear;
        let place = "the bitmaps' extension";
        let new = self.header.bitmaps.is_none();
        // A sector is written as a whole.
        let data_at = at + 8;
        let one_sector = data_at / 512 == (data_at + 23) / 512;
        let hidden = to.is_none() || new || !one_sector;
        if hidden && autoclear & HAS_BITMAPS != 0 {
            self.put_autoclear(autoclear & !HAS_BITMAPS)?;
        }
        let Some((count, directory)) = to else {
            self.put(at, &[0; 8], place)?;
            return self.sync();
        };
        let mut bytes = Vec::new();
        bytes.extend_from_slice(&BITMAPS.to_be_bytes());
        bytes.extend_from_slice(&24u32.to_be_bytes());
        bytes.extend_from_slice(&(count as u32).to_be_bytes());
        bytes.extend_from_slice(&[0; 4]);
        bytes.extend_from_slice(&directory.len.to_be_bytes());
        bytes.extend_from_slice(&directory.at.to_be_bytes());
        if new {
            // First what the new extension is followed by and has, then that it is there.
            self.put(at + BITMAPS_LEN, &[0; 8], place)?;
            self.put(data_at, &bytes[8..], place)?;
            self.sync()?;
            self.put(at, &bytes[..8], place)?;
        } else {
            self.put(data_at, &bytes[8..], place)?;
        }
        self.sync()?;
        if hidden {
            self.put_autoclear(autoclear | HAS_BITMAPS)?;
        }
        Ok(())
    }

    pub(super) fn put_autoclear(&mut self, features: u64) -> Result<(), QcowError> {
        let place = "the autoclear features";
        self.put(AT_AUTOCLEAR, &features.to_be_bytes(), place)?;
        self.sync()?;
        self.header.autoclear = features;
        Ok(())
    }
}
