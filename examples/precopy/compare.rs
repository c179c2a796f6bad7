//! The verdict: source and destination page by page, differing neighbours merged into ranges.

use serde::Serialize;

/// The number of differing ranges that are stored. All are counted.
const KEPT_RANGES: usize = 10;

/// The result of a comparison byte for byte so far.
#[derive(Clone, Debug, Default, Serialize)]
pub(crate) struct Comparison {
    /// Pages of 4 KiB that were compared.
    pub(crate) pages_compared: u64,
    /// Bytes that were compared.
    pub(crate) bytes_compared: u64,
    /// Pages in which at least one byte differs.
    pub(crate) differing_pages: u64,
    /// Bytes that differ.
    pub(crate) differing_bytes: u64,
    /// Runs of neighbouring differing pages.
    pub(crate) differing_ranges: u64,
    /// The first of these runs.
    pub(crate) first_differing_ranges: Vec<DifferingRange>,
    /// IOVA and file of the last differing page, the end of the current run.
    #[serde(skip)]
    last_differing: Option<(u64, u32)>,
}

/// Neighbouring pages of one file that all differ.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct DifferingRange {
    /// The first IOVA.
    pub(crate) iova_start: u64,
    /// The last IOVA, included.
    pub(crate) iova_last: u64,
    /// The file of the trace.
    pub(crate) file: String,
    /// The offset of the range in the file, in bytes.
    pub(crate) file_offset: u64,
    /// The number of pages.
    pub(crate) pages: u64,
    /// The number of their bytes that differ.
    pub(crate) differing_bytes: u64,
}

/// The place of a page.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PageAt<'a> {
    /// Its first IOVA.
    pub(crate) iova: u64,
    /// Index of its file in the trace.
    pub(crate) file: u32,
    /// The file's name.
    pub(crate) name: &'a str,
    /// Its offset in the file, in bytes.
    pub(crate) offset: u64,
}

impl Comparison {
    /// Whether all compared pages are identical.
    pub(crate) fn identical(&self) -> bool {
        self.differing_pages == 0
    }

    /// Compares one page. Pages come in the order of their IOVAs. If one side is longer, its
    /// additional bytes differ.
    pub(crate) fn page(&mut self, at: PageAt<'_>, source: &[u8], destination: &[u8]) {
        let bytes = source.len().max(destination.len()) as u64;
        self.pages_compared += 1;
        self.bytes_compared += bytes;
        if source == destination {
            return;
        }
        let common = source
            .iter()
            .zip(destination)
            .filter(|(a, b)| a == b)
            .count() as u64;
        let differing = bytes - common;
        let last = at.iova + bytes.saturating_sub(1);
        self.differing_pages += 1;
        self.differing_bytes += differing;

        let follows = self
            .last_differing
            .is_some_and(|(end, file)| end.checked_add(1) == Some(at.iova) && file == at.file);
        self.last_differing = Some((last, at.file));
        if !follows {
            self.differing_ranges += 1;
            if self.first_differing_ranges.len() < KEPT_RANGES {
                self.first_differing_ranges.push(DifferingRange {
                    iova_start: at.iova,
                    iova_last: last,
                    file: at.name.to_owned(),
                    file_offset: at.offset,
                    pages: 1,
                    differing_bytes: differing,
                });
            }
        } else if self.differing_ranges <= KEPT_RANGES as u64
            && let Some(run) = self.first_differing_ranges.last_mut()
        {
            run.iova_last = last;
            run.pages += 1;
            run.differing_bytes += differing;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Compares `pages` pages of one file; `differs` tells for each page whether one of its bytes
    /// has changed.
    fn compare(pages: u64, differs: impl Fn(u64) -> bool) -> Comparison {
        let mut comparison = Comparison::default();
        let source = [7; 4096];
        let mut changed = source;
        changed[100] = 8;
        for page in 0..pages {
            let at = PageAt {
                iova: 0x10000 + page * 4096,
                file: 0,
                name: "base/5/16396",
                offset: page * 4096,
            };
            comparison.page(at, &source, if differs(page) { &changed } else { &source });
        }
        comparison
    }

    #[test]
    fn identical_pages_are_counted_only() {
        let comparison = compare(5, |_| false);
        assert!(comparison.identical());
        assert_eq!(
            (comparison.pages_compared, comparison.bytes_compared),
            (5, 20480)
        );
        assert_eq!(comparison.differing_ranges, 0);
    }

    #[test]
    fn neighbours_are_one_range() {
        let comparison = compare(10, |page| [2, 3, 4, 9].contains(&page));
        assert!(!comparison.identical());
        assert_eq!(
            (comparison.differing_pages, comparison.differing_bytes),
            (4, 4)
        );
        assert_eq!(comparison.differing_ranges, 2);
        let first = &comparison.first_differing_ranges[0];
        assert_eq!((first.iova_start, first.iova_last), (0x12000, 0x14fff));
        assert_eq!(
            (first.file_offset, first.pages, first.differing_bytes),
            (8192, 3, 3)
        );
    }

    #[test]
    fn files_side_by_side_are_two_ranges() {
        let mut comparison = Comparison::default();
        for file in 0..2 {
            let at = PageAt {
                iova: u64::from(file) * 4096,
                file,
                name: "f",
                offset: 0,
            };
            comparison.page(at, &[0; 4096], &[1; 4096]);
        }
        assert_eq!(
            (comparison.differing_ranges, comparison.differing_bytes),
            (2, 8192)
        );
    }

    #[test]
    fn all_ranges_are_counted_but_only_the_first_kept() {
        let comparison = compare(100, |page| page % 3 != 0);
        assert_eq!(
            (comparison.differing_ranges, comparison.differing_pages),
            (33, 66)
        );
        assert_eq!(comparison.first_differing_ranges.len(), KEPT_RANGES);
        assert!(
            comparison
                .first_differing_ranges
                .iter()
                .all(|range| range.pages == 2)
        );
    }

    #[test]
    fn a_missing_page_differs_in_every_byte() {
        let mut comparison = Comparison::default();
        let at = PageAt {
            iova: u64::MAX - 4095,
            file: 0,
            name: "f",
            offset: 0,
        };
        comparison.page(at, &[0; 4096], &[]);
        assert_eq!(
            (comparison.bytes_compared, comparison.differing_bytes),
            (4096, 4096)
        );
        assert_eq!(comparison.first_differing_ranges[0].iova_last, u64::MAX);
    }
}
