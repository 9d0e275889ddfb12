//! The daemon shell of all back-ends: command line, socket, vhost-user messages, memory, signals, logs.
//!
//! A back-end implements [`Device`] and calls `run`. Two kinds of threads exist:
//!
//! ```text
//!  control thread (the shell)                          worker threads (the device)
//!  listener, signals, vhost-user socket                one event loop each: kick, I/O, commands
//!        │   Command::Start(Vring) ─────────────────────▶ owns the ring, no lock on the data path
//!        │   Command::Stop { index, done } ─────────────▶ finishes what is in flight …
//!        ◀────────────────────────────── done.send(vring) … and gives the ring back
//! ```
//!
//! A ring that runs belongs to its worker. Whatever is to change about it (memory, addresses, call
//! eventfd, enabled or not), the shell stops the ring, changes it and starts it again.

mod device;
mod limit;
mod vring;

pub use device::{Device, DeviceError};
pub use limit::LogLimit;
pub use vring::{Command, CommandSender, Commands, Memory, Vring, command_channel};
