//! A switch: guests that are joined to each other, and to links, in one process.
//!
//! ```text
//!  guest A  tx ring ─▶ first bytes copied ─▶ rules ─▶ table ─┬─▶ rx ring of guest B    one copy, ring to ring
//!  link     bounce  ─▶                                       └─▶ link                  one system call
//! ```
//!
//! One thread owns all rings, so that no frame meets a lock; each port has a control thread and a thread for its control
//! queue besides, which sleep. Frames keep what their sender left to the hardware: a segment of 64 KiB crosses as one
//! packet without a checksum if the receiver takes it so, and is finished in software if it does not (`offload`).
//!
//! | What a guest can do | and what comes of it |
//! | --- | --- |
//! | send from the address of another port's card | dropped (`tx_forged`) |
//! | send from ever new addresses | its share of the table is full; others' entries stay (`table`) |
//! | send to everybody without end | bounded by `flood-packets` (`tx_storm`) |
//! | send with tags of VLANs that are not its own | dropped (`tx_wrong_vlan`) |
//! | hide a second tag behind the first | kept from ports that take the first off (`frame`) |
//! | take no packets | those for it are dropped (`rx_starved`); nobody waits |
//! | change a frame while it is looked at | what was looked at is what goes out (`frame`) |
//! | hand over descriptors that block (its VMM) | signalled without a wait, or refused (`signal`) |
//!
//! | Module | Its matter |
//! | --- | --- |
//! | `options` | the command line, and descriptions of ports |
//! | `hub`, `port` | what the shell sees: the switch, and each port as a device |
//! | `shared`, `counters` | what threads have in common |
//! | `worker` | the thread |
//! | `frame`, `policy`, `table` | what a frame says, whether it may, and where to |
//! | `outlet`, `offload` | how it gets there |
//! | `window` | guest memory, for copies |
//! | `signal` | interrupts that never wait |

mod counters;
mod frame;
#[cfg(feature = "fuzzing")]
pub(super) mod fuzz;
mod hub;
mod offload;
mod options;
mod outlet;
mod policy;
mod port;
mod shared;
mod signal;
mod table;
#[cfg(test)]
mod tests;
mod window;
mod worker;

#[cfg(feature = "fuzzing")]
pub use fuzz::frame as fuzz_frame;
pub use hub::{Switch, SwitchError};
pub use options::{OptionsError, SwitchArgs};
pub use port::SwitchPort;
