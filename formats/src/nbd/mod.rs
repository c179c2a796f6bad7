//! Dirty state over the protocol of network block devices (NBD).
//!
//! ```text
//!  lease or RunTable -> Export -> serve -> socket -> nbdinfo, qemu-img, nbdcopy, Client
//!                                                                  Client -> RunTable
//! ```
//!
//! A connection begins with a handshake (fixed newstyle), in which the client lists exports, agrees
//! on the form of replies, selects metadata contexts and chooses an export. Then it sends requests:
//! for data, and for the status of blocks, which comes as extents of a length and flags, for each
//! context that was selected:
//!
//! * `base:allocation`: bit 0 of the flags is a hole, bit 1 reads as zero;
//! * `qemu:dirty-bitmap:NAME`: bit 0 is dirty.
//!
//! With extended headers (clients that know them ask for them) lengths have 64 bits, so one request
//! covers the whole disk. Without them they have 32 bits.
//!
//! The protocol has no transaction: a client that closes its connection may have copied everything
//! or nothing. So a lease outlives the connections, and is committed when the program that copies
//! says so by other means, such as the end of its process with success.
//!
//! A server and its clients are in no way protected from others on the network: use a unix socket,
//! or the loopback interface.

mod client;
mod connect;
mod error;
mod export;
mod pieces;
mod server;
mod session;
mod transmit;
mod wire;

pub use client::Client;
pub use connect::Connect;
pub use error::NbdError;
pub use export::Export;
pub use server::serve;
pub use session::Session;
