//! The daemon shell of all back-ends: command line, socket, vhost-user messages, memory, signals, logs.
//!
//! A back-end implements [`Device`], and its program calls [`main`]. Two kinds of threads exist:
//!
//! ```text
//!  control thread (the shell)                          worker threads (the device)
//!  listener, signals, vhost-user socket                one event loop each: kick, I/O, commands
//!        │   Command::Start(Vring) ─────────────────────▶ owns the ring, no lock on the data path
//!        │   Command::Stop { index, … } ────────────────▶ finishes what is in flight …
//!        ◀────────────────────────────── done.send(vring) … and gives the ring back
//! ```
//!
//! With --control-socket there are threads for its clients (`ringside_control`): counters they read themselves, everything
//! else they hand to the control thread and wait for its answer.
//!
//! A program with several ports (`ports`) has a control thread for each of them, so that a front-end that hangs holds up
//! nobody else.
//!
//! With --take-over it begins where another program of the same device is, which then ends (`handover`).
//!
//! A ring that runs belongs to its worker. Whatever is to change about it (memory, addresses, call
//! eventfd, enabled or not), the shell stops the ring, changes it and starts it again.
//!
//! What the other side can do, and what comes of it:
//!
//! | A guest or a front-end … | … and the back-end |
//! | --- | --- |
//! | breaks a ring | stops that ring and signals its error eventfd; the others go on |
//! | sends a message that cannot be obeyed, and wants a reply | refuses it; the connection goes on |
//! | sends one without wanting a reply, or garbage, or half a message | ends the connection; the next front-end is served |
//! | does not read its answers | ends the connection after two seconds |
//! | sends descriptors that are always ready in place of an eventfd | refuses them |
//! | leaves with requests in flight | waits for their end before guest memory is unmapped |
//! | truncates the file of guest memory | goes on with zeroes there, and ends the connection (`torn`) |
//! | shares memory whose pages others bring, with a process that serves several | refuses it (`memory`) |
//! | gives a dirty log that is too short for its guest | refuses it, or the memory that is too much for it (`dirty`) |
//! | leaves notes about requests in flight that make no sense | does not start that ring; the others go on (`inflight`) |
//! | gives a descriptor for the device's state that is full, or never ends | has a thread wait for it, for five seconds, and refuses (`state`) |
//! | sends an eventfd that blocks | wakes the worker by a signal when it wants the ring back |
//! | does any of this without end | logs a few lines in ten seconds ([`LogLimit`]) |

mod confine;
mod control;
mod counter;
mod daemon;
mod device;
mod dirty;
#[cfg(feature = "fuzzing")]
#[doc(hidden)]
pub mod fuzz;
mod handler;
mod handover;
mod inflight;
mod limit;
mod lock;
mod log;
mod memory;
mod options;
mod placement;
mod poll;
mod ports;
mod prefetch;
mod rate;
mod session;
mod socket;
mod state;
mod torn;
mod uring;
mod vring;

pub use confine::confine;
pub(crate) use confine::confined;
pub use control::Statistics;
pub use counter::Counter;
pub(crate) use counter::{go_on as counters_go_on, to_json as counters_to_json};
pub use daemon::{ShellError, main, main_with, run};
pub use device::{Device, DeviceError, Drained, OpenError, WorkerThread, config_range};
pub(crate) use dirty::{GuestSlice, is_logged, mark_pieces, mark_slices};
pub use dirty::{LogError, Memory, PageLog, PageSlice};
pub use handler::HandlerError;
pub use handover::{Parts, TakeOverError, TalkError};
pub(crate) use handover::{now, same};
pub use limit::LogLimit;
pub(crate) use lock::set_lock;
pub use memory::MemoryError;
pub use options::{LogFormat, OnOff, Program, ShellArgs};
pub use placement::PlacementError;
pub(crate) use poll::{PollLimits, PollWindow};
pub use ports::{Hub, OpenPort, PortError, PortOptions, UplinkControl, run_ports};
pub(crate) use prefetch::{MOST_PREFETCHED, prefetch_to_read, prefetch_to_write};
pub use rate::{Bucket, LimitError, NamedRates, Rate};
pub use ringside_control::Chain;
pub use session::SessionError;
pub use socket::SocketError;
pub use state::StateError;
pub(crate) use state::{open as open_state, seal as seal_state};
pub(crate) use uring::{
    IORING_REGISTER_BUFFERS, IORING_REGISTER_FILES, IORING_UNREGISTER_BUFFERS, restricted,
};
pub use vring::{Command, CommandSender, Commands, Vring, command_channel, signal};
