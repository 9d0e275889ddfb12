//! The network device: a driver's virtqueues on one side, a TAP interface on the other.
//!
//! May depend on the shell and the rings. A packet's way, with no copy of ours in it:
//!
//! ```text
//!            guest memory                     one thread for each queue pair           kernel
//!  transmit  [header│frame in any pieces] ──▶ tx: take chains ─── a ring of writes ───▶ TAP queue
//!  receive   [buffers in a row]           ◀── rx: readv over them ◀── filter ───────── TAP queue
//!  control   [class│command│data][ack]    ──▶ one thread more: settings, for all pairs at once
//! ```
//!
//! The virtio-net header stands before each packet on both sides (IFF_VNET_HDR), so that checksums and
//! segments pass as they are: a segment of 64 KiB is one chain, one read or write and one packet of the kernel.
//!
//! A guest that goes on with a new connection (its front-end or this program was replaced, or it migrated) is asked to
//! announce itself to the network, if its front-end passes on changes of the configuration space (protocol features
//! CONFIG and BACKEND_REQ) and its control queue is served here. QEMU keeps both to itself and asks its guests on its own.
//!
//! | Module | Its matter |
//! | --- | --- |
//! | `args` | the command line |
//! | `link` | what stands behind the card: a TAP interface, or another link |
//! | `iov` | scatter/gather lists in guest memory |
//! | `features`, `config` | what is offered, configuration space |
//! | `control`, `filter`, `settings` | commands, which packets pass, and how workers learn of it |
//! | `state` | what goes with a guest that moves |
//! | `tx`, `rx`, `ring` | the data path |
//! | `hash`, `steering` | hashes of packets, and receive-side scaling |
//! | `coalesce` | interrupts that are held back |
//! | `limits` | limits of rates |
//! | `rarp` | making a guest known that has moved |
//! | `worker`, `control_worker`, `epoll_set` | the threads |
//! | `device` | what the shell sees |
//! | `switch` | several guests, joined to each other |

mod args;
mod coalesce;
mod config;
mod control;
mod control_worker;
mod counters;
mod device;
mod epoll_set;
mod features;
mod filter;
#[cfg(feature = "fuzzing")]
#[doc(hidden)]
pub mod fuzz;
mod hash;
mod iov;
mod limits;
mod link;
mod rarp;
mod ring;
mod rx;
mod settings;
mod state;
mod steering;
mod switch;
#[cfg(test)]
mod tests;
mod tx;
mod worker;

pub use args::{ArgsError, Cidr, CidrError, NetArgs, Offload};
pub use config::{MacAddress, MacError};
pub use device::Net;
pub use link::{
    Forward, ForwardError, LinkError, LinkSpec, LinkSpecError, PacketError, PasstError, PcapError,
    Tap, TapError, TapQueue, XdpError, finish_captures, start_passt,
};
pub use switch::{OptionsError, Switch, SwitchArgs, SwitchError, SwitchPort};
