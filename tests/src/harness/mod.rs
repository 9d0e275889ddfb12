//! What tests are written with: back-ends, guests, networks and counters, each a value that cleans up when it goes.

mod backend;
mod counters;
mod daemon;
mod guest;
mod network;

pub use backend::{BackEnd, Blk, Kind, Net, disk_file, sha256};
pub use counters::{
    EventCounts, IOCTL, KVM_EXIT, SYSTEM_CALL, URING_REQUEST, flushes, sum_interrupts,
};
pub use daemon::Daemon;
pub use guest::{Guest, GuestBuilder, GuestOutput, Vmm, readable};
pub use network::{Capture, Namespace, iperf3, iperf3_server};
