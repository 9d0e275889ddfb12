//! What tests are written with: back-ends, guests, networks and counters, each a value that cleans up when it goes.

mod backend;
mod counters;
mod daemon;
mod guest;
mod network;

pub use backend::{BackEnd, Blk, Net, disk_file, sha256};
pub use counters::{KvmCounts, SyscallCounter, guest_interrupts};
pub use daemon::Daemon;
pub use guest::{Guest, GuestBuilder, GuestOutput, Vmm};
pub use network::{Namespace, iperf3, iperf3_server};
