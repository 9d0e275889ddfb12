//! What tests are written with: back-ends, guests, networks, devices and counters, each a value that cleans up when it goes.

mod backend;
mod ceph;
mod control;
mod counters;
mod daemon;
mod guest;
mod held;
mod kernel_log;
mod mapped;
mod network;
mod null_blk;
mod passthrough;
mod qmp;
mod registers;
mod sriov;
mod switch;
mod testpmd;

pub use backend::{BackEnd, Blk, Kind, Net, disk_file, sha256};
pub use ceph::Ceph;
pub use control::Control;
pub use counters::{
    EventCounts, IOCTL, KVM_EXIT, KVM_MMIO, KVM_PIO, KVM_USERSPACE_EXIT, Packets, SYSTEM_CALL,
    URING_REQUEST, flushes, packets, sum_interrupts, sum_interrupts_by,
};
pub use daemon::{Daemon, threads};
pub use guest::{Guest, GuestBuilder, GuestOutput, Vmm, listens, readable};
pub use held::Held;
pub use kernel_log::{KernelLog, dma_fault};
pub use mapped::Mapped;
pub use network::{Capture, Namespace, bridge, http_server, iperf3, iperf3_server, name_server};
pub use null_blk::with_null_blk;
pub use passthrough::{Assigned, Device, PciId, VirtualFunctions, ringside_vfio};
pub use qmp::Qmp;
pub use registers::{Registers, Transfer, Width, edu_transfer, igbvf_transmit_from};
pub use sriov::{HostNamespace, Igb, NvmePf};
pub use switch::Switch;
pub use testpmd::{Testpmd, last_shown, testpmd};
