//! The memory of the bits of a bitmap, and the one window of them that is open.
//!
//! Every form of bitmap is a sequence of aligned 64-bit words. Bit `n` of a request is bit `n +
//! shift` of that sequence, where `shift` is the number of bits before the bitmap in its first word
//! (or, for a file, in its first page). So all forms share one way to record and one way to read;
//! they differ in how a window is opened:
//!
//! | form | window | opened by |
//! |---|---|---|
//! | memory | 512 chunks | nothing to do |
//! | sparse | one chunk | a lookup; recording allocates the chunk if it is absent |
//! | file, to record | 2 MiB, or as told | mapping it, if the file has it, and its system room |
//! | file, to read | 64 KiB | copying it, after a look at the length of the file |

#[cfg(all(feature = "mmap", not(dirtymap_loom)))]
use super::file::{FileBitmap, Mapping};
use super::span::Span;
use super::{MAX_BITS, SparseBitmap, WINDOW_BITS};
use crate::chunkmap::{CHUNK_WORDS, ChunkMap, LINE_WORDS};
use crate::error::BitmapError;
use crate::sync::{AtomicU64, Ordering};

/// The memory of the bits of a bitmap.
#[derive(Clone, Copy, Debug)]
pub(super) enum Backing<'a> {
    /// In the caller's memory.
    Memory(Span<'a>),
    /// In memory in which only the first words can be recorded.
    #[cfg(not(any(dirtymap_loom, dirtymap_shuttle)))]
    Failing(Span<'a>, u64),
    /// In chunks that are allocated when they are needed.
    Sparse(&'a SparseBitmap),
    /// In chunks with summaries, which one writer records in.
    Chunks(&'a ChunkMap),
    /// In a file of which one window is mapped at a time.
    #[cfg(all(feature = "mmap", not(dirtymap_loom)))]
    File(&'a FileBitmap),
}

impl<'a> Backing<'a> {
    /// How many bits the bitmap holds, as of now.
    pub(super) fn bits(&self) -> u64 {
        let bits = match self {
            Backing::Memory(span) => span.bits(),
            #[cfg(not(any(dirtymap_loom, dirtymap_shuttle)))]
            Backing::Failing(span, _) => span.bits(),
            Backing::Sparse(sparse) => sparse.bits(),
            Backing::Chunks(map) => map.last().saturating_add(1),
            #[cfg(all(feature = "mmap", not(dirtymap_loom)))]
            Backing::File(file) => file.bits(),
        };
        bits.min(MAX_BITS)
    }

    /// The position of bit 0 in the row of words.
    pub(super) fn shift(&self) -> u64 {
        match self {
            Backing::Memory(span) => span.skipped_bits(),
            #[cfg(not(any(dirtymap_loom, dirtymap_shuttle)))]
            Backing::Failing(span, _) => span.skipped_bits(),
            Backing::Sparse(_) | Backing::Chunks(_) => 0,
            #[cfg(all(feature = "mmap", not(dirtymap_loom)))]
            Backing::File(file) => file.shift(),
        }
    }

    /// The window that holds `word`, for recording. The position `last` is the last one of the
    /// request.
    #[cfg_attr(
        not(all(feature = "mmap", not(dirtymap_loom))),
        expect(unused_variables)
    )]
    pub(super) fn window(&self, word: u64, last: u64) -> Result<Window<'a>, BitmapError> {
        Ok(match self {
            Backing::Memory(span) => Window::of_memory(*span, word),
            #[cfg(not(any(dirtymap_loom, dirtymap_shuttle)))]
            Backing::Failing(span, good) if word < *good => Window::lent((0, *span, *good)),
            #[cfg(not(any(dirtymap_loom, dirtymap_shuttle)))]
            Backing::Failing(..) => {
                return Err(BitmapError::Window {
                    at: word * 8,
                    error: std::io::Error::other("a test refuses it"),
                });
            }
            Backing::Sparse(sparse) => Window::lent(sparse.chunk(word)),
            Backing::Chunks(map) => {
                let chunk = word / CHUNK_WORDS;
                let (words, summary) = map.words_to_record(chunk);
                Window {
                    first: chunk * CHUNK_WORDS,
                    words: CHUNK_WORDS,
                    bits: Bits::Noted {
                        span: Span::of_words(words),
                        origin: chunk * CHUNK_WORDS,
                        summary,
                    },
                }
            }
            #[cfg(all(feature = "mmap", not(dirtymap_loom)))]
            Backing::File(file) => Window::of_file(file, word, last)?,
        })
    }

    /// Whether there may be a window that cannot be opened.
    #[inline]
    pub(super) fn may_fail(&self) -> bool {
        match self {
            Backing::Memory(_) | Backing::Sparse(_) | Backing::Chunks(_) => false,
            #[cfg(not(any(dirtymap_loom, dirtymap_shuttle)))]
            Backing::Failing(..) => true,
            #[cfg(all(feature = "mmap", not(dirtymap_loom)))]
            Backing::File(_) => true,
        }
    }

    /// The first window that holds `word` or a later one up to the position `last`, for reading.
    /// `None` if all those words are absent, so zero.
    pub(super) fn next_window(
        &self,
        word: u64,
        last: u64,
    ) -> Result<Option<Window<'a>>, BitmapError> {
        match self {
            Backing::Memory(span) => Ok(Some(Window::of_memory(*span, word))),
            Backing::Sparse(sparse) => Ok(sparse.next_chunk(word, last / 64).map(Window::lent)),
            Backing::Chunks(map) => {
                let found = map.next_words(word / CHUNK_WORDS, last / 64 / CHUNK_WORDS);
                Ok(found.map(|(chunk, words)| {
                    Window::lent((chunk * CHUNK_WORDS, Span::of_words(words), CHUNK_WORDS))
                }))
            }
            #[cfg(not(any(dirtymap_loom, dirtymap_shuttle)))]
            Backing::Failing(span, _) => Ok(Some(Window::of_memory(*span, word))),
            #[cfg(all(feature = "mmap", not(dirtymap_loom)))]
            Backing::File(file) => Window::copy_of_file(file, word, last).map(Some),
        }
    }

    /// A stand-in for the window that holds `word` and cannot be opened: all of its bits count as
    /// set.
    pub(super) fn unreadable(&self, word: u64) -> Window<'a> {
        let words = match self {
            #[cfg(all(feature = "mmap", not(dirtymap_loom)))]
            Backing::File(file) => file.copied_words(),
            _ => WINDOW_BITS / 64,
        };
        Window {
            first: word / words * words,
            words,
            bits: Bits::Unreadable,
        }
    }
}

/// The words that are open.
#[derive(Debug)]
pub(super) struct Window<'a> {
    first: u64,
    words: u64,
    bits: Bits<'a>,
}

#[derive(Debug)]
enum Bits<'a> {
    /// In memory; word 0 of the span is word `origin` of the bitmap.
    Lent { span: Span<'a>, origin: u64 },
    /// A chunk of which `summary` says in which lines its one writer has recorded.
    Noted {
        span: Span<'a>,
        origin: u64,
        summary: &'a AtomicU64,
    },
    /// In a mapping that the window owns.
    #[cfg(all(feature = "mmap", not(dirtymap_loom)))]
    Mapped(Mapping),
    /// A copy of a part of a file, to be read.
    #[cfg(all(feature = "mmap", not(dirtymap_loom)))]
    Copied(Vec<[u8; 8]>),
    /// No words.
    Unreadable,
}

impl<'a> Window<'a> {
    /// A window that holds no word.
    pub(super) fn none() -> Self {
        Window {
            first: 0,
            words: 0,
            bits: Bits::Unreadable,
        }
    }

    fn of_memory(span: Span<'a>, word: u64) -> Self {
        let words = WINDOW_BITS / 64;
        Window {
            first: word / words * words,
            words,
            bits: Bits::Lent { span, origin: 0 },
        }
    }

    /// A chunk and its first word.
    fn lent((first, span, words): (u64, Span<'a>, u64)) -> Self {
        Window {
            first,
            words,
            bits: Bits::Lent {
                span,
                origin: first,
            },
        }
    }

    #[cfg(all(feature = "mmap", not(dirtymap_loom)))]
    fn of_file(file: &'a FileBitmap, word: u64, last: u64) -> Result<Self, BitmapError> {
        let words = file.window_words();
        let first = word / words * words;
        Ok(Window {
            first,
            words,
            bits: Bits::Mapped(file.map(first, last)?),
        })
    }

    #[cfg(all(feature = "mmap", not(dirtymap_loom)))]
    fn copy_of_file(file: &'a FileBitmap, word: u64, last: u64) -> Result<Self, BitmapError> {
        let words = file.copied_words();
        let first = word / words * words;
        Ok(Window {
            first,
            words,
            bits: Bits::Copied(file.copy(first, last)?),
        })
    }

    /// Whether `word` is in the window.
    #[inline]
    pub(super) fn holds(&self, word: u64) -> bool {
        word.wrapping_sub(self.first) < self.words
    }

    /// The first word.
    pub(super) fn first(&self) -> u64 {
        self.first
    }

    /// The first word after the window.
    pub(super) fn end(&self) -> u64 {
        self.first + self.words
    }

    /// Sets the bits of `mask` in `word`, and returns those that were clear.
    #[inline]
    pub(super) fn or(&self, word: u64, mask: u64) -> u64 {
        self.with(word, |span, index| span.or(index, mask))
            .unwrap_or(0)
    }

    /// As [`or`](Self::or), where no other thread writes to the word meanwhile.
    #[inline]
    pub(super) fn or_alone(&self, word: u64, mask: u64) -> u64 {
        self.with(word, |span, index| span.or_alone(index, mask))
            .unwrap_or(0)
    }

    /// The whole words from `word` on that the window has, up to `words` of them.
    #[inline]
    pub(super) fn words(&self, word: u64, words: u64) -> &[AtomicU64] {
        if !self.holds(word) {
            return &[];
        }
        if let Bits::Noted { .. } = self.bits {
            return &[]; // each word is noted when it is recorded
        }
        let words = words.min(self.end() - word) as usize;
        self.with(word, |span, index| span.words(index, words))
            .unwrap_or(&[])
    }

    /// Clears the bits of `mask` in `word`, and returns those that were set.
    pub(super) fn and_not(&self, word: u64, mask: u64) -> u64 {
        self.with(word, |span, index| span.and_not(index, mask))
            .unwrap_or(0)
    }

    /// The bits of `word`.
    #[inline]
    pub(super) fn load(&self, word: u64) -> u64 {
        #[cfg(all(feature = "mmap", not(dirtymap_loom)))]
        if let Bits::Copied(words) = &self.bits {
            let copied = words.get((word - self.first) as usize);
            return copied.map_or(0, |bytes| u64::from_le_bytes(*bytes));
        }
        self.with(word, |span, index| span.load(index))
            .unwrap_or(u64::MAX)
    }

    /// The first word of `from..=last` that is not zero, as far as the window reaches.
    pub(super) fn find(&self, from: u64, last: u64) -> Option<u64> {
        (from..self.end().min(last.saturating_add(1))).find(|word| self.load(*word) != 0)
    }

    /// Calls `access` with the span that holds `word`, and the word's place in it. A span that is
    /// lent is not copied.
    #[inline]
    fn with<'s, R>(&'s self, word: u64, access: impl FnOnce(&Span<'s>, usize) -> R) -> Option<R> {
        debug_assert!(self.holds(word));
        match &self.bits {
            Bits::Lent { span, origin } => Some(access(span, (word - origin) as usize)),
            Bits::Noted {
                span,
                origin,
                summary,
            } => {
                let nth = (word - origin) as usize;
                // Relaxed, both: of the one writer; its Release fence before it clears what it has
                // recorded orders the summary and the word.
                let lines = summary.load(Ordering::Relaxed);
                summary.store(lines | 1 << (nth / LINE_WORDS), Ordering::Relaxed);
                Some(access(span, nth))
            }
            #[cfg(all(feature = "mmap", not(dirtymap_loom)))]
            Bits::Mapped(mapping) => {
                let (span, origin) = mapping.span();
                Some(access(&span, (word - origin) as usize))
            }
            #[cfg(all(feature = "mmap", not(dirtymap_loom)))]
            Bits::Copied(_) => {
                debug_assert!(false, "a copy is read, never written");
                None
            }
            Bits::Unreadable => None,
        }
    }
}
