//! One page behind one leaf and one upper entry, and a device that writes it through its caches.

use super::explore::Steps;

/// The state of the leaf in the device's cache.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum Tlb {
    Nothing,
    /// A translation; D was clear when it was cached.
    Clean,
    /// A translation that says "D is set": writes through it do not look at the table.
    Dirty,
}

/// The progress of the device in a write.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum At {
    Idle,
    /// About to read the upper entry in memory.
    Upper,
    /// About to set D in the leaf.
    Leaf,
    /// Translated; the data has not landed.
    Data,
}

/// The table, the memory, and the device.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(super) struct Machine {
    /// Whether the leaf is there.
    present: bool,
    /// The accessed bit of the upper entry.
    pub(super) a: bool,
    /// The dirty bit of the leaf.
    pub(super) d: bool,
    /// Whether the device caches the upper entry.
    upper: bool,
    tlb: Tlb,
    at: At,
    /// The page, which holds the number of its writes.
    pub(super) data: u8,
    /// Writes that the device may still begin.
    writes: u8,
    stopped: bool,
}

impl Machine {
    pub(super) fn new(writes: u8) -> Self {
        Machine {
            present: true,
            a: false,
            d: false,
            upper: false,
            tlb: Tlb::Nothing,
            at: At::Idle,
            data: 0,
            writes,
            stopped: false,
        }
    }

    /// The leaf with D cleared.
    pub(super) fn clean(self) -> Self {
        Machine { d: false, ..self }
    }

    /// The upper entry with A cleared.
    pub(super) fn unaccessed(self) -> Self {
        Machine { a: false, ..self }
    }

    /// No leaf.
    pub(super) fn removed(self) -> Self {
        Machine {
            present: false,
            d: false,
            ..self
        }
    }

    /// The device no longer caches the leaf, and with `subtree` neither the upper entry.
    pub(super) fn flushed(self, subtree: bool) -> Self {
        Machine {
            tlb: Tlb::Nothing,
            upper: self.upper && !subtree,
            ..self
        }
    }

    /// Whether no write is in flight.
    pub(super) fn is_drained(&self) -> bool {
        self.at == At::Idle
    }

    /// Whether no write can follow.
    pub(super) fn is_over(&self) -> bool {
        self.stopped && self.is_drained()
    }

    /// The next steps of the device: a step of a write, a read, an eviction, the end.
    pub(super) fn steps<S>(&self, out: &mut Steps<S>, with: impl Fn(Machine) -> S) {
        let now = *self;
        match now.at {
            At::Idle if !now.stopped => {
                if now.writes > 0 {
                    let at = match now.tlb {
                        Tlb::Dirty => At::Data,
                        Tlb::Clean => At::Leaf,
                        Tlb::Nothing if now.upper => At::Leaf,
                        Tlb::Nothing => At::Upper,
                    };
                    let writes = now.writes - 1;
                    out.push(
                        "device: begins a write",
                        with(Machine { at, writes, ..now }),
                    );
                }
                if now.tlb == Tlb::Nothing && now.present {
                    // Sets A only when it walks through the upper entry in memory.
                    let read = Machine {
                        a: now.a || !now.upper,
                        upper: true,
                        tlb: if now.d { Tlb::Dirty } else { Tlb::Clean },
                        ..now
                    };
                    out.push("device: reads", with(read));
                }
                out.push(
                    "device: stops",
                    with(Machine {
                        stopped: true,
                        ..now
                    }),
                );
            }
            At::Idle => {}
            At::Upper => out.push(
                "device: walks the upper entry, sets A",
                with(Machine {
                    a: true,
                    upper: true,
                    at: At::Leaf,
                    ..now
                }),
            ),
            At::Leaf if now.present => out.push(
                "device: sets D",
                with(Machine {
                    d: true,
                    tlb: Tlb::Dirty,
                    at: At::Data,
                    ..now
                }),
            ),
            At::Leaf => out.push(
                "device: faults",
                with(Machine {
                    at: At::Idle,
                    tlb: Tlb::Nothing,
                    ..now
                }),
            ),
            At::Data => out.push(
                "device: its data lands",
                with(Machine {
                    data: now.data + 1,
                    at: At::Idle,
                    ..now
                }),
            ),
        }
        if now.tlb != Tlb::Nothing {
            let tlb = Tlb::Nothing;
            out.push("device: evicts the leaf", with(Machine { tlb, ..now }));
        }
        if now.upper {
            let upper = false;
            out.push(
                "device: evicts the upper entry",
                with(Machine { upper, ..now }),
            );
        }
    }
}
