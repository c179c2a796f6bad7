//! One sequence: calls that are drawn, made, and measured.

use std::io::{self, Write};

use dirtymap_iommufd::Device;

use super::bitmap::{Bitmap, pairs, ranges};
use super::model::{Area, Areas, Run};
use super::rng::Rng;
use super::tags::Read;
use crate::memory::{Memory, PAGE, Rights};
use crate::mock::{APERTURE, Flags, GRANULE, Get, Iommu, MockDevice, errno};

/// Where areas are mapped: so many bytes from the start of the aperture on.
const WINDOW: u64 = 24 << 20;
/// The size of a large page of the system.
const LARGE: u64 = 2 << 20;
/// No leaf is larger: areas of large pages have at most three of them.
const LARGEST: u64 = 4 << 20;
const NO_CLEAR: u32 = 1;

/// A page table of the sequence.
struct Table {
    id: u32,
    /// Whether it was allocated with tracking.
    tracks: bool,
    /// Whether tracking is on.
    on: bool,
}

/// A sequence under way. Its file of iommufd is closed before the memory goes.
pub(crate) struct Sequence {
    number: u64,
    op: u64,
    iommu: Iommu,
    ioas: u32,
    _device: MockDevice,
    tables: Vec<Table>,
    /// A page table that is not recorded, by which leaves are found.
    probe: u32,
    alignment: u64,
    huge: bool,
    areas: Areas,
}

type Done<T> = Result<T, Box<dyn std::error::Error>>;

impl Sequence {
    /// Sets up an IOAS, and records its shape.
    pub(crate) fn begin(number: u64, rng: &mut Rng, out: &mut impl Write) -> Done<Self> {
        let huge = number % 3 == 2;
        let large = number % 4 != 3;
        let iommu = Iommu::open()?;
        let ioas = iommu.ioas()?;
        if !large {
            iommu.set_huge_pages(ioas, false)?;
        }
        let flags = Flags {
            huge,
            ..Flags::default()
        };
        let device = iommu.device(ioas, flags)?;
        let mut tables = Vec::new();
        for nth in 0..1 + rng.below(3) {
            let tracks = nth == 0 || !rng.once_in(3);
            let id = iommu.hwpt(device.id(), ioas, tracks)?;
            let on = false;
            tables.push(Table { id, tracks, on });
        }
        let probe = iommu.hwpt(device.id(), ioas, true)?;
        iommu.track(probe, 1)?;
        let (ranges, alignment) = iommu.usable(ioas)?;
        let shapes: Vec<String> = tables
            .iter()
            .map(|table| format!("{{\"alloc_dirty_tracking\":{}}}", table.tracks))
            .collect();
        writeln!(
            out,
            "{{\"t\":\"seq\",\"seq\":{number},\"name\":\"{}\",\"pagetable\":\"{}\",\
             \"option_huge_pages\":{},\"granule\":{GRANULE},\"iova_alignment\":{alignment},\
             \"iova_ranges\":{},\"hwpts\":[{}]}}",
            if huge { "large pages" } else { "small leaves" },
            if huge { "huge" } else { "default" },
            u8::from(large),
            pairs(&ranges),
            shapes.join(",")
        )?;
        Ok(Sequence {
            number,
            op: 0,
            iommu,
            ioas,
            _device: device,
            tables,
            probe,
            alignment,
            huge,
            areas: Areas::default(),
        })
    }

    /// Draws a call, makes it, and records it.
    pub(crate) fn call(&mut self, rng: &mut Rng, out: &mut impl Write) -> Done<()> {
        let fields = match (self.op, rng.below(20)) {
            (0..2, _) | (_, 0..3) => self.map(rng)?,
            (2..4, _) => self.track(self.op as i64 - 2, 1)?,
            (_, 3) => self.unmap(rng)?,
            (_, 4) => {
                let hwpt = self.draw_table(rng);
                self.track(hwpt, rng.of(&[1, 1, 1, 1, 0, 2]).unwrap_or(1))?
            }
            (_, 5..11) => self.dirty(rng)?,
            _ => self.get(rng)?,
        };
        let (seq, i) = (self.number, self.op);
        writeln!(out, "{{\"t\":\"op\",\"seq\":{seq},\"i\":{i},{fields}}}")?;
        self.op += 1;
        Ok(())
    }

    /// A page table by its place; -1 is one that does not exist.
    fn draw_table(&self, rng: &mut Rng) -> i64 {
        if rng.once_in(20) {
            return -1;
        }
        let any = rng.below(self.tables.len() as u64) as i64;
        // The first one tracks.
        if rng.once_in(2) { any } else { 0 }
    }

    fn table(&self, place: i64) -> Option<&Table> {
        self.tables.get(usize::try_from(place).ok()?)
    }

    /// Its number in iommufd; one that does not exist for -1.
    fn id(&self, place: i64) -> u32 {
        self.table(place).map_or(u32::MAX, |table| table.id)
    }

    /// What is dirty in a page table, if that can be asked: the field `after`.
    fn after(&self, place: i64) -> io::Result<String> {
        match self.table(place).filter(|table| table.on) {
            Some(table) => Ok(pairs(&self.state(table.id)?)),
            None => Ok("null".into()),
        }
    }

    /// What is dirty in all areas.
    fn state(&self, hwpt: u32) -> io::Result<Vec<Run>> {
        let mut all = Vec::new();
        for (start, area) in &self.areas.0 {
            all.extend(self.look(hwpt, (*start, area.length), NO_CLEAR)?);
        }
        Ok(all)
    }

    /// The dirty granules of a range, and of a leaf that extends above it.
    fn look(&self, hwpt: u32, (iova, length): Run, flags: u32) -> io::Result<Vec<Run>> {
        // A leaf that extends past the range has room, too.
        let bits = length / GRANULE + LARGEST / GRANULE;
        let mut words = vec![0u64; usize::try_from(bits.div_ceil(64)).unwrap_or(0)];
        let get = Get {
            iova,
            length,
            page_size: GRANULE,
            flags,
            reserved: 0,
            data: words.as_mut_ptr().expose_provenance() as u64,
        };
        self.iommu.dirty(hwpt, &get)?;
        Ok(ranges(&words, iova, GRANULE))
    }

    fn map(&mut self, rng: &mut Rng) -> Done<String> {
        let hugetlb = self.huge && !rng.once_in(3);
        let unit = if hugetlb { LARGE } else { self.alignment };
        let length = unit * (1 + rng.below(if hugetlb { 3 } else { 200 }));
        let mut iova = APERTURE + rng.below(WINDOW / unit) * unit;
        // Often right after another area.
        if rng.once_in(2)
            && let Some((start, area)) = self.areas.0.last_key_value()
        {
            iova = start + area.length;
        }
        let odd = rng.once_in(16);
        if odd {
            iova = rng
                .of(&[0, iova + 512, (1 << 31) - length / 2])
                .unwrap_or(iova);
        }
        let writeable = !rng.once_in(8);
        let bytes = usize::try_from(length)?.next_multiple_of(PAGE) + PAGE;
        let bytes = if hugetlb {
            usize::try_from(length)?
        } else {
            bytes
        };
        let memory = Memory::new(bytes, hugetlb)?;
        let va_off = match self.alignment {
            GRANULE if !hugetlb && rng.once_in(3) => GRANULE,
            _ => 0,
        };
        let done = self.iommu.map(
            self.ioas,
            (iova, length),
            memory.address() + va_off,
            writeable,
        );
        let errno = errno(&done);
        let mut layout = Vec::new();
        if errno == 0 {
            let leaves = self.leaves((iova, length))?;
            let ptes = ptes(&leaves);
            layout = (0..self.tables.len())
                .map(
                    |hwpt| match self.tables.get(hwpt).is_some_and(|table| table.tracks) {
                        true => format!("{{\"hwpt\":{hwpt},\"ptes\":[{ptes}]}}"),
                        false => format!("{{\"hwpt\":{hwpt}}}"),
                    },
                )
                .collect();
            let area = Area {
                length,
                leaves,
                _memory: memory,
            };
            self.areas.0.insert(iova, area);
        }
        let backing = if hugetlb { "hugetlb" } else { "anon" };
        Ok(format!(
            "\"op\":\"map\",\"iova\":{iova},\"length\":{length},\"backing\":\"{backing}\",\
             \"va_off\":{va_off},\"writeable\":{writeable},\"errno\":{errno},\"layout\":[{}]",
            layout.join(",")
        ))
    }

    /// The leaves of a new area: each granule that no leaf has yet is made dirty, and what is dirty
    /// then is a leaf.
    fn leaves(&self, (iova, length): Run) -> Done<Vec<Run>> {
        let (mut at, end) = (iova, iova + length);
        let mut leaves = Vec::new();
        while at < end {
            self.iommu.write(self.probe, at, &[1], 1)?;
            // Reads begin and end at multiples of the alignment, which leaves need not do.
            let from = at / self.alignment * self.alignment;
            let mut seen = None;
            // Most leaves are small; a leaf that fills the look may be larger.
            for granules in [16, LARGEST / GRANULE] {
                let looked = (from, (granules * GRANULE).min(end - from));
                seen = self.look(self.probe, looked, NO_CLEAR)?.first().copied();
                if seen.is_some_and(|(_, len)| len < looked.1) {
                    break;
                }
            }
            let leaf = seen.filter(|(start, _)| *start == at);
            let Some((_, size)) = leaf.filter(|(_, size)| size.is_power_of_two()) else {
                return Err(format!("a leaf at {at:#x} that is none: {seen:?}").into());
            };
            let whole = (at + size - from).next_multiple_of(self.alignment);
            self.look(self.probe, (from, whole), 0)?;
            leaves.push((at, size));
            at += size;
        }
        Ok(leaves)
    }

    fn unmap(&mut self, rng: &mut Rng) -> Done<String> {
        let areas: Vec<Run> = self
            .areas
            .0
            .iter()
            .map(|(at, area)| (*at, area.length))
            .collect();
        let (start, len) = rng.of(&areas).unwrap_or((APERTURE, GRANULE));
        let (iova, length) = match rng.below(6) {
            0 => (start, len + GRANULE * rng.below(512)),
            1 => (start, len / 2 / GRANULE * GRANULE + GRANULE),
            2 if rng.once_in(3) => (0, u64::MAX),
            3 => (start.saturating_sub(GRANULE * 4), len + GRANULE * 8),
            _ => (start, len),
        };
        let done = self.iommu.unmap(self.ioas, iova, length);
        let (errno, unmapped) = (errno(&done), done.unwrap_or(0));
        self.areas.unmap(iova, iova.saturating_add(length - 1));
        let after = self.after(0)?;
        Ok(format!(
            "\"op\":\"unmap\",\"iova\":{iova},\"length\":{length},\"errno\":{errno},\
             \"unmapped\":{unmapped},\"after\":{after}"
        ))
    }

    fn track(&mut self, hwpt: i64, flags: u32) -> Done<String> {
        let errno = errno(&self.iommu.track(self.id(hwpt), flags));
        let table = usize::try_from(hwpt)
            .ok()
            .and_then(|hwpt| self.tables.get_mut(hwpt));
        if let (0, Some(table)) = (errno, table) {
            table.on = flags == 1;
        }
        let after = self.after(hwpt)?;
        Ok(format!(
            "\"op\":\"track\",\"hwpt\":{hwpt},\"flags\":{flags},\"reserved\":0,\
             \"errno\":{errno},\"after\":{after}"
        ))
    }

    /// A device writes to some granules near an area.
    fn dirty(&mut self, rng: &mut Rng) -> Done<String> {
        let hwpt = self.draw_table(rng).max(0);
        let areas: Vec<Run> = self
            .areas
            .0
            .iter()
            .map(|(at, area)| (*at, area.length))
            .collect();
        let (start, len) = rng.of(&areas).unwrap_or((APERTURE, LARGE));
        let count = len / GRANULE + 4;
        let mut words = vec![0u64; usize::try_from(count.div_ceil(64))?];
        let mut granules = Vec::new();
        let mut at = rng.below(8);
        while at < count && granules.len() < 40 {
            let run = (1 + rng.below(3)).min(count - at);
            for bit in at..at + run {
                if let Some(word) = words.get_mut((bit / 64) as usize) {
                    *word |= 1 << (bit % 64);
                }
            }
            granules.push((start + at * GRANULE, run));
            at += run + 1 + rng.below(1 + count / 20);
        }
        let done = self.iommu.write(self.id(hwpt), start, &words, count);
        let (errno, nr) = (errno(&done), done.unwrap_or(0));
        let after = self.after(hwpt)?;
        Ok(format!(
            "\"op\":\"dirty\",\"hwpt\":{hwpt},\"granules\":{},\"errno\":{errno},\"nr\":{nr},\
             \"after\":{after}",
            pairs(&granules)
        ))
    }

    fn get(&mut self, rng: &mut Rng) -> Done<String> {
        let hwpt = self.draw_table(rng);
        let (get, bitmap) = self.draw_get(rng)?;
        let tracked = self.table(hwpt).is_some_and(|table| table.on);
        let dirty = match self.table(hwpt).filter(|table| table.on) {
            Some(table) => self.state(table.id)?,
            None => Vec::new(),
        };
        let errno = errno(&self.iommu.dirty(self.id(hwpt), &get));
        let tags = Read {
            get: &get,
            errno,
            tracked,
            bitmap: bitmap.as_ref(),
            areas: &self.areas,
            dirty: &dirty,
        }
        .tags();
        let changed = |one| {
            bitmap
                .as_ref()
                .map_or(Vec::new(), |bitmap| bitmap.changed(one))
        };
        let (new, lost) = (pairs(&changed(true)), pairs(&changed(false)));
        let buf = bitmap.as_ref().map_or("null".into(), Bitmap::json);
        let after = self.after(hwpt)?;
        let Get {
            iova,
            length,
            page_size,
            flags,
            reserved,
            ..
        } = get;
        Ok(format!(
            "\"op\":\"get\",\"hwpt\":{hwpt},\"iova\":{iova},\"length\":{length},\
             \"page_size\":{page_size},\"flags\":{flags},\"reserved\":{reserved},\"buf\":{buf},\
             \"errno\":{errno},\"new\":{new},\"lost\":{lost},\"after\":{after},\
             \"tags\":[\"{}\"]",
            tags.join("\",\"")
        ))
    }

    /// The arguments of a read: mostly a range of whole areas, sometimes a part, or nonsense.
    fn draw_get(&self, rng: &mut Rng) -> Done<(Get, Option<Bitmap>)> {
        let areas: Vec<Run> = self
            .areas
            .0
            .iter()
            .map(|(at, area)| (*at, area.length))
            .collect();
        let (start, len) = rng.of(&areas).unwrap_or((APERTURE, LARGE));
        let sizes = [
            GRANULE,
            GRANULE,
            GRANULE,
            4096,
            4096,
            4096,
            8192,
            1 << 16,
            1 << 20,
            512,
            6144,
        ];
        let page_size = rng.of(&sizes).unwrap_or(GRANULE);
        let unit = page_size.max(self.alignment);
        let round = |at: u64| at.next_multiple_of(unit);
        let (from, to) = match rng.below(10) {
            0..2 => (start + rng.below(len), start + len),
            2..4 => (start, start + rng.below(len)),
            4 => (start.saturating_sub(LARGE), start + len + LARGE),
            _ => (start, start + len),
        };
        let (mut iova, mut length) = (round(from), round(to).saturating_sub(round(from)));
        // The kernels differ about no bytes at all.
        length = length.max(unit).min(32 << 20);
        let (mut flags, mut reserved) = (u32::from(rng.once_in(3)) * NO_CLEAR, 0);
        match rng.below(40) {
            0 => iova += 256,
            1 => length += 256,
            2 => iova = u64::MAX - unit + 1,
            3 => flags |= 2,
            4 => reserved = 1,
            _ => (),
        }
        let bits = length / page_size.min(GRANULE);
        let off = rng.of(&[0, 0, 0, 8, 2048, 4081]).unwrap_or(0);
        let fill = rng.of(&[0, 0, 0, 0xff, 0x55]).unwrap_or(0);
        let mut bitmap = Bitmap::new(bits, off, fill)?;
        match rng.below(16) {
            0 => bitmap.protect(0, Rights::Ro)?,
            1 => bitmap.protect(0, Rights::None)?,
            _ => (),
        }
        let bitmap = Some(bitmap).filter(|_| !rng.once_in(40));
        let get = Get {
            iova,
            length,
            page_size,
            flags,
            reserved,
            data: bitmap.as_ref().map_or(0, Bitmap::address),
        };
        Ok((get, bitmap))
    }
}

/// Leaves as `[first, size, count]`.
fn ptes(leaves: &[Run]) -> String {
    let mut runs: Vec<(u64, u64, u64)> = Vec::new();
    for (start, size) in leaves {
        match runs.last_mut() {
            Some((_, same, count)) if same == size => *count += 1,
            _ => runs.push((*start, *size, 1)),
        }
    }
    let runs: Vec<String> = runs
        .iter()
        .map(|(start, size, count)| format!("[{start},{size},{count}]"))
        .collect();
    runs.join(",")
}
