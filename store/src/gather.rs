//! Group commit: how many threads a leader waits for before it writes a batch.
//!
//! ```text
//!  wait --> waiting --take--> taken --served--> they write, and come back
//!              ^                                        |
//!              +---- complete: all that are expected <--+
//! ```
//!
//! Threads that waited together tend to wait together again. So a leader yields to the threads that
//! the last batch served. A leader that does not would have half of them in each batch, and would
//! take two flushes where one is enough.

use dirtymap::sync::TINY;

/// How often in a row a leader yields without a new thread that waits.
pub(crate) const PATIENCE: u32 = if TINY { 1 } else { 64 };

/// Threads that wait for extents.
#[derive(Debug, Default)]
pub(crate) struct Gather {
    /// The threads that wait for a batch that no leader has taken yet.
    waiting: usize,
    /// The threads that wait for the batch that a leader writes.
    taken: usize,
    /// The threads that the last batch served, and those that waited when it was durable.
    expected: usize,
    /// A thread will lead, and yields to others meanwhile.
    pub(crate) gathering: bool,
}

impl Gather {
    /// A thread waits from now on. Its records are in the queue.
    pub(crate) fn arrive(&mut self) {
        self.waiting += 1;
    }

    /// A leader takes the records of the queue: all that wait are in its batch.
    pub(crate) fn take(&mut self) {
        self.taken = std::mem::take(&mut self.waiting);
    }

    /// The batch is durable.
    pub(crate) fn served(&mut self) {
        self.expected = std::mem::take(&mut self.taken) + self.waiting;
    }

    /// The number of threads that wait for the next batch.
    pub(crate) fn waiting(&self) -> usize {
        self.waiting
    }

    /// Whether all expected threads wait. True for a thread that is alone.
    pub(crate) fn is_complete(&self) -> bool {
        self.waiting >= self.expected
    }
}

#[cfg(test)]
mod tests {
    use super::Gather;

    /// Three threads are served while two wait already. The next batch is for all five: the three
    /// come back as soon as they have written.
    #[test]
    fn a_batch_waits_for_the_threads_that_the_last_one_served() {
        let mut gather = Gather::default();
        (0..3).for_each(|_| gather.arrive());
        assert!(gather.is_complete(), "nobody else is known");
        gather.take();
        (0..2).for_each(|_| gather.arrive());
        gather.served();
        assert!(!gather.is_complete(), "the three are away, and come back");
        (0..2).for_each(|_| gather.arrive());
        assert!(!gather.is_complete());
        gather.arrive();
        assert!(gather.is_complete());
    }

    /// The other threads are gone: the next batch waits for them in vain, and no later one.
    #[test]
    fn a_thread_that_is_alone_waits_for_nobody() {
        let mut gather = Gather::default();
        (0..5).for_each(|_| gather.arrive());
        gather.take();
        gather.served();
        gather.arrive();
        assert!(!gather.is_complete());
        gather.take();
        gather.served();
        gather.arrive();
        assert!(gather.is_complete());
    }
}
